"""GGUF files of llama.cpp under the names of Hugging Face: the values of a config.json, and the tensors.

A file goes through the table of its family, as a folder of Hugging Face does. Here are only the names that llama.cpp
gives, and what it does to weights: it permutes the rows of queries and keys of Llama, adds 1 to the norms of Gemma,
transposes the projections of GPT-2, and stacks experts, as mlx-lm does.

Source: `convert_hf_to_gguf.py` of llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from icenet.core.errors import ConfigError, WeightsError
from icenet.core.families.gguf_metadata import Metadata, Values
from icenet.core.families.gguf_rotary import LONG_ROPE, ROPE_FREQUENCIES, rotary_scaling
from icenet.core.families.keys import shown
from icenet.core.weights.files import Array, StoredWeights
from icenet.core.weights.gguf import GgufFile, open_gguf
from icenet.core.weights.safetensors import Spec

HEAD, EMBEDDING = "output.weight", "token_embd.weight"
_COMMON = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "blk.{i}.attn_q": "model.layers.{i}.self_attn.q_proj",
    "blk.{i}.attn_k": "model.layers.{i}.self_attn.k_proj",
    "blk.{i}.attn_v": "model.layers.{i}.self_attn.v_proj",
    "blk.{i}.attn_qkv": "model.layers.{i}.self_attn.qkv_proj",
    "blk.{i}.attn_output": "model.layers.{i}.self_attn.o_proj",
    "blk.{i}.attn_q_norm": "model.layers.{i}.self_attn.q_norm",
    "blk.{i}.attn_k_norm": "model.layers.{i}.self_attn.k_norm",
    "blk.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_gate": "model.layers.{i}.mlp.gate_proj",
    "blk.{i}.ffn_up": "model.layers.{i}.mlp.up_proj",
    "blk.{i}.ffn_down": "model.layers.{i}.mlp.down_proj",
}
_SANDWICH = {
    "blk.{i}.post_attention_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "blk.{i}.post_ffw_norm": "model.layers.{i}.post_feedforward_layernorm",
}
_MIXTRAL = {
    "blk.{i}.ffn_gate_inp": "model.layers.{i}.block_sparse_moe.gate",
    "blk.{i}.ffn_gate_exps": "model.layers.{i}.block_sparse_moe.switch_mlp.gate_proj",
    "blk.{i}.ffn_up_exps": "model.layers.{i}.block_sparse_moe.switch_mlp.up_proj",
    "blk.{i}.ffn_down_exps": "model.layers.{i}.block_sparse_moe.switch_mlp.down_proj",
    # files of 2023 have a tensor per expert
    "blk.{i}.ffn_gate.{e}": "model.layers.{i}.block_sparse_moe.experts.{e}.w1",
    "blk.{i}.ffn_up.{e}": "model.layers.{i}.block_sparse_moe.experts.{e}.w3",
    "blk.{i}.ffn_down.{e}": "model.layers.{i}.block_sparse_moe.experts.{e}.w2",
}
_QWEN_EXPERTS = {
    "blk.{i}.ffn_gate_inp": "model.layers.{i}.mlp.gate",
    "blk.{i}.ffn_gate_exps": "model.layers.{i}.mlp.switch_mlp.gate_proj",
    "blk.{i}.ffn_up_exps": "model.layers.{i}.mlp.switch_mlp.up_proj",
    "blk.{i}.ffn_down_exps": "model.layers.{i}.mlp.switch_mlp.down_proj",
}
_GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "blk.{i}.attn_norm": "transformer.h.{i}.ln_1",
    "blk.{i}.attn_qkv": "transformer.h.{i}.attn.c_attn",
    "blk.{i}.attn_output": "transformer.h.{i}.attn.c_proj",
    "blk.{i}.ffn_norm": "transformer.h.{i}.ln_2",
    "blk.{i}.ffn_up": "transformer.h.{i}.mlp.c_fc",
    "blk.{i}.ffn_down": "transformer.h.{i}.mlp.c_proj",
}

_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_GPT2_KEYS = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_NO_EFFECT = frozenset(
    {
        *("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "attention.layer_norm_epsilon"),
        *("attention.layer_norm_rms_epsilon", "attention.causal", "use_parallel_residual"),
    }
)
"""Keys of an architecture that do not change what a model computes, if its other keys are known."""


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    Attributes:
        model_type: Its name in config.json.
        names: Names of layers, ours by its own, with `{i}` for the block and `{e}` for an expert.
        keys: Keys of config.json by those of the metadata, without the name of the architecture.
        constants: Values of config.json that are the same in all models.
        is_permuted: Whether the rows of queries and keys alternate between the two halves of each head.
        adds_one: Whether 1 was added to the weights of norms.
        is_transposed: Whether the weights of projections were transposed.
        has_head_size: Whether its config.json has head_dim.
    """

    model_type: str
    names: Mapping[str, str] = field(default_factory=lambda: _COMMON)
    keys: Mapping[str, str] = field(default_factory=lambda: _KEYS)
    constants: Mapping[str, Any] = field(default_factory=dict)
    is_permuted: bool = False
    adds_one: bool = False
    is_transposed: bool = False
    has_head_size: bool = True
    more: Callable[[Metadata, Values], None] = lambda metadata, values: None


