"""Import rules: which folder imports which, no cycles, and each backend without the other."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from helpers import ROOT, python
from source_tree import (
    ALL,
    BACKEND_FOLDERS,
    MLX,
    SHARED,
    TORCH,
    cycles,
    import_graph,
    imports,
    is_in,
    is_standard,
    violations,
)

import icenet

LAYERS = [
    ["core.errors", "core.messages", "core.importing", "core.dtypes", "core.host"],
    ["core.rng", "core.files", "core.listing"],
    ["core.config", "core.tokenizers", "core.porting"],
    ["core.report"],
    ["core.backends"],
    ["core.weights", "core.nn"],
    ["core.generation"],
    ["core.models", "core.distributed", "core.embedding"],
    ["core.families"],
    ["core.engine"],
    ["core.data"],
    ["core.runs"],
    ["core.training"],
    ["core.conversion"],
    ["parity"],
    ["api"],
    ["commands"],
    ["cli"],
]
"""The folders of `icenet` that know no framework. Each imports folders of the lines above it, and the public API."""

PACKAGES = ("numpy", "ml_dtypes", "pydantic", "yaml", "safetensors", "typing_extensions", "filelock")
"""What the shared code imports at the top of a file, next to the standard library."""
LATE_PACKAGES = (
    "rich",
    "matplotlib",
    "PIL",
    "sklearn",
    "tokenizers",
    "jinja2",
    "tensorboard",
    "tensorboardX",
    "IPython",
    "gguf",
    "huggingface_hub",
)
"""What it imports inside functions: slow to import, or an optional dependency."""

PUBLIC_API = {"icenet", *(f"icenet.{name}" for name in icenet.__all__)}
TOP = ("icenet.blas", "icenet._deprecated")
IMPORT_BY_NAME = {
    *("icenet.core.backends", "icenet.core.config.user_code", "icenet.core.config.imported", "icenet._deprecated"),
    *("icenet.porting.load", "icenet_torch.porting.sources", "icenet.cli.options", "icenet", "icenet.parity"),
}
"""They choose a backend, run the user's file, open the model of `model.path`, redirect old names, run the source of a
port, import torchvision, timm and transformers, which are optional, and import the work of a command and the
public names of `icenet` and `icenet.parity`."""


# ---- on the source ----------------------------------------------------------------------------------------


def test_every_folder_has_a_layer() -> None:
    listed = {f"icenet.{folder}" for layer in LAYERS for folder in layer}
    inner = {name for name in SHARED if not is_in(name, *listed, *TOP)}
    assert inner == {"icenet", "icenet.__main__", "icenet.core"}
    assert listed <= set(SHARED)
    assert {"models", "nn", "generation", "engine", "tools"} <= set(BACKEND_FOLDERS)


def layer_violations() -> list[str]:
    below = [*TOP, "icenet.core.errors"]  # errors are raised by the other folders of their layer, too
    found = []
    for layer in LAYERS:
        for folder in layer:
            own = f"icenet.{folder}"
            files = {name: path for name, path in SHARED.items() if is_in(name, own)}
            allowed = (own, *below)
            found += violations(
                files,
                lambda n, allowed=allowed: (
                    not is_in(n, "icenet", "icenet_torch") or is_in(n, *allowed) or n in PUBLIC_API
                ),
                types=False,
            )
        below += [f"icenet.{folder}" for folder in layer]
    return found


def test_folders_import_only_the_layers_below() -> None:
    """Imports for type checkers may name a layer above."""
    assert layer_violations() == []


def test_shared_code_imports_no_framework() -> None:
    allowed = ("icenet", "click", *PACKAGES, *LATE_PACKAGES)
    backends = tuple(f"icenet.{folder}" for folder in BACKEND_FOLDERS)
    plugin = {"icenet.parity.pytest_plugin": SHARED["icenet.parity.pytest_plugin"]}
    others = {name: path for name, path in SHARED.items() if name not in plugin}
    assert not violations(others, lambda n: is_standard(n) or (is_in(n, *allowed) and not is_in(n, *backends)))
    assert not violations(plugin, lambda n: is_standard(n) or is_in(n, "pytest", "icenet.parity"))


def test_only_the_command_line_imports_click() -> None:
    outside = {name: path for name, path in SHARED.items() if not is_in(name, "icenet.cli", "icenet.commands")}
    assert not violations(outside, lambda name: not is_in(name, "click"))


def test_backends_import_the_core_and_their_own_framework() -> None:
    shared = ("numpy", "ml_dtypes", "icenet.core", "icenet.parity", "icenet._deprecated")
    ours = ("mlx", "icenet.blas", "icenet.nn", *MLX)
    theirs = ("torch", "triton", "icenet_torch")
    sides = (".tools.peers", ".tools.loops")  # of icenet bench
    for modules, own, packages in ((MLX, ours, ("mlx_lm",)), (TORCH, theirs, ("transformers", "torchvision"))):
        peers = {name: path for name, path in modules.items() if name.endswith(sides)}
        others = {name: path for name, path in modules.items() if name not in peers}
        for found, names in ((others, own), (peers, (*own, *packages))):
            allowed = (*shared, *names)
            assert not violations(found, lambda n, allowed=allowed: is_standard(n) or is_in(n, *allowed))


def test_there_is_no_import_cycle() -> None:
    """Neither between modules, late imports included, nor between folders."""
    assert cycles(import_graph(ALL)) == []


def unguarded(source: str) -> list[int]:
    """Returns the lines that import mlx without a module-level import of icenet.blas before them."""
    tree = ast.parse(source)
    guards = [
        node.lineno
        for node in tree.body
        if (isinstance(node, ast.Import) and any(alias.name == "icenet.blas" for alias in node.names))
        or (
            isinstance(node, ast.ImportFrom) and node.module == "icenet" and any(a.name == "blas" for a in node.names)
        )
    ]
    first = min(guards, default=sys.maxsize)
    uses = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        if any(name.split(".")[0] == "mlx" for name in names) and node.lineno < first:
            uses.append(node.lineno)
    return uses


def test_a_fast_blas_is_loaded_before_mlx() -> None:
    """A module that imports MLX imports `icenet.blas` first. After `import mlx.core` it has no effect."""
    sources = {name: path.read_text(encoding="utf-8") for name, path in ALL.items() if is_in(name, "icenet")}
    assert {name: lines for name, source in sources.items() if (lines := unguarded(source))} == {}
    assert len([name for name in MLX if "import mlx" in sources[name]]) > 10


def test_the_core_imports_slow_packages_late() -> None:
    for path in (path for name, path in SHARED.items() if is_in(name, "icenet.core")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                name = node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name
                assert not is_in(name, *LATE_PACKAGES), f"{path.relative_to(ROOT)}:{node.lineno}: {name}"


def test_imports_by_name_are_in_few_places() -> None:
    """The rules above do not see an import by name."""
    pattern = re.compile(r"import_module|__import__|runpy|\bexec\(")
    found = {name for name, path in ALL.items() if pattern.search(path.read_text(encoding="utf-8"))}
    assert found <= IMPORT_BY_NAME
    assert found


def test_one_module_is_imported_by_a_fixed_name() -> None:
    """The model at `model.path` has a configuration of its own, so what opens it is above `core.config`."""
    fixed = re.compile(r"(?:import_module|__import__)\(\s*[\"'](icenet[\w.]*)[\"']")
    found = {name: fixed.findall(path.read_text(encoding="utf-8")) for name, path in ALL.items()}
    assert {name: targets for name, targets in found.items() if targets} == {
        "icenet.core.config.imported": ["icenet.core.runs.open_model"]
    }


def test_these_rules_can_fail(tmp_path: Path) -> None:
    assert unguarded("import icenet.blas\nimport mlx.core as mx\n") == []
    assert unguarded("import mlx.core as mx\nimport icenet.blas\n") == [1]
    assert unguarded("def f():\n    from mlx import nn\n") == [2]
    assert unguarded("from icenet import blas\nfrom mlx.utils import tree_map\n") == []
    file = tmp_path / "x.py"
    file.write_text("def f():\n    import torch.nn\n    from mlx import core\n    from icenet import models\n")
    assert [name for _, name in imports(file)] == ["torch.nn", "mlx.core", "icenet.models"]
    assert not is_standard("torch") and not is_in("icenet.core2", "icenet.core") and is_in("a.b", "a.b")
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]
    assert cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    with pytest.raises(AssertionError, match=r"No module named .torch."):
        python("import torch", blocked=["torch"])


# ---- in fresh processes -----------------------------------------------------------------------------------

LOADED = """
import sys
def loaded(*names):
    return sorted({name.partition(".")[0] for name in sys.modules} & set(names))
