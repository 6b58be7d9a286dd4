"""The text of model.py, which a port writes: its source, a function that loads the weights, and a call on zeros."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

import numpy as np

from icenet.core.porting import signature
from icenet.core.porting.build import Plan
from icenet.core.porting.source.lines import wrapped
from icenet.parity.ports.inputs import port_axes

_NUMBERED = re.compile(r"['\"]\d+['\"](: |\] = )")
"""Layers with numbers as names, of a dict or of a class, which `load_weights` takes for a list."""
_LOADED = """    model.load_weights(str(folder / "weights.safetensors"))"""
_LOADED_BY_NAME = """    for name, array in mx.load(str(folder / "weights.safetensors")).items():
        owner, (*path, last) = model, name.split(".")
        for part in path:
            owner = owner[int(part)] if isinstance(owner, list) else owner[part]
        owner[int(last) if isinstance(owner, list) else last] = array"""


def model_file(source: str, plan: Plan, inputs: Sequence[np.ndarray], is_nhwc: bool) -> str:
    """Returns the text of model.py.

    Args:
        source: The source of the port.
        plan: Its plan.
        inputs: The arrays of the example, in the order of the graph's inputs and with PyTorch's axes.
        is_nhwc: Whether the port takes images with their channels last.
    """
    shapes = [tuple(array.shape[axis] for axis in port_axes(array.ndim, is_nhwc)) for array in inputs]
    zeros = [f"mx.zeros({shape}, mx.{_mlx_dtype(array)})" for shape, array in zip(shapes, inputs, strict=True)]
    names = _parameters(source, plan.class_name)
    given = signature.call_text(plan.graph.signature, plan.graph.inputs, zeros, names)
    call = "\n".join(wrapped(f"result = model({given})", 4))
    return f'''{_with_imports(source)}

def load(folder=None):
    """Returns the model with the weights of a folder, by default the one of this file."""
    folder = Path(__file__).parent if folder is None else Path(folder)
    model = {plan.class_name}()
{_LOADED_BY_NAME if re.search(_NUMBERED, source) else _LOADED}
    return model.eval()


if __name__ == "__main__":
    try:
        model = load()
    except (RuntimeError, ValueError, LookupError) as error:
        reason = " ".join(str(error).split())
        raise SystemExit(f"weights.safetensors: not the weights of this model ({{reason}}); port it again") from None
{call}
    print(tree_map(lambda x: (x.shape, x.dtype) if isinstance(x, mx.array) else x, result))
'''


def _with_imports(source: str) -> str:
    """Returns a source with the imports of the functions that model.py has in addition, in the usual order."""
    source = source.replace("import dataclass\n\n", "import dataclass\n", 1)
    without_math = source.replace("import math\n\n", "", 1)
    standard = "from pathlib import Path\n\n"
    if without_math != source:
        standard = "import math\n" + standard
    mlx = without_math.index("import mlx.core as mx\n")
    numpy = without_math.rfind("import numpy as np\n", 0, mlx)
    start = numpy if numpy >= 0 else mlx
    found = without_math[:start] + standard + without_math[start:]
    return found.replace("import mlx.nn as nn\n", "import mlx.nn as nn\nfrom mlx.utils import tree_map\n", 1)


def _parameters(source: str, class_name: str) -> list[str]:
    """Returns the parameters of the call of a class."""
    found = [item for item in ast.parse(source).body if isinstance(item, ast.ClassDef) and item.name == class_name]
    call = next(item for item in found[0].body if isinstance(item, ast.FunctionDef) and item.name == "__call__")
    return [argument.arg for argument in [*call.args.args[1:], *call.args.kwonlyargs]]


def _mlx_dtype(array: np.ndarray) -> str:
    """Returns the name of the dtype of MLX for an array."""
    return {"float64": "float32", "bool": "bool_", "complex128": "complex64"}.get(str(array.dtype), str(array.dtype))
