"""IceNet's PyTorch mirror: the same models under the same names, MPS, CUDA or CPU.

    from icenet_torch.models import TransformerModel

Works with MLX absent.
"""

from __future__ import annotations

import os
import platform

if platform.machine() in ("x86_64", "AMD64"):
    # Read by MKL at its first call. Without it a product's last bits depend on the alignment of its operands,
    # so one run is not equal to the next; no cost was measured.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
