"""The evidence of the parity tool: a small part of it in each run, all faults and a thousand models if slow."""

from __future__ import annotations

import json
from typing import Any

import evidence
import family_faults
import numpy as np
import pytest
from pairs import Fault

QUICK_MODELS = (2, 5, 7, 13, 17)
"""Seeds of models of several kinds."""
QUICK_FAULTS = (
    ("decoder", "theta"),
    ("cnn", "momentum"),
    ("lstm", "reversed"),
    ("gru", "state"),
    ("graph", "decay"),
    ("diffusion", "tf32"),
)


@pytest.fixture(autouse=True)
def cpu(mlx_on_cpu: None) -> None:
    """Computes on the CPU."""


@pytest.mark.parametrize("seed", QUICK_MODELS)
def test_correct_models_raise_no_alarm(seed: int) -> None:
    found = evidence.check_model(seed)
    assert not found["alarm"], found["alarm"]


def _marks(fault: Fault) -> Any:
    return () if (fault.model, fault.name) in QUICK_FAULTS else pytest.mark.slow


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=_marks(f), id=f"{f.model}-{f.name}") for f in family_faults.FAULTS]
)
def test_faults_are_found_in_their_module_with_their_cause(fault: Fault) -> None:
    found = evidence.check_fault(family_faults.ALL.index(fault))
    assert found["found"] and found["placed"] and (found["caused"] or not fault.cause), found["verdict"]


def test_there_are_a_hundred_faults_of_many_kinds() -> None:
    faults = family_faults.ALL
    assert len({(fault.model, fault.name) for fault in faults}) == len(faults) >= 100
    assert len({fault.kind for fault in faults}) >= 25 and len({fault.model for fault in faults}) >= 11


@pytest.mark.parametrize(
    "model", [pytest.param(m, marks=() if m in ("cnn", "lstm") else pytest.mark.slow) for m in family_faults.MODELS]
)
def test_models_without_a_fault_are_correct(model: str) -> None:
    report = evidence.compared(*family_faults.family(model), {"stages": ["structure", "weights", "forward"]})
    assert report.passed, report


def test_fixed_tolerances() -> None:
    x = np.float32([1.0, 1000.0])
    judged = evidence.judged_by_tolerances([(x, x + np.float32([0, 5e-3]))], "fp32")
    assert judged == {"1e-05": False, "0.0001": False, "0.001": False, "assert_close": False}
    judged = evidence.judged_by_tolerances([(x, x + np.float32([5e-5, 0]))], "fp32")
    assert judged == {"1e-05": False, "0.0001": True, "0.001": True, "assert_close": False}
    assert evidence.judged_by_tolerances([(x, x * np.float32(1.01))], "bf16")["assert_close"]
    assert not any(evidence.judged_by_tolerances([(x, x[:1])], "fp32").values())


def test_the_table_has_both_numbers() -> None:
    accepted = dict.fromkeys(evidence.JUDGES, True)
    faults = [{"found": True, "accepted": accepted}, {"error": "it fails"}]
    models = [{"alarm": "differs", "accepted": {**accepted, "1e-05": False}}]
    lines = evidence.comparison(faults, models).splitlines()
    assert lines[0] == "| judged by | faults missed | false alarms |"
    assert lines[2] == "| `icenet.parity.compare` | 0 of 1 | 1 of 1 |"
    assert lines[3] == "| tolerance 1e-05 | 1 of 1 | 1 of 1 |" and lines[4].endswith("| 1 of 1 | 0 of 1 |")


@pytest.mark.slow
def test_the_program(capfd: pytest.CaptureFixture[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "all.json"
    monkeypatch.setattr("sys.argv", ["evidence.py", "models", "--count", "1000", "--jobs", "2", "--out", str(out)])
    assert evidence.main() == 0
    assert "1000 correct models" in capfd.readouterr().out
    assert len(json.loads(out.read_text())["models"]) == 1000
