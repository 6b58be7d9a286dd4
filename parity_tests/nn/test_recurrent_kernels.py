"""MLX's recurrent layers against PyTorch in float64: loops, numpy, kernels in an emulation, and kernels on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import icenet.blas  # noqa: F401  (first: it decides which BLAS MLX finds)

# isort: split
import emulated_gpu
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch

from icenet.core.errors import UsageError
from icenet.nn import GRU, LSTM, RNN
from icenet.nn.device_limits import Limits
from icenet.nn.recurrence import host, kernels
from icenet.nn.recurrence.source import CUDA_ORDER, GATES, Kernel
from icenet.nn.recurrence.tiles import WARPS, choose_tiles
from icenet.parity.yardstick import judge
from icenet_torch import nn as torch_layers

KINDS = {"lstm": LSTM, "gru": GRU, "rnn": RNN, "relu": RNN}
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
INPUTS = 5

# A counter without atomic operations: one thread of the emulation runs at a time, and switches at known places only.
EMULATED_ORDER = """
inline void arrive(unsigned* counter) { ++*counter; machine::moved = true; }
inline void wait_for(unsigned* counter, unsigned arrivals) { while (*counter < arrivals) machine::yield(); }
"""


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def emulate(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Returns a function that makes the layers run the kernels in the emulation."""

    def use(limits: Limits, metal: bool = False, reversed_order: bool = False) -> None:
        def build(kernel: Kernel, shared_memory: int) -> Any:
            return emulated_gpu.kernel(
                compiled,
                name="recurrent",
                input_names=list(kernel.inputs),
                output_names=list(kernel.outputs),
                source=kernel.source,
                header=kernel.header.replace(CUDA_ORDER, EMULATED_ORDER),
                shared_memory=shared_memory,
                metal=metal,
                reversed_order=reversed_order,
            )

        monkeypatch.setattr(kernels, "are_used", lambda projected, weight: True)
        monkeypatch.setattr(kernels, "device_limits", lambda index: limits)
        monkeypatch.setattr(kernels, "on_metal", lambda: metal)
        monkeypatch.setattr(kernels, "build", build)
        monkeypatch.setattr(kernels, "new_counters", lambda after, size: mx.zeros((size,), mx.uint32))

    return use


def weights(kind: str, hidden: int, directions: int = 1) -> dict[str, np.ndarray]:
    drawn = np.random.default_rng(hidden)
    rows = GATES["rnn" if kind == "relu" else kind] * hidden
    shapes = {"weight_ih": (rows, INPUTS), "weight_hh": (rows, hidden), "bias": (rows,)}
    if kind == "gru":
        shapes["bias_hn"] = (hidden,)
    return {
        name + direction: (drawn.normal(size=shape) * (hidden**-0.5 if len(shape) == 2 else 0.3)).astype(np.float32)
        for direction in ("", "_reverse")[:directions]
        for name, shape in shapes.items()
    }


def inputs(steps: int, batch: int, hidden: int, states: int, padded: bool) -> tuple[Any, list[Any], Any, Any]:
    """Returns x, the states, the mask and factors of the outputs."""
    drawn = np.random.default_rng(batch)
    x, *more = (
        drawn.normal(size=shape).astype(np.float32)
        for shape in [(steps, batch, INPUTS), *[(1, batch, hidden)] * states, (steps, batch, hidden)]
    )
    return x, more[:-1], drawn.random((steps, batch)) < 0.7 if padded else None, more[-1]


