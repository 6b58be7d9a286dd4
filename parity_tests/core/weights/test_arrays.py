"""Arrays of other byte orders, dtypes and strides, lists and tensors as weights: the right values or one line."""

from __future__ import annotations

import copy
from typing import Any

import icenet.blas  # noqa: F401  (before mlx)

import ml_dtypes
import numpy as np
import pytest
from helpers import BACKENDS, is_one_line

from icenet.core.errors import WeightsError
from icenet.core.models import modules
from icenet.core.weights.arrays import to_array

mx: Any = pytest.importorskip("mlx.core")
mlx_nn: Any = pytest.importorskip("mlx.nn")
torch: Any = pytest.importorskip("torch")
arrays: Any = pytest.importorskip("icenet.nn.arrays")

WEIGHT = np.arange(24, dtype=np.float32).reshape(4, 3, 2) - 7.5  # of a Conv1d, whose axes MLX permutes
BIAS = np.array([1.5, -2.0, 0.25, 8.0], np.float32)


def layer(backend: str) -> Any:
    if backend == "mlx":
        return mlx_nn.Conv1d(3, 4, 2)
    return torch.nn.Conv1d(3, 4, 2)


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


VALUES = {
    "big-endian": lambda a: a.astype(">f4"),
    "big-endian float64": lambda a: a.astype(">f8"),
    "float64": lambda a: a.astype("f8"),
    "float16": lambda a: a.astype("f2"),
    "big-endian float16": lambda a: a.astype(">f2"),
    "bfloat16": lambda a: a.astype(ml_dtypes.bfloat16),
    "Fortran order": np.asfortranarray,
    "negative strides": lambda a: a[::-1].copy()[::-1],
    "every second": lambda a: np.repeat(a, 2, axis=0)[::2],
    "bfloat16 backward": lambda a: a[::-1].astype(ml_dtypes.bfloat16)[::-1],
    "read-only": read_only,
    "list": lambda a: a.tolist(),
    "unaligned": lambda a: np.frombuffer(b"x" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_arrays_of_any_layout(backend: str) -> None:
    for name, form in VALUES.items():
        assert to_array("weight", form(WEIGHT)).dtype.isnative, name
        module = layer(backend)
        modules.set_weights(module, {"weight": form(WEIGHT), "bias": form(BIAS)})
        found = modules.get_weights(module)
        assert np.array_equal(found["weight"], WEIGHT) and np.array_equal(found["bias"], BIAS), name
        assert {array.dtype for array in found.values()} == {np.dtype("float32")}, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_integers_and_tensors(backend: str) -> None:
    whole = np.arange(24).reshape(4, 3, 2)
    for form in (
        lambda a: a.astype(">i8"),
        lambda a: a.astype(np.uint8),
        lambda a: torch.tensor(a.astype("f4"), requires_grad=True),
        lambda a: mx.array(a.astype("f4")),
    ):
        module = layer(backend)
        modules.set_weights(module, {"weight": form(whole), "bias": form(whole[:, 0, 0])})
        assert np.array_equal(modules.get_weights(module)["weight"], whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "value",
    [
        WEIGHT.astype(object),
        WEIGHT.astype(str),
        WEIGHT.astype(complex),
        WEIGHT.astype(np.longdouble),
        [[1.0, 2.0], [3.0]],
        None,
        WEIGHT[0],
        np.float32(3),
        np.zeros((4, 3, 2), "datetime64[s]"),
    ],
    ids=lambda value: str(getattr(value, "dtype", type(value).__name__)),
)
def test_what_is_no_weight_is_one_line_and_changes_nothing(backend: str, value: Any) -> None:
    module = layer(backend)
    before = copy.deepcopy(modules.get_weights(module))
    with pytest.raises(WeightsError) as error:
        modules.set_weights(module, {"bias": BIAS, "weight": value})
    assert is_one_line(str(error.value), "weight")
    assert all(np.array_equal(array, before[name]) for name, array in modules.get_weights(module).items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_are_no_mapping(backend: str) -> None:
    for values in ([("weight", WEIGHT)], {0: WEIGHT}, None):
        with pytest.raises(WeightsError) as error:
            modules.set_weights(layer(backend), values)  # type: ignore[arg-type]
        assert is_one_line(str(error.value), "name")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_large_arrays_of_mlx_are_those_of_numpy(dtype: str) -> None:
    """Values that a dtype has without rounding are written by numpy, with the bits of MLX's own conversion."""
    bits = np.random.default_rng(3).integers(0, 2**16, (40, 30), np.uint16)
    given = [bits.view(np.float16), bits.view(ml_dtypes.bfloat16), bits.view(np.float16).astype(np.float32), bits]
    with mx.stream(mx.cpu), np.errstate(invalid="ignore"):
        for array in (np.where(abs(array) < 1000, array, array.dtype.type(1)) for array in given):
            for source in (array, array.T, array[::-1], array[:0], array[0, 0]):
                module: Any = mlx_nn.Module()
                module.weight = mx.zeros(source.shape, getattr(mx, dtype))
                modules.set_weights(module, {"weight": source})
                expected = arrays.from_numpy(np.array(source)).astype(getattr(mx, dtype))
                assert module.weight.dtype == expected.dtype and module.weight.shape == expected.shape
                assert arrays.to_numpy(module.weight).tobytes() == arrays.to_numpy(expected).tobytes()


def test_views_of_a_module_of_torch_are_its_new_weights() -> None:
    for change in (lambda a: a, lambda a: a.T, lambda a: a[::-1], lambda a: np.broadcast_to(a[1], a.shape)):
        module = torch.nn.Linear(6, 6, bias=False)
        own = module.weight.detach().numpy()
        expected = change(own.copy())
        modules.set_weights(module, {"weight": change(own)})
        assert np.array_equal(modules.get_weights(module)["weight"], expected)


def test_float64_modules_of_mlx_keep_their_precision() -> None:
    with mx.stream(mx.cpu):
        module = mlx_nn.Linear(2, 1, bias=False)
        module.set_dtype(mx.float64)
        modules.set_weights(module, {"weight": np.array([[1 / 3, 1e-17]])})
        assert modules.get_weights(module)["weight"].tolist() == [[1 / 3, 1e-17]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_integers_of_a_model_take_no_fractions(backend: str) -> None:
    if backend == "mlx":
        module: Any = mlx_nn.Module()
        module.steps = mx.array([3])
    else:
        module = torch.nn.Module()
        module.register_buffer("steps", torch.tensor([3]))
    with pytest.raises(WeightsError) as error:
        modules.set_weights(module, {"steps": np.array([2.5])})
    assert is_one_line(str(error.value), "steps", "float64")
    modules.set_weights(module, {"steps": np.array([2], ">i8")})
    assert modules.get_weights(module)["steps"].tolist() == [2]
