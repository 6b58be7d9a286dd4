"""What the commands of `icenet` share: their order, their examples, and the options that several have."""

from __future__ import annotations

import difflib
from typing import Any

import click


class Commands(click.Group):
    """Commands in the order in which a newcomer meets them; a misspelt one is answered with the nearest."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], self.commands, 1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(self.commands)}"
            raise click.UsageError(f"no command {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)


def examples(*lines: str) -> str:
    """An epilog that click prints line by line."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


backend_option = click.option(
    "--backend", type=click.Choice(["auto", "mlx", "torch"]), help="Which framework; what the config says if absent."
)
device_option = click.option("--device", metavar="DEVICE", help="auto, cpu, gpu, cuda, cuda:N or mps.")
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, as training.learning_rate=1e-3."
)
trust_option = click.option(
    "--trust-code",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=lambda ctx, param, value: trust_code() if value else None,
    help="Run the user's own file that a checkpoint's model.type names.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")


def json_text(value: Any) -> str:
    """A report as JSON."""
    import json

    return json.dumps(value, indent=2, ensure_ascii=False)


def trust_code() -> None:
    """Lets a checkpoint run the user's own file."""
    from icenet.core.config import custom

    custom.trust_everything()


def check_device(device: str | None) -> None:
    """Refuses a device that no configuration could name."""
    if device is not None:
        from icenet.core import config

        config.check_device(device)
