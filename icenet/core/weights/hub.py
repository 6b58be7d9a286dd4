"""Models of huggingface.co by the id of their repository, which the package huggingface_hub downloads."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import ModuleType

from icenet.core.errors import CheckpointError
from icenet.core.messages import first_line

PATTERNS = (
    *("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model"),
    *("sentencepiece.bpe.model", "spiece.model"),
)
"""Files that are downloaded: never pickled weights or code."""
IGNORED = ("*/*.safetensors", "consolidated*.safetensors", "onnx/*", "openvino/*", "coreml/*")
"""Other copies of the same weights."""
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_FILES = (".yaml", ".yml", ".json", ".safetensors", ".gguf", ".pt", ".pth", ".bin", ".ckpt", ".txt", ".npz")
_TIMEOUT_SECONDS = 10.0


def is_repository_id(path: Path) -> bool:
    """Returns whether a path that does not exist has the form of a repository's id: `ORGANIZATION/NAME`.

    A path in a folder that exists is a misspelled path.
    """
    text = path.as_posix()
    is_id = bool(_ID.fullmatch(text)) and path.suffix.lower() not in _FILES and "--" not in text and ".." not in text
    return is_id and not path.exists() and not path.parent.exists()


def local_path(path: Path) -> Path:
    """Returns the folder of a repository's files on this machine for its id, and any other path as it is.

    Files that are in the cache are not downloaded again. Without a network the cache is used.

    Raises:
        CheckpointError: The repository does not exist, is not accessible or is not in the cache, or huggingface_hub
            is not installed.
    """
    if not is_repository_id(path):
        return path
    name, hub = path.as_posix(), _package(path)
    try:
        folder = Path(
            hub.snapshot_download(
                name, allow_patterns=list(PATTERNS), ignore_patterns=list(IGNORED), etag_timeout=_TIMEOUT_SECONDS
            )
        )
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # those of the package, and of the HTTP library that it uses
        raise CheckpointError(f"{name}: no such file or folder, and {_reason(error)}") from None
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{name}: the repository has no config.json; of a repository of GGUF files download one and give its path"
        )
    logging.getLogger("icenet").info(f"{name} is {folder}")
    return folder


def _package(path: Path) -> ModuleType:
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"{path}: no such file or folder; if it is a repository of huggingface.co, it needs the package "
            "huggingface_hub: pip install 'icenet[hub]'"
        ) from None
    return huggingface_hub


def _reason(error: Exception) -> str:
    kinds = {base.__name__ for base in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return "the repository of huggingface.co needs permission: request it on its page, and run `hf auth login`"
    if "RepositoryNotFoundError" in kinds:
        return "no repository of huggingface.co has this name, or it is private: run `hf auth login`"
    if "LocalEntryNotFoundError" in kinds or "OfflineModeIsEnabled" in kinds:
        return "huggingface.co cannot be reached and the cache has no such repository; check the network"
    line = first_line(error)
    return f"it cannot be downloaded from huggingface.co ({line[:200]})"
