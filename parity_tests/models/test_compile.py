"""Compiled models: the same numbers as eager ones, and few traces for sequences of many lengths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import helpers

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from icenet.core import backends as engines
from icenet.core.config import Config, ModelConfig
from icenet.core.generation.decoder import State
from icenet.core.generation.request import make_request
from icenet.core.models import buckets
from icenet.nn import activations
from icenet_torch.nn import activation as torch_activation

MODELS: dict[str, dict[str, Any]] = {
    "transformer": {"type": "transformer", "hidden_size": 32, "num_layers": 1, "num_heads": 2, "max_seq_length": 100},
    "encoder": {
        "type": "transformer",
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "max_seq_length": 100,
        "causal": False,
    },
    "rotary": {  # angles that depend on the layer and on the number of tokens
        **{"type": "transformer", "hidden_size": 32, "num_layers": 3, "num_heads": 2, "max_seq_length": 100},
        **{"positions": "rotary", "rotary_scaling": {"type": "dynamic", "factor": 4.0, "original_length": 7}},
        **{"sliding_window": 4, "layer_types": ["sliding", "full", "full"], "sliding_rotary_theta": 50.0},
        "rotary_layers": [0, 1],
    },
    **{
        f"{count} experts": {
            **{"type": "transformer", "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_seq_length": 100},
            **{"num_experts": count, "expert_size": 12},
        }
        for count in (4, 8)  # fewer and more than the rows of three tokens
    },
    "gru": {"type": "gru", "hidden_size": 16, "num_layers": 1},
}


def config(name: str, compiled: bool) -> Config:
    model = {**MODELS[name], "vocab_size": 61, "compile_model": compiled}
    return Config.from_dict({"model": model, "data": {"seq_length": 32}})


def batch(rows: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(seed).integers(0, 61, (rows, length + 1)).astype(np.int32)
    return {"inputs": np.ascontiguousarray(tokens[:, :-1]), "labels": np.ascontiguousarray(tokens[:, 1:])}


def test_a_bucket_is_at_least_its_length() -> None:
    for length in range(1, 300):
        assert buckets.bucket(length) >= length and buckets.bucket(length) in (16, 32, 64, 128, 256, 512)
        assert length <= buckets.bucket(length, 300) <= 300
    assert {buckets.bucket(n, 100) for n in range(1, 101)} == {16, 32, 64, 100}


@pytest.mark.parametrize("name", MODELS)
def test_padding_does_not_change_the_loss(name: str) -> None:
    """On the engine without compilation, so that only padding differs."""
    engine = engines.engine(config(name, False), "torch", "cpu", dtype="float64")
    for rows, length in ((1, 5), (3, 33), (4, 16), (5, 97)):
        given = batch(rows, length)
        padded = buckets.pad(given, engine.config.model)
        assert len(padded["inputs"]) in (1, 2, 4, 8)
        loss, count, _ = engine.evaluate(given)
        again, counted, _ = engine.evaluate(padded)
        assert counted == count == rows * length
        assert again == pytest.approx(loss, rel=1e-12)


def test_images_are_padded_with_rows_only() -> None:
    images = {"inputs": np.ones((3, 8, 8, 1), np.float32), "labels": np.zeros(3, np.int32)}
    padded = buckets.pad(images, ModelConfig(type="cnn"))
    assert padded["inputs"].shape == (4, 8, 8, 1) and padded["labels"].tolist() == [0, 0, 0, -100]


@pytest.mark.parametrize(
    ("name", "method", "fused"),
    [
        ("transformer", "hidden_states", False),
        pytest.param("transformer", "hidden_states", True, marks=pytest.mark.slow),
        ("gru", "run_layers", True),
    ],
)
def test_mlx_traces_few_times_and_agrees_with_eager(
    name: str, method: str, fused: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if not fused:
        request.getfixturevalue("unfused")
    compiled, eager = (engines.engine(config(name, on), "mlx") for on in (True, False))
    traced = []
    plain = getattr(type(compiled.model), method)

    def counting(self: Any, input_ids: Any, *others: Any) -> Any:
        traced.append(input_ids.shape)
        return plain(self, input_ids, *others)

    lengths = range(3, 40, 4)
    with monkeypatch.context() as patch:
        patch.setattr(type(compiled.model), method, counting)
        found = [compiled.forward(batch(2, length, length)) for length in lengths]
    assert len(traced) == len(set(traced)) <= 3, traced
    for length, values in zip(lengths, found, strict=True):
        expected = eager.forward(batch(2, length, length))
        assert values.shape == expected.shape
        assert np.abs(values - expected).max() <= 64 * 2.0**-24 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("name", "of_mlx"), [("gelu", "gelu"), ("gelu_tanh", "gelu_approx"), ("silu", "silu"), ("relu", "relu")]
)
def test_activations_on_a_cpu_compile_nothing_and_round_once(
    monkeypatch: pytest.MonkeyPatch, name: str, of_mlx: str, dtype: str
) -> None:
    monkeypatch.setattr(nn, of_mlx, None)  # MLX's own function, which would start g++
    with mx.stream(mx.cpu):
        x = mx.random.normal((64, 65), scale=4, key=mx.random.key(0)).astype(getattr(mx, dtype))
        found = activations.activation(name, x)
        assert found.dtype == x.dtype
        values, found = (np.array(array.astype(mx.float32)).astype(np.float64) for array in (x, found))
    expected = torch_activation(name, torch.from_numpy(values)).numpy()
    half_an_ulp = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype] * np.abs(expected)
    error_in_fp32 = 8 * 2.0**-24 * np.maximum(np.abs(values), 1)  # for x = -5 the formulas of gelu cancel
    assert (np.abs(found - expected) <= half_an_ulp + error_in_fp32).all()


@pytest.mark.parametrize("name", ["transformer", "rotary", "4 experts", "8 experts", "gru"])
@helpers.both_backends
def test_a_decoding_step_depends_on_its_arrays_only(backend: str, name: str, request: pytest.FixtureRequest) -> None:
    """A step that is captured once and run again with other arrays chooses the tokens of `generate`."""
    options = {"max_new_tokens": 8, "seed": 3, "repetition_penalty": 1.3, "top_k": 20}
    prompts = [[1, 2, 3, 4, 5], [7], [9, 8]]
    model = helpers.build_model(backend, config(name, False).model)
    expected = model.generate(prompts, **options)
    decoder = model.decoder_type(model, make_request(model, prompts, None, 0, options))
    with decoder:
        tokens = [decoder.fetch(decoder.submit(0))]
        decoder.cache.reserve(len(tokens) * 8)
        state = replace(decoder.state, cache=decoder.cache.state)

        def step(arrays: list[Any]) -> list[Any]:
            *cache, index, seen, keys, token = arrays
            after, choice = decoder.decode_step(State(cache, index, keys, seen), token)
            return [*after.cache, after.index, after.seen, after.keys, choice.token]

        arrays = [*state.cache, state.index, state.seen, state.keys, decoder.choice.token]
        if backend == "mlx":
            request.getfixturevalue("unfused")
            captured: Any = mx.compile(step)
        else:
            with torch.no_grad():
                captured = make_fx(step)([array.clone() for array in arrays])
        for _ in range(7):
            with decoder.inference_mode():
                arrays = captured(arrays)
            tokens.append(helpers.plain(arrays[-1]))
    width = max(map(len, prompts))
    assert helpers.plain(expected)[:, width:].tolist() == np.stack(tokens, axis=1).tolist()
