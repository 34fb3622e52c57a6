"""load_model: a model's settings → M0 and its capabilities, or another model from outside."""

from selfalign.engines.model_check import check_model, check_reward_model
from selfalign.models.config import ModelConfig
from selfalign.models.pretrained import fetch_pretrained
from selfalign.models.reward_model import RewardHead, fetch_reward_model
from selfalign.store.artifacts import Content, Counts, StageOutput
from selfalign.store.stage import Size, stage


def size(*, model: ModelConfig, **others: object) -> Size:
    """Return the model's path."""
    return Size(model.path, {})


@stage(size=size)
def load_model(
    out: StageOutput, *, model: ModelConfig, source: Content | str, head: RewardHead | None = None
) -> Counts:
    """Download, convert or build M0, and test its capabilities.

    Args:
        out: receives `weights/`, `tokenizer/`, `weights.json` and, of a model that writes, `capabilities.json`.
        model: the model's settings.
        source: digest of the model's files. Other files under the same path are another M0.
        head: how the logits of a reward model are summed; None for a causal language model.

    Raises:
        SelfalignError: the model does not exist, or it cannot be used.
    """
    if head is not None:
        return check_reward_model(fetch_reward_model(model, out.path, "judge.model"), model.dtype, head)
    return check_model(fetch_pretrained(model, out.path), model.dtype)
