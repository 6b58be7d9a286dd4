"""IceNet's PyTorch mirror: the models of `icenet` under the same names, on CPU, CUDA or MPS. It does not need MLX.

from icenet_torch.models import TransformerModel
"""

from __future__ import annotations

import os
import platform

import icenet._deprecated  # noqa: F401  (old module names)

if platform.machine() in ("x86_64", "AMD64"):
    # MKL reads this at its first call. Without it, the last bits of a product depend on the alignment of its
    # operands, and two equal runs differ. No cost was measured.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
