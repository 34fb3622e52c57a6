"""What is measured, and where it goes.

Names of training metrics are TRL's where TRL has them. Every row of `metrics.jsonl` has `step` (one count over the
whole run), `stage`, `iteration` and the values; `METRICS` says what each value means. `held_out/NAME` is NAME over the
pairs that were set aside, `preferences/NAME` over those of `evaluate.preferences` (there Δ is summed over tokens
whatever `loss.reduction` is, so that losses compare), `NAME_low` and `NAME_high` are the ends of its 95 % interval.
`eval/` numbers of head-to-head comparisons are against M1; with `_vs_previous` against M_{t-1}, with `_vs_given`
against the outputs of `evaluate.against`.
BENCHMARK stands for the name of a benchmark, such as mt_bench, whose judge counts what is `judge/…` elsewhere.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from scipy import stats

from selfalign.core.records import Judgement
from selfalign.metrics.intervals import RunningMean, distinct, length_controlled, wilson

METRICS = {
    "context": "the longest sequence M0 takes, in tokens",
    "dropout": "whether M0 has dropout that can be set",
    "chat_template": "whether M0's tokenizer has a chat template",
    "system_turns": "whether that template takes system turns",
    "earlier_turns": "whether that template takes turns before the last question",
    "loss": "the optimised loss of the step, averaged over its pairs (or target tokens, or demonstrations)",
    "loss_per_token": "negative log-likelihood of a target token, nats",
    "learning_rate": "learning rate of the step",
    "grad_norm": "norm of the gradient before clipping",
    "rewards/chosen": "mean β[log π - log π_ref] of the chosen responses",
    "rewards/rejected": "mean β[log π - log π_ref] of the rejected responses",
    "rewards/margins": "mean reward of the chosen minus that of the rejected responses",
    "rewards/margins_per_token": "the same with each reward divided by its response's tokens",
    "rewards/accuracies": "share of pairs whose chosen response has the larger reward; a tie counts as not",
    "rewards/ties": "share of pairs with equal rewards",
    "rewards/accuracies_augmented": "share of pairs with Δ > 0, that is accuracy under p⊕x; Δ = 0 counts as not",
    "rewards/ties_augmented": "share of pairs with Δ = 0",
    "refinement/mean": "mean of Δ over the pairs, in units of reward; of reward a token with loss.reduction=mean",
    "refinement/std": "standard deviation of Δ over the pairs of a step, in the same units",
    "refinement/correlation_with_margin": "Pearson's, of Δ and summed reward margin over the pairs of a step",
    "logps/chosen": "mean summed log-probability of the chosen responses, nats",
    "logps/rejected": "mean summed log-probability of the rejected responses, nats",
    "logps/chosen_change": "log π of the chosen responses trained on, after alignment minus before, mean nats a pair",
    "logps/chosen_change_per_token": "the same a token: all their nats over all their tokens",
    "logps/rejected_change": "log π of the rejected responses trained on, after alignment minus before, nats a pair",
    "logps/rejected_change_per_token": "the same a token: all their nats over all their tokens",
    "rewards/length_correlation": "Pearson's, of implicit reward and tokens over both responses of the training pairs",
    "tokens_per_second": "tokens trained on a second; those of a second pass (p⊕x) count too",
    "step_seconds": "wall time of an optimiser step; checkpoints and their comparison are left out",
    "peak_memory_gb": "the most memory so far of any process, GiB: of its GPU, or resident where there is none",
    "token_accuracy": "share of target tokens that were the most likely ones",
    "held_out_pairs": "preference pairs set aside, which share no prompt and no response with others",
    "held_out_passed_over": "pairs that could not be, for they share one with SFT data or pairs trained on before",
    "chosen_step": "optimiser step whose policy was taken, where checkpoints are compared",
    "checkpoint_win_rate/N": "validation instructions that the checkpoint after N steps won against the one before it",
    "checkpoint_wins/N": "how many it won, in both orders",
    "checkpoint_losses/N": "how many it lost, in both orders; where these are too many, training stopped there",
    "prompts_cut": "pairs whose prompt lost its beginning to fit into train.align.max_length",
    "prompts_cut_behind_p": "pairs whose prompt is shorter behind p, to fit into the model's context",
    "novelty": "1 minus an instruction's highest ROUGE-L F1 to a seed or one kept before it, mean over the new ones",
    "distinct_1": "different words among all words of an iteration's new instructions (Li et al. 2016, 1510.03055)",
    "distinct_2": "the same of pairs of adjoining words; both fall as the count grows, so compare equal counts",
    "mean_words": "mean length of the new instructions, words",
    "mean_tokens": "mean length of the responses, tokens",
    "mean_characters": "mean length of the responses, characters",
    "finished_share": "share of responses that end by themselves",
    "pairs": "preference pairs trained on",
    "candidate_pairs": "pairs the rule would make of all responses: those kept and those dropped, by reason",
    "mean_score_margin": "mean difference of the judge's scores in a pair",
    "mean_length_difference": "mean length of chosen minus rejected responses, tokens",
    "score_length_correlation": "Spearman's, of the candidates' score and tokens, mean over instructions",
    "judge/mean_score": "mean score of the candidates",
    "judge/std_score": "standard deviation of the scores",
    "judge/entropy": "mean entropy of the judge's score distribution, nats",
    "judge/variance": "mean variance of a response's judgements, where it has several valid ones",
    "judge/score_entropy": "entropy of the responses' scores, nats: 0 where all are the same",
    "judge/tied_share": "share of instructions with several responses whose scores are all equal",
    "judge/constant": "1 where the judge says nearly the same of everything (`judge.alarm`), else 0",
    "judge/position_bias": "share of comparisons in which, even so, the same place won in both orders",
    "judge/place_preference": "by how many nats a pairwise judge prefers the first place",
    "judge/tied_comparisons": "share of comparisons that are ties, disagreeing orders included",
    "judge/alpha": "what the implicit reward loses for each token of the response",
    "judge/requests": "judgements an external judge was asked for",
    "judge/requests_without_usage": "those whose answer told no token counts",
    "judge/prompt_tokens": "tokens an external judge read",
    "judge/completion_tokens": "tokens an external judge wrote",
    "judge/cost": "what these tokens cost, by the prices of `judge.endpoint`",
    "wins": "of one comparison of two models: instructions won in both orders",
    "ties": "instructions with a tie, or with orders that disagree",
    "losses": "instructions lost in both orders",
    "win_rate": "share of instructions won head to head, a tie counts half",
    "win_rate_length_controlled": "win rate to expect at equal length: a logistic model of length and outcome",
    "mean_characters_opponent": "mean length of the opponent's answers, characters",
    "eval/win_rate": "share of evaluation instructions won head to head against M1, a tie counts half",
    "eval/win_rate_length_controlled": "win rate to expect at equal length: a logistic model of length and outcome",
    "eval/wins": "instructions won head to head, in both orders",
    "eval/ties": "instructions with a tie, or with orders that disagree",
    "eval/losses": "instructions lost in both orders",
    "eval/position_bias": "share of comparisons in which the same place won in both orders",
    "eval/score_win_rate": "share of instructions whose answer scores above M1's, a tie counts half",
    "eval/score_win_rate_length_controlled": "the same to expect at equal length",
    "eval/length_growth": "mean length of the answers as a multiple of M1's",
    "eval/distinct_2": "different pairs of adjoining words (characters, where a script has no spaces) of the answers",
    "eval/repeated_4": "share of runs of four words (or such characters) that stood before in the same answer",
    "eval/kl_to_m1": "log π - log π_M1 of the model's own answers, nats an answer: an estimate of KL(π ‖ M1)",
    "eval/kl_to_m1_per_token": "the same a token",
    "eval/answers": "evaluation instructions answered",
    "eval/mean_score": "mean score of the answers, by the evaluation's judge",
    "eval/mean_characters": "mean length of the answers, characters",
    "eval/finished_share": "share of answers that end by themselves",
    "eval/score_length_correlation": "Spearman's, of score and length in characters over the answers",
    "preferences/pairs": "pairs of `evaluate.preferences` measured",
    "preferences/scored": "those of them whose responses both have a score",
    "preferences/margin_score_pearson": "Pearson's correlation of margin and score difference, over the scored pairs",
    "preferences/margin_score_spearman": "Spearman's of the same",
    "preferences/delta_score_pearson": "Pearson's correlation of Δ and score difference, over the scored pairs",
    "preferences/delta_score_spearman": "Spearman's of the same",
    "crossed/BOUND": "a number beyond `evaluate.limits.BOUND`, there only where it is crossed",
    "judge_quality/pairwise_accuracy": "share of answer pairs ordered as the humans did, a tie counts as not",
    "judge_quality/five_best": "how often an answer at the top of the scale is the humans' best",
    "judge_quality/exact_match": "share of questions whose whole order is the humans'",
    "judge_quality/spearman": "Spearman's ρ with the human order, mean over questions",
    "judge_quality/kendall": "Kendall's τ-b with the human order, mean over questions",
    "judge_quality/questions": "questions measured",
    "judge_quality/unjudged": "questions left out because an answer carries no score",
    "judge_quality/undefined": "questions left out of the two correlations because all scores are equal",
    "calibration/parsed": "share of judgements that carry a score",
    "calibration/spread": "entropy of how often each whole score was given, nats; 0 for a constant judge",
    "calibration/ties": "share of answer pairs of a question with equal scores",
    "calibration/position_bias": "share of comparisons where the same place won in both orders, of a pairwise judge",
    "calibration/self_consistency": "share of pairs of judgements of one answer that give the same score",
    "calibration/length_correlation": "Spearman's, of score and length in characters, mean over questions",
    "calibration/score_of_rank/N": "mean score of the answers that humans ranked N-th",
    "BENCHMARK/questions": "questions of a benchmark that were asked",
    "BENCHMARK/score": "mean grade of its answers, 1 to 10, by its judge",
    "BENCHMARK/turn_N": "the same of the answers to the N-th turns",
    "BENCHMARK/CATEGORY": "the same of the answers to a category's questions, all turns together",
    "BENCHMARK/referenced": "answers that were graded beside reference answers",
    "BENCHMARK/mean_characters": "mean length of the answers, characters",
    "BENCHMARK/finished_share": "share of the answers that end by themselves",
    "BENCHMARK/TASK/METRIC": "lm-eval's number of a task, its interval ± 1.96 standard errors",
    "BENCHMARK/TASK/documents": "documents of the task that were asked",
    "BENCHMARK/TASK/prompts_cut": "requests whose prompt lost its beginning to fit into the context",
    "BENCHMARK/average": "mean of the tasks' numbers, its interval as of independent tasks",
    "seconds": "wall time of the stage when it ran",
}


def meaning_in_benchmark(metric: str) -> str:
    """What METRICS says of a benchmark's metric, given its name behind the benchmark's."""
    common = re.sub(r"_\d+$", "_N", metric)
    return METRICS.get(f"BENCHMARK/{common}") or METRICS.get(metric) or METRICS["BENCHMARK/CATEGORY"]


def instruction_statistics(texts: Sequence[Sequence[str]], highest: Sequence[float]) -> dict[str, float]:
    """How new, how varied and how long instructions are.

    Args:
        texts: their words; there is at least one instruction.
        highest: the highest ROUGE-L F1 of each to anything known before it.
    """
    varied = {f"distinct_{size}": distinct(texts, size) for size in (1, 2)}
    return {
        "novelty": 1 - math.fsum(highest) / len(highest),
        **{name: value for name, value in varied.items() if value is not None},
        "mean_words": sum(map(len, texts)) / len(texts),
    }


def judgement_statistics(judgements: Iterable[Judgement]) -> dict[str, float]:
    """Mean, spread and (where the judge has one) entropy of the scores."""
    scores, entropies = RunningMean(), RunningMean()
    for judgement in judgements:
        if judgement.score is not None:
            scores.add(judgement.score)
        if judgement.entropy is not None:
            entropies.add(judgement.entropy)
    if scores.value is None:
        return {}
    statistics = {"judge/mean_score": scores.value, "judge/std_score": scores.deviation}
    return statistics | ({} if entropies.value is None else {"judge/entropy": entropies.value})


def outcomes_by_score(scores: dict[str, float], others: dict[str, float]) -> dict[str, float]:
    """{instruction id: 1 where the score is the higher one, 0 where it is the lower, ½ if equal}, of those in both."""
    both = sorted(scores.keys() & others.keys())
    return {name: (scores[name] > others[name]) + (scores[name] == others[name]) / 2 for name in both}


def win_statistics(outcomes: Sequence[float], longer: Sequence[float]) -> dict[str, float]:
    """Wins, ties and losses, and the win rates with their intervals, a tie counting half; no rate without outcomes.

    Args:
        outcomes: of each instruction: 1 won, ½ tied, 0 lost.
        longer: characters of the answer minus those of the opponent's.
    """
    counts: dict[str, float] = {
        name: outcomes.count(value) for name, value in (("wins", 1.0), ("ties", 0.5), ("losses", 0.0))
    }
    if not outcomes:
        return counts
    equal = length_controlled(outcomes, longer).known("win_rate_length_controlled")
    return counts | wilson(math.fsum(outcomes), len(outcomes)).named("win_rate") | equal


Sums = dict[str, tuple[float, float]]
"""{metric: (weighted sum, weight)}: what unequal batches add up to the same averages as one large one."""

LENGTH_MOMENTS = "rewards/length_moments/"
"""Begins the names of five means: reward, tokens, both squared, and their product, in this order."""


def reward_metrics(
    chosen: Sequence[float],
    rejected: Sequence[float],
    refinements: Sequence[float] | None = None,
    *,
    chosen_tokens: Sequence[float] = (),
    rejected_tokens: Sequence[float] = (),
) -> Sums:
    """Sums and weights of the reward metrics over pairs.

    Args:
        chosen: rewards β[log π - log π_ref] of the chosen responses.
        rejected: of the rejected ones.
        refinements: Δ of each pair, where the loss has one.
        chosen_tokens: lengths of the chosen responses; without them there is no margin a token.
        rejected_tokens: of the rejected ones.
    """
    total = float(len(chosen))
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    metrics = {
        "rewards/chosen": (math.fsum(chosen), total),
        "rewards/rejected": (math.fsum(rejected), total),
        "rewards/margins": (math.fsum(margins), total),
        "rewards/mean_square_margin": (math.fsum(margin * margin for margin in margins), total),
        "rewards/accuracies": (float(sum(margin > 0 for margin in margins)), total),
        "rewards/ties": (float(sum(margin == 0 for margin in margins)), total),
    }
    if chosen_tokens:
        lengths = zip(chosen, rejected, chosen_tokens, rejected_tokens, strict=True)
        metrics["rewards/margins_per_token"] = (math.fsum(a / n - b / m for a, b, n, m in lengths), total)
    if refinements is not None:
        metrics |= {
            "refinement/mean": (math.fsum(refinements), total),
            "refinement/mean_square": (math.fsum(delta * delta for delta in refinements), total),
            "refinement/mean_product": (math.fsum(d * m for d, m in zip(refinements, margins, strict=True)), total),
            "rewards/accuracies_augmented": (float(sum(delta > 0 for delta in refinements)), total),
            "rewards/ties_augmented": (float(sum(delta == 0 for delta in refinements)), total),
        }
    return metrics


def logp_changes(name: str, changes: Sequence[float], tokens: Sequence[float]) -> Sums:
    """How much log π of responses has changed: nats a response, and nats a token.

    Args:
        name: "chosen" or "rejected".
        changes: of each response, nats summed over its tokens.
        tokens: how many these are.
    """
    total = math.fsum(changes)
    return {
        f"logps/{name}_change": (total, float(len(changes))),
        f"logps/{name}_change_per_token": (total, math.fsum(tokens)),
    }


def length_moments(rewards: Sequence[float], tokens: Sequence[float]) -> Sums:
    """What `averages` makes `rewards/length_correlation` of: moments of the responses' rewards and lengths."""
    count = float(len(rewards))
    parts = {
        "reward": rewards,
        "tokens": tokens,
        "square_reward": [reward * reward for reward in rewards],
        "square_tokens": [length * length for length in tokens],
        "product": [reward * length for reward, length in zip(rewards, tokens, strict=True)],
    }
    return {f"{LENGTH_MOMENTS}{part}": (math.fsum(values), count) for part, values in parts.items()}


