"""`icenet parity`: its forms and their options."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import click

from icenet.cli.options import (
    PATH,
    CommandGroup,
    examples,
    json_option,
    precision_option,
    set_option,
    show_json,
    trust_option,
)
from icenet.core.dtypes import FLOAT_DTYPES
from icenet.core.messages import options_of_command
from icenet.core.report import streams

_CODE = re.compile(r"[^=]+\.py:[A-Za-z_][A-Za-z0-9_]*")
"""An argument that names code in a file, such as `mine.py:Net`."""
_OPTIONS = {
    "inputs": "a file of inputs (--input)",
    "inputs as a dict or a tuple": "a file of inputs (--input)",
    "inputs, or layout=": "a file of inputs (--input)",
    "copy_weights=True": "--copy-weights",
    "dtype='fp32'": "--dtype fp32",
    "stages=['forward']": "--stages forward",
}
"""The options by the words that messages of `icenet.parity.compare` and `record` have for Python."""


class _ParityGroup(CommandGroup):
    """A group whose arguments select the command: `modules` if they name code, otherwise `config`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["modules" if any(map(_CODE.fullmatch, args)) else "config", *args]
        return super().parse_args(ctx, args)


@click.group(
    cls=_ParityGroup,
    epilog=examples(
        "icenet parity quickstart",
        "icenet parity runs/mine",
        "icenet parity mine.py:MlxNet ref.py:TorchNet",
        "icenet parity check mine.py:MlxNet trace/",
    ),
)
def parity() -> None:
    """Find the first layer that differs between two models.

    Compares the backends of a config, or two modules.

    The name of the command can be left out: `icenet parity quickstart` is `icenet parity config quickstart`, and
    `icenet parity mine.py:A ref.py:B` is `icenet parity modules mine.py:A ref.py:B`. The exit code is 0 if all values
    agree, otherwise 1. With `record` and `check`, the modules can be on two machines.
    """