def _routing(metadata: Metadata) -> None:
    """Checks the keys of routers whose only value is that of the architecture in llama.cpp."""
    for key, only in (("expert_gating_func", 1), ("expert_weights_norm", True), ("expert_weights_scale", 1.0)):
        if (value := metadata.get(key)) not in (None, 0, only):
            raise ConfigError(f"{metadata.name}.{key}: {shown(value)} is not supported, only {only}")


def _llama(metadata: Metadata, values: Values) -> None:
    names = metadata.file
    if metadata.get("expert_count"):
        _routing(metadata)
        values |= {"model_type": "mixtral", "num_local_experts": metadata.get("expert_count")}
        values["num_experts_per_tok"] = metadata.get("expert_used_count")
        values["sliding_window"] = metadata.get("attention.sliding_window")
    elif window := metadata.get("attention.sliding_window"):
        values |= {"model_type": "mistral", "sliding_window": window}
    else:
        values["attention_bias"] = "blk.0.attn_q.bias" in names
        values["mlp_bias"] = "blk.0.ffn_up.bias" in names
    for key in ("expert_count", "expert_used_count"):
        metadata.get(key)


def _qwen3_experts(metadata: Metadata, values: Values) -> None:
    _routing(metadata)
    values["num_experts"] = metadata.get("expert_count")
    values["num_experts_per_tok"] = metadata.get("expert_used_count")
    values["moe_intermediate_size"] = metadata.get("expert_feed_forward_length")


def _gemma(metadata: Metadata, values: Values) -> None:
    heads = metadata.whole("attention.head_count", 1)
    is_27b = values.get("num_hidden_layers") == (46 if metadata.name == "gemma2" else 62)  # as llama.cpp knows it
    width = metadata.whole("embedding_length", 1)
    values["query_pre_attn_scalar"] = width // heads if is_27b else values["head_dim"]
    values["sliding_window"] = metadata.get("attention.sliding_window")
    if metadata.name == "gemma2":
        values["attn_logit_softcapping"] = metadata.get("attn_logit_softcapping", 50.0)
        values["final_logit_softcapping"] = metadata.get("final_logit_softcapping", 30.0)
        return
    values["rope_local_base_freq"] = metadata.get("rope.freq_base_swa", 10000.0)
    pattern = metadata.get("attention.sliding_window_pattern") or 6
    count = metadata.whole("block_count", 1)
    if isinstance(pattern, int) and count <= 2**14:
        pattern = [(index + 1) % pattern != 0 for index in range(count)]
    if not isinstance(pattern, list):
        raise ConfigError(f"{metadata.name}.attention.sliding_window_pattern: {shown(pattern)} is not supported")
    values["layer_types"] = ["sliding_attention" if window else "full_attention" for window in pattern]


