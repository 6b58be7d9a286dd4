"""The CUDA kernels of training against float64: emulated on the CPU, and on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import icenet.blas  # noqa: F401  (first: it decides which BLAS MLX finds)

# isort: split
import emulated_gpu
import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import tiny

from icenet.core import backends
from icenet.core.config import Config
from icenet.nn import conv, norm, training_kernels
from icenet.nn.arrays import from_numpy, to_numpy
from icenet.nn.training_kernels import activations, common, losses, norms, pooling, updates
from icenet.parity.yardstick import judge

SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
CACHES = [
    value
    for module in (activations, common, losses, norms, pooling, updates)
    for value in vars(module).values()
    if isinstance(value, functools._lru_cache_wrapper)
]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(
    params=[
        pytest.param("gpu", marks=pytest.mark.gpu),
        pytest.param("emulated", marks=pytest.mark.skipif(emulated_gpu.COMPILER is None, reason="needs g++")),
    ]
)
def device(request: Any, compiled: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "gpu":
        if not mx.cuda.is_available():
            pytest.skip("needs CUDA")
        yield request.param
        return
    for cached in CACHES:
        cached.cache_clear()

    def cuda_kernel(name: str, inputs: list[str], outputs: list[str], source: str) -> Callable[..., list[mx.array]]:
        return emulated_gpu.kernel(compiled, name=name, input_names=inputs, output_names=outputs, source=source)

    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_kernel)
    monkeypatch.setattr(training_kernels, "has_kernels", lambda: True)
    yield request.param
    for cached in CACHES:
        cached.cache_clear()


def draw(dtype: str, *shape: int, offset: float = 0.0, seed: int = 0) -> np.ndarray:
    """Returns values that the dtype has."""
    values = np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32) + np.float32(offset)
    return torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()


def run_mlx(f: Any, arrays: list[np.ndarray], cotangent: np.ndarray, dtypes: list[str]) -> list[np.ndarray]:
    """Returns the output of a function and its gradients."""
    inputs = [from_numpy(array).astype(getattr(mx, dtype)) for array, dtype in zip(arrays, dtypes, strict=True)]
    outputs, gradients = mx.vjp(f, inputs, [from_numpy(cotangent).astype(inputs[0].dtype)])
    return [to_numpy(array.astype(mx.float32)) for array in (*outputs, *gradients)]


def run_torch(f: Any, arrays: list[np.ndarray], cotangent: np.ndarray, dtypes: list[str]) -> list[np.ndarray]:
    inputs = [
        torch.from_numpy(array).to(getattr(torch, dtype)).requires_grad_()
        for array, dtype in zip(arrays, dtypes, strict=True)
    ]
    y = f(*inputs)
    y.backward(torch.from_numpy(cotangent).to(y.dtype))
    return [array.detach().double().numpy() for array in (y, *(x.grad for x in inputs))]  # type: ignore[union-attr]


def check(ours: Any, theirs: Any, arrays: list[np.ndarray], dtype: str, shape: tuple[int, ...] | None = None) -> None:
    """Compares an operation and its gradients with PyTorch's in the dtype and in float64.

    Args:
        ours, theirs: The operation in MLX and in PyTorch. The first argument has the dtype, others are fp32.
        arrays: The arguments.
        dtype: The dtype.
        shape: The shape of the output; None is that of the first argument.
    """
    cotangent = draw(dtype, *(shape or arrays[0].shape), seed=1)
    dtypes = [dtype] + ["float32"] * (len(arrays) - 1)
    found = run_mlx(ours, arrays, cotangent, dtypes)
    noisy = run_torch(theirs, arrays, cotangent, dtypes)
    exact = run_torch(theirs, arrays, cotangent, ["float64"] * len(arrays))
    for index, (a, b, r) in enumerate(zip(found, noisy, exact, strict=True)):
        judgement = judge(a, b, r, SHORT[dtype], stored="fp32" if index > 1 else None)
        assert judgement.passed, (index, judgement)


# compiling the kernels of a case takes 1 to 5 s
def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


# ---- loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "width", "softcap"),
    [("bfloat16", 1003, 5.0), slow("bfloat16", 5000, None), slow("float32", 9001, None), slow("float16", 64, 3.0)],
)
def test_cross_entropy(dtype: str, width: int, softcap: float | None, device: str) -> None:
    """Also rows with an ignored label, with a logit of minus infinity and with equal logits."""
    rows = 5
    logits = draw(dtype, rows, width) * 8
    logits[1, 3], logits[2] = -np.inf, 1.0
    labels = np.array([7, 3 + (softcap is None), 0, -100, width - 1])
    exact = torch.from_numpy(logits).double().requires_grad_()
    capped = exact if softcap is None else softcap * torch.tanh(exact / softcap)
    losses = F.cross_entropy(capped, torch.from_numpy(labels), reduction="none")
    (losses.sum() / 4).backward()
    values = from_numpy(logits).astype(getattr(mx, dtype))
    loss, gradient = training_kernels.cross_entropy(values, mx.array(labels), mx.array(4), softcap)
    assert np.allclose(to_numpy(loss), losses.detach().numpy(), rtol=2e-6, atol=2e-6)
    steps = {"float32": 2e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    truth = exact.grad.numpy()  # type: ignore[union-attr]
    found = to_numpy(gradient.astype(mx.float32))
    assert np.allclose(found, truth, rtol=steps, atol=1e-7 if dtype != "float16" else 6e-8)
    assert not found[3].any()


# ---- norms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("bfloat16", (3, 5, 6, 40)),
        slow("bfloat16", (2, 9, 11, 7)),  # one channel per thread
        slow("float16", (4, 8, 8, 520)),  # more than one tile
        slow("float32", (8, 16, 16, 4)),
    ],
)
def test_batch_norm(dtype: str, shape: tuple[int, ...], device: str) -> None:
    """The images have a mean of ten deviations, which squares of the values alone would lose in fp32."""
    x, weight, bias = (
        draw(dtype, *shape, offset=10.0),
        draw("float32", shape[-1], offset=1),
        draw("float32", shape[-1]),
    )
    running = [np.zeros(shape[-1], np.float32), np.ones(shape[-1], np.float32)]
    kept: dict[str, Any] = {}

    def ours(x: mx.array, weight: mx.array, bias: mx.array) -> list[mx.array]:
        y, kept["mean"], kept["var"] = training_kernels.batch_norm(
            x, weight, bias, *map(mx.array, running), 1e-5, 0.1
        )
        return [y]

    def theirs(x: Any, weight: Any, bias: Any) -> Any:
        kept["theirs"] = mean, var = [torch.tensor(array).to(weight.dtype) for array in running]
        return F.batch_norm(x.movedim(-1, 1), mean, var, weight, bias, True).movedim(1, -1)

    check(ours, theirs, [x, weight, bias], dtype)
    for name, truth in zip(("mean", "var"), kept["theirs"], strict=True):  # the last call is the one in float64
        assert np.allclose(to_numpy(kept[name]), truth.numpy(), rtol=1e-6)


@pytest.mark.parametrize(("dtype", "has_residual"), [("bfloat16", False), ("bfloat16", True), slow("float32", True)])
def test_batch_norm_with_what_follows(dtype: str, has_residual: bool, device: str) -> None:
    """A sum and ReLU in the kernels of the norm equal those after it, and so do the gradients of all inputs."""
    shape = (3, 5, 6, 40)
    x, residual = draw(dtype, *shape, offset=10.0), draw(dtype, *shape, seed=2)
    weight, bias = draw("float32", shape[-1], offset=1), draw("float32", shape[-1])
    running = mx.zeros(shape[-1]), mx.ones(shape[-1])

    def ours(fused: bool) -> Any:
        def compute(x: mx.array, weight: mx.array, bias: mx.array, residual: mx.array) -> list[mx.array]:
            added = residual if has_residual else None
            if fused:
                y, *_ = training_kernels.batch_norm(x, weight, bias, *running, 1e-5, 0.1, True, added)
                return [y]
            y, *_ = training_kernels.batch_norm(x, weight, bias, *running, 1e-5, 0.1)
            return [mx.maximum(y if added is None else y + added, 0)]

        return compute

    arrays, dtypes = [x, weight, bias, residual], [dtype, "float32", "float32", dtype]
    cotangent = draw(dtype, *shape, seed=1)
    found, expected = (run_mlx(ours(fused), arrays, cotangent, dtypes) for fused in (True, False))
    for a, b in zip(found, expected, strict=True):
        assert np.allclose(a, b, rtol=1e-6, atol=1e-6)
    assert (found[0] == 0).any() and found[4].any() == has_residual


@pytest.mark.parametrize("is_centered", [True, slow(False)])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("bfloat16", (3, 7, 264)), slow("float16", (2, 301)), slow("float32", (40, 512)), slow("bfloat16", (2, 1096))],
)
def test_layer_norm(dtype: str, shape: tuple[int, ...], is_centered: bool, device: str) -> None:
    x, weight, bias = (
        draw(dtype, *shape, offset=3.0),
        draw("float32", shape[-1], offset=1),
        draw("float32", shape[-1]),
    )

    def theirs(x: Any, weight: Any, *bias: Any) -> Any:
        y = x.to(weight.dtype)
        if bias:
            return F.layer_norm(y, shape[-1:], weight, *bias, 1e-5).to(x.dtype)
        return F.rms_norm(y, shape[-1:], weight, 1e-5).to(x.dtype)

    def ours(x: mx.array, weight: mx.array, *bias: mx.array) -> list[mx.array]:
        return [training_kernels.layer_norm(x, weight, bias[0] if bias else None, 1e-5)]

    check(ours, theirs, [x, weight, bias] if is_centered else [x, weight], dtype)


@pytest.mark.parametrize("width", [1, 5, 6, 33, 130])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_norm_of_rows_of_any_size(dtype: str, width: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of `mx.fast.layer_norm` on CUDA is wrong in some of them."""
    if device == "emulated":
        monkeypatch.setattr(norm, "_has_wrong_gradient", lambda x: True)
    layer = norm.LayerNorm(width)

    def ours(x: mx.array, weight: mx.array, bias: mx.array) -> list[mx.array]:
        layer.update({"weight": weight, "bias": bias})
        return [layer(x)]

    def theirs(x: Any, weight: Any, bias: Any) -> Any:
        return F.layer_norm(x.to(weight.dtype), (width,), weight, bias, 1e-5).to(x.dtype)

    drawn = draw(dtype, 5, width, offset=3.0), draw("float32", width, offset=1), draw("float32", width)
    check(ours, theirs, list(drawn), dtype)


