"""Quantized weights in safetensors: MLX's own, AWQ and GPTQ. Tensors are dequantized on access.

The values have the dtype of the scales, and the bits that `mlx.core.dequantize`, AutoAWQ and GPTQModel give: a
product of a whole number and a scale is rounded once, and MLX rounds it before and after it adds the bias.

| method | packed along | a group of values has | value |
|---|---|---|---|
| MLX, affine | inputs | a scale and a bias | scale * q + bias |
| AWQ, gemm | outputs, 8 at a time in the order 0 2 4 6 1 3 5 7 | a scale and a zero point | scale * (q - zero) |
| GPTQ | inputs | a scale and a zero point, stored minus 1 in format v1 | scale * (q - zero) |

Sources: `mlx/backend/cpu/quantized.cpp`; `awq/utils/packing_utils.py` of AutoAWQ; `BaseQuantLinear` of GPTQModel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from icenet.core.errors import ConfigError, WeightsError
from icenet.core.weights import files as weight_files
from icenet.core.weights.files import Array, StoredWeights
from icenet.core.weights.packed import KINDS, DequantizedWeights, StoredPacked
from icenet.core.weights.packing import dequantize, unpack
from icenet.core.weights.quantization import BITS, Quantization, stated_settings
from icenet.core.weights.safetensors import Spec

KEYS = ("quantization", "quantization_config")
"""Keys of config.json: that of mlx-lm, and that of `transformers`."""
GPTQ_BITS = (2, 3, 4, 8)
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place of each of 8 values in a word."""
_CHUNK_VALUES = 1 << 22
_FLOATS = ("float16", "bfloat16", "float32")


def dequantized(values: Mapping[str, Any], weights: StoredWeights) -> tuple[dict[str, Any], StoredWeights]:
    """Returns the content of a config.json without its quantization, and the weights under their usual names.

    Args:
        values: The content of config.json.
        weights: The tensors of the files.

    Raises:
        ConfigError: The quantization is of a kind that is not supported.
        WeightsError: Tensors are missing, or have shapes that do not belong together.
    """
    given = {key: values[key] for key in KEYS if values.get(key) is not None}
    if not given:
        return dict(values), weights
    found: _Quantized
    key, settings = next(iter(given.items()))
    if not isinstance(settings, dict):
        raise ConfigError(f"{key}: {str(settings)[:40]!r} is not an object")
    method = settings.get("quant_method")
    if method is None:
        found = MlxWeights(weights, settings)
    elif method == "awq":
        found = _AwqWeights(weights, settings)
    elif method == "gptq":
        found = _GptqWeights(weights, settings)
    else:
        raise ConfigError(
            f"{key}: quantization with {str(method)[:40]!r} is not supported, only MLX's own, awq and gptq; "
            "use the original weights"
        )
    if not found.layers:
        raise ConfigError(f"{key}: none of the tensors is quantized as it says; remove the key if they are not")
    return {name: value for name, value in values.items() if name not in KEYS}, found


def read_saved(weights: weight_files.Weights) -> Mapping[str, Array]:
    """Returns the weights of a saved model; those that are quantized as a view of dequantized ones.

    Raises:
        WeightsError, ConfigError: The settings in their metadata are damaged, or do not fit.
    """
    settings = stated_settings(weights.metadata, weights.path)
    if settings is None:
        return weights
    found = MlxWeights(weights, settings)
    if not found.layers:
        raise WeightsError(f"{weights.path}: none of the tensors is quantized as its metadata say; save it again")
    return DequantizedWeights(found.packed_weights, weights.metadata)


