"""Token by token on MLX: reads prompts through a cache and chooses tokens on the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import numpy as np

from icenet.core.config import GenerationConfig
from icenet.core.generation.sampling import LEAST_TEMPERATURE
from icenet.nn.random import random_uniform

if TYPE_CHECKING:
    from icenet.core.generation.request import Request


class Decoder:
    """Serves one request (`icenet.core.generation.streaming.Decoder`).

    A model that has `make_cache`, `hidden_states` and `project` is read through its cache; any other is read
    anew from its first token for each next one.
    """

    def __init__(self, model: Any, request: Request) -> None:
        self.model = model
        self.request = request
        self.cached = hasattr(model, "make_cache")
        self.cache: Any = None
        self.token: Any = None
        self.logits: Any = None

    def __enter__(self) -> Decoder:
        request = self.request
        keys, seen = request.keys(), request.seen(self.model.config.vocab_size)
        self.keys = None if keys is None else mx.array(keys)
        self.seen = None if seen is None else mx.array(seen)
        self.rows = mx.arange(len(request.tokens))
        self.context = mx.array(request.tokens)  # all tokens so far, [B, S]
        self.attention_mask = None if request.attention_mask is None else mx.array(request.attention_mask)
        with evaluating(self.model):
            self.logits = self.prefill(request.context_length)
        return self

    def __exit__(self, *exception: object) -> None:
        self.logits = self.cache = None

    def prefill(self, limit: int | None) -> mx.array:
        """Reads the last `limit` tokens of the context into a new cache; gives the logits `[B, V]` after them."""
        if limit is not None:
            self.context = self.context[:, -limit:]
            self.attention_mask = None if self.attention_mask is None else self.attention_mask[:, -limit:]
        if not self.cached:
            return self.model(self.context)[:, -1]
        self.cache = self.model.make_cache()
        chunk, length = self.request.settings.prefill_chunk, self.context.shape[1]
        for start in range(0, length, chunk):
            stop = min(start + chunk, length)
            mask = None if self.attention_mask is None else self.attention_mask[:, :stop]
            hidden = self.model.hidden_states(self.context[:, start:stop], mask, self.cache)
            mx.eval(hidden)
        return self.model.project(hidden[:, -1])

    def decode_step(self, token: mx.array) -> mx.array:
        """Reads one more token of each row, `[B]`; gives the logits `[B, V]` after it."""
        context_length = self.request.context_length
        full = context_length is not None and self.context.shape[1] >= context_length
        self.context = mx.concatenate([self.context, token[:, None]], axis=1)
        if self.attention_mask is not None:
            self.attention_mask = mx.concatenate([self.attention_mask, mx.ones((len(token), 1), mx.bool_)], axis=1)
        if full:  # forget the older half and read the rest again: positions start anew
            return self.prefill(max((context_length or 0) // 2, 1))
        if not self.cached:
            return self.model(self.context)[:, -1]
        hidden = self.model.hidden_states(token[:, None], self.attention_mask, self.cache)
        return self.model.project(hidden[:, -1])

    def next(self, index: int) -> mx.array:
        if index > 0:
            with evaluating(self.model):
                self.logits = self.decode_step(self.token)
        keys = None if self.keys is None else self.keys[index]
        self.scores = scores(self.logits, self.request.settings, keys, self.seen)
        self.token = mx.argmax(self.scores, axis=-1)
        if self.seen is not None:
            self.seen[self.rows, self.token] = True
        mx.async_eval(self.token)
        return self.token

    def fetch(self, handle: Any) -> np.ndarray:
        return np.array(handle).astype(np.int32)

    def fetch_scores(self) -> tuple[np.ndarray, np.ndarray]:
        """The logits and scores, fp32 `[B, V]`, that the last token was chosen by."""
        return np.array(self.logits.astype(mx.float32)), np.array(self.scores)


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode for one piece of work: between two tokens of a stream a model is as its user set it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def scores(logits: mx.array, settings: GenerationConfig, keys: mx.array | None, seen: mx.array | None) -> mx.array:
    """What the next token is the highest of, fp32 `[B, V]`, by the rules of `icenet.core.generation.sampling`.

    logits `[B, V]`; keys uint32 `[B, 2]`, None for the most likely token; seen bool `[B, V]`.
    """
    logits = logits.astype(mx.float32)
    vocab_size = logits.shape[-1]
    if seen is not None:
        penalty = settings.repetition_penalty
        logits = mx.where(seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)
    if keys is None:
        return logits
    logits = logits / max(settings.temperature, LEAST_TEMPERATURE)
    if 0 < settings.top_k < vocab_size:
        least = mx.topk(logits, settings.top_k, axis=-1).min(axis=-1, keepdims=True)
        logits = mx.where(logits < least, -mx.inf, logits)
    if settings.top_p < 1:
        ordered = mx.sort(logits, axis=-1)  # ascending
        below = mx.cumsum(mx.softmax(ordered, axis=-1, precise=True), axis=-1) <= 1 - settings.top_p
        below[:, -1] = False  # the most likely token always stays
        least = mx.where(below, mx.inf, ordered).min(axis=-1, keepdims=True)
        logits = mx.where(logits < least, -mx.inf, logits)
    if settings.min_p > 0:
        probabilities = mx.softmax(logits, axis=-1, precise=True)
        least = settings.min_p * probabilities.max(axis=-1, keepdims=True)
        logits = mx.where(probabilities < least, -mx.inf, logits)
    uniform = random_uniform(keys, vocab_size)
    return logits - mx.log(-mx.log(uniform))
