"""What selfalign-ui shows of a run, beneath the page: places of records, search, roles, lineage, comparison, HTML."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from builders import TINY_RUN, instruction, judgement, linked_artifact, response, run, write_tiny_data

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import write_records
from selfalign.core.records import (
    Comparison,
    Demonstration,
    JudgementStatus,
    LabelledResponse,
    PairReference,
    PreferencePair,
    Response,
    Verdict,
)
from selfalign.data.pair_rules import BestWorst
from selfalign.runs.labels import Label
from selfalign.runs.reader import FILES
from selfalign.stages.pair import Labels, PositivesOnly
from selfalign.store.key import to_key_json
from selfalign.ui import search
from selfalign.ui.candidates import judges_disagree, orders_disagree, rule_of, stream_candidates
from selfalign.ui.compare import Side, answer_labels, compare
from selfalign.ui.lineage import lineage_of
from selfalign.ui.record_file import RecordFile, texts_of
from selfalign.ui.render import candidates_html, comparisons_html, list_html, record_html
from selfalign.ui.run_records import RunRecords, open_runs
from selfalign.ui.search import JUDGES, ORDERS, Query, Searcher

HOSTILE = (
    '<script>window.hit=1</script><img src=x onerror="window.hit=1"></p></div><svg onload="window.hit=1">'
    "${window.hit=1} {{value}} <!-- --> &lt; [link](javascript:alert(1)) **bold** $x^2$ </textarea></style>"
)
"""A text that HTML, Markdown or a template would take for something else."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of two iterations that trains on the pairs of both, and judges with a panel."""
    place = tmp_path_factory.mktemp("runs")
    return run(
        place / "outputs",
        *TINY_RUN,
        *write_tiny_data(place / "data"),
        "data.accumulate_pairs=true",
        "judge=panel",
        "+judge@judge.members.score=expected_score",
        "+judge@judge.members.reward=implicit",
        "data.seed_data.eft_source=none",
    )


@pytest.fixture
def searcher(folder: Path) -> Searcher:
    return Searcher(RunRecords(folder))


def read(folder: Path, label: str, kind: type[Any]) -> list[Any]:
    """The records of an artifact, by the file itself."""
    file = RecordFile(folder / "artifacts" / label / FILES[kind])
    return list(file.stream())


# --- a file ------------------------------------------------------------------------------------------------------


def test_any_record_of_a_file_is_read_by_its_place_its_id_and_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    written = [response(f"i{n // 3}-{n % 3}", f"Text {n} é\u2028\n") for n in range(30)]
    write_records(path, written)
    file = RecordFile(path)
    assert len(file) == 30
    assert file.read([29, 0, 17]) == [written[29], written[0], written[17]]
    assert file.with_id("i4-1") == written[13]
    assert file.rows_with_id("i4-1") == [13]
    assert file.of("i4") == written[12:15]
    assert file.with_id("i44") is None
    assert file.of("i44") == []
    assert list(file.stream()) == written


def test_texts_that_share_a_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfalign.ui.record_file.hash", lambda text: 1, raising=False)
    write_records(tmp_path / "responses.jsonl", [response("a-1"), response("b-1")])
    file = RecordFile(tmp_path / "responses.jsonl")
    assert [one.id for one in file.of("b")] == ["b-1"]
    assert file.rows_with_id("b-1") == [1]


