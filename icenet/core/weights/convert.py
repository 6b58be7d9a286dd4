"""Converts weights between three forms, bit for bit.

| form        | on disk                         | layouts   | metadata      | read by                          |
|-------------|---------------------------------|-----------|---------------|----------------------------------|
| `canonical` | .safetensors file, or a folder  | PyTorch's | `format: pt`  | IceNet; `load_state_dict`        |
| `mlx`       | one .safetensors file           | MLX's     | `format: mlx` | `mlx.nn.Module.load_weights`     |
| `torch`     | .pt, .pth or .bin: a state dict | PyTorch's | none          | `torch.load` + `load_state_dict` |

A .safetensors file of the `torch` form is the canonical form.

A form is detected from the first bytes and the metadata of a file, never from its extension or its arrays. Between
PyTorch's and MLX's layouts arrays are permuted by the kind of their layer (`icenet.core.weights.layout`), which the
model determines. The MLX form has MLX's names, which differ in containers: `features.layers.0` for `features.0`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icenet.core import backends, files
from icenet.core.errors import UsageError, WeightsError
from icenet.core.weights import files as weights
from icenet.core.weights import formats, layout, prefixes, sharing
from icenet.core.weights.arrays import RenamedWeights
from icenet.core.weights.files import Array, Progress
from icenet.core.weights.gguf import is_gguf
from icenet.core.weights.packed import packed_of
from icenet.core.weights.quantization import METADATA, Quantization, describe
from icenet.core.weights.quantized import read_saved
from icenet.core.weights.safetensors import dtype_name, spec_of

FORMS = ("canonical", "mlx", "torch")
PICKLED = (".pt", ".pth", ".bin")
_FORMATS = {"canonical": "pt", "mlx": "mlx", "torch": "pt"}  # form -> metadata `format`
_MLX_UNSUPPORTED = ("F64",)  # mlx.core.load: "unsupported dtype F64"


Translation = Callable[[Mapping[str, Array]], Mapping[str, Array] | None]
"""Returns weights under other names, or None."""


@dataclass(frozen=True)
class Summary:
    """A file or folder of weights in numbers.

    Attributes:
        path: The file or folder.
        form: "canonical", "mlx" or "torch".
        tensors: Number of arrays.
        values: Number of values of all arrays, buffers included.
        bytes: Size of all arrays.
        dtypes: Dtype of safetensors -> number of arrays.
        metadata: Metadata of the file.
    """

    path: Path
    form: str
    tensors: int
    values: int
    bytes: int
    dtypes: dict[str, int]
    metadata: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
        size = f"{self.values:,} values, {self.bytes:,} bytes"
        return f"{self.path}: {self.form}, {self.tensors} tensors ({kinds}), {size}"


@dataclass(frozen=True)
class Conversion:
    """The result of `convert`.

    Attributes:
        source: The weights that were read.
        destination: The weights that were written.
        files: The files that were written.
        left_out: Names of buffers that the new form does not have, and of weights without the prefix to strip.
        note: A remark on names that wrappers have changed, or on a form that the source denies; empty without one.
    """

    source: Summary
    destination: Summary
    files: list[Path]
    left_out: list[str]
    note: str = ""


def detect(path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> str:
    """Returns the form of a file or folder.

    Args:
        path: The file or folder.
        metadata: Its metadata; None reads them.

    Raises:
        UsageError: Neither the content nor the metadata determine the form.
    """
    path = Path(path)
    if _is_pickled(path):
        return "torch"
    stated = (weights.read(path).metadata if metadata is None else metadata).get("format")
    if stated == "pt":
        return "canonical"
    if stated == "mlx":
        return "mlx"
    reason = f"its metadata have format {stated!r}" if stated else "its metadata have no format"
    raise UsageError(f"{path}: unknown form of weights ({reason}); name it with --from canonical, mlx or torch")


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    to: str,
    *,
    source_form: str | None = None,
    key: str | None = None,
    strip_prefix: str | Sequence[str] = (),
    arrays: Mapping[str, Array] | None = None,
    model: Any = None,
    kinds: Mapping[str, str] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    names: Mapping[str, str] | None = None,
    shared: Mapping[str, str] | None = None,
    aliases: Collection[str] = (),
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int | None = weights.MAX_SHARD_BYTES,
    progress: Progress | None = None,
    companions: Mapping[str, bytes] = {},
    read_as: Translation | None = None,
    write_as: Translation | None = None,
) -> Conversion:
    """Writes the weights at `source` to `destination` in the form `to`.

    Args:
        source: A .safetensors file, its index, a folder that contains one, or a file of `torch.save`, which may have
            any name, or the index of several.
        destination: A .safetensors, .pt, .pth or .bin file, or a folder, for `model.safetensors` in it.
        to: "canonical", "mlx" or "torch".
        source_form: The form of the source; None detects it.
        key: Key of the state dict in a file of `torch.save` that holds more, such as `model_state_dict`.
        strip_prefix: Prefixes to remove from the names, such as `module.` (see `prefixes.strip_prefix`).
        arrays: Weights of the form of the source, to convert instead of its own: those of a moving average.
        model: The model that the weights are of: any `mlx.nn.Module` or `torch.nn.Module`. It determines `kinds`,
            `shapes`, `names`, `shared` and `aliases`. It or `kinds` is required between "mlx" and the other forms.
        kinds: Module path -> layer kind.
        shapes: Name -> canonical shape of the model's parameters, which must be equal; None: no check.
        names: MLX's name -> canonical name, where the two differ.
        shared: Further name -> first name of each array that the model shares. The source may have one of them.
        aliases: Further names of shared arrays that the MLX model does not have, as a port; the mlx form has none.
        metadata: Text to store in addition to the metadata of the source.
        overwrite: Whether to replace an existing destination.
        max_shard_bytes: Size above which the weights are split; the mlx form is always one file, because
            `load_weights` reads one.
        progress: Called with (bytes done, bytes in total) after each array.
        companions: Content of files to write next to weights in a folder, by name, such as a config.yaml.
        read_as: Returns a state dict of another program with PyTorch's layouts under the names of the model; None if
            it is not of that program.
        write_as: Returns weights with PyTorch's layouts under the names to write.

    Raises:
        UsageError: The request is not valid, or it would replace a file.
        WeightsError: The weights are damaged or do not fit.
        FileError: The destination cannot be written.
        BackendError: The request needs PyTorch, which is not installed.
    """
    source, destination = Path(source), Path(destination)
    _check_form(to)
    destination = destination_file(destination, to)
    refuse_existing(source, destination, overwrite)
    given = _open_source(source, source_form, key, strip_prefix, arrays, read_as)
    # one of its shards may be the destination, which may be behind a symbolic link
    destination = files.output_file(destination, overwrite=True, inputs=given.files)
    facts = _Facts(kinds, shapes, names or {}, shared or {}, aliases) if model is None else _Facts.of(model)
    found = RenamedWeights(given.arrays, facts.names) if given.form == "mlx" else given.arrays
    found = sharing.complete(found, facts.shared)
    result = _with_layout(found, given.form, to, facts, str(source))
    written: Mapping[str, Array] = result
    if to == "mlx":
        _check_dtypes_of_mlx(result, source)
        written = RenamedWeights(result, {canonical: name for name, canonical in facts.names.items()}, facts.aliases)
    elif write_as is not None and (renamed := write_as(result)) is not None:
        written = renamed
    described: dict[str, str] = {}
    if destination.suffix in PICKLED:  # a state dict contains tensors only
        outputs = _write_state_dict(destination, written, progress)
    else:
        described = {**given.metadata, **(metadata or {}), "format": _FORMATS[to]}
        if given.layers:
            del described[METADATA]
        limit = None if to == "mlx" else max_shard_bytes
        outputs = weights.write(destination, written, described, limit, progress, companions, durable=False)
    return Conversion(
        summary(source, given.form, found, given.metadata),
        summary(destination, to, written, described),
        outputs,
        [*(name for name in found if name not in result), *given.left_out],
        given.note or (_note(found) if facts.shapes is None else ""),
    )


@dataclass(frozen=True)
class _Facts:
    """What is known of the model of the weights. The attributes are the arguments of `convert`."""

    kinds: Mapping[str, str] | None
    shapes: Mapping[str, tuple[int, ...]] | None
    names: Mapping[str, str]
    shared: Mapping[str, str]
    aliases: Collection[str]

    @classmethod
    def of(cls, model: Any) -> _Facts:
        """Returns the facts of a module of either backend."""
        tree = backends.module(backends.backend_of(model), "nn.tree")
        kinds, shapes = tree.layer_kinds(model), tree.weight_shapes(model)
        return cls(
            kinds,
            {path: shape for path, shape in shapes.items() if not layout.is_left_out(kinds, path)},
            tree.mlx_names(model),
            sharing.find_shared((path, array) for path, array, _ in tree.named_arrays(model)),
            sharing.aliases_in_twin(tree.named_modules(model)),
        )


def _with_layout(
    found: Mapping[str, Array], form: str, to: str, facts: _Facts, source: str
) -> layout.PermutedWeights:
    """Returns weights of one form with the layouts of another.

    Raises:
        UsageError: That needs the kinds of the layers.
        WeightsError: They are not the weights of the model.
    """
    kinds, shapes, permutes = facts.kinds, facts.shapes, (form == "mlx") != (to == "mlx")
    if kinds is None and (permutes or (form == "mlx" and shapes is not None)):
        raise UsageError(
            f"{source}: converting {form} to {to} needs the kinds of the layers, which a config determines; "
            "name it with --config, or in Python give the model: convert(..., model=model)"
        )
    if shapes is not None:
        _check_shapes(found, form, kinds or {}, shapes, source)
    direction = None if not permutes else "to_mlx" if to == "mlx" else "to_torch"
    return layout.PermutedWeights(found, kinds or {}, direction)


def _write_state_dict(path: Path, written: Mapping[str, Array], progress: Progress | None) -> list[Path]:
    """Writes a file of `torch.save`. Returns it as the only file."""
    _state_dict_module().write_state_dict(path, written)
    if progress is not None:
        total = sum(spec_of(written, name).nbytes for name in written)
        progress(total, total)
    return [path]


@dataclass(frozen=True)
class _Source:
    """The weights of a conversion.

    Attributes:
        arrays: The weights, without a prefix and under the names of the model.
        form: Their form.
        metadata: The metadata of the file.
        files: The files that were opened.
        layers: The layers that are dequantized.
        left_out: Names without the prefix to strip.
        note: A remark on how the source was read; empty without one.
    """

    arrays: Mapping[str, Array]
    form: str
    metadata: Mapping[str, str]
    files: Sequence[Path]
    layers: Mapping[str, Quantization]
    left_out: list[str]
    note: str


def _open_source(
    path: Path,
    form: str | None,
    key: str | None,
    strip_prefix: str | Sequence[str],
    arrays: Mapping[str, Array] | None,
    read_as: Translation | None,
) -> _Source:
    """Opens the source of a conversion. The arguments are those of `convert`."""
    found, metadata = _read(path, key) if arrays is None or not is_gguf(path) else (arrays, {})
    opened = found.files if isinstance(found, weights.Weights) else []
    layers: Mapping[str, Quantization] = {}
    if arrays is not None:
        found = arrays
    elif isinstance(found, weights.Weights):
        found = read_saved(found)
        layers = packed.layers if (packed := packed_of(found)) else {}
    left_out: list[str] = []
    if strip_prefix:
        found, left_out = _without_prefix(path, found, strip_prefix)
    translated = None if read_as is None or form == "mlx" else read_as(found)
    note = _contradiction(path, metadata, form)
    if layers:
        note = note or f"the weights are dequantized: {describe(layers)} in the source"
    if translated is not None:
        found = translated
        form = form or ("torch" if _is_pickled(path) else "canonical")  # also without metadata
        note = note or "the names of the source are those of another program"
    form = form or detect(path, metadata)
    _check_form(form)
    return _Source(found, form, metadata, opened, layers, left_out, note)


def _check_dtypes_of_mlx(found: Mapping[str, Array], source: Path) -> None:
    """Raises WeightsError if arrays have a dtype that MLX cannot read from a file."""
    unsupported = [name for name in found if dtype_name(spec_of(found, name).dtype) in _MLX_UNSUPPORTED]
    if unsupported:
        raise WeightsError(
            f"{source}: MLX does not read float64 from safetensors, and {len(unsupported)} arrays have it "
            f"(the first is {unsupported[0]}); save the weights as float32 first"
        )


def _without_prefix(
    source: Path, found: Mapping[str, Array], prefix: str | Sequence[str]
) -> tuple[Mapping[str, Array], list[str]]:
    """Returns weights without a prefix, and the names of those that do not have it."""
    originals = {name: name for name in found}
    try:
        originals = prefixes.strip_prefix(originals, prefix)
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None
    kept = set(originals.values())
    return {new: found[name] for new, name in originals.items()}, [name for name in found if name not in kept]


def _contradiction(source: Path, metadata: Mapping[str, str], form: str | None) -> str:
    """Returns a remark if the form that the user gives is not the one that the source states."""
    try:
        stated = detect(source, metadata)
    except UsageError:
        return ""
    if form is None or (form == "mlx") == (stated == "mlx"):
        return ""
    reason = "it is a file of torch.save" if stated == "torch" else f"its metadata say {stated}"
    return f"{source}: was read as {form}, because --from says so, but {reason}"


def _note(names: Iterable[str]) -> str:
    """Returns a remark on prefixes of wrappers in names that no model has checked."""
    found = prefixes.suggest_prefixes(names)
    return f"names begin with or contain {' and '.join(found)}; {prefixes.advice(found)}" if found else ""


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise UsageError(f"unknown form {form!r}; give one of {', '.join(FORMS)}")


def _check_shapes(
    found: Mapping[str, Array],
    form: str,
    kinds: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    source: str,
) -> None:
    """Raises WeightsError unless the canonical form of `found` has exactly the names and shapes of `shapes`."""
    canonical = layout.PermutedWeights(found, kinds, None)
    if form == "mlx":
        # names first: a name without a layer kind is then reported together with the other unexpected names
        weights.check(dict.fromkeys(shapes, ()), dict.fromkeys(canonical, ()), source)
        canonical = layout.PermutedWeights(found, kinds, "to_torch")
    weights.check(shapes, weights.shapes(canonical), source)


def summary(path: Path, form: str, found: Mapping[str, Array], metadata: Mapping[str, str] = {}) -> Summary:
    """Returns the summary of weights. No data are read."""
    dtypes: Counter[str] = Counter()
    size = nbytes = 0
    for spec in (spec_of(found, name) for name in found):
        dtypes[dtype_name(spec.dtype)] += 1
        size, nbytes = size + spec.size, nbytes + spec.nbytes
    return Summary(path, form, len(found), size, nbytes, dict(sorted(dtypes.items())), dict(metadata))


def _read(path: Path, key: str | None = None) -> tuple[Mapping[str, Array], dict[str, str]]:
    if not _is_pickled(path):
        if key is not None:
            raise UsageError(f"{path}: is no file of torch.save, so --key {key} has no effect; leave it out")
        found = weights.read(path)
        return found, found.metadata
    file = path / _PICKLED_INDEX if path.is_dir() else path
    if not file.is_file():
        raise WeightsError(f"{path}: no such file; check the path")
    if not file.name.endswith(_INDEX_SUFFIX):
        return _state_dict_module().read_state_dict(file, key), {}
    merged: dict[str, Array] = {}
    listed = weights.listed_in_index(file, PICKLED)
    weights.warn_of_other_shards(file.with_name(file.name.removesuffix(".index.json")), set(listed.values()))
    for name in sorted(set(listed.values())):
        merged |= _state_dict_module().read_state_dict(file.with_name(name), key)
    weights.check(dict.fromkeys(listed, ()), dict.fromkeys(merged, ()), str(file))
    return merged, {}


_PICKLED_INDEX = "pytorch_model.bin.index.json"
_INDEX_SUFFIX = ".bin.index.json"


def _is_pickled(path: Path) -> bool:
    """Returns whether a path is a file of `torch.save`, or the index of several or its folder."""
    if path.is_dir():
        has_safetensors = any((path / name).exists() for name in (weights.DEFAULT_NAME, weights.DEFAULT_INDEX))
        return not has_safetensors and (path / _PICKLED_INDEX).is_file()
    if path.name.endswith(_INDEX_SUFFIX):
        return True
    if path.is_file():
        found = formats.identify(path)
        return found.kind == formats.PICKLE or (path.suffix in PICKLED and found.kind != formats.SAFETENSORS)
    return path.suffix in PICKLED


def _state_dict_module() -> Any:
    # imported late, because only .pt files need PyTorch
    return backends.module("torch", "tools.state_dict")


def destination_file(path: Path, to: str) -> Path:
    """Returns the file that `convert` writes: `path`, or model.safetensors in the folder `path`.

    Raises:
        UsageError: The form `to` cannot have this extension.
    """
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


def refuse_existing(source: Path, destination: Path, overwrite: bool) -> None:
    """Checks that the file `destination` may be written.

    Raises:
        UsageError: It is the source, or it exists and `overwrite` is False.
    """
    read_from = source
    if source.name.endswith(weights.INDEX_SUFFIX):
        read_from = source.with_name(source.name.removesuffix(".index.json"))
    elif source.is_dir() or (source.suffix not in PICKLED and not source.is_file()):
        read_from = weights.target(source)
    if os.path.realpath(read_from) == os.path.realpath(destination):  # `resolve` raises RuntimeError for a loop
        raise UsageError(f"{destination}: source and destination are the same file; name another destination")
    for path in (destination, weights.index_of(destination)):
        files.output_file(path, overwrite=overwrite, inputs=[read_from])
