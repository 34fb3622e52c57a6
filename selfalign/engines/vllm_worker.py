"""The other end of `selfalign.engines.vllm_engine`: vLLM in a process, and maybe a Python environment, of its own.

Run as a script; it imports nothing of selfalign, and vLLM with all that belongs to it only once its pipes are safe.
The first line it reads is {"gpus", "adapter": its folder, or "", "arguments": of vllm.LLM}, answered with {"version"}
when the model is loaded. Every other one is {"prompts": token ids, "seeds": one for each completion of each prompt,
"sampling"}, answered with {"ids": of each completion, "logps": of the tokens that `logprob_token_ids` names, if any}.
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
        answer = engine.answer(**json.loads(question))


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
        self._adapter = None
        if adapter := settings["adapter"]:
            from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

            self._adapter = LoRARequest("policy", 1, adapter)
        self._model = vllm.LLM(**settings["arguments"])

    def answer(self, prompts: list[list[int]], seeds: list[list[int]], sampling: dict[str, Any]) -> dict[str, Any]:
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


if __name__ == "__main__":
    main()
