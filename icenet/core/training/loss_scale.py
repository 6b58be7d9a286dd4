"""The precision policy, and the loss scale of fp16 as plain state.

Parameters and optimizer moments are fp32. `training.mixed_precision` names the type of activations and matrix
products; norms, softmax and the loss are computed in fp32 whatever it is. Both backends follow it by the same
rule: a layer computes in the type of what it is given, and the embedding gives the compute type.

fp16 has gradients as small as 6e-8 round to zero, so the loss is scaled up before the backward pass and the
gradients down after it (Micikevicius et al., 2018).
"""

from __future__ import annotations

from dataclasses import dataclass

GROWTH_INTERVAL = 2000
_LARGEST = 2.0**24


@dataclass
class LossScale:
    """Halved by an overflow, whose step is skipped; doubled after 2,000 steps without one."""

    scale: float = 1.0
    good_steps: int = 0

    @classmethod
    def for_precision(cls, mixed_precision: str) -> LossScale:
        """2^16 for fp16; 1, which never changes, for the types with the range of fp32."""
        return cls(2.0**16 if mixed_precision == "fp16" else 1.0)

    def update(self, finite: bool) -> None:
        """Takes in whether the step's gradients were finite."""
        if not finite:
            self.scale, self.good_steps = max(self.scale / 2, 1.0), 0
            return
        self.good_steps += 1
        if self.good_steps >= GROWTH_INTERVAL:
            self.scale, self.good_steps = min(self.scale * 2, _LARGEST), 0
