"""A PyTorch module with a port is trained like any model: on MLX, on with PyTorch and the original, and back."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import icenet.blas

import mlx.core as mx
import numpy as np
import pytest
import torch
import yaml
from helpers import is_one_line, losses

import icenet
from icenet.cli.main import main
from icenet.core import backends
from icenet.core.config import Config, custom, user_code
from icenet.core.errors import BackendError, FileError, IceNetError, UsageError
from icenet.core.models.build import class_of
from icenet.core.models.twins import compare_with_twin
from icenet.core.runs import checkpoint
from icenet.core.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("in_folder")

TEXT = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect", bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.down = nn.Conv2d(4, 8, 3, stride=2)
        self.dropout = nn.Dropout(0.1)
        self.out = nn.Linear(8, 10)
        self.register_buffer("gain", torch.tensor([1.0, 0.5] * 4))
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 8), persistent=False)

    def forward(self, images):
        x = torch.relu(self.norm(self.conv(images)))
        x = torch.relu(self.down(x)).mean((2, 3)) * self.scale * self.gain
        return {"logits": self.out(self.dropout(x)), "features": x}


class Other(Net):
    def forward(self, images):
        return {"features": super().forward(images)["features"]}


def net():
    torch.manual_seed(1)
    return Net()
"""
CONFIG: dict[str, Any] = {
    "device": "cpu",
    "seed": 3,
    "model": {"type": "mine.py:net", "port": "ported", "vocab_size": 10},
    "data": {"kind": "images", "source": "digits"},
    "training": {"max_steps": 6, "batch_size": 16, "learning_rate": 1e-2, "warmup_steps": 1, "eval_every": 6},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a PyTorch module, its port and a config."""
    found = tmp_path_factory.mktemp("ported")
    (found / "mine.py").write_text(TEXT)
    (found / "net.yaml").write_text(yaml.safe_dump(CONFIG))
    module = user_code.run_file(found / "mine.py").net()
    for training in (True, True, False):
        module.train(training)(torch.randn(4, 1, 8, 8))  # statistics that differ from those of a new module
    icenet.port(module, torch.randn(2, 1, 8, 8)).save(found / "ported")
    torch.save(module.state_dict(), found / "net.pt")
    return found


def test_both_backends_begin_with_the_weights_of_the_folder() -> None:
    saved = torch.load("net.pt")
    for backend in ("mlx", "torch"):
        weights = icenet.build("net.yaml", backend, "cpu").weights()
        assert set(weights) == {f"net.{name}" for name in saved if not name.endswith("tracked")}
        for name, array in weights.items():
            np.testing.assert_array_equal(array, saved[name.removeprefix("net.")].numpy())


def test_any_backend_is_chosen_and_the_twins_agree(caplog: pytest.LogCaptureFixture) -> None:
    config = Config.from_yaml("net.yaml")
    assert backends.choose(config) in ("mlx", "torch")
    for backend in ("mlx", "torch"):
        model = icenet.build(config, backend, "cpu")
        assert compare_with_twin(config, model) is None
    assert not caplog.messages


def test_a_run_changes_backend_twice(tmp_path: Path) -> None:
    config = Config.from_yaml("net.yaml")
    Trainer.start(config, tmp_path / "run", backend="mlx", quiet=True).fit(until=2)
    Trainer.resume(tmp_path / "run", backend="torch", quiet=True).fit(until=4)
    Trainer.resume(tmp_path / "run", backend="mlx", quiet=True).fit()
    for backend in ("torch", "mlx"):
        Trainer.start(config, tmp_path / backend, backend=backend, quiet=True).fit()
        np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / backend), rtol=2e-5)
    loaded = {backend: icenet.load(tmp_path / "run", backend, "cpu", trust_code=True) for backend in ("mlx", "torch")}
    images = np.random.default_rng(0).standard_normal((3, 8, 8, 1)).astype(np.float32)
    ours = np.array(loaded["mlx"](mx.array(images)))
    with torch.no_grad():
        theirs = loaded["torch"](torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    theirs_again = user_code.run_file(Path("mine.py")).Net()
    icenet.to_torch(loaded["mlx"].net, theirs_again)  # the module of a saved folder
    for name, value in theirs_again.state_dict().items():
        if not name.endswith("tracked"):
            np.testing.assert_array_equal(value.numpy(), loaded["torch"].net.state_dict()[name].numpy())
    assert "mine.py" in str(checkpoint.find(tmp_path / "torch").state["code"])


def test_weights_move_between_a_saved_port_and_its_original(tmp_path: Path) -> None:
    ours = runpy.run_path("ported/model.py")["load"]()
    theirs = user_code.run_file(Path("mine.py")).Net()
    icenet.to_torch(ours, theirs)
    saved = torch.load("net.pt")
    assert all(
        torch.equal(value, saved[name]) for name, value in theirs.state_dict().items() if "tracked" not in name
    )
    with torch.no_grad():
        theirs.conv.weight.add_(1)
    icenet.from_torch(theirs, ours)
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        wanted = theirs.eval()(images)["logits"].numpy()
    np.testing.assert_allclose(np.array(ours(mx.array(images.numpy()))["logits"]), wanted, atol=1e-5)


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    def failure(kind: type[IceNetError], backend: str = "mlx", **model: Any) -> str:
        config = Config.from_dict({**CONFIG, "model": {**CONFIG["model"], **model}})
        with pytest.raises(kind) as caught:
            icenet.build(config, backend, "cpu")
        return str(caught.value)

    assert is_one_line(failure(UsageError, port="absent"), "model.port", "absent")
    (tmp_path / "model.py").write_text("")
    assert is_one_line(failure(FileError, port=str(tmp_path)), "config.json", "icenet port")
    (tmp_path / "config.json").write_text('{"class": "Net"}')
    assert is_one_line(failure(FileError, port=str(tmp_path)), "port the module again")
    assert is_one_line(failure(UsageError, "torch", type="mine.py:Absent"), "mine.py has no Absent")
    assert is_one_line(failure(UsageError, type="mine.py:Net", port=None), "icenet port mine.py:Net")
    model = icenet.build(Config.from_dict({**CONFIG, "model": {**CONFIG["model"], "type": "mine.py:Other"}}), "torch")
    with pytest.raises(UsageError) as caught:
        model(torch.zeros(1, 1, 8, 8))
    assert is_one_line(str(caught.value), "mine.py:Other", "logits")


def test_a_port_that_a_checkpoint_names_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Trainer.start(Config.from_yaml("net.yaml"), tmp_path / "run", backend="mlx", quiet=True).fit(until=1)
    for backend in ("mlx", "torch"):
        monkeypatch.setattr(custom, "_trusted", set())
        with pytest.raises(UsageError, match="--trust-code"):
            icenet.load(tmp_path / "run", backend, "cpu")
    with pytest.raises((UsageError, BackendError)):
        class_of(Config.from_dict({**CONFIG, "model": {**CONFIG["model"], "port": None}}).model, "mlx")


def test_info_shows_the_options_that_a_port_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "net.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "type=mine.py:net  vocab_size=10  port=ported\n" in shown and "hidden_size" not in shown
    assert main(["info", "ported"]) == 2
    assert is_one_line(capsys.readouterr().err, "ported", "is that of a port", "port: ported")


def damaged(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-5])


def of_another_model(weights: Path) -> None:
    mx.save_safetensors(str(weights), {"out.weight": mx.zeros((8, 10))})


@pytest.mark.parametrize("change", [Path.unlink, damaged, of_another_model])
def test_a_port_that_is_run_names_wrong_weights(change: Callable[[Path], None], tmp_path: Path) -> None:
    folder = Path(shutil.copytree("ported", tmp_path / "copy"))
    change(folder / "weights.safetensors")
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(folder / "model.py"), run_name="__main__")
    assert is_one_line(caught.value.code, "weights.safetensors", "port it again")
