"""`icenet embed`: embeds the texts of a file."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import icenet
from icenet.core import files
from icenet.core.errors import DataError, UsageError
from icenet.core.generation.prompts import read_prompt
from icenet.core.report.bar import Bar

SUFFIXES = (".npz", ".npy")
_LINES = (".jsonl", ".ndjson")


def embed(
    path: Path,
    source: Path,
    out: Path,
    *,
    text_key: str | None = None,
    batch_size: int = 32,
    overwrite: bool = False,
    backend: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    options: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> str:
    """Writes the embedding of each text of a file, and returns a line about it.

    Args:
        path: A model that `icenet.load` accepts.
        source: A file with one text per line, or JSON lines; `-` is the standard input, with one text per line.
        out: File to write: .npy with the embeddings, float32 `[N, D]`; or .npz with them as `embeddings` and the
            texts as `texts`.
        text_key: Key of the text in each object of JSON lines; default: text.
        batch_size: Number of texts that are computed together.
        overwrite: Whether `out` may be replaced.
        backend, device, dtype: See `icenet.load`.
        options: Keys of `EmbeddingConfig` in place of the model's own.
        quiet: Show no progress.

    Raises:
        UsageError: `out` has another ending or exists, or see `icenet.embed`.
        DataError: The file has no texts, or a line is not such an object.
        FileError: `out` cannot be written.
    """
    if out.suffix not in SUFFIXES:
        raise UsageError(f"{out}: name a file that ends with {' or '.join(SUFFIXES)}")
    target = files.output_file(out, overwrite=overwrite, inputs=[source])
    texts = read_texts(source, text_key)
    model = icenet.load(path, backend, device, dtype=dtype)
    with Bar(f"embedding {source.name}", quiet, unit="texts") as bar:
        vectors = icenet.embed(model, texts, batch_size, progress=bar, **(options or {}))
    content = io.BytesIO()
    if out.suffix == ".npy":
        np.save(content, vectors)
    else:
        np.savez(content, embeddings=vectors, texts=_strings(texts))
    files.write_bytes(target, content.getvalue())
    return f"{out}: {len(vectors):,} embeddings of {vectors.shape[1]:,} values"


def read_texts(source: Path, text_key: str | None = None) -> list[str]:
    """Returns the texts of a file: its lines, or the texts in the objects of JSON lines. Empty lines are texts too.

    Raises:
        UsageError: The file cannot be read, is not UTF-8, or has no keys.
        DataError: It is empty, or a line is not an object with a text.
    """
    has_keys = source.suffix in _LINES
    if text_key is not None and not has_keys:
        raise UsageError(
            f"--text-key is for files that end with {' or '.join(_LINES)}; {source} has one text per line"
        )
    content = read_prompt(source)
    lines = content.replace("\r\n", "\n").split("\n")
    lines = lines[:-1] if lines[-1] == "" else lines
    if not lines:
        raise DataError(f"{source}: is empty; write one text per line")
    if not has_keys:
        return lines
    return [_text_of(source, number, line, text_key or "text") for number, line in enumerate(lines, 1)]


def _text_of(source: Path, number: int, line: str, key: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(f"{source}: line {number} is {'not JSON' if line.strip() else 'empty'}") from None
    if not isinstance(value, dict) or not isinstance(value.get(key), str):
        raise DataError(
            f"{source}: line {number} is not an object with a text under {json.dumps(key)}; "
            "--text-key names another key"
        )
    text: str = value[key]
    return text


def _strings(texts: list[str]) -> NDArray[Any]:
    """Returns texts as an array that numpy reads without unpickling, which keeps no zero characters at their ends."""
    return np.array(texts, dtype=np.str_)