# ---- elementwise --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "name"),
    [("bfloat16", "gelu"), slow("float16", "gelu_tanh"), slow("float32", "silu"), slow("bfloat16", "relu")],
)
def test_activation(dtype: str, name: str, device: str) -> None:
    functions = {
        "gelu": F.gelu,
        "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
        "silu": F.silu,
        "relu": F.relu,
    }
    x = np.append(draw(dtype, 600) * 3, np.array([0.0, 30, -30, 5], np.float32))
    check(lambda x: [training_kernels.activation(name, x)], functions[name], [x], dtype)


@pytest.mark.parametrize(("is_decoupled", "decay"), [(True, 0.1), slow(False, 0.2)])
def test_adam(is_decoupled: bool, decay: float, device: str) -> None:
    """A step with a clipped gradient, by the formulas of Kingma and Ba and of Loshchilov and Hutter in float64.

    The arrays have more than a block, sizes that four divides and others, and there are more than a kernel has.
    """
    factor, rate, first, second, eps = 0.25, 1e-2, 0.271, 0.143, 1e-8
    shrink, added = (1 - rate * decay, 0.0) if is_decoupled else (1.0, decay)
    numbers = [mx.array([rate / first, second**0.5]), mx.array([shrink, added])]
    shapes = [(1000,), (3, 777), (1,), (4, 2, 2100), (8192,), (5,), (3, 3000), (2049,), (8,), (8193,)]
    shapes += [(1 + index,) for index in range(updates.ARRAYS_OF_ADAM)]
    p, g, m = ([draw("float32", *shape, seed=seed) for shape in shapes] for seed in range(3))
    v = [np.square(draw("float32", *shape, seed=4)) + np.float32(0.1) for shape in shapes]
    arrays = [[from_numpy(array) for array in group] for group in (p, g, m, v)]
    arrays[1][0] = from_numpy(np.append(np.float32(0), g[0]))[1:]  # packs of its values are not aligned
    found = training_kernels.adam(*arrays, mx.array([factor]), *numbers, eps, (0.9, 0.95))
    assert len(found) == len(shapes)
    for index, result in enumerate(found):
        slope = g[index].astype(np.float64) * factor + added * p[index]
        new_m, new_v = 0.9 * m[index] + 0.1 * slope, 0.95 * v[index] + 0.05 * slope**2
        new_p = p[index] * (1 - rate * decay if is_decoupled else 1)
        new_p = new_p - rate * (new_m / first) / (np.sqrt(new_v / second) + eps)
        for array, truth in zip(result, (new_p, new_m, new_v), strict=True):
            assert array.shape == shapes[index]
            assert np.allclose(to_numpy(array), truth, rtol=1e-6, atol=1e-7)


