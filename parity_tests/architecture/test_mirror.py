"""The mirror: `icenet_torch` has the files, classes, methods and attributes of `icenet`, and model files differ in
framework words only."""

from __future__ import annotations

import ast
import difflib
import re
from pathlib import Path

import pytest
from source_tree import MLX, ONE_DIRECTION, TORCH, is_in

TORCH_FILES = {
    "",  # sets MKL's mode
    "core",  # the guide's name for icenet.core.config
    "engine.capture",  # MLX submits a step as one graph by itself
    "nn.kernels",  # Triton kernels; MLX has its kernels in nn.random
    "tools.state_dict",  # a PyTorch state dict needs no engine
    *("tools.maxima", "tools.sums"),  # the noise is measured in PyTorch
    "tools.originals",  # what is ported
    "tools.pointwise",  # the weights of `b` are reshaped, which is PyTorch
    "tools.recurrent_parts",  # MLX has recurrent layers of one direction only
    "tools.variants",  # the causes of a difference are tried on PyTorch
}
"""Modules and packages of PyTorch without a counterpart, and why."""

MLX_FILES = {
    "nn.device_limits",  # of the kernels below; Triton asks the device itself
    "nn.recurrence",  # loops over time and their kernels; PyTorch's own functions compute whole sequences
    "nn.one_row",  # PyTorch starts an operation in less time, and its norm is one
    "nn.cuda",  # sources of CUDA kernels; those of PyTorch are in Triton
    "tools.ports",  # of modules of PyTorch
    "engine.compiled",  # PyTorch captures the passes of a step
    "nn.training_kernels",  # CUDA kernels of MLX; PyTorch's operations are these, or it has them in nn.kernels
}
"""Modules and packages of MLX without a counterpart, and why."""

ONE_SIDED = {
    # MLX has no objects for places of arrays; the others are about layers with other parameters in PyTorch
    "nn.tree": {"Arrays", "Arrays.get", "Arrays.set", "set_biases"},
    "nn.kinds": {"counterpart_kinds", "transposed_weights"},
    "engine.engine": {"Engine.prepare_process"},  # MLX reads its settings of CUDA once
    # the device is an attribute on MLX, whose arrays have none
    "models.base": {"BaseModel.device", "BaseModel.match_gradients_at_zero"},
    "nn.activations": {  # MLX's layers with PyTorch's gradients
        "match_gradients_at_zero",
        *(f"{name}{method}" for name in ("LeakyReLU", "PReLU", "CELU") for method in ("", ".forward")),
    },
    "nn.arithmetic": {"set_tf32", "chip", "tf32", "switches"},  # MLX reads its switch once
    "nn.conv": {"Conv2d.reset_parameters"},
    # MLX images have channels last; PyTorch reads into tensors that it does not fill, and tells where they are
    "nn.arrays": {"triton_kernels", "to_channels_first", "filled", "device_index", "address", "array_of_parts"},
    "nn.norm": {"LayerNorm.prepare_generation", "RMSNorm.prepare_generation"},  # for nn.one_row
    "nn.loss": {"register_for_compiler"},  # mx.compile needs no registration
    "nn.dropout": {"masked_scale"},  # MLX draws threefry numbers itself
    # PyTorch is accurate there
    "nn.exact": {
        "add_bias",
        "channel_sums",
        "logsumexp",
        "moments",
        "normalize",
        "scale",
        "scale_and_shift",
        "softmax_terms",
    },
    "nn.cached_attention": {"has_triton", "in_device_memory"},  # PyTorch has small tensors on the device
    "generation.decoder": {"Decoder.inference_mode"},  # torch.no_grad
    # a compiled step of MLX serves several requests at a time; a CUDA graph has the memory of one request
    "generation.cache": {"KVCache.without_arrays"},
    "generation.capture": {"CapturedStep.nbytes", "keep_step", "settings"},
    "tools.calls": {"exact_arithmetic", "held_results"},  # the reference is PyTorch
    "tools.probe": {"perturbing"},  # the noise is measured in PyTorch
    "nn.linear": {
        # the first two keep PyTorch from drawing values; its embedding takes no small integers, as MLX's does
        *("Linear.reset_parameters", "Embedding.reset_parameters", "Embedding.forward"),
    },
    "nn.experts": {"QuantizedStackedLinear"},  # PyTorch has no product with quantized weights of experts
    # mlx.nn.quantize calls the first; MLX has a function for the second, and no other layout
    "nn.linear_kernels": {"Packed", "processors", "limits", "most_rows", "can_compute", "packed_weight"},
    "nn.quantized": {"to_quantized", "dequantized", "QuantizedLayer.prepare_product", "join_parts"},
    "nn.random": {"signed", "threefry2x32", "threefry2x32_in_place", "random_bits_at_least"},
}
"""Public names that only one backend has, and why."""

