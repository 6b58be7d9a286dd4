"""Variants of what a PyTorch module computes: common mistakes of ports, applied to the functions that it calls.

`icenet.parity.causes` replays a module of the reference with each variant and names the one that computes what the
module under test does.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Run = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""Called as `run(function, args, kwargs)` in place of `function(*args, **kwargs)`."""


@dataclass(frozen=True)
class Variant:
    """A change of the functions that a module calls.

    Attributes:
        text: What is different in the module under test, in one line.
        names: Names of the functions that it changes.
        run: Computes the variant of a call; returns NotImplemented for a call that it does not change.
    """

    text: str
    names: frozenset[str]
    run: Run


@contextlib.contextmanager
def applied(variant: Variant, only: int | None = None) -> Iterator[None]:
    """Applies a variant to all calls of its functions, or to that with a number, while the context is open."""
    with _Applied(variant, only):
        yield


@contextlib.contextmanager
def spying() -> Iterator[list[tuple[str, tuple[Any, ...], dict[str, Any]]]]:
    """Yields a list to which each call of a function is added: its name and its arguments, numbers and flags only."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    with _Spy(calls):
        yield calls


class _Spy(TorchFunctionMode):
    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._calls.append((_name(func), tuple(map(_plain, args)), {k: _plain(v) for k, v in kwargs.items()}))
        return func(*args, **kwargs)


class _Applied(TorchFunctionMode):
    def __init__(self, variant: Variant, only: int | None) -> None:
        super().__init__()
        self._variant, self._only, self._count = variant, only, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _name(func) in self._variant.names:
            number = self._count
            self._count += 1
            if self._only is None or self._only == number:
                found = self._variant.run(func, args, kwargs)
                if found is not NotImplemented:
                    return found
        return func(*args, **kwargs)


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func)).strip("_")


def _plain(item: Any) -> Any:
    """Returns numbers, flags and texts; None for anything else."""
    return item if isinstance(item, (bool, int, float, str)) else None


# ---- activations --------------------------------------------------------------------------------------------


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _as_gelu_mlx_fast(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.773 * x)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "exact GELU": F.gelu,
    "the tanh approximation of GELU": lambda x: F.gelu(x, approximate="tanh"),
    "the sigmoid approximation of GELU, x * sigmoid(1.702 x)": _quick_gelu,
    "the sigmoid approximation of GELU, x * sigmoid(1.773 x)": _as_gelu_mlx_fast,
    "SiLU": F.silu,
    "ReLU": F.relu,
    "leaky ReLU with slope 0.01": lambda x: F.leaky_relu(x, 0.01),
    "leaky ReLU with slope 0.1": lambda x: F.leaky_relu(x, 0.1),
    "leaky ReLU with slope 0.2": lambda x: F.leaky_relu(x, 0.2),
    "ReLU6": F.relu6,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "ELU": F.elu,
    "SELU": F.selu,
    "CELU": F.celu,
    "softplus": F.softplus,
    "Mish": F.mish,
    "hard swish": F.hardswish,
    "hard sigmoid": F.hardsigmoid,
    "the square of ReLU": lambda x: F.relu(x).square(),
    "exp": torch.exp,
    "absolute value": torch.abs,
    "no activation": lambda x: x,
}

ACTIVATION_NAMES = frozenset(
    {"gelu", "silu", "relu", "leaky_relu", "relu6", "tanh", "sigmoid", "elu", "selu", "celu", "softplus", "mish"}
    | {"hardswish", "hardsigmoid"}
)


def _activation(name: str) -> Variant:
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs["input"]
        # a function that changes its input in place must still do so
        y = ACTIVATIONS[name](x.clone() if kwargs.get("inplace") else x)
        return x.copy_(y) if kwargs.get("inplace") else y

    return Variant(f"{name} in a, {{0}} in b", ACTIVATION_NAMES, run)


# ---- attention ----------------------------------------------------------------------------------------------


def _attention(change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Run:
    """Returns the variant of scaled_dot_product_attention with changed options."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        options = {**dict(zip(names, args, strict=False)), **kwargs}
        changed = change(dict(options))
        return NotImplemented if changed is None else func(**changed)

    return run


def _with_scale(power: float) -> Run:
    def change(options: dict[str, Any]) -> dict[str, Any]:
        size = options["query"].shape[-1]
        return {**options, "scale": float(size) ** power}

    return _attention(change)


