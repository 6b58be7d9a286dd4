"""Compares the loss of the user with its counterpart for the other backend, before training."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core import backends
from icenet.core.config import Config, custom
from icenet.core.data.datasets import Dataset
from icenet.core.engine import Batch, Engine
from icenet.core.errors import IceNetError
from icenet.core.messages import first_line

TOLERANCE = 1e-3
"""Relative difference beyond rounding. `icenet parity` judges the losses with its yardstick."""


def compare(config: Config, engine: Engine, dataset: Dataset) -> str | None:
    """Returns a note if the two functions of `training.loss` have different values for one output of the model.

    Nothing is compared where only one backend is installed, or the output is more than one array.
    """
    reference = config.training.loss
    other = {"mlx": "torch", "torch": "mlx"}[engine.backend]
    if not custom.is_custom(reference) or not backends.installed(other) or engine.process_group.size > 1:
        return None
    batch = dataset.train_batch(0, config.training.batch_size)
    values = {}
    try:
        output = engine.forward(batch)
        for backend in (engine.backend, other):
            function = custom.loss_function(reference, backend)
            values[backend] = _value(backend, engine.backend, function, output, batch)
    except IceNetError as error:
        return f"training.loss: the functions of the two backends were not compared: {error}"
    except Exception as error:
        reason = first_line(error, "")
        return (
            f"training.loss: {reference} fails on arrays of {other}: {type(error).__name__}: {reason}; write the "
            f"function for it in {custom.split(reference)[0].stem}_{other}.py"
        )
    one, two = values.values()
    if math.isclose(one, two, rel_tol=TOLERANCE, abs_tol=1e-6):
        return None
    return (
        f"training.loss: {reference} is {one:.6g} on {engine.backend} and {two:.6g} on {other} for the same "
        "output of the model; make the two functions agree"
    )


def _value(backend: str, origin: str, function: Any, output: NDArray[Any], batch: Batch) -> float:
    """Returns a loss on the CPU. Images are `[B, H, W, C]` on MLX and `[B, C, H, W]` on PyTorch."""
    from_numpy = backends.module(backend, "nn.arrays").from_numpy

    def native(array: NDArray[Any], channels_last: bool) -> Any:
        if array.ndim == 4 and channels_last != (backend == "mlx"):
            array = np.ascontiguousarray(
                array.transpose(0, 3, 1, 2) if channels_last else array.transpose(0, 2, 3, 1)
            )
        return from_numpy(array)

    arrays = {name: native(array, True) for name, array in batch.items()}
    return float(function(native(output, origin == "mlx"), arrays))
