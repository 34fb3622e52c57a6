"""HTML of records. Every text of a record is escaped, so nothing in it is markup, Markdown or a script."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import msgspec

from selfalign.core.formatting import plural
from selfalign.core.jsonl import as_plain
from selfalign.core.records import (
    Comparison,
    Demonstration,
    Instruction,
    Judgement,
    LabelledResponse,
    PreferencePair,
    RankedAnswers,
    Response,
)
from selfalign.data.tails import tails_of
from selfalign.data.turns import as_text, said
from selfalign.report.html import decimals, fold, judgement_html, preformatted, show
from selfalign.ui.candidates import orders_disagree
from selfalign.ui.chat import Conversation, Reply
from selfalign.ui.compare import Comparisons
from selfalign.ui.lineage import CandidateLine, Candidates, JudgedBy, Lineage, Trained
from selfalign.ui.search import Hit, Page

EXCERPT = 240
"""Characters of a record in a list."""

GOOD, BAD = ("chosen", "desirable", "positive"), ("rejected", "undesirable")
SCORE = decimals(3)
NATS = decimals(2)


def problem(text: str) -> str:
    """Return an error as a paragraph."""
    return f'<p class="problem">{escape(text)}</p>'


def hint(text: str) -> str:
    """Return a remark of the page's own as a paragraph."""
    return f'<p class="hint">{escape(text)}</p>'


def title(names: str) -> str:
    """Return the title of the page."""
    return f'<p class="title">selfalign <span class="place">{escape(names)}</span></p>'


# --- the list ----------------------------------------------------------------------------------------------------


def list_html(page: Page) -> str:
    """Return the records of a page as buttons, which a click opens."""
    if not page.hits:
        return hint("No record fits. Take a filter away." if page.searched else "There are no such records.")
    rows = "".join(_row(number, hit) for number, hit in enumerate(page.hits))
    return f'<div class="rows">{rows}</div>'


def _row(number: int, hit: Hit) -> str:
    name = hit.record.get("id", "") if isinstance(hit.record, dict) else hit.record.id
    score = "" if hit.score is None else f'<span class="number">{SCORE(hit.score)}</span>'
    head = f'<span class="place">{escape(str(hit.label))}</span><span class="id">{escape(str(name))}</span>{score}'
    text = " ".join(text_of(hit.record).split())
    cut = text[:EXCERPT] + "…" * (len(text) > EXCERPT)
    shown = escape(cut) if cut else "<i>(empty)</i>"
    return (
        f'<button type="button" class="row" data-row="{number}"><span class="line">{head}</span>'
        f'<span class="line">{_marks(hit.status, hit.reason)}</span><span class="excerpt">{shown}</span></button>\n'
    )


def _marks(status: str, reason: str = "") -> str:
    """Return the words of a status, and why nothing was made of a record."""
    words = [word for word in status.split(", ") if word]
    kinds = ["good" if word in GOOD else "bad" if word in BAD else "plain" for word in words]
    marks = [f'<mark class="{kind}">{escape(_word(word))}</mark>' for kind, word in zip(kinds, words, strict=True)]
    reasons = [f'<mark class="reason">{escape(_word(word))}</mark>' for word in reason.split(", ") if word]
    return "".join([*marks, *reasons])


def _word(word: str) -> str:
    return word.replace("_", " ")


def text_of(record: Any) -> str:
    """Return what a record says, for a list."""
    match record:
        case Instruction() | Response() | Judgement():
            return record.text
        case PreferencePair() | Demonstration():
            return as_text(record.prompt)
        case LabelledResponse():
            return record.response
        case RankedAnswers():
            return record.instruction
        case Comparison():
            return f"{_verdicts(record)} {' | '.join(record.texts)}"
    return msgspec.json.encode(record).decode()


def _verdicts(record: Comparison) -> str:
    both = [verdict.name if verdict else "–" for verdict in (record.forward, record.backward)]
    return f"first order {both[0]}, second order {both[1]}" + ", the orders disagree" * orders_disagree(record)


# --- one record and its lineage ----------------------------------------------------------------------------------


def record_html(hit: Hit, lineage: Lineage) -> str:
    """Return a record with its lineage, and all its fields on demand."""
    place = f"{hit.label}, record {hit.row + 1}"
    fields = msgspec.json.format(msgspec.json.encode(as_plain(hit.record)), indent=2).decode()
    parts = [
        f'<p class="place">{escape(place)}</p>',
        lineage_html(lineage, hit.record),
        "" if _is_shown(hit.record, lineage) else block("Record", text(text_of(hit.record))),
        fold("All fields of the record", preformatted(fields)),
    ]
    return f'<div class="record">{"".join(parts)}</div>'


