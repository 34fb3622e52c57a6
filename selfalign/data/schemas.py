"""Published data sets in their own schemas: Open Assistant, HH-RLHF, UltraFeedback.

An unusable row is left out and counted by reason, because readers of a published set cannot mend it.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import msgspec

from selfalign.core.files import digest_json
from selfalign.core.records import Demonstration, Message, PreferencePair, RankedAnswers
from selfalign.data.rows import is_blank
from selfalign.data.tails import Tail, common_turns, pair_of
from selfalign.data.turns import as_prompt, compared, fault_of, said, turn_text

LANGUAGE = "en"
"""Language of the messages taken from Open Assistant, as in arXiv 2401.10020, section 3.1."""

SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
"""Begins a turn of an HH-RLHF transcript."""

Drops = Counter[str]
R = TypeVar("R", Demonstration, PreferencePair, RankedAnswers)


@dataclass(kw_only=True, slots=True)
class TreeMessage:
    """A row of Open Assistant (arXiv 2304.07327; OpenAssistant/oasst1, oasst2): one message of a tree.

    `role` is "prompter" or "assistant". The best of several answers has `rank` 0; a single one has none.
    """

    message_id: str
    role: str
    text: str
    lang: str
    parent_id: str | None = None
    rank: float | None = None
    deleted: bool | None = None
    review_result: bool | None = None


@dataclass(kw_only=True, slots=True)
class TranscriptPair:
    """A row of HH-RLHF (arXiv 2204.05862; Anthropic/hh-rlhf): two transcripts with the speakers' names in them."""

    chosen: str
    rejected: str


@dataclass(kw_only=True, slots=True)
class RatedPair:
    """A row of HuggingFaceH4/ultrafeedback_binarized (arXiv 2310.16944): two conversations and their scores.

    `asked` are the row's prompts that stand beside the conversations, which should say them too.
    """

    chosen: list[Message]
    rejected: list[Message]
    score_chosen: float | None = None
    score_rejected: float | None = None
    asked: list[str] = field(default_factory=list)

    def says_what_is_asked(self) -> bool:
        """Whether every prompt beside the conversations is a turn of the user's in them."""
        said = {compared(turn["content"]) for turn in self.chosen if turn["role"] == "user"}
        return said.issuperset(map(compared, self.asked))


class RatedCompletion(msgspec.Struct, kw_only=True, rename={"fine_grained_score": "fine-grained_score"}):
    """One of a task's answers: the critic's overall score, and the mean of its ratings by aspect."""

    response: str
    overall_score: float | None = None
    fine_grained_score: float | None = None


@dataclass(kw_only=True, slots=True)
class RatedCompletions:
    """A row of UltraFeedback (arXiv 2310.01377; openbmb/UltraFeedback): a task and the answers of several models."""

    instruction: str
    completions: list[RatedCompletion]


class Schema(Protocol):
    """A format of rows that a user describes.

    `read` returns a row in one of selfalign's formats, and a row that is in one already as it is. It returns None for a
    row without use, which is counted as `schema`.
    """

    def read(self, row: dict[str, Any]) -> dict[str, Any] | None: ...


def schema_of(row: dict[str, Any]) -> type | None:
    """Return the published schema of a row, told by its fields; None for selfalign's own formats."""
    if {"message_id", "role", "text", "lang"} <= row.keys():
        return TreeMessage
    if {"instruction", "completions"} <= row.keys():
        return RatedCompletions
    sides = [row.get("chosen"), row.get("rejected")]
    if {"score_chosen", "score_rejected"} <= row.keys() and all(isinstance(side, list) for side in sides):
        return None if isinstance(row.get("prompt"), list) else RatedPair
    if row.get("prompt") is None and all(isinstance(side, str) and SPEAKER.match(side) for side in sides):
        return TranscriptPair
    return None


# --- Open Assistant ----------------------------------------------------------------------------------------------


def best_of_tree(rows: Sequence[TreeMessage]) -> tuple[list[Demonstration], Drops]:
    """Return English first-turn questions with the best-ranked answer, the IFT data of arXiv 2401.10020."""
    drops: Drops = Counter()
    best: list[Demonstration] = []
    for question, answer in first_turns(rows, drops):
        if answer.rank:
            drops["lower_rank"] += 1
        else:
            best.append(_demonstration(as_prompt(question.text), answer.text, answer.message_id))
    return _unique(best, drops), drops


def rank_tree(rows: Sequence[TreeMessage]) -> tuple[list[RankedAnswers], Drops]:
    """Return English first-turn questions with their answers in the humans' order."""
    drops: Drops = Counter()
    questions: dict[str, list[tuple[TreeMessage, TreeMessage]]] = {}
    for question, answer in first_turns(rows, drops):
        questions.setdefault(question.message_id, []).append((question, answer))
    ranked = [
        _ranked(name, turns[0][0].text, [(answer.text, (-(answer.rank or 0),)) for _, answer in turns], drops)
        for name, turns in questions.items()
    ]
    return [question for question in ranked if question is not None], drops


