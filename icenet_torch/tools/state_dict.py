"""PyTorch state dicts on disk (.pt, .pth, .bin) as numpy arrays, and back. Nothing in a file is ever run."""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from icenet.core.errors import WeightsError
from icenet.core.files import staged
from icenet_torch.nn.arrays import _TORCH_DTYPES, from_numpy, to_numpy

Array = npt.NDArray[Any]
_STORABLE = set(_TORCH_DTYPES.values())


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Array]:
    """The tensors of a state dict saved by `torch.save`, by name, on the host; memory-mapped where it can be.

    Loaded with `weights_only=True`, so that a file cannot run code. Raises WeightsError for a file that holds
    more than a flat table of dense tensors, or is damaged.
    """
    path = Path(path)
    try:
        # only the zip form (torch 1.6 and later) can be mapped
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of, it refuses
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise WeightsError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from error
    except Exception as error:  # damaged files raise whatever the parser stumbled over
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise WeightsError(
                f"{path}: holds more than tensors and is not loaded, since unpickling can run code; "
                "re-save its state dict alone, or as .safetensors, where you trust it"
            ) from None
        raise WeightsError(
            f"{path}: is damaged or not a state dict; save model.state_dict() again, or use .safetensors"
        ) from None
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}; save model.state_dict() alone")
    for name, value in content.items():
        if not isinstance(name, str):
            raise WeightsError(f"{path}: {name!r} is no name of a tensor; save model.state_dict() alone")
        if not isinstance(value, torch.Tensor):
            raise WeightsError(
                f"{path}: {name!r} is a {type(value).__name__}, not a tensor; save model.state_dict() alone"
            )
        if value.layout != torch.strided or value.is_meta or value.is_quantized or value.dtype not in _STORABLE:
            what = f"{value.layout}, {value.dtype}".replace("torch.", "")
            raise WeightsError(f"{path}: {name!r} ({what}) is not a plain tensor; make it dense and of a plain dtype")
    return {name: to_numpy(value) for name, value in content.items()}


def write_state_dict(path: str | os.PathLike[str], weights: Mapping[str, Array]) -> None:
    """Saves arrays as a state dict that `torch.load(path, weights_only=True)` and `load_state_dict` take.

    Atomic, as `icenet.core.weights.files.write`; raises WeightsError for a full or refusing disk.
    """
    path = Path(path)
    tensors = {name: from_numpy(array) for name, array in sorted(weights.items())}
    with staged(path) as stage, stage.open(path) as file:
        try:
            torch.save(tensors, file)
        except RuntimeError as error:
            # torch's zip writer covers a failed write with an error of its own
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise WeightsError(f"{path}: PyTorch cannot write it ({str(error).splitlines()[0]})") from error
