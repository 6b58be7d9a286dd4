"""Ids of repositories, with a package huggingface_hub that is replaced, and without a network."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import is_one_line

import icenet
from icenet.core.config import Config
from icenet.core.errors import CheckpointError
from icenet.core.runs.open_model import open_target
from icenet.core.weights import files as weight_files
from icenet.core.weights.hub import is_repository_id, local_path


def replaced(monkeypatch: pytest.MonkeyPatch, result: Any) -> list[dict[str, Any]]:
    """Replaces the package; returns the arguments of its calls."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(name: str, **arguments: Any) -> str:
        calls.append({"name": name, **arguments})
        if isinstance(result, Exception):
            raise result
        return str(result)

    module = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)  # type: ignore[arg-type]
    return calls


@pytest.mark.parametrize(
    ("path", "is_id"),
    [
        ("org/name", True), ("HuggingFaceTB/SmolLM2-135M", True), ("a.b/c_d-1.5", True), ("name", False),
        ("a/b/c", False), ("/org/name", False), ("../name", False), ("~/name", False), ("org/model.gguf", False),
        ("org/x.yaml", False), ("there/name", False), ("org/na me", False), ("org/..", False), ("org/a--b", False),
    ],
)  # fmt: skip
def test_what_is_an_id(path: str, is_id: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert is_repository_id(Path(path)) is is_id


def test_a_repository_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "cache"
    values = {"vocab_size": 5, "n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 4, "n_inner": 4}
    icenet.save(icenet.build(_gpt2(values), "torch"), tmp_path / "own")
    icenet.convert(tmp_path / "own", cache, "hf")
    calls = replaced(monkeypatch, cache)
    model = icenet.load("org/name", "torch")
    assert model.config.hidden_size == 4
    config, weights = open_target(Path("org/name"))
    assert config.model == model.config and weights is not None
    for form in ("hf", "canonical"):
        icenet.convert("org/name", tmp_path / form, form)
    assert np.array_equal(weight_files.read(tmp_path / "canonical")["final_norm.weight"], np.ones(4))
    assert {call["name"] for call in calls} == {"org/name"}
    patterns = calls[0]["allow_patterns"]
    assert "*.safetensors" in patterns and not any("bin" in pattern or ".py" in pattern for pattern in patterns)


def _gpt2(values: dict[str, Any]) -> Any:
    from icenet.core.families import FAMILIES

    return Config.from_dict({"model": FAMILIES["gpt2"].read(values)})


class RepositoryNotFoundError(OSError):
    pass


class GatedRepoError(RepositoryNotFoundError):
    pass


class LocalEntryNotFoundError(FileNotFoundError):
    pass


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RepositoryNotFoundError("404\nClient Error"), ["no repository"]),
        (GatedRepoError("403"), ["permission", "hf auth login"]),
        (LocalEntryNotFoundError("x"), ["cannot be reached", "network"]),
        (ValueError("strange\nerror"), ["strange"]),
    ],
)
def test_what_fails_is_one_line(
    error: Exception, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    replaced(monkeypatch, error)
    with pytest.raises(CheckpointError) as found:
        icenet.load("org/name")
    assert is_one_line(found.value, "org/name", *words)


def test_a_repository_without_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    replaced(monkeypatch, tmp_path)
    with pytest.raises(CheckpointError, match="GGUF"):
        icenet.load("org/name")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"icenet\[hub\]") as error:
        icenet.load("org/name")
    assert is_one_line(error.value)


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the package itself, which does not try to reach its server when it is offline."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match="cannot be reached") as error:
        local_path(Path("org/name"))
    assert is_one_line(error.value)


def test_a_run_begins_with_the_model_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run records the folder in the cache."""
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "cache"
    values = {"vocab_size": 5, "n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 4, "n_inner": 4}
    icenet.save(icenet.build(_gpt2(values), "torch"), tmp_path / "own")
    icenet.convert(tmp_path / "own", cache, "hf")
    replaced(monkeypatch, cache)
    in_file, on_command_line = (
        Config.from_dict({"model": {"path": "org/name"}}),
        Config.from_dict({}, ["model.path=org/name"]),
    )
    for config in (in_file, on_command_line):
        assert config.model.hidden_size == 4 and config.training.init_from == str(cache)
