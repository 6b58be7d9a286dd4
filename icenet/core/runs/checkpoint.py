"""Checkpoints: complete or absent, verified, and the same for both backends.

    RUN/checkpoints/step-00000100/
        model.safetensors        canonical weights
        optimizer.safetensors    optimizer state, named PATH.SLOT
        state.json               step, loss scale, fingerprint of the data, versions
        config.yaml              the configuration of the run
        tokenizer.json           the tokenizer, unless it is `bytes`
        2_Dense/                 layers after the pooling of embeddings, if there are any
        manifest.json            size and SHA-256 of each of these files

A checkpoint becomes complete with one rename. `save` writes it as `.step-00000100.partial`, flushes everything to the
disk and renames the folder (`icenet.core.files.staged_folder`). A process that is killed before that leaves the older
checkpoints and a partial folder, which no reader opens and the next save removes.

Only names of `step-` and digits are checkpoints; the user's own folders next to them stay. So do old checkpoints that
contain files of the user. A checkpoint with missing or short files was copied or moved incompletely, because it is
written completely or not at all.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from icenet.core.config import Config, CustomDataConfig
from icenet.core.errors import CheckpointError, IceNetError, MissingCheckpointError
from icenet.core.families import sentence_transformers
from icenet.core.files import path_hint, staged_folder, write_bytes, write_error, write_text
from icenet.core.files import set_aside as rename_aside
from icenet.core.messages import first_line
from icenet.core.tokenizers.base import TOKENIZER_FILE
from icenet.core.weights import files as weight_files

FORMAT = 1
FOLDER = "checkpoints"
"""Name of the folder of checkpoints in the folder of a run."""
MANIFEST = "manifest.json"
_USE_ANOTHER = "use another checkpoint of the run"
_NAME = re.compile(r"step-(\d{8,})")


class IncompleteError(CheckpointError):
    """A checkpoint of which files are missing or cut short: it was copied or moved incompletely."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a step.

    Attributes:
        path: The folder of the checkpoint.
        config: The configuration of the run.
        step: Number of completed steps.
        state: The content of state.json.
        weights: Canonical weights. Arrays are read from the disk when they are looked up.
        optimizer: Optimizer state by PATH.SLOT, read like `weights`.
    """

    path: Path
    config: Config
    step: int
    state: dict[str, Any]
    weights: Mapping[str, np.ndarray]
    optimizer: Mapping[str, np.ndarray]


def save(
    run: Path,
    config: Config,
    step: int,
    weights: Mapping[str, np.ndarray],
    optimizer: Mapping[str, np.ndarray],
    state: Mapping[str, Any],
    keep: int | None = None,
    protect: int | None = None,
    files: Mapping[str, bytes] = {},
    metadata: Mapping[str, str] = {},
) -> Path:
    """Writes the checkpoint of a step, then removes old ones. Returns the folder of the checkpoint.

    Args:
        run: The folder of the run.
        config: The configuration of the run.
        step: Number of completed steps.
        weights: Canonical weights.
        optimizer: Optimizer state by PATH.SLOT.
        state: Further content of state.json.
        keep: Number of newest checkpoints to keep; None keeps all.
        protect: Step of a checkpoint to keep in addition.
        files: Content of further files by name (`Dataset.files`).
        metadata: Metadata of the file of weights.

    Raises:
        CheckpointError: The checkpoint cannot be written, for example because the disk is full. Older ones stay.
    """
    target = path_of(run, step)
    for leftover in target.parent.glob(".step-*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with staged_folder(target) as partial:
            weight_files.write(partial / "model.safetensors", weights, metadata)
            weight_files.write(partial / "optimizer.safetensors", optimizer)
            write_text(partial / "state.json", json.dumps({"format": FORMAT, "step": step, **state}, indent=1))
            write_config(partial, config, files)
            listed = {
                file.relative_to(partial).as_posix(): {
                    "bytes": file.stat().st_size,
                    "sha256": weight_files.checksum(file),
                }
                for file in sorted(partial.rglob("*"))
                if file.is_file()
            }
            write_text(partial / MANIFEST, json.dumps({"format": FORMAT, "files": listed}, indent=1))
    except (OSError, IceNetError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        reason = write_error(target, cause) if isinstance(cause, OSError) else str(error)
        older = newest(run)
        rest = f"{older.name} is intact: resume from it" if older else "there is no earlier checkpoint"
        raise CheckpointError(f"{target}: the checkpoint was not written: {reason}; {rest}") from None
    if keep is not None:
        kept = {*list_checkpoints(run)[-keep:], path_of(run, protect or 0)}
        for old in set(list_checkpoints(run)) - kept:
            if not _foreign_files(old):
                shutil.rmtree(old, ignore_errors=True)
    return target


def _foreign_files(path: Path) -> list[str]:
    """Returns the names in the folder of a checkpoint that its manifest does not list, without hidden files."""
    try:
        listed = _read_json(path, MANIFEST).get("files")
        names = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
        return sorted(names - {MANIFEST, *(name.partition("/")[0] for name in listed or ())})
    except (OSError, TypeError, AttributeError, IceNetError):  # damaged: it may be all that is left of a run
        return [MANIFEST]


def config_files(config: Config, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Returns the content of config.yaml and of the files that belong to it, such as tokenizer.json, by name.

    The config.yaml is the last one. It refers to the tokenizer.json and to the layers of `dense_files` next to it, so
    the folder can be moved. Options of a user's class of data stay as they are.
    """
    if TOKENIZER_FILE in files and not isinstance(config.data, CustomDataConfig):
        config = config.with_overrides(f"data.tokenizer={TOKENIZER_FILE}")
    names = sentence_transformers.dense_names(config.embedding)
    if names and all(any(file.startswith(f"{name}/") for file in files) for name in names):
        config = config.with_overrides(f"embedding.dense={json.dumps(names)}")
    return {**files, "config.yaml": config.to_yaml().encode()}


