"""Initial weights of a new run from a trained model: `training.init_from`."""

from __future__ import annotations

from pathlib import Path

from icenet.core.config import Config
from icenet.core.config.section import shown
from icenet.core.engine import Engine
from icenet.core.errors import ConfigError, WeightsError
from icenet.core.tokenizers import tokenizer_files
from icenet.core.training.changed_keys import of_model, value
from icenet.core.training.open_model import open_trained


def apply(config: Config, engine: Engine) -> list[str]:
    """Sets the weights of `training.init_from`, if the configuration has it. Returns notes for the user.

    Raises:
        ConfigError: The path has no weights, or those of another model.
        CheckpointError, WeightsError: The path cannot be read.
    """
    path = config.training.init_from
    if path is None:
        return []
    source, weights = open_trained(Path(path), "training.init_from")
    try:
        engine.initialize(weights)
    except WeightsError as error:
        raise ConfigError(
            f"training.init_from: the weights of {path} do not fit the model: {error}; --set model.path={path} "
            "takes the model from there, too"
        ) from None
    notes = [f"the initial weights are those of {path}"]
    changes = [
        f"{key} is {shown(new)}, and {shown(old)} there"
        for key in of_model(source, config)
        if (new := value(config, key)) != (old := value(source, key))
    ]
    if changes:
        notes.append(
            f"{', '.join(changes)}, so the initial weights compute something else than they were trained to compute"
        )
    ours, theirs = (getattr(settings.data, "tokenizer", None) for settings in (config, source))
    if ours != theirs and None not in (ours, theirs) and tokenizer_files(str(ours)) != tokenizer_files(str(theirs)):
        notes.append(
            f"data.tokenizer is {ours}, and that of {path} is another: the ids of tokens have other meanings"
        )
    return notes
