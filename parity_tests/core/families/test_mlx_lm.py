"""Folders of mlx-lm: their names and layouts, quantized ones, and mlx-lm itself where it is installed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import icenet.blas  # before mlx.core

import numpy as np
import pytest
from helpers import native, plain, same_bits

import icenet
from icenet.core.config import Config
from icenet.core.families import FAMILIES, folder
from icenet.core.families.weights import family_tensors
from icenet.core.weights import files as weight_files

COMMON = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 16}
GROUPED = {**COMMON, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
VALUES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16},
    "gpt_neox": {**COMMON, "num_attention_heads": 2, "intermediate_size": 128, "hidden_act": "gelu_new"},
    "mixtral": {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **GROUPED, "head_dim": 16, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "attention_bias": False, "norm_topk_prob": True,
    },
}  # fmt: skip


def arrays_of(model_type: str, **changes: Any) -> dict[str, np.ndarray]:
    """Returns random tensors by the names of `transformers`."""
    config = Config.from_dict({"model": FAMILIES[model_type].read({**VALUES[model_type], **changes})})
    generator = np.random.default_rng(1)
    found = family_tensors(FAMILIES[model_type], config).items()
    return {name: generator.standard_normal(tensor.shape).astype(np.float16) for name, tensor in found}


def written(path: Path, model_type: str, arrays: dict[str, np.ndarray], **changes: Any) -> Path:
    weight_files.write(path, arrays)
    (path / "config.json").write_text(json.dumps({"model_type": model_type, **VALUES[model_type], **changes}))
    return path


def of_mlx_lm(model_type: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors as `sanitize` of mlx-lm's GPT-2 and GPT-NeoX leaves them."""
    if model_type == "gpt_neox":
        names = {name: name.removeprefix("gpt_neox.").replace("layers.", "h.") for name in arrays}
        return {f"model.{names[name]}": array for name, array in arrays.items()}
    names = {name: f"model.{name.removeprefix('transformer.')}" for name in arrays}
    is_projection = {name: array.ndim == 2 and ".h." in name for name, array in arrays.items()}
    return {names[name]: array.T.copy() if is_projection[name] else array for name, array in arrays.items()}


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox"])
def test_names_of_mlx_lm_are_read_and_leave_as_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    arrays = arrays_of(model_type)
    expected = folder.read(written(tmp_path / "hf", model_type, arrays))
    given = of_mlx_lm(model_type, arrays)
    found = folder.read(written(tmp_path / "in", model_type, given))
    assert found.config.model == expected.config.model
    assert same_bits(dict(found.weights), dict(expected.weights))
    icenet.convert(tmp_path / "in", tmp_path / "again", "mlx-lm")
    assert same_bits(dict(weight_files.read(tmp_path / "again")), given)
    icenet.convert(tmp_path / "in", tmp_path / "out", "hf")
    prefix = "transformer." if model_type == "gpt2" else ""
    own = {name.removeprefix(prefix): array for name, array in arrays.items()}
    assert same_bits(dict(weight_files.read(tmp_path / "out")), own)


@pytest.mark.parametrize("tied", [True, False])
def test_names_of_an_exported_gpt2(tied: bool, tmp_path: Path) -> None:
    """Those of published folders, which both programs load; with a head, which mlx-lm lacks, those of the library."""
    arrays = arrays_of("gpt2", tie_word_embeddings=tied)
    written(tmp_path / "in", "gpt2", arrays, tie_word_embeddings=tied)
    assert ("use --to mlx-lm" in icenet.convert(tmp_path / "in", tmp_path / "kept", "hf").note) is tied
    assert same_bits(dict(weight_files.read(tmp_path / "kept")), arrays)
    icenet.convert(tmp_path / "in", tmp_path / "own", "canonical")
    assert "use --to mlx-lm" not in icenet.convert(tmp_path / "own", tmp_path / "out", "hf").note
    own = {name.removeprefix("transformer.") if tied else name: array for name, array in arrays.items()}
    assert same_bits(dict(weight_files.read(tmp_path / "out")), own)
    options = FAMILIES["gpt2"].options
    found, expected = (folder.read(tmp_path / path).config.model for path in ("out", "in"))
    assert options(found) == options(expected)


# --- quantized mixtures of experts --------------------------------------------------------------------------

SCALE, ZERO = 0.5, 8