def write_config(folder: Path, config: Config, files: Mapping[str, bytes]) -> None:
    """Writes the files of `config_files` to a folder. Raises FileError if one cannot be written."""
    for name, content in config_files(config, files).items():
        write_bytes(folder / name, content)


def path_of(run: Path, step: int) -> Path:
    """Returns the folder of the checkpoint of a step, whether it exists or not."""
    return run / FOLDER / f"step-{step:08d}"


def list_checkpoints(run: Path, after: int = -1) -> list[Path]:
    """Returns the checkpoints of a run whose step is greater than `after`, oldest first. They are not verified."""
    found = {path: _NAME.fullmatch(path.name) for path in (run / FOLDER).glob("step-*") if path.is_dir()}
    steps = {path: int(match[1]) for path, match in found.items() if match}
    return sorted((path for path, step in steps.items() if step > after), key=lambda path: steps[path])


def code_of(path: Path) -> dict[str, str]:
    """Returns the SHA-256 of the files of a custom model that a checkpoint stores; empty without them."""
    try:
        code = _read_json(path, "state.json").get("code")
    except IceNetError:
        return {}
    return code if isinstance(code, dict) else {}


def enclosing(path: Path) -> Path | None:
    """Returns the checkpoint that is at a path or contains it, whether the path exists or not; None if none does."""
    for folder in (path.resolve(), *path.resolve().parents):
        if is_checkpoint(folder):
            return folder
    return None


def is_checkpoint(folder: Path) -> bool:
    """Returns whether a folder is a checkpoint, complete or not, by its name in a run or by its manifest.

    The manifest.json of another program has no format number.
    """
    if _NAME.fullmatch(folder.name) and folder.parent.name == FOLDER and folder.is_dir():
        return True
    try:
        return isinstance(_read_json(folder, MANIFEST).get("format"), int)
    except IceNetError:
        return False


def newest(run: Path) -> Path | None:
    """Returns the newest checkpoint of a run, not verified, or None."""
    return next(reversed(list_checkpoints(run)), None)


def verify(path: Path) -> None:
    """Compares size and SHA-256 of every file of a checkpoint with the manifest.

    Raises:
        IncompleteError: A file is missing or cut short.
        CheckpointError: A file is changed.
    """
    manifest = _read_json(path, MANIFEST)
    _check_format(path, manifest)
    files = manifest.get("files")
    # more than 5 GB of weights are in shards with an index
    required = [{"state.json"}, {"config.yaml"}]
    required += [{f"{kind}.safetensors", f"{kind}.safetensors.index.json"} for kind in ("model", "optimizer")]
    if not isinstance(files, dict) or not all(names & files.keys() for names in required):
        raise CheckpointError(f"{path / MANIFEST}: damaged: it does not list the checkpoint's files")
    for name, entry in files.items():
        file = path / name
        parts = name.split("/")
        if not isinstance(entry, dict) or any(Path(part).name != part or part in ("", "..") for part in parts):
            raise CheckpointError(f"{path / MANIFEST}: damaged: invalid entry {name!r}")
        if not file.is_file():
            raise IncompleteError(f"{file}: missing", _USE_ANOTHER)
        if isinstance(entry.get("bytes"), int) and file.stat().st_size < entry["bytes"]:
            raise IncompleteError(f"{file}: damaged (it is cut short)", _USE_ANOTHER)
        if file.stat().st_size != entry.get("bytes") or weight_files.checksum(file) != entry.get("sha256"):
            raise CheckpointError(f"{file}: damaged (its checksum is wrong)", _USE_ANOTHER)


