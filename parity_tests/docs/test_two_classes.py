"""The files, the program and the commands of the page about porting run as printed, and its tables are right."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT
from pages import blocks, code

from icenet.cli.main import main
from icenet.core.config import custom
from icenet.core.models.modules import copy_weights, get_weights
from icenet.parity import compare

ours: Any = pytest.importorskip("icenet.nn")
mlx_nn: Any = pytest.importorskip("mlx.nn")
torch: Any = pytest.importorskip("torch")

PAGE = "docs/two-classes.md"
STAGES = ("structure", "weights", "forward", "gradients")


@pytest.fixture
def net(here: Path, monkeypatch: pytest.MonkeyPatch, no_plots: None) -> Path:
    """Returns the working directory, with the files that the page shows."""
    monkeypatch.setattr(custom, "_trusted", set())
    for _, content in blocks(PAGE, "python", "yaml"):
        if name := re.match(r"# (\S+\.(py|yaml))\n", content):
            (here / name[1]).write_text(content)
    assert {path.name for path in here.glob("my_net*")} == {"my_net.py", "my_net_torch.py", "my_net.yaml"}
    return here


def proof() -> str:
    return next(block for block in code(PAGE, "python") if "import compare" in block)


def test_the_proof(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len([line for line in proof().splitlines() if line and not line.startswith(("import", "from"))]) <= 10
    scope: dict[str, Any] = {}
    exec(proof(), scope)
    assert scope["report"].passed and capsys.readouterr().out.startswith("passed: ")


@pytest.mark.slow
def test_the_proof_finds_the_order_of_flatten(net: Path) -> None:
    file = net / "my_net.py"
    file.write_text(file.read_text().replace("mx.moveaxis(x, -1, 1).flatten(1)", "x.flatten(1)"))
    scope: dict[str, Any] = {}
    exec(proof(), scope)
    assert not scope["report"].passed and "mx.moveaxis(x, -1, 1).flatten(1)" in scope["report"].cause


def test_the_commands(net: Path) -> None:
    for block in code(PAGE, "bash"):
        for line in block.splitlines():
            assert main([*shlex.split(line)[1:], *(["--quiet"] if "train" in line else [])]) == 0, line


def test_the_message_of_a_mismatch(net: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = net / "my_net.py"
    file.write_text(file.read_text().replace('        self.freeze(keys=["gain"], recurse=False)\n', ""))
    import icenet

    icenet.build("my_net.yaml", "mlx", "cpu")
    shown = next(content for content in unlabelled() if "differs from its" in content)
    assert caplog.messages == [" ".join(shown.split())]


def unlabelled() -> list[str]:
    """Returns the code blocks of the page without a language."""
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    return re.findall(r"^```\n(.*?)^```", re.sub(r"^```\w+\n.*?^```", "", text, flags=re.M | re.S), re.M | re.S)


SAME = {
    "Linear": (4, 6),
    "LayerNorm": (4,),
    "PReLU": (),
    "LeakyReLU": (),
    "CELU": (),
    "ReLU": (),
    "SiLU": (),
    "Tanh": (),
    "Sigmoid": (),
    "Identity": (),
    "Conv1d": (4, 6, 3),
    "Conv2d": (4, 6, 3),
    "Conv3d": (4, 6, 3),
    "ConvTranspose1d": (4, 6, 3),
    "ConvTranspose2d": (4, 6, 3),
    "ConvTranspose3d": (4, 6, 3),
    "MaxPool1d": (2,),
    "MaxPool2d": (2,),
    "MaxPool3d": (2,),
    "AvgPool1d": (2,),
    "AvgPool2d": (2,),
    "AvgPool3d": (2,),
}
"""Layers that the page names as equal, with their arguments here."""

TRANSLATED = {
    "BatchNorm1d": (lambda: torch.nn.BatchNorm1d(4), lambda: mlx_nn.BatchNorm(4)),
    "BatchNorm2d": (lambda: torch.nn.BatchNorm2d(4), lambda: ours.BatchNorm2d(4)),
    "GroupNorm": (lambda: torch.nn.GroupNorm(2, 4), lambda: mlx_nn.GroupNorm(2, 4, pytorch_compatible=True)),
    "RMSNorm": (lambda: torch.nn.RMSNorm(4, eps=1e-5), lambda: mlx_nn.RMSNorm(4, 1e-5)),
    "GELU": (lambda: torch.nn.GELU(approximate="tanh"), lambda: mlx_nn.GELU(approx="tanh")),
}


@pytest.mark.parametrize("name", [*SAME, *TRANSLATED])
def test_the_layers(name: str) -> None:
    """Each translation computes the same, on inputs with the axes of the page."""
    theirs, mine = TRANSLATED.get(name) or (
        lambda: getattr(torch.nn, name)(*SAME[name]),
        lambda: getattr(mlx_nn, name)(*SAME[name]),
    )
    pair = torch.nn.Sequential(theirs()).eval(), mlx_nn.Sequential(mine())
    pair[1].eval()
    copy_weights(*pair)
    assert get_weights(pair[0]).keys() == get_weights(pair[1]).keys()
    axes = re.search(r"([123])d$", name)
    space = int(axes[1]) if axes else 2 if name == "GroupNorm" else 0
    x = np.random.default_rng(0).standard_normal((2, *[6] * (space or 1), 4)).astype(np.float32)
    report = compare(pair[1], pair[0], x, layout="channels_last" if space else "same", stages=STAGES)
    assert report.passed, report.verdict
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    assert re.search(rf"`{name}`|nn\.{name}\(|`{name[:-2]}1d` to `3d`", page)