def _phi3(metadata: Metadata, values: Values) -> None:
    values["sliding_window"] = metadata.get("attention.sliding_window") or None
    original = metadata.get("rope.scaling.original_context_length")
    if original is not None:
        values["original_max_position_embeddings"] = original


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", {**_COMMON, **_MIXTRAL}, is_permuted=True, more=_llama),
    "qwen2": Architecture("qwen2", constants={"use_sliding_window": False}, has_head_size=False),
    "qwen3": Architecture("qwen3", constants={"use_sliding_window": False}),
    "qwen3moe": Architecture(
        "qwen3_moe",
        {**_COMMON, **_QWEN_EXPERTS},
        constants={"use_sliding_window": False, "norm_topk_prob": True, "decoder_sparse_step": 1},
        more=_qwen3_experts,
    ),
    "gemma2": Architecture("gemma2", {**_COMMON, **_SANDWICH}, adds_one=True, more=_gemma),
    "gemma3": Architecture("gemma3_text", {**_COMMON, **_SANDWICH}, adds_one=True, more=_gemma),
    "phi3": Architecture(
        "phi3",
        {**_COMMON, "blk.{i}.ffn_up": "model.layers.{i}.mlp.gate_up_proj"},
        has_head_size=False,
        more=_phi3,
    ),
    "olmo2": Architecture("olmo2", {**_COMMON, **_SANDWICH}, has_head_size=False),
    "gpt2": Architecture("gpt2", _GPT2, _GPT2_KEYS, is_transposed=True, has_head_size=False),
}


@dataclass(frozen=True)
class Model:
    """A GGUF file as a folder of Hugging Face would be.

    Attributes:
        path: The file.
        values: The content of a config.json.
        weights: The tensors by the names of Hugging Face.
        metadata: Metadata of the file.
    """

    path: Path
    values: Values
    weights: GgufWeights
    metadata: Mapping[str, Any]


def read(path: Path) -> Model:
    """Reads a file. Tensors are read when they are looked up.

    Raises:
        WeightsError: It is damaged.
        ConfigError: Its architecture, or a value of its metadata, is not supported.
    """
    file = open_gguf(path)
    name = file.metadata.get("general.architecture")
    architecture = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if architecture is None:
        described = f"architecture {shown(name)} is not supported" if name else "has no general.architecture"
        raise ConfigError(f"{path}: {described}; the supported ones are {', '.join(ARCHITECTURES)}")
    if (kind := file.metadata.get("general.type", "model")) != "model":
        raise ConfigError(f"{path}: is of type {shown(kind)}, not a model; give the file of the model")
    if EMBEDDING not in file:
        raise WeightsError(f"{path}: has no tensor {EMBEDDING}; copy or download it again")
    metadata = Metadata(file, str(name))
    try:
        values = _values(metadata, architecture)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    unknown = [key for key in sorted(metadata.unused - _NO_EFFECT) if metadata.get(key)]
    if unknown:
        listed = ", ".join(shown(f"{name}.{key}") for key in unknown[:5])
        raise ConfigError(f"{path}: {listed}: unknown for {name}, and may change what the model computes")
    return Model(path, values, GgufWeights(file, architecture, values), file.metadata)


