"""`icenet quickstart`, `train`, `prepare`, `runs` and `plot`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from icenet.cli.options import (
    PATH,
    TEXT_OPTIONS,
    backend_option,
    command,
    device_option,
    examples,
    json_option,
    overwrite_option,
    set_option,
    show,
    trust_option,
)
from icenet.core.messages import options_of_command
from icenet.core.report import streams


@command("quickstart", epilog=examples("icenet quickstart", "icenet quickstart --out /tmp/demo --set seed=7"))
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


@command(
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


@command(
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
        with options_of_command({**TEXT_OPTIONS, "data.source": "TEXT"}):
            streams.write(prepare.train_tokenizer(target, quiet=quiet, **given))


@command("runs", epilog=examples("icenet runs", "icenet runs experiments --json"))
@click.argument("folder", type=PATH, required=False)
@json_option
def runs_command(folder: Path | None, as_json: bool) -> None:
    """List runs with their progress, losses and state.

    Lists the runs in FOLDER (default: runs/), newest first.
    """
    from icenet.commands import runs

    show(runs.list_runs(folder), as_json)


@command(
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
