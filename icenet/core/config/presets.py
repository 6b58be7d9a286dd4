"""The configurations that are part of the package, found by name."""

from __future__ import annotations

import difflib
import stat
from pathlib import Path

from icenet.core.config.section import shortened
from icenet.core.errors import ConfigError

GUIDE = {
    "transformer-tiny": (20e6, 40e6),
    "transformer-small": (90e6, 180e6),
    "transformer-medium": (250e6, 500e6),
    "transformer-large": (450e6, 900e6),
    "transformer-xl": (1.5e9, 3e9),
    "cnn-small": (5e6, 10e6),
    "cnn-medium": (20e6, 40e6),
    "cnn-large": (80e6, 160e6),
    "lstm-small": (5e6, 10e6),
    "lstm-medium": (20e6, 40e6),
    "lstm-large": (80e6, 160e6),
    "gru-small": (5e6, 10e6),
    "gru-medium": (20e6, 40e6),
    "gru-large": (80e6, 160e6),
}
"""Figures of the model guide for each preset: number of parameters, and their bytes in FP16."""


class NotFoundError(ConfigError):
    """A path of a configuration at which there is neither a file nor a preset."""


_TEXTS = {".txt", ".jsonl", ".ndjson", ".md", ".py"}
"""Suffixes of files that are data or code."""
_PACKAGE = Path(__file__).resolve().parents[2]


def folder() -> Path:
    """Returns the folder of the presets: inside an installed package, or next to the package in a checkout."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """Returns the names of all presets."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def find(path: str | Path) -> Path:
    """Returns the file of a path or of the name of a preset.

    `configs/NAME.yaml` also means the preset NAME if there is no such file, so that the commands in the documentation
    work in any folder.

    Raises:
        NotFoundError: There is neither a file nor a preset.
        ConfigError: The file cannot be read.
    """
    file = Path(path)
    try:
        mode = file.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{shortened(str(path))}: cannot be read: {reason}") from None
    if mode is not None:
        if stat.S_ISREG(mode):
            if file.suffix.lower() in _TEXTS:
                raise ConfigError(
                    f"{path}: is not a configuration; to train on a text, give a preset and --set data.source={path}"
                )
            return file
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise ConfigError(f"{path}: is {kind}; expected a YAML file or a preset{_use_of_folder(file)}")
    preset = folder() / f"{file.stem}.yaml"
    if preset.is_file() and file.parent.name in ("", "configs") and file.suffix in ("", ".yaml"):
        return preset
    close = difflib.get_close_matches(file.stem, names(), 1)
    hint = f"did you mean {close[0]}?" if close else f"presets: {', '.join(names())}"
    raise NotFoundError(f"{path}: no such file or preset", hint)


def _use_of_folder(path: Path) -> str:
    """Returns the option for a folder that was given in place of a configuration."""
    if (path / "run.json").is_file():
        return f" (a run continues with --resume {path})"
    if (path / "config.json").is_file():
        return f" (a model is trained with --set model.path={path})"
    return ""
