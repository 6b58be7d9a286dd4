"""A fast BLAS for MLX on Linux CPUs. Every module of ours that uses MLX imports this one before `mlx.core`.

MLX's wheels for Linux carry the reference BLAS (Netlib's Fortran loops: 8 GFLOP/s where the same two cores
do 230). A matrix product ends in the symbol `sgemm_`, which the dynamic loader looks for in the global scope
first; so a library with its own `sgemm_`, put there before MLX is bound, serves MLX. Once `mlx.core` is
imported its symbols are bound, and it is too late.

Which library: the environment variable ICENET_BLAS says `torch`, `openblas`, `none` or a path; `auto` (the
default) takes a system OpenBLAS, else the one inside an installed torch, which is not imported for that.
Nothing is done on other platforms, nor with MLX's CUDA build where the choice is left at `auto`.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.metadata
import importlib.util
import os
import platform
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from icenet.core.errors import BackendError

VARIABLE = "ICENET_BLAS"
# The builds with threads come first: where they exist, libopenblas.so.0 is the serial one (Fedora, openSUSE).
OPENBLAS_NAMES = ("libopenblasp.so.0", "libopenblas_pthreads.so.0", "libopenblas.so.0", "libopenblas.so")
MKL_CBWR = "AUTO,STRICT"
REMEDY = "install OpenBLAS (Debian: apt install libopenblas0; Fedora: dnf install openblas-threads) or torch"


class BlasWarning(UserWarning):
    """MLX will run on its reference BLAS, about 25 times slower in matrix products."""


@dataclass(frozen=True)
class Status:
    """What serves MLX's matrix products on the CPU.

    `name` is `torch`, `openblas`, `path` (any other library), `reference` (MLX's own, slow) or `not needed`
    (another platform, or MLX's CUDA build); `path` is the library's file, if one was loaded; `note` says why.
    """

    name: str
    path: str | None
    note: str


_status: Status | None = None


def status() -> Status:
    """The BLAS in use, as `load` left it."""
    return load()


def load() -> Status:
    """Put a fast BLAS into the global symbol scope, once per process; called by importing this module.

    Raises BackendError where ICENET_BLAS names a library that is missing or of no use; warns (BlasWarning)
    where nothing was found or `mlx.core` was imported before.
    """
    global _status
    if _status is None:
        _status = _load(os.environ.get(VARIABLE, "").strip() or "auto")
    return _status


def choose(value: str) -> Status:
    """Set ICENET_BLAS to `value` and load accordingly, before `mlx.core` is imported.

    A library once loaded stays for the life of the process: BackendError where MLX is imported already, or
    where another library serves already. The way out is the variable, set before the program starts.
    """
    global _status
    value = value.strip() or "auto"
    if "mlx.core" in sys.modules and value != (os.environ.get(VARIABLE, "").strip() or "auto"):
        raise BackendError(
            f"BLAS {value!r} cannot be chosen now, mlx is imported already: "
            f"set {VARIABLE}={value} before Python starts"
        )
    _status = _load(value)
    os.environ[VARIABLE] = value
    return _status


def _load(choice: str) -> Status:
    if sys.platform != "linux":
        return Status("not needed", None, f"MLX uses the platform's own BLAS on {sys.platform}")
    if choice == "auto" and _installed("mlx-cuda-13", "mlx-cuda-12") and not _installed("mlx-cpu"):
        return Status(
            "not needed", None, f"MLX's CUDA build works on the GPU; {VARIABLE}=torch serves its CPU device"
        )
    before = _global_blas()
    if choice == "none":
        if before:
            raise BackendError(
                f"{VARIABLE}=none, but {before} is loaded already: unset LD_PRELOAD, or choose earlier"
            )
        return Status("reference", None, f"{VARIABLE}=none")
    if choice == "auto" and before:
        return Status(_name(before), before, "was in the global scope already")
    if not before and "mlx.core" in sys.modules:
        note = "mlx was imported before icenet, too late for a fast BLAS: import icenet.blas before mlx.core"
        warnings.warn(f"{note}, else matrix products on the CPU are about 25 times slower", BlasWarning, stacklevel=4)
        return Status("reference", None, note)

    complaints = []
    for candidate in _candidates(choice):
        complaint = _open(candidate)
        if complaint is None:
            path = _global_blas() or candidate
            return Status(_name(path), path, f"{VARIABLE}={choice}")
        if os.path.sep in candidate or choice == candidate:  # a name that the loader does not know is no news
            complaints.append(f"{candidate} {complaint}")
    if choice == "auto":
        note = f"no fast BLAS found; {REMEDY}"
        text = f"MLX's matrix products on the CPU will be about 25 times slower: {note}"
        warnings.warn(f"{text} ({VARIABLE}=none silences this)", BlasWarning, stacklevel=4)
        return Status("reference", None, note)
    ways_out = {"torch": "pip install torch", "openblas": REMEDY}
    way_out = ways_out.get(choice, "give auto, torch, openblas, none or the path of a library that exports sgemm_")
    raise BackendError(f"{VARIABLE}={choice}: {'; '.join(complaints) or 'not found'}; {way_out}")


def _candidates(choice: str) -> list[str]:
    """Libraries to try, in order: paths, or names that the dynamic loader searches for itself."""
    found: list[str] = []
    if choice in ("auto", "openblas"):
        found += OPENBLAS_NAMES
        in_prefix = Path(sys.prefix, "lib", "libopenblas.so.0")  # conda's, which the loader may not search
        found += [str(in_prefix)] if in_prefix.exists() else []
        other = ctypes.util.find_library("openblas")
        found += [other] if other and other not in found else []
    if choice in ("auto", "torch"):
        spec = importlib.util.find_spec("torch")  # finds the package; does not import it
        for folder in (spec.submodule_search_locations or []) if spec else []:
            library = Path(folder, "lib", "libtorch_cpu.so")
            found += [str(library)] if library.exists() else []
    return found if choice in ("auto", "openblas", "torch") else [os.path.expanduser(choice)]


def _open(path: str) -> str | None:
    """Load `path` into the global scope; None if it now serves, else what is wrong with it."""
    if _name(path) == "torch" and platform.machine() in ("x86_64", "AMD64"):
        # Equal calls then give equal bits, whatever the alignment of the data, the threads and the run, and
        # MLX agrees with torch bit for bit: without it 163 of 600 small Linear products differed on an AMD
        # EPYC. AUTO and not AVX2: equal in effect, but on an Intel Xeon with AVX-512 AVX2 halves the speed.
        os.environ.setdefault("MKL_CBWR", MKL_CBWR)
    try:
        # Looked at before it is made global: a library of no use must not stay in everybody's way.
        library = ctypes.CDLL(path, ctypes.RTLD_LOCAL)
        if not hasattr(library, "sgemm_"):
            return "does not export sgemm_ (builds with suffixed names, such as openblas64, cannot serve MLX)"
        if hasattr(library, "openblas_get_config"):
            library.openblas_get_config.restype = ctypes.c_char_p
            if b"USE64BITINT" in (library.openblas_get_config() or b""):
                return "has 64-bit integers (ILP64), which MLX's calls do not"
        ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    except OSError as error:
        return f"cannot be loaded ({str(error).removeprefix(path + ': ')})"
    if _address(ctypes.CDLL(None)) != _address(library):
        return f"comes too late: {_global_blas()} is loaded already and stays for the life of the process"
    return None


def _address(library: ctypes.CDLL) -> int | None:
    """Where `sgemm_` leads, seen from `library`."""
    return ctypes.cast(library.sgemm_, ctypes.c_void_p).value if hasattr(library, "sgemm_") else None


class _DlInfo(ctypes.Structure):
    _fields_ = (
        ("dli_fname", ctypes.c_char_p),
        ("dli_fbase", ctypes.c_void_p),
        ("dli_sname", ctypes.c_char_p),
        ("dli_saddr", ctypes.c_void_p),
    )


def _global_blas() -> str | None:
    """The file whose `sgemm_` the loader finds first in the global scope; None if there is none."""
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


load()
