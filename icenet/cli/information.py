"""`icenet info`, `doctor` and `schema`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from icenet.cli.options import (
    PATH,
    command,
    examples,
    json_option,
    overwrite_option,
    set_option,
    show,
    show_json,
    trust_option,
)


@command(
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
    Their sizes are those of a list of models, whose figures are in the columns guide; within tells whether a preset
    needs no more memory (docs/models.md).
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


@command("doctor", epilog=examples("icenet doctor", "icenet doctor --json"))
@json_option
def doctor_command(as_json: bool) -> None:
    """Check the installation, and list problems and fixes.

    Shows the versions, the devices, the BLAS on the CPU and the speed of matrix products.
    """
    from icenet.commands import doctor

    report = doctor.examine()
    show(report, as_json)
    sys.exit(0 if report.ok else 1)


@command("schema", epilog=examples("icenet schema > configs/schema.json"))
def schema_command() -> None:
    """Print the JSON schema of the configuration, for editors."""
    from icenet.core.config import json_schema

    show_json(json_schema())
