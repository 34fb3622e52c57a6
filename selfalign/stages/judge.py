"""judge: instructions + responses + a judging policy → judgements.

Two ways to the score that arXiv 2401.10020 asks the model for: it writes a justification and a last line
`Score: n` (`SampledScore`, the paper's), or the score is the mean of its distribution over the score tokens, read
in one forward pass (`ExpectedScore`).
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from selfalign.batches import Group, share_prompt
from selfalign.data import as_prompt
from selfalign.errors import SelfalignError
from selfalign.files import derive_seed, text_or_file
from selfalign.generation import Request, Sampling, Transformers
from selfalign.metrics import judgement_statistics
from selfalign.models import Policy, PolicyFiles
from selfalign.records import (
    FinishReason,
    Instruction,
    Judgement,
    JudgementStatus,
    Prompt,
    Response,
    read_records,
    write_records,
)
from selfalign.scoring import Scorer
from selfalign.store import Artefact, Counts, Journal, Workspace
from selfalign.tokenization import encode_prompt, fill

PREFIX = "Score: "


@dataclass(kw_only=True, slots=True)
class SampledScore:
    """The judge writes a justification and a last line `Score: n`; several such judgements are averaged.

    Attributes:
        prompt: the rubric, a text or "file:PATH", with {instruction} and {response} where they belong.
        model: who judges: "self" (M_t, the paper), "sft" (M1) or "base" (M0).
        low: the lowest score of the rubric.
        high: the highest.
        samples: judgements of each response; the mean of the valid ones counts.
        max_failed_share: the run stops when a larger share of judgements carries no score.
        sampling: how judgements are drawn.
    """

    prompt: str
    model: str = "self"
    low: int = 0
    high: int = 5
    samples: int = 3
    opening: ClassVar[str] = ""
    max_failed_share: float = 0.5
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        self.prompt = text_or_file(self.prompt, "judge.prompt")
        check_judge(self.prompt, self.model, self.low, self.high)
        self.sampling.check("judge.sampling")
        if self.samples < 1:
            raise SelfalignError(f"judge.samples must be 1 or more, got {self.samples}")
        if not 0 <= self.max_failed_share <= 1:
            raise SelfalignError(f"judge.max_failed_share must lie between 0 and 1, got {self.max_failed_share}")

    def ask(self, instruction: str, response: str) -> Prompt:
        """The judge's prompt about one response."""
        return as_prompt(fill(self.prompt, {"instruction": instruction, "response": response}))

    def answer(self, score: int, justification: str) -> str:
        """What a judgement with this score looks like, for evaluation fine-tuning."""
        return f"{justification}\n{PREFIX}{score}".lstrip()


@dataclass(kw_only=True, slots=True)
class ExpectedScore:
    """The probability-weighted mean over the score tokens that may follow `Score: `, in one forward pass.

    Attributes:
        prompt: the rubric, a text or "file:PATH", with {instruction} and {response} where they belong.
        model: who judges: "self" (M_t, the paper), "sft" (M1) or "base" (M0).
        low: the lowest score of the rubric.
        high: the highest; both are single digits.
        batch_tokens: the most tokens of a forward pass.
    """

    prompt: str
    model: str = "self"
    low: int = 0
    high: int = 5
    batch_tokens: int = 2048
    opening: ClassVar[str] = PREFIX

    def __post_init__(self) -> None:
        self.prompt = text_or_file(self.prompt, "judge.prompt")
        check_judge(self.prompt, self.model, self.low, self.high)
        if not 0 <= self.low < self.high <= 9:
            raise SelfalignError(
                f"judge.low and judge.high must be one digit each for expected_score, got {self.low} to {self.high}"
            )
        if self.batch_tokens < 1:
            raise SelfalignError(f"judge.batch_tokens must be 1 or more, got {self.batch_tokens}")

    def ask(self, instruction: str, response: str) -> Prompt:
        """The judge's prompt about one response."""
        return as_prompt(fill(self.prompt, {"instruction": instruction, "response": response}))

    def answer(self, score: int, justification: str) -> str:
        """What follows the opening, for evaluation fine-tuning: the score alone."""
        return str(score)


Judge = SampledScore | ExpectedScore


@dataclass(frozen=True, slots=True)
class Subject:
    """A response with the instruction it answers."""

    instruction: Instruction
    response: Response


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a judgement's text says: `score` is a number exactly when `status` is ok."""

    status: JudgementStatus
    score: float | None = None


