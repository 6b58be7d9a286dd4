"""Closed and full standard streams, encodings without Unicode, control characters and markup in names."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import is_one_line, tiny
from rich.table import Table

from icenet.cli.main import main
from icenet.cli.options import show_json
from icenet.core.report import reporter, streams
from icenet.core.report.console import new_console, print_line, stderr_console
from icenet.core.report.progress import Progress
from icenet.core.report.streams import printable

NOT_UTF8 = os.fsdecode(b"r\xff")
CLOSED = {"stdin": "<&-", "stdout": ">&-", "stderr": "2>&-"}


class Failing(io.StringIO):
    """A stream on a full disk, or one whose reader has exited."""

    def __init__(self, error: type[OSError], code: int) -> None:
        super().__init__()
        self.error = error(code, os.strerror(code))

    def flush(self) -> None:
        raise self.error


def full() -> Failing:
    return Failing(OSError, 28)


def shell(folder: Path, arguments: str, redirection: str) -> subprocess.CompletedProcess[str]:
    command = f"exec {sys.executable} -m icenet {arguments} {redirection}"
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, cwd=folder)


def test_a_run_without_standard_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All files have numbers above 2: a library that writes to standard error would write into one of them."""
    config = tiny(tmp_path, "training.max_steps=2", "backend=torch")
    (tmp_path / "tiny.yaml").write_text(config.to_yaml())
    monkeypatch.setenv("ICENET_CACHE", str(tmp_path / "cache"))
    done = shell(tmp_path, "train tiny.yaml --run r", " ".join(CLOSED.values()))
    assert done.returncode == 1  # the result could not be printed
    assert (tmp_path / "r/checkpoints/step-00000002/manifest.json").is_file()
    assert len((tmp_path / "r/metrics.jsonl").read_text().splitlines()) >= 2


@pytest.mark.parametrize("arguments", ["", "--help"])
def test_a_closed_or_full_output(tmp_path: Path, arguments: str) -> None:
    for redirection in (">&-", ">/dev/full"):
        done = shell(tmp_path, arguments, redirection)
        assert done.returncode in (1, 2) and is_one_line(done.stderr, "output cannot be written")
    for redirection in ("2>&-", "2>/dev/full", "<&-"):
        done = shell(tmp_path, arguments, redirection)
        assert done.stdout and done.stderr == "" and done.returncode == (0 if arguments else 2)


def test_messages_that_cannot_be_written_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (full(), None, Failing(BrokenPipeError, 32)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert main(["nonsense"]) == 2
        console = stderr_console()
        with Progress(3, 0, console) as progress:
            progress.note("a note")
            progress.update(3, 1.0)
        streams.write_error("text")


def test_output_that_cannot_be_written_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for stream, message in ((full(), "space"), (Failing(BrokenPipeError, 32), "")):
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["schema"]) == 1
        err = capsys.readouterr().err
        assert is_one_line(err, message) if message else err == ""


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_output_in_any_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="strict"))
    with streams.prepared():
        streams.write(f"a→é{NOT_UTF8}名")
        show_json({"a→": f"é{NOT_UTF8}🎉\x9b\x1b"})
        table = Table(title="→")
        table.add_column("▁█")
        new_console().print(table)
    first, _, rest = raw.getvalue().partition(b"\n")
    if encoding == "utf-8":
        assert first == "a→ér".encode() + b"\xff" + "名".encode()
    else:
        assert first.startswith(b"a->") and first.endswith(b"r\xff\\u540d")
    value = json.loads(rest[: rest.index(b"}") + 1])
    assert value == {"a→": f"é{NOT_UTF8}🎉\x9b\x1b"} and b"\x1b" not in rest


HOSTILE = ["\x1b[31mred", "a\nb", "[red]x[/]", "[/]", ":smile:", "\x9b2J", "a\rb", NOT_UTF8, "\x07"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_printed_literally(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    for console in (new_console(file=file), new_console(file=file, force_terminal=True, width=80, color_system=None)):
        table = Table(title=f"title {printable(name)}")
        table.add_column("column")
        table.add_row(printable(name))
        console.print(table)
        console.print(name)
        print_line(console, name)
    text = file.getvalue()
    assert all(character.isprintable() or character == "\n" for character in text)
    assert text.count(printable(name)) >= 6
    assert printable(printable(name)) == printable(name)


def test_a_terminal_gets_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text that a model generates may contain any; a file or a pipe gets it as it is."""
    text = "a\tb\r\nc\x1b]0;title\x07\x9b2J"
    for is_terminal in (True, False):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda is_terminal=is_terminal: is_terminal)
        monkeypatch.setattr(sys, "stdout", stream)
        streams.write(text, end="")
        assert stream.getvalue() == (r"a" "\tb\nc" r"\x1b]0;title\x07\x9b2J" if is_terminal else text)


@pytest.mark.parametrize("width", [1, 20])
def test_a_narrow_terminal_shows_all_cells(width: int) -> None:
    console = new_console(file=io.StringIO(), force_terminal=True, width=width)
    assert console.width >= 60


def test_a_plot_that_cannot_be_drawn_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from icenet.core.training.trainer import Trainer

    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("no\nfont")

    monkeypatch.setattr(reporter.plots, "plot_metrics", fails)
    config = tiny(tmp_path, "training.max_steps=1", "backend=torch")
    result = Trainer.start(config, tmp_path / "run", quiet=True).fit()
    assert result.plot is None and result.plot_problem == "no font" and result.checkpoint.is_dir()