def numbers(shape: tuple[int, ...], bits: int = 4) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 2**bits, shape)


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    """Packs whole numbers along the last axis, the lowest bits of a word first."""
    words = values.reshape(*values.shape[:-1], -1, 32 // bits).astype(np.uint64)
    return (words << (np.arange(32 // bits, dtype=np.uint64) * np.uint64(bits))).sum(-1).astype(np.uint32)


def quantized(method: str, layer: str, shape: tuple[int, ...], bits: int, size: int) -> dict[str, np.ndarray]:
    """Returns the tensors of a layer `[..., out, in]` with the values SCALE * (numbers - ZERO)."""
    values, groups = numbers(shape, bits), shape[-1] // size
    if method == "mlx":
        scales = np.full((*shape[:-1], groups), SCALE, np.float16)
        parts = {"weight": packed(values, bits), "scales": scales, "biases": scales * -ZERO}
        return {f"{layer}.{kind}": array for kind, array in parts.items()}
    scales = np.full((groups, shape[0]), SCALE, np.float16)
    zeros = np.full((groups, shape[0]), ZERO)
    if method == "gptq":
        weight, zeros = packed(values, bits).T, packed(zeros - 1, bits)
    else:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        columns = (np.arange(shape[0]).reshape(-1, 8)[:, order]).reshape(-1)
        weight, zeros = packed(values.T[:, columns], 4), packed(zeros[:, columns], 4)
    arrays = {"qweight": weight.view(np.int32), "qzeros": zeros.view(np.int32), "scales": scales}
    return {f"{layer}.{kind}": np.ascontiguousarray(array) for kind, array in arrays.items()}


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("method", ["mlx", "gptq", "awq"])
def test_quantized_experts_are_read(model_type: str, method: str, tmp_path: Path) -> None:
    """Stacked ones of mlx-lm, whose router has 8 bits, and those of each expert of GPTQ and AWQ."""
    arrays = arrays_of(model_type)
    part = "block_sparse_moe" if model_type == "mixtral" else "mlp"
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"} if model_type == "mixtral" else {}
    given: dict[str, np.ndarray] = {}
    expected: dict[str, np.ndarray] = {}
    settings: dict[str, Any] = {"group_size": 32, "bits": 4}
    for name, array in arrays.items():
        layer, _, kind = name.rpartition(".")
        _, experts, after = layer.partition(f"{part}.experts.")
        if experts:
            index, _, theirs = after.partition(".")
            path = f"blocks.{layer.split('.')[2]}.feed_forward.experts.{names.get(theirs, theirs)}.weight"
            if method != "mlx":
                given |= quantized(method, layer, array.shape, 4, 32)
                expected[path] = np.stack([SCALE * (numbers(array.shape) - ZERO)] * 3)
            elif index == "0":
                stacked = f"{layer.partition('.experts')[0]}.switch_mlp.{names.get(theirs, theirs)}"
                given |= quantized(method, stacked, (3, *array.shape), 4, 32)
                expected[path] = SCALE * (numbers((3, *array.shape)) - ZERO)
        elif method == "mlx" and layer.endswith(f"{part}.gate"):
            given |= quantized(method, layer, array.shape, 8, 32)
            settings[layer] = {"group_size": 32, "bits": 8}
            expected[f"blocks.{layer.split('.')[2]}.feed_forward.router.weight"] = SCALE * (
                numbers(array.shape, 8) - ZERO
            )
        else:
            given[f"{layer}.{kind}"] = array
    key = {"quantization": settings} if method == "mlx" else {"quantization_config": settings}
    if method != "mlx":
        settings["quant_method"] = method
    found = folder.read(written(tmp_path / "in", model_type, given, **key))
    for path, array in expected.items():
        np.testing.assert_array_equal(found.weights[path], array.astype(np.float16), strict=True)
    icenet.convert(tmp_path / "in", tmp_path / "out", "hf")
    assert weight_files.read(tmp_path / "out").keys() == arrays.keys()


# --- mlx-lm itself ------------------------------------------------------------------------------------------

CLASSES = {
    "Llama": GROUPED, "Mistral": {**GROUPED, "sliding_window": None}, "Qwen2": GROUPED, "Olmo2": GROUPED,
    "Qwen3": {**GROUPED, "head_dim": 32}, "Phi3": {**GROUPED, "pad_token_id": 0},
    "SmolLM3": {**GROUPED, "head_dim": 32, "pad_token_id": 0},
    "Gemma2": {**GROUPED, "head_dim": 32, "query_pre_attn_scalar": 7, "sliding_window": 16},
    "Gemma3Text": {**GROUPED, "head_dim": 32, "query_pre_attn_scalar": 7, "sliding_window": 6, "hidden_size": 64,
                   "sliding_window_pattern": 2},
    "GPT2": VALUES["gpt2"], "GPTNeoX": VALUES["gpt_neox"], "Mixtral": VALUES["mixtral"],
    "Qwen3Moe": {**VALUES["qwen3_moe"], "hidden_size": 64},  # its router has groups of 64
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(("bits", "size"), [(4, 32), (8, 32), (None, None)])
def test_both_programs_compute_the_same(name: str, bits: int | None, size: int | None, tmp_path: Path) -> None:
    """An exported folder is loaded by mlx-lm; what that writes, quantized or not, has the same logits here."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    utils = pytest.importorskip("mlx_lm.utils")
    mx: Any = importlib.import_module("mlx.core")
    ends = {"bos_token_id": None, "eos_token_id": None}
    config = getattr(transformers, f"{name}Config")(**{**ends, "pad_token_id": None, **CLASSES[name]})
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            center = 0.8 if parameter.ndim == 1 and path.endswith("weight") else 0.0
            parameter.copy_(center + 0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "hf")
    assert "mlx-lm" not in icenet.convert(tmp_path / "hf", tmp_path / "mlx", "mlx-lm").note
    theirs, settings = utils.load_model(tmp_path / "mlx")
    if bits is not None:
        theirs, settings = utils.quantize_model(theirs, settings, size, bits)
    (tmp_path / "in").mkdir()
    utils.save_model(tmp_path / "in", theirs)
    utils.save_config(settings, config_path=tmp_path / "in/config.json")
    theirs, _ = utils.load_model(tmp_path / "in")
    theirs = theirs if bits is None else utils.dequantize_model(theirs)
    tokens = np.random.default_rng(0).integers(1, 40, (1, 12))
    expected = np.array(theirs(mx.array(tokens)).astype(mx.float32))
    icenet.convert(tmp_path / "in", tmp_path / "out", "hf")
    for path in ("in", "out"):
        for backend in ("torch", "mlx"):
            own = plain(icenet.load(tmp_path / path, backend, "cpu", dtype="fp32")(native(backend, tokens)))
            assert np.abs(own - expected).max() <= 1e-5 * np.abs(expected).max()
    again, _ = utils.load_model(tmp_path / "out")
    np.testing.assert_array_equal(np.array(again(mx.array(tokens)).astype(mx.float32)), expected)
