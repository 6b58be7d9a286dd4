"""The fast BLAS for MLX: the choice of the library, and that MLX's products come from it.

A library is loaded once per process, so each case runs in a new process. The stub's `sgemm_` writes 42 everywhere: an
MLX product of 42s was computed by the stub.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from helpers import ROOT, is_one_line

from icenet.cli.main import main
from icenet.core.host import blas

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("g++")
X86 = platform.machine() == "x86_64"


def installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


cuda_build = any(map(installed, ("mlx-cuda-13", "mlx-cuda-12"))) and not installed("mlx-cpu")
mlx_cpu_build = pytest.mark.skipif(cuda_build, reason="MLX's CUDA build needs no BLAS")
linux = pytest.mark.skipif(sys.platform != "linux", reason="a fast BLAS is loaded on Linux only")
with_mlx = pytest.mark.skipif(importlib.util.find_spec("mlx") is None, reason="needs mlx")
with_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")

STUB = """
#ifdef SUFFIXED
#define sgemm_ sgemm_64_
#endif
void sgemm_(char *ta, char *tb, int *m, int *n, int *k, float *alpha, float *a, int *lda, float *b, int *ldb,
            float *beta, float *c, int *ldc) {
  for (int j = 0; j < *n; j++) for (int i = 0; i < *m; i++) c[i + (long)j * *ldc] = 42.0f;
}
#ifdef WIDE
const char *openblas_get_config(void) { return "OpenBLAS 0.3.30 NO_LAPACKE USE64BITINT DYNAMIC_ARCH"; }
#endif
"""
PRODUCT = """
import mlx.core as mx
a = mx.ones((300, 300))
product = mx.matmul(a, a, stream=mx.cpu)
print(product.min().item(), product.max().item())
"""
STATUS = "import icenet.blas; print(icenet.blas.status().name, icenet.blas.status().path)\n"


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a new process with `variables` and without the BLAS variables of this process."""
    ours = ("ICENET_BLAS", "MKL_CBWR", "LD_PRELOAD")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env |= {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "always", **variables}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


def preloadable(folder: Path) -> Path:
    """Returns the folder of a library for LD_PRELOAD. Skips the test if it has a space, which separates paths."""
    if " " in str(folder):
        pytest.skip(f"LD_PRELOAD cannot name a file in {folder}")
    return folder


