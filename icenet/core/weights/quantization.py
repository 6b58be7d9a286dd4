"""Settings of layers whose weights are quantized, and the format, which is that of MLX.

Such a layer has a `weight` with packed numbers, `scales` and `biases`. A group of `group_size` values of a row has a
scale s and a bias b, and each value is a whole number q of `bits` bits: s * q + b. The numbers are in 32-bit words,
the lowest bits first.

| array | dtype | shape |
|---|---|---|
| `weight` | uint32 | [..., out, in * bits / 32] |
| `scales`, `biases` | that of the weights before | [..., out, in / group_size] |

These are the names and the bits of folders of mlx-lm and of `mlx.nn.QuantizedLinear`, and a model that is saved has
them too: the metadata `icenet_quantization` of its file has the settings as config.json of mlx-lm has them.

Source: `mlx/backend/cpu/quantized.cpp` of MLX 0.32.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from icenet.core.errors import UsageError, WeightsError

METADATA = "icenet_quantization"
BITS, GROUP_SIZES = (2, 3, 4, 5, 6, 8), (32, 64, 128)
"""What MLX computes with."""
DEFAULT_GROUP_SIZE = 64


class Quantization(NamedTuple):
    """How a layer is quantized."""

    bits: int
    group_size: int

    def __str__(self) -> str:
        return f"{self.bits} bits in groups of {self.group_size}"

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the packed numbers for that of a weight."""
        return (*shape[:-1], shape[-1] * self.bits // 32)

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the scales for that of a weight."""
        return (*shape[:-1], shape[-1] // self.group_size)

    def shape(self, packed: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of a weight for that of its packed numbers."""
        return (*packed[:-1], packed[-1] * 32 // self.bits)


def check(bits: int, group_size: int) -> Quantization:
    """Returns the settings of a user.

    Raises:
        UsageError: MLX has no such number of bits or size of groups.
    """
    for name, value, allowed in (("bits", bits, BITS), ("group_size", group_size, GROUP_SIZES)):
        if isinstance(value, bool) or value not in allowed:
            raise UsageError(f"quantize: {name} {value!r} is not supported; one of {', '.join(map(str, allowed))}")
    return Quantization(bits, group_size)


def layers_to_quantize(
    shapes: Mapping[str, tuple[int, ...]], quantization: Quantization
) -> tuple[dict[str, Quantization], list[str]]:
    """Returns the layers of a model that are quantized, and those that are not because groups do not divide a row.

    Args:
        shapes: Shape of the weight of each layer that can be quantized, by path.
        quantization: The settings.

    Raises:
        UsageError: There are none.
    """
    divides = {path: shape[-1] % quantization.group_size == 0 for path, shape in shapes.items()}
    if not any(divides.values()):
        widths = sorted({shape[-1] for shape in shapes.values()})
        reason = f": the widths are {', '.join(map(str, widths[:4]))}" if widths else ""
        raise UsageError(
            f"quantize: no layer has a width that is a multiple of group_size {quantization.group_size}{reason}"
        )
    return dict.fromkeys((path for path in shapes if divides[path]), quantization), [
        path for path in shapes if not divides[path]
    ]


# ---- settings in files -------------------------------------------------------------------------------------


def settings_of(layers: Mapping[str, Quantization]) -> dict[str, Any]:
    """Returns the settings of quantized layers as config.json of mlx-lm has them.

    The most common ones are those of all layers, and other layers have an entry of their own.
    """
    [(common, _)] = Counter(layers.values()).most_common(1)
    others = {path: found for path, found in layers.items() if found != common}
    return {
        "group_size": common.group_size,
        "bits": common.bits,
        "mode": "affine",
        **{path: {"group_size": found.group_size, "bits": found.bits} for path, found in others.items()},
    }


def metadata_of(layers: Mapping[str, Quantization]) -> dict[str, str]:
    """Returns the metadata of a file with quantized layers; empty without such layers."""
    return {METADATA: json.dumps(settings_of(layers), sort_keys=True)} if layers else {}


def stated_settings(metadata: Mapping[str, str], where: Any) -> dict[str, Any] | None:
    """Returns the settings that `metadata_of` recorded; None if nothing is.

    Raises:
        WeightsError: They are damaged.
    """
    if METADATA not in metadata:
        return None
    try:
        settings = json.loads(metadata[METADATA])
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise WeightsError(f"{where}: its metadata {METADATA} are damaged; copy or save the model again")
    return settings


def describe(layers: Mapping[str, Quantization]) -> str:
    """Returns the settings of quantized layers as a text: "197 layers have 4 bits in groups of 64"."""
    counts = Counter(layers.values())
    return ", ".join(
        f"{count} layer{'s have' if count > 1 else ' has'} {found}" for found, count in counts.most_common()
    )
