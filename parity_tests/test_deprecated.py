"""Old names of documented modules: each import warns once and returns the new module."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from icenet._deprecated import RENAMED


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_warns_and_is_the_new_module(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=RENAMED[old]) as caught:
        module = importlib.import_module(old)
    assert len(caught) == 1 and caught[0].filename != "<frozen importlib._bootstrap>"
    new = importlib.import_module(RENAMED[old])
    assert module is new and new.__name__ == RENAMED[old] and new.__spec__.name == RENAMED[old]


def test_the_documented_imports_work_in_a_fresh_process() -> None:
    code = """
from icenet.core.trainer import Trainer
from icenet.core.convert import convert
from icenet.core import recurrent_weights
import icenet.probe, icenet_torch.probe
icenet.probe.recording, icenet_torch.probe.recording
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_other_missing_modules_stay_missing() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("icenet.core.no_such_module")
