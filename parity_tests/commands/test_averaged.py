"""`--averaged` of the commands: they use the moving average of the weights, and say if there is none."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import error_line, is_one_line, same_bits, tiny

import icenet
from icenet.cli.main import main
from icenet.commands.predict import predict, softmax
from icenet.core.data.datasets import dataset_for
from icenet.core.data.images.augment import normalize
from icenet.core.errors import CheckpointError, NonFiniteError
from icenet.core.runs import checkpoint
from icenet.core.runs.open_model import open_averaged
from icenet.core.training.trainer import Trainer
from icenet.core.weights import files as weight_files

torch: Any = pytest.importorskip("torch")
Image: Any = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with two runs of an image classifier, with and without averaged weights, and an image."""
    folder = tmp_path_factory.mktemp("averaged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("icenet.core.report.plots.plot_metrics", lambda *_, **__: None)
        for name, decay in (("run", "0.9"), ("plain", "null")):
            overrides = [f"training.ema_decay={decay}", "training.max_steps=3", "training.eval_every=null"]
            config = tiny(folder, *overrides, family="cnn")
            Trainer.start(config, folder / name, backend="torch", quiet=True).fit()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(folder / "image.png")
    return folder


def test_predict(runs: Path) -> None:
    data: Any = dataset_for(tiny(runs, family="cnn"))
    pixels = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1) * 4
    images = torch.from_numpy(normalize(pixels, data.mean, data.std)).permute(0, 3, 1, 2)
    found = []
    for averaged in (True, False):
        model = icenet.load(runs / "run", "torch", "cpu", averaged=averaged)
        with torch.no_grad():
            expected = softmax(model(images).numpy())
        found.append(predict(runs / "run", [runs / "image.png"], "torch", "cpu", averaged=averaged).probabilities)
        np.testing.assert_allclose(found[-1], expected, atol=1e-6)
    assert np.abs(found[0] - found[1]).max() > 1e-4
    with pytest.raises(CheckpointError, match=r"has no averaged weights"):
        predict(runs / "plain", [runs / "image.png"], "torch", "cpu", averaged=True)


def test_predict_in_half_precision(runs: Path) -> None:
    full, half = (
        predict(runs / "plain", [runs / "image.png"], "torch", "cpu", dtype=dtype).probabilities
        for dtype in (None, "bf16")
    )
    assert 1e-6 < np.abs(half - full).max() < 2.0**-5


def test_predictions_that_are_not_finite(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the image and the weight."""
    found = checkpoint.find(runs / "plain")
    name = "blocks.0.norm.running_mean"
    weights = {**found.weights, name: np.full_like(found.weights[name], np.nan)}
    monkeypatch.setattr(checkpoint, "find", lambda path: dataclasses.replace(found, weights=weights))
    with pytest.raises(NonFiniteError) as caught:
        predict(runs / "plain", [runs / "image.png"], "torch", "cpu")
    assert is_one_line(caught.value, "image.png", name)


def test_convert(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = runs / "averaged.safetensors"
    assert main(["convert", str(runs / "run"), str(out), "--to", "canonical", "--averaged"]) == 0
    _, averaged = open_averaged(runs / "run")
    assert same_bits(dict(weight_files.read(out)), dict(averaged))
    assert not same_bits(dict(averaged), icenet.load(runs / "run", "torch", "cpu").weights())
    capfd.readouterr()
    for source, code in (("plain", 1), ("averaged.safetensors", 2)):  # a run without an average, and no run
        assert main(["convert", str(runs / source), str(runs / "x.pt"), "--to", "torch", "--averaged"]) == code
        assert source in error_line(capfd.readouterr().err)
