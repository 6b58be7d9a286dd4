"""Llama and the families with its names of tensors: RMS norms, rotary positions, gated feed-forward networks.

Sources: the classes `LlamaConfig`, `LlamaForCausalLM`, ... of Hugging Face's `transformers` 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from icenet.core.families.family import Family
from icenet.core.families.keys import Activation, Dropout, Key, Only, Part, Values
from icenet.core.families.rotary_keys import Phi3Rotary, Rotary, RotaryLayers, SlidingRotary
from icenet.core.families.tensors import Row
from icenet.core.families.transformer_keys import HeadSize, LayerWindows, ScalarScale, Window

_FIXED = {
    "type": "transformer",
    "causal": True,
    "positions": "rotary",
    "embedding_scale": 1.0,
    "feed_forward": "gated",
    "feed_forward_bias": False,
    "norm": "rms_norm",
    "attention_bias": False,
    "output_bias": False,
}

_BUFFERS = (r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)


def common_parts(
    vocab: int,
    width: int,
    layers: int,
    inner: int,
    positions: int,
    eps: float,
    kv_heads: int | None,
    tied: bool = False,
) -> tuple[Part, ...]:
    """Returns the keys that all families have, with the defaults of one."""
    return (
        Key("vocab_size", "vocab_size", vocab),
        Key("hidden_size", "hidden_size", width),
        Key("num_hidden_layers", "num_layers", layers),
        Key("intermediate_size", "feed_forward_size", inner),
        Key("max_position_embeddings", "max_seq_length", positions),
        Key("rms_norm_eps", "norm_eps", eps),
        Key("num_key_value_heads", "num_kv_heads", kv_heads),
        Key("tie_word_embeddings", "tie_embeddings", tied),
    )


HEADS = Key("num_attention_heads", "num_heads", 32)
BIAS = Key("attention_bias", "attention_bias", False)
SILU = Activation("hidden_act", "silu")

_OUTER = (
    Row("model.embed_tokens", ["token_embedding"]),
    Row("model.norm", ["final_norm"]),
    Row("lm_head", ["output"]),
)
_NORMS = (
    Row("model.layers.{i}.input_layernorm", ["blocks.{i}.attention_norm"]),
    Row("model.layers.{i}.post_attention_layernorm", ["blocks.{i}.feed_forward_norm"]),
)
_QUERY_KEY_NORMS = (
    Row("model.layers.{i}.self_attn.q_norm", ["blocks.{i}.attention.q_norm"]),
    Row("model.layers.{i}.self_attn.k_norm", ["blocks.{i}.attention.k_norm"]),
)
_LINEAR = (
    Row("model.layers.{i}.self_attn.q_proj", ["blocks.{i}.attention.q_proj"]),
    Row("model.layers.{i}.self_attn.k_proj", ["blocks.{i}.attention.k_proj"]),
    Row("model.layers.{i}.self_attn.v_proj", ["blocks.{i}.attention.v_proj"]),
    Row("model.layers.{i}.self_attn.o_proj", ["blocks.{i}.attention.out_proj"]),
    Row("model.layers.{i}.mlp.gate_proj", ["blocks.{i}.feed_forward.gate_proj"]),
    Row("model.layers.{i}.mlp.up_proj", ["blocks.{i}.feed_forward.up_proj"]),
    Row("model.layers.{i}.mlp.down_proj", ["blocks.{i}.feed_forward.down_proj"]),
)


def _family(
    name: str, architecture: str, fixed: dict[str, Any], parts: Sequence[Part], rows: Sequence[Row], **options: Any
) -> Family:
    return Family(
        name, architecture, {**_FIXED, **fixed}, parts, "model.", [*_OUTER, *rows], buffers=_BUFFERS, **options
    )


LLAMA = _family(
    "llama",
    "LlamaForCausalLM",
    {},
    [
        *common_parts(32000, 4096, 32, 11008, 2048, 1e-6, None),
        *(HEADS, HeadSize(), BIAS, Key("mlp_bias", "feed_forward_bias", False), SILU, Rotary()),
        Only("rope_interleaved", False),
    ],
    [*_NORMS, *_LINEAR],
    ignored=frozenset({"pretraining_tp", "is_llama_config"}),  # tensor parallel slices of the same product
    divides_width=True,
)

MISTRAL = _family(
    "mistral",
    "MistralForCausalLM",
    {},
    [*common_parts(32000, 4096, 32, 14336, 131072, 1e-6, 8), HEADS, HeadSize(), SILU, Rotary(), Window(4096)],
    [*_NORMS, *_LINEAR],
)


def _is_after_first(index: int, values: Values) -> bool:
    return index >= (values.whole("max_window_layers", 28, least=0) or 0)


_QWEN_WINDOWS = LayerWindows(4096, _is_after_first, "use_sliding_window", ("max_window_layers",))

QWEN2 = _family(
    "qwen2",
    "Qwen2ForCausalLM",
    {"attention_bias": True, "attention_output_bias": False},
    [
        *common_parts(151936, 4096, 32, 22016, 32768, 1e-6, 32),
        *(HEADS, HeadSize(), SILU, Rotary(), _QWEN_WINDOWS, Only("use_mrope", False)),
    ],
    [*_NORMS, *_LINEAR],
)

QWEN3 = _family(
    "qwen3",
    "Qwen3ForCausalLM",
    {"query_key_norm": "head"},
    [
        *common_parts(151936, 4096, 32, 22016, 32768, 1e-6, 32),
        HEADS,
        HeadSize(128),
        BIAS,
        SILU,
        Rotary(),
        _QWEN_WINDOWS,
    ],
    [*_NORMS, *_LINEAR, *_QUERY_KEY_NORMS],
)

OLMO2 = _family(
    "olmo2",
    "Olmo2ForCausalLM",
    {"query_key_norm": "all", "norm_position": "branch"},
    [*common_parts(50304, 4096, 32, 11008, 2048, 1e-5, None), HEADS, HeadSize(), BIAS, SILU, Rotary()],
    [
        Row("model.layers.{i}.post_attention_layernorm", ["blocks.{i}.attention_norm"]),
        Row("model.layers.{i}.post_feedforward_layernorm", ["blocks.{i}.feed_forward_norm"]),
        *_LINEAR,
        *_QUERY_KEY_NORMS,
    ],
)

GEMMA2 = _family(
    "gemma2",
    "Gemma2ForCausalLM",
    {"norm_offset": True, "norm_position": "sandwich", "embedding_scale": None},
    [
        *common_parts(256000, 2304, 26, 9216, 8192, 1e-6, 4, tied=True),
        *(Key("num_attention_heads", "num_heads", 8), HeadSize(256), BIAS, Rotary()),
        Activation("hidden_activation", "gelu_pytorch_tanh"),
        ScalarScale("query_pre_attn_scalar", 256),
        Key("attn_logit_softcapping", "attention_softcap", 50.0),
        Key("final_logit_softcapping", "logit_softcap", 30.0),
        LayerWindows(4096, lambda index, _: index % 2 == 0),
        Only("use_bidirectional_attention", False),
    ],
    [
        *_LINEAR,
        Row("model.layers.{i}.input_layernorm", ["blocks.{i}.attention_norm"]),
        Row("model.layers.{i}.post_attention_layernorm", ["blocks.{i}.attention_post_norm"]),
        Row("model.layers.{i}.pre_feedforward_layernorm", ["blocks.{i}.feed_forward_norm"]),
        Row("model.layers.{i}.post_feedforward_layernorm", ["blocks.{i}.feed_forward_post_norm"]),
    ],
    ignored=frozenset({"hidden_act"}),  # the library reads hidden_activation
    divides_width=True,
)

_GEMMA3_WINDOWS = LayerWindows(
    4096,
    lambda index, values: (index + 1) % (values.whole("sliding_window_pattern", 6) or 6) != 0,
    pattern="sliding_window_pattern",
)

GEMMA3 = _family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    {"norm_offset": True, "norm_position": "sandwich", "embedding_scale": None, "query_key_norm": "head"},
    [
        *common_parts(262208, 2304, 26, 9216, 131072, 1e-6, 4, tied=True),
        *(Key("num_attention_heads", "num_heads", 8), HeadSize(256), BIAS),
        *(SlidingRotary(windows=_GEMMA3_WINDOWS), _GEMMA3_WINDOWS),
        Activation("hidden_activation", "gelu_pytorch_tanh"),
        ScalarScale("query_pre_attn_scalar", 256),
        Key("final_logit_softcapping", "logit_softcap", None),
        Only("attn_logit_softcapping", None),  # the library does not apply it
        Only("use_bidirectional_attention", False),
    ],
    [*GEMMA2.rows[len(_OUTER) :], *_QUERY_KEY_NORMS],
    ignored=frozenset({"hidden_act"}),  # the library reads hidden_activation
    divides_width=True,
)


def _lacks_rotary(index: int, values: Values) -> bool:
    return index not in RotaryLayers().read(values)["rotary_layers"]


SMOLLM3 = _family(
    "smollm3",
    "SmolLM3ForCausalLM",
    {},
    [
        *common_parts(128256, 2048, 36, 11008, 32768, 1e-6, 4, tied=True),
        *(Key("num_attention_heads", "num_heads", 16), HeadSize(), BIAS, SILU, Rotary(theta=2000000.0)),
        *(Key("mlp_bias", "feed_forward_bias", False), RotaryLayers()),
        LayerWindows(None, _lacks_rotary, "use_sliding_window"),
    ],
    [*_NORMS, *_LINEAR],
    ignored=frozenset({"max_window_layers", "pretraining_tp"}),  # which the library does not read
)

PHI3 = _family(
    "phi3",
    "Phi3ForCausalLM",
    {},
    [
        *common_parts(32064, 3072, 32, 8192, 4096, 1e-5, None),
        *(HEADS, HeadSize(), SILU, Phi3Rotary(fraction_key="partial_rotary_factor"), Window(None)),
        Dropout(("resid_pdrop", "embd_pdrop"), 0.0),
        *(Only(name, False) for name in ("attention_bias", "mlp_bias", "lm_head_bias")),
    ],
    [
        *_NORMS,
        Row("model.layers.{i}.self_attn.qkv_proj", [f"blocks.{{i}}.attention.{part}_proj" for part in "qkv"]),
        Row("model.layers.{i}.self_attn.o_proj", ["blocks.{i}.attention.out_proj"]),
        Row(
            "model.layers.{i}.mlp.gate_up_proj",
            ["blocks.{i}.feed_forward.gate_proj", "blocks.{i}.feed_forward.up_proj"],
        ),
        Row("model.layers.{i}.mlp.down_proj", ["blocks.{i}.feed_forward.down_proj"]),
    ],
    ignored=frozenset({"full_attn_mod", "interpolate_factor"}),  # which the library does not read
)
