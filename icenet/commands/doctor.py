"""`icenet doctor`: what is installed, what this machine has, what works, what is wrong and how to mend it.

Each backend is examined in its own process (`icenet.tools.environment`, `icenet_torch.tools.environment`). This
module imports no framework, so a broken one (its import fails, crashes or hangs) is reported like any other finding.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

BACKENDS = {"mlx": "icenet.tools.environment", "torch": "icenet_torch.tools.environment"}
PACKAGES = (
    *("icenet", "mlx", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-metal", "torch"),
    *("numpy", "safetensors", "pydantic", "pyyaml", "rich", "click", "matplotlib"),
)
# The versions that the parity tests are run with: at least the first, below the second.
TESTED = {"mlx": ((0, 32, 1), (0, 33)), "torch": ((2, 6), (2, 14))}
TESTED_PYTHON = ((3, 10), (3, 14))
# The same sys.path as here, not the child's own: else a `torch.py` in the current folder would be examined.
CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
try:
    from {module} import environment
    answer = environment()
except BaseException as error:
    answer = {{"error": f"{{type(error).__name__}}: {{error}}"}}
print("\\n" + {mark!r} + json.dumps(answer))
"""
MARK = "icenet-facts "


@dataclass(frozen=True)
class Problem:
    """A finding. `severity` is `error` (a backend does not work), `warning` (slow or untested) or `note`."""

    severity: str
    what: str
    remedy: str


@dataclass(frozen=True)
class Report:
    """Everything `icenet doctor` knows, in JSON types (but for the problems, which `as_dict` makes so).

    `system`: facts about Python and the machine; `versions`: package name to version, None where there is
    none; `backends`: `mlx` and `torch` to their facts, or to `{"error": why}`; `problems`: the worst first.
    """

    system: dict[str, Any]
    versions: dict[str, str | None]
    backends: dict[str, dict[str, Any]]
    problems: list[Problem]

    @property
    def ok(self) -> bool:
        """Whether at least one backend works."""
        return any("error" not in facts for facts in self.backends.values())


def doctor(timeout: float = 120.0) -> Report:
    """Examine this machine, then each backend for at most `timeout` seconds (2 s in all if all is well)."""
    system, versions = system_facts(), package_versions()
    backends = {name: backend_facts(name, timeout) for name in BACKENDS}
    return Report(system, versions, backends, find_problems(system, versions, backends))


def as_dict(report: Report) -> dict[str, Any]:
    """The report in JSON types, with `ok`."""
    return {"ok": report.ok, **dataclasses.asdict(report)}


def package_versions() -> dict[str, str | None]:
    """The installed version of each package that matters here, None where there is none."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def system_facts() -> dict[str, Any]:
    """Python, platform, chip, cores this process may use, memory in bytes, NVIDIA driver, C++ compiler."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    driver = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", _read("/proc/driver/nvidia/version"))
    if sys.platform == "darwin":
        chip, memory = _sysctl("machdep.cpu.brand_string"), int(_sysctl("hw.memsize") or 0)
    else:
        model = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
        total = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
        chip, memory = model[1] if model else "", int(total[1]) * 1024 if total else 0
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "system": platform.system(),
        "machine": platform.machine(),
        "macos": platform.mac_ver()[0] or None,
        "chip": chip or platform.processor() or platform.machine(),
        "cores": usable,
        "memory": memory or None,
        "nvidia": driver[1] if driver else "present" if Path("/dev/nvidiactl").exists() else None,
        "compiler": shutil.which("g++"),
    }