def run(layer: Any, framework: str, given: tuple[Any, list[Any], Any, Any], dtype: str) -> dict[str, Any]:
    """Returns the outputs, the last state and the gradients of all inputs and parameters; float64 numpy."""
    x, state, mask, factors = given
    if framework == "mlx":
        kind = getattr(mx, dtype)

        def loss(parameters: Any, x: Any, state: list[Any]) -> Any:
            layer.update(parameters)
            y, end = layer(x, tuple(state), None if mask is None else mx.array(mask))
            total = (y.astype(mx.float32) * mx.array(factors)).sum()
            return total + sum((part * part).sum() for part in end), (y, *end)

        arguments = layer.parameters(), mx.array(x).astype(kind), [mx.array(part) for part in state]
        (_, results), (d_parameters, d_x, d_state) = mx.value_and_grad(loss, (0, 1, 2))(*arguments)
        arrays = [*results, *d_parameters.values(), d_x, *d_state]
        values = [np.array(array.astype(mx.float32), np.float64) for array in arrays]
        names = list(d_parameters)
    else:
        kind = getattr(torch, dtype)
        x = torch.from_numpy(x).to(kind).requires_grad_()
        parts = [torch.from_numpy(part).to(layer.bias.dtype).requires_grad_() for part in state]
        y, end = layer(x, tuple(parts), None if mask is None else torch.from_numpy(mask))
        total = (y.to(torch.float64) * torch.from_numpy(factors)).sum()
        (total + sum((part.double() ** 2).sum() for part in end)).backward()
        named = dict(layer.named_parameters())
        arrays = [y, *end, *(value.grad for value in named.values()), x.grad, *(part.grad for part in parts)]
        values = [array.detach().double().numpy() for array in arrays]
        names = list(named)
    states = [f"state {index}" for index in range(len(state))]
    keys = ["outputs", *states, *names, "gradient of x", *(f"gradient of {name}" for name in states)]
    return dict(zip(keys, values, strict=True))


def check(kind: str, size: tuple[int, int, int], padded: bool = False, dtype: str = "float32") -> None:
    """Compares a layer with PyTorch's in float64 by the yardstick."""
    steps, batch, hidden = size
    options = {"activation": "relu"} if kind == "relu" else {}
    layer = KINDS[kind](INPUTS, hidden, **options)
    values = weights(kind, hidden)
    if kind == "relu" and dtype != "float32":  # no value near the edge of the ReLU, where rounding decides
        values["bias"] += 4 * np.sign(values["bias"])
        values["weight_hh"] /= 4
    layer.update({name: mx.array(value) for name, value in values.items()})
    layer.train()
    given = inputs(steps, batch, hidden, layer.states, padded)
    found = run(layer, "mlx", given, dtype)
    results = []
    for kind, made_with in ((torch.float32, dtype), (torch.float64, "float64")):
        peer = getattr(torch_layers, type(layer).__name__)(INPUTS, hidden, **options).to(kind)
        peer.load_state_dict({name: torch.from_numpy(value) for name, value in values.items()})
        results.append(run(peer, "torch", given, made_with))
    noisy, exact = results
    assert set(found) == set(exact)
    for name, expected in exact.items():
        judgement = judge(found[name], noisy[name], expected, SHORT[dtype])
        assert judgement.passed, f"{name}: {judgement.ratio}"
    layer.eval()  # without records
    x, state, mask, _ = given
    mask = None if mask is None else mx.array(mask)
    y, end = layer(mx.array(x).astype(getattr(mx, dtype)), tuple(map(mx.array, state)), mask)
    for name, array in zip(exact, (y, *end), strict=False):
        judgement = judge(np.array(array.astype(mx.float32)), noisy[name], exact[name], SHORT[dtype])
        assert judgement.passed, f"evaluation, {name}: {judgement.ratio}"


needs_compiler = pytest.mark.skipif(emulated_gpu.COMPILER is None, reason="needs g++")
SMALL = Limits(multiprocessors=3, shared_memory=3000)
"""Weights that fit in shared memory in part, and fewer blocks than tiles."""


