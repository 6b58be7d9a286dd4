"""Prompts: token ids (arrays of any framework, lists of unequal length) or texts, as one checked batch."""

from __future__ import annotations

import codecs
import errno
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core.errors import UsageError
from icenet.core.tokenizers.base import Tokenizer, encode_prompt


def batch_of(
    input_ids: Any, attention_mask: Any, pad_token_id: int, vocab_size: int
) -> tuple[NDArray[np.int32], NDArray[np.bool_] | None]:
    """Checks prompts and pads them on the left. MLX does not check token ids, so they are checked here.

    Args:
        input_ids: Token ids `[B, T]`, `[T]`, or a list of lists of unequal length.
        attention_mask: `[B, T]`, 0 or False for padding, or None.
        pad_token_id: Token for padding.
        vocab_size: Number of valid token ids.

    Returns:
        Tokens, int32 `[B, T]`, and their attention mask, bool `[B, T]`; the mask is None without padding.

    Raises:
        UsageError: The ids are not integers, are empty, have a wrong shape, are outside the vocabulary, or a prompt
            ends in padding.
    """
    if not isinstance(pad_token_id, (int, np.integer)) or not 0 <= pad_token_id < vocab_size:
        raise UsageError(f"generate: pad_token_id {pad_token_id} is outside the vocabulary (0 to {vocab_size - 1})")
    if isinstance(input_ids, str) or (
        isinstance(input_ids, (list, tuple)) and any(isinstance(row, str) for row in input_ids)
    ):
        raise UsageError("generate: input_ids must be token ids; use icenet.generate(model, text) for text")
    if isinstance(input_ids, (list, tuple)) and any(_is_sequence(row) for row in input_ids):
        tokens, mask = _pad_left([_to_row(row, index) for index, row in enumerate(input_ids)], pad_token_id)
    else:
        tokens = _to_integers(input_ids, "token ids")
        tokens = tokens[None, :] if tokens.ndim == 1 and tokens.size else tokens
        if tokens.ndim != 2 or tokens.size == 0:
            empty = " (empty)" if tokens.ndim == 1 else ""
            raise UsageError(f"generate: input_ids must be [batch, length], not {list(tokens.shape)}{empty}")
        mask = np.ones(tokens.shape, np.bool_)
    if attention_mask is not None:
        mask = mask & _to_mask(attention_mask, tokens.shape)
        if not mask[:, -1].all():
            raise UsageError("generate: a prompt ends in padding; pad on the left")
    check_vocabulary(tokens, vocab_size, "generate")
    return tokens.astype(np.int32), None if mask.all() else mask


def read_prompt(path: Path) -> str:
    """Returns the text of a prompt file in UTF-8; `-` is the standard input.

    The text is that of the bytes, as in training: line ends stay as they are, and a byte order mark is dropped.

    Raises:
        UsageError: The file cannot be read, or is not UTF-8.
    """
    try:
        content = _read_stdin() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        if error.errno == errno.EBADF:
            raise _closed() from None
        raise UsageError(f"{path}: cannot read the text: {error.strerror}") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UsageError(f"{path}: cannot read the text: UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8")
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: cannot read the text: not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None


def _closed() -> UsageError:
    return UsageError("--prompt-file -: the standard input is closed; give a file, or --prompt")


def _read_stdin() -> bytes:
    if sys.stdin is None:  # closed by the caller
        raise _closed()
    buffer = getattr(sys.stdin, "buffer", None)  # a replaced stdin may have only text
    return buffer.read() if buffer is not None else sys.stdin.read().encode("utf-8", "surrogateescape")


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
    """Returns the token ids of texts. An empty text becomes the end-of-text token.

    Args:
        tokenizer: The tokenizer.
        prompts: The texts.
        add_special_tokens: Whether to add the tokens that the tokenizer puts around a text.
    """
    encode = partial(encode_prompt, tokenizer) if add_special_tokens else tokenizer.encode
    return [encode(prompt) or [tokenizer.eot_id] for prompt in prompts]


def _pad_left(rows: list[NDArray[Any]], pad_token_id: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    length = max(len(row) for row in rows)
    tokens = np.full((len(rows), length), pad_token_id, np.int64)
    mask = np.zeros((len(rows), length), np.bool_)
    for index, row in enumerate(rows):
        tokens[index, length - len(row) :] = row
        mask[index, length - len(row) :] = True
    return tokens, mask


def _to_row(row: Any, index: int) -> NDArray[Any]:
    if not _is_sequence(row):
        raise UsageError(f"generate: prompt {index} is the number {row!r} and the others are lists of ids")
    values = _to_integers(row, f"prompt {index}: token ids") if len(row) else np.zeros(0, np.int64)
    if values.ndim != 1:
        raise UsageError(f"generate: prompt {index} must be a flat list of ids, not {list(values.shape)}")
    if values.size == 0:
        raise UsageError(f"generate: prompt {index} is empty; pass at least one token")
    return values


def _is_sequence(value: Any) -> bool:
    return hasattr(value, "__len__") and getattr(value, "ndim", 1) > 0


def _to_numpy(array: Any) -> NDArray[Any]:
    return np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)


def _to_integers(array: Any, name: str) -> NDArray[Any]:
    try:
        values = _to_numpy(array)
    except (ValueError, TypeError):
        raise UsageError(f"generate: {name} are nested unevenly; pass a flat list of integers") from None
    if values.size and not np.issubdtype(values.dtype, np.integer):
        raise UsageError(f"generate: token ids must be integers, not {values.dtype}")
    return values


def _to_mask(attention_mask: Any, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    try:
        mask = _to_numpy(attention_mask)
    except (ValueError, TypeError, RuntimeError):
        if (dtype := getattr(attention_mask, "dtype", None)) is not None:  # numpy has no bfloat16
            raise UsageError(f"generate: attention_mask must be bool or integers of 1 and 0, not {dtype}") from None
        raise UsageError(f"generate: attention_mask is ragged and input_ids is {list(shape)}") from None
    if mask.shape != shape:
        raise UsageError(f"generate: attention_mask is {list(mask.shape)} and input_ids is {list(shape)}")
    if mask.dtype.kind not in "biuf":
        raise UsageError(f"generate: attention_mask must be True and False, or 1 and 0, not {mask.ravel()[0]!r}")
    check_mask(mask, "generate: attention_mask")
    return mask.astype(np.bool_)


def check_mask(mask: NDArray[Any], name: str) -> None:
    """Raises UsageError if a mask is not of 1 and 0, such as an additive one of 0 and -inf. `name` begins the text.

    Floats that are all zero are an additive mask without padding too.
    """
    if mask.dtype.kind == "b":
        return
    wrong = mask[(mask != 0) & (mask != 1)]
    if wrong.size or (mask.dtype.kind not in "iu" and not mask.any()):
        value = wrong[0] if wrong.size else "zeros only"
        raise UsageError(
            f"{name} must be 1 or True for tokens and 0 or False for padding, not {value}; of an additive mask, "
            "whose zeros are the tokens, pass mask == 0"
        )


def check_vocabulary(tokens: NDArray[Any], vocab_size: int, name: str, table: str = "the vocabulary") -> None:
    """Raises UsageError if an id is outside the vocabulary, or another table. `name` begins the message."""
    outside = (tokens < 0) | (tokens >= vocab_size)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise UsageError(
            f"{name}: token {int(tokens[row, column])} at row {row}, position {column} is outside "
            f"{table} (0 to {vocab_size - 1})"
        )
