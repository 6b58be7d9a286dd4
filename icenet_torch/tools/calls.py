"""Calls of the modules within any PyTorch model: intercepts, computes and differentiates them.

What is done with the calls is in `icenet.parity.calls.sides`, which names no framework. The mirror is
`icenet/tools/calls.py`.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from icenet.parity.trace import Value, short_dtype
from icenet_torch.nn.arrays import DTYPES, from_numpy
from icenet_torch.tools.probe import to_numpy

ARRAY: type = torch.Tensor

Handler = Callable[[str, Callable[..., Any], Any, Any], Any]
"""Called as `handle(path, call, args, kwargs)` in place of `call(*args, **kwargs)`; returns its result."""

Cotangent = Callable[[int, tuple[int, ...]], Any]
"""Returns the cotangent of the output with a number and a shape, as a numpy array; None for zero."""


# ---- modules ------------------------------------------------------------------------------------------------


def working_copy(module: nn.Module, dtype: str = "fp32", exact: bool = False) -> nn.Module:
    """Returns a copy of a module whose calls, modes and buffers can be changed.

    Args:
        module: Any module.
        dtype: fp32, bf16 or fp16, to which floating parameters and buffers are rounded. In fp32 the parameters are
            those of `module`, unless an embedding changes them in its call (`max_norm`).
        exact: Whether the copy computes in float64 on the CPU.
    """
    shares = dtype == "fp32" and not exact and all(p.dtype == torch.float32 for p in module.parameters())
    shares = shares and all(getattr(inner, "max_norm", None) is None for inner in module.modules())
    memo: dict[int, Any] = {id(p): p for p in module.parameters()} if shares else {}
    memo |= held_results(module)
    with torch.no_grad():
        copied = copy.deepcopy(module, memo)
    if not shares:
        # `to` and `double` would make complex numbers real, or leave them in complex64
        copied = copied._apply(lambda item: item.to(DTYPES[dtype]) if item.is_floating_point() else item)
    _share_hooks(module, copied)
    if exact:
        copied = copied._apply(_widened)
        for inner in copied.modules():
            for name, item in vars(inner).items():
                if not name.startswith("_") or not isinstance(item, (dict, nn.Module)):
                    vars(inner)[name] = _doubled(item)
    return copied


def _widened(item: torch.Tensor) -> torch.Tensor:
    """Returns a tensor in float64 or complex128, if it is of such numbers, on the CPU."""
    wide = torch.complex128 if item.is_complex() else torch.float64 if item.is_floating_point() else item.dtype
    return item.cpu().to(wide)


def _doubled(item: Any) -> Any:
    """Returns tensors that a module holds without registering them, in float64; parameters stay themselves."""
    if isinstance(item, torch.Tensor) and not isinstance(item, nn.Parameter):
        return _widened(item)
    if type(item) in (list, tuple):
        return type(item)(map(_doubled, item))
    return {key: _doubled(value) for key, value in item.items()} if type(item) is dict else item


def detached(module: nn.Module, rows: Mapping[str, int] | None = None) -> nn.Module:
    """Returns a copy of a module with parameters of its own, which may be updated.

    Args:
        module: Any module.
        rows: How many of its first rows a parameter keeps, by path. The others keep all. A module with less than all
            cannot be called.
    """
    memo, parameters = held_results(module), dict(module.named_parameters(remove_duplicate=False))
    for name, count in (rows or {}).items():
        kept = parameters[name].detach()[:count].clone()
        memo[id(parameters[name])] = nn.Parameter(kept, requires_grad=parameters[name].requires_grad)
    with torch.no_grad():
        copied = copy.deepcopy(module, memo)
    _share_hooks(module, copied)
    return copied


def _share_hooks(module: nn.Module, copied: nn.Module) -> None:
    """Gives the parameters of a copy the hooks of their gradients, which `copy.deepcopy` leaves out."""
    for own, other in zip(module.parameters(), copied.parameters(), strict=True):
        if other is not own and other.requires_grad:
            for hook in (own._backward_hooks or {}).values():
                other.register_hook(hook)


def held_results(module: nn.Module) -> dict[int, Any]:
    """Returns copies of the results of operations that a module holds, by id, as `copy.deepcopy` takes them.

    It cannot copy them. The old `torch.nn.utils.weight_norm` keeps the weight that it computes in each call.
    """
    held = (item for inner in module.modules() for item in vars(inner).values() if isinstance(item, torch.Tensor))
    return {id(item): item.detach().clone() for item in held if not item.is_leaf}


def buffers(module: nn.Module) -> dict[str, np.ndarray]:
    """Returns the floating buffers of a module itself, not of those within it, by name."""
    return {
        name: to_numpy(b)
        for name, b in module.named_buffers(recurse=False)
        if b.is_floating_point() and name not in module._non_persistent_buffers_set
    }


@contextlib.contextmanager
def assigned(module: nn.Module, values: Mapping[str, np.ndarray]) -> Iterator[None]:
    """Sets parameters and buffers of a module to canonical values, by path, while the context is open."""
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    before = {name: own[name].data for name in values}
    try:
        for name, array in values.items():
            own[name].data = from_numpy(np.array(array, order="C")).to(before[name])
        yield
    finally:
        for name, tensor in before.items():
            own[name].data = tensor


@contextlib.contextmanager
def intercepting(modules: Mapping[str, nn.Module], handle: Handler) -> Iterator[None]:
    """Passes every call of the modules to a handler while the context is open."""
    before: list[tuple[nn.Module, bool, Any]] = []

    def wrapped(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return handle(path, forward, args, kwargs)

        return call

    try:
        for path, module in modules.items():
            before.append((module, "forward" in vars(module), module.forward))
            vars(module)["forward"] = wrapped(path, module.forward)
        yield
    finally:
        for module, is_own, forward in before:
            if is_own:
                vars(module)["forward"] = forward
            else:
                del vars(module)["forward"]


CONVOLUTIONS = frozenset(f"conv{kind}{axes}d" for kind in ("", "_transpose") for axes in (1, 2, 3))
"""Functions whose second argument is the weight of a convolution."""


@contextlib.contextmanager
def convolution_weights() -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Yields a list to which the function and the weight of each convolution are added while the context is open."""
    found: list[tuple[str, torch.Tensor]] = []
    with _Convolutions(found):
        yield found


