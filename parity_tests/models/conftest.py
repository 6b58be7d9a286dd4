"""Fixtures of the tests of models."""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import pytest

from icenet.core.config import custom
from icenet.core.models import init


@pytest.fixture
def shared_initial_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws each initial value once for both backends: the guide's models have up to 70 M parameters."""
    drawn = functools.cache(init.initial_value)
    monkeypatch.setattr(init, "initial_value", lambda *arguments, out: drawn(*arguments))


@pytest.fixture
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, no_plots: None) -> None:
    """Runs a test in the `folder` of its module, whose files are not trusted before."""
    monkeypatch.setattr(custom, "_trusted", set())
    monkeypatch.chdir(folder)


@pytest.fixture
def unfused() -> Iterator[None]:
    """Lets `mx.compile` trace functions without fusing them into kernels, which g++ compiles one by one.

    Python has no function for this mode of MLX, so that its C++ function is called by its symbol.
    """
    mx = pytest.importorskip("mlx.core")
    library = ctypes.CDLL(str(next((Path(mx.__file__).parent / "lib").glob("libmlx.*"))))
    no_fuse = 2  # enum class CompileMode { disabled, no_simplify, no_fuse, enabled }
    library._ZN3mlx4core16set_compile_modeENS0_11CompileModeE(no_fuse)
    yield
    mx.enable_compile()


@pytest.fixture(
    params=[pytest.param("cuda", marks=pytest.mark.gpu), "cpu"], ids=["on a GPU", "in Triton's interpreter"]
)
def triton_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Returns a device of kernels of Triton. A test imports their module after it."""
    if request.param == "cpu":
        if importlib.import_module("torch").cuda.is_available():
            pytest.skip("Triton compiles for the GPU")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    return str(request.param)
