"""Ports a PyTorch module to MLX: export, source, module, proof."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from icenet.core import backends, files
from icenet.core.errors import UsageError
from icenet.core.models import port_weights
from icenet.core.porting.build import Plan
from icenet.core.porting.names import optimizer_notes
from icenet.core.porting.places import as_dict
from icenet.parity.ports.attempts import Attempts
from icenet.parity.ports.inputs import arrays_of
from icenet.parity.ports.model_file import model_file
from icenet.parity.ports.original import Original
from icenet.parity.ports.page import html_page
from icenet.parity.ports.report import PortReport
from icenet.parity.ports.size_checks import with_size_checks

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
        for name in ("model.py", "weights.safetensors", "config.json", "parity.html"):
            if (folder / name).exists() and not overwrite:
                raise UsageError(f"{folder}: {name} exists; give another folder, or overwrite=True (--overwrite)")
        texts = {
            "model.py": model_file(self.source, self.plan, self.inputs, self.layout == "nhwc"),
            "config.json": json.dumps(self.config(), indent=2) + "\n",
            "parity.html": self.page(),
        }
        with files.staged(folder / "model.py", durable=False) as stage:
            with stage.open(folder / "weights.safetensors") as file:
                backends.module("mlx", "porting.load").save_weights(file, self.module)
            for name, text in texts.items():
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
        return html_page(self.plan.class_name, self.report)


def port(
    torch_module: Any,
    example_inputs: Any,
    *,
    dynamic: Any = None,
    dtype: str = "fp32",
    layout: str = "nchw",
    example_kwargs: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
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
    is_nhwc = layout == "nhwc"
    original = Original(torch_module, example_inputs, example_kwargs, dynamic)
    attempts = Attempts(original, is_nhwc, progress or (lambda stage: None))
    found = attempts.find()
    plan, model, report = found.plan, found.model, found.report
    report.notes += optimizer_notes(plan.graph, plan.train)
    if not report.passed:
        raise attempts.refusal(found)
    refusing, notes = attempts.with_other_arguments(found)
    report.notes += notes
    if dtype != "fp32":
        plan = attempts.in_dtype(found, DTYPES[dtype])
        report.notes.append(f"compared in fp32; the weights are {dtype}")
    if (source := refusing(plan.source)) != plan.source:
        plan = replace(plan, source=source)
    if report.fixed or report.limits or report.guards:
        plan = replace(plan, source=with_size_checks(plan, report, is_nhwc))
    if plan is not found.plan:
        model = found.export.make(plan)
    port_weights.mark(model, plan.places())
    backends.module("mlx", "porting.layers").accelerate(model)
    if dtype != "fp32":
        backends.module("mlx", "porting.load").set_dtype(model, DTYPES[dtype])
    return Port(model, plan.source, report, plan, arrays_of(original.example), layout, torch_module)


def check(
    module: Any, example_inputs: Any, *, dynamic: Any = None, example_kwargs: Mapping[str, Any] | None = None
) -> dict[str, list[str]]:
    """Returns the operations that the table lacks, with the places where the module uses them."""
    return Original(module, example_inputs, example_kwargs, dynamic).export().missing()
