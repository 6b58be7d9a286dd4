"""The table of operations against PyTorch's operator database."""

from __future__ import annotations

import pytest

pytest.importorskip("expecttest", reason="PyTorch's operator database needs it")

import op_db as operations
import torch

QUICK = [
    "add",
    "cumsum",
    "gather",
    "scatter_add",
    "index_put",
    "masked_fill",
    "topk",
    "sort",
    "floor_divide",
    "remainder",
    "where",
    "var",
    "clamp",
    "nn.functional.pad",
    "nn.functional.interpolate",
    "nn.functional.avg_pool2d",
    "nn.functional.conv2d",
    "nn.functional.group_norm",
]


def results(names: list[str] | None, dtype: torch.dtype, limit: int) -> list[operations.Result]:
    chosen = [op for op in operations.operations() if dtype in op.supported_dtypes("cpu")]
    chosen = [op for op in chosen if names is None or op.name in names]
    return [operations.check_operation(op, dtype, dtype.is_floating_point, limit) for op in chosen]


@pytest.mark.slow  # one of MLX's reductions of the samples does not end on some runs
def test_some_operations() -> None:
    found = results(QUICK, torch.float32, 3)
    assert sum(item.passed for item in found) > 40
    assert [error for item in found for error in item.errors] == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
def test_all_operations(dtype: torch.dtype) -> None:
    found = results(None, dtype, 30)
    passed, failed = sum(item.passed for item in found), sum(item.failed for item in found)
    assert passed > 0.97 * (passed + failed), [error for item in found for error in item.errors][:50]
