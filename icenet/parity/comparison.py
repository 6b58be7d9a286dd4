"""Compares any two modules, of MLX, PyTorch or one of them, stage by stage: `icenet.parity.compare`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from icenet.parity.result import ALL_STAGES, Report


def compare(
    a: Any,
    b: Any,
    inputs: Any = None,
    *,
    rename: Mapping[str, str] | Callable[[str], str | None] | None = None,
    stages: Sequence[str] = ALL_STAGES,
    dtype: str = "fp32",
    layout: str | Mapping[str, str] | None = None,
    loss: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    optimizer: tuple[Any, Any] | None = None,
    steps: int | None = None,
    seed: int = 0,
    draws: int | None = None,
    copy_weights: bool = False,
    replay: str | None = None,
) -> Report:
    """Compares two modules stage by stage and names the first module that differs. Both stay unchanged.

    Args:
        a: The module under test: any `mlx.nn.Module` or `torch.nn.Module`.
        b: The reference: any module of PyTorch or MLX, or a recorded `Recording`.
        inputs: Arguments of `a`: an array, a tuple of arrays, or a dict of keyword arguments. Images `[B, H, W, C]`.
            None: drawn for the signature and the first layer, several times.
        rename: Path of a module of `a` to its path in `b`: a mapping, also of prefixes, or a function. Modules of
            equal paths need none.
        stages: Stages to run, some of ALL_STAGES. Each must pass before the next is run.
        dtype: Compute dtype: fp32, bf16 or fp16. Copies of the modules are converted to it.
        layout: How the inputs of `b` are made from those of `a`: "same", "channels_last" (`b` takes channels first,
            so the last axis is moved), or one of the two by the name or number of the input. Default: moved if the
            first layer of `b` that reads the input is a convolution, pooling or batch norm.
        loss: The loss of the outputs on each side, as functions of the output of the module; default: the mean
            squared distance from random targets.
        optimizer: The optimizer of each side: for MLX an `mlx.optimizers.Optimizer`, for PyTorch a function of the
            parameters, such as `partial(torch.optim.AdamW, lr=1e-3)`; default: SGD.
        steps: Number of free-running training steps; default: 2, or 1 for more than a million parameters.
        seed: Seed of drawn inputs, cotangents and targets.
        draws: Number of random inputs, if none are given; default: 3.
        copy_weights: Compare with the weights of `b` in a copy of `a`.
        replay: Where to save the smallest input that differs; default: it is not searched for.

    Returns:
        The report.

    Raises:
        UsageError: An argument is not a module, an option is wrong, or a module fails on the inputs.
    """
    raise NotImplementedError
