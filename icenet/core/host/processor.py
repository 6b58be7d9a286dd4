"""The host's processor, where the speed of a library depends on it."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

_AVX512 = {"avx512f", "avx512dq", "avx512bw", "avx512vl"}


def is_amd() -> bool:
    """Returns whether the processor is one of AMD; False if the system does not say so."""
    return "AuthenticAMD" in _description()


def is_amd_with_avx512() -> bool:
    """Returns whether it is one of AMD with AVX-512, which MKL does not use there. It is known on Linux only."""
    return is_amd() and _AVX512.issubset(_description().split())


def multiplies_bf16() -> bool:
    """Returns whether it has instructions for products of bf16, AVX-512 BF16 or AMX. It is known on Linux only."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(_description().split())


def _description() -> str:
    """Returns the text in which the system describes the processor; empty if there is none."""
    if sys.platform != "linux":
        return platform.processor()
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # a container without /proc
        return ""
