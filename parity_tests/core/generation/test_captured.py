"""Decoding steps that are captured on a GPU: compiled by MLX, a CUDA graph in PyTorch. They equal plain steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers import both_backends, token_ids

import icenet
from icenet.core import backends
from icenet.core.config import Config
from icenet.core.generation.request import make_request

pytestmark = pytest.mark.gpu

LLAMA = {
    "positions": "rotary",
    "norm": "rms_norm",
    "feed_forward": "gated",
    "feed_forward_size": 80,
    "activation": "silu",
    "attention_bias": False,
    "feed_forward_bias": False,
    "num_kv_heads": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "default": {},
    "llama": LLAMA,
    "one head of keys, size 80": {**LLAMA, "num_kv_heads": 1, "head_size": 80},
    "head size 20": {**LLAMA, "head_size": 20, "rotary_pairs": "interleaved"},
    "windows": {**LLAMA, "sliding_window": 5, "layer_types": ["sliding", "full"]},
    "soft caps": {**LLAMA, "attention_softcap": 3.0, "logit_softcap": 4.0, "attention_scale": 0.4},
    "query-key norm": {**LLAMA, "query_key_norm": "head", "norm_position": "sandwich", "norm_offset": True},
    "dynamic": {**LLAMA, "rotary_scaling": {"type": "dynamic", "factor": 4.0, "original_length": 19}},
    "experts": {**LLAMA, "num_experts": 4, "experts_per_token": 2},
    "gru": {"type": "gru"},
    "lstm": {"type": "lstm"},
}
PROMPTS = {"one": [7], "unequal": [3, 12, 1], "long": [1100, 9], "full": [250]}


def build(backend: str, values: dict[str, Any]) -> Any:
    given = {"type": "transformer", "hidden_size": 64, "num_layers": 2, "vocab_size": 97, **values}
    if given["type"] == "transformer":
        given = {"num_heads": 4, "max_seq_length": 4096, **given}
    return icenet.build(Config(model=given), backend=backend, device="gpu" if backend == "mlx" else "cuda")


def decode(model: Any, prompts: list[list[int]], count: int, **options: Any) -> tuple[Any, Any]:
    """Returns the tokens `[count, B]` and the scores `[count, B, V]`."""
    decoder = model.decoder_type(model, make_request(model, prompts, None, 0, {"max_new_tokens": count, **options}))
    tokens, scores = [], []
    with decoder:
        for index in range(count):
            tokens.append(decoder.fetch(decoder.submit(index)))
            scores.append(decoder.fetch_scores()[1].copy())
    return np.stack(tokens), np.stack(scores)


@pytest.fixture
def plain_steps(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a context in which steps are not captured, and operations are not fused."""

    @contextlib.contextmanager
    def use() -> Iterator[None]:
        with monkeypatch.context() as patch:
            for name in backends.PACKAGES:
                decoder = backends.module(name, "generation.decoder").Decoder
                patch.setattr(decoder, "capture", lambda self, state, token: self.decode_step)
            patch.setattr("icenet_torch.models.fused.has_few_rows", lambda x: False)
            yield

    return use


@both_backends
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prompts", PROMPTS)
def test_a_captured_step_equals_a_plain_one(backend: str, name: str, prompts: str, plain_steps: Any) -> None:
    rows = [token_ids(1, length, vocab_size=97, seed=length)[0].tolist() for length in PROMPTS[prompts]]
    model = build(backend, MODELS[name])
    for options in ({"temperature": 0.0, "repetition_penalty": 1.2}, {"seed": 5, "top_k": 20}):
        tokens, scores = decode(model, rows, 20, **options)
        with plain_steps():
            expected_tokens, expected = decode(model, rows, 20, **options)
        assert np.array_equal(tokens, expected_tokens)
        kept = np.isfinite(expected)
        assert np.array_equal(kept, np.isfinite(scores))
        assert np.abs(scores - expected)[kept].max() <= 2.0**-16 * np.abs(expected[kept]).max()


@both_backends
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision(backend: str, dtype: str, plain_steps: Any) -> None:
    """The scores of the same tokens differ by a few roundings of the activations."""
    model = build(backend, LLAMA)
    model.set_weight_dtype(dtype)
    model.init_weights(0)
    rows = token_ids(3, 9, vocab_size=97).tolist()
    _, scores = decode(model, rows, 2, temperature=0.0)
    with plain_steps():
        _, expected = decode(model, rows, 2, temperature=0.0)
    unit = 2.0**-8 if dtype == "bf16" else 2.0**-11
    assert np.abs(scores - expected).max() <= 8 * unit * np.abs(expected).max()


@both_backends
@pytest.mark.parametrize("name", ["default", "windows"])
@pytest.mark.parametrize("size", [3, 8, 64])
def test_rows_that_join_a_captured_batch(backend: str, name: str, size: int, plain_steps: Any) -> None:
    """Rows move while a step is captured: their tokens are those of plain steps, all in one block."""
    rows = [token_ids(1, 3 + 17 * row % 60, vocab_size=97, seed=row)[0].tolist() for row in range(20)]
    model = build(backend, MODELS[name])
    for options in ({"temperature": 0.0, "repetition_penalty": 1.2}, {"seed": 5, "eos_token_id": list(range(9))}):
        found = model.generate(rows, max_new_tokens=30, details=True, max_batch_size=size, **options)
        with plain_steps():
            expected = model.generate(rows, max_new_tokens=30, stream=True, **options)
            block = np.stack(list(expected), axis=1)
        for row, one in zip(block, found, strict=True):
            assert one.tokens == row[: len(one.tokens)].tolist()


@both_backends
def test_each_call_has_its_own_state(backend: str) -> None:
    """Two streams of one model at the same time, and a call after a change of the weights in place."""
    model = build(backend, LLAMA)
    expected = [model.generate([[5, 6]], max_new_tokens=9, seed=seed, details=True)[0].tokens for seed in (1, 2)]
    streams = [model.generate([[5, 6]], max_new_tokens=9, seed=seed, stream=True) for seed in (1, 2)]
    found = [[int(next(stream)[0]) for stream in streams] for _ in range(9)]
    assert [list(row) for row in zip(*found, strict=True)] == expected
