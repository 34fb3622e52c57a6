"""Generation through an OpenAI-compatible server that is started with the policy's weights: vLLM, SGLang, transformers.

Prompts are sent to `/v1/completions` as token ids, the same as in training, so the server applies no chat template.
Every reply has to report that it read as many tokens as were sent.
"""

import logging
import os
import re
import shlex
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import torch

from selfalign.core import distributed
from selfalign.core.errors import SelfalignError
from selfalign.core.failures import naming
from selfalign.core.files import write_json
from selfalign.core.placeholders import check_template
from selfalign.core.records import FinishReason
from selfalign.engines.openai_client import Client, Endpoint
from selfalign.engines.protocol import Completion, Request, Sampling, check_dtype
from selfalign.engines.replies import PassingError, RefusedError, Reply
from selfalign.engines.server_process import ServerProcess
from selfalign.engines.transformers import Transformers
from selfalign.models.chat_template import marker_ids
from selfalign.models.checkpoint import PolicyCheckpoint, release_memory, resolve_dtype
from selfalign.models.config import DTYPES
from selfalign.models.quantization import check_engine
from selfalign.models.scorer import LogProbScorer
from selfalign.models.tokenizer import answer_text, encode_prompt, ids_to_exact_text, silent_ids, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
"""Seconds between two requests to a server that is starting."""


@dataclass(kw_only=True, slots=True)
class Server:
    """Generation by a server that each stage starts with its policy's weights and stops when it is done.

    A server that somebody else runs cannot be used: nothing would tell whether it has M_t's weights.

    Attributes:
        command: shell command that starts the server in the foreground. {weights} is replaced by the policy's folder,
            {port} by the port to listen on, and {dtype} by the dtype.
        dtype: of the weights and of merged adapters: "float32", "bfloat16", or "auto" for the faster one on this
            machine.
        scoring_dtype: of the weights for judges that read probabilities, which run here with transformers; "auto" for
            `dtype`, or for the faster one to score if that is "auto" too.
        max_concurrent_completions: the most completions that are requested before any is saved. A kill loses at most
            these.
        api_key_env: the environment variable that holds the key, if the server asks for one.
        concurrency: the most requests at once.
        timeout_seconds: a request that takes longer is sent again.
        retries: how often a request is sent again after a timeout, a broken answer, status 429 or 5xx.
        startup_timeout_seconds: the most seconds until the server has loaded the weights and answers.
    """

    command: str
    dtype: str = "auto"
    scoring_dtype: str = "auto"
    max_concurrent_completions: int = 128
    api_key_env: str = field(default="", metadata={"keyed": False})
    concurrency: int = field(default=16, metadata={"keyed": False})
    timeout_seconds: float = field(default=600.0, metadata={"keyed": False})
    retries: int = field(default=6, metadata={"keyed": False})
    startup_timeout_seconds: float = field(default=1800.0, metadata={"keyed": False})

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        check_dtype(self.scoring_dtype, "scoring_dtype")
        check_template(self.command, "engine.command", ("weights", "port"), ("dtype",))
        if re.search(r"--api-key[ =]+(?![\"']?\$)", self.command):
            raise SelfalignError(
                "engine.command contains a key, and it is saved with the run. Take the key from the environment: "
                "write --api-key $NAME and set engine.api_key_env=NAME."
            )
        for name in ("max_concurrent_completions", "startup_timeout_seconds"):
            if getattr(self, name) <= 0:
                raise SelfalignError(f"engine.{name} must be above 0, got {getattr(self, name)}")
        self.endpoint("http://localhost", "policy").check("engine")

    def load(self, policy: PolicyCheckpoint) -> "ServerGenerator":
        """Return the policy behind a server, which runs while the generator is entered."""
        return ServerGenerator(self, policy)

    def load_scorer(self, policy: PolicyCheckpoint, max_batch_tokens: int) -> LogProbScorer:
        """Return the policy in this process, because servers differ in the probabilities they report, if any."""
        return Transformers(dtype=self.dtype, scoring_dtype=self.scoring_dtype).load_scorer(policy, max_batch_tokens)

    def endpoint(self, base_url: str, model: str) -> Endpoint:
        """Return the address of the server, with the settings of requests."""
        return Endpoint(
            base_url=base_url,
            model=model,
            api_key_env=self.api_key_env,
            concurrency=self.concurrency,
            timeout_seconds=self.timeout_seconds,
            retries=self.retries,
        )


