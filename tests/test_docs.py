"""The README and the pages of docs/ say what is there: their links, commands, keys, messages and names of files."""

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from builders import ROOT, composed, floors, planned
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from selfalign.cli.environment import conf_folder
from selfalign.cli.main import told
from selfalign.cli.report import main as report_main
from selfalign.cli.store import main as store_main
from selfalign.cli.ui import main as ui_main
from selfalign.config.hydra import compose_experiment, register, to_experiment
from selfalign.metrics.catalog import METRICS

README = ROOT / "README.md"
EXAMPLES = ROOT / "docs/examples"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "AGENTS.md", ROOT / "conf/README.md", *DOCS]
COMMANDS = {"selfalign-report": report_main, "selfalign-store": store_main, "selfalign-ui": ui_main}
LINES, WORDS = 120, 900
"""The most that the README may have."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def blocks_of(page: Path, kind: str = "") -> list[str]:
    """The code blocks of a page that are of a kind; without one those of the shell."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", text_of(page), flags=re.MULTILINE | re.DOTALL)


# --- size and links ----------------------------------------------------------------------------------------------


def test_readme_is_a_screen_and_a_half() -> None:
    assert len(text_of(README).splitlines()) <= LINES
    assert len(text_of(README).split()) <= WORDS


def test_every_page_begins_with_what_its_reader_can_do() -> None:
    assert len(DOCS) >= 17
    for page in DOCS:
        title, _, first, *_ = text_of(page).splitlines()
        assert title.startswith("# "), page
        assert first.startswith("After this page you "), page


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_pages_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if not link.startswith(("https://", "http://")):
            target, _, anchor = link.partition("#")
            found = page if not target else page.parent / target
            assert found.exists(), link
            assert not anchor or anchor in anchors_of(found), link


def test_every_page_is_linked_from_the_readme_and_stands_in_the_contents() -> None:
    listed = set(re.findall(r"\(docs/(\w+)\.md", text_of(README)))
    contents = blocks_of(ROOT / "docs/index.md", "{toctree}")[0].split()
    assert listed == {page.stem for page in DOCS} - {"index"}
    assert [name for name in contents if name != ":hidden:"] == sorted(listed, key=contents.index)


# --- commands ----------------------------------------------------------------------------------------------------


def shell_lines(page: Path) -> Iterator[list[str]]:
    """The words of each command in a page: those of its blocks, and those that stand in its text."""
    inline = re.findall(r"`(selfalign[- ][^`]+)`", prose_of(page))
    for text in [*blocks_of(page), "\n".join(inline)]:
        for line in text.replace("\\\n", " ").splitlines():
            if re.search(r"\bselfalign(-\w+)? ", line) and "…" not in line:
                yield shlex.split(line, comments=True)


def commands() -> list[list[str]]:
    """The words of each command of selfalign in the pages, once, from its name on."""
    found: dict[tuple[str, ...], None] = {}
    for page in PAGES:
        for words in shell_lines(page):
            starts = [index for index, word in enumerate(words) if re.fullmatch(r"selfalign(-\w+)?", word)]
            if starts and words[0] != "pip":
                found[tuple(words[starts[0] :])] = None
    return [list(words) for words in found]


def jobs_of(words: list[str]) -> list[list[str]]:
    """The overrides of each job: one, or those of a sweep. What is Hydra's own is left out."""
    given = [word for word in words if "=" in word and not word.startswith(("hydra", "+hydra", "-"))]
    if "-m" not in words:
        return [given]
    choices = [
        [f"{one.key_or_group}={value}" for value in one.sweep_string_iterator()]
        if one.is_sweep_override() and not one.is_interval_sweep()
        else [f"{one.key_or_group}=0.5" if one.is_sweep_override() else text]
        for text, one in zip(given, OverridesParser.create().parse_overrides(given), strict=True)
    ]
    return [list(job) for job in product(*choices)]


LOOKS_UP = {"--explain", "--schema", "-sc"}
CONFIGURED = [
    words
    for words in commands()
    if words[0] == "selfalign" and LOOKS_UP.isdisjoint(words) and any("=" in word for word in words)
]
LOOKUPS = [words for words in commands() if {"--explain", "--schema"} & set(words)]
OTHERS = [words for words in commands() if words[0] in COMMANDS]
EVALUATIONS = [words for words in commands() if words[0] == "selfalign-evaluate"]


def test_there_are_commands_to_check() -> None:
    assert len(CONFIGURED) >= 40
    assert len(OTHERS) >= 4
    assert len(EVALUATIONS) >= 4
    assert len(LOOKUPS) >= 3
    assert jobs_of(["selfalign", "-m", "loss=dpo,ipo", "loss.beta=0.1"]) == [
        ["loss=dpo", "loss.beta=0.1"],
        ["loss=ipo", "loss.beta=0.1"],
    ]


OWN_FILES = {"experiment=mine": "experiment=smoke", "judge=my_rubric": "judge=expected_score"}
"""Options of docs/extending.md, by the options that they start from."""


