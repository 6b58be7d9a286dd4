"""Prefixes of names that wrappers add to a state dict: torch.compile, data parallel, FSDP, Lightning, averages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from icenet.core.errors import UsageError

T = TypeVar("T")

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_flat_param.")
"""Parts that PyTorch's wrappers insert anywhere in a name: torch.compile, FSDP, checkpointing."""
_USUAL = ("module.", "model.", "ema_model.", "ema.", "net.", "network.", "student.", "teacher.", "averaged_model.")
"""First parts of names that data parallel, Lightning and averages add."""


def strip_prefix(values: Mapping[str, T], prefix: str | Sequence[str]) -> dict[str, T]:
    """Returns the values whose names begin with a prefix, under their names without it.

    Values with other names are left out. A prefix that begins with "_", such as `_orig_mod.`, belongs to a wrapper of
    PyTorch: it is removed wherever it is a part of a name, and names without it stay.

    Args:
        values: Values by name.
        prefix: The prefix, such as `module.`; of several, one after the other.

    Raises:
        UsageError: No name has the prefix, or two names become equal.
    """
    found = dict(values)
    for part in [prefix] if isinstance(prefix, str) else prefix:
        part = part if part.endswith(".") else f"{part}."
        renamed = {name: _without(name, part) for name in found}
        kept = {name: new for name, new in renamed.items() if new != name or part.startswith("_")}
        if all(new == name for name, new in renamed.items()):
            raise UsageError(f"no name has the prefix {part}; the first is {next(iter(found), 'missing')}")
        twice = [new for new, count in Counter(kept.values()).items() if count > 1]
        if twice:
            raise UsageError(f"without {part} two weights have the name {twice[0]}")
        found = {new: found[name] for name, new in kept.items()}
    return found


def _without(name: str, part: str) -> str:
    if part.startswith("_"):
        # between dots only: `x_orig_mod.` is another name
        return f".{name}".replace(f".{part}", ".").removeprefix(".")
    return name.removeprefix(part)


def suggest_prefixes(found: Iterable[str], expected: Iterable[str] | None = None) -> list[str]:
    """Returns the prefixes to strip, in order, so that names become those of a model; empty if that helps nothing.

    Args:
        found: Names of weights.
        expected: Names that the model has; None if they are not known: then only usual prefixes are found.
    """
    names, wrappers = list(found), []
    for part in _WRAPPERS:
        shorter = [_without(name, part) for name in names]
        if shorter != names:
            wrappers.append(part)
            names = shorter
    if expected is None:
        common = [part for part in _USUAL if names and all(name.startswith(part) for name in names)]
        return wrappers + common
    known = set(expected)
    matches = Counter(
        name[:at] for name in names for at in _starts(name) if name[at:] in known
    )  # prefix -> names that it explains
    prefix, count = max(matches.items(), key=lambda item: (item[1], -len(item[0])), default=("", 0))
    if not prefix or 2 * count < len(known):
        return wrappers if 2 * len(known & set(names)) >= len(known) else []
    return [*wrappers, prefix]


def _starts(name: str) -> list[int]:
    return [0] + [at + 1 for at, character in enumerate(name) if character == "."]


def advice(prefixes: Sequence[str]) -> str:
    """Returns the part of a message that names the option to strip prefixes."""
    options = " ".join(f"--strip-prefix {prefix}" for prefix in prefixes)
    value = repr(prefixes[0] if len(prefixes) == 1 else list(prefixes))
    return f"icenet convert {options} removes it (in Python icenet.core.weights.strip_prefix(values, {value}))"
