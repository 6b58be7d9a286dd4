"""The commands and programs of the pages on training run, and the links of all pages lead somewhere."""

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
from pages import PAGES, blocks

from icenet.cli.main import main

pytest.importorskip("torch")
pytest.importorskip("mlx")

EXECUTED = ["docs/training.md", "docs/data.md", "docs/optimizers.md", "docs/distributed.md"]
NOT_RUN = "not run by"
"""In the title of a section with commands that need machines that a test does not have."""

SMALL = ["model.hidden_size=16", "model.num_layers=1", "model.max_seq_length=16", "training.batch_size=4"]
"""What the default run changes in quickstart."""


def anchors(page: Path) -> set[str]:
    """Returns the anchors of the titles of a page, as GitHub names them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_the_links_of_a_page(page: str) -> None:
    """Files and titles that a page links to exist."""
    file = ROOT / page
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for name, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([\w-]+))?\)", text):
        target = file.parent / name if name else file
        assert target.exists(), name
        assert not anchor or anchor in anchors(target), f"{name}#{anchor}"


def icenet_arguments(line: str, source: Path) -> list[str]:
    """Returns the arguments of an `icenet` command with a small model and text; a launcher is left out."""
    words = shlex.split(line, comments=True)
    words = [str(source) if word == "stdlib" else word for word in words[words.index("icenet") + 1 :]]
    if words[:2] != ["train", "quickstart"]:
        return words
    text = [] if "data.source=" in line else [f"data.source={source}"]
    return [*words, *(part for override in (*SMALL, *text) for part in ("--set", override))]


@pytest.mark.parametrize("page", EXECUTED)
def test_every_command_of_the_page(
    page: str, here: Path, tmp_path_factory: pytest.TempPathFactory, no_plots: None
) -> None:
    """Each succeeds, one after another in an empty folder, in this process and with a small model."""
    source = Path(shutil.copytree(Path(json.__file__).parent, tmp_path_factory.mktemp("source") / "json"))
    for language, content in blocks(page, "bash", "python", skip=NOT_RUN):
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
@pytest.mark.parametrize("page", EXECUTED)
def test_every_command_of_the_page_as_printed(page: str, here: Path) -> None:
    """Each succeeds, one after another in an empty folder, as its own process."""
    (here / "bin").mkdir()
    (here / "bin" / "icenet").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m icenet "$@"\n')
    (here / "bin" / "icenet").chmod(0o755)
    path = os.pathsep.join([str(here / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    (here / "work").mkdir()
    for language, content in blocks(page, "bash", "python", skip=NOT_RUN):
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
