"""GPT-2 and GPT-NeoX: layer norms, biases, plain feed-forward networks, queries, keys and values in one tensor.

Sources: the classes `GPT2Config`, `GPT2LMHeadModel`, `GPTNeoXConfig` and `GPTNeoXForCausalLM` of Hugging Face's
`transformers` 5, and `mlx_lm.models.gpt2` and `gpt_neox` of mlx-lm for the names of its folders.
"""

from __future__ import annotations

from icenet.core.families.family import Family
from icenet.core.families.keys import Activation, Dropout, Key, Only, Repeated
from icenet.core.families.rotary_keys import Rotary
from icenet.core.families.tensors import Row
from icenet.core.families.transformer_keys import IsScaled

_QKV = tuple(f"blocks.{{i}}.attention.{part}_proj" for part in "qkv")
_FIXED = {
    "type": "transformer",
    "causal": True,
    "embedding_scale": 1.0,
    "output_bias": False,
    "norm": "layer_norm",
    "feed_forward": "plain",
}


def _gpt2_rows(prefix: str, is_transposed: bool) -> list[Row]:
    """Returns the rows of GPT-2 with a prefix of the names. Projections of `transformers` have the axes (in, out)."""
    block = f"{prefix}.h.{{i}}"
    return [
        Row(f"{prefix}.wte", ["token_embedding"]),
        Row(f"{prefix}.wpe", ["position_embedding"]),
        Row(f"{block}.ln_1", ["blocks.{i}.attention_norm"]),
        Row(f"{block}.attn.c_attn", _QKV, is_transposed),
        Row(f"{block}.attn.c_proj", ["blocks.{i}.attention.out_proj"], is_transposed),
        Row(f"{block}.ln_2", ["blocks.{i}.feed_forward_norm"]),
        Row(f"{block}.mlp.c_fc", ["blocks.{i}.feed_forward.up_proj"], is_transposed),
        Row(f"{block}.mlp.c_proj", ["blocks.{i}.feed_forward.down_proj"], is_transposed),
        Row(f"{prefix}.ln_f", ["final_norm"]),
    ]


GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    {**_FIXED, "positions": "learned"},
    [
        Key("vocab_size", "vocab_size", 50257),
        Key("n_embd", "hidden_size", 768),
        Key("n_layer", "num_layers", 12),
        Key("n_head", "num_heads", 12),
        Key("n_positions", "max_seq_length", 1024),
        Repeated("n_ctx", "max_seq_length"),  # required by mlx-lm
        Key("n_inner", "feed_forward_size", None),
        Key("layer_norm_epsilon", "norm_eps", 1e-5),
        Key("tie_word_embeddings", "tie_embeddings", True),
        Activation("activation_function", "gelu_new", {"gelu_tanh": "gelu_new"}),
        Dropout(("resid_pdrop", "embd_pdrop"), 0.1),
        IsScaled("scale_attn_weights"),
        Only("scale_attn_by_inverse_layer_idx", False),
    ],
    "transformer.",
    [
        *_gpt2_rows("transformer", is_transposed=True),
        Row("lm_head", ["output"]),
    ],
    alternatives=[_gpt2_rows("model", is_transposed=False)],  # of mlx-lm
    buffers=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
    ignored=frozenset({"reorder_and_upcast_attn"}),  # about half precision
    divides_width=True,
)


def _neox_rows(prefix: str, blocks: str) -> list[Row]:
    """Returns the rows of GPT-NeoX without its head, with a prefix of the names and the name of the blocks."""
    block = f"{blocks}.{{i}}"
    return [
        Row(f"{prefix}.embed_in", ["token_embedding"]),
        Row(f"{block}.input_layernorm", ["blocks.{i}.attention_norm"]),
        Row(f"{block}.attention.query_key_value", _QKV, is_per_head=True),
        Row(f"{block}.attention.dense", ["blocks.{i}.attention.out_proj"]),
        Row(f"{block}.post_attention_layernorm", ["blocks.{i}.feed_forward_norm"]),
        Row(f"{block}.mlp.dense_h_to_4h", ["blocks.{i}.feed_forward.up_proj"]),
        Row(f"{block}.mlp.dense_4h_to_h", ["blocks.{i}.feed_forward.down_proj"]),
        Row(f"{prefix}.final_layer_norm", ["final_norm"]),
    ]


GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    {**_FIXED, "positions": "rotary"},
    [
        Key("vocab_size", "vocab_size", 50432),
        Key("hidden_size", "hidden_size", 6144),
        Key("num_hidden_layers", "num_layers", 44),
        Key("num_attention_heads", "num_heads", 64),
        Key("intermediate_size", "feed_forward_size", 24576),
        Key("max_position_embeddings", "max_seq_length", 2048),
        Key("layer_norm_eps", "norm_eps", 1e-5),
        Key("tie_word_embeddings", "tie_embeddings", False),
        Key("use_parallel_residual", "parallel_residual", True),
        Key("attention_bias", "attention_bias", True),
        Activation("hidden_act", "gelu"),
        Dropout(("hidden_dropout",), 0.0),
        Rotary("rotary_emb_base", "rotary_pct", 0.25),
    ],
    "gpt_neox.",
    [
        *_neox_rows("gpt_neox", "gpt_neox.layers"),
        Row("embed_out", ["output"]),
    ],
    head="embed_out.weight",
    alternatives=[[*_neox_rows("model", "model.h"), Row("model.embed_out", ["output"])]],  # of mlx-lm
    buffers=(r"(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    ignored=frozenset({"is_decoder"}),
    divides_width=True,
)
