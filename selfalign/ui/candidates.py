"""What became of each response: its score, its role in training data or the reason why it has none, and whether judges
or orders disagree about it. One pass over the files of an iteration or an evaluation.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import combinations
from typing import Any

from selfalign.core.errors import SelfalignError
from selfalign.core.files import derive_seed
from selfalign.core.jsonl import join_sorted
from selfalign.core.records import (
    Comparison,
    Demonstration,
    Instruction,
    LabelledResponse,
    PreferencePair,
    Response,
    ResponseScore,
    Verdict,
)
from selfalign.data.pair_rules import AllOrdered, BestVsK, BestWorst, ByWriter, RandomPair, pick_pairs
from selfalign.runs.labels import Label
from selfalign.stages.pair import Labels, PositivesOnly, Rule, reason_to_drop
from selfalign.ui.record_file import id_of, owner_of
from selfalign.ui.run_records import RunRecords

RULES: dict[str, type[Rule]] = {
    kind.__name__: kind for kind in (BestWorst, RandomPair, AllOrdered, BestVsK, ByWriter, Labels, PositivesOnly)
}
"""{name of the class in a manifest: the rule}. A rule of the user's own cannot be asked again."""

CHOSEN, REJECTED = "chosen", "rejected"


@dataclass(slots=True)
class Group:
    """An instruction with its responses.

    Attributes:
        instruction: the instruction.
        responses: its responses.
        scores: {response id: mean score} by the judge that counts.
        by_judge: {judgements: {response id: mean score}} of every judge of its own.
        comparisons: comparisons of these responses with one another, or with another model's.
        roles: {response id: "chosen", "rejected", "chosen, rejected", "desirable", "undesirable" or "positive"}.
        reasons: {response id: why it has no role}, as the pair rule says.
    """

    instruction: Instruction
    responses: list[Response]
    scores: dict[str, float] = field(default_factory=dict)
    by_judge: dict[Label, dict[str, float]] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    roles: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """The reasons why none of its responses has a role, each once; empty if one has a role."""
        return "" if self.roles else ", ".join(dict.fromkeys(filter(None, self.reasons.values())))

    def disputed_by_judges(self) -> set[str]:
        """Return the responses that one judge puts above another response, and another judge below it."""
        disputed: set[str] = set()
        for one, other in combinations([response.id for response in self.responses], 2):
            if judges_disagree(self.by_judge.values(), one, other):
                disputed |= {one, other}
        return disputed

    def disputed_by_order(self) -> set[str]:
        """Return the responses for which the verdict depends on which of two is shown first."""
        disputed = [one for one in self.comparisons if orders_disagree(one)]
        return {name for one in disputed for name in (one.first_id, one.second_id)}


def judges_disagree(by_judge: Iterable[Mapping[str, float]], one: str, other: str) -> bool:
    """Return whether of two responses one judge scores the first higher, and another judge the second."""
    differences = [scores[one] - scores[other] for scores in by_judge if one in scores and other in scores]
    return any(d > 0 for d in differences) and any(d < 0 for d in differences)


def orders_disagree(comparison: Comparison) -> bool:
    """Return whether the verdicts in the two orders are not the same."""
    turned = {Verdict.A: Verdict.B, Verdict.B: Verdict.A, Verdict.TIE: Verdict.TIE}
    if comparison.forward is None or comparison.backward is None:
        return False
    return comparison.forward != turned[comparison.backward]


def stream_candidates(run: RunRecords, responses: Label) -> Iterator[Group]:
    """Yield the instructions that responses answer, in their order, with all that is known of the responses.

    Raises:
        SelfalignError: a file is damaged, or the records of two files have another order.
    """
    instructions = run.instructions_of(responses)
    if instructions is None:
        raise SelfalignError(f"{run.name}: the instructions of {responses} are missing")
    judges = run.judges_of(responses)
    counts = next(iter(reversed([judge for judge in judges if not _is_second(run, judge)])), None)
    scored = {judge: _behind(run, responses, Response, judge, ResponseScore, id_of) for judge in judges}
    compared = [
        _behind(run, instructions, Instruction, one, Comparison, owner_of) for one in run.comparisons_of(responses)
    ]
    settled = [RoleReader.open(run, responses, instructions, pairs) for pairs in run.pairs_of(responses)]
    for instruction, answers in _behind(run, instructions, Instruction, responses, Response, owner_of):
        group = Group(instruction, answers)
        for judge, stream in scored.items():
            known = {answer.id: score.score for answer in answers for score in next(stream)[1]}
            group.by_judge[judge] = {name: score for name, score in known.items() if score is not None}
        group.scores = group.by_judge[counts] if counts is not None else {}
        group.comparisons = [one for stream in compared for one in next(stream)[1]]
        for reader in settled:
            reader.settle(group)
        yield group
    for stream in (*scored.values(), *compared, *(reader.records for reader in settled)):
        next(stream, None)  # A record that is left over is missed by now.


