"""Old names of documented modules. Importing one warns and returns the module under its new name."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

RENAMED = {
    "icenet.core.checkpoint": "icenet.core.runs.checkpoint",
    "icenet.core.convert": "icenet.core.weights.convert",
    "icenet.core.recurrent_weights": "icenet.core.weights.torch_rnn",
    "icenet.core.trainer": "icenet.core.training.trainer",
    "icenet.core.training.checkpoint": "icenet.core.runs.checkpoint",
    "icenet.core.training.early_stopping": "icenet.core.runs.early_stopping",
    "icenet.core.training.open_model": "icenet.core.runs.open_model",
    "icenet.core.training.run_folder": "icenet.core.runs.run_folder",
    "icenet.core.training.saved_model": "icenet.core.runs.saved_model",
    "icenet.parity.locate": "icenet.parity.configuration.locate",
    "icenet.parity.run": "icenet.parity.configuration.run",
    "icenet.probe": "icenet.tools.probe",
    "icenet_torch.probe": "icenet_torch.tools.probe",
}


class _Finder:  # without the classes of importlib.abc, whose import takes a tenth of the time of `icenet --help`
    """Imports the modules of `RENAMED`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in RENAMED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """Returns None: the module is made as usual."""

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        warnings.warn(f"{old} is deprecated; import {RENAMED[old]}", DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(RENAMED[old])  # the import system returns this entry


sys.meta_path.append(_Finder())
