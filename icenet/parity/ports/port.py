"""Ports a PyTorch module to MLX: export, source, module, proof."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from icenet.core import backends, files
from icenet.core.errors import PortError, UsageError
from icenet.core.models import port_weights
from icenet.core.porting import build, signature
from icenet.core.porting.build import Plan
from icenet.core.porting.names import optimizer_notes
from icenet.core.porting.places import as_dict
from icenet.core.porting.record import Graph, Tensor, refs
from icenet.core.porting.source.lines import wrapped
from icenet.parity.ports.inputs import arrays_of
from icenet.parity.ports.proof import locate, prove
from icenet.parity.ports.report import PortReport, limit_text

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass
class Port:
    """A port of a PyTorch module.

    Attributes:
        module: The `mlx.nn.Module`, with the names of the original's parameters, in evaluation mode.
        source: The Python file of the module, which depends on mlx only.
        report: The comparison with the original.
    """

    module: Any
    source: str
    report: PortReport
    plan: Plan
    inputs: list[np.ndarray]
    layout: str
    original: Any = None

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Writes model.py, weights.safetensors, config.json and parity.html to a folder. Returns the folder.

        `python folder/model.py` loads the weights and runs the module on zeros.

        Args:
            folder: The folder, created if absent.
            overwrite: Whether to replace files of these names.

        Raises:
            UsageError: A file would be replaced.
            FileError: A file cannot be written.
        """
        folder = files.user_path(folder, "save")
        names = ("model.py", "weights.safetensors", "config.json", "parity.html")
        present = [name for name in names if (folder / name).exists()]
        if present and not overwrite:
            raise UsageError(f"{folder}: {present[0]} exists; give another folder, or overwrite=True (--overwrite)")
        load = backends.module("mlx", "porting.load")
        texts = _file(self), json.dumps(self.config(), indent=2) + "\n", self.page()
        with files.staged(folder / "model.py", durable=False) as stage:
            with stage.open(folder / "weights.safetensors") as file:
                load.save_weights(file, self.module)
            for name, text in zip(("model.py", "config.json", "parity.html"), texts, strict=True):
                with stage.open(folder / name) as file:
                    file.write(text.encode())
        return folder

    def config(self) -> dict[str, Any]:
        """Returns what config.json holds: the class, the inputs, and the result of the comparison."""
        inputs = [
            {
                "name": ref.name,
                "shape": list(map(str, self.plan.graph.tensors[ref.name].shape)),
                "dtype": str(array.dtype),
            }
            for ref, array in zip(self.plan.graph.inputs, self.inputs, strict=True)
        ]
        return {
            "class": self.plan.class_name,
            "original": self.plan.graph.modules[""].kind,
            "layout": self.layout,
            "inputs": inputs,
            "weights": as_dict(self.plan.places()),
            "report": self.report.as_dict(),
        }

    def page(self) -> str:
        """Returns the comparison as a self-contained HTML page."""
        import html

        rows = "".join(
            f"<tr><td>{html.escape(c.mode)}</td><td>{html.escape(c.what)}</td><td>{html.escape(c.sizes)}</td>"
            f"<td>{c.ratio:.2g}</td><td>{c.difference:.1e}</td><td>{c.layers}</td><td>{html.escape(c.name)}</td></tr>"
            for c in self.report.checks
        )
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.report.notes)
        first = html.escape(str(self.report).splitlines()[0])
        return (
            "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>{html.escape(self.plan.class_name)}: parity</title>"
            "<style>body{font:16px system-ui;margin:2em auto;max-width:60em;padding:0 1em}td,th{padding:.2em .8em;"
            "text-align:left;border-bottom:1px solid #ccc}</style>"
            f"<h1>{html.escape(self.plan.class_name)}</h1><p>{first}</p>"
            "<p>Each row compares the port with the original. The difference is the largest one, relative to the "
            "largest value. The ratio is the error of the port against the original in float64, in units of the "
            "error that the original itself has in its dtype; up to 8 passes. The layers are those of mlx.nn, as in "
            "model.py, or IceNet's, as in port.module.</p><table><tr><th>mode<th>compared<th>sizes"
            f"<th>ratio<th>difference<th>layers<th>largest at</tr>{rows}</table><ul>{notes}</ul></html>\n"
        )