def signed(name: str) -> tuple[str, int]:
    """(metric, 1), or of "-metric", which should be low, (metric, -1): the best has the highest value times that."""
    return name.removeprefix("-"), -1 if name.startswith("-") else 1


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


def reward_intervals(metrics: Sums) -> dict[str, float]:
    """The ends of 95 % intervals, as `…_low` and `…_high`: Wilson's for shares, Student's t for the mean margin.

    Both take the pairs as independent of each other, as those are that are held out: one of each instruction.
    """
    intervals: dict[str, float] = {}
    for name in ("rewards/accuracies", "rewards/accuracies_augmented"):
        total, weight = metrics.get(name, (0.0, 0.0))
        if weight:
            share = wilson(total, int(weight))
            intervals |= {f"{name}_low": share.low, f"{name}_high": share.high}
    total, pairs = metrics["rewards/margins"]
    if pairs > 1:
        mean = total / pairs
        variance = max(0.0, metrics["rewards/mean_square_margin"][0] / pairs - mean**2) * pairs / (pairs - 1)
        half = float(stats.t.ppf(0.975, pairs - 1)) * math.sqrt(variance / pairs)
        intervals |= {"rewards/margins_low": mean - half, "rewards/margins_high": mean + half}
    return intervals


def score_histogram(scores: Sequence[float], low: int, high: int, parts: int = 1) -> list[int]:
    """How many scores round to each whole one from `low` to `high`, or to each of so many parts of a point."""
    rounded = Counter(round(score * parts) for score in scores)
    return [rounded[place] for place in range(low * parts, high * parts + 1)]
