"""A W&B workspace that compares the runs of a project: `selfalign-workspace ENTITY/PROJECT`.

It needs the extra `workspace`. Without an API key, or if WANDB_MODE forbids it, it is built and checked, but not sent.
"""

from typing import TYPE_CHECKING, Any

from selfalign.core.errors import SelfalignError
from selfalign.metrics import catalog
from selfalign.tracking.wandb import SETTING, has_key, is_online

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

NAME = "selfalign comparison"
LAMBDA = "loss.lam"
RUN_SETTINGS = ("choices.value.loss", "loss.value.lam", "loss.value.beta", "choices.value.judge", "seed.value")
"""Settings in the table of runs. W&B stores the value of each top-level key as `value`."""

OVER_LAMBDA = (
    catalog.EVAL_WIN_RATE,
    catalog.EVAL_WIN_RATE_LENGTH_CONTROLLED,
    catalog.REWARDS_MARGINS,
    catalog.REWARDS_ACCURACIES,
    catalog.over(catalog.HELD_OUT, catalog.REWARDS_ACCURACIES),
    catalog.over(catalog.PREFERENCES, catalog.REWARDS_ACCURACIES),
)
"""Metrics of the last model, a point for each run over λ and a bar for each setting, the mean over its seeds."""

CURVES = (
    catalog.REWARDS_MARGINS,
    catalog.REWARDS_ACCURACIES,
    catalog.REWARDS_ACCURACIES_AUGMENTED,
    catalog.REFINEMENT_MEAN,
    catalog.LOSS,
)
"""Metrics of training steps, one line for each λ."""

BY_ITERATION = (
    catalog.EVAL_WIN_RATE,
    catalog.EVAL_MEAN_CHARACTERS,
    catalog.JUDGE_QUALITY_PAIRWISE_ACCURACY,
    catalog.JUDGE_QUALITY_EXACT_MATCH,
    catalog.JUDGE_QUALITY_SPEARMAN,
    catalog.JUDGE_QUALITY_KENDALL,
    catalog.JUDGE_MEAN_SCORE,
)
"""Metrics of models, of which each setting has one line, the mean over its seeds."""


def build(entity: str, project: str) -> "Workspace":
    """Build the workspace: win rate over λ and by setting, curves by λ, the judge by iteration, settings that differ.

    Runs that differ only in their seed are one setting: the mean, ± its standard error over the seeds, which is what
    W&B can compute. Intervals that count the instructions too are on the comparison page.
    """
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    by_lambda = panels.Config(LAMBDA)
    over_seeds: dict[str, Any] = {
        "groupby": panels.Config(SETTING),
        "groupby_aggfunc": "mean",
        "groupby_rangefunc": "stderr",
    }
    sections: dict[str, list[Any]] = {
        "Over λ": [
            panels.ScatterPlot(title=f"{metric.panel} over λ", x=by_lambda, y=panels.SummaryMetric(metric.name))
            for metric in OVER_LAMBDA
        ],
        "By setting": [
            panels.BarPlot(title=f"{metric.panel} by setting", metrics=[metric.name], **over_seeds)
            for metric in OVER_LAMBDA
        ],
        "Training by λ": [
            panels.LinePlot(
                title=f"{metric.panel} by λ", x="Step", y=[metric.name], groupby=by_lambda, groupby_aggfunc="mean"
            )
            for metric in CURVES
        ],
        "By iteration": [
            panels.LinePlot(title=f"{metric.panel} by iteration", x=metric.axis, y=[metric.name], **over_seeds)
            for metric in BY_ITERATION
        ],
        "Settings that differ": [panels.RunComparer(diff_only=True)],
    }
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[workspaces.Section(name=name, panels=made, is_open=True) for name, made in sections.items()],
        runset_settings=workspaces.RunsetSettings(
            order=[workspaces.Ordering(workspaces.Summary(catalog.EVAL_WIN_RATE.name), ascending=False)],
            pinned_columns=[
                "run:group",
                *(f"config:{key}" for key in RUN_SETTINGS),
                f"summary:{catalog.EVAL_WIN_RATE.name}",
            ],
        ),
    )


def as_sent(workspace: "Workspace") -> dict[str, Any]:
    """Return the workspace in the format of W&B. The conversion validates it."""
    return workspace._to_model().model_dump(by_alias=True, mode="json")


def publish(entity: str, project: str) -> str:
    """Send the workspace if W&B is online. Return its address, or why it was not sent.

    Raises:
        SelfalignError: the extra is not installed, or W&B refuses the workspace.
    """
    try:
        workspace = build(entity, project)
    except ModuleNotFoundError as error:
        raise SelfalignError(f"{error}. Install the extra: pip install 'selfalign[workspace]'") from error
    views = sum(len(section.panels) for section in workspace.sections)
    as_sent(workspace)
    if not is_online():
        missing = "unset WANDB_MODE and WANDB_DISABLED" if has_key() else "set WANDB_API_KEY"
        return f"{views} panels for {entity}/{project}, built and valid, but not sent: {missing} and repeat the command"
    import wandb

    try:
        workspace.save()
    except wandb.Error as error:
        raise SelfalignError(f"{entity}/{project}: Weights & Biases refuses the workspace ({error})") from error
    return f"{views} panels: {workspace.url}"