_NUMBERED = re.compile(r"['\"]\d+['\"](: |\] = )")
"""Layers with numbers as names, of a dict or of a class, which `load_weights` takes for a list."""
_LOADED = """    model.load_weights(str(folder / "weights.safetensors"))"""
_LOADED_BY_NAME = """    for name, array in mx.load(str(folder / "weights.safetensors")).items():
        owner, (*path, last) = model, name.split(".")
        for part in path:
            owner = owner[int(part)] if isinstance(owner, list) else owner[part]
        owner[int(last) if isinstance(owner, list) else last] = array"""


def _file(port: Port) -> str:
    """Returns the text of model.py: the source, a function that loads the weights, and a call on zeros."""
    shapes = [tuple(array.shape[axis] for axis in _axes(array.ndim, port.layout == "nhwc")) for array in port.inputs]
    zeros = [f"mx.zeros({shape}, mx.{_mlx(array)})" for shape, array in zip(shapes, port.inputs, strict=True)]
    names = _parameters(port.source, port.plan.class_name)
    given = signature.call_text(port.plan.graph.signature, port.plan.graph.inputs, zeros, names)
    result = "\n".join(wrapped(f"result = model({given})", 4))
    source = port.source.replace("import math\n\n", "", 1)
    standard = (
        "import math\nfrom pathlib import Path\n\n" if source != port.source else "from pathlib import Path\n\n"
    )
    at = source.index("import mlx.core as mx\n")
    numpy = source.rfind("import numpy as np\n", 0, at)
    at = numpy if numpy >= 0 else at
    source = source[:at] + standard + source[at:]
    source = source.replace("import mlx.nn as nn\n", "import mlx.nn as nn\nfrom mlx.utils import tree_map\n", 1)
    return f'''{source}

def load(folder=None):
    """Returns the model with the weights of a folder, by default the one of this file."""
    folder = Path(__file__).parent if folder is None else Path(folder)
    model = {port.plan.class_name}()
{_LOADED if not re.search(_NUMBERED, source) else _LOADED_BY_NAME}
    return model.eval()


if __name__ == "__main__":
    model = load()
{result}
    print(tree_map(lambda x: (x.shape, x.dtype) if isinstance(x, mx.array) else x, result))
'''


def _axes(ndim: int, nhwc: bool) -> tuple[int, ...]:
    """Returns the axes of the original in the order in which the port takes them."""
    return (0, *range(2, ndim), 1) if nhwc and ndim == 4 else tuple(range(ndim))


def _parameters(source: str, class_name: str) -> list[str]:
    """Returns the parameters of the call of a class."""
    found = [item for item in ast.parse(source).body if isinstance(item, ast.ClassDef) and item.name == class_name]
    call = next(item for item in found[0].body if isinstance(item, ast.FunctionDef) and item.name == "__call__")
    return [argument.arg for argument in [*call.args.args[1:], *call.args.kwonlyargs]]


def _mlx(array: np.ndarray) -> str:
    return {"float64": "float32", "bool": "bool_", "complex128": "complex64"}.get(str(array.dtype), str(array.dtype))


