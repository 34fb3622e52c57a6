"""The protocol of engines: requests, completions, and policies that write or score."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, Self

import msgspec

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import as_plain
from selfalign.core.records import FinishReason
from selfalign.models.batches import SharedPrompt
from selfalign.models.chat_template import markers_of
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.config import DTYPES
from selfalign.models.scorer import ask_all, responses_in
from selfalign.models.tokenizer import decode_response, plain_ids, split_written, thought_length
from selfalign.store.journal import Journal, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(kw_only=True, slots=True)
class Sampling:
    """How tokens are sampled.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: tokens are sampled from the smallest set with at least this probability (Holtzman et al. 2019).
        max_new_tokens: the length at which a response is cut; an answer alone where a thought has a budget of its own.
        thought_tokens: the most tokens of a thought before the answer, which then is truncated; 0 lets thought and
            answer share max_new_tokens.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 512
    thought_tokens: int = field(default=0, metadata={"keyed": "if set"})

    @property
    def longest(self) -> int:
        """The most tokens of a thought and an answer together."""
        return self.thought_tokens + self.max_new_tokens

    def named(self, key: str) -> str:
        """Return the settings that limit the length, for messages."""
        thought = f"{key}.thought_tokens={self.thought_tokens} and " if self.thought_tokens else ""
        return f"{thought}{key}.max_new_tokens={self.max_new_tokens}"

    def check(self, key: str) -> None:
        """Check every range. Messages name the setting as `key`.name.

        Raises:
            SelfalignError: a value is out of range.
        """
        if self.temperature < 0:
            raise SelfalignError(f"{key}.temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise SelfalignError(f"{key}.top_p must be above 0 and at most 1, got {self.top_p}")
        if self.max_new_tokens < 1:
            raise SelfalignError(f"{key}.max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        if self.thought_tokens < 0:
            raise SelfalignError(f"{key}.thought_tokens must be 0 or more, got {self.thought_tokens}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A prompt, and one seed for each wanted completion."""

    prompt: list[int]
    seeds: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A generated text without control tokens, why it ended, and its ids, if they are known.

    An engine returns the whole text and the number of all tokens. `generate_batched` takes the thought apart: then
    `text` is the answer and `tokens` counts the answer's.
    """

    text: str
    finish_reason: FinishReason
    tokens: int
    ids: list[int] = field(default_factory=list)
    thought: str = ""
    thought_tokens: int = 0


class LoadedEngine(Protocol):
    """A policy that is loaded until the `with` block around it ends, which frees its memory.

    `counts` are the engine's entries for a stage's manifest, such as its version.
    """

    @property
    def tokenizer(self) -> "Tokenizer": ...

    @property
    def digest(self) -> str: ...

    @property
    def context(self) -> int: ...

    @property
    def counts(self) -> dict[str, Any]: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class Generator(LoadedEngine, Protocol):
    """A loaded policy that writes."""

    def plan(self, lengths: Sequence[int], samples: int, max_new_tokens: int) -> list[list[int]]: ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]: ...


class TokenScorer(LoadedEngine, Protocol):
    """A loaded policy that scores given next tokens. `Scorer` does so in this process."""

    def plan(self, groups: Sequence[SharedPrompt]) -> list[list[SharedPrompt]]: ...

    def next_token_logprobs(
        self, groups: Sequence[SharedPrompt], alternatives: Sequence[int]
    ) -> list[list[list[float]]]: ...


class Engine(Protocol):
    """An engine, the component `engine`. Engines that plan batches by tokens take the judge's `max_batch_tokens`."""

    @property
    def dtype(self) -> str: ...

    def load(self, policy: PolicyCheckpoint) -> Generator: ...

    def load_scorer(self, policy: PolicyCheckpoint, max_batch_tokens: int) -> TokenScorer: ...


def check_dtype(dtype: str, name: str = "dtype") -> None:
    """Check `engine.dtype` or `engine.scoring_dtype`.

    Raises:
        SelfalignError: it is neither "auto" nor a dtype.
    """
    if dtype not in ("auto", *DTYPES):
        raise SelfalignError(f"engine.{name} must be auto or one of {', '.join(DTYPES)}; got {dtype!r}")


def generate_batched(
    generator: Generator, requests: Sequence[Request], sampling: Sampling, journal: Journal, name: str, size: int = 1
) -> list[list[Completion]]:
    """Return the completions of each request, written in journalled batches, their thoughts apart.

    Args:
        generator: the policy that writes.
        requests: prompts that fit into the context together with their completions.
        sampling: how tokens are sampled.
        journal: keeps finished batches.
        name: prefix of the batches' names in the journal.
        size: how far a completion moves the progress bar.
    """
    lengths = [len(request.prompt) for request in requests]
    samples = max((len(request.seeds) for request in requests), default=1)
    plan = generator.plan(lengths, samples, sampling.longest)
    whole = replace(sampling, max_new_tokens=sampling.longest, thought_tokens=0)

    def task(number: int) -> Task:
        chosen = [requests[index] for index in plan[number]]
        units = size * sum(len(request.seeds) for request in chosen)
        return f"{name}-{number}", units, lambda: as_plain(generator.generate(chosen, whole))

    written: dict[int, list[Completion]] = {}
    for batch, rows in zip(plan, journal.batches(map(task, range(len(plan)))), strict=True):
        written |= dict(zip(batch, msgspec.convert(rows, list[list[Completion]]), strict=True))
    return [
        [part_completion(generator.tokenizer, request.prompt, made, sampling) for made in written[index]]
        for index, request in enumerate(requests)
    ]


def part_completion(tokenizer: "Tokenizer", prompt: list[int], made: Completion, sampling: Sampling) -> Completion:
    """Return a completion with its thought apart from its answer, each within its budget.

    A thought that has no end, or is longer than `thought_tokens`, leaves no answer: the completion is truncated. An
    answer longer than `max_new_tokens` is cut there, if its ids are known.
    """
    if markers_of(tokenizer) is None:
        return made
    thought, answer = split_written(tokenizer, prompt, made.text)
    tokens = _thought_tokens(tokenizer, made, thought)
    too_long = sampling.thought_tokens and tokens > sampling.thought_tokens
    if answer is None or too_long:
        thought = made.text
        return replace(
            made, text="", thought=thought, finish_reason=FinishReason.TRUNCATED, tokens=0, thought_tokens=made.tokens
        )
    parted = replace(made, text=answer, thought=thought, tokens=made.tokens - tokens, thought_tokens=tokens)
    if not sampling.thought_tokens or parted.tokens <= sampling.max_new_tokens:
        return parted
    ids = made.ids[: tokens + sampling.max_new_tokens]
    text = decode_response(tokenizer, ids)[len(thought) :] if ids else answer
    return replace(parted, text=text, ids=ids, finish_reason=FinishReason.LENGTH, tokens=sampling.max_new_tokens)


def _thought_tokens(tokenizer: "Tokenizer", made: Completion, thought: str) -> int:
    """Return the number of a completion's tokens that are its thought's."""
    if not thought:
        return 0
    if made.ids:
        return thought_length(tokenizer, made.ids, thought)
    return min(len(plain_ids(tokenizer, thought)), made.tokens)


def score_batched(
    reader: TokenScorer,
    groups: Sequence[SharedPrompt],
    alternatives: Sequence[int],
    journal: Journal,
    name: str,
    size: Callable[[SharedPrompt], int] = responses_in,
) -> Iterator[list[list[float]]]:
    """Yield log p (nats) of each alternative as the token after each response of every group, in journalled batches.

    Args:
        reader: the policy that scores.
        groups: prompts with their responses.
        alternatives: token ids.
        journal: keeps finished batches.
        name: prefix of the batches' names in the journal.
        size: how far a group moves the progress bar.
    """
    return ask_all(
        partial(reader.next_token_logprobs, alternatives=alternatives), reader.plan(groups), journal, name, size
    )
