"""Speculative decoding (Leviathan et al., 2023; Chen et al., 2023): a small model proposes tokens for a large one.

In each round the draft proposes N tokens, one after the other. The model then reads them in one forward pass, which
takes about the time of one token, and chooses its own token at each of their places. Its choices are the result up to
the first one that the draft did not propose, that one included. Both caches go back to the last token of the result.

The papers accept a proposal with a probability that keeps the distribution. Here a draw is a function of its key, and
the draft and the model draw the token of a place with the same key. A proposal is accepted if it is the model's own
choice. So the text for a seed is the one without a draft, up to ties within rounding: a forward pass of several
tokens rounds otherwise than one of a single token. The same Gumbel noise makes similar distributions choose the same
token, with a probability of at least (1 - d) / (1 + d) for their total variation d (Daliri et al., 2025).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core.errors import UsageError
from icenet.core.generation.decoder import Choice, DecoderBase, State
from icenet.core.generation.prompt_cache import PromptCache, check_request
from icenet.core.generation.request import Request, Tokens
from icenet.core.generation.sampling import compute_scores

NUM_DRAFT_TOKENS = 3
"""Number of proposals in a round. Three are best or close to it at agreements of 60 to 80 % (docs/generation.md)."""


@dataclass
class DraftReport:
    """How many proposals of a draft were the tokens of the model.

    Attributes:
        proposed: Number of proposed tokens.
        accepted: Number of those that are part of the text.
        compared: Number of those that were compared: a round ends at the first one that is not accepted.
        rounds: Number of forward passes of the model over proposals.
    """

    proposed: int = 0
    accepted: int = 0
    compared: int = 0
    rounds: int = 0

    @property
    def agreement(self) -> float:
        """Probability that the draft proposes the token of the model after the same text."""
        return self.accepted / max(self.compared, 1)


def make_decoder(
    model: Any,
    request: Request,
    cache: PromptCache | None = None,
    draft: Any = None,
    num_draft_tokens: int | None = None,
) -> Any:
    """Returns the decoder of a request.

    Args:
        model: The model.
        request: The request.
        cache: A prompt cache of the model, or None.
        draft: A smaller model with the same tokenizer on the same device, or None.
        num_draft_tokens: Number of tokens that the draft proposes at a time; `NUM_DRAFT_TOKENS` by default.

    Raises:
        UsageError: The cache or the draft cannot be used for this request.
    """
    if cache is not None:
        if not isinstance(cache, PromptCache):
            raise UsageError(f"generate: cache must be what icenet.prompt_cache returns, not {type(cache).__name__}")
        cache.check(model, request)
    if draft is None:
        if num_draft_tokens is not None:
            raise UsageError("generate: num_draft_tokens has no effect without a draft")
        return model.decoder_type(model, request, cache)
    check_draft(model, draft, request)
    count = NUM_DRAFT_TOKENS if num_draft_tokens is None else num_draft_tokens
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or not 1 <= count <= 64:
        raise UsageError(f"generate: num_draft_tokens must be an integer from 1 to 64, not {count!r}")
    own = None if cache is None else cache.of_draft(draft)
    decoders = model.decoder_type(model, request, cache), draft.decoder_type(draft, request, own)
    return SpeculativeDecoder(*decoders, int(count))


def check_draft(model: Any, draft: Any, request: Request) -> None:
    """Raises UsageError if a model cannot be the draft of another one for a request."""
    if draft is model:
        raise UsageError("generate: the draft is the model itself; give a smaller model with the same tokenizer")
    if getattr(draft, "backend", None) != model.backend or str(draft.device) != str(model.device):
        raise UsageError(
            f"generate: the draft must be a model on the backend and the device of the model, {model.backend} and "
            f"{model.device}"
        )
    if draft.config.vocab_size != model.config.vocab_size:
        raise UsageError(
            f"generate: the draft has a vocabulary of {draft.config.vocab_size} tokens and the model one of "
            f"{model.config.vocab_size}; both need the same tokenizer"
        )
    names = [None if owner.tokenizer is None else owner.tokenizer.name for owner in (model, draft)]
    if None not in names and names[0] != names[1]:
        raise UsageError(f"generate: the tokenizer of the draft is {names[1]}, and that of the model is {names[0]}")
    for part in (model, draft):
        check_request(part, _without_limit(request) if part is draft else request, "speculative decoding")
    length, longest = len(request.rows()[0]), getattr(draft.config, "max_seq_length", None)
    if longest is not None and length > longest:
        raise UsageError(
            f"generate: the draft reads at most {longest} tokens (its max_seq_length), and the prompt has {length}"
        )


def _without_limit(request: Request) -> Request:
    """Returns a request without the model's maximum length: the draft has its own."""
    return replace(request, context_length=None)


