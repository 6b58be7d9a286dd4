"""Mixtral and Qwen3-MoE: Mistral and Qwen3 with mixtures of experts.

Sources: the classes `MixtralConfig`, `MixtralForCausalLM`, `Qwen3MoeConfig` and `Qwen3MoeForCausalLM` of Hugging
Face's `transformers` 5, and `mlx_lm.models.mixtral` and `qwen3_moe` of mlx-lm for the names of its folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from icenet.core.errors import ConfigError
from icenet.core.families import llama
from icenet.core.families.keys import Key, Only, Options, Repeated, Values, shown
from icenet.core.families.rotary_keys import Rotary
from icenet.core.families.tensors import Row
from icenet.core.families.transformer_keys import MAX_LAYERS, HeadSize, Window

_IGNORED = frozenset({"router_jitter_noise"})
"""A key of training: noise at the input of the router."""

_OURS = "blocks.{i}.feed_forward"


@dataclass(frozen=True)
class SwitchedWindow(Window):
    """`sliding_window` of all layers, if `use_sliding_window` is true."""

    @property
    def keys(self) -> Sequence[str]:
        return ("sliding_window", "use_sliding_window")

    def read(self, values: Values) -> dict[str, Any]:
        return super().read(values) if values.flag("use_sliding_window", False) else {"sliding_window": None}

    def write(self, options: Options) -> dict[str, Any]:
        written = super().write(options)
        return {**written, "use_sliding_window": written["sliding_window"] is not None}


@dataclass(frozen=True)
class RouterLoss:
    """`router_aux_loss_coef`, which the library uses if `output_router_logits` is true."""

    @property
    def keys(self) -> Sequence[str]:
        return ("output_router_logits", "router_aux_loss_coef")

    def read(self, values: Values) -> dict[str, Any]:
        has_loss = values.flag("output_router_logits", False)
        return {"router_aux_loss_coef": values.number("router_aux_loss_coef", 0.001) if has_loss else 0.0}

    def write(self, options: Options) -> dict[str, Any]:
        factor = options["router_aux_loss_coef"]
        return {"output_router_logits": True, "router_aux_loss_coef": factor} if factor else {}


_ROUTER_LOSS = RouterLoss()


@dataclass(frozen=True)
class SparseLayers:
    """Sizes of experts, and the layers that have them: each `decoder_sparse_step`-th, without `mlp_only_layers`."""

    count: int
    per_token: int
    size: int

    @property
    def keys(self) -> Sequence[str]:
        sizes = ("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
        return (*sizes, "decoder_sparse_step", "mlp_only_layers", *_ROUTER_LOSS.keys)

    def read(self, values: Values) -> dict[str, Any]:
        # the library writes num_local_experts and reads both
        count = values.whole("num_experts", values.whole("num_local_experts", self.count, least=0), least=0)
        step = values.whole("decoder_sparse_step", 1) or 1
        dense = values.get("mlp_only_layers") or []
        if not isinstance(dense, list) or not all(type(index) is int for index in dense):
            raise ConfigError(f"mlp_only_layers: {shown(dense)} is not a list of whole numbers")
        layers = range(values.whole("num_hidden_layers", None, MAX_LAYERS) or 0)
        sparse = [index for index in layers if index not in dense and (index + 1) % step == 0]
        if not count or not sparse:
            return {}
        return {
            "num_experts": count,
            "experts_per_token": values.whole("num_experts_per_tok", self.per_token),
            "expert_size": values.whole("moe_intermediate_size", self.size),
            "expert_layers": None if len(sparse) == len(layers) else sparse,
            "normalize_expert_weights": values.flag("norm_topk_prob", False),
            **_ROUTER_LOSS.read(values),
        }

    def write(self, options: Options) -> dict[str, Any]:
        sparse = options["expert_layers"] or []
        return {
            "num_experts": options["num_experts"] or 0,  # the name that mlx-lm reads
            "num_local_experts": options["num_experts"] or 0,
            "num_experts_per_tok": options["experts_per_token"],
            "moe_intermediate_size": options["expert_size"] or self.size,
            "norm_topk_prob": options["normalize_expert_weights"],
            "decoder_sparse_step": 1,
            "mlp_only_layers": [index for index in range(options["num_layers"]) if index not in sparse],
            **_ROUTER_LOSS.write(options),
        }


def _stacked(prefix: str) -> list[Row]:
    """Returns the rows of mlx-lm, which stacks the weights of the experts as we do."""
    return [
        Row(f"{prefix}.switch_mlp.{name}", [f"{_OURS}.experts.{name}"])
        for name in ("gate_proj", "up_proj", "down_proj")
    ]


_FUSED = [
    Row("model.layers.{i}.mlp.gate", [f"{_OURS}.router"]),
    Row(
        "model.layers.{i}.mlp.experts.gate_up_proj",
        [f"{_OURS}.experts.gate_proj", f"{_OURS}.experts.up_proj"],
        is_fused=True,
    ),
    Row("model.layers.{i}.mlp.experts.down_proj", [f"{_OURS}.experts.down_proj"], is_fused=True),
]
"""Names in the memory of `transformers` 5, which it writes with `save_original_format=False`."""

MIXTRAL = replace(
    llama.MISTRAL,
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    parts=[
        *llama.common_parts(32000, 4096, 32, 14336, 131072, 1e-5, 8),
        Key("num_local_experts", "num_experts", 8),
        Key("num_experts_per_tok", "experts_per_token", 2),
        _ROUTER_LOSS,
        *(llama.HEADS, HeadSize(), llama.SILU, Rotary(theta=1e6), Window(None), Only("attention_bias", False)),
    ],
    rows=[
        *llama.MISTRAL.rows,
        Row("model.layers.{i}.block_sparse_moe.gate", [f"{_OURS}.router"]),
        Row("model.layers.{i}.block_sparse_moe.experts.{e}.w1", [f"{_OURS}.experts.gate_proj"]),
        Row("model.layers.{i}.block_sparse_moe.experts.{e}.w3", [f"{_OURS}.experts.up_proj"]),
        Row("model.layers.{i}.block_sparse_moe.experts.{e}.w2", [f"{_OURS}.experts.down_proj"]),
    ],
    alternatives=[_FUSED, _stacked("model.layers.{i}.block_sparse_moe")],
    ignored=_IGNORED,
)

QWEN3_MOE = replace(
    llama.QWEN3,
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    parts=[
        *llama.common_parts(151936, 2048, 24, 6144, 32768, 1e-6, 4),
        SparseLayers(128, 8, 768),
        *(llama.HEADS, HeadSize(), llama.BIAS, llama.SILU, Rotary(), SwitchedWindow(4096)),
        *(Repeated("head_dim", "head_size"), Only("use_mrope", False)),  # mlx-lm requires head_dim
    ],
    rows=[
        *llama.QWEN3.rows,
        Row("model.layers.{i}.mlp.gate", [f"{_OURS}.router"]),
        Row("model.layers.{i}.mlp.experts.{e}.gate_proj", [f"{_OURS}.experts.gate_proj"]),
        Row("model.layers.{i}.mlp.experts.{e}.up_proj", [f"{_OURS}.experts.up_proj"]),
        Row("model.layers.{i}.mlp.experts.{e}.down_proj", [f"{_OURS}.experts.down_proj"]),
    ],
    alternatives=[_FUSED, _stacked("model.layers.{i}.mlp")],
    ignored=_IGNORED | {"max_window_layers"},  # the library gives all layers the window
)