def load(path: Path) -> Checkpoint:
    """Verifies and opens the checkpoint in the folder `path`.

    Raises:
        CheckpointError: It is damaged, has a newer format, or is not a checkpoint.
    """
    verify(path)
    state = _read_json(path, "state.json")
    _check_format(path, state)
    step = state.get("step")
    if not isinstance(step, int) or step < 0:
        raise CheckpointError(f"{path / 'state.json'}: damaged: the step is {step!r}")
    return Checkpoint(
        path,
        Config.from_yaml(path / "config.yaml", trust_code=False),
        step,
        state,
        weight_files.read(path / "model.safetensors"),
        weight_files.read(path / "optimizer.safetensors"),
    )


def _check_format(path: Path, content: Mapping[str, Any]) -> None:
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: has checkpoint format {content.get('format')!r}, and this version of icenet reads {FORMAT}",
            "install the version that wrote it (see state.json)",
        )


def _no_checkpoint(path: Path) -> MissingCheckpointError:
    if path.name == FOLDER and list_checkpoints(path.parent):
        return MissingCheckpointError(f"{path}: contains the checkpoints of a run; give its folder, {path.parent}")
    if path.is_file() and (path.parent / MANIFEST).is_file():
        return MissingCheckpointError(f"{path}: is a file of a checkpoint; give its folder, {path.parent}")
    if path.is_dir() and (files := sorted(file.name for file in path.glob("*.gguf"))):
        return MissingCheckpointError(
            f"{path}: contains no checkpoint; give the GGUF file, such as {path / files[0]}"
        )
    return MissingCheckpointError(f"{path}: contains no checkpoint; give the folder of a run or of a checkpoint")


def find(path: Path, warn: Callable[[str], None] | None = None, skip_incomplete: bool = True) -> Checkpoint:
    """Opens a checkpoint, or the newest intact checkpoint of a run.

    Args:
        path: The folder of a checkpoint or of a run.
        warn: Called with a message for each damaged checkpoint that is skipped; default: the logger `icenet`.
        skip_incomplete: Whether a checkpoint with missing or short files is skipped too.

    Raises:
        IncompleteError: The newest checkpoint that is not damaged is incomplete, and may not be skipped.
        MissingCheckpointError: The path does not exist, or has no checkpoint.
        CheckpointError: There is no intact checkpoint.
    """
    if not path.exists():
        raise MissingCheckpointError(f"{path}: no such run or checkpoint{path_hint(path)}")
    if (path / MANIFEST).is_file():
        return load(path)
    check_link(path)
    candidates = list_checkpoints(path)[::-1]
    if not candidates:
        raise _no_checkpoint(path)
    problems: list[tuple[Path, IceNetError]] = []
    for candidate in candidates:
        try:
            found = load(candidate)
        except IceNetError as error:
            problems.append((candidate, error))
            continue
        incomplete = next((entry for entry in problems if isinstance(entry[1], IncompleteError)), None)
        if incomplete is not None and not skip_incomplete:
            raise IncompleteError(
                incomplete[1].problem,
                f"copy the rest of {incomplete[0].name}, or continue from the newest intact checkpoint: "
                f"--resume {found.path}",
            )
        for skipped, problem in problems:
            (warn or logging.getLogger("icenet").warning)(f"skipping {skipped.name}: {problem}")
        return found
    raise CheckpointError(
        f"{path}: all of its {len(candidates)} checkpoints are damaged or incomplete; the newest: "
        f"{problems[0][1].problem}",
        "copy an intact one there, or train again without --resume",
    )


def check_link(run: Path) -> None:
    """Checks that the folder of checkpoints of a run is not a symbolic link to nothing.

    Raises:
        CheckpointError: It is.
    """
    link = run / FOLDER
    if link.is_symlink() and not link.exists():
        raise CheckpointError(
            f"{link}: is a link to {os.readlink(link)}, which does not exist; mount it, or correct the link"
        )


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint, so that its run can continue from an earlier one. Returns the new path.

    It is not removed, because the disk may recover, or another version of icenet may read it.
    """
    target = path.with_name(f"unread-{path.name}")
    if target.exists():
        rename_aside(target)
    os.replace(path, target)
    return target


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((path / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IncompleteError(f"{path}: not a complete checkpoint: {name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / name}: damaged: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path / name}: damaged: not an object")
    return value
