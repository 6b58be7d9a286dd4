"""`icenet doctor`: reports the packages, the machine and the backends, and lists problems with their fixes.

Each backend is examined in a separate process (`icenet.tools.environment`, `icenet_torch.tools.environment`). This
module imports no framework, so one that fails to import, crashes or hangs is reported like any other problem.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icenet.commands import isolated
from icenet.core.host import processor
from icenet.core.host.threads import usable_cores
from icenet.core.report.console import new_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

BACKENDS = {"mlx": "icenet.tools.environment", "torch": "icenet_torch.tools.environment"}
MLX_BUILDS = ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")
"""The packages that hold MLX's Linux builds. They overwrite each other's files."""
PACKAGES = (
    *("icenet", "mlx", *MLX_BUILDS, "mlx-metal", "torch"),
    *("numpy", "safetensors", "pydantic", "pyyaml", "rich", "click", "matplotlib"),
)
TESTED = {"mlx": ((0, 32, 1), (0, 33)), "torch": ((2, 6), (2, 14))}
"""The versions that the tests cover: from the first, up to and not including the second."""
TESTED_PYTHON = ((3, 10), (3, 14))
SEVERITIES = {"error": "bold red", "warning": "yellow", "note": "blue"}
"""The severities, the worst first, and their styles."""
_TIMEOUT = 120.0
"""Seconds that a backend may take before it counts as hanging."""
_WIDEST = 160
"""Columns of a console above which cells are wrapped here, to `_CELL` columns."""
_CELL = 48


@dataclass(frozen=True)
class Problem:
    """A problem and its fix.

    Attributes:
        severity: `error` (a backend does not work), `warning` (slow or untested) or `note`.
        what: The problem.
        remedy: How to fix it.
    """

    severity: str
    what: str
    remedy: str


@dataclass(frozen=True)
class Report:
    """The result of `icenet doctor`.

    Attributes:
        system: Python and the machine (see `system_facts`).
        versions: Package name to version; None if it is not installed.
        backends: `mlx` and `torch` to their environment, or to `{"error": reason}`.
        problems: The worst first.
    """

    system: dict[str, Any]
    versions: dict[str, str | None]
    backends: dict[str, dict[str, Any]]
    problems: list[Problem]

    @property
    def ok(self) -> bool:
        """Whether at least one backend works."""
        return any("error" not in facts for facts in self.backends.values())

    def as_dict(self) -> dict[str, Any]:
        """Returns the report in JSON types."""
        return {"ok": self.ok, **dataclasses.asdict(self)}

    def render(self, console: Console | None = None) -> None:
        """Prints the report as tables."""
        if console is None:
            console = new_console()
        # in a file, lines have their full length; words are not divided, because a path would be, too
        wrap = _wrapped if console.width > _WIDEST else str
        console.print(_machine_table(self, wrap))
        console.print(_backend_table(self, wrap))
        if self.problems:
            console.print(_problem_table(self, wrap))
        else:
            console.print("No problems found.", style="bold green")


def examine() -> Report:
    """Examines this machine and each backend; takes about 2 s."""
    system, versions = system_facts(), package_versions()
    backends = {name: backend_facts(name, _TIMEOUT) for name in BACKENDS}
    return Report(system, versions, backends, find_problems(system, versions, backends))


def package_versions() -> dict[str, str | None]:
    """Returns the installed version of each of PACKAGES; None if it is not installed."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def system_facts() -> dict[str, Any]:
    """Returns Python, platform, chip, usable cores, memory in bytes, NVIDIA driver and C++ compiler."""
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
        "cores": usable_cores(),
        "memory": memory or None,
        "nvidia": driver[1] if driver else "present" if Path("/dev/nvidiactl").exists() else None,
        "compiler": shutil.which("g++"),
    }


def backend_facts(framework: str, timeout: float) -> dict[str, Any]:
    """Returns a backend's environment, computed in a separate process, or `{"error": reason}`."""
    if importlib.util.find_spec(framework) is None:  # does not import the package
        return {"error": "not installed"}
    try:
        facts: dict[str, Any] = isolated.call(BACKENDS[framework], "environment", timeout=timeout)
    except isolated.IsolatedError as error:
        return {"error": str(error)}
    return facts


