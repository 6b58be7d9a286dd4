"""The single values of a configuration as the user wrote them, and the types that the text itself shows.

A value of a YAML file or of `--set` is kept as text until the type of its key is known (`typed.py`). A key of type
text takes the text, so that `source: 2024` is a file. Numbers are decimal: YAML 1.1, which PyYAML implements, reads
010 as 8 and 1:00 as 60.
"""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Any, Literal

import yaml

Style = Literal["plain", "quoted", "set"]


class Scalar(str):
    """The text of one value.

    Attributes:
        style: `plain` and `quoted` as in YAML; `set` is everything behind the `=` of `--set`.
    """

    __slots__ = ("style",)
    style: Style

    def __new__(cls, text: str, style: Style) -> Scalar:
        """Keeps how the text was written."""
        scalar = super().__new__(cls, text)
        scalar.style = style
        return scalar


class NotDecimalError(ValueError):
    """A number in a notation that is not decimal, or too long to be meant."""


NUMBER = re.compile(
    r"[-+]?(?:[0-9]+(?:_[0-9]+)*(?:\.(?:[0-9]+(?:_[0-9]+)*)?)?|\.[0-9]+(?:_[0-9]+)*)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
"""A decimal number: of YAML 1.2, and with underscores between digits."""

NULLS = ("", "~", "null", "Null", "NULL")
BOOLEANS = {
    text: value
    for words, value in (("true yes on", True), ("false no off", False))
    for word in words.split()
    for text in (word, word.capitalize(), word.upper())
}

_OTHER_NOTATION = re.compile(
    r"[-+]?(?:0[xX][0-9a-fA-F_]+|0[bB][01_]+|0[oO][0-7_]+|[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?)"
)
"""Numbers of YAML 1.1 and 1.2 with another base than 10: 0x1f, 0b11, 0o17, and 1:30, which has base 60."""

_MAX_DIGITS = 400  # of float64's largest number: 309
_STOCK = yaml.SafeLoader("")


def number(text: str) -> int | float | None:
    """Returns the decimal number that a text is, or None if it is none.

    Raises:
        NotDecimalError: The text is a number in another notation, or too large.
    """
    if _OTHER_NOTATION.fullmatch(text):
        raise NotDecimalError(f"{text} is not a decimal number{_in_decimal(text)}")
    if not NUMBER.fullmatch(text):
        return None
    if len(text) > _MAX_DIGITS:
        raise NotDecimalError(f"a number of {len(text):,} characters is too long")
    if text.lower().endswith(("inf", "nan")):
        return float(text.replace(".", ""))
    if re.fullmatch(r"[-+]?[0-9_]+", text):
        return int(text)
    value = float(text)
    if math.isinf(value):
        raise NotDecimalError(f"{text} is beyond the range of floating-point numbers")
    return value


def _in_decimal(text: str) -> str:
    """Returns the advice for a number in another notation."""
    if ":" in text:
        return "; write it without colons, such as 60 or 1.5"
    return f"; write {int(text.replace('_', ''), 0)}"


def natural(text: str, *, dates: bool = True) -> Any:
    """Returns the value of an unquoted text with the type that it shows: null, boolean, number, date or text.

    Args:
        text: The text.
        dates: Whether 2024-01-01 is a date; otherwise it is a text.

    Raises:
        NotDecimalError: See `number`.
        ValueError: It looks like a date and is none, such as 2024-99-99.
    """
    if text in NULLS:
        return None
    if text in BOOLEANS:
        return BOOLEANS[text]
    value = number(text)
    if value is not None:
        return value
    kind = _STOCK.resolve(yaml.ScalarNode, text, (True, False)).rpartition(":")[2]
    if kind in ("int", "float"):  # such as 1__0
        raise NotDecimalError(f"{text} is not a decimal number")
    if kind == "timestamp" and dates:
        return _STOCK.construct_yaml_timestamp(yaml.ScalarNode(kind, text))
    return text


def ways_to_write(text: str) -> str:
    """Returns the advice for a text that was given instead of a number; empty without one."""
    plain = unicodedata.normalize("NFKC", text).replace("\u2212", "-").strip().strip("'\"")
    for candidate in (plain, plain.replace(",", "") if re.fullmatch(r"[-+]?[1-9]\d{0,2}(,\d{3})+", plain) else ""):
        if NUMBER.fullmatch(candidate):
            return f"; write {candidate}" + (" without quotes" if candidate == text else "")
    if re.match(r"[-+]?\.?\d", plain):
        return "; numbers are written as 1000, 0.001 or 1e-3"
    return ""


def strange_characters(name: str) -> str:
    """Returns the Unicode names of the first characters that are not ASCII, which may look like ASCII; or nothing."""
    found = [unicodedata.name(character, ascii(character)) for character in name if not character.isascii()]
    return ", ".join(list(dict.fromkeys(found))[:2])


def strange_spaces(text: str) -> str:
    """Returns the Unicode names of the first characters that look like a space, or like nothing, and are no space."""
    return strange_characters("".join(each for each in text if unicodedata.category(each) in ("Zs", "Cf")))
