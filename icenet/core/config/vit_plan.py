"""The parts of a vision transformer, derived from its configuration: positions, and the plan of its blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from icenet.core.config.transformer_plan import AttentionPlan, BlockPlan, FeedForwardPlan, NormPlan

if TYPE_CHECKING:
    from icenet.core.config.model import ViTConfig

Pooling = Literal["token", "mean"]
Distillation = Literal["none", "token", "classifier"]


def blocks(config: ViTConfig) -> list[BlockPlan]:
    """Returns the plan of each block."""
    width, init_scale = config.hidden_size, (2 * config.num_layers) ** -0.5
    attention = AttentionPlan(
        width=width,
        num_heads=config.num_heads,
        num_kv_heads=config.num_heads,
        head_size=head_size(config),
        bias=config.attention_bias,
        dropout=config.dropout,
        init_scale=init_scale,
    )
    feed_forward = FeedForwardPlan(
        width=width,
        inner=config.feed_forward_size or 4 * width,
        activation=config.activation,
        dropout=config.dropout,
        init_scale=init_scale,
    )
    return [BlockPlan(attention, feed_forward, norm(config))] * config.num_layers


def norm(config: ViTConfig) -> NormPlan:
    """Returns the plan of the norms of blocks and of the final norm."""
    return NormPlan("layer_norm", config.norm_eps)


def head_size(config: ViTConfig) -> int:
    """Returns the width of an attention head."""
    return config.head_size or config.hidden_size // config.num_heads


def num_positions(config: ViTConfig) -> int:
    """Returns the number of patches, the class token and the distillation token."""
    height, width = (length // config.patch_size for length in image_shape(config))
    return height * width + (config.pooling == "token") + (config.distillation != "none")


def image_shape(config: ViTConfig) -> tuple[int, int]:
    """Returns the height and width of the images."""
    size = config.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def size_problem(config: ViTConfig, height: int, width: int) -> str:
    """Returns why a size of images does not fit; an empty text if it is that of the model."""
    own = image_shape(config)
    if (height, width) == own:
        return ""
    return (
        f"images of {height}x{width} do not fit the learned positions of this model, which are those of "
        f"{own[0]}x{own[1]} (model.image_size)"
    )


def check(config: ViTConfig) -> None:
    """Raises ValueError if options contradict each other."""
    if config.patch_size > min(image_shape(config)):
        raise ValueError(f"patch_size {config.patch_size} is larger than image_size {config.image_size}")
    if config.distillation != "none" and config.pooling != "token":
        raise ValueError(
            f"distillation {config.distillation} needs pooling token: its token is next to a class token"
        )
    if config.head_size is None and config.hidden_size % config.num_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is not a multiple of num_heads {config.num_heads}; or give head_size"
        )