def test_sums_of_squares(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small and large arrays, more than a kernel has, in their order."""
    monkeypatch.setattr(updates, "_LARGE", 50_000)
    monkeypatch.setattr(updates, "_PARTS", 3)
    shapes = [
        (3,),
        (50_001,),
        (2, 70),
        *[(index + 1,) for index in range(updates.ARRAYS_OF_A_SUM)],
        (300, 200),
    ]
    arrays = [draw("float32", *shape, offset=1.0) for shape in shapes]
    found = to_numpy(training_kernels.sums_of_squares([from_numpy(array) for array in arrays]))
    expected = [np.square(array.astype(np.float64)).sum() for array in arrays]
    assert np.allclose(found, expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6, 50, 16), (3000, 5), (900, 1, 72)])
@pytest.mark.parametrize(("dtype", "step"), [("float32", 1e-6), ("bfloat16", 2.0**-8)])
def test_column_sums(dtype: str, step: float, shape: tuple[int, ...], device: str) -> None:
    """They are rounded to the dtype once."""
    x = draw(dtype, *shape, offset=1.0)
    found = training_kernels.column_sums(from_numpy(x).astype(getattr(mx, dtype)))
    assert found.dtype == mx.float32
    assert mx.array_equal(found, found.astype(getattr(mx, dtype)).astype(mx.float32)).item()
    assert np.allclose(to_numpy(found), x.astype(np.float64).reshape(-1, shape[-1]).sum(axis=0), rtol=step)


@pytest.mark.parametrize("optimizer", [slow("adam"), "adamw"])
def test_an_update_with_the_kernels(
    optimizer: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms, clipping and Adam of a model, whose parameters are in two groups, equal those of MLX's operations."""
    monkeypatch.setattr(updates, "_PARTS", 2)
    config = tiny(tmp_path, f"training.optimizer={optimizer}", "training.max_grad_norm=0.1", "model.vocab_size=50")
    results = []
    for has_kernels in (False, True):
        monkeypatch.setattr(training_kernels, "has_kernels", lambda has_kernels=has_kernels: has_kernels)
        engine = backends.engine(config, "mlx", "cpu" if device == "emulated" else "gpu")
        for step in range(2):
            gradients = {
                path: draw("float32", *array.shape, seed=step) for path, array in engine.model.weights().items()
            }
            engine.apply_gradients(gradients, step, 1e-2, clip=True)
        results.append({**engine.model.weights(), **engine.optimizer_state()})
    for path, expected in results[0].items():
        assert np.allclose(results[1][path], expected, rtol=1e-5, atol=1e-7), path


ODD: dict[str, tuple[dict[str, Any], int]] = {
    "transformer": (
        {
            "type": "transformer",
            "hidden_size": 36,
            "num_layers": 1,
            "num_heads": 3,
            "vocab_size": 61,
            "max_seq_length": 24,
        },
        1,
    ),
    "llama": (
        {
            **{"type": "transformer", "hidden_size": 40, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2},
            **{
                "vocab_size": 131,
                "max_seq_length": 24,
                "norm": "rms_norm",
                "feed_forward": "gated",
                "activation": "silu",
            },
            **{"positions": "rotary", "tie_embeddings": True},
        },
        3,
    ),
    "resnet": (
        {
            **{"type": "cnn", "block": "bottleneck", "stem": "conv7", "base_channels": 5, "num_layers": 2},
            **{"hidden_size": 40, "vocab_size": 7},
        },
        5,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_steps_with_all_kernels(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of training steps in bf16 at sizes that nothing divides, with the kernels and with MLX's operations."""
    model, rows = ODD[name]
    draws = np.random.default_rng(0)
    if model["type"] == "cnn":
        inputs: Any = draws.standard_normal((rows, 33, 33, 3)).astype(np.float32)
        labels = draws.integers(0, 7, rows)
    else:
        inputs = draws.integers(0, model["vocab_size"], (rows, 19)).astype(np.int32)
        labels = draws.integers(0, model["vocab_size"], (rows, 19))
    batch = {"inputs": inputs, "labels": labels.astype(np.int32)}
    monkeypatch.setattr(updates, "_PARTS", 2)
    config = Config.from_dict(
        {"model": {**model, "dropout": 0.0}, "training": {"mixed_precision": "bf16", "batch_size": rows}}
    )
    losses = []
    for has_kernels in (False, True):
        monkeypatch.setattr(training_kernels, "has_kernels", lambda has_kernels=has_kernels: has_kernels)
        monkeypatch.setattr(training_kernels, "is_worthwhile", lambda x, has_kernels=has_kernels: has_kernels)
        engine = backends.engine(config, "mlx", "cpu" if device == "emulated" else "gpu")
        results = [engine.read(engine.train_step(batch, step, 1e-2)) for step in range(3)]
        losses.append([result.loss for result in results] + [result.grad_norm for result in results])
    assert np.allclose(*losses, rtol=0.02), losses  # a rounding of bf16 is 0.004
    assert losses[0][2] < losses[0][0]


# ---- images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "stride", "padding", "shape"),
    [(3, 2, 1, (2, 7, 8, 5)), slow(2, 2, 0, (2, 9, 7, 3)), slow(3, 1, 1, (1, 5, 6, 4))],
)
def test_max_pool(size: int, stride: int, padding: int, shape: tuple[int, ...], device: str) -> None:
    """Values are small integers, so that many windows have equal maxima; one is NaN."""
    x = np.round(draw("float32", *shape))
    x[0, 2, 3, 1] = np.nan

    def theirs(x: Any) -> Any:
        return F.max_pool2d(x.movedim(-1, 1), size, stride, padding).movedim(1, -1)

    cotangent = np.round(draw("float32", *theirs(torch.from_numpy(x)).shape, seed=1) * 4)
    found = run_mlx(lambda x: [training_kernels.max_pool(x, size, stride, padding)], [x], cotangent, ["bfloat16"])
    for a, b in zip(found, run_torch(theirs, [x], cotangent, ["float32"]), strict=True):
        assert np.array_equal(a, b, equal_nan=True)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (2, 0), (7, 3)])
@pytest.mark.parametrize("length", [7, 9, 12])
def test_convolution_with_cudnns_gradient(kernel: int, padding: int, stride: int, length: int) -> None:
    """Its gradients are written as other convolutions, which any device computes."""
    x, weight = draw("float32", 2, length, length + 1, 3), draw("float32", 4, kernel, kernel, 3)

    def theirs(x: Any, weight: Any) -> Any:
        return F.conv2d(x.movedim(-1, 1), weight.movedim(-1, 1), None, stride, padding).movedim(1, -1)

    shape = tuple(theirs(torch.from_numpy(x), torch.from_numpy(weight)).shape)
    check(lambda x, w: [conv._conv2d_on_cuda(x, w, stride, padding)], theirs, [x, weight], "float32", shape)


@pytest.mark.gpu
@pytest.mark.parametrize("strides", [(1, 2), (2, 1)])
def test_convolutions_with_gradients_of_the_same_shapes(strides: tuple[int, int]) -> None:
    """MLX's cache of cuDNN's plans does not tell them apart."""
    if not mx.cuda.is_available():
        pytest.skip("needs CUDA")
    for stride in strides:
        layer = conv.Conv2d(8, 8, 3, stride)
        x, weight = draw("float32", 2, 4 if stride == 1 else 7, 4 if stride == 1 else 7, 8), to_numpy(layer.weight)

        def ours(x: mx.array, weight: mx.array, layer: conv.Conv2d = layer) -> list[mx.array]:
            layer.update({"weight": weight})
            return [layer(x)]

        def theirs(x: Any, weight: Any, stride: int = stride) -> Any:
            return F.conv2d(x.movedim(-1, 1), weight.movedim(-1, 1), None, stride, 1).movedim(1, -1)

        check(ours, theirs, [x, weight], "float32", (2, 4, 4, 8))
