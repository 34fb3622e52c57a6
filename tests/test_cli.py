import errno
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name

import pytest
import warm
from builders import ROOT, TINY_RUN, Said, composed, write_tiny_data
from hydra.errors import OverrideParseException

from selfalign.cli.commands import COMMANDS as FAMILY
from selfalign.cli.environment import conf_folder, set_bars, set_waiting
from selfalign.cli.errors import explain, report_errors
from selfalign.cli.main import EXAMPLES
from selfalign.core.errors import SelfalignError

# --- help --------------------------------------------------------------------------------------------------------


def test_help_answers_at_once_without_torch(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "selfalign", "--help"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in said.stderr.splitlines()}
    assert "selfalign" in imported
    assert not imported & {"torch", "transformers", "hydra", "numpy", "wandb"}
    assert said.returncode == 0


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_group_and_option_and_five_examples(call: Callable[..., Said], flag: str) -> None:
    said = call(flag)
    lines = [line.split() for line in said.out.splitlines()]
    for group in (path for path in conf_folder().iterdir() if path.is_dir()):
        assert [group.name, *sorted(option.stem for option in group.glob("*.yaml"))] in lines
    assert len(EXAMPLES) == 5
    assert all(text in said.out for example in EXAMPLES for text in example)
    assert "HYDRA_FULL_ERROR=1" in said.out
    assert said.err == ""


def test_examples_in_the_help_compose(call: Callable[..., Said]) -> None:
    for example, _ in EXAMPLES:
        arguments = [a for a in example.split()[1:] if a != "-m"]
        said = call(*[a.split(",")[0] for a in arguments], "--cfg", "job")
        assert said.code == 0, said.err
        assert "judge:" in said.out


# --- bad input ---------------------------------------------------------------------------------------------------

BAD = {
    "unknown key": (["experiment=smoke", "loss.betta=1"], "loss.betta"),
    "unknown key added": (["experiment=smoke", "+loss.betta=1"], "loss.betta"),
    "unknown top key": (["experiment=smoke", "+iteration=3"], "iteration"),
    "unknown key in depth": (["experiment=smoke", "data.respond.sampling.topp=1"], "data.respond.sampling.topp"),
    "wrong type": (["experiment=smoke", "loss.beta=high"], "loss.beta"),
    "wrong type of a whole number": (["experiment=smoke", "iterations=1.5"], "iterations"),
    "wrong type in depth": (["experiment=smoke", "train.sft.epochs=two"], "train.sft.epochs"),
    "out of range": (["experiment=smoke", "loss.beta=-1"], "loss.beta"),
    "out of range in depth": (["experiment=smoke", "evaluate.sampling.top_p=3"], "evaluate.sampling.top_p"),
    "no iterations": (["experiment=smoke", "iterations=0"], "iterations"),
    "unknown option": (["experiment=smoke", "loss=ppo"], "loss"),
    "unknown group": (["experiment=smoke", "critic=large"], "critic"),
    "unknown experiment": (["experiment=smok"], "experiment"),
    "missing value": (["experiment=smoke", "model=pretrained"], "model.path"),
    "missing model folder": (["experiment=smoke", "model=pretrained", "model.path=/nowhere/at/all"], "model.path"),
    "missing demonstrations": (
        ["experiment=smoke", "data.seed_data.demonstrations=/no.jsonl"],
        "data.seed_data.demonstrations",
    ),
    "missing questions": (["experiment=smoke", "evaluate.instructions=/no.jsonl"], "evaluate.instructions"),
    "missing pairs": (["experiment=smoke", "data=pairs", "data.path=/no.jsonl", "iterations=1"], "data.path"),
    "prompt without response": (["experiment=smoke", "judge.prompt=Grade!"], "judge.prompt"),
    "loss without its pair": (["experiment=smoke", "loss=positives"], "pair=positives"),
    "given pairs in two iterations": (["experiment=smoke", "data=pairs", "data.path=/no.jsonl"], "iterations"),
    "sweep without -m": (["experiment=smoke", "seed=range(5)"], "requires --multirun"),
    "name that is no folder": (["experiment=smoke", "name=a/b"], "name"),
    "syntax": (["experiment=smoke", "loss.beta=[1"], "'loss.beta=\"[1\"'"),
}


