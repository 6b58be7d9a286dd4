"""Tables of positions: made as far as they are needed, before the steps that read them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from helpers import BACKENDS, both_backends, build_model, native, plain, token_ids

from icenet.core import backends
from icenet.core.config import Config, ModelConfig
from icenet.core.nn import position_tables as tables
from icenet.core.nn import rotary

SMALL: dict[str, Any] = {
    **{"type": "transformer", "hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 61},
    **{"max_seq_length": 600, "dropout": 0.0},
}
POSITIONS: dict[str, dict[str, Any]] = {
    "sinusoidal": {},
    "rotary": {"positions": "rotary"},
    "two bases": {"positions": "rotary", "sliding_window": 9, "sliding_rotary_theta": 50.0, "rotary_layers": [1]},
    "long-rope": {
        "positions": "rotary",
        "rotary_scaling": {
            **{"type": "longrope", "factor": 4.0, "original_length": 300},
            **{"short_factors": [1.0, 1.5, 2.0, 3.0], "long_factors": [2.0, 4.0, 9.0, 20.0]},
        },
    },
    "dynamic": {
        "positions": "rotary",
        "rotary_scaling": {"type": "dynamic", "factor": 2.0, "original_length": 300},
    },
}
by_kind = pytest.mark.parametrize("options", POSITIONS.values(), ids=POSITIONS)


@both_backends
@by_kind
def test_a_table_that_grows_has_the_same_rows(
    backend: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the boundaries at which the buffers of the cache and the table become larger."""
    tokens = token_ids(1, 270, vocab_size=61)
    request = {"max_new_tokens": 12, "temperature": 0.0, "details": True}
    expected = build_model(backend, ModelConfig(**SMALL, **options))
    logits = plain(expected(native(backend, tokens)))
    continued = [row.tokens for row in expected.generate(tokens[:, :250], **request)]
    monkeypatch.setattr(tables, "LEAST", 8)
    model = build_model(backend, ModelConfig(**SMALL, **options))
    found = [plain(model(native(backend, tokens[:, :length]))) for length in (1, 8, 9, 33, 270)]
    np.testing.assert_array_equal(found[-1], logits)
    model = build_model(backend, ModelConfig(**SMALL, **options))
    assert [row.tokens for row in model.generate(tokens[:, :250], **request)] == continued


@both_backends
@by_kind
def test_a_captured_step_finds_the_rows_of_its_position(
    backend: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows no numbers of the host, so `reserve` makes the rows of the table before it."""
    tokens = native(backend, token_ids(1, 311, vocab_size=61))
    model = build_model(backend, ModelConfig(**SMALL, **options))
    cache = model.make_cache()
    model(tokens[:, :310], cache=cache)
    expected = plain(model(tokens[:, 310:], cache=cache))
    monkeypatch.setattr(tables, "LEAST", 8)
    model = build_model(backend, ModelConfig(**SMALL, **options))
    cache = model.make_cache()
    model(tokens[:, :310], cache=cache)
    cache.reserve(1)
    found = plain(model(tokens[:, 310:], cache=cache.captured(cache.state)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


@both_backends
@by_kind
def test_the_length_of_a_prompt_does_not_matter(backend: str, options: dict[str, Any]) -> None:
    """Next to longer ones, padded on the left, in pieces: logits and tokens are those of each prompt alone."""
    model = build_model(backend, ModelConfig(**SMALL, **options))
    whole = token_ids(1, 320, vocab_size=61)[0]
    prompts = [whole[:length].tolist() for length in (1, 2, 255, 256, 257, 320)]
    request = {"max_new_tokens": 3, "temperature": 0.0, "details": True}
    together = [row.tokens for row in model.generate(prompts, prefill_chunk=100, **request)]
    assert together == [model.generate([prompt], **request)[0].tokens for prompt in prompts]
    padded, mask = np.zeros((6, 320), np.int32), np.zeros((6, 320), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, 320 - len(prompt) :], mask[row, 320 - len(prompt) :] = prompt, 1
    logits = plain(model(native(backend, padded), native(backend, mask)))
    for row, prompt in enumerate(prompts):
        alone = plain(model(native(backend, np.array([prompt], np.int32))))[0]
        np.testing.assert_allclose(logits[row, 320 - len(prompt) :], alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_for_a_huge_context_needs_no_memory_for_it(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = rotary.RotaryRows.make

    def make(self: Any, start: int, stop: int) -> Any:
        made.append(stop - start)
        return original(self, start, stop)

    monkeypatch.setattr(rotary.RotaryRows, "make", make)
    values = {**SMALL, "max_seq_length": 2**24, "positions": "rotary"}
    backends.meta_model(Config.from_dict({"backend": backend, "model": values}))
    assert not made
    model = build_model(backend, ModelConfig(**values))
    tokens = native(backend, token_ids(1, 5, vocab_size=61))
    logits = plain(model(tokens))
    assert made == [tables.LEAST]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        np.testing.assert_array_equal(plain(copied(tokens)), logits)


def test_a_table_made_for_inference_is_used_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that PyTorch's inference mode has created cannot be saved for the gradient."""
    import torch

    monkeypatch.setattr(tables, "LEAST", 4)
    model = build_model("torch", ModelConfig(**SMALL, positions="rotary"))
    tokens = torch.from_numpy(token_ids(1, 20, vocab_size=61))
    with torch.inference_mode():
        model(tokens)
    model(tokens).sum().backward()
