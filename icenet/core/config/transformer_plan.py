"""The parts of a transformer: sizes and options of each block, derived from its configuration.

The blocks of both backends take these values and not the configuration, so that other models can use them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from icenet.core.config.rotary_scaling import RotaryScaling

if TYPE_CHECKING:
    from icenet.core.config.model import TransformerConfig

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
FeedForward = Literal["plain", "gated"]
LayerType = Literal["full", "sliding"]
Norm = Literal["layer_norm", "rms_norm"]
NormPosition = Literal["pre", "post", "sandwich", "branch"]
Output = Literal["linear", "transform", "none"]
Positions = Literal["sinusoidal", "learned", "rotary", "none"]
QueryKeyNorm = Literal["none", "head", "all"]
RotaryPairs = Literal["half", "interleaved"]


class NormPlan(NamedTuple):
    """A normalization layer without its width."""

    kind: Norm = "layer_norm"
    eps: float = 1e-5
    offset: bool = False
    """Whether an RMS norm multiplies by 1 + weight."""


class RotaryPlan(NamedTuple):
    """The angles of rotary positions."""

    size: int
    """Number of values of a head that are rotated."""
    theta: float = 10000.0
    scaling: RotaryScaling | None = None


class AttentionPlan(NamedTuple):
    """An attention layer. Its input and output have `width` values."""

    width: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    bias: bool = True
    output_bias: bool = True
    scale: float | None = None
    """Factor of the scores; None is 1 / sqrt(head_size)."""
    softcap: float | None = None
    query_key_norm: QueryKeyNorm = "none"
    norm: NormPlan = NormPlan()
    """Norm of queries and keys."""
    rotary: LayerType | None = None
    """Type of layers whose angles it takes (see `rotary_plans`); None: it has no rotary positions."""
    rotary_pairs: RotaryPairs = "half"
    window: int | None = None
    """Number of tokens that a token attends to, itself included; None: all."""
    dropout: float = 0.0
    init_scale: float = 1.0
    """Factor of the initial values of the output projection."""


class ExpertsPlan(NamedTuple):
    """The experts of a mixture: feed-forward networks of which each token uses those that a router scores highest."""

    total: int
    per_token: int
    normalize: bool = True
    """Whether the weights of the experts of a token add up to 1."""


class FeedForwardPlan(NamedTuple):
    """A feed-forward network, or each expert of a mixture."""

    width: int
    inner: int
    activation: Activation = "gelu"
    is_gated: bool = False
    bias: bool = True
    dropout: float = 0.0
    init_scale: float = 1.0
    """Factor of the initial values of the last projection."""
    experts: ExpertsPlan | None = None


class BlockPlan(NamedTuple):
    """A block: attention and feed-forward network, and the place of their norms."""

    attention: AttentionPlan
    feed_forward: FeedForwardPlan
    norm: NormPlan = NormPlan()
    norm_position: NormPosition = "pre"
    parallel: bool = False


def blocks(config: TransformerConfig) -> list[BlockPlan]:
    """Returns the plan of each block."""
    width, heads = config.hidden_size, config.num_heads
    init_scale = (2 * config.num_layers) ** -0.5
    kinds = layer_types(config)
    output_bias = config.attention_bias if config.attention_output_bias is None else config.attention_output_bias
    attention = AttentionPlan(
        width=width,
        num_heads=heads,
        num_kv_heads=config.num_kv_heads or heads,
        head_size=head_size(config),
        bias=config.attention_bias,
        output_bias=output_bias,
        scale=config.attention_scale,
        softcap=config.attention_softcap,
        query_key_norm=config.query_key_norm,
        norm=NormPlan("rms_norm", config.norm_eps, config.norm_offset),
        rotary_pairs=config.rotary_pairs,
        dropout=config.dropout,
        init_scale=init_scale,
    )
    feed_forward = FeedForwardPlan(
        width=width,
        inner=config.feed_forward_size or config.feed_forward_multiplier * width,
        activation=config.activation,
        is_gated=config.feed_forward == "gated",
        bias=config.feed_forward_bias,
        dropout=config.dropout,
        init_scale=init_scale,
    )
    sparse = set(expert_layers(config))
    rotary = rotary_types(config)
    return [
        BlockPlan(
            attention._replace(window=config.sliding_window if kind == "sliding" else None, rotary=rotary[index]),
            experts(config, feed_forward) if index in sparse else feed_forward,
            norm(config),
            config.norm_position,
            config.parallel_residual,
        )
        for index, kind in enumerate(kinds)
    ]


def layer_types(config: TransformerConfig) -> list[LayerType]:
    """Returns whether each block has the window, if there is one."""
    return config.layer_types or ["sliding"] * config.num_layers


def rotary_types(config: TransformerConfig) -> list[LayerType | None]:
    """Returns the type of layers whose angles each block takes, a key of `rotary_plans`; None without rotation."""
    if config.positions != "rotary":
        return [None] * config.num_layers
    layers = range(config.num_layers) if config.rotary_layers is None else config.rotary_layers
    kinds: list[LayerType] = ["full"] * config.num_layers
    if config.sliding_rotary_theta is not None:
        kinds = layer_types(config)
    return [kind if index in layers else None for index, kind in enumerate(kinds)]


def rotary_plans(config: TransformerConfig) -> dict[LayerType, RotaryPlan]:
    """Returns the angles of rotary positions: `full` for all layers, or `sliding` for sliding ones if they differ."""
    size, used = rotary_size(config), rotary_types(config)
    plans: dict[LayerType, RotaryPlan] = {"full": RotaryPlan(size, config.rotary_theta, config.rotary_scaling)}
    if config.sliding_rotary_theta is not None:
        plans["sliding"] = RotaryPlan(size, config.sliding_rotary_theta)
    return {kind: plan for kind, plan in plans.items() if kind in used}


def experts(config: TransformerConfig, feed_forward: FeedForwardPlan) -> FeedForwardPlan:
    """Returns the plan of a mixture of experts, from that of a feed-forward network."""
    plan = ExpertsPlan(config.num_experts or 1, config.experts_per_token, config.normalize_expert_weights)
    return feed_forward._replace(inner=config.expert_size or feed_forward.inner, experts=plan)


def expert_layers(config: TransformerConfig) -> list[int]:
    """Returns the indices of the layers with experts."""
    if config.num_experts is None:
        return []
    return list(range(config.num_layers)) if config.expert_layers is None else config.expert_layers


def norm(config: TransformerConfig) -> NormPlan:
    """Returns the plan of the norms of blocks and of the final norm."""
    return NormPlan(config.norm, config.norm_eps, config.norm_offset)


def head_size(config: TransformerConfig) -> int:
    """Returns the width of an attention head."""
    return config.head_size or config.hidden_size // config.num_heads


def rotary_size(config: TransformerConfig) -> int:
    """Returns how many values of a head are rotated."""
    return int(head_size(config) * config.rotary_fraction)


def _check_rotary(config: TransformerConfig) -> None:
    """Raises ValueError if options of rotary positions contradict each other."""
    for name in ("rotary_scaling", "sliding_rotary_theta", "rotary_layers"):
        if getattr(config, name) is not None and config.positions != "rotary":
            raise ValueError(f"{name} is for positions: rotary")
    layers = config.rotary_layers
    if layers and (layers != sorted(set(layers)) or layers[-1] >= config.num_layers):
        raise ValueError(
            f"rotary_layers {layers} are not indices of layers, from 0 to {config.num_layers - 1} in ascending order"
        )
    is_sliding = config.sliding_window is not None and "sliding" in layer_types(config)
    if config.sliding_rotary_theta is not None and not is_sliding:
        raise ValueError("sliding_rotary_theta is for sliding layers, which need sliding_window")
    if (scaling := config.rotary_scaling) is None:
        return
    pairs = rotary_size(config) // 2
    if scaling.type == "dynamic" and pairs < 2:
        raise ValueError(f"rotary_scaling of type dynamic needs at least 4 rotated values of a head, not {2 * pairs}")
    for name in ("short_factors", "long_factors"):
        if scaling.type == "longrope" and len(factors := getattr(scaling, name)) != pairs:
            raise ValueError(f"rotary_scaling.{name} has {len(factors)} factors, and a head {pairs} rotated pairs")


def _check_experts(config: TransformerConfig) -> None:
    """Raises ValueError if options of experts contradict each other."""
    if config.num_experts is None:
        unused = {
            "experts_per_token": 2,
            "expert_size": None,
            "expert_layers": None,
            "normalize_expert_weights": True,
            "router_aux_loss_coef": 0.0,
        }
        for name, default in unused.items():
            if getattr(config, name) != default:
                raise ValueError(f"{name} needs num_experts")
        return
    if config.experts_per_token > config.num_experts:
        raise ValueError(
            f"experts_per_token {config.experts_per_token} is more than num_experts {config.num_experts}"
        )
    layers = config.expert_layers
    if layers is not None and (not layers or layers != sorted(set(layers)) or layers[-1] >= config.num_layers):
        raise ValueError(
            f"expert_layers {layers} are not indices of layers, from 0 to {config.num_layers - 1} in ascending order"
        )


def check(config: TransformerConfig) -> None:
    """Raises ValueError if options contradict each other."""
    heads, width = config.num_heads, config.hidden_size
    if config.head_size is None and width % heads:
        raise ValueError(f"hidden_size {width} is not a multiple of num_heads {heads}; or give head_size")
    if heads % (config.num_kv_heads or heads):
        raise ValueError(f"num_heads {heads} is not a multiple of num_kv_heads {config.num_kv_heads}")
    if config.positions == "sinusoidal" and width % 2:
        raise ValueError(f"hidden_size {width} is odd: sinusoidal positions come in pairs")
    if config.positions == "rotary" and (rotary_size(config) % 2 or rotary_size(config) == 0):
        raise ValueError(
            f"rotary positions come in pairs: rotary_fraction {config.rotary_fraction} of a head of "
            f"{head_size(config)} is {rotary_size(config)}"
        )
    _check_rotary(config)
    if config.layer_types is not None:
        if len(config.layer_types) != config.num_layers:
            raise ValueError(
                f"layer_types has {len(config.layer_types)} layers and num_layers is {config.num_layers}"
            )
        if config.sliding_window is None and "sliding" in config.layer_types:
            raise ValueError("layer_types has sliding layers, which need sliding_window")
    if config.sliding_window is not None and not config.causal:
        raise ValueError("sliding_window needs causal: true")
    _check_experts(config)
    if config.norm_offset and config.norm != "rms_norm":
        raise ValueError("norm_offset is for norm: rms_norm")
    if config.parallel_residual and config.norm_position != "pre":
        raise ValueError(f"parallel_residual needs norm_position: pre, not {config.norm_position}")
    if config.position_offset and config.positions != "learned":
        raise ValueError(f"position_offset is for positions: learned, not {config.positions}")
    if (buckets := config.relative_buckets) is not None:
        if config.causal:
            raise ValueError("relative_buckets needs causal: false")
        if buckets % 4 or config.relative_max_distance <= buckets // 4:
            raise ValueError(
                f"relative_buckets {buckets} must be a multiple of 4, and relative_max_distance "
                f"{config.relative_max_distance} more than a quarter of them"
            )
    if config.output == "none":
        for name in ("tie_embeddings", "output_bias", "logit_softcap"):
            if getattr(config, name):
                raise ValueError(f"{name} is for output: linear or transform; output none has no logits")
