"""JSON files of a folder of Hugging Face: settings of the model, generation, the tokenizer and images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icenet.core import files
from icenet.core.errors import ConfigError
from icenet.core.messages import first_line
from icenet.core.weights.safetensors import without_duplicates

_MAX_BYTES = 1 << 24


def read(path: Path) -> Any:
    """Returns the content of a file.

    Raises:
        ConfigError: It cannot be read, or is no JSON.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: larger than {_MAX_BYTES >> 20} MB; not a file of settings")
        content = path.read_bytes()
        if content.startswith(files.LFS_POINTER):
            raise ConfigError(f"{path}: is a Git LFS pointer, not the file; {files.LFS_REMEDY}")
        return json.loads(content, object_pairs_hook=without_duplicates)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        reason = first_line(error, "it is nested too deeply")
        raise ConfigError(f"{path}: not JSON: {reason}; copy or save it again") from None


def read_object(path: Path) -> dict[str, Any]:
    """Returns the content of a file that has an object. Raises ConfigError as `read`, or if it has none."""
    values = read(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a JSON object; copy or save it again")
    return values


def read_optional(path: Path) -> dict[str, Any]:
    """Returns what `read_object` does; no values if there is no such file."""
    return read_object(path) if path.is_file() else {}


def to_bytes(values: Mapping[str, Any]) -> bytes:
    """Returns the content of a file with some values."""
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
