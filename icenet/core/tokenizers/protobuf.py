"""Reads the wire format of protocol buffers, in which SentencePiece stores its models.

Source: https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from collections.abc import Iterator


def read_fields(data: bytes, most: int) -> Iterator[tuple[int, int | bytes]]:
    """Yields the number and the value of each field of a message: an int, or the bytes of all other types.

    Args:
        data: The message.
        most: Maximum number of its fields.

    Raises:
        ValueError: It is not a message, or has more fields.
    """
    position, end, value = 0, len(data), 0
    for _ in range(most):
        if position == end:
            return
        key, position = _varint(data, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if kind == 2:
            length, position = _varint(data, position)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of type {kind}")
        first, position = position, position + length
        if position > end:
            raise ValueError("the message ends within a field")
        yield key >> 3, data[first:position]
    if position != end:
        raise ValueError(f"more than {most} fields")


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Returns the number at a position, and the position after it."""
    value = data[position] if position < len(data) else 0x80
    if value < 0x80:
        return value, position + 1
    value = 0
    for shift, byte in enumerate(data[position : position + 10]):
        value |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:
            return value & ((1 << 64) - 1), position + shift + 1
    raise ValueError("a number without an end")
