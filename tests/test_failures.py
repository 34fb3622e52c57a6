"""What the machine refuses is one line that names the file and says what to do, whichever library meets it."""

import errno
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import LIMIT, composed, file_limit, instruction
from safetensors import SafetensorError

from selfalign.cli.errors import explain
from selfalign.cli.report import report
from selfalign.core.errors import SelfalignError
from selfalign.core.failures import KEPT, fits, is_out_of_memory, naming, system_error
from selfalign.core.files import write_json
from selfalign.core.jsonl import write_records
from selfalign.launch.experiment import LogHandler, log_file, reported_keys, was_done
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.store.artifacts import StageOutput, Store
from selfalign.store.journal import Journal


def test_python_hears_of_a_file_limit_as_an_error_and_not_by_a_signal() -> None:
    assert signal.getsignal(signal.SIGXFSZ) is signal.SIG_IGN


def log_row(folder: Path) -> None:
    StageOutput(folder, "M1", lambda row: None).log({"step": 1, "text": "x" * LIMIT})


WRITERS: dict[str, tuple[Callable[[Path, PolicyCheckpoint], Any], str]] = {
    "json": (lambda folder, policy: write_json(folder / "a.json", "x" * LIMIT), "a.json"),
    "records": (lambda folder, policy: write_records(folder / "a.jsonl", [instruction("i", "x" * LIMIT)]), "a.jsonl"),
    "journal": (lambda folder, policy: Journal(folder, lambda n: None).keep("b", "x" * LIMIT), "journal-0.jsonl"),
    "log": (lambda folder, policy: log_row(folder), "log.jsonl"),
    "weights": (
        lambda folder, policy: Store(folder).make("sft", {}, lambda out: save(out, policy)),
        "sft/",
    ),
}


def save(out: StageOutput, policy: PolicyCheckpoint) -> dict[str, Any]:
    PolicyCheckpoint(out.path).save(policy.load("float32"), policy)
    return {}


@pytest.mark.parametrize("what", WRITERS)
def test_file_that_may_not_grow_is_named_with_what_to_do(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, what: str
) -> None:
    write, name = WRITERS[what]
    with file_limit(), pytest.raises(OSError) as caught:
        write(tmp_path, tiny_policy)
    said = explain(caught.value)
    assert caught.value.errno == errno.EFBIG
    assert said is not None
    assert said.startswith(f"{tmp_path}/{name}")
    assert said.endswith(f": File too large; raise the limit on the size of a file (ulimit -f); {KEPT}")


def test_half_written_weights_do_not_go_on_filling_the_disk(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    with file_limit(), pytest.raises(OSError):
        Store(tmp_path).make("sft", {}, lambda out: save(out, tiny_policy))
    (folder,) = (path for path in tmp_path.glob("sft/*") if path.is_dir())
    assert [path.name for path in folder.iterdir()] == ["scratch"]
    assert Store(tmp_path).make("sft", {}, lambda out: save(out, tiny_policy)).stage == "sft"


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EDQUOT, "Disk quota exceeded; make room there"),
        (errno.ENOSPC, "No space left on device; make room there"),
        (errno.EFBIG, "File too large; raise the limit"),
        (errno.EROFS, "Read-only file system; set an output_dir"),
    ],
)
@pytest.mark.parametrize("kind", ["python", "safetensors", "tokenizers"])
def test_refusal_is_the_same_whichever_library_meets_it(tmp_path: Path, number: int, said: str, kind: str) -> None:
    told = f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
    raised = {"python": OSError(number, os.strerror(number)), "safetensors": SafetensorError(told)}
    with pytest.raises(OSError) as caught, naming(tmp_path / "model"):
        raise raised.get(kind, Exception(told))
    line = explain(caught.value)
    assert line is not None
    assert line.startswith(f"{tmp_path}/model: {said}")
    assert "\n" not in line


