"""The functions of the package `icenet`: arguments of other types than they take, paths with `~`, changed models."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TINY_MODELS, both_backends, is_one_line

import icenet
from icenet.core.config import Config, ModelConfig
from icenet.core.errors import BackendError, UsageError

LSTM = TINY_MODELS["lstm"]


def build(backend: str, model: dict[str, Any] = LSTM, **options: Any) -> Any:
    return icenet.build(Config(device="cpu", model=model), backend, **options)


WRONG: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "build a section": (lambda _: icenet.build(ModelConfig(**LSTM)), ("build", "RecurrentConfig", "Config(model=")),
    "build a dict": (lambda _: icenet.build({"model": LSTM}), ("build", "dict", "from_dict")),
    "build None": (lambda _: icenet.build(None), ("build", "NoneType")),
    "build bytes": (lambda _: icenet.build(b"quickstart"), ("build", "bytes")),
    "load None": (lambda _: icenet.load(None), ("load", "NoneType")),
    "load with jax": (lambda _: icenet.load("x", backend="jax"), ("no backend 'jax'", "mlx, torch, auto")),
    "load nothing": (lambda _: icenet.load(" "), ("load", "empty")),
    "save None": (lambda model: icenet.save(model, None), ("save", "NoneType")),
    "save a number": (lambda model: icenet.save(model, 5), ("save", "int")),
    "save an array": (lambda _: icenet.save(np.ones(2), "x"), ("save", "BaseModel", "ndarray")),
    "generate with None": (lambda _: icenet.generate(None, "a"), ("generate", "BaseModel", "NoneType")),
    "convert to another form": (lambda _: icenet.convert("saved", "x", "onnx"), ("onnx", "canonical", "hf", "gguf")),
    "convert None": (lambda _: icenet.convert(None, "x", "mlx"), ("convert", "NoneType")),
}


@pytest.mark.parametrize(("call", "names"), WRONG.values(), ids=WRONG)
def test_an_argument_of_a_wrong_type_is_named_in_one_line(
    call: Callable[[Any], Any], names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UsageError, BackendError)) as error:
        call(build("torch"))
    assert is_one_line(str(error.value), *names)
    assert list(tmp_path.iterdir()) == []


def test_no_prompts_have_no_texts() -> None:
    model = build("torch", TINY_MODELS["transformer"])
    assert icenet.generate(model, []) == icenet.generate(model, (), details=True) == []
    with pytest.raises(UsageError, match="takes one prompt, not 0"):
        icenet.generate(model, [], stream=True)


@both_backends
@pytest.mark.parametrize("device", ["gpu0", "cuda:x", "", 3])
def test_a_device_that_is_no_name_of_one(device: Any, backend: str) -> None:
    with pytest.raises(UsageError) as error:
        build(backend, device=device)
    assert is_one_line(str(error.value), "device")


def test_wrappers_of_pytorch() -> None:
    torch = importlib.import_module("torch")
    model = build("torch")
    with pytest.raises(UsageError, match=r"DataParallel; pass its \.module"):
        icenet.generate(torch.nn.DataParallel(model), "a")
    assert build("torch", device=torch.device("cpu")).device.type == "cpu"


def test_a_default_device_of_pytorch_does_not_hold_the_model() -> None:
    torch = importlib.import_module("torch")
    with torch.device("meta"):
        model = build("torch")
    assert {array.tobytes() for array in model.weights().values()} == {
        array.tobytes() for array in build("torch").weights().values()
    }


def test_a_path_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    model = build("torch")
    folder = icenet.save(model, "~/saved")
    assert folder == tmp_path / "home" / "saved"
    assert icenet.load(Path("~/saved"), "torch").weights().keys() == model.weights().keys()
    icenet.convert("~/saved", "~/copy.safetensors", "canonical")
    assert (tmp_path / "home" / "copy.safetensors").is_file()
    (tmp_path / "home" / "lstm.yaml").write_text(
        "model: {type: lstm, hidden_size: 8, num_layers: 1, vocab_size: 257}", encoding="utf-8"
    )
    assert icenet.build("~/lstm.yaml", "torch", "cpu").config.hidden_size == 8
    assert list(Path().iterdir()) == []


@both_backends
def test_a_model_that_its_config_does_not_describe_is_not_saved(backend: str, tmp_path: Path) -> None:
    model = build(backend)
    nn = importlib.import_module({"mlx": "mlx.nn", "torch": "torch.nn"}[backend])
    model.output = nn.Linear(24, 300, bias=False)  # a larger vocabulary
    with pytest.raises(UsageError) as error:
        icenet.save(model, tmp_path / "resized")
    assert is_one_line(str(error.value), "output.weight", "[300, 24]", "[257, 24]", "model.config")
    assert list(tmp_path.iterdir()) == []
    model.token_embedding = nn.Embedding(300, 24)
    model.config = ModelConfig(**{**LSTM, "vocab_size": 300})
    icenet.save(model, tmp_path / "resized")
    assert icenet.load(tmp_path / "resized", backend).weights()["output.weight"].shape == (300, 24)
    model.adapter = nn.Linear(24, 2)
    with pytest.raises(UsageError) as error:
        icenet.save(model, tmp_path / "adapter")
    assert is_one_line(str(error.value), "adapter.", "absent")


def test_parametrized_layers_are_not_saved(tmp_path: Path) -> None:
    model = build("torch")
    importlib.import_module("torch.nn.utils.parametrizations").weight_norm(model.output)
    with pytest.raises(UsageError, match="by the config"):
        icenet.save(model, tmp_path / "parametrized")


def test_numbers_of_numpy_in_a_configuration() -> None:
    sizes = {"hidden_size": np.int64(24), "num_layers": np.int32(1), "dropout": np.float32(0.5)}
    config = Config(seed=np.int64(3), device="cpu", model={**LSTM, **sizes})
    assert config == Config(seed=3, device="cpu", model={**LSTM, "hidden_size": 24, "num_layers": 1, "dropout": 0.5})
    config.training.max_steps = np.int64(7)
    assert type(config.training.max_steps) is int
    assert ModelConfig(type="cnn", num_layers=3, stage_depths=np.array([1, 2])).stage_depths == [1, 2]
    own = ModelConfig(type="models.py:Mine", scale=np.float32(2), sizes=[np.int64(3)], table=np.arange(2))
    assert (own.scale, own.sizes, own.table) == (2.0, [3], [0, 1])
    assert {type(own.scale), type(own.sizes[0])} == {float, int}
    with pytest.raises(UsageError) as error:
        ModelConfig(type="cnn", num_layers=np.float64(2))
    assert is_one_line(str(error.value), "model.num_layers", "write 2")