def _with_mask(diagonal: int | None) -> Run:
    def change(options: dict[str, Any]) -> dict[str, Any] | None:
        if not options.get("is_causal") and options.get("attn_mask") is None:
            if diagonal is None:
                return None
        elif diagonal is None:
            return {**options, "is_causal": False, "attn_mask": None}
        n, m = options["query"].shape[-2], options["key"].shape[-2]
        mask = torch.ones(n, m, dtype=torch.bool).tril(diagonal).to(options["query"].device)
        mask = mask | ~mask.any(-1, keepdim=True)  # a row without keys is the mean of all values elsewhere, too
        return {**options, "is_causal": False, "attn_mask": mask}

    return _attention(change)


def _with_strict_mask() -> Run:
    def change(options: dict[str, Any]) -> dict[str, Any]:
        n, m = options["query"].shape[-2], options["key"].shape[-2]
        mask = torch.ones(n, m, dtype=torch.bool).tril(-1)
        mask[0] = torch.arange(m) <= m  # a finite -1e9 in all places of a row has no effect
        return {**options, "is_causal": False, "attn_mask": mask.to(options["query"].device)}

    return _attention(change)


def _diagonal(by: int) -> Run:
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = dict(kwargs)
        diagonal = given.pop("diagonal", args[1] if len(args) > 1 else 0)
        return func(args[0], diagonal=diagonal + by, **given)

    return run


def _softmax(dim: int) -> Run:
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs["input"]
        if x.ndim < -dim:
            return NotImplemented
        return torch.log_softmax(x, dim) if _name(func) == "log_softmax" else torch.softmax(x, dim)

    return run


# ---- masks that are written by hand -------------------------------------------------------------------------

_LOW = -1e3
"""Scores are hidden by a number at most as large as this."""
HIDES = frozenset({"masked_fill", "where", "add", "iadd", "radd"})
"""Functions with which scores are hidden."""


def _masking(change: Callable[[torch.Tensor], torch.Tensor | None]) -> Run:
    """Returns the variant of masked_fill, where and sums that hide other scores.

    Args:
        change: Called with the mask, True for hidden scores; returns those to hide in place, or None for none.
    """

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        name = _name(func)
        if name == "masked_fill":
            given = {**dict(zip(("input", "mask", "value"), args, strict=False)), **kwargs}
            scores, hidden, value = given["input"], given["mask"], given["value"]
        elif name == "where":
            given = {**dict(zip(("condition", "input", "other"), args, strict=False)), **kwargs}
            if "other" not in given:
                return NotImplemented
            scores, hidden, value = given["input"], ~given["condition"].bool(), given["other"]
            if not _is_low(value):
                scores, hidden, value = value, ~hidden, scores
        else:
            given = {**dict(zip(("input", "other"), args, strict=False)), **kwargs}
            scores, mask = given.get("input"), given.get("other")
            if not isinstance(scores, torch.Tensor) or not isinstance(mask, torch.Tensor):
                return NotImplemented
            if _is_additive(scores) and not _is_additive(mask):
                scores, mask = mask, scores
            if not _is_additive(mask):
                return NotImplemented
            hidden, value = mask <= _LOW, mask.min()
        if not isinstance(scores, torch.Tensor) or not _is_low(value):
            return NotImplemented
        changed = change(hidden)
        if changed is None:
            return scores.clone()
        return scores.masked_fill(changed, -1e9)  # finite: a row without keys is the mean of all

    return run


