"""The file of a custom model: an invalid one is one line, changed code is named, modules next to it are found."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import icenet.blas

import numpy as np
import pytest
import yaml
from custom_models import ONLY, SETTINGS, failure, with_model
from helpers import is_one_line, same_bits, train

import icenet as front_door
from icenet.cli.main import main
from icenet.core.config import Config, custom
from icenet.core.errors import UsageError, WeightsError
from icenet.core.training.trainer import Trainer

pytest.importorskip("mlx.core")
torch: Any = pytest.importorskip("torch")


# ---- errors -----------------------------------------------------------------------------------------------


WRONG = {
    "no file": (None, r"model\.type: bad\.py: no such file"),
    "a folder": ("FOLDER", r"bad\.py: no such file"),
    "syntax": ("def f(:\n    pass\n", r"bad\.py cannot be run: SyntaxError: invalid syntax .*line 1"),
    "raises": ("1 / 0\n", r"bad\.py cannot be run: ZeroDivisionError: division by zero"),
    "raises lines": (
        'raise ValueError("first\\nsecond")\n',
        r"bad\.py cannot be run: ValueError: first \(bad\.py, line 1\)$",
    ),
    "raises nothing": ("raise RuntimeError\n", r"bad\.py cannot be run: RuntimeError"),
    "exits": ("import sys\nsys.exit(0)\n", r"bad\.py cannot be run: SystemExit"),
    "imports a missing module": ("import nowhere_at_all\n", r"bad\.py.* imported: No module named 'nowhere"),
    "no text": ("\0\1", r"bad\.py cannot be run: (ValueError|SyntaxError): "),
    "no class": ("class Other: pass\n", r"bad\.py has no class Model that is a subclass of icenet(_torch)?\.models"),
    "no model": ("class Model: pass\n", r"bad\.py has no class Model that is a subclass of"),
    "a function": ("def Model(config): pass\n", r"bad\.py has no class Model that is a subclass of"),
    "a lookalike": (
        "class Model:\n    backend = 'torch'\n    def __init__(self, config): pass\n    def forward(self, x): pass\n",
        r"bad\.py has no class Model that is a subclass of",
    ),
    "the base itself": (
        "from icenet_torch.models.base import BaseModel as Model\n",
        r"bad\.py has no class Model that is a subclass of",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_invalid_file_is_an_error(name: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text, message = WRONG[name]
    if text == "FOLDER":
        (here / "bad.py").mkdir()
    elif text is not None:
        (here / "bad.py").write_text(text)
    (here / "bad.yaml").write_text(yaml.safe_dump(with_model(type="bad.py:Model")))
    for backend in ("torch", "auto"):
        line = failure(["train", "bad.yaml", "--run", "run", "--backend", backend], capfd)
        assert re.search(message, line.strip()), line
    assert not (here / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    "family", ["my_models.py", "my_models:CustomModel", "my_models.py:", ":X", "a.py:b c", "a.py:1"]
)
def test_invalid_types(family: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "bad.yaml").write_text(yaml.safe_dump(with_model(type=family)))
    assert "model.type" in failure(["train", "bad.yaml", "--run", "run"], capfd)


def test_a_changed_file_is_read_again(here: Path) -> None:
    """Also with the same length and modification time, which Python's compiled files do not detect."""
    file = here / "one_torch.py"
    config = Config.from_dict({**SETTINGS, "model": {**ONLY, "type": "one_torch.py:Only"}})
    assert "embedding.weight" in front_door.build(config, "torch").weights()
    file.write_text(file.read_text().replace("self.embedding", "self.amendment"))
    assert list(front_door.build(config, "torch").weights()) == ["amendment.weight"]