def _values(metadata: Metadata, architecture: Architecture) -> Values:
    file = metadata.file
    found = {theirs: metadata.get(key) for key, theirs in architecture.keys.items()}
    values = {key: value for key, value in found.items() if value is not None}
    values |= {"model_type": architecture.model_type, **architecture.constants}
    values["vocab_size"] = file.entries[EMBEDDING].shape[0]
    values["tie_word_embeddings"] = HEAD not in file or (
        file.entries[HEAD].kind == file.entries[EMBEDDING].kind and file.stored(HEAD) == file.stored(EMBEDDING)
    )
    for name in ("bos", "eos", "padding"):
        token = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        values["pad_token_id" if name == "padding" else f"{name}_token_id"] = token
    if architecture.keys is _KEYS:
        heads = metadata.whole("attention.head_count", 1)
        natural = metadata.whole("embedding_length", 1) // heads or 1
        if architecture.is_permuted:  # old files of Llama have the size of a head here only
            natural = metadata.whole("rope.dimension_count", natural)
        size = metadata.whole("attention.key_length", natural)
        rotated = metadata.whole("rope.dimension_count", size)
        if (other := metadata.whole("attention.value_length", size)) != size:
            raise ConfigError(f"keys of {size} values and values of {other} per head are not supported")
        if architecture.has_head_size or size * heads != values.get("hidden_size"):
            values["head_dim"] = size
        if rotated != size:
            values["partial_rotary_factor"] = rotated / size
        if metadata.get("attention.head_count_kv") is None:
            values["num_key_value_heads"] = heads
        if (scaling := rotary_scaling(metadata)) is not None:
            values["rope_scaling"] = scaling
    architecture.more(metadata, values)
    return {key: value for key, value in values.items() if value is not None}


class _Place(NamedTuple):
    """Where a tensor comes from: its name in the file, and what was done to it."""

    name: str
    change: str
    shape: tuple[int, ...]


class GgufWeights(StoredWeights):
    """The tensors of a GGUF file by the names of Hugging Face, with what llama.cpp did to them undone.

    Attributes:
        path: The file.
        entries: Name -> the place of a tensor, with its shape.
        left_out: Names of tensors that are settings, such as factors of rotary positions.

    Args:
        file: The file.
        architecture: Its architecture.
        values: The content of its config.json.
    """

    def __init__(self, file: GgufFile, architecture: Architecture, values: Mapping[str, Any]) -> None:
        self.path = file.path
        self._file = file
        self._heads = {"attn_q": values.get("num_attention_heads"), "attn_k": values.get("num_key_value_heads")}
        self.left_out = [name for name in file if name in (ROPE_FREQUENCIES, *LONG_ROPE.values())]
        entries: dict[str, _Place] = {}
        for name, entry in file.entries.items():
            if name in self.left_out:
                continue
            layer, _, kind = name.rpartition(".")
            part = layer.rpartition(".")[2]
            theirs, number = _hugging_face_name(layer, architecture.names)
            change, shape = "", entry.shape
            if architecture.is_permuted and part in self._heads:
                change = "permuted"
            elif architecture.adds_one and part.endswith("norm") and kind == "weight":
                change = "one more"
            elif architecture.is_transposed and number is not None and len(shape) == 2:
                change, shape = "transposed", shape[::-1]
            entries[f"{theirs}.{kind}" if theirs else name] = _Place(name, change, shape)
        self.entries: Mapping[str, _Place] = entries

    def __getitem__(self, name: str) -> Array:
        place = self.entries[name]
        array = self._file[place.name]
        if place.change == "transposed":
            return array.T
        if place.change == "one more":
            return (array.astype(np.float32) - 1).astype(array.dtype)
        if place.change == "permuted":
            heads = self._heads[place.name.split(".")[-2]]
            if not isinstance(heads, int) or heads < 1 or array.shape[0] % (2 * heads):
                raise WeightsError(f"{self.path}: {place.name} has {array.shape[0]} rows, for {shown(heads)} heads")
            return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        return array

    def spec(self, name: str) -> Spec:
        """Returns the dtype and the shape of an array."""
        place = self.entries[name]
        return Spec(self._file.entries[place.name].dtype, place.shape)


def _hugging_face_name(layer: str, names: Mapping[str, str]) -> tuple[str, str | None]:
    """Returns the name of a layer, empty if it is unknown, and the number of its block."""
    if not (match := re.fullmatch(r"blk\.(\d{1,5})\.(\w+)(?:\.(\d{1,4}))?", layer)):
        return names.get(layer, ""), None
    number, part, expert = match.groups()
    theirs = names.get(f"blk.{{i}}.{part}.{{e}}" if expert else f"blk.{{i}}.{part}", "")
    return theirs.replace("{i}", number).replace("{e}", expert or ""), number
