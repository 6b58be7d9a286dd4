"""The allocator of glibc keeps the memory of large arrays, unless users set it."""

from __future__ import annotations

import platform

import pytest
from helpers import TINY_MODELS, both_backends, python

from icenet.core import backends
from icenet.core.config import Config
from icenet.core.engine import engine
from icenet.core.host.allocator import VARIABLES

PROGRAM = """
import ctypes, resource
from icenet.core import backends
from icenet.core.host.allocator import keep_freed_memory

keep_freed_memory()
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
for _ in range(2):
    block = library.malloc(64 << 20)
    library.memset(block, 1, 64 << 20)
    library.free(block)
with open("/proc/self/statm") as file:
    print(int(file.read().split()[1]) * resource.getpagesize() > 64 << 20)
"""
THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}

LIBRARY, VERSION = platform.libc_ver()


@pytest.mark.skipif(LIBRARY != "glibc" or tuple(map(int, VERSION.split("."))) < (2, 35), reason="needs glibc 2.35")
@pytest.mark.parametrize("is_set_by_user", [False, True])
def test_freed_memory_is_kept_unless_users_set_the_allocator(
    is_set_by_user: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)  # glibc reads an empty value as zero
    assert python(PROGRAM, **(THRESHOLDS if is_set_by_user else {})) == str(not is_set_by_user)


@both_backends
def test_training_keeps_it(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not backends.installed(backend):  # importorskip would import MLX without a fast BLAS
        pytest.skip(f"{backend} is not installed")
    calls: list[int] = []
    monkeypatch.setattr(engine, "keep_freed_memory", lambda: calls.append(1))
    backends.engine(Config.from_dict({"model": TINY_MODELS["rnn"]}), backend, "cpu")
    assert calls == [1]
