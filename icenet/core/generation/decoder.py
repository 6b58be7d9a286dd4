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
        self.keys = self.to_device(request.keys())  # [new tokens, B, 2]
        self.seen = self.to_device(request.seen(self.model.config.vocab_size))  # [B, V]
        self.context: Any = self.to_device(request.tokens)  # all tokens so far, [B, S]
        self.attention_mask = self.to_device(request.attention_mask)  # [B, S]
        self.logits = self.prefill(request.context_length)

    def __exit__(self, *exception: object) -> None:
        self.logits = self.scores = self.cache = None

    # ---- the steps ---------------------------------------------------------------------------------------

    def prefill(self, max_tokens: int | None) -> Any:
        """Reads the last `max_tokens` tokens of the context into a new cache, in chunks of `prefill_chunk` tokens.

        Returns:
            Logits `[B, V]` of the next token.
        """
        if max_tokens is not None:
            self.context = self.context[:, -max_tokens:]
            self.attention_mask = None if self.attention_mask is None else self.attention_mask[:, -max_tokens:]
        if not self.cached:
            return self._last_logits()
        self.cache = self.model.make_cache()
        chunk, length = self.request.settings.prefill_chunk, self.context.shape[1]
        for start in range(0, length, chunk):
            stop = min(start + chunk, length)
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

        If the context is full, the older half is dropped and the rest is read again, with positions from zero.

        Returns:
            Logits `[B, V]` of the next token.
        """
        context_length = self.request.context_length
        is_full = context_length is not None and self.context.shape[1] >= context_length
        self.context = self.append_column(self.context, token)
        if self.attention_mask is not None:
            self.attention_mask = self.append_column(self.attention_mask, token >= 0)  # no new token is padding
        if is_full:
            return self.prefill(max((context_length or 0) // 2, 1))
        if not self.cached:
            return self._last_logits()
        hidden = self.model.hidden_states(token[:, None], self.attention_mask, self.cache)
        return self.model.project(hidden[:, -1])

    def submit(self, index: int) -> Any:
        """Queues the choice of new token `index` (0, 1, ...) of each row. Returns a handle for `fetch`."""
        with self.inference_mode():
            if index > 0:
                self.logits = self.decode_step(self.token)
            keys = None if self.keys is None else self.keys[index]
            self.scores = compute_scores(self.ops, self.logits, self.request.settings, keys, self.seen)
            self.token = self.scores.argmax(-1)
            if self.seen is not None:
                self.mark_seen(self.token)
            return self.start_copy(self.token)

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
    def start_copy(self, token: Any) -> Any:
        """Starts to compute `token` and to copy it to the host. Returns a handle for `fetch`."""

    @abstractmethod
    def fetch(self, handle: Any) -> Tokens:
        """Waits for the tokens of a handle. Returns int32 `[B]` on the host."""

    @abstractmethod
    def fetch_scores(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Returns the logits and the scores of the last choice, fp32 `[B, V]` each, on the host."""
