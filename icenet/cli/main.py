"""The `icenet` command: one short function a subcommand, without logic of its own.

Nothing but click is imported until a subcommand runs, so `icenet --help` answers at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import click

from icenet.cli.bench import bench
from icenet.cli.options import (
    Commands,
    backend_option,
    check_device,
    device_option,
    examples,
    json_option,
    json_text,
    set_option,
    trust_option,
)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=examples(
        "icenet quickstart                        see both backends agree, in under two minutes",
        "icenet train configs/quickstart.yaml     train a small GPT",
        "icenet COMMAND --help                    options and examples of a command",
    ),
)
@click.version_option(package_name="icenet", prog_name="icenet")
def cli() -> None:
    """One config, two backends, one result: models in MLX, mirrored in PyTorch."""


@cli.command(epilog=examples("icenet quickstart", "icenet quickstart --out /tmp/demo --set training.max_steps=100"))
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/quickstart"), show_default=True)
@set_option
@click.option("--quiet", is_flag=True, help="No progress, only the result.")
def quickstart(out: Path, overrides: tuple[str, ...], quiet: bool) -> None:
    """Train in MLX, change to PyTorch half way, and compare.

    A small GPT is trained on the Python standard library's source. Its half-way checkpoint is resumed in
    PyTorch, and beside it the run is finished in MLX; the gap between the curves is judged by PyTorch's own
    fp32-to-fp64 distance, and both backends write a text from the finished weights.
    """
    from icenet.commands import quickstart as room

    report = room.run(out, overrides, quiet)
    room.render(report)
    sys.exit(0 if report.passed else 1)


@cli.command(
    epilog=examples(
        "icenet train quickstart",
        "icenet train my.yaml --backend torch --device cuda --run runs/mine",
        "icenet train quickstart --set data.source=book.txt --set training.max_steps=2000",
        "icenet train --resume runs/mine --backend mlx",
    )
)
@click.argument("config", required=False)
@click.option("--run", "run_folder", type=click.Path(path_type=Path), help="Folder of the run; runs/NAME if absent.")
@click.option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Continue a run or checkpoint.")
@backend_option
@device_option
@set_option
@click.option("--quiet", is_flag=True, help="No progress.")
@trust_option
def train(
    config: str | None,
    run_folder: Path | None,
    resume: Path | None,
    backend: str | None,
    device: str | None,
    overrides: tuple[str, ...],
    quiet: bool,
) -> None:
    """Train a model from CONFIG, a YAML file or a preset's name."""
    from icenet.commands import train as report
    from icenet.core.training.run_folder import new_run_folder
    from icenet.core.training.trainer import Trainer

    if (config is None) == (resume is None):
        raise click.UsageError("give either a CONFIG, or --resume RUN")
    check_device(device)
    if resume is not None:
        trainer = Trainer.resume(
            resume, run=run_folder, overrides=overrides, backend=backend, device=device, quiet=quiet
        )
    else:
        from icenet.core.config import Config

        settings = Config.from_yaml(str(config), overrides)
        folder = run_folder or new_run_folder(str(config))
        trainer = Trainer.start(settings, folder, backend=backend, device=device, quiet=quiet)
    result = trainer.fit()
    if trainer.is_main_process:
        report.print_result(result)


@cli.command(
    epilog=examples(
        "icenet prepare my.yaml",
        "icenet prepare my.yaml --workers 4 --set data.source=corpus.jsonl.gz",
        "icenet prepare corpus/ --train-tokenizer bpe --vocab-size 4096 --out tokenizer.json",
        "icenet prepare my.yaml --set data.tokenizer=tokenizer.json --set model.vocab_size=4096",
    )
)
@click.argument("target", metavar="CONFIG|TEXT")
@set_option
@click.option("--workers", type=click.IntRange(1), help="Processes that share the work; one a core where it is much.")
@click.option("--train-tokenizer", "kind", type=click.Choice(["bpe"]), help="Train one on TEXT instead.")
@click.option("--vocab-size", type=int, help="Tokens of the new tokenizer; 4096 if absent.")
@click.option("--out", type=click.Path(path_type=Path), help="Its file; tokenizer.json if absent.")
@click.option("--text-key", help="Of JSON lines: the key of the text in each; text if absent.")
@click.option("--overwrite", is_flag=True, help="Replace the tokenizer that is there.")
@click.option("--quiet", is_flag=True, help="No progress.")
def prepare(
    target: str, overrides: tuple[str, ...], workers: int | None, kind: str | None, quiet: bool, **options: Any
) -> None:
    """Make the tokens of a text before the training, or train a tokenizer.

    With a CONFIG, a YAML file or a preset's name, its text is made tokens once, by several processes. What is done
    is kept: stopped at any moment, the same command goes on from there, and so does icenet train.

    With --train-tokenizer a tokenizer is trained on a TEXT: a file, a folder, a glob, or stdlib.
    """
    from icenet.commands import prepare as room

    given = {name: value for name, value in options.items() if value is not None and value is not False}
    if kind is None:
        click.echo(room.prepare(room.read_config(target, overrides, given), workers, quiet))
    elif overrides or workers:
        raise click.UsageError("--set and --workers go with a CONFIG, not with --train-tokenizer")
    else:
        click.echo(room.train_tokenizer(target, quiet=quiet, **given))


