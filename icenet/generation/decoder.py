"""The decoder's operations on MLX arrays. `icenet.core.generation.decoder` has the loop."""

from __future__ import annotations

import copy as copying
import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, cast

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from icenet.core.generation.cache import RecurrentCache
from icenet.core.generation.decoder import DecoderBase, State, Step
from icenet.core.generation.request import Tokens
from icenet.core.generation.sampling import SamplingOps
from icenet.generation import sampling
from icenet.generation.cache import KVCache
from icenet.generation.capture import KEPT_STEPS, CapturedStep, fuse_kernels, kept_steps
from icenet.nn.arrays import on_cpu


class Decoder(DecoderBase):
    """Generates the tokens of one request on the model's device."""

    ops: ClassVar[SamplingOps] = sampling

    def to_device(self, array: NDArray[Any] | None) -> mx.array | None:
        return None if array is None else mx.array(array)

    def capture(self, state: State, token: mx.array, step: Step | None = None) -> Step:
        if on_cpu() or not isinstance(self.cache, (KVCache, RecurrentCache)):
            return step or self.plain_step
        if step is not None:
            fuse_kernels(self.model)
            return CapturedStep(step, state, token)
        # tracing takes as long as several tokens, so that steps are kept for later requests
        key, steps = self.step_key(state, token), kept_steps(self.model)
        if key not in steps:
            fuse_kernels(self.model)
            steps[key] = CapturedStep(self._for_tracing().decode_step, state, token)
        steps[key] = steps.pop(key)  # the last one was used last
        while len(steps) > KEPT_STEPS:
            del steps[next(iter(steps))]
        return steps[key]

    def keep(self, step: Step) -> None:
        """Does nothing: steps are kept when they are captured, because several requests can use one at a time."""

    def _for_tracing(self) -> Decoder:
        """Returns a decoder for a step that the model keeps: it holds no buffers, nor the model."""
        other = copying.copy(self)
        other.model = weakref.proxy(self.model)
        other.cache = self.cache.without_arrays()
        other.state = other.choice = other.logits = other.context = other.attention_mask = None
        other.step = other.prompt_cache = None
        other.new_tokens, other.chosen = [], []
        return other

    def copy(self, array: mx.array) -> mx.array:
        return array

    def concatenate(self, arrays: list[mx.array]) -> mx.array:
        return mx.concatenate(arrays, axis=1) if len(arrays) > 1 else arrays[0]

    def pick(self, arrays: list[mx.array], rows: Sequence[int]) -> mx.array:
        array = mx.concatenate(arrays, axis=0) if len(arrays) > 1 else arrays[0]
        return array[mx.array(list(rows))]

    def take(self, array: mx.array, index: mx.array) -> mx.array:
        return array[index]

    def mark(self, seen: mx.array, token: mx.array) -> mx.array:
        return mx.put_along_axis(seen, token[:, None], mx.array(True), axis=1)

    def evaluate(self, arrays: list[mx.array]) -> None:
        mx.eval(arrays)

    def choose(self, scores: mx.array) -> tuple[mx.array, mx.array]:
        if on_cpu():  # there, MLX's functions of half precision take 4 times as long (50,257 scores: 330 and 76 us)
            scores = scores.astype(mx.float32)
        return scores.argmax(-1), scores.max(-1)  # argmax passes over NaN, max does not

    def start_copy(self, token: mx.array, best: mx.array, state: list[mx.array]) -> tuple[mx.array, mx.array]:
        mx.async_eval(token, best, state)  # lazy arrays would need the thread and keep the graphs of all steps
        return token, best

    def finish_copy(self, handle: tuple[mx.array, mx.array]) -> Tokens:
        # lists, because numpy's functions take longer for few rows: 6 % of a token of GPT-2 with 1.2M parameters
        token, best = cast(Iterable[list[Any]], (array.tolist() for array in handle))
        return np.array([t if math.isfinite(b) else -1 for t, b in zip(token, best, strict=True)], np.int32)

    def fetch_scores(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return np.array(self.choice.logits.astype(mx.float32)), np.array(self.choice.scores.astype(mx.float32))
