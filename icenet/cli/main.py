"""The `icenet` command: its subcommands, and how errors end it.

The other files of this folder define the subcommands and their options, by subject. Only click is imported until a
subcommand runs, so `icenet --help` takes less than 0.1 s. The subcommands' work is in `icenet.commands`.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from typing import Any

import click

from icenet.cli import conversion, inference, information, training
from icenet.cli.bench import bench
from icenet.cli.options import CommandGroup, examples
from icenet.cli.parity import parity
from icenet.core.messages import first_line
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


for command in (  # in the order of the help
    training.quickstart_command,
    training.train_command,
    training.prepare_command,
    training.runs_command,
    training.plot_command,
    inference.generate_command,
    inference.chat_command,
    inference.eval_command,
    inference.embed_command,
    inference.predict_command,
    conversion.port_command,
    conversion.convert_command,
    parity,
    information.info_command,
    information.doctor_command,
    bench,
    information.schema_command,
):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 2 for a usage error, 130 for Ctrl-C, 1 for any other failure.

    Errors are printed to standard error as one line. With ICENET_DEBUG=1 they are raised. Output that cannot be
    written is a failure, except if its reader, such as head, has exited: then the command ends without a message.
    """
    if arguments is None and sys.argv[1:2] == ["convert"]:  # the whole process converts
        from icenet.core.host import blas

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
    except (KeyboardInterrupt, click.Abort) as error:
        if isinstance(error.__cause__, EOFError):  # click takes it for the end of the input
            if debug:
                raise error.__cause__ from None
            return _fail(f"EOFError: {error.__cause__}; set ICENET_DEBUG=1 to see the traceback", 1)
        return _fail("stopped by Ctrl-C", 130)
    except BrokenPipeError:  # the reader of the output, such as head, has exited
        return 1
    except OSError as error:
        if debug:
            raise
        return _fail(f"{error.filename}: {error.strerror or error}" if error.filename else _output_error(error), 1)
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1
    except Exception as error:
        if _is_interrupt(error):
            return _fail("stopped by Ctrl-C", 130)
        if debug:
            raise
        first = first_line(error, "")
        if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
            return _fail(f"out of memory ({first}); lower training.batch_size, data.seq_length or data.image_size", 1)
        return _fail(f"{type(error).__name__}: {first}; set ICENET_DEBUG=1 to see the traceback", 1)
    return 0


def _is_interrupt(error: BaseException | None) -> bool:
    """Returns whether a library has turned a KeyboardInterrupt into an error, as pydantic does within a callback."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt) or "KeyboardInterrupt" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


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