QUOTED = {
    "other letters": ("/m/李明", "'model.path=\"/m/李明\"'"),
    "equals": ("/m/a=b", "'model.path=\"/m/a=b\"'"),
    "brackets": ("/m/x (1)", "'model.path=\"/m/x (1)\"'"),
    "hash": ("/m/#1", "'model.path=\"/m/#1\"'"),
    "tilde": ("~/models", "'model.path=\"~/models\"'"),
    "list": ("/m/[v2]", "'model.path=\"/m/[v2]\"'"),
    "several": ("/m/a, b", "'model.path=\"/m/a, b\"'"),
    "apostrophe": ("/m/it's", "'model.path=\"/m/it'\"'\"'s\"'"),
    "quotation mark": ('/m/6" disk', '\'model.path="/m/6\\" disk"\''),
    "quoted by half": ("'/m/it's'", "'model.path=\"/m/it'\"'\"'s\"'"),
}


@pytest.mark.parametrize("case", QUOTED)
def test_value_that_hydra_cannot_read_is_answered_with_how_to_quote_it(call: Callable[..., Said], case: str) -> None:
    value, word = QUOTED[case]
    said = call("model=pretrained", f"model.path={value}")
    assert said.code == 1
    assert said.err.count("\n") == 1
    assert said.err.startswith("error: ")
    assert word in said.err
    assert not any(internal in said.err for internal in ("Exception", "http", "Error"))
    (override,) = shlex.split(word)
    plain = value[1:-1] if value.startswith("'") else value
    assert composed("model=pretrained", override)[0].model.path == plain


def test_quoting_is_shown_for_the_command_that_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    error = OverrideParseException("model.path=/m/a=b", "mismatched input '=' expecting <EOF>")
    for program, command in (("/bin/selfalign-evaluate", "selfalign-evaluate"), ("/x/__main__.py", "selfalign")):
        monkeypatch.setattr(sys, "argv", [program])
        assert (explain(error) or "").endswith(f": {command} 'model.path=\"/m/a=b\"'")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["loss"], "cannot read 'loss': expected key=value or group=option"),
        (
            ["seed=rang(5)"],
            "cannot read 'seed=rang(5)': Unknown function 'rang' Available: bool,choice,float,glob,int,",
        ),
        (["loss=dpo,ipo"], "'loss=dpo,ipo' has several values: add -m for a sweep over them, write 'loss=[dpo,ipo]' "),
        (
            ["-m", "data.path=/ä,/b"],
            "cannot read 'data.path=/ä,/b': a text with characters other than letters, digits, ",
        ),
    ],
)
def test_other_overrides_that_cannot_be_read_say_what_is_meant(
    call: Callable[..., Said], overrides: list[str], said: str
) -> None:
    answer = call(*overrides)
    assert answer.err.startswith(f"error: {said}")
    assert answer.err.count("\n") == 1


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_that_names_the_key(call: Callable[..., Said], case: str) -> None:
    overrides, key = BAD[case]
    said = call(*overrides)
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert said.code == 1
    assert len(errors) == 1
    assert said.err.endswith(errors[0] + "\n")
    assert key in errors[0]
    assert "Traceback" not in said.out + said.err
    if not case.startswith("missing"):  # Before a file is found missing, the run may have said what it begins with.
        assert said.err == errors[0] + "\n"


