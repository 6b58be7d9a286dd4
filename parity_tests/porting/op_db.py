"""PyTorch's operator database against the table of operations: each sample is exported, written as MLX and run."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
import types
import unittest
import unittest.mock
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import icenet.blas  # noqa: F401  (before mlx)

import mlx.core as mx
import numpy as np
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from icenet.core.porting.graph.functional import make_functional, with_exact_gradients
from icenet.core.porting.graph.layout import channels_last
from icenet.core.porting.record import Graph, Node, Ref
from icenet.core.porting.source.writer import write
from icenet.core.porting.table import TABLE
from icenet.porting import load
from icenet_torch.porting.reader import Reader

RANDOM = re.compile(
    r"dropout|rand|normal|bernoulli|uniform|multinomial|exponential|cauchy|geometric|log_normal|rrelu|empty|fractional"
)
"""Operations whose values are random or undefined."""
DRAWS = re.compile(r"rand|normal|bernoulli|uniform|multinomial|exponential|cauchy|geometric|log_normal|rrelu")
FREE_SIGNS = ("linalg.svd", "svd", "linalg.eigh")
"""Decompositions whose vectors have any sign: the database says what of them is determined."""


def record(function: Any, inputs: list[torch.Tensor]) -> Graph:
    """Returns the record of a function of tensors, at the level of `torch.export`."""
    module = make_fx(function, tracing_mode="real", pre_dispatch=True)(*inputs)
    for node in list(module.graph.nodes):
        if node.target is torch._C._set_grad_enabled:  # no operation; a gradient that it ends is seen as a difference
            module.graph.erase_node(node)
    reader = Reader.__new__(Reader)
    reader.files, reader.stack, reader.storages, reader.nodes = {}, [], {}, []
    reader.count, reader.taken, reader.results = 0, set(), {}
    tensors, aliases, names = {}, {}, []
    arrays = {}
    interpreter = _Meta(module)
    interpreter.run(*inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            names.append(node.name)
            tensors[node.name] = reader.meta(node.meta["val"])
            aliases[node.name] = reader.storage(node.meta["val"])
        elif node.op == "get_attr":
            from icenet.core.porting.record import Array

            value = getattr(module, node.target)
            tensors[node.name] = reader.meta(value)
            number = value.tolist() if value.numel() <= 4096 else None
            arrays[node.name] = Array(node.name, tensors[node.name], "constant", False, number)
    reader.nodes.append(Node("enter", "enter", {"path": "", "values": {name: Ref(name) for name in names}}, None))
    reader.convert(module.graph, {})
    output = next(node for node in module.graph.nodes if node.op == "output")
    result = reader.argument(output.args[0])
    result = tuple(result) if isinstance(result, list) else result
    reader.nodes.append(Node("exit", "exit", {"path": "", "values": result}, None))
    from icenet.core.porting.record import Module

    root = Module("", "samples.Sample")
    return Graph(
        reader.nodes, [Ref(name) for name in names], ([], {}), result, arrays, {"": root}, {}, tensors, aliases
    )


class _Meta(torch.fx.Interpreter):
    def run_node(self, node: Any) -> Any:
        result = super().run_node(node)
        node.meta["val"] = pytree.tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, result)
        return result


def run_graph(
    graph: Graph, inputs: list[torch.Tensor], exact_masks: bool = False
) -> tuple[Any, list[mx.array], set[str]]:
    """Returns the MLX module of a record, its outputs, and the operations that the table lacks."""
    functional = make_functional(graph)
    missing = {node.op for node in functional.nodes if node.op not in ("enter", "exit") and node.base not in TABLE}
    if missing:
        return None, [], missing
    last, _ = channels_last(functional, {}, False)
    last = with_exact_gradients(last) if exact_masks else last
    model = load.run_source(write(last, {}, None, "sample"), "Sample").Sample()
    given = [load.to_array(_numpy(item)) for item in inputs]
    return model, load.flat(model(*given)), set()


def _numpy(value: torch.Tensor) -> np.ndarray:
    if value.dtype == torch.bfloat16:
        value = value.float()
    value = value + 0 if value._is_zerotensor() else value
    return value.detach().resolve_conj().resolve_neg().contiguous().numpy()


def close(ours: mx.array, theirs: torch.Tensor, loose: float = 1.0) -> bool:
    """Returns whether two results are equal to rounding."""
    wanted = _numpy(theirs)
    got = np.array(ours.astype(mx.float32) if ours.dtype == mx.bfloat16 else ours)
    if got.shape != wanted.shape:
        return False
    if wanted.dtype.kind in "fc":
        if theirs.dtype == torch.bfloat16:
            loose *= 2.0**9  # an ulp of bf16 is 2**16 ulps of fp32; sums are of few numbers
        scale = float(np.abs(wanted[np.isfinite(wanted)]).max()) if np.isfinite(wanted).any() else 1.0
        return bool(np.allclose(got, wanted, rtol=3e-5 * loose, atol=2e-6 * loose * max(scale, 1e-3), equal_nan=True))
    return bool((got == wanted).all()) and (got.dtype.kind == wanted.dtype.kind)


Outcome = tuple[str, str]
"""What a sample did, and details: passed, failed, missing (names of operations), or skipped."""


def check_function(function: Callable[..., Any], inputs: Sequence[Any]) -> Outcome:
    """Checks the outputs and gradients of a function of tensors, as `check_sample`."""
    op = types.SimpleNamespace(name="", op=function, supports_autograd=True)
    return check_sample(op, types.SimpleNamespace(input=inputs[0], args=inputs[1:], kwargs={}), True)


def check_sample(op: Any, sample: Any, backward: bool) -> Outcome:
    """Runs one sample forward, and backward if its inputs take gradients."""
    leaves, spec = pytree.tree_flatten((sample.input, list(sample.args), dict(sample.kwargs)))
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    inputs = [leaves[index].detach().clone() for index in places]

    def function(*tensors: torch.Tensor) -> Any:
        whole = list(leaves)
        for index, tensor in zip(places, tensors, strict=True):
            whole[index] = tensor
        first, args, kwargs = pytree.tree_unflatten(whole, spec)
        result = op.op(first, *args, **kwargs)
        return sample.output_process_fn_grad(result) if op.name in FREE_SIGNS else result

    try:
        wanted = function(*[item.clone() for item in inputs])
        if any(type(item) not in (torch.Tensor, torch.nn.Parameter) for item in pytree.tree_leaves(wanted)):
            return "skipped", "the result has values that are not tensors"
        graph = record(function, [item.clone() for item in inputs])
    except Exception as error:  # an error sample, a sparse layout: outside of ports
        return "skipped", _short(error)
    try:
        model, found, missing = run_graph(graph, inputs)
        if missing:
            return "missing", " ".join(sorted(missing))
        expected = [item for item in pytree.tree_leaves(wanted) if isinstance(item, torch.Tensor)]
        if len(found) != len(expected):
            raise AssertionError(f"{len(found)} results instead of {len(expected)}")
        if not RANDOM.search(op.name) and not any(map(_is_random, graph.nodes)):
            exact: list[torch.Tensor] = []
            for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
                has_indices = number or op.name == "argsort"
                if close(ours, theirs) or (has_indices and _is_place(op.name, ours, theirs, inputs[0], sample)):
                    continue
                exact = exact or _exact(lambda *given: pytree.tree_leaves(function(*given)), inputs)
                if not _is_rounding(ours, theirs, exact[number : number + 1]):
                    raise AssertionError(
                        f"forward {tuple(theirs.shape)} {theirs.dtype}: {_some(ours)} instead of {_some(theirs)}"
                    )
            if backward and op.supports_autograd:
                try:
                    _check_gradients(model, function, inputs)
                except _NotFinite:  # the port is written again, too
                    _check_gradients(run_graph(graph, inputs, True)[0], function, inputs)
    except Exception as error:
        shapes = [tuple(item.shape) for item in inputs]
        given = [item for item in (*sample.args, *sample.kwargs.items()) if "tensor(" not in str(item)]
        return "failed", f"{_short(error)} | {shapes} {given}"[:330]
    return "passed", ""


def _is_random(node: Node) -> bool:
    """Returns whether an operation draws random numbers."""
    if "dropout" in node.base:
        return bool(node.args["p"]) and bool(node.args.get("train", True))
    return bool(DRAWS.match(node.base)) or bool(node.args.get("dropout_p"))


def _is_place(name: str, ours: mx.array, theirs: torch.Tensor, x: torch.Tensor, sample: Any) -> bool:
    """Returns whether indices are those of the same values; PyTorch does not say which of equal values it takes."""
    names = ("topk", "kthvalue", "mode", *(() if sample.kwargs.get("stable") else ("sort", "argsort")))
    if name not in names or theirs.dtype != torch.int64 or tuple(ours.shape) != theirs.shape:
        return False
    given = [item for item in sample.args[1 if name in ("topk", "kthvalue") else 0 :] if type(item) is int]
    dim = sample.kwargs.get("dim", given[0] if given else -1)
    mine = torch.from_numpy(np.array(ours).astype(np.int64))
    if mine.ndim < x.ndim:
        mine, theirs = mine.unsqueeze(dim), theirs.unsqueeze(dim)
    return bool(torch.equal(x.gather(dim, mine), x.gather(dim, theirs)))


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:220]


def _some(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return str(_numpy(value).ravel()[:3])
    return str(np.array(value.astype(mx.float32) if value.dtype == mx.bfloat16 else value).ravel()[:3])


def _exact(function: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the results in float64, [] if PyTorch has none."""
    wide = [item.double() if item.is_floating_point() else item.clone() for item in inputs]
    try:
        return [item.detach() for item in function(*wide) if isinstance(item, torch.Tensor)]
    except (RuntimeError, TypeError):
        return []


