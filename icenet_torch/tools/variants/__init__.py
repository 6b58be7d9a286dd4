"""Variants of what a PyTorch module computes: common mistakes of ports, applied to the functions that it calls.

`icenet.parity.causes` replays a module of the reference with each variant and names the one that computes what the
module under test does. In the texts, `a` is the module under test and `b` the reference.
"""

from __future__ import annotations

from icenet_torch.tools.variants import (
    activations,
    alibi,
    arithmetic,
    attention,
    choices,
    heads,
    images,
    losses,
    masks,
    norms,
    numbers,
    operations,
    positions,
    reductions,
    rotary,
    signals,
    windows,
)
from icenet_torch.tools.variants.activations import (
    ACTIVATION_NAMES,
    ACTIVATIONS,
    USUAL_ACTIVATIONS,
    activated,
    activation_name,
)
from icenet_torch.tools.variants.angles import THETA, theta_variants, with_theta
from icenet_torch.tools.variants.caps import CAPS, cap_variants, capped
from icenet_torch.tools.variants.casts import casts
from icenet_torch.tools.variants.helpers import EXCHANGED, helpers
from icenet_torch.tools.variants.loops import globals_used
from icenet_torch.tools.variants.numbers import BOUNDED, clip_variants, number_variants, sum_variants
from icenet_torch.tools.variants.operands import changing, listing
from icenet_torch.tools.variants.operations import ATTACHED, UNBOUNDED
from icenet_torch.tools.variants.shapes import VARIANTS as SHAPES
from icenet_torch.tools.variants.variant import Variant, applied, spying
from icenet_torch.tools.variants.windows import shown_keys

TABLE: list[Variant] = [
    *activations.VARIANTS,
    *windows.VARIANTS,
    *attention.VARIANTS,
    *masks.VARIANTS,
    *operations.INTERLEAVED,
    heads.REPEATED,
    *rotary.VARIANTS,
    *positions.VARIANTS,
    *heads.VARIANTS,
    *alibi.VARIANTS,
    *norms.VARIANTS,
    *images.VARIANTS,
    *signals.VARIANTS,
    *losses.VARIANTS,
    *choices.VARIANTS,
    *arithmetic.VARIANTS,
    *reductions.VARIANTS,
    *numbers.VARIANTS,
    *operations.VARIANTS,
    *windows.ADDED,
]
"""The variants that need nothing of the module under test, the more likely ones first."""
LATE = [reductions.ABSOLUTE, operations.LARGEST]
"""Tried last: other variants may have the same effect, as where all terms are negative."""

__all__ = [
    "ACTIVATIONS",
    "ACTIVATION_NAMES",
    "ATTACHED",
    "BOUNDED",
    "CAPS",
    "EXCHANGED",
    "LATE",
    "SHAPES",
    "TABLE",
    "THETA",
    "UNBOUNDED",
    "USUAL_ACTIVATIONS",
    "Variant",
    "activated",
    "activation_name",
    "applied",
    "cap_variants",
    "capped",
    "casts",
    "changing",
    "clip_variants",
    "globals_used",
    "helpers",
    "listing",
    "number_variants",
    "shown_keys",
    "spying",
    "sum_variants",
    "theta_variants",
    "with_theta",
]
