"""Scales of the loss and of cotangents with which no gradient overflows in fp16."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.parity.align import ReplayError
from icenet.parity.measures import round_to
from icenet.parity.trace import Call, Value

Array = npt.NDArray[Any]

Replay = Callable[[str, Call, list[Value] | None], dict[str, Value]]
"""Calls the layer at a path with arguments and cotangents (None: no gradients): `engines.replay` of one engine."""

FP16_SCALES = (1.0, 2.0**-10, 2.0**-20)
"""Scales of the loss and of cotangents in fp16, of which the first without overflow is used."""
FP16_HEADROOM = 8192.0
"""Largest gradient for which a scale is used. The limit of fp16 is 65504; intermediate values may be larger."""


def fits_fp16(reference: Mapping[str, Array], others: Sequence[Mapping[str, Array]], scale: float = 1.0) -> bool:
    """Returns whether gradients are far enough from the limit of fp16, if the reference's are multiplied by `scale`.

    Whether a gradient near the limit overflows depends on the last bit, so it shows no difference between backends.
    Training reduces the scale of the loss then. One side alone may overflow: MLX computes the derivative of `silu` in
    fp16, PyTorch in fp32. Values that are not finite at each scale are a difference.
    """
    largest = max((float(np.abs(array).max(initial=0)) for array in reference.values()), default=0.0)
    finite = (np.isfinite(array).all() for arrays in others for array in arrays.values())
    return largest * scale < FP16_HEADROOM and all(finite)


def scaled_for_fp16(
    path: str,
    call: Call,
    cotangents: list[Value],
    replays: Sequence[Replay],
) -> list[Value]:
    """Returns cotangents, scaled so that no gradient overflows in fp16."""
    for scale in FP16_SCALES:
        scaled = [
            Value(round_to(value.array * scale, value.dtype), value.dtype) if value.is_float else value
            for value in cotangents
        ]
        found = []
        for replay in replays:
            with suppress(ReplayError):  # which is reported where the layer is judged
                results = replay(path, call, scaled).items()
                found.append({name: value.array for name, value in results if not name.startswith("output")})
        if fits_fp16(found[-1], found[:-1]):
            break
    return scaled
