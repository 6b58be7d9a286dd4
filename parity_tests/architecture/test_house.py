"""The house's rules, each proven in a fresh process or on the source itself: who may import whom, that each backend
lives without the other, and that `icenet_torch` mirrors `icenet` file for file, class for class, line for line."""

from __future__ import annotations

import ast
import difflib
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FRONT = {"__init__", "__main__", "cli", "cli_bench", "cli_options", "quickstart"}
"""The modules of `icenet` that belong to no backend, beside its folders `core` and `parity`."""


def modules(folder: str) -> dict[str, Path]:
    """Every module below a folder of the checkout, by its dotted name."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


CORE, PARITY = modules("icenet/core"), modules("icenet/parity")
FRAMELESS = {**CORE, **PARITY}
FRONT_DOOR = {
    name: path for name, path in modules("icenet").items() if path.parent.name == "icenet" and path.stem in FRONT
}
MLX = {name: path for name, path in modules("icenet").items() if name not in FRAMELESS and name not in FRONT_DOOR}
TORCH = modules("icenet_torch")


# ---- in fresh processes -----------------------------------------------------------------------------------

PRELUDE = """
import importlib.machinery, sys
class Finder:
    find_distributions = importlib.machinery.PathFinder.find_distributions
    @staticmethod
    def find_spec(name, path=None, target=None):
        hidden = name.partition(".")[0] in {blocked!r}
        return None if hidden else importlib.machinery.PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
def loaded(*names):
    return sorted({{name.partition(".")[0] for name in sys.modules}} & set(names))
def forget():
    for name in [name for name in sys.modules if name.partition(".")[0] in ("icenet", "icenet_torch")]:
        del sys.modules[name]
