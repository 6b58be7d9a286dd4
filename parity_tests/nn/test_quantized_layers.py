"""Models with quantized layers: on MLX they stay quantized, on PyTorch their weights are dequantized."""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path
from typing import Any

import icenet.blas  # before mlx.core

import numpy as np
import pytest
from helpers import build_model, is_one_line, native, plain, same_bits, token_ids

import icenet
from icenet.commands import info
from icenet.core.config import Config
from icenet.core.errors import IceNetError, UsageError
from icenet.core.families import FAMILIES, folder
from icenet.core.families.weights import family_tensors
from icenet.core.runs.open_model import open_target
from icenet.core.weights import files as weight_files
from icenet.core.weights.packed import packed_of
from icenet.core.weights.quantization import Quantization
from icenet.parity.yardstick import judge

pytest.importorskip("mlx.core")

MODEL: dict[str, Any] = {
    "type": "transformer", "hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 257,
    "max_seq_length": 64, "positions": "rotary", "feed_forward": "gated", "feed_forward_size": 96,
    "activation": "silu", "norm": "rms_norm", "dropout": 0.0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "expert_size": 32}


def save(path: Path, **changes: Any) -> Path:
    """Saves a model with larger differences between its logits than initial values give."""
    config = Config.from_dict({"model": {**MODEL, **changes}, "device": "cpu"})
    model = icenet.build(config, "torch")
    generator = np.random.default_rng(1)
    weights = model.weights()
    for name, array in weights.items():
        if name.endswith(".weight") and array.ndim > 1:
            weights[name] = (array + 0.1 * generator.standard_normal(array.shape)).astype(np.float32)
        elif name.endswith(".bias"):
            weights[name] = (0.1 * generator.standard_normal(array.shape)).astype(np.float32)
    model.set_weights(weights)
    return icenet.save(model, path)


def load(path: Path, backend: str, **options: Any) -> Any:
    return icenet.load(path, backend, "cpu", **options)


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    return plain(model(native(model.backend, tokens))).astype(np.float64)


@pytest.mark.parametrize(
    ("bits", "changes"),
    [
        (4, {}),
        (8, {"tie_embeddings": True}),
        (3, {"attention_bias": False, "feed_forward_bias": False}),
        (4, EXPERTS),
        (2, {"positions": "learned", "feed_forward": "plain", "activation": "gelu"}),
    ],
)
def test_backends_agree(bits: int, changes: dict[str, Any], tmp_path: Path) -> None:
    """By the yardstick, for few rows, which MLX's quantized product takes, and for many."""
    path = save(tmp_path / "model", **changes)
    ours, theirs = (load(path, backend, quantize=bits, group_size=32) for backend in ("mlx", "torch"))
    expected = {Quantization(bits, 32)}
    assert set(ours.quantized_layers().values()) == expected and not theirs.quantized_layers()
    linear = {name for name in ours.quantizable_layers() if "token_embedding" not in name}
    assert not [name for name in linear if name.endswith("router")]
    exact = build_model("exact", theirs.config)
    exact.set_weights({name: array.astype(np.float64) for name, array in theirs.weights().items()})
    for tokens in (token_ids(1, 5, vocab_size=257), token_ids(2, 20, vocab_size=257)):
        verdict = judge(logits(ours, tokens), logits(theirs, tokens), logits(exact, tokens))
        assert verdict.passed, verdict
    tokens = token_ids(2, 6, vocab_size=257)
    texts = [
        plain(model.generate(native(model.backend, tokens), max_new_tokens=12, temperature=0)).tolist()
        for model in (ours, theirs)
    ]
    assert texts[0] == texts[1]


