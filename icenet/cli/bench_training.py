"""`icenet bench train`, `guide`, `cpu`, `memory`, `step`, `dropout` and `port`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from icenet.cli.bench_options import (
    FiniteRange,
    add_options,
    backend_option,
    config_argument,
    names,
    notify,
    precisions,
    run_rows,
    sides_options,
)
from icenet.cli.options import (
    PATH,
    command,
    device_option,
    examples,
    json_option,
    overwrite_option,
    set_option,
    show,
)


def _training_options(command: Any) -> Any:
    """Adds the options of the measurements of training."""
    parts = (
        click.option("--batch", type=click.IntRange(1), help="Rows of a batch. Default: those of each row."),
        click.option("--length", type=click.IntRange(1), help="Tokens of a row, or height and width of the images."),
        click.option(
            "--precision",
            type=click.Choice(["fp32", "bf16"]),
            help="training.mixed_precision. Default: bf16 on a GPU, fp32 on a CPU.",
        ),
        click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Rounds that count."),
        click.option(
            "--seconds",
            type=FiniteRange(0, min_open=True),
            default=1.0,
            show_default=True,
            help="Time of a side in a round; at least one step.",
        ),
        click.option(
            "--limit",
            type=FiniteRange(0, min_open=True),
            default=120.0,
            show_default=True,
            help="Seconds of the rounds of a row, without compiling. A slower row has fewer rounds, at least one.",
        ),
        click.option(
            "--side",
            "only",
            callback=_training_sides,
            metavar="LIST",
            help="Sides to measure, e.g. 'icenet mlx,torch loop'. Default: all that are installed.",
        ),
        *sides_options,
    )
    return add_options(command, parts)


def _training_sides(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[str]:
    from icenet.commands.bench.loops import KINDS

    return names(ctx, parameter, value, list(KINDS), "side")


def _training_rows(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[str]:
    from icenet.commands.bench import cpu, guide, training_rows

    rows = {"guide": guide.ROWS, "cpu": cpu.ROWS}.get(str(ctx.info_name), training_rows.ROWS)
    return names(ctx, parameter, value, list(rows), "row") or list(rows)


_rows_option = click.option(
    "--row", "rows", callback=_training_rows, metavar="LIST", help="Rows to measure. Default: all."
)


def _run_training(module: Any, rows: list[str], json_file: str | None, overwrite: bool, **options: Any) -> None:
    """Measures rows of a module of `icenet.commands.bench`."""
    from icenet.commands.bench import training, training_rows

    chosen = {name: module.ROWS[name] for name in rows}
    run = getattr(module, "run", training.run)
    run_rows(lambda notify: run(chosen, training_rows.Options(**options), notify), json_file, overwrite)


@command(
    "train",
    epilog=examples(
        "icenet bench train",
        "icenet bench train --row gpt --batch 16 --length 1024 --set model.hidden_size=768",
        "icenet bench train --row cnn,lstm --backend torch --precision fp32 --json train.json",
    ),
)
@_rows_option
@_training_options
def train_command(rows: list[str], **options: Any) -> None:
    """Measure training next to loops written by hand.

    Rows: gpt (the preset transformer-small), lstm (4 x 512) and cnn (ResNet-50). The loops have the layers of
    PyTorch, torchvision and mlx.nn. The sizes are smaller on a CPU.
    """
    from icenet.commands.bench import training_rows

    _run_training(training_rows, rows, **options)


@command(
    "guide", epilog=examples("icenet bench guide", "icenet bench guide --row transformer-small,lstm --length 128")
)
@_rows_option
@_training_options
def guide_command(rows: list[str], **options: Any) -> None:
    """Measure the rows of the guide's benchmark table.

    They are shown next to the guide's figures on an Apple M4 Pro. Rows: transformer-small, transformer-medium,
    transformer-large, cnn, lstm.
    """
    from icenet.commands.bench import guide

    options["only"] = options["only"] or ["icenet mlx", "icenet torch"]
    _run_training(guide, rows, **options)


@command(
    "cpu",
    epilog=examples(
        "icenet bench cpu",
        "icenet bench cpu --row lstm-2x256,gpt-quickstart --repeats 9",
        "icenet bench cpu --row lstm-4x512 --batch 64 --set model.bidirectional=true --json",
    ),
)
@_rows_option
@_training_options
def cpu_command(rows: list[str], **options: Any) -> None:
    """Measure the processor time of training on a CPU.

    Small models of all kinds on MLX and PyTorch. Processor time depends less on other programs than time does. Rows:
    gpt-quickstart, gpt-small, cnn-digits, gru-2x256, gru-4x512, rnn-2x256, rnn-4x512, lstm-1x128, lstm-2x256,
    lstm-2x256-wide, lstm-2x256-bidirectional, lstm-4x512, lstm-4x512-wide (wide: more rows in a batch).
    """
    from icenet.commands.bench import cpu

    options["only"] = options["only"] or ["icenet mlx", "icenet torch"]
    options["device"] = options["device"] or "cpu"
    _run_training(cpu, rows, **options)


def _layer_counts(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[int]:
    try:
        counts = [int(part) for part in (value or "").split(",") if part.strip()]
    except ValueError:
        counts = [0]
    if any(count < 1 for count in counts):
        raise click.BadParameter("give numbers of layers separated by commas, e.g. 4,8,16,24", ctx, parameter)
    return counts


@command(
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
    callback=precisions,
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

    show(memory.run(config, overrides, backend, device, precision, depth, out, notify(as_json), overwrite), as_json)


@command(
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

    show(step.run(config, overrides, backend, device, steps, notify(as_json)), as_json)


@command("dropout", epilog=examples("icenet bench dropout", "icenet bench dropout --backend torch --rounds 51"))
@click.option("--rounds", type=click.IntRange(3), default=15, show_default=True, help="Number of repetitions.")
@backend_option
@device_option
@json_option
def dropout_command(rounds: int, backend: str | None, device: str | None, as_json: bool) -> None:
    """Time keyed dropout against the framework's own.

    Keyed dropout has the same masks on both backends.
    """
    from icenet.commands.bench import dropout

    show(dropout.run(backend, device, rounds, notify(as_json)), as_json)


def _ported_models(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[str]:
    from icenet.commands.bench.port import MODELS

    return names(ctx, parameter, value, list(MODELS), "model") or list(MODELS)


@command(
    "port",
    epilog=examples(
        "icenet bench port",
        "icenet bench port --model resnet50 --batch 64 --length 224 --precision bf16 --device gpu",
    ),
)
@click.option(
    "--model", "models", callback=_ported_models, metavar="LIST", help="Models: resnet50, gpt2. Default: both."
)
@click.option("--batch", type=click.IntRange(1), help="Rows of a batch. Default: more on a GPU.")
@click.option("--length", type=click.IntRange(1), help="Tokens of a row, or height and width of the images.")
@click.option("--layers", type=click.IntRange(1), default=12, show_default=True, help="Layers of GPT-2.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="The dtype of the weights and the arithmetic of both.",
)
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True, help="Number of repetitions.")
@device_option
@json_option
def port_command(as_json: bool, **options: Any) -> None:
    """Time ports next to IceNet's own models.

    Ports torchvision's ResNet-50 and the GPT-2 of transformers, with random weights, to MLX by icenet.port. IceNet's
    own models get the same weights. The proof of a port takes minutes.
    """
    from icenet.commands.bench import port

    show(port.run(**options, notify=notify(as_json)), as_json)
