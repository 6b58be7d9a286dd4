"""Files of weights are identified by their content; prefixes and keys are named, and stripped on request."""

from __future__ import annotations

import json
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import is_one_line
from safetensors.numpy import save_file

from icenet.core.errors import IceNetError, UsageError, WeightsError
from icenet.core.runs.open_model import open_target
from icenet.core.weights import formats, read, strip_prefix
from icenet.core.weights.convert import convert, detect
from icenet.core.weights.prefixes import suggest_prefixes

torch: Any = pytest.importorskip("torch")

MODEL = torch.nn.Sequential(OrderedDict(body=torch.nn.Linear(3, 2), head=torch.nn.Linear(2, 1)))
STATE = MODEL.state_dict()


def prefixed(prefix: str, state: dict[str, Any] = STATE) -> dict[str, Any]:
    return {prefix + name: array for name, array in state.items()}


def write_zip(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return path


def contents(folder: Path) -> dict[str, tuple[Path, str]]:
    """Returns files with misleading names, and a word that the message must have."""
    folder.mkdir(exist_ok=True)
    scripted, saved, legacy, arrays = (folder / f"{name}.safetensors" for name in ("script", "zip", "old", "npz"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.zeros(1, 1)), str(scripted))
    torch.save(STATE, saved)
    torch.save(STATE, legacy, _use_new_zipfile_serialization=False)
    with arrays.open("wb") as file:
        np.savez(file, weight=np.ones(3))
    found = {"script": (scripted, "TorchScript"), "zip": (saved, "torch.save"), "old": (legacy, "torch.save")}
    found["npz"] = arrays, ".npz"
    for name, content, word in (
        ("h5", b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
        ("gguf", b"GGUF\x03\0\0\0" + bytes(64), "GGUF"),
        ("onnx", b"\x08\x08\x12\x07pytorch\x1a\x052.0.0:" + bytes(9), "ONNX"),
        ("npy", b"\x93NUMPY\x01\0v\0", "numpy"),
        ("gzip", b"\x1f\x8b\x08" + bytes(20), "gzip"),
        ("html", b"<!DOCTYPE html><html>404</html>", "web page"),
        ("lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "LFS"),
        ("empty", b"", "empty"),
        ("zeros", bytes(5000), "zeros"),
        ("text", b"hello\nworld\n", "text"),
        ("json", b'{"a": 1}', "JSON"),
        ("pickle", pickle.dumps({"a": 1}), "pickle"),
        ("cut", saved.read_bytes()[:300], "cut short"),
        ("tflite", b"\x1c\0\0\0TFL3" + bytes(30), "Lite"),
    ):
        path = folder / f"{name}.safetensors"
        path.write_bytes(content)
        found[name] = path, word
    found["keras"] = write_zip(folder / "keras.safetensors", "config.json", "model.weights.h5"), "Keras"
    found["other zip"] = write_zip(folder / "other.safetensors", "a.txt"), "zip"
    return found


def test_files_are_identified_by_their_content(tmp_path: Path) -> None:
    for name, (path, word) in contents(tmp_path).items():
        with pytest.raises(WeightsError) as error:
            read(path)
        assert is_one_line(str(error.value), str(path), word), name
        for suffix in (".bin", ".ckpt"):
            renamed = path.rename(path.with_suffix(suffix))
            if formats.identify(renamed).kind == formats.PICKLE and name != "pickle":
                assert set(convert(renamed, tmp_path / f"{name}{suffix}.safetensors", "canonical").files[0].parts)
            else:
                with pytest.raises(IceNetError) as refused:
                    convert(renamed, tmp_path / "new.safetensors", "canonical")
                assert is_one_line(str(refused.value), str(renamed)), name
            path = renamed


def test_safetensors_of_any_name(tmp_path: Path) -> None:
    save_file({name: array.numpy() for name, array in STATE.items()}, tmp_path / "x.bin", {"format": "pt"})
    assert detect(tmp_path / "x.bin") == "canonical"
    convert(tmp_path / "x.bin", tmp_path / "y.safetensors", "canonical", shapes=shapes())
    assert list(read(tmp_path / "x.bin")) == sorted(STATE)


def shapes() -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in STATE.items()}


@pytest.mark.parametrize("suffix", [".ckpt", ".h5", ".pt", ".yaml"])
def test_loading_a_file_of_weights_names_what_it_is(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save(STATE, path)
    with pytest.raises(IceNetError) as error:
        open_target(path)
    assert is_one_line(str(error.value), str(path), "icenet convert")
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(IceNetError) as error:
        open_target(path)
    assert is_one_line(str(error.value), str(path))


PREFIXES = ["_orig_mod.", "module.", "model.", "_fsdp_wrapped_module.", "ema_model.", "_orig_mod.module.", "a.b."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_are_named_and_stripped_on_request(tmp_path: Path, prefix: str) -> None:
    source, target = tmp_path / "wrapped.pt", tmp_path / "new.safetensors"
    torch.save({**prefixed(prefix), "step": torch.tensor(3)}, source)
    with pytest.raises(WeightsError) as error:
        convert(source, target, "canonical", shapes=shapes())
    message = str(error.value)
    assert is_one_line(message, str(source), "strip_prefix")
    options = [
        word for before, word in zip(message.split(), message.split()[1:], strict=False) if before == "--strip-prefix"
    ]
    assert "".join(options) == prefix and not target.exists()
    if not options[-1].startswith("_"):
        done = convert(source, target, "canonical", shapes=shapes(), strip_prefix=options)
        assert done.left_out == ["step"]
        assert all(np.array_equal(array, STATE[name]) for name, array in read(target).items())


def test_wrappers_within_names() -> None:
    names = [
        "blocks.0._fsdp_wrapped_module.attention.weight",
        "blocks.0._checkpoint_wrapped_module.mlp.bias",
        "out.weight",
    ]
    plain = ["blocks.0.attention.weight", "blocks.0.mlp.bias", "out.weight"]
    found = suggest_prefixes(names, plain)
    assert list(strip_prefix(dict.fromkeys(names), found)) == plain
    assert suggest_prefixes(plain, plain) == suggest_prefixes(["x", "y"], plain) == []
    assert suggest_prefixes(["a.out.weight", "a.x", "a.y"], plain) == [], "it explains one of three names"
    assert list(strip_prefix({"x_orig_mod.weight": 1, "_orig_mod.b": 2}, "_orig_mod")) == ["x_orig_mod.weight", "b"]
    for values, prefix in (({"a": 1}, "module."), ({"a": 1, "_orig_mod.a": 2}, "_orig_mod.")):
        with pytest.raises(UsageError) as error:
            strip_prefix(values, prefix)
        assert is_one_line(str(error.value), prefix)


def test_names_that_no_model_checks_are_remarked(tmp_path: Path) -> None:
    torch.save(prefixed("module."), tmp_path / "ddp.pt")
    done = convert(tmp_path / "ddp.pt", tmp_path / "new.safetensors", "canonical")
    assert is_one_line(done.note, "--strip-prefix module.")
    assert list(read(tmp_path / "new.safetensors")) == sorted(prefixed("module."))
    plain = convert(tmp_path / "ddp.pt", tmp_path / "other.safetensors", "canonical", strip_prefix="module.")
    assert plain.note == "" and list(read(tmp_path / "other.safetensors")) == sorted(STATE)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "ema"])
def test_a_training_checkpoint_needs_the_key(tmp_path: Path, key: str) -> None:
    source, target = tmp_path / "last.ckpt", tmp_path / "new.safetensors"
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    content = {"epoch": 3, key: prefixed("model."), "optimizer": optimizer, "pytorch-lightning_version": "2.1"}
    torch.save(content, source)
    with pytest.raises(WeightsError) as without:
        convert(source, target, "canonical", shapes=shapes())
    assert is_one_line(str(without.value), str(source), f"--key {key}", "Lightning")
    with pytest.raises(UsageError) as error:
        convert(source, target, "canonical", shapes=shapes(), key="weights")
    assert is_one_line(str(error.value), "weights", key)
    with pytest.raises(WeightsError) as wrong:
        convert(source, target, "canonical", shapes=shapes(), key=key)
    assert is_one_line(str(wrong.value), "--strip-prefix model.")
    convert(source, target, "canonical", shapes=shapes(), key=key, strip_prefix="model.")
    assert list(read(target)) == sorted(STATE)


def test_a_key_without_effect_is_refused(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "x.pt")
    save_file({"a": np.ones(2)}, tmp_path / "x.safetensors", {"format": "pt"})
    for name in ("x.pt", "x.safetensors"):
        with pytest.raises(UsageError) as error:
            convert(tmp_path / name, tmp_path / "new.safetensors", "canonical", key="model")
        assert is_one_line(str(error.value), "--key")


def test_a_whole_module_is_not_unpickled(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
    with pytest.raises(WeightsError) as caught:
        convert(tmp_path / "whole.pt", tmp_path / "out.safetensors", "canonical")
    assert is_one_line(caught.value, "whole.pt", "unpickling", "found.state_dict() if it is a module")
    assert [path.name for path in tmp_path.iterdir()] == ["whole.pt"]


def test_shards_of_pytorch(tmp_path: Path) -> None:
    """A folder as Transformers wrote it before safetensors."""
    parts = {"pytorch_model-00001-of-00002.bin": ["body.weight", "body.bias"]}
    parts["pytorch_model-00002-of-00002.bin"] = ["head.weight", "head.bias"]
    for file, names in parts.items():
        torch.save({name: STATE[name] for name in names}, tmp_path / file)
    listed = {name: file for file, names in parts.items() for name in names}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": listed}))
    for number, source in enumerate((tmp_path, index)):
        convert(source, tmp_path / f"new{number}.safetensors", "canonical", shapes=shapes())
        assert list(read(tmp_path / f"new{number}.safetensors")) == sorted(STATE)
    index.write_text(json.dumps({"weight_map": {**listed, "more": "../x.bin"}}))
    with pytest.raises(WeightsError) as error:
        convert(index, tmp_path / "new.safetensors", "canonical")
    assert is_one_line(str(error.value), "../x.bin")


def test_names_of_files_that_are_not_utf8(tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode(b"w\xff.pt")
    torch.save(STATE, (file := source.open("wb")))
    file.close()
    convert(source, tmp_path / os.fsdecode(b"n\xff.safetensors"), "canonical", shapes=shapes())
    convert(source, tmp_path / os.fsdecode(b"n\xff.pt"), "torch", shapes=shapes())
