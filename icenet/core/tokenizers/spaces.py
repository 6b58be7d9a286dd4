"""Rules of a tokenizer.json for tokens that have U+2581 in place of a space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SPACE = "▁"
"""U+2581, which SentencePiece writes for a space."""


def replace(pattern: Mapping[str, str], content: str) -> dict[str, Any]:
    """Returns the rule that replaces what matches a pattern, `{"String": ...}` or `{"Regex": ...}`."""
    return {"type": "Replace", "pattern": pattern, "content": content}


def decoder(strips: int, has_bytes: bool = True) -> dict[str, Any]:
    """Returns the rules that make a text of tokens.

    Args:
        strips: The largest number of spaces that are removed from its beginning.
        has_bytes: Whether there are tokens of bytes, `<0x00>` to `<0xFF>`.
    """
    rules = [replace({"String": SPACE}, " "), *([{"type": "ByteFallback"}] if has_bytes else []), {"type": "Fuse"}]
    if strips:
        rules.append({"type": "Strip", "content": " ", "start": strips, "stop": 0})
    return {"type": "Sequence", "decoders": rules}
