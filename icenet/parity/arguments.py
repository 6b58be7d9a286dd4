"""Checks of the arguments of `icenet.parity.compare`: each wrong one is one line that says what to give."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from icenet.core.errors import UsageError
from icenet.parity.results.status import ALL_STAGES

DTYPES = ("fp32", "bf16", "fp16")

Progress = Callable[[str, int, int], None]
"""Called with the name of the stage, the finished part of its work, and all of it."""


def check_options(
    stages: Sequence[str], dtype: str, inputs: Any, draws: int | None, steps: int | None, seed: int
) -> tuple[str, ...]:
    """Returns the chosen stages in their order.

    Raises:
        UsageError: A stage, the dtype or a number is wrong.
    """
    check_numbers("compare", dtype, steps, seed)
    if draws is not None and not _is_whole(draws):
        raise UsageError(f"compare: draws is {draws!r}; give a whole number, 1 or more")
    chosen = (stages,) if isinstance(stages, str) else tuple(stages)
    for name in chosen:
        if name not in ALL_STAGES:
            raise UsageError(f"compare: there is no stage {name!r}: the stages are {', '.join(ALL_STAGES)}")
    if not chosen:
        raise UsageError(f"compare: no stage is given: the stages are {', '.join(ALL_STAGES)}")
    if draws is not None and (inputs is not None or draws < 1):
        why = "inputs are given, so none are drawn" if inputs is not None else f"draws is {draws}"
        raise UsageError(f"compare: {why}; draws is the number of random inputs, 1 or more, without inputs")
    return tuple(name for name in ALL_STAGES if name in chosen)


def check_numbers(function: str, dtype: str, steps: int | None, seed: int) -> None:
    """Raises UsageError with the name of the function if the dtype, the number of steps or the seed is wrong."""
    if dtype not in DTYPES:
        raise UsageError(f"{function}: dtype is {dtype!r}: give one of {', '.join(DTYPES)}")
    if steps is not None and not (_is_whole(steps) and steps >= 0):
        raise UsageError(f"{function}: steps is {steps!r}; give a whole number, 0 or more")
    if not (_is_whole(seed) and 0 <= seed < 2**32):
        raise UsageError(f"{function}: seed is {seed!r}; give a whole number from 0 to 2**32 - 1")


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_pairs(rename: Any, loss: Any, optimizer: Any, copy_weights: Any) -> None:
    """Raises UsageError if the names, the pair of losses or of optimizers, or `copy_weights` is of another kind."""
    if rename is not None and not isinstance(rename, Mapping) and not callable(rename):
        raise UsageError(f"compare: rename is {rename!r}; give a dict of names, or a function of a name")
    if copy_weights not in (None, True, False):
        raise UsageError(f"compare: copy_weights is {copy_weights!r}; give True, False or None")
    for name, value, what in (
        ("loss", loss, "two functions of the output, (that of a, that of b)"),
        ("optimizer", optimizer, "two optimizers, (that of a, that of b)"),
    ):
        if value is not None and not (isinstance(value, (tuple, list)) and len(value) == 2):
            raise UsageError(f"compare: {name} is {_kind(value)}; give {what}")
    for item in loss or ():
        if item is not None and not callable(item):
            raise UsageError(f"compare: loss has {_kind(item)}; give two functions of the output")


def _kind(value: Any) -> str:
    """Returns what to call a value in a message."""
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"a {type(value).__name__}"