"""
FRAMEWORKS = 'print(*loaded("mlx", "torch", "icenet_torch", "tensorflow", "jax"))'
LOADED_NOW = 'print(*loaded("mlx", "torch", "icenet_torch"))'


def fresh(program: str, *blocked: str) -> str:
    return python(LOADED + program, blocked=blocked)


def test_the_public_api_loads_no_framework() -> None:
    assert fresh(f"import icenet; [getattr(icenet, name) for name in icenet.__all__]; {FRAMEWORKS}") == ""
    program = "names = icenet.parity.__all__; [getattr(icenet.parity, name) for name in names]; "
    assert fresh(f"import icenet; {program} assert {{*names}} <= {{*dir(icenet.parity)}}; {FRAMEWORKS}") == ""


def test_the_shared_modules_work_without_a_framework() -> None:
    program = "".join(f"import {name}\n" for name in sorted(set(SHARED) - {"icenet.__main__"}))
    assert fresh(program + FRAMEWORKS, "mlx", "torch", "icenet_torch") == ""


def test_help_loads_no_framework() -> None:
    program = """
import atexit, icenet.cli.main
atexit.register(lambda: print("LOADED", *loaded("mlx", "torch", "icenet_torch")))
icenet.cli.main.main(["--help"])
"""
    output = fresh(program)
    assert output.splitlines()[-1] == "LOADED" and "Usage" in output


USE = """
import sys
import numpy as np
from {package}.models import TransformerModel
from {package}.models.base import BaseModel
from icenet.core.config import ModelConfig, Config
from icenet.core import backends
import {modules}
sizes = dict(type="transformer", hidden_size=8, num_layers=1, num_heads=2, vocab_size=11, max_seq_length=8)
model = TransformerModel(ModelConfig(**sizes))
assert model.generate([[1, 2], [3]], max_new_tokens=3, seed=1).shape == (2, 5)
batch = {{"inputs": np.ones((2, 4), np.int32), "labels": np.ones((2, 4), np.int32)}}
for model in (sizes, dict(type="lstm", hidden_size=8, num_layers=1, vocab_size=11)):
    engine = backends.engine(Config.from_dict({{"model": model}}), {backend!r})
    assert engine.read(engine.train_step(batch, 0, 1e-3)).finite
assert "torch._dynamo" not in sys.modules  # the compiler, whose import takes seconds
assert backends.resolve("auto") == {backend!r}
"""


@pytest.mark.parametrize(
    ("backend", "package", "other", "found"),
    [("mlx", "icenet", "torch", "mlx"), ("torch", "icenet_torch", "mlx", "icenet_torch torch")],
)
def test_each_backend_works_without_the_other(backend: str, package: str, other: str, found: str) -> None:
    own = MLX if backend == "mlx" else TORCH
    everything = ", ".join(
        name for name in own if not is_in(name, "icenet_torch.nn.kernels", "icenet_torch.nn.linear_kernels")
    )
    assert fresh(USE.format(package=package, backend=backend, modules=everything) + LOADED_NOW, other) == found


@pytest.mark.parametrize("missing", ["mlx", "torch"])
def test_a_missing_backend_is_one_line_with_the_remedy(missing: str) -> None:
    program = f"""
from icenet.core import backends
from icenet.core.errors import BackendError
try:
    backends.resolve({missing!r})
except BackendError as error:
    print(error)
"""
    message = fresh(program, missing)
    assert f"{missing} is not installed" in message and "pip install" in message and "\n" not in message
