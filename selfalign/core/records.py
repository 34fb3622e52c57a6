"""The records that stages exchange: one dataclass a record, one JSON object a line.

Every record has an `id` that names it for good, and says which model wrote it (`model`, the digest of that
policy's weights), so that a later stage can check what it is given. The fields are the documented schema of the
`.jsonl` files in a run folder.
"""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgspec

Message = dict[str, Any]
"""One turn of a conversation: {"role": "system" | "user" | "assistant" | "tool", "content": text}.

An assistant's turn may have `tool_calls`, a list of {"type": "function", "function": {"name", "arguments"}} with an
optional `id`; a tool's may have `name` and `tool_call_id`. The system turn of a prompt may have `tools`, the
definitions of the tools; if its content is empty, it is nothing but their place.
"""

Turns = list[Message] | msgspec.UnsetType
"""Turns of a record, or its tool calls. Where there are none, the record's line has no such field."""

Prompt = str | list[Message]
"""Input of the model: messages for the chat template, or a text that is taken as it stands."""


class FinishReason(StrEnum):
    """Why a text ended, or why there is none.

    `eos`: at an end-of-turn token. `length`: cut at `max_new_tokens`. `truncated`: inside its thought, so that there is
    no answer. `unknown`: at its own end, for a reason that only
    the server which wrote it knows. The others are refusals: a server did not fulfil the request, because the prompt
    does not fit, for its content, or for any other reason. The text is then the server's message.
    """

    EOS = "eos"
    LENGTH = "length"
    TRUNCATED = "truncated"
    UNKNOWN = "unknown"
    PROMPT_TOO_LONG = "prompt_too_long"
    CONTENT_FILTER = "content_filter"
    REFUSED = "refused"

    @property
    def is_cut(self) -> bool:
        """Whether the text was cut before its own end, or inside its thought."""
        return self in (FinishReason.LENGTH, FinishReason.TRUNCATED)

    @property
    def is_refusal(self) -> bool:
        """Whether the request was not fulfilled."""
        return self in (FinishReason.PROMPT_TOO_LONG, FinishReason.CONTENT_FILTER, FinishReason.REFUSED)


class JudgementStatus(StrEnum):
    """Outcome of one judgement. Only `ok` carries a score.

    `truncated`: the text was cut before its verdict, maybe while the judge was still thinking. `prompt_too_long`,
    `content_filter` and `refused` (for any other reason): the judge could not be asked. Where a server refused, its
    message is the text.
    """

    OK = "ok"
    NO_SCORE = "no_score"
    OUT_OF_RANGE = "out_of_range"
    AMBIGUOUS = "ambiguous"
    TRUNCATED = "truncated"
    PROMPT_TOO_LONG = "prompt_too_long"
    CONTENT_FILTER = "content_filter"
    REFUSED = "refused"


@dataclass(frozen=True, kw_only=True, slots=True)
class Demonstration:
    """A prompt and the response that SFT teaches.

    `source` is "ift", "eft", or "positive" (a response judged good). `prefill` is how the answer begins where that is
    given instead of learnt. Demonstrations of one `question` have prompts that begin alike, so they are trained side by
    side and their beginning is computed once. `ids` are the tokens of a response that a model wrote, and `thought` is
    what it wrote before its answer; a given response may hold its thought itself. `thought_prompt` asked for the
    thought, before the prompt. `response_calls` are the tool calls of the response, which may have no text beside them.
    """

    id: str
    prompt: Prompt
    response: str
    source: str
    question: str = ""
    prefill: str = ""
    ids: list[int] = field(default_factory=list)
    thought: str = ""
    thought_prompt: str = ""
    response_calls: Turns = msgspec.UNSET


@dataclass(frozen=True, kw_only=True, slots=True)
class Criterion:
    """A statement that is true of a response or not, and its weight.

    With a negative weight it states a mistake, which the response should avoid.
    """

    text: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.text.strip() or not math.isfinite(self.weight) or not self.weight:
            raise ValueError(f"a criterion needs a text and a finite weight other than 0, got {self}")


