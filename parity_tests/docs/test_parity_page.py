"""The programs and commands of docs/parity.md run, and print what the page shows."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT

from icenet.cli.main import main
from icenet.parity import compare

pytest.importorskip("torch")
pytest.importorskip("icenet.models")  # chooses the BLAS before mlx is imported

PAGE = "docs/parity.md"


def section(title: str) -> list[tuple[str, str]]:
    """Returns the code blocks of a section, as (language, content); that of output is empty."""
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    part = re.split(rf"^##+ {re.escape(title)}$", text, flags=re.MULTILINE)[1]
    part = re.split(r"^##+ ", part, flags=re.MULTILINE)[0]
    return re.findall(r"^```(\w*)\n(.*?)^```$", part, flags=re.MULTILINE | re.DOTALL)


def without_numbers(line: str) -> str:
    """Returns a verdict without the ratios and the value with the largest one, which depend on the processor."""
    line = re.sub(r"largest ratio .*", "largest ratio", line)
    return re.sub(r"off by \S+ times", "off by N times", line).strip()


def test_two_modules(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (_, program), (_, shown) = section("Any two modules")[:2]
    exec(program, {"__name__": "program"})
    assert without_numbers(capsys.readouterr().out.splitlines()[0]) == without_numbers(shown)


def write_files() -> None:
    """Writes the files that the section of the port shows, as they are when it is correct."""
    blocks = section("Port a model in an evening")
    for _, content in blocks:
        if name := re.match(r"# (\w+\.py)", content):
            Path(name[1]).write_text(content)
    for language, content in blocks:
        if language == "diff":
            correct(content)


def correct(content: str) -> None:
    """Applies a change of one line to mine.py."""
    old, new = (line[1:] for line in content.splitlines())
    source = Path("mine.py").read_text()
    assert content.startswith("-") and source.count(old + "\n") == 1
    Path("mine.py").write_text(source.replace(old + "\n", new + "\n"))


@pytest.mark.slow
def test_two_machines(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_files()
    lines = [
        line
        for language, c in section("Port a model in an evening")
        for line in c.splitlines() * (language == "bash")
    ]
    lines = [line for line in lines if " record " in line or " check " in line]
    assert [main(shlex.split(line)[1:]) for line in lines] == [0, 0]
    assert "passed: " in capsys.readouterr().out


def test_the_port(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From the first wrong output to the green page, then the weights and the test."""
    monkeypatch.syspath_prepend(here)
    printed, pages = "", []
    commands = 0
    for language, content in section("Port a model in an evening"):
        if name := re.match(r"# (\w+\.py)", content):
            Path(name[1]).write_text(content)
        elif language == "diff":
            correct(content)
        elif language == "bash":
            for line in content.splitlines():
                if " record " in line or " check " in line:
                    continue
                commands += 1
                code = main(shlex.split(line)[1:])
                printed = capsys.readouterr().out
                assert code == (0 if commands > 2 else 1), printed
                pages.append(Path("parity.html").read_text(encoding="utf-8"))
        else:
            assert without_numbers(printed.splitlines()[0]) == without_numbers(content)
    assert commands == 3 and "between pwconv1 and pwconv2" in pages[1] and "Agrees: ConvNeXt" in pages[2]
    for name in ("mine", "ref", "weights"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    scope: dict[str, Any] = {"__name__": "weights"}
    exec(Path("weights.py").read_text(), scope)
    assert Path("convnext.safetensors").stat().st_size > 100_000
    (_, test), *_ = section("In tests")
    exec(test, scope)
    scope["test_forward"](lambda *args, **options: compare(*args, **options))
    images = np.zeros((1, 32, 32, 3), np.float32)
    assert compare(scope["net"], scope["TorchConvNeXt"](), images, stages="weights").copied_weights


def test_the_table_of_options_is_that_of_the_command() -> None:
    from icenet.cli.parity import modules_command

    text = (ROOT / PAGE).read_text(encoding="utf-8").partition("### The command")[2].partition("### Two machines")[0]
    shown = set(re.findall(r"`(--[\w-]+)", text))
    options = [name for item in modules_command.params for name in (*item.opts, *item.secondary_opts)]
    assert shown == {name for name in options if name.startswith("--")}
