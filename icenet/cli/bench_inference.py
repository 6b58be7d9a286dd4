"""`icenet bench decode`, `prefill`, `batch`, `quantized`, `speculative`, `load`, `convert`, `start` and `all`."""

from __future__ import annotations

from typing import Any

import click

from icenet.cli.bench_options import (
    FiniteRange,
    add_options,
    names,
    precisions,
    run_rows,
    sides_options,
)
from icenet.cli.options import (
    command,
    examples,
)


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

    return names(ctx, parameter, value, list(KINDS), "side")


def _inference_options(command: Any) -> Any:
    """Adds the argument and the options that all measurements of inference have."""
    parts = (
        click.argument("target", default="gpt2"),
        click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Rounds that count."),
        click.option(
            "--dtype",
            "dtypes",
            callback=lambda ctx, parameter, value: None if value is None else precisions(ctx, parameter, value),
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
        *sides_options,
    )
    return add_options(command, parts)


_new_tokens_option = click.option("--new-tokens", type=click.IntRange(2), help="New tokens of each prompt.")


_NOT_SAMPLED = {
    "speculative": "its tokens are drawn at temperature 100",
    "load": "it generates no tokens",
    "convert": "it generates no tokens",
    "start": "its token is the most likely one",
}


def _run_inference(rows: list[str], json_file: str | None, overwrite: bool, **options: Any) -> None:
    from icenet.commands.bench import inference, inference_rows

    if options["sample"] and len(rows) == 1 and (reason := _NOT_SAMPLED.get(rows[0])):
        raise click.UsageError(f"--sample has no effect on {rows[0]}: {reason}")
    run_rows(lambda notify: inference.run(rows, inference_rows.Options(**options), notify), json_file, overwrite)


_batches_option = click.option(
    "--batch", "batches", callback=_numbers, metavar="LIST", help="Numbers of prompts. Default: 1,32 or 1,8."
)
_lengths_option = click.option(
    "--prompt", "prompts", callback=_numbers, metavar="LIST", help="Lengths of the prompts. Default: 64."
)


@command(
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


@command(
    "prefill", epilog=examples("icenet bench prefill", "icenet bench prefill llama-1b --prompts 4x2048 --dtype bf16")
)
@_inference_options
@_prefill_option
def prefill_command(**options: Any) -> None:
    """Measure the prompt tokens per second.

    TARGET is the same as in icenet bench decode.
    """
    _run_inference(["prefill"], **options)


@command("batch", epilog=examples("icenet bench batch", "icenet bench batch --prompts 64,32,512 --new-tokens 128"))
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
    from icenet.core.weights.quantization import BITS

    found = _numbers(ctx, parameter, value) or []
    if not set(found) <= set(BITS):
        known = ", ".join(map(str, BITS))
        raise click.BadParameter(f"give one or more of {known}, separated by commas", ctx, parameter)
    return list(dict.fromkeys(found))


@command(
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


@command(
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
    type=FiniteRange(0, 1),
    default=0.7,
    show_default=True,
    help="Probability that the draft proposes the token of the model.",
)
def speculative_command(**options: Any) -> None:
    """Measure decoding with a draft model.

    The new tokens per second of one prompt without a draft, and with one of a quarter of the layers and half the
    width, whose proposals agree at a given rate. TARGET is the same as in icenet bench decode.
    """
    _run_inference(["speculative"], **options)


@command("load", epilog=examples("icenet bench load llama-1.5b", "icenet bench load SmolLM2-135M --dtype bf16"))
@_inference_options
def load_command(**options: Any) -> None:
    """Time the loading of weights against reading the file.

    TARGET is the same as in icenet bench decode.
    """
    _run_inference(["load"], **options)


@command("convert", epilog=examples("icenet bench convert gpt2-large", "icenet bench convert runs/mine"))
@_inference_options
def convert_command(**options: Any) -> None:
    """Time the conversion of weights against copying the file.

    TARGET is the same as in icenet bench decode.
    """
    _run_inference(["convert"], **options)


@command("start", epilog=examples("icenet bench start", "icenet bench start gpt2 --dtype bf16 --backend torch"))
@_inference_options
def start_command(**options: Any) -> None:
    """Time new processes: the help, and a first token.

    The limit of a first token is a process that imports the framework and reads the file. TARGET is the same as in
    icenet bench decode.
    """
    _run_inference(["start"], **options)


@command("all", epilog=examples("icenet bench all", "icenet bench all llama-1.5b --json bench.json"))
@_inference_options
@_new_tokens_option
def all_command(**options: Any) -> None:
    """Run all measurements of inference.

    These are decode, prefill, batch, quantized, speculative, load, convert and start.

    TARGET is the same as in icenet bench decode.
    """
    rows = ["decode", "prefill", "batch", "quantized", "speculative", "load", "convert", "start"]
    _run_inference(rows, **options)