MISTAKEN = {
    "key": ("loss.lamb=3", "no loss.lamb; did you mean loss.lam?"),
    "key in depth": ("data.respond.sampling.topp=1", "no data.respond.sampling.topp; did you mean "
                     "data.respond.sampling.top_p?"),
    "key added": ("+loss.lamb=1", "no loss.lamb; did you mean loss.lam?"),
    "key of another component": ("loss.samples=1", "no loss.samples; loss has beta, label_smoothing, lam, "),
    "key without its path": ("beta=3", "no beta; did you mean loss.beta?"),
    "key of two components": ("epochs=3", "no epochs; did you mean train.sft.epochs or train.align.epochs?"),
    "group": ("judgee=additive", "no judgee; did you mean judge?"),
    "key of no group": ("critic=large", "no critic; a configuration has at, benchmark, data, "),
    "option": ("loss=dpoo", "no loss=dpoo; did you mean loss=dpo? There are: alpha_dpo, dpo, ipo, kto, odpo, "
               "positives, simpo, sppo, sr_dpo, sr_ipo"),
    "option unlike any": ("pair=xyz", "no pair=xyz; there are: all_ordered, best_vs_k, best_worst, by_writer, "
                                      "labels, positives, random"),
    "option of a list": ("benchmark=[mtbench]", "no benchmark=mtbench; did you mean benchmark=mt_bench? There are: "),
    "option of a group elsewhere": ("judge@evaluate.preference_pairs.judge=externa", "no judge=externa; did you mean "
                                    "judge=external? There are: "),
    "option in a folder": ("experiment=my/smoke", "no experiment=my/smoke; did you mean experiment=smoke? There are: "),
    "value of another type": ("iterations=1.5", "cannot set iterations=1.5: Value '1.5' of type 'float' could not be "
                              "converted to Integer"),
    "value for a component": ("train.sft=fast", "cannot set train.sft=fast: Invalid type assigned: str is not a "
                              "subclass of Optimization."),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKEN)
def test_mistaken_override_is_answered_with_what_was_meant(call: Callable[..., Said], case: str) -> None:
    override, message = MISTAKEN[case]
    said = call(override)
    assert said.err.startswith(f"error: {message}")
    assert said.err.count("\n") == 1
    assert not any(internal in said.err for internal in ("full_key", "object_type", "append to your", "Could not"))
    assert said.code == 1


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["model=pretrained"], ["model.path"]),
        (["model=pretrained", "data=pairs", "iterations=1"], ["data.path", "model.path"]),
        (["engine=server"], ["engine.command"]),
        (["benchmark=[alpaca_eval,lm_eval]"], ["benchmark.alpaca_eval.reference_outputs", "benchmark.lm_eval.tasks"]),
        (["judge=external"], ["judge.endpoint.base_url", "judge.endpoint.model"]),
        (["judge=external", "judge.endpoint.model=m"], ["judge.endpoint.base_url"]),
    ],
)
def test_values_that_must_be_given_are_asked_for_all_at_once(
    call: Callable[..., Said], overrides: list[str], keys: list[str]
) -> None:
    said = call(*overrides)
    assert said.err.splitlines() == [f"error: set {key}=…; it has no default" for key in keys]
    assert said.code == 1


@pytest.mark.parametrize(
    "key", ["evaluate.head_to_head", "train.checkpoint_selection.head_to_head", "benchmark.mt_bench.judge"]
)
@pytest.mark.parametrize("setting", ["model=gpt", "api_key_env=KEY", "prompt_price=3"])
def test_endpoint_without_an_address_is_no_endpoint_that_is_passed_over(
    call: Callable[..., Said], key: str, setting: str
) -> None:
    said = call("benchmark=[mt_bench]", f"{key}.endpoint.{setting}")
    assert said.err.splitlines()[0] == f"error: set {key}.endpoint.base_url=…; it has no default"
    assert said.code == 1


def test_launcher_that_is_not_installed_is_answered_with_how_to_install_it(call: Callable[..., Said]) -> None:
    said = call("-m", "experiment=smoke", "hydra/launcher=nosuch", "seed=1")
    assert said.err.startswith("error: no hydra/launcher=nosuch; there are: basic, ")
    assert said.err.endswith("; pip install 'selfalign[sweep]'\n")
    assert "search path" not in said.err


