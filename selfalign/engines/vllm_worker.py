"""The other end of `selfalign.engines.vllm_engine`: vLLM in a process, and maybe a Python environment, of its own.

Run as a script; it imports nothing of selfalign, and vLLM with all that belongs to it only once its pipes are safe.
The first line it reads is {"gpus", "adapter": its folder, or "", "arguments": of vllm.LLM}, answered with {"version"}
when the model is loaded. Every other one is one of

- {"prompts": token ids, "seeds": one for each completion of each prompt, "sampling"}, answered with {"ids": of each
  completion, "logps": of the tokens that `logprob_token_ids` names, if any};
- {"rest": true}: free the GPUs' memory, answered with {};
- {"weights": folder, "adapter": its folder, or ""}: go on with another policy of the same shape, answered with
  {"version"}.
"""

import atexit
import json
import os
import signal
import threading
import time
from queue import SimpleQueue
from typing import IO, Any

TERMINATE_TIMEOUT = 5.0
"""Seconds that an idle worker has to end after its input has ended; a busy one is killed then."""

RUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables of torchrun, which do not concern this process."""


def main() -> None:
    """Answer questions until nobody asks any more."""
    incoming, outgoing = take_pipes()
    over = threading.Event()
    atexit.register(end_all, over)  # Registered first, it runs last, when vLLM has tidied up.
    questions = read_ahead(incoming, over)
    try:
        answer_all(questions, outgoing)
    except BrokenPipeError:
        over.set()


def answer_all(questions: "SimpleQueue[str]", outgoing: IO[str]) -> None:
    """Load the model, and answer questions up to the empty one."""
    engine = VLLMEngine(json.loads(questions.get()))
    answer: dict[str, Any] = {"version": engine.version}
    while True:
        outgoing.write(json.dumps(answer) + "\n")
        outgoing.flush()
        if not (question := questions.get()):
            return
        answer = engine.answer(json.loads(question))


def take_pipes() -> tuple[IO[str], IO[str]]:
    """Take standard input and output for this program alone: what libraries print goes to standard error.

    No process that is started from here inherits the pipes, so they close with this one.
    """
    incoming, outgoing = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return incoming, outgoing


def read_ahead(incoming: IO[str], over: threading.Event) -> "SimpleQueue[str]":
    """Yield the lines as they come, then an empty one. After that, this process has a while to end by itself."""
    lines: SimpleQueue[str] = SimpleQueue()

    def read() -> None:
        for line in incoming:
            lines.put(line)
        over.set()
        lines.put("")
        time.sleep(TERMINATE_TIMEOUT)
        end_all(over)

    threading.Thread(target=read, daemon=True).start()
    return lines


def end_all(over: threading.Event) -> None:
    """Kill this process and all that it has started once its input has ended; else the caller does so."""
    if over.is_set():
        os.killpg(0, signal.SIGKILL)


def settle_environment(gpus: str) -> None:
    """Set the environment variables that vLLM reads when it is imported.

    Args:
        gpus: the GPUs to use, as CUDA_VISIBLE_DEVICES lists them; empty where there are none.
    """
    for name in list(os.environ):
        if name in RUN or name.startswith("TORCHELASTIC_"):
            del os.environ[name]
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # One process fewer, and what is asked together is also started together, so that batches are the same each time.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


class VLLMEngine:
    """A loaded model."""

    def __init__(self, settings: dict[str, Any]) -> None:
        settle_environment(settings["gpus"])
        import vllm  # pyright: ignore[reportMissingImports]

        self.version: str = vllm.__version__
        self._sampling = vllm.SamplingParams
        self._on_cpu = not settings["gpus"]
        self._adapters = 0
        self._set_adapter(settings["adapter"])
        self._model = vllm.LLM(**settings["arguments"])

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """Do what the question says."""
        if "rest" in question:
            return self.rest()
        if "weights" in question:
            return self.renew(**question)
        return self.write(**question)

    def rest(self) -> dict[str, Any]:
        """Free the GPUs' memory. A base with an adapter waits in main memory, other weights are read anew.

        On a CPU vLLM cannot, and keeps what it has.
        """
        if not self._on_cpu:
            self._model.sleep(level=1 if self._adapter else 2)
        return {}

    def renew(self, weights: str, adapter: str) -> dict[str, Any]:
        """Take the weights, or beside the same base the adapter, of another policy. Nothing of the last one is left."""
        if not self._on_cpu:
            self._model.wake_up(tags=["weights"])
        if not adapter:
            self._model.collective_rpc("reload_weights", kwargs={"weights_path": weights})
        if not adapter and self._on_cpu:
            self._model.apply_model(renew_output_layer)
        if not self._on_cpu:
            self._model.wake_up(tags=["kv_cache"])
        self._set_adapter(adapter)
        if not self._model.reset_prefix_cache():
            raise RuntimeError("vLLM did not let go of its cache of prompts, which other weights have computed")
        return {"version": self.version}

    def _set_adapter(self, adapter: str) -> None:
        """Write with an adapter from now on. Its number is new, or vLLM would go on with the one of that number."""
        self._adapter = None
        if adapter:
            from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

            self._adapters += 1
            self._adapter = LoRARequest(f"policy {self._adapters}", self._adapters, adapter)

    def write(self, prompts: list[list[int]], seeds: list[list[int]], sampling: dict[str, Any]) -> dict[str, Any]:
        """Write a completion for every seed of every prompt."""
        # JSON makes texts of numbers that are keys.
        sampling["logit_bias"] = {int(token): bias for token, bias in sampling.get("logit_bias", {}).items()} or None
        asked = [{"prompt_token_ids": prompt} for prompt, own in zip(prompts, seeds, strict=True) for _ in own]
        how = [
            self._sampling(seed=seed, detokenize=False, ignore_eos=True, **sampling) for own in seeds for seed in own
        ]
        written = self._model.generate(asked, how, lora_request=self._adapter, use_tqdm=False)
        completions = [result.outputs[0] for result in written]
        alternatives = sampling.get("logprob_token_ids", [])
        return {
            "ids": [list(completion.token_ids) for completion in completions],
            "logps": [[c.logprobs[0][token].logprob for token in alternatives] for c in completions],
        }


def renew_output_layer(model: Any) -> None:
    """Make anew what the output layer multiplies by.

    On a CPU that is a copy in another order. vLLM 0.32 leaves the old one where the layer is the embedding.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import (  # pyright: ignore[reportMissingImports]
        ParallelLMHead,
    )

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)


if __name__ == "__main__":
    main()
