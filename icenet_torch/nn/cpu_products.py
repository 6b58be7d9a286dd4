"""Products with the weight of a layer on a CPU, in generation, PyTorch.

`F.linear` calls MKL, which reads weights at half of the memory's rate and computes at half of the core's on AMD
processors. Two other functions of PyTorch read the same memory faster, but have no backward pass. Microseconds of one
thread (weights of 768 x 3072 values, and of GPT-2's vocabulary, 768 x 50257):

          rows    F.linear          batched           oneDNN
AMD EPYC, AVX-512
             1       584    9,256      336    5,066      449    6,599
             8     1,067   21,196                        707   10,833
           512    24,278                              10,625
Intel Xeon, AVX-512
             1       559   15,560    1,360   32,991      498   21,282
             8     1,538   53,699                      1,788   24,602
           512    19,704                              22,100

Weights of half precision: `F.linear` has kernels for them, which add up in fp32 and round once. They read the weight
as it is, while a copy in fp32 takes new pages for each product. Microseconds of one thread of an AMD EPYC with
AVX-512 BF16, weights of 768 x 3072 and of 640 x 32000 values:

          rows    F.linear, bf16    F.linear, fp16    copied to fp32
             1       139    2,714      173    1,616      395   45,074
             8       182    3,327    1,392   12,854      695   51,552
            64       750    7,877   11,708  103,722    3,555   74,686
"""

from __future__ import annotations

from functools import lru_cache

import torch

from icenet.core.host import processor
from icenet_torch.nn.arrays import Array, on_cpu

HAS_FUNCTIONS = (
    torch.backends.mkl.is_available()
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
IS_FASTER = HAS_FUNCTIONS and processor.is_amd()
_MULTIPLIES_BF16 = torch.backends.mkldnn.is_available() and processor.multiplies_bf16()
_MOST_FP16_ROWS = 4
_MIN_WEIGHT, _MIN_PRODUCT = 2**17, 2**20
"""Numbers of weights for one row, and of rows times weights for several, from which the functions are faster."""


def can_compute(x: Array, weight: Array) -> bool:
    """Returns whether `product` computes x W^T: in fp32 on a CPU, for a large weight, without a backward pass.

    Not if oneDNN is switched off, as `F.linear` does not use it then.
    """
    if x.numel() == 0 or x.shape[-1] != weight.shape[1]:  # sizes that do not fit are an error of F.linear
        return False
    rows = x.numel() // x.shape[-1]
    if not (weight.numel() >= _MIN_WEIGHT if rows == 1 else rows * weight.numel() >= _MIN_PRODUCT):
        return False
    is_fp32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    can_run = is_fp32 and on_cpu(x) and weight.is_contiguous() and not torch.is_grad_enabled()
    return IS_FASTER and can_run and torch.backends.mkldnn.enabled


def can_compute_half(x: Array, weight: Array) -> bool:
    """Returns whether `F.linear` computes x W^T of half precision as it is, on a CPU and without a backward pass.

    Of bf16 if the processor has instructions for it; of fp16 for few rows.
    """
    if x.dtype != weight.dtype or not on_cpu(x) or torch.is_grad_enabled():
        return False
    if x.dtype == torch.bfloat16:
        return _MULTIPLIES_BF16 and torch.backends.mkldnn.enabled
    return x.dtype == torch.float16 and x.numel() <= _MOST_FP16_ROWS * x.shape[-1]


def product(x: Array, weight: Array, bias: Array | None) -> Array:
    """Computes x W^T + b: x `[..., in]`, weight `[out, in]`, bias `[out]` to `[..., out]`, all fp32."""
    outputs, inputs = weight.shape
    bias = None if bias is None else bias.contiguous()  # oneDNN reads the memory of a view in its order
    if x.numel() > inputs or (blocks := _count_blocks(outputs)) == 1:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
    # matrices times a column: the weight in blocks of rows. The transpose of a row has the strides of a column.
    matrices, column = weight.view(blocks, -1, inputs), x.reshape(1, inputs).t().expand(blocks, inputs, 1)
    if bias is None:
        y = torch.bmm(matrices, column)
    else:
        y = torch.baddbmm(bias.view(blocks, -1, 1), matrices, column)
    return y.view(*x.shape[:-1], outputs)


@lru_cache
def _count_blocks(rows: int) -> int:
    """Returns the number of blocks of at most 256 rows, all of one size; 1 if a block would have less than 8."""
    size = next(size for size in range(256, 0, -1) if rows % size == 0)
    return rows // size if size >= 8 else 1