def answer(code: str, **variables: str) -> list[str]:
    """Returns the lines that `code` prints; the process must succeed."""
    done = python(code, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def last_error(code: str, **variables: str) -> str:
    """Returns the last line of the error output; the process must fail."""
    done = python(code, **variables)
    assert done.returncode != 0, f"did not fail: {done.stdout}"
    return done.stderr.strip().splitlines()[-1]


def stub(folder: Path, name: str, *defines: str) -> str:
    """Compiles the stub as `folder/name`."""
    if COMPILER is None:
        pytest.skip("needs a C compiler")
    source = folder / "stub.c"
    source.write_text(STUB)
    flags = [f"-D{define}" for define in defines]
    subprocess.run(
        [COMPILER, "-x", "c", "-shared", "-fPIC", *flags, "-o", str(folder / name), str(source)], check=True
    )
    return str(folder / name)


# ---- the choice ----------------------------------------------------------------------------------


@linux
@with_mlx
@mlx_cpu_build
def test_the_status_names_the_variable_that_chooses_openblas_kernels(tmp_path: Path) -> None:
    """`icenet doctor` shows the note: products of half the speed have a visible cause."""
    stub(tmp_path, "libopenblasp.so.0")
    code = "import icenet.blas; print(icenet.blas.status().note)"
    variables = {"LD_LIBRARY_PATH": str(tmp_path), "OPENBLAS_CORETYPE": "Haswell"}
    assert answer(code, **variables) == ["ICENET_BLAS=auto, OPENBLAS_CORETYPE=Haswell"]


@linux
@with_mlx
@mlx_cpu_build
def test_auto_takes_a_system_openblas_and_mlx_computes_with_it(tmp_path: Path) -> None:
    path = stub(tmp_path, "libopenblasp.so.0")
    lines = answer(STATUS + PRODUCT, LD_LIBRARY_PATH=str(tmp_path))
    assert lines == [f"openblas {path}", "42.0 42.0"]


@linux
@with_mlx
@with_torch
def test_the_users_choice_goes_before_a_system_openblas(tmp_path: Path) -> None:
    stub(tmp_path, "libopenblasp.so.0")
    status, product = answer(STATUS + PRODUCT, LD_LIBRARY_PATH=str(tmp_path), ICENET_BLAS="torch")
    assert status.startswith("torch ") and status.endswith("libtorch_cpu.so")
    assert product == "300.0 300.0"


@linux
@with_mlx
def test_a_path_is_taken_as_named(tmp_path: Path) -> None:
    path = stub(tmp_path, "libmine.so")
    assert answer(STATUS + PRODUCT, ICENET_BLAS=path) == [f"path {path}", "42.0 42.0"]


@linux
@with_mlx
def test_none_leaves_mlx_as_it_is_without_a_word(tmp_path: Path) -> None:
    stub(tmp_path, "libopenblasp.so.0")
    done = python(STATUS + PRODUCT, LD_LIBRARY_PATH=str(tmp_path), ICENET_BLAS="none")
    assert done.stdout.splitlines() == ["reference None", "300.0 300.0"]
    assert "BlasWarning" not in done.stderr


@linux
@with_mlx
@with_torch
@mlx_cpu_build
def test_auto_passes_over_an_openblas_with_64_bit_integers(tmp_path: Path) -> None:
    stub(tmp_path, "libopenblasp.so.0", "WIDE")
    stub(tmp_path, "libopenblas_pthreads.so.0", "SUFFIXED")
    status, product = answer(STATUS + PRODUCT, LD_LIBRARY_PATH=str(tmp_path))
    assert status.split()[0] in ("torch", "openblas")  # openblas: a real one further down the list
    assert str(tmp_path) not in status and product == "300.0 300.0"


@linux
@with_mlx
@mlx_cpu_build
def test_a_preloaded_blas_is_kept_and_never_too_late(tmp_path: Path) -> None:
    path = stub(preloadable(tmp_path), "libopenblas.so.0")
    done = python(PRODUCT + STATUS, LD_PRELOAD=path)  # mlx first
    assert done.stdout.splitlines() == ["42.0 42.0", f"openblas {path}"]
    assert "BlasWarning" not in done.stderr


@linux
@with_torch
def test_neither_framework_is_imported() -> None:
    check = "import icenet.blas, sys; print({'mlx', 'mlx.core', 'torch', 'numpy'} & set(sys.modules))"
    assert answer(check) == ["set()"]


def test_other_platforms_and_the_cuda_build_are_left_alone() -> None:
    code = """
import os, sys
import icenet.core.host.blas as blas
blas._installed = lambda *names: "mlx-cpu" not in names
platform = sys.platform
for sys.platform, choice in (("darwin", "torch"), ("win32", "auto"), ("linux", "auto")):
    print(blas._load(choice).name)
sys.platform = platform
print(platform != "linux" or blas._global_blas())
"""
    lines = answer(code, ICENET_BLAS="none")
    assert lines[:3] == ["not needed"] * 3
    assert lines[3] in ("None", "True")


# ---- the products --------------------------------------------------------------------------------

AGREEMENT = """
import icenet.blas
import mlx.core as mx
import numpy as np
import torch
mx.set_default_device(mx.cpu)
draw = np.random.default_rng(0).standard_normal
shapes = ((300, 300, 300), (1, 300, 300), (37, 129, 11), (2, 26, 36), (14, 10, 1), (4, 4, 6), (1, 7, 7))
for m, k, n in shapes:
    a, b = draw((m, k)).astype(np.float32), draw((k, n)).astype(np.float32)
    ours = np.array(mx.array(a) @ mx.array(b))
    theirs = (torch.from_numpy(a) @ torch.from_numpy(b)).numpy()
    exact = a.astype(np.float64) @ b.astype(np.float64)
    bound = k * 2.0**-24 * (np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64))
    linear = np.array(mx.array(a) @ mx.array(b.T.copy()).T)
    same = np.array_equal(linear, (torch.from_numpy(a) @ torch.from_numpy(b.T.copy()).T).numpy())
    print(np.array_equal(ours, theirs), same, bool((np.abs(ours - exact) <= bound).all()))
"""


@linux
@with_mlx
@with_torch
@pytest.mark.skipif(not X86, reason="on other processors torch uses several algorithms")
def test_on_torchs_blas_mlx_agrees_with_torch_bit_for_bit() -> None:
    assert answer(AGREEMENT, ICENET_BLAS="torch") == ["True True True"] * 7


@linux
@with_mlx
@with_torch
def test_on_its_own_blas_mlx_does_not() -> None:
    """The control of the test above: with the reference BLAS a 300x300 product differs somewhere."""
    assert answer(AGREEMENT, ICENET_BLAS="none")[0] == "False False True"


@linux
@with_torch
@pytest.mark.skipif(not X86, reason="MKL is for x86-64")
def test_mkl_is_made_reproducible_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    code = "import icenet.blas, os; print(os.environ.get('MKL_CBWR'))"
    assert answer(code, ICENET_BLAS="torch") == ["AUTO,STRICT"]
    assert answer(code, ICENET_BLAS="torch", MKL_CBWR="COMPATIBLE") == ["COMPATIBLE"]
    assert answer(code, ICENET_BLAS="none") == ["None"]


# ---- errors --------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize(
    ("value", "problem"),
    [("/no/such/libblas.so", "cannot open"), ("mkl", "cannot open"), ("libm.so.6", "does not export sgemm_")],
)
def test_an_unsuitable_library_is_an_error(value: str, problem: str) -> None:
    line = last_error("import icenet.blas", ICENET_BLAS=value)
    assert is_one_line(line, "BackendError", f"ICENET_BLAS={value}", problem, "auto, torch, openblas, none", "path")