def _is_low(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and float(value) <= _LOW
    return isinstance(value, (int, float)) and value <= _LOW


def _is_additive(mask: torch.Tensor) -> bool:
    """Returns whether a tensor has zeros, and numbers that hide scores."""
    if not mask.is_floating_point() or not mask.numel():
        return False
    low = mask <= _LOW
    return bool(low.any()) and not bool(mask[~low].any())


def _moved(by: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the function that moves a mask by one key: by -1 the last key is hidden, by 1 the first is seen."""

    def move(hidden: torch.Tensor) -> torch.Tensor:
        moved = hidden.roll(by, -1)
        moved[..., 0 if by > 0 else -1] = by < 0
        return moved

    return move


def _added_as_it_is(func: Any, args: Any, kwargs: Any) -> Any:
    """Adds a mask of 0 and 1 in place of 0 and a large negative number."""
    tensors = [item for item in (*args, *kwargs.values()) if isinstance(item, torch.Tensor)]
    if len(tensors) != 2:
        return NotImplemented
    scores, mask = tensors if _is_additive(tensors[1]) else tensors[::-1]
    return scores + (mask > _LOW).to(scores.dtype) if _is_additive(mask) else NotImplemented


# ---- tables of angles ---------------------------------------------------------------------------------------


def frequencies_of(table: np.ndarray) -> tuple[str, np.ndarray] | None:
    """Returns "cos", "sin" or "angle", and the frequencies of a table [..., T, D] of positions; None for others."""
    array = np.asarray(table, np.float64)
    while array.ndim > 2 and (array.shape[0] == 1 or np.array_equal(array[0], array[-1])):
        array = array[0]
    if array.ndim == 3 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 2 or len(array) < 3:
        return None
    positions = np.arange(len(array))[:, None]
    for kind, inverse, function in (("cos", np.arccos, np.cos), ("sin", np.arcsin, np.sin), ("angle", None, None)):
        first = np.clip(array[1], -1, 1) if inverse is not None else array[1]
        frequencies = inverse(first) if inverse is not None else first
        values = positions * frequencies if function is None else function(positions * frequencies)
        if frequencies.max() > 0.5 and (frequencies > 0).all() and np.abs(values - array).max() < 1e-2:
            return kind, frequencies
    return None


def theta_of(frequencies: np.ndarray) -> float | None:
    """Returns the base of frequencies base^(-k / n); None if they are others."""
    values = np.unique(np.round(np.log(frequencies), 3))[::-1]
    if len(values) < 2 or abs(values[0]) > 1e-3:
        return None
    logs = -values * len(values)
    steps = logs / np.maximum(np.arange(len(values)), 1)
    base = float(np.exp(np.median(steps[1:])))
    return base if base > 10 and np.allclose(steps[1:], steps[1], rtol=2e-2) else None


def with_theta(table: np.ndarray, theta: float) -> tuple[np.ndarray, float] | None:
    """Returns a table of angles, their cosines or sines with another base, and the base that it has."""
    found = frequencies_of(table)
    old = theta_of(found[1]) if found is not None else None
    if found is None or old is None:
        return None
    kind, frequencies = found
    count = len(np.unique(np.round(np.log(frequencies), 3)))
    old = min((t for t in THETA if abs(math.log(t / old)) < 0.05), default=old)
    places = np.round(-np.log(frequencies) / math.log(old) * count)
    length = next(axis for axis in range(table.ndim - 2, -1, -1) if table.shape[axis] > 1)
    angles = np.arange(table.shape[length])[:, None] * theta ** (-places / count)
    values = angles if kind == "angle" else getattr(np, kind)(angles)
    shape = [1] * table.ndim
    shape[length], shape[-1] = values.shape
    return np.broadcast_to(values.reshape(shape), table.shape), old


def theta_variants(others: Sequence[float]) -> list[Variant]:
    """Returns the variants of the base of the angles that a module gets as tables of cosines and sines.

    Args:
        others: Numbers that the module under test holds.
    """

    def turned(theta: float) -> Run:
        def change(item: Any) -> Any:
            if not isinstance(item, torch.Tensor) or not item.is_floating_point() or item.ndim < 2:
                return item
            found = with_theta(item.detach().cpu().double().numpy(), theta)
            return item if found is None else torch.from_numpy(np.array(found[0])).to(item)

        def run(func: Any, args: Any, kwargs: Any) -> Any:
            changed = tuple(map(change, args))
            return (
                func(*changed, **kwargs)
                if any(x is not y for x, y in zip(changed, args, strict=True))
                else NotImplemented
            )

        return run

    bases = dict.fromkeys((*(float(n) for n in others if n >= 100), *THETA))
    return [
        Variant(f"theta is {theta:g} in a, another in b", frozenset({"mul", "rmul"}), turned(theta))
        for theta in bases
    ]


# ---- rotary positions ---------------------------------------------------------------------------------------


def _pairs(func: Any, args: Any, kwargs: Any) -> Any:
    """Turns the rotation of the halves of a head into that of pairs of neighbours."""
    name = _name(func)
    if name == "getitem":
        x, index = args
        last = index[-1] if isinstance(index, tuple) else None
        if isinstance(last, slice) and index[0] is Ellipsis and last.step in (None, 1) and x.shape[-1] % 2 == 0:
            half = x.shape[-1] // 2
            if (last.start or 0) == 0 and last.stop == half:
                return x[..., ::2]
            if last.start == half and last.stop in (None, 2 * half):
                return x[..., 1::2]
        return NotImplemented
    if name == "chunk":
        given = {**dict(zip(("input", "chunks", "dim"), args, strict=False)), **kwargs}
        if given.get("chunks") == 2 and given.get("dim", 0) in (-1, given["input"].ndim - 1):
            return given["input"][..., ::2], given["input"][..., 1::2]
        return NotImplemented
    tensors, dim = args[0] if args else kwargs["tensors"], kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if len(tensors) == 2 and tensors[0].shape == tensors[1].shape and dim in (-1, tensors[0].ndim - 1):
        return torch.stack(list(tensors), dim=-1).flatten(-2)
    return NotImplemented


def _halves(func: Any, args: Any, kwargs: Any) -> Any:
    """Turns the rotation of pairs of neighbours into that of the halves of a head."""
    name = _name(func)
    if name == "getitem":
        x, index = args
        last = index[-1] if isinstance(index, tuple) else None
        if isinstance(last, slice) and last.step == 2:
            half = x.shape[-1] // 2
            return x[..., half:] if last.start == 1 else x[..., :half]
        return NotImplemented
    if name == "stack":
        tensors, dim = args[0] if args else kwargs["tensors"], kwargs.get("dim", args[1] if len(args) > 1 else 0)
        if len(tensors) == 2 and dim in (-1, tensors[0].ndim):
            return torch.stack(list(tensors), dim=-2)
        return NotImplemented
    if name == "repeat_interleave":
        given = {**dict(zip(("input", "repeats", "dim"), args, strict=False)), **kwargs}
        if given.get("repeats") == 2 and given.get("dim") in (-1, given["input"].ndim - 1):
            return torch.cat([given["input"], given["input"]], dim=-1)
        return NotImplemented
    if name == "view_as_complex":
        x = args[0]
        return func(x.reshape(*x.shape[:-2], 2, x.shape[-2]).transpose(-1, -2).contiguous())
    if name == "view_as_real":
        y = func(args[0])
        return y.transpose(-1, -2).contiguous().reshape(y.shape)
    return NotImplemented


# ---- sums, norms, images ------------------------------------------------------------------------------------


def _variance(correction: int) -> Run:
    """Returns the variant of var and std with another correction, the number that is subtracted from the count."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = {k: v for k, v in kwargs.items() if k in ("keepdim",)}
        own = list(args[1:])
        flags = [item for item in own if isinstance(item, bool)]
        dim = kwargs.get("dim", next((item for item in own if not isinstance(item, bool)), None))
        is_unbiased = flags[0] if flags else kwargs.get("unbiased", kwargs.get("correction", 1) not in (0, None))
        if len(flags) > 1:
            given["keepdim"] = flags[1]
        if int(bool(is_unbiased)) == correction:
            return NotImplemented
        return func(args[0], dim=dim, correction=correction, **given)

    return run


def _hand_written_norm(change: Callable[[torch.Tensor, float], torch.Tensor]) -> Run:
    """Returns the variant of layer_norm with another quotient, given the deviations from the mean, and eps."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = {**dict(zip(("input", "shape", "weight", "bias", "eps"), args, strict=False)), **kwargs}
        shape: Any = given.get("normalized_shape", given.get("shape"))
        x, axes = given["input"], tuple(range(-len(shape), 0))
        if len(axes) > 1:
            return NotImplemented
        y = change(x - x.mean(axes, keepdim=True), given.get("eps", 1e-5))
        y = y if given.get("weight") is None else y * given["weight"]
        return y if given.get("bias") is None else y + given["bias"]

    return run


def _variance_of(x: torch.Tensor, ddof: int = 0) -> torch.Tensor:
    """Returns the variance over the last axis of values whose mean is 0."""
    return x.square().sum(-1, keepdim=True) / (x.shape[-1] - ddof)


_NORM = frozenset({"layer_norm"})
NORMS = [
    Variant(
        "unbiased variance (ddof 1) in a, biased in b",
        _NORM,
        _hand_written_norm(lambda x, eps: x / (_variance_of(x, 1) + eps).sqrt()),
    ),
    Variant(
        "eps is added to the standard deviation in a, to the variance in b",
        _NORM,
        _hand_written_norm(lambda x, eps: x / (_variance_of(x).sqrt() + eps)),
    ),
    Variant(
        "unbiased standard deviation plus eps in a, biased variance plus eps in b",
        _NORM,
        _hand_written_norm(lambda x, eps: x / (_variance_of(x, 1).sqrt() + eps)),
    ),
]


_RESIZE = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")


def _resized(**changes: Any) -> Run:
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = {**dict(zip(_RESIZE, args, strict=False)), **kwargs}
        mode = given.get("mode", "nearest")
        if "align_corners" in changes:
            if (
                mode in ("nearest", "nearest-exact", "area")
                or bool(given.get("align_corners")) is changes["align_corners"]
            ):
                return NotImplemented
            return func(**{**given, **changes})
        linear = {3: "linear", 4: "bilinear", 5: "trilinear"}[given["input"].ndim]
        new = linear if changes["mode"] == "linear" else changes["mode"]
        if new == mode:
            return NotImplemented
        return func(**{**given, "mode": new, "align_corners": None if new == "nearest" else False})

    return run


_PAD = ("input", "pad", "mode", "value")


def _padded(mode: str) -> Run:
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = {**dict(zip(_PAD, args, strict=False)), **kwargs}
        if given.get("mode", "constant") == mode:
            return NotImplemented
        return func(given["input"], given["pad"], mode=mode)

    return run


def _padded_at(change: Callable[[list[int]], list[int]]) -> Run:
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = {**dict(zip(_PAD, args, strict=False)), **kwargs}
        given["pad"] = change(list(given["pad"]))
        return func(**given)

    return run


def _conv_padded(mode: str) -> Run:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        padding = given.get("padding", 0)
        axes = given["input"].ndim - 2
        sizes = [padding] * axes if isinstance(padding, int) else list(padding)
        if isinstance(padding, str) or not any(sizes):
            return NotImplemented
        pad = [size for item in reversed(sizes) for size in (item, item)]
        given["input"], given["padding"] = F.pad(given["input"], pad, mode=mode), 0
        return func(**given)

    return run


def _pooled(kind: str) -> Run:
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = dict(zip(("input", "kernel_size", "stride", "padding"), args, strict=False))
        given.update({k: v for k, v in kwargs.items() if k in ("input", "kernel_size", "stride", "padding")})
        axes = next(int(c) for c in _name(func) if c.isdigit())
        return getattr(F, f"{kind}_pool{axes}d")(**given)

    return run


def _padded_count(counts: bool) -> Run:
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if bool(given.get("count_include_pad", True)) is counts:
            return NotImplemented
        return func(**{**given, "count_include_pad": counts})

    return run


def _bias(factor: float) -> Run:
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = list(args)
        bias = kwargs.get("bias", given[2] if len(given) > 2 else None)
        if bias is None:
            return NotImplemented
        if "bias" in kwargs:
            return func(*given, **{**kwargs, "bias": bias * factor})
        given[2] = bias * factor
        return func(*given, **kwargs)

    return run


def _tf32(x: torch.Tensor) -> torch.Tensor:
    bits = x.float().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32).to(x.dtype)


def _in_tf32(func: Any, args: Any, kwargs: Any) -> Any:
    given = [
        _tf32(a) if isinstance(a, torch.Tensor) and a.is_floating_point() and i < 2 else a for i, a in enumerate(args)
    ]
    return func(*given, **kwargs)


def _reversed_list(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = args[0] if args else kwargs["tensors"]
    rest = {k: v for k, v in kwargs.items() if k != "tensors"}
    return func(list(tensors)[::-1], *args[1:], **rest)


def _reversed_parts(func: Any, args: Any, kwargs: Any) -> Any:
    parts = func(*args, **kwargs)
    return tuple(parts)[::-1]


def _negated(func: Any, args: Any, kwargs: Any) -> Any:
    return -func(*args, **kwargs)


def _repeated(func: Any, args: Any, kwargs: Any) -> Any:
    given = {**dict(zip(("input", "repeats", "dim"), args, strict=False)), **kwargs}
    if not isinstance(given.get("repeats"), int) or given.get("dim") is None:
        return NotImplemented
    return torch.cat([given["input"]] * given["repeats"], dim=given["dim"])


def _flipped(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].clone()


def _summed(kind: str) -> Run:
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = {**dict(zip(("input", "dim", "keepdim"), args, strict=False)), **kwargs}
        dim = given.get("dim")
        if kind == "amax":
            return torch.amax(given["input"], dim=() if dim is None else dim, keepdim=bool(given.get("keepdim")))
        options = {} if dim is None else {"dim": dim, "keepdim": bool(given.get("keepdim"))}
        return getattr(torch, kind)(given["input"], **options)

    return run


def _left_out(func: Any, args: Any, kwargs: Any) -> Any:
    """Leaves out the second operand of an operation on two tensors."""
    tensors = [item for item in args[:2] if isinstance(item, torch.Tensor) and item.is_floating_point()]
    if len(tensors) < 2:
        return NotImplemented
    shape = torch.broadcast_shapes(tensors[0].shape, tensors[1].shape)
    return tensors[0].expand(shape).clone() if tensors[0].shape == shape else NotImplemented


def _left_out_first(func: Any, args: Any, kwargs: Any) -> Any:
    return _left_out(func, args[1::-1], kwargs)


def _over_queries(func: Any, args: Any, kwargs: Any) -> Any:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    query, key = given["query"], given["key"]
    scores = query @ key.transpose(-1, -2) * (given.get("scale") or query.shape[-1] ** -0.5)
    mask = given.get("attn_mask")
    if given.get("is_causal"):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -2) @ given["value"]


_CONVS = frozenset({"conv1d", "conv2d", "conv3d"})
_PRODUCTS = _CONVS | {"linear", "matmul", "bmm", "einsum", "scaled_dot_product_attention"}
_POOLS = frozenset({"max_pool1d", "max_pool2d", "max_pool3d", "boolean_dispatch", "fn"})
_SDPA = frozenset({"scaled_dot_product_attention"})

TABLE: list[Variant] = [
    *(_activation(name) for name in ACTIVATIONS),
    Variant("attention scale 1 / size in a, 1 / sqrt(size) in b", _SDPA, _with_scale(-1.0)),
    Variant("attention without a scale in a, with 1 / sqrt(size) in b", _SDPA, _with_scale(0.0)),
    Variant("attention scale 1 / size^(1/4) in a, 1 / sqrt(size) in b", _SDPA, _with_scale(-0.25)),
    Variant("attention scale sqrt(size) in a, 1 / sqrt(size) in b", _SDPA, _with_scale(0.5)),
    Variant("softmax of the attention over the queries in a, over the keys in b", _SDPA, _over_queries),
    Variant("no attention mask in a", _SDPA, _with_mask(None)),
    Variant("a causal attention mask in a, none in b", _SDPA, _with_mask(0)),
    Variant("attention mask off by one: a hides the position itself", _SDPA, _with_strict_mask()),
    Variant(
        "attention mask off by one: a hides the position itself (rows without keys see all)", _SDPA, _with_mask(-1)
    ),
    Variant("attention mask off by one: a shows the next position", _SDPA, _with_mask(1)),
    Variant(
        "mask off by one: the diagonal of triu or tril is one higher in a", frozenset({"triu", "tril"}), _diagonal(1)
    ),
    Variant(
        "mask off by one: the diagonal of triu or tril is one lower in a", frozenset({"triu", "tril"}), _diagonal(-1)
    ),
    *(
        Variant(f"softmax over the axis {dim} in a", frozenset({"softmax", "log_softmax"}), _softmax(dim))
        for dim in (-1, -2, -3)
    ),
    Variant("no attention mask in a: scores that b hides are seen", HIDES, _masking(lambda hidden: None)),
    Variant("the attention mask is inverted in a", HIDES, _masking(torch.logical_not)),
    Variant(
        "attention mask off by one: a hides one key more, such as the position itself", HIDES, _masking(_moved(-1))
    ),
    Variant("attention mask off by one: a shows one key more, such as the next position", HIDES, _masking(_moved(1))),
    Variant(
        "the attention mask of 0 and 1 is added to the scores in a: hidden keys are seen. Add 0 and -inf",
        frozenset({"add", "iadd", "radd"}),
        _added_as_it_is,
    ),
    Variant(
        "rotary positions of pairs (x[..., ::2]) in a, of halves in b", frozenset({"getitem", "chunk", "cat"}), _pairs
    ),
    Variant(
        "rotary positions of halves in a, of pairs (x[..., ::2]) in b",
        frozenset({"getitem", "stack", "repeat_interleave", "view_as_complex", "view_as_real"}),
        _halves,
    ),
    Variant("rotary positions turn in the other direction in a: the sign of the sine", frozenset({"sin"}), _negated),
    Variant("biased variance (ddof 0) in a, unbiased in b", frozenset({"var", "std"}), _variance(0)),
    Variant("unbiased variance (ddof 1) in a, biased in b", frozenset({"var", "std"}), _variance(1)),
    *NORMS,
    *(
        Variant(
            f"align_corners is {flag} in a, {not flag} in b",
            frozenset({"interpolate", "upsample"}),
            _resized(align_corners=flag),
        )
        for flag in (True, False)
    ),
    *(
        Variant(f"interpolation mode {mode} in a, another in b", frozenset({"interpolate"}), _resized(mode=mode))
        for mode in ("nearest", "linear", "bicubic")
    ),
    *(
        Variant(f"padding mode {mode} in a, another in b", frozenset({"pad"}), _padded(mode))
        for mode in ("constant", "reflect", "replicate", "circular")
    ),
    Variant(
        "padding on the other side in a",
        frozenset({"pad"}),
        _padded_at(lambda pad: [p for i in range(0, len(pad), 2) for p in (pad[i + 1], pad[i])]),
    ),
    Variant(
        "padding in equal parts on both sides in a",
        frozenset({"pad"}),
        _padded_at(lambda pad: [(pad[i] + pad[i + 1]) // 2 for i in range(0, len(pad), 2) for _ in range(2)]),
    ),
    *(
        Variant(f"padding mode {mode} in a, zeros in b", _CONVS, _conv_padded(mode))
        for mode in ("reflect", "replicate", "circular")
    ),
    Variant("average pooling in a, maximum in b", _POOLS, _pooled("avg")),
    Variant(
        "maximum pooling in a, average in b", frozenset({"avg_pool1d", "avg_pool2d", "avg_pool3d"}), _pooled("max")
    ),
    *(
        Variant(
            f"average pooling {'counts' if counts else 'does not count'} the padding in a (count_include_pad)",
            frozenset({"avg_pool1d", "avg_pool2d", "avg_pool3d"}),
            _padded_count(counts),
        )
        for counts in (True, False)
    ),
    Variant("no bias in a", _CONVS | {"linear"}, _bias(0.0)),
    Variant("the bias is added twice in a", _CONVS | {"linear"}, _bias(2.0)),
    Variant(
        "the parts are concatenated in the reverse order in a",
        frozenset({"cat", "concat", "concatenate", "stack"}),
        _reversed_list,
    ),
    Variant(
        "the parts of a split are in the reverse order in a", frozenset({"chunk", "split", "unbind"}), _reversed_parts
    ),
    Variant(
        "heads repeated in turn (tile) in a, each several times (repeat_interleave) in b",
        frozenset({"repeat_interleave"}),
        _repeated,
    ),
    Variant("the sequence is not reversed in a", frozenset({"flip"}), _flipped),
    Variant("sum in a, mean in b", frozenset({"mean"}), _summed("sum")),
    Variant("maximum in a, mean in b", frozenset({"mean"}), _summed("amax")),
    Variant("mean in a, sum in b", frozenset({"sum"}), _summed("mean")),
    Variant("a quotient is left out in a", frozenset({"div", "truediv"}), _left_out),
    *(
        Variant(f"a {what} is left out in a", frozenset({name, f"i{name}"}), run)
        for name, what in (("mul", "product"), ("add", "sum"))
        for run in (_left_out, _left_out_first)
    ),
    Variant("products in TF32 in a, whose precision is 10 bits: set MLX_ENABLE_TF32=0", _PRODUCTS, _in_tf32),
]


# ---- numbers ------------------------------------------------------------------------------------------------

_OPERATIONS = frozenset(
    {"add", "radd", "iadd", "sub", "rsub", "mul", "rmul", "div", "truediv", "rdiv", "pow", "rpow"}
)
EPS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-12, 0.0)
THETA = (10000.0, 500000.0, 1000000.0, 100000.0, 1000.0, 160000.0, 100.0)
_SEEN = 1e-9


def number_variants(
    calls: Sequence[tuple[str, tuple[Any, ...], dict[str, Any]]], others: Sequence[float]
) -> list[Variant]:
    """Returns variants of the numbers in the calls of a module: eps, theta and scales.

    Args:
        calls: What `spying` found.
        others: Numbers that the module under test holds.
    """
    found: dict[tuple[str, float, float], Variant] = {}

    def add(name: str, old: float, new: float, what: str) -> None:
        if abs(old - new) > _SEEN * max(abs(old), 1e-12):
            shown = (math.exp(abs(new)), math.exp(abs(old))) if what == "theta" and abs(old) < 100 else (new, old)
            text = f"{what} is {shown[0]:.6g} in a, {shown[1]:.6g} in b"
            found.setdefault((name, old, new), Variant(text, frozenset({name}), _replacing(old, new)))

    for name, args, kwargs in calls:
        numbers = [n for n in (*args, *kwargs.values()) if isinstance(n, (int, float)) and not isinstance(n, bool)]
        for old in map(float, numbers):
            candidates: tuple[float, ...]
            if name in ("layer_norm", "group_norm", "batch_norm", "rms_norm", "instance_norm", "normalize"):
                candidates, what = (EPS if 0 <= old <= 1e-2 else ()), "eps"
            elif name in ("add", "radd", "iadd", "sub", "clamp", "clamp_min", "maximum") and 0 <= old <= 1e-2:
                candidates, what = EPS, "eps"
            elif name in ("pow", "rpow") and old >= 100:
                candidates, what = THETA, "theta"
            elif name in ("mul", "rmul", "div", "truediv") and abs(old) > 2 and _is_log(abs(old)):
                candidates, what = tuple(math.copysign(math.log(t), old) for t in THETA), "theta"
            elif name in ("mul", "rmul", "div", "truediv") and old not in (0.0,):
                candidates, what = (old * old, math.sqrt(abs(old)), 1.0, -old, 1 / old, 2 * old, old / 2), "a scale"
            elif name in ("leaky_relu", "elu", "celu", "softplus"):
                candidates, what = (0.01, 0.1, 0.2, 0.3, 0.5, 1.0), "the slope or alpha"
            elif name in ("mul", "add", "sub"):
                candidates, what = (), "a number"
            else:
                continue
            for new in (*candidates, *others):
                if what != "eps" or 0 <= new <= 1e-2:
                    add(name, old, float(new), what)
    return list(found.values())


def _is_log(value: float) -> bool:
    return any(abs(value - math.log(theta)) < 1e-6 * value for theta in THETA)


def _replacing(old: float, new: float) -> Run:
    def change(item: Any) -> Any:
        is_number = isinstance(item, (int, float)) and not isinstance(item, bool)
        return new if is_number and abs(item - old) <= _SEEN * max(abs(old), 1e-12) else item

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        changed = tuple(map(change, args)), {name: change(item) for name, item in kwargs.items()}
        same = all(x is y for x, y in zip(changed[0], args, strict=True))
        if same and all(changed[1][name] is item for name, item in kwargs.items()):
            return NotImplemented
        return func(*changed[0], **changed[1])

    return run


def activated(name: str, array: np.ndarray) -> np.ndarray:
    """Returns the activation with a name of ACTIVATIONS of an array."""
    found: np.ndarray = ACTIVATIONS[name](torch.from_numpy(np.array(array, np.float64))).numpy()
    return found


def activation_name(name: str, kwargs: dict[str, Any], args: tuple[Any, ...] = ()) -> str:
    """Returns what an activation function is called in a message."""
    if name == "gelu":
        return "the tanh approximation of GELU" if "tanh" in (*args, *kwargs.values()) else "exact GELU"
    names = {"silu": "SiLU", "relu": "ReLU", "leaky_relu": "leaky ReLU", "elu": "ELU", "mish": "Mish"}
    return names.get(name, name)


# ---- casts --------------------------------------------------------------------------------------------------


def _uncast(half: torch.dtype) -> Run:
    """Returns the variant that leaves out a cast to fp32; integers become numbers of half precision."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        is_cast = _name(func) in ("float", "to", "type") and not args[0].is_floating_point()
        if is_cast and (_name(func) == "float" or torch.float32 in (*args[1:], *kwargs.values())):
            return args[0].to(half)
        return _left_in_half(func, args, kwargs)

    return run


def _left_in_half(func: Any, args: Any, kwargs: Any) -> Any:
    name, x = _name(func), args[0]
    if name == "float":
        return x
    dtypes = [item for item in (*args[1:], *kwargs.values()) if isinstance(item, torch.dtype)]
    if name in ("to", "type"):
        is_half = x.dtype in (torch.float16, torch.bfloat16)
        return x if is_half and torch.float32 in dtypes else NotImplemented
    if torch.float32 in dtypes:
        kept = {key: item for key, item in kwargs.items() if item is not torch.float32}
        return func(*(item for item in args if item is not torch.float32), **kept)
    return NotImplemented


def _rounded_softmax(func: Any, args: Any, kwargs: Any) -> Any:
    given = {**dict(zip(("input", "dim"), args, strict=False)), **kwargs}
    x, dim = given["input"], given["dim"]
    e = (x - x.amax(dim, keepdim=True)).exp()
    return e / e.cumsum(dim).narrow(dim, x.shape[dim] - 1, 1)


def _rounded_norm(func: Any, args: Any, kwargs: Any) -> Any:
    given = {**dict(zip(("input", "shape", "weight", "bias", "eps"), args, strict=False)), **kwargs}
    x, eps = given["input"], given.get("eps") or 1e-5
    if _name(func) == "layer_norm":
        x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    y = y if given.get("weight") is None else y * given["weight"]
    return y if given.get("bias") is None else y + given["bias"]


def casts(dtype: str) -> list[Variant]:
    """Returns the variants without a cast to fp32 that a port in bf16 or fp16 may lack."""
    return [
        Variant(
            f"a cast to fp32 is missing: a computes in {dtype} what b computes in fp32",
            frozenset({"float", "to", "type", "softmax", "sum", "mean", "log_softmax"}),
            _uncast(torch.bfloat16 if dtype == "bf16" else torch.float16),
        ),
        Variant(
            f"softmax is computed in {dtype} in a, in fp32 in b: pass precise=True",
            frozenset({"softmax"}),
            _rounded_softmax,
        ),
        Variant(
            f"a norm is computed in {dtype} in a, in fp32 in b", frozenset({"layer_norm", "rms_norm"}), _rounded_norm
        ),
    ]
