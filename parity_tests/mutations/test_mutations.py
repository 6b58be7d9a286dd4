"""Detection power: each planted fault of `faults.py` must be found by the tests that it names.

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
from faults import FAULTS, Fault
from helpers import ROOT

COPIED = ("icenet", "icenet_torch", "parity_tests", "configs", "docs", "README.md", "CHANGELOG.md", "pyproject.toml")
by_name = pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])


def mutated(fault: Fault, source: str) -> str:
    """Returns a file's text with the fault; the text to replace must occur exactly once."""
    assert source.count(fault.old) == 1, f"{fault.file} has the text {source.count(fault.old)} times: {fault.old!r}"
    return source.replace(fault.old, fault.new)


def test_the_list_is_long_and_has_no_duplicates() -> None:
    assert len(FAULTS) >= 40
    assert len({fault.name for fault in FAULTS}) == len({(f.file, f.old, f.new) for f in FAULTS}) == len(FAULTS)


@by_name
def test_the_fault_fits_the_source(fault: Fault) -> None:
    """The text to replace occurs once, the result is valid Python, and the named tests exist."""
    source = (ROOT / fault.file).read_text(encoding="utf-8")
    changed = mutated(fault, source)
    assert changed != source
    if fault.file.endswith(".py"):
        ast.parse(changed)
    for test in fault.tests:
        file, _, function = test.partition("::")
        text = (ROOT / "parity_tests" / file).read_text(encoding="utf-8")
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
def test_the_fault_is_found(fault: Fault, checkout: Path) -> None:
    file = checkout / fault.file
    source = file.read_text(encoding="utf-8")
    file.write_text(mutated(fault, source), encoding="utf-8")
    try:
        done = run_tests(checkout, fault.tests, "-x", "-n", "0")
    finally:
        file.write_text(source, encoding="utf-8")
    assert done.returncode == 1, f"not found: {fault.name}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


@pytest.mark.mutation
def test_the_named_tests_pass_without_a_fault(checkout: Path) -> None:
    tests = sorted({test for fault in FAULTS for test in fault.tests})
    done = run_tests(checkout, tests, "-n", "0")
    assert done.returncode == 0, done.stdout[-3000:]