"""


def python(code: str, *blocked: str) -> str:
    """What code prints in a process of its own, where the `blocked` packages are not installed."""
    program = PRELUDE.format(blocked=set(blocked)) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


FRAMEWORKS = 'print(*loaded("mlx", "torch", "icenet_torch", "tensorflow", "jax"))'


def test_the_front_door_loads_no_framework() -> None:
    assert python(f"import icenet; {FRAMEWORKS}") == ""
    assert (
        python(f"import icenet; icenet.__version__; [getattr(icenet, n) for n in icenet.__all__]; {FRAMEWORKS}") == ""
    )


@pytest.mark.parametrize("module", sorted(set(FRONT_DOOR) - {"icenet", "icenet.__main__"}))
def test_the_other_front_modules_load_no_framework(module: str) -> None:
    assert python(f"import {module}; {FRAMEWORKS}") == ""


@pytest.mark.skipif("icenet.cli.main" not in FRONT_DOOR, reason="no command yet")
def test_the_commands_help_loads_no_framework() -> None:
    code = """
    import atexit, icenet.cli.main
    atexit.register(lambda: print("LOADED", *loaded("mlx", "torch", "icenet_torch")))
    icenet.cli.main(["--help"])
    """
    done = python(code, "mlx", "torch")
    assert done.splitlines()[-1] == "LOADED" and "Usage" in done


def test_each_module_of_core_and_parity_lives_without_a_framework() -> None:
    """Alone, too: each is imported first, so none works only because another came before it."""
    code = f"""
    import importlib
    for name in {sorted(FRAMELESS)}:
        forget()
        importlib.import_module(name)
    {FRAMEWORKS}
    """
    assert python(code, "mlx", "torch", "icenet_torch") == ""


USE = """
import numpy as np
from {package}.models import TransformerModel
from {package}.models.base import BaseModel
from icenet.core.config import ModelConfig, Config
from icenet.core import backends
import {package}.tools.probe, {package}.tools.environment, {package}.engine.optimizers
sizes = dict(type="transformer", hidden_size=8, num_layers=1, num_heads=2, vocab_size=11, max_seq_length=8)
model = TransformerModel(ModelConfig(**sizes))
assert model.generate([[1, 2], [3]], max_new_tokens=3, seed=1).shape == (2, 5)
engine = backends.engine(Config.from_dict({{"model": sizes}}), {name!r})
batch = {{"inputs": np.ones((2, 4), np.int32), "labels": np.ones((2, 4), np.int32)}}
assert engine.read(engine.train_step(batch, 0, 1e-3)).finite
assert backends.resolve("auto") == {name!r}
print(*loaded("mlx", "torch", "icenet_torch"))
"""


@pytest.mark.parametrize("name", ["mlx", "torch"])
def test_each_backend_works_without_the_other(name: str) -> None:
    package, other = {"mlx": ("icenet", "torch"), "torch": ("icenet_torch", "mlx")}[name]
    code = USE.format(package=package, name=name)
    assert python(code, other) == {"mlx": "mlx", "torch": "icenet_torch torch"}[name]


def test_each_backend_leaves_the_other_alone() -> None:
    """Also where both are installed."""
    everything = "; ".join(f"import {name}" for name in MLX)
    assert python(f'{everything}; print(*loaded("mlx", "torch", "icenet_torch"))') == "mlx"
    everything = "; ".join(f"import {name}" for name in TORCH if not name.endswith(".kernels"))  # needs Triton
    assert python(f'{everything}; print(*loaded("mlx", "torch", "icenet_torch"))') == "icenet_torch torch"


@pytest.mark.parametrize("missing", ["mlx", "torch"])
def test_a_missing_backend_is_one_line_with_the_remedy(missing: str) -> None:
    code = f"""
    from icenet.core import backends
    from icenet.core.errors import BackendError
    try:
        backends.resolve({missing!r})
    except BackendError as error:
        print(error)
    """
    told = python(code, missing)
    assert told.startswith(f"backend {missing} is not installed: pip install ") and "\n" not in told


def test_mlx_is_never_imported_before_the_blas_is_chosen() -> None:
    """Whichever module of the MLX side comes first: after `import mlx.core` it would be too late."""
    code = f"""
    import importlib
    class Watch:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.partition(".")[0] == "mlx":
                seen.append("icenet.blas" in sys.modules)
                raise ModuleNotFoundError(name)
    sys.meta_path.insert(0, Watch)
    for name in {sorted(MLX)}:
        forget()
        seen = []
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            pass
        if not all(seen):
            print(name)
    """
    assert python(code) == ""


# ---- on the source ----------------------------------------------------------------------------------------


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every import statement of a file, early or late, with its line; for `from a import b` both a and a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def strangers(files: dict[str, Path], allowed: Any) -> list[str]:
    """The imports of files that `allowed(name)` says no to, as `file:line: name`."""
    return [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in files.values()
        for line, name in imports(path)
        if not allowed(name)
    ]


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


# what core imports late: to draw and to show, to read images and text
DRAWN_LATE = ("rich", "matplotlib", "PIL", "sklearn", "tokenizers", "tensorboard", "IPython")
# what it needs beside the standard library
CORE_NEEDS = ("numpy", "pydantic", "yaml", "safetensors", "typing_extensions", *DRAWN_LATE)


def standard(name: str) -> bool:
    return name.partition(".")[0] in sys.stdlib_module_names


def test_core_imports_nothing_of_ours_and_no_framework() -> None:
    assert not strangers(CORE, lambda n: standard(n) or within(n, "icenet.core", *CORE_NEEDS) or n == "icenet")
    bare = [
        f"{p.name}"
        for p in CORE.values()
        for _, n in imports(p)
        if n.startswith("icenet.") and not within(n, "icenet.core")
    ]
    assert not bare


def test_parity_imports_core_only() -> None:
    allowed = ("icenet.core", "icenet.parity", *CORE_NEEDS, "pytest")
    assert not strangers(PARITY, lambda n: standard(n) or within(n, *allowed) or n == "icenet")


def test_the_front_door_imports_core_and_parity_only() -> None:
    allowed = (
        "icenet.core",
        "icenet.parity",
        *(name for name in FRONT_DOOR if name != "icenet"),
        *CORE_NEEDS,
        "click",
    )
    assert not strangers(FRONT_DOOR, lambda n: standard(n) or within(n, *allowed) or n == "icenet")


def test_backends_never_import_each_other() -> None:
    ours = ("icenet.core", "icenet.parity", *(name for name in MLX))
    assert not strangers(MLX, lambda n: standard(n) or within(n, "mlx", "numpy", *ours) or n == "icenet")
    shared = ("icenet.core", "icenet.parity", "icenet_torch")
    assert not strangers(TORCH, lambda n: standard(n) or within(n, "torch", "triton", "numpy", *shared))


def test_heavy_drawing_is_imported_late() -> None:
    for path in CORE.values():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                name = node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name
                assert not within(name, *DRAWN_LATE), f"{path.relative_to(ROOT)}:{node.lineno}: {name}"


def test_only_the_backend_flag_imports_by_name() -> None:
    """An import written as a text would slip through the rules above."""
    for name, path in {**modules("icenet"), **TORCH}.items():
        text = path.read_text(encoding="utf-8")
        if re.search(r"import_module|__import__|runpy|exec\(", text):
            # custom runs a file of the user's own, which a person has named
            assert name in ("icenet.core.backends", "icenet.core.config.custom"), name


def test_these_rules_can_fail(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("def f():\n    import torch.nn\n    from mlx import core\n    from icenet import models\n")
    found = [name for _, name in imports(file)]
    assert found == ["torch.nn", "mlx", "mlx.core", "icenet", "icenet.models"]
    assert not standard("torch") and not within("icenet.core2", "icenet.core") and within("a.b", "a.b")
    with pytest.raises(AssertionError, match=r"No module named .torch."):
        python("import torch", "torch")


# ---- the mirror -------------------------------------------------------------------------------------------

TORCH_ONLY = {"kernels"}
"""In Triton what MLX has kernels for."""
TORCH_ALIASES = {"core", "core.config"}
"""The guide's names under the other package's name."""
MLX_ONLY = {"blas"}
"""Chooses the BLAS that MLX's Linux wheel lacks."""


