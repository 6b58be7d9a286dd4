"""Compares an `mlx.nn.Module` with its `torch.nn.Module` twin: no configuration, engine or training is needed."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from icenet.core import backends
from icenet.core.errors import UsageError
from icenet.core.models import dropout, modules, randomness
from icenet.core.weights.arrays import to_array
from icenet.parity.align import DIFFERENT_CALLS
from icenet.parity.engines import Perturbation
from icenet.parity.layer import SampledReplay
from icenet.parity.locate import Row, compare, locate
from icenet.parity.randomness import check_equal_runs
from icenet.parity.report import Report, Section
from icenet.parity.run import rounded, unequal
from icenet.parity.trace import Call, Trace, Value, short_dtype
from icenet.parity.yardstick import F, Samples

Array = npt.NDArray[Any]


def compare_modules(
    mlx: Any,
    torch: Any,
    mlx_inputs: Sequence[Array],
    torch_inputs: Sequence[Array] | None = None,
    *,
    train: bool = False,
) -> Report:
    """Compares an MLX module with its PyTorch twin in fp32: every layer in the run, and in a replay with gradients.

    The weights must be equal before (see `icenet.from_torch`). Both modules stay unchanged.

    Args:
        mlx: Any `mlx.nn.Module`.
        torch: Any `torch.nn.Module` on the CPU, with the same names of layers.
        mlx_inputs: Arguments of the MLX module: numpy arrays with MLX's axes, such as images `[B, H, W, C]`.
        torch_inputs: Arguments of the PyTorch module with PyTorch's axes, such as images `[B, C, H, W]`; default:
            the same as `mlx_inputs`.
        train: Compare in training mode. The framework's own dropout layers have equal masks on both sides.

    Returns:
        A report; `verdict()` is one line, `render(console)` prints the tables.

    Raises:
        UsageError: An argument is not a module of its framework, has parameters in another dtype than fp32, returns
            no arrays, or draws random numbers without a key; an id is outside the table of an embedding; or the
            inputs are not a list of arrays with values.
        WeightsError: An input is not an array of numbers.
    """
    _check_modules(mlx, torch)
    _check_inputs("mlx_inputs", mlx_inputs)
    if torch_inputs is not None:
        _check_inputs("torch_inputs", torch_inputs)
    if train:
        mlx, torch = _keyed(mlx), _keyed(torch)
    calls = [Call(tuple(map(_value, itertools.count(), given))) for given in (mlx_inputs, torch_inputs or mlx_inputs)]
    twins = {"MLX": mlx, "PyTorch": torch, "reference": copy.deepcopy(torch).double()}
    report = Report("fp32", {name: _describe(module) for name, module in twins.items()})
    replays = [_Replay(module, train, exact=name == "reference") for name, module in twins.items()]
    by_role = dict(zip(twins, replays, strict=True))
    in_turn = zip(replays, (calls[0], calls[1], calls[1]), strict=True)
    records = [partial(_record, replay, call) for replay, call in in_turn]
    for replay, call in zip(replays[:2], calls, strict=True):
        nn = backends.module(replay.backend, "nn")
        with nn.embedding.reading_ids(nn.tree.named_modules(replay.module)):
            randomness.check_draws(replay.backend, nn, replay.module, partial(replay, "", call))
    check_equal_runs(records[0], records[1], records[2], "fp32")
    traces = [_record(replay, call) for replay, call in zip(replays, (calls[0], calls[1], calls[1]), strict=True)]
    kinds = traces[0].layer_kinds
    ours, theirs = (
        {name: array for name, array in modules.get_weights(module).items() if not _is_renamed(name, kinds)}
        for module in (mlx, torch)
    )
    report.num_weights, report.unequal_weights = len(theirs), unequal(ours, theirs)
    report.rounded_weights = rounded(ours, theirs, report.unequal_weights)
    report.shared = modules.shared_arrays(torch)

    def sampled(role: str, in_order: bool) -> Callable[[int], Trace]:
        def sample(index: int) -> Trace:
            with _perturbed(twins[role], index, role, in_order) as perturb:
                return _record(by_role[role], perturb.call(calls[0 if role == "MLX" else 1]))

        return sample

    def sampled_replay(role: str, in_order: bool) -> SampledReplay:
        def replayed(index: int, path: str, call: Call, cotangents: list[Value] | None) -> dict[str, Value]:
            with _perturbed(twins[role], index, role, in_order, path) as perturb:
                moved = [perturb(cotangent, "cotangent", number) for number, cotangent in enumerate(cotangents or ())]
                return by_role[role](path, perturb.call(call), moved)

        return replayed

    def samples(function: Callable[[str, bool], F]) -> Samples[F]:
        in_order = function("PyTorch", True) if traces[0].has_foreign("") else None
        return Samples(function("reference", False), function("PyTorch", False), function("MLX", False), in_order)

    by_mlx, by_torch, exact = traces
    if not exact.outputs(""):
        raise UsageError(
            f"{type(torch).__name__} returns nothing that can be compared; return tensors, or tuples, lists, dicts "
            "or dataclasses of them"
        )

    def rows_of(has_differences: bool) -> list[Row]:
        used = samples(sampled).few() if has_differences else samples(sampled)
        return compare(by_mlx, by_torch, exact, kinds=("module",), samples=used)

    three = replays[0], replays[1], replays[2]
    rows = locate(rows_of, by_mlx, by_torch, exact, three, samples=samples(sampled_replay))
    report.sections = [Section(f"layers, {'training' if train else 'evaluation'}", rows)]
    return report


def _check_modules(mlx: Any, torch: Any) -> None:
    """Raises UsageError if an argument is not a module of its framework, or does not compute in fp32."""
    for backend, module in (("mlx", mlx), ("torch", torch)):
        if backends.backend_of(module) != backend:
            raise UsageError(
                "compare_modules: the MLX module comes first, then the PyTorch module; "
                f"{type(module).__name__} is the other one"
            )
        for path, array, _ in backends.module(backend, "nn.tree").named_arrays(module):
            dtype = str(array.dtype).rpartition(".")[2]
            if "float" in dtype and dtype != "float32":
                remedy = {"mlx": "apply(lambda x: x.astype(mx.float32))", "torch": "float()"}[backend]
                raise UsageError(
                    f"compare_modules: computes in fp32, and {path} of {type(module).__name__} is {dtype}; convert "
                    f"the module first, with .{remedy}"
                )


def _check_inputs(name: str, given: Any) -> None:
    """Raises UsageError if the arguments of a module are not a list of arrays with values."""
    if not isinstance(given, (list, tuple)):
        raise UsageError(
            f"compare_modules: {name} must be a list of the arguments, such as [x], not a {type(given).__name__}"
        )
    empty = next((index for index, item in enumerate(given) if 0 in getattr(item, "shape", ())), None)
    if empty is not None or not given:
        what = f"{name} is empty" if empty is None else f"{name}[{empty}] is an array without values"
        raise UsageError(f"compare_modules: {what}; nothing would be compared")


class _Replay:
    """Replays the layers of one module in a mode, and leaves its running statistics unchanged."""

    def __init__(self, module: Any, train: bool, exact: bool = False) -> None:
        self.module, self.train, self.exact = module, train, exact
        self.backend = backends.backend_of(module)
        named = backends.module(self.backend, "nn.tree").named_modules(module)
        self.dropouts = dropout.dropout_layers(named) if train else {}

    def __call__(self, path: str, call: Call, cotangents: list[Value] | None = None) -> dict[str, Value]:
        if self.exact:  # without parameters, the dtype of the inputs is that of the computation
            call, cotangents = call.map(_exact), cotangents and list(map(_exact, cotangents))
        norm = backends.module(self.backend, "nn.norm")
        before = self.module.training
        self.module.train(self.train)
        if self.dropouts:
            keys = dropout.dropout_keys(0, 0, range(len(call.values[0].array)), list(self.dropouts))
            dropout.seed_dropouts(self.dropouts.values(), backends.module(self.backend, "nn.random").to_keys(keys))
        try:
            with norm.keep_buffers(self.module):
                found: dict[str, Value] = backends.module(self.backend, "tools.probe").replay(
                    self.module, path, call, cotangents
                )
                return found
        finally:
            self.module.train(before)


def _keyed(module: Any) -> Any:
    """Returns a copy of a module whose dropout layers have keyed masks."""
    backend = backends.backend_of(module)
    named_modules = backends.module(backend, "nn.tree").named_modules
    # functions of MLX, which its pooling layers hold, cannot be copied
    functions = [item for _, inner in named_modules(module) for item in vars(inner).values() if callable(item)]
    memo = {id(item): item for item in functions if type(item).__module__ == "nanobind"}
    copied = copy.deepcopy(module, memo)
    backends.module(backend, "nn.dropout").key_dropouts(named_modules(copied))
    return copied


def _record(replay: _Replay, call: Call) -> Trace:
    with backends.module(replay.backend, "tools.probe").recording(replay.module, Trace()) as trace:
        replay("", call)
    return trace


@contextlib.contextmanager
def _perturbed(module: Any, sample: int, role: str, in_order: bool, within: str = "") -> Iterator[Perturbation]:
    """Sets the weights of a module, or of the layer `within` it, to those of a sample while the context is open.

    In the role "PyTorch" all that the layer computes is also moved by ulps. Yields the perturbation for its inputs.
    """
    backend = backends.backend_of(module)
    perturb = Perturbation("fp32", sample, rounds=role == "PyTorch")
    named = backends.module(backend, "nn.tree").named_modules(module)
    layer = next(item for path, item in named if path == within)
    weights = modules.get_weights(layer)
    shared = modules.shared_arrays(layer)  # moved once, at its first place
    own = {path: array for path, array in weights.items() if path not in shared}
    modules.set_weights(layer, {path: perturb.array(array, "weight", path) for path, array in own.items()})
    sums = backends.module("torch", "tools.sums").summing_in_order(sample) if in_order else contextlib.nullcontext()
    probe = backends.module(backend, "tools.probe")
    inner = probe.perturbing(layer, perturb.rounded) if perturb.rounds else contextlib.nullcontext()
    try:
        with inner, sums:
            yield perturb
    finally:
        modules.set_weights(layer, own)


def _exact(value: Value) -> Value:
    return Value(value.array.astype(np.float64), "fp64") if value.is_float else value


def _value(number: int, given: Any) -> Value:
    array = to_array(f"input {number}", given)
    if array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16:
        array = array.astype(np.float32)  # the dtype of the comparison
    return Value(array, short_dtype(array.dtype))


def _describe(module: Any) -> dict[str, str]:
    """Returns framework, version, device and TF32 of a module."""
    backend = backends.backend_of(module)
    device = backends.module(backend, "tools.probe").device_of(module)
    described = backends.module(backend, "tools.environment").describe(_device_name(device))
    return {**described, "tf32": "on" if backends.module(backend, "nn.arithmetic").uses_tf32(device) else "off"}


def _device_name(device: Any) -> str:
    return str(getattr(device, "type", device)).rpartition(".")[2]


def _is_renamed(name: str, kinds: dict[str, str]) -> bool:
    """Returns whether a parameter is within a layer that has other parameters in the other framework."""
    return any(name.startswith(f"{path}." if path else "") for path, kind in kinds.items() if kind in DIFFERENT_CALLS)
