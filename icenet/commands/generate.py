"""`icenet generate`: loads a model and streams the continuation of a prompt."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import icenet
from icenet.core import backends, threads
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
    choose_num_threads(model)
    continuation = icenet.generate(model, prompt, stream=True, **options)
    yield prompt
    yield from continuation
    yield "\n"


def choose_num_threads(model: Any) -> None:
    """Sets this process's number of threads, 1 or all, with which the model's small products are faster on this CPU.

    Does nothing on a GPU, or if an environment variable sets the number (`threads.VARIABLES`).
    """
    width = getattr(model.config, "hidden_size", None)
    if width is None or "cpu" not in str(model.device) or any(os.environ.get(name) for name in threads.VARIABLES):
        return
    backends.module(model.backend, "tools.threads").choose_num_threads(SMALL_ROWS, width)