Criteria = list[Criterion] | msgspec.UnsetType
"""The criteria of a record. Where there are none, the record's line has no such field."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Instruction:
    """A task. `source`: "self" (a model wrote it in this run), "given" (read), "ranked" or "evaluation" (held out).

    `turns` is the conversation that asks it, where that is more than one user turn. `text` is then the conversation to
    read, with its roles: what judges and people see. `answer` and `constraints` say what is right, where that can be
    checked (`data/verifiable.py`). `criteria` are what its responses are judged by, where it has criteria of its own.
    """

    id: str
    text: str
    source: str
    category: str = ""
    turns: list[Message] = field(default_factory=list)
    answer: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    constraints: list[dict[str, Any]] | msgspec.UnsetType = msgspec.UNSET
    criteria: Criteria = msgspec.UNSET

    @property
    def prompt(self) -> list[Message]:
        """The conversation that is to be answered."""
        return self.turns or [{"role": "user", "content": self.text}]


@dataclass(frozen=True, kw_only=True, slots=True)
class RankedAnswers:
    """An instruction with answers in a human's order. `ranks[i]` belongs to `texts[i]`; 1 is best, and there are no
    ties.

    `scores` and `justifications` are what a human judge gave; empty where only the order is known. `turns` is the
    conversation that `instruction` shows, and `criteria` are its own, as in `Instruction`.
    """

    id: str
    instruction: str
    texts: list[str]
    ranks: list[int]
    scores: list[int]
    justifications: list[str]
    turns: list[Message] = field(default_factory=list)
    criteria: Criteria = msgspec.UNSET

    @property
    def prompt(self) -> list[Message]:
        """The conversation that is to be answered."""
        return self.turns or [{"role": "user", "content": self.instruction}]


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """One answer to an instruction. `model` is "human" for given answers.

    `text` is the answer alone: all that is judged, compared and measured. `thought` is what was written before it, the
    model's markers included; a thought without an end leaves no answer, and the response is `truncated`. `tokens`
    counts the answer's tokens, the end of turn included, and `thought_tokens` those before them. `ids` are all of them
    in their order: what a policy is trained on is what was written. They are empty where only a text came back.
    `writer` is who wrote it, as `data.respond.writers` has it; there is no such field where M_t alone writes.
    """

    id: str
    instruction_id: str
    text: str
    finish_reason: FinishReason
    tokens: int
    model: str
    ids: list[int] = field(default_factory=list)
    thought: str = ""
    thought_tokens: int = 0
    writer: str | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        if self.finish_reason not in (FinishReason.EOS, FinishReason.LENGTH, FinishReason.TRUNCATED):
            raise ValueError(
                f"response {self.id}: finish_reason {self.finish_reason}; a response is eos, length or truncated"
            )
        if self.finish_reason is FinishReason.TRUNCATED and self.text:
            raise ValueError(f"response {self.id}: its thought has no end, so it has no answer, but text {self.text!r}")

    @property
    def finished(self) -> bool:
        """Whether it ended by itself."""
        return self.finish_reason is FinishReason.EOS


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """One judgement of one response.

    `score` is a number on the judge's scale exactly when `status` is ok. `entropy` (nats) is that of the score
    distribution where the judge has one. `model` is the digest of the policy that judged, or the endpoint's name of
    it. Where judgements are drawn, `sample` counts those wanted of a response, `attempt` the tries at one of them, and
    `seed` drew this one; the rubric stands in the manifest.
    """

    id: str
    response_id: str
    status: JudgementStatus
    score: float | None
    text: str
    model: str
    entropy: float | None = None
    sample: int = 1
    attempt: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        if (self.score is not None) != (self.status is JudgementStatus.OK):
            raise ValueError(f"judgement {self.id}: status {self.status} with score {self.score}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseScore:
    """The mean over all judgements of a response. `id` is the response's.

    `score` is the mean of the `valid` ones, None where these are fewer than the judge wants; `variance` is theirs
    (n-1 in the denominator), None for fewer than two.
    """

    id: str
    score: float | None
    valid: int
    variance: float | None


class Verdict(StrEnum):
    """A judge's verdict on two responses in one order: the first shown is better (A), the second (B), or neither."""

    A = "A"
    B = "B"
    TIE = "C"


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two responses to one instruction, compared in both orders.

    `forward` is the verdict with `first` shown first, `backward` with `second` shown first; None where it could not be
    read, for which `status` gives the reason. `outcome` is that of `first`: 1 won, 0 lost, ½ tied or the orders
    disagree; None unless `status` is ok. `texts` are what the judge wrote or `[[A]]` with its probability.
    """

    id: str
    instruction_id: str
    first_id: str
    second_id: str
    forward: Verdict | None
    backward: Verdict | None
    status: JudgementStatus
    outcome: float | None
    texts: list[str]
    model: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferencePair:
    """Two responses to one prompt, the better and the worse.

    The scores are the judge's means, None for given pairs. A response whose `*_finished` is false was cut at the
    token limit, so training does not teach it to end there. `instruction_id`, `chosen_id` and `rejected_id` lead back
    to the records the pair was made from. `chosen_ids` and `rejected_ids` are the responses' tokens as they were
    written, and `chosen_thought` and `rejected_thought` what was written before the answers, for which `thought_prompt`
    asked before the prompt. All are empty for given pairs, whose responses may hold their thoughts themselves.

    Given pairs may go on from their prompt with several turns. `chosen` is then the last answer, and `chosen_turns`
    are those before it, of which the first is the assistant's; `chosen_calls` are the tool calls of the last answer.
    So with `rejected_turns` and `rejected_calls`.

    `label_smoothing` is ε of this pair, from 0 to 1: how likely it is in the wrong order. Where it is not given,
    the record's line has no such field, and the loss has its own ε.
    """

    id: str
    prompt: Prompt
    chosen: str
    rejected: str
    chosen_score: float | None = None
    rejected_score: float | None = None
    chosen_finished: bool = True
    rejected_finished: bool = True
    instruction_id: str = ""
    chosen_id: str = ""
    rejected_id: str = ""
    chosen_ids: list[int] = field(default_factory=list)
    rejected_ids: list[int] = field(default_factory=list)
    chosen_thought: str = ""
    rejected_thought: str = ""
    thought_prompt: str = ""
    chosen_turns: Turns = msgspec.UNSET
    rejected_turns: Turns = msgspec.UNSET
    chosen_calls: Turns = msgspec.UNSET
    rejected_calls: Turns = msgspec.UNSET
    label_smoothing: float | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        if self.label_smoothing is not msgspec.UNSET and not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"pair {self.id}: label_smoothing must be from 0 to 1, got {self.label_smoothing}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledResponse:
    """One response to a prompt, and whether it is desirable.

    `score` is the judge's mean, None where there is none. A response that is not `finished` was cut at the token limit.
    `ids`, `thought`, `thought_prompt`, `turns` and `calls` are as those of a pair's chosen response.
    """

    id: str
    prompt: Prompt
    response: str
    desirable: bool
    score: float | None = None
    finished: bool = True
    instruction_id: str = ""
    response_id: str = ""
    ids: list[int] = field(default_factory=list)
    thought: str = ""
    thought_prompt: str = ""
    turns: Turns = msgspec.UNSET
    calls: Turns = msgspec.UNSET


@dataclass(frozen=True, kw_only=True, slots=True)
class PairReference:
    """The reference policy's summed log-probabilities (nats) of a pair's responses.

    `augmented_*` are conditioned on p⊕x; None where the loss does not need them. For a labelled response, `chosen` is
    its own log-probability, and `rejected` that of the response to another prompt from which z₀ is estimated.
    """

    id: str
    chosen: float
    rejected: float
    augmented_chosen: float | None = None
    augmented_rejected: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PairTokens:
    """The scored tokens of a pair's responses as text, and a value of each, given p⊕x.

    The values are log-probabilities (nats) under one policy, or what the tokens add to Δ, in units of reward.
    """

    id: str
    chosen: list[str]
    rejected: list[str]
    chosen_values: list[float]
    rejected_values: list[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairMargin:
    """Log-ratios, margin and Δ of a pair that neither the policy nor its reference was trained on.

    `chosen`, `rejected` and `augmented_*` are log π(y) - log π_ref(y), nats summed over the response's tokens, given x
    and given p⊕x. `margin` is β(chosen - rejected), `delta` Δ, the same given p⊕x. `score_difference` is a judge's
    score of the chosen response minus that of the rejected one, None where one of them has no score.
    """

    id: str
    chosen: float
    rejected: float
    augmented_chosen: float
    augmented_rejected: float
    margin: float
    delta: float
    score_difference: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseKL:
    """The summed log-probability of an answer under the policy that wrote it and under M1. `id` is the response's."""

    id: str
    policy: float
    origin: float
    tokens: int
