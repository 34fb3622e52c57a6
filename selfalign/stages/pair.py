"""pair: responses + judgements → preference pairs, or positives."""

from collections import Counter
from dataclasses import dataclass

from selfalign.data import as_prompt, read_pairs
from selfalign.errors import SelfalignError
from selfalign.files import digest_text
from selfalign.records import (
    Demonstration,
    FinishReason,
    Instruction,
    PreferencePair,
    Response,
    read_records,
    read_scores,
    write_records,
)
from selfalign.store import Artefact, Counts, Workspace


@dataclass(kw_only=True, slots=True)
class BestWorst:
    """The response with the highest mean score against the one with the lowest; a tie drops the instruction.

    arXiv 2401.10020, section 2.2.

    Attributes:
        minimum_margin: the scores must differ by more than this.
        minimum_pairs: the run stops when fewer pairs are left.
    """

    minimum_margin: float = 0.0
    minimum_pairs: int = 1

    def __post_init__(self) -> None:
        if self.minimum_margin < 0:
            raise SelfalignError(f"pair.minimum_margin must be 0 or more, got {self.minimum_margin}")
        if self.minimum_pairs < 1:
            raise SelfalignError(f"pair.minimum_pairs must be 1 or more, got {self.minimum_pairs}")


@dataclass(kw_only=True, slots=True)
class PositivesOnly:
    """Good responses become SFT examples instead of pairs: the paper's "positives only" variant.

    Attributes:
        minimum_score: the mean score a response needs; the paper takes perfect fives.
        minimum_examples: the run stops when fewer are left.
    """

    minimum_score: float = 5.0
    minimum_examples: int = 1

    def __post_init__(self) -> None:
        if self.minimum_examples < 1:
            raise SelfalignError(f"pair.minimum_examples must be 1 or more, got {self.minimum_examples}")


PairRule = BestWorst | PositivesOnly


def pair(
    out: Workspace, *, rule: PairRule, instructions: Artefact, responses: Artefact, judgements: Artefact
) -> Counts:
    """Turns judged responses into what alignment trains on.

    Args:
        out: gets pairs.jsonl, or demonstrations.jsonl for positives.
        rule: which responses are taken.
        instructions: instructions.jsonl.
        responses: responses.jsonl.
        judgements: scores.jsonl.

    Raises:
        SelfalignError: too few are left; the reasons are counted.
    """
    asked = read_records(instructions.path / "instructions.jsonl", Instruction)
    answers: dict[str, list[Response]] = {}
    for response in read_records(responses.path / "responses.jsonl", Response):
        answers.setdefault(response.instruction_id, []).append(response)
    scores = read_scores(judgements.path)
    drops: Counter[str] = Counter()
    judged: dict[str, list[Response]] = {}
    unjudged = 0
    for record in asked:
        candidates = answers.get(record.id, [])
        judged[record.id] = [response for response in candidates if response.id in scores]
        unjudged += len(candidates) - len(judged[record.id])
    if isinstance(rule, PositivesOnly):
        drops["unjudged"] = unjudged
        return _keep_positives(out, rule, asked, judged, scores, drops)
    pairs = [best_worst(record, judged[record.id], scores, rule, drops) for record in asked]
    kept = [made for made in pairs if made is not None]
    if len(kept) < rule.minimum_pairs:
        raise SelfalignError(
            f"{out.label}: {len(kept)} pairs from {len(asked)} instructions, fewer than pair.minimum_pairs="
            f"{rule.minimum_pairs} (dropped: {dict(+drops)}); a judge that ties too often needs evaluation "
            "fine-tuning or judge=expected_score, alike candidates a higher temperature"
        )
    write_records(out.path / "pairs.jsonl", kept)
    margins = [made.chosen_score - made.rejected_score for made in kept]  # pyright: ignore[reportOperatorIssue]
    longer = [len(made.chosen) - len(made.rejected) for made in kept]
    return {
        "pairs": len(kept),
        "mean_score_margin": sum(margins) / len(kept),
        "mean_length_difference": sum(longer) / len(kept),
        "unjudged_responses": unjudged,
        "dropped": dict(sorted((+drops).items())),
    }


def best_worst(
    instruction: Instruction,
    responses: list[Response],
    scores: dict[str, float],
    rule: BestWorst,
    drops: Counter[str],
) -> PreferencePair | None:
    """The pair of one instruction, or None with the reason counted; equal scores go by position."""
    if len(responses) < 2:
        drops["fewer_than_two_judged"] += 1
        return None
    best = max(responses, key=lambda response: scores[response.id])
    worst = min(responses, key=lambda response: scores[response.id])
    margin = scores[best.id] - scores[worst.id]
    if margin == 0 or margin <= rule.minimum_margin:
        drops["tie" if margin == 0 else "small_margin"] += 1
        return None
    if best.text == worst.text or not best.text or not worst.text:
        drops["identical" if best.text == worst.text else "empty_response"] += 1
        return None
    return PreferencePair(
        id=digest_text(best.id + worst.id)[:16],
        prompt=as_prompt(instruction.text),
        chosen=best.text,
        rejected=worst.text,
        chosen_score=scores[best.id],
        rejected_score=scores[worst.id],
        chosen_finished=best.finish_reason is FinishReason.EOS,
        rejected_finished=worst.finish_reason is FinishReason.EOS,
        instruction_id=instruction.id,
        chosen_id=best.id,
        rejected_id=worst.id,
    )


def given_pairs(out: Workspace, *, source: str, content: str) -> Counts:
    """Given preference data as pairs, and its chosen responses as demonstrations.

    Args:
        out: gets pairs.jsonl and demonstrations.jsonl.
        source: a data source in one of TRL's preference formats.
        content: digest of the source.

    Raises:
        SelfalignError: no pair is left.
    """
    pairs, drops = read_pairs(source)
    if not pairs:
        raise SelfalignError(f"{source}: no usable pair (dropped: {dict(drops)})")
    write_records(out.path / "pairs.jsonl", pairs)
    chosen = [Demonstration(id=p.id, prompt=p.prompt, response=p.chosen, source="positive") for p in pairs]
    write_records(out.path / "demonstrations.jsonl", chosen)
    return {"pairs": len(pairs), "dropped": dict(sorted(drops.items()))}


def _keep_positives(
    out: Workspace,
    rule: PositivesOnly,
    asked: list[Instruction],
    judged: dict[str, list[Response]],
    scores: dict[str, float],
    drops: Counter[str],
) -> Counts:
    kept: list[Demonstration] = []
    for record in asked:
        for response in judged[record.id]:
            reason = _against_positive(response, scores[response.id], rule)
            if reason:
                drops[reason] += 1
            else:
                prompt = as_prompt(record.text)
                kept.append(Demonstration(id=response.id, prompt=prompt, response=response.text, source="positive"))
    if len(kept) < rule.minimum_examples:
        raise SelfalignError(
            f"{out.label}: {len(kept)} responses score {rule.minimum_score} or more, fewer than "
            f"pair.minimum_examples={rule.minimum_examples} (dropped: {dict(drops)}); lower pair.minimum_score"
        )
    write_records(out.path / "demonstrations.jsonl", kept)
    return {"positives": len(kept), "dropped": dict(sorted((+drops).items()))}


def _against_positive(response: Response, score: float, rule: PositivesOnly) -> str | None:
    if score < rule.minimum_score:
        return "low_score"
    if not response.text:
        return "empty_response"
    return None if response.finish_reason is FinishReason.EOS else "cut_response"