def test_backends_agree_in_fp32_on_scales_in_half_precision(tmp_path: Path) -> None:
    """PyTorch's weights are s * q + b of fp32: rounded to the dtype of the scales they would differ by 1 in 256."""
    model = load(save(tmp_path / "model"), "mlx", quantize=4, group_size=32, dtype="bf16")
    saved = icenet.save(model, tmp_path / "saved")
    ours, theirs = load(saved, "mlx"), load(saved, "torch")
    exact = build_model("exact", theirs.config)
    exact.set_weights({name: array.astype(np.float64) for name, array in theirs.weights().items()})
    tokens = token_ids(1, 6, vocab_size=257)
    verdict = judge(logits(ours, tokens), logits(theirs, tokens), logits(exact, tokens))
    assert verdict.passed, verdict


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True, "attention_bias": True}])
def test_pytorch_has_a_product_with_four_bits(changes: dict[str, Any], tmp_path: Path) -> None:
    """In bf16, in a prompt and in single tokens, and with the same arrays as MLX."""
    path = save(tmp_path / "model", vocab_size=256, **changes)
    ours, theirs = (load(path, name, quantize=4, group_size=32, dtype="bf16") for name in ("mlx", "torch"))
    assert theirs.quantized_layers() == ours.quantized_layers() and len(ours.quantized_layers()) >= 15
    assert same_bits(theirs.weights(), ours.weights())
    whole = load(icenet.save(theirs, tmp_path / "saved"), "torch")  # fp32, which is dequantized
    exact = build_model("exact", whole.config)
    exact.set_weights({name: array.astype(np.float64) for name, array in whole.weights().items()})
    tokens = token_ids(2, 7, vocab_size=256)
    prepared = theirs.for_generation()
    sizes = [prepared.blocks[0].attention._joined.weight.shape, prepared.blocks[0].feed_forward._joined.weight.shape]
    assert [tuple(size) for size in sizes] == [(128, 8), (192, 8)]
    for model in (theirs, prepared):
        found = [
            plain(
                output.float()
                if hasattr(output, "detach")
                else output.astype(importlib.import_module("mlx.core").float32)
            )
            for output in (one(native(one.backend, tokens)) for one in (ours, model))
        ]
        verdict = judge(*found, logits(exact, tokens), "bf16")
        assert verdict.passed, verdict
        # and the other way round: PyTorch's error is as small as that of MLX
        verdict = judge(*found[::-1], logits(exact, tokens), "bf16")
        assert verdict.passed, verdict
    assert same_bits(theirs.weights(), ours.weights())  # the layers have parts of the joined arrays
    again = load(tmp_path / "saved", "torch", dtype="bf16")
    assert same_bits(again.weights(), theirs.weights())
    assert not load(path, "torch", quantize=8, group_size=32, dtype="bf16").quantized_layers()


def test_large_weights_are_dequantized_in_parts_on_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = importlib.import_module("icenet_torch.nn.quantized")
    model = load(save(tmp_path / "model", vocab_size=256), "torch", quantize=4, group_size=32, dtype="bf16")
    whole = quantized.dequantized(model.output, importlib.import_module("torch").float32)
    monkeypatch.setattr(quantized, "_CHUNK_VALUES", 200)
    assert (quantized.dequantized(model.output, whole.dtype) == whole).all()
    assert (quantized.dequantized(model.output, whole.dtype, native("torch", [3, 5])) == whole[[3, 5]]).all()
    expected = load(icenet.save(model, tmp_path / "saved"), "torch").output.weight
    assert (whole - expected).abs().max() <= 1e-6


def test_the_values_are_those_of_the_formula(tmp_path: Path) -> None:
    """Weights on PyTorch are the dequantized ones; MLX holds the numbers of its own function."""
    mx = importlib.import_module("mlx.core")
    path = save(tmp_path / "model")
    weights = weight_files.read(path)
    ours, theirs = (load(path, backend, quantize=4).weights() for backend in ("mlx", "torch"))
    for name in ("token_embedding", "output", "blocks.1.attention.k_proj"):
        with mx.stream(mx.cpu):
            parts = mx.quantize(mx.array(weights[f"{name}.weight"]), 64, 4)
            value = np.array(mx.dequantize(*parts, 64, 4))
        for kind, part in zip(("weight", "scales", "biases"), parts, strict=True):
            assert np.array_equal(ours[f"{name}.{kind}"], np.array(part))
        np.testing.assert_allclose(theirs[f"{name}.weight"], value, rtol=0, atol=1e-6)
    # the width of 96 is no multiple of 64
    assert np.array_equal(
        theirs["blocks.0.feed_forward.down_proj.weight"], weights["blocks.0.feed_forward.down_proj.weight"]
    )


