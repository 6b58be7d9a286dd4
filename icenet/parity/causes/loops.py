"""Loops in the code of a module whose number of iterations differs."""

from __future__ import annotations

from icenet.core import backends
from icenet.parity.causes.numbers import attributes
from icenet.parity.causes.trial import Trial

_MOST_LOOPS = 4
"""Number of loops in the code of a module up to which other numbers of iterations are tried."""
_MOST_ITERATIONS = 64
"""Number of iterations up to which others are tried."""
_FARTHEST = 6
"""Largest difference of the numbers of iterations that is tried."""


def find_loops(trial: Trial) -> str:
    """Returns which loop over a `range` of the reference has another number of iterations in `a`."""
    if trial.c.reference.backend != "torch" or not trial.is_forward:
        return ""
    variants = backends.module("torch", "tools.variants.loops")
    with variants.globals_used() as names:
        trial.replay()
    with variants.loops(names) as loops:
        trial.replay()
    counts = {loop.site: loop.length for loop in loops}
    if len(counts) > _MOST_LOOPS:
        return ""
    held = [v for _, v in attributes(trial.modules[0]).values() if isinstance(v, int) and not isinstance(v, bool)]
    for site, count in counts.items():
        if not 0 < count <= _MOST_ITERATIONS:
            continue
        near = [count + by for size in range(1, _FARTHEST + 1) for by in (-size, size)]
        for new in dict.fromkeys((*near, *held)):
            if new == count or not 0 <= new <= _MOST_ITERATIONS:
                continue
            with variants.loops(names, site, new):
                found = trial.replay()
            if found and trial.explains(found):
                return f"a loop of {count} iteration{'s' * (count > 1)} in b has {new} in a"
    return ""
