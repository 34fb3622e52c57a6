"""What a wheel and an sdist install: every file, every command, from any folder, and errors that name extras."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from builders import ROOT, TINY_RUN, composed, write_tiny_data

from selfalign import __version__
from selfalign.core.files import read_json
from selfalign.judges.function import FunctionScore

DEVELOPMENT = {"bench", "dev", "docs"}
"""Extras that nothing in the package needs."""

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def build(folder: Path, out: Path, *kinds: str) -> Path:
    """Build an sdist, a wheel or both of a source folder."""
    words = [sys.executable, "-m", "hatchling", "build", "-d", str(out), *(f"--target={kind}" for kind in kinds)]
    subprocess.run(words, cwd=folder, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel of this checkout."""
    return build(ROOT, tmp_path_factory.mktemp("dist"), "sdist", "wheel")


def wheel_in(folder: Path) -> Path:
    [wheel] = folder.glob("*.whl")
    return wheel


def contents(wheel: Path) -> dict[str, int]:
    """{path in the wheel: checksum}."""
    with zipfile.ZipFile(wheel) as file:
        return {one.filename: one.CRC for one in file.infolist()}


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Call a command of the wheel in an environment, a home and a folder that know no checkout.

    Other packages are those of this environment: a path file adds their folder, whose own path files are not read, so
    that an editable installation is not seen.
    """
    place = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "venv"], check=True)
    python, paths = place / "venv/bin/python", sysconfig.get_paths(vars={"base": str(place / "venv")})
    (Path(paths["purelib"]) / "others.pth").write_text(sysconfig.get_paths()["purelib"], "utf-8")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel_in(dist))]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    (place / "home").mkdir()
    (place / "work").mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "WANDB_DIR")}

    def call(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(place / "venv/bin" / command), *arguments], cwd=place / "work", text=True, capture_output=True,
            env=kept | {"HOME": str(place / "home")}, check=False,
        )  # fmt: skip

    return call


# --- what is in them ---------------------------------------------------------------------------------------------


def test_wheel_has_every_file_of_the_package_and_of_conf(dist: Path) -> None:
    def below(name: str) -> set[str]:
        files = (path for path in (ROOT / name).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {path.relative_to(ROOT).as_posix() for path in files}

    wanted = below("selfalign") | {f"selfalign/{name}" for name in below("conf")}
    assert {name for name in contents(wheel_in(dist)) if ".dist-info/" not in name} == wanted
    assert len(wanted) > 300


def test_sdist_builds_the_same_wheel(dist: Path, tmp_path: Path) -> None:
    [sdist] = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"selfalign-{__version__}"
    assert (unpacked / "CITATION.cff").is_file()
    assert contents(wheel_in(build(unpacked, tmp_path / "again", "wheel"))) == contents(wheel_in(dist))


def test_version_is_that_of_the_citation_and_of_the_newest_changes(dist: Path) -> None:
    assert wheel_in(dist).name == f"selfalign-{__version__}-py3-none-any.whl"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["version"] == __version__
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), flags=re.MULTILINE)
    assert re.fullmatch(rf"{re.escape(__version__)} \((unreleased|\d{{4}}-\d\d-\d\d)\)", headings[0])


def test_no_preset_calls_code_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions are looked for from a folder without the checkout's files."""
    monkeypatch.chdir(tmp_path)
    presets = [path for path in (ROOT / "conf/experiment").glob("*.yaml") if "function:" in path.read_text("utf-8")]
    assert len(presets) == 2
    for preset in presets:
        judge = composed(f"experiment={preset.stem}")[0].judge
        assert isinstance(judge, FunctionScore)
        assert judge.called_code() == {}


# --- extras ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", sorted(PROJECT["optional-dependencies"].keys()))
def test_extra_is_in_the_quickstart_and_in_the_error_of_what_needs_it(extra: str) -> None:
    """The tests of each part see the error; this one sees that no extra is without one."""
    page = (ROOT / "docs/quickstart.md").read_text("utf-8")
    assert re.search(rf"^\| .*`{extra}`.* \|", page, flags=re.MULTILINE)
    code = "\n".join(path.read_text("utf-8") for path in (ROOT / "selfalign").rglob("*.py"))
    assert f"pip install 'selfalign[{extra}]'" in code or extra in DEVELOPMENT


# --- the commands ------------------------------------------------------------------------------------------------


def test_every_command_of_the_wheel_starts(installed: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert len(PROJECT["scripts"]) >= 5
    for command in PROJECT["scripts"]:
        said = installed(command, "--help")
        assert (said.returncode, "usage: " in said.stdout + said.stderr) == (0, True), command
    assert "(SrDPO)" in installed("selfalign", "--explain", "loss.lam").stdout


def test_sweep_from_the_wheel_reads_and_makes_what_it_needs(
    installed: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    small = [*TINY_RUN, "iterations=1", "evaluate=none", "pair.minimum_pairs=1", *write_tiny_data(tmp_path / "data")]
    said = installed("selfalign", "-m", *small, "loss=dpo", f"output_dir={tmp_path / 'outputs'}")
    assert said.returncode == 0, said.stderr
    [jobs] = (tmp_path / "outputs/sweeps").glob("*/jobs.json")
    assert [job["state"] for job in read_json(jobs)] == ["finished"]
    assert (jobs.parent / "comparison.html").is_file()
