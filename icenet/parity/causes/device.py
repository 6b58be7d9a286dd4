"""The cause in a kernel: the framework computes something else on its device than on a CPU."""

from __future__ import annotations

from icenet.parity.causes.trial import ACCEPTED, Trial


def find_device(trial: Trial) -> str:
    """Returns that the call of `a` agrees on a CPU, if that explains the difference.

    An example is the gradient of `mx.fast.layer_norm` on CUDA: MLX 0.32.4 computes it wrong if 16 bytes do not divide
    a row.
    """
    side = trial.c.a
    with side.tools.on_another_device() as moved:
        if not moved:
            return ""
        results = trial.named(side.replay(trial.given))
    if trial.ratio(trial.exact, own=results) > min(trial.before / 4, ACCEPTED):
        return ""
    about = side.describe()
    kernel = f"a kernel of {about['framework']} {about['version']}"
    return f"a agrees on a CPU: {kernel} is wrong on {about['device']} for these shapes; choose other ones"