def judge(
    out: Workspace,
    *,
    judge: Judge,
    policy: Artefact,
    instructions: Artefact,
    responses: Artefact,
    generate: Transformers,
    seed: int,
) -> Counts:
    """Judges every response.

    Args:
        out: gets judgements.jsonl.
        judge: the rubric and how its score is read.
        policy: who judges.
        instructions: instructions.jsonl.
        responses: responses.jsonl.
        generate: the backend for judgements that are written.
        seed: draws their tokens.

    Raises:
        SelfalignError: too many judgements carry no score; what came back is shown, and kept for the next try.
    """
    asked = {record.id: record for record in read_records(instructions.path / "instructions.jsonl", Instruction)}
    answers = read_records(responses.path / "responses.jsonl", Response)
    subjects = [Subject(asked[answer.instruction_id], answer) for answer in answers]
    total = len(subjects) * (judge.samples if isinstance(judge, SampledScore) else 1)
    with out.journal(total, "judgements") as journal:
        if isinstance(judge, ExpectedScore):
            judgements = expected_scores(journal, judge, PolicyFiles(policy.path).load(generate.dtype), subjects)
        else:
            judgements = sampled_scores(journal, judge, policy, generate, subjects, seed)
    failed = [judgement for judgement in judgements if judgement.status is not JudgementStatus.OK]
    allowed = judge.max_failed_share if isinstance(judge, SampledScore) else 0.5
    if len(failed) > allowed * len(judgements) or len(failed) == len(judgements):
        raise SelfalignError(_failure(out.label, judgements, failed))
    order = {subject.response.id: index for index, subject in enumerate(subjects)}
    judgements.sort(key=lambda judgement: (order[judgement.response_id], judgement.id))
    write_records(out.path / "judgements.jsonl", judgements)
    statuses = Counter(judgement.status.value for judgement in failed)
    return {
        "judgements": len(judgements),
        "dropped": dict(sorted(statuses.items())),
        **judgement_statistics(judgements),
    }


def parse_score(text: str, low: float, high: float, finish_reason: FinishReason = FinishReason.EOS) -> Parsed:
    """Reads the score from newly generated judgement text.

    A score stands behind the word "Score" and a colon at the beginning of a line, whatever markup surrounds it;
    `4/5` counts as 4 where 5 is the highest score. The last one counts.

    Returns:
        ok with the score; no_score (truncated if the text was cut); ambiguous if two different scores stand there;
        out_of_range if it is not between `low` and `high`. A score is never clipped.
    """
    lines = text.splitlines()
    found = [match for match in map(SCORE_LINE.fullmatch, lines) if match]
    cut = finish_reason is FinishReason.LENGTH
    if cut and found and text.endswith(found[-1].string):
        found.pop()  # "Score: 1" at the cut may have been going to be "Score: 10".
    if not found:
        return Parsed(JudgementStatus.TRUNCATED if cut else JudgementStatus.NO_SCORE)
    if len({float(match["score"]) for match in map(SCORE_START.match, lines) if match}) > 1:
        return Parsed(JudgementStatus.AMBIGUOUS)
    score, scale = float(found[-1]["score"]), found[-1]["of"]
    if not low <= score <= high or (scale is not None and float(scale) != high):
        return Parsed(JudgementStatus.OUT_OF_RANGE)
    return Parsed(JudgementStatus.OK, score)


SCORE_START = re.compile(
    r"[\s>*_#`\-]*(?:(?:final|total|overall)\s+)?score[\s*_`]*[:=][\s*_`]*(?P<score>[+-]?[0-9]+(?:\.[0-9]+)?)",
    re.IGNORECASE,
)
"""A line that begins with a score, whatever follows."""

SCORE_LINE = re.compile(
    SCORE_START.pattern + r"(?:\s*(?:/|out of)\s*(?P<of>[0-9]+(?:\.[0-9]+)?))?(?:\s*points?)?[\s*_`.!]*",
    re.IGNORECASE,
)
"""A line that is a score and nothing else."""


def expected_scores(
    journal: Journal, judge: ExpectedScore, policy: Policy, subjects: Sequence[Subject]
) -> list[Judgement]:
    """One judgement a response: the mean of the judge's score distribution.

    The responses to one instruction share the rubric and the instruction, which are computed once for all.
    """
    tokenizer = policy.tokenizer
    digits = score_tokens(policy, judge.low, judge.high)
    families: dict[str, list[Subject]] = {}
    for subject in subjects:
        families.setdefault(subject.instruction.id, []).append(subject)
    judgements: list[Judgement] = []
    groups: list[Group] = []
    members: dict[str, list[Subject]] = {}
    for name, family in families.items():
        prompts = [
            encode_prompt(tokenizer, judge.ask(subject.instruction.text, subject.response.text), judge.opening)
            for subject in family
        ]
        fits = [len(prompt) < policy.context for prompt in prompts]
        judgements += [_too_long(s, policy.digest) for s, fit in zip(family, fits, strict=True) if not fit]
        members[name] = [s for s, fit in zip(family, fits, strict=True) if fit]
        fitting = [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]
        if fitting:
            groups.append(share_prompt(name, fitting, [[] for _ in fitting]))
    scorer = Scorer(policy, judge.batch_tokens)
    for number, batch in enumerate(scorer.plan(groups)):
        chosen = [subject for group in batch for subject in members[group.id]]
        rows = journal.batch(
            str(number),
            len(chosen),
            lambda batch=batch: [row for g in scorer.choose(batch, digits) for row in g],
        )
        judgements += [_expected(subject, row, judge, policy.digest) for subject, row in zip(chosen, rows, strict=True)]
    return judgements