def test_broken_line_is_named_and_an_empty_file_has_no_records(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"id":"a"}\n{"id":', encoding="utf-8")
    with pytest.raises(SelfalignError, match=r"pairs\.jsonl:2"):
        RecordFile(tmp_path / "pairs.jsonl")
    (tmp_path / "scores.jsonl").touch()
    assert list(RecordFile(tmp_path / "scores.jsonl").stream()) == []


def test_file_of_an_unknown_name_is_read_as_plain_objects(tmp_path: Path) -> None:
    (tmp_path / "others.jsonl").write_text('{"question":"Why?","turns":["So."]}\n', encoding="utf-8")
    [record] = RecordFile(tmp_path / "others.jsonl").read([0])
    assert sorted(texts_of(record)) == ["So.", "Why?"]


# --- what became of responses --------------------------------------------------------------------------------------


def test_roles_and_scores_of_responses_are_those_of_the_pairs_and_of_the_panel(folder: Path) -> None:
    label = Label.iteration(1, "responses")
    pairs = read(folder, "iteration_1/pairs", PreferencePair)
    groups = list(stream_candidates(RunRecords(folder), label))
    roles = {name: role for group in groups for name, role in group.roles.items()}
    assert roles == {p.chosen_id: "chosen" for p in pairs} | {p.rejected_id: "rejected" for p in pairs}
    scores = {name: score for group in groups for name, score in group.scores.items()}
    assert all(scores[p.chosen_id] == p.chosen_score for p in pairs)
    assert {str(judge) for judge in groups[0].by_judge} == {
        f"iteration_1/judgements{end}" for end in ("", "_by_score", "_by_reward")
    }


def test_reasons_why_pairs_were_dropped_add_up_to_what_the_stage_counted(folder: Path) -> None:
    for number in (1, 2):
        label = Label.iteration(number, "responses")
        manifest = json.loads((folder / f"artifacts/iteration_{number}/pairs/manifest.json").read_text("utf-8"))
        groups = list(stream_candidates(RunRecords(folder), label))
        dropped = [reason for group in groups if (reason := group.reason)]
        counted = [reason for reason, count in manifest["counts"]["dropped"].items() for _ in range(count)]
        assert sorted(dropped) == sorted(counted)
        others = [r for group in groups if not group.reason for r in group.reasons.values()]
        assert set(others) <= {"not_picked"}


@pytest.mark.parametrize("rule", [BestWorst(max_similarity=0.5), Labels(threshold=2.0), PositivesOnly()])
def test_rule_is_read_back_from_a_manifest(rule: Any) -> None:
    assert rule_of(json.loads(json.dumps(to_key_json(rule)))) == rule


def test_rule_of_the_users_own_is_not_guessed() -> None:
    assert rule_of({"class": "Mine", "minimum_margin": 0.0}) is None
    assert rule_of({"class": "BestWorst", "of_another_version": 1}) is None


def compared(
    forward: Verdict | None, backward: Verdict | None, owner: str = "i", first: int = 1, second: int = 2
) -> Comparison:
    status = JudgementStatus.OK if forward and backward else JudgementStatus.AMBIGUOUS
    names = {"id": f"{owner}{first}{second}", "instruction_id": owner}
    names |= {"first_id": f"{owner}-{first}", "second_id": f"{owner}-{second}"}
    return Comparison(**names, forward=forward, backward=backward, status=status, outcome=None, texts=[], model="m")


@pytest.mark.parametrize(
    ("forward", "backward", "disagree"),
    [
        (Verdict.A, Verdict.B, False),
        (Verdict.B, Verdict.A, False),
        (Verdict.TIE, Verdict.TIE, False),
        (Verdict.A, Verdict.A, True),
        (Verdict.B, Verdict.TIE, True),
        (None, Verdict.A, False),
    ],
)
def test_orders_disagree_if_the_place_decides(forward: Any, backward: Any, disagree: bool) -> None:
    assert orders_disagree(compared(forward, backward)) is disagree


def test_judges_disagree_if_they_rank_two_responses_the_other_way_round() -> None:
    first, second, tied, silent = {"a": 1.0, "b": 2.0}, {"a": 30.0, "b": 20.0}, {"a": 1.0, "b": 1.0}, {"a": 1.0}
    assert judges_disagree([first, second], "a", "b")
    assert not judges_disagree([first, first, tied, silent], "a", "b")


# --- search --------------------------------------------------------------------------------------------------------


def found(searcher: Searcher, **query: Any) -> list[Any]:
    """All records that fit, over all pages."""
    asked = Query(**query)
    pages = searcher.page(asked).pages
    return [hit.record for number in range(1, pages + 1) for hit in searcher.page(asked, number).hits]


def test_every_record_of_every_file_is_found(searcher: Searcher, folder: Path) -> None:
    names = searcher.run.file_names()
    assert {"pairs.jsonl", "responses.jsonl", "judgements.jsonl", "references.jsonl", "ranked.jsonl"} <= names.keys()
    for name, labels in names.items():
        lines = [len((folder / f"artifacts/{label}/{name}").read_bytes().splitlines()) for label in labels]
        assert len(found(searcher, file=name)) == sum(lines), name


def test_filters_keep_what_fits_and_nothing_else(searcher: Searcher) -> None:
    whole = found(searcher, file="responses.jsonl", iteration=1)
    texts = [one.text for one in whole]
    part = next(text for text in texts if len(text) > 6)[2:6].upper()
    by_text = found(searcher, file="responses.jsonl", iteration=1, text=part)
    assert by_text == [one for one in whole if any(part.casefold() in t.casefold() for t in texts_of(one))] != []
    chosen = found(searcher, file="responses.jsonl", iteration=1, status="chosen")
    pairs = found(searcher, file="pairs.jsonl", artifact="iteration_1/pairs")
    assert [one.id for one in chosen] == [pair.chosen_id for pair in pairs]
    long = found(searcher, file="responses.jsonl", iteration=1, lengths=(10, 20))
    assert long == [one for one in whole if 10 <= len(one.text) <= 20]
    scored = found(searcher, file="judgements.jsonl", scores=(0.0, None))
    assert scored == [
        one for one in found(searcher, file="judgements.jsonl") if one.score is not None and one.score >= 0
    ]
    unread = found(searcher, file="judgements.jsonl", status="no_score")
    assert unread == [one for one in found(searcher, file="judgements.jsonl") if one.status == "no_score"]


def test_reasons_and_disagreement_are_filters(searcher: Searcher) -> None:
    label = Label.iteration(1, "responses")
    groups = list(stream_candidates(searcher.run, label))
    for reason in searcher.reasons(Query(file="responses.jsonl")):
        shown = {one.id for one in found(searcher, file="responses.jsonl", artifact=str(label), reason=reason)}
        assert shown == {n for g in groups for n, reasons in g.reasons.items() if reason in reasons.split(", ")}
    disputed = {one.id for one in found(searcher, file="responses.jsonl", artifact=str(label), disagreement=JUDGES)}
    assert disputed == {name for group in groups for name in group.disputed_by_judges()} != set()
    by_order = found(searcher, file="comparisons.jsonl", disagreement=ORDERS)
    assert by_order == [one for one in found(searcher, file="comparisons.jsonl") if orders_disagree(one)]


def test_filter_by_orders_finds_comparisons_responses_and_pairs(tmp_path: Path) -> None:
    folder, names = tmp_path / "run", ("a", "b")
    asked = linked_artifact(folder, "iteration_1/instructions", "instruct", instructions=[*map(instruction, names)])
    answers = [response(f"{name}-{n}") for name in names for n in (1, 2, 3)]
    wrote = linked_artifact(folder, "iteration_1/responses", "respond", {"instructions": asked}, responses=answers)
    judged = {
        "judgements": [judgement(one.id, float(one.id[-1])) for one in answers],
        "comparisons": [
            compared(Verdict.A, Verdict.B, "a", 1, 2),
            compared(Verdict.A, Verdict.A, "b", 1, 2),
            compared(Verdict.B, Verdict.A, "b", 1, 3),
        ],
    }
    inputs = {"instructions": asked, "responses": wrote}
    scores = linked_artifact(folder, "iteration_1/judgements", "judge", inputs, **judged)
    kept = [
        PreferencePair(
            id=f"{name}{best}{worst}",
            prompt="?",
            chosen="C",
            rejected="R",
            instruction_id=name,
            chosen_id=f"{name}-{best}",
            rejected_id=f"{name}-{worst}",
        )
        for name, best, worst in (("a", 2, 1), ("b", 2, 1), ("b", 3, 1))
    ]
    inputs |= {"judgements": scores, "rule": {"class": "Mine"}, "seed": 0}
    linked_artifact(folder, "iteration_1/pairs", "pair", inputs, pairs=kept)
    searcher = Searcher(RunRecords(folder))
    shown = {
        name: [one.id for one in found(searcher, file=f"{name}.jsonl", disagreement=ORDERS)]
        for name in ("comparisons", "instructions", "responses", "pairs")
    }
    assert shown == {"comparisons": ["b12"], "instructions": ["b"], "responses": ["b-1", "b-2"], "pairs": ["b21"]}
    [candidates] = lineage_of(searcher, Label.iteration(1, "pairs"), kept[1]).candidates
    assert [one for _, one in candidates.comparisons] == judged["comparisons"][1:]
    assert "the orders disagree" in candidates_html(candidates)


def test_gathered_pairs_are_disputed_as_they_are_in_their_parts(searcher: Searcher) -> None:
    parts = [found(searcher, file="pairs.jsonl", artifact=f"iteration_{n}/pairs", disagreement=JUDGES) for n in (1, 2)]
    whole = found(searcher, file="pairs.jsonl", artifact="iteration_2/all_pairs", disagreement=JUDGES)
    assert whole == [*parts[0], *parts[1]]


def test_pages_go_over_files_without_leaving_out_or_repeating(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = found(searcher, file="responses.jsonl")
    for size in (1, 4, 7):
        monkeypatch.setattr(search, "PAGE", size)
        assert found(searcher, file="responses.jsonl") == everything
    assert (
        searcher.page(Query(file="responses.jsonl"), 10_000).number
        == searcher.page(Query(file="responses.jsonl")).pages
    )


# --- lineage -------------------------------------------------------------------------------------------------------


def test_lineage_of_a_pair_goes_from_its_instruction_to_its_log_probabilities(searcher: Searcher) -> None:
    pair = found(searcher, file="pairs.jsonl", artifact="iteration_1/pairs")[0]
    lineage = lineage_of(searcher, Label.iteration(1, "pairs"), pair)
    assert lineage.instruction is not None
    assert lineage.instruction.prompt == pair.prompt
    [candidates] = lineage.candidates
    assert [line.response.instruction_id for line in candidates.lines] == [pair.instruction_id] * 3
    by_id = {line.response.id: line for line in candidates.lines}
    assert by_id[pair.chosen_id].response.text == pair.chosen
    assert by_id[pair.chosen_id].status.endswith("chosen")
    judged = {str(one.label): one for one in by_id[pair.chosen_id].judged}
    assert judged["iteration_1/judgements"].judgements[0].text.startswith("score ")
    assert judged["iteration_1/judgements_by_score"].judgements[0].response_id == pair.chosen_id
    [trained] = lineage.trained
    assert trained.record == pair
    assert [(one.model, one.when) for one in trained.logps] == [("M1", "before"), ("M2", "after")]


def test_log_probabilities_are_those_that_the_run_keeps(searcher: Searcher, folder: Path) -> None:
    pair = found(searcher, file="pairs.jsonl", artifact="iteration_1/pairs")[-1]
    [trained] = lineage_of(searcher, Label.iteration(1, "pairs"), pair).trained
    for one, label in zip(trained.logps, ("iteration_1/reference", "iteration_2/reference"), strict=True):
        assert one.record == next(r for r in read(folder, label, PairReference) if r.id == pair.id)


@pytest.mark.parametrize("name", ["responses", "judgements", "scores", "references", "pairs"])
def test_lineage_of_any_record_of_an_iteration_is_that_of_its_pair(searcher: Searcher, name: str) -> None:
    pair = found(searcher, file="pairs.jsonl", artifact="iteration_1/pairs")[0]
    searched = searcher.page(Query(file=f"{name}.jsonl", iteration=1, text=pair.id if name == "references" else ""))
    hits = [hit for hit in searched.hits if str(hit.label).startswith("iteration_1/")]
    whole = lineage_of(searcher, Label.iteration(1, "pairs"), pair)
    lineages = [lineage_of(searcher, hit.label, hit.record) for hit in hits]
    assert any(one == whole for one in lineages), name
    assert all(one.instruction for one in lineages)


def test_lineage_of_compared_ranked_answers_is_their_question_s(searcher: Searcher, folder: Path) -> None:
    compared = read(folder, "evaluation_M1/ranked_comparisons", Comparison)
    assert compared
    for one in compared:
        lineage = lineage_of(searcher, Label.evaluation("M1", "ranked_comparisons"), one)
        assert lineage.instruction
        [candidates] = lineage.candidates
        shown = {line.response.id for line in candidates.lines}
        assert {one.first_id, one.second_id} <= shown
        assert {line.response.instruction_id for line in candidates.lines} == {lineage.instruction.id}


def test_a_gathered_pair_leads_to_the_iteration_that_made_it(searcher: Searcher) -> None:
    pair = found(searcher, file="pairs.jsonl", artifact="iteration_1/pairs")[0]
    gathered = lineage_of(searcher, Label.iteration(2, "all_pairs"), pair)
    assert gathered == lineage_of(searcher, Label.iteration(1, "pairs"), pair)


# --- answers side by side --------------------------------------------------------------------------------------------


def test_answers_of_two_models_stand_beside_each_other_by_instruction(searcher: Searcher) -> None:
    first, second = (Side(searcher, Label.evaluation(name, "answers")) for name in ("M3", "M1"))
    page = compare(first, second)
    assert (page.found, page.pages) == (3, 1)
    for one in page.shown:
        sides = [side.lines[0].response for side in (one.first, one.second)]
        assert [response.instruction_id for response in sides] == [one.instruction.id] * 2
        assert sides[0].model != sides[1].model
    rivers = compare(first, second, "RIVERS")
    assert [one.instruction.text for one in rivers.shown] == ["What do people make of rivers?"]
    assert str(answer_labels(searcher)[0]) == "evaluation_M3/answers"
    assert compare(first, Side(searcher, Label.iteration(1, "responses"))).found == 0


# --- runs with missing parts -----------------------------------------------------------------------------------------


def copy_of(folder: Path, place: Path) -> Path:
    """A run folder with the same artifacts, linked by their full paths, that may be changed."""
    copy = place / "copy"
    for link in sorted((folder / "artifacts").rglob("*")):
        if link.is_symlink():
            own = copy / link.relative_to(folder)
            own.parent.mkdir(parents=True, exist_ok=True)
            own.symlink_to(link.resolve())
    return copy


def all_kinds_are_shown(searcher: Searcher) -> int:
    """Show the first records of every file with their lineage; return how many there are."""
    count = 0
    for name, labels in searcher.run.file_names().items():
        for label in labels:
            page = searcher.page(Query(file=name, artifact=str(label)))
            assert list_html(page).count("data-row=") == len(page.hits)
            for hit in page.hits[:3]:
                assert record_html(hit, lineage_of(searcher, hit.label, hit.record))
                count += 1
    return count


@pytest.mark.parametrize("missing", ["instructions", "responses", "judgements"])
def test_run_with_a_missing_part_is_shown_without_it(folder: Path, tmp_path: Path, missing: str) -> None:
    copy = copy_of(folder, tmp_path)
    (copy / "artifacts/iteration_1" / missing).unlink()
    assert all_kinds_are_shown(Searcher(RunRecords(copy))) > 50


def test_run_that_goes_on_shows_what_is_finished_and_more_after_a_reload(folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path)
    link = copy / "artifacts/iteration_2/pairs"
    whole = link.readlink()
    link.unlink()
    (tmp_path / "begun/pair/0123").mkdir(parents=True)
    link.symlink_to(tmp_path / "begun/pair/0123")
    searcher = Searcher(RunRecords(copy))
    query = Query(file="pairs.jsonl", artifact="iteration_2/pairs")
    assert searcher.run.unfinished == [Label.iteration(2, "pairs")]
    assert all_kinds_are_shown(searcher) > 50
    assert searcher.page(query).searched == 0
    link.unlink()
    link.symlink_to(whole)
    searcher.reload()
    assert searcher.page(query).found > 0
    assert searcher.run.unfinished == []


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SelfalignError, match="not a run folder"):
        open_runs([tmp_path])


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss=kto", "pair=labels"],
        ["loss=positives", "pair=positives", "pair.minimum_score=0"],
    ],
    ids=["labels", "positives"],
)
def test_runs_of_other_kinds_are_shown(overrides: list[str], tmp_path: Path) -> None:
    made = run(tmp_path / "out", *TINY_RUN, *write_tiny_data(tmp_path / "data"), "iterations=1", *overrides)
    searcher = Searcher(RunRecords(made))
    assert all_kinds_are_shown(searcher) > 30
    kinds = {"loss=kto": LabelledResponse, "loss=positives": Demonstration}
    kind = kinds.get(overrides[0], PreferencePair)
    label = Label.iteration(1, "pairs")
    record = read(made, str(label), kind)[0]
    lineage = lineage_of(searcher, label, record)
    assert lineage.instruction is not None
    assert record in [one.record for one in lineage.trained]


