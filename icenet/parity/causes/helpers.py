"""Functions and methods of the user that the code of a module calls: left out, or with exchanged arguments."""

from __future__ import annotations

from collections import Counter

from icenet.core import backends
from icenet.parity.causes.trial import Trial

_MOST = 24
"""Number of changes of calls up to which they are tried."""


def find_helpers(trial: Trial) -> str:
    """Returns which function of the reference is not applied in `a`, or gets its arguments in the other order."""
    if trial.c.reference.backend != "torch" or not trial.is_forward:
        return ""
    variants = backends.module("torch", "tools.variants")
    module = trial.modules[1]
    with variants.globals_used() as names:
        trial.replay()
    with variants.helpers(module, names) as calls:
        trial.replay()
    counts = Counter(call.name for call in calls)
    places: list[tuple[str, int | None, int]] = []
    for call in calls:
        numbers = (None, call.number) if counts[call.name] > 1 else (call.number,)
        places += [(call.name, number, change) for number in numbers for change in call.changes]
    for name, number, change in list(dict.fromkeys(places))[:_MOST]:
        with variants.helpers(module, names, (name, number, change)):
            found = trial.replay()
        if found and trial.explains(found):
            which = f", in call {number + 1} of {counts[name]}" if number is not None and counts[name] > 1 else ""
            if change == variants.EXCHANGED:
                return f"the first two arguments of {name} of b are exchanged in a{which}"
            return f"{name} of b is left out in a{f', for its result {change + 1}' if change else ''}{which}"
    return ""
