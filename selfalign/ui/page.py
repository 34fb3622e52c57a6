"""The page: tabs to browse records, compare answers, chat and vote, and see what a run has made.

Gradio makes the controls. All that comes from records or models is HTML of `ui/render.py`, where texts are escaped.
"""

import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Before Gradio is imported, which would tell of it.

import gradio as gr
from gradio.themes import Base, colors

from selfalign.core.errors import SelfalignError
from selfalign.core.formatting import plural
from selfalign.engines.protocol import Sampling
from selfalign.runs.labels import Label
from selfalign.runs.ledger import flat_numbers
from selfalign.ui.chat import ChatModels, Conversation
from selfalign.ui.compare import Side, answer_labels, compare
from selfalign.ui.lineage import lineage_of
from selfalign.ui.render import (
    comparisons_html,
    conversation_html,
    hint,
    list_html,
    problem,
    record_html,
    run_html,
    title,
)
from selfalign.ui.run_records import RunRecords
from selfalign.ui.search import JUDGES, ORDERS, Query, Searcher
from selfalign.ui.votes import append_vote, vote_of

ALL, NOBODY = "all", "no second model"

TITLES = {
    "pairs.jsonl": "pairs",
    "responses.jsonl": "responses",
    "judgements.jsonl": "judgements",
    "instructions.jsonl": "instructions",
    "comparisons.jsonl": "comparisons",
    "scores.jsonl": "mean scores",
    "labelled.jsonl": "labelled responses",
    "demonstrations.jsonl": "demonstrations",
    "ranked.jsonl": "ranked answers",
    "taught.jsonl": "ranked answers that teach judging",
    "references.jsonl": "log-probabilities of pairs",
    "preferences.jsonl": "margins of held-out pairs",
    "moved.jsonl": "log-probabilities of answers",
}
"""The title of each file with records; any other has its name."""

OPEN_ROW = """
element.addEventListener('click', (event) => {
  const row = event.target.closest('[data-row]');
  if (!row) return;
  element.querySelectorAll('.row.current').forEach((other) => other.classList.remove('current'));
  row.classList.add('current');
  trigger('click', {row: Number(row.dataset.row)});
});
"""
"""Opens the record that is clicked on; only the number of its row is sent."""

SCROLL = (
    "() => { if (window.innerWidth < 760) document.querySelector('#sa-record')?.scrollIntoView({inline: 'nearest'}); }"
)
"""On a phone the record stands below the list."""


@dataclass(slots=True)
class Shown:
    """What a visitor looks at: a query and the number of its page."""

    run: str
    query: Query
    number: int = 1


