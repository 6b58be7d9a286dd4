"""Loads a fast BLAS for MLX on Linux CPUs, before `mlx.core` is imported. Importing `icenet.blas` does it.

MLX's Linux wheels contain the reference BLAS (8 GFLOP/s on two cores that reach 230). MLX's matrix products call the
symbol `sgemm_`, which the dynamic loader looks up in the global scope first. A library that exports `sgemm_` and is
loaded into the global scope before `mlx.core` is imported therefore computes MLX's products. Once `mlx.core` is
imported, its symbols are bound.

The environment variable ICENET_BLAS, or else the config key `blas`, selects the library: `torch`, `openblas`, `none`
or a path. `auto`, the default, selects a system OpenBLAS, or else the library inside an installed torch, without
importing torch. On other platforms nothing is loaded, and with MLX's CUDA build nothing is loaded by `auto`.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from icenet.core.errors import BackendError

VARIABLE = "ICENET_BLAS"
# Threaded builds come first: next to them, libopenblas.so.0 is the serial build (Fedora, openSUSE).
OPENBLAS_NAMES = ("libopenblasp.so.0", "libopenblas_pthreads.so.0", "libopenblas.so.0", "libopenblas.so")
MKL_CBWR = "AUTO,STRICT"
CORE_VARIABLE = "OPENBLAS_CORETYPE"
"""It makes OpenBLAS compute as on another processor, so on one with AVX-512 it can halve the speed."""
REMEDY = "install OpenBLAS (Debian: apt install libopenblas0; Fedora: dnf install openblas-threads) or torch"


class BlasWarning(UserWarning):
    """MLX uses its reference BLAS, whose matrix products are about 25 times slower."""


@dataclass(frozen=True)
class Status:
    """The BLAS of MLX's matrix products on the CPU.

    Attributes:
        name: `torch`, `openblas`, `path` (any other library), `reference` (MLX's own) or `not needed` (another
            platform, MLX's CUDA build, or a program without products).
        path: File of the library, if one was loaded.
        note: Reason for the choice.
    """

    name: str
    path: str | None
    note: str


_status: Status | None = None
"""A library stays in the global symbol scope until the process ends, so this is a fact about the process."""


def status() -> Status:
    """Returns the BLAS in use."""
    return load()


def load(choice: str = "auto") -> Status:
    """Loads a fast BLAS into the global symbol scope, once per process.

    Args:
        choice: The library, unless ICENET_BLAS is set.

    Raises:
        BackendError: The library does not exist or is not suitable.

    Warns:
        BlasWarning: No library was found, or `mlx.core` is already imported; or the process has another library than
            `choice`.
    """
    global _status
    variable = os.environ.get(VARIABLE, "").strip()
    if _status is None:
        _status = _load(variable or choice, f"blas: {choice}" if choice != "auto" and not variable else "")
    elif not variable and not _is_choice(_status, choice):
        text = f"blas: {choice} has no effect, {_status.path or _status.name} is in use since MLX was imported"
        warnings.warn(f"{text}; set {VARIABLE}={choice} before Python starts", BlasWarning, stacklevel=2)
    return _status


def _is_choice(status: Status, choice: str) -> bool:
    """Returns whether a process with this status has the library that `choice` selects."""
    return (
        choice == "auto"
        or status.name in ("not needed", choice)
        or (choice == "none" and status.name == "reference")
        or status.path == os.path.expanduser(choice)
    )


def skip() -> None:
    """Leaves MLX its own BLAS in this process, unless ICENET_BLAS is set: for a program that computes no products.

    Loading the library of torch takes 0.25 s, and numpy's own threads, which start when it is imported, 0.05 s.
    """
    global _status
    if _status is None and not os.environ.get(VARIABLE, "").strip():
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        _status = Status("not needed", None, "this program computes no products")


def choose(value: str) -> Status:
    """Sets ICENET_BLAS to `value` and loads that library. Call it before `mlx.core` is imported.

    Raises:
        BackendError: MLX is already imported, or another library is already loaded. A library stays loaded until the
            process ends, so the variable must then be set before Python starts.
    """
    global _status
    value = value.strip() or "auto"
    if "mlx.core" in sys.modules and value != (os.environ.get(VARIABLE, "").strip() or "auto"):
        raise BackendError(
            f"BLAS {value!r} cannot be chosen, mlx is already imported: set {VARIABLE}={value} before Python starts"
        )
    _status = _load(value)
    os.environ[VARIABLE] = value
    return _status


def _load(choice: str, setting: str = "") -> Status:
    """Loads a library. `setting` is the text with which the user chose it, for messages."""
    setting = setting or f"{VARIABLE}={choice}"
    if sys.platform != "linux":
        return Status("not needed", None, f"MLX uses the platform's own BLAS on {sys.platform}")
    if choice == "auto" and _installed("mlx-cuda-13", "mlx-cuda-12") and not _installed("mlx-cpu"):
        return Status("not needed", None, f"MLX's CUDA build uses the GPU; {VARIABLE}=torch is for its CPU device")
    before = _global_blas()
    if choice == "none":
        if before:
            raise BackendError(f"{setting}, but {before} is already loaded: unset LD_PRELOAD, or choose earlier")
        return Status("reference", None, setting)
    if choice == "auto" and before:
        return Status(_name(before), before, "already in the global scope")
    if not before and "mlx.core" in sys.modules:
        note = "mlx.core was imported first, so no fast BLAS can be loaded: import icenet.blas before mlx.core"
        warnings.warn(f"{note}; matrix products on the CPU are about 25 times slower", BlasWarning, stacklevel=4)
        return Status("reference", None, note)

    problems = []
    for candidate in _candidates(choice):
        problem = _open(candidate)
        if problem is None:
            path = _global_blas() or candidate
            name, core = _name(path), os.environ.get(CORE_VARIABLE)
            is_replaced = name == "openblas" and core is not None
            return Status(name, path, f"{setting}, {CORE_VARIABLE}={core}" if is_replaced else setting)
        if os.path.sep in candidate or choice == candidate:  # a library name that is not installed is expected
            problems.append(f"{candidate} {problem}")
    if choice == "auto":
        note = f"no fast BLAS found; {REMEDY}"
        text = f"MLX's matrix products on the CPU will be about 25 times slower: {note}"
        warnings.warn(f"{text} ({VARIABLE}=none hides this warning)", BlasWarning, stacklevel=4)
        return Status("reference", None, note)
    remedies = {"torch": "pip install torch", "openblas": REMEDY}
    remedy = remedies.get(choice, "give auto, torch, openblas, none or the path of a library that exports sgemm_")
    raise BackendError(f"{setting}: {'; '.join(problems) or 'not found'}; {remedy}")


def _candidates(choice: str) -> Iterator[str]:
    """Yields the libraries to try, in order: paths, or names for the dynamic loader."""
    if choice not in ("auto", "openblas", "torch"):
        yield os.path.expanduser(choice)
    if choice in ("auto", "openblas"):
        yield from OPENBLAS_NAMES
        in_prefix = Path(sys.prefix, "lib", "libopenblas.so.0")  # conda's, which the loader may not find
        if in_prefix.exists():
            yield str(in_prefix)
    if choice in ("auto", "torch"):
        spec = importlib.util.find_spec("torch")  # does not import torch
        for folder in (spec.submodule_search_locations or []) if spec else []:
            library = Path(folder, "lib", "libtorch_cpu.so")
            if library.exists():
                yield str(library)
    if choice in ("auto", "openblas"):
        from ctypes.util import find_library  # last, because it starts ldconfig, gcc and ld: 20 ms with its import

        if (other := find_library("openblas")) and other not in OPENBLAS_NAMES:
            yield other


def _open(path: str) -> str | None:
    """Loads a library into the global scope. Returns None if MLX will use it, or else the problem."""
    if _name(path) == "torch" and platform.machine() in ("x86_64", "AMD64"):
        # Equal calls then have equal bits, independent of the alignment of the data, the threads and the run, and MLX
        # agrees with torch bit for bit. Without it, 163 of 600 small Linear products differed on an AMD EPYC. AVX2
        # instead of AUTO has the same effect, but halves the speed on an Intel Xeon with AVX-512.
        os.environ.setdefault("MKL_CBWR", MKL_CBWR)
    try:
        # Checked before it is made global, because it cannot be removed from the global scope.
        library = ctypes.CDLL(path, ctypes.RTLD_LOCAL)
        if not hasattr(library, "sgemm_"):
            return "does not export sgemm_ (builds with suffixed names, such as openblas64, do not work with MLX)"
        if hasattr(library, "openblas_get_config"):
            library.openblas_get_config.restype = ctypes.c_char_p
            if b"USE64BITINT" in (library.openblas_get_config() or b""):
                return "has 64-bit integers (ILP64), and MLX has 32-bit integers"
        ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    except OSError as error:
        return f"cannot be loaded ({str(error).removeprefix(path + ': ')})"
    if _address(ctypes.CDLL(None)) != _address(library):
        return f"is too late: {_global_blas()} is already loaded and stays loaded until the process ends"
    return None


def _address(library: ctypes.CDLL) -> int | None:
    """Returns the address of `sgemm_` as `library` resolves it."""
    return ctypes.cast(library.sgemm_, ctypes.c_void_p).value if hasattr(library, "sgemm_") else None


_SET_THREADS = ("openblas_set_num_threads", "mkl_serv_set_num_threads")
_GET_THREADS = ("openblas_get_num_threads", "mkl_get_max_threads")
"""What OpenBLAS and the MKL inside torch export. The number holds for the process."""


@lru_cache
def num_threads() -> int | None:
    """Returns the number of threads of the library that `load` found; None if it cannot be read or set."""
    get, settable = _function(_GET_THREADS), _function(_SET_THREADS)
    if not get or not settable:
        return None
    # `torch.set_num_threads` sets a number of the calling thread in MKL, which the thread of MLX does not have
    set_own = _function(("mkl_serv_set_num_threads_local",))
    own = set_own(0) if set_own else 0
    try:
        return int(get())
    finally:
        if own:
            set_own(own)


def set_num_threads(threads: int) -> None:
    """Sets the number of threads of the library for this process; does nothing where it cannot be set."""
    function = _function(_SET_THREADS)
    if function is not None:
        function(ctypes.c_int(threads))
        num_threads.cache_clear()


def _function(names: Sequence[str]) -> Any:
    """Returns the first of the functions that the library in use exports, or None."""
    path = status().path
    library = ctypes.CDLL(path) if path and os.path.exists(path) else None
    return next((getattr(library, name) for name in names if hasattr(library, name)), None)


class _DlInfo(ctypes.Structure):
    _fields_ = (
        ("dli_fname", ctypes.c_char_p),
        ("dli_fbase", ctypes.c_void_p),
        ("dli_sname", ctypes.c_char_p),
        ("dli_saddr", ctypes.c_void_p),
    )


def _global_blas() -> str | None:
    """Returns the file of the `sgemm_` in the global scope, or None."""
    everything = ctypes.CDLL(None)
    address, info = _address(everything), _DlInfo()
    if address is None:
        return None
    found = everything.dladdr(ctypes.c_void_p(address), ctypes.byref(info))
    return os.fsdecode(info.dli_fname) if found and info.dli_fname else "an unnamed library"


def _name(path: str) -> str:
    base = os.path.basename(path)
    return "torch" if base.startswith("libtorch") else "openblas" if "openblas" in base else "path"


def _installed(*distributions: str) -> bool:
    for distribution in distributions:
        try:
            importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        return True
    return False
