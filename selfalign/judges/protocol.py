"""The protocol of all judges: their inputs, their outputs, and checks of their settings."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, cast

from selfalign.core.errors import SelfalignError
from selfalign.core.files import text_or_file
from selfalign.core.jsonl import CHUNK
from selfalign.core.placeholders import check_template, fill
from selfalign.core.records import (
    Comparison,
    Instruction,
    Judgement,
    JudgementStatus,
    Prompt,
    Response,
    ResponseScore,
)
from selfalign.data.thinking import answer_given
from selfalign.data.turns import as_prompt
from selfalign.engines.openai_client import Client, Endpoint
from selfalign.engines.protocol import Engine, Generator, LoadedEngine, TokenScorer
from selfalign.metrics.accumulate import Sums
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.reward_model import RewardHead, RewardScorer, load_reward_model
from selfalign.store.artifacts import Artifact, Counts
from selfalign.store.journal import Journal

OWN_MODELS = ("self", "sft", "base", "previous")
"""Names of the run's own models as judges: M_t, M1, M0 and M_{t-1}."""

NO_MODEL = ""
"""The `model` of a judge that asks none."""

INSTRUCTIONS_PER_CALL = CHUNK // 4
"""Instructions judged at a time; with four candidates each, as many responses as a stage holds records."""

SCALE = re.compile(
    r"\b(?:scale|scores?|points?|marks?|rat(?:e|ing|ings)|grad(?:e|es)|levels?|numbers?|from|between)\b"
    r"(?:(?!criteri|steps?\b|items?\b)[^.\n\d]){0,40}?"
    r"\b(?P<low>\d{1,3})(?:\s*\([^)\n]{0,40}\)|,[^,\n]{0,40},)?\s*(?:-|–|—|to|and|through)\s*(?P<high>\d{1,3})\b"
    r"(?!\s*(?:words?|sentences?|lines?|paragraphs?))"
    r"|\b(?P<first>\d{1,3})\s*(?:-|–|—|to)\s*(?P<last>\d{1,3})\s+(?:likert\s+)?(?:scale|rating)\b"
    r"|\b(?P<points>\d{1,3})[- ]points?\s+(?:likert\s+)?(?:scale|rating)\b"
    r"|(?:\bout of|[>\])xXnN]\s*/)\s*(?P<top>\d{1,3})\b",
    re.IGNORECASE,
)
"""How a rubric names its scale: "points from 0 to 5", "a scale of 1-10", "a 1-7 Likert scale", "a 10-point scale",
"Score: <points>/10"."""

L = TypeVar("L", bound=LoadedEngine)


@dataclass(kw_only=True, slots=True)
class DegeneracyThresholds:
    """Bounds below which a judge's scores are nearly constant and teach nothing. Crossing one is a warning, not an
    error.

    Attributes:
        max_tie_rate: warns when at least this share of the instructions has equal scores for all its responses.
        min_entropy: warns when the scores, over all responses, have less entropy than this, nats; 0 never does.
    """

    max_tie_rate: float = 0.8
    min_entropy: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.max_tie_rate <= 1:
            raise SelfalignError(
                f"judge.degeneracy.max_tie_rate must be above 0 and at most 1, got {self.max_tie_rate}"
            )
        if self.min_entropy < 0:
            raise SelfalignError(f"judge.degeneracy.min_entropy must be 0 or more, got {self.min_entropy}")


@dataclass(kw_only=True, slots=True)
class Rubric:
    """Settings of judges that give a score to one response.

    Attributes:
        prompt: the rubric, a text or "file:PATH", with the placeholders {instruction} and {response}.
        min_score: the lowest score of the rubric.
        max_score: the highest.
        max_failure_rate: the run stops when more than this share of the wanted judgements has no score after all
            retries.
        degeneracy: when scores count as nearly constant.
    """

    prompt: str
    min_score: int = 0
    max_score: int = 5
    max_failure_rate: float = 0.5
    degeneracy: DegeneracyThresholds = field(default_factory=DegeneracyThresholds)

    def __post_init__(self) -> None:
        self.prompt = text_or_file(self.prompt, "judge.prompt")
        check_template(self.prompt, "judge.prompt", ("instruction", "response"))
        check_share(self.max_failure_rate)
        check_scale(self.min_score, self.max_score)

    @property
    def instructions_per_call(self) -> int:
        """The number of instructions judged at a time."""
        return INSTRUCTIONS_PER_CALL

    def ask(self, instruction: str, response: str) -> Prompt:
        """Return the judge's prompt about one response, of which the judge sees the answer alone."""
        return as_prompt(fill(self.prompt, {"instruction": instruction, "response": answer_given(response)}))


@dataclass(frozen=True, slots=True)
class InstructionResponse:
    """A response with the instruction it answers."""

    instruction: Instruction
    response: Response


