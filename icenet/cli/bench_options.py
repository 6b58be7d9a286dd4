"""Options and functions that the measurements of `icenet bench` share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from icenet.cli.options import device_option, overwrite_option, set_option, show
from icenet.core.dtypes import FLOAT_DTYPES
from icenet.core.report import streams

config_argument = click.argument("config", default="quickstart")
backend_option = click.option(
    "--backend", type=click.Choice(["auto", "mlx", "torch"]), help="Backend to measure. Default: every installed one."
)


json_file_option = click.option(
    "--json",
    "json_file",
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    help="Write the results to a file as JSON, or print them instead of the tables if no FILE is given.",
)


sides_options = (backend_option, device_option, set_option, json_file_option, overwrite_option)
"""The last options of the measurements of sides."""


class FiniteRange(click.FloatRange):
    """A number of a range, neither infinite nor NaN, which a range of click accepts."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


def add_options(command: Any, options: Sequence[Callable[[Any], Any]]) -> Any:
    """Returns a command with options, which its help lists in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def names(
    ctx: click.Context, parameter: click.Parameter, value: str | None, known: list[str], kind: str
) -> list[str]:
    """Returns the names of a list with commas; none if it is not given.

    Args:
        known: The names that there are.
        kind: What they are, for the message.
    """
    found = [part.strip() for part in value.split(",")] if value is not None else []
    if unknown := [name for name in found if name not in known]:
        raise click.BadParameter(
            f"no {kind} {unknown[0]!r}; one or more of {', '.join(known)}, separated by commas", ctx, parameter
        )
    return found


def precisions(ctx: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    """Returns the dtypes of a list with commas."""
    found = [part.strip() for part in value.split(",")]
    if not set(found) <= FLOAT_DTYPES.keys():
        known = ", ".join(FLOAT_DTYPES)
        raise click.BadParameter(f"give one or more of {known}, separated by commas", ctx, parameter)
    return found


def notify(as_json: bool) -> Callable[[str], None]:
    """Returns the function that reports progress: to standard error, or nowhere with --json."""
    return (lambda text: None) if as_json else streams.write_error


def run_rows(run: Callable[[Callable[[str], None]], Any], json_file: str | None, overwrite: bool) -> None:
    """Measures rows, shows the report and writes it to a file if there is one."""
    from icenet.core import files

    path = None if json_file in (None, "-") else files.output_file(Path(str(json_file)), overwrite=overwrite)
    report = run(notify(json_file == "-"))
    show(report, json_file == "-")
    if path is not None:
        files.write_text(path, json.dumps(report.as_dict(), indent=2) + "\n")
        streams.write(f"json  {path}")
    if report.interruption is not None:
        raise report.interruption