class ServerGenerator:
    """A policy that writes through a server. The main process starts it, and all processes use it."""

    def __init__(self, settings: Server, policy: PolicyCheckpoint) -> None:
        self._settings = settings
        self._policy = policy
        self._server: ServerProcess | None = None
        self.tokenizer = policy.load_tokenizer()
        self.digest = policy.digest
        self.context = policy.context
        self.counts: dict[str, Any] = {}

    def __enter__(self) -> "ServerGenerator":
        release_memory()
        distributed.wait_for_all()  # All have let go of the memory that the server needs.
        with ExitStack() as stack:
            endpoint, self._takes_ids = distributed.on_main(lambda: self._start(stack))
            self._client = stack.enter_context(endpoint.open("engine"))
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        with self._open:
            if kind is None:
                distributed.wait_for_all()  # Nobody asks it any more.

    def plan(self, lengths: Sequence[int], samples: int, max_new_tokens: int) -> list[list[int]]:
        """Return batches of `max_concurrent_completions` texts, in the order of the prompts. The server batches them
        again itself.
        """
        size = max(1, self._settings.max_concurrent_completions // samples)
        return [list(range(start, min(start + size, len(lengths)))) for start in range(0, len(lengths), size)]

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Write every completion, several at once. A server that respects seeds writes the same text again.

        Raises:
            SelfalignError: the server gives no usable answer, or has read other tokens than the prompt.
        """
        how = {"temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens}
        if marker_ids(self.tokenizer):  # Else nothing would tell a thought from its answer.
            how["skip_special_tokens"] = False
        bodies = [
            {"prompt": self._prompt(request.prompt), "seed": seed % 2**31, **how}
            for request in requests
            for seed in request.seeds
        ]
        try:
            replies = iter(self._client.complete_each(bodies))
        except SelfalignError as error:
            if self._server is not None and self._server.ended:
                raise SelfalignError(
                    f"{error}; the server has ended; its output: {self._server.last_words()}"
                ) from error
            raise
        return [
            [_completion(self.tokenizer, next(replies), request.prompt) for _ in request.seeds] for request in requests
        ]

    def _prompt(self, ids: list[int]) -> list[int] | str:
        if self._takes_ids:
            return ids
        try:
            return ids_to_exact_text(self.tokenizer, ids)
        except SelfalignError as error:
            raise SelfalignError(
                f"engine.command: the server takes prompts as text only, and it {error}. Use a server that takes "
                "token ids, such as vLLM or SGLang, or set engine=transformers."
            ) from error

    def _start(self, stack: ExitStack) -> tuple[Endpoint, bool]:
        """Start the server until the stack closes. Return its address, and whether it takes token ids."""
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="selfalign-", ignore_cleanup_errors=True)))
        dtype = resolve_dtype(self._settings.dtype, writing=True)
        with naming(folder):
            export(self._policy, folder, dtype)
        port, began = _free_port(), time.monotonic()
        endpoint = self._settings.endpoint(f"http://{_host()}:{port}/v1", str(folder))
        values = {"{weights}": shlex.quote(str(folder)), "{port}": str(port), "{dtype}": dtype}
        command = self._settings.command
        for name, value in values.items():
            command = command.replace(name, value)
        logger.info("starting a server: %s", self._settings.command)
        with endpoint.open("engine") as client:
            self._server = ServerProcess(command, folder, client.clean)
            stack.callback(self._server.stop)
            takes_ids = self._wait_until_ready(client, self._server)
        logger.info("the server answers after %.0f s", time.monotonic() - began)
        return endpoint, takes_ids

    def _wait_until_ready(self, client: Client, server: ServerProcess) -> bool:
        """Wait for the server's first reply. Return whether it takes token ids; else it takes texts.

        Raises:
            SelfalignError: it has ended, refuses, or does not answer in time.
        """
        prompt = encode_prompt(self.tokenizer, "Hello.")
        ask, until = {"max_tokens": 1, "temperature": 0}, time.monotonic() + self._settings.startup_timeout_seconds
        while True:
            try:
                client.attempt({"prompt": prompt, **ask})
            except RefusedError as error:
                if error.status not in (400, 422):
                    raise
                return False
            except PassingError as error:
                trouble = error
            else:
                return True
            if server.ended:
                raise SelfalignError(f"engine.command: the server has ended; its output: {server.last_words()}")
            if time.monotonic() > until:
                raise SelfalignError(
                    f"engine.command: no answer in "
                    f"engine.startup_timeout_seconds={self._settings.startup_timeout_seconds:g} "
                    f"({trouble}); the server's output: {server.last_words()}"
                )
            time.sleep(POLL_SECONDS)


def export(policy: PolicyCheckpoint, folder: Path, dtype: str) -> None:
    """Write a policy as servers load it: one checkpoint with its tokenizer, which stops where the run's texts stop.

    Args:
        policy: weights without an adapter are linked; an adapter is merged into them in float32.
        folder: the folder to write to.
        dtype: of merged weights, which are rounded once.
    """
    check_engine(policy.quantization.get("quantization", "none"), "server")
    if (policy.path / "adapter").exists():
        merged = policy.load("float32", device="cpu").model
        cast(torch.nn.Module, merged).to(DTYPES[dtype])
        merged.save_pretrained(folder)
    else:
        for pattern in ("*.safetensors", "*.safetensors.index.json", "config.json", "*.py"):
            for file in policy.weights_folder.glob(pattern):
                (folder / file.name).symlink_to(file.resolve())
    tokenizer = policy.load_tokenizer()
    tokenizer.save_pretrained(folder)
    # Servers take from this file what a request does not say, each with other defaults where it says nothing; not all
    # know a number that means "no top_k", but all know the whole vocabulary.
    whole = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": len(tokenizer), "repetition_penalty": 1.0}
    ids = {"eos_token_id": stop_ids(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    silent = silent_ids(tokenizer, policy.config.vocab_size)  # Others know no such rule; they answer with texts.
    ids |= {"suppress_tokens": silent} if silent else {}
    write_json(folder / "generation_config.json", {**whole, **ids, "bos_token_id": tokenizer.bos_token_id})


def _completion(tokenizer: "Tokenizer", reply: Reply, prompt: list[int]) -> Completion:
    """Return a reply as a completion. Only its text is known, not its tokens.

    Raises:
        SelfalignError: the prompt was refused or read as other tokens, the text ended for a reason unknown here, or
            nothing is said of how many tokens it has.
    """
    if reply.finish_reason is FinishReason.PROMPT_TOO_LONG:
        raise SelfalignError(
            f"engine.command: the server rejected a {len(prompt)}-token prompt: its context limit is too small. "
            "Start it with the model's full context length (e.g. --max-model-len)."
        )
    if reply.prompt_tokens != len(prompt):
        raise SelfalignError(
            f"engine.command: the server reports {reply.prompt_tokens} prompt tokens, but {len(prompt)} were sent. "
            "Use a server that takes prompts as they are."
        )
    if reply.finish_reason not in (FinishReason.EOS, FinishReason.LENGTH):
        reason = reply.stated_reason if reply.finish_reason is FinishReason.UNKNOWN else reply.finish_reason.value
        raise SelfalignError(
            f"engine.command: the server ended a text for the reason {reason!r}. Only stop and length are known: use "
            "another server."
        )
    if reply.text and not reply.completion_tokens:
        raise SelfalignError("engine.command: the server does not say how many tokens it wrote (completion_tokens)")
    ended = reply.finish_reason is FinishReason.EOS
    spelled = [str(tokenizer.convert_ids_to_tokens(token)) for token in stop_ids(tokenizer) if marker_ids(tokenizer)]
    last = next((word for word in spelled if ended and reply.text.endswith(word)), "")
    text = answer_text(tokenizer, reply.text.removesuffix(last), finished=ended)
    return Completion(text=text, finish_reason=reply.finish_reason, tokens=reply.completion_tokens)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _host() -> str:
    """Return the host name by which all processes of the run reach the main process."""
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return "localhost" if one_machine else os.environ["MASTER_ADDR"]
