"""Continuous batching: the prompts of a request share a fixed number of slots.

A row leaves its slot as soon as it ends, and a prompt that waits takes the slot. The slots have positions of their
own in the cache, so prompts of any length are decoded together, by the same step as a single one. What a row
generates does not depend on the others: its keys of sampling are those of its number in the request.

Prompts of similar lengths are read together, the longest first, padded on the right. Nothing attends to the padding,
and the new tokens are written over it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from icenet.core.errors import NonFiniteError
from icenet.core.generation import decoder as decoding
from icenet.core.generation.cache import RowCache
from icenet.core.generation.decoder import Choice, DecoderBase, State
from icenet.core.generation.request import PREFILL_TOKENS, Request
from icenet.core.generation.stopping import StoppingCriteria


@dataclass(frozen=True)
class Costs:
    """What decides when rows move.

    Attributes:
        padding: Tokens of padding that are read in the time of starting another forward pass.
        joining: Part of the slots that must be free before prompts join.
        leaving: Part of the slots that must be free before the batch shrinks, if no prompt waits.
    """

    padding: int
    joining: float
    leaving: float


ON_GPU = Costs(padding=4096, joining=1 / 8, leaving=1 / 2)
"""Starting a pass takes as long as reading thousands of tokens. A smaller batch is hardly faster, and its step is
captured again."""
ON_CPU = Costs(padding=32, joining=0.0, leaving=1 / 8)
"""The time is that of the operations. Reading the weights takes as long as computing about 30 tokens."""

Pending = tuple[Any, list[int | None]]
"""The handle of a step, and the row of each slot in that step."""


def rows_that_join(model: Any, request: Request) -> list[int]:
    """Returns the rows of a request that can share a batch; none if there is one row.

    A row cannot if its context becomes full and slides, or if its tokens must be read again at some length. No row
    can if the model has no cache, or one of a user's class.
    """
    if len(request.tokens) < 2 or not hasattr(model, "make_cache"):
        return []
    cache = model.make_cache()
    if not isinstance(cache, RowCache) or "arrange" not in vars(type(cache)):  # a subclass may have more arrays
        return []
    context, switch = request.context_length, getattr(model, "rereads_above", None)
    joining = []
    for row, (prompt, limit) in enumerate(zip(request.rows(), request.limits, strict=True)):
        slides = context is not None and len(prompt) + limit > context
        rereads = switch is not None and len(prompt) <= switch < len(prompt) + limit
        if not (slides or rereads):
            joining.append(row)
    return joining


def generate_batch(decoder: DecoderBase, stopping: StoppingCriteria) -> None:
    """Generates all rows of the decoder's request. `stopping` has their tokens afterwards.

    Raises:
        NonFiniteError: The logits of a row are NaN or infinite.
    """
    batch, pending = Batch(decoder, stopping), None
    try:
        while pending is not None or batch.has_rows:
            # the next step is queued before the last tokens are read, so the device does not wait for the host
            upcoming = batch.submit()
            batch.read(pending)
            if batch.is_due:
                batch.read(upcoming)
                upcoming = None
                batch.rearrange()
            pending = upcoming
        decoder.end_step()
    except NonFiniteError as error:
        raise decoder.request.explain(error, decoder.model, stopping.tokens) from None


class Rows(NamedTuple):
    """The arrays on which the next tokens of some rows depend.

    Attributes:
        cache: The tokens that are read.
        token: The last token of each row, which is not read, int `[B]`.
        seen: Tokens that each row contains, bool `[B, V]`; None without a repetition penalty.
    """

    cache: RowCache
    token: Any
    seen: Any

    def arrange(self, rows: Sequence[int], decoder: DecoderBase, other: Rows | None = None) -> Rows:
        """Returns some of these rows and of others, one below the other: see `RowCache.arrange`."""
        both = [self] if other is None else [self, other]
        self.cache.arrange(rows, decoder.pick, None if other is None else other.cache)
        token = decoder.pick([part.token for part in both], rows)
        seen = None if self.seen is None else decoder.pick([part.seen for part in both], rows)
        decoder.evaluate([token, *([] if seen is None else [seen]), *self.cache.state])
        return Rows(self.cache, token, seen)


class Batch:
    """The rows of a request in the slots of a batch.

    Attributes:
        slots: The row in each slot; None if it is free. The step computes free slots, too.
        waiting: The rows that are not yet read, the longest first.
    """

    def __init__(self, decoder: DecoderBase, stopping: StoppingCriteria) -> None:
        decoder.model = decoder.model.for_generation()
        self.decoder = decoder
        self.request = decoder.request
        self.stopping = stopping
        self.costs = ON_CPU if decoder.model.is_on_cpu else ON_GPU
        self.prompts = self.request.rows()
        self.lengths = np.array([len(prompt) for prompt in self.prompts])
        self.waiting = deque(np.argsort(-self.lengths, kind="stable").tolist())
        self.slots: list[int | None] = []
        self.chosen = [0] * len(self.prompts)  # number of tokens that are chosen or queued, of each row
        self.moved = False  # whether the cache does not know the positions of the slots
        self.steps = 0  # since the keys of the draws were made

    @property
    def has_rows(self) -> bool:
        """Whether a row waits or is in a slot."""
        return bool(self.waiting) or self.slots.count(None) < len(self.slots)

    @property
    def is_due(self) -> bool:
        """Whether enough slots are free for prompts to join, or for the batch to become smaller."""
        size, free = len(self.slots), self.slots.count(None)
        if self.waiting:
            return free == size or free >= min(len(self.waiting), max(1, size * self.costs.joining))
        return 0 < size * self.costs.leaving <= free < size

    def submit(self) -> Pending | None:
        """Queues the choice of the next token of each row. Returns None if there is none.

        A row that has all its tokens then leaves its slot.
        """
        rows = list(self.slots)
        if rows.count(None) == len(rows):
            return None
        decoder = self.decoder
        with decoder.inference_mode():
            if self.steps == decoding.KEY_BLOCK:
                self._make_keys()
            if self.moved:
                self._place()
            decoder.decode(decoder.choice.token)
            handle = decoder.start_copy(decoder.choice.token, decoder.choice.best, decoder.state.arrays)
        self.steps += 1
        for slot, row in enumerate(rows):
            if row is not None:
                self.chosen[row] += 1
                if self.chosen[row] == self.request.limits[row]:
                    self._free(slot)
        return handle, rows

    def read(self, pending: Pending | None) -> None:
        """Waits for the tokens of a step. A row that ends with one of them leaves its slot."""
        if pending is None:
            return
        handle, rows = pending
        for slot, (row, token) in enumerate(zip(rows, self.decoder.finish_copy(handle).tolist(), strict=True)):
            if row is None or self.stopping.finish_reasons[row] is not None:
                continue
            self.stopping.add(row, token)
            if self.stopping.finish_reasons[row] is not None and self.slots[slot] == row:
                self._free(slot)

    def _free(self, slot: int) -> None:
        self.slots[slot] = None
        self.moved = True

    def rearrange(self) -> None:
        """Reads prompts that wait into free slots. If none waits, the batch shrinks. All steps must be read."""
        with self.decoder.inference_mode():
            size = min(self.request.settings.max_batch_size, len(self.waiting))
            if self.slots.count(None) == len(self.slots) > size or not self.slots:
                self.slots, self.decoder.cache = [None] * size, None
                self.decoder.end_step()
            while self.waiting and None in self.slots:
                self._join(self._next_group())
            if self.is_due:
                kept = [slot for slot, row in enumerate(self.slots) if row is not None]
                self._arrange(kept)
                self.decoder.end_step()
                self.slots = [self.slots[slot] for slot in kept]
            if self.has_rows:
                self._make_keys()
                self._place()

    def _next_group(self) -> list[int]:
        """Takes the next prompts that are read together, the shortest first."""
        group = [self.waiting.popleft()]
        longest, padding = int(self.lengths[group[0]]), 0
        while self.waiting and len(group) < self.slots.count(None):
            padding += longest - int(self.lengths[self.waiting[0]])
            if padding > self.costs.padding or longest * (len(group) + 1) > PREFILL_TOKENS:
                break
            group.append(self.waiting.popleft())
        return group[::-1]

    def _join(self, group: list[int]) -> None:
        """Reads prompts and chooses the first token of each. Those that do not end with it get slots."""
        decoder, request = self.decoder, self.request.select(group)
        cache, logits = self._prefill(group)
        seen = decoder.to_device(request.seen(decoder.model.config.vocab_size))
        state, choice = decoder.choose_token(self._state(request.keys(0, 1), seen), logits)
        tokens = decoder.finish_copy(decoder.start_copy(choice.token, choice.best, [*cache.state, *state.arrays]))
        for row, token in sorted(zip(group, tokens.tolist(), strict=True)):  # an error names the first row
            self.chosen[row] = 1
            self.stopping.add(row, token)
        kept = [place for place, row in enumerate(group) if self.stopping.finish_reasons[row] is None]
        if not kept:
            return
        joined = Rows(cache, choice.token, state.seen)
        if len(kept) < len(group):
            joined = joined.arrange(kept, decoder)
        free = [slot for slot, row in enumerate(self.slots) if row is None][: len(kept)]
        for slot, place in zip(free, kept, strict=True):
            self.slots[slot] = group[place]
        size = len(self.slots)
        if decoder.cache is None:
            self._set_rows(joined)
            if len(kept) < size:
                self._arrange([*range(len(kept)), *[0] * (size - len(kept))])  # free slots are copies of a row
        else:
            rows = list(range(size))
            for place, slot in enumerate(free):
                rows[slot] = size + place
            self._arrange(rows, joined)

    def _prefill(self, group: Sequence[int]) -> tuple[RowCache, Any]:
        """Reads prompts, the shortest first, into a new cache. Returns it and the logits `[B, V]` after them."""
        decoder, model, lengths = self.decoder, self.decoder.model, self.lengths[list(group)]
        longest, chunk = int(lengths[-1]), self.request.prefill_columns(len(group), model)
        # the padding repeats a token of the row: that of another token may have a vector that is not finite
        tokens = np.stack([np.pad(self.prompts[row], (0, longest - self.lengths[row]), mode="edge") for row in group])
        cache = model.make_cache()
        limit = int(max(self.lengths + self.request.limits)) - 1  # the last token is not read
        last = []  # the hidden states of the last token of each row, [1, rows, D] for each chunk
        with cache.reading_prompts(longest, limit, decoder.to_device(lengths.astype(np.int32)[:, None])):
            for start in range(0, longest, chunk):
                stop = min(start + chunk, longest)
                mask = np.arange(stop) < lengths[:, None]
                is_masked = cache.reads_padding and not mask.all()
                hidden = model.hidden_states(
                    decoder.to_device(tokens[:, start:stop]), decoder.to_device(mask) if is_masked else None, cache
                )
                ends = np.flatnonzero((lengths > start) & (lengths <= stop))
                if len(ends):
                    places = decoder.to_device(lengths[ends] - 1 - start)
                    last.append(hidden[decoder.to_device(ends), places][None])
                decoder.evaluate([*last, *cache.state])
        return cache, model.project(decoder.concatenate(last)[0])

    def _arrange(self, rows: list[int], joined: Rows | None = None) -> None:
        """Moves the rows of the slots, and puts others in: see `Rows.arrange`."""
        decoder = self.decoder
        present = Rows(decoder.cache, decoder.choice.token, decoder.state.seen)
        decoder.state = None  # it refers to the buffers, which would be copied
        self._set_rows(present.arrange(rows, decoder, joined))

    def _set_rows(self, rows: Rows) -> None:
        self.decoder.cache, self.decoder.choice = rows.cache, Choice(rows.token, None, None, None)
        self.decoder.state = State([], None, None, rows.seen)

    def _place(self) -> None:
        """Tells the cache the position of each slot: all tokens but the last are read. Free slots begin at zero."""
        columns = [0 if row is None else int(self.lengths[row]) + self.chosen[row] - 1 for row in self.slots]
        longest = max(columns)
        filled = {column for column, row in zip(columns, self.slots, strict=True) if row is not None}
        if self.costs is ON_CPU and filled == {longest}:
            columns = [longest]  # that of all rows: their columns are copied, and attention needs no mask
        self.decoder.cache.place(self.decoder.to_device(np.array(columns, np.int32)), longest)
        self.moved = False

    def _make_keys(self) -> None:
        """Makes the keys of the next draws of each slot."""
        rows = [0 if row is None else row for row in self.slots]
        keys = self.request.select(rows).keys([self.chosen[row] for row in rows], decoding.KEY_BLOCK)
        self.decoder.state = self._state(keys, self.decoder.state.seen)
        self.steps = 0

    def _state(self, keys: Any, seen: Any) -> State:
        return State([], self.decoder.to_device(np.zeros((), np.int32)), self.decoder.to_device(keys), seen)