OWN_IMPLEMENTATION = {"engine.distributed", "engine.optimizers", "nn.recurrent", "nn.cpu_products"}
"""Files with the same classes and different helpers: PyTorch has these algorithms, MLX does not, or the reverse."""

DIFFERENT_LINES = {"models.base": 45, "models.fused": 10}
"""Model files with lines that differ in more than the words: conversions of arrays, the call of a module, hooks."""


def inner(name: str) -> str:
    return name.partition(".")[2]


PAIRS = sorted(inner(name) for name in MLX if not is_in(inner(name), ONE_DIRECTION))
PAIRED = [name for name in PAIRS if not is_in(name, *MLX_FILES)]
MODEL_FILES = [name for name in PAIRS if name.startswith("models.")]


def twins(name: str) -> tuple[Path, Path]:
    return MLX[f"icenet.{name}"], TORCH[f"icenet_torch.{name}"]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_every_file_has_its_counterpart() -> None:
    theirs = {inner(name) for name in TORCH if not is_in(inner(name), ONE_DIRECTION)}
    assert set(PAIRED) == {name for name in theirs if not is_in(name, *TORCH_FILES)}
    assert len(PAIRS) > 30


# ---- names ------------------------------------------------------------------------------------------------


class Outline:
    """A class as its users see it: its methods, their arguments, and the attributes that `__init__` sets."""

    def __init__(self, node: ast.ClassDef) -> None:
        functions = [item for item in node.body if isinstance(item, ast.FunctionDef)]
        self.arguments = {
            rename(function.name): [a.arg for a in function.args.args + function.args.kwonlyargs]
            for function in functions
        }
        self.attributes: set[str] = set()
        for function in functions:
            if function.name == "__init__":
                self.attributes = {
                    item.attr
                    for item in ast.walk(AsAssignment().visit(function))
                    if isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store)
                }

    @property
    def methods(self) -> list[str]:
        return list(self.arguments)


def rename(method: str) -> str:
    """A module is called through `__call__` in MLX and through `forward` in PyTorch."""
    return "forward" if method == "__call__" else method