def _is_shown(record: Any, lineage: Lineage) -> bool:
    """Whether the lineage shows what the record says."""
    return bool(lineage.instruction or lineage.trained) and not isinstance(record, Comparison | dict)


def lineage_html(lineage: Lineage, record: Any = None) -> str:
    """Return the lineage of a record, from its instruction to the log-probabilities."""
    parts = list[str]()
    if lineage.instruction is not None:
        shown = text(lineage.instruction.text, "instruction") + f'<p class="place">{escape(str(lineage.label))}</p>'
        parts.append(block("Instruction", shown))
    opened = getattr(record, "response_id", "") or getattr(record, "id", "")
    parts += [block(f"Candidates · {one.label}", candidates_html(one, opened)) for one in lineage.candidates]
    parts += [block(f"{_kind(one)} · {one.label}", trained_html(one)) for one in lineage.trained]
    return "".join(parts)


def block(title: str, body: str) -> str:
    """Return a part of the page under a title, which is a text."""
    return f"<section><h3>{escape(title)}</h3>{body}</section>"


def text(content: str, kind: str = "text") -> str:
    """Return a text with its line breaks."""
    return f'<p class="{kind}">{escape(content)}</p>' if content else f'<p class="{kind} empty">(empty)</p>'


def thought(content: str) -> str:
    """Return a thought, folded."""
    return fold("Thinking", preformatted(content)) if content else ""


def candidates_html(candidates: Candidates, opened: str = "") -> str:
    """Return the candidates of an instruction with their judgements; `opened` is one to be marked."""
    lines = "".join(_candidate(line, line.response.id == opened) for line in candidates.lines)
    compared = "".join(
        f'<p class="hint">{escape(str(label))}: {escape(f"{one.first_id} against {one.second_id}")}, '
        f"{escape(_verdicts(one))}</p>{''.join(map(preformatted, one.texts))}"
        for label, one in candidates.comparisons
    )
    folded = fold(plural(len(candidates.comparisons), "comparison"), compared) if compared else ""
    return f'<div class="candidates">{lines}</div>{folded}'


def _candidate(line: CandidateLine, opened: bool) -> str:
    response = line.response
    roles = [word for word in line.status.split(", ") if word in (*GOOD, *BAD)]
    kind = "both" if len(roles) > 1 else "good" if set(roles) & {*GOOD} else "bad" if roles else "plain"
    scores = "".join(
        f'<span class="number">{escape(_judge(one) + " " if len(line.judged) > 1 else "")}'
        f"{show(one.score.score if one.score else None, SCORE)}</span>"
        for one in line.judged
    )
    head = f'<p class="line"><span class="id">{escape(response.id)}</span>{scores}</p>'
    marks = f'<p class="line">{_marks(line.status, line.reason)}</p>'
    judged = "".join(_judged(one) for one in line.judged if one.judgements)
    body = f"{thought(response.thought)}{text(response.text)}{judged}"
    return f'<div class="candidate {kind}{" opened" if opened else ""}">{head}{marks}{body}</div>\n'


def _judge(judged: JudgedBy) -> str:
    """Return the name of a judge: the member of a panel, or the part of the iteration."""
    part = judged.label.part or judged.label.owner
    return part.partition("_by_")[2] or (f"by {judged.model}" if judged.model else part)


def _judged(judged: JudgedBy) -> str:
    by = f"{judged.label}" + (f", judged by {judged.model}" if judged.model else "")
    title = f"{plural(len(judged.judgements), 'judgement')} · {by}"
    return fold(title, "".join(map(judgement_html, judged.judgements)))


def _kind(trained: Trained) -> str:
    kinds = {PreferencePair: "Pair", LabelledResponse: "Labelled response", Demonstration: "Demonstration"}
    return kinds[type(trained.record)]


def trained_html(trained: Trained) -> str:
    """Return a record of training data with its log-probabilities."""
    record = trained.record
    given = "" if getattr(record, "instruction_id", "") else text(as_text(record.prompt), "instruction")
    if isinstance(record, PreferencePair):
        chosen, rejected = (tail.as_text() for tail in tails_of(record))
        sides = [
            _side("good", "chosen", record.chosen_score, record.chosen_thought, chosen, record.chosen_finished),
            _side(
                "bad", "rejected", record.rejected_score, record.rejected_thought, rejected, record.rejected_finished
            ),
        ]
    elif isinstance(record, LabelledResponse):
        kind, word = ("good", "desirable") if record.desirable else ("bad", "undesirable")
        sides = [_side(kind, word, record.score, record.thought, said(record.response, record.calls), record.finished)]
    else:
        answer = said(record.response, record.response_calls)
        sides = [_side("good", record.source, None, record.thought, answer, finished=True)]
    return f'{given}<div class="candidates">{"".join(sides)}</div>{_logps(trained)}'


