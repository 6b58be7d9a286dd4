"""Sources of CUDA kernels that run for each token, as files.

MLX hashes the source of a kernel at each launch, 3 to 5 us for 10 kB, and a token needs some 70 launches. A line that
includes a file is the same kernel with a short source.
"""

from __future__ import annotations

import hashlib
import struct
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).resolve().parent


@lru_cache
def body(name: str) -> str:
    """Returns the lines of a kernel that stand for a file of this folder.

    The digest is there because MLX keeps compiled kernels by their source.
    """
    path = HERE / name
    text = path.read_text(encoding="utf-8")
    if any(character in str(path) for character in '"\\\n'):  # cannot be written in an #include
        return text
    return f'#include "{path}"  // {hashlib.sha256(text.encode()).hexdigest()[:16]}\n'


def bits_of_float(value: float) -> int:
    """Returns a number of 32 bits as the integer of a template, which takes no fractions."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])