class AsAssignment(ast.NodeTransformer):
    """Turns `self.register_buffer("name", value)` into `self.name = value`."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        call = node.value
        registers = ("register_buffer", "register_parameter")
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in registers:
            target = ast.Attribute(call.func.value, ast.literal_eval(call.args[0]), ast.Store())
            return ast.copy_location(ast.Assign([target], call.args[1]), node)
        return node


def outlines(tree: ast.Module) -> dict[str, Outline]:
    return {
        node.name: Outline(node)
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    }


def public_names(tree: ast.Module) -> set[str]:
    """Returns the public functions of a module, and the public methods of its public classes as `Class.method`."""
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    methods = {f"{name}.{method}" for name, outline in outlines(tree).items() for method in outline.methods}
    return {name for name in functions | methods if not name.rpartition(".")[2].startswith("_")}


@pytest.mark.parametrize("name", PAIRED)
def test_the_same_names_in_each_pair_of_files(name: str) -> None:
    ours, theirs = (parse(path) for path in twins(name))
    one_sided = ONE_SIDED.get(name, set())
    assert [kind for kind in outlines(ours) if kind not in one_sided] == list(outlines(theirs))
    if name not in OWN_IMPLEMENTATION:
        assert public_names(ours) ^ public_names(theirs) == one_sided - outlines(ours).keys()


@pytest.mark.parametrize("name", MODEL_FILES)
def test_models_have_the_same_methods_arguments_and_attributes(name: str) -> None:
    ours, theirs = (outlines(parse(path)) for path in twins(name))
    for kind in ours:
        one_sided = {
            method for other, _, method in (n.partition(".") for n in ONE_SIDED.get(name, ())) if other == kind
        }
        both = [[m for m in side[kind].methods if m not in one_sided] for side in (ours, theirs)]
        assert both[0] == both[1], kind
        for method in both[0]:
            assert ours[kind].arguments[method] == theirs[kind].arguments[method], f"{kind}.{method}"
        assert ours[kind].attributes == theirs[kind].attributes, kind


def test_both_backends_offer_the_same_models_and_layers() -> None:
    for package in ("models", "nn"):
        ours, theirs = (
            [ast.unparse(node) for node in parse(path).body if isinstance(node, (ast.Assign, ast.AnnAssign))]
            for path in twins(package)
        )
        assert ours == theirs != []


# ---- lines ------------------------------------------------------------------------------------------------

WORDS = [
    (r"icenet_torch", "icenet"),
    (r"\bMLX\b|\bPyTorch\b", "FRAMEWORK"),
    (r"\bmlx\.nn\.Module|\btorch\.nn\.Module", "nn.Module"),
    (r"\bmx\.array\((.*)\)$", r"framework.from_numpy(\1)"),
    (r"\bmx\.array\b|\btorch\.Tensor\b", "Array"),
    (r"\bmx\.|\btorch\.", "framework."),
    (r"'mlx'|'torch'", "'backend'"),
    (r"\b__call__\b", "forward"),
    (r"nn\.ModuleList\((.*)\)$", r"[\1]"),
    (r"\[\[(.*)\]\]$|\[\((.*)\)\]$", r"[\1\2]"),  # of a list or a generator
    (r"= \[(\w+)\]$", r"= \1"),
    (r"\bconcatenate\b", "cat"),
    (r"\blist\((\w+)\)", r"\1"),  # mx.concatenate requires a list
    (r"\bastype\b", "to"),
    (r"\baxis=", "dim="),
    (r"\bbool_\b", "bool"),
    (r"\buint32 `\[sites", "int32 `[sites"),  # PyTorch has no arithmetic on unsigned integers
    (r"\bint64 `\[B, L\]`", "int32 `[B, L]`"),  # PyTorch's ids are int64
    (r"\[B, H, W, C\]|\[B, C, H, W\]", "[images]"),
    (r"channel_axis=\d", "channel_axis=C"),
    (r"framework\.clamp\((.*), min=0\)", r"framework.maximum(\1, 0)"),
]
"""The words of the frameworks and what they have in common. The order matters."""


def meaning(source: str) -> list[str]:
    """Returns the lines of a file without imports, comments and line breaks, with the common words of `WORDS`."""
    tree = AsAssignment().visit(ast.parse(source))
    tree.body = [node for node in tree.body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    lines = []
    for line in ast.unparse(ast.fix_missing_locations(tree)).splitlines():
        for pattern, word in WORDS:
            line = re.sub(pattern, word, line)
        lines.append(line)
    return lines


def difference(ours: str, theirs: str) -> list[str]:
    lines = difflib.unified_diff(meaning(ours), meaning(theirs), lineterm="", n=0)
    return [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]


@pytest.mark.parametrize("name", MODEL_FILES)
def test_model_files_differ_in_framework_words_only(name: str) -> None:
    found = difference(*(path.read_text(encoding="utf-8") for path in twins(name)))
    assert len(found) <= DIFFERENT_LINES.get(name, 0), "\n".join(found)


def test_these_rules_can_fail() -> None:
    ours = "class A:\n    def __call__(self, x: mx.array):\n        return mx.exp(x, axis=1)\n"
    theirs = "class A:\n    def forward(self, x: torch.Tensor):\n        return torch.exp(x, dim=1)\n"
    assert difference(ours, theirs) == []
    assert difference(ours, theirs.replace("exp", "log")) != []
    assert difference(ours, theirs.replace("dim=1", "dim=2")) != []
    assert public_names(ast.parse(ours.replace("__call__", "other"))) == {"A.other"}
    buffer = "class A:\n    def __init__(self):\n        self.register_buffer('x', y)\n        self.z = 1\n"
    assert outlines(ast.parse(buffer))["A"].attributes == {"x", "z"}
