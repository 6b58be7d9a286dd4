"""The blocks of a convolutional network: type, channels and stride of each, derived from its configuration.

    stem -> stage 0 -> stage 1 (half the resolution, twice the channels) -> ... -> global average pooling

Rules for a configuration without `stage_depths` and `stage_widths`:

    stages    up to four, base_channels * 1, 2, 4, 8 wide; the first block of each but the first has stride 2
    depths    one block per stage; the rest of num_layers is divided between the first two stages (5: 2 1 1 1,
              6: 2 2 1 1, 8: 3 3 1 1), where the resolution is high and the weights are few
    types     conv and basic blocks alternate, and the last one is basic

Depth therefore adds few parameters compared to width. In the model guide's table, twice the channels and two more
layers have four times the parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from icenet.core.config.model import CNNConfig

Stem = Literal["conv3", "conv7"]
BlockType = Literal["alternating", "conv", "basic", "bottleneck"]
BottleneckStride = Literal["conv1", "conv3"]
Classifier = Literal["hidden", "linear"]

EXPANSION = 4
"""Output channels of a bottleneck block divided by its inner channels (He et al., 2015)."""


class Block(NamedTuple):
    """One block of the network."""

    kind: str
    """conv, basic or bottleneck."""
    inputs: int
    """Input channels."""
    outputs: int
    """Output channels."""
    stride: int


def depths(config: CNNConfig) -> list[int]:
    """Returns the number of blocks of each stage."""
    if config.stage_depths is not None:
        return config.stage_depths
    found = [1] * min(config.num_layers, 4)
    for extra in range(config.num_layers - len(found)):
        found[extra % 2] += 1
    return found


def widths(config: CNNConfig) -> list[int]:
    """Returns the channels of each stage."""
    return config.stage_widths or [config.base_channels * 2**stage for stage in range(len(depths(config)))]


def blocks(config: CNNConfig) -> list[Block]:
    """Returns all blocks in order."""
    found: list[Block] = []
    channels, total = config.base_channels, sum(depths(config))
    for stage, (depth, width) in enumerate(zip(depths(config), widths(config), strict=True)):
        outputs = EXPANSION * width if config.block == "bottleneck" else width
        for index in range(depth):
            kind: str = config.block
            if kind == "alternating":
                kind = "basic" if (total - len(found)) % 2 else "conv"
            stride = 1 if index else 2 if stage else config.first_stage_stride
            found.append(Block(kind, channels, outputs, stride))
            channels = outputs
    return found


def min_image_size(config: CNNConfig) -> int:
    """Returns the smallest height and width for which each halving of the resolution has at least two pixels."""
    halvings = len(depths(config)) - 1 + (2 if config.stem == "conv7" else 0) + (config.first_stage_stride == 2)
    return 2 ** (halvings - 1) + 1 if halvings else 1


def check(config: CNNConfig) -> None:
    """Checks that the stages agree with each other.

    Raises:
        ValueError: They disagree. Pydantic turns it into an error of the configuration.
    """
    if config.stage_depths is not None:
        total = sum(config.stage_depths)
        if not config.stage_depths:
            raise ValueError("stage_depths is empty; give the blocks of at least one stage, or leave it out")
        if total != config.num_layers:
            raise ValueError(
                f"stage_depths {config.stage_depths} has {total} blocks and num_layers is {config.num_layers}; "
                f"set num_layers to {total}"
            )
    if config.stage_widths is not None and len(config.stage_widths) != len(depths(config)):
        raise ValueError(
            f"stage_widths {config.stage_widths} has {len(config.stage_widths)} stages and stage_depths "
            f"{depths(config)} has {len(depths(config))}; give one width for each stage"
        )
    last = blocks(config)[-1].outputs
    if config.classifier == "linear" and config.hidden_size != last:
        raise ValueError(
            f"hidden_size {config.hidden_size} differs from the {last} channels of the last stage, the input of "
            f"classifier linear; set hidden_size to {last}, or classifier to hidden"
        )


def size_problem(config: CNNConfig, height: int, width: int) -> str:
    """Returns why the strides do not allow a size of images; an empty text if they do."""
    smallest = min_image_size(config)
    if min(height, width) >= smallest:
        return ""
    others = "fewer stages" + (" or model.stem conv3" if config.stem == "conv7" else "")
    return (
        f"images of {height}x{width} are too small for the strides of this model, which needs {smallest}x{smallest} "
        f"({others} need less)"
    )