class SpeculativeDecoder:
    """Generates the tokens of a request with one row. It is used as a `DecoderBase` is.

    Args:
        target: The decoder of the model.
        draft: The decoder of the draft, for the same request.
        num_draft_tokens: Number of proposals in a round.

    Attributes:
        report: How many proposals were accepted so far.
    """

    def __init__(self, target: DecoderBase, draft: DecoderBase, num_draft_tokens: int) -> None:
        self.request = target.request
        self.report = DraftReport()
        self.target, self.draft = target, draft
        self.count = num_draft_tokens
        self.last: Any = None  # the last token of the result, which the model has not read, int `[1]`
        self.unread: list[Any] = []  # the tokens of the result that the draft has not read, int `[1]` each
        self._step: Any = None
        self._step_size: Any = None
        self._contexts = contextlib.ExitStack()

    @property
    def model(self) -> Any:
        """The model whose tokens are generated."""
        return self.target.model

    def __enter__(self) -> SpeculativeDecoder:
        """Prefills the prompt with both models."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.target)
            # the draft is exited first: its cache is kept up to the same tokens
            self.draft.request = _without_limit(self.request)
            stack.enter_context(self.draft)
            self.draft.chosen = self.target.chosen
            self.seen = self.request.seen(self.model.config.vocab_size)
            self._contexts = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._step = self.last = None
        self.unread = []
        self._contexts.__exit__(*exception)

    def submit(self, index: int) -> int:
        """Returns a handle of new token `index` for `fetch`."""
        return index

    def fetch(self, handle: int) -> Tokens:
        """Returns new token `handle` of the row, int32 `[1]`; -1 if its logits are not finite."""
        chosen = self.target.chosen
        if not chosen:
            self.target.fetch(self.target.submit(0))
            self._keep(chosen)
        while len(chosen) <= handle:
            self._round()
        return np.array(chosen[handle : handle + 1], np.int32)

    def _keep(self, tokens: list[int], unread: list[Any] | None = None) -> None:
        """Notes the newest tokens of the result, and which ones before the last the draft has not read."""
        # made from the host's value, it is not lazy: another thread may read the next token
        self.last = self.target.to_device(np.array([max(tokens[-1], 0)], np.uint32))
        self.unread = [*(unread or []), self.last]
        if self.seen is not None:
            self.seen[0, tokens] = True

    def _round(self) -> None:
        """Adds at least one token to the result."""
        target, draft, chosen = self.target, self.draft, self.target.chosen
        before = target.cache.length
        count = min(self.count, self.request.new_tokens - len(chosen) - 1, self._room() - len(self.unread) + 1)
        keys = self.request.keys(len(chosen), self.count + 1)
        tokens = [self.last]
        if count > 0:
            with draft.inference_mode():
                for token in self.unread[:-1]:
                    self._catch_up(token, keys)
                self._set(draft, keys)
                read = draft.cache.length
                for _ in range(count):
                    choice = draft.decode(tokens[-1])
                    tokens.append(draft.copy(choice.token))
                    draft.start_copy(choice.token, choice.best, draft.state.arrays)
        with target.inference_mode():
            self._set(target, keys)
            joined = target.concatenate([token[:, None] for token in tokens])[0]
            choice = self._verify(joined)
            proposals = target.start_copy(joined, joined, [])
            handle = target.start_copy(choice.token, choice.best, target.state.arrays)
            found, proposed = target.finish_copy(handle), target.finish_copy(proposals)
        accepted = int(np.cumprod(found[:-1] == proposed[1:]).sum())
        new = found[: accepted + 1].tolist()
        chosen.extend(new)
        target.cache.truncate(before + accepted + 1)
        if count > 0:
            draft.cache.truncate(read + min(accepted + 1, count))
            self.report.proposed += count
            self.report.accepted += accepted
            self.report.compared += min(accepted + 1, count)
            self.report.rounds += 1
        skipped = [tokens[-1]] if count > 0 and accepted == count else []
        self._keep(new, skipped if count > 0 else self.unread)

    def _catch_up(self, token: Any, keys: NDArray[np.uint32] | None) -> None:
        """Lets the draft read a token, int `[1]`, without a choice: its last proposal, if all were accepted."""
        draft = self.draft
        if draft.model.is_on_cpu:  # the logits of a small model take longer than its layers
            draft.state = replace(draft.state, cache=[])  # MLX would copy the buffers if they are referred to
            draft.model.hidden_states(token[:, None], None, draft.cache)
            return
        self._set(draft, keys)
        choice = draft.decode(token)  # which is captured
        # nothing depends on its choice, but a kernel of this step may store its keys and values
        draft.start_copy(choice.token, choice.best, draft.state.arrays)

    def _room(self) -> int:
        """Returns how many tokens the draft can read."""
        longest: int | None = getattr(self.draft.model.config, "max_seq_length", None)
        return self.count + 2 if longest is None else longest - self.draft.cache.length

    def _set(self, decoder: DecoderBase, keys: NDArray[np.uint32] | None) -> None:
        """Sets the keys of the draws of a round, and the tokens that the row contains."""
        if keys is None and self.seen is None:
            return
        decoder.state = replace(
            decoder.state,
            index=decoder.to_device(np.zeros((), np.int32)),
            keys=decoder.to_device(keys),
            seen=decoder.to_device(self.seen),
        )

    def _verify(self, tokens: Any) -> Choice:
        """Reads T tokens with the model, int `[T]`, and chooses the token after each of them.

        As in `DecoderBase.decode`, nothing refers to the arrays of the state before when it returns.
        """
        target = self.target
        if len(tokens) == 1:
            return target.decode(tokens)
        target.cache.reserve(len(tokens))
        state = replace(target.state, cache=target.cache.state)
        step = self._verify_step
        if len(tokens) == self.count + 1:  # the last rounds may be shorter
            size = target.cache.capacity, len(state.arrays)
            if self._step is None or self._step_size != size:
                self._step, self._step_size = target.capture(state, tokens, self._verify_step), size
            step = self._step
        target.state, choice = step(state, tokens)
        target.cache.state = target.state.cache
        target.cache.length += len(tokens)
        return choice

    def _verify_step(self, state: State, tokens: Any) -> tuple[State, Choice]:
        """Reads tokens, int `[T]`. It depends on its arguments only, as `DecoderBase.decode_step`.

        Returns:
            The state after them, and the choices, `[T]`, after each of them.
        """
        target, settings = self.target, self.request.settings
        cache = target.cache.captured(state.cache)
        hidden = target.model.hidden_states(tokens[None], None, cache)
        logits = target.model.project(hidden[0])
        keys = None if state.keys is None else state.keys[: len(tokens), 0]
        seen = state.seen
        if seen is not None:  # a place has also seen the proposals before it
            rows = [seen]
            for index in range(1, len(tokens)):
                rows.append(target.mark(rows[-1], tokens[index : index + 1]))
            seen = target.concatenate(rows).reshape(len(rows), -1)
        scores = compute_scores(target.ops, logits, settings, keys, seen)
        token, best = target.choose(scores)
        return replace(state, cache=cache.state), Choice(token, best, logits, scores)
