"""Quantized folders: MLX's own quantization against MLX, AWQ and GPTQ against their packing and formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import icenet.blas  # before mlx.core

import ml_dtypes
import numpy as np
import pytest
from helpers import is_one_line, same_bits

import icenet
from icenet.core.config import Config
from icenet.core.errors import IceNetError
from icenet.core.families import FAMILIES, folder
from icenet.core.families.weights import family_tensors
from icenet.core.weights import files as weight_files
from icenet.core.weights.files import StoredWeights
from icenet.core.weights.packing import unpack
from icenet.core.weights.quantized import dequantized
from icenet.core.weights.safetensors import Spec


class Arrays(StoredWeights):
    """Arrays in memory in place of files."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.path, self.entries = Path("model"), arrays

    def __getitem__(self, name: str) -> np.ndarray:
        return self.entries[name]

    def spec(self, name: str) -> Spec:
        return Spec(self.entries[name].dtype, self.entries[name].shape)


def read(arrays: dict[str, np.ndarray], **settings: Any) -> StoredWeights:
    values, weights = dequantized({"model_type": "llama", "quantization_config": settings}, Arrays(arrays))
    assert values == {"model_type": "llama"}
    for name in weights:
        assert weights.spec(name) == (weights[name].dtype, weights[name].shape)
    return weights


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    """Packs whole numbers along the last axis, bit by bit, the lowest first: the definition of a stream of bits."""
    stream = (values[..., None] >> np.arange(bits)) & 1
    stream = stream.reshape(*values.shape[:-1], -1, 32).astype(np.uint64)
    return (stream << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_numbers_are_unpacked(bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 2**bits, (3, 96))
    assert np.array_equal(unpack(packed(values, bits), bits), values)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_folders_have_the_bits_of_mlx(bits: int, dtype: str) -> None:
    mx = pytest.importorskip("mlx.core")
    weight = mx.array(np.random.default_rng(1).standard_normal((24, 128)).astype("float32")).astype(
        getattr(mx, dtype)
    )
    with mx.stream(mx.cpu):  # on a GPU the kernel adds without a rounding in between
        parts = mx.quantize(weight, group_size=64, bits=bits)
        values = np.array(mx.dequantize(*parts, group_size=64, bits=bits).astype(mx.float32))
    arrays = {}
    for kind, part in zip(("weight", "scales", "biases"), parts, strict=True):
        is_packed = kind == "weight"
        own = np.array(part if is_packed else part.astype(mx.float32))
        arrays[f"a.{kind}"] = own if is_packed else own.astype(getattr(ml_dtypes, dtype, None) or dtype)
    arrays["b.weight"] = np.ones((2, 3), np.float32)
    found = read(arrays, group_size=64, bits=bits)
    assert list(found) == ["a.weight", "b.weight"] and str(found["a.weight"].dtype) == dtype
    tolerance = 1e-6 if dtype == "float32" else 0  # its compiler may add without a rounding in between
    np.testing.assert_allclose(found["a.weight"].astype(np.float32), values, rtol=0, atol=tolerance)


def test_layers_of_an_mlx_folder_have_their_own_settings() -> None:
    generator = np.random.default_rng(1)
    arrays = {}
    for name, bits, size in (("a", 4, 32), ("b", 8, 64)):
        arrays[f"{name}.weight"] = packed(generator.integers(0, 2**bits, (4, 64)), bits)
        arrays |= {f"{name}.{kind}": np.ones((4, 64 // size), np.float32) for kind in ("scales", "biases")}
    found = read(arrays, group_size=32, bits=4, b={"group_size": 64, "bits": 8}, c=False)
    assert np.array_equal(found["b.weight"], unpack(arrays["b.weight"], 8) + 1.0)
    assert np.array_equal(found["a.weight"], unpack(arrays["a.weight"], 4) + 1.0)


def test_awq_folders() -> None:
    """Packed as AutoAWQ does: the i-th of 8 places of a word has the output 8 k + order[i]."""
    generator = np.random.default_rng(2)
    inputs, outputs, size = 64, 24, 32
    whole = generator.integers(0, 16, (inputs, outputs))
    zeros = generator.integers(0, 16, (inputs // size, outputs))
    scales = generator.uniform(0.01, 0.1, (inputs // size, outputs)).astype(np.float16)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def pack(values: np.ndarray) -> np.ndarray:
        found = np.zeros((len(values), outputs // 8), np.uint32)
        for place, output in enumerate(order):
            found |= (values[:, output::8] << (4 * place)).astype(np.uint32)
        return found.view(np.int32)

    arrays = {"a.qweight": pack(whole), "a.qzeros": pack(zeros), "a.scales": scales, "a.bias": np.ones(3, np.float16)}
    found = read(arrays, quant_method="awq", version="gemm", bits=4, group_size=size)
    groups = np.arange(inputs) // size
    expected = ((whole - zeros[groups]) * scales[groups].astype(np.float64)).astype(np.float16).T
    np.testing.assert_array_equal(found["a.weight"], expected, strict=True)
    assert list(found) == ["a.bias", "a.weight"]


@pytest.mark.parametrize("stored", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", ["consecutive", "g_idx", "one group", "symmetric"])
def test_gptq_folders(bits: int, stored: str, order: str) -> None:
    generator = np.random.default_rng(bits)
    inputs, outputs, size = 64, 32, 16
    count = 1 if order == "one group" else inputs // size
    whole = generator.integers(0, 2**bits, (inputs, outputs))
    zeros = generator.integers(0, 2**bits, (count, outputs))
    scales = generator.uniform(0.01, 0.1, (count, outputs)).astype(np.float16)
    groups = np.zeros(inputs, int) if order == "one group" else np.arange(inputs) // size
    arrays = {"a.scales": scales, "a.qweight": packed(whole.T, bits).T.view(np.int32)}
    if order == "g_idx":
        groups = generator.permutation(groups)
        arrays["a.g_idx"] = groups.astype(np.int32)
    if order == "symmetric":
        zeros = np.full_like(zeros, 2 ** (bits - 1))
    else:  # format v1 has zero points minus 1, and -1 as the largest number
        arrays["a.qzeros"] = packed((zeros - (stored == "gptq")) % 2**bits, bits).view(np.int32)
    settings = {"checkpoint_format": stored, "desc_act": order == "g_idx"}
    found = read(arrays, quant_method="gptq", bits=bits, group_size=-1 if count == 1 else size, **settings)
    expected = ((whole - zeros[groups]) * scales[groups].astype(np.float64)).astype(np.float16).T
    np.testing.assert_array_equal(found["a.weight"], expected, strict=True)
    assert list(found) == ["a.weight"]


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16}
MLX = {"bits": 4, "group_size": 32}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "awq", "version": "gemv", "bits": 4}, "gemv"),
        ({**GPTQ, "bits": 5}, "bits 5"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "marlin"),
        ({**GPTQ, "group_size": None}, "group_size None"),
        ({**GPTQ, "dynamic": {"-:gate": {}, "+:.*down.*": {"bits": 8}}}, "dynamic"),
        ({**GPTQ, "dynamic": [1]}, "dynamic"),
        ({**GPTQ, "group_size": 0}, "do not belong"),
        ({**MLX, "mode": "mxfp4"}, "mxfp4"),
        ({**MLX, "bits": "4"}, "bits '4'"),
        ({**MLX, "group_size": 2**40}, "do not belong"),
        ({**MLX, "group_size": -32}, "do not belong"),
    ],
)
def test_settings_that_are_not_supported_are_one_line(settings: dict[str, Any], words: str) -> None:
    arrays = {
        "a.qweight": np.zeros((2, 8), np.int32),
        "b.weight": np.zeros((2, 4), np.uint32),
        "a.scales": np.ones((1, 8), np.float16),
        "b.scales": np.ones((2, 1), np.float16),
        "b.biases": np.ones((2, 1), np.float16),
    }
    own = {name: array for name, array in arrays.items() if ("quant_method" in settings) == name.startswith("a")}
    with pytest.raises(IceNetError, match=words) as error:
        read(own, **settings)
    assert is_one_line(error.value)


def test_tensors_that_do_not_fit_are_one_line() -> None:
    good = {
        "a.qweight": np.zeros((8, 8), np.int32),
        "a.qzeros": np.zeros((4, 1), np.int32),
        "a.scales": np.ones((4, 8), np.float16),
    }
    assert read(good, **GPTQ)["a.weight"].shape == (8, 64)
    for name, array in (
        ("a.qweight", np.zeros((8, 9), np.int32)),
        ("a.qweight", np.zeros((8, 8), np.float32)),
        ("a.qweight", np.zeros(8, np.int32)),
        ("a.qzeros", np.zeros((3, 1), np.int32)),
        ("a.scales", np.ones((5, 8), np.float16)),
        ("a.scales", np.ones((4, 8), np.int32)),
        ("a.g_idx", np.zeros(3, np.int32)),
        ("a.g_idx", np.full(64, 4, np.int32)),
        ("a.g_idx", np.full(64, -1, np.int32)),
    ):
        with pytest.raises(IceNetError, match="a\\.") as error:
            read({**good, name: array}, **GPTQ)
        assert is_one_line(error.value)


def test_large_weights_are_dequantized_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    arrays = {
        "a.qweight": generator.integers(0, 2**31, (8, 40)).astype(np.int32),
        "a.qzeros": generator.integers(0, 2**31, (4, 5)).astype(np.int32),
        "a.scales": generator.uniform(0.01, 0.1, (4, 40)).astype(np.float16),
        "b.qweight": generator.integers(0, 2**31, (32, 5)).astype(np.int32),
        "b.qzeros": generator.integers(0, 2**31, (2, 5)).astype(np.int32),
        "b.scales": generator.uniform(0.01, 0.1, (2, 40)).astype(np.float16),
    }
    awq = {"quant_method": "awq", "bits": 4, "group_size": 16}
    for settings, letter in ((GPTQ, "a"), (awq, "b")):
        own = {name: array for name, array in arrays.items() if name.startswith(letter)}
        whole = read(own, **settings)[f"{letter}.weight"]
        monkeypatch.setattr("icenet.core.weights.quantized._CHUNK_VALUES", 100)
        np.testing.assert_array_equal(read(own, **settings)[f"{letter}.weight"], whole, strict=True)
        monkeypatch.undo()


def test_files_are_read(tmp_path: Path) -> None:
    arrays = {"a.weight": packed(np.arange(64)[None] % 16, 4), "a.scales": np.ones((1, 2), np.float32)}
    weight_files.write(tmp_path, {**arrays, "a.biases": np.zeros((1, 2), np.float32)})
    _, found = dequantized({"quantization": MLX, "quantization_config": MLX}, weight_files.read(tmp_path))
    assert np.array_equal(found["a.weight"], np.arange(64)[None] % 16)


def test_a_quantized_folder_is_a_model(tmp_path: Path) -> None:
    """It generates, and leaves as a folder without quantization."""
    mx = pytest.importorskip("mlx.core")
    values = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 16, "eos_token_id": 2, "tie_word_embeddings": True,
        "quantization": {"bits": 4, "group_size": 64}, "quantization_config": {"bits": 4, "group_size": 64},
    }  # fmt: skip
    config = Config.from_dict({"model": FAMILIES["llama"].read({k: values[k] for k in values if "quant" not in k})})
    generator = np.random.default_rng(1)
    arrays, expected = {}, {}
    for name, tensor in family_tensors(FAMILIES["llama"], config).items():
        array = mx.array(generator.standard_normal(tensor.shape).astype("float32"))
        if array.ndim == 1:
            arrays[name] = expected[name] = np.array(array)
            continue
        parts = mx.quantize(array, group_size=64, bits=4)
        arrays |= {name.replace("weight", kind): np.array(part) for kind, part in zip(KINDS, parts, strict=True)}
        expected[name] = np.array(mx.dequantize(*parts, group_size=64, bits=4))
    weight_files.write(tmp_path / "in", arrays, {"format": "mlx"})
    (tmp_path / "in/config.json").write_text(json.dumps(values))
    found = folder.read(tmp_path / "in")
    for name, array in expected.items():
        np.testing.assert_allclose(found.weights.stored[name], array, rtol=0, atol=1e-6)
    icenet.convert(tmp_path / "in", tmp_path / "out", "hf")
    assert not {"quantization", "quantization_config"} & json.loads((tmp_path / "out/config.json").read_text()).keys()
    model, again = icenet.load(tmp_path / "in", "torch"), icenet.load(tmp_path / "out", "torch")
    assert same_bits(model.weights(), again.weights())


KINDS = ("weight", "scales", "biases")