def inner(name: str) -> str:
    return name.partition(".")[2]


def test_every_file_has_its_twin() -> None:
    ours = {inner(name) for name in MLX} - MLX_ONLY
    theirs = {inner(name) for name in TORCH} - TORCH_ONLY - TORCH_ALIASES - {""}
    assert ours == theirs
    assert len(ours) >= 8


PAIRS = sorted({inner(name) for name in MLX} - MLX_ONLY)
MODEL_FILES = [name for name in PAIRS if name.startswith("models.")]
"""The families and their base: here the mirror is line by line."""

RENAMED = {"__call__": "forward"}
"""A module is called through `__call__` in MLX and through `forward` in PyTorch."""

DIFFERENT_METHODS = {
    # PyTorch's Module turns a call into `forward`, and keeps its parameters on a device that has to be asked for
    ("models.base", "BaseModel"): {"__call__", "forward", "device"},
    # PyTorch's layers draw initial values of their own unless this is overridden
    ("nn", "Linear"): {"reset_parameters"},
    ("nn", "Embedding"): {"reset_parameters"},
    ("nn", "Conv2d"): {"reset_parameters"},
}


class Outline:
    """A class as it shows from outside: its methods and the attributes its `__init__` makes, in order."""

    def __init__(self, node: ast.ClassDef) -> None:
        functions = [item for item in node.body if isinstance(item, ast.FunctionDef)]
        self.methods = [RENAMED.get(function.name, function.name) for function in functions]
        self.attributes: list[str] = []
        for function in functions:
            if function.name != "__init__":
                continue
            for item in ast.walk(function):
                if (
                    isinstance(item, ast.Attribute)
                    and isinstance(item.ctx, ast.Store)
                    and isinstance(item.value, ast.Name)
                ):
                    self.attributes.append(item.attr)
                if isinstance(item, ast.Call) and getattr(item.func, "attr", "") in (
                    "register_buffer",
                    "register_parameter",
                ):
                    self.attributes.append(ast.literal_eval(item.args[0]))
        self.arguments = {
            RENAMED.get(function.name, function.name): [
                argument.arg for argument in function.args.args + function.args.kwonlyargs
            ]
            for function in functions
        }


def classes(path: Path) -> dict[str, Outline]:
    return {
        node.name: Outline(node)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }


def twins(name: str) -> tuple[Path, Path]:
    return MLX[f"icenet.{name}"], TORCH[f"icenet_torch.{name}"]


@pytest.mark.parametrize("name", PAIRS)
def test_the_same_classes_in_the_same_order(name: str) -> None:
    ours, theirs = (classes(path) for path in twins(name))
    assert [c for c in ours if not c.startswith("_")] == [c for c in theirs if not c.startswith("_")]


@pytest.mark.parametrize("name", MODEL_FILES)
def test_models_have_the_same_methods_and_attributes(name: str) -> None:
    ours, theirs = (classes(path) for path in twins(name))
    for kind in ours:
        other = DIFFERENT_METHODS.get((name, kind), set())
        assert [m for m in ours[kind].methods if m not in other] == [
            m for m in theirs[kind].methods if m not in other
        ], kind
        assert sorted(ours[kind].attributes) == sorted(theirs[kind].attributes), kind
        for method in set(ours[kind].arguments) & set(theirs[kind].arguments) - other:
            assert ours[kind].arguments[method] == theirs[kind].arguments[method], f"{kind}.{method}"