def port(
    torch_module: Any,
    example_inputs: Any,
    *,
    dynamic: Any = None,
    dtype: str = "fp32",
    layout: str = "nchw",
    example_kwargs: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Port:
    """Ports a PyTorch module to MLX, as source and as a module, and proves that both compute the same.

    Args:
        torch_module: A `torch.nn.Module` on the CPU. It stays unchanged.
        example_inputs: The arguments of one call: a tensor, or a tuple of tensors.
        dynamic: What `torch.export.export` takes as `dynamic_shapes`. By default every dimension is open that the
            module allows.
        dtype: Dtype of the weights of the result: fp32, bf16 or fp16. The comparison is in fp32.
        layout: nchw if the port takes and returns images as the original, nhwc if their channels are last.
        example_kwargs: Keyword arguments of the call.
        progress: Called with the name of each stage when it begins.

    Returns:
        A `Port` with `module`, an `mlx.nn.Module` with the names of the original's parameters, `source`, the text of
        a Python file that depends on mlx only, `report`, the comparison, and the method `save(folder)`. The module
        has the parameters of the original's `forward`; what is no array in the example is a constant.

    Raises:
        PortError: The graph of the module cannot be exported, an operation has no counterpart, or the port differs.
        UsageError: An argument is wrong.
        BackendError: MLX or PyTorch is not installed.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: give one of {', '.join(DTYPES)}")
    if layout not in ("nchw", "nhwc"):
        raise UsageError(f"layout {layout!r}: give nchw or nhwc")
    exporter, run = backends.module("torch", "porting.export"), backends.module("torch", "porting.run")
    examples = backends.module("torch", "porting.inputs")
    examples.check_module(torch_module)
    args = (
        example_inputs
        if isinstance(example_inputs, tuple)
        else tuple(example_inputs)
        if isinstance(example_inputs, list)
        else (example_inputs,)
    )
    args, kwargs = examples.checked_inputs((args, dict(example_kwargs or {})))
    progress("exporting")
    graph, train, program, notes = _export(exporter, torch_module, args, kwargs, dynamic)
    if not list(refs(graph.output_tree)):
        raise PortError(f"{graph.modules[''].class_name} returns no tensor; a port needs one to compare")
    _check_table(graph, train)
    progress("writing the source")
    title = f"{graph.modules[''].class_name} in MLX, ported from PyTorch."
    load = backends.module("mlx", "porting.load")
    layers = backends.module("mlx", "porting.layers")
    weights = run.weights(torch_module, program)
    arrays, named = examples.to_numpy((args, kwargs))

    def attempt(exact_masks: bool) -> tuple[Plan, Any, PortReport]:
        plan = build.plan(graph, train, layout == "nhwc", title, exact_masks=exact_masks)
        model = load.make(plan.source, plan.class_name, plan.native(weights))
        checked, proven = plan, model
        if layout == "nhwc":  # the proof gives images with PyTorch's axes
            checked = build.plan(graph, train, False, title, exact_masks=exact_masks)
            proven = load.make(checked.source, checked.class_name, checked.native(weights))
        accelerated = layers.accelerate(load.make(checked.source, checked.class_name, checked.native(weights)))
        accelerated = accelerated if layers.is_accelerated(accelerated) else None
        return plan, model, prove(checked, proven, torch_module, program, arrays, named, progress, accelerated)

    if graph.loops:
        try:
            plan, model, report = attempt(False)
            is_open = report.passed
        except PortError:
            is_open = False
        if not is_open:  # the loops need the number of steps of the example
            graph, train, program, notes = _export(exporter, torch_module, args, kwargs, dynamic, open_loops=False)
    if not graph.loops:
        plan, model, report = attempt(False)
    if not report.passed and dynamic is None and any(item.shape[:1] == (1,) for item in arrays_of((arrays, named))):
        # a batch of 1 may be computed in another way than larger ones: `x.squeeze(0)`
        graph, train, program, notes = _export(
            exporter, torch_module, args, kwargs, None, widened=False, open_loops=False
        )
        plan, model, report = attempt(False)
    if any(check.what == "gradients" and math.isinf(check.ratio) for check in report.checks):
        others = attempt(True)
        if others[2].passed:
            plan, model, report = others
            notes.append("exact_where drops gradients that are not finite where a mask leaves values out")
    report.notes += [*notes, *optimizer_notes(graph, train)]
    if not report.passed:
        report.culprit = locate(plan, program, torch_module, (arrays, named), report)
        functions = [*graph.functions, *(train.functions if train is not None else ())]
        if functions and all(check.passed for check in report.checks if check.what != "gradients"):
            report.culprit += f"; {functions[0]} has a backward of its own, which a port cannot have"
        with backends.module("mlx", "tools.calls").on_another_device() as moved:
            if moved and attempt(False)[2].passed:
                report.culprit += "; on a CPU it agrees, so a kernel of MLX is wrong on this device, for these shapes"
        raise PortError(f"the port of {graph.modules[''].class_name} differs: {report.culprit}\n{report}")
    if report.fixed or report.limits or report.guards:
        plan = replace(plan, source=_with_sizes(plan, report, layout == "nhwc"))
        model = load.make(plan.source, plan.class_name, plan.native(weights))
    port_weights.mark(model, plan.places())
    layers.accelerate(model)
    if dtype != "fp32":
        load.set_dtype(model, DTYPES[dtype])
        report.notes.append(f"compared in fp32; the weights are {dtype}")
    return Port(model, plan.source, report, plan, arrays_of((arrays, named)), layout, torch_module)


def _with_sizes(plan: Plan, report: PortReport, nhwc: bool) -> str:
    """Returns the source of a plan with checks of the sizes that the port cannot change, or not beyond limits."""
    start = plan.source.index(f"class {plan.class_name}(nn.Module):")
    match = re.compile(r"    def __call__\((?P<parameters>.*?)\):\n", re.DOTALL).search(plan.source, start)
    assert match is not None
    parameters = {item.partition("=")[0].strip() for item in match["parameters"].split(",")}
    texts = {ref.name: ref.name for ref in plan.graph.inputs if ref.name in parameters}
    for item in plan.graph.signature:
        if item.name in parameters:
            texts.update({leaf: text for leaf, text, _ in signature.leaves(item.value, item.name, item.name)})

    def axes(name: str) -> tuple[int, ...]:
        return _axes(plan.graph.tensors[name].ndim, nhwc)

    def size_text(name: str, dim: int) -> str:
        return f"{texts[name]}.shape[{axes(name).index(dim)}]"

    lines = []
    for name in {**report.fixed, **report.limits}:
        text = texts.get(name)
        if text is None:
            continue
        wrong = {dim: (f"{{}} != {size}", f"{size}") for dim, size in report.fixed.get(name, {}).items()}
        for dim, (low, high) in report.limits.get(name, {}).items():
            outside = f"{{}} < {low}" if high is None else f"{{}} > {high}"
            outside = outside if low is None or high is None else f"not {low} <= {{}} <= {high}"
            wrong[dim] = outside, limit_text(low, high)
        for dim, (condition, made_for) in sorted((axes(name).index(dim), found) for dim, found in wrong.items()):
            lines += [
                f"        if {condition.format(f'{text}.shape[{dim}]')}:\n",
                f'            raise ValueError(f"{text} has {{{text}.shape[{dim}]}} in dimension {dim}; '
                f'the port was made for {made_for}")\n',
            ]
    inputs = [ref.name for ref in plan.graph.inputs]
    for guard in report.guards:
        places = [(inputs[number], dim) for (number, dim), *_ in guard.places.values()]
        if all(name in texts for name, _ in places):
            condition, outside = guard.texts(lambda place: size_text(inputs[place[0]], place[1]))
            given = " and ".join(
                f"{texts[name]} has {{{size_text(name, dim)}}} in dimension {axes(name).index(dim)}"
                for name, dim in places
            )
            lines += [
                f"        if {outside}:\n",
                f'            raise ValueError(f"{given}; "\n',
                f'                             "the port was made for {condition}")\n',
            ]
    return plan.source[: match.end()] + "".join(lines) + plan.source[match.end() :]


def check(
    module: Any, example_inputs: Any, *, dynamic: Any = None, example_kwargs: dict[str, Any] | None = None
) -> dict[str, list[str]]:
    """Returns the operations that the table lacks, with the places where the module uses them."""
    exporter, examples = backends.module("torch", "porting.export"), backends.module("torch", "porting.inputs")
    examples.check_module(module)
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    args, kwargs = examples.checked_inputs((args, dict(example_kwargs or {})))
    graph, train, _, _ = _export(exporter, module, args, kwargs, dynamic)
    return _missing(graph, train)


def _export(
    exporter: Any,
    module: Any,
    args: Any,
    kwargs: Any,
    dynamic: Any,
    *,
    widened: bool = True,
    open_loops: bool = True,
) -> tuple[Graph, Graph | None, Any, list[str]]:
    examples = backends.module("torch", "porting.inputs")
    examples.check_arguments(module, args, kwargs)
    if isinstance(dynamic, (bool, int, str)):
        raise UsageError(
            f"dynamic={dynamic!r}: give the dynamic_shapes of torch.export.export, such as (None,) for one argument "
            "whose sizes are fixed, or leave it out, which opens every size"
        )
    is_open = dynamic is None and widened
    wide_args, wide_kwargs = examples.widened(args, kwargs) if is_open else (args, kwargs)
    shapes = "auto" if dynamic is None else dynamic
    try:
        graph, program, shapes = exporter.export(module, wide_args, wide_kwargs, shapes, False, open_loops)
    except PortError:
        if wide_args is args:
            examples.check_call(module, args, kwargs)
            raise
        wide_args, wide_kwargs = args, kwargs
        examples.check_call(module, args, kwargs)
        graph, program, shapes = exporter.export(module, args, kwargs, shapes, False, open_loops)
    if wide_args is not args and any(
        isinstance(tensor, Tensor) and tensor.shape[:1] == (2,)
        for tensor in (graph.tensors[ref.name] for ref in graph.inputs)
    ):  # the batch is fixed: the proof would find that, and cost a second one
        wide_args, wide_kwargs = args, kwargs
        graph, program, shapes = exporter.export(module, args, kwargs, "auto", False, open_loops)
    notes: list[str] = []
    try:
        train, _, _ = exporter.export(module, wide_args, wide_kwargs, shapes, True, open_loops)
    except PortError as error:
        train = None
        notes.append(f"training mode: {error}")
    if train is not None and _outputs(train) != _outputs(graph):
        notes.append("the module returns another structure in training mode; the port has the evaluation mode only")
        train = None
    if constants := {**graph.constants, **(train.constants if train is not None else {})}:
        texts = [f"{path} = {value}" for path, value in constants.items()]
        more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
        notes.append(f"buffers whose values are constants of the port: {', '.join(texts[:3])}{more}")
    return graph, train, program, notes


def _outputs(graph: Graph) -> str:
    return re.sub(r"name='\w+'", "", repr(graph.output_tree))


def _missing(graph: Graph, train: Graph | None) -> dict[str, list[str]]:
    found = build.missing(graph)
    for op, places in (build.missing(train) if train is not None else {}).items():
        found.setdefault(op, places)
    return found


def _check_table(graph: Graph, train: Graph | None) -> None:
    found = _missing(graph, train)
    if found:
        raise PortError(describe_missing(found))


def describe_missing(found: dict[str, list[str]]) -> str:
    """Returns the number of missing operations, and a line for each with its count and its first place."""
    first = f"{len(found)} operations have no counterpart:" if len(found) > 1 else "1 operation has no counterpart:"
    lines = [
        f"  aten.{op}: {'once, at' if len(places) == 1 else f'{len(places)} times, first at'} {places[0]}"
        for op, places in sorted(found.items())
    ]
    return "\n".join([first, *lines])
