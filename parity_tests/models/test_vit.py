"""The vision transformer on both backends: an independent model in float64, parity, training, and wrong images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import icenet.blas

# isort: split
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import PACKAGES, both_backends, build_model, is_one_line, native, plain
from PIL import Image
from torch import nn

import icenet
from icenet.commands.predict import predict
from icenet.core import rng
from icenet.core.config import Config, ModelConfig, ViTConfig, vit_plan
from icenet.core.errors import ConfigError, UsageError
from icenet.core.training.trainer import Trainer
from icenet.parity.configuration.engines import build
from icenet.parity.configuration.run import compare_engines, random_batch, unequal

BASE = {
    "type": "vit", "image_size": 14, "patch_size": 4, "num_layers": 2, "num_heads": 2, "hidden_size": 12,
    "feed_forward_size": 20, "vocab_size": 7, "dropout": 0.1,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "class token, dropout": {},
    "mean of patches, grey": {"pooling": "mean", "image_channels": 1, "dropout": 0.0},
    "wide heads, relu": {"num_heads": 3, "head_size": 5, "attention_bias": False, "activation": "relu"},
    "two classifiers": {"distillation": "classifier"},
    "no squares": {"image_size": [9, 14]},
    "one patch": {"image_size": 5, "patch_size": 5, "pooling": "mean", "activation": "gelu_tanh"},
}


def config(training: dict[str, Any] | None = None, **model: Any) -> Config:
    return Config.from_dict({"seed": 7, "device": "cpu", "model": {**BASE, **model}, "training": training or {}})


class PlainViT(nn.Module):
    """A ViT of PyTorch's own encoder layers, for images `[B, C, H, W]` whose size is a multiple of the patches."""

    def __init__(self, settings: ViTConfig) -> None:
        super().__init__()
        width, patch = settings.hidden_size, settings.patch_size
        self.patches = nn.Linear(settings.image_channels * patch**2, width)
        count = (settings.pooling == "token") + (settings.distillation != "none")
        self.token = nn.Parameter(torch.zeros(1, count, width)) if count else None
        self.teacher = nn.Linear(width, settings.vocab_size) if settings.distillation == "classifier" else None
        self.positions = nn.Parameter(torch.zeros(1, vit_plan.num_positions(settings), width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, settings.num_heads, settings.feed_forward_size or 4 * width, 0.0, F.gelu, settings.norm_eps,
                batch_first=True, norm_first=True,
            )
            for _ in range(settings.num_layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width, eps=settings.norm_eps)
        self.classes = nn.Linear(width, settings.vocab_size)
        self.patch = patch

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)  # [B, patches, C * P * P]
        x = self.patches(x)
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.positions
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        if self.teacher is not None:
            return self.classes(x[:, 0]) / 2 + self.teacher(x[:, 1]) / 2
        return self.classes(x[:, 0] if self.token is not None else x.mean(dim=1))

    def load(self, values: dict[str, np.ndarray]) -> None:
        """Takes the weights of our model."""
        arrays = {name: torch.from_numpy(np.asarray(value)) for name, value in values.items()}
        state = {
            "patches.weight": arrays["patch_embedding.weight"].flatten(1),
            "patches.bias": arrays["patch_embedding.bias"],
            "positions": arrays["position_embedding.weight"][None],
            "norm.weight": arrays["final_norm.weight"],
            "norm.bias": arrays["final_norm.bias"],
            "classes.weight": arrays["output.weight"],
            "classes.bias": arrays["output.bias"],
        }
        if self.token is not None:
            tokens = [arrays[f"{name}_embedding.weight"] for name in ("class", "distillation")[: self.token.shape[1]]]
            state["token"] = torch.cat(tokens)[None]
        if self.teacher is not None:
            state |= {f"teacher.{kind}": arrays[f"distillation_output.{kind}"] for kind in ("weight", "bias")}
        names = {
            "norm1": "attention_norm", "norm2": "feed_forward_norm", "self_attn.out_proj": "attention.out_proj",
            "linear1": "feed_forward.up_proj", "linear2": "feed_forward.down_proj",
        }  # fmt: skip
        for index in range(len(self.layers)):
            for kind in ("weight", "bias"):
                for theirs, ours in names.items():
                    state[f"layers.{index}.{theirs}.{kind}"] = arrays[f"blocks.{index}.{ours}.{kind}"]
                parts = [arrays[f"blocks.{index}.attention.{part}_proj.{kind}"] for part in "qkv"]
                state[f"layers.{index}.self_attn.in_proj_{kind}"] = torch.cat(parts)
        self.load_state_dict(state, strict=True)


