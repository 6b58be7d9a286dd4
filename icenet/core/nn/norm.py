"""Batch norm without a framework: the check of its input. Both backends use it."""

from __future__ import annotations

from icenet.core.errors import UsageError


def check_batch_norm(count: int) -> None:
    """Raises UsageError if a channel has fewer than two values, which have no variance."""
    if count < 2:
        raise UsageError(
            "batch norm: a batch with one value per channel has no variance; "
            "use a larger training.batch_size, or larger images"
        )