class _Quantized(StoredWeights):
    """Weights of which some layers are quantized. Their tensors are replaced by one weight each."""

    packed: str
    """Kind of the tensor that a quantized layer has in place of its weight, or the weight itself."""
    parts: tuple[str, ...]
    """Kinds of the other tensors of a quantized layer."""
    entries: Mapping[str, Spec]
    layers: set[str]
    """Names of the quantized layers."""

    def __init__(self, weights: StoredWeights, settings: Mapping[str, Any]) -> None:
        self.path = weights.path
        self._weights = weights
        self._settings = settings
        marker = self.parts[0]
        self.layers = {
            name.removesuffix(f".{marker}")
            for name in weights
            if name.endswith(f".{marker}") and f"{name.removesuffix(f'.{marker}')}.{self.packed}" in weights
        }
        used = {f"{layer}.{kind}" for layer in self.layers for kind in (self.packed, *self.parts)}
        used -= {f"{layer}.weight" for layer in self.layers}
        names = [name for name in weights if name not in used]
        names += [f"{layer}.weight" for layer in self.layers if f"{layer}.weight" not in weights]
        self._specs = {f"{layer}.weight": self._check(layer) for layer in sorted(self.layers)}
        self.entries = {
            name: self._specs[name] if name in self._specs else weights.spec(name) for name in sorted(names)
        }

    def __getitem__(self, name: str) -> Array:
        if name not in self._specs:
            return self._weights[name]
        spec = self._specs[name]
        found = np.empty(spec.shape, spec.dtype)
        rows = found.reshape(-1, spec.shape[-1]) if found.ndim > 1 else found
        with np.errstate(all="ignore"):  # the model's check of its logits reports values that are not finite
            self._fill(name.removesuffix(".weight"), rows, max(8, _CHUNK_VALUES // spec.shape[-1] // 8 * 8))
        return found

    def spec(self, name: str) -> Spec:
        """Returns the dtype and the shape of an array."""
        return self.entries[name]

    def _check(self, layer: str) -> Spec:
        """Returns the dtype and the shape of the weight of a layer; raises for tensors that do not fit."""
        raise NotImplementedError

    def _fill(self, layer: str, rows: Array, step: int) -> None:
        """Writes the weight of a layer to `rows` `[outputs, inputs]`, `step` rows at a time, a multiple of 8."""
        raise NotImplementedError

    def _spec_of(self, layer: str, kind: str, axes: int = 2, dtypes: tuple[str, ...] = ("int32", "uint32")) -> Spec:
        name = f"{layer}.{kind}"
        if name not in self._weights:
            raise WeightsError(f"{self.path}: {name} is missing; copy or save the folder again")
        spec = self._weights.spec(name)
        if len(spec.shape) != axes or str(spec.dtype) not in dtypes or 0 in spec.shape:
            wanted = f"{' or '.join(dtypes)} with {axes} axes"
            raise WeightsError(f"{self.path}: {name} is {spec.dtype} {list(spec.shape)}, not {wanted}")
        return spec

    def _mismatch(self, layer: str, kinds: tuple[str, ...], settings: str) -> WeightsError:
        present = [f"{layer}.{kind}" for kind in kinds if f"{layer}.{kind}" in self._weights]
        listed = ", ".join(f"{name} {list(self._weights.spec(name).shape)}" for name in present)
        return WeightsError(f"{self.path}: the shapes of {listed} do not belong together with {settings}")

    def _whole(self, settings: Mapping[str, Any], key: str, allowed: tuple[int, ...] | None = None) -> int:
        value = settings.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or (allowed and value not in allowed):
            only = f", only {', '.join(map(str, allowed))}" if allowed else ""
            raise ConfigError(f"{self.path}: quantization: {key} {repr(value)[:40]} is not supported{only}")
        return value


class MlxWeights(_Quantized):
    """What mlx-lm writes: `weight` with packed values, `scales` and `biases` with one value per group of inputs.

    Attributes:
        packed_weights: The same weights, packed.
    """

    packed, parts = "weight", ("scales", "biases")

    def __init__(self, weights: StoredWeights, settings: Mapping[str, Any]) -> None:
        super().__init__(weights, settings)
        layers = {layer: self._of_layer(layer) for layer in sorted(self.layers)}
        self.packed_weights = StoredPacked(weights, layers)

    def _of_layer(self, layer: str) -> Quantization:
        """Returns the settings of a layer, which may have its own."""
        own = self._settings.get(layer)
        settings = {**self._settings, **own} if isinstance(own, dict) else self._settings
        if (mode := settings.get("mode", "affine")) != "affine":
            raise ConfigError(f"{self.path}: quantization: mode {str(mode)[:40]!r} is not supported, only 'affine'")
        return Quantization(self._whole(settings, "bits", BITS), self._whole(settings, "group_size"))

    def _check(self, layer: str) -> Spec:
        bits, size = self._of_layer(layer)
        axes = len(self._weights.spec(f"{layer}.weight").shape)
        packed = self._spec_of(layer, "weight", axes, ("uint32",))
        scales = self._spec_of(layer, "scales", axes, _FLOATS)
        inputs = packed.shape[-1] * 32 // bits if packed.shape else 0
        fits = axes in (2, 3) and size > 0 and scales.shape == (*packed.shape[:-1], inputs // size)
        if not fits or inputs % size or scales != self._spec_of(layer, "biases", axes, _FLOATS):
            raise self._mismatch(layer, (self.packed, *self.parts), f"bits {bits} and group_size {size}")
        return Spec(scales.dtype, (*packed.shape[:-1], inputs))

    def _fill(self, layer: str, rows: Array, step: int) -> None:
        weight, scales, biases = (self._weights[f"{layer}.{kind}"] for kind in KINDS)
        dequantize((weight, scales, biases), self._of_layer(layer), rows)


class _AwqWeights(_Quantized):
    """AutoAWQ's version gemm: `qweight` `[inputs, outputs / 8]`, `qzeros` and `scales` with a row per group."""

    packed, parts = "qweight", ("scales", "qzeros")

    def __init__(self, weights: StoredWeights, settings: Mapping[str, Any]) -> None:
        version = str(settings.get("version", "gemm")).lower()
        if version != "gemm":
            raise ConfigError(f"{weights.path}: AWQ's version {version[:40]!r} is not supported, only gemm")
        super().__init__(weights, settings)

    def _check(self, layer: str) -> Spec:
        self._whole(self._settings, "w_bit" if "w_bit" in self._settings else "bits", (4,))
        packed, scales = self._spec_of(layer, "qweight"), self._spec_of(layer, "scales", dtypes=_FLOATS)
        inputs, outputs = packed.shape[0], packed.shape[1] * 8
        size = self._group_size(inputs)
        fits = size > 0 and inputs % size == 0 and scales.shape == (inputs // size, outputs)
        if not fits or self._spec_of(layer, "qzeros").shape != (inputs // size, outputs // 8):
            raise self._mismatch(layer, (self.packed, *self.parts), f"bits 4 and group_size {size}")
        return Spec(scales.dtype, (outputs, inputs))

    def _group_size(self, inputs: int) -> int:
        size = self._whole(self._settings, "q_group_size" if "q_group_size" in self._settings else "group_size")
        return inputs if size == -1 else size

    def _fill(self, layer: str, rows: Array, step: int) -> None:
        packed, scales, zeros = (self._weights[f"{layer}.{kind}"] for kind in (self.packed, *self.parts))
        size = self._group_size(len(packed))
        for start in range(0, len(rows), step):
            part, words = slice(start, start + step), slice(start // 8, (start + step) // 8)
            values = _in_order(unpack(packed[:, words], 4)).astype(np.float32)
            groups = values.reshape(-1, size, values.shape[1])
            groups -= _in_order(unpack(zeros[:, words], 4))[:, None].astype(np.float32)
            groups *= scales[:, None, part].astype(np.float32)
            rows[part] = values.T


def _in_order(values: Array) -> Array:
    """Returns AWQ's values `[N, outputs]` in the order of the outputs."""
    return values.reshape(len(values), -1, 8)[:, :, _AWQ_ORDER].reshape(values.shape)


class _GptqWeights(_Quantized):
    """GPTQ: `qweight` `[inputs * bits / 32, outputs]`, `scales` and `qzeros` with a row per group.

    `g_idx` has the group of each input; without it groups are consecutive.
    """

    packed, parts = "qweight", ("scales", "qzeros", "g_idx")

    def __init__(self, weights: StoredWeights, settings: Mapping[str, Any]) -> None:
        self.path = weights.path
        self._bits = self._whole(settings, "bits", GPTQ_BITS)
        stored = settings.get("checkpoint_format") or "gptq"
        if stored not in ("gptq", "gptq_v2"):
            raise ConfigError(
                f"{weights.path}: GPTQ's checkpoint_format {str(stored)[:40]!r} is not supported, only gptq or "
                "gptq_v2"
            )
        self._is_minus_one = stored == "gptq"
        rules = settings.get("dynamic") or {}
        if not isinstance(rules, dict) or not all(str(name).startswith("-:") for name in rules):
            raise ConfigError(
                f"{weights.path}: quantization: dynamic {str(rules)[:60]!r} is not supported, only rules -: for "
                "layers that are not quantized"
            )
        super().__init__(weights, settings)

    def _check(self, layer: str) -> Spec:
        bits = self._bits
        packed, scales = self._spec_of(layer, "qweight"), self._spec_of(layer, "scales", dtypes=_FLOATS)
        inputs, outputs, groups = packed.shape[0] * 32 // bits, packed.shape[1], scales.shape[0]
        fits = scales.shape[1] == outputs and packed.shape[0] * 32 % bits == 0
        if f"{layer}.qzeros" in self._weights:
            fits &= (
                self._spec_of(layer, "qzeros").shape == (groups, -(-outputs * bits // 32))
                and outputs * bits % 32 == 0
            )
        if f"{layer}.g_idx" in self._weights:
            fits &= self._spec_of(layer, "g_idx", 1).shape == (inputs,)
        else:
            size = self._group_size(inputs)
            fits &= size > 0 and groups == -(-inputs // size)
        if not fits:
            raise self._mismatch(layer, (self.packed, *self.parts), f"bits {bits}")
        return Spec(scales.dtype, (outputs, inputs))

    def _group_size(self, inputs: int) -> int:
        size = self._whole(self._settings, "group_size")
        return inputs if size == -1 else size

    def _fill(self, layer: str, rows: Array, step: int) -> None:
        packed, scales = self._weights[f"{layer}.qweight"], self._weights[f"{layer}.scales"].astype(np.float32)
        outputs, inputs = rows.shape
        if f"{layer}.g_idx" in self._weights:
            groups = self._weights[f"{layer}.g_idx"].astype(np.int64)
            if groups.min() < 0 or groups.max() >= len(scales):
                raise WeightsError(f"{self.path}: {layer}.g_idx has groups outside of 0 to {len(scales) - 1}")
        else:
            groups = np.arange(inputs) // self._group_size(inputs)
        if f"{layer}.qzeros" in self._weights:
            zeros = unpack(self._weights[f"{layer}.qzeros"], self._bits)[:, :outputs]
            if self._is_minus_one:  # the largest number stands for -1
                zeros = (zeros + np.uint8(1)) & np.uint8(2**self._bits - 1)
        else:
            zeros = np.full(scales.shape, 2 ** (self._bits - 1), np.uint8)
        for start in range(0, outputs, step):
            part = slice(start, start + step)
            values = unpack(packed[:, part].T, self._bits).astype(np.float32)
            values -= zeros[:, part].T[:, groups]
            values *= scales[:, part].T[:, groups]
            rows[part] = values
