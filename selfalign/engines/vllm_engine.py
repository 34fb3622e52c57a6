"""engine=vllm: vLLM (Kwon et al. 2023, arXiv 2309.06180) writes and scores, in processes of its own.

A stage starts them with the policy's weights and stops them when it is done, so that their memory is free before
training; with `resident` they stay for the next stage and take its policy's weights. They need nothing of selfalign's
Python environment, and may have their own.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json
from selfalign.core.records import FinishReason
from selfalign.engines.protocol import Completion, Request, Sampling, check_dtype
from selfalign.engines.resident import ResidentWorkers, resident_workers
from selfalign.engines.worker_process import SHUTDOWN_TIMEOUT, Worker, ask_each, stop
from selfalign.models.batches import SharedPrompt
from selfalign.models.checkpoint import UNBOUNDED, PolicyCheckpoint, release_memory, resolve_dtype
from selfalign.models.quantization import check_engine
from selfalign.models.tokenizer import decode_response, silent_ids, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

WORKER = Path(__file__).with_name("vllm_worker.py")

PROMPT_TOKENS = 4096
"""On a CPU, at least so many tokens of prompts are computed at once."""

NEVER = -1e9
"""Added to its logit, this gives a token no probability."""

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Adapter ranks that vLLM can make room for."""


@dataclass(kw_only=True, slots=True)
class VLLM:
    """Generation by vLLM, in processes of its own.

    A text depends on its record, its seed and the weights. Other texts of the batch have an effect only through the
    rounding of matrix products. Random draws are vLLM's, so sampled texts differ from those of another engine. Judges
    that read log-probabilities read vLLM's.

    Attributes:
        python: the interpreter of the environment that has vLLM; empty for this one.
        dtype: of the weights while generating: "float32", "bfloat16", or "auto" for the faster one on this machine.
        tensor_parallel_size: GPUs that share one copy of the weights.
        replicas: copies of the weights, each in a process of its own; the texts of a batch are dealt out among them.
        gpu_memory_utilization: the share of each GPU's memory that vLLM takes; on a CPU, of the main memory.
        max_model_len: the longest sequence in tokens, prompt and response together; 0 takes the model's own.
        max_concurrent_completions: the most completions that are requested at once; vLLM chooses how many of them it
            writes in parallel. A kill loses at most these.
        resident: whether the processes stay until the end of the run and take the weights of the next policy, which
            saves their start in each stage. Between stages they leave the GPUs' memory; on a CPU they keep theirs.
        options: other arguments of vllm.LLM, such as enforce_eager or kv_cache_dtype.
    """

    python: str = field(default="", metadata={"keyed": False})
    dtype: str = "auto"
    tensor_parallel_size: int = field(default=1, metadata={"keyed": False})
    replicas: int = field(default=1, metadata={"keyed": False})
    gpu_memory_utilization: float = field(default=0.9, metadata={"keyed": False})
    max_model_len: int = 0
    max_concurrent_completions: int = 1024
    resident: bool = field(default=False, metadata={"keyed": False})
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        for name in ("tensor_parallel_size", "replicas", "max_concurrent_completions"):
            if getattr(self, name) < 1:
                raise SelfalignError(f"engine.{name} must be 1 or more, got {getattr(self, name)}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise SelfalignError(
                f"engine.gpu_memory_utilization must be above 0 and at most 1, got {self.gpu_memory_utilization}"
            )
        if self.max_model_len < 0:
            raise SelfalignError(f"engine.max_model_len must be 0 or more, got {self.max_model_len}")

    def load(self, policy: PolicyCheckpoint) -> "VLLMGenerator":
        """Start engines that write."""
        return VLLMGenerator.start(self, policy)

    def load_scorer(self, policy: PolicyCheckpoint, max_batch_tokens: int) -> "VLLMTokenScorer":
        """Start engines that score. Their batches are vLLM's, whatever the judge's `max_batch_tokens`."""
        return VLLMTokenScorer.start(self, policy)

    def arguments(self, policy: PolicyCheckpoint) -> dict[str, Any]:
        """Return the arguments of vllm.LLM. Prompts and completions are token ids, so vLLM needs no tokenizer."""
        check_engine(policy.quantization.get("quantization", "none"), "vllm")
        context = self.context(policy)
        # On a CPU, vLLM 0.32 cannot compute a prompt in parts and draw from a stream of its own behind it.
        whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(context, PROMPT_TOKENS)}
        return {
            "model": str(policy.weights_folder.resolve()),
            "skip_tokenizer_init": True,
            "trust_remote_code": policy.trusted,
            "dtype": resolve_dtype(self.dtype, writing=True),
            "tensor_parallel_size": self.tensor_parallel_size,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "max_model_len": context if context < UNBOUNDED else None,
            "enable_prefix_caching": True,
            **(lora_arguments(adapter) if (adapter := policy.path / "adapter").exists() else {}),
            "generation_config": "vllm",  # Else the checkpoint's generation_config.json would add penalties of its own.
            **({"enable_sleep_mode": self.resident} if torch.cuda.is_available() else whole),
            **self.options,
        }

    def context(self, policy: PolicyCheckpoint) -> int:
        """Return the longest sequence that is requested."""
        return min(self.max_model_len or policy.context, policy.context)


