"""The commands and programs of the training page run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, environment
from pages import blocks

from icenet.cli.main import main

pytest.importorskip("torch")
pytest.importorskip("mlx")

PAGE = "docs/training.md"
NOT_RUN = "not run by us"
"""In the title of a section with commands that need machines that a test does not have."""

SMALL = ["model.hidden_size=16", "model.num_layers=1", "model.max_seq_length=16", "training.batch_size=4"]
"""What the default run changes in quickstart."""

EXAMPLES = blocks(PAGE, "bash", "python", skip=NOT_RUN)


def test_the_page_has_examples_and_its_links_exist() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    assert len(EXAMPLES) >= 8
    links = re.findall(r"\]\(#([\w-]+)\)", text)
    titles = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in re.findall(r"^#+ (.*)$", text, re.M)}
    assert set(links) <= titles, set(links) - titles


def icenet_arguments(line: str, source: Path) -> list[str]:
    """Returns the arguments of an `icenet` command with a small model and text; a launcher is left out."""
    words = shlex.split(line, comments=True)
    words = [str(source) if word == "stdlib" else word for word in words[words.index("icenet") + 1 :]]
    if words[:2] != ["train", "quickstart"]:
        return words
    text = [] if "data.source=" in line else [f"data.source={source}"]
    return [*words, *(part for override in (*SMALL, *text) for part in ("--set", override))]


def test_every_command_of_the_page(here: Path, tmp_path_factory: pytest.TempPathFactory, no_plots: None) -> None:
    """Each succeeds, one after another in an empty folder, in this process and with a small model."""
    source = Path(shutil.copytree(Path(json.__file__).parent, tmp_path_factory.mktemp("source") / "json"))
    for language, content in EXAMPLES:
        if "icenet bench" in content:
            continue
        if language == "python":
            small = "".join(f"{override!r}, " for override in SMALL)
            exec(content.replace("overrides=[", f"overrides=[{small}"), {})
            continue
        for line in content.replace("\\\n", " ").splitlines():
            if "icenet " in line:
                assert main(icenet_arguments(line, source)) == 0, line
            else:
                subprocess.run(["bash", "-euc", line], check=True)


@pytest.mark.slow
def test_every_command_of_the_page_as_printed(here: Path) -> None:
    """Each succeeds, one after another in an empty folder, as its own process."""
    (here / "bin").mkdir()
    (here / "bin" / "icenet").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m icenet "$@"\n')
    (here / "bin" / "icenet").chmod(0o755)
    path = os.pathsep.join([str(here / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    (here / "work").mkdir()
    for language, content in EXAMPLES:
        run = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
        done = subprocess.run(
            [*run, content],
            cwd=here / "work",
            env=environment(here, PATH=path),
            capture_output=True,
            text=True,
            timeout=600,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{content}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
