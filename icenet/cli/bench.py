"""`icenet bench`: the measurements and their options."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@click.group(
    cls=CommandGroup,
    epilog=examples("icenet bench decode", "icenet bench all gpt2", "icenet bench memory"),
)
def bench() -> None:
    """Measure memory and speed on this machine.

    Measures every installed backend, or the one given with --backend, each in a separate process. decode, prefill,
    batch, load, start and all also measure mlx-lm and transformers, if they are installed, on the same weights, and
    quantized measures mlx-lm.
    """


def _numbers(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        numbers = [int(part) for part in value.split(",")]
    except ValueError:
        numbers = [0]
    if any(number < 1 for number in numbers):
        raise click.BadParameter("give numbers from 1 separated by commas, e.g. 1,32", ctx, parameter)
    return numbers


def _sides(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[str]:
    from icenet.commands.bench.sides import KINDS

    names = [part.strip() for part in value.split(",")] if value is not None else []
    if unknown := [name for name in names if name not in KINDS]:
        known = ", ".join(KINDS)
        raise click.BadParameter(
            f"no side {unknown[0]!r}; one or more of {known}, separated by commas", ctx, parameter
        )
    return names


_json_file_option = click.option(
    "--json",
    "json_file",
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    help="Write the results to a file as JSON, or print them instead of the tables if no FILE is given.",
)


def _inference_options(command: Any) -> Any:
    """Adds the argument and the options that all measurements of inference have."""
    parts = (
        click.argument("target", default="gpt2"),
        click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Rounds that count."),
        click.option(
            "--dtype",
            "dtypes",
            callback=lambda ctx, parameter, value: None if value is None else _precisions(ctx, parameter, value),
            metavar="LIST",
            help="Dtypes of the weights: fp32, bf16, fp16. Default: bf16 on a GPU, fp32 on a CPU.",
        ),
        click.option("--sample", is_flag=True, help="Sample tokens (temperature 0.8, top-k 50); otherwise greedy."),
        click.option(
            "--side",
            "only",
            callback=_sides,
            metavar="LIST",
            help="Sides to measure, e.g. 'icenet mlx,mlx-lm'. Default: all that are installed.",
        ),
        backend_option,
        device_option,
        set_option,
        _json_file_option,
        overwrite_option,
    )
    for part in reversed(parts):
        command = part(command)
    return command


_new_tokens_option = click.option("--new-tokens", type=click.IntRange(2), help="New tokens of each prompt.")


def _run_inference(rows: list[str], json_file: str | None, overwrite: bool, **options: Any) -> None:
    from icenet.commands.bench import inference

    _run_rows(lambda notify: inference.run(rows, inference.Options(**options), notify), json_file, overwrite)


def _run_rows(run: Callable[[Callable[[str], None]], Any], json_file: str | None, overwrite: bool) -> None:
    """Measures rows, shows the report and writes it to a file if there is one."""
    from icenet.core import files

    path = None if json_file in (None, "-") else files.output_file(Path(str(json_file)), overwrite=overwrite)
    report = run(_notify(json_file == "-"))
    show(report, json_file == "-")
    if path is not None:
        files.write_text(path, json.dumps(report.as_dict(), indent=2) + "\n")
        streams.write(f"json  {path}")
    if report.interruption is not None:
        raise report.interruption


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


_batches_option = click.option(
    "--batch", "batches", callback=_numbers, metavar="LIST", help="Numbers of prompts. Default: 1,32 or 1,8."
)
_lengths_option = click.option(
    "--prompt", "prompts", callback=_numbers, metavar="LIST", help="Lengths of the prompts. Default: 64."
)


@bench.command(
    "decode",
    epilog=examples(
        "icenet bench decode",
        "icenet bench decode llama-1.5b --batch 1,32 --prompt 64,1024 --new-tokens 256 --dtype bf16,fp32",
        "icenet bench decode gpt2 --set model.hidden_size=512 --backend mlx --json decode.json",
    ),
)
@_inference_options
@_batches_option
@_lengths_option
@_new_tokens_option
def decode_command(**options: Any) -> None:
    """Measure the new tokens per second.

    TARGET is a shape with random weights (gpt2, gpt2-large, gpt2-xl, smollm2-135m, llama-1b, llama-1.5b, llama-8b), a
    preset, a YAML file, or a model that icenet.load reads.
    """
    _run_inference(["decode"], **options)


def _one_size(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    expected = {"prefill": ("count", "length"), "mixed": ("count", "shortest", "longest")}[str(parameter.name)]
    numbers = None if value is None else value.split("x" if len(expected) == 2 else ",")
    if numbers is None:
        return None
    if len(numbers) != len(expected) or not all(part.isdecimal() and int(part) > 0 for part in numbers):
        example = "8x1024" if len(expected) == 2 else "64,32,512"
        raise click.BadParameter(f"give {' and '.join(expected)} like {example}", ctx, parameter)
    sizes = tuple(int(part) for part in numbers)
    if len(sizes) == 3 and sizes[1] > sizes[2]:
        raise click.BadParameter(
            f"the shortest prompt, {sizes[1]}, is longer than the longest, {sizes[2]}", ctx, parameter
        )
    return sizes


_prefill_option = click.option(
    "--prompts", "prefill", callback=_one_size, metavar="COUNTxLENGTH", help="Prompts. Default: 8x1024 or 1x256."
)
_mixed_option = click.option(
    "--prompts",
    "mixed",
    callback=_one_size,
    metavar="COUNT,SHORTEST,LONGEST",
    help="Prompts and their lengths. Default: 64,32,512 or 8,16,64.",
)


@bench.command(
    "prefill", epilog=examples("icenet bench prefill", "icenet bench prefill llama-1b --prompts 4x2048 --dtype bf16")
)
@_inference_options
@_prefill_option
def prefill_command(**options: Any) -> None:
    """Measure the prompt tokens per second.

    TARGET is the same as in icenet bench decode.
    """
    _run_inference(["prefill"], **options)


@bench.command(
    "batch", epilog=examples("icenet bench batch", "icenet bench batch --prompts 64,32,512 --new-tokens 128")
)
@_inference_options
@_mixed_option
@_new_tokens_option
def batch_command(**options: Any) -> None:
    """Measure many prompts of unequal lengths.

    The value is new tokens per second, with the time of reading the prompts. TARGET is the same as in icenet bench
    decode.
    """
    _run_inference(["batch"], **options)


def _bits(ctx: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    from icenet.core.weights.packed import BITS

    found = _numbers(ctx, parameter, value) or []
    if not set(found) <= set(BITS):
        known = ", ".join(map(str, BITS))
        raise click.BadParameter(f"give one or more of {known}, separated by commas", ctx, parameter)
    return list(dict.fromkeys(found))


@bench.command(
    "quantized",
    epilog=examples(
        "icenet bench quantized llama-1.5b", "icenet bench quantized llama-1b --bits 4 --group-size 32 --batch 1,8"
    ),
)
@_inference_options
@_batches_option
@_lengths_option
@_new_tokens_option
@click.option("--bits", callback=_bits, default="8,4", show_default=True, metavar="LIST", help="Bits of a weight.")
@click.option(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    callback=lambda ctx, parameter, value: int(value),
    default="64",
    show_default=True,
    help="Number of weights that share a scale.",
)
def quantized_command(**options: Any) -> None:
    """Measure decoding with quantized weights.

    The new tokens per second with the weights as they are, and with the same weights quantized. TARGET is the same as
    in icenet bench decode.
    """
    _run_inference(["quantized"], **options)


@bench.command(
    "speculative",
    epilog=examples(
        "icenet bench speculative", "icenet bench speculative llama-1.5b --agreement 0.8 --prompt 64,1024"
    ),
)
@_inference_options
@_lengths_option
@_new_tokens_option
@click.option(
    "--agreement",
    type=click.FloatRange(0, 1),
    default=0.7,
    show_default=True,
    help="Probability that the draft proposes the token of the model.",
)
def speculative_command(**options: Any) -> None:
    """Measure decoding with a draft model.

    The new tokens per second of one prompt without a draft, and with one of a quarter of the layers and half the
    width, whose proposals agree at a given rate. TARGET is the same as in icenet bench decode.
    """
    if options["sample"]:
        raise click.UsageError("--sample has no effect on speculative: its tokens are drawn at temperature 100")
    _run_inference(["speculative"], **options)


@bench.command("load", epilog=examples("icenet bench load llama-1.5b", "icenet bench load SmolLM2-135M --dtype bf16"))
@_inference_options
def load_command(**options: Any) -> None:
    """Time the loading of weights against reading the file.

    TARGET is the same as in icenet bench decode.
    """
    _run_inference(["load"], **options)


@bench.command("convert", epilog=examples("icenet bench convert gpt2-large", "icenet bench convert runs/mine"))
@_inference_options
def convert_command(**options: Any) -> None:
    """Time the conversion of weights against copying the file.

    TARGET is the same as in icenet bench decode.
    """
    _run_inference(["convert"], **options)


@bench.command("start", epilog=examples("icenet bench start", "icenet bench start gpt2 --dtype bf16 --backend torch"))
@_inference_options
def start_command(**options: Any) -> None:
    """Time new processes: the help, and a first token.

    The limit of a first token is a process that imports the framework and reads the file. TARGET is the same as in
    icenet bench decode.
    """
    _run_inference(["start"], **options)


@bench.command("all", epilog=examples("icenet bench all", "icenet bench all llama-1.5b --json bench.json"))
@_inference_options
@_new_tokens_option
def all_command(**options: Any) -> None:
    """Run decode, prefill, batch, quantized, speculative, load, convert and start.

    TARGET is the same as in icenet bench decode.
    """
    rows = ["decode", "prefill", "batch", "quantized", "speculative", "load", "convert", "start"]
    _run_inference(rows, **options)


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
            type=click.FloatRange(0, min_open=True),
            default=1.0,
            show_default=True,
            help="Time of a side in a round; at least one step.",
        ),
        click.option(
            "--side",
            "only",
            callback=_training_sides,
            metavar="LIST",
            help="Sides to measure, e.g. 'icenet mlx,torch loop'. Default: all that are installed.",
        ),
        backend_option,
        device_option,
        set_option,
        _json_file_option,
        overwrite_option,
    )
    for part in reversed(parts):
        command = part(command)
    return command


def _training_sides(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[str]:
    from icenet.commands.bench.loops import KINDS

    return _names(ctx, parameter, value, list(KINDS), "side")


def _training_rows(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[str]:
    from icenet.commands.bench import guide, training

    rows = guide.ROWS if ctx.info_name == "guide" else training.ROWS
    return _names(ctx, parameter, value, list(rows), "row") or list(rows)


def _names(
    ctx: click.Context, parameter: click.Parameter, value: str | None, known: list[str], kind: str
) -> list[str]:
    names = [part.strip() for part in value.split(",")] if value is not None else []
    if unknown := [name for name in names if name not in known]:
        raise click.BadParameter(
            f"no {kind} {unknown[0]!r}; one or more of {', '.join(known)}, separated by commas", ctx, parameter
        )
    return names


_rows_option = click.option(
    "--row", "rows", callback=_training_rows, metavar="LIST", help="Rows to measure. Default: all."
)


def _run_training(known: Any, rows: list[str], json_file: str | None, overwrite: bool, **options: Any) -> None:
    from icenet.commands.bench import training

    chosen = {name: known[name] for name in rows}
    _run_rows(lambda notify: training.run(chosen, training.Options(**options), notify), json_file, overwrite)


@bench.command(
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

    Rows: gpt (a transformer, the guide's Small), lstm (4 x 512) and cnn (ResNet-50). The loops have the layers of
    PyTorch, torchvision and mlx.nn. The sizes are smaller on a CPU.
    """
    from icenet.commands.bench import training

    _run_training(training.ROWS, rows, **options)


@bench.command(
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
    _run_training(guide.ROWS, rows, **options)


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