@linux
def test_suffixed_and_64_bit_builds_are_refused_by_name(tmp_path: Path) -> None:
    suffixed = stub(tmp_path, "libopenblas64_.so", "SUFFIXED")
    assert is_one_line(last_error("import icenet.blas", ICENET_BLAS=suffixed), suffixed, "sgemm_", "suffixed")
    wide = stub(tmp_path, "libopenblas64.so", "WIDE")
    assert is_one_line(last_error("import icenet.blas", ICENET_BLAS=wide), wide, "ILP64")


@linux
def test_a_choice_against_a_preloaded_blas_is_an_error(tmp_path: Path) -> None:
    path, other = stub(preloadable(tmp_path), "libopenblas.so.0"), stub(tmp_path, "libother.so")
    line = last_error("import icenet.blas", LD_PRELOAD=path, ICENET_BLAS=other)
    assert is_one_line(line, other, "too late", path)
    assert "unset LD_PRELOAD" in last_error("import icenet.blas", LD_PRELOAD=path, ICENET_BLAS="none")


ABSENT = """
import ctypes.util, os
import icenet.core.host.blas as blas
blas.OPENBLAS_NAMES, blas.sys.prefix = (), "/nowhere"
ctypes.util.find_library = lambda name: None
blas.importlib.util.find_spec = lambda name: None
blas._status = None
os.environ["ICENET_BLAS"] = {choice!r}
print(blas.load())
"""


@linux
@mlx_cpu_build
def test_nothing_found_is_one_warning_with_the_remedy() -> None:
    done = python(ABSENT.format(choice="auto") + "blas.load(); blas.status()", ICENET_BLAS="none")
    assert done.stdout.startswith("Status(name='reference', path=None")
    assert done.stderr.count("BlasWarning: ") == 1
    assert "install OpenBLAS (Debian: apt install libopenblas0" in done.stderr


@linux
@pytest.mark.parametrize(("choice", "remedy"), [("torch", "pip install torch"), ("openblas", "install OpenBLAS")])
def test_a_chosen_library_that_is_not_installed_is_an_error(choice: str, remedy: str) -> None:
    line = last_error(ABSENT.format(choice=choice), ICENET_BLAS="none")
    assert f"ICENET_BLAS={choice}: not found; {remedy}" in line


@linux
@with_mlx
@mlx_cpu_build
def test_too_late_is_one_warning_with_the_remedy() -> None:
    done = python("import mlx.core\n" + STATUS)
    assert done.stdout.splitlines() == ["reference None"]
    assert done.stderr.count("BlasWarning: ") == 1
    assert "import icenet.blas before mlx.core" in done.stderr


