"""Custom models of plain layers in a parity run: signals, batch norm's statistics, flattened images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from icenet.cli.main import main
from icenet.core.config import Config
from icenet.parity.configuration.run import run

FILES = {
    "plain.py": """
import mlx.core as mx
import mlx.nn as nn

from icenet.models.base import BaseModel


class Signals(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.body = nn.Sequential(nn.Conv1d(width, width, 3, padding=1), nn.BatchNorm(width), nn.ReLU())
        self.norm = nn.GroupNorm(2, width, pytorch_compatible=True)
        self.head = nn.Linear(width, config.vocab_size)

    def forward(self, x):
        x = self.embedding(x)
        return self.head(self.norm(x + self.body(x)))


class Images(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm(4, momentum=MOMENTUM)
        self.head = nn.Linear(4 * 36, config.vocab_size)

    def forward(self, x):
        x = nn.relu(self.norm(self.conv(x)))
        return self.head(FLATTEN)
""",
    "plain_torch.py": """
import torch
import torch.nn as nn

from icenet_torch.models.base import BaseModel


class Signals(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.body = nn.Sequential(nn.Conv1d(width, width, 3, padding=1), nn.BatchNorm1d(width), nn.ReLU(inplace=True))
        self.norm = nn.GroupNorm(2, width)
        self.head = nn.Linear(width, config.vocab_size)

    def forward(self, x):
        x = self.embedding(x).transpose(1, 2)
        return self.head(self.norm(x + self.body(x)).transpose(1, 2))


class Images(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 36, config.vocab_size)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).flatten(1))
""",
}
CORRECT = "mx.moveaxis(x, -1, 1).flatten(1)"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, name: str, *, flatten: str = CORRECT, momentum: float = 0.1) -> Config:
    """Writes the models and the configuration of one of them."""
    for file, text in FILES.items():
        (folder / file).write_text(text.replace("FLATTEN", flatten).replace("MOMENTUM", str(momentum)))
    data: dict[str, Any] = {"kind": "images", "source": "digits"} if name == "Images" else {"seq_length": 16}
    model = {"type": f"plain.py:{name}", "hidden_size": 16, "vocab_size": 10}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"device": "cpu", "seed": 3, "model": model, "data": data}))
    return Config.from_yaml(path)


def test_signals_of_as_many_positions_as_channels(here: Path) -> None:
    report = run(write(here, "Signals"))
    assert report.passed, report.verdict()
    assert "layers, training" in [section.title for section in report.sections]
    judged = {row.path: row for section in report.sections for row in section.rows}
    assert judged["body.0"].note == judged["norm"].note == "" and judged["body"].note.startswith("channels last")
    assert {"body.1.running_mean", "body.1.running_var"} <= judged.keys()


@pytest.mark.usefixtures("few_samples")
def test_another_momentum_is_found(here: Path) -> None:
    report = run(write(here, "Images", momentum=0.2))
    over = {row.path for section in report.sections for row in section.rows if not row.passed}
    assert over == {"norm.running_mean", "norm.running_var"}


@pytest.mark.usefixtures("few_samples")
def test_the_command_names_a_wrong_order_of_flattened_images(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(here, "Images", flatten="x.flatten(1)")
    capfd.readouterr()
    assert main(["parity", "Images.yaml", "--json"]) == 1
    found = json.loads(capfd.readouterr().out)
    assert CORRECT in found["verdict"]
    rows = {row["path"]: row for row in found["sections"][0]["rows"]}
    assert CORRECT in rows["head"]["remedy"] and rows["head"]["mark"] == "propagated"