@dataclass(slots=True)
class Explorer:
    """The runs that are looked at, and where votes go.

    Attributes:
        runs: the runs.
        votes: the file of votes.
        searchers: {name of a run: searches it}.
        models: the models of all runs.
    """

    runs: list[RunRecords]
    votes: Path
    searchers: dict[str, Searcher] = field(init=False)
    models: ChatModels = field(init=False)

    def __post_init__(self) -> None:
        self.searchers = {run.name: Searcher(run) for run in self.runs}
        self.models = ChatModels(self.runs)

    # --- browse ------------------------------------------------------------------------------------------------------

    def kinds(self, run: str) -> list[tuple[str, str]]:
        """Return (title, file name) of the kinds of records that a run has, pairs first."""
        names = self.searchers[run].run.file_names()
        order = [*TITLES, *names]
        return [(TITLES.get(name, name), name) for name in sorted(names, key=order.index)]

    def choices(self, run: str, file: str) -> dict[str, list[str]]:
        """Return the choices of the filters for a kind of records."""
        searcher = self.searchers[run]
        query = Query(file=file)
        labels = searcher.labels(query)
        return {
            "artifact": [ALL, *map(str, labels)],
            "iteration": [ALL, *map(str, sorted({label.iteration_number for label in labels}))],
            "status": [ALL, *searcher.statuses(query)],
            "reason": [ALL, *searcher.reasons(query)],
        }

    def listed(self, shown: Shown) -> tuple[str, str]:
        """Return the list of a page, and where in the results it is."""
        page = self.searchers[shown.run].page(shown.query, shown.number)
        shown.number = page.number
        where = f"{page.found:,} of {page.searched:,} records, page {page.number:,} of {page.pages:,}"
        return list_html(page), hint(where)

    def opened(self, shown: Shown, row: int) -> str:
        """Return a record of the page that is shown, with its lineage."""
        searcher = self.searchers[shown.run]
        hits = searcher.page(shown.query, shown.number).hits
        if not 0 <= row < len(hits):
            return hint("This record is not there any more.")
        return record_html(hits[row], lineage_of(searcher, hits[row].label, hits[row].record))

    # --- compare -----------------------------------------------------------------------------------------------------

    def answers(self, run: str) -> list[str]:
        """Return the labels of a run's responses, those of the last model first."""
        return [str(label) for label in answer_labels(self.searchers[run])]

    def compared(self, sides: Sequence[tuple[str, str]], text: str, number: int) -> tuple[str, str, int]:
        """Return answers side by side, where they are in the results, and the number of the page."""
        if not all(label for _, label in sides):
            return hint("A run has no answers yet."), "", 1
        first, second = (Side(self.searchers[run], Label.parse(label)) for run, label in sides)
        found = compare(first, second, text.strip(), number)
        where = f"{plural(found.found, 'instruction')}, page {found.number:,} of {found.pages:,}"
        names = [label if len(self.runs) == 1 else f"{run}: {label}" for run, label in sides]
        return comparisons_html(found, names), hint(where), found.number

    # --- chat --------------------------------------------------------------------------------------------------------

    def replied(self, conversation: Conversation, names: Sequence[str], sampling: Sampling) -> Conversation:
        """Return the conversation with the replies of one or two models to its last question."""
        messages = conversation.messages()
        replies = [self.models.reply(name, messages, sampling, secrets.randbits(63)) for name in names]
        return conversation.answered(replies)

    def voted(self, conversation: Conversation, chosen: int) -> tuple[Conversation, str]:
        """Save a vote. Return the conversation that goes on from the chosen reply, and what was done."""
        count = append_vote(self.votes, vote_of(conversation, chosen))
        command = f"selfalign data=pairs data.path={self.votes} iterations=1"
        return conversation.keeping(chosen), f"{plural(count, 'vote')} in {self.votes}. To train on them: {command}"

    # --- run ---------------------------------------------------------------------------------------------------------

    def made(self, run: str) -> str:
        """Return what a run has made, with what it counted and dropped."""
        records = self.searchers[run].run
        rows: list[tuple[str, str, str, str]] = []
        for label, artifact in records.finished.items():
            counts = records.manifest(label).get("counts", {})
            dropped = flat_numbers(counts.get("dropped", {}))
            files = [(path.stem, records.file(label, path.name)) for path in records.record_files(label)]
            rows.append(
                (
                    str(label),
                    str(artifact.inputs["stage"]),
                    ", ".join(f"{len(file):,} {name}" for name, file in files if file),
                    ", ".join(f"{number:g} {reason.replace('_', ' ')}" for reason, number in dropped.items() if number),
                )
            )
        rows += [(str(label), "not finished", "", "") for label in records.unfinished]
        return run_html(rows)


def build_page(explorer: Explorer) -> gr.Blocks:
    """Return the page of these runs."""
    with gr.Blocks(title="selfalign", analytics_enabled=False) as page:
        _html(title(", ".join(explorer.searchers)))
        with gr.Tab("Browse"):
            _browse_tab(page, explorer)
        with gr.Tab("Compare"):
            _compare_tab(explorer)
        with gr.Tab("Chat"):
            _chat_tab(explorer)
        with gr.Tab("Artifacts") as tab:
            names = [*explorer.searchers]
            run = gr.Dropdown(names, value=names[0], label="Run", visible=len(names) > 1)
            made = _html()
            for event in (tab.select, run.input):
                event(_told(explorer.made), run, made, api_visibility="private")
    return page