def test_code_that_changes_after_training_is_named(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The weights compute something else then."""
    file = here / "one_torch.py"
    text = file.read_text()
    (here / "sub").mkdir()
    (here / "sub" / "factor.py").write_text("FACTOR = 1\n")
    file.write_text(text.replace("class Only", "from sub.factor import FACTOR\n\n\nclass Only"))
    config = Config.from_dict({**SETTINGS, "model": {**ONLY, "type": "one_torch.py:Only"}})
    train(config, here / "run", "torch", 1)
    front_door.load(here / "run", "torch", trust_code=True)
    assert not caplog.messages
    (here / "sub" / "factor.py").write_text("FACTOR = 2\n")
    front_door.load(here / "run", "torch", trust_code=True)
    step = here / "run" / "checkpoints" / "step-00000001"
    expected = f"was trained with another version of {Path('sub', 'factor.py')}"
    assert len(caplog.messages) == 1 and is_one_line(caplog.messages[0], str(step), expected)
    with custom.everything_trusted():
        assert sum(expected in note for note in Trainer.resume(here / "run", quiet=True).notes) == 1


def test_code_that_changes_after_saving_is_named(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A saved model records its code, and so does a conversion of a checkpoint or of a saved model."""
    file = here / "one_torch.py"
    config = Config.from_dict({**SETTINGS, "model": {**ONLY, "type": "one_torch.py:Only"}})
    train(config, here / "run", "torch", 1)
    front_door.save(front_door.build(config, "torch"), here / "saved")
    assert main(["convert", "run", "converted", "--to", "canonical", "--trust-code"]) == 0
    assert main(["convert", "saved", "again", "--to", "canonical", "--trust-code"]) == 0
    for name in ("saved", "converted", "again"):
        front_door.load(here / name, "torch", trust_code=True)
    assert not caplog.messages
    file.write_text(file.read_text() + "\n# another version\n")
    for name in ("saved", "converted", "again"):
        caplog.clear()
        front_door.load(here / name, "torch", trust_code=True)
        assert is_one_line(*caplog.messages, name, "saved with another version of one_torch.py")


def test_an_expanded_buffer(here: Path) -> None:
    """PyTorch's load_state_dict cannot write to it. Such constants are loaded; other values are named."""
    file = here / "one_torch.py"
    line = "        self.register_buffer('scale', torch.full((1,), 0.5).expand(257))\n"
    text = file.read_text().replace("import torch.nn", "import torch\nimport torch.nn")
    text = text.replace("\n    def forward", f"{line}\n    def forward").replace("(x)\n", "(x) * self.scale\n")
    file.write_text(text)
    config = Config.from_dict({**SETTINGS, "model": {**ONLY, "type": "one_torch.py:Only"}})
    train(config, here / "run", "torch", 1)
    loaded = front_door.load(here / "run", "torch", trust_code=True).weights()
    assert (loaded["scale"] == 0.5).all()
    model = front_door.build(config, "torch")
    model.set_weights(loaded)
    assert same_bits(model.weights(), loaded)
    with pytest.raises(WeightsError) as caught:
        model.set_weights({**loaded, "scale": np.arange(257, dtype=np.float32)})
    assert is_one_line(caught.value, "scale", "expanded", "buffer.clone()")


# ---- modules next to the file -----------------------------------------------------------------------------


LAYERS = """
import torch.nn as nn

WIDTH = {width}


class Scale(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x):
        from parts.gain import gain  # also when the layer is called

        return gain(self.linear(x))
"""

WITH_LAYERS = """
import random

import layers
import parts.gain
from icenet_torch.models.base import BaseModel
from layers import Scale
from parts import gain
from . import layers as again

assert again is layers and random.Random and parts.gain is gain


class Model(BaseModel):
    width = layers.WIDTH

    def __init__(self, config):
        super().__init__(config)
        self.scale = Scale(config.hidden_size)

    def forward(self, x):
        return self.scale(x)
"""


def write_with_layers(folder: Path, width: int = 1) -> None:
    """Writes a model for PyTorch that imports a module and a package next to it."""
    (folder / "parts").mkdir(parents=True)
    (folder / "parts" / "__init__.py").touch()
    (folder / "parts" / "gain.py").write_text(f"def gain(x):\n    return {width} * x\n")
    (folder / "layers.py").write_text(LAYERS.format(width=width))
    (folder / "model.py").write_text(WITH_LAYERS)


def custom_model(file: str) -> Any:
    return front_door.build(Config.from_dict(with_model(type=f"{file}:Model", hidden_size=4)), "torch", "cpu")


def test_modules_next_to_the_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models whose siblings have the same names, also from another working directory, and after a change."""
    write_with_layers(here / "one", 1)
    write_with_layers(here / "two", 2)
    path, modules = list(sys.path), set(sys.modules)
    models = [custom_model("one/model.py"), custom_model("two/model.py")]
    monkeypatch.chdir(here / "two")
    x = torch.ones(1, 4)
    for model, width in zip(models, (1, 2), strict=True):
        assert model.width == width
        assert torch.equal(model(x), width * torch.nn.functional.linear(x, model.scale.linear.weight))
    assert sys.path == path and not {"layers", "parts", "parts.gain"} & (set(sys.modules) - modules)
    file = here / "one" / "layers.py"
    file.write_text(file.read_text().replace("WIDTH = 1", "WIDTH = 3"))
    assert custom_model(str(here / "one" / "model.py")).width == 3


def test_a_folder_of_data_hides_no_installed_module(here: Path) -> None:
    write_with_layers(here / "one")
    (here / "one" / "yaml").mkdir()
    file = here / "one" / "model.py"
    file.write_text("import yaml\nyaml.safe_load('a')\n" + file.read_text())
    assert custom_model("one/model.py").width == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import nowhere", ["No module named 'nowhere'", "layers.py, line 2"]),
        ("from .nowhere import x", ["No module named 'nowhere'", "layers.py, line 2"]),
        ("from parts import nowhere", ["cannot import name 'nowhere' from 'parts'", "layers.py, line 2"]),
        ("1 / 0", ["ZeroDivisionError: division by zero", "layers.py, line 2"]),
        ("1 +", ["SyntaxError", "layers.py, line 2"]),
    ],
)
def test_errors_in_a_module_next_to_the_file(text: str, expected: list[str], here: Path) -> None:
    write_with_layers(here / "one")
    (here / "one" / "layers.py").write_text(f"\n{text}\n")
    with pytest.raises(UsageError) as caught:
        custom_model("one/model.py")
    assert is_one_line(str(caught.value), "one/model.py", *expected), caught.value
    write_with_layers(here / "again")  # nothing of the failed import remains
    (here / "one" / "layers.py").write_text((here / "again" / "layers.py").read_text())
    assert custom_model("one/model.py").width == 1
