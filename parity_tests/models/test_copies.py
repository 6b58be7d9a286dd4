"""Copies of models by `copy.deepcopy` and `pickle`: equal weights, shared arrays and results, no common memory."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import PACKAGES, TINY_MODELS, both_backends

import icenet
from icenet.core.config import Config, ModelConfig

COPIERS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),  # noqa: S301  (its own bytes)
}


def build(family: str, backend: str) -> Any:
    return icenet.build(Config(device="cpu", model=TINY_MODELS[family]), backend)


@both_backends
@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
@pytest.mark.parametrize("family", ["transformer", "gru", "cnn"])
def test_copies_are_equal_and_independent(family: str, copier: Callable[[Any], Any], backend: str) -> None:
    model = build(family, backend)
    copied = copier(model)
    before = model.weights()
    assert {name: array.tobytes() for name, array in copied.weights().items()} == {
        name: array.tobytes() for name, array in before.items()
    }
    assert (copied.device, copied.compute_dtype, copied.training) == (model.device, model.compute_dtype, False)
    assert copied.dropout_sites() == model.dropout_sites()
    if family != "cnn":
        texts = [icenet.generate(each, "def ", max_new_tokens=4, seed=1) for each in (model, copied)]
        assert texts[0] == texts[1]
    copied.set_weights({name: array + 1 for name, array in before.items()})
    assert all(np.array_equal(array, before[name]) for name, array in model.weights().items())


@both_backends
def test_a_copy_of_a_custom_model_shares_what_the_model_shares(backend: str) -> None:
    base = importlib.import_module(f"{PACKAGES[backend]}.models.base").BaseModel
    nn = importlib.import_module(f"{PACKAGES[backend]}.nn")

    class Tied(base):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied(ModelConfig(**TINY_MODELS["transformer"]))
    copied = copy.deepcopy(model)
    assert copied.shared_arrays() == model.shared_arrays() == {"head.weight": "embedding.weight"}
    assert copied.num_params == model.num_params


@both_backends
def test_a_model_without_parameters(backend: str) -> None:
    base = importlib.import_module(f"{PACKAGES[backend]}.models.base").BaseModel
    model = base(ModelConfig(**TINY_MODELS["transformer"]))
    assert (model.num_params, model.weights()) == (0, {})
    assert "cpu" in str(model.device or "cpu")