@cli.command(epilog=examples("icenet runs", "icenet runs experiments --json"))
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@json_option
def runs(folder: Path | None, as_json: bool) -> None:
    """List the runs in FOLDER (runs/ if absent), the newest first: how far each is, its losses, its state."""
    from icenet.commands import runs as run_list

    report = run_list.list_runs(folder)
    click.echo(json_text(report.as_dict())) if as_json else report.render()


@cli.command(
    epilog=examples(
        "icenet plot runs/mine",
        "icenet plot runs/* --out compared.pdf --x tokens",
        "icenet plot runs/mine runs/other --smooth 50",
    )
)
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), help="PNG, PDF or SVG; plot.png, in the run if it is one.")
@click.option("--smooth", type=click.IntRange(1), metavar="N", help="Steps of the thick lines' mean; 1: no mean.")
@click.option("--x", type=click.Choice(["step", "tokens", "time"]), default="step", show_default=True)
def plot(runs: tuple[Path, ...], out: Path | None, smooth: int | None, x: str) -> None:
    """Draw loss, learning rate, gradient norm and throughput of RUNS over each other, while they train or after."""
    from icenet.commands import plot as overlay

    click.echo(overlay.plot(runs, out, smooth, x))


@cli.command(
    epilog=examples(
        'icenet generate runs/quickstart/mlx --prompt "def main("',
        "icenet generate runs/mine --prompt-file intro.txt --temperature 0.8 --top-k 50 --seed 1",
        "icenet generate runs/mine --backend torch --temperature 0",
    )
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--prompt", help="The text to continue.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="A file with the text to continue; - for stdin.")
@click.option("--max-new-tokens", type=int)
@click.option("--max-length", type=int)
@click.option("--temperature", type=float)
@click.option("--top-k", type=int)
@click.option("--top-p", type=float)
@click.option("--min-p", type=float)
@click.option("--repetition-penalty", type=float)
@click.option("--seed", type=int)
@click.option("--stop", multiple=True, metavar="TEXT", help="End the text before this; may be given several times.")
@click.option("--overflow", type=click.Choice(["error", "slide"]), help="What to do beyond max_seq_length.")
@click.option("--averaged", is_flag=True, help="With the averaged weights that training.ema_decay kept.")
@backend_option
@device_option
@trust_option
def generate(
    model: Path,
    prompt: str | None,
    prompt_file: Path | None,
    averaged: bool,
    backend: str | None,
    device: str | None,
    **options: Any,
) -> None:
    """Continue a text with MODEL, a run, a checkpoint or a saved model."""
    import icenet
    from icenet.core.generation.request import read_prompt

    check_device(device)
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("give either --prompt or --prompt-file")
    text = read_prompt(prompt_file) if prompt_file is not None else prompt or ""
    options["stop"] = list(options["stop"]) or None
    loaded = icenet.load(model, backend, device, averaged=averaged)
    pieces = icenet.generate(loaded, text, stream=True, **options)
    click.echo(text, nl=False)
    for piece in pieces:
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()


