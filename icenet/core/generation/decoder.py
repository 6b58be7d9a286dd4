"""The decoder: reads the prompts of a request, then generates one token per row and step.

The loop names no framework. `generation/decoder.py` of each backend adds the operations on its arrays.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icenet.core.config import user_code
from icenet.core.generation.cache import Cache
from icenet.core.generation.prompt_cache import PromptCache
from icenet.core.generation.request import Request, Tokens
from icenet.core.generation.sampling import SamplingOps, compute_scores

KEY_BLOCK = 256
"""Number of new tokens whose sampling keys are made at a time."""


@dataclass(frozen=True)
class State:
    """The arrays from which the next token is computed. All are on the model's device.

    A captured step takes and returns `arrays`; None stands for an array that the request does not need.

    Attributes:
        cache: `Cache.state` of the model's cache; empty for a model without one.
        index: Index of the next new token, int32 `[]`. It stays as it is at temperature 0.
        keys: Keys of the draws of a block of new tokens, `[KEY_BLOCK, B, 2]`; None at temperature 0.
        seen: Tokens that each row contains, bool `[B, V]`; None without a repetition penalty.
    """

    cache: list[Any]
    index: Any
    keys: Any
    seen: Any

    @property
    def arrays(self) -> list[Any]:
        """All arrays of the state."""
        return [*self.cache, *(array for array in (self.index, self.keys, self.seen) if array is not None)]


class Choice(NamedTuple):
    """The choice of the next token of each row.

    Attributes:
        token: int `[B]`.
        best: Score of the token, `[B]`. It is not finite if a logit of the row is NaN or infinite, or if all of them
            are -infinite.
        logits: `[B, V]`.
        scores: `[B, V]`, of `compute_scores`.
    """

    token: Any
    best: Any
    logits: Any
    scores: Any


Step = Callable[[State, Any], tuple[State, Choice]]
"""Reads a token of each row and chooses the next one: `DecoderBase.decode_step`."""


class DecoderBase(ABC):
    """Generates the tokens of one request. Used as a context manager.

    A model with `make_cache`, `hidden_states` and `project` is decoded through its cache. Any other model computes
    the whole context again for each token.

    The host decides what depends on the number of tokens: it makes room in the cache, reads the context again if the
    window of a row is full, and makes the keys of the next draws. `decode_step` does the rest. It is captured on a
    GPU.
    """

    ops: ClassVar[SamplingOps]
    """The backend's sampling steps."""

    def __init__(self, model: Any, request: Request, prompt_cache: PromptCache | None = None) -> None:
        self.model = model
        self.request = request
        self.prompt_cache = prompt_cache
        self.chosen: list[int] = []  # the new tokens of the first row, for the prompt cache
        self.cached = hasattr(model, "make_cache")
        self.step: Step | None = None
        self.step_size: Any = None
        self.cache: Any = None
        self.state: Any = None
        self.choice: Any = None

    def __enter__(self) -> DecoderBase:
        """Moves the request to the device and prefills the prompts."""
        self.model = self.model.for_generation()
        with self.inference_mode():
            self._start(self.request)
        return self

    def _start(self, request: Request) -> None:
        rows = request.rows()
        self.lengths = np.array([len(row) for row in rows])  # tokens of each row in the context
        padded = np.full((len(rows), self.lengths.max()), request.pad_token_id, np.int32)
        for index, row in enumerate(rows):
            padded[index, padded.shape[1] - len(row) :] = row
        self.context = self.to_device(padded)  # tokens of each row, padded on the left, [B, T]
        self.new_tokens: list[Any] = []  # the tokens after it, [B] each
        seen = self.to_device(request.seen(self.model.config.vocab_size))
        self.state = State([], self.to_device(np.zeros((), np.int32)), None, seen)
        longest = request.context_length
        self.rereads = bool(
            not self.cached
            or (longest is not None and self.lengths.max() + request.new_tokens > longest)
            or getattr(self.model, "rereads_above", None)
        )
        self.logits = self.prefill(self.lengths if longest is None else np.minimum(self.lengths, longest))

    def __exit__(self, *exception: object) -> None:
        if exception[0] in (None, GeneratorExit, KeyboardInterrupt):
            self.end_step()
            if self.prompt_cache is not None:
                self.prompt_cache.put(self.cache, [*self.request.rows()[0].tolist(), *self.chosen])
        self.logits = self.choice = self.state = self.cache = self.step = None

    # ---- the steps ---------------------------------------------------------------------------------------

    def prefill(self, lengths: NDArray[np.int64]) -> Any:
        """Reads the last `lengths[r]` tokens of each row r of the context into a new cache.

        The tokens are read in chunks of `Request.prefill_columns`.

        Returns:
            Logits `[B, V]` of the next token.
        """
        self.lengths, longest = lengths, int(lengths.max())
        context = self.context = self._join_context()[:, -longest:]
        padding = longest - lengths[:, None]
        self.attention_mask = self.to_device(np.arange(longest) >= padding) if padding.any() else None
        if not self.cached:
            return self._last_logits()
        self.cache, first = None, 0
        if self.prompt_cache is not None:
            self.cache, first = self.prompt_cache.take(self.request.rows()[0].tolist())
        if self.cache is None:
            self.cache = self.model.make_cache()
        prompts: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if isinstance(self.cache, Cache):  # a user's may be a list
            limit = longest + self.request.new_tokens - 1  # the last one is not read
            limit = min(limit, self.request.context_length or limit)
            row_lengths = self.to_device(lengths.astype(np.int32)[:, None])
            prompts = self.cache.reading_prompts(longest, limit, row_lengths)
        chunk = self.request.prefill_columns(len(lengths), self.model)
        with prompts:
            for start in range(first, longest, chunk):
                stop = min(start + chunk, longest)
                mask = None if self.attention_mask is None else self.attention_mask[:, :stop]
                hidden = self.model.hidden_states(context[:, start:stop], mask, self.cache)
                # with the position, which no output depends on: another thread may read the next token
                self.evaluate([hidden, *(self.cache.state if isinstance(self.cache, Cache) else [])])
        return self.model.project(hidden[:, -1])

    def _join_context(self) -> Any:
        """Returns all tokens of each row, `[B, T]`.

        Until then the tokens are kept as they were chosen: they are evaluated, so another thread may read them on.
        """
        if self.new_tokens:
            self.context = self.concatenate([self.context, *(token[:, None] for token in self.new_tokens)])
            self.new_tokens = []
        return self.context

    def _last_logits(self) -> Any:
        """Returns the logits `[B, V]` of the next token, computed from the whole context."""
        context = self._join_context()
        length = context.shape[1]
        remedy = f"if it has fewer than {length} positions, give max_length, or model.max_seq_length in its config"
        with user_code.explain_errors(context, remedy_of_ids=remedy):
            return self.model(context)[:, -1]

    def choose_token(self, state: State, logits: Any) -> tuple[State, Choice]:
        """Chooses the next token of each row from its logits, `[B, V]`."""
        keys = None if state.keys is None else self.take(state.keys, state.index % KEY_BLOCK)
        scores = compute_scores(self.ops, logits, self.request.settings, keys, state.seen)
        token, best = self.choose(scores)
        seen = None if state.seen is None else self.mark(state.seen, token)
        index = state.index if keys is None else state.index + 1
        return replace(state, index=index, seen=seen), Choice(token, best, logits, scores)

    def decode_step(self, state: State, token: Any) -> tuple[State, Choice]:
        """Reads one token of each row, int `[B]`, and chooses the next one.

        It depends on `state` and `token` only, so that it can be captured and run again with other arrays. The
        buffers of the cache must have room for one column.
        """
        return self._read_and_choose(state, token, self.cache.captured(state.cache))

    def plain_step(self, state: State, token: Any) -> tuple[State, Choice]:
        """The same as `decode_step`, where it is not captured: it reads the columns with tokens only."""
        return self._read_and_choose(state, token, self.cache.holding(state.cache))

    def _read_and_choose(self, state: State, token: Any, cache: Cache) -> tuple[State, Choice]:
        hidden = self.model.hidden_states(token[:, None], None, cache)
        return self.choose_token(replace(state, cache=cache.state), self.model.project(hidden[:, -1]))

    def submit(self, index: int) -> Any:
        """Queues the choice of new token `index` (0, 1, ...) of each row. Returns a handle for `fetch`."""
        with self.inference_mode():
            if index % KEY_BLOCK == 0:
                keys = self.request.keys(index, KEY_BLOCK)
                self.state = replace(self.state, keys=self.to_device(keys))
            logits = self.logits if index == 0 else self._read(self.choice.token)
            self.logits = None
            if logits is None:
                self.decode(self.choice.token)
            else:
                self.state, self.choice = self.choose_token(self.state, logits)
            return self.start_copy(self.choice.token, self.choice.best, self.state.arrays)

    def decode(self, token: Any) -> Choice:
        """Reads one token of each row, int `[B]`, and chooses the next one.

        When it returns, nothing refers to the arrays of the step before: MLX then writes into the buffers of the
        cache, and otherwise copies them.
        """
        self.cache.reserve(1)
        state = replace(self.state, cache=self.cache.state)
        size = getattr(self.cache, "capacity", None), len(state.arrays)
        before = None
        if self.step is None or self.step_size != size:
            before = self.step
            self.step, self.step_size = self.capture(state, token), size
        self.state, self.choice = self.step(state, token)
        self.cache.state = self.state.cache
        self.cache.length += 1
        if before is not None:
            self.keep(before)
        return self.choice

    def end_step(self) -> None:
        """Ends the use of the captured step. The state and the cache do not have its memory afterwards."""
        step, self.step = self.step, None
        if step is not None:
            self.keep(step)

    def step_key(self, state: State, token: Any) -> tuple[Any, ...]:
        """Returns what a captured `decode_step` depends on besides the model and the values of its arrays."""
        settings = self.request.settings
        draws = settings.temperature, settings.top_k, settings.top_p, settings.min_p, settings.repetition_penalty
        sizes = tuple(tuple(array.shape) for array in [token, *state.arrays])
        return sizes, getattr(self.cache, "padding", None) is None, state.keys is None, draws

    def _read(self, token: Any) -> Any:
        """Reads one token of each row, int `[B]`, where `decode_step` cannot.

        If the context of a row is full, its older half is dropped. The rest is read again, with positions from zero.
        The whole context is read again when a row becomes longer than the model's `rereads_above`.

        Returns:
            Logits `[B, V]` of the next token, or None if `decode_step` can read the token.
        """
        self.lengths = self.lengths + 1
        longest = self.request.context_length
        if self.rereads:
            self.new_tokens.append(self.copy(token))
        if longest is not None and self.lengths.max() > longest:
            return self.prefill(np.where(self.lengths > longest, max(longest // 2, 1), self.lengths))
        if not self.cached:
            return self._last_logits()
        if (limit := getattr(self.model, "rereads_above", None)) and (self.lengths == limit + 1).any():
            return self.prefill(self.lengths)
        if isinstance(self.cache, Cache):
            return None
        if self.attention_mask is not None:
            new = self.to_device(np.ones((len(self.lengths), 1), np.bool_))
            self.attention_mask = self.concatenate([self.attention_mask, new])
        return self.model.project(self.model.hidden_states(token[:, None], self.attention_mask, self.cache)[:, -1])

    def fetch(self, handle: Any) -> Tokens:
        """Waits for the tokens that `submit` has queued. Returns int32 `[B]`, -1 where the score is not finite."""
        tokens = self.finish_copy(handle)
        self.chosen.append(int(tokens[0]))
        return tokens

    @contextlib.contextmanager
    def inference_mode(self) -> Iterator[None]:
        """Sets the model to evaluation mode, and opens its arithmetic, for one step.

        The modes are restored after each step, so a caller that consumes a stream sees its own.
        """
        with self.model.evaluation(), self.model.arithmetic():
            yield

    # ---- operations of the framework ---------------------------------------------------------------------

    @abstractmethod
    def to_device(self, array: NDArray[Any] | None) -> Any:
        """Returns a numpy array as an array on the model's device; None for None."""

    @abstractmethod
    def capture(self, state: State, token: Any, step: Step | None = None) -> Step:
        """Returns a step for arrays of these sizes, captured if that is faster on this device.

        Args:
            state, token: Arguments of the step.
            step: The step; `decode_step` by default.
        """

    @abstractmethod
    def keep(self, step: Step) -> None:
        """Keeps a captured step, which this request has used, for later ones."""

    @abstractmethod
    def copy(self, array: Any) -> Any:
        """Returns an array that the next step does not write to."""

    @abstractmethod
    def concatenate(self, arrays: list[Any]) -> Any:
        """Returns arrays `[B, S]`, `[B, T]`, ... side by side."""

    @abstractmethod
    def pick(self, arrays: list[Any], rows: Sequence[int]) -> Any:
        """Returns rows of arrays `[B, ...]`, by their places in the arrays one below the other."""

    @abstractmethod
    def take(self, array: Any, index: Any) -> Any:
        """Returns `array[index]` of an array `[N, ...]`; the index is an int array `[]` on the device."""

    @abstractmethod
    def mark(self, seen: Any, token: Any) -> Any:
        """Returns `seen`, bool `[B, V]`, with True at one token of each row, int `[B]`."""

    @abstractmethod
    def evaluate(self, arrays: list[Any]) -> None:
        """Evaluates lazy arrays, which bounds the memory of a prefill chunk."""

    @abstractmethod
    def choose(self, scores: Any) -> tuple[Any, Any]:
        """Returns the token with the highest score of each row, int `[B]`, and that score.

        The score is not finite if a logit of the row is NaN or infinite, or if all of them are -infinite.
        """

    @abstractmethod
    def start_copy(self, token: Any, best: Any, state: list[Any]) -> Any:
        """Starts to compute tokens, their scores and the arrays of the state, and to copy the first two to the host.

        Returns:
            A handle for `finish_copy`.
        """

    @abstractmethod
    def finish_copy(self, handle: Any) -> Tokens:
        """Waits for the tokens of a handle. Returns int32 `[B]` on the host, -1 where the score is not finite."""

    @abstractmethod
    def fetch_scores(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Returns the logits and the scores of the last choice, fp32 `[B, V]` each, on the host."""
