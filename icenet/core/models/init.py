"""Initial values as a pure function of (seed, parameter path), drawn on the host in PyTorch's layouts.

Both backends receive the same arrays, so they start equal bit for bit. The rules by layer kind:

    linear      Normal with standard deviation init_scale / sqrt(inputs). Bias zero. Stacked ones likewise.
    embedding   Normal with standard deviation 1 / sqrt(width).
    bilinear    Normal with standard deviation init_scale / sqrt(second inputs). Bias zero.
    recurrent   As linear, with the same deviation for all gates.
    conv        Normal with standard deviation init_scale * sqrt(2 / inputs per output) (He et al., 2015). Bias zero.
    norms       Weight one, bias zero. For batch norm also running mean zero, running variance one.

The bias of an LSTM's forget gate is zero, not one (Jozefowicz et al., 2015): with one, training on bytes of text
was slower (two layers of 256, 250 steps: validation loss 1.72 instead of 1.67; 1.82 with PyTorch's uniform weights).

`init_scale` is 1 by default. Projections at the end of a residual branch use 1 / sqrt(2 * num_layers), so that the
sum over all branches keeps its size (Radford et al., 2019).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from icenet.core import rng
from icenet.core.errors import WeightsError

Array = NDArray[np.float32]


def initial_value(
    kind: str,
    name: str,
    path: str,
    shape: tuple[int, ...],
    seed: int,
    init_scale: float = 1.0,
    *,
    out: Array | None = None,
) -> Array:
    """Returns the initial value of a parameter, float32.

    Args:
        kind: Layer kind (see `icenet.core.weights.layout`).
        name: Name of the parameter in its layer.
        path: Path of the parameter in the model, which selects its random numbers.
        shape: Shape in PyTorch's layout.
        seed: Seed of the run.
        init_scale: Factor of the standard deviation, or of the weight one of a norm.
        out: Memory that normal variates may be drawn into (see `rng.normal`).

    Raises:
        WeightsError: The layer kind has no rule.
    """
    if kind in ("linear", "stacked_linear", "embedding", "recurrent", "bilinear"):
        if name.startswith("bias"):
            return np.zeros(shape, np.float32)
        deviation = init_scale / math.sqrt(shape[-1])
        return rng.normal(rng.key(seed, "init", path), shape, deviation, out)
    if kind in ("layer_norm", "rms_norm", "group_norm"):
        return np.full(shape, init_scale if name == "weight" else 0, np.float32)
    if kind.startswith("conv"):
        if name == "bias":
            return np.zeros(shape, np.float32)
        deviation = init_scale * math.sqrt(2 / math.prod(shape[1:]))
        return rng.normal(rng.key(seed, "init", path), shape, deviation, out)
    if kind == "batch_norm":
        return (np.ones if name in ("weight", "running_var") else np.zeros)(shape, np.float32)
    raise WeightsError(f"{path}: no rule for the initial value of a layer of kind {kind!r}")


def sinusoidal_rows(width: int, start: int, stop: int) -> Array:
    """Returns sinusoidal encodings of positions from `start` to `stop`, float32 `[stop - start, width]`.

    Column 2i is sin(position / 10000^(2i / width)); column 2i + 1 is the cosine of the same angle (Vaswani et al.,
    2017, section 3.5). They are computed in float64, because the frameworks' sines of large angles differ.
    """
    frequencies = 10000.0 ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    angles = np.arange(start, stop, dtype=np.float64)[:, None] * frequencies
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(-1, width).astype(np.float32)