@cli.command(
    epilog=examples(
        "icenet predict runs/cnn-digits seven.png",
        "icenet predict runs/mine photos/ --top-k 5 --backend torch",
        "icenet predict runs/mine photos/ --json > classes.json",
    )
)
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("images", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--top-k", type=click.IntRange(1), default=3, show_default=True, help="Classes told of each image.")
@backend_option
@device_option
@json_option
@trust_option
def predict(
    run: Path, images: tuple[Path, ...], top_k: int, backend: str | None, device: str | None, as_json: bool
) -> None:
    """Classify IMAGES, files or folders of them, with RUN, a run or a checkpoint."""
    from icenet.commands import predict as room

    check_device(device)
    report = room.predict(run, images, backend, device, top_k)
    click.echo(json_text(report.as_dict())) if as_json else report.render()


@cli.command(
    epilog=examples(
        "icenet convert runs/mine/checkpoints/step-00000200 mine.safetensors --to mlx",
        "icenet convert mine.safetensors mine.pt --to torch --config my.yaml",
        "icenet convert weights.pt folder/ --to canonical --config my.yaml",
    )
)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=click.Choice(["canonical", "mlx", "torch"]), help="The form to write.")
@click.option("--from", "source_form", type=click.Choice(["canonical", "mlx", "torch"]), help="If it cannot be told.")
@click.option("--config", metavar="CONFIG", help="Config of the model, where the source has none beside it.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@trust_option
def convert(
    source: Path, destination: Path, to: str, source_form: str | None, config: str | None, overwrite: bool
) -> None:
    """Convert weights between the canonical form, MLX's and PyTorch's, bit for bit."""
    from icenet.commands.convert import convert_model

    click.echo(convert_model(source, destination, to, source_form, config, overwrite))


@cli.command(
    epilog=examples(
        "icenet parity quickstart",
        "icenet parity runs/mine --steps 50",
        "icenet parity my.yaml --dtype bf16 --verbose",
    )
)
@click.argument("target")
@click.option("--steps", type=click.IntRange(0), default=0, show_default=True, help="Also compare a training curve.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="The config's if absent.")
@click.option("--verbose", is_flag=True, help="Every layer, not only the interesting ones.")
@set_option
@json_option
@trust_option
def parity(
    target: str, steps: int, dtype: str | None, verbose: bool, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Compare the backends layer by layer on TARGET, a config, a run or a checkpoint."""
    from icenet.parity import run as room

    report = room.run_target(target, overrides, steps=steps, dtype=dtype, quiet=as_json)
    if as_json:
        click.echo(json_text(report.as_dict()))
    else:
        from rich.console import Console

        report.render(Console(), verbose)
    sys.exit(0 if report.passed else 1)


@cli.command(
    epilog=examples(
        "icenet info",
        "icenet info transformer-small",
        "icenet info runs/mine --json",
        "icenet info my.yaml --schedule --set training.schedule=wsd",
    )
)
@click.argument("target", required=False)
@click.option("--schedule", is_flag=True, help="The learning rate of TARGET instead, as a table and a picture.")
@click.option("--out", type=click.Path(path_type=Path), help="The picture; schedule.png, in the run if it is one.")
@set_option
@json_option
@trust_option
def info(target: str | None, schedule: bool, out: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Parameters and memory of TARGET, a config, run or checkpoint; of all presets without one."""
    from icenet.commands import info as describe
    from icenet.commands import schedule as schedule_report

    if target is None and (overrides or schedule):
        raise click.UsageError("--set needs a TARGET to change" if overrides else "--schedule needs a TARGET")
    if out is not None and not schedule:
        raise click.UsageError("--out is where --schedule draws; give both")
    if schedule:
        curve = schedule_report.of_target(str(target), overrides)
        picture = curve.draw(out) if out or not as_json else None
        click.echo(json_text(curve.as_dict())) if as_json else curve.render(picture)
        return
    report = describe.presets_report() if target is None else describe.target(target, overrides)
    click.echo(json_text(report.as_dict())) if as_json else report.render()


@cli.command(epilog=examples("icenet doctor", "icenet doctor --json"))
@json_option
def doctor(as_json: bool) -> None:
    """Versions, chip, devices, BLAS and its speed; what is wrong and how to mend it."""
    from icenet.commands import doctor as room

    report = room.doctor()
    if as_json:
        click.echo(json_text(room.as_dict(report)))
    else:
        from rich.console import Console

        room.render(report, Console())
    sys.exit(0 if report.ok else 1)


cli.add_command(bench)


@cli.command(epilog=examples("icenet schema > configs/schema.json"))
def schema() -> None:
    """Print the JSON schema of the configuration, for editors."""
    from icenet.core.config import json_schema

    click.echo(json_text(json_schema()))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; what goes wrong is one line, and the exit code 2 for usage and 1 for failure."""
    from icenet.core.errors import IceNetError

    debug = bool(os.environ.get("ICENET_DEBUG"))
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        cli.main(arguments, prog_name="icenet", standalone_mode=False)
    except click.exceptions.Exit as exit_:
        return _finish(exit_.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return _finish(2)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        where = f" (see {context.command_path} --help)" if context else ""
        return _fail(error.format_message() + where, 2)
    except IceNetError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _fail("stopped by Ctrl-C", 1)
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if debug:
            raise
        return _fail(f"{error.filename or 'the output'}: {error.strerror or error}", 1)
    except SystemExit as exit_:
        return _finish(exit_.code if isinstance(exit_.code, int) else 1)
    except Exception as error:
        if debug:
            raise
        first = next(iter(str(error).splitlines()), "")
        if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
            return _fail(f"out of memory ({first}); lower training.batch_size or data.seq_length", 1)
        return _fail(f"{type(error).__name__}: {first}; ICENET_DEBUG=1 shows where", 1)
    return _finish(0)


def _finish(code: int) -> int:
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            return _fail(f"the output cannot be written: {error.strerror}", 1)
    return code


def _show_warning(message: Warning | str, *where: Any) -> None:
    """One line, as errors have it, instead of Python's two with a path."""
    click.echo(f"icenet: warning: {' '.join(str(message).split())}", err=True)


def _fail(message: str, code: int) -> int:
    from icenet.core.distributed import launch

    click.echo(f"icenet: {launch.after_the_first()}{' '.join(message.split())}", err=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