def score_tokens(policy: Policy, low: int, high: int) -> list[int]:
    """The token of each score behind `Score: `.

    Raises:
        SelfalignError: this tokenizer does not write each score as one token there.
    """
    encode = policy.tokenizer
    prompts = as_prompt("x")
    prefix = encode_prompt(encode, prompts, PREFIX)
    tails = [encode_prompt(encode, prompts, f"{PREFIX}{score}")[len(prefix) :] for score in range(low, high + 1)]
    whole = [encode_prompt(encode, prompts, f"{PREFIX}{score}")[: len(prefix)] for score in range(low, high + 1)]
    if any(len(tail) != 1 for tail in tails) or any(start != prefix for start in whole):
        raise SelfalignError("this model's tokenizer does not write a score as one token; choose judge=additive")
    return [tail[0] for tail in tails]


def sampled_scores(
    journal: Journal,
    judge: SampledScore,
    policy: Artefact,
    generate: Transformers,
    subjects: Sequence[Subject],
    seed: int,
) -> list[Judgement]:
    """`samples` written judgements of each response."""
    generator = generate.load(PolicyFiles(policy.path))
    prompts = [
        encode_prompt(generator.tokenizer, judge.ask(subject.instruction.text, subject.response.text))
        for subject in subjects
    ]
    limit = generator.context - judge.sampling.max_new_tokens
    judgements = [_too_long(s, generator.digest) for s, p in zip(subjects, prompts, strict=True) if len(p) > limit]
    fitting = [(s, p) for s, p in zip(subjects, prompts, strict=True) if len(p) <= limit]
    lengths = [len(prompt) for _, prompt in fitting]
    for number, batch in enumerate(generator.plan(lengths, judge.samples, judge.sampling.max_new_tokens)):
        members = [fitting[index] for index in batch]
        requests = [
            Request(prompt=prompt, seeds=[derive_seed(seed, s.response.id, n) for n in range(judge.samples)])
            for s, prompt in members
        ]
        rows = journal.batch(
            str(number),
            len(members) * judge.samples,
            lambda requests=requests: [
                [(completion.text, completion.finish_reason.value) for completion in completions]
                for completions in generator.write(requests, judge.sampling)
            ],
        )
        for (subject, _), texts in zip(members, rows, strict=True):
            for sample, (text, reason) in enumerate(texts, start=1):
                parsed = parse_score(text, judge.low, judge.high, FinishReason(reason))
                judgements.append(_judgement(subject, parsed, text, generator.digest, sample))
    return judgements


def _expected(subject: Subject, logps: list[float], judge: ExpectedScore, model: str) -> Judgement:
    """Mean and entropy of the distribution over the scores, given each score token's log-probability."""
    highest = max(logps)
    weights = [math.exp(logp - highest) for logp in logps]
    shares = [weight / sum(weights) for weight in weights]
    score = sum(share * value for share, value in zip(shares, range(judge.low, judge.high + 1), strict=True))
    return Judgement(
        id=f"{subject.response.id}-1",
        response_id=subject.response.id,
        status=JudgementStatus.OK,
        score=score,
        text=f"{PREFIX}{score:.2f}",
        model=model,
        entropy=-sum(share * math.log(share) for share in shares if share > 0),
    )


def _judgement(subject: Subject, parsed: Parsed, text: str, model: str, sample: int) -> Judgement:
    return Judgement(
        id=f"{subject.response.id}-{sample}",
        response_id=subject.response.id,
        status=parsed.status,
        score=parsed.score,
        text=text,
        model=model,
    )


def _too_long(subject: Subject, model: str) -> Judgement:
    return _judgement(subject, Parsed(JudgementStatus.PROMPT_TOO_LONG), "", model, 1)


def _failure(label: str, judgements: list[Judgement], failed: list[Judgement]) -> str:
    reasons = dict(Counter(judgement.status.value for judgement in failed))
    shown = "; ".join(repr(judgement.text[:80]) for judgement in failed[:3])
    return (
        f"{label}: {len(failed)} of {len(judgements)} judgements carry no score ({reasons}); the judge wrote for "
        f"example {shown}. Try judge=expected_score, or a model that can follow the rubric"
    )


def check_judge(prompt: str, model: str, low: int, high: int) -> None:
    """What both judges' settings must satisfy."""
    for name in ("{instruction}", "{response}"):
        if name not in prompt:
            raise SelfalignError(f"judge.prompt lacks {name}")
    if model not in ("self", "sft", "base"):
        raise SelfalignError(f"judge.model must be self, sft or base; got {model!r}")
    if low >= high:
        raise SelfalignError(f"judge.low must be below judge.high, got {low} and {high}")
