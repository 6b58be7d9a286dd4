"""The decoder's operations on PyTorch tensors. `icenet.core.generation.decoder` has the loop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from icenet.core.generation.cache import RecurrentCache
from icenet.core.generation.decoder import DecoderBase, State, Step
from icenet.core.generation.request import Tokens
from icenet.core.generation.sampling import SamplingOps
from icenet_torch.generation import sampling
from icenet_torch.generation.cache import KVCache
from icenet_torch.generation.capture import (
    CAPTURED_DEVICES,
    CapturedStep,
    fuse_kernels,
    keep_step,
    kept_steps,
    settings,
)

Handle = tuple[torch.Tensor, torch.Tensor, torch.cuda.Event | None]
"""Tokens and their scores on the host, and the event after which they are valid; None if they already are."""


class Decoder(DecoderBase):
    """Generates the tokens of one request on the model's device."""

    ops: ClassVar[SamplingOps] = sampling

    @contextlib.contextmanager
    def inference_mode(self) -> Iterator[None]:
        with torch.no_grad(), super().inference_mode():
            yield

    def to_device(self, array: NDArray[Any] | None) -> torch.Tensor | None:
        if array is None:
            return None
        # PyTorch has no arithmetic on unsigned words: keys are int32 with the same bits
        array = array.view(np.int32) if array.dtype == np.uint32 else array
        return torch.from_numpy(array).to(self.model.device)

    def capture(self, state: State, token: torch.Tensor, step: Step | None = None) -> Step:
        if token.device.type not in CAPTURED_DEVICES or not isinstance(self.cache, (KVCache, RecurrentCache)):
            return step or self.plain_step
        if step is not None:
            fuse_kernels(self.model)
            return CapturedStep(step, state, token)
        # capturing takes as long as dozens of tokens, so that steps are kept for later requests
        key, steps = (*self.step_key(state, token), settings(token.device)), kept_steps(self.model)
        if (kept := steps.pop(key, None)) is None:  # two requests at a time need memory of their own
            fuse_kernels(self.model)
            kept = CapturedStep(self.decode_step, state, token)
            kept.key = key
        return kept

    def keep(self, step: Step) -> None:
        if not isinstance(step, CapturedStep) or step.key is None or not keep_step(self.model, step):
            return
        if self.prompt_cache is not None:  # it keeps the buffers, and the next request writes to those of the step
            own = {id(array) for array in step.state.cache}
            self.cache.state = [array.clone() if id(array) in own else array for array in self.cache.state]

    def copy(self, array: torch.Tensor) -> torch.Tensor:
        return array.clone() if isinstance(self.step, CapturedStep) else array

    def concatenate(self, arrays: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(arrays, dim=1) if len(arrays) > 1 else arrays[0]

    def pick(self, arrays: list[torch.Tensor], rows: Sequence[int]) -> torch.Tensor:
        array = torch.cat(arrays, dim=0) if len(arrays) > 1 else arrays[0]
        return array.index_select(0, torch.tensor(rows, device=array.device))

    def take(self, array: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return array.index_select(0, index.reshape(1))[0]  # array[index] would copy the index to the host

    def mark(self, seen: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        return seen.scatter(1, token[:, None], True)

    def evaluate(self, arrays: list[torch.Tensor]) -> None:
        """Does nothing: PyTorch's tensors are not lazy."""

    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        best, token = scores.max(dim=-1)
        return token, best

    def start_copy(self, token: torch.Tensor, best: torch.Tensor, state: list[torch.Tensor]) -> Handle:
        if token.device.type != "cuda":
            return token, best, None
        # the copies are queued on the stream before the work of the next step
        host = token.to("cpu", non_blocking=True), best.to("cpu", non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return *host, copied

    def finish_copy(self, handle: Handle) -> Tokens:
        token, best, copied = handle
        if copied is not None:
            copied.synchronize()
        return np.where(np.isfinite(best.cpu().float().numpy()), token.cpu().numpy(), -1).astype(np.int32)

    def fetch_scores(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return self.choice.logits.float().cpu().numpy(), self.choice.scores.float().cpu().numpy()
