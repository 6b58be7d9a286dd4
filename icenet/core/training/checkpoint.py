"""Checkpoints: complete or absent, verified, and the same whichever backend wrote them.

    RUN/checkpoints/step-00000100/
        model.safetensors        canonical weights
        optimizer.safetensors    moments by PATH.SLOT
        state.json               step, loss scale, data fingerprint, versions
        config.yaml              the configuration of the run
        tokenizer.json           the tokenizer, where it is not `bytes`
        manifest.json            size and SHA-256 of each file; written last

A checkpoint is written under another name and renamed when everything is on the disk, so a kill at any moment
leaves the old ones and perhaps a folder whose name begins with a dot, which the next save removes.

Other folders there are the user's and stay: only names of `step-` and digits are checkpoints.
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

from icenet.core.config import Config
from icenet.core.errors import CheckpointError, IceNetError, WeightsError
from icenet.core.files import reason_of, sync_folder
from icenet.core.tokenizers.base import FILE as TOKENIZER
from icenet.core.weights import files as weight_files

FORMAT = 1
_FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A run as it stood after `step` steps. Arrays are read from the disk when they are asked for."""

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
) -> Path:
    """Writes the checkpoint of a step and removes all but the newest `keep` and that of step `protect`.

    `files` are others that go with it, by name (`Dataset.files`). Gives its folder.

    Raises:
        CheckpointError: it could not be written (a full disk, no permission); older ones are untouched.
    """
    target = path_of(run, step)
    parent = target.parent
    partial = parent / f".{target.name}.partial"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for leftover in parent.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        weight_files.write(partial / "model.safetensors", weights)
        weight_files.write(partial / "optimizer.safetensors", optimizer)
        _write(partial / "state.json", json.dumps({"format": FORMAT, "step": step, **state}, indent=1))
        write_config(partial, config, files)
        listed = {
            file.name: {"bytes": file.stat().st_size, "sha256": weight_files.checksum(file)}
            for file in sorted(partial.iterdir())
        }
        _write(partial / "manifest.json", json.dumps({"format": FORMAT, "files": listed}, indent=1))
        sync_folder(partial)
        if target.exists():  # left by a run that was taken back to an earlier step
            shutil.rmtree(target)
        os.replace(partial, target)
        sync_folder(parent)
    except (OSError, WeightsError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        cause = error if isinstance(error, OSError) else error.__cause__
        why = reason_of(target, cause) if isinstance(cause, OSError) else str(error)
        older = newest(run)
        rest = f"{older.name} is untouched; make room and resume" if older else "make room and start again"
        raise CheckpointError(f"{target}: the checkpoint was not written: {why}; {rest}") from None
    if keep is not None:
        kept = {*list_checkpoints(run)[-keep:], path_of(run, protect or 0)}
        for old in set(list_checkpoints(run)) - kept:
            shutil.rmtree(old, ignore_errors=True)
    return target


def write_config(folder: Path, config: Config, files: Mapping[str, bytes]) -> None:
    """Writes a configuration and the files that go with it to a folder; there it names those, wherever it is moved.

    Raises:
        OSError: they cannot be written.
    """
    for name, content in files.items():
        _write(folder / name, content)
    _write(folder / "config.yaml", carried(config, files).to_yaml())


def carried(config: Config, files: Mapping[str, bytes]) -> Config:
    """A configuration whose tokenizer is the file of its name that lies beside it."""
    return config.with_overrides(f"data.tokenizer={TOKENIZER}") if TOKENIZER in files else config


def _write(path: Path, content: str | bytes) -> None:
    with path.open("wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def path_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, or would."""
    return run / _FOLDER / f"step-{step:08d}"


def list_checkpoints(run: Path, after: int = -1) -> list[Path]:
    """The checkpoints of a run, or those of steps after `after`, oldest first, verified or not."""
    found = {path: _NAME.fullmatch(path.name) for path in (run / _FOLDER).glob("step-*") if path.is_dir()}
    steps = {path: int(match[1]) for path, match in found.items() if match}
    return sorted((path for path, step in steps.items() if step > after), key=lambda path: steps[path])


def newest(run: Path) -> Path | None:
    """The newest checkpoint of a run, verified or not."""
    return next(reversed(list_checkpoints(run)), None)


def verify(path: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        CheckpointError: a file is missing, changed or cut short.
    """
    manifest = _read_json(path, "manifest.json")
    _check_format(path, manifest)
    files = manifest.get("files")
    # weights beyond 5 GB are in shards, with an index
    wanted = [{"state.json"}, {"config.yaml"}]
    wanted += [{f"{kind}.safetensors", f"{kind}.safetensors.index.json"} for kind in ("model", "optimizer")]
    if not isinstance(files, dict) or not all(names & files.keys() for names in wanted):
        raise CheckpointError(f"{path / 'manifest.json'}: damaged: it does not list the checkpoint's files")
    for name, entry in files.items():
        file = path / name
        if not isinstance(entry, dict) or Path(name).name != name:
            raise CheckpointError(f"{path / 'manifest.json'}: damaged: {name!r} is no entry of a checkpoint's file")
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; use another checkpoint of the run")
        if file.stat().st_size != entry.get("bytes") or weight_files.checksum(file) != entry.get("sha256"):
            raise CheckpointError(f"{file}: damaged (not what was written); use another checkpoint of the run")


def load(path: Path) -> Checkpoint:
    """Verifies and opens one checkpoint folder.

    Raises:
        CheckpointError: damaged, of a later format, or not a checkpoint.
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
            f"{path}: written in checkpoint format {content.get('format')!r}, and this version reads {FORMAT}; "
            "install the version of icenet that wrote it (state.json names it)"
        )


def find(path: Path, warn: Callable[[str], None] | None = None) -> Checkpoint:
    """Opens a checkpoint, or the newest good one of a run folder.

    `warn` hears of damaged ones; absent, the logger `icenet` does, which writes to the standard error.

    Raises:
        CheckpointError: there is none.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such run or checkpoint")
    if (path / "manifest.json").is_file():
        return load(path)
    found = list_checkpoints(path)
    if not found:
        raise CheckpointError(f"{path}: holds no checkpoint; give a run's folder or a checkpoint in it")
    problems: list[str] = []
    for candidate in reversed(found):
        try:
            good = load(candidate)
        except IceNetError as error:
            problems.append(str(error))
            continue
        for passed, problem in zip(reversed(found), problems, strict=False):
            (warn or logging.getLogger("icenet").warning)(f"passing over {passed.name}: {problem}")
        return good
    raise CheckpointError(f"{path}: none of its {len(found)} checkpoints is whole; the newest: {problems[0]}")


def set_aside(path: Path) -> Path:
    """Renames a checkpoint that could not be read, so that a run can go on from an earlier one.

    It is not removed: a disk may come back, or another version of icenet read it. Gives its new name.
    """
    target = path.with_name(f"unread-{path.name}")
    if target.exists():
        shutil.rmtree(target, ignore_errors=True)
    os.replace(path, target)
    return target


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((path / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not a complete checkpoint: {name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / name}: damaged: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path / name}: damaged: not an object")
    return value