def first_turns(rows: Sequence[TreeMessage], drops: Drops) -> Iterator[tuple[TreeMessage, TreeMessage]]:
    """Yield (question, ranked answer to it). Every other answer is counted."""
    messages = {row.message_id: row for row in rows}
    drops["duplicate"] += sum(row.role == "assistant" for row in rows)
    for answer in messages.values():
        if answer.role != "assistant":
            continue
        drops["duplicate"] -= 1
        question = messages.get(answer.parent_id or "")
        reason = _against_turn(question, answer)
        if reason:
            drops[reason] += 1
        else:
            assert question is not None
            yield question, answer


def _against_turn(question: TreeMessage | None, answer: TreeMessage) -> str | None:
    if question is None:
        return "no_question"
    both = (question, answer)
    reasons = {
        "later_turn": question.parent_id is not None,
        "other_language": any(message.lang != LANGUAGE for message in both),
        "deleted": any(message.deleted for message in both),
        "failed_review": any(message.review_result is False for message in both),
        "no_rank": answer.rank is None,
        "empty_response": any(is_blank(message.text) for message in both),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


# --- HH-RLHF -----------------------------------------------------------------------------------------------------


def transcript(text: str) -> list[Message] | None:
    """Return a transcript as messages, the last of them the assistant's; None if the speakers do not take turns."""
    opening, *parts = SPEAKER.split(text.strip())
    speakers, texts = parts[::2], [part.strip() for part in parts[1::2]]
    turns = len(speakers) // 2
    if opening or not turns or speakers != ["Human", "Assistant"] * turns or not all(texts[:-1]):
        return None
    return [
        {"role": "user" if speaker == "Human" else "assistant", "content": said}
        for speaker, said in zip(speakers, texts, strict=True)
    ]


def pairs_of_transcripts(rows: Sequence[TranscriptPair]) -> tuple[list[PreferencePair], Drops]:
    """Return pairs with the dialogue so far as their prompt."""
    drops: Drops = Counter()
    pairs: list[PreferencePair] = []
    for row in rows:
        chosen, rejected = transcript(row.chosen), transcript(row.rejected)
        if chosen is None or rejected is None:
            drops["no_dialogue"] += 1
        elif (pair := _pair(chosen, rejected, (None, None), drops)) is not None:
            pairs.append(pair)
    return _unique(pairs, drops), drops


def chosen_of_transcripts(rows: Sequence[TranscriptPair]) -> tuple[list[Demonstration], Drops]:
    """Return the chosen responses, with the dialogue so far as prompt (the SFT data of arXiv 2405.21040)."""
    drops: Drops = Counter()
    read = [transcript(row.chosen) for row in rows]
    drops["no_dialogue"] = read.count(None)
    return _last_turns([messages for messages in read if messages is not None], drops), drops


# --- UltraFeedback -----------------------------------------------------------------------------------------------


def rated_pairs(rows: Sequence[RatedPair]) -> tuple[list[PreferencePair], Drops]:
    """Return pairs with the critic's scores. If these do not favour the chosen response, there is no preference."""
    drops: Drops = Counter()
    whole = _whole(rows, drops)
    read = [_pair(row.chosen, row.rejected, (row.score_chosen, row.score_rejected), drops) for row in whole]
    return _unique([pair for pair in read if pair is not None], drops), drops


def chosen_of_rated(rows: Sequence[RatedPair]) -> tuple[list[Demonstration], Drops]:
    """Return the chosen responses."""
    drops: Drops = Counter()
    return _last_turns([row.chosen for row in _whole(rows, drops)], drops), drops


def _whole(rows: Sequence[RatedPair], drops: Drops) -> list[RatedPair]:
    """Return the rows whose conversations say all that is asked. The others are counted."""
    whole = [row for row in rows if row.says_what_is_asked()]
    drops["different_prompts"] += len(rows) - len(whole)
    return whole


def rank_completions(rows: Sequence[RatedCompletions]) -> tuple[list[RankedAnswers], Drops]:
    """Return tasks with their answers by overall score; ties are broken by the mean rating by aspect.

    If answers are equal in both, the first stays and the others are counted as ties.
    """
    drops: Drops = Counter()
    ranked: list[RankedAnswers] = []
    for row in rows:
        answers: list[tuple[str, tuple[float, ...]]] = []
        for completion in row.completions:
            scores = (completion.overall_score, completion.fine_grained_score)
            known = tuple(score for score in scores if score is not None and not math.isnan(score))
            reason = "no_score" if len(known) < 2 else "empty_response" if is_blank(completion.response) else None
            if reason:
                drops[reason] += 1
            else:
                answers.append((completion.response, known))
        question = _ranked("", row.instruction, answers, drops)
        if question is not None:
            ranked.append(question)
    kept = _unique(ranked, Counter())
    drops["duplicate"] += sum(len(q.texts) for q in ranked) - sum(len(q.texts) for q in kept)
    return kept, drops


def best_completions(rows: Sequence[RatedCompletions]) -> tuple[list[Demonstration], Drops]:
    """Return tasks with their best answer."""
    ranked, drops = rank_completions(rows)
    drops["lower_rank"] += sum(len(question.texts) - 1 for question in ranked)
    return [_demonstration(q.prompt, q.texts[q.ranks.index(1)], q.id) for q in ranked], drops


# --- what they share ---------------------------------------------------------------------------------------------

DEMONSTRATIONS: dict[type, Callable[[Any], tuple[list[Demonstration], Drops]]] = {
    TreeMessage: best_of_tree,
    TranscriptPair: chosen_of_transcripts,
    RatedPair: chosen_of_rated,
    RatedCompletions: best_completions,
}
RANKED: dict[type, Callable[[Any], tuple[list[RankedAnswers], Drops]]] = {
    TreeMessage: rank_tree,
    RatedCompletions: rank_completions,
}
PAIRS: dict[type, Callable[[Any], tuple[list[PreferencePair], Drops]]] = {
    TranscriptPair: pairs_of_transcripts,
    RatedPair: rated_pairs,
}
"""{schema: its reader}. Counts and drops are of answers, or of pairs."""


def _ranked(
    name: str, instruction: str, answers: Iterable[tuple[str, tuple[float, ...]]], drops: Drops
) -> RankedAnswers | None:
    """Return a question with strictly ordered answers (a larger quality is better), or None, its answers counted."""
    texts: dict[str, tuple[float, ...]] = {}
    for text, quality in answers:
        if text in texts or quality in texts.values():
            drops["duplicate" if text in texts else "tie"] += 1
        else:
            texts[text] = quality
    if len(texts) < 2 or is_blank(instruction):
        drops["only_answer" if len(texts) < 2 else "empty_question"] += len(texts)
        return None
    order = sorted(texts.values(), reverse=True)
    return RankedAnswers(
        id=name or digest_json(instruction)[:16],
        instruction=instruction,
        texts=list(texts),
        ranks=[order.index(quality) + 1 for quality in texts.values()],
        scores=[],
        justifications=[""] * len(texts),
    )


def against_pair(chosen: str, rejected: str, better: float | None = None, worse: float | None = None) -> str | None:
    """Return why two answers are no preference, or None. The scores are theirs, if both have one."""
    if better is not None and worse is not None and better <= worse:
        return "tie" if better == worse else "scores_contradict"
    if is_blank(chosen) or is_blank(rejected):
        return "empty_response"
    return "identical" if chosen == rejected else None


def against_tails(chosen: Tail, rejected: Tail, better: float | None = None, worse: float | None = None) -> str | None:
    """Return why two tails are no preference, or None."""
    answers = said(chosen.text, chosen.calls), said(rejected.text, rejected.calls)
    reason = against_pair(*answers, better, worse)
    return None if reason == "identical" and chosen != rejected else reason


def _pair(
    chosen: list[Message], rejected: list[Message], scores: tuple[float | None, float | None], drops: Drops
) -> PreferencePair | None:
    """Return the pair of two conversations that part at an answer, or None with the reason counted."""
    if not _is_dialogue(chosen) or not _is_dialogue(rejected):
        reason = "no_dialogue"
    else:
        size = common_turns(chosen, rejected)
        preferred, other = Tail.of(chosen[size:]), Tail.of(rejected[size:])
        if not size or preferred is None or other is None:
            reason = "different_prompts"
        elif not (reason := against_tails(preferred, other, *scores)):
            name = digest_json([chosen, rejected[size:]])[:16]
            return replace(pair_of(chosen[:size], preferred, other, scores), id=name)
    drops[reason] += 1
    return None


def _last_turns(conversations: Sequence[list[Message]], drops: Drops) -> list[Demonstration]:
    """Return the last turn of each conversation as the response to the turns before it."""
    found: list[Demonstration] = []
    for messages in conversations:
        if not _is_dialogue(messages):
            drops["no_dialogue"] += 1
        elif is_blank(turn_text(messages[-1])):
            drops["empty_response"] += 1
        else:
            made = _demonstration(messages[:-1], messages[-1]["content"], digest_json(messages)[:16])
            found.append(replace(made, response_calls=messages[-1].get("tool_calls", msgspec.UNSET)))
    return _unique(found, drops)


def _is_dialogue(messages: list[Message]) -> bool:
    """Return whether an assistant's turn ends the messages and answers a conversation."""
    return (
        len(messages) > 1
        and messages[-1]["role"] == "assistant"
        and messages[-2]["role"] in ("user", "tool")
        and not fault_of(messages[:-1])
    )


def _demonstration(prompt: list[Message], response: str, name: str) -> Demonstration:
    return Demonstration(id=name, prompt=prompt, response=response, source="ift")


def _unique(records: list[R], drops: Drops) -> list[R]:
    """Return the first record of each id. The others are counted."""
    kept = {record.id: record for record in reversed(records)}
    drops["duplicate"] += len(records) - len(kept)
    return [record for record in records if kept.pop(record.id, None) is not None]