def test_error_of_a_sweep_sets_the_exit_code_though_other_jobs_ran(call: Callable[..., Said], tmp_path: Path) -> None:
    said = call(
        "-m", "experiment=smoke", "model=pretrained", "model.path=/nowhere/a,/nowhere/b", f"output_dir={tmp_path}"
    )
    assert said.code == 1
    last = said.err.splitlines()[-1]
    assert last.startswith("error: 2 of 2 jobs failed")
    assert "job 1 (model.path=/nowhere/a): model.path: no folder '/nowhere/a'" in last
    assert "Traceback" not in said.err


def test_full_error_shows_the_traceback(call: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(SelfalignError, match=r"loss\.beta"):
        call("experiment=smoke", "loss.beta=-1")


def test_bug_is_shown_with_its_traceback_and_said_to_be_one(
    call: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("selfalign.launch.experiment.run_experiment", broken)
    said = call("experiment=smoke")
    assert said.code == 1
    assert "Traceback" in said.err
    assert "ZeroDivisionError: oh" in said.err
    assert said.err.splitlines()[-1].startswith("error: this is a bug in selfalign")


def test_process_ends_with_one_line_and_exit_code_1(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "selfalign", "experiment=smoke", "loss.beta=-1"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (said.returncode, said.stdout) == (1, "")
    assert said.stderr.startswith("error: loss.beta must be above 0 and finite, got -1")
    assert said.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --- files that cannot be written --------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["below a file", "proc"])
def test_output_that_cannot_be_written_is_one_line(call: Callable[..., Said], tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    folder = Path("/proc/nothing/out") if place == "proc" else tmp_path / "file/out"
    said = call(*TINY_RUN, f"output_dir={folder}")
    assert said.code == 1
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith(f"error: {folder.parent}")
    assert "Traceback" not in said.err


@pytest.mark.parametrize("where", ["selfalign.store.artifacts.write_json", "selfalign.stages.seed_data.write_records"])
def test_full_disk_is_one_line_and_what_was_made_is_kept(
    call: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(path: Path, *arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(where, full)
    said = call(*TINY_RUN, *write_tiny_data(tmp_path / "data"), f"output_dir={tmp_path / 'out'}")
    assert said.code == 1
    assert "Traceback" not in said.err
    last = said.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "No space left on device" in last
    assert "kept" in last


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "/a/b: No space left on device; "),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "/a: Permission denied; "),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system; "),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/a/b"), "/a/b: Disk quota exceeded; make room there"),
        (OSError(errno.EFBIG, "File too large", "/a/b"), "/a/b: File too large; raise the limit"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left on"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/a"), "/a: Is a directory; "),
        (SelfalignError("what to do"), "what to do"),
    ],
)
def test_what_the_user_can_mend_is_explained_in_one_line(error: Exception, said: str) -> None:
    message = explain(error)
    assert message is not None
    assert message.startswith(said)
    assert "\n" not in message


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("x"), OSError("without a number"), RuntimeError("x")])
def test_bug_has_no_explanation(error: Exception) -> None:
    assert explain(error) is None


def test_message_of_several_lines_is_said_in_one(call: Callable[..., Said], tmp_path: Path) -> None:
    """JSON and YAML libraries answer in several lines."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"instruction": "a", "response": "b"}\n{"instruction": "c"\n')
    said = call("experiment=smoke", f"data.seed_data.demonstrations={broken}", f"output_dir={tmp_path / 'out'}")
    assert said.code == 1
    assert f"{broken}:2" in said.err.splitlines()[-1]
    assert said.err.splitlines()[-1].startswith("error: ")


# --- a run, interrupted and in company ---------------------------------------------------------------------------

COMPANY = """
import os, signal, sys, time
from pathlib import Path
import selfalign.config.hydra, selfalign.launch.experiment, selfalign.training.trainer
from selfalign.cli.main import main

# What runs in the background of a shell ignores Ctrl-C, and so would its children.
signal.signal(signal.SIGINT, signal.default_int_handler)