def find_problems(
    system: dict[str, Any], versions: dict[str, str | None], backends: dict[str, dict[str, Any]]
) -> list[Problem]:
    """Returns the problems of a machine and their fixes, the worst first. The arguments are those of `Report`."""
    problems = [*_python_problems(system), *_package_problems(system, versions)]
    for name, facts in backends.items():
        if "error" not in facts:
            problems += _backend_problems(name, facts, has_nvidia=bool(system["nvidia"]))
        elif versions.get(name):
            what = f"{name} does not work: {facts['error']}"
            problems.append(Problem("error", what, _fix_backend(name, facts["error"], system, versions)))
    if system["compiler"] is None and "error" not in backends.get("mlx", {"error": ""}):
        what = "no C++ compiler (g++): MLX cannot compile models on the CPU (compile_model)"
        problems.append(Problem("note", what, "leave compile_model off on the CPU, or: apt install g++"))
    return sorted(problems, key=lambda problem: list(SEVERITIES).index(problem.severity))


def _python_problems(system: dict[str, Any]) -> list[Problem]:
    problems = []
    if not _is_tested(system["python"], TESTED_PYTHON):
        what = f"Python {system['python']} is not a tested version ({_range(TESTED_PYTHON)})"
        problems.append(Problem("warning", what, "create a virtual environment with Python 3.12"))
    if system["system"] == "Darwin" and system["machine"] == "x86_64":
        if system["chip"].startswith("Apple"):
            what = "this Python is an Intel build that runs under Rosetta; MLX needs an arm64 build"
            problems.append(Problem("error", what, "install an arm64 Python"))
        else:
            problems.append(Problem("warning", "an Intel Mac: MLX needs Apple silicon", "use --backend torch"))
    if system["macos"] and _numbers(system["macos"]) < (14,):
        problems.append(Problem("error", f"macOS {system['macos']}: MLX needs macOS 14 or later", "update macOS"))
    return problems


def _package_problems(system: dict[str, Any], versions: dict[str, str | None]) -> list[Problem]:
    problems = []
    for name, tested in TESTED.items():
        version = versions.get(name)
        if version is None:
            problems.append(Problem("warning", f"{name} is not installed", _install(name, system)))
        elif not _is_tested(version, tested):
            what = f"{name} {version} is not a tested version ({_range(tested)})"
            first, below = map(_dotted, tested)
            problems.append(Problem("warning", what, f"pip install '{name}>={first},<{below}'"))
    builds = [name for name in MLX_BUILDS if versions.get(name)]
    if len(builds) > 1:
        what = f"{' and '.join(builds)} are both installed: they overwrite each other's files"
        problems.append(Problem("error", what, _reinstall("mlx", system, versions)))
    elif versions.get("mlx") and system["system"] == "Linux":
        if not builds:
            what = "mlx is installed without a build for this machine (mlx-cpu or mlx-cuda-13)"
            problems.append(Problem("error", what, _install("mlx", system)))
        elif versions[builds[0]] != versions["mlx"]:
            what = f"mlx {versions['mlx']} and {builds[0]} {versions[builds[0]]} must have the same version"
            problems.append(Problem("error", what, f"pip install '{builds[0]}=={versions['mlx']}'"))
    return problems


def _backend_problems(name: str, facts: dict[str, Any], has_nvidia: bool) -> list[Problem]:
    """Returns the problems of a backend that works."""
    problems = []
    if name == "mlx" and facts["blas"]["name"] == "reference":
        what = f"MLX uses its reference BLAS on the CPU, about 25 times slower ({facts['blas']['note']})"
        remedy = "install OpenBLAS (Debian: apt install libopenblas0) or torch, and leave ICENET_BLAS unset"
        problems.append(Problem("warning", what, remedy))
    if name == "mlx" and facts["blas"]["name"] == "torch" and processor.is_amd_with_avx512():
        what = "MLX's products on the CPU are those of MKL in PyTorch, which uses no AVX-512 on AMD processors"
        remedy = "OpenBLAS does, and is up to twice as fast (Debian: apt install libopenblas0)"
        problems.append(Problem("note", what, remedy))
    if has_nvidia and facts["default_device"] == "cpu":
        remedy = {
            "mlx": "pip uninstall -y mlx-cpu; pip install 'icenet[cuda]'",
            "torch": "install a CUDA build: pytorch.org",
        }[name]
        problems.append(Problem("warning", f"there is an NVIDIA GPU, and {name} does not use it", remedy))
    if facts["tf32"]["used"]:
        what = f"{facts['framework']} computes fp32 products in TF32 on this GPU, although allow_tf32 is false"
        remedy = {"mlx": "MLX_ENABLE_TF32=0", "torch": "NVIDIA_TF32_OVERRIDE=0"}[name]
        problems.append(Problem("warning", what, f"set the environment variable {remedy}"))
    return problems


def _install(name: str, system: dict[str, Any]) -> str:
    if name == "torch":
        return "pip install 'icenet[torch]'"
    if system["system"] == "Linux":
        return "pip install 'icenet[cuda]'" if system["nvidia"] else "pip install 'icenet[cpu]'"
    if system["system"] == "Darwin":
        return "pip install 'mlx>=0.32.1,<0.33'"
    return "MLX has no build for this platform: use --backend torch"