@needs_compiler
@pytest.mark.parametrize(
    ("kind", "size", "limits", "options"),
    [
        ("lstm", (2, 3, 20), SMALL, {}),
        pytest.param("gru", (3, 3, 12), Limits(3, 0, 16, 1), {"metal": True, "padded": True}, marks=pytest.mark.slow),
        *(
            pytest.param(kind, size, limits, options, marks=pytest.mark.slow)
            for kind in KINDS
            for size, limits, options in [
                ((4, 19, 40), SMALL, {"padded": True}),
                ((3, 18, 24), SMALL, {"reversed_order": True}),
                ((4, 7, 13), Limits(8, 100_000), {"padded": True, "dtype": "bfloat16"}),
                ((1, 3, 10), Limits(8, 100_000), {"dtype": "float16"}),
                ((3, 9, 14), Limits(16, 0, 8, 1), {"metal": True, "padded": True}),
                ((2, 1, 8), Limits(16, 0, 8, 1), {"metal": True, "dtype": "float16"}),
            ]
        ),
    ],
)
def test_emulated(emulate: Any, kind: str, size: Any, limits: Limits, options: dict[str, Any]) -> None:
    """Forward and backward: units and rows that are no multiple of a tile, padding, dtypes, CUDA and Metal."""
    emulate(limits, options.get("metal", False), options.get("reversed_order", False))
    check(kind, size, options.get("padded", False), options.get("dtype", "float32"))