@dataclass(kw_only=True, slots=True)
class JudgeContext:
    """Run-time context of a judge. A loaded policy is cached between calls and released when the context exits.

    Attributes:
        journal: keeps finished batches through a kill.
        policy: the policy that judges; None for a judge behind an endpoint.
        reference: the reference policy of the judging policy, for judges that compare the two.
        engine: the engine.
        seed: of everything that is sampled.
        member_scores: {member of a panel: {response id: score}}.
        counts: the engine's own counts, such as its version.
    """

    journal: Journal
    policy: PolicyCheckpoint | None
    reference: PolicyCheckpoint | None
    engine: Engine
    seed: int
    member_scores: dict[str, dict[str, float]] = field(default_factory=dict)
    counts: Counts = field(default_factory=dict, init=False)
    _client: Client | None = field(default=None, init=False)
    _role: str = field(default="", init=False)
    _loaded: LoadedEngine | None = field(default=None, init=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._release()
        if self._client is not None:
            self._client.__exit__()

    def writer(self) -> Generator:
        """Return the judging policy, loaded to write."""
        return self._only("writer", lambda: self.engine.load(self.judging_policy()))

    def reader(self, max_batch_tokens: int) -> TokenScorer:
        """Return the judging policy, loaded to score next tokens in batches of at most `max_batch_tokens`."""
        return self._only("reader", lambda: self.engine.load_scorer(self.judging_policy(), max_batch_tokens))

    def reward_model(self, dtype: str, max_batch_tokens: int) -> RewardScorer:
        """Return the judging model, loaded with its head to score conversations."""

        def load() -> RewardScorer:
            return RewardScorer(load_reward_model(self.judging_policy(), dtype), max_batch_tokens)

        return self._only("reward model", load)

    def client(self, endpoint: Endpoint, key: str) -> Client:
        """Return the client of the judge's server. Messages name its settings as `key`.name."""
        self._client = self._client or endpoint.open(key)
        return self._client

    def _only(self, role: str, load: Callable[[], L]) -> L:
        """Return the loaded policy. Another one is released first, so that the weights are in memory once."""
        if self._role != role:
            self._release()
            self._loaded, self._role = load().__enter__(), role
            self.counts |= self._loaded.counts
        return cast(L, self._loaded)

    def _release(self) -> None:
        loaded, self._loaded, self._role = self._loaded, None, ""
        if loaded is not None:
            loaded.__exit__(None, None, None)

    def judging_policy(self) -> PolicyCheckpoint:
        """Return the policy that judges.

        Raises:
            SelfalignError: nobody was given.
        """
        if self.policy is None:
            raise SelfalignError("the judge needs a policy, but none was given")
        return self.policy


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeOutput:
    """Judgements, and the comparisons they come from, if there are any.

    A judge is called several times. Its `counts` are summed over the calls, its `means` are averaged.
    """

    judgements: list[Judgement]
    comparisons: list[Comparison] = field(default_factory=list)
    counts: Counts = field(default_factory=dict)
    means: Sums = field(default_factory=dict)


class Judge(Protocol):
    """A way to score responses.

    A wanted judgement that fails with all its attempts counts once against `max_failure_rate`. A response with fewer
    than `min_valid_samples` valid judgements is unjudged. `instructions_per_call` is the number of instructions judged
    at a time, each with all its responses. `token_setting` names the setting that limits the length of the judge's
    texts; it is None for a judge that writes nothing. `model` is `NO_MODEL` for a judge that asks no model: it gets no
    policy, and its results depend on none.
    """

    max_failure_rate: float
    degeneracy: DegeneracyThresholds

    @property
    def instructions_per_call(self) -> int: ...

    @property
    def model(self) -> str: ...

    @property
    def min_valid_samples(self) -> int: ...

    @property
    def token_setting(self) -> str | None: ...

    def wanted(self, subjects: Sequence[InstructionResponse]) -> int: ...

    def judge(self, context: JudgeContext, subjects: Sequence[InstructionResponse]) -> JudgeOutput: ...


class TeachableJudge(Protocol):
    """What evaluation fine-tuning asks of a judge: its prompt, and the answer it should give."""

    def ask(self, instruction: str, response: str) -> Prompt: ...

    def answer(self, score: int, justification: str) -> str: ...

    @property
    def opening(self) -> str: ...

    @property
    def min_score(self) -> int: ...

    @property
    def max_score(self) -> int: ...


def asks_a_server(judge: object) -> bool:
    """Whether the judge is behind an endpoint, and not a policy of this run."""
    return bool(getattr(judge, "endpoint", Endpoint()).base_url)


def asks_a_policy(judge: Any) -> bool:
    """Whether a policy judges, and not a server or the judge by itself."""
    return not asks_a_server(judge) and judge.model != NO_MODEL


def verifies(judge: object) -> bool:
    """Whether the judge checks what the instructions say is right, which they must then say."""
    return getattr(judge, "verifies", False)


def only_compares(judge: object) -> bool:
    """Whether the judge's scores only order the responses to one instruction, so that a single one has no score."""
    return getattr(judge, "only_compares", False)


def who_judges(judge: Any, policy: Artifact | None) -> str:
    """Return the name of who judges, for the plan: a server's model, or a policy by its label."""
    if asks_a_server(judge):
        return judge.endpoint.model
    return policy.key if policy is not None else "no model"


def wants_model(judge: Any) -> bool:
    """Whether a model has to be loaded that only judges. There may be no judge at all."""
    return judge is not None and asks_a_policy(judge) and judge.model not in OWN_MODELS


def head_of(judge: Any) -> RewardHead | None:
    """Return how a judge sums the logits of its reward model; None for a judge that is no reward model."""
    return getattr(judge, "head", None)


def by_instruction(subjects: Sequence[InstructionResponse]) -> dict[str, list[InstructionResponse]]:
    """Return {instruction id: its responses}, in their order."""
    candidate_lists: dict[str, list[InstructionResponse]] = {}
    for subject in subjects:
        candidate_lists.setdefault(subject.instruction.id, []).append(subject)
    return candidate_lists


def average(
    subjects: Sequence[InstructionResponse], judgements: Sequence[Judgement], min_valid_samples: int
) -> list[ResponseScore]:
    """Return every response's mean over its valid judgements, their number and variance (n-1 in the denominator).

    A response with fewer than `min_valid_samples` valid judgements has no score.
    """
    valid: dict[str, list[float]] = {subject.response.id: [] for subject in subjects}
    for judgement in judgements:
        if judgement.score is not None:
            valid[judgement.response_id].append(judgement.score)
    return [_summary(response, scores, min_valid_samples) for response, scores in valid.items()]


def _summary(response: str, scores: list[float], min_valid_samples: int) -> ResponseScore:
    mean = math.fsum(scores) / len(scores) if scores else 0.0
    squares = math.fsum((score - mean) ** 2 for score in scores)
    return ResponseScore(
        id=response,
        score=mean if len(scores) >= min_valid_samples else None,
        valid=len(scores),
        variance=squares / (len(scores) - 1) if len(scores) > 1 else None,
    )


def last_attempts(judgements: Sequence[Judgement]) -> list[Judgement]:
    """Return the last attempt at each wanted judgement, which is the one that counts."""
    last = {(judgement.response_id, judgement.sample): judgement for judgement in judgements}
    return list(last.values())


def too_long(subject: InstructionResponse, model: str) -> Judgement:
    """Return the judgement of a response whose prompt exceeds the judge's context. Prompts are never cut to fit."""
    return unjudged(subject, model, JudgementStatus.PROMPT_TOO_LONG, "")


def unjudged(subject: InstructionResponse, model: str, status: JudgementStatus, text: str) -> Judgement:
    """Return the one judgement, without a score, of a response."""
    name = subject.response.id
    return Judgement(id=f"{name}-1", response_id=name, status=status, score=None, text=text, model=model)


def ties(subjects: Sequence[InstructionResponse], scores: Mapping[str, float]) -> list[bool]:
    """For each instruction with two judged responses or more, return whether all scores are equal."""
    candidate_lists = [
        [scores[s.response.id] for s in candidates if s.response.id in scores]
        for candidates in by_instruction(subjects).values()
    ]
    return [len(set(candidates)) == 1 for candidates in candidate_lists if len(candidates) > 1]


def other_scale(prompt: str, low: int, high: int) -> str | None:
    """Return the words by which a rubric names another scale than `low` to `high`; None without such words."""
    named = [*SCALE.finditer(prompt)]
    ends = [
        (int(one["low"] or one["first"] or low), int(one["high"] or one["last"] or one["points"] or one["top"]))
        for one in named
    ]
    others = [found for found, (first, last) in zip(named, ends, strict=True) if first < last]
    return None if (low, high) in ends or not others else " ".join(others[0][0].split())


def check_scale(low: int, high: int) -> None:
    """Check that `low` is below `high`."""
    if low >= high:
        raise SelfalignError(f"judge.min_score must be below judge.max_score, got {low} and {high}")


def check_model(model: str, key: str = "judge") -> None:
    """Check that the judge is one of the run's own models, or looks like a model source."""
    if model == "previous" and key != "judge":
        raise SelfalignError(f"{key}.model=previous: M_{{t-1}} judges new responses only (judge.model)")
    if model not in OWN_MODELS and not re.search("[/:~]", model) and not Path(model or "/nowhere").is_dir():
        raise SelfalignError(
            f"{key}.model must be {', '.join(OWN_MODELS)}, or a folder, hub id or packaged model as model.path takes; "
            f"got {model!r}"
        )


def check_share(max_failure_rate: float, key: str = "judge") -> None:
    """Check that the share lies between 0 and 1."""
    if not 0 <= max_failure_rate <= 1:
        raise SelfalignError(f"{key}.max_failure_rate must lie between 0 and 1, got {max_failure_rate}")


def check_max_batch_tokens(max_batch_tokens: int, key: str = "judge") -> None:
    """Check that the batch size is positive."""
    if max_batch_tokens < 1:
        raise SelfalignError(f"{key}.max_batch_tokens must be 1 or more, got {max_batch_tokens}")