@pytest.mark.usefixtures("mlx_on_cpu")  # the products of CUDA's kernels have no gradient
@pytest.mark.parametrize("generates", [False, True])
def test_cuda_compiles_no_product_of_several_rows(generates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX compiles `qmm_sm90` for more than a minute. The weight is dequantized, also for the gradient."""
    mx, quantized = importlib.import_module("mlx.core"), importlib.import_module("icenet.nn.quantized")
    layer = importlib.import_module("icenet.nn").Linear(64, 32).to_quantized(32, 4)
    layer._generates = generates
    inputs = {rows: mx.random.normal((1, rows, 64), key=mx.random.key(rows)) for rows in (1, 2, 40)}

    def results() -> list[np.ndarray]:
        gradients = [
            mx.grad(lambda x: (quantized.quantized_product(x, layer) ** 2).sum())(x) for x in inputs.values()
        ]
        return [plain(y) for y in (*(quantized.quantized_product(x, layer) for x in inputs.values()), *gradients)]

    expected, product, rows = results(), mx.quantized_matmul, []
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(quantized, "on_cpu", lambda: False)
    monkeypatch.setattr(quantized.linear_kernels, "limits", lambda: None)
    monkeypatch.setattr(mx, "quantized_matmul", lambda x, *a, **k: rows.append(x.shape[-2]) or product(x, *a, **k))
    for found, value in zip(results(), expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-5)
    assert set(rows) == {1}
    monkeypatch.setattr(quantized, "_MOST_FEATURES", 63)
    rows.clear()
    results()
    assert not rows


def test_generation_joins_quantized_projections(tmp_path: Path) -> None:
    """The packed rows of q, k and v become one array, of which those of the layers are parts."""
    model = load(save(tmp_path / "model", attention_bias=True), "mlx", quantize=4, group_size=32)
    before = {name: array.copy() for name, array in model.weights().items()}
    tokens = native("mlx", token_ids(1, 6, vocab_size=257))
    expected = plain(model(tokens))
    prepared = model.for_generation()
    attention, feed_forward = prepared.blocks[0].attention, prepared.blocks[0].feed_forward
    assert attention.q_proj is None and feed_forward.up_proj is None
    assert attention._joined.weight.shape == (64 + 2 * 32, 64 * 4 // 32)
    np.testing.assert_allclose(plain(prepared(tokens)), expected, rtol=0, atol=1e-5)
    assert same_bits(model.weights(), before)


def test_on_a_gpu_the_parts_of_a_packed_weight_are_in_one_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel has one input for them. They are in memory once, and the model that is copied has the same values."""
    kernels, limits = (importlib.import_module(f"icenet.nn.{name}") for name in ("linear_kernels", "device_limits"))
    model = load(save(tmp_path / "model", tie_embeddings=True), "mlx", quantize=4, group_size=32)
    before = {name: array.copy() for name, array in model.weights().items()}
    tokens = native("mlx", token_ids(1, 6, vocab_size=257))
    expected = plain(model(tokens))
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "limits", lambda: limits.Limits(132, 227 << 10, has_tensor_cores=True))
        prepared = model.for_generation()
    block, original = prepared.blocks[0], model.blocks[0]
    layers = [
        (prepared.token_embedding, [model.token_embedding]),
        (block.feed_forward.down_proj, [original.feed_forward.down_proj]),
        (block.attention._joined, [getattr(original.attention, f"{name}_proj") for name in "qkv"]),
    ]
    for layer, originals in layers:
        joined = np.array(kernels.packed_weight(layer).joined, copy=False)
        for part in (layer[name] for layer in (layer, *originals) for name in ("weight", "scales", "biases")):
            assert np.shares_memory(joined, np.array(part, copy=False))
        numbers = [np.array(layer[name], copy=False).reshape(-1) for name in ("weight", "scales", "biases")]
        assert np.array_equal(joined, np.concatenate([array.view(np.uint32) for array in numbers]))
    np.testing.assert_allclose(plain(prepared(tokens)), expected, rtol=0, atol=1e-5)
    assert same_bits(model.weights(), before)


