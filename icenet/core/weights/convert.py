"""Weights from one form to another, bit for bit.

    canonical   safetensors with PyTorch's layouts, metadata `format: pt`: a file, or a checkpoint folder
    mlx         one safetensors file with MLX's layouts, metadata `format: mlx`, for
    `mlx.nn.Module.load_weights` torch       a PyTorch state dict: .pt, .pth or .bin; as .safetensors it is
    the canonical form

A form is known by the file's extension and metadata, never by what the arrays look like. Between PyTorch's
layouts and MLX's, arrays move by the kind of their layer (`icenet.core.weights.layout`), which the model's config
gives.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from icenet.core.errors import UsageError, WeightsError
from icenet.core.weights import files as weights
from icenet.core.weights import layout
from icenet.core.weights.files import Array, Progress
from icenet.core.weights.safetensors import dtype_name

Form = Literal["canonical", "mlx", "torch"]
FORMS: tuple[str, ...] = get_args(Form)
PICKLED = (".pt", ".pth", ".bin")
_FORMATS = {"canonical": "pt", "mlx": "mlx", "torch": "pt"}  # form -> metadata `format`
_MLX_REFUSES = ("F64",)  # mlx.core.load: "unsupported dtype F64"


@dataclass(frozen=True)
class Summary:
    """What a file or folder of weights holds; `values` counts the numbers of all arrays, buffers included."""

    path: Path
    form: str
    tensors: int
    values: int
    bytes: int
    dtypes: dict[str, int]  # safetensors dtype -> number of arrays
    metadata: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
        size = f"{self.values:,} values, {self.bytes:,} bytes"
        return f"{self.path}: {self.form}, {self.tensors} tensors ({kinds}), {size}"


@dataclass(frozen=True)
class Conversion:
    """What `convert` read and what it wrote; `left_out` names buffers that the new form does without."""

    source: Summary
    destination: Summary
    files: list[Path]
    left_out: list[str]


def detect(path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> Form:
    """The form of a file or folder, by extension, then by metadata. Raises UsageError where neither tells."""
    path = Path(path)
    if path.suffix in PICKLED and not path.is_dir():
        return "torch"
    stated = (weights.read(path).metadata if metadata is None else metadata).get("format")
    if stated == "pt":
        return "canonical"
    if stated == "mlx":
        return "mlx"
    said = f"its metadata say format {stated!r}" if stated else "its metadata name no format"
    raise UsageError(f"{path}: cannot tell its form ({said}); name it with --from canonical, mlx or torch")


def inspect(path: str | os.PathLike[str], form: Form | None = None) -> Summary:
    """Counts what is at `path` without converting it; the data of safetensors files are not read."""
    path = Path(path)
    found, metadata = _read(path)
    return _summary(path, form or detect(path, metadata), found, metadata)


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    to: Form,
    *,
    source_form: Form | None = None,
    kinds: Mapping[str, str] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int | None = weights.MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> Conversion:
    """Writes the weights at `source` to `destination` in the form `to`.

    Args:
        source: a .safetensors file, its index, a folder with one, or a .pt/.pth/.bin file.
        destination: a .safetensors or .pt/.pth/.bin file, or a folder (for `model.safetensors` in it).
        to: "canonical", "mlx" or "torch"; its layouts and metadata.
        source_form: the form of the source where extension and metadata do not tell, or tell wrongly.
        kinds: module path -> layer kind; needed between "mlx" and the others.
        shapes: the model's parameters and their canonical shapes, to be met exactly; None: no check.
        metadata: text to store beside the source's own.
        overwrite: whether a destination that exists may be replaced.
        max_shard_bytes: where to split; the mlx form is always one file, since `load_weights` takes one.
        progress: called with (bytes done, bytes in all) after each array.

    Raises UsageError for a request that cannot be meant, WeightsError for weights that are damaged or do not
    fit, BackendError where a .pt file is wanted and PyTorch is not installed.
    """
    source, destination = Path(source), Path(destination)
    if to not in FORMS:
        raise UsageError(f"no form {to!r}; give one of {', '.join(FORMS)}")
    destination = _destination(destination, to)
    _refuse_collision(source, destination, overwrite)
    found, source_metadata = _read(source)
    form = source_form or detect(source, source_metadata)
    if form not in FORMS:
        raise UsageError(f"no form {form!r}; give one of {', '.join(FORMS)}")
    crosses = (form == "mlx") != (to == "mlx")
    if kinds is None and (crosses or (form == "mlx" and shapes is not None)):
        raise UsageError(
            f"{source}: converting {form} to {to} needs the layers' kinds, which the config gives; "
            "name it with --config"
        )
    if shapes is not None:
        canonical = layout.Relaid(found, kinds or {}, None)
        if form == "mlx":
            # names first: a name without a kind is then one of the unexpected, told with all the others
            names: dict[str, tuple[int, ...]] = dict.fromkeys(canonical, ())
            weights.check(dict.fromkeys(shapes, ()), names, str(source))
            canonical = layout.Relaid(found, kinds or {}, "to_torch")
        weights.check(shapes, weights.shapes(canonical), str(source))
    direction = None if not crosses else "to_mlx" if to == "mlx" else "to_torch"
    result = layout.Relaid(found, kinds or {}, direction)
    if to == "mlx":
        refused = [name for name in result if dtype_name(result[name].dtype) in _MLX_REFUSES]
        if refused:
            raise WeightsError(
                f"{source}: MLX reads no float64 from safetensors, and {len(refused)} arrays have it "
                f"(the first is {refused[0]}); save the weights as float32 first"
            )
    described = {**source_metadata, **(metadata or {}), "format": _FORMATS[to]}
    if destination.suffix in PICKLED:
        _state_dict_functions()[1](destination, result)
        files = [destination]
        if progress is not None:
            total = sum(array.nbytes for array in result.values())
            progress(total, total)
        described = {}  # a state dict holds tensors only
    else:
        limit = None if to == "mlx" else max_shard_bytes
        files = weights.write(destination, result, described, limit, progress)
    return Conversion(
        _summary(source, form, found, source_metadata),
        _summary(destination, to, result, described),
        files,
        [name for name in found if name not in result],
    )


def _summary(path: Path, form: str, found: Mapping[str, Array], metadata: Mapping[str, str]) -> Summary:
    arrays = list(found.values())  # views: no data are read
    dtypes = Counter(dtype_name(array.dtype) for array in arrays)
    size, nbytes = sum(array.size for array in arrays), sum(array.nbytes for array in arrays)
    return Summary(path, form, len(arrays), size, nbytes, dict(sorted(dtypes.items())), dict(metadata))


def _read(path: Path) -> tuple[Mapping[str, Array], dict[str, str]]:
    if path.suffix in PICKLED and not path.is_dir():
        if not path.is_file():
            raise WeightsError(f"{path}: no such file; check the path")
        return _state_dict_functions()[0](path), {}
    found = weights.read(path)
    return found, found.metadata


def _state_dict_functions() -> tuple[Callable[..., dict[str, Array]], Callable[..., None]]:
    # Late, and through the one place that imports a backend: only .pt files need PyTorch.
    from icenet.core import backends as backend

    module = backend.module("torch", "tools.state_dict")
    return module.read_state_dict, module.write_state_dict


def _destination(path: Path, to: str) -> Path:
    """The file to write: `path`, or model.safetensors in the folder `path`."""
    if path.is_dir() or path.suffix == "" or str(path).endswith(os.sep):
        return path / weights.DEFAULT_NAME
    if path.suffix in PICKLED:
        if to == "torch":
            return path
        raise UsageError(f"{path}: the {to} form is safetensors; name it .safetensors, or convert --to torch")
    if path.suffix != weights.SUFFIX:
        raise UsageError(
            f"{path}: cannot write {path.suffix} files; "
            "name a .safetensors file, a folder, or (--to torch) a .pt file"
        )
    return path


def _refuse_collision(source: Path, destination: Path, overwrite: bool) -> None:
    read_from = source
    if source.name.endswith(weights.INDEX_SUFFIX):
        read_from = source.with_name(source.name.removesuffix(".index.json"))
    elif source.suffix not in PICKLED or source.is_dir():
        read_from = weights.target(source)
    if read_from.resolve() == destination.resolve():
        raise UsageError(f"{destination}: is the source itself; name another destination")
    taken = [path for path in (destination, weights.index_of(destination)) if path.exists()]
    if taken and not overwrite:
        raise UsageError(f"{taken[0]}: exists; name another destination, or give --overwrite to replace it")
