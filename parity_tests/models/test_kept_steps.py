"""Steps that MLX has compiled for one request are used for the next ones of the same form."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import numpy as np
import pytest
from helpers import build_model

from icenet.core.config import ModelConfig
from icenet.generation import capture, decoder
from icenet.nn import snapshot

MODELS: dict[str, dict[str, Any]] = {
    "transformer": {"type": "transformer", "num_heads": 2, "max_seq_length": 600, "positions": "rotary"},
    "lstm": {"type": "lstm"},
}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]


def build(name: str) -> Any:
    sizes = {"hidden_size": 16, "num_layers": 2, "vocab_size": 61, "dropout": 0.0}
    return build_model("mlx", ModelConfig(**{**sizes, **MODELS[name]}))


def texts(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    settings: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0, **options}
    return [row.tokens for row in model.generate(prompts, details=True, **settings)]


@pytest.fixture
def traced(unfused: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps are captured, as on a GPU. Returns the number of rows of each one that Python has computed."""
    monkeypatch.setattr(decoder, "on_cpu", lambda: False)
    monkeypatch.setattr(snapshot, "on_cpu", lambda: False)
    rows: list[int] = []
    step = decoder.Decoder.decode_step

    def record(self: Any, state: Any, token: Any) -> Any:
        rows.append(len(token))
        return step(self, state, token)

    monkeypatch.setattr(decoder.Decoder, "decode_step", record)
    return rows


REQUESTS: list[tuple[list[list[int]], dict[str, Any]]] = [
    (PROMPTS[:1], {}),
    (PROMPTS[1:2], {}),
    (PROMPTS, {}),
    (PROMPTS[1:2], {"temperature": 0.9, "seed": 3}),
    (PROMPTS[:1], {"temperature": 0.9, "seed": 4, "max_new_tokens": 9}),
    (PROMPTS[:1], {"repetition_penalty": 1.5}),
    ([[7] * 300], {"max_new_tokens": 3}),
    (PROMPTS[2:], {}),
]


@pytest.mark.parametrize("name", MODELS)
def test_requests_of_the_same_form_are_traced_once(name: str, request: pytest.FixtureRequest) -> None:
    expected = [texts(build(name), prompts, **options) for prompts, options in REQUESTS]
    traced = request.getfixturevalue("traced")
    model = build(name)
    assert [texts(model, prompts, **options) for prompts, options in REQUESTS] == expected
    longer = [1] if name == "transformer" else []  # with larger buffers
    assert traced == [1, 3, 1, 1, *longer]  # the first, of three rows, sampled, with a penalty


def test_a_change_in_place_of_a_weight_is_seen(request: pytest.FixtureRequest) -> None:
    model = build("transformer")
    model.final_norm.weight *= mx.array(np.linspace(-2, 2, 16, dtype=np.float32))
    expected = texts(model, PROMPTS[:1])
    request.getfixturevalue("traced")
    model = build("transformer")
    assert texts(model, PROMPTS[:1]) != expected
    model.final_norm.weight *= mx.array(np.linspace(-2, 2, 16, dtype=np.float32))
    assert texts(model, PROMPTS[:1]) == expected


def test_a_model_and_its_buffers_are_freed(traced: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[weakref.ref[Any]] = []
    model = build("transformer")
    make_cache = type(model).make_cache

    def made(self: Any) -> Any:
        cache = make_cache(self)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(type(model), "make_cache", made)
    texts(model, PROMPTS)
    steps = capture.kept_steps(model.for_generation())
    assert len(steps) == 1
    for seed in range(2 * capture.KEPT_STEPS):
        texts(model, PROMPTS[:1], temperature=0.5 + seed / 10, max_new_tokens=2)
    assert len(steps) == capture.KEPT_STEPS
    kept = weakref.ref(model.for_generation())
    gc.collect()
    assert not any(cache() for cache in caches)
    del model
    gc.collect()
    assert kept() is None
