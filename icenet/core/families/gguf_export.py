"""Writes GGUF files for llama.cpp, from the table that reads them (see `gguf`)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from icenet.core.config import Config
from icenet.core.errors import ConfigError, WeightsError
from icenet.core.families import FAMILIES
from icenet.core.families.family import OF_TRAINING, Family, same_value
from icenet.core.families.gguf import ARCHITECTURES, Architecture, read
from icenet.core.families.gguf_rotary import LLAMA3_KEYS, LONG_ROPE, ROPE_FREQUENCIES, llama3_factors
from icenet.core.families.weights import ExportedWeights
from icenet.core.host.threads import for_ranges
from icenet.core.weights.copying import MOST_THREADS, copy_to
from icenet.core.weights.files import Array
from icenet.core.weights.gguf import DEFAULT_ALIGNMENT, package
from icenet.core.weights.safetensors import read_into, release, spec_of

KINDS = {"gguf": "F16", "gguf-q8_0": "Q8_0", "gguf-f32": "F32"}
"""The forms, and the type of the tensors with two axes or more."""
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7}
_LLAMA = {"mistral": "llama", "mixtral": "llama"}
_ROUTER = "ffn_gate_inp"
_SWA_PATTERN = 6
_BLOCK = 32
_INFINITE = 0x7C00
_VALUES = 1 << 16
"""Number of values that a thread converts at once. More do not fit its cache, and take new memory at each step."""


class _Tensor(NamedTuple):
    """A tensor of the file: its type and shape, and a function that makes it in a dtype of floats.

    Its axes may be divided in what the function returns.
    """

    kind: str
    shape: tuple[int, ...]
    make: Callable[[], Array]


def write(
    path: Path,
    family: Family,
    config: Config,
    weights: Mapping[str, Array],
    tokenizer: Mapping[str, Any],
    kind: str,
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Writes a file. Tensors are made one at a time, and converted some rows at a time.

    Args:
        path: The file.
        family: The family of the model.
        config: The configuration of the model.
        weights: Canonical weights.
        tokenizer: Metadata of its tokenizer and chat template.
        kind: F32, F16 or Q8_0, for tensors with two axes or more. Others, and those of routers, are F32; those that
            do not divide into blocks of 32 are F16 instead of Q8_0.

    Returns:
        The type and the shape of each tensor.

    Raises:
        ConfigError: llama.cpp's files cannot express the options of the model.
        WeightsError: The package gguf is not installed, or F16 cannot hold a value.
    """
    gguf = package("writing a GGUF file")
    name = _LLAMA.get(family.model_type) or next(
        (own for own, known in ARCHITECTURES.items() if known.model_type == family.model_type), None
    )
    if name is None:
        known = ", ".join([*(known.model_type for known in ARCHITECTURES.values()), *_LLAMA])
        raise ConfigError(f"models of the family {family.model_type} are not written as GGUF; only {known}")
    architecture = ARCHITECTURES[name]
    values, options = family.write(config.model), family.options(config.model)
    names = set(architecture.names.values())  # a file has one tensor for the experts of a layer
    stacked = next((rows for rows in family.alternatives if names.issuperset(row.theirs for row in rows)), ())
    metadata = {**_metadata(name, architecture, values, options), **tokenizer}
    metadata["general.file_type"], metadata["general.quantization_version"] = _FILE_TYPES[kind], 2
    tensors = _tensors(architecture, values, ExportedWeights(family, config, weights, stacked), kind)
    writer = gguf.GGUFWriter(path, name)
    sizes: dict[str, int] = {}
    for key, value in metadata.items():
        writer.add_key_value(key, value, _type(gguf, value))
    numbers = {own: gguf.GGMLQuantizationType[own] for own in ("F32", "F16", "Q8_0")}
    for own, tensor in tensors.items():
        size = int(np.prod(tensor.shape))
        block, nbytes = gguf.GGML_QUANT_SIZES[numbers[tensor.kind]]
        sizes[own] = size // block * nbytes
        writer.add_tensor_info(own, tensor.shape, np.dtype(np.float32), sizes[own], numbers[tensor.kind])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    start = _aligned(path.stat().st_size)
    for own, tensor in tensors.items():
        _write_data(path, start, own, tensor, sizes[own])
        start += _aligned(sizes[own])
    os.truncate(path, start)  # with the zeros after the last tensor
    _check(path, options)
    return {own: (tensor.kind, tensor.shape) for own, tensor in tensors.items()}