def _side(kind: str, word: str, score: float | None, thinking: str, answer: str, finished: bool) -> str:
    number = "" if score is None else f'<span class="number">{SCORE(score)}</span>'
    cut = "" if finished else '<mark class="plain">cut</mark>'
    head = f'<p class="line"><mark class="{kind}">{escape(word)}</mark>{cut}{number}</p>'
    return f'<div class="candidate {kind}">{head}{thought(thinking)}{text(answer)}</div>'


def _logps(trained: Trained) -> str:
    """Return the table of log-probabilities, and the margins of pairs that were held out."""
    if not (trained.logps or trained.margins):
        return hint("The run keeps no log-probabilities of this record.")
    rows = [
        (
            f"{one.model or one.label}{f', {one.when} training on it' if one.when else ''}",
            [one.record.chosen, one.record.rejected, one.record.chosen - one.record.rejected],
            [one.record.augmented_chosen, one.record.augmented_rejected],
        )
        for one in trained.logps
    ]
    body = "".join(
        f"<tr><th>{escape(name)}</th>{_cells(plain)}{_cells(augmented)}</tr>" for name, plain, augmented in rows
    )
    heads = ("log π of", "chosen", "rejected", "difference", "chosen given p", "rejected given p")
    head = "".join(f"<th>{name}</th>" for name in heads)
    caption = hint("In nats, summed over the tokens of the response.")
    table = f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>{caption}' if rows else ""
    margins = "".join(
        hint(f"{label}: margin {NATS(one.margin)}, Δ {NATS(one.delta)} (reward), log-ratios against the reference")
        for label, one in trained.margins
    )
    return table + margins


def _cells(values: Iterable[float | None]) -> str:
    return "".join(f"<td>{show(value, NATS)}</td>" for value in values)


# --- answers side by side ----------------------------------------------------------------------------------------


def comparisons_html(found: Comparisons, names: Sequence[str]) -> str:
    """Return instructions with the answers of both sides."""
    if not found.shown:
        return hint("These answers share no such instruction.")
    blocks = [
        f'<article>{text(one.instruction.text, "instruction")}<div class="sides">'
        f"{_answers(names[0], one.first)}{_answers(names[1], one.second)}</div></article>"
        for one in found.shown
    ]
    return f'<div class="record">{"".join(blocks)}</div>'


def _answers(name: str, candidates: Candidates) -> str:
    body = candidates_html(candidates) if candidates.lines else hint("no answer")
    return f'<div><p class="name">{escape(name)}</p>{body}</div>'


# --- the chat ----------------------------------------------------------------------------------------------------


def conversation_html(conversation: Conversation) -> str:
    """Return a conversation. Of two replies, the one that it goes on from is marked."""
    parts: list[str] = []
    for exchange in conversation.exchanges:
        several = len(exchange.replies) > 1
        replies = "".join(
            _reply(reply, kept=several and number == exchange.kept) for number, reply in enumerate(exchange.replies)
        )
        parts.append(f'<div class="question">{text(exchange.question)}</div><div class="sides">{replies}</div>')
    return f'<div class="record chat">{"".join(parts)}</div>'


def _reply(reply: Reply, kept: bool) -> str:
    goes_on = '<mark class="plain">the conversation goes on from this</mark>' if kept else ""
    cut = "" if reply.finish_reason.value == "eos" else f'<mark class="reason">{reply.finish_reason.value}</mark>'
    head = f'<p class="line"><span class="name">{escape(reply.model)}</span>{goes_on}{cut}</p>'
    return f'<div class="reply{" kept" if kept else ""}">{head}{thought(reply.thought)}{text(reply.text)}</div>'


# --- the run -----------------------------------------------------------------------------------------------------


def run_html(stages: Sequence[tuple[str, str, str, str]]) -> str:
    """Return the artifacts of a run: (label, stage, what it counted, what it dropped)."""
    rows = "".join(
        f"<tr><th>{escape(label)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for label, *cells in stages
    )
    head = "".join(f"<th>{name}</th>" for name in ("artifact", "stage", "records", "dropped"))
    return f'<div class="record"><div class="wide stages"><table><tr>{head}</tr>{rows}</table></div></div>'
