"""Sums of PyTorch in the order of MLX's: term by term, in fp32.

PyTorch sums in many partial sums or in float64, MLX mostly term by term. The rounding error of a sum of n terms then
grows with sqrt(n): for the statistics of a batch norm over 16 images of 32x32 it is about 20 times larger. Both are
correct. `summing_in_order` measures how far such sums change a result, whichever layer or function they are in.

For the same purpose it has the errors of functions that MLX computes less exactly on a CPU:

erf, GELU    moved by up to an ulp of 1 in fp32: MLX's error function has errors of 4e-7, also where its value is
             small, and PyTorch's of 3e-8.
exp          a power of 2, whose exponent is rounded up or down: the error of exp(x) is |x| times as large.
softmax      its gradient: MLX rounds the products of probabilities and cotangents before it subtracts their sum, so
             the error is half an ulp of the products. PyTorch subtracts the sum from the cotangents, in fp32.
attention    its operations one by one, not PyTorch's fused kernel: with nearly equal scores, the gradients of queries
             and keys are small differences of such products. Each is rounded in half precision.
constants    functions of numbers in the code and of integers, such as the frequencies exp(-k) of positions, and their
             angles t * exp(-k). Nearby problems do not move them, so without more they had equal roundings in all
             samples. What is rounded in them is moved by an ulp, up or down, in one of SAMPLES samples each.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from icenet.core import rng

aten = torch.ops.aten

# operations with sums inside, written by PyTorch in terms of the sums below
_COMPOSED = get_decompositions(
    [
        aten.native_batch_norm,
        aten.native_batch_norm_backward,
        aten.native_layer_norm,
        aten.native_layer_norm_backward,
        aten.native_group_norm,
        aten.native_group_norm_backward,
        aten._softmax,
        aten._log_softmax,
        aten._log_softmax_backward_data,
        aten.logsumexp,
        aten.linalg_vector_norm,
        aten.std,
        aten.std_mean,
        aten.mse_loss,
        aten.smooth_l1_loss,
        aten.huber_loss,
        aten.binary_cross_entropy,
        aten.nll_loss_forward,
    ]
)


@contextlib.contextmanager
def summing_in_order(sample: int = 0) -> Iterator[None]:
    """Takes fp32 and half-precision sums, means and variances term by term while the context is open.

    This includes those in the layers of PyTorch and in their gradients, and products whose sums are long and whose
    results are few: of matrices, and of the gradient of a convolution by its weight. The gradient of a linear layer
    of 4 features over 76,832 positions is such a product, and that of a 1x1 convolution of 2 channels over 4 images
    of 16x16. PyTorch takes them in parts or term by term: that depends on the processor, the BLAS and the strides of
    the arrays. The gradient of a convolution with groups has more results, but MLX takes each in one loop: over 8
    images of 32x32 its error is 9 times PyTorch's, which takes parts. Other products and convolutions stay. The error
    function and `exp` get the errors that they have in MLX.

    Args:
        sample: Number of the order of the terms: each sum begins at another term. The roundings of a long sum hardly
            depend on the last bits of its terms, so equal orders would have equal errors in all samples.
    """
    token = _sample.set(sample)
    try:
        with _InOrder(), _attention_by_operations():
            yield
    finally:
        _sample.reset(token)


@contextlib.contextmanager
def _attention_by_operations() -> Iterator[None]:
    """Computes attention by its operations, in half precision each of them rounded as in MLX."""
    rounds = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # on a CPU, too
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(rounds)


_sample: ContextVar[int] = ContextVar("sample", default=0)


class _InOrder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._constants = WeakTensorKeyDictionary()
        self._roundings = 0

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_constant = self._is_constant(args, kwargs)
        found = self._call(func, args, kwargs)
        if is_constant and isinstance(found, Tensor):
            if found.dtype == torch.float32 and torch.Tag.pointwise in func.tags:
                found = _rounded_again(func, args, kwargs, found, self._roundings)
                self._roundings += 1
            self._constants[found] = True
        return found

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not _is_single(args):
            return func(*args, **kwargs)
        if func in _REPLACED:
            return _REPLACED[func](*args, **kwargs)
        with self:
            if func in _COMPOSED:
                return _COMPOSED[func](*args, **kwargs)
            # other signatures of the sums, such as var_mean(x, dim, unbiased) in PyTorch's own group norm
            found = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if found is NotImplemented else found

    def _is_constant(self, args: Any, kwargs: Any) -> bool:
        """Returns whether arguments depend on no float from without, such as an input or a weight."""
        tensors = [item for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor)]
        return all(not item.is_floating_point() or item in self._constants for item in tensors)


def _rounded_again(func: Any, args: Any, kwargs: Any, found: Tensor, number: int) -> Tensor:
    """Returns a result of fp32 in which one in SAMPLES of the rounded elements is moved up or down by an ulp."""
    exact, rounded = func(*tree_map(_in_float64, args), **tree_map(_in_float64, kwargs)), found.cpu()
    slots = (SAMPLES * (_uniform(rounded, "constants", number) + 1)).floor()  # 0 to 2 * SAMPLES
    moved = torch.nextafter(rounded, torch.where(slots == 0, torch.inf, -torch.inf).to(rounded))
    return torch.where((slots < 2) & (exact != rounded) & rounded.isfinite(), moved, rounded).to(found.device)


def _in_float64(item: Any) -> Any:
    """Returns a dtype or a tensor of numbers as float64, on the CPU: MPS has no float64."""
    if isinstance(item, torch.dtype):
        return torch.float64 if item == torch.float32 else item
    if not isinstance(item, Tensor):
        return item
    if item.dtype == torch.bool:
        return item.cpu()
    return item.cpu().to(torch.complex128) if item.is_complex() else item.cpu().double()


def _is_single(args: Sequence[Any]) -> bool:
    """Returns whether the first tensor is of a dtype that MLX computes with."""
    first = next((item for item in args if isinstance(item, Tensor)), None)
    return first is not None and first.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _sum(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    dims = _axes(x, dim)
    kept = [axis for axis in range(x.ndim) if axis not in dims]
    terms = x.float().permute((*dims, *kept)).reshape(-1, *(x.shape[axis] for axis in kept))
    array = terms.cpu().numpy()
    array = np.ascontiguousarray(np.roll(array, _first_term(len(array)), axis=0))
    total = np.zeros(array.shape[1:], np.float32) if len(array) == 0 else np.add.accumulate(array, axis=0)[-1]
    shape = [1 if axis in dims else x.shape[axis] for axis in range(x.ndim)] if keepdim else total.shape
    return torch.from_numpy(np.asarray(total)).reshape(tuple(shape)).to(x.device, dtype or x.dtype)


SAMPLES = 12
"""One in so many roundings of constants is moved in a sample, as in `icenet.parity.nearby`."""

LONG, MANY = 1024, 1 << 24
"""Sums of products of LONG terms are taken in order if all of them have at most MANY terms together."""

SHORT, FEW = 128, 256
"""Up to FEW sums of products are taken in order from SHORT terms on, also those of the weight of a convolution.

