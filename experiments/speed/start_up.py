"""How much of a run is loading: seconds in which its engines start and its models are read, by who needs them.

`python experiments/speed/start_up.py experiment=smoke iterations=10 …` runs selfalign with these arguments and prints a
table, and a digest of all texts that the run wrote. What the run finds in its store is not loaded and not counted.
vLLM takes no heads as narrow as the tiny model's: `--wide FOLDER` writes one with wider heads there and runs with it.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import LlamaForCausalLM

from selfalign.cli.main import main as selfalign
from selfalign.core.files import digest_json
from selfalign.engines.protocol import Completion
from selfalign.engines.transformers import Transformers, TransformersGenerator
from selfalign.engines.vllm_engine import VLLM, VLLMGenerator
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.config import ModelConfig
from selfalign.models.pretrained import fetch_pretrained
from selfalign.runs.summary import table

LOADERS = {
    "engines to write": ((Transformers, "load"), (VLLM, "load")),
    "engines to score": ((Transformers, "load_scorer"), (VLLM, "load_scorer")),
    "models for training and metrics": ((PolicyCheckpoint, "load"),),
}


def main() -> None:
    """Run the experiment with a watch on whatever loads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wide", type=Path, metavar="FOLDER")
    asked, overrides = parser.parse_known_args()
    if asked.wide:
        write_wide(asked.wide)
        overrides += ["model=pretrained", f"model.path={asked.wide}"]
    sys.argv[1:] = overrides
    seconds, times, texts = dict.fromkeys(LOADERS, 0.0), Counter[str](), list[Any]()
    for name, loaders in LOADERS.items():
        for owner, method in loaders:
            setattr(owner, method, timed(getattr(owner, method), name, seconds, times))
    for owner in (TransformersGenerator, VLLMGenerator):
        owner.generate = kept(owner.generate, texts)
    began = time.monotonic()
    try:
        selfalign()
    finally:
        whole = time.monotonic() - began
        rows = [[name, str(times[name]), f"{seconds[name]:.2f}", f"{seconds[name] / whole:.1%}"] for name in LOADERS]
        print(*table(["loaded", "times", "seconds", "share"], [*rows, ["the run", "", f"{whole:.2f}", ""]]), sep="\n")
        print(f"{len(texts)} batches of texts, digest {digest_json(texts)[:12]}")


def write_wide(folder: Path) -> None:
    """Write a random model like the tiny one, with heads of 32."""
    with TemporaryDirectory() as made:
        tiny = fetch_pretrained(ModelConfig(path="random:tiny"), Path(made))
        config: Any = tiny.load("float32").model.config
        config.update({"hidden_size": 128, "head_dim": 32})
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
        tiny.load_tokenizer().save_pretrained(folder)


def timed(load: Callable[..., Any], name: str, seconds: dict[str, float], times: Counter[str]) -> Callable[..., Any]:
    """Return a loader that is counted. A model that an engine loads counts as the engine's."""

    def watched(*args: Any, **kwargs: Any) -> Any:
        began, before = time.monotonic(), (seconds.copy(), times.copy())
        loaded = load(*args, **kwargs)
        seconds.update(before[0])
        times.clear()
        times.update(before[1])
        seconds[name] += time.monotonic() - began
        times[name] += 1
        return loaded

    return watched


def kept(generate: Callable[..., list[list[Completion]]], texts: list[Any]) -> Callable[..., list[list[Completion]]]:
    """Return a writer whose texts are kept."""

    def watched(*args: Any) -> list[list[Completion]]:
        written = generate(*args)
        texts.append([[made.ids for made in group] for group in written])
        return written

    return watched


if __name__ == "__main__":
    main()
