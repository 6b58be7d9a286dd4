"""The merges of a BPE whose file has the scores of its tokens instead, as SentencePiece's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from icenet.core.errors import DataError

_MAX_CHARACTERS = 1 << 22
"""Length of all tokens of a vocabulary, of which Gemma has the half; takes seconds."""
_MAX_COPIED = 1 << 28
"""Characters of all parts of all tokens, the sum of squared lengths."""


def derived_merges(vocabulary: Mapping[str, int], ranks: Sequence[float], skipped: Sequence[bool]) -> list[list[str]]:
    """Returns the merges that a vocabulary implies: each pair of tokens that is a token, the best one first.

    SentencePiece merges the pair whose token has the largest score.

    Args:
        vocabulary: Ids of the tokens.
        ranks: The scores of the tokens by id.
        skipped: For each id, whether the token is not made of others.

    Raises:
        DataError: The tokens are too long in all.
    """
    lengths = [len(token) for token, index in vocabulary.items() if not skipped[index]]
    if sum(lengths) > _MAX_CHARACTERS or sum(length * length for length in lengths) > _MAX_COPIED:
        raise DataError(f"the tokens have more than {_MAX_CHARACTERS:,} characters, or one is too long")
    found: list[tuple[float, int, int, str, str]] = []
    for token, index in vocabulary.items():
        if skipped[index]:
            continue
        known = [
            (vocabulary[left], vocabulary[right], left, right)
            for cut in range(1, len(token))
            if (left := token[:cut]) in vocabulary and (right := token[cut:]) in vocabulary
        ]
        found += [(ranks[index], len(left), len(right), left, right) for _, _, left, right in sorted(known)]
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [[left, right] for _, _, _, left, right in found]
