"""`icenet bench`: one short function a measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from icenet.cli.options import (
    Commands,
    backend_option,
    check_device,
    device_option,
    examples,
    json_option,
    json_text,
    set_option,
)


@click.group(cls=Commands, epilog=examples("icenet bench memory", "icenet bench step", "icenet bench dropout"))
def bench() -> None:
    """Measure what things cost on this machine, on each backend in a process of its own.

    Without --backend all that are installed are measured.
    """


def _numbers(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[int]:
    try:
        found = [int(part) for part in (value or "").split(",") if part.strip()]
    except ValueError:
        found = [0]
    if any(number < 1 for number in found):
        raise click.BadParameter("numbers of layers with commas between them, as 4,8,16,24", ctx, parameter)
    return found


def _precisions(ctx: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    known = ("fp32", "bf16", "fp16")
    found = [part.strip() for part in value.split(",")]
    if not set(found) <= set(known):
        raise click.BadParameter(f"some of {', '.join(known)}, with commas between them", ctx, parameter)
    return found


def _show(report: Any, as_json: bool) -> None:
    click.echo(json_text(report.as_dict())) if as_json else report.render()


def _notify(as_json: bool) -> Any:
    return (lambda text: None) if as_json else (lambda text: click.echo(text, err=True))


config_argument = click.argument("config", default="quickstart")


@bench.command(
    epilog=examples(
        "icenet bench memory",
        "icenet bench memory my.yaml --backend torch --device cuda --precision fp32,bf16,fp16",
        "icenet bench memory --depth 4,8,16,24 --set model.hidden_size=64 --set training.batch_size=8",
    )
)
@config_argument
@click.option("--precision", callback=_precisions, default="fp32,bf16", show_default=True, metavar="LIST")
@click.option("--depth", callback=_numbers, metavar="LIST", help="Numbers of layers; draws the peak against them.")
@click.option("--out", type=click.Path(path_type=Path), help="The picture; bench-memory.png with several depths.")
@backend_option
@device_option
@set_option
@json_option
def memory(
    config: str,
    precision: list[str],
    depth: list[int],
    out: Path | None,
    backend: str | None,
    device: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Peak memory of a training step of CONFIG, with gradient checkpointing and without."""
    from icenet.commands.bench import memory as room

    check_device(device)
    _show(room.run(config, overrides, backend, device, precision, depth, out, _notify(as_json)), as_json)


@bench.command(
    epilog=examples("icenet bench step --set model.dropout=0", "icenet bench step my.yaml --steps 400 --backend mlx")
)
@config_argument
@click.option("--steps", type=click.IntRange(8), default=200, show_default=True, help="Steps of each loop.")
@backend_option
@device_option
@set_option
@json_option
def step(
    config: str, steps: int, backend: str | None, device: str | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """A step of icenet's loop on CONFIG, against the framework's own minimal loop for the same model."""
    from icenet.commands.bench import step as room

    check_device(device)
    _show(room.run(config, overrides, backend, device, steps, _notify(as_json)), as_json)


@bench.command(epilog=examples("icenet bench dropout", "icenet bench dropout --backend torch --rounds 51"))
@click.option("--rounds", type=click.IntRange(3), default=15, show_default=True)
@backend_option
@device_option
@json_option
def dropout(rounds: int, backend: str | None, device: str | None, as_json: bool) -> None:
    """Keyed dropout, whose masks agree on both backends, against each framework's own."""
    from icenet.commands.bench import dropout as room

    check_device(device)
    _show(room.run(backend, device, rounds, _notify(as_json)), as_json)
