"""Reads the model at `model.path` for `icenet.core.config.imported`, which calls `read` by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from icenet.core.config import written
from icenet.core.config.custom import is_custom
from icenet.core.config.imported import ModelAtPath
from icenet.core.errors import ConfigError
from icenet.core.models.inference import lacks_tokenizer
from icenet.core.runs import open_model
from icenet.core.weights import hub


def read(path: Path) -> ModelAtPath:
    """Returns what a configuration takes from the model at a path.

    Args:
        path: A folder or repository of Hugging Face, a GGUF file, a run, a checkpoint or a saved model.

    Raises:
        ConfigError: There is no model, or it is one of Python code.
        CheckpointError, WeightsError: It cannot be read.
    """
    path = hub.local_path(path)
    config, weights = open_model.open_trained(path, "model.path", warn=False)  # training.init_from opens it again
    if is_custom(config.model.type):  # naming its weights is not trusting its code
        raise ConfigError(
            f"model.path: {path} is a model of Python code, {config.model.type}; name that in model.type, and the "
            "path in training.init_from"
        )
    tokenizer = getattr(config.data, "tokenizer", "bytes")
    if lacks_tokenizer(config, weights):
        tokenizer = str(path.absolute() / "tokenizer.json")  # which reading the data then reports as missing

    def image_keys() -> dict[str, Any]:
        facts = open_model.image_facts(path)
        return {} if facts is None else facts.data_keys()

    return ModelAtPath(
        path=path,
        input_kind=config.model.input_kind,
        model=config.model.model_dump(mode="python"),
        tokenizer=tokenizer,
        generation=written.tree(config.generation),
        embedding=written.tree(config.embedding),
        image_keys=image_keys,
    )
