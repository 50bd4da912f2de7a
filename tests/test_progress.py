"""What long work shows on a terminal and in a log file."""

import io
import sys

import pytest

from synthkit import progress as module
from synthkit.progress import progress, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def not_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)


def test_a_log_file_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_LINE_EVERY", 0.0)
    with progress_bar(8, "generate images", done=2) as bar:
        bar.update(4)
    assert list(progress(iter("abc"), "read", total=3)) == ["a", "b", "c"]
    told = capsys.readouterr().err
    assert "\r" not in told and all(line.strip() for line in told.splitlines())
    lines = told.splitlines()
    assert lines[0].startswith("generate images: 2 of 8, 00:00 elapsed")
    assert any(line.startswith("generate images: 6 of 8, ") for line in lines)
    assert any(line.startswith("read: 2 of 3, ") for line in lines)


def test_short_work_is_silent_in_a_log_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert sum(progress(range(5), "add")) == 10
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress([1, 2], "count")) == [1, 2]
    assert "\rcount:   0%" in sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_quiet_silences_both(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "_LINE_EVERY", 0.0)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert list(progress([1], "count")) == [1]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress([1], "count")) == [1]
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]