@pytest.mark.parametrize("terms", [1, 4])
@pytest.mark.parametrize("gates", [1, 3, 4])
def test_any_size_has_a_division(gates: int, terms: int) -> None:
    """All blocks run at once, own all units and keep no more than fits."""
    for hidden in (8, 13, 100, 512, 1500, 4096, 10_000):
        for batch in (1, 7, 64, 1000):
            for limits in (SMALL, Limits(132, 224_000), Limits(20, 90_000)):
                tiles = choose_tiles(gates, hidden, terms * hidden, batch, 4, limits)
                owned = tiles.U * tiles.WU * tiles.GROUPS
                assert tiles.unit_blocks * owned >= hidden and tiles.parts >= 1
                assert tiles.unit_blocks * tiles.parts <= limits.multiprocessors
                assert tiles.WB * tiles.WU * tiles.KS == WARPS
                assert tiles.SHARED_K * owned * gates * 4 <= limits.shared_memory
                assert hidden % tiles.V == 0 == tiles.SHARED_K % tiles.V


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    projected, weight = mx.zeros((3, 2, 64)), mx.zeros((64, 16))
    for module_name in ("on_cpu", "on_metal"):
        monkeypatch.setattr(kernels, module_name, lambda: False)
    monkeypatch.setattr(kernels, "device_limits", lambda index: SMALL)
    used = kernels.are_used
    assert used(projected, weight)
    assert not used(mx.zeros((3, 2, 16)), mx.zeros((16, 4)))  # smaller than a tile
    monkeypatch.setenv("ICENET_RECURRENT_KERNELS", "off")
    assert not used(projected, weight)
    monkeypatch.setattr(kernels, "on_metal", lambda: True)
    monkeypatch.delenv("ICENET_RECURRENT_KERNELS")
    assert not used(projected, weight)
    monkeypatch.setenv("ICENET_RECURRENT_KERNELS", "on")
    assert used(projected, weight)
    monkeypatch.setenv("ICENET_RECURRENT_KERNELS", "yes")
    with pytest.raises(UsageError, match=r"ICENET_RECURRENT_KERNELS is 'yes'; it must be on or off"):
        used(projected, weight)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("way", ["numpy", "loop"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("mlx_on_cpu")  # the loops and the kernel of a CPU
def test_on_a_cpu(kind: str, way: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    used = set()

    def is_used(*arrays: Any, original: Any = host.is_used) -> bool:
        answer: bool = original(*arrays)
        used.add(answer)
        return answer

    monkeypatch.setattr(host, "is_used", is_used)
    monkeypatch.setenv("ICENET_RECURRENT_KERNELS", "off" if way == "loop" else "on")
    check(kind, (6, 5, 12), padded)
    assert used == {way == "numpy" and sys.platform == "linux"}


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
@pytest.mark.usefixtures("mlx_on_cpu")
def test_arrays_that_are_views_on_a_cpu(kind: str) -> None:
    """The BLAS reads memory: the state and the weights are as views the same as their copies."""
    layer, random = KINDS[kind](4, 8), np.random.default_rng(0)

    def draw(*shape: int) -> mx.array:
        return mx.array(random.standard_normal(shape, dtype=np.float32))

    layer.update({name: draw(*array.shape) for name, array in layer.parameters().items()})
    x, states = draw(4, 3, 6).T, [draw(8, 3, 1).T for _ in range(layer.states)]
    layer.weight_hh = draw(8, len(layer.weight_hh)).T

    def gradients(*arrays: mx.array) -> list[np.ndarray]:
        found: Any = mx.grad(lambda x, *state: layer(x, state)[0].square().sum(), list(range(len(arrays))))(*arrays)
        return [np.array(array) for array in found]

    views = gradients(x, *states)
    layer.weight_hh = mx.array(np.array(layer.weight_hh).copy(order="C"))
    copies = gradients(*(mx.array(np.array(array).copy(order="C")) for array in (x, *states)))
    for view, copy in zip(views, copies, strict=True):
        np.testing.assert_allclose(view, copy, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_values_that_overflow_cause_no_warning_of_numpy(kind: str) -> None:
    """As those of MLX's operations."""
    layer, random = KINDS[kind](4, 8), np.random.default_rng(0)

    def draw(*shape: int) -> mx.array:
        return mx.array(random.standard_normal(shape, dtype=np.float32))

    layer.update({name: 1e38 * draw(*array.shape) for name, array in layer.parameters().items()})
    value, gradient = mx.value_and_grad(lambda x: layer(x)[0].sum())(draw(6, 3, 4))
    mx.eval(value, gradient)
    assert gradient.shape == (6, 3, 4)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
@pytest.mark.usefixtures("mlx_on_cpu")  # a kernel of a GPU has no derivative of forward mode
def test_functions_that_mlx_transforms(kind: str) -> None:
    """Compiled functions, and derivatives of forward mode of outputs and of gradients."""
    layer = KINDS[kind](INPUTS, 8)
    layer.update({name: mx.array(value) for name, value in weights(kind, 8).items()})
    layer.train()
    x, _, mask, vector = inputs(5, 3, INPUTS, 1, True)
    x, mask, vector = mx.array(x), mx.array(mask), mx.array(vector)

    def call(x: mx.array) -> mx.array:
        return layer(x, mask=mask)[0]

    def gradient(x: mx.array) -> mx.array:
        return mx.grad(lambda x: (call(x) ** 2).sum())(x)

    def slope(function: Any) -> np.ndarray:
        return np.array(mx.jvp(function, [x], [vector])[1][0])

    for function in (call, gradient):
        np.testing.assert_allclose(np.array(mx.compile(function)(x)), np.array(function(x)), rtol=0, atol=2e-6)
        moved = [np.array(function(x + step * vector), np.float64) for step in (1e-2, -1e-2)]
        expected = (moved[0] - moved[1]) / 2e-2
        assert np.abs(slope(function) - expected).max() < 2e-2 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_layers_in_vmap(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a state that is mapped, too: the loops compute the layer and its gradient."""
    monkeypatch.setenv("ICENET_RECURRENT_KERNELS", "off" if mx.cuda.is_available() else "on")
    layer, random = KINDS[kind](INPUTS, 8), np.random.default_rng(0)
    layer.update({name: mx.array(value) for name, value in weights(kind, 8).items()})

    def draw(*shape: int) -> mx.array:
        return mx.array(random.standard_normal(shape, dtype=np.float32))

    x, states = draw(2, 4, 3, INPUTS), [draw(2, 1, 3, 8) for _ in range(layer.states)]

    def gradient(x: mx.array, *state: mx.array) -> mx.array:
        return mx.grad(lambda x: (layer(x, state)[0] ** 2).sum())(x)

    expected = mx.stack([gradient(x[index], *(state[index] for state in states)) for index in range(2)])
    np.testing.assert_allclose(np.array(mx.vmap(gradient)(x, *states)), np.array(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_of_a_gradient(kind: str, training: bool) -> None:
    """The product of the Hessian of the inputs and a vector, against a difference of gradients in float64."""
    options = {"activation": "relu"} if kind == "relu" else {}
    layer = KINDS[kind](INPUTS, 8, **options)
    values = weights(kind, 8)
    layer.update({name: mx.array(value) for name, value in values.items()})
    layer.train(training)
    reference = getattr(torch_layers, type(layer).__name__)(INPUTS, 8, **options).double()
    reference.load_state_dict({name: torch.from_numpy(value) for name, value in values.items()})
    x, state, _, _ = inputs(4, 3, 8, layer.states, False)
    vector = np.random.default_rng(9).normal(size=x.shape).astype(np.float32)

    def gradient(x: mx.array) -> mx.array:
        return mx.grad(lambda x: (layer(x, tuple(map(mx.array, state)))[0] ** 2).sum())(x)

    def exact(x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        (reference(x, tuple(torch.from_numpy(part).double() for part in state))[0] ** 2).sum().backward()
        assert x.grad is not None
        return x.grad

    found = np.array(mx.grad(lambda x: (gradient(x) * mx.array(vector)).sum())(mx.array(x)))
    moved = [exact(torch.from_numpy(x.astype(np.float64) + step * vector)).numpy() for step in (1e-6, -1e-6)]
    expected = (moved[0] - moved[1]) / 2e-6
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# ---- on a GPU ---------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not mx.is_available(mx.gpu):
        pytest.skip("needs a GPU in MLX")
    monkeypatch.setenv("ICENET_RECURRENT_KERNELS", "on")
    device = mx.default_device()
    mx.set_default_device(mx.gpu)
    yield
    mx.set_default_device(device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1, 8), (7, 3, 9), (5, 64, 512), (3, 21, 1500), (4, 130, 66), (2, 2, 4100)])
def test_kernels_on_a_gpu(on_gpu: None, kind: str, size: Any, padded: bool, dtype: str) -> None:
    check(kind, size, padded, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_two_directions_and_layers_on_a_gpu(
    on_gpu: None, kind: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launches that do not depend on each other, repeated, with equal results; and equal to the loops'."""
    layers = [KINDS[kind](size, 96, bidirectional=True) for size in (64, 192)]
    drawn = np.random.default_rng(0)
    for layer in layers:
        for name, value in layer.parameters().items():
            layer[name] = mx.array(drawn.normal(size=value.shape).astype(np.float32) / 10)
    model = nn.Sequential(*layers)
    model.train()
    x = mx.array(drawn.normal(size=(40, 24, 64)).astype(np.float32))

    def loss(x: mx.array) -> mx.array:
        for layer in layers:
            x, _ = layer(x)
        return (x * x).mean()

    step = nn.value_and_grad(model, loss)
    call = mx.compile(step, inputs=model.state, outputs=model.state) if compiled else step  # it updates the model
    results = [call(x) for _ in range(5)]  # evaluated at once
    mx.eval(results)
    monkeypatch.setenv("ICENET_RECURRENT_KERNELS", "off")
    expected = step(x)
    from mlx.utils import tree_flatten

    reference = dict(tree_flatten(expected[1]))
    for value, gradients in results:
        assert float(value) == pytest.approx(float(expected[0]), rel=1e-5)
        for name, gradient in tree_flatten(gradients):
            difference = float(mx.abs(gradient - reference[name]).max() / mx.abs(reference[name]).max())
            assert difference < 1e-5, f"{name}: {difference}"
