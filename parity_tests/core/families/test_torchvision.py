"""State dicts of torchvision's ResNets and vision transformers, in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import both_backends, is_one_line, native, plain
from torch import nn
from torchvision_models import ResNet, VisionTransformer, randomize

import icenet
from icenet.cli.main import main
from icenet.core.config import Config
from icenet.core.errors import ConfigError, UsageError, WeightsError

VIT = {
    "type": "vit", "image_size": 12, "patch_size": 4, "num_layers": 2, "num_heads": 2, "hidden_size": 12,
    "feed_forward_size": 20, "vocab_size": 5, "dropout": 0.0,
}  # fmt: skip
RESNET = {"type": "cnn", "stem": "conv7", "classifier": "linear", "vocab_size": 5, "dropout": 0.0}
CASES: dict[str, tuple[dict[str, Any], nn.Module, int]] = {
    "basic": (
        {**RESNET, "block": "basic", "num_layers": 3, "stage_depths": [1, 2], "stage_widths": [64, 72],
         "hidden_size": 72},
        ResNet([1, 2], [64, 72], False, 5), 20,
    ),
    "bottleneck": (
        {**RESNET, "block": "bottleneck", "num_layers": 3, "stage_depths": [2, 1], "stage_widths": [6, 10],
         "hidden_size": 40},
        ResNet([2, 1], [6, 10], True, 5), 20,
    ),
    "vit": (VIT, VisionTransformer(12, 4, 2, 2, 12, 20, 5), 12),
}  # fmt: skip


def write(folder: Path, name: str, **changes: Any) -> tuple[Path, Path]:
    """Writes a state dict of a case and its config."""
    model, theirs, _ = CASES[name]
    source, config = folder / "theirs.pth", folder / "model.yaml"
    torch.save(randomize(theirs).state_dict(), source)
    config.write_text(Config.from_dict({"model": {**model, **changes}}).to_yaml())
    return source, config


def convert(*words: object) -> bool:
    return main(["convert", *map(str, words)]) in (0, None)


@pytest.mark.parametrize("name", CASES)
def test_a_state_dict_is_read_and_written_bit_for_bit(name: str, tmp_path: Path) -> None:
    """The logits are those of the model in float64, within 8 times the error of float32 in PyTorch."""
    _, theirs, size = CASES[name]
    source, config = write(tmp_path, name)
    assert convert(source, tmp_path / "ours", "--to", "canonical", "--config", config)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        single = theirs(images).numpy()
        exact = theirs.double()(images.double()).numpy()
        theirs.float()
    noise = max(np.abs(single - exact).max(), 2**-23 * np.abs(exact).max())
    for backend in ("mlx", "torch"):
        model = icenet.load(tmp_path / "ours", backend, "cpu")
        found = plain(model(native(backend, images.permute(0, 2, 3, 1).numpy(), images=True)))
        assert np.abs(found - exact).max() <= 8 * noise, backend
    assert convert(tmp_path / "ours", tmp_path / "back.pth", "--to", "torchvision")
    back, original = torch.load(tmp_path / "back.pth", weights_only=True), theirs.state_dict()
    assert back.keys() == original.keys()
    counters = {key for key in original if key.endswith("num_batches_tracked")}
    assert all(torch.equal(back[key], original[key]) for key in original.keys() - counters)
    assert all(back[key] == 0 and back[key].dtype == torch.int64 for key in counters)


@both_backends
def test_python_converts_with_a_model(backend: str, tmp_path: Path) -> None:
    """Also to MLX's layout, from safetensors without metadata, and with the names of published files."""
    from safetensors.torch import save_file

    source, config = write(tmp_path, "vit")
    old = {
        name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): tensor.contiguous()
        for name, tensor in CASES["vit"][1].state_dict().items()
    }
    save_file(old, tmp_path / "old.safetensors")
    model = icenet.build(config, backend, "cpu")
    done = icenet.convert(tmp_path / "old.safetensors", tmp_path / "ours.safetensors", "mlx", model=model)
    assert is_one_line(done.note, "names")
    icenet.convert(tmp_path / "ours.safetensors", tmp_path / "back.safetensors", "torchvision", model=model)
    icenet.convert(source, tmp_path / "direct.safetensors", "torchvision", model=model)
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "direct.safetensors").read_bytes()


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    from icenet.commands.convert import convert_model

    source, config = write(tmp_path, "vit", image_size=16)
    with pytest.raises(WeightsError) as error:
        convert_model(source, tmp_path / "a", "canonical", None, str(config), False)
    assert is_one_line(error.value, "theirs.pth", "encoder.pos_embedding", "[1, 10, 12]", "[1, 17, 12]")
    with pytest.raises(UsageError) as usage:
        convert_model(source, tmp_path / "a.pth", "torchvision", None, None, False)
    assert is_one_line(usage.value, "--config")
    with pytest.raises(UsageError) as usage:
        convert_model(source, tmp_path / "a", "torchvision", None, str(config), False)
    assert is_one_line(usage.value, ".pth")
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.pth").exists()


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"type": "vit", "norm_eps": 1e-12}, "norm_eps"),
        ({"type": "vit", "pooling": "mean"}, "pooling"),
        ({"type": "vit", "num_heads": 4, "head_size": 5, "hidden_size": 16}, "head_size"),
        ({"type": "cnn", "stem": "conv3"}, "stem"),
        ({"type": "cnn", "stem": "conv7", "block": "conv"}, "block"),
        (
            {
                **RESNET,
                "block": "bottleneck",
                "num_layers": 1,
                "stage_widths": [4],
                "hidden_size": 16,
                "bottleneck_stride": "conv1",
            },
            "bottleneck_stride",
        ),
        ({"type": "lstm"}, "lstm"),
    ],
)
def test_options_that_torchvision_lacks_are_named(changes: dict[str, Any], option: str) -> None:
    from icenet.core.families import torchvision

    with pytest.raises(ConfigError) as error:
        torchvision.exported({}, Config.from_dict({"model": changes}))
    assert is_one_line(error.value, "torchvision", option)


def test_the_names_are_those_of_the_package() -> None:
    models = pytest.importorskip("torchvision.models")
    theirs = models.VisionTransformer(12, 4, 2, 2, 12, 20, num_classes=5).state_dict()
    assert {name: a.shape for name, a in theirs.items()} == {
        name: a.shape for name, a in CASES["vit"][1].state_dict().items()
    }
    for resnet, depths, bottleneck in ((models.resnet18, [2, 2, 2, 2], False), (models.resnet50, [3, 4, 6, 3], True)):
        ours = ResNet(depths, [64, 128, 256, 512], bottleneck, 1000).state_dict()
        assert {name: a.shape for name, a in resnet().state_dict().items()} == {n: a.shape for n, a in ours.items()}