# ---- the config's choice -------------------------------------------------------------------------

RESOLVE = """
import os
from icenet.core import backends
from icenet.core.host import blas
backends.resolve("mlx", {choice!r})
print(blas.status().name, blas.status().path, "ICENET_BLAS" in os.environ)
"""


@linux
@with_mlx
def test_a_config_chooses_without_the_environment(tmp_path: Path) -> None:
    """A program that is started later must not inherit the choice of this config."""
    one, two = stub(tmp_path, "libone.so"), stub(tmp_path, "libtwo.so")
    again = f"backends.resolve('mlx', {one!r}); backends.resolve('mlx', {two!r}); backends.resolve('mlx')\n"
    done = python(RESOLVE.format(choice=one) + PRODUCT + again)
    assert done.stdout.splitlines() == [f"path {one} False", "42.0 42.0"], done.stderr
    [warning] = [line for line in done.stderr.splitlines() if "BlasWarning: " in line]
    assert f"blas: {two} has no effect, {one} is in use" in warning and "before Python starts" in warning


@linux
@with_mlx
def test_the_environment_goes_before_the_config(tmp_path: Path) -> None:
    one = stub(tmp_path, "libone.so")
    assert answer(RESOLVE.format(choice="torch"), ICENET_BLAS=one) == [f"path {one} True"]


@linux
def test_a_library_that_the_config_names_and_that_does_not_exist_is_an_error() -> None:
    assert is_one_line(last_error(RESOLVE.format(choice="/no/lib.so")), "blas: /no/lib.so", "openblas")


# ---- choose --------------------------------------------------------------------------------------


@linux
@with_mlx
def test_choose_before_mlx_is_imported(tmp_path: Path) -> None:
    path = stub(tmp_path, "libmine.so")
    code = f"import icenet.blas as blas, os; print(blas.choose({path!r}).name, os.environ['ICENET_BLAS'])\n"
    again = f"print(blas.choose({path!r}).name, blas.status().path)\n"
    assert answer(code + PRODUCT + again, ICENET_BLAS="none") == [f"path {path}", "42.0 42.0", f"path {path}"]


@linux
@with_mlx
def test_choose_after_mlx_is_imported_is_an_error() -> None:
    code = "import icenet.blas as blas, mlx.core; blas.choose('torch')"
    line = last_error(code, ICENET_BLAS="none")
    assert is_one_line(line, "'torch'", "mlx", "ICENET_BLAS=torch before Python starts")


@linux
def test_choose_against_the_library_in_use_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    one, two = stub(tmp_path, "libone.so"), stub(tmp_path, "libtwo.so")
    code = """
import os
import icenet.blas as blas
for value in (OTHER, "none"):
    try:
        blas.choose(value)
    except Exception as error:
        print(type(error).__name__, os.environ["ICENET_BLAS"], blas.status().path)
"""
    lines = answer(code.replace("OTHER", repr(two)), ICENET_BLAS=one)
    assert lines == [f"BackendError {one} {one}"] * 2


def test_a_program_without_products_loads_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """`icenet convert` as a process of its own. A library that the user names is loaded."""
    skipped: list[bool] = []
    monkeypatch.setattr(blas, "skip", lambda: skipped.append(True))
    for command in ("convert", "info"):
        monkeypatch.setattr(sys, "argv", ["icenet", command, "--help"])
        assert main() == main([command, "--help"]) == 0
    assert skipped == [True]
    monkeypatch.undo()
    monkeypatch.delenv(blas.VARIABLE, raising=False)
    monkeypatch.setattr(blas, "_status", None)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    blas.skip()
    assert os.environ["OPENBLAS_NUM_THREADS"] == "2"
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    monkeypatch.setattr(blas, "_status", None)
    blas.skip()
    assert os.environ["OPENBLAS_NUM_THREADS"] == "1"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert blas.load().name == blas.load("openblas").name == "not needed"
    monkeypatch.setattr(blas, "_status", None)
    monkeypatch.setenv(blas.VARIABLE, "torch")
    blas.skip()
    assert blas._status is None
