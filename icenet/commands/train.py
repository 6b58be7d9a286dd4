"""`icenet train`: starts or continues a run, trains it to its end and prints the paths of the results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from icenet.commands.overrides import option, warn_of_replaced
from icenet.core.config import Config
from icenet.core.report.console import new_console
from icenet.core.runs.run_folder import default_folder
from icenet.core.training.trainer import Result, Trainer


def train(
    config: str | None,
    resume: Path | None = None,
    *,
    run: Path | None = None,
    overrides: Sequence[str] = (),
    backend: str | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> None:
    """Trains a model and prints the result. Of several processes only the first one prints.

    Args:
        config: A YAML file or the name of a preset, for a new run.
        resume: A run or checkpoint to continue, instead of `config`.
        run: Folder of the run. Default: runs/NAME for a new run, the same folder for a continued one.
        overrides: `key=value` changes of the configuration.
        backend, device: Override those of the configuration.
        quiet: Show no progress.
    """
    warn_of_replaced(overrides, {"backend": option("--backend", backend), "device": option("--device", device)})
    if resume is not None:
        trainer = Trainer.resume(resume, run=run, overrides=overrides, backend=backend, device=device, quiet=quiet)
    else:
        settings = Config.from_yaml(str(config), overrides)
        folder = run or default_folder(str(config))
        trainer = Trainer.start(settings, folder, numbered=run is None, backend=backend, device=device, quiet=quiet)
    result = trainer.fit()
    if trainer.is_main_process:
        print_result(result)


def print_result(result: Result) -> None:
    """Prints the losses and the paths of a run to standard output."""
    console = new_console(highlight=False, soft_wrap=True)
    validation = f", validation loss {result.validation_loss:.4f}" if result.validation_loss is not None else ""
    if result.validation_accuracy is not None:
        validation += f", accuracy {result.validation_accuracy:.2%}"
    console.print(f"step {result.step}: loss {result.loss:.4f}{validation}")
    if result.stopped_early:
        console.print(f"stopped early: {result.early_stopping.reason}")
    console.print(f"run         {result.run}")
    console.print(f"checkpoint  {result.checkpoint}")
    console.print(f"plot        {result.plot or f'none: {result.plot_problem}'}")
