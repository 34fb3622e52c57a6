import io
import re
import sys

import pytest

from selfalign.core import progress
from selfalign.core.progress import progress_bar


def advance(*, shown: bool = True, later_seconds: float | None = None) -> None:
    with progress_bar("M2", 40, "steps", shown=shown, later_seconds=later_seconds) as move:
        for _ in range(40):
            move(1)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    advance()
    written = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "\r" in written
    assert "40/40 steps" in written


def test_bar_says_how_long_the_run_takes_if_later_stages_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    advance(later_seconds=725)
    assert sys.stderr.getvalue().rstrip().endswith("00:00 left · run: about 12 min left")  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "stderr", Terminal())
    advance()
    assert "run:" not in sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_log_file_has_no_bar(capfd: pytest.CaptureFixture[str]) -> None:
    advance()
    assert capfd.readouterr() == ("", "")


def test_log_file_of_a_long_stage_has_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    now = iter(range(0, 10_000, 50))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    advance()
    written = capfd.readouterr().err
    assert "\r" not in written
    lines = written.splitlines()
    assert 3 < len(lines) < 10
    assert all(re.fullmatch(r"M2 +\d+/40 steps · [\d:]+ · [\d:?]+ left", line) for line in lines)


def test_bar_of_another_process_is_not_seen(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0)
    advance(shown=False)
    assert capfd.readouterr() == ("", "")
