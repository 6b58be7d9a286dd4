"""The `icenet` command: its subcommands, their options, and how errors end it.

Only click is imported until a subcommand runs, so `icenet --help` takes less than 0.1 s. The subcommands' work is
in `icenet.commands`.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import click

from icenet.cli.bench import bench
from icenet.cli.options import (
    PATH,
    CommandGroup,
    averaged_option,
    backend_option,
    device_option,
    draft_options,
    dtype_option,
    examples,
    generation_options,
    json_option,
    overwrite_option,
    precision_option,
    quantize_options,
    set_option,
    show,
    show_json,
    template_option,
    to_list,
    trust_option,
)
from icenet.cli.parity import parity
from icenet.core.report import streams


@click.group(
    cls=CommandGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=examples(
        "icenet quickstart                        train on both backends and compare, in about a minute",
        "icenet train configs/quickstart.yaml     train a small GPT",
        "icenet COMMAND --help                    show the options and examples of a command",
    ),
)
@click.version_option(package_name="icenet", prog_name="icenet")
def cli() -> None:
    """One config, two backends, one result: models in MLX, mirrored in PyTorch."""
    try:
        os.getcwd()
    except FileNotFoundError:  # PyTorch's and MLX's libraries abort there
        from icenet.core.errors import UsageError

        raise UsageError("the working directory was removed; change to another one (cd)") from None


@cli.command("quickstart", epilog=examples("icenet quickstart", "icenet quickstart --out /tmp/demo --set seed=7"))
@click.option("--out", type=PATH, default=Path("runs/quickstart"), show_default=True, help="Folder of the results.")
@set_option
@click.option("--quiet", is_flag=True, help="Show no progress.")
def quickstart_command(out: Path, overrides: tuple[str, ...], quiet: bool) -> None:
    """Train on MLX, switch to PyTorch halfway, and compare.

    Trains a small GPT on the source code of the Python standard library. The halfway checkpoint is resumed both in
    MLX and in PyTorch. The difference between the two loss curves must stay within a multiple of the difference
    between PyTorch in fp32 and in fp64. Both backends then generate a text from the final weights.
    """
    from icenet.commands import quickstart

    report = quickstart.run(out, overrides, quiet)
    report.render()
    sys.exit(0 if report.passed else 1)


@cli.command(
    "train",
    epilog=examples(
        "icenet train quickstart",
        "icenet train my.yaml --backend torch --device cuda --run runs/mine",
        "icenet train quickstart --set data.source=book.txt --set training.max_steps=2000",
        "icenet train --resume runs/mine --backend mlx",
    ),
)
@click.argument("config", required=False)
@click.option("--run", "run_folder", type=PATH, help="Folder of the run. Default: runs/NAME, after the config.")
@click.option("--resume", type=PATH, metavar="RUN", help="Continue a run or a checkpoint, on either backend.")
@backend_option
@device_option
@set_option
@click.option("--quiet", is_flag=True, help="Show no progress.")
@trust_option
def train_command(
    config: str | None,
    run_folder: Path | None,
    resume: Path | None,
    backend: str | None,
    device: str | None,
    overrides: tuple[str, ...],
    quiet: bool,
) -> None:
    """Train a model, or continue a run.

    CONFIG is a YAML file or the name of a preset.
    """
    from icenet.commands.train import train

    if (config is None) == (resume is None):
        raise click.UsageError("give either a CONFIG, or --resume RUN")
    train(config, resume, run=run_folder, overrides=overrides, backend=backend, device=device, quiet=quiet)


@cli.command(
    "prepare",
    epilog=examples(
        "icenet prepare my.yaml",
        "icenet prepare my.yaml --workers 4 --set data.source=corpus.jsonl.gz",
        "icenet prepare corpus/ --train-tokenizer bpe --vocab-size 4096 --out tokenizer.json",
        "icenet prepare my.yaml --set data.tokenizer=tokenizer.json --set model.vocab_size=4096",
    ),
)
@click.argument("target", metavar="CONFIG|TEXT")
@set_option
@click.option(
    "--workers", type=click.IntRange(1), help="Number of threads that encode the text. Default: one per core."
)
@click.option("--train-tokenizer", "kind", type=click.Choice(["bpe"]), help="Train a tokenizer on TEXT instead.")
@click.option("--vocab-size", type=int, help="Vocabulary size of the new tokenizer. Default: 4096.")
@click.option("--out", type=PATH, help="File of the new tokenizer. Default: tokenizer.json.")
@click.option("--text-key", help="Key of the text in each object of a JSON Lines file. Default: text.")
@click.option(
    "--errors",
    type=click.Choice(["stop", "skip", "replace"]),
    help="What to do about files and lines that cannot be used, as data.errors. Default: stop.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing tokenizer file.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def prepare_command(
    target: str, overrides: tuple[str, ...], workers: int | None, kind: str | None, quiet: bool, **options: Any
) -> None:
    """Tokenize a text before training, or train a tokenizer.

    With a CONFIG (a YAML file or the name of a preset), tokenizes its text in several threads and stores the
    tokens. If the command is interrupted, running it again, or icenet train, continues where it stopped.

    With --train-tokenizer, trains a tokenizer on TEXT: a file, a folder, a glob pattern, or stdlib (the source code
    of the Python standard library).
    """
    from icenet.commands import prepare

    given = {name: value for name, value in options.items() if value is not None and value is not False}
    if kind is None:
        streams.write(prepare.prepare(prepare.read_config(target, overrides, given), workers, quiet))
    elif overrides or workers:
        raise click.UsageError("--set and --workers need a CONFIG; --train-tokenizer takes neither")
    else:
        streams.write(prepare.train_tokenizer(target, quiet=quiet, **given))


@cli.command("runs", epilog=examples("icenet runs", "icenet runs experiments --json"))
@click.argument("folder", type=PATH, required=False)
@json_option
def runs_command(folder: Path | None, as_json: bool) -> None:
    """List runs with their progress, losses and state.

    Lists the runs in FOLDER (default: runs/), newest first.
    """
    from icenet.commands import runs

    show(runs.list_runs(folder), as_json)


@cli.command(
    "plot",
    epilog=examples(
        "icenet plot runs/mine",
        "icenet plot runs/* --out compared.pdf --x tokens",
        "icenet plot runs/mine runs/other --smooth 50",
    ),
)
@click.argument("runs", type=PATH, nargs=-1, required=True)
@click.option("--out", type=PATH, help="PNG, PDF or SVG file. Default: plot.png, in the run's folder for one run.")
@click.option(
    "--smooth", type=click.IntRange(1), metavar="N", help="Window of the moving average, in steps. 1: no smoothing."
)
@click.option(
    "--x",
    type=click.Choice(["step", "tokens", "time"]),
    default="step",
    show_default=True,
    help="Unit of the x axis.",
)
@overwrite_option
def plot_command(runs: tuple[Path, ...], out: Path | None, smooth: int | None, x: str, overwrite: bool) -> None:
    """Plot the loss and other curves of one or more runs.

    Draws loss, learning rate, gradient norm and throughput in one figure. Works on finished runs and on runs in
    progress.
    """
    from icenet.commands import plot

    streams.write(str(plot.plot(runs, out, smooth, x, overwrite)))


@cli.command(
    "generate",
    epilog=examples(
        'icenet generate runs/quickstart/mlx --prompt "def main("',
        "icenet generate runs/mine --prompt-file intro.txt --temperature 0.8 --top-k 50 --seed 1",
        "icenet generate runs/mine --backend torch --temperature 0",
        "icenet generate SmolLM2-1.7B --draft SmolLM2-135M --prompt-file intro.txt",
        "icenet generate MODEL --prompt-file book.txt --save-prompt-cache book.safetensors",
        "icenet generate MODEL --prompt-file book-and-question.txt --prompt-cache book.safetensors",
        'icenet generate SmolLM2-1.7B --prompt "The sea" --quantize 4',
    ),
)
@click.argument("model", type=PATH)
@click.option("--prompt", help="Text to continue.")
@click.option("--prompt-file", type=PATH, help="File with the text to continue; - for standard input.")
@click.option(
    "--add-special-tokens/--no-add-special-tokens",
    default=None,
    help="Put tokens around the prompt as the tokenizer does, such as a beginning-of-text token.",
)
@generation_options
@draft_options
@click.option(
    "--prompt-cache", type=PATH, metavar="FILE", help="Do not read again the beginning of the prompt in FILE."
)
@click.option(
    "--save-prompt-cache",
    type=PATH,
    metavar="FILE",
    help="Write what the model has read of the prompt to FILE, for --prompt-cache.",
)
@overwrite_option
@averaged_option
@backend_option
@device_option
@dtype_option
@quantize_options
@click.option("--json", "as_json", is_flag=True, help="Print text, tokens and finish reason as JSON.")
@trust_option
def generate_command(
    model: Path,
    prompt: str | None,
    prompt_file: Path | None,
    averaged: bool,
    backend: str | None,
    device: str | None,
    dtype: str | None,
    as_json: bool,
    draft: Path | None,
    num_draft_tokens: int | None,
    prompt_cache: Path | None,
    save_prompt_cache: Path | None,
    overwrite: bool,
    **options: Any,
) -> None:
    """Continue a text with a trained model.

    MODEL is a run, a checkpoint, a saved model or a Hugging Face folder. Options that are not given take their values
    from the generation section of the model's config. The output ends at an end-of-text token, before a stop text, or
    at the maximum number of tokens; --json also prints which of them it was.

    The text is continued as it is: icenet chat applies the chat template of a model.

    With --draft, a smaller model with the same tokenizer proposes tokens, and MODEL reads several of them at a time.
    The text is the same. --save-prompt-cache writes what MODEL has read of a prompt. With --prompt-cache, a prompt
    that begins with the same text is read from there on, on either backend.
    """
    from icenet.commands import generate
    from icenet.core.generation.prompts import read_prompt

    if prompt is not None and prompt_file is not None:
        raise click.UsageError("give either --prompt or --prompt-file")
    text = read_prompt(prompt_file) if prompt_file is not None else prompt or ""
    speedups = generate.Speedups(draft, num_draft_tokens, prompt_cache, save_prompt_cache, overwrite)
    options |= {"averaged": averaged, "speedups": speedups}
    if as_json:
        show_json(generate.generate(model, text, backend, device, dtype, **options))
        return
    for piece in generate.stream(model, text, backend, device, dtype, **options):
        streams.write(piece, end="")


@cli.command(
    "chat",
    epilog=examples(
        "icenet chat SmolLM2-135M-Instruct",
        'icenet chat MODEL --message "What is the capital of France?"',
        'icenet chat MODEL --system "Answer in one word." --temperature 0.7 --seed 1',
        "icenet chat MODEL --backend torch --template-option enable_thinking=false",
        "icenet chat SmolLM2-1.7B-Instruct --draft SmolLM2-135M-Instruct",
        "icenet chat SmolLM2-1.7B-Instruct --quantize 4",
    ),
)
@click.argument("model", type=PATH)
@click.option(
    "--message", "messages", multiple=True, metavar="TEXT", help="Answer this message and exit. Repeatable, in turn."
)
@click.option("--system", metavar="TEXT", help="Message before the conversation that describes the task.")
@generation_options
@draft_options
@template_option
@averaged_option
@backend_option
@device_option
@dtype_option
@quantize_options
@trust_option
def chat_command(
    model: Path,
    messages: tuple[str, ...],
    system: str | None,
    template_options: dict[str, Any],
    averaged: bool,
    backend: str | None,
    device: str | None,
    dtype: str | None,
    draft: Path | None,
    num_draft_tokens: int | None,
    **options: Any,
) -> None:
    """Chat with a model that has a chat template.

    MODEL is a Hugging Face folder, a run, a checkpoint or a saved model. Each line is a message; /help lists the
    commands. Ctrl-C stops an answer. Ctrl-D, /exit or Ctrl-C twice end the chat. If the standard input is no
    terminal, its lines are the messages.

    Options that are not given take their values from generation_config.json or from the generation section of the
    model's config.
    """
    from icenet.commands.chat import chat

    chat(
        model,
        messages,
        system=system,
        backend=backend,
        device=device,
        dtype=dtype,
        averaged=averaged,
        template_options=template_options,
        draft=draft,
        num_draft_tokens=num_draft_tokens,
        **options,
    )


@cli.command(
    "eval",
    epilog=examples(
        "icenet eval runs/quickstart/mlx --text book.txt",
        "icenet eval SmolLM2-135M-Instruct/ --text stdlib --max-tokens 100000 --backend torch",
        "icenet eval model/ --text wiki.jsonl --length 2048 --stride 512 --json",
        "icenet eval model/ --text wiki.jsonl --quantize 4",
    ),
)
@click.argument("model", type=PATH)
@click.option("--text", "source", required=True, help="A text file, a folder, a glob or stdlib, as data.source.")
@click.option("--length", type=click.IntRange(1), help="Tokens in a window. Default: the model's, at most 1,024.")
@click.option("--stride", type=click.IntRange(1), help="Distance of two windows. Default: they do not overlap.")
@click.option("--max-tokens", type=click.IntRange(1), help="Evaluate only this number of tokens.")
@click.option(
    "--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Windows that are computed together."
)
@click.option("--text-key", default="text", show_default=True, help="Key of the text in JSON Lines files.")
@click.option(
    "--errors",
    type=click.Choice(["stop", "skip", "replace"]),
    default="stop",
    show_default=True,
    help="What to do with files and characters that cannot be used.",
)
@quantize_options
@averaged_option
@backend_option
@device_option
@dtype_option
@click.option("--quiet", is_flag=True, help="Show no progress.")
@json_option
@trust_option
def eval_command(model: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Print the perplexity of a text.

    MODEL is a run, a checkpoint, a saved model or a Hugging Face folder. The text is divided into windows, and each
    token is predicted once, from those before it in its window.
    """
    from icenet.commands import eval as evaluation

    show(evaluation.evaluate(model, quiet=quiet or as_json, **options), as_json)


