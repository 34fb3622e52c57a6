"""In the place of vLLM where that is not installed: what selfalign's worker script uses of it, without a model.

A completion depends on its prompt, its seed and the sampling alone. Options of LLM that vLLM does not have make it
fail: `report`, a file that gets what it was started with, beside one with the suffix .calls that gets what else it was
told; `fails_at`, the question at which it does, 0 for the start; `hangs_at`, the same for one that it never answers.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

__version__ = "0.0.0"

VOCABULARY = range(3, 1024)


@dataclass(kw_only=True)
class SamplingParams:
    seed: int
    temperature: float
    max_tokens: int
    detokenize: bool
    ignore_eos: bool
    top_p: float = 1.0
    stop_token_ids: list[int] = field(default_factory=list)
    logprob_token_ids: list[int] = field(default_factory=list)
    logit_bias: dict[int, float] | None = None


class LLM:
    def __init__(self, *, report: str = "", fails_at: int = -1, hangs_at: int = -1, **arguments: Any) -> None:
        self.report, self.blocks_in_use = report, arguments.pop("blocks_in_use", False)
        self.fails_at, self.hangs_at, self.questions = fails_at, hangs_at, 0
        print("what vLLM prints does not disturb what is answered", flush=True)
        # As vLLM does for the parts of a model; it must go, too.
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        if report:
            seen = {"pids": [os.getpid(), child.pid], "arguments": arguments, "environment": dict(os.environ)}
            with Path(report).open("a", encoding="utf-8") as file:
                file.write(json.dumps(seen) + "\n")
        self._stumble()

    def generate(
        self, prompts: list[dict[str, Any]], sampling: list[SamplingParams], *, lora_request: Any, use_tqdm: bool
    ) -> list[SimpleNamespace]:
        self.questions += 1
        self._stumble()
        self._tell("generate", lora_request and [lora_request.lora_int_id, lora_request.lora_path])
        return [self._write(prompt["prompt_token_ids"], how) for prompt, how in zip(prompts, sampling, strict=True)]

    def sleep(self, level: int) -> None:
        self._tell("sleep", level)

    def wake_up(self, tags: list[str]) -> None:
        self._tell("wake_up", tags)

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self._tell(method, kwargs)

    def apply_model(self, function: Callable[[Any], None]) -> None:
        self._tell("apply_model", function.__name__)

    def reset_prefix_cache(self) -> bool:
        self._tell("reset_prefix_cache", None)
        return not self.blocks_in_use

    def _tell(self, called: str, with_what: Any) -> None:
        if self.report:
            with Path(f"{self.report}.calls").open("a", encoding="utf-8") as file:
                file.write(json.dumps([called, with_what]) + "\n")

    def _write(self, prompt: list[int], how: SamplingParams) -> SimpleNamespace:
        never = {token for token, bias in (how.logit_bias or {}).items() if bias < -1e6}
        ids = drawn(prompt, how.seed if how.temperature else 0, how.max_tokens, how.stop_token_ids, never)
        logps = {token: SimpleNamespace(logprob=logp(prompt, token)) for token in how.logprob_token_ids}
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, logprobs=[logps])])

    def _stumble(self) -> None:
        if self.questions == self.fails_at:
            raise RuntimeError(f"no memory is left\nat question {self.questions}")
        if self.questions == self.hangs_at:
            time.sleep(600)


def drawn(prompt: list[int], seed: int, count: int, stops: list[int], never: Container[int] = ()) -> list[int]:
    """The token ids of a completion; every other one ends with a stop."""
    draw = random.Random(json.dumps([prompt, seed]))
    usable = [token for token in VOCABULARY if token not in never]
    ids = [draw.choice(usable) for _ in range(count)]
    return [*ids[:-1], stops[-1]] if stops and draw.random() < 0.5 else ids


def logp(prompt: list[int], token: int) -> float:
    """Of a next token, as told by this engine."""
    return -1 - random.Random(json.dumps([prompt, token])).random()
