"""Errors: the message, what is wrong and the way to fix it."""

from __future__ import annotations

import copy

import pytest

from icenet.core.config import Config
from icenet.core.errors import CheckpointError, ConfigError, IceNetError, WeightsError


def test_a_message_is_the_problem_and_the_remedy() -> None:
    error = WeightsError("w.safetensors: no such file", "check the path")
    assert str(error) == "w.safetensors: no such file; check the path"
    assert (error.problem, error.remedy) == ("w.safetensors: no such file", "check the path")
    assert str(CheckpointError("it is damaged")) == CheckpointError("it is damaged").problem == "it is damaged"


def test_a_copy_has_both() -> None:
    """A copy is made as one of another process is: from the message and the attributes."""
    error = copy.copy(ConfigError("seed: a text", "write a number"))
    assert type(error) is ConfigError and isinstance(error, ValueError)
    assert str(error) == "seed: a text; write a number"
    assert (error.problem, error.remedy) == ("seed: a text", "write a number")


def test_a_caller_knows_what_is_wrong_without_reading_the_message() -> None:
    with pytest.raises(IceNetError) as caught:
        Config.from_yaml("quickstrat")
    assert caught.value.problem == "quickstrat: no such file or preset"
    assert "quickstart" in caught.value.remedy
