"""Token by token on PyTorch: reads prompts through a cache and chooses tokens on the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from icenet.core.config import GenerationConfig
from icenet.core.generation.sampling import LEAST_TEMPERATURE
from icenet_torch.nn.random import random_uniform

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

    @torch.no_grad()
    def __enter__(self) -> Decoder:
        request = self.request
        keys, seen = request.keys(), request.seen(self.model.config.vocab_size)
        device = self.model.device
        self.keys = None if keys is None else torch.from_numpy(keys.view(np.int32)).to(device)
        self.seen = None if seen is None else torch.from_numpy(seen).to(device)
        self.rows = torch.arange(len(request.tokens), device=device)
        self.context = torch.from_numpy(request.tokens).to(device)  # all tokens so far, [B, S]
        self.attention_mask = (
            None if request.attention_mask is None else torch.from_numpy(request.attention_mask).to(device)
        )
        with evaluating(self.model):
            self.logits = self.prefill(request.context_length)
        return self

    def __exit__(self, *exception: object) -> None:
        self.logits = self.cache = None

    def prefill(self, limit: int | None) -> torch.Tensor:
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
        return self.model.project(hidden[:, -1])

    def decode_step(self, token: torch.Tensor) -> torch.Tensor:
        """Reads one more token of each row, `[B]`; gives the logits `[B, V]` after it."""
        context_length = self.request.context_length
        full = context_length is not None and self.context.shape[1] >= context_length
        self.context = torch.cat([self.context, token[:, None]], dim=1)
        if self.attention_mask is not None:
            self.attention_mask = torch.cat(
                [self.attention_mask, self.attention_mask.new_ones((len(token), 1))], dim=1
            )
        if full:  # forget the older half and read the rest again: positions start anew
            return self.prefill(max((context_length or 0) // 2, 1))
        if not self.cached:
            return self.model(self.context)[:, -1]
        hidden = self.model.hidden_states(token[:, None], self.attention_mask, self.cache)
        return self.model.project(hidden[:, -1])

    @torch.no_grad()
    def next(self, index: int) -> Any:
        if index > 0:
            with evaluating(self.model):
                self.logits = self.decode_step(self.token)
        keys = None if self.keys is None else self.keys[index]
        self.scores = scores(self.logits, self.request.settings, keys, self.seen)
        self.token = torch.argmax(self.scores, dim=-1)
        if self.seen is not None:
            self.seen[self.rows, self.token] = True
        if self.token.device.type != "cuda":
            return self.token, None
        # the copy to the host is queued now, behind this choice and before the next one's work
        host = self.token.to("cpu", non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return host, copied

    def fetch(self, handle: Any) -> np.ndarray:
        host, copied = handle
        if copied is not None:
            copied.synchronize()
        return host.cpu().numpy().astype(np.int32)

    def fetch_scores(self) -> tuple[np.ndarray, np.ndarray]:
        """The logits and scores, fp32 `[B, V]`, that the last token was chosen by."""
        return self.logits.float().cpu().numpy(), self.scores.cpu().numpy()


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode for one piece of work: between two tokens of a stream a model is as its user set it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def scores(
    logits: torch.Tensor, settings: GenerationConfig, keys: torch.Tensor | None, seen: torch.Tensor | None
) -> torch.Tensor:
    """What the next token is the highest of, fp32 `[B, V]`, by the rules of `icenet.core.generation.sampling`.

    logits `[B, V]`; keys int32 `[B, 2]`, None for the most likely token; seen bool `[B, V]`.
    """
    logits = logits.float()
    vocab_size = logits.shape[-1]
    if seen is not None:
        penalty = settings.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if keys is None:
        return logits
    logits = logits / max(settings.temperature, LEAST_TEMPERATURE)
    if 0 < settings.top_k < vocab_size:
        least = torch.topk(logits, settings.top_k, dim=-1).values.amin(dim=-1, keepdim=True)
        logits = torch.where(logits < least, -torch.inf, logits)
    if settings.top_p < 1:
        ordered = torch.sort(logits, dim=-1).values  # ascending
        below = torch.cumsum(torch.softmax(ordered, dim=-1), dim=-1) <= 1 - settings.top_p
        below[:, -1] = False  # the most likely token always stays
        least = torch.where(below, torch.inf, ordered).amin(dim=-1, keepdim=True)
        logits = torch.where(logits < least, -torch.inf, logits)
    if settings.min_p > 0:
        probabilities = torch.softmax(logits, dim=-1)
        least = settings.min_p * probabilities.amax(dim=-1, keepdim=True)
        logits = torch.where(probabilities < least, -torch.inf, logits)
    uniform = random_uniform(keys, vocab_size)
    return logits - torch.log(-torch.log(uniform))
