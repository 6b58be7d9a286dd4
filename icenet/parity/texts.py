"""Whether two backends write the same text, and where they do not, how close the choice was.

The same seed gives the same draws, so two backends part only where the two best scores (logits and noise) are
closer than the rounding errors of the logits. A difference with a wider margin is a real one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from icenet.core import backends
from icenet.core.generation import request as generation
from icenet.core.generation import streaming
from icenet.core.tokenizers.base import decode_continuation

TIE = 64 * 2.0**-23
"""A margin below this share of the largest logit is a tie: 64 roundings of fp32, over some dozens of layers."""


@dataclass(frozen=True)
class TextComparison:
    """Two continuations of a prompt. `margin` is that of the first differing choice, relative to the logits."""

    text: str
    tokens: dict[str, list[int]]
    differs_at: int | None = None
    margin: float | None = None

    @property
    def equal(self) -> bool:
        return self.differs_at is None

    @property
    def equal_but_for_ties(self) -> bool:
        return self.equal or (self.margin is not None and self.margin <= TIE)

    @property
    def verdict(self) -> str:
        count = len(next(iter(self.tokens.values())))
        if self.equal:
            return f"the same {count} tokens"
        kind = "a tie within rounding" if self.equal_but_for_ties else "not a tie"
        return f"differs at token {self.differs_at}, {kind} (margin {self.margin:.1e})"


def compare_texts(
    path: Path,
    prompt: str | Sequence[int],
    *,
    names: tuple[str, str] = ("mlx", "torch"),
    device: str | None = None,
    **options: Any,
) -> TextComparison:
    """Continues a prompt on two backends with the weights at `path`.

    `options` are those of `GenerationConfig`. Where the tokens differ, the first backend writes its text anew
    up to that choice and its scores are read.
    """
    import icenet

    models = [icenet.load(path, name, device) for name in names]
    ids = [list(prompt)] if not isinstance(prompt, str) else generation.encode_prompts(models[0].tokenizer, [prompt])
    requests = [generation.request(model, ids, None, 0, options) for model in models]
    decoders = [backends.module(name, "generation.decoder").Decoder for name in names]
    rows = [streaming.complete(decoders[i](models[i], requests[i]), requests[i])[0] for i in range(2)]
    text = decode_continuation(models[0].tokenizer, rows[0]) if models[0].tokenizer else ""
    tokens = dict(zip(names, rows, strict=True))
    at = next((i for i, (a, b) in enumerate(zip(*rows, strict=False)) if a != b), None)
    if at is None:
        return TextComparison(text, tokens)
    margin = _margin(decoders[0](models[0], requests[0]), at, [row[at] for row in rows])
    return TextComparison(text, tokens, at, margin)


def _margin(decoder: Any, at: int, choices: list[int]) -> float:
    """How far apart the scores of two choices of token `at` are, relative to the largest logit."""
    with decoder:
        for index in range(at + 1):
            decoder.next(index)
        logits, scores = decoder.fetch_scores()
    return float(abs(scores[0, choices[0]] - scores[0, choices[1]]) / np.abs(logits).max())