class _Convolutions(TorchFunctionMode):
    def __init__(self, found: list[tuple[str, torch.Tensor]]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(getattr(func, "__name__", ""))
        if name in CONVOLUTIONS:
            self._found.append((name, args[1] if len(args) > 1 else kwargs["weight"]))
        return func(*args, **kwargs)


# ---- arrays -------------------------------------------------------------------------------------------------


def snapshot(tensor: torch.Tensor) -> Value:
    """Returns what a tensor holds; the model may write to it later. `value` converts the result."""
    return Value(to_numpy(tensor), short_dtype(tensor.dtype))


def version(tensor: torch.Tensor) -> tuple[int, int]:
    """Returns a key that is that of the same tensor with the same values, while the tensor exists."""
    return id(tensor), tensor._version


def _computed(tensor: torch.Tensor) -> Value:
    """Returns a tensor that is not written to again, without a copy if it is in the memory of the host."""
    tensor = tensor.detach().to_dense()  # also a sparse one, of an embedding
    if tensor.device.type != "cpu" or tensor.dtype == torch.bfloat16 or not tensor.is_contiguous():
        return snapshot(tensor)
    return Value(tensor.numpy(), short_dtype(tensor.dtype))


def value(taken: Value) -> Value:
    """Returns a snapshot as a value, after the computation."""
    return taken


def tap(tensor: torch.Tensor, store: Callable[[Value], None], is_passed_on: bool = False) -> torch.Tensor:
    """Returns the tensor; its gradient is given to `store` when it is computed.

    Args:
        tensor, store: The tensor, and what takes its gradient.
        is_passed_on: Whether a module returns its argument, so that the gradient by other uses of it is left out.
    """
    if tensor.requires_grad:
        tensor = tensor.view_as(tensor) if is_passed_on else tensor
        tensor.register_hook(lambda gradient: store(_computed(gradient)))
    return tensor


def native(value: Value, exact: bool = False, like: nn.Module | None = None) -> torch.Tensor:
    """Returns a value as a tensor, floats in their dtype, or in float64 if `exact`, on the device of a module."""
    tensor = found = from_numpy(value.array)
    if value.is_float:
        found = found.to(torch.float64 if exact else {**DTYPES, "fp64": torch.float64}[value.dtype])
    elif tensor.is_complex():
        found = found.to(torch.complex128 if exact else torch.complex64)
    first = next(like.parameters(), None) if like is not None else None
    found = found if first is None else found.to(first.device)
    return found.clone() if found is tensor else found  # the memory of numpy must not change


# ---- computation --------------------------------------------------------------------------------------------


def evaluate(
    function: Callable[..., Sequence[Any]],
    inputs: Sequence[Value],
    module: nn.Module,
    parameters: Sequence[str] = (),
    cotangent: Cotangent | None = None,
    exact: bool = False,
    constants: bool = False,
) -> tuple[list[Value], list[Value | None], dict[str, Value]]:
    """Computes a function, and the gradient of sum(outputs * cotangents).

    Args:
        function: Takes tensors and returns a sequence of tensors.
        inputs: Its arguments.
        module: The module that it calls.
        parameters: Paths of the trainable parameters of the module by which the gradient is computed.
        cotangent: Returns the cotangents; None to compute no gradient.
        exact: Whether to compute in float64, also where the code of the module names fp32.
        constants: Has no effect.

    Returns:
        The outputs, the gradients by the floating inputs (None for others), and by the parameters that are used.
    """
    own = dict(module.named_parameters()) if parameters else {}
    by_name = {name: own[name] for name in parameters if own[name].requires_grad}
    tensors = [native(item, exact, module) for item in inputs]
    with torch.enable_grad(), exact_arithmetic() if exact else contextlib.nullcontext():
        if cotangent is not None:
            tensors = [t.requires_grad_() if item.is_float else t for t, item in zip(tensors, inputs, strict=True)]
        outputs = list(function(*(_Alias.apply(t) if t.requires_grad else t for t in tensors)))
        if cotangent is None:
            return [snapshot(output) for output in outputs], [None] * len(inputs), {}
        pairs = []
        for index, output in enumerate(outputs):
            seed = cotangent(index, tuple(output.shape))
            if seed is not None and output.requires_grad:
                pairs.append((output, from_numpy(np.asarray(seed, order="C")).to(output)))
        by = [t for t in tensors if t.requires_grad] + list(by_name.values())
        computed: Sequence[Any] = [None] * len(by)
        if by and pairs:
            seeded, seeds = [output for output, _ in pairs], [seed for _, seed in pairs]
            computed = torch.autograd.grad(seeded, by, seeds, allow_unused=True)
    found = iter(computed)
    gradients: list[Value | None] = []
    for tensor in tensors:
        gradient = next(found) if tensor.requires_grad else None
        zeros = torch.zeros_like(tensor) if tensor.requires_grad and gradient is None else gradient
        gradients.append(None if zeros is None else _computed(zeros))
    used = {name: _computed(g) for name, g in zip(by_name, found, strict=True) if g is not None}
    # an output that nothing computed, such as a parameter, or a part of another tensor may be written to later
    own_memory = [output.grad_fn is not None and output._base is None for output in outputs]
    found_outputs = [
        _computed(output) if is_own else snapshot(output) for output, is_own in zip(outputs, own_memory, strict=True)
    ]
    return found_outputs, gradients, used


class _Alias(torch.autograd.Function):
    """The identity without a copy, whose result may be changed in place, which is not possible on a leaf."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient


def mean_square(
    outputs: Sequence[torch.Tensor], targets: Sequence[Value | None], exact: bool = False
) -> torch.Tensor:
    """Returns the mean squared distance of the floating outputs from their targets, those without one left out."""
    terms = []
    for output, target in zip(outputs, targets, strict=True):
        if target is None:
            continue
        expected = native(target, exact).to(output.device)
        terms.append((output.to(expected.dtype) - expected).square().mean())
    return torch.stack(terms).sum()


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Computes in float64 where code names another floating dtype, such as `x.float()`, in the context."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Double():
            yield
    finally:
        torch.set_default_dtype(default)


class _Double(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CASTS:
            return args[0].to(torch.float64)
        kwargs = {name: _wide(item) for name, item in (kwargs or {}).items()}
        return func(*map(_wide, args), **kwargs)


_CASTS = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)
_NARROW = {
    **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64),
    torch.complex64: torch.complex128,
}


def _wide(item: Any) -> Any:
    return _NARROW.get(item, item) if isinstance(item, torch.dtype) else item


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Compiles nothing in the context: hooks and modes have no effect on compiled code. Nothing is recomputed."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_checkpoints())
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextlib.contextmanager
def on_another_device() -> Iterator[bool]:
    """Changes nothing, and its value is False: the modules of PyTorch stay on the device that holds their weights."""
    yield False


@contextlib.contextmanager
def without_checkpoints() -> Iterator[None]:
    """Keeps all values for the backward pass in the context: `torch.utils.checkpoint` computes nothing again.

    A module is called once then. PyTorch draws the same random numbers again, so the gradients are the same.
    """
    before = {name: getattr(checkpoint, name) for name in _CHECKPOINTS}
    try:
        for name, replacement in _CHECKPOINTS.items():
            setattr(checkpoint, name, replacement)
        yield
    finally:
        for name, original in before.items():
            setattr(checkpoint, name, original)


class _Called:
    """In place of the function that recomputes with `use_reentrant=True`."""

    @staticmethod
    def apply(function: Callable[..., Any], _: bool, *args: Any) -> Any:
        return function(*args)


def _keeping(*_: Any, **__: Any) -> Iterator[None]:
    """In place of the context of a call that recomputes with `use_reentrant=False`."""
    yield


_CHECKPOINTS = {"CheckpointFunction": _Called, "_checkpoint_without_reentrant_generator": _keeping}
"""What `torch.utils.checkpoint.checkpoint` calls: user code holds that function by its own name."""


# ---- state of the process -----------------------------------------------------------------------------------


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Restores the states of PyTorch's generators on exit."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


# ---- optimizers ---------------------------------------------------------------------------------------------


UPDATE = "step"
"""The method of an optimizer that changes the parameters."""
OPTIMIZERS = "a class of torch.optim, a partial of it, or a function of the module"
"""What `make_optimizer` accepts."""


def make_optimizer(module: nn.Module, given: Any, rate: float = 0.1) -> Any:
    """Returns a new optimizer of the trainable parameters of a module.

    Args:
        module: The module.
        given: A function of the module, or a class of `torch.optim` or a `partial` of it, which gets the parameters;
            None for SGD with momentum.
        rate: Learning rate of SGD with momentum.

    Raises:
        TypeError: The optimizer takes no dense gradients.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    if given is None:
        return torch.optim.SGD(trained, lr=rate, momentum=0.9)
    cls = getattr(given, "func", given)  # of a partial
    made = given(trained if isinstance(cls, type) else module)
    if isinstance(made, torch.optim.SparseAdam):
        raise TypeError("SparseAdam updates with sparse gradients only, and those of a comparison are dense")
    return made


def apply_gradients(module: nn.Module, optimizer: Any, gradients: Mapping[str, np.ndarray]) -> None:
    """Updates the parameters of a module in place, given canonical gradients by path."""
    for name, parameter in module.named_parameters():
        gradient = gradients.get(name)
        if parameter.requires_grad:
            parameter.grad = None if gradient is None else _own(gradient, parameter)
    optimizer.step()
    optimizer.zero_grad()


def _own(gradient: np.ndarray, parameter: torch.Tensor) -> torch.Tensor:
    """Returns a gradient as a tensor of its own, which an optimizer may change."""
    given = from_numpy(np.asarray(gradient, order="C"))
    tensor = given.to(parameter)
    return tensor.clone() if tensor is given else tensor


def trainable(module: nn.Module) -> list[str]:
    """Returns the paths of the trainable parameters; a shared one has one path."""
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]