@pytest.mark.parametrize("words", CONFIGURED, ids=" ".join)
def test_command_composes(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for file, text in (("my_rubric.txt", "{instruction} {response}"), ("p.txt", "{scale} is the best.")):
        (tmp_path / file).write_text(text)
    for job in jobs_of(words):
        compose_experiment(conf_folder(), [OWN_FILES.get(one, one) for one in job], EXAMPLES / "selfalign_example/conf")


def recipes() -> list[list[str]]:
    """The commands of docs/recipes.md."""
    [page] = [page for page in PAGES if page.name == "recipes.md"]
    return [words for words in shell_lines(page) if words[0] == "selfalign" and "=" in "".join(words)]


@pytest.mark.parametrize("words", recipes(), ids=" ".join)
def test_every_recipe_on_the_command_line_is_planned_from_an_empty_folder(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to its last model, without reading or making anything."""
    monkeypatch.chdir(tmp_path)
    [job] = jobs_of(words)
    config = compose_experiment(conf_folder(), job)[0]
    assert f"M{config.iterations + 1}" in planned(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", LOOKUPS, ids=" ".join)
def test_lookup_is_answered(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/judge").mkdir(parents=True)
    assert told([word.replace("KEY", "seed") for word in words[1:]])


@pytest.mark.parametrize("words", EVALUATIONS, ids=" ".join)
def test_settings_of_an_evaluation_compose(words: list[str]) -> None:
    overrides = [word for word in words[1:] if "=" in word]
    assert len(overrides) < len(words) - 1, "there is a run or a model"
    composed("experiment=demo", *overrides)


@pytest.mark.parametrize("words", OTHERS, ids=" ".join)
def test_other_commands_are_used_as_they_parse(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2 is bad usage; runs that the pages name are not here, which is 1."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        COMMANDS[words[0]]()
    assert ended.value.code != 2


def test_presets_and_rubrics_in_the_pages_compose(tmp_path: Path) -> None:
    """What docs/extending.md keeps in a folder of its own."""
    rubric, preset = blocks_of(ROOT / "docs/extending.md", "yaml")
    for name, text in (("judge/my_rubric", rubric), ("experiment/mine", preset)):
        (tmp_path / name).with_suffix(".yaml").parent.mkdir()
        (tmp_path / name).with_suffix(".yaml").write_text(text)
    register()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = to_experiment(compose("config", [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"]))
    assert config.name == "mine"
    assert config.judge.prompt.startswith("Grade the response from 0 to 5.")
    assert type(config.loss).__name__ == "IPO"


# --- names -------------------------------------------------------------------------------------------------------


def messages() -> list[str]:
    """Every text in the code, with "…" for what is filled in."""
    found = []
    for path in (ROOT / "selfalign").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
    return found


def test_troubleshooting_quotes_messages_as_the_code_has_them() -> None:
    headings = re.findall(r"^### `(.+)`$", text_of(ROOT / "docs/troubleshooting.md"), flags=re.MULTILINE)
    assert len(headings) >= 20
    known = "\n".join(messages())
    for heading in headings:
        for part in heading.split("…"):
            assert part.strip(" ,.") in known, heading


def test_options_in_the_configuration_are_those_of_each_group() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", text_of(ROOT / "docs/configuration.md"), flags=re.MULTILINE)
    listed = {group: set(re.findall(r"`(\w+)`", options)) for group, options in rows}
    groups = {folder.name: {file.stem for file in folder.glob("*.yaml")} for folder in (ROOT / "conf").iterdir()}
    parts = {"data": {"self_rewarding_demo", "self_rewarding_smoke"}}
    for group, options in groups.items():
        if options:
            wanted = options - parts.get(group, set())
            assert listed[group] == wanted if group not in ("model", "experiment") else listed[group] <= wanted, group


def test_every_number_of_the_catalogue_has_a_meaning_that_fits_into_a_table() -> None:
    assert all(m.meaning and not re.search(r"[|\n]", m.meaning) for m in METRICS.values())


# --- the packages ------------------------------------------------------------------------------------------------


def packages_on_disk() -> set[str]:
    return {path.parent.name for path in (ROOT / "selfalign").glob("*/__init__.py")}


def package_map(page: Path) -> list[str]:
    """The first column of a page's package map."""
    table = text_of(page).partition("## Package map")[2].partition("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)


def test_package_maps_and_floors_name_the_same_packages_once() -> None:
    mapped, stacked = package_map(README), [name for floor in floors() for name in floor]
    assert len(set(mapped)) == len(mapped) >= 18
    assert sorted(mapped) == sorted(package_map(ROOT / "docs/architecture.md")) == sorted(stacked)


def test_package_map_is_what_is_on_disk() -> None:
    assert set(package_map(README)) == packages_on_disk()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    packages = "|".join(package_map(README))
    for name in re.findall(rf"`(?:selfalign/)?((?:{packages})/[\w/]+\.py)`", text_of(page)):
        assert (ROOT / "selfalign" / name).exists(), name


def test_classes_beside_an_equation_stand_in_the_file_that_is_named() -> None:
    named = re.findall(r"`(\w+)` in `(\w+/\w+\.py)`", text_of(ROOT / "docs/methods.md"))
    named += re.findall(r"`(\w+)` in `(\w+/\w+\.py)`", text_of(ROOT / "docs/judges.md"))
    assert len(named) >= 11
    for name, file in named:
        assert re.search(rf"^(class|def) {name}\b", (ROOT / "selfalign" / file).read_text(), re.MULTILINE), name
