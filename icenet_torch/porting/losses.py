"""The connectionist temporal classification loss as a whole operation during an export, which torch cannot export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_library = torch.library.Library("icenet_loss", "DEF")
_library.define(
    "ctc_loss(Tensor log_probs, Tensor targets, Tensor input_lengths, Tensor target_lengths, int blank, "
    "int reduction, bool zero_infinity) -> Tensor"
)
_ctc_loss = torch.ctc_loss


def _shapes(
    log_probs: Any, targets: Any, lengths: Any, target_lengths: Any, blank: int, reduction: int, _zero: bool
) -> Any:
    return log_probs.new_empty((log_probs.shape[1],) if reduction == 0 and log_probs.ndim == 3 else ())


_library.impl("ctc_loss", _ctc_loss, "CompositeExplicitAutograd")
torch.library.register_fake("icenet_loss::ctc_loss", _shapes, lib=_library)


@contextlib.contextmanager
def whole_losses() -> Iterator[None]:
    """Records the loss as a whole operation while the context is open."""

    def call(
        log_probs: Any,
        targets: Any,
        input_lengths: Any,
        target_lengths: Any,
        blank: int = 0,
        reduction: int = 1,
        zero_infinity: bool = False,
    ) -> Any:
        lengths = [torch.as_tensor(item) for item in (input_lengths, target_lengths)]
        return torch.ops.icenet_loss.ctc_loss(log_probs, targets, *lengths, blank, reduction, zero_infinity)

    torch.ctc_loss = call  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.ctc_loss = _ctc_loss
