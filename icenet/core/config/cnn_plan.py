"""The stages of a convolutional network: which block stands where, what it reads and what it gives.

    stem -> stage 0 -> stage 1 (half the resolution, twice the channels) -> ... -> average over the image

The rules of a configuration that names no stages of its own:

    stages    up to four, base_channels * 1, 2, 4, 8 wide; each after the first begins with a stride of 2
    blocks    num_layers over the stages, one each; what is left goes to the first two in turn (5: 2 1 1 1,
              6: 2 2 1 1, 8: 3 3 1 1), where resolution is high and weights are few
    kinds     conv and basic blocks in turn, so that the last is a residual one

With them depth costs little beside width, as in the model guide's table, where two layers more and twice the
channels come to four times the parameters.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from icenet.core.errors import UsageError

EXPANSION = 4
"""What leaves a bottleneck block, in units of its inner width (He et al., 2015)."""


class CNNFields(Protocol):
    """The fields of a configuration that decide the plan; see `icenet.core.config.CNNConfig`."""

    @property
    def num_layers(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def base_channels(self) -> int: ...

    @property
    def image_channels(self) -> int: ...

    @property
    def block(self) -> str: ...

    @property
    def stem(self) -> str: ...

    @property
    def classifier(self) -> str: ...

    @property
    def stage_depths(self) -> list[int] | None: ...

    @property
    def stage_widths(self) -> list[int] | None: ...


class Block(NamedTuple):
    """One block: conv, basic or bottleneck; the channels it reads and gives; its stride."""

    kind: str
    inputs: int
    outputs: int
    stride: int


def depths(config: CNNFields) -> list[int]:
    """Blocks of each stage."""
    if config.stage_depths is not None:
        return config.stage_depths
    found = [1] * min(config.num_layers, 4)
    for extra in range(config.num_layers - len(found)):
        found[extra % 2] += 1
    return found


def widths(config: CNNFields) -> list[int]:
    """Channels of each stage."""
    return config.stage_widths or [config.base_channels * 2**stage for stage in range(len(depths(config)))]


def blocks(config: CNNFields) -> list[Block]:
    """All blocks, in order."""
    found: list[Block] = []
    channels, total = config.base_channels, sum(depths(config))
    for stage, (depth, width) in enumerate(zip(depths(config), widths(config), strict=True)):
        outputs = EXPANSION * width if config.block == "bottleneck" else width
        for index in range(depth):
            kind = config.block
            if kind == "alternating":
                kind = "basic" if (total - len(found)) % 2 else "conv"
            found.append(Block(kind, channels, outputs, stride=2 if stage > 0 and index == 0 else 1))
            channels = outputs
    return found


def min_image_size(config: CNNFields) -> int:
    """The least height and width: every halving of the resolution has two pixels to halve."""
    halvings = len(depths(config)) - 1 + (2 if config.stem == "conv7" else 0)
    return 2 ** (halvings - 1) + 1 if halvings else 1


def check(config: CNNFields) -> None:
    """Refuses stages that contradict each other; ValueError, for the configuration to explain."""
    if config.stage_depths is not None:
        total = sum(config.stage_depths)
        if not config.stage_depths:
            raise ValueError("stage_depths is empty; name the blocks of at least one stage, or leave it out")
        if total != config.num_layers:
            raise ValueError(
                f"stage_depths {config.stage_depths} come to {total} blocks and num_layers is {config.num_layers}; "
                f"set num_layers to {total}"
            )
    if config.stage_widths is not None and len(config.stage_widths) != len(depths(config)):
        raise ValueError(
            f"stage_widths {config.stage_widths} has {len(config.stage_widths)} stages and there are "
            f"{len(depths(config))} (stage_depths {depths(config)})"
        )
    last = blocks(config)[-1].outputs
    if config.classifier == "linear" and config.hidden_size != last:
        raise ValueError(
            f"hidden_size {config.hidden_size} is not the {last} channels of the last stage, "
            f"which classifier linear reads; set hidden_size to {last}, or classifier to hidden"
        )


def check_images(config: CNNFields, shape: tuple[int, ...], channel_axis: int) -> None:
    """Refuses images, of `shape` [B, H, W, C] or [B, C, H, W], that the network cannot read.

    Raises:
        UsageError: not four axes, other channels than the configuration's, or too small for the strides.
    """
    layout = "[batch, channels, height, width]" if channel_axis == 1 else "[batch, height, width, channels]"
    if len(shape) != 4:
        raise UsageError(f"images are {layout}, not an array of shape {list(shape)}")
    channels = shape[channel_axis]
    size = [length for axis, length in enumerate(shape) if axis not in (0, channel_axis)]
    if channels != config.image_channels:
        raise UsageError(
            f"images {list(shape)} have {channels} channels and model.image_channels is {config.image_channels} "
            f"(the layout is {layout})"
        )
    least = min_image_size(config)
    if min(size) < least:
        raise UsageError(
            f"images of {size[0]}x{size[1]} are too small for the strides of this model: the least is "
            f"{least}x{least}; use larger images or fewer stages"
            + (", or model.stem conv3" if config.stem == "conv7" else "")
        )