def _reinstall(name: str, system: dict[str, Any], versions: dict[str, str | None]) -> str:
    packages = [package for package in PACKAGES if package.split("-")[0] == name and versions.get(package)]
    return f"pip uninstall -y {' '.join(packages)}; {_install(name, system)}"


def _fix_backend(name: str, error: str, system: dict[str, Any], versions: dict[str, str | None]) -> str:
    """Returns the fix for a backend that does not work."""
    if error.startswith("ICENET_BLAS"):
        return "unset ICENET_BLAS, or set it to an existing library"
    if error.startswith("no result within"):
        return f"find the import that hangs: {sys.executable} -X importtime -c 'import {name}'"
    return _reinstall(name, system, versions)


Version = tuple[int, ...]


def _is_tested(version: str, tested: tuple[Version, Version]) -> bool:
    first, below = tested
    return first <= _numbers(version) < below


def _numbers(version: str) -> Version:
    """Returns the numbers of a version: `2.13.0+cpu` is (2, 13, 0)."""
    return tuple(int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", version)[0])[:3])


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


def _range(tested: tuple[Version, Version]) -> str:
    first, below = map(_dotted, tested)
    return f"at least {first} and below {below}"


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


def _table(title: str, *columns: str) -> Table:
    """Returns an empty table. Cells must be `Text`: rich would interpret `icenet[cpu]` as markup."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", style="cyan" if index == 0 else None)
    return table


def _wrapped(text: str) -> str:
    """Returns a text whose lines are short, except for longer words."""
    wrap = functools.partial(textwrap.wrap, width=_CELL, break_long_words=False, break_on_hyphens=False)
    return "\n".join(part for line in text.splitlines() for part in wrap(line))


def _machine_table(report: Report, wrap: Callable[[str], str]) -> Table:
    from rich.text import Text

    system = report.system
    rows = {
        "Python": f"{system['python']} ({system['executable']})",
        "platform": system["platform"],
        "chip": f"{system['chip']}, {system['cores']} cores",
        "memory": f"{system['memory'] / 2**30:.1f} GiB" if system["memory"] else "unknown",
        "NVIDIA driver": system["nvidia"] or "none",
        "C++ compiler": system["compiler"] or "none",
        "packages": ", ".join(f"{name} {version}" for name, version in report.versions.items() if version),
    }
    table = _table("Machine", "", "")
    for label, value in rows.items():
        table.add_row(label, Text(wrap(str(value))))
    return table


def _backend_table(report: Report, wrap: Callable[[str], str]) -> Table:
    from rich.text import Text

    columns = [_backend_column(facts) for facts in report.backends.values()]
    table = _table("Backends", "", *report.backends)
    for label in dict.fromkeys(label for column in columns for label in column):
        table.add_row(label, *(Text(wrap(column.get(label, "-"))) for column in columns))
    return table


def _backend_column(facts: dict[str, Any]) -> dict[str, str]:
    """Returns one backend's column of the table: label to text."""
    if "error" in facts:
        error = facts["error"]
        return {"state": error if error == "not installed" else f"does not work: {error}"}
    library, tf32, threads = facts["blas"], facts["tf32"], facts["decoding_threads"]
    precision = "TF32" if tf32["used"] else "full fp32"
    choice = "TF32 with allow_tf32: true" if tf32["available"] else "this device has no TF32"
    rates = (f"{name} {rate:g} GFLOP/s" for name, rate in facts["matmul_gflops"].items())
    return {
        "state": "works",
        "version": facts["version"],
        "devices": f"{', '.join(facts['devices'])} (default: {facts['default_device']})",
        "chip": facts["chip"] or "-",
        "BLAS on the CPU": f"{library['name']} ({library['note']})"
        + (f"\n{library['path']}" if library["path"] else ""),
        "fp32 matmul of 1024x1024": ", ".join(rates),
        "small operations on the CPU": "\n".join(f"{name} {us:g} us" for name, us in facts["small_us"].items()),
        "threads for decoding": f"{threads['chosen']} of {threads['of']}" if threads["of"] else "not adjustable",
        "fp32 products": f"{precision}; {choice}",
        "dtypes": facts["dtypes"],
    }


def _problem_table(report: Report, wrap: Callable[[str], str]) -> Table:
    from rich.text import Text

    table = _table("Problems", "severity", "problem", "fix")
    for problem in report.problems:
        severity = Text(problem.severity, style=SEVERITIES[problem.severity])
        table.add_row(severity, Text(wrap(problem.what)), Text(wrap(problem.remedy)))
    return table