def _html(value: str = "", name: str | None = None, js_on_load: str | None = None) -> gr.HTML:
    """Return a place for HTML of `ui/render.py`."""
    return gr.HTML(value, elem_id=name, elem_classes="sa", js_on_load=js_on_load, apply_default_css=False)


def _told(act: Callable[..., str]) -> Callable[..., str]:
    """Return a function whose errors, of those that a user can correct, are shown in place of its HTML."""

    def told(*arguments: Any) -> str:
        try:
            return act(*arguments)
        except SelfalignError as error:
            return problem(str(error))

    return told


def _browse_tab(page: gr.Blocks, explorer: Explorer) -> None:
    names = [*explorer.searchers]
    kinds = explorer.kinds(names[0])
    shown = gr.State(Shown(names[0], Query(file=kinds[0][1] if kinds else "")))
    with gr.Row():
        run = gr.Dropdown(names, value=names[0], label="Run", visible=len(names) > 1, min_width=150)
        kind = gr.Dropdown(kinds, value=kinds[0][1] if kinds else None, label="Records", min_width=150)
        artifact = gr.Dropdown([ALL], value=ALL, label="Artifact", min_width=150)
        iteration = gr.Dropdown([ALL], value=ALL, label="Iteration", min_width=110)
        status = gr.Dropdown([ALL], value=ALL, label="Status", min_width=130)
    with gr.Row():
        text = gr.Textbox(label="Search", placeholder="part of a text, or an id", scale=3, min_width=220)
        search = gr.Button("Search", variant="primary", scale=0, min_width=110)
    with gr.Accordion("More filters", open=False), gr.Row():
        reason = gr.Dropdown([ALL], value=ALL, label="Drop reason", min_width=150)
        disputed = gr.Dropdown([ALL, JUDGES, ORDERS], value=ALL, label="Disagreement", min_width=150)
        limits = [
            gr.Number(value=None, label=label, min_width=110)
            for label in ("Score from", "Score to", "Characters from", "Characters to")
        ]
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            where = _html()
            rows = _html("", "sa-rows", js_on_load=OPEN_ROW)
            with gr.Row():
                back = gr.Button("Previous", size="sm", min_width=80)
                onward = gr.Button("Next", size="sm", min_width=80)
                again = gr.Button("Reload", size="sm", min_width=80)
        with gr.Column(scale=3, min_width=280):
            record = _html(hint("Choose a record to see its lineage."), "sa-record")

    filters = [artifact, iteration, status, text, reason, disputed, *limits]

    def listed(state: Shown) -> tuple[Shown, str, str]:
        try:
            return state, *explorer.listed(state)
        except SelfalignError as error:
            return state, problem(str(error)), ""

    def searched(run: str, kind: str, *values: Any) -> tuple[Shown, str, str]:
        return listed(Shown(run, _query(kind, *values)))

    def turned(step: int) -> Callable[[Shown], tuple[Shown, str, str]]:
        return lambda state: listed(Shown(state.run, state.query, state.number + step))

    def kind_chosen(run: str, kind: str | None) -> list[Any]:
        known = explorer.searchers[run].run.file_names()
        kind = kind if kind in known else next((name for _, name in explorer.kinds(run)), "")
        state = Shown(run, Query(file=kind))
        try:
            choices = explorer.choices(run, kind)
            result = listed(state)
        except SelfalignError as error:
            choices, result = {}, (state, problem(str(error)), "")
        updates = [
            gr.update(choices=choices.get(name, [ALL]), value=ALL)
            for name in ("artifact", "iteration", "status", "reason")
        ]
        kinds = gr.update(choices=explorer.kinds(run), value=kind or None)
        return [kinds, *updates, ALL, *[None] * len(limits), *result]

    def reloaded(run: str, kind: str) -> list[Any]:
        explorer.searchers[run].reload()
        return kind_chosen(run, kind)

    def opened(state: Shown, event: gr.EventData) -> str:
        return _told(explorer.opened)(state, int(event.row))

    private: dict[str, Any] = {"api_visibility": "private"}
    results = [shown, rows, where]
    cleared = [kind, artifact, iteration, status, reason, disputed, *limits, *results]
    for event in (run.input, kind.input, page.load):
        event(kind_chosen, [run, kind], cleared, **private)
    again.click(reloaded, [run, kind], cleared, **private)
    submitted = [search.click, text.submit, *(one.input for one in (artifact, iteration, status, reason, disputed))]
    for event in (*submitted, *(one.submit for one in limits)):
        event(searched, [run, kind, *filters], results, **private)
    back.click(turned(-1), shown, results, **private)
    onward.click(turned(1), shown, results, **private)
    rows.click(opened, shown, record, **private).then(None, js=SCROLL, **private)