def test_given_pairs_are_shown_with_their_log_probabilities(tmp_path: Path) -> None:
    rows = [{"instruction": f"Ask {n}?", "chosen": f"Good {n}.", "rejected": f"Bad {n}, no."} for n in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = ["data=pairs", f"data.path={tmp_path / 'pairs.jsonl'}", "iterations=1", "evaluate=none"]
    tiny = [one for one in TINY_RUN if not one.startswith(("data.", "evaluate."))]
    made = run(tmp_path / "out", *tiny, *given, "data.seed_data.fine_tune=false", "data.seed_data.eft_source=none")
    searcher = Searcher(RunRecords(made))
    assert all_kinds_are_shown(searcher) >= 4
    [hit, *_] = searcher.page(Query(file="pairs.jsonl")).hits
    lineage = lineage_of(searcher, hit.label, hit.record)
    assert lineage.instruction is None
    assert [one.model for one in lineage.trained[0].logps] == ["M0"]


# --- hostile texts ---------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """The elements and attributes of a page, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = set[str](), set[str](), ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


OWN_TAGS = {"article", "button", "details", "div", "h3", "i", "mark", "p", "pre", "section", "span", "summary"}
OWN_TAGS |= {"table", "td", "th", "tr"}


def made_hostile(folder: Path, place: Path) -> Path:
    """The run with every text of its records replaced by a hostile one, in artifacts of the same names."""
    copy = copy_of(folder, place)
    for link in [path for path in sorted((copy / "artifacts").rglob("*")) if path.is_symlink()]:
        source = link.resolve()
        if not list(source.glob("*.jsonl")) or (source / "weights").exists():
            continue
        own = place / "store" / source.parent.name / source.name
        own.mkdir(parents=True, exist_ok=True)
        for file in [*source.glob("*.jsonl"), source / "manifest.json"]:
            data = file.read_bytes()
            rows = [hostile(json.loads(line)) for line in data.splitlines()] if file.suffix == ".jsonl" else []
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
            (own / file.name).write_bytes(text if rows else data)
        link.unlink()
        link.symlink_to(own)
    return copy


def hostile(value: Any, key: str = "") -> Any:
    """A record with its texts replaced, and all that other records or the schema depend on kept."""
    if isinstance(value, dict):
        return {name: hostile(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [hostile(item, key) for item in value]
    written = key in ("text", "texts", "content", "chosen", "rejected", "response", "instruction", "justifications")
    return HOSTILE if written and isinstance(value, str) else value


def test_hostile_records_are_shown_as_text(folder: Path, tmp_path: Path) -> None:
    searcher = Searcher(RunRecords(made_hostile(folder, tmp_path)))
    pages = [
        list_html(searcher.page(Query(file=name))) for name in ("pairs.jsonl", "responses.jsonl", "judgements.jsonl")
    ]
    for name in searcher.run.file_names():
        for hit in searcher.page(Query(file=name)).hits:
            pages.append(record_html(hit, lineage_of(searcher, hit.label, hit.record)))
    sides = [Side(searcher, Label.evaluation(name, "answers")) for name in ("M3", "M1")]
    pages.append(comparisons_html(compare(sides[0], sides[1]), [HOSTILE, "M1"]))
    shown = [Elements(page) for page in pages]
    assert set().union(*(one.tags for one in shown)) <= OWN_TAGS
    assert set().union(*(one.attributes for one in shown)) <= {"class", "data-row", "type"}
    assert sum(HOSTILE in one.text for one in shown) > 20


# --- size ------------------------------------------------------------------------------------------------------------


def test_a_page_of_a_large_file_decodes_its_own_records_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the filters are computed once, a page reads as many records as it shows."""
    many = [response(f"i{n}-1", f"Text {n}") for n in range(20_000)]
    linked_artifact(tmp_path / "run", "iteration_1/responses", "respond", responses=many)
    searcher = Searcher(RunRecords(tmp_path / "run"))
    query = Query(file="responses.jsonl", lengths=(None, 9))
    assert searcher.page(query).found == 10_000
    read_rows: list[int] = []
    original = RecordFile.read
    monkeypatch.setattr(RecordFile, "read", lambda self, rows: read_rows.extend(rows) or original(self, rows))
    monkeypatch.setattr(RecordFile, "stream", lambda self: pytest.fail("the whole file is read again"))
    page = searcher.page(query, 123)
    assert read_rows == [hit.row for hit in page.hits]
    assert len(page.hits) == search.PAGE
    assert all(isinstance(hit.record, Response) and hit.record.text == f"Text {hit.row}" for hit in page.hits)