@dataclass(slots=True)
class VLLMWorkers:
    """Engines that run one policy, until the `with` block around them ends."""

    tokenizer: "Tokenizer"
    digest: str
    context: int
    max_concurrent_completions: int
    silent: list[int]
    workers: list[Worker]
    started_with: dict[str, Any]
    rests_in: ResidentWorkers | None
    counts: dict[str, Any]

    @classmethod
    def start(cls, config: VLLM, policy: PolicyCheckpoint) -> Self:
        """Start an engine for each replica, or give the weights to resident ones. Return when all have loaded them.

        Raises:
            SelfalignError: there are too few GPUs, or vLLM cannot run the model.
        """
        arguments, gpus = config.arguments(policy), share_gpus(config.replicas, config.tensor_parallel_size)
        folder = policy.path / "adapter"
        adapter = str(folder) if folder.exists() else ""
        started_with = {
            "command": [config.python or sys.executable, "-P", str(WORKER)],
            "gpus": gpus,
            "arguments": {name: value for name, value in arguments.items() if name != "model"},
            "shape": policy.weights["base"] if adapter else policy.weights.get("config.json", policy.digest),
        }
        tokenizer, context = policy.load_tokenizer(), config.context(policy)
        release_memory()
        resident = resident_workers() if config.resident else None
        workers, answers = list[Worker](), list[Any]()
        if resident:
            workers, answers = resident.take(started_with, {"weights": arguments["model"], "adapter": adapter})
        if not workers:
            settings = [{"gpus": own, "adapter": adapter, "arguments": arguments} for own in gpus]
            workers, answers = start_workers(started_with["command"], settings)
        return cls(
            tokenizer=tokenizer,
            digest=policy.digest,
            context=context,
            max_concurrent_completions=config.max_concurrent_completions,
            silent=silent_ids(tokenizer, policy.config.vocab_size),
            workers=workers,
            started_with=started_with,
            rests_in=resident,
            counts={"vllm_version": answers[0]["version"]},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.rests_in and kind is None:
            self.rests_in.keep(self.workers, self.started_with, {"rest": True})
        else:
            stop(self.workers, SHUTDOWN_TIMEOUT if kind is None else 0)

    def ask(self, requests: Sequence[Request], sampling: dict[str, Any], answer: str) -> list[list[Any]]:
        """Return the engines' answers for every completion of each request. Requests are dealt out among them."""
        shares = [requests[first :: len(self.workers)] for first in range(len(self.workers))]
        questions = [
            {"prompts": [one.prompt for one in share], "seeds": [one.seeds for one in share], "sampling": sampling}
            for share in shares
        ]
        answers = [iter(answered[answer]) for answered in ask_each(self.workers, questions)]
        return [[next(answers[index % len(answers)]) for _ in request.seeds] for index, request in enumerate(requests)]


def start_workers(command: Sequence[str], settings: Sequence[Any]) -> tuple[list[Worker], list[Any]]:
    """Return an engine for each of the settings, with its answer to them.

    Raises:
        SelfalignError: one cannot start.
    """
    workers: list[Worker] = []
    try:
        for _ in settings:
            workers.append(Worker("the engine of engine=vllm", command))
        return workers, ask_each(workers, settings)
    except BaseException:
        stop(workers, 0)
        raise


@dataclass(slots=True)
class VLLMGenerator(VLLMWorkers):
    """A policy that writes."""

    def plan(self, lengths: Sequence[int], samples: int, max_new_tokens: int) -> list[list[int]]:
        """Return the prompts in their order, within `max_concurrent_completions`: indices, batch by batch."""
        size = max(1, self.max_concurrent_completions // samples)
        return [list(range(start, min(start + size, len(lengths)))) for start in range(0, len(lengths), size)]

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Write every request's completions, each from its own seed."""
        stops = stop_ids(self.tokenizer)
        settings = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": stops,
            "logit_bias": dict.fromkeys(self.silent, NEVER),
        }
        written = self.ask(requests, settings, "ids")
        return [[self._completion(ids, stops) for ids in completions] for completions in written]

    def _completion(self, ids: list[int], stops: list[int]) -> Completion:
        reason = FinishReason.EOS if ids and ids[-1] in stops else FinishReason.LENGTH
        return Completion(text=decode_response(self.tokenizer, ids), finish_reason=reason, tokens=len(ids), ids=ids)


@dataclass(slots=True)
class VLLMTokenScorer(VLLMWorkers):
    """A policy that scores given next tokens."""

    def plan(self, groups: Sequence[SharedPrompt]) -> list[list[SharedPrompt]]:
        """Return the groups in their order, in batches of at most `max_concurrent_completions` responses."""
        batches: list[list[SharedPrompt]] = []
        room = 0
        for group in groups:
            if len(group.responses) > room:
                batches.append([])
                room = self.max_concurrent_completions
            batches[-1].append(group)
            room -= len(group.responses)
        return batches

    def next_token_logprobs(
        self, groups: Sequence[SharedPrompt], alternatives: Sequence[int]
    ) -> list[list[list[float]]]:
        """Return log p (nats) of each alternative as the token after each response, for every group."""
        requests = [
            Request(prompt=[*group.prompt, *response], seeds=[0]) for group in groups for response in group.responses
        ]
        settings = {"temperature": 0.0, "max_tokens": 1, "logprob_token_ids": list(alternatives)}
        rows = iter(self.ask(requests, settings, "logps"))
        return [[next(rows)[0] for _ in group.responses] for group in groups]


def share_gpus(replicas: int, each: int) -> list[str]:
    """Return the GPUs of every replica, as CUDA_VISIBLE_DEVICES lists them; "" on a machine without GPUs.

    If a run has several processes on one machine, each has its own GPUs.

    Raises:
        SelfalignError: there are too few.
    """
    if not torch.cuda.is_available():
        return [""] * replicas
    known = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    names, first = known.split(","), int(os.environ.get("LOCAL_RANK", "0")) * replicas * each
    own = names[first : first + replicas * each]
    if len(own) < replicas * each:
        raise SelfalignError(
            f"engine.replicas={replicas} × engine.tensor_parallel_size={each} need {replicas * each} GPUs for "
            f"each process of the run, but only {len(names)} are visible. Lower one of them."
        )
    return [",".join(own[start : start + each]) for start in range(0, len(own), each)]


def lora_arguments(adapter: Path) -> dict[str, Any]:
    """Return the arguments of vllm.LLM for an adapter: how much room it takes.

    Raises:
        SelfalignError: the adapter's rank is above the highest that vLLM takes.
    """
    rank = read_json(adapter / "adapter_config.json")["r"]
    if rank > LORA_RANKS[-1]:
        raise SelfalignError(f"engine=vllm takes adapters up to rank {LORA_RANKS[-1]}, but model.lora.rank={rank}")
    return {"enable_lora": True, "max_lora_rank": next(room for room in LORA_RANKS if room >= rank)}
