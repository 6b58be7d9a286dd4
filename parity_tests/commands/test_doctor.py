"""`icenet doctor`: its report on this machine, on broken frameworks, and on described machines."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, python

from icenet.commands import doctor as doc

with_mlx = pytest.mark.skipif(importlib.util.find_spec("mlx") is None, reason="needs mlx")
with_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
linux = pytest.mark.skipif(sys.platform != "linux", reason="of Linux only")


@pytest.fixture(autouse=True)
def _checkout_with_the_default_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delenv("ICENET_BLAS", raising=False)


# ---- this machine --------------------------------------------------------------------------------


@with_mlx
@with_torch
def test_this_machine() -> None:
    report = doc.examine()
    assert report.ok
    for name in ("mlx", "torch"):
        facts = report.backends[name]
        assert facts["version"].split("+")[0] == importlib.metadata.version(name).split("+")[0]
        assert facts["default_device"] in [device.split(":")[0] for device in facts["devices"]]
        assert set(facts["matmul_gflops"]) == {device.split(":")[0] for device in facts["devices"]}
        assert all(rate > 0 for rate in facts["matmul_gflops"].values())
        assert len(facts["small_us"]) == 2 and all(time > 0 for time in facts["small_us"].values())
        threads = facts["decoding_threads"]
        assert threads["chosen"] in (1, threads["of"])
    assert list(report.backends["mlx"]) == list(report.backends["torch"])
    as_json = json.loads(json.dumps(report.as_dict()))
    assert as_json == report.as_dict() and as_json["ok"] is True


@linux
def test_memory_and_cores_are_the_kernels() -> None:
    facts = doc.system_facts()
    assert facts["memory"] == pytest.approx(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), rel=1e-3)
    assert facts["cores"] == len(os.sched_getaffinity(0))
    assert facts["python"] == sys.version.split()[0]


def test_doctor_imports_no_framework() -> None:
    """Not in its own process, whatever the processes that it starts find."""
    program = """
    import sys
    from icenet.commands import doctor, isolated
    from rich.console import Console
    def fail(*_, **__):
        raise isolated.IsolatedError("broken")
    isolated.call = fail
    doctor.examine().render(Console(file=sys.stderr))
    print(sorted({"mlx", "mlx.core", "torch"} & set(sys.modules)))
    """
    assert python(program) == "[]"


def test_the_remedy_of_the_reference_blas() -> None:
    facts = {**WORKS["mlx"], "blas": {"name": "reference", "path": None, "note": "ICENET_BLAS=none"}}
    system, versions = machine()
    (problem,) = doc.find_problems(system, versions, {**WORKS, "mlx": facts})
    assert problem.severity == "warning"
    assert "reference BLAS" in problem.what and "leave ICENET_BLAS unset" in problem.remedy


@pytest.mark.parametrize(
    ("name", "has_avx512", "count"), [("torch", True, 1), ("torch", False, 0), ("openblas", True, 0)]
)
def test_mkl_on_an_amd_processor(name: str, has_avx512: bool, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doc.processor, "is_amd_with_avx512", lambda: has_avx512)
    facts = {**WORKS["mlx"], "blas": {"name": name, "path": "/lib/x.so", "note": "ICENET_BLAS=auto"}}
    problems = doc.find_problems(*machine(), {**WORKS, "mlx": facts})
    assert [problem.severity for problem in problems] == ["note"] * count
    assert all("MKL" in problem.what and "apt install libopenblas0" in problem.remedy for problem in problems)


@pytest.mark.slow  # matrix products of the reference BLAS
@linux
@with_mlx
def test_the_reference_blas_is_found_and_its_remedy_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICENET_BLAS", "none")
    facts = doc.backend_facts("mlx", 120)
    assert facts["blas"] == {"name": "reference", "path": None, "note": "ICENET_BLAS=none"}
    system, versions = machine()
    (problem,) = doc.find_problems(system, versions, {**WORKS, "mlx": facts})
    assert problem.severity == "warning"
    assert "reference BLAS" in problem.what and "leave ICENET_BLAS unset" in problem.remedy


@linux
@with_mlx
def test_a_bad_icenet_blas_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICENET_BLAS", "/no/such.so")
    facts = doc.backend_facts("mlx", 120)
    assert facts["error"].startswith("ICENET_BLAS=/no/such.so: ")
    system, versions = machine()
    (problem,) = doc.find_problems(system, versions, {**WORKS, "mlx": facts})
    assert problem.severity == "error" and "/no/such.so" in problem.what and "unset ICENET_BLAS" in problem.remedy


# ---- broken frameworks ---------------------------------------------------------------------------

BREAKS = {
    "raises": ("raise ImportError('libtorch.so: no such file')", "ImportError: libtorch.so: no such file"),
    "crashes": (
        "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "the process was killed by SIGSEGV",
    ),
    "exits": ("import os; os._exit(3)", "the process exited with code 3 and no result: no message"),
    "gives up": ("raise SystemExit('no licence')", "SystemExit: no licence"),
    "hangs": ("import time; time.sleep(60)", "no result within 1 s"),
}


@pytest.mark.parametrize("way", BREAKS)
def test_a_broken_framework_is_a_problem(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "win32" and way == "crashes":
        pytest.skip("no signals")
    code, error = BREAKS[way]
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("print('a word on stdout')\n" + code)
    monkeypatch.syspath_prepend(str(tmp_path))
    facts = doc.backend_facts("torch", 1 if way == "hangs" else 60)
    assert facts == {"error": error}
    system, versions = machine()
    report = doc.Report(system, versions, {"mlx": {"error": "not installed"}, "torch": facts}, [])
    assert not report.ok
    problems = doc.find_problems(system, versions, {**WORKS, "torch": facts})
    assert [problem.what for problem in problems] == [f"torch does not work: {error}"]
    assert problems[0].severity == "error"
    assert ("importtime" if way == "hangs" else "pip uninstall -y torch; pip install 'icenet[torch]'") in problems[
        0
    ].remedy


def test_a_framework_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert doc.backend_facts("mlx", 60) == {"error": "not installed"}


def test_a_file_in_the_current_folder_is_not_taken_for_a_framework(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('the wrong one')")
    installed = tmp_path / "installed"
    installed.mkdir()
    (installed / "torch.py").write_text("raise ImportError('the installed one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(installed), *(entry for entry in sys.path if entry not in ("", "."))])
    assert doc.backend_facts("torch", 120) == {"error": "ImportError: the installed one"}


# ---- described machines ----------------------------------------------------------------------------

TF32_OFF = {"available": False, "used": False}
WORKS: dict[str, dict[str, Any]] = {
    "mlx": {
        "framework": "MLX",
        "version": "0.32.4",
        "devices": ["cpu"],
        "default_device": "cpu",
        "chip": "a chip",
        "blas": {"name": "openblas", "path": "/lib/libopenblas.so.0", "note": "ICENET_BLAS=auto"},
        "matmul_gflops": {"cpu": 200.0},
        "small_us": {"matrix-vector product": 110.0, "elementwise chain": 50.0},
        "decoding_threads": {"of": 2, "chosen": 1},
        "tf32": TF32_OFF,
        "dtypes": "",
    },
    "torch": {
        "framework": "PyTorch",
        "version": "2.13.0",
        "devices": ["cpu"],
        "default_device": "cpu",
        "chip": None,
        "blas": {"name": "mkl", "path": None, "note": "MKL 2024.2"},
        "matmul_gflops": {"cpu": 200.0},
        "small_us": {"matrix-vector product": 110.0, "elementwise chain": 50.0},
        "decoding_threads": {"of": 2, "chosen": 1},
        "tf32": TF32_OFF,
        "dtypes": "",
    },
}


def machine(**changes: Any) -> tuple[dict[str, Any], dict[str, str | None]]:
    """Returns a Linux machine without problems, with `changes` to its facts or package versions."""
    system: dict[str, Any] = {
        "python": "3.12.4",
        "executable": "/venv/bin/python",
        "platform": "Linux",
        "system": "Linux",
        "machine": "x86_64",
        "macos": None,
        "chip": "a chip",
        "cores": 2,
        "memory": 2**34,
        "nvidia": None,
        "compiler": "/usr/bin/g++",
    }
    versions: dict[str, str | None] = dict.fromkeys(doc.PACKAGES)
    versions |= {"mlx": "0.32.4", "mlx-cpu": "0.32.4", "torch": "2.13.0+cpu"}
    for name, value in changes.items():
        (system if name in system else versions)[name.replace("_", "-")] = value
    return system, versions


def mac(**changes: Any) -> dict[str, Any]:
    facts = {"system": "Darwin", "machine": "arm64", "macos": "15.2", "chip": "Apple M4", "mlx_cpu": None}
    return {**facts, **changes}


def test_a_machine_without_problems() -> None:
    for good in (
        machine(),
        machine(**mac()),
        machine(python="3.10.0"),
        machine(python="3.13.9"),
        machine(torch="2.6.0"),
    ):
        assert doc.find_problems(*good, WORKS) == []


@pytest.mark.parametrize(
    ("changes", "severity", "what", "remedy"),
    [
        ({"mlx": None, "mlx_cpu": None}, "warning", "mlx is not installed", "pip install 'icenet[cpu]'"),
        (mac(mlx=None), "warning", "mlx is not installed", "pip install 'mlx>=0.32.1,<0.33'"),
        ({"torch": None}, "warning", "torch is not installed", "pip install 'icenet[torch]'"),
        (
            {"torch": "2.5.1"},
            "warning",
            "torch 2.5.1 is not a tested version",
            "pip install 'torch>=2.6,<2.14'",
        ),
        ({"torch": "2.14.0a0"}, "warning", "at least 2.6 and below 2.14", "pip install 'torch>=2.6,<2.14'"),
        (mac(mlx="0.33.0"), "warning", "mlx 0.33.0 is not a tested version", "pip install 'mlx>=0.32.1,<0.33'"),
        (mac(mlx="0.32.0"), "warning", "mlx 0.32.0 is not a tested version", "pip install 'mlx>=0.32.1,<0.33'"),
        (
            {"mlx_cuda_13": "0.32.4"},
            "error",
            "mlx-cpu and mlx-cuda-13 are both installed",
            "pip uninstall -y mlx mlx-cpu mlx-cuda-13; pip install 'icenet[cpu]'",
        ),
        ({"mlx_cpu": None}, "error", "without a build for this machine", "pip install 'icenet[cpu]'"),
        ({"mlx_cpu": "0.32.1"}, "error", "must have the same version", "pip install 'mlx-cpu==0.32.4'"),
        ({"python": "3.14.0"}, "warning", "Python 3.14.0 is not", "Python 3.12"),
        ({"python": "3.9.18"}, "warning", "Python 3.9.18 is not", "Python 3.12"),
        (mac(machine="x86_64"), "error", "Rosetta", "install an arm64 Python"),
        (mac(macos="13.6"), "error", "macOS 13.6", "update macOS"),
        ({"compiler": None}, "note", "no C++ compiler", "apt install g++"),
    ],
)
def test_each_problem_has_its_remedy(changes: dict[str, Any], severity: str, what: str, remedy: str) -> None:
    (problem,) = doc.find_problems(*machine(**changes), WORKS)
    assert problem.severity == severity
    assert what in problem.what
    assert remedy in problem.remedy


def test_a_gpu_that_is_not_used_and_tf32_on_one_that_is() -> None:
    backends = copy.deepcopy(WORKS)
    backends["torch"] |= {"devices": ["cpu", "cuda"], "default_device": "cuda"}
    backends["torch"]["tf32"] = {"available": True, "used": True}
    unused, tf32 = doc.find_problems(*machine(nvidia="580.1"), backends)
    assert unused.what == "there is an NVIDIA GPU, and mlx does not use it" and "icenet[cuda]" in unused.remedy
    assert tf32.severity == "warning" and "PyTorch computes fp32 products in TF32" in tf32.what
    assert "NVIDIA_TF32_OVERRIDE=0" in tf32.remedy


def test_the_worst_problem_is_first() -> None:
    problems = doc.find_problems(*machine(compiler=None, torch=None, mlx_cpu=None), WORKS)
    assert [problem.severity for problem in problems] == ["error", "warning", "note"]


def test_the_tables_show_every_value() -> None:
    console_module = pytest.importorskip("rich.console")
    system, versions = machine(mlx=None, mlx_cpu=None)
    backends = {**WORKS, "mlx": {"error": "not installed"}}
    report = doc.Report(system, versions, backends, doc.find_problems(system, versions, backends))
    out = io.StringIO()
    report.render(console_module.Console(file=out, width=160))
    for words in (
        "a chip, 2 cores",
        "16.0 GiB",
        "not installed",
        "200 GFLOP/s",
        "pip install 'icenet[cpu]'",
        "MKL 2024.2",
        "full fp32; this device has no TF32",
    ):
        assert words in out.getvalue()
    assert "No problems" not in out.getvalue()


def test_the_tables_in_a_file_are_narrow_and_divide_no_word(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    system, versions = machine(mlx=None, mlx_cpu=None)
    system["executable"] = f"/{'folder/' * 12}bin/python"
    backends = {"torch": {**WORKS["torch"], "dtypes": "slow on the CPU; " * 20}}
    doc.Report(system, versions, backends, doc.find_problems(system, versions, backends)).render()
    out = capsys.readouterr().out
    assert f"({system['executable']})" in out and "pip install 'icenet[cpu]'" in out
    assert max(map(len, out.splitlines())) < 160
