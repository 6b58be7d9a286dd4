"""PyTorch state dicts on disk (.pt, .pth, .bin) to and from numpy arrays. Code in a file is never executed."""

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
from icenet_torch.nn.arrays import from_numpy, to_numpy

Array = npt.NDArray[Any]

# the dtypes that safetensors, PyTorch and numpy have in common
_DTYPES = {
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64),
    *(torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
}


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Returns the tensors of a state dict that `torch.save` wrote, as numpy arrays by name.

    The file is memory-mapped if it is a zip file (PyTorch 1.6 and later). It is loaded with `weights_only=True`, so
    it cannot run code.

    Raises:
        WeightsError: The file is missing, damaged, or holds anything but names and dense tensors.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns about tensors that are refused below
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise WeightsError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from error
    except Exception as error:  # the parser of a damaged file can raise anything
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise WeightsError(
                f"{path}: holds objects other than tensors and is not loaded, because unpickling them can run code; "
                "if you trust the file, save its state dict alone, or as .safetensors"
            ) from None
        raise WeightsError(
            f"{path}: damaged or not a state dict; save model.state_dict() again, or use .safetensors"
        ) from None
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}; save model.state_dict() alone")
    for name, value in content.items():
        if not isinstance(name, str):
            raise WeightsError(f"{path}: {name!r} is not a name of a tensor; save model.state_dict() alone")
        if not isinstance(value, torch.Tensor):
            raise WeightsError(
                f"{path}: {name!r} is a {type(value).__name__}, not a tensor; save model.state_dict() alone"
            )
        if value.layout != torch.strided or value.is_meta or value.is_quantized or value.dtype not in _DTYPES:
            form = f"{value.layout}, {value.dtype}".replace("torch.", "")
            raise WeightsError(
                f"{path}: {name!r} ({form}) is not a dense tensor of a supported dtype; convert it first"
            )
    return {name: to_numpy(value) for name, value in content.items()}


def write_state_dict(path: str | os.PathLike[str], weights: Mapping[str, Array]) -> None:
    """Saves arrays as a state dict for `torch.load(path, weights_only=True)`. The write is atomic.

    Raises:
        FileError: The file cannot be written, for example because the disk is full.
    """
    path = Path(path)
    tensors = {name: from_numpy(array) for name, array in sorted(weights.items())}
    with staged(path) as stage, stage.open(path) as file:
        try:
            torch.save(tensors, file)
        except RuntimeError as error:
            # PyTorch's zip writer raises its own error on top of a failed write
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise WeightsError(f"{path}: PyTorch cannot write it ({str(error).splitlines()[0]})") from error
