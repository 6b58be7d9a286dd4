"""Runs a `torch.nn.Module` for the comparison with its port."""

from __future__ import annotations

import contextlib
import copy
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.nn.modules import rnn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._sympy.printers import PythonPrinter

from icenet.parity.trace import Value, short_dtype
from icenet_torch.porting import export, inputs
from icenet_torch.tools import calls


def to_torch(value: Any) -> Any:
    """Returns arguments with tensors in the place of numpy arrays."""
    if isinstance(value, np.ndarray):
        if value.dtype.name == "bfloat16":
            return torch.from_numpy(value.astype(np.float32)).to(torch.bfloat16)
        return torch.from_numpy(np.array(value))
    if isinstance(value, (list, tuple)):
        return type(value)(to_torch(item) for item in value)
    if isinstance(value, dict):
        return {key: to_torch(item) for key, item in value.items()}
    return value


def to_numpy(value: torch.Tensor) -> np.ndarray:
    """Returns a tensor as a numpy array."""
    value = value.detach().resolve_conj().resolve_neg().cpu()
    if value.dtype == torch.bfloat16:
        value = value.float()
    return np.asarray(value.numpy())


def outputs(result: Any) -> list[torch.Tensor]:
    """Returns the tensors of an output in order."""
    result = export.without_data_classes(result)
    return [item for item in pytree.tree_leaves(result) if isinstance(item, torch.Tensor)]


def _value(tensor: torch.Tensor) -> Value:
    return Value(to_numpy(tensor).copy(), short_dtype(tensor.dtype))


_DOUBLE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}
_SINGLE = {torch.float64: torch.float32, torch.complex128: torch.complex64}


class _Precision(TorchDispatchMode):
    """Gives operations other dtypes in the place of those that the code of a module names, as in `x.float()`."""

    def __init__(self, dtypes: dict[torch.dtype, torch.dtype]) -> None:
        super().__init__()
        self.dtypes = dtypes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def other(item: Any) -> Any:
            return self.dtypes.get(item, item) if isinstance(item, torch.dtype) else item

        if func is not torch.ops.aten.view.dtype:  # it reads the bits
            args, kwargs = tuple(map(other, args)), {name: other(item) for name, item in (kwargs or {}).items()}
        grouped = getattr(torch.ops.aten, "_grouped_mm", None)  # torch 2.8 and later
        if grouped is not None and func is grouped.default and args[0].dtype == torch.float64:
            return _grouped_products(*args[:3])
        if func is torch.ops.aten.fake_quantize_per_channel_affine_cachemask.default:
            args = (args[0], args[1].float(), *args[2:])  # torch has no scale in float64
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default):  # torch.tensor(...)
            result = result.to(other(result.dtype))
        return result


