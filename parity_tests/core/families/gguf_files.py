"""Writes GGUF files as llama.cpp's converter does, with the package gguf: its names of tensors, its writer.

What the converter does to weights is written here once more, after `convert_hf_to_gguf.py`, so that an error in
IceNet's own table shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf: Any = pytest.importorskip("gguf")

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3",
    "qwen3_moe": "qwen3moe", "gemma2": "gemma2", "gemma3_text": "gemma3", "olmo2": "olmo2", "gpt2": "gpt2",
}  # fmt: skip
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]


def interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """Returns rows of queries or keys of Llama in the order of llama.cpp."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)


def write(
    path: Path,
    values: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    kind: str = "F32",
    metadata: Mapping[str, Any] = {},
    extra: Mapping[str, np.ndarray] = {},
    **options: Any,
) -> Path:
    """Writes the tensors of a folder of Hugging Face.

    Args:
        path: The file.
        values: The content of its config.json.
        arrays: Its tensors.
        kind: Type of the tensors with two axes or more.
        metadata: Metadata to add.
        extra: Tensors to add by their names in the file.
        options: Options of the writer of the package.
    """
    name = ARCHITECTURES[values["model_type"]]
    writer = gguf.GGUFWriter(path, name, **options)
    get = {**values, **{ours: values[theirs] for theirs, ours in _GPT2.items() if theirs in values}}.get
    layers, heads = get("num_hidden_layers"), get("num_attention_heads")
    writer.add_block_count(layers)
    writer.add_context_length(get("max_position_embeddings"))
    writer.add_embedding_length(get("hidden_size"))
    writer.add_feed_forward_length(get("intermediate_size") or 4 * get("hidden_size"))
    writer.add_head_count(heads)
    kv_heads = get("num_key_value_heads") or heads
    if name == "gpt2":
        writer.add_layer_norm_eps(get("layer_norm_epsilon"))
    else:
        writer.add_head_count_kv(kv_heads)
        writer.add_layer_norm_rms_eps(get("rms_norm_eps"))
        rope = get("rope_parameters") or {"rope_theta": get("rope_theta") or 10000.0}
        local = rope.get("sliding_attention", rope)
        rope = rope.get("full_attention", rope)
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope.get("rope_type") in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
            writer.add_rope_scaling_factor(rope["factor"])
        if rope.get("rope_type") == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if local is not rope:
            writer.add_float32(f"{name}.rope.freq_base_swa", local["rope_theta"])
        if rope.get("rope_type") == "llama3":
            writer.add_tensor("rope_freqs.weight", _llama3(rope, get("head_dim")))
    if get("head_dim"):
        writer.add_key_length(get("head_dim"))
        writer.add_value_length(get("head_dim"))
        writer.add_rope_dimension_count(get("head_dim"))
    if get("sliding_window") and (name != "qwen2" or get("use_sliding_window")):
        writer.add_sliding_window(get("sliding_window"))
    if name == "gemma2":
        writer.add_attn_logit_softcapping(get("attn_logit_softcapping"))
        writer.add_final_logit_softcapping(get("final_logit_softcapping"))
    if count := get("num_local_experts") or get("num_experts"):
        writer.add_expert_count(count)
        writer.add_expert_used_count(get("num_experts_per_tok"))
        if get("moe_intermediate_size"):
            writer.add_expert_feed_forward_length(get("moe_intermediate_size"))
    add_tokenizer(writer, get("vocab_size"))
    for key, value in metadata.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for own, array in extra.items():
        writer.add_tensor(own, array)
    for theirs, array in _stacked(arrays).items():
        own = _name(gguf, name, theirs, layers)
        if own.endswith((".attn_q.weight", ".attn_q.bias")) and name == "llama":
            array = interleaved(array, heads)
        if own.endswith((".attn_k.weight", ".attn_k.bias")) and name == "llama":
            array = interleaved(array, kv_heads)
        if name.startswith("gemma") and own.endswith("norm.weight"):
            array = array + 1
        if name == "gpt2" and own.startswith("blk") and array.ndim == 2:
            array = array.T
        is_quantized = array.ndim > 1 and array.shape[-1] % 32 == 0 and "ffn_gate_inp" not in own
        stored = gguf.GGMLQuantizationType[kind if is_quantized else "F32"]
        data = np.ascontiguousarray(array, np.float32)
        writer.add_tensor(own, data if stored.name == "F32" else gguf.quants.quantize(data, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: Any, size: int) -> None:
    """Adds a vocabulary of single bytes, as SentencePiece has."""
    tokens = [*TOKENS, *(f"w{index}" for index in range(size))][:size]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(size)])
    writer.add_token_types([2, 3, 3, *[6] * (size - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


_GPT2 = {
    "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings", "n_inner": "intermediate_size",
}  # fmt: skip


def _name(package: Any, architecture: str, theirs: str, layers: int) -> str:
    number = next(key for key, value in package.MODEL_ARCH_NAMES.items() if value == architecture)
    layer, _, kind = theirs.rpartition(".")
    found = package.get_tensor_name_map(number, layers).get_name(layer)
    assert found is not None, theirs
    return f"{found}.{kind}"


def _stacked(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns tensors with those of the experts of a layer in one."""
    found: dict[str, Any] = {}
    for name, array in arrays.items():
        before, experts, after = name.partition(".experts.")
        if experts:
            found.setdefault(f"{before}.experts.{after.partition('.')[2]}", []).append(array)
        else:
            found[name] = array
    return {name: np.stack(array) if isinstance(array, list) else array for name, array in found.items()}


def _llama3(rope: Mapping[str, Any], size: int) -> np.ndarray:
    """Returns the factors of Llama 3, as `LlamaModel.generate_extra_tensors` computes them."""
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    factors = []
    for frequency in 1.0 / (rope["rope_theta"] ** (np.arange(0, size, 2) / size)):
        length = 2 * np.pi / frequency
        smooth = (rope["original_max_position_embeddings"] / length - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        factors.append(1.0 if length < high else rope["factor"] if length > low else between)
    return np.array(factors, np.float32)