def backend_facts(framework: str, timeout: float) -> dict[str, Any]:
    """The answer of its module's `facts()` in a fresh process, or `{"error": why there is none}`."""
    if importlib.util.find_spec(framework) is None:  # looks for the package; does not import it
        return {"error": "not installed"}
    child = [sys.executable, "-c", CHILD.format(module=BACKENDS[framework], mark=MARK), json.dumps(sys.path)]
    try:
        done = subprocess.run(child, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {timeout:g} s"}
    answers = [line for line in done.stdout.decode(errors="replace").splitlines() if line.startswith(MARK)]
    if answers:
        answer: dict[str, Any] = json.loads(answers[-1].removeprefix(MARK))
        return answer
    if done.returncode < 0:
        return {"error": f"its process was killed by {signal.Signals(-done.returncode).name}"}
    last_words = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
    return {"error": f"its process ended with {done.returncode} and no answer: {''.join(last_words) or 'silent'}"}


def find_problems(
    system: dict[str, Any], versions: dict[str, str | None], backends: dict[str, dict[str, Any]]
) -> list[Problem]:
    """What is wrong, and the way out of each; a pure function of the three, the worst first."""
    found = [*_of_python(system), *_of_packages(system, versions)]
    for name, facts in backends.items():
        if "error" in facts:
            if versions.get(name):
                remedy = _mend(name, facts["error"], system, versions)
                found.append(Problem("error", f"{name} does not work: {facts['error']}", remedy))
            continue
        found += _of_backend(name, facts)
    found += _of_gpu(system, backends)
    if system["compiler"] is None and "error" not in backends.get("mlx", {"error": ""}):
        what = "no C++ compiler (g++): MLX cannot compile models on the CPU (compile_model)"
        found.append(Problem("note", what, "leave compile_model off on the CPU, or: apt install g++"))
    return sorted(found, key=lambda problem: ("error", "warning", "note").index(problem.severity))


def _of_python(system: dict[str, Any]) -> list[Problem]:
    found = []
    version, (first, below) = _numbers(system["python"]), TESTED_PYTHON
    if not first <= version < below:
        what = f"Python {system['python']} is outside of what is tested, {_range(first, below)}"
        found.append(Problem("warning", what, "make a virtual environment with Python 3.12"))
    if system["system"] == "Darwin" and system["machine"] == "x86_64":
        apple = system["chip"].startswith("Apple")
        what = "this Python is an Intel build under Rosetta" if apple else "an Intel Mac: MLX needs Apple silicon"
        remedy = "install an arm64 Python: MLX needs it" if apple else "use --backend torch"
        found.append(Problem("error" if apple else "warning", what, remedy))
    if system["macos"] and _numbers(system["macos"]) < (14,):
        found.append(Problem("error", f"macOS {system['macos']}: MLX needs macOS 14 or later", "update macOS"))
    return found


def _of_packages(system: dict[str, Any], versions: dict[str, str | None]) -> list[Problem]:
    found = []
    builds = [name for name in ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13") if versions.get(name)]
    for name in BACKENDS:
        version = versions.get(name)
        if version is None:
            found.append(Problem("warning", f"{name} is not installed", _install(name, system)))
            continue
        first, below = TESTED[name]
        if not first <= _numbers(version) < below:
            what = f"{name} {version} is outside of what is tested, {_range(first, below)}"
            found.append(Problem("warning", what, f"pip install '{name}>={_dotted(first)},<{_dotted(below)}'"))
    if len(builds) > 1:
        what = f"{' and '.join(builds)} are both installed: they overwrite each other's files"
        found.append(Problem("error", what, _reinstall("mlx", system, versions)))
    elif versions.get("mlx") and system["system"] == "Linux":
        if not builds:
            what = "mlx is installed without a build for this machine (mlx-cpu or mlx-cuda-13)"
            found.append(Problem("error", what, _install("mlx", system)))
        elif versions[builds[0]] != versions["mlx"]:
            what = f"mlx {versions['mlx']} and {builds[0]} {versions[builds[0]]} do not belong together"
            found.append(Problem("error", what, f"pip install '{builds[0]}=={versions['mlx']}'"))
    return found


def _of_backend(name: str, facts: dict[str, Any]) -> list[Problem]:
    found = []
    if name == "mlx" and facts["blas"]["name"] == "reference":
        what = f"MLX uses its reference BLAS on the CPU, about 25 times slower ({facts['blas']['note']})"
        remedy = "install OpenBLAS (Debian: apt install libopenblas0) or torch, and leave ICENET_BLAS unset"
        found.append(Problem("warning", what, remedy))
    tf32 = facts["tf32"]
    if tf32["enabled"] and tf32["matters"]:
        what = f"{facts['framework']} may compute fp32 at TF32's precision on this GPU ({tf32['switch']})"
        remedy = "parity sets it to 0; for training: MLX_ENABLE_TF32=0"
        if name == "torch":
            remedy = "parity turns it off; for training set both switches to False"
        found.append(Problem("note", what, remedy))
    return found


def _of_gpu(system: dict[str, Any], backends: dict[str, dict[str, Any]]) -> list[Problem]:
    working = {name: facts for name, facts in backends.items() if "error" not in facts}
    blind = [name for name, facts in working.items() if facts["default_device"] == "cpu"]
    ways_out = {
        "mlx": "pip uninstall -y mlx-cpu; pip install 'icenet[cuda]'",
        "torch": "install a CUDA build: pytorch.org",
    }
    return [
        Problem("warning", f"there is an NVIDIA GPU, and {name} does not use it", ways_out[name])
        for name in blind
        if system["nvidia"]
    ]


def _install(name: str, system: dict[str, Any]) -> str:
    if name == "torch":
        return "pip install 'icenet[torch]'"
    if system["system"] == "Linux":
        return "pip install 'icenet[cuda]'" if system["nvidia"] else "pip install 'icenet[cpu]'"
    return (
        "pip install 'mlx>=0.32.1,<0.33'"
        if system["system"] == "Darwin"
        else "MLX has no build here: --backend torch"
    )


def _reinstall(name: str, system: dict[str, Any], versions: dict[str, str | None]) -> str:
    family = [package for package in PACKAGES if package.split("-")[0] == name and versions.get(package)]
    return f"pip uninstall -y {' '.join(family)}; {_install(name, system)}"


def _mend(name: str, error: str, system: dict[str, Any], versions: dict[str, str | None]) -> str:
    if error.startswith("BackendError"):
        return "unset ICENET_BLAS, or name a library that is there"
    if error.startswith("no answer"):
        return f"see where this hangs: {sys.executable} -X importtime -c 'import {name}'"
    return _reinstall(name, system, versions)


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` is (2, 13, 0)."""
    return tuple(int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", version)[0])[:3])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _range(first: tuple[int, ...], below: tuple[int, ...]) -> str:
    return f"at least {_dotted(first)} and below {_dotted(below)}"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _sysctl(key: str) -> str:
    try:
        command = ["/usr/sbin/sysctl", "-n", key]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def render(report: Report, console: Console) -> None:
    """Print the report as tables. Texts are put in as `Text`: rich would take `icenet[cpu]` for markup."""
    from rich.table import Table
    from rich.text import Text

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", title_style="bold", show_header=any(columns))
        for index, column in enumerate(columns):
            made.add_column(column, overflow="fold", style="cyan" if index == 0 else None)
        return made

    system = report.system
    memory = f"{system['memory'] / 2**30:.1f} GiB" if system["memory"] else "unknown"
    machine = table("This machine", "", "")
    rows = {
        "Python": f"{system['python']} ({system['executable']})",
        "platform": system["platform"],
        "chip": f"{system['chip']}, {system['cores']} cores",
        "memory": memory,
        "NVIDIA driver": system["nvidia"] or "none",
        "C++ compiler": system["compiler"] or "none",
        "packages": ", ".join(f"{name} {version}" for name, version in report.versions.items() if version),
    }
    for label, value in rows.items():
        machine.add_row(label, Text(str(value)))
    console.print(machine)

    shown = [_shown(facts) for facts in report.backends.values()]
    backends = table("Backends", "", *report.backends)
    for label in dict.fromkeys(label for column in shown for label in column):
        backends.add_row(label, *(Text(column.get(label, "-")) for column in shown))
    console.print(backends)

    if not report.problems:
        console.print(Text("Nothing is wrong.", style="bold green"))
        return
    styles = {"error": "bold red", "warning": "yellow", "note": "blue"}
    problems = table("Found", "", "what", "the way out")
    for problem in report.problems:
        severity = Text(problem.severity, style=styles[problem.severity])
        problems.add_row(severity, Text(problem.what), Text(problem.remedy))
    console.print(problems)


def _shown(facts: dict[str, Any]) -> dict[str, str]:
    """One backend's column of the table: label to text."""
    if "error" in facts:
        error = facts["error"]
        return {"state": error if error == "not installed" else f"does not work: {error}"}
    blas, tf32 = facts["blas"], facts["tf32"]
    state = ("on" if tf32["enabled"] else "off") + ("" if tf32["matters"] else ", of no effect on this device")
    return {
        "state": "works",
        "version": facts["version"],
        "devices": f"{', '.join(facts['devices'])} (default: {facts['default_device']})",
        "chip": facts["chip"] or "-",
        "BLAS on the CPU": f"{blas['name']} ({blas['note']})" + (f"\n{blas['path']}" if blas["path"] else ""),
        "fp32 matmul of 1024x1024": ", ".join(
            f"{name} {rate:g} GFLOP/s" for name, rate in facts["matmul_gflops"].items()
        ),
        "TF32": f"{state}\n{tf32['switch']}",
        "dtypes": facts["dtypes"],
    }
