"""Metrics as weighted sums that processes and batches add up, and the averages they come to."""

import math

Sums = dict[str, tuple[float, float]]
"""{metric: (weighted sum, weight)}: what unequal batches add up to the same averages as one large one."""

LENGTH_MOMENTS = "rewards/length_moments/"
"""Begins the names of five means: reward, tokens, both squared, and their product, in this order."""


def add_sums(metrics: Sums, others: Sums) -> Sums:
    """Both together."""
    names = [*metrics, *(name for name in others if name not in metrics)]
    pairs = {name: (metrics.get(name, (0.0, 0.0)), others.get(name, (0.0, 0.0))) for name in names}
    return {name: (a[0] + b[0], a[1] + b[1]) for name, (a, b) in pairs.items()}


def averages(metrics: Sums) -> dict[str, float]:
    """Weighted sums as averages; a metric without weight is left out instead of being NaN.

    The second moments of Δ and the margin become Δ's standard deviation and their Pearson correlation, which is
    left out where one of them is constant; likewise those of reward and length.
    """
    values = {name: total / weight for name, (total, weight) in metrics.items() if weight}
    square_margin = values.pop("rewards/mean_square_margin", 0.0)
    if "refinement/mean_square" in values:
        delta, margin = values["refinement/mean"], values["rewards/margins"]
        square, product = values.pop("refinement/mean_square"), values.pop("refinement/mean_product")
        values["refinement/std"] = math.sqrt(max(0.0, square - delta**2))
        correlation = _pearson(delta, margin, square, square_margin, product)
        if correlation is not None:
            values["refinement/correlation_with_margin"] = correlation
    moments = [values.pop(name) for name in list(values) if name.startswith(LENGTH_MOMENTS)]
    if moments and (correlation := _pearson(*moments)) is not None:
        values["rewards/length_correlation"] = correlation
    return values


def _pearson(x: float, y: float, square_x: float, square_y: float, product: float) -> float | None:
    """Pearson's correlation from means, mean squares and mean product; None where one side is constant."""
    variance_x, variance_y = square_x - x**2, square_y - y**2
    if variance_x <= 1e-12 * square_x or variance_y <= 1e-12 * square_y:
        return None
    return min(1.0, max(-1.0, (product - x * y) / math.sqrt(variance_x * variance_y)))
