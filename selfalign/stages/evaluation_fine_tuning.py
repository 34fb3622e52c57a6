"""evaluation_fine_tuning: IFT demonstrations + the SFT baseline's judgements → IFT + EFT demonstrations."""

from collections import Counter
from itertools import pairwise

from selfalign.core.errors import SelfalignError
from selfalign.core.files import digest_text
from selfalign.core.jsonl import read_records, write_records
from selfalign.core.records import Demonstration, Judgement, RankedAnswers
from selfalign.judges.protocol import TeachableJudge
from selfalign.metrics import catalog
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.store.artifacts import Artifact, Counts, StageOutput
from selfalign.store.stage import Size, records_in, stage

Scored = tuple[float, str]
"""A judgement's score and text."""

Target = tuple[float, Demonstration]
"""An EFT example with the score it teaches."""


def size(*, seeds: Artifact, questions: Artifact, **others: object) -> Size:
    """Return at most all IFT demonstrations and one EFT example for each judged answer."""
    most = records_in(seeds, "demonstrations") + records_in(questions, "responses")
    return Size("IFT + judgements in the humans' order", {"demonstrations": most})


@stage(size=size)
def evaluation_fine_tuning(
    out: StageOutput,
    *,
    judge: TeachableJudge,
    policy: Artifact,
    seeds: Artifact,
    questions: Artifact,
    judgements: Artifact,
    max_score_imbalance: float,
) -> Counts:
    """Keep judgements that agree with the ranks as EFT examples (arXiv 2401.10020, section 3.1).

    The ranks are the humans', or those of `distorted_questions` (arXiv 2408.02666).

    A draw is one judgement of each answer to a question. A question contributes its first draw whose scores are
    strictly in the humans' order. The paper does not define ties; here a tie is a disagreement, as in judge quality.

    Args:
        out: receives demonstrations.jsonl.
        judge: its prompt becomes the prompt of each example.
        policy: the SFT baseline, which must have written all judgements.
        seeds: demonstrations.jsonl with the IFT examples.
        questions: ranked.jsonl.
        judgements: judgements.jsonl of their answers.
        max_score_imbalance: the largest allowed ratio of the examples with the most common score to those with the
            second most common score.

    Raises:
        SelfalignError: another model wrote a judgement, or no question is left.
    """
    written = read_records(judgements.path / "judgements.jsonl", Judgement)
    if others := {judgement.model for judgement in written} - {PolicyCheckpoint(policy.path).digest}:
        raise SelfalignError(
            f"{out.label}: judgements by {sorted(others)}; the SFT baseline must have written all of them"
        )
    drops: Counter[str] = Counter()
    usable = usable_judgements(written, judge, drops)
    ranked = read_records(questions.path / "ranked.jsonl", RankedAnswers)
    draws = [agreeing_draw(question, usable, drops) for question in ranked]
    targets = [t for question, draw in zip(ranked, draws, strict=True) for t in demonstrate(question, draw, judge)]
    if not targets:
        raise SelfalignError(
            f"{out.label}: the SFT baseline judged none of {len(ranked)} questions in the humans' order (dropped: "
            f"{dict(+drops)}). Raise judge.num_samples, or set data.seed_data.eft_source to another source"
        )
    kept = thin(targets, max_score_imbalance)
    drops["examples_of_most_common_score"] = len(targets) - len(kept)
    ift = read_records(seeds.path / "demonstrations.jsonl", Demonstration)
    write_records(out.path / "demonstrations.jsonl", [*ift, *(example for _, example in kept)])
    return {
        catalog.IFT.name: len({one.question or one.id for one in ift}),
        catalog.EFT.name: len(kept),
        catalog.JUDGEMENTS.name: len(written),
        catalog.JUDGEMENTS_SCORED.name: sum(judgement.score is not None for judgement in written),
        catalog.QUESTIONS.name: len(ranked),
        catalog.QUESTIONS_AGREEING.name: sum(bool(draw) for draw in draws),
        "dropped": dict(sorted((+drops).items())),
    }


def usable_judgements(written: list[Judgement], judge: TeachableJudge, drops: Counter[str]) -> dict[str, list[Scored]]:
    """Return {response id: judgements that end with their score in the rubric's form}.

    A judgement with text after its score would teach the judge to continue there.
    """
    usable: dict[str, list[Scored]] = {}
    for judgement in written:
        if judgement.score is None:
            continue  # The judge stage has counted it, by its status.
        if judgement.text.splitlines()[-1].strip() != judge.answer(int(judgement.score), ""):
            drops["judgements_in_other_form"] += 1
        else:
            usable.setdefault(judgement.response_id, []).append((judgement.score, judgement.text))
    return usable


def agreeing_draw(question: RankedAnswers, usable: dict[str, list[Scored]], drops: Counter[str]) -> list[Scored]:
    """Return the first draw in the humans' order, one judgement for each answer.

    Returns:
        An empty list if there is none; the reason is counted in `drops`.
    """
    by_answer = [usable.get(f"{question.id}-{number}", []) for number in range(1, len(question.texts) + 1)]
    draws = [list(draw) for draw in zip(*by_answer, strict=False)]
    for draw in draws:
        if in_order(question.ranks, [score for score, _ in draw]):
            return draw
    drops["questions_in_other_order" if draws else "questions_without_scores"] += 1
    return []


def in_order(ranks: list[int], scores: list[float]) -> bool:
    """Whether every answer with a better rank has a higher score."""
    by_rank = [score for _, score in sorted(zip(ranks, scores, strict=True))]
    return all(better > worse for better, worse in pairwise(by_rank))


def demonstrate(question: RankedAnswers, draw: list[Scored], judge: TeachableJudge) -> list[Target]:
    """Return the EFT examples of one question: the judge's prompt for each answer, and the baseline's judgement."""
    return [
        (
            score,
            Demonstration(
                id=f"eft-{question.id}-{number}",
                prompt=judge.ask(question.instruction, question.texts[number - 1]),
                response=text,
                source="eft",
                question=question.id,
            ),
        )
        for number, (score, text) in enumerate(draw, start=1)
    ]


def thin(targets: list[Target], ratio: float) -> list[Target]:
    """Drop examples with the most common score until they are at most `ratio` × those with the second most common.

    The digests of their ids decide which are dropped.
    """
    counts = Counter(score for score, _ in targets).most_common(2)
    if len(counts) < 2:
        return targets
    (most_common, count), (_, second_count) = counts
    ids = sorted((example.id for score, example in targets if score == most_common), key=digest_text)
    dropped = set(ids[min(count, int(ratio * second_count)) :])
    return [target for target in targets if target[1].id not in dropped]