def _aligned(size: int) -> int:
    """Returns a number of bytes with those up to the place of the next tensor."""
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _write_data(path: Path, start: int, name: str, tensor: _Tensor, size: int) -> None:
    """Writes a tensor of `size` bytes to a place of a file, some rows at a time in several threads.

    The threads share no file, because Windows has no function that writes to a place of one.
    """
    array = tensor.make()
    rows = array.reshape(-1, array.shape[-1]) if array.flags.c_contiguous else array
    step, row_size = max(1, _VALUES * len(rows) // rows.size), size // len(rows)

    def write_rows(first: int, stop: int) -> None:
        with path.open("r+b") as file:
            file.seek(start + first * row_size)
            for begin in range(first, stop, step):
                part = rows[begin : min(begin + step, stop)]
                values = np.empty(part.shape, part.dtype)
                if not read_into(values, part):
                    copy_to(values, part)
                file.write(_in_type(name, values, tensor.kind).reshape(-1).view(np.uint8).data)

    for_ranges(write_rows, len(rows), step, MOST_THREADS)
    release(array)


def _in_type(name: str, values: Array, kind: str) -> Array:
    """Returns values in a type of the file: float32, float16 or the bytes of blocks of 8 bits."""
    if kind == "F32":
        return values.astype("<f4", copy=False)
    with np.errstate(all="ignore"):  # the values of a broken model may be infinite or NaN
        scaled, packed = (values, None) if kind == "F16" else _blocks(values)
        halves = scaled.astype("<f2", copy=False)
        # of integers first, which takes a tenth of the time of `isfinite` for float16
        is_finite = (halves.view("<u2") & 0x7FFF).max() < _INFINITE
        if not is_finite and not np.array_equal(np.isfinite(halves), np.isfinite(scaled)):
            what = "values" if packed is None else "scales of blocks"
            raise WeightsError(f"{name}: has {what} that float16 cannot hold; convert --to gguf-f32")
    if packed is None:
        return halves
    packed[:, :2] = halves.view(np.uint8)
    return packed


def _blocks(values: Array) -> tuple[Array, Array]:
    """Returns the scales of blocks of 32 values, `[blocks, 1]`, and the values of the blocks as Q8_0.

    The bytes are those of the package gguf, which takes 2.7 times as long.
    """
    blocks = values.astype(np.float32, copy=False).reshape(-1, _BLOCK)
    # `max(axis=1)` takes twice as long for so few values
    largest = np.maximum.reduceat(np.abs(blocks).reshape(-1), np.arange(0, blocks.size, _BLOCK))[:, None]
    scales = largest / np.float32(127)
    scaled = blocks * np.where(scales == 0, np.float32(0), 1 / scales)
    whole = np.trunc(scaled)
    scaled -= whole
    scaled += scaled
    whole += np.trunc(scaled, out=scaled)  # halves are rounded away from zero
    packed = np.empty((len(blocks), 2 + _BLOCK), np.uint8)
    np.copyto(packed[:, 2:].view(np.int8), whole, casting="unsafe")
    return scales, packed


def _check(path: Path, options: Mapping[str, Any]) -> None:
    """Raises ConfigError unless the file has the options of the model."""
    try:
        found = read(path)
    except ConfigError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ConfigError(f"a GGUF file cannot express the options of the model: {reason}") from None
    family = FAMILIES[found.values["model_type"]]
    again = family.options(Config.from_dict({"model": family.read(found.values)}).model)
    lost = [
        key
        for key, value in options.items()
        if key not in OF_TRAINING and not same_value(value, again.get(key), 1e-6)
    ]
    if lost:
        listed = ", ".join(f"model.{'sliding_window' if key == 'windows' else key}" for key in lost)
        raise ConfigError(f"a GGUF file of this architecture cannot express {listed}")


def _metadata(
    name: str, architecture: Architecture, values: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the metadata for the content of a config.json."""
    found = {key: values[theirs] for key, theirs in architecture.keys.items() if values.get(theirs) is not None}
    found |= {"feed_forward_length": options["feed_forward_size"], "vocab_size": options["vocab_size"]}
    if options.get("num_experts"):
        found |= {"expert_count": options["num_experts"], "expert_used_count": options["experts_per_token"]}
        if name != "llama":
            found["expert_feed_forward_length"] = options["expert_size"]
    scaling: Mapping[str, Any] = values.get("rope_scaling") or {}
    if name != "gpt2":
        size = options["head_size"]
        found |= {"attention.key_length": size, "attention.value_length": size}
        found["rope.dimension_count"] = round(size * options.get("rotary_fraction", 1.0))
        if scaling.get("rope_type") != "llama3":  # that of Llama 3 is a tensor
            found |= _scaling(scaling)
        if window := next((window for window in options["windows"] if window), None):
            found["attention.sliding_window"] = window
    if name == "gemma2":
        found |= {
            key: values[key] for key in ("attn_logit_softcapping", "final_logit_softcapping") if values.get(key)
        }
    if name == "gemma3":
        found["rope.freq_base_swa"] = values["rope_local_base_freq"]
        windows = [kind == "sliding_attention" for kind in values["layer_types"]]
        if windows != [(index + 1) % _SWA_PATTERN != 0 for index in range(len(windows))]:
            found["attention.sliding_window_pattern"] = windows
    metadata = {f"{name}.{key}": value for key, value in found.items()}
    if scaling.get("rope_type") == "llama3":
        exact = {key: scaling[key] for key in LLAMA3_KEYS}
        metadata |= {
            LLAMA3_KEYS[key]: np.float64(value) if isinstance(value, float) else value for key, value in exact.items()
        }
    return metadata


def _scaling(scaling: Mapping[str, Any]) -> dict[str, Any]:
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        return {}
    known = {"rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"}
    if kind not in ("linear", "yarn") or not scaling.keys() <= known:
        raise ConfigError(f"scaled rotary positions of type {kind} with {', '.join(scaling)} are not written as GGUF")
    names = {
        "factor": "factor",
        "original_max_position_embeddings": "original_context_length",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
    }
    found = {f"rope.scaling.{own}": scaling[key] for key, own in names.items() if scaling.get(key) is not None}
    return {"rope.scaling.type": kind, **found}


def _tensors(
    architecture: Architecture, values: Mapping[str, Any], weights: Mapping[str, Array], kind: str
) -> dict[str, _Tensor]:
    found: dict[str, _Tensor] = {}
    scaling = values.get("rope_scaling") or {}
    if scaling.get("rope_type") == "llama3":
        size = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
        factors = llama3_factors(size, values["rope_theta"], scaling)
        found[ROPE_FREQUENCIES] = _Tensor("F32", factors.shape, lambda: factors)
    if LONG_ROPE.keys() & scaling.keys():
        raise ConfigError("long-rope is not written as GGUF")
    heads = {"attn_q": values.get("num_attention_heads"), "attn_k": values.get("num_key_value_heads")}
    heads["attn_k"] = heads["attn_k"] or heads["attn_q"]
    own_names = {theirs: own for own, theirs in architecture.names.items()}
    for name in weights:
        layer, _, part = name.rpartition(".")
        number = next(iter(re.findall(r"\.(\d+)\.", layer)), "")
        own = own_names.get(re.sub(r"\.\d+\.", ".{i}.", layer, count=1))
        if own is None:
            raise ConfigError(f"{name}: has no name in GGUF files")
        shape = spec_of(weights, name).shape
        last = own.rpartition(".")[2]
        is_transposed = architecture.is_transposed and bool(number) and len(shape) == 2
        permuted = heads[last] if architecture.is_permuted and last in heads else None
        adds_one = architecture.adds_one and last.endswith("norm")
        shape = shape[::-1] if is_transposed else shape
        used = "F32" if len(shape) < 2 or last == _ROUTER else kind
        used = "F16" if used == "Q8_0" and shape[-1] % 32 else used

        make = partial(_made, weights, name, is_transposed, adds_one, permuted)
        found[f"{own.replace('{i}', number)}.{part}"] = _Tensor(used, shape, make)
    return found


def _made(weights: Mapping[str, Array], name: str, is_transposed: bool, adds_one: bool, heads: int | None) -> Array:
    """Returns a tensor as llama.cpp stores it: with alternating halves of each of its heads, if any.

    Those have axes of their own, so that the result is a view.
    """
    array = weights[name]
    array = array.T if is_transposed else array.astype(np.float32) + 1 if adds_one else array
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2) if heads else array


def _type(gguf: Any, value: Any) -> Any:
    """Returns the type of a value of the metadata."""
    kinds = gguf.GGUFValueType
    names = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING, list: kinds.ARRAY}
    return names.get(type(value), kinds.FLOAT64)