def start(name):
    child = os.fork()
    if child:
        return child
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{stream}", os.O_WRONLY | os.O_CREAT), number)
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    sys.stdout.flush()
    os._exit(code)

def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

interrupted = start("interrupted")
while not list(Path("outputs/store").glob("sft/*")):
    time.sleep(0.005)
os.kill(interrupted, signal.SIGINT)
print(end(interrupted))
pair = [start("first"), start("second")]
print(*map(end, pair))
"""
"""Three times the same command: the first gets Ctrl-C while it trains, the other two are started at once."""


def test_interrupted_run_is_continued_by_two_at_once_one_after_the_other(tmp_path: Path) -> None:
    overrides = [*TINY_RUN, *write_tiny_data(tmp_path / "data")]
    done = warm.run(
        [sys.executable, "-c", COMPANY, *overrides],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    said = {path.name: path.read_text() for path in tmp_path.glob("*.*") if path.is_file()}
    assert done.stdout.splitlines()[-2:] == ["130", "0 0"], said
    assert "Traceback" not in said["interrupted.err"]
    assert said["interrupted.err"].splitlines()[-1] == "interrupted; repeat the command to continue"

    errors, outputs = [[said[f"{name}.{stream}"] for name in ("first", "second")] for stream in ("err", "out")]
    (waited,) = [text for text in errors if "already running" in text]
    assert "waiting" in waited
    assert sum("nothing had to be made" in text for text in outputs) == 1
    assert len(list(tmp_path.glob("outputs/store/align/*/manifest.json"))) == 2
    assert len(list(tmp_path.glob("outputs/tiny-*"))) == 1
    assert "Warning" not in "".join(errors)
    assert not re.search(r"\r|%\|", "".join(said.values())), "a log file has a progress bar"


SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
"""{command: module and function} as they are installed."""


def help_of(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    capsys.readouterr()
    with suppress(SystemExit):
        resolve_name(SCRIPTS[command])()
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


@pytest.mark.parametrize("command", SCRIPTS)
def test_help_of_every_command_has_one_form_and_names_the_others(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert SCRIPTS.keys() <= FAMILY.keys()
    text = help_of(command, monkeypatch, capsys)
    assert text.startswith(f"{command}: {FAMILY[command]}\n\nusage: {command} ")
    places = [text.index(f"\n{section}\n") for section in ("options:", "examples:", "other commands:")]
    assert places == sorted(places)
    others = text[places[-1] :].splitlines()[2:]
    assert [line.split(maxsplit=1) for line in others] == [[k, v] for k, v in FAMILY.items() if k != command]
    examples = text[places[-2] : places[-1]].splitlines()
    assert [line.split()[0] for line in examples if re.match("  [^ ]", line)] == [command] * (len(examples) // 2 - 1)


def test_docs_list_the_family_in_its_order() -> None:
    text = (ROOT / "docs/runs.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(selfalign[\w-]*)` \|", text, flags=re.MULTILINE) == list(FAMILY)


def test_subcommand_is_answered_with_the_command_that_was_meant(call: Callable[..., Said]) -> None:
    said = call("report", "--watch", "outputs/x")
    assert (said.code, said.out) == (1, "")
    assert said.err == "error: selfalign has no subcommands; did you mean selfalign-report --watch outputs/x?\n"


def test_commands_are_installed_under_their_names() -> None:
    scripts = SCRIPTS
    assert scripts["selfalign"] == "selfalign.cli.main:main"
    assert scripts["selfalign-report"] == "selfalign.cli.report:main"
    assert all(callable(resolve_name(place)) for place in scripts.values())


def test_help_into_a_closed_pipe_is_no_error() -> None:
    """As in `selfalign --help | head`."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "selfalign", "--help"], stdout=writing, stderr=subprocess.PIPE, cwd=ROOT, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("stream", ["while it runs", "at its end"])