Few results exceed the tolerance by chance if their error is only a few times the noise. Simulated with sums of normal
terms, of which PyTorch takes 4 to 64 parts, 1 in 70 single results of 1,024 terms is over it by floor 5 of the
criterion alone, 1 in 900 of 512, and none of 900 of 256 or less. Taken in order, none is. Of many results the ratio
hardly varies.
"""


def _are_few(count: int, results: int) -> bool:
    """Returns whether there are few sums of products, given the number of terms of each sum, and of results."""
    return count >= SHORT and results <= FEW and count * results <= MANY


def _are_long(count: int, results: int) -> bool:
    """Returns whether sums of products are long, and not too many to be taken in order."""
    return count >= LONG and count * results <= MANY


def _is_in_order(a: Tensor, b: Tensor) -> bool:
    """Returns whether the product of two matrices is taken in order."""
    count, results = a.shape[1], a.shape[0] * b.shape[1]
    return _are_few(count, results) or _are_long(count, results)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if not _is_in_order(a, b):
        return aten.mm.default(a, b)
    return _sum(a.float().T[:, :, None] * b.float()[:, None], 0).to(a.dtype)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if not _is_in_order(a, b):
        return aten.addmm.default(bias, a, b, beta=beta, alpha=alpha)
    return beta * bias + alpha * _mm(a, b)


def _first_term(count: int) -> int:
    """Returns a random number below `count`, by the sample."""
    return int(rng.uniform(rng.key(0, "order of sums", _sample.get()), (1,))[0] * count)


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    return _sum(x, dim, keepdim, dtype=dtype) / math.prod(x.shape[axis] for axis in _axes(x, dim))


def _var_mean(
    x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    count = math.prod(x.shape[axis] for axis in _axes(x, dim))
    mean = _mean(x, dim, keepdim=True)
    squares = _sum((x - mean).square(), dim, keepdim)
    return squares / (count - (1 if correction is None else correction)), mean if keepdim else mean.reshape(
        squares.shape
    )


def _var(x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return _var_mean(x, dim, correction=correction, keepdim=keepdim)[0]


def _convolution_backward(*args: Any) -> tuple[Tensor | None, ...]:
    gradient, x, weight, _, stride, padding, dilation, is_transposed, _, groups, (has_input, has_weight, has_bias) = (
        args
    )
    windowed, other = (gradient, x) if is_transposed else (x, gradient)
    count = other[:, 0].numel()
    in_order = has_weight and (_are_few(count, weight.numel()) or (groups > 1 and _are_long(count, weight.numel())))
    found = aten.convolution_backward.default(*args[:-1], [has_input, has_weight and not in_order, False])
    by_weight = found[1]
    if in_order:
        by_weight = _sum(_weight_terms(windowed, other, weight, stride, padding, dilation, groups), 0).to(
            weight.dtype
        )
    dims = [axis for axis in range(gradient.ndim) if axis != 1]
    return found[0], by_weight, _sum(gradient, dims) if has_bias else None


def _weight_terms(
    windowed: Tensor,
    other: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Returns the terms of the gradient of a convolution by its weight, `[terms, *weight.shape]`.

    Args:
        windowed: The array whose windows are multiplied by the weight, `[B, C, ...]`: the input, or the cotangent if
            the convolution is transposed.
        other: The cotangent, or the input if the convolution is transposed.
        weight, stride, padding, dilation, groups: Those of the convolution.
    """
    kernel, size = weight.shape[2:], windowed.shape[1] // groups
    windows = torch.nn.functional.pad(windowed.float(), [n for pad in reversed(padding) for n in (pad, pad)])
    for axis, (width, step, spread) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        windows = windows.unfold(axis, (width - 1) * spread + 1, step).narrow(axis, 0, other.shape[axis])
        windows = windows[..., ::spread]
    # windows: [B, C, *positions, *kernel]
    factors = windows.movedim(1, other.ndim - 1).reshape(-1, groups, 1, size, *kernel)
    others = other.float().movedim(1, -1).reshape(-1, groups, other.shape[1] // groups, *[1] * (other.ndim - 1))
    return (factors * others).flatten(1, 2)


def _erf(x: Tensor) -> Tensor:
    return aten.erf.default(x) + _error_of_erf(x)


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    found = aten.gelu.default(x, approximate=approximate)
    return found if approximate == "tanh" else found + 0.5 * x * _error_of_erf(x)


def _gelu_backward(gradient: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    found = aten.gelu_backward.default(gradient, x, approximate=approximate)
    return found if approximate == "tanh" else found + 0.5 * gradient * _error_of_erf(x)


def _exp(x: Tensor) -> Tensor:
    exponent = x.cpu().double() * math.log2(math.e)  # on the CPU: MPS has no float64
    half_ulp = torch.ldexp(torch.ones_like(exponent), torch.frexp(exponent).exponent - 25)
    return torch.exp2(exponent + half_ulp * _uniform(x, "functions").cpu()).to(x)


def _softmax_backward(gradient: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    terms = gradient * output
    return (terms - output * _sum(terms, dim, keepdim=True)).to(input_dtype)


def _error_of_erf(x: Tensor) -> Tensor:
    """Returns random errors of up to an ulp of 1 in fp32, and zeros in other dtypes."""
    return 2.0**-23 * _uniform(x, "functions") if x.dtype == torch.float32 else torch.zeros_like(x)


def _uniform(x: Tensor, what: str, number: int = 0) -> Tensor:
    """Returns random numbers of fp32 from -1 to 1 in the shape of a tensor, by the sample, a name and a number."""
    uniform = rng.uniform(rng.key(0, f"errors of {what}", _sample.get(), number), tuple(x.shape))
    return (2 * torch.from_numpy(np.asarray(uniform)) - 1).to(x.device)


def _axes(x: Tensor, dim: Any) -> list[int]:
    """Returns the axes of a reduction; None and an empty list are all of them."""
    dims = [dim] if isinstance(dim, int) else list(dim or range(x.ndim))
    return [axis % x.ndim for axis in dims]


_REPLACED: dict[Any, Callable[..., Any]] = {
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.mean.default: _mean,
    aten.mean.dim: _mean,
    aten.var.correction: _var,
    aten.var_mean.correction: _var_mean,
    aten.convolution_backward.default: _convolution_backward,
    aten.erf.default: _erf,
    aten.exp.default: _exp,
    aten.gelu.default: _gelu,
    aten.gelu_backward.default: _gelu_backward,
    aten._softmax_backward_data.default: _softmax_backward,
}