@dataclass(slots=True)
class RoleReader:
    """Reads which responses became training data, and asks the rule again why others did not.

    Attributes:
        records: instructions with their pairs, or responses with their label or demonstration.
        by_response: whether it is the latter.
        rule: the rule of the artifact; None if it cannot be asked.
        seed: of its draws.
    """

    records: Iterator[tuple[Any, list[Any]]]
    by_response: bool
    rule: Rule | None
    seed: int

    @classmethod
    def open(cls, run: RunRecords, responses: Label, instructions: Label, pairs: Label) -> "RoleReader":
        inputs = run.finished[pairs].inputs
        kinds = [kind for kind in (PreferencePair, LabelledResponse, Demonstration) if run.records(pairs, kind)]
        kind = kinds[0] if kinds else PreferencePair
        if kind is PreferencePair:
            records = _behind(run, instructions, Instruction, pairs, kind, owner_of)
        else:
            records = _behind(run, responses, Response, pairs, kind, id_of)
        return cls(records, kind is not PreferencePair, rule_of(inputs["rule"]), inputs["seed"])

    def settle(self, group: Group) -> None:
        """Add roles and reasons to a group."""
        times = len(group.responses) if self.by_response else 1
        for one in [one for _ in range(times) for one in next(self.records)[1]]:
            for name, role in roles_in(one):
                known = group.roles.get(name, "")
                group.roles[name] = role if known in ("", role) else f"{CHOSEN}, {REJECTED}"
        for name, reason in self._reasons(group).items():
            if name not in group.roles:
                group.reasons[name] = reason

    def _reasons(self, group: Group) -> dict[str, str]:
        """Return {response id: why it would have no role}."""
        rule, responses = self.rule, group.responses
        if rule is None:
            return {}
        if isinstance(rule, PositivesOnly):
            return {one.id: reason_to_drop(one, group.scores.get(one.id), rule) or "" for one in responses}
        if isinstance(rule, Labels):
            return {one.id: label for one, label in rule.label(responses, group.scores) if isinstance(label, str)}
        scores = group.scores if rule.needs_scores else rule.assumed_scores(responses)
        picked, dropped = pick_pairs(rule, responses, scores, derive_seed(self.seed, group.instruction.id))
        others = "not_picked" if picked else ", ".join(sorted(dropped)) or "not_picked"
        return {one.id: others if one.id in scores else "unjudged" for one in responses}


def rule_of(settings: dict[str, Any]) -> Rule | None:
    """Return the pair rule of a manifest; None for one of the user's own, or of another version."""
    kind = RULES.get(settings["class"])
    known = {name: value for name, value in settings.items() if name != "class"}
    return kind(**known) if kind is not None and known.keys() <= {one.name for one in fields(kind)} else None


def roles_in(record: PreferencePair | LabelledResponse | Demonstration) -> list[tuple[str, str]]:
    """Return (response id, role) of the responses in a record of training data."""
    if isinstance(record, PreferencePair):
        return [(record.chosen_id, CHOSEN), (record.rejected_id, REJECTED)]
    if isinstance(record, LabelledResponse):
        return [(record.response_id, "desirable" if record.desirable else "undesirable")]
    return [(record.id, "positive")]


def _is_second(run: RunRecords, judgements: Label) -> bool:
    """Whether judgements are those of a second judge, who has no part in the scores."""
    return bool(run.made_from(judgements, "second", "pair")) and not run.made_from(judgements, "judgements", "pair")


def _behind(
    run: RunRecords, first: Label, leaders: type[Any], second: Label, followers: type[Any], owner: Callable[[Any], str]
) -> Iterator[tuple[Any, list[Any]]]:
    """Yield each record of one file with those of another that belong to it."""
    leading, following = run.records(first, leaders), run.records(second, followers)
    path = second.link_in(run.folder)
    return join_sorted(leading.stream() if leading else (), following.stream() if following else (), owner, path)
