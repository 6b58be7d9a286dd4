"""PyTorch state dicts on disk (.pt, .pth, .bin) to and from numpy arrays. Code in a file is never executed."""

from __future__ import annotations

import contextlib
import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy.typing as npt
import torch

from icenet.core.errors import UsageError, WeightsError
from icenet.core.files import staged
from icenet.core.messages import first_line
from icenet.core.weights import formats
from icenet.core.weights.safetensors import FileMap, file_maps
from icenet_torch.nn.arrays import from_numpy, to_numpy

Array = npt.NDArray[Any]

# the dtypes that safetensors, PyTorch and numpy have in common
_DTYPES = {
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64),
    *(torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
}


def read_state_dict(path: str | os.PathLike[str], key: str | None = None) -> dict[str, Array]:
    """Returns the tensors of a state dict that `torch.save` wrote, as numpy arrays by name.

    The file is memory-mapped if it is a zip file (PyTorch 1.6 and later). It is loaded with `weights_only=True`, so
    it cannot run code.

    Args:
        path: The file.
        key: Key of the state dict in a file that holds more, such as `state_dict` in a checkpoint of Lightning.

    Raises:
        WeightsError: The file is missing, damaged, or holds anything but names and dense tensors.
        UsageError: It holds no dict of tensors of that key.
    """
    path = Path(path)
    content = _select(path, _load(path), key)
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


def _load(path: Path) -> Any:
    """Returns the content of a file of `torch.save`."""
    found = formats.identify(path)
    if found.name and found.kind not in (formats.PICKLE, formats.SAFETENSORS):
        raise WeightsError(f"{path}: is {found.name}; {found.remedy}")
    is_zip = zipfile.is_zipfile(path)
    try:
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            warnings.simplefilter("ignore")  # PyTorch warns about tensors that are refused below
            file: Any = path
            # PyTorch cannot open a name that is not UTF-8, and reads one in .safetensors as safetensors
            if not _is_utf8(path) or path.suffix == ".safetensors":
                file, is_zip = stack.enter_context(path.open("rb")), False
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except OSError as error:
        raise WeightsError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from error
    except Exception as error:  # the parser of a damaged file can raise anything
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise WeightsError(
                f"{path}: holds objects other than tensors and is not loaded, because unpickling them can run code; "
                "if you trust the file, save its state dict alone: found = torch.load(path, weights_only=False), "
                "then torch.save(found['state_dict'], 'weights.pt'), or found.state_dict() if it is a module"
            ) from None
        raise WeightsError(
            f"{path}: damaged or not a state dict; save model.state_dict() again, or use .safetensors"
        ) from None


def _is_utf8(path: Path) -> bool:
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def _select(path: Path, content: Any, key: str | None) -> Mapping[Any, Any]:
    """Returns the state dict in the content of a file."""
    if isinstance(content, torch.Tensor):
        raise WeightsError(f"{path}: holds one tensor without a name; save model.state_dict()")
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}; save model.state_dict() alone")
    inner = [name for name, value in content.items() if isinstance(name, str) and _is_state_dict(value)]
    if key is not None:
        if key not in inner:
            raise UsageError(
                f"{path}: holds no state dict {key!r}; "
                + (f"it has {', '.join(inner)}" if inner else "leave out --key: it holds no other dict of tensors")
            )
        selected: Mapping[Any, Any] = content[key]
        return selected
    if inner:
        what = "a checkpoint of Lightning" if "pytorch-lightning_version" in content else "a training checkpoint"
        keys = ", ".join(str(name) for name in list(content)[:8])
        choice = f"--key {inner[0]}" if len(inner) == 1 else f"--key with one of {', '.join(inner)}"
        raise WeightsError(
            f"{path}: is {what} with {keys}; give {choice} to icenet convert (in Python key={inner[0]!r})"
        )
    return content


def _is_state_dict(value: Any) -> bool:
    """Returns whether a value is a dict of tensors by name."""
    return (
        isinstance(value, Mapping)
        and any(isinstance(item, torch.Tensor) for item in value.values())
        and all(isinstance(name, str) for name in value)
    )


class _CheckedFile:
    """A file to write, before each part of which files that are read are checked.

    PyTorch reads the memory maps of all arrays, and a file that becomes shorter meanwhile would end the process.
    """

    def __init__(self, file: BinaryIO, maps: Sequence[FileMap]) -> None:
        self._file, self._maps = file, maps
        self.flush = file.flush

    def write(self, part: Any) -> int:
        for data in self._maps:
            data.check()
        return self._file.write(part)


def write_state_dict(path: str | os.PathLike[str], weights: Mapping[str, Array]) -> None:
    """Saves arrays as a state dict for `torch.load(path, weights_only=True)`.

    The write is atomic, and does not wait for the disk, because the file can be made again from the weights.

    Raises:
        FileError: The file cannot be written, for example because the disk is full.
    """
    path = Path(path)
    arrays = dict(sorted(weights.items()))
    tensors = {name: from_numpy(array) for name, array in arrays.items()}
    with staged(path, durable=False) as stage, stage.open(path) as file:
        try:
            torch.save(tensors, _CheckedFile(file, file_maps(arrays.values())))
        except RuntimeError as error:
            # PyTorch's zip writer raises its own error on top of a failed write, of Ctrl-C and of signals
            if (cause := error.__context__) is not None and not isinstance(cause, RuntimeError):
                raise cause from None
            raise WeightsError(f"{path}: PyTorch cannot write it ({first_line(error)})") from error
