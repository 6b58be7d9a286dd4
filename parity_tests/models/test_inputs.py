"""Wrong arguments of a model: one line that names what is expected and what was given, the same on both backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import icenet.blas  # noqa: F401  (before mlx)

import numpy as np
import pytest
from helpers import BACKENDS, TINY_MODELS, both_backends, build_model, is_one_line, native

from icenet.core import backends
from icenet.core.config import Config, ModelConfig, custom
from icenet.core.errors import UsageError
from icenet.parity.configuration.engines import record
from icenet.parity.configuration.run import random_batch

mx: Any = pytest.importorskip("mlx.core")
torch: Any = pytest.importorskip("torch")

IDS = np.arange(10, dtype=np.int32).reshape(2, 5)
TOKENS: dict[str, tuple[Any, list[str]]] = {
    "one axis": (IDS[0], ["[batch, length]", "[5]"]),
    "three axes": (IDS[None], ["[batch, length]", "[1, 2, 5]"]),
    "no rows": (IDS[:0], ["empty", "[0, 5]"]),
    "no tokens": (IDS[:, :0], ["empty", "[2, 0]"]),
    "floats": (IDS.astype(np.float32), ["integers", "float32"]),
    "bools": (IDS > 3, ["integers", "bool"]),
    "outside": (IDS + 990, ["token 990 at row 0, position 0", "0 to 256"]),
    "negative": (IDS - 4, ["token -4 at row 0, position 0", "0 to 256"]),
    "outside at the end": (np.where(IDS == 9, 257, IDS), ["token 257 at row 1, position 4", "0 to 256"]),
}
IMAGES = np.zeros((2, 8, 8, 1), np.float32)
PICTURES: dict[str, tuple[Any, list[str]]] = {
    "one image": (IMAGES[0], ["[8, 8, 1]"]),
    "five axes": (IMAGES[None], ["[1, 2, 8, 8, 1]"]),
    "no images": (IMAGES[:0], ["empty"]),
    "channels": (np.zeros((2, 8, 8, 3), np.float32), ["3 channels", "model.image_channels is 1"]),
    "too small": (IMAGES[:, :1, :1], ["1x1", "2x2"]),
}
TEXT_MODELS = ("transformer", "lstm")


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, str], Any]:
    """Returns a tiny model by family and backend."""
    families = (*TEXT_MODELS, "cnn")
    return {(f, b): build_model(b, ModelConfig(**TINY_MODELS[f])) for f in families for b in BACKENDS}


def error(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        call(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("family", TEXT_MODELS)
def test_tokens(family: str, name: str, models: dict[tuple[str, str], Any]) -> None:
    array, expected = TOKENS[name]
    found = {error(models[family, backend], native(backend, array)) for backend in BACKENDS}
    assert len(found) == 1 and is_one_line(found.pop(), "input_ids", *expected)


@pytest.mark.parametrize("name", PICTURES)
def test_images(name: str, models: dict[tuple[str, str], Any]) -> None:
    array, expected = PICTURES[name]
    for backend, axes in zip(
        BACKENDS, ("[batch, height, width, channels]", "[batch, channels, height, width]"), strict=True
    ):
        model = models["cnn", backend]
        given = native(backend, array, images=array.ndim == 4)
        message = error(model, given)
        assert is_one_line(message, "images", *expected)
        assert axes in message or name in ("no images", "too small")
        assert error(model.extract_features, given) == message


@both_backends
def test_not_an_array(backend: str, models: dict[tuple[str, str], Any]) -> None:
    wanted = {"mlx": "mlx.core.array", "torch": "torch.Tensor"}[backend]
    other_framework = native("torch" if backend == "mlx" else "mlx", IDS)
    for value in ([[1, 2]], IDS, None, "text", other_framework):
        given = type(value).__name__
        assert is_one_line(error(models["lstm", backend], value), "input_ids", wanted, given)
        assert is_one_line(error(models["cnn", backend], value), "images", wanted, given)


@pytest.mark.parametrize("family", TEXT_MODELS)
@pytest.mark.parametrize("shape", [(2, 4), (5,), (1, 5)])
def test_masks(shape: tuple[int, ...], family: str, models: dict[tuple[str, str], Any]) -> None:
    found = {
        error(models[family, b], native(b, IDS), attention_mask=native(b, np.ones(shape, np.bool_))) for b in BACKENDS
    }
    assert len(found) == 1 and is_one_line(found.pop(), "attention_mask", "[2, 5]", str(list(shape)))


@pytest.mark.parametrize("family", TEXT_MODELS)
@pytest.mark.parametrize(
    ("keep", "mask_out", "named"), [(0, -np.inf, "-inf"), (0, -1e4, "-10000.0"), (0, 0, "zeros only"), (1, 2, "2.0")]
)
def test_a_mask_that_is_added_to_the_scores(
    keep: float, mask_out: float, named: str, family: str, models: dict[tuple[str, str], Any]
) -> None:
    """Read as 0 for padding, it would be its opposite."""
    mask = np.where(IDS % 5 < 2, mask_out, keep).astype(np.float32)
    found = {error(models[family, b], native(b, IDS), attention_mask=native(b, mask)) for b in BACKENDS}
    assert len(found) == 1 and is_one_line(found.pop(), "attention_mask", named, "mask == 0")
    config = Config.from_dict({"model": TINY_MODELS[family]})
    for backend in BACKENDS:
        with pytest.raises(UsageError, match="mask == 0"):
            backends.engine(config, backend, "cpu").forward({"inputs": IDS, "attention_mask": mask})


@both_backends
@pytest.mark.parametrize("family", TEXT_MODELS)
def test_masks_of_any_dtype(family: str, backend: str, models: dict[tuple[str, str], Any]) -> None:
    model = models[family, backend]
    mask = native(backend, IDS % 5 >= 2)
    framework: Any = mx if backend == "mlx" else torch
    expected = model(native(backend, IDS), attention_mask=mask).tolist()
    for dtype in (framework.int64, framework.uint8, framework.float32, framework.bfloat16):
        given = mask.astype(dtype) if backend == "mlx" else mask.to(dtype)
        assert model(native(backend, IDS), attention_mask=given).tolist() == expected
        with pytest.raises(UsageError, match="attention_mask must be"):
            model(native(backend, IDS), attention_mask=given * 2)
        with pytest.raises(UsageError, match="attention_mask must be"):
            model.generate(native(backend, IDS), attention_mask=given * 2)


@both_backends
def test_what_is_accepted(backend: str, models: dict[tuple[str, str], Any]) -> None:
    """Integers of any size, and arrays that are not contiguous."""
    model = models["lstm", backend]
    expected = np.array(model(native(backend, IDS)).tolist())
    for dtype in (np.uint8, np.int16, np.int64):
        assert np.array_equal(model(native(backend, IDS.astype(dtype))).tolist(), expected)
    assert np.array_equal(model(native(backend, IDS.T.copy()).T).tolist(), expected)


@both_backends
def test_ids_are_not_read_where_they_were_checked_or_are_unknown(
    backend: str, models: dict[tuple[str, str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding does not wait for its tokens, an engine checks batches on the host, traced arrays have no values."""
    model = models["transformer", backend]
    if backend == "torch":
        assert model._to_host(torch.zeros(2, device="meta")) is None
    else:
        seen = []
        mx.vmap(lambda x: [seen.append(model._to_host(x)), x][1])(mx.array(IDS))
        assert seen == [None]
    monkeypatch.setattr(type(model), "_to_host", lambda *_: pytest.fail("the ids were read"))
    assert model.generate(native(backend, IDS), max_new_tokens=2).shape == (2, 7)
    config = Config.from_dict({"device": "cpu", "model": TINY_MODELS["transformer"]})
    backends.engine(config, backend).forward({"inputs": IDS})


