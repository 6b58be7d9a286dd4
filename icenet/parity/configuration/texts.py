"""Compares the texts that two backends generate.

With the same seed both backends add the same Gumbel noise to their logits. They choose different tokens only if the
two best scores (logit plus noise) differ by less than the rounding errors of the logits: a tie. A difference with a
larger margin is an error of one backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from icenet.core.generation.prompts import encode_prompts
from icenet.core.generation.request import Request, make_request, settings_of
from icenet.core.tokenizers.base import decode_continuation

TIE = 64 * 2.0**-23
"""The largest margin of a tie, relative to the largest logit: 64 ulps of fp32, for some dozens of layers."""


@dataclass(frozen=True)
class TextComparison:
    """Two continuations of one prompt.

    Attributes:
        text: The continuation by the first backend; empty without a tokenizer.
        tokens: The new tokens by backend, without stops.
        differs_at: Index of the first token that differs, where a stop counts as a token; None if all are equal.
        margin: Difference of the scores of the two tokens there, relative to the largest logit.
    """

    text: str
    tokens: dict[str, list[int]]
    differs_at: int | None = None
    margin: float | None = None

    @property
    def equal(self) -> bool:
        return self.differs_at is None

    @property
    def equal_but_for_ties(self) -> bool:
        """Whether the tokens are equal, or the first difference is a tie."""
        return self.equal or (self.margin is not None and self.margin <= TIE)

    @property
    def verdict(self) -> str:
        count = len(next(iter(self.tokens.values())))
        if self.equal:
            return f"the same {count} tokens"
        kind = "a tie within rounding" if self.equal_but_for_ties else "not a tie"
        margin = "" if self.margin is None else f" (margin {self.margin:.1e})"
        return f"differs at token {self.differs_at}, {kind}{margin}"


def compare_texts(
    path: Path,
    prompt: str | Sequence[int],
    *,
    names: tuple[str, str] = ("mlx", "torch"),
    device: str | None = None,
    **options: Any,
) -> TextComparison:
    """Continues a prompt on two backends.

    Args:
        path: Path of a saved model or checkpoint.
        prompt: Text or token ids.
        names: The two backends.
        device: Device of both; default: that of the configuration.
        options: Fields of `GenerationConfig`.
    """
    import icenet

    models = [icenet.load(path, name, device) for name in names]
    ids = [list(prompt)] if not isinstance(prompt, str) else _encode(models[0], prompt, options)
    requests = [make_request(model, ids, None, 0, options) for model in models]
    rows, kept = zip(*map(_generate, models, requests), strict=True)
    text = decode_continuation(models[0].tokenizer, kept[0]) if models[0].tokenizer else ""
    tokens = dict(zip(names, kept, strict=True))
    at = next((i for i, (a, b) in enumerate(zip(*rows, strict=False)) if a != b), None)
    if at is None:
        return TextComparison(text, tokens, None if len(rows[0]) == len(rows[1]) else min(map(len, rows)))
    margin = _margin(models[0].decoder_type(models[0], requests[0]), at, [row[at] for row in rows])
    return TextComparison(text, tokens, at, margin)


def _encode(model: Any, prompt: str, options: dict[str, Any]) -> list[list[int]]:
    return encode_prompts(model.tokenizer, [prompt], settings_of(model, options).add_special_tokens)


def _generate(model: Any, request: Request) -> tuple[list[int], list[int]]:
    """Returns all tokens that the model chooses, and those without stops.

    A text that ends may be a prefix of one that continues. They differ in the token that ends the first.
    """
    stopping, chosen = request.stopping_criteria(), []
    with model.decoder_type(model, request) as decoder:
        for index in range(request.new_tokens):
            token = decoder.fetch(decoder.submit(index))
            chosen.append(int(token[0]))
            stopping.update(token)
            if stopping.all_done:
                break
    return chosen, stopping.tokens[0]


def _margin(decoder: Any, at: int, choices: list[int]) -> float:
    """Generates up to token `at`; returns the margin between two choices of that token."""
    with decoder:
        for index in range(at + 1):
            decoder.fetch(decoder.submit(index))
        logits, scores = decoder.fetch_scores()
    return float(abs(scores[0, choices[0]] - scores[0, choices[1]]) / np.abs(logits).max())
