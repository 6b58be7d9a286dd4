"""`icenet port` and `icenet convert`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from icenet.cli.options import (
    PATH,
    averaged_option,
    command,
    examples,
    overwrite_option,
    quantize_options,
    trust_option,
)
from icenet.core.report import streams


@command(
    "port",
    epilog=examples(
        "icenet port mine.py:Net --shape 1x3x224x224 --out folder/",
        "icenet port mine.py:Tagger --shape 2x16:int1000 --weights tagger.safetensors --out tagger/",
        "icenet port torchvision:resnet50 --shape 1x3x224x224 --out resnet50/",
        "icenet port transformers:bert-base-uncased --out bert/",
        "icenet port mine.py:Net --shape 1x3x224x224 --check",
    ),
)
@click.argument("target", metavar="MODULE")
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="[NAME=]SIZES[:TYPE]",
    help="Sizes of an input, such as 1x3x224x224, 2x16:int1000 (ids below 1000) or mask=2x16:bool. Repeatable.",
)
@click.option("--out", type=PATH, help="Folder of the port: model.py, weights.safetensors, config.json, parity.html.")
@click.option("--weights", type=PATH, help="Weights of the module: .safetensors, or .pt with tensors only.")
@click.option("--check", is_flag=True, help="Only list the operations that have no counterpart in MLX.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True)
@click.option(
    "--layout", type=click.Choice(["nchw", "nhwc"]), default="nchw", show_default=True, help="Axes of images."
)
@overwrite_option
@click.option("--quiet", is_flag=True, help="Show no progress.")
def port_command(
    target: str,
    shapes: tuple[str, ...],
    out: Path | None,
    weights: Path | None,
    check: bool,
    dtype: str,
    layout: str,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Port a PyTorch module to MLX, as source, with proof.

    MODULE is FILE.py:CLASS, torchvision:NAME, timm:NAME or transformers:FOLDER. A Python file is run, because you
    name it. The exit code is 1 if the module cannot be ported or the port computes something else.
    """
    from icenet.commands.port import port

    text, passed = port(
        target,
        shapes,
        out,
        weights=weights,
        only_check=check,
        dtype=dtype,
        layout=layout,
        overwrite=overwrite,
        quiet=quiet,
    )
    click.echo(text)
    sys.exit(0 if passed else 1)


@command(
    "convert",
    epilog=examples(
        "icenet convert runs/mine/checkpoints/step-00000200 mine.safetensors --to mlx",
        "icenet convert mine.safetensors mine.pt --to torch --config my.yaml",
        "icenet convert weights.pt folder/ --to canonical --config my.yaml",
        "icenet convert runs/mine exported/ --to hf",
        "icenet convert model.gguf folder/ --to canonical",
        "icenet convert SmolLM2-1.7B folder/ --to mlx-lm --quantize 4",
        "icenet convert resnet50.pth resnet/ --to canonical --config resnet-50",
        "icenet convert last.ckpt folder/ --to canonical --config my.yaml --key state_dict --strip-prefix model.",
    ),
)
@click.argument("source", type=PATH)
@click.argument("destination", type=PATH)
@click.option(
    "--to",
    required=True,
    type=click.Choice(["canonical", "mlx", "torch", "hf", "mlx-lm", "gguf", "gguf-q8_0", "gguf-f32", "torchvision"]),
    help="Format to write.",
)
@click.option(
    "--from",
    "source_form",
    type=click.Choice(["canonical", "mlx", "torch"]),
    help="Format of SOURCE, if it cannot be detected.",
)
@click.option("--config", metavar="CONFIG", help="Config of the model, if there is none next to SOURCE.")
@click.option("--key", help="Key of the state dict in a file of torch.save that holds more, e.g. state_dict.")
@click.option(
    "--strip-prefix",
    multiple=True,
    metavar="PREFIX",
    help="Remove a prefix from the names of the weights, e.g. module. or _orig_mod. Repeatable.",
)
@quantize_options
@overwrite_option
@averaged_option
@trust_option
def convert_command(
    source: Path,
    destination: Path,
    to: str,
    source_form: str | None,
    config: str | None,
    key: str | None,
    strip_prefix: tuple[str, ...],
    quantize: int | None,
    group_size: int | None,
    overwrite: bool,
    averaged: bool,
) -> None:
    """Convert weights between file formats, bit for bit.

    The formats are canonical (safetensors with PyTorch layouts), mlx, torch, hf (a Hugging Face folder), mlx-lm,
    gguf, gguf-q8_0 and gguf-f32 (a file for llama.cpp), and torchvision (a state dict with the names of its ResNets
    and vision transformers).

    --quantize writes a folder of mlx-lm with quantized layers. Quantized layers stay as they are in a folder of
    mlx-lm and are dequantized in other formats.
    """
    from icenet.commands.convert import convert_model

    text = convert_model(
        source,
        destination,
        to,
        source_form,
        config,
        overwrite,
        averaged,
        key=key,
        strip_prefix=strip_prefix,
        quantize=quantize,
        group_size=group_size,
    )
    streams.write(text)