# ---- models of the user -----------------------------------------------------------------------------------

NET = """
import {framework}.nn as nn
from {package}.models.base import BaseModel


class Vision(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x)


class Narrow(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(257, 200)

    def forward(self, x):
        return self.embedding(x)


class Pair(Narrow):
    def forward(self, x):
        return self.embedding(x), x


class Pooled(Narrow):
    def forward(self, x):
        return self.embedding(x)[:, 0]
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the working directory, with the models."""
    (tmp_path / "net.py").write_text(NET.format(framework="mlx", package="icenet"))
    (tmp_path / "net_torch.py").write_text(NET.format(framework="torch", package="icenet_torch"))
    monkeypatch.chdir(tmp_path)
    custom.trust("net.py:any")
    return tmp_path


@both_backends
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Vision", ["line 12", "int32 [4, 8]", "data.kind=images"]),
        ("Narrow", ["[4, 8, 200]", "[4, 8, 257]", "model.vocab_size"]),
        ("Pair", ["tuple", "[4, 8, 257]"]),
        ("Pooled", ["[4, 200]", "[4, 8, 257]"]),
    ],
)
def test_a_model_that_does_not_fit_its_data(name: str, expected: list[str], backend: str, nets: Path) -> None:
    """Also in a comparison, whose error names the same line."""
    model = {"type": f"net.py:{name}", "vocab_size": 257}
    config = Config.from_dict({"device": "cpu", "model": model, "data": {"seq_length": 8}})
    engine, batch = backends.engine(config, backend), random_batch(config)
    calls = [lambda: engine.evaluate(batch), lambda: engine.gradients(batch), lambda: record(engine, batch)]
    found = [error(call) for call in calls]
    assert all(is_one_line(message, *expected) for message in found), found


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_without_a_model_section(backend: str) -> None:
    model_class = backends.module(backend, "models").TransformerModel
    whole = Config.from_yaml("quickstart")
    for given, names in (
        ({"type": "transformer"}, ("dict", "ModelConfig(")),
        (whole, ("not a Config", "section model")),
    ):
        with pytest.raises(UsageError) as caught:
            model_class(given)
        assert is_one_line(caught.value, "TransformerModel", *names)
