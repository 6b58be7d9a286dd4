"""Settings and fixtures of all tests.

The settings must be made before a test module imports a framework: one thread per process, because the tests run in
parallel and their arrays are small, and full-precision products, so that fp32 means fp32 on every device.
"""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
os.environ["MLX_ENABLE_TF32"] = "0"  # also in the models that a test builds without a config
gc.set_threshold(20_000)  # with Python's 700, collections take 7 % of the processor time

DEFAULT_MARKERS = "not slow and not gpu and not mutation"
"""The markers of a default run, as in `pyproject.toml`."""

_numbers = itertools.count()  # of the folders of tests

MAX_WORKERS = 4
"""Each worker process holds both frameworks, about 1 GB."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Returns the number of workers of `-n auto`, the default.

    Single files start faster in one process. Slow tests measure time, so they run one after another.
    """
    if config.option.markexpr not in (DEFAULT_MARKERS, "mutation") or any(
        ".py" in argument for argument in config.args
    ):
        return 0
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, MAX_WORKERS)


@pytest.fixture(scope="session", autouse=True)
def session_cache() -> Iterator[None]:
    """Keeps token files of fixtures of a wider scope than one test out of the user's cache."""
    folder = tempfile.mkdtemp(prefix="icenet-tests-")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICENET_CACHE", folder)
        yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def frozen_objects() -> None:
    """Leaves what is alive before a test module out of later collections: the libraries have a million objects.

    `icenet bench` collects before each measurement, which takes 0.3 s with them.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def isolated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gives each test its own cache, and hides the variables of a launcher of several processes.

    The folder `tmp_path` is made only for tests that ask for it: most have no files, and there are thousands.
    """
    if "tmp_path" in request.fixturenames:
        folder = request.getfixturevalue("tmp_path")
    else:
        folder = tmp_path_factory.getbasetemp() / f"test-{next(_numbers)}"  # exists once the test uses the cache
    monkeypatch.setenv("ICENET_CACHE", str(folder / "cache"))
    for name in ("RANK", "WORLD_SIZE", "MLX_RANK", "MLX_HOSTFILE", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes runs draw no plots, which saves a second each."""
    monkeypatch.setattr("icenet.core.report.plots.plot_metrics", lambda *_, **__: None)


@pytest.fixture
def mlx_on_cpu() -> Iterator[None]:
    """Makes the CPU MLX's default device, on machines with a GPU too."""
    pytest.importorskip("icenet.models")  # chooses the BLAS before mlx is imported
    import mlx.core as mx

    before, set_default_device = mx.default_device(), mx.set_default_device
    set_default_device(mx.cpu)
    yield
    set_default_device(before)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns an empty folder that is the working directory of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path