def test_innermost_name_stays() -> None:
    with pytest.raises(OSError) as caught, naming(Path("folder")), naming(Path("folder/file")):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == "folder/file"


@pytest.mark.parametrize("error", [ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), ValueError("x")])
def test_what_is_about_no_file_gets_no_name(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, naming(Path("folder")):
        raise error
    assert caught.value is error
    assert getattr(error, "filename", None) is None


def test_text_that_mentions_a_full_disk_is_none() -> None:
    """A model may write anything; an error that repeats it is still a bug."""
    assert system_error(ValueError("the judge wrote 'No space left on device'")) is None


# --- the log -----------------------------------------------------------------------------------------------------


def test_log_that_cannot_be_written_ends_the_run_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.log"
    with file_limit(), pytest.raises(OSError) as caught, log_file(path):
        logging.getLogger().error("%s", "x" * LIMIT)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert "Traceback" not in capsys.readouterr().err


def test_reason_of_a_failing_run_is_not_lost_to_the_log_that_is_full_too(tmp_path: Path) -> None:
    with file_limit(100), pytest.raises(SelfalignError, match="the first reason"), log_file(tmp_path / "run.log"):
        raise SelfalignError("the first reason")


def test_message_that_is_wrong_itself_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    handler = LogHandler(tmp_path / "run.log", encoding="utf-8")
    handler.handle(logging.LogRecord("a", logging.INFO, "", 0, "%d", ("no number",), None))
    handler.close()


def test_reason_of_a_failing_stage_is_not_lost_to_its_clock(tmp_path: Path) -> None:
    def build(out: StageOutput) -> dict[str, Any]:
        (out.scratch / "seconds").mkdir()  # So that the time cannot be written down.
        raise SelfalignError("the first reason")

    with pytest.raises(SelfalignError, match="the first reason"):
        Store(tmp_path).make("stage", {}, build)


# --- memory ------------------------------------------------------------------------------------------------------


def test_stage_that_needs_too_much_memory_is_named_with_what_to_lower(tmp_path: Path) -> None:
    def build(out: StageOutput) -> dict[str, Any]:
        torch.empty(1 << 50)
        return {}

    with pytest.raises(SelfalignError, match=r"^M2 does not fit into memory \(.*allocate.*\): lower microbatch_tokens"):
        Store(tmp_path).make("sft", {}, build, label="M2")


@pytest.mark.parametrize(
    ("error", "lack"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_lack_of_memory_is_told_from_other_errors(error: Exception, lack: bool) -> None:
    assert is_out_of_memory(error) is lack
    with pytest.raises(SelfalignError if lack else type(error)), fits("M1"):
        raise error


def test_lack_of_memory_outside_of_a_stage_is_no_bug() -> None:
    assert explain(MemoryError()) == f"there is no memory left (MemoryError); {KEPT}"


# --- text --------------------------------------------------------------------------------------------------------


def test_path_that_is_no_utf_8_is_said_to_be_none() -> None:
    with pytest.raises(UnicodeEncodeError) as caught:
        "/models/\udcff/mine".encode()
    assert explain(caught.value) == (
        r"'/models/\udcff/mine' is not UTF-8: rename the path or mend the text, or set LC_ALL=C.UTF-8"
    )


# --- what a run has written about itself -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "read"), [("finished.json", None), ("summary.json", reported_keys)])
def test_damaged_file_of_a_run_is_named_with_what_to_delete(tmp_path: Path, name: str, read: Any) -> None:
    (tmp_path / name).write_text('{"tra')
    said = rf"^{tmp_path}/{name} is damaged\. Delete it and repeat the command, which writes it again$"
    with pytest.raises(SelfalignError, match=said):
        read(tmp_path) if read else was_done(composed("experiment=smoke")[0], tmp_path)


def test_damaged_run_is_one_line_of_the_report_too(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "summary.json").write_text('{"config')
    with pytest.raises(SelfalignError, match=rf"^{tmp_path}: its files are damaged"):
        report([tmp_path])
