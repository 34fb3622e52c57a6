"""The page of selfalign-ui in a browser, at the width of a desktop and of a phone, over records that would break it."""

import json
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from builders import Said, composed, instruction, judgement, linked_artifact, nudged_policy, response, taught_policy

from selfalign.cli.ui import main
from selfalign.core.files import write_json
from selfalign.core.records import PairReference, PreferencePair
from selfalign.models.checkpoint import PolicyCheckpoint

CHROMIUM = Path(os.environ.get("SELFALIGN_CHROMIUM", "/usr/bin/chromium"))
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
PATIENCE = 120_000
"""Milliseconds within which a slow machine shows something."""

HOSTILE = (
    '<script>window.hit=1</script><img src=x onerror="window.hit=1"></p></div><svg onload="window.hit=1"></svg>'
    "${window.hit=1} {{value}} [link](javascript:window.hit=1) **bold** </textarea></style>"
)


# --- the command -----------------------------------------------------------------------------------------------------


def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> Said:
    monkeypatch.setattr(sys, "argv", ["selfalign-ui", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return Said(int(ended.value.code or 0), *capsys.readouterr())


def test_help_says_what_the_page_shows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = called(monkeypatch, capsys, "--help")
    assert said.code == 0
    assert "(default: 127.0.0.1)" in said.out
    assert "votes.jsonl in the first RUN" in " ".join(said.out.split())


def test_without_gradio_the_line_to_install_it_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr("selfalign.cli.ui.find_spec", lambda name: None if name == "gradio" else find_spec(name))
    said = called(monkeypatch, capsys, str(tmp_path))
    assert (said.code, said.out) == (1, "")
    assert said.err == "error: selfalign-ui needs Gradio: pip install 'selfalign[ui]'\n"


# --- the page --------------------------------------------------------------------------------------------------------


def a_run(folder: Path, model: PolicyCheckpoint, other: PolicyCheckpoint) -> Path:
    """A run of hostile records, with two models."""
    names = [f"i{n:02}" for n in range(30)]
    asked = linked_artifact(
        folder,
        "iteration_1/instructions",
        "instruct",
        instructions=[instruction(name, f"{HOSTILE} {name}") for name in names],
    )
    answers = [response(f"{name}-{n}", f"Answer {n} {HOSTILE}") for name in names for n in (1, 2)]
    wrote = linked_artifact(folder, "iteration_1/responses", "respond", {"instructions": asked}, responses=answers)
    inputs = {"instructions": asked, "responses": wrote}
    judged = [judgement(one.id, float(one.id[-1])) for one in answers]
    scores = linked_artifact(folder, "iteration_1/judgements", "judge", inputs, judgements=judged)
    pairs = [
        PreferencePair(
            id=f"pair-{name}",
            prompt=[{"role": "user", "content": f"{HOSTILE} {name}"}],
            chosen=f"Answer 2 {HOSTILE}",
            rejected=f"Answer 1 {HOSTILE}",
            chosen_score=2.0,
            rejected_score=1.0,
            instruction_id=name,
            chosen_id=f"{name}-2",
            rejected_id=f"{name}-1",
        )
        for name in names
    ]
    inputs |= {"judgements": scores, "rule": {"class": "Mine"}, "seed": 0}
    made = linked_artifact(folder, "iteration_1/pairs", "pair", inputs, pairs=pairs)
    logps = [PairReference(id=one.id, chosen=-12.5, rejected=-20.25) for one in pairs]
    linked_artifact(folder, "iteration_1/reference", "reference_logprobs", {"pairs": made}, references=logps)
    for name, checkpoint in (("M1", model), ("M2", other)):
        manifest = {"stage": "sft", "format": 0, "digest": checkpoint.digest, "inputs": {}, "counts": {}}
        write_json(checkpoint.path / "manifest.json", manifest)
        (folder / "artifacts" / name).symlink_to(checkpoint.path)
    (folder / "config.yaml").write_text(composed("experiment=smoke")[1], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_policy: PolicyCheckpoint) -> Iterator[tuple[str, Path]]:
    """The address of a page, and its file of votes."""
    if find_spec("gradio") is None:
        pytest.skip("needs Gradio: pip install 'selfalign[ui]'")
    place = tmp_path_factory.mktemp("ui")
    model = taught_policy(tiny_policy, place)
    run = a_run(place / "run", model, nudged_policy(model, place / "other", size=0.01))
    command = [sys.executable, "-c", "from selfalign.cli.ui import main; main()", str(run)]
    with Popen([*command, "--votes", str(place / "votes.jsonl")], stdout=PIPE, encoding="utf-8") as server:
        assert server.stdout is not None
        yield server.stdout.readline().split()[1], place / "votes.jsonl"
        server.terminate()


@pytest.fixture(params=[1280, 390], ids=["desktop", "phone"])
def page(request: pytest.FixtureRequest, served: tuple[str, Path], tmp_path: Path) -> Iterator[Any]:
    """The page in a browser of its own, which must reach nothing but the page."""
    if not CHROMIUM.exists():
        pytest.skip(f"needs a browser at {CHROMIUM}, or where SELFALIGN_CHROMIUM says")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch_persistent_context(
            tmp_path / "profile",
            executable_path=CHROMIUM,
            args=FLAGS,
            viewport={"width": request.param, "height": 844},
        )
        shown, errors, hosts = browser.new_page(), list[str](), set[str]()
        shown.set_default_timeout(PATIENCE)
        shown.on("pageerror", lambda error: errors.append(str(error)))
        shown.on("request", lambda sent: hosts.add(urlsplit(sent.url).netloc))
        shown.goto(served[0])
        shown.wait_for_selector(".sa .row")
        yield shown
        assert shown.evaluate("window.hit") is None, "a record was executed"
        assert not shown.locator(":is(.rows, .record) :is(script, img, svg, a, strong, b, textarea, style)").count()
        assert shown.evaluate("document.documentElement.scrollWidth") <= request.param
        assert hosts - {""} == {urlsplit(served[0]).netloc}
        assert errors == []
        browser.close()


def tab(page: Any, name: str) -> None:
    """Open a tab; on a narrow page it may stand in the menu behind the others."""
    if not page.get_by_role("tab", name=name).last.is_visible():
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown button", has_text=name).click()
        return
    page.get_by_role("tab", name=name).last.click()


@pytest.mark.nightly
def test_records_are_listed_searched_and_opened_with_their_lineage(page: Any) -> None:
    assert page.locator(".sa .row").count() == 20
    assert "30 of 30 records, page 1 of 2" in page.inner_text("body")
    page.get_by_role("button", name="Next").first.click()
    page.wait_for_function("document.querySelectorAll('.sa .row').length === 10")
    page.get_by_label("Search", exact=True).fill("I07")
    page.get_by_role("button", name="Search").click()
    page.wait_for_function("document.querySelectorAll('.sa .row').length === 1")
    assert HOSTILE[:60] in page.locator(".sa .row").inner_text()
    page.locator(".sa .row").click()
    page.wait_for_selector("#sa-record section")
    shown = page.locator("#sa-record").inner_text()
    assert [title in shown for title in ("Instruction", "Candidates · iteration_1/responses", "Pair · ")] == [True] * 3
    assert f"Answer 2 {HOSTILE}" in shown
    assert "−12.50" in shown
    assert page.locator("#sa-record details[open]").count() == 0
    assert page.locator("#sa-record .candidate.good").count() == 2


@pytest.mark.nightly
def test_answers_of_models_stand_side_by_side(page: Any) -> None:
    tab(page, "Compare")
    page.get_by_role("button", name="Show").click()
    page.wait_for_selector("#sa-compared article")
    assert page.locator("#sa-compared article").count() == 10
    assert page.locator("#sa-compared article").first.locator(".name").count() == 2


@pytest.mark.nightly
def test_chat_with_two_models_ends_in_a_vote_that_is_saved(page: Any, served: tuple[str, Path]) -> None:
    tab(page, "Chat")
    page.get_by_label("Beside it").click()
    page.get_by_role("option", name="M1").click()
    page.get_by_text("Sampling").click()
    page.get_by_label("Most new tokens").fill("40")
    page.get_by_label("Your turn").fill(f"Say one thing about bread. {HOSTILE}")
    before = served[1].read_bytes().count(b"\n") if served[1].exists() else 0
    page.get_by_role("button", name="Send").click()
    page.wait_for_selector("#sa-chat .reply >> nth=1")
    assert HOSTILE in page.locator("#sa-chat .question").inner_text()
    texts = page.locator("#sa-chat .reply .text").all_inner_texts()
    page.get_by_role("button", name="The second is better").click()
    page.wait_for_function("/vote|same/.test(document.querySelector('#sa-told').innerText)")
    told = page.locator("#sa-told").inner_text()
    finished = not page.locator("#sa-chat mark.reason").count()
    assert finished, "the taught model ends its turns"
    if texts[0].strip() == texts[1].strip():
        assert "both replies are the same text" in told
        return
    assert f"{before + 1} vote" in told
    row = json.loads(served[1].read_text(encoding="utf-8").splitlines()[-1])
    assert [row["rejected"].strip(), row["chosen"].strip()] == [text.strip() for text in texts]
    assert (row["rejected_model"], row["chosen_model"]) == ("M2", "M1")


@pytest.mark.nightly
def test_page_listens_on_loopback_alone(served: tuple[str, Path]) -> None:
    port = urlsplit(served[0]).port
    [server] = psutil.Process().children()
    listening = [one.laddr for one in server.net_connections("inet") if one.status == psutil.CONN_LISTEN]
    assert {one.ip for one in listening if one.port == port} == {"127.0.0.1"}
    assert {one.ip for one in listening} <= {"127.0.0.1", "::1"}