@pytest.mark.parametrize(
    ("pooling", "distillation"), [("token", "none"), ("mean", "none"), ("token", "token"), ("token", "classifier")]
)
def test_the_mirror_is_an_encoder_of_pytorchs_layers(pooling: str, distillation: str) -> None:
    """Logits, loss and gradients in float64. With 14 pixels and patches of 4, two rows and columns are unused."""
    given = config(pooling=pooling, distillation=distillation, dropout=0.0)
    assert isinstance(given.model, ViTConfig)
    ours = build(given).reference
    values = {
        path: rng.normal(rng.key(0, "test", path), array.shape).astype(np.float64) / 5 + ("norm.weight" in path)
        for path, array in ours.weights().items()
    }
    ours.set_weights(values)
    theirs = PlainViT(given.model).double()
    theirs.load(values)
    batch = random_batch(given, rows=3)
    images = torch.from_numpy(batch["inputs"]).double().permute(0, 3, 1, 2)[:, :, :12, :12]
    logits = theirs(images)
    np.testing.assert_allclose(ours.forward(batch), logits.detach().numpy(), rtol=0, atol=1e-12)
    loss = F.cross_entropy(logits, torch.from_numpy(batch["labels"]).long())
    loss.backward()
    found, gradients = ours.gradients(batch)
    assert found == pytest.approx(loss.item(), rel=1e-12)
    truth = {
        "patch_embedding.weight": theirs.patches.weight.grad.reshape(12, 3, 4, 4),
        "position_embedding.weight": theirs.positions.grad[0],
        "blocks.1.feed_forward.up_proj.weight": theirs.layers[1].linear1.weight.grad,
        **({"class_embedding.weight": theirs.token.grad[0, :1]} if theirs.token is not None else {}),
        **({"distillation_embedding.weight": theirs.token.grad[0, 1:]} if distillation != "none" else {}),
        **({"distillation_output.weight": theirs.teacher.weight.grad} if theirs.teacher is not None else {}),
    }
    for path, gradient in truth.items():
        np.testing.assert_allclose(gradients[path], gradient.numpy(), rtol=0, atol=1e-12, err_msg=path)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, None) for name in CASES), ("class token, dropout", "bf16"), ("one patch", "fp16")]
)
def test_parity(name: str, dtype: str | None) -> None:
    """Every layer, every gradient and a training step of MLX, judged by the yardstick."""
    given = config({"mixed_precision": dtype} if dtype else None, **CASES[name])
    report = compare_engines(build(given), random_batch(given))
    assert report.passed, report


def test_initial_weights_are_equal_bit_for_bit() -> None:
    engines = build(config(hidden_size=64))
    ours = engines.mlx.weights()
    assert unequal(ours, engines.torch.weights()) == []
    weight = ours["patch_embedding.weight"]
    assert abs(weight.std() * (3 * 4 * 4) ** 0.5 - 1) < 6 / weight.size**0.5


@both_backends
def test_gradient_checkpointing_changes_nothing(backend: str) -> None:
    found = []
    for checkpointing in (False, True):
        given = config({"gradient_checkpointing": checkpointing})
        engine = icenet.core.backends.engine(given, backend)
        found.append(engine.gradients(random_batch(given), 1)[1])
    for path, array in found[0].items():
        np.testing.assert_allclose(found[1][path], array, rtol=1e-5, atol=1e-6 * np.abs(array).max(), err_msg=path)