@parity.command(
    "config",
    epilog=examples(
        "icenet parity quickstart",
        "icenet parity runs/mine --steps 50",
        "icenet parity my.yaml --dtype bf16 --verbose",
    ),
)
@click.argument("target")
@click.option(
    "--steps",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Length of a training curve to compare as well.",
)
@precision_option
@click.option("--verbose", is_flag=True, help="List every layer, not only those that stand out.")
@set_option
@json_option
@trust_option
def config_command(
    target: str, steps: int, dtype: str | None, verbose: bool, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Compare the backends layer by layer.

    TARGET is a config, a run, a checkpoint, a Hugging Face folder or a GGUF file.
    """
    from icenet.commands.parity import parity

    report = parity(target, overrides, steps=steps, dtype=dtype, quiet=as_json)
    if as_json:
        show_json(report.as_dict())
    else:
        from icenet.core.report.console import new_console

        report.render(new_console(), verbose)
    sys.exit(0 if report.passed else 1)


def _pairs(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str] | None:
    found = {}
    for value in values:
        old, separator, new = value.partition("=")
        if not separator or not old or not new:
            raise click.BadParameter(f"{value!r} is not A=B, such as layers.0=blocks.0", ctx, parameter)
        found[old] = new
    return found or None


def _stages(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[str] | None:
    if value is None:
        return None
    from icenet.parity.results.status import ALL_STAGES

    names = [part.strip() for part in value.split(",")]
    if unknown := [name for name in names if name not in ALL_STAGES]:
        known = ", ".join(ALL_STAGES)
        raise click.BadParameter(f"no stage {unknown[0]!r}; one or more of {known}, with commas", ctx, parameter)
    return names


_INPUT_OPTIONS = (
    click.option("--input", "input_file", type=PATH, metavar="FILE", help="Arguments of the modules, a .npz file."),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of drawn inputs."),
    click.option(
        "--weights",
        "weights_file",
        type=PATH,
        metavar="FILE",
        help="Weights of both modules, a .safetensors file with the names and axes of PyTorch.",
    ),
    click.option(
        "--dtype", type=click.Choice(list(FLOAT_DTYPES)), default="fp32", show_default=True, help="Compute dtype."
    ),
)
_RENAME_OPTION = (
    click.option(
        "--rename",
        multiple=True,
        callback=_pairs,
        metavar="A=B",
        help="Path of a module of the first and its path in the second, also of prefixes. Repeatable.",
    ),
)
_REPORT_OPTIONS = (
    click.option(
        "--stages", callback=_stages, metavar="LIST", help="Stages to run, with commas. Default: all, in order."
    ),
    click.option(
        "--copy-weights/--keep-weights",
        default=None,
        help="Compare with the weights of the second in a copy of the first, or with those it has. "
        "Default: copied if they have nothing in common.",
    ),
    click.option("--html", type=PATH, metavar="FILE", help="Write the page with all details."),
    json_option,
)
_REPLAY_OPTION = click.option(
    "--replay", type=PATH, metavar="FILE", help="Search the smallest input that differs and save it (.npz)."
)


def _with(*options: Any) -> Any:
    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@parity.command(
    "modules",
    epilog=examples(
        "icenet parity mine.py:MlxNet ref.py:TorchNet",
        "icenet parity mine.py:MlxNet ref.py:TorchNet --input x.npz --html parity.html",
        "icenet parity mine.py:net ref.py:net --weights model.safetensors --rename layers=blocks",
    ),
)
@click.argument("module")
@click.argument("reference")
@_with(*_INPUT_OPTIONS, *_RENAME_OPTION, *_REPORT_OPTIONS, _REPLAY_OPTION)
@options_of_command(_OPTIONS)
def modules_command(module: str, reference: str, as_json: bool, html: Path | None, **options: Any) -> None:
    """Compare two modules, MODULE with REFERENCE.

    Each is FILE.py:NAME: a module, or a class or function without arguments that returns one. The files are run.
    Without --input, the inputs are drawn for the signature and the first layer.
    """
    from icenet.commands.parity_modules import compare_files

    _check(html)
    _finish(compare_files(module, reference, quiet=as_json, **options), html, as_json)


@parity.command(
    "record",
    epilog=examples(
        "icenet parity record ref.py:TorchNet --input x.npz --out trace/",
        "icenet parity record ref.py:net --weights model.safetensors --dtype bf16 --out trace/",
    ),
)
@click.argument("module")
@click.option("--out", "folder", type=PATH, required=True, metavar="DIR", help="Folder of the trace, new or empty.")
@_with(*_INPUT_OPTIONS)
@options_of_command(_OPTIONS)
def record_command(module: str, folder: Path, **options: Any) -> None:
    """Record what MODULE computes, for `icenet parity check` on another machine.

    MODULE is FILE.py:NAME, usually of PyTorch. The other framework need not be installed. The trace is a folder of
    two files without code, written while the module runs.
    """
    from icenet.commands.parity_modules import record_file

    if streams.Diagnostics().isatty():
        streams.write_error(f"recording {module}: takes 10 to 30 times as long as a comparison")
    click.echo(record_file(module, folder, **options))


@parity.command(
    "check",
    epilog=examples(
        "icenet parity check mine.py:MlxNet trace/",
        "icenet parity check mine.py:net trace/ --weights model.safetensors --html parity.html",
    ),
)
@click.argument("module")
@click.argument("trace", type=PATH)
@_with(_INPUT_OPTIONS[2], *_RENAME_OPTION, *_REPORT_OPTIONS)
@options_of_command(_OPTIONS)
def check_command(module: str, trace: Path, as_json: bool, html: Path | None, **options: Any) -> None:
    """Compare MODULE with a trace of `icenet parity record`.

    MODULE is FILE.py:NAME. Inputs, dtype and seed are those of the trace. The framework of the reference need not be
    installed.
    """
    from icenet.commands.parity_modules import check_file

    _check(html)
    _finish(check_file(module, trace, quiet=as_json, **options), html, as_json)


def _check(html: Path | None) -> None:
    """Checks that the page can be written, before the comparison."""
    from icenet.parity.results import html as pages

    if html is not None:
        pages.check(html)


def _finish(report: Any, html: Path | None, as_json: bool) -> None:
    """Shows a report, writes its page, and ends with its exit code."""
    from icenet.commands.parity_modules import show

    if html is not None:
        report.to_html(html)
    show_json(report.as_dict()) if as_json else show(report, html)
    sys.exit(0 if report.passed else 1)
