"""load_model: model config → M0, checked."""

from selfalign.engines.model_check import check_model
from selfalign.models.config import ModelConfig
from selfalign.models.pretrained import fetch_pretrained
from selfalign.store.artifacts import Content, Counts, StageOutput
from selfalign.store.stage import Size, stage


def size(*, model: ModelConfig, **others: object) -> Size:
    """A model from outside."""
    return Size(model.path, {})


@stage(size=size)
def load_model(out: StageOutput, *, model: ModelConfig, source: Content | str) -> Counts:
    """Fetches, converts or builds M0, and checks what it can do.

    Args:
        out: gets `weights/`, `tokenizer/`, `weights.json` and `capabilities.json`.
        model: where M0 comes from.
        source: what the files hold that it comes from; another content under the same path is another M0.

    Raises:
        SelfalignError: there is no such model, or it cannot be aligned.
    """
    return check_model(fetch_pretrained(model, out.path), model.dtype)
