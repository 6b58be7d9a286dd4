"""The errors a person can cause, each told in one line that names the thing and the way out.

The command prints `str(error)` alone and exits with `exit_code`: 2 where the request itself was wrong
(usage, configuration, data that was named), 1 where a well-formed request could not be carried out.
"""

from __future__ import annotations


class IceNetError(Exception):
    """A failure to be shown as one line, without a traceback."""

    exit_code = 1


class UsageError(IceNetError):
    """The request was wrong: an argument, an option, a file that is not there."""

    exit_code = 2


class ConfigError(UsageError, ValueError):
    """A configuration that names an unknown key, a wrong type or an impossible combination."""


class DataError(UsageError):
    """A data source that is missing, empty or too small for what is asked of it."""


class CheckpointError(IceNetError):
    """A checkpoint that is missing, incomplete, damaged or not of this run."""


class WeightsError(IceNetError):
    """Weights whose names, shapes, types or bytes are not what the model needs."""


class BackendError(IceNetError):
    """A backend or device that is not there, or that cannot do what is asked."""
