"""The dtype of a model's weights for inference, and the memory that loading them takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import TINY_MODELS, both_backends, build_model, native, plain, token_ids

import icenet
from icenet.core import backends
from icenet.core.config import ModelConfig
from icenet.core.errors import UsageError, WeightsError
from icenet.core.weights import files

NUMPY_DTYPES = {"fp32": np.dtype("f4"), "bf16": np.dtype(ml_dtypes.bfloat16), "fp16": np.dtype("f2")}


def save(folder: Path, family: str) -> Any:
    """Saves a tiny model of a family in `folder`, with running statistics that differ; returns it."""
    config = ModelConfig(**TINY_MODELS[family])
    model = build_model("torch", config)
    drawn = np.random.default_rng(2)
    model.set_weights(
        {name: array + 0.1 * drawn.random(array.shape, "f4") for name, array in model.weights().items()}
    )
    icenet.save(model, folder)
    return model


def logits(model: Any, family: str) -> np.ndarray:
    """Returns the logits of fixed inputs."""
    if family == "cnn":
        images = np.random.default_rng(3).normal(size=(2, 8, 8, 1)).astype(np.float32)
        outputs = model(native(model.backend, images, images=True))
    else:
        outputs = model(native(model.backend, token_ids(2, 7, vocab_size=257)))
    return backends.module(model.backend, "nn.arrays").to_numpy(outputs)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("family", TINY_MODELS)
def test_half_precision_agrees_with_float64(tmp_path: Path, family: str, dtype: str) -> None:
    """The error of each backend is that of rounding: some units of the dtype, relative to the largest logit."""
    saved = save(tmp_path, family)
    rounded = {name: array.astype(NUMPY_DTYPES[dtype]) for name, array in saved.weights().items()}
    exact = build_model("exact", saved.config)
    exact.set_weights({name: array.astype(np.float64) for name, array in rounded.items()})
    expected = logits(exact, family)
    errors = {}
    for backend in ("mlx", "torch"):
        model = icenet.load(tmp_path, backend, "cpu", dtype=dtype)
        stored = model.weights()
        assert {array.dtype for array in stored.values()} == {NUMPY_DTYPES[dtype]}
        assert all(np.array_equal(stored[name], array) for name, array in rounded.items())
        errors[backend] = np.abs(logits(model, family).astype(np.float64) - expected).max() / np.abs(expected).max()
    unit = float(ml_dtypes.finfo(NUMPY_DTYPES[dtype]).eps)
    assert 0 < errors["torch"] < 8 * unit
    assert errors["mlx"] < 8 * errors["torch"]


@both_backends
def test_the_default_on_a_cpu_is_fp32(tmp_path: Path, backend: str) -> None:
    save(tmp_path / "a", "transformer")
    half = icenet.load(tmp_path / "a", backend, "cpu", dtype="bf16")
    icenet.save(half, tmp_path / "b")
    stored = files.read(tmp_path / "b")
    assert {entry.dtype for entry in stored.entries.values()} == {"BF16"}
    model = icenet.load(tmp_path / "b", backend, "cpu")
    for name, array in model.weights().items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, stored[name].astype(np.float32))
    assert logits(model, "transformer").dtype == np.float32


@both_backends
def test_generation_in_half_precision(tmp_path: Path, backend: str) -> None:
    save(tmp_path, "transformer")
    model = icenet.load(tmp_path, backend, "cpu", dtype="bf16")
    tokens = plain(model.generate([[1, 2, 3]], max_new_tokens=5, temperature=0))[0].tolist()
    to_numpy = backends.module(backend, "nn.arrays").to_numpy
    for length in range(3, 8):
        assert tokens[length] == to_numpy(model(native(backend, [tokens[:length]])))[0, -1].argmax()


def test_unknown_dtypes_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "gru")
    with pytest.raises(UsageError, match=r"dtype: no dtype 'int4'; one of fp32, bf16, fp16"):
        icenet.load(tmp_path, dtype="int4")


@both_backends
def test_loading_keeps_no_second_copy(tmp_path: Path, backend: str) -> None:
    """The pages of the file, which the memory map brings in, do not stay in the process."""
    maps = Path("/proc/self/smaps")
    if not maps.exists():
        pytest.skip("the memory of mapped files is read from /proc")

    def mapped() -> int:
        """Returns the resident bytes of the mapped files of the folder, without those of libraries."""
        sizes = re.findall(rf" {re.escape(str(tmp_path))}/.*\n(?:[A-Z]\w+:.*\n)*?Rss:\s+(\d+)", maps.read_text())
        return 1024 * sum(map(int, sizes))

    config = ModelConfig(**{**TINY_MODELS["transformer"], "hidden_size": 512, "num_layers": 4})
    icenet.save(build_model(backend, config), tmp_path)
    model = icenet.load(tmp_path, backend, "cpu")
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in files.read(tmp_path).items()}
    files.write(tmp_path / "half.safetensors", half)  # its arrays are converted, and not read at once
    for name in ("model.safetensors", "half.safetensors"):
        weights = files.read(tmp_path / name)  # whose map stays open
        before, size = mapped(), (tmp_path / name).stat().st_size
        model.set_weights(weights)
        assert size > 20e6
        assert mapped() - before < 0.1 * size, name


@both_backends
def test_batch_norm_of_half_weights_rounds_once(backend: str) -> None:
    """The result is that of exact arithmetic, rounded to bf16."""
    drawn = np.random.default_rng(4)
    values = {
        name: drawn.uniform(0.5, 2, 6).astype(ml_dtypes.bfloat16)
        for name in ("weight", "bias", "running_mean", "running_var")
    }
    images = drawn.normal(size=(2, 4, 4, 6)).astype(ml_dtypes.bfloat16)
    layers, arrays = (backends.module(backend, name) for name in ("nn", "nn.arrays"))
    layer = layers.BatchNorm2d(6)
    layer.eval()
    for name, value in values.items():
        if backend == "mlx":
            setattr(layer, name, arrays.from_numpy(value))
        else:
            getattr(layer, name).data = arrays.from_numpy(value)
    given = images if backend == "mlx" else np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    found = arrays.to_numpy(layer(arrays.from_numpy(given)))
    found = found if backend == "mlx" else found.transpose(0, 2, 3, 1)
    weight, bias, mean, var = (value.astype(np.float64) for value in values.values())
    exact = (images.astype(np.float64) - mean) / np.sqrt(var + layer.eps) * weight + bias
    differing = found != exact.astype(ml_dtypes.bfloat16)
    assert differing.mean() < 0.02  # values next to the middle between two numbers


@both_backends
def test_values_outside_of_the_dtype_are_refused(tmp_path: Path, backend: str) -> None:
    model = save(tmp_path, "gru")
    weights = model.weights()
    weights["output.weight"][3, 2] = 7e4
    model.set_weights(weights)
    icenet.save(model, tmp_path)
    with pytest.raises(WeightsError, match=r"output\.weight: 70000 is too large for the model's float16; use bf16"):
        icenet.load(tmp_path, backend, "cpu", dtype="fp16")
    loaded = icenet.load(tmp_path, backend, "cpu")
    with pytest.raises(WeightsError, match=r"output\.weight: 1e\+300 is too large for the model's float32"):
        loaded.set_weights({**weights, "output.weight": np.full(weights["output.weight"].shape, 1e300)})
