"""`icenet port`: ports a PyTorch module to MLX, with proof."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from icenet.core import backends, files
from icenet.core.config import user_code
from icenet.core.errors import UsageError
from icenet.core.report.console import stderr_console
from icenet.parity.ports import port as porting
from icenet.parity.ports.attempts import describe_missing

_SHAPE = re.compile(
    r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<sizes>\d+(?:x\d+)*|scalar)(?::(?P<kind>float|int|bool)(?P<below>\d+)?)?"
)


def port(
    target: str,
    shapes: Sequence[str],
    out: Path | None,
    *,
    weights: Path | None = None,
    only_check: bool = False,
    dtype: str = "fp32",
    layout: str = "nchw",
    overwrite: bool = False,
    quiet: bool = False,
) -> tuple[str, bool]:
    """Ports the module that a target names.

    Args:
        target: `FILE.py:CLASS`, which is run, `torchvision:NAME`, `timm:NAME` or `transformers:FOLDER`.
        shapes: The inputs, such as 1x3x224x224 or 1x16:int50000.
        out: The folder of the port; None writes nothing.
        weights: A state dict: .safetensors, or a file of torch.save with tensors only.
        only_check: Report the operations that have no counterpart, and port nothing.
        dtype, layout: See `icenet.port`.
        overwrite: Whether to replace files in the folder.
        quiet: Show no progress.

    Returns:
        The text of the result, and whether all is well.
    """
    if out is not None and not only_check:
        folder = files.user_path(out, "port")
        if (folder / "model.py").exists() and not overwrite:
            raise UsageError(f"{folder}: model.py exists; give another folder, or --overwrite")
        files.check_folder(folder)
    backends.module("torch", "porting.export")
    module, example = _module(target)
    if weights is not None:
        backends.module("torch", "porting.sources").load_weights(module, files.user_path(weights, "port"))
    args, kwargs = _inputs(shapes, example)
    if only_check:
        found = porting.check(module, args, example_kwargs=kwargs)
        if found:
            return describe_missing(found), False
        return f"{target}: every operation has a counterpart", True
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = stderr_console()
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("exporting", total=None)
        done = porting.port(
            module,
            args,
            dtype=dtype,
            layout=layout,
            example_kwargs=kwargs,
            progress=lambda stage: bar.update(task, description=stage),
        )
    lines = [str(done.report)]
    if out is not None:
        lines.append(
            f"wrote {done.save(out, overwrite=overwrite)}: model.py, weights.safetensors, config.json, parity.html"
        )
    return "\n".join(lines), done.report.passed


def _module(target: str) -> tuple[Any, Any]:
    """Returns the module that a target names, and example inputs if the source knows them."""
    kind, _, name = target.partition(":")
    sources = backends.module("torch", "porting.sources")
    if kind.endswith(".py") and name:
        path = files.user_path(Path(kind), "port")
        if not path.is_file():
            raise UsageError(f"{path}: no such file")
        try:
            found = user_code.run_file(path, target)
        except ImportError as error:
            raise UsageError(f"{target}: {error}") from None
        made = getattr(found, name, None)
        if made is None:
            raise UsageError(
                f"{path} has no {name}; it has {', '.join(sources.modules_in(found)) or 'no torch.nn.Module'}"
            )
        return sources.instance(made, target), None
    if kind in ("torchvision", "timm", "transformers") and name:
        made, example = getattr(sources, kind)(name)
        return made, example
    raise UsageError(
        f"{target}: give FILE.py:CLASS, torchvision:NAME, timm:NAME or transformers:FOLDER, such as mine.py:Net"
    )


def _mask(sizes: tuple[int, ...]) -> np.ndarray:
    """Returns a boolean array that is true in the first three quarters of its last axis.

    So a mask of padding leaves something out and something in, whether true means padding or a token: a row that is
    masked as a whole has a softmax of NaN, which proves nothing.
    """
    last = sizes[-1] if sizes else 1
    return np.broadcast_to(np.arange(last) < max(1, last * 3 // 4), sizes).copy()


def _inputs(shapes: Sequence[str], example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns random inputs of the shapes."""
    if not shapes:
        if example is None:
            raise UsageError(
                "give the shapes of the inputs, such as --shape 1x3x224x224, or --shape 1x16:int50000 for ids"
            )
        return (), dict(example)
    rng = np.random.default_rng(0)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    tensors = backends.module("torch", "porting.inputs").tensors
    for text in shapes:
        match = _SHAPE.fullmatch(text)
        if match is None:
            raise UsageError(
                f"--shape {text}: write sizes with x between them, such as 1x3x224x224 or mask=1x16:bool"
            )
        if re.search(r"(?:^|=|x)0+(?:x|:|$)", text) or int(match["below"] or 1) == 0:
            raise UsageError(f"--shape {text}: give sizes and numbers of ids from 1")
        sizes = () if match["sizes"] == "scalar" else tuple(map(int, match["sizes"].split("x")))
        try:
            if match["kind"] == "int":
                array = rng.integers(0, int(match["below"] or 10), sizes)
            elif match["kind"] == "bool":
                array = _mask(sizes)
            else:
                array = rng.standard_normal(sizes).astype(np.float32)
        except (MemoryError, OverflowError, ValueError):  # of numpy: more bytes, values or ids than it can have
            raise UsageError(f"--shape {text}: does not fit into memory; give smaller numbers") from None
        value = tensors(np.asarray(array))
        if match["name"]:
            kwargs[match["name"]] = value
        elif kwargs:
            raise UsageError(f"--shape {text}: inputs without a name come before those with one")
        else:
            args.append(value)
    return tuple(args), kwargs
