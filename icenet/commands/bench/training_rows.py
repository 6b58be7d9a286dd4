"""The rows of `icenet bench train`, `guide` and `cpu`: options, configurations, and the least work of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from icenet.commands.bench import limits
from icenet.core import backends
from icenet.core.config import Config, cnn_plan


@dataclass(frozen=True)
class Options:
    """What is measured. None selects a default, which is smaller on a CPU.

    Attributes:
        overrides: `KEY=VALUE` changes of all configurations.
        backend: The only backend of IceNet and of its peers.
        device: The device of all sides.
        only: Names of the sides to measure; empty for all.
        precision: fp32 or bf16.
        batch: Number of rows of a batch.
        length: Number of tokens of a row; for images, their height and width.
        seconds: Seconds of a side in a round.
        repeats: Number of rounds that count.
        limit: Seconds of the rounds of a row. A row that takes longer has fewer rounds, but at least one. Compiling
            and the first steps do not count. A side is left out if these, or a round, take three times as long.
    """

    overrides: Sequence[str] = ()
    backend: str | None = None
    device: str | None = None
    only: Sequence[str] = ()
    precision: str | None = None
    batch: int | None = None
    length: int | None = None
    seconds: float = 1.0
    repeats: int = 5
    limit: float = 120.0


@dataclass(frozen=True)
class Row:
    """A kind of measurement.

    Attributes:
        title: What is trained.
        config: A preset.
        overrides: Changes of it.
        gpu, cpu: Number of rows of a batch, and their length (`Options.length`).
        reference: The figure of the guide, for `icenet bench guide`.
    """

    title: str
    config: str
    gpu: tuple[int, int]
    cpu: tuple[int, int]
    overrides: tuple[str, ...] = ()
    reference: str = ""


ROWS = {
    "gpt": Row(
        "a transformer, the preset transformer-small", "transformer-small", (32, 512), (2, 128), ("model.dropout=0",)
    ),
    "lstm": Row(
        "an LSTM of 4 x 512", "lstm-medium", (64, 128), (16, 32), ("model.dropout=0", "model.vocab_size=256")
    ),
    "cnn": Row("ResNet-50", "resnet-50", (64, 224), (4, 64)),
}
"""The rows of `icenet bench train` by name."""


def config_of(row: Row, options: Options, device: str) -> Config:
    """Returns the configuration of a row, with its batch and length.

    Args:
        row: The row.
        options: The options.
        device: cpu or gpu.
    """
    batch, length = row.gpu if device == "gpu" else row.cpu
    batch, length = options.batch or batch, options.length or length
    config = Config.from_yaml(row.config, row.overrides)
    key = "data.image_size" if config.model.input_kind == "images" else "data.seq_length"
    if hasattr(config.model, "max_seq_length"):
        config = config.with_overrides(f"model.max_seq_length={length}")
    precision = options.precision or ("bf16" if device == "gpu" else "fp32")
    own = [f"training.batch_size={batch}", f"training.mixed_precision={precision}", f"{key}={length}"]
    return config.with_overrides(*own, *options.overrides)


def operations(config: Config) -> float:
    """Returns the operations of the products of a training step: three times those of the forward pass.

    An addition and a multiplication are two. The gradients of a product are two more products.
    """
    model = backends.meta_model(config)
    batch = config.training.batch_size
    if config.model.input_kind == "images":
        return 3 * batch * image_operations(config.model, model.weight_shapes(), length_of(config))
    length = length_of(config)
    size = limits.size_of(config, model)
    pairs = sum(limits.attended_pairs(length, window or length) for window in size.windows)
    return 3.0 * batch * (2 * (size.dense + size.output) * length + 4 * size.query_width * pairs)


def length_of(config: Config) -> int:
    """Returns the number of tokens of a row, or the height and width of the images."""
    length = getattr(config.data, "image_size" if config.model.input_kind == "images" else "seq_length")
    return int(length)


def image_operations(options: Any, shapes: Mapping[str, tuple[int, ...]], size: int) -> float:
    """Returns the operations of the products of a forward pass of one image.

    Args:
        options: The configuration of a CNN.
        shapes: The shapes of its weights by path, in PyTorch's layout.
        size: Height and width of the image.
    """

    def work(path: str, side: int) -> float:
        count = 2.0 * side * side
        for length in shapes.get(f"{path}.weight", (0,)):
            count *= length
        return count

    half = lambda side: (side - 1) // 2 + 1  # noqa: E731
    side = half(size) if options.stem == "conv7" else size
    total = work("stem.conv", side)
    side = half(side) if options.stem == "conv7" else side
    for index, block in enumerate(cnn_plan.blocks(options)):
        before, side = side, (side - 1) // block.stride + 1
        path = f"blocks.{index}"
        late = block.kind == "bottleneck" and options.bottleneck_stride != "conv1"
        total += work(f"{path}.conv", side) + work(f"{path}.shortcut.conv", side)
        total += sum(work(f"{path}.branch.{part}.conv", before if late and part == 0 else side) for part in range(3))
    return total + work("hidden", 1) + work("output", 1)
