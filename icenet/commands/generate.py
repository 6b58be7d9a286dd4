"""`icenet generate`: loads a model and streams the continuation of a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import icenet
from icenet.commands.cpu_threads import choose_num_threads
from icenet.core.report.environment import SMALL_ROWS


def stream(
    path: Path,
    prompt: str,
    backend: str | None = None,
    device: str | None = None,
    *,
    averaged: bool = False,
    **options: Any,
) -> Iterator[str]:
    """Yields the prompt, its continuation piece by piece, and a final newline.

    The options are checked before the first piece.

    Args:
        path: A run, a checkpoint or a saved model.
        prompt: The text to continue.
        backend: mlx, torch or auto; the config's backend if absent.
        device: The device; the config's device if absent.
        averaged: Use the averaged weights of `training.ema_decay`.
        options: Keys of `GenerationConfig`; None keeps the model's own setting.
    """
    model = icenet.load(path, backend, device, averaged=averaged)
    if (width := getattr(model.config, "hidden_size", None)) and "cpu" in str(model.device):
        choose_num_threads(model.backend, SMALL_ROWS, width)
    continuation = icenet.generate(model, prompt, stream=True, **options)
    yield prompt
    yield from continuation
    yield "\n"
