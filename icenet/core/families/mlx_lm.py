"""What mlx-lm 0.32 computes in another way than `transformers`, or cannot load, of the families that it has.

Source: the classes of `mlx_lm.models`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from icenet.core.config import TransformerConfig
from icenet.core.families.family import Family
from icenet.core.families.transformer_keys import period_of
from icenet.core.nn.rotary import attention_factor

_HEADS_OF_WIDTH = ("mixtral", "qwen2", "phi3", "gpt2", "gpt_neox")
_FOUR_TIMES = ("gpt2", "gpt_neox")
"""Families for which mlx-lm ignores a size of a head, and one of the feed-forward network."""
_WITHOUT_BIAS = ("qwen3", "qwen3_moe", "gemma2", "gemma3_text")
"""Families whose projections have no biases in mlx-lm."""
_ACTIVATIONS = dict.fromkeys(("gemma2", "gemma3_text", "gpt2", "gpt_neox"), "gelu_tanh")
"""The only activation of a family in mlx-lm; that of the others is silu."""


def differences(family: Family, config: TransformerConfig) -> list[str]:
    """Returns what mlx-lm computes in another way, or cannot load, of an exported model; one text for each."""
    options, name, width = family.options(config), family.model_type, config.hidden_size
    lacks: list[str] = []
    if name in _HEADS_OF_WIDTH and options["head_size"] != width // config.num_heads:
        lacks.append(f"its heads have hidden_size / num_heads = {width // config.num_heads}")
    if name in _FOUR_TIMES and options["feed_forward_size"] != 4 * width:
        lacks.append(f"its feed_forward_size is 4 x hidden_size = {4 * width}")
    if name in _WITHOUT_BIAS and config.attention_bias:
        lacks.append("its attention has no biases")
    if name == "gpt_neox" and not config.attention_bias:
        lacks.append("its attention has biases")
    if name == "gpt2" and not config.tie_embeddings:
        lacks.append("its GPT-2 has tied embeddings")
    if name == "gpt_neox" and config.tie_embeddings:
        lacks.append("its GPT-NeoX has an output projection of its own")
    if name == "gemma2" and not (config.attention_softcap and config.logit_softcap):
        lacks.append("its Gemma 2 needs attention_softcap and logit_softcap")
    return [*(f"mlx-lm cannot load it: {text}" for text in lacks), *_windows(name, config, options["windows"])] + [
        f"mlx-lm {text}" for text in _numbers(name, config, options)
    ]


def _windows(name: str, config: TransformerConfig, layers: list[int | None]) -> list[str]:
    windows = [window for window in layers if window is not None and window < config.max_seq_length]
    if not windows or (name == "smollm3" and None in layers):
        return []
    if name != "gemma3_text":
        return [f"mlx-lm uses no sliding window: texts of more than {min(windows)} tokens differ there"]
    if period_of(layers) is None:
        return ["mlx-lm cannot load it: its Gemma 3 needs layers without a window at regular intervals"]
    return []


def _numbers(name: str, config: TransformerConfig, options: Mapping[str, Any]) -> list[str]:
    """Returns differences of numbers, each as the end of a sentence."""
    found = []
    if config.activation != (only := _ACTIVATIONS.get(name, "silu")):
        found.append(f"computes {only} in place of {config.activation}")
    if options["attention_scale"] != options["head_size"] ** -0.5 and name == "gpt2":
        found.append("scales the scores of attention")
    if name == "gemma3_text" and config.logit_softcap is not None:
        found.append("has no logit_softcap in Gemma 3")
    if name == "gemma3_text" and _in_bfloat16(width := config.hidden_size) != width**0.5:
        found.append("rounds the scale of Gemma 3's embedding to bfloat16")
    scaling = config.rotary_scaling
    if scaling is not None and scaling.type == "longrope":
        found.append("uses the long factors of rotary positions for short texts too")
    if scaling is not None and scaling.attention_factor is not None:
        plain = scaling.model_copy(update={"attention_factor": None})
        if scaling.attention_factor != attention_factor(plain):
            found.append("ignores attention_factor of rotary positions")
    return found


def _in_bfloat16(width: int) -> float:
    """Returns the square root of a width as mlx-lm rounds it."""
    return float(np.float32(width**0.5).astype(ml_dtypes.bfloat16))
