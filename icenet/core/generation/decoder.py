"""The decoder: reads the prompts of a request, then generates one token per row and step.

The loop names no framework. `generation/decoder.py` of each backend adds the operations on its arrays.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from icenet.core.config import user_code
from icenet.core.generation.request import Request, Tokens
from icenet.core.generation.sampling import SamplingOps, compute_scores

KEY_BLOCK = 256
"""Number of new tokens whose sampling keys are made at a time."""


class DecoderBase(ABC):
    """Generates the tokens of one request. Used as a context manager.

    A model with `make_cache`, `hidden_states` and `project` is decoded through its cache. Any other model computes
    the whole context again for each token.
    """

    ops: ClassVar[SamplingOps]
    """The backend's sampling steps."""

    def __init__(self, model: Any, request: Request) -> None:
        self.model = model
        self.request = request
        self.cached = hasattr(model, "make_cache")
        # only a model without a cache, or one whose context is full, reads earlier tokens again
        self.keeps_context = not self.cached or request.context_length is not None
        self.cache: Any = None
        self.token: Any = None
        self.logits: Any = None
        self.scores: Any = None

    def __enter__(self) -> DecoderBase:
        """Moves the request to the device and prefills the prompts."""
        with self.inference_mode():
            self._start(self.request)
        return self

    def _start(self, request: Request) -> None:
        self.keys: Any = None  # of the current block of new tokens, [KEY_BLOCK, B, 2]
        self.seen = self.to_device(request.seen(self.model.config.vocab_size))  # [B, V]
        rows = request.rows()
        self.lengths = np.array([len(row) for row in rows])  # tokens of each row in the context
        padded = np.full((len(rows), self.lengths.max()), request.pad_token_id, np.int32)
        for index, row in enumerate(rows):
            padded[index, padded.shape[1] - len(row) :] = row
        self.context: Any = self.to_device(padded)  # the tokens of each row, padded on the left, [B, S]
        self.attention_mask: Any = None  # [B, S], None without padding
        longest = request.context_length
        self.logits = self.prefill(self.lengths if longest is None else np.minimum(self.lengths, longest))

    def __exit__(self, *exception: object) -> None:
        self.logits = self.scores = self.cache = None

    # ---- the steps ---------------------------------------------------------------------------------------

    def prefill(self, lengths: NDArray[np.int64]) -> Any:
        """Reads the last `lengths[r]` tokens of each row r of the context into a new cache.

        The tokens are read in chunks of `prefill_chunk` columns.

        Returns:
            Logits `[B, V]` of the next token.
        """
        self.lengths, longest = lengths, int(lengths.max())
        self.context = self.context[:, -longest:]
        padding = longest - lengths[:, None]
        self.attention_mask = self.to_device(np.arange(longest) >= padding) if padding.any() else None
        if not self.cached:
            return self._last_logits()
        self.cache = self.model.make_cache()
        chunk = self.request.settings.prefill_chunk
        for start in range(0, longest, chunk):
            stop = min(start + chunk, longest)
            mask = None if self.attention_mask is None else self.attention_mask[:, :stop]
            hidden = self.model.hidden_states(self.context[:, start:stop], mask, self.cache)
            self.evaluate(hidden)
        return self.model.project(hidden[:, -1])

    def _last_logits(self) -> Any:
        """Returns the logits `[B, V]` of the next token, computed from the whole context."""
        with user_code.explain_errors(self.context):
            return self.model(self.context)[:, -1]

    def decode_step(self, token: Any) -> Any:
        """Reads one token of each row, int `[B]`, into the cache.

        If the context of a row is full, its older half is dropped. The rest is read again, with positions from zero.

        Returns:
            Logits `[B, V]` of the next token.
        """
        self.lengths = self.lengths + 1
        if self.keeps_context:
            self.context = self.append_column(self.context, token)
        longest = self.request.context_length
        if longest is not None and self.lengths.max() > longest:
            return self.prefill(np.where(self.lengths > longest, max(longest // 2, 1), self.lengths))
        if self.attention_mask is not None:
            self.attention_mask = self.append_column(self.attention_mask, token >= 0)  # no new token is padding
        if not self.cached:
            return self._last_logits()
        hidden = self.model.hidden_states(token[:, None], self.attention_mask, self.cache)
        return self.model.project(hidden[:, -1])

    def submit(self, index: int) -> Any:
        """Queues the choice of new token `index` (0, 1, ...) of each row. Returns a handle for `fetch`."""
        with self.inference_mode():
            if index > 0:
                self.logits = self.decode_step(self.token)
            if index % KEY_BLOCK == 0:
                count = min(KEY_BLOCK, self.request.new_tokens - index)
                self.keys = self.to_device(self.request.keys(index, count))
            keys = None if self.keys is None else self.keys[index % KEY_BLOCK]
            self.scores = compute_scores(self.ops, self.logits, self.request.settings, keys, self.seen)
            self.token, best = self.choose(self.scores)
            if self.seen is not None:
                self.mark_seen(self.token)
            return self.start_copy(self.token, best)

    @contextlib.contextmanager
    def inference_mode(self) -> Iterator[None]:
        """Sets the model to evaluation mode, and opens its arithmetic, for one step.

        The mode is restored after each step, so a caller that consumes a stream sees the model in its own mode.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            with self.model.arithmetic():
                yield
        finally:
            self.model.train(was_training)

    # ---- operations of the framework ---------------------------------------------------------------------

    @abstractmethod
    def to_device(self, array: NDArray[Any] | None) -> Any:
        """Returns a numpy array as an array on the model's device; None for None."""

    @abstractmethod
    def append_column(self, array: Any, column: Any) -> Any:
        """Returns `array` `[B, S]` with `column` `[B]` appended: `[B, S + 1]`."""

    @abstractmethod
    def mark_seen(self, token: Any) -> None:
        """Sets `seen` to True at one token of each row, int `[B]`."""

    @abstractmethod
    def evaluate(self, array: Any) -> None:
        """Evaluates a lazy array, which bounds the memory of a prefill chunk."""

    @abstractmethod
    def choose(self, scores: Any) -> tuple[Any, Any]:
        """Returns the token with the highest score of each row, int `[B]`, and that score.

        The score is not finite if a logit of the row is NaN or infinite, or if all of them are -infinite.
        """

    @abstractmethod
    def start_copy(self, token: Any, best: Any) -> Any:
        """Starts to compute tokens and their scores, and to copy them to the host. Returns a handle for `fetch`."""

    @abstractmethod
    def fetch(self, handle: Any) -> Tokens:
        """Waits for the tokens of a handle. Returns int32 `[B]` on the host, -1 where the score is not finite."""

    @abstractmethod
    def fetch_scores(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Returns the logits and the scores of the last choice, fp32 `[B, V]` each, on the host."""