@pytest.mark.parametrize("name", ["nn", "random", "ema", "decoder", "engine", "probe"])
def test_layers_and_engines_have_the_same_public_methods(name: str) -> None:
    ours, theirs = (classes(path) for path in twins(name))
    for kind in ours.keys() & theirs.keys():
        other = DIFFERENT_METHODS.get((name, kind), set())
        public = [
            {m for m in side[kind].methods if m not in other and (m == "__init__" or not m.startswith("_"))}
            for side in (ours, theirs)
        ]
        assert public[0] == public[1], kind


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}


@pytest.mark.parametrize("name", ["nn", "random", "decoder", "probe", "optimizers", "facts"])
def test_what_one_side_offers_the_other_does_too(name: str) -> None:
    """PyTorch's side may have more: what MLX's framework has and PyTorch's lacks."""
    ours, theirs = (functions(path) for path in twins(name))
    assert ours <= theirs
    more = {
        "nn": {"to_channels_first"},
        "random": {"signed", "threefry2x32", "threefry2x32_in_place", "random_bits", "masked"},
        "facts": {"blas", "synchronize"},
    }  # MLX draws threefry itself, and its images have channels last
    assert theirs - ours <= more.get(name, set())


WORDS = [
    # the framework's words, MLX's and PyTorch's; the order matters
    (r"icenet_torch", "icenet"),
    (r"\bmx\.array\b|\btorch\.Tensor\b", "Array"),
    (r"\bmx\.|\btorch\.", "framework."),
    (r"mlx\.nn\.Module|torch\.nn\.Module", "nn.Module"),
    (r"\bMLX\b|\bPyTorch\b", "FRAMEWORK"),
    (r'"mlx"|"torch"', '"backend"'),
    (r"\b__call__\b", "forward"),
    (r"\bconcatenate\b|\bcat\b", "concatenate"),
    (r"\bastype\b", "to"),
    (r"\baxis=", "dim="),
    (r"\bbool_\b", "bool"),
    (r"\buint32 `\[sites", "int32 `[sites"),  # PyTorch has no arithmetic on unsigned words
    (r"\bint64 `\[B, L\]`", "int32 `[B, L]`"),  # PyTorch's ids are int64
]
DIFFERENT_LINES = {
    # where keys and values are made, the buffer, the list of blocks
    "models.transformer": 20,
    # conversions to numpy and layouts, the module's call
    "models.base": 40,
}


def meaning(path: Path) -> list[str]:
    """A file's lines with the framework's words replaced, without its imports, blank lines and isort's marks."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    imported = {
        line
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        if number in imported or not line.strip() or line.strip() == "# isort: split":
            continue
        for pattern, word in WORDS:
            line = re.sub(pattern, word, line)
        lines.append(line)
    return lines


@pytest.mark.parametrize("name", MODEL_FILES)
def test_the_files_differ_in_the_frameworks_words_and_little_else(name: str) -> None:
    ours, theirs = (meaning(path) for path in twins(name))
    apart = [
        line
        for line in difflib.unified_diff(ours, theirs, lineterm="", n=0)
        if line[:1] in "+-" and line[:3] not in ("+++", "---")
    ]
    print("\n".join(apart))
    limit = DIFFERENT_LINES.get(name, 20)
    assert len(apart) <= limit, f"{len(apart)} lines differ:\n" + "\n".join(apart)
    # a count alone lets a file drift: most of it must be the same text
    assert difflib.SequenceMatcher(None, ours, theirs, autojunk=False).ratio() > 0.7


def test_the_families_are_the_same() -> None:
    def names(path: Path) -> Any:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        return [
            ast.unparse(node.value)
            for node in tree.body
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None
        ]

    ours, theirs = twins("models")
    assert names(ours) == names(theirs) != []


# ---- size and words ---------------------------------------------------------------------------------------


def test_no_file_grows_past_two_rooms() -> None:
    """The design: a file that grows past about 400 lines is asking to be two rooms."""
    sizes = {
        name: len(path.read_text(encoding="utf-8").splitlines())
        for name, path in {**modules("icenet"), **TORCH}.items()
    }
    assert {name: size for name, size in sizes.items() if size > 440} == {}


def test_annotations_are_postponed_everywhere() -> None:
    for path in {**modules("icenet"), **TORCH}.values():
        text = path.read_text(encoding="utf-8")
        if text.strip():
            assert "from __future__ import annotations" in text or "def " not in text, path
            assert ast.get_docstring(ast.parse(text)), f"{path} does not say what it is"