@cli.command(
    "embed",
    epilog=examples(
        "icenet embed all-MiniLM-L6-v2/ sentences.txt --out vectors.npz",
        "icenet embed Qwen3-Embedding-0.6B/ queries.txt --out queries.npy --prompt-name query",
        "icenet embed model/ corpus.jsonl --text-key body --out corpus.npy --batch-size 128 --dtype bf16",
        "icenet embed model/ - --out vectors.npy --pooling cls --normalize",
    ),
)
@click.argument("model", type=PATH)
@click.argument("file", type=PATH)
@click.option("--out", required=True, type=PATH, help="File to write: .npz (embeddings and texts) or .npy.")
@click.option("--text-key", help="Key of the text in each object of a JSON Lines file. Default: text.")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Number of texts that are computed together.",
)
@click.option(
    "--pooling",
    multiple=True,
    callback=to_list,
    type=click.Choice(["cls", "max", "mean", "mean_sqrt_length", "weighted_mean", "last"]),
    help="How the tokens of a text become one vector. Repeat to concatenate. Default: that of the model, or mean.",
)
@click.option("--normalize/--no-normalize", default=None, help="Divide each vector by its length.")
@click.option("--max-seq-length", type=click.IntRange(1), help="Number of tokens after which a text is cut.")
@click.option("--prompt", help="Text to put in front of each text.")
@click.option("--prompt-name", help="Which of the model's prompts to put in front of each text.")
@backend_option
@device_option
@dtype_option
@overwrite_option
@click.option("--quiet", is_flag=True, help="Show no progress.")
@trust_option
def embed_command(
    model: Path,
    file: Path,
    out: Path,
    text_key: str | None,
    batch_size: int,
    backend: str | None,
    device: str | None,
    dtype: str | None,
    overwrite: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Compute one vector for each text of a file.

    MODEL is a folder of sentence-transformers or Hugging Face, a run or a saved model. FILE has one text per line, or
    is a JSON Lines file (.jsonl); - is the standard input.
    """
    from icenet.commands.embed import embed

    text = embed(
        model,
        file,
        out,
        text_key=text_key,
        batch_size=batch_size,
        overwrite=overwrite,
        backend=backend,
        device=device,
        dtype=dtype,
        options=options,
        quiet=quiet,
    )
    streams.write(text)


@cli.command(
    "predict",
    epilog=examples(
        "icenet predict runs/cnn-digits seven.png",
        "icenet predict runs/mine photos/ --top-k 5 --backend torch",
        "icenet predict runs/mine photos/ --json > classes.json",
        "icenet predict microsoft/resnet-50 photo.jpg",
    ),
)
@click.argument("model", type=PATH)
@click.argument("images", type=PATH, nargs=-1, required=True)
@click.option(
    "--top-k", type=click.IntRange(1), default=3, show_default=True, help="Number of classes to print per image."
)
@averaged_option
@backend_option
@device_option
@precision_option
@json_option
@trust_option
def predict_command(
    model: Path,
    images: tuple[Path, ...],
    top_k: int,
    averaged: bool,
    backend: str | None,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Classify images with a trained model.

    MODEL is a run, a checkpoint, a saved model or a Hugging Face folder. IMAGES are files or folders.
    """
    from icenet.commands import predict

    show(predict.predict(model, images, backend, device, top_k, averaged, dtype), as_json)


@cli.command(
    "port",
    epilog=examples(
        "icenet port mine.py:Net --shape 1x3x224x224 --out folder/",
        "icenet port mine.py:Tagger --shape 2x16:int1000 --weights tagger.safetensors --out tagger/",
        "icenet port torchvision:resnet50 --shape 1x3x224x224 --out resnet50/",
        "icenet port transformers:bert-base-uncased --out bert/",
        "icenet port mine.py:Net --shape 1x3x224x224 --check",
    ),
)
@click.argument("target", metavar="FILE.py:CLASS|torchvision:NAME|timm:NAME|transformers:FOLDER")
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

    A Python file is run, because you name it. The exit code is 1 if the module cannot be ported or the port computes
    something else.
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


@cli.command(
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


cli.add_command(parity)


@cli.command(
    "info",
    epilog=examples(
        "icenet info",
        "icenet info transformer-small",
        "icenet info runs/mine --json",
        "icenet info my.yaml --schedule --set training.schedule=wsd",
    ),
)
@click.argument("target", required=False)
@click.option("--schedule", is_flag=True, help="Show the learning rate schedule of TARGET instead, with a plot.")
@click.option("--out", type=PATH, help="File of the plot. Default: schedule.png, in the run's folder for a run.")
@overwrite_option
@set_option
@json_option
@trust_option
def info_command(
    target: str | None, schedule: bool, out: Path | None, overwrite: bool, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Show parameter counts and memory of models.

    TARGET is a config, a run, a checkpoint, a Hugging Face folder or a GGUF file. Without it, all presets are listed.
    """
    if target is None and (overrides or schedule):
        raise click.UsageError("--set needs a TARGET" if overrides else "--schedule needs a TARGET")
    if (out is not None or overwrite) and not schedule:
        option = "--out" if out is not None else "--overwrite"
        raise click.UsageError(f"{option} is about the plot of --schedule; give both")
    if schedule:
        from icenet.commands import schedule as schedule_command

        curve = schedule_command.of_target(str(target), overrides)
        picture = curve.draw(out, overwrite) if out or not as_json else None
        show_json(curve.as_dict()) if as_json else curve.render(picture)
        return
    from icenet.commands import info

    show(info.presets_report() if target is None else info.model_report(target, overrides), as_json)


@cli.command("doctor", epilog=examples("icenet doctor", "icenet doctor --json"))
@json_option
def doctor_command(as_json: bool) -> None:
    """Check the installation, and list problems and fixes.

    Shows the versions, the devices, the BLAS on the CPU and the speed of matrix products.
    """
    from icenet.commands import doctor

    report = doctor.examine()
    show(report, as_json)
    sys.exit(0 if report.ok else 1)


cli.add_command(bench)


@cli.command("schema", epilog=examples("icenet schema > configs/schema.json"))
def schema_command() -> None:
    """Print the JSON schema of the configuration, for editors."""
    from icenet.core.config import json_schema

    show_json(json_schema())


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 2 for a usage error, 1 for any other failure.

    Errors are printed to standard error as one line. With ICENET_DEBUG=1 they are raised. Output that cannot be
    written is a failure, except if its reader, such as head, has exited: then the command ends without a message.
    """
    if arguments is None and sys.argv[1:2] == ["convert"]:  # the whole process converts
        from icenet.core import blas

        blas.skip()
    show_warning = warnings.showwarning
    with streams.prepared():
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        try:
            code = _run(arguments)
            error = streams.finish()
        finally:
            warnings.showwarning = show_warning
        if error is not None and code == 0:
            return 1 if isinstance(error, BrokenPipeError) else _fail(_output_error(error), 1)
        return code


def _run(arguments: list[str] | None) -> int:
    from icenet.core.errors import IceNetError
    from icenet.core.training import signals

    debug = bool(os.environ.get("ICENET_DEBUG"))
    try:
        try:
            with signals.raising():
                cli.main(arguments, prog_name="icenet", standalone_mode=False)
        except click.exceptions.NoArgsIsHelpError as error:
            streams.write(error.format_message())
            return 2
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        where = f" (see {context.command_path} --help)" if context else ""
        return _fail(error.format_message() + where, 2)
    except IceNetError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code)
    except signals.Stopped as error:
        return _fail(f"stopped by {error}", 1)
    except (KeyboardInterrupt, click.Abort):
        return _fail("stopped by Ctrl-C", 1)
    except BrokenPipeError:  # the reader of the output, such as head, has exited
        return 1
    except OSError as error:
        if debug:
            raise
        return _fail(f"{error.filename}: {error.strerror or error}" if error.filename else _output_error(error), 1)
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1
    except Exception as error:
        if debug:
            raise
        first = next(iter(str(error).splitlines()), "")
        if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
            return _fail(f"out of memory ({first}); lower training.batch_size, data.seq_length or data.image_size", 1)
        return _fail(f"{type(error).__name__}: {first}; set ICENET_DEBUG=1 to see the traceback", 1)
    return 0


def _output_error(error: OSError) -> str:
    if error.errno == errno.EBADF:
        return "the output cannot be written: standard output is closed"
    return f"the output cannot be written: {error.strerror or error}"


def _show_warning(message: Warning | str, *where: Any) -> None:
    """Prints a warning as one line, like an error, instead of Python's two lines with a path."""
    streams.write_error(f"icenet: warning: {' '.join(str(message).split())}")


def _fail(message: str, code: int) -> int:
    from icenet.core.distributed import launch

    streams.write_error(f"icenet: {launch.error_prefix()}{' '.join(message.split())}")
    return code


if __name__ == "__main__":
    sys.exit(main())