@both_backends
def test_images_that_do_not_fit_are_one_line(backend: str) -> None:
    model = build_model(backend, ModelConfig(**BASE))
    for shape, names in (
        ((1, 16, 16, 3), ["16x16", "14x14", "model.image_size"]),
        ((1, 14, 14, 1), ["1 channels", "model.image_channels"]),
        ((14, 14, 3), ["images", "[14, 14, 3]"]),
    ):
        with pytest.raises(UsageError) as error:
            model(native(backend, np.zeros(shape, np.float32), images=len(shape) == 4))
        assert is_one_line(error.value, *names)
    with pytest.raises(UsageError) as error:
        model.generate([[1, 2]])
    assert is_one_line(error.value, "vit", "icenet predict")


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"patch_size": 15}, ["patch_size", "image_size"]),
        ({"pooling": "mean", "distillation": "token"}, ["distillation", "pooling"]),
        ({"num_heads": 5}, ["hidden_size", "num_heads", "head_size"]),
        ({"pooling": "max"}, ["model.pooling", "token", "mean"]),
        ({"max_seq_length": 5}, ["max_seq_length"]),
    ],
)
def test_configs_that_contradict_themselves(values: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        config(**values)
    assert is_one_line(error.value, *names)


def test_a_run_trains_on_both_backends_and_converts(tmp_path: Path) -> None:
    """The digits, with equal curves, and a folder of Hugging Face at the end."""
    from icenet.core.weights import files as weight_files

    values = {
        "device": "cpu", "seed": 3, "data": {"kind": "images", "source": "digits"},
        "model": {**BASE, "image_size": 8, "image_channels": 1, "vocab_size": 10},
        "training": {"max_steps": 6, "batch_size": 32, "eval_every": 6, "learning_rate": 3e-3},
    }  # fmt: skip
    losses = {}
    for backend in PACKAGES:
        trainer = Trainer.start(Config.from_dict(values), tmp_path / backend, backend=backend, quiet=True)
        losses[backend] = trainer.fit().validation_loss
    assert losses["mlx"] == pytest.approx(losses["torch"], rel=1e-5)
    icenet.convert(tmp_path / "mlx", tmp_path / "hf", "hf")
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert list(written["id2label"].values()) == [str(digit) for digit in range(10)]
    file = tmp_path / "digit.png"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(file)
    found, exported = (predict(tmp_path / name, [file], "torch", "cpu") for name in ("mlx", "hf"))
    np.testing.assert_allclose(exported.probabilities, found.probabilities, rtol=1e-5)
    assert exported.classes == found.classes
    shapes = {name: spec.shape for name, spec in weight_files.read(tmp_path / "hf").entries.items()}
    assert shapes["vit.embeddings.position_embeddings"] == (1, 5, 12)
    wrong = Config.from_dict({**values, "model": {**BASE, "image_channels": 1, "vocab_size": 10}})
    with pytest.raises(ConfigError) as error:
        Trainer.start(wrong, tmp_path / "wrong", backend="torch", quiet=True)
    assert is_one_line(error.value, "8x8", "data.image_size=14")


def test_the_model_returns_features() -> None:
    images = rng.normal(rng.key(0, "test", "images"), (2, 14, 14, 3))
    found = {}
    for backend in PACKAGES:
        model = build_model(backend, ModelConfig(**BASE))
        features = model.extract_features(native(backend, images, images=True))
        found[backend] = plain(features)
        assert found[backend].shape == (2, 12)
        np.testing.assert_array_equal(
            plain(model.output(features)), plain(model(native(backend, images, images=True)))
        )
    np.testing.assert_allclose(found["mlx"], found["torch"], rtol=0, atol=1e-5)
