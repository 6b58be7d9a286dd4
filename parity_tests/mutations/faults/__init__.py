"""The planted faults, with the tests that must find them.

Each module has the faults of the folders that its name and docstring give, by source file, in its `FAULTS`.
"""

from __future__ import annotations

import importlib
import pkgutil

from faults.fault import Fault

MODULES = [info.name for info in pkgutil.iter_modules(__path__) if info.name != "fault"]

BY_MODULE: dict[str, dict[str, list[Fault]]] = {
    name: importlib.import_module(f"{__name__}.{name}").FAULTS for name in MODULES
}

FAULTS: list[tuple[str, Fault]] = [
    (file, fault) for files in BY_MODULE.values() for file, faults in files.items() for fault in faults
]
"""All faults, each with the path of its source file in the checkout."""
