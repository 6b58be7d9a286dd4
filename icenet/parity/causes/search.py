"""The search for the cause of a difference: each known one is tried on the reference in memory.

That which removes the difference is named. What is tried, one file each:

calls       modes that differ; modules, such as a dropout, that only one side calls, or more often
numbers     attributes of both modules with the same meaning: eps, momentum, rates, strides, align_corners
order       axes, halves, a direction or a shift of the array that differs
sums        an array that is added, left out, multiplied by a number, or taken in the place of another one; a mean
            that overflows in fp16
functions   variants of the functions that the reference calls (`icenet_torch.tools.variants`): GELU, masks, scales,
            padding, variance, pooling, TF32, eps as a number in the code; casts to fp32 that are left out
rotary      the base of the angles of rotary positions, the values that they turn together, and how many they turn
constants   tables and masks with other values, and two parameters that are exchanged
norms       norms over other axes or heads, or of another kind
loops       loops of another number of iterations
operands    single calls that are left out, or get another variable or number (last)
helpers     functions of the user that are left out, or get their arguments in the other order
weights     the order of gates and projections, a bias that is not used, 1 + weight, tied weights
integers    integers and booleans: an offset of positions, an inverted mask
shapes      operations that change a shape, if the shapes of both sides differ
device      a kernel that computes something else than on a CPU (first)
passed      what a module passes to one that it calls: an argument of one side only, another number or mask (first)
optimizers  options of an optimizer, for a difference of its updates
"""

from __future__ import annotations

from collections.abc import Mapping

from icenet.parity import align
from icenet.parity.calls.pairs import Pair
from icenet.parity.causes.calls import find_call_order, find_calls, find_dropout, find_mode, find_pooled, find_rate
from icenet.parity.causes.constants import find_constants, find_factors
from icenet.parity.causes.device import find_device
from icenet.parity.causes.functions import (
    find_activated,
    find_casts,
    find_functions,
    find_mask,
    find_statistics,
    find_stopped,
)
from icenet.parity.causes.helpers import find_helpers
from icenet.parity.causes.integers import find_ignored, find_integers
from icenet.parity.causes.loops import find_loops
from icenet.parity.causes.norms import find_norms
from icenet.parity.causes.numbers import (
    find_numbers,
    find_options,
)
from icenet.parity.causes.operands import find_operands
from icenet.parity.causes.order import find_chosen, find_direction, find_order
from icenet.parity.causes.rotary import find_angles, find_partial, find_rotary
from icenet.parity.causes.sums import (
    find_centred,
    find_exchanged,
    find_left_out,
    find_overflow,
    find_parts,
    find_scale,
    find_sums,
)
from icenet.parity.causes.trial import Trial
from icenet.parity.causes.weights import find_offset, find_tied, find_unused, find_weights
from icenet.parity.state import Comparison
from icenet.parity.yardstick import Judgement

_SEARCHES = (
    *(find_overflow, find_mask, find_numbers, find_order, find_angles),
    *(find_call_order, find_exchanged, find_parts),
    *(find_statistics, find_rotary),
    *(
        find_partial,
        find_offset,
        find_unused,
        find_constants,
        find_calls,
        find_norms,
        find_left_out,
        find_pooled,
        find_rate,
        find_helpers,
        find_functions,
        find_activated,
        find_loops,
        find_chosen,
        find_scale,
        find_sums,
        find_weights,
        find_factors,
        find_ignored,
    ),
    *(find_tied, find_options, find_centred, find_direction, find_casts, find_operands),
)
"""The searches for the cause of a wrong output, in their order."""
_BACKWARD = (
    *(find_numbers, find_stopped, find_sums, find_offset, find_unused, find_functions, find_weights),
    *(find_casts, find_scale, find_calls),
)
"""Those for the cause of a wrong gradient."""
_COMPUTED = (
    *(find_statistics, find_functions, find_rotary, find_angles, find_partial),
    *(find_unused, find_weights, find_offset, find_tied, find_casts, find_loops, find_stopped),
    *(find_norms, find_constants, find_factors, find_ignored, find_pooled, find_rate, find_helpers),
)
"""Those in which the reference computes something else, which a recorded one cannot."""


def suggest(comparison: Comparison, pair: Pair, judgements: Mapping[str, Judgement]) -> str:
    """Returns the cause that removes the difference of a call; empty if none does."""
    if cause := find_mode(comparison, pair) or find_dropout(comparison, pair):
        return cause
    try:
        trial = Trial(comparison, pair, judgements)
    except (align.ReplayError, KeyError):  # a result that one side lacks
        return ""
    if trial.name not in trial.ours:
        return ""
    if not trial.exact[trial.name].is_float:
        return find_integers(trial)
    for search in (find_device, *(_SEARCHES if trial.is_forward else _BACKWARD)):
        if search in _COMPUTED and not comparison.computes_reference:
            continue
        try:
            if cause := search(trial):
                return cause
        except align.ReplayError:  # of a variant
            continue
        except Exception as error:  # the difference is found; only this cause is not tried
            comparison.add_notes(
                [f"{search.__name__}: the search for a cause stopped: {type(error).__name__}: {error}"]
            )
    return ""


def set_cause(comparison: Comparison, pair: Pair, judgements: Mapping[str, Judgement]) -> None:
    """Sets the cause of the report to that which removes the difference of a call."""
    try:
        comparison.report.cause = suggest(comparison, pair, judgements)
    except Exception as error:  # the difference is found; only its cause is not
        comparison.report.notes.append(f"the search for a cause stopped: {type(error).__name__}: {error}")