def test_layers_with_other_settings_are_not_joined(tmp_path: Path) -> None:
    path = save(tmp_path / "model")
    model = load(path, "mlx")
    importlib.import_module("mlx.nn").quantize(
        model, 32, 4, class_predicate=lambda name, layer: (
            {"group_size": 64, "bits": 8} if name.endswith("q_proj") else hasattr(layer, "to_quantized")
        )
    )  # fmt: skip
    settings = model.quantized_layers()
    assert settings["blocks.0.attention.q_proj"] == Quantization(8, 64)
    assert settings["blocks.0.attention.k_proj"] == Quantization(4, 32)
    assert model.for_generation().blocks[0].attention._joined is None
    tokens = token_ids(1, 7, vocab_size=257)
    # saved and loaded again, on both backends
    icenet.save(model, tmp_path / "saved")
    again, theirs = load(tmp_path / "saved", "mlx"), load(tmp_path / "saved", "torch")
    assert again.quantized_layers() == settings and same_bits(again.weights(), model.weights())
    np.testing.assert_array_equal(logits(again, tokens), logits(model, tokens))
    np.testing.assert_allclose(logits(theirs, tokens), logits(model, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("changes", [{}, EXPERTS, {"tie_embeddings": True}])
def test_a_saved_model_is_loaded_with_the_same_bits(changes: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    path = save(tmp_path / "model", **changes)
    model = load(path, "mlx", quantize=4, group_size=32, dtype=dtype)
    saved = icenet.save(model, tmp_path / "saved")
    again = load(saved, "mlx", dtype=dtype)
    assert same_bits(again.weights(), model.weights())
    assert same_bits(dict(weight_files.read(saved)), model.weights())
    icenet.save(again, tmp_path / "again")
    for name in ("model.safetensors", "config.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()
    assert (
        sum(array.nbytes for array in model.weights().values())
        < 0.4 * (saved.parent / "model" / "model.safetensors").stat().st_size
    )


def test_quantized_layers_are_frozen_and_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "model")
    model, whole = load(path, "mlx", quantize=4, group_size=32), load(path, "mlx")
    assert not [name for name in model.trainable_paths() if "_proj" in name]
    assert model.part_sizes() == whole.part_sizes()
    assert "16 layers have 4 bits in groups of 32" in repr(model)
    saved = icenet.save(model, tmp_path / "saved")
    report = info.model_report(str(saved))
    assert report.num_params == whole.num_params and len(report.quantized) == 16
    assert report.stored_bytes == sum(array.nbytes for array in model.weights().values())
    assert report.as_dict()["quantized"]["output"] == {"bits": 4, "group_size": 32}
    report.render()
    assert "quantized: 16 layers have 4 bits in groups of 32" in " ".join(capsys.readouterr().out.split())


def test_other_forms_and_pytorch_get_dequantized_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = icenet.save(load(save(tmp_path / "model"), "mlx", quantize=8, group_size=32), tmp_path / "saved")
    with caplog.at_level(logging.WARNING, "icenet"):
        theirs = load(saved, "torch")
    assert [is_one_line(r.message, "16 layers have 8 bits", "torch", "instead of") for r in caplog.records] == [True]
    caplog.clear()
    done = icenet.convert(saved, tmp_path / "plain", "canonical")
    assert "dequantized: 16 layers have 8 bits in groups of 32" in done.note
    found = weight_files.read(tmp_path / "plain")
    assert same_bits(dict(found), theirs.weights()) and not [key for key in found.metadata if "quantization" in key]
    icenet.convert(saved, tmp_path / "weights.pt", "torch")
    torch = importlib.import_module("torch")
    assert same_bits(
        {name: array.numpy() for name, array in torch.load(tmp_path / "weights.pt").items()}, theirs.weights()
    )
    with caplog.at_level(logging.WARNING, "icenet"):
        load(saved, "mlx", quantize=4, group_size=32)
    assert [is_one_line(r.message, "quantized already", "second time") for r in caplog.records] == [True]


def test_errors(tmp_path: Path) -> None:
    path = save(tmp_path / "model")
    for options, words in (
        ({"quantize": 7}, ["bits 7", "one of 2, 3, 4, 5, 6, 8"]),
        ({"quantize": 4, "group_size": 48}, ["group_size 48", "32, 64, 128"]),
        ({"quantize": 4, "group_size": 128}, ["group_size 128", "64"]),
        ({"group_size": 32}, ["group_size 32", "quantize"]),
    ):
        with pytest.raises(UsageError) as error:
            load(path, "mlx", **options)
        assert is_one_line(str(error.value), *words)
    for form in ("hf", "canonical", "gguf"):
        for options in ({"quantize": 4}, {"group_size": 32}):
            with pytest.raises(UsageError) as error:
                icenet.convert(path, tmp_path / "out", form, **options)
            assert is_one_line(str(error.value), "--quantize", "mlx-lm", form)
    saved = icenet.save(load(path, "mlx", quantize=4), tmp_path / "saved")
    file = saved / "model.safetensors"
    stored = weight_files.read(file)
    arrays, metadata = {name: array.copy() for name, array in stored.items()}, dict(stored.metadata)
    for changes, words in (
        ({"icenet_quantization": "{"}, ["icenet_quantization", "damaged"]),
        ({"icenet_quantization": json.dumps({"bits": 8, "group_size": 64})}, ["do not belong together"]),
        ({"icenet_quantization": json.dumps({"bits": 4, "group_size": "x"})}, ["group_size 'x'"]),
    ):
        weight_files.write(file, arrays, {**metadata, **changes})
        with pytest.raises(IceNetError) as error:
            load(saved, "mlx")
        assert is_one_line(str(error.value), *words)


# ---- folders of mlx-lm -------------------------------------------------------------------------------------

COMMON = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 32}
HEADS = {**COMMON, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 96, "eos_token_id": 2}
VALUES: dict[str, dict[str, Any]] = {
    "llama": {**HEADS, "tie_word_embeddings": True},
    "phi3": {**HEADS, "pad_token_id": 0},  # joins q, k and v, and gate and up
    "gpt2": {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 32},  # transposed layers
    # joins q, k and v within each head
    "gpt_neox": {**COMMON, "num_attention_heads": 2, "intermediate_size": 256, "hidden_act": "gelu_new"},
    "qwen3_moe": {
        **HEADS, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "attention_bias": False, "norm_topk_prob": True,
    },
}  # fmt: skip


def hf_folder(path: Path, model_type: str) -> Path:
    config = Config.from_dict({"model": FAMILIES[model_type].read(VALUES[model_type])})
    generator = np.random.default_rng(1)
    found = family_tensors(FAMILIES[model_type], config).items()
    arrays = {name: (0.2 * generator.standard_normal(tensor.shape)).astype(np.float32) for name, tensor in found}
    weight_files.write(path, arrays)
    (path / "config.json").write_text(json.dumps({"model_type": model_type, **VALUES[model_type]}))
    return path


@pytest.mark.parametrize("model_type", VALUES)
def test_folders_of_mlx_lm_are_written_and_read(model_type: str, tmp_path: Path) -> None:
    """The same numbers as those of a model that is quantized when it is loaded, and of mlx-lm if it is installed."""
    source = hf_folder(tmp_path / "hf", model_type)
    done = icenet.convert(source, tmp_path / "q4", "mlx-lm", quantize=4, group_size=32)
    assert "4 bits in groups of 32" in done.note
    values = json.loads((tmp_path / "q4" / "config.json").read_text())
    assert values["quantization"] == values["quantization_config"] == {"bits": 4, "group_size": 32, "mode": "affine"}
    model, expected = load(tmp_path / "q4", "mlx"), load(source, "mlx", quantize=4, group_size=32)
    assert same_bits(model.weights(), expected.weights()) and model.quantized_layers() == expected.quantized_layers()
    again = icenet.convert(tmp_path / "q4", tmp_path / "copy", "mlx-lm")
    assert again.destination.dtypes == done.destination.dtypes
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "q4" / name).read_bytes()
    mlx_lm = pytest.importorskip("mlx_lm.utils")
    theirs, _ = mlx_lm.load_model(tmp_path / "q4")
    tokens = token_ids(1, 6, vocab_size=64)
    np.testing.assert_allclose(logits(model, tokens), plain(theirs(native("mlx", tokens))), rtol=0, atol=2e-4)


def test_layers_of_a_folder_have_their_own_settings(tmp_path: Path) -> None:
    """Some packed with 8 bits, as mlx-lm's mixed recipes write them, and one that is not quantized."""
    icenet.convert(hf_folder(tmp_path / "hf", "llama"), tmp_path / "q4", "mlx-lm", quantize=4, group_size=32)
    icenet.convert(tmp_path / "hf", tmp_path / "q8", "mlx-lm", quantize=8, group_size=64)
    q4, q8, whole = (dict(weight_files.read(tmp_path / name)) for name in ("q4", "q8", "hf"))
    own, plain_layer = "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj"
    mixed = {name: array for name, array in q4.items() if not name.startswith((own, plain_layer))}
    mixed |= {name: array for name, array in q8.items() if name.startswith(own)}
    mixed[f"{plain_layer}.weight"] = whole[f"{plain_layer}.weight"]
    values = json.loads((tmp_path / "q4" / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        values[key] |= {own: {"bits": 8, "group_size": 64}, plain_layer: False}
    weight_files.write(tmp_path / "mixed", mixed)
    (tmp_path / "mixed" / "config.json").write_text(json.dumps(values))
    model, theirs = load(tmp_path / "mixed", "mlx"), load(tmp_path / "mixed", "torch")
    layers = model.quantized_layers()
    assert layers["blocks.0.attention.v_proj"] == Quantization(8, 64)
    assert (
        layers["blocks.0.attention.k_proj"] == Quantization(4, 32) and "blocks.1.feed_forward.up_proj" not in layers
    )
    tokens = token_ids(1, 6, vocab_size=64)
    np.testing.assert_allclose(logits(model, tokens), logits(theirs, tokens), rtol=0, atol=1e-4)
    saved = icenet.save(model, tmp_path / "saved")
    assert load(saved, "mlx").quantized_layers() == layers
    icenet.convert(saved, tmp_path / "back", "mlx-lm")
    settings = json.loads((tmp_path / "back" / "config.json").read_text())["quantization"]
    assert settings == {"bits": 4, "group_size": 32, "mode": "affine", own: {"bits": 8, "group_size": 64}}
    assert same_bits(dict(weight_files.read(tmp_path / "back")), mixed)


def test_a_quantized_folder_opens_as_a_view(tmp_path: Path) -> None:
    icenet.convert(hf_folder(tmp_path / "hf", "gpt2"), tmp_path / "q4", "mlx-lm", quantize=4, group_size=32)
    _, weights = open_target(tmp_path / "q4")
    packed = packed_of(weights)
    assert packed is not None and weights is not None
    for name in packed:
        assert (packed[name].dtype, packed[name].shape) == packed.spec(name)
    assert set(packed) - set(weights) == {
        f"{layer}.{kind}" for layer in packed.layers for kind in ("scales", "biases")
    }
    assert packed_of(folder.read(tmp_path / "hf").weights) is None


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized weights have the perplexity and the text of the folder that convert writes, which info describes."""
    main = importlib.import_module("icenet.cli.main").main
    path = save(tmp_path / "model", max_seq_length=32, activation="silu", norm="rms_norm", attention_bias=False,
                feed_forward_bias=False, output_bias=False, embedding_scale=1.0)  # fmt: skip
    text = tmp_path / "text.txt"
    text.write_text("the text " * 20)
    options = ["--text", str(text), "--backend", "torch", "--device", "cpu", "--json"]
    settings = ["--quantize", "3", "--group-size", "32"]
    capsys.readouterr()
    found = []
    for model, more in ((path, []), (path, settings), (tmp_path / "out", [])):
        if model != path:
            assert main(["convert", str(path), str(model), "--to", "mlx-lm", *settings]) == 0
            assert "3 bits in groups of 32" in capsys.readouterr().out
        assert main(["eval", str(model), *options, *more]) == 0
        found.append(json.loads(capsys.readouterr().out)["perplexity"])
    assert found[1] == found[2] != found[0]
    assert main(["info", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantized"]["output"] == {"bits": 3, "group_size": 32}
    asked = ["--prompt", "the", "--temperature", "0", "--max-new-tokens", "20", *options[2:]]
    texts = []
    for model, more in ((path, []), (path, settings), (tmp_path / "out", [])):
        assert main(["generate", str(model), *asked, *more]) == 0
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[1] == texts[2] != texts[0]
    loaded: list[Any] = []
    monkeypatch.setattr("icenet.commands.chat.check_chat_template", lambda *arguments: None)
    monkeypatch.setattr("icenet.load", lambda *arguments, **options: loaded.append(options))
    main(["chat", str(path), *settings])
    assert (loaded[0]["quantize"], loaded[0]["group_size"]) == (3, 32)
    capsys.readouterr()
    assert main(["convert", str(path), str(tmp_path / "no"), "--to", "mlx-lm", "--group-size", "32"]) == 2
    assert is_one_line(capsys.readouterr().err, "--group-size", "--quantize")
