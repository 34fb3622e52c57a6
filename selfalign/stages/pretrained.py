"""pretrained: model config → M0."""

from selfalign.models import ModelConfig, PolicyFiles, fetch_pretrained
from selfalign.store import Counts, Workspace


def pretrained(out: Workspace, *, model: ModelConfig, source: str) -> Counts:
    """Fetches, converts or builds M0 and checks that it loads.

    Args:
        out: gets `weights/`, `tokenizer/` and `weights.json`.
        model: where M0 comes from.
        source: digest of the files it comes from; another content under the same path is another M0.
    """
    fetch_pretrained(model, out.path)
    # In main memory, for one GPU may be too small; only quantising it there would take long.
    loaded = PolicyFiles(out.path).load(model.dtype, device="cpu" if model.quantization == "none" else "")
    return {"parameters": loaded.model.num_parameters()}  # which also counts those that share a byte
