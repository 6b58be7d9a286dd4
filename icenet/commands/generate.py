"""`icenet generate`: loads a model and streams the continuation of a prompt."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import icenet
from icenet.commands.cpu_threads import choose_num_threads
from icenet.core.errors import IceNetError
from icenet.core.report.environment import SMALL_ROWS


def generate(
    path: Path,
    prompt: str,
    backend: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    *,
    averaged: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Returns the prompt, the text and the tokens of its continuation, and the finish reason.

    Args:
        path, prompt, backend, device, dtype, averaged, options: See `stream`.
    """
    model = _load(path, backend, device, dtype, averaged)
    return {"prompt": prompt, **asdict(icenet.generate(model, prompt, details=True, **options))}


def stream(
    path: Path,
    prompt: str,
    backend: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    *,
    averaged: bool = False,
    **options: Any,
) -> Generator[str, None, None]:
    """Yields the prompt, its continuation piece by piece, and a final newline.

    The options are checked before the first piece. The newline also follows a text that an error or Ctrl-C ends.

    Args:
        path: A run, a checkpoint or a saved model.
        prompt: The text to continue.
        backend: mlx, torch or auto; the config's backend if absent.
        device: The device; the config's device if absent.
        dtype: fp32, bf16 or fp16; see `icenet.load`.
        averaged: Use the averaged weights of `training.ema_decay`.
        options: Keys of `GenerationConfig`; None keeps the model's own setting.
    """
    model = _load(path, backend, device, dtype, averaged)
    continuation = icenet.generate(model, prompt, stream=True, **options)
    yield prompt
    try:
        yield from continuation
    except (KeyboardInterrupt, IceNetError):
        yield "\n"
        raise
    yield "\n"


def _load(path: Path, backend: str | None, device: str | None, dtype: str | None, averaged: bool) -> Any:
    model = icenet.load(path, backend, device, dtype=dtype, averaged=averaged)
    if (width := getattr(model.config, "hidden_size", None)) and model.is_on_cpu:
        choose_num_threads(model.backend, SMALL_ROWS, width)
    return model