def _is_rounding(ours: mx.array, theirs: torch.Tensor, exact: list[torch.Tensor]) -> bool:
    """Returns whether a result is at most 8 times as far from float64 as PyTorch's."""
    if not exact or not theirs.is_floating_point() or exact[0].shape != theirs.shape:
        return False
    wanted = _numpy(exact[0]).astype(np.float64)
    mine = np.array(ours.astype(mx.float32)).astype(np.float64)
    if mine.shape != wanted.shape or not (np.isfinite(mine) == np.isfinite(wanted)).all():
        return False
    finite = np.isfinite(wanted)
    noise = np.abs(_numpy(theirs).astype(np.float64) - wanted)[finite].max(initial=0.0)
    ulp = np.abs(wanted[finite]).max(initial=0.0) * torch.finfo(theirs.dtype).eps
    return bool(np.abs(mine - wanted)[finite].max(initial=0.0) <= 8 * max(noise, ulp))


class _NotFinite(AssertionError):
    """A gradient is not finite where PyTorch's is."""


def _check_gradients(model: Any, function: Any, inputs: list[torch.Tensor]) -> None:
    chosen = [index for index, item in enumerate(inputs) if item.dtype == torch.float32 and item.numel()]
    if not chosen or any(item.isnan().any() for item in inputs):  # whether a gradient at NaN is NaN has no rule
        return
    factors: dict[int, torch.Tensor] = {}

    def gradients_of(*given: torch.Tensor) -> list[torch.Tensor]:
        leaves = [item.clone().requires_grad_(index in chosen) for index, item in enumerate(given)]
        results = [item for item in pytree.tree_leaves(function(*leaves)) if isinstance(item, torch.Tensor)]
        floats = [index for index, item in enumerate(results) if item.is_floating_point() and item.requires_grad]
        generator = torch.Generator().manual_seed(0)
        if not factors:
            factors.update({index: torch.randn(results[index].shape, generator=generator) for index in floats})
        if not floats:
            return []
        total = sum((results[index] * factors[index]).sum() for index in floats)
        found = torch.autograd.grad(total, [leaves[index] for index in chosen], allow_unused=True)
        return [
            torch.zeros_like(given[index]) if item is None else item.to_dense() if item.is_sparse else item
            for index, item in zip(chosen, found, strict=True)
        ]

    try:
        gradients = gradients_of(*inputs)
    except RuntimeError:  # PyTorch has no gradient of these inputs
        return
    if not gradients:
        return
    floats = list(factors)
    fixed = [load.to_array(_numpy(item)) for item in inputs]

    def loss(*given: mx.array) -> mx.array:
        whole = list(fixed)
        for index, item in zip(chosen, given, strict=True):
            whole[index] = item
        outputs = load.flat(model(*whole))
        return sum((outputs[index] * load.to_array(factors[index].numpy())).sum() for index in floats)

    found = mx.grad(loss, argnums=tuple(range(len(chosen))))(*[fixed[index] for index in chosen])
    exact: list[torch.Tensor] = []
    for number, (mine, theirs) in enumerate(
        zip([found] if isinstance(found, mx.array) else found, gradients, strict=True)
    ):
        if close(mine, theirs, 20):
            continue
        exact = exact or _exact(gradients_of, inputs)
        if not _is_rounding(mine, theirs, exact[number : number + 1]):
            is_worse = not np.isfinite(np.array(mine)[np.isfinite(_numpy(theirs))]).all()
            kind = _NotFinite if is_worse else AssertionError
            raise kind(f"gradient {np.array(mine).ravel()[:4]} instead of {_numpy(theirs).ravel()[:4]}")


