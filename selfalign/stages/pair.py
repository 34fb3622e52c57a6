"""pair: responses + judgements → preference pairs, or positives."""

from collections import Counter
from dataclasses import dataclass

from selfalign.agreement import length_correlation
from selfalign.data import as_prompt, read_pairs
from selfalign.errors import SelfalignError
from selfalign.files import derive_seed, digest_text
from selfalign.pairing import Candidate, PairRule, pick_pairs
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


def pair(
    out: Workspace,
    *,
    rule: PairRule | PositivesOnly,
    instructions: Artefact,
    responses: Artefact,
    judgements: Artefact,
    seed: int,
) -> Counts:
    """Turns judged responses into what alignment trains on.

    Args:
        out: gets pairs.jsonl, or demonstrations.jsonl for positives.
        rule: which responses are taken.
        instructions: instructions.jsonl.
        responses: responses.jsonl.
        judgements: scores.jsonl.
        seed: draws, together with the instruction's id, where the rule draws.

    Raises:
        SelfalignError: too few are left; the reasons are counted.
    """
    asked = read_records(instructions.path / "instructions.jsonl", Instruction)
    answers: dict[str, list[Response]] = {record.id: [] for record in asked}
    for response in read_records(responses.path / "responses.jsonl", Response):
        answers[response.instruction_id].append(response)
    scores = read_scores(judgements.path)
    if isinstance(rule, PositivesOnly):
        counts = _keep_positives(out, rule, asked, answers, scores)
    else:
        counts = _keep_pairs(out, rule, asked, answers, scores, seed)
    judged = [[(scores[r.id], r.tokens) for r in family if r.id in scores] for family in answers.values()]
    biased = length_correlation(judged)
    return counts | ({} if biased is None else {"score_length_correlation": biased})


def _keep_pairs(
    out: Workspace,
    rule: PairRule,
    asked: list[Instruction],
    answers: dict[str, list[Response]],
    scores: dict[str, float],
    seed: int,
) -> Counts:
    """Writes the pairs of every instruction; `candidate_pairs` is kept and dropped ones together."""
    drops: Counter[str] = Counter()
    kept: list[PreferencePair] = []
    longer = 0
    for record in asked:
        picked, dropped = pick_pairs(rule, answers[record.id], scores, derive_seed(seed, record.id))
        drops += dropped
        kept += [_pair_of(record, chosen, rejected) for chosen, rejected in picked]
        longer += sum(chosen.response.tokens - rejected.response.tokens for chosen, rejected in picked)
    if len(kept) < rule.minimum_pairs:
        raise SelfalignError(
            f"{out.label}: {len(kept)} pairs from {len(asked)} instructions, fewer than pair.minimum_pairs="
            f"{rule.minimum_pairs} (dropped: {dict(drops)}); a judge that ties too often needs evaluation "
            "fine-tuning or judge=expected_score, alike candidates a higher temperature"
        )
    write_records(out.path / "pairs.jsonl", kept)
    margins = [made.chosen_score - made.rejected_score for made in kept]  # pyright: ignore[reportOperatorIssue]
    written = [response for candidates in answers.values() for response in candidates]
    return {
        "pairs": len(kept),
        "candidate_pairs": sum(rule.wanted(len(candidates)) for candidates in answers.values()),
        "mean_score_margin": sum(margins) / len(kept),
        "mean_length_difference": longer / len(kept),
        "unjudged_responses": sum(response.id not in scores for response in written),
        "dropped": dict(sorted(drops.items())),
    }


def _pair_of(instruction: Instruction, chosen: Candidate, rejected: Candidate) -> PreferencePair:
    best, worst = chosen.response, rejected.response
    return PreferencePair(
        id=digest_text(best.id + worst.id)[:16],
        prompt=as_prompt(instruction.text),
        chosen=best.text,
        rejected=worst.text,
        chosen_score=chosen.score,
        rejected_score=rejected.score,
        chosen_finished=best.finish_reason is FinishReason.EOS,
        rejected_finished=worst.finish_reason is FinishReason.EOS,
        instruction_id=instruction.id,
        chosen_id=best.id,
        rejected_id=worst.id,
    )


def given_pairs(out: Workspace, *, source: str, count: int, content: str, held_out: list[Artefact]) -> Counts:
    """Given preference data as pairs, and its chosen responses as demonstrations.

    Args:
        out: gets pairs.jsonl and demonstrations.jsonl.
        source: a data source in one of TRL's preference formats, or of ranked answers.
        count: takes the first so many; 0 takes all.
        content: digest of the source.
        held_out: instructions.jsonl of what no training may see; pairs that ask one of these are dropped.

    Raises:
        SelfalignError: no pair is left.
    """
    given, drops = read_pairs(source)
    known = [record for part in held_out for record in read_records(part.path / "instructions.jsonl", Instruction)]
    apart = _without_held_out(given, {record.text for record in known})
    pairs = apart[: count or None]
    drops.update(held_out=len(given) - len(apart), surplus=len(apart) - len(pairs))
    if not pairs:
        raise SelfalignError(f"{source}: no usable pair (dropped: {dict(+drops)})")
    write_records(out.path / "pairs.jsonl", pairs)
    chosen = [Demonstration(id=p.id, prompt=p.prompt, response=p.chosen, source="positive") for p in pairs]
    write_records(out.path / "demonstrations.jsonl", chosen)
    return {"pairs": len(pairs), "dropped": dict(sorted((+drops).items()))}


def _without_held_out(pairs: list[PreferencePair], held_out: set[str]) -> list[PreferencePair]:
    """Pairs none of whose turns is a held-out instruction."""

    def turns(pair: PreferencePair) -> set[str]:
        return {pair.prompt} if isinstance(pair.prompt, str) else {message["content"] for message in pair.prompt}

    return [pair for pair in pairs if not turns(pair) & held_out]


def gather_pairs(out: Workspace, *, parts: list[Artefact]) -> Counts:
    """What several iterations made, together, the earliest first.

    Args:
        out: gets pairs.jsonl, or demonstrations.jsonl for positives, whichever the parts have.
        parts: what `pair` made in each iteration; M1's demonstrations may come before positives.
    """
    if not (parts[0].path / "pairs.jsonl").exists():
        positives = [d for part in parts for d in read_records(part.path / "demonstrations.jsonl", Demonstration)]
        write_records(out.path / "demonstrations.jsonl", positives)
        return {"positives": len(positives)}
    pairs = [made for part in parts for made in read_records(part.path / "pairs.jsonl", PreferencePair)]
    write_records(out.path / "pairs.jsonl", pairs)
    return {"pairs": len(pairs)}


def _keep_positives(
    out: Workspace,
    rule: PositivesOnly,
    asked: list[Instruction],
    answers: dict[str, list[Response]],
    scores: dict[str, float],
) -> Counts:
    kept: list[Demonstration] = []
    drops: Counter[str] = Counter()
    for record in asked:
        for response in answers[record.id]:
            reason = _against_positive(response, scores.get(response.id), rule)
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
    return {"positives": len(kept), "dropped": dict(sorted(drops.items()))}


def _against_positive(response: Response, score: float | None, rule: PositivesOnly) -> str | None:
    """Why a response is no positive, or None."""
    if score is None:
        return "unjudged"
    if score < rule.minimum_score:
        return "low_score"
    if not response.text:
        return "empty_response"
    return None if response.finish_reason is FinishReason.EOS else "cut_response"
