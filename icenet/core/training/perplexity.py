"""The perplexity of a text: exp of the mean loss of its tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core.data.text.cache import load_tokens
from icenet.core.data.text.documents import IGNORED
from icenet.core.data.text.sources import find_source
from icenet.core.errors import DataError, NonFiniteError, UsageError
from icenet.core.report.bar import Bar
from icenet.core.tokenizers.base import encode_prompt

DEFAULT_LENGTH = 1024
"""Longest window unless another length is given."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Perplexity:
    """The loss of a text.

    Attributes:
        source: Description of the text.
        tokens: Number of tokens that were predicted.
        loss: Their mean loss in nats.
        length: Number of tokens in a window.
        stride: Distance of two windows.
        notes: What was left out of the source.
    """

    source: str
    tokens: int
    loss: float
    length: int
    stride: int
    notes: tuple[str, ...] = ()

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite beyond the largest number."""
        return math.exp(self.loss) if self.loss < 709 else math.inf


def evaluate_text(
    model: Any,
    source: str,
    *,
    length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    text_key: str = "text",
    errors: str = "stop",
    quiet: bool = True,
) -> Perplexity:
    """Returns the perplexity of a text. Each token is predicted once, from the tokens before it in its window.

    A window begins with the tokens that the tokenizer puts in front of a prompt (BOS), if it has some. Otherwise the
    first token of the text is not predicted.

    Args:
        model: A language model with a tokenizer, of either backend.
        source: A file, a folder, a glob or stdlib, as `data.source`.
        length: Tokens in a window; by default the model's max_seq_length, at most 1,024.
        stride: Distance of two windows. Less than `length` gives each token more context, for more work. By default
            windows do not overlap.
        batch_size: Number of windows that are computed together.
        max_tokens: Evaluate only this number of tokens, from the beginning.
        text_key, errors: As in the section `data`.
        quiet: Show no progress.

    Raises:
        UsageError: The model does not predict the next token, or an option is out of range.
        DataError: The source has no text or cannot be read, or the text is too short.
        NonFiniteError: The loss is NaN or infinite.
    """
    tokenizer = model.tokenizer
    if (
        tokenizer is None
        or not getattr(model.config, "causal", True)
        or getattr(model.config, "bidirectional", False)
    ):
        missing = (
            "has no tokenizer" if tokenizer is None else "does not predict the next token (model.causal is false)"
        )
        raise UsageError(f"eval: the model {missing}; give a language model")
    longest = getattr(model.config, "max_seq_length", None)
    length = length or min(longest or DEFAULT_LENGTH, DEFAULT_LENGTH)
    prefix = _prefix(tokenizer)
    if longest is not None and length > longest:
        raise UsageError(f"eval: length {length} is more than the {longest} tokens that the model reads")
    if length <= len(prefix):
        raise UsageError(f"eval: length {length} leaves no room next to the {len(prefix)} tokens at its beginning")
    own = length - len(prefix)  # tokens of the text in the inputs of a window
    stride = stride or own
    if stride > own:
        raise UsageError(
            f"eval: stride {stride} is more than the {own} tokens of a window and would leave tokens out"
        )
    found = find_source(source, errors)
    with Bar(f"encoding {source}", quiet) as bar:
        file = load_tokens(found, tokenizer, text_key=text_key, errors=errors, progress=bar)
    tokens = file.tokens[:max_tokens]
    count = len(tokens) - (0 if prefix else 1)
    if count < 1:
        raise DataError(f"eval: {found.description} has {len(tokens)} tokens, too few to predict one")
    total, done = 0.0, 0
    with Bar(f"evaluating {source}", quiet, unit="tokens") as bar:
        for inputs, labels in _batches(tokens, prefix, own, stride, batch_size):
            loss, labelled = model.compute_loss(inputs, labels)
            if not math.isfinite(loss):
                raise NonFiniteError(f"eval: the loss is not finite: {model.explain_non_finite()}")
            total, done = total + loss * labelled, done + labelled
            bar(done, count)
    left_out = found.left_out.merged(file.left_out)
    notes = (f"{found.description}: {left_out.summary()}",) if left_out else ()
    return Perplexity(found.description, done, total / done, length, stride, notes)


def _prefix(tokenizer: Any) -> list[int]:
    """Returns the tokens that a tokenizer puts in front of a prompt."""
    one, two = (encode_prompt(tokenizer, text) for text in ("a", "b"))
    plain = tokenizer.encode("a")
    shared = next((i for i, (x, y) in enumerate(zip(one, two, strict=False)) if x != y), 0)
    return one[:shared] if one[shared : shared + len(plain)] == plain else []


def _batches(
    tokens: NDArray[Any], prefix: list[int], own: int, stride: int, batch_size: int
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Yields inputs and labels of windows, int32 `[B, T]`; a label that an earlier window has is ignored."""
    width, start = len(prefix) + own, 0
    begin = 0 if prefix else 1  # the first token that is predicted
    rows: list[tuple[NDArray[np.int32], NDArray[np.int32]]] = []
    while begin < len(tokens):
        inputs, labels = np.zeros(width, np.int32), np.full(width, IGNORED, np.int32)
        part = tokens[start : start + own]
        inputs[: len(prefix) + len(part)] = [*prefix, *part]
        end = min(start + own + 1, len(tokens))
        place = len(prefix) - start - 1  # the input before a token predicts it
        labels[place + begin : place + end] = tokens[begin:end]
        rows.append((inputs, labels))
        begin, start = end, start + stride
        if len(rows) == batch_size:
            yield _stack(rows)
            rows = []
    if rows:
        yield _stack(rows)


def _stack(rows: list[tuple[NDArray[np.int32], NDArray[np.int32]]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    return np.stack([inputs for inputs, _ in rows]), np.stack([labels for _, labels in rows])
