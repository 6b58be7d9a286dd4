"""`icenet generate`: loads a model and streams the continuation of a prompt."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import icenet
from icenet.commands.cpu_threads import choose_num_threads
from icenet.core.config import GenerationConfig
from icenet.core.errors import IceNetError
from icenet.core.report.environment import SMALL_ROWS
from icenet.core.training import unused_keys

_log = logging.getLogger("icenet")


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
    model = load_model(path, backend, device, dtype, averaged)
    name_unused(model, options)
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
    model = load_model(path, backend, device, dtype, averaged)
    name_unused(model, options)
    continuation = icenet.generate(model, prompt, stream=True, **options)
    yield prompt
    try:
        yield from continuation
    except (KeyboardInterrupt, IceNetError):
        yield "\n"
        raise
    yield "\n"


def name_unused(model: Any, options: Mapping[str, Any]) -> None:
    """Names the given options that have no effect with the others and the model's own settings."""
    given = {name: value for name, value in options.items() if value is not None}
    settings = (model.generation or GenerationConfig()).model_copy(update=given)
    for key, reason in unused_keys.of_generation(settings, model.config):
        if (name := key.partition(".")[2]) in given:
            _log.warning(f"no effect: --{name.replace('_', '-')}: {reason}")


def load_model(path: Path, backend: str | None, device: str | None, dtype: str | None, averaged: bool) -> Any:
    """Returns a model that is loaded as `icenet.load` does, with the number of threads that is best for decoding."""
    model = icenet.load(path, backend, device, dtype=dtype, averaged=averaged)
    if (width := getattr(model.config, "hidden_size", None)) and model.is_on_cpu:
        choose_num_threads(model.backend, SMALL_ROWS, width)
    return model
