"""`icenet parity`: compares the backends on a configuration, a run, a checkpoint or a saved model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn

from icenet.commands.overrides import option, warn_of_replaced
from icenet.core.report.console import stderr_console
from icenet.core.runs import open_model
from icenet.parity.configuration.report import Report
from icenet.parity.configuration.run import run


def parity(
    target: str, overrides: Sequence[str] = (), *, steps: int = 0, dtype: str | None = None, quiet: bool = False
) -> Report:
    """Runs `icenet.parity.configuration.run.run` on a target, with a progress bar on stderr if that is a terminal.

    Args:
        target: A configuration file, the name of a preset, or the path of a run, a checkpoint or a saved model.
        overrides: `KEY=VALUE` settings.
        steps, dtype: See `icenet.parity.configuration.run.run`.
        quiet: Show no progress bar.
    """
    replaced = {"backend": "both are compared", "allow_tf32": "the backends are compared without TF32"}
    warn_of_replaced(overrides, {**replaced, "training.mixed_precision": option("--dtype", dtype)})
    config, weights = open_model.open_target(Path(target), overrides)
    with progress_bar(quiet) as update:
        return run(config, weights, steps=steps, dtype=dtype, progress=update)


@contextlib.contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Shows a progress bar on stderr if that is a terminal. Yields a function of the stage, and of the work done and
    in all."""
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}")
    console = stderr_console()
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("building", total=1)

        def update(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total)

        yield update