def _grouped_products(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """Returns a `grouped_mm`, which torch does not have in float64: of rows, or of the columns of a gradient."""
    ends = offs.tolist()
    parts = list(zip([0, *ends], ends, strict=False))
    if b.ndim == 2:
        return torch.stack([a[:, start:end] @ b[start:end] for start, end in parts])
    rest = a.new_zeros(a.shape[0] - ends[-1], b.shape[-1])
    return torch.cat([*(a[start:end] @ b[group] for group, (start, end) in enumerate(parts)), rest])


def _copied(module: nn.Module) -> nn.Module:
    """Returns a copy of a module, which may hold results of operations, as the old `weight_norm` does."""
    memo: dict[int, Any] = {}
    for inner in module.modules():
        for value in vars(inner).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    copied = copy.deepcopy(module, memo)
    for inner in copied.modules():
        for name, value in vars(inner).items():
            if isinstance(value, types.FunctionType) and value.__closure__:
                vars(inner)[name] = _rebound(value, memo)
    return copied


def _rebound(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    """Returns a function such as `lambda x: m.proj(m.fc(x))` that reads the copies of what it reads."""
    cells = tuple(
        types.CellType(memo.get(id(cell.cell_contents), cell.cell_contents)) for cell in function.__closure__ or ()
    )
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


Cotangents: TypeAlias = "list[np.ndarray] | Callable[[tuple[int, ...]], np.ndarray] | None"


class Reference:
    """A copy of a module in fp32 or float64, which can be run without a change of the module.

    The copy in float64 computes in float64 where the code names float32, bf16 or fp16; the copy in fp32 has
    fp32 in the place of float64, as a port does, and keeps bf16 and fp16.

    Args:
        module: The module.
        double: Whether to compute in float64.
    """

    def __init__(self, module: nn.Module, double: bool) -> None:
        self.module = _copied(module)
        self.double = double
        self.dtypes = _DOUBLE if double else _SINGLE
        self.module._apply(self.converted)
        for inner in self.module.modules():
            for name, value in vars(inner).items():
                if isinstance(value, torch.Tensor):
                    vars(inner)[name] = self.converted(value)

    def converted(self, value: torch.Tensor) -> torch.Tensor:
        """Returns a tensor in the dtype of this copy."""
        return value.to(self.dtypes.get(value.dtype, value.dtype))

    def run(
        self,
        args: Any,
        kwargs: Any,
        training: bool,
        cotangents: Cotangents = None,
        weights: Mapping[str, np.ndarray] | None = None,
        within: Callable[[nn.Module], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> dict[str, Value]:
        """Returns the outputs, the gradients of their sum times cotangents, and the buffers after the call.

        Their names are "output[0]", "gradient:PATH" and "buffer:PATH". The gradients are those of the parameters; of
        a module without trainable parameters, those of the inputs, whose paths are "input 0" and so on.

        Args:
            args, kwargs: The arguments: numpy arrays and constants.
            training: The mode.
            cotangents: float32 arrays in the shapes of the floating-point outputs, or a function that returns one for
                a shape; without them no gradients.
            weights: Values for some of the parameters, by path.
            within: Returns a context of the module that is open during the call.
        """
        module = self.module
        module.train(training)
        module.zero_grad()
        default = torch.get_default_dtype()
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it sets the results of padding to zero
        if self.double:
            torch.set_default_dtype(torch.float64)
        try:
            with (
                export.same_attributes(module),
                inputs.unchanged([*module.parameters(), *module.buffers()]),
                calls.assigned(module, weights or {}),
                within(module),
                _Precision(self.dtypes),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")  # the module's own, at each of the sizes that are tried
                return self._run(args, kwargs, cotangents)
        finally:
            torch.set_default_dtype(default)
            torch.backends.mha.set_fastpath_enabled(fast)

    def _run(self, args: Any, kwargs: Any, cotangents: Cotangents) -> dict[str, Value]:
        module = self.module
        args, kwargs = pytree.tree_map(self.given, (args, kwargs))
        variables: dict[str, torch.Tensor] = {}
        if cotangents is None:
            with torch.no_grad():
                found = outputs(module(*args, **kwargs))
        else:
            variables = {path: value for path, value in module.named_parameters() if value.requires_grad}
            if not variables:
                given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
                variables = {
                    f"input {number}": leaf.requires_grad_()
                    for number, leaf in enumerate(given)
                    if leaf.is_floating_point()
                }
                args, kwargs = pytree.tree_map(  # the module may change its inputs in place
                    lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs)
                )
            found = outputs(module(*args, **kwargs))
            floats = [item for item in found if item.is_floating_point()]
            factors = cotangents
            if callable(cotangents):
                factors = [cotangents(tuple(item.shape)) for item in floats]
            assert isinstance(factors, list)
            loss = sum(
                (item * torch.from_numpy(factor).to(item.dtype)).sum()
                for item, factor in zip(floats, factors, strict=True)
            )
            if isinstance(loss, torch.Tensor) and loss.requires_grad:
                loss.backward()
        values = {f"output[{number}]": _value(item) for number, item in enumerate(found)}
        for path, variable in variables.items():
            gradient = torch.zeros_like(variable) if variable.grad is None else variable.grad
            values[f"gradient:{path}"] = _value(gradient)
        values.update({f"buffer:{path}": _value(value) for path, value in module.named_buffers()})
        return values

    def weights(self) -> dict[str, Value]:
        """Returns the floating-point parameters by path."""
        return {path: _value(value) for path, value in self.module.named_parameters() if value.is_floating_point()}

    def given(self, leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            leaf = to_torch(leaf)
        if isinstance(leaf, torch.Tensor):
            return self.converted(leaf.detach().clone())
        return leaf


def weights(module: nn.Module, program: Any) -> dict[str, np.ndarray]:
    """Returns parameters, buffers and constants as numpy arrays by path."""
    import ml_dtypes

    found = {}
    for path, value in export.arrays(module, program).items():
        array = to_numpy(value)
        found[path] = array.astype(ml_dtypes.bfloat16) if value.dtype == torch.bfloat16 else array
    return found


def intermediate(program: Any, args: Any, kwargs: Any) -> dict[str, np.ndarray]:
    """Returns the value of each operation of an exported program on some arguments, by name."""
    values: dict[str, np.ndarray] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node: Any) -> Any:
            result = super().run_node(node)
            if isinstance(result, torch.Tensor) and node.users:  # of an unused buffer, PyTorch 2.11 keeps the shape
                values[node.name] = to_numpy(result).copy()
            return result

    args, kwargs = to_torch((args, kwargs))
    flat = program._graph_module_flat_inputs(args, kwargs)
    flat = [item.clone() if isinstance(item, torch.Tensor) else item for item in flat]
    with torch.no_grad(), inputs.unchanged(_state(program)):
        Recorder(program.graph_module).run(*flat)
    return values


@contextlib.contextmanager
def without_dropout() -> Iterator[None]:
    """Switches dropout off while the context is open: other random numbers are drawn on each side."""
    functional = torch.nn.functional
    names = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
    before = {name: getattr(functional, name) for name in names}
    attention, plain = functional.scaled_dot_product_attention, torch.dropout
    recurrent = ("lstm", "gru", "rnn_tanh", "rnn_relu")

    def without(default: bool) -> Callable[..., torch.Tensor]:
        """Returns a dropout that drops nothing; in training its result has memory of its own."""

        def same(
            input: torch.Tensor, p: float = 0.5, training: bool = default, inplace: bool = False
        ) -> torch.Tensor:
            return input.clone() if training and p and not inplace else input

        return same

    def whole(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, *args: Any, **kwargs: Any
    ) -> Any:
        return attention(query, key, value, attn_mask, 0.0, *args, **kwargs)

    def layers(run: Callable[..., Any]) -> Callable[..., Any]:  # the sixth argument is the dropout between them
        return lambda *args: run(*args[:5], 0.0, *args[6:])

    for name in names:
        setattr(functional, name, without(name not in ("alpha_dropout", "feature_alpha_dropout")))
    functional.scaled_dot_product_attention, torch.dropout = whole, without(True)
    for name in recurrent:
        setattr(rnn._VF, name, layers(getattr(torch._C._VariableFunctions, name)))
    try:
        yield
    finally:
        for name in recurrent:
            delattr(rnn._VF, name)
        for name, function in before.items():
            setattr(functional, name, function)
        functional.scaled_dot_product_attention, torch.dropout = attention, plain


def _state(program: Any) -> list[torch.Tensor]:
    """Returns the tensors of an exported program, which are the module's own."""
    found = (*program.state_dict.values(), *program.constants.values())
    return [value for value in found if isinstance(value, torch.Tensor)]


def guards(program: Any) -> list[tuple[str, dict[str, tuple[tuple[int, int], ...]]]]:
    """Returns the conditions on sizes under which an exported program computes what the module computes.

    Returns:
        Each as a Python expression, the shortest first, and for each of its names the places, as (number of the
        tensor, dimension), which have that size. A name with several places is a size that the module has there in
        common. Inequalities (`!=`) come after the others; most follow from them.
    """
    inputs_of = set(program.graph_signature.user_inputs)
    tensors = [
        node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs_of
    ]
    common: dict[Any, Any] = {}
    own: dict[Any, list[tuple[int, int]]] = {}
    environment = None
    for number, tensor in enumerate(item for item in tensors if isinstance(item, torch.Tensor)):
        for dim, size in enumerate(tensor.shape):
            if isinstance(size, torch.SymInt) and size.node._expr.is_Symbol:
                environment = size.node.shape_env
                common[size.node._expr] = size.node.expr
                own.setdefault(size.node._expr, []).append((number, dim))
    if environment is None:
        return []
    places: dict[Any, list[tuple[int, int]]] = {}
    own = {symbol: of for symbol, of in own.items() if common[symbol].is_Symbol}  # others are fixed
    for symbol, of in own.items():
        places.setdefault(common[symbol], []).extend(of)
    expressions = sorted(
        (guard.expr for guard in environment.guards),
        key=lambda expression: (expression.func.__name__ == "Unequality", len(str(expression))),
    )
    for symbol, limit in program.range_constraints.items():  # most follow from the guards
        if limit.lower > 1:
            expressions.append(symbol >= limit.lower)
        if limit.upper.is_Integer and limit.upper < 2**31:
            expressions.append(symbol <= limit.upper)
    found = {}
    for expression in expressions:
        shared = expression.xreplace(common)
        kept, table = (shared, places) if shared.free_symbols else (expression, own)  # `x.shape[0] == y.shape[0]`
        symbols = sorted(kept.free_symbols, key=lambda symbol: table.get(symbol, []))
        if symbols and all(symbol in table for symbol in symbols):
            text = PythonPrinter().doprint(kept).replace("torch.sym_float", "float")
            text = text.replace("torch._sym_", "math.")  # sqrt, log2
            found[text] = {str(symbol): tuple(table[symbol]) for symbol in symbols}
    return list(found.items())


def accepts(program: Any, args: Any, kwargs: Any) -> bool:
    """Returns whether the guards of an exported program allow the sizes of some arguments."""
    try:
        with torch.no_grad(), inputs.unchanged(_state(program)):
            program.module()(*to_torch(args), **to_torch(kwargs))
    except Exception:
        return False
    return True