def test_output_that_nobody_reads_any_more_is_one_line(tmp_path: Path, stream: str) -> None:
    """As in `selfalign … | head`."""
    lines = "print('x' * 100_000, flush=True)" if stream == "while it runs" else "print('x')"
    program = f"""
from selfalign.cli.errors import report_errors
with report_errors("interrupted"):
    {lines}
"""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False
    )
    os.close(writing)
    assert done.stderr == (
        "error: the output is not read any more; what was finished is kept, the same command continues from it\n"
    )
    assert done.returncode == 1


def test_pipe_to_another_program_is_not_taken_for_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), report_errors("interrupted"):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert capsys.readouterr().err.startswith("error: Broken pipe; ")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
    ids=["unset", "own"],
)
def test_threads_wait_awake_for_a_moment_unless_the_environment_says_how(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: dict[str, str]
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    set_waiting()
    assert os.environ == expected


def test_bars_of_libraries_are_off_where_there_is_no_terminal(tmp_path: Path) -> None:
    program = """
from selfalign.cli.environment import set_environment
set_environment()
from tqdm.auto import tqdm
list(tqdm(range(3), desc="plain"))
import datasets
list(datasets.utils.tqdm(range(3), desc="datasets", disable=False))
from selfalign.cli.environment import set_messages
set_messages()
import transformers
list(transformers.utils.logging.tqdm(range(3), desc="transformers"))
"""
    environment = {name: value for name, value in os.environ.items() if name not in BARS}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_bars_of_libraries_stay_where_there_is_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BARS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    set_bars()
    assert not set(BARS) & os.environ.keys()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


BARS = ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS")
"""Variables that switch off the bars of libraries."""

# --- terminals that lack characters ------------------------------------------------------------------------------

COMMANDS = {
    "selfalign": ("selfalign.cli.main:main", ["--help"], "M1 ? M2 ? M3"),
    "selfalign-evaluate": (
        "selfalign.cli.evaluate:evaluate",
        ["/models/x", "name=李"],
        "selfalign-evaluate 'name=\"?\"'",
    ),
    "selfalign-report": ("selfalign.cli.report:main", ["/runs/李"], "/runs/? is not a run folder"),
    "selfalign-store": ("selfalign.cli.store:main", ["list", "--output", "/runs/李"], "/runs/?: no store"),
    "selfalign-workspace": ("selfalign.cli.workspace:main", ["李"], "ENTITY/PROJECT, got '?'"),
}


@pytest.mark.parametrize(("command", "encoding"), [*((name, "ascii") for name in COMMANDS), ("selfalign", "cp1252")])
def test_character_that_the_terminal_lacks_is_shown_as_a_question_mark(
    tmp_path: Path, command: str, encoding: str
) -> None:
    place, arguments, shown = COMMANDS[command]
    module, _, function = place.partition(":")
    program = f"import sys; from {module} import {function}; sys.argv = {[command, *arguments]!r}; {function}()"
    said = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
        timeout=120,
    )
    text = (said.stdout + said.stderr).decode(encoding)
    assert "Traceback" not in text
    assert "bug" not in text
    assert shown in text


def test_run_works_where_the_terminal_is_ascii(
    call: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tables and bars have other signs, and so may names of files."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    rows = '{"prompt": "Is it 李?", "chosen": "ä", "rejected": "No."}\n'
    (tmp_path / "pä.jsonl").write_text(rows, encoding="utf-8")
    told = [
        "experiment=smoke",
        "data=pairs",
        "data.seed_data.demonstrations=''",
        "data.seed_data.ranked=''",
        "iterations=1",
    ]
    said = call(*told, "evaluate=none", 'data.path="pä.jsonl"', "output_dir=out")
    out, err = (stream.buffer.getvalue().decode("ascii") for stream in streams)  # pyright: ignore
    assert said.code == 0, err
    assert "p?.jsonl" in out
    assert "Traceback" not in err
    (config,) = tmp_path.glob("out/smoke-*/config.yaml")
    assert "path: pä.jsonl" in config.read_text(encoding="utf-8")
