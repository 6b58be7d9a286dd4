"""PyTorch's operator database against the table of operations: each sample is exported, written as MLX and run.

python parity_tests/porting/op_db.py                       # all operations; prints the coverage
python parity_tests/porting/op_db.py --only cumsum gather  # some operations, with their errors
python parity_tests/porting/op_db.py --dtype int64 --part 0/2   # integers; every second operation
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import icenet.blas  # noqa: F401  (before mlx)

import mlx.core as mx
import numpy as np
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from icenet.core.porting.functional import make_functional
from icenet.core.porting.layout import channels_last
from icenet.core.porting.record import Graph, Node, Ref
from icenet.core.porting.table import TABLE
from icenet.core.porting.writer import write
from icenet.porting import load
from icenet_torch.porting import export

RANDOM = re.compile(
    r"dropout|rand|normal|bernoulli|uniform|multinomial|exponential|cauchy|geometric|log_normal|rrelu|empty|fractional"
)
"""Operations whose values are random or undefined."""


@dataclass
class Result:
    """What one operation of the database did."""

    name: str
    passed: int = 0
    failed: int = 0
    missing: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    skipped: int = 0


def record(function: Any, inputs: list[torch.Tensor]) -> Graph:
    """Returns the record of a function of tensors, at the level of `torch.export`."""
    module = make_fx(function, tracing_mode="real", pre_dispatch=True)(*inputs)
    reader = export._Reader.__new__(export._Reader)
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


def run_graph(graph: Graph, inputs: list[torch.Tensor]) -> tuple[Any, list[mx.array], set[str]]:
    """Returns the MLX module of a record, its outputs, and the operations that the table lacks."""
    functional = make_functional(graph)
    missing = {node.op for node in functional.nodes if node.op not in ("enter", "exit") and node.base not in TABLE}
    if missing:
        return None, [], missing
    last, _ = channels_last(functional, {}, False)
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
        scale = float(np.abs(wanted[np.isfinite(wanted)]).max()) if np.isfinite(wanted).any() else 1.0
        return bool(np.allclose(got, wanted, rtol=3e-5 * loose, atol=2e-6 * loose * max(scale, 1e-3), equal_nan=True))
    return bool((got == wanted).all()) and (got.dtype.kind == wanted.dtype.kind)


def check_sample(op: Any, sample: Any, dtype: torch.dtype, backward: bool, result: Result) -> None:
    """Runs one sample forward, and backward if its inputs take gradients."""
    leaves, spec = pytree.tree_flatten((sample.input, list(sample.args), dict(sample.kwargs)))
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    inputs = [leaves[index].detach().clone() for index in places]

    def function(*tensors: torch.Tensor) -> Any:
        whole = list(leaves)
        for index, tensor in zip(places, tensors, strict=True):
            whole[index] = tensor
        first, args, kwargs = pytree.tree_unflatten(whole, spec)
        return op.op(first, *args, **kwargs)

    try:
        wanted = function(*[item.clone() for item in inputs])
        if any(type(item) not in (torch.Tensor, torch.nn.Parameter) for item in pytree.tree_leaves(wanted)):
            result.skipped += 1
            return
        graph = record(function, inputs)
    except Exception:  # an error sample, a sparse layout: outside of ports
        result.skipped += 1
        return
    try:
        model, found, missing = run_graph(graph, inputs)
        if missing:
            result.missing.update(missing)
            return
        expected = [item for item in pytree.tree_leaves(wanted) if isinstance(item, torch.Tensor)]
        if len(found) != len(expected):
            raise AssertionError(f"{len(found)} results instead of {len(expected)}")
        if not RANDOM.search(op.name) and not sample.kwargs.get("dropout_p"):
            for ours, theirs in zip(found, expected, strict=True):
                if not close(ours, theirs):
                    raise AssertionError(
                        f"forward {tuple(theirs.shape)} {theirs.dtype}: {np.array(ours).ravel()[:3]} instead of "
                        f"{_numpy(theirs).ravel()[:3]}"
                    )
            if backward and op.supports_autograd:
                _check_gradients(model, function, inputs, expected)
        result.passed += 1
    except Exception as error:
        result.failed += 1
        shapes = [tuple(item.shape) for item in inputs]
        given = [item for item in (*sample.args, *sample.kwargs.items()) if "tensor(" not in str(item)]
        text = f"{type(error).__name__}: {str(error)[:200]} | {shapes} {given}"
        result.errors.append(" ".join(text.split())[:330])


def _check_gradients(model: Any, function: Any, inputs: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    chosen = [index for index, item in enumerate(inputs) if item.dtype == torch.float32 and item.numel()]
    if not chosen:
        return
    leaves = [item.clone().requires_grad_(index in chosen) for index, item in enumerate(inputs)]
    try:
        results = [item for item in pytree.tree_leaves(function(*leaves)) if isinstance(item, torch.Tensor)]
    except RuntimeError:
        return
    floats = [index for index, item in enumerate(results) if item.dtype == torch.float32 and item.requires_grad]
    if not floats:
        return
    generator = torch.Generator().manual_seed(0)
    factors = {index: torch.randn(results[index].shape, generator=generator) for index in floats}
    try:
        total = sum((results[index] * factors[index]).sum() for index in floats)
        gradients = torch.autograd.grad(total, [leaves[index] for index in chosen], allow_unused=True)
    except RuntimeError:  # PyTorch has no gradient of these inputs
        return
    fixed = [load.to_array(_numpy(item)) for item in inputs]

    def loss(*given: mx.array) -> mx.array:
        whole = list(fixed)
        for index, item in zip(chosen, given, strict=True):
            whole[index] = item
        outputs = load.flat(model(*whole))
        return sum((outputs[index] * load.to_array(factors[index].numpy())).sum() for index in floats)

    ours = mx.grad(loss, argnums=tuple(range(len(chosen))))(*[fixed[index] for index in chosen])
    for mine, theirs in zip([ours] if isinstance(ours, mx.array) else ours, gradients, strict=True):
        theirs = torch.zeros(mine.shape) if theirs is None else theirs
        if not close(mine, theirs, 20):
            raise AssertionError(f"gradient {np.array(mine).ravel()[:4]} instead of {_numpy(theirs).ravel()[:4]}")


def check_operation(op: Any, dtype: torch.dtype, backward: bool, limit: int) -> Result:
    """Runs the samples of an operation."""
    result = Result(op.name if not op.variant_test_name else f"{op.name}.{op.variant_test_name}")
    torch.manual_seed(0)
    with warnings.catch_warnings(), contextlib.redirect_stderr(open("/dev/null", "w", encoding="utf-8")):
        warnings.simplefilter("ignore")
        try:
            for number, sample in enumerate(op.sample_inputs("cpu", dtype, requires_grad=False)):
                if number >= limit:
                    break
                check_sample(op, sample, dtype, backward, result)
        except Exception as error:
            result.errors.append(f"samples: {error}"[:200])
    return result


def operations() -> list[Any]:
    """Returns PyTorch's operator database."""
    from torch.testing._internal.common_methods_invocations import op_db

    return list(op_db)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--forward", action="store_true")
    parser.add_argument("--part", default="0/1")
    given = parser.parse_args(arguments)
    dtype = getattr(torch, given.dtype)
    index, count = map(int, given.part.split("/"))
    total = Counter[str]()
    missing = Counter[str]()
    chosen = [op for op in operations() if dtype in op.supported_dtypes("cpu")]
    chosen = [op for op in chosen if not given.only or op.name in given.only or op.name.split(".")[-1] in given.only]
    for op in chosen[index::count]:
        result = check_operation(op, dtype, not given.forward, given.limit)
        number = sum(result.missing.values())
        total.update(passed=result.passed, failed=result.failed, missing=number, skipped=result.skipped)
        missing.update(dict.fromkeys(result.missing, 1))
        if result.failed or given.only:
            counts = f"{result.passed} passed, {result.failed} failed, {number} missing, {result.skipped} skipped"
            print(f"{result.name}: {counts}", flush=True)
            for error in result.errors[: 6 if given.only else 2]:
                print("    ", error, flush=True)
    print("missing:", ", ".join(f"{name}" for name, _ in missing.most_common()))
    tried = total["passed"] + total["failed"]
    print(
        f"{total['passed']} of {tried} samples of the table's operations, "
        f"{100 * total['passed'] / max(tried, 1):.2f}%; "
        f"{total['missing']} samples need operations that are missing, {total['skipped']} cannot be exported"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
