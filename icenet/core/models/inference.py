"""Builds a model for inference: in evaluation mode, with its tokenizer and its generation settings."""

from __future__ import annotations

import logging
from typing import Any

from icenet.core import backends
from icenet.core.config import Config
from icenet.core.models import twins
from icenet.core.tokenizers import get_tokenizer


def build_for_inference(
    config: Config, backend: str | None, device: str | None, *, seed: int | None, allow_tf32: bool | None = None
) -> Any:
    """Returns a model in evaluation mode.

    Args:
        config: The configuration.
        backend: mlx, torch or auto; None selects `config.backend`.
        device: auto, cpu, gpu, cuda, cuda:N or mps; None selects `config.device`.
        seed: Seed of the initial weights, or None for a model whose weights are then loaded.
        allow_tf32: Whether fp32 products may use TF32; None selects `config.allow_tf32`.
    """
    if allow_tf32 is not None:
        config = config.model_copy(update={"allow_tf32": allow_tf32})
    name = backends.choose(config, backend)
    model = backends.module(name, "engine.build").build_model(config, device or config.device, seed=seed)
    model.eval()
    if (difference := twins.compare_with_twin(config, model)) is not None:
        logging.getLogger("icenet").warning(difference)
    if config.model.input_kind in ("tokens", "anything") and config.data.kind == "text":
        tokenizer = get_tokenizer(getattr(config.data, "tokenizer", "bytes"))
        if tokenizer.vocab_size <= config.model.vocab_size:
            model.tokenizer = tokenizer
    draws = config.generation.seed if config.generation.seed is not None else config.seed
    model.generation = config.generation.model_copy(update={"seed": draws})
    return model
