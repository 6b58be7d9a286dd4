"""Detection power: each planted fault of `faults/` must be found by the tests that it names.

`pytest -m mutation` plants each in a copy of the checkout. The default run only checks that the list
matches the source.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faults import BY_MODULE, FAULTS
from faults.fault import Fault
from helpers import ROOT

COPIED = ("icenet", "icenet_torch", "parity_tests", "configs", "docs", "README.md", "CHANGELOG.md", "pyproject.toml")
by_name = pytest.mark.parametrize(("file", "fault"), FAULTS, ids=[fault.name for _, fault in FAULTS])


def mutated(fault: Fault, source: str) -> str:
    """Returns a file's text with the fault; the text to replace must occur exactly once."""
    assert source.count(fault.old) == 1, f"the file has the text {source.count(fault.old)} times: {fault.old!r}"
    return source.replace(fault.old, fault.new)


def test_the_list_is_long_and_has_no_duplicates() -> None:
    assert len(FAULTS) >= 40
    changes = {(file, fault.old, fault.new) for file, fault in FAULTS}
    assert len({fault.name for _, fault in FAULTS}) == len(changes) == len(FAULTS)


def test_the_faults_of_a_folder_are_in_one_module() -> None:
    modules: dict[str, set[str]] = {}
    for module, files in BY_MODULE.items():
        for file in files:
            modules.setdefault(str(Path(file).parent), set()).add(module)
    assert {folder: names for folder, names in modules.items() if len(names) > 1} == {}


@by_name
def test_the_fault_fits_the_source(file: str, fault: Fault) -> None:
    """The text to replace occurs once, the result is valid Python, and the named tests exist."""
    source = (ROOT / file).read_text(encoding="utf-8")
    changed = mutated(fault, source)
    assert changed != source
    if file.endswith(".py"):
        ast.parse(changed)
    for test in fault.tests:
        name, _, function = test.partition("::")
        text = (ROOT / "parity_tests" / name).read_text(encoding="utf-8")
        assert re.search(rf"^def {re.escape(function.partition('[')[0])}\(", text, re.MULTILINE), test


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a copy of the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    return copy


def run_tests(checkout: Path, tests: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    """Runs tests of a copy of the checkout as a new process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", *options]
    return subprocess.run(
        [*command, *(f"parity_tests/{test}" for test in tests)],
        cwd=checkout,
        # without byte code, which could be that of the file before the fault was planted
        env={**environment, "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.mutation
@by_name
def test_the_fault_is_found(file: str, fault: Fault, checkout: Path) -> None:
    path = checkout / file
    source = path.read_text(encoding="utf-8")
    path.write_text(mutated(fault, source), encoding="utf-8")
    try:
        done = run_tests(checkout, fault.tests, "-x", "-n", "0")
    finally:
        path.write_text(source, encoding="utf-8")
    assert done.returncode == 1, f"not found: {fault.name}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


@pytest.mark.mutation
def test_the_named_tests_pass_without_a_fault(checkout: Path) -> None:
    tests = sorted({test for _, fault in FAULTS for test in fault.tests})
    done = run_tests(checkout, tests, "-n", "0")
    assert done.returncode == 0, done.stdout[-3000:]
