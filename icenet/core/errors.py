"""Errors with a message of one line, which names the cause and the way to fix it.

The command line prints `str(error)` without a traceback and exits with the error's `exit_code`: 2 if the request
is wrong (an argument, the configuration, the data that it names), 1 if a valid request cannot be carried out.
"""

from __future__ import annotations


class IceNetError(Exception):
    """Base class of all errors that are shown to the user as one line.

    Args:
        problem: What is wrong.
        remedy: The way to fix it, which follows the problem in the message. A caller with another way uses
            `problem` alone. Some errors have both in `problem`.
    """

    exit_code = 1

    def __init__(self, problem: str = "", remedy: str = "") -> None:
        super().__init__(f"{problem}; {remedy}" if remedy else problem)
        self.problem = problem
        self.remedy = remedy


class UsageError(IceNetError):
    """A wrong request: an argument, an option, a file that does not exist."""

    exit_code = 2


class ConfigError(UsageError, ValueError):
    """A configuration with an unknown key, a wrong type or an impossible combination of values."""


class DataError(UsageError):
    """A data source that is missing, empty, damaged or too small."""


class ChatTemplateError(DataError):
    """A chat template that renders no messages: its syntax is wrong, or jinja2 is missing."""


class OutsideTableError(UsageError, IndexError):
    """An id outside the table of an embedding."""


class FileError(IceNetError):
    """A file that cannot be written: a full disk, a missing permission."""


class CheckpointError(IceNetError):
    """A checkpoint that is missing, incomplete, damaged or part of another run."""


class MissingCheckpointError(UsageError, CheckpointError):
    """A path that names no run, checkpoint or model: it does not exist, or is something else."""


class WeightsError(IceNetError):
    """Weights with names, shapes, dtypes or bytes other than the model or the file format requires."""


class MissingWeightsError(UsageError, WeightsError):
    """A path of weights that does not exist."""


class NonFiniteError(IceNetError):
    """A result that is NaN or infinite, because of the weights or an overflow of the arithmetic."""


class BackendError(IceNetError):
    """A backend or a device that is not available, or does not support an operation."""


class PortError(IceNetError):
    """A PyTorch module that cannot be ported, or a port that does not compute what the module computes."""


class ArithmeticWarning(UserWarning):
    """A setting of TF32 that has no effect."""