def _query(
    file: str, artifact: str, iteration: str, status: str, text: str, reason: str, disputed: str, *limits: Any
) -> Query:
    """Return the query of the filters as the page has them."""
    low, high, short, long = limits
    return Query(
        file=file,
        artifact=_unless_all(artifact),
        iteration=int(iteration) if _unless_all(iteration) else None,
        text=text.strip(),
        status=_unless_all(status),
        reason=_unless_all(reason),
        disagreement=_unless_all(disputed),
        scores=(low, high),
        lengths=(short, long),
    )


def _unless_all(choice: str) -> str:
    return "" if choice == ALL else choice


def _compare_tab(explorer: Explorer) -> None:
    names = [*explorer.searchers]
    first, second = names[0], names[1] if len(names) > 1 else names[0]
    labels, others = explorer.answers(first), explorer.answers(second)
    other = others[-1:] if first == second and len(others) < 2 else others[first == second :][:1]
    with gr.Row():
        runs = [
            gr.Dropdown(names, value=run, label=f"{side} run", visible=len(names) > 1, min_width=150)
            for side, run in (("Left", first), ("Right", second))
        ]
        answers = [
            gr.Dropdown(choices, value=value, label=f"{side} answers", min_width=150)
            for side, choices, value in (
                ("Left", labels, next(iter(labels), None)),
                ("Right", others, next(iter(other), None)),
            )
        ]
        text = gr.Textbox(label="Search instructions", min_width=180)
        show = gr.Button("Show", variant="primary", scale=0, min_width=110)
    where, found, number = _html(), _html("", "sa-compared"), gr.State(1)
    with gr.Row():
        back = gr.Button("Previous", size="sm", min_width=80)
        onward = gr.Button("Next", size="sm", min_width=80)

    def turned(step: int | None) -> Callable[..., tuple[str, str, int]]:
        def compared(one: str, two: str, left: str, right: str, text: str, number: int) -> tuple[str, str, int]:
            try:
                place = 1 if step is None else number + step
                return explorer.compared([(one, left), (two, right)], text, place)
            except SelfalignError as error:
                return problem(str(error)), "", 1

        return compared

    def run_chosen(run: str) -> Any:
        labels = explorer.answers(run)
        return gr.update(choices=labels, value=next(iter(labels), None))

    inputs, outputs = [*runs, *answers, text, number], [found, where, number]
    for run, answer in zip(runs, answers, strict=True):
        run.input(run_chosen, run, answer, api_visibility="private")
    for event, step in ((show.click, None), (text.submit, None), (back.click, -1), (onward.click, 1)):
        event(turned(step), inputs, outputs, api_visibility="private")


