"""Shared parts of the commands: the group class, common options, and the output of reports."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import click

from icenet.core.dtypes import FLOAT_DTYPES
from icenet.core.importing import without_garbage_collection
from icenet.core.messages import options_of_command
from icenet.core.report import streams

_OTHER_WORDS = {
    **dict.fromkeys(("export", "import", "quantize"), "convert"),
    **dict.fromkeys(("finetune", "fine-tune", "resume", "fit"), "train"),
    **{"sample": "generate", "tokenize": "prepare", "list": "runs", "encode": "embed", "classify": "predict"},
}
"""Words for what a command of another name does."""
TEXT_OPTIONS = {"data.text_key": "--text-key"} | {f"data.errors={x}": f"--errors {x}" for x in ("skip", "replace")}
"""The options of commands that read a text, by the keys of the section data that messages name otherwise."""


class Command(click.Command):
    """A command. Its module in `icenet.commands`, if it has one, is imported without collections of cycles."""

    def invoke(self, ctx: click.Context) -> Any:
        module = f"icenet.commands.{self.name}"
        with without_garbage_collection():
            if importlib.util.find_spec(module) is not None:
                importlib.import_module(module)
        return super().invoke(ctx)


class CommandGroup(click.Group):
    """A group that lists its commands in the order of definition and suggests a name for a misspelled one."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            close = [name for name in self.commands if name == _OTHER_WORDS.get(args[0])]
            close += [name for name in self.commands if name.startswith(args[0]) or args[0].startswith(name)]
            close += difflib.get_close_matches(args[0], self.commands, 1, cutoff=0.7)
            hint = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(self.commands)}"
            raise click.UsageError(f"no command {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)


def command(name: str, **options: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """Returns a decorator that makes a function a command, as `click.command` does."""
    return click.command(name, cls=Command, **options)


def examples(*lines: str) -> str:
    """Returns an epilog that click prints line by line, without reflowing it."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def _trust_code(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        from icenet.core.config import custom

        ctx.with_resource(custom.everything_trusted())  # until the command ends


def _check_device(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        from icenet.core import config

        config.check_device(value)
    return value


def _to_int(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    if parameter.name == "group_size" and value is not None and ctx.params.get("quantize") is None:
        raise click.UsageError("--group-size has no effect without --quantize", ctx)
    return None if value is None else int(value)


def to_list(ctx: click.Context, parameter: click.Parameter, values: tuple[Any, ...]) -> list[Any] | None:
    """Returns the values of a repeatable option; None if it is not given."""
    return list(values) or None


class UserPath(click.Path):
    """A path: not empty, with `~` for the home folder, which a shell leaves as it is in `--out=~/x`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str):
            if not value.strip():
                self.fail("the path is empty; name a file or folder", param, ctx)
            value = os.path.expanduser(value)
        return super().convert(value, param, ctx)


PATH = UserPath(path_type=Path)
"""The type of an argument or option that is a path."""

overwrite_option = click.option("--overwrite", is_flag=True, help="Replace existing files.")

backend_option = click.option(
    "--backend", type=click.Choice(["auto", "mlx", "torch"]), help="Framework to use. Default: the config's backend."
)
device_option = click.option(
    "--device",
    metavar="DEVICE",
    callback=_check_device,
    help="auto, cpu, gpu, cuda, cuda:N or mps. Default: the config's device.",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(list(FLOAT_DTYPES)),
    help="Dtype of weights and arithmetic. Default: fp32 on a CPU, that of the file on a GPU.",
)
_QUANTIZE_OPTIONS = (
    click.option(
        "--quantize",
        type=click.Choice(["2", "3", "4", "5", "6", "8"]),
        callback=_to_int,
        is_eager=True,  # --group-size needs it
        help="Quantize linear layers and embeddings to this number of bits.",
    ),
    click.option(
        "--group-size",
        type=click.Choice(["32", "64", "128"]),
        callback=_to_int,
        help="Number of values that share a scale, with --quantize. Default: 64.",
    ),
)


def quantize_options(command: Any) -> Any:
    """Adds the options of quantized weights to a command."""
    for option in reversed(_QUANTIZE_OPTIONS):
        command = option(command)
    return command


precision_option = click.option(
    "--dtype",
    type=click.Choice(list(FLOAT_DTYPES)),
    help="Dtype of the arithmetic. Default: training.mixed_precision of the config.",
)
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a config key, e.g. training.learning_rate=1e-3. Repeatable.",
)
trust_option = click.option(
    "--trust-code",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_trust_code,
    help="Allow a checkpoint to run the Python file that its model.type names.",
)
averaged_option = click.option(
    "--averaged", is_flag=True, help="Use the averaged weights that training.ema_decay stored."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")


_GENERATION_OPTIONS = (
    click.option("--max-new-tokens", type=int, help="Number of tokens to generate."),
    click.option("--max-length", type=int, help="Number of tokens of prompt and continuation together."),
    click.option("--temperature", type=float, help="Divisor of the logits; 0 selects the most likely token."),
    click.option("--top-k", type=int, help="Sample from the k most likely tokens; 0: from all."),
    click.option("--top-p", type=float, help="Sample from the most likely tokens with total probability p."),
    click.option("--min-p", type=float, help="Drop tokens less likely than p times the most likely one."),
    click.option("--repetition-penalty", type=float, help="Penalty on tokens that occurred; 1: none."),
    click.option("--seed", type=int, help="Seed of the sampling."),
    click.option(
        "--stop",
        multiple=True,
        callback=to_list,
        metavar="TEXT",
        help="End the output before this text. Repeatable.",
    ),
    click.option(
        "--eos-token-id",
        type=int,
        multiple=True,
        callback=to_list,
        help="End at this token. Repeatable. Default: the end-of-text tokens of the tokenizer.",
    ),
    click.option("--ignore-eos/--no-ignore-eos", default=None, help="Continue after an end-of-text token."),
    click.option(
        "--overflow",
        type=click.Choice(["error", "slide"]),
        help="Beyond model.max_seq_length: fail, or drop the oldest tokens.",
    ),
)


def generation_options(command: Any) -> Any:
    """Adds the options of text generation to a command. They are None if they are not given."""
    for option in reversed(_GENERATION_OPTIONS):
        command = option(command)
    return options_of_command({"overflow='slide'": "--overflow slide"})(command)


def _template_options(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    import json

    found: dict[str, Any] = {}
    for value in values:
        name, separator, text = value.partition("=")
        if not separator or not name.isidentifier():
            raise click.BadParameter(f"{value!r} is not NAME=VALUE", ctx, parameter)
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


_DRAFT_OPTIONS = (
    click.option(
        "--draft",
        type=PATH,
        metavar="MODEL",
        help="A smaller model with the same tokenizer, which proposes tokens: the same text in less time.",
    ),
    click.option(
        "--num-draft-tokens",
        type=click.IntRange(1, 64),
        help="Number of tokens that the draft proposes at a time. Default: 3.",
    ),
)


def draft_options(command: Any) -> Any:
    """Adds the options of speculative decoding to a command."""
    for option in reversed(_DRAFT_OPTIONS):
        command = option(command)
    return command


template_option = click.option(
    "--template-option",
    "template_options",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_template_options,
    help="Set a variable of the chat template, e.g. enable_thinking=false. Repeatable.",
)


class Report(Protocol):
    """The result of a command, which can be printed as tables or as JSON."""

    def as_dict(self) -> Any: ...

    def render(self) -> None: ...


def show(report: Report, as_json: bool) -> None:
    """Prints a report to standard output, as tables or as JSON."""
    if as_json:
        show_json(report.as_dict())
    else:
        report.render()


def show_json(value: Any) -> None:
    """Prints a value of JSON types to standard output. Only printable characters are written unescaped."""
    import json

    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    text = json.dumps(value, indent=2, ensure_ascii=not is_unicode)
    streams.write(re.sub("[\x7f-\x9f\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text))
