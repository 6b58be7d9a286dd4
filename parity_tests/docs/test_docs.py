"""The commands and programs of the training guide run as they are printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import environment

pytest.importorskip("torch")
pytest.importorskip("mlx")

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "training.md"
NOT_RUN = "not run by us"
"""What stands in the title of a section whose commands need machines that a test has not."""


def blocks(text: str) -> list[tuple[str, str]]:
    """The code blocks that are to run: language and content."""
    found = []
    for section in re.split(r"^(?=##+ )", text, flags=re.M):
        if NOT_RUN not in section.partition("\n")[0]:
            found += re.findall(r"^```(bash|python)\n(.*?)^```$", section, re.M | re.S)
    return found


def test_the_guide_has_what_it_should() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    assert len(blocks(text)) >= 8
    links = re.findall(r"\]\(#([\w-]+)\)", text)
    titles = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in re.findall(r"^#+ (.*)$", text, re.M)}
    assert set(links) <= titles, set(links) - titles


@pytest.mark.parametrize("measures", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_command_of_the_guide(tmp_path: Path, measures: bool) -> None:
    """One after the other, in an empty folder; each must end well. Benchmarks are slow."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, module in (("icenet", "icenet"), ("python", "")):
        script = f'#!/bin/sh\nexec "{sys.executable}" {f"-m {module}" if module else ""} "$@"\n'
        (binaries / name).write_text(script)
        (binaries / name).chmod(0o755)
    here = tmp_path / "here"
    here.mkdir()
    beside = Path(sys.executable).parent
    path = os.pathsep.join([str(binaries), str(beside), os.environ["PATH"]])
    surroundings = environment(tmp_path, PATH=path, OMP_NUM_THREADS="2")
    for language, content in blocks(GUIDE.read_text(encoding="utf-8")):
        if "icenet bench" in content and not measures:
            continue
        run = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
        command = [*run, content]
        began = time.monotonic()
        done = subprocess.run(
            command, cwd=here, env=surroundings, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL
        )
        print(f"{time.monotonic() - began:5.1f} s  {content.splitlines()[0]}")
        assert done.returncode == 0, f"{content}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