def samples(op: Any, dtype: torch.dtype) -> Iterator[Callable[[], Outcome]]:
    """Yields the checks of the samples of an operation, one at a time."""
    torch.manual_seed(0)
    with warnings.catch_warnings(), contextlib.redirect_stderr(None):
        warnings.simplefilter("ignore")
        try:
            for sample in op.sample_inputs("cpu", dtype, requires_grad=False):
                yield lambda sample=sample: check_sample(op, sample, dtype == torch.float32)
        except Exception as error:
            message = _short(error)
            yield lambda: ("skipped", f"the database fails: {message}")


def name_of(op: Any) -> str:
    """Returns the name of an operation and its variant."""
    return op.name if not op.variant_test_name else f"{op.name}.{op.variant_test_name}"


def operations() -> list[Any]:
    """Returns PyTorch's operator database."""
    if (
        "expecttest" not in sys.modules and importlib.util.find_spec("expecttest") is None
    ):  # the base class of PyTorch's own tests, not of the database
        module = types.ModuleType("expecttest")
        module.TestCase = unittest.TestCase  # type: ignore[attr-defined]
        sys.modules["expecttest"] = module
    # the import would forbid changes of switches such as cuDNN's for the rest of the process
    with unittest.mock.patch.object(torch.backends, "disable_global_flags", lambda: None):
        from torch.testing._internal.common_methods_invocations import op_db
    return list(op_db)
