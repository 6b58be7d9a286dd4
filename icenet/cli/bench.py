"""`icenet bench`: the measurements and their options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from icenet.cli.options import (
    PATH,
    CommandGroup,
    device_option,
    examples,
    json_option,
    overwrite_option,
    set_option,
    show,
)
from icenet.core.dtypes import FLOAT_DTYPES
from icenet.core.report import streams


@click.group(cls=CommandGroup, epilog=examples("icenet bench memory", "icenet bench step", "icenet bench dropout"))
def bench() -> None:
    """Measure memory and speed on this machine.

    Measures every installed backend, or the one given with --backend, each in a separate process.
    """


def _layer_counts(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[int]:
    try:
        counts = [int(part) for part in (value or "").split(",") if part.strip()]
    except ValueError:
        counts = [0]
    if any(count < 1 for count in counts):
        raise click.BadParameter("give numbers of layers separated by commas, e.g. 4,8,16,24", ctx, parameter)
    return counts


def _precisions(ctx: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    precisions = [part.strip() for part in value.split(",")]
    if not set(precisions) <= FLOAT_DTYPES.keys():
        known = ", ".join(FLOAT_DTYPES)
        raise click.BadParameter(f"give one or more of {known}, separated by commas", ctx, parameter)
    return precisions


def _notify(as_json: bool) -> Callable[[str], None]:
    """Returns the function that reports progress: to standard error, or nowhere with --json."""
    return (lambda text: None) if as_json else streams.write_error


config_argument = click.argument("config", default="quickstart")
backend_option = click.option(
    "--backend", type=click.Choice(["auto", "mlx", "torch"]), help="Backend to measure. Default: every installed one."
)


@bench.command(
    "memory",
    epilog=examples(
        "icenet bench memory",
        "icenet bench memory my.yaml --backend torch --device cuda --precision fp32,bf16,fp16",
        "icenet bench memory --depth 4,8,16,24 --set model.hidden_size=64 --set training.batch_size=16",
    ),
)
@config_argument
@click.option(
    "--precision",
    callback=_precisions,
    default="fp32,bf16",
    show_default=True,
    metavar="LIST",
    help="Values of training.mixed_precision to measure.",
)
@click.option(
    "--depth", callback=_layer_counts, metavar="LIST", help="Numbers of layers to measure, with a plot of the peaks."
)
@click.option("--out", type=PATH, help="File of the plot. Default: bench-memory.png.")
@overwrite_option
@backend_option
@device_option
@set_option
@json_option
def memory_command(
    config: str,
    precision: list[str],
    depth: list[int],
    out: Path | None,
    overwrite: bool,
    backend: str | None,
    device: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure the peak memory of a training step.

    Measures a step of CONFIG with and without gradient checkpointing.
    """
    from icenet.commands.bench import memory

    show(memory.run(config, overrides, backend, device, precision, depth, out, _notify(as_json), overwrite), as_json)


@bench.command(
    "step",
    epilog=examples("icenet bench step --set model.dropout=0", "icenet bench step my.yaml --steps 400 --backend mlx"),
)
@config_argument
@click.option(
    "--steps", type=click.IntRange(8), default=200, show_default=True, help="Number of steps to time in each loop."
)
@backend_option
@device_option
@set_option
@json_option
def step_command(
    config: str, steps: int, backend: str | None, device: str | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Time a training step against a minimal loop.

    The minimal loop trains the model of CONFIG and is written with the framework alone. The dtype of both is
    training.mixed_precision, a key for --set.
    """
    from icenet.commands.bench import step

    show(step.run(config, overrides, backend, device, steps, _notify(as_json)), as_json)


@bench.command("dropout", epilog=examples("icenet bench dropout", "icenet bench dropout --backend torch --rounds 51"))
@click.option("--rounds", type=click.IntRange(3), default=15, show_default=True, help="Number of repetitions.")
@backend_option
@device_option
@json_option
def dropout_command(rounds: int, backend: str | None, device: str | None, as_json: bool) -> None:
    """Time keyed dropout against the framework's own.

    Keyed dropout has the same masks on both backends.
    """
    from icenet.commands.bench import dropout

    show(dropout.run(backend, device, rounds, _notify(as_json)), as_json)