def _chat_tab(explorer: Explorer) -> None:
    names = [*explorer.models.places()]
    if not names:
        _html(hint("The runs have no model yet."))
        return
    usual = explorer.models.sampling(names[0])
    conversation, waiting = gr.State(Conversation()), gr.State("")
    with gr.Row():
        one = gr.Dropdown(names, value=names[0], label="Model", min_width=150)
        two = gr.Dropdown([NOBODY, *names], value=NOBODY, label="Beside it", min_width=150)
    with gr.Accordion("Sampling", open=False), gr.Row():
        settings = [
            gr.Number(usual.temperature, label="Temperature", minimum=0, min_width=110),
            gr.Number(usual.top_p, label="Top-p", minimum=0, maximum=1, min_width=110),
            gr.Number(usual.max_new_tokens, label="Most new tokens", precision=0, minimum=1, min_width=110),
            gr.Number(usual.thought_tokens, label="Most tokens of a thought", precision=0, minimum=0, min_width=110),
        ]
    said = _html(hint("Nothing was asked yet."), "sa-chat")
    told = _html("", "sa-told")
    with gr.Row(visible=False) as voting:
        left = gr.Button("The first is better", min_width=120)
        right = gr.Button("The second is better", min_width=120)
    with gr.Row():
        question = gr.Textbox(label="Your turn", lines=2, scale=3, min_width=220)
        with gr.Column(scale=0, min_width=150):
            send = gr.Button("Send", variant="primary")
            fresh = gr.Button("New conversation")

    def asked(question: str, conversation: Conversation) -> tuple[Conversation, str, str, str, Any]:
        """Show the question at once, before the models begin."""
        if not question.strip():
            return conversation, "", conversation_html(conversation), problem("Write something first."), question
        begun = conversation.asked(question.strip())
        return begun, question, conversation_html(begun), hint("The model writes …"), ""

    def replied(waiting: str, conversation: Conversation, one: str, two: str, *limits: float):
        if not waiting:
            return conversation, gr.skip(), gr.skip(), gr.skip()
        chosen = [one] if two == NOBODY else [one, two]
        try:
            sampling = Sampling(
                temperature=limits[0], top_p=limits[1], max_new_tokens=int(limits[2]), thought_tokens=int(limits[3])
            )
            whole = explorer.replied(conversation, chosen, sampling)
        except SelfalignError as error:
            before = Conversation(conversation.exchanges[:-1])
            return before, conversation_html(before), problem(str(error)), gr.update(visible=False)
        return whole, conversation_html(whole), "", gr.update(visible=len(chosen) == 2)

    def voted(chosen: int) -> Callable[[Conversation], tuple[Conversation, str, str]]:
        def vote(conversation: Conversation) -> tuple[Conversation, str, str]:
            try:
                kept, note = explorer.voted(conversation, chosen)
            except (SelfalignError, OSError) as error:
                return conversation, conversation_html(conversation), problem(str(error))
            return kept, conversation_html(kept), hint(note)

        return vote

    def begun_anew() -> tuple[Conversation, str, str, Any]:
        return Conversation(), hint("Nothing was asked yet."), "", gr.update(visible=False)

    private: dict[str, Any] = {"api_visibility": "private"}
    for event in (send.click, question.submit):
        shown = [conversation, waiting, said, told, question]
        event(asked, [question, conversation], shown, **private).then(
            replied, [waiting, conversation, one, two, *settings], [conversation, said, told, voting], **private
        )
    left.click(voted(0), conversation, [conversation, said, told], **private)
    right.click(voted(1), conversation, [conversation, said, told], **private)
    fresh.click(begun_anew, None, [conversation, said, told, voting], **private)


def serve(explorer: Explorer, host: str, port: int | None, *, wait: bool = True) -> tuple[gr.Blocks, str]:
    """Serve the page, until Ctrl-C unless `wait` is false. Return the page and its address.

    Raises:
        SelfalignError: the address cannot be listened on.
    """
    theme = Base(
        primary_hue=colors.blue,
        font=["system-ui", "Segoe UI", "Liberation Sans", "sans-serif"],
        font_mono=["ui-monospace", "DejaVu Sans Mono", "monospace"],
    )
    page = build_page(explorer)
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
            theme=theme,
            css_paths=Path(__file__).with_name("page.css"),
        )
    except OSError as error:
        raise SelfalignError(
            f"cannot listen on {host}, port {port or 'any'} ({error}): choose another --port"
        ) from error
    print(f"page      {address}", flush=True)
    if wait:
        page.block_thread()
    return page, address
