"""`icenet generate`: loads a model and streams the continuation of a prompt."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import icenet
from icenet.commands.cpu_threads import choose_num_threads
from icenet.core import files
from icenet.core.config import GenerationConfig
from icenet.core.errors import IceNetError, UsageError
from icenet.core.generation.request import settings_of
from icenet.core.report.environment import SMALL_ROWS
from icenet.core.training.notices import unused_keys

_log = logging.getLogger("icenet")


def generate(
    path: Path,
    prompt: str,
    backend: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    *,
    averaged: bool = False,
    quantize: int | None = None,
    group_size: int | None = None,
    speedups: Speedups | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Returns the prompt, the text and the tokens of its continuation, and the finish reason.

    Args:
        path, prompt, backend, device, dtype, averaged, quantize, group_size, speedups, options: See `stream`.
    """
    model = load_model(path, backend, device, dtype, averaged, quantize, group_size)
    name_unused(model, options)
    arguments = (speedups or Speedups()).of(model, prompt, options)
    found = asdict(icenet.generate(model, prompt, details=True, **arguments, **options))
    if found["draft"] is None:
        del found["draft"]
    return {"prompt": prompt, **found}


def stream(
    path: Path,
    prompt: str,
    backend: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    *,
    averaged: bool = False,
    quantize: int | None = None,
    group_size: int | None = None,
    speedups: Speedups | None = None,
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
        quantize, group_size: See `load_model`.
        speedups: A draft and prompt caches.
        options: Keys of `GenerationConfig`; None keeps the model's own setting.
    """
    model = load_model(path, backend, device, dtype, averaged, quantize, group_size)
    name_unused(model, options)
    arguments = (speedups or Speedups()).of(model, prompt, options)
    continuation = icenet.generate(model, prompt, stream=True, **arguments, **options)
    yield prompt
    try:
        yield from continuation
    except (KeyboardInterrupt, IceNetError):
        yield "\n"
        raise
    yield "\n"


@dataclass(frozen=True)
class Speedups:
    """What makes generation faster and does not change the text.

    Attributes:
        draft: A smaller model with the same tokenizer.
        num_draft_tokens: Number of tokens that it proposes at a time.
        prompt_cache: File with a prompt cache to use.
        save_prompt_cache: File to write the cache of the prompt to.
        overwrite: Whether this file may exist.
    """

    draft: Path | None = None
    num_draft_tokens: int | None = None
    prompt_cache: Path | None = None
    save_prompt_cache: Path | None = None
    overwrite: bool = False

    def of(self, model: Any, prompt: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the arguments of `icenet.generate`, and writes the cache of the prompt."""
        if self.overwrite and self.save_prompt_cache is None:
            raise UsageError("--overwrite has no effect without --save-prompt-cache")
        cache = None if self.prompt_cache is None else icenet.load_prompt_cache(self.prompt_cache, model)
        if self.save_prompt_cache is not None:
            inputs = [] if self.prompt_cache is None else [self.prompt_cache]
            files.output_file(self.save_prompt_cache, overwrite=self.overwrite, inputs=inputs)
            cache = cache or icenet.prompt_cache(model)
            cache.read(prompt, settings_of(model, options).add_special_tokens)
            cache.save(self.save_prompt_cache, overwrite=self.overwrite)
        return {"draft": self.draft, "num_draft_tokens": self.num_draft_tokens, "cache": cache}


def name_unused(model: Any, options: Mapping[str, Any]) -> None:
    """Names the given options that have no effect with the others and the model's own settings."""
    given = {name: value for name, value in options.items() if value is not None}
    settings = (model.generation or GenerationConfig()).model_copy(update=given)
    for key, reason in unused_keys.of_generation(settings, model.config):
        if (name := key.partition(".")[2]) in given:
            _log.warning(f"no effect: --{name.replace('_', '-')}: {reason}")


def load_model(
    path: Path,
    backend: str | None,
    device: str | None,
    dtype: str | None,
    averaged: bool,
    quantize: int | None = None,
    group_size: int | None = None,
) -> Any:
    """Returns a model that is loaded as `icenet.load` does, with the number of threads that is best for decoding.

    Args:
        path, backend, device, dtype, averaged, quantize, group_size: See `icenet.load`.
    """
    model = icenet.load(
        path, backend, device, dtype=dtype, averaged=averaged, quantize=quantize, group_size=group_size
    )
    if (width := getattr(model.config, "hidden_size", None)) and model.is_on_cpu:
        choose_num_threads(model.backend, SMALL_ROWS, width)
    return model
