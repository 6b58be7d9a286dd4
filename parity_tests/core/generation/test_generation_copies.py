"""The copy of a model that generates: joined projections, in memory once, with the weights of the model."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers import LLAMA, both_backends, build_model, native, plain, token_ids

from icenet.core.config import ModelConfig
from icenet.nn import snapshot

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "llama": {**LLAMA, "attention_bias": False},
    "tied": {**LLAMA, "attention_bias": False, "tie_embeddings": True},
}


def build(backend: str, name: str = "llama") -> Any:
    sizes = {"hidden_size": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 61, "max_seq_length": 40}
    model = build_model(backend, ModelConfig(**{"type": "transformer", "dropout": 0.0, **sizes, **OPTIONS[name]}))
    model.eval()
    return model


def logits(model: Any, backend: str) -> np.ndarray:
    return plain(model(native(backend, token_ids(2, 9, vocab_size=61))))


@both_backends
@pytest.mark.parametrize("name", OPTIONS)
def test_a_copy_computes_what_the_model_does(backend: str, name: str) -> None:
    model = build(backend, name)
    before, names = logits(model, backend), list(model.weight_shapes())
    found = logits(model.for_generation(), backend)
    assert np.abs(found - before).max() <= 8 * 2.0**-24 * np.abs(before).max()
    # the model itself keeps its layers, its values and its names
    assert list(model.weight_shapes()) == names
    assert np.array_equal(logits(model, backend), before)
    attention = model.for_generation().blocks[0].attention
    assert attention.q_proj is None and attention._joined.weight.shape == (
        24 + 2 * (24 if name == "default" else 12),
        24,
    )


@both_backends
def test_a_copy_is_kept_and_joined_weights_are_in_memory_once(backend: str) -> None:
    model = build(backend)
    copied = model.for_generation()
    assert model.for_generation() is copied

    def address(array: Any) -> int:
        return array.data_ptr() if backend == "torch" else snapshot._addresses([array])[0]

    ends = address(copied.blocks[1].attention._joined.weight) + 4 * 24 * np.array([0, 24, 36])
    own = model.blocks[1].attention
    for layer, expected in zip((own.q_proj, own.k_proj, own.v_proj), ends, strict=True):
        assert address(layer.weight) == expected


def add_one(backend: str, layer: Any, how: str) -> None:
    """Adds 1 to the weight of a layer, as users do."""
    if backend == "mlx":
        if how == "in place":
            layer.weight += 1
        elif how == "item":
            layer.weight[...] = layer.weight + 1
        else:
            layer.weight = layer.weight + 1
        mx.eval(layer.weight)
    elif how == "in place":
        with torch.no_grad():
            layer.weight += 1
    elif how == "item":
        layer.weight.data[...] += 1
    else:
        layer.weight = torch.nn.Parameter(layer.weight.detach() + 1)


@both_backends
@pytest.mark.parametrize("how", ["in place", "item", "another"])
@pytest.mark.parametrize("name", ["v_proj", "out_proj"])
def test_a_changed_weight_changes_what_is_generated(backend: str, how: str, name: str) -> None:
    model, prompts = build(backend), [[5, 6, 7]]
    first = model.generate(prompts, max_new_tokens=9, temperature=0.0, details=True)[0].tokens
    add_one(backend, getattr(model.blocks[0].attention, name), how)
    second = model.generate(prompts, max_new_tokens=9, temperature=0.0, details=True)[0].tokens
    expected = list(prompts[0])
    for _ in range(9):
        expected.append(int(plain(model(native(backend, np.array([expected], np.int32))))[0, -1].argmax()))
    assert second == expected[3:] and second != first


@both_backends
@pytest.mark.parametrize("how", ["in place", "item", "another"])
def test_a_changed_weight_that_is_frozen_and_cast_changes_the_copy(backend: str, how: str) -> None:
    model = build(backend)
    model.compute_dtype = mx.bfloat16 if backend == "mlx" else torch.bfloat16
    model.freeze() if backend == "mlx" else model.requires_grad_(False)
    model.for_generation()
    add_one(backend, model.blocks[0].attention.out_proj, how)
    cast = model.for_generation().blocks[0].attention.out_proj.weight
    assert cast.dtype == model.compute_dtype
    exact = plain(model.blocks[0].attention.out_proj.weight)
    found = plain(cast.astype(mx.float32) if backend == "mlx" else cast.float())
    assert np.all(np.abs(found - exact) <= 2.0**-8 * np.abs(exact))


@pytest.mark.parametrize("how", ["in place", "item", "another"])
@pytest.mark.parametrize("name", ["q_proj", "out_proj"])
def test_a_change_is_noticed_on_cuda(how: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, a kernel writes the addresses. It is replaced; more arrays than it takes need several calls."""
    model = build("mlx")
    addresses, sizes = snapshot._addresses, []

    def kernel(inputs: list[Any], **options: Any) -> list[Any]:
        sizes.append(len(inputs))
        with monkeypatch.context() as on_host:
            on_host.setattr(snapshot, "on_cpu", lambda: True)
            return [mx.array(np.array(addresses(inputs), np.uint64))]

    monkeypatch.setattr(snapshot, "on_cpu", lambda: False)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(snapshot, "_kernel", lambda: kernel)
    monkeypatch.setattr(snapshot, "INPUTS", 8)
    kept = model.for_generation()
    assert model.for_generation() is kept
    count = -(-len(snapshot.Snapshot(model, kept)._others) // 8)
    assert count > 2 and sizes == [8] * (2 * count)  # of the arrays now and then
    add_one("mlx", getattr(model.blocks[1].attention, name), how)
    assert model.for_generation() is not kept
    assert np.array_equal(model.for_generation().blocks[1].attention.out_proj.weight,
                          model.blocks[1].attention.out_proj.weight)  # fmt: skip

    def fail(inputs: list[Any], **options: Any) -> list[Any]:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(snapshot, "_kernel", lambda: fail)
    assert model.for_generation() is not model.for_generation()
    if name == "q_proj":
        joined = model.for_generation().blocks[1].attention._joined.weight
        assert np.array_equal(joined[:24], model.blocks[1].attention.q_proj.weight)


@both_backends
def test_a_model_in_training_keeps_no_copy(backend: str) -> None:
    model = build(backend)
    model.train()
    assert model.for_generation() is not model.for_generation()
    assert not model.for_generation().training and model.training


@both_backends
def test_copies_of_a_model_have_their_own(backend: str) -> None:
    model = build(backend)
    kept = model.for_generation()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert other.for_generation() is not kept
        add_one(backend, other.blocks[0].attention.q_proj, "in place")
    assert model.for_generation() is kept
    assert np.array_equal(logits(model, backend), logits(build(backend), backend))


@pytest.mark.usefixtures("mlx_on_cpu")  # a captured step of a GPU calls no Python
@both_backends
def test_caches_are_freed_at_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step has a cache of its own. Without a cycle of references, none waits for the garbage collector."""
    model = build(backend)
    caches: list[weakref.ref[Any]] = []
    cache_type = type(model.make_cache())
    holding = cache_type.holding

    def recording(self: Any, state: Any) -> Any:
        other = holding(self, state)
        caches.extend([weakref.ref(self), weakref.ref(other)])
        return other

    monkeypatch.setattr(cache_type, "holding", recording)
    gc.disable()
    try:
        for _ in model.generate([[5, 6, 7]], max_new_tokens=9, temperature=0.0, stream=True):
            assert len({id(cache()) for cache in caches if cache() is not None}) <= 2
    finally:
        gc.enable()
    assert len(caches) == 16 and not any(cache() for cache in caches)


@both_backends
def test_a_cache_of_the_user_can_be_a_list(backend: str) -> None:
    model = build(backend)
    expected = model.generate([[5, 6, 7]], max_new_tokens=5, temperature=0.0, details=True)[0].tokens
    base = type(model)

    def hidden_states(self: Any, input_ids: Any, mask: Any = None, cache: Any = None) -> Any:
        cache.extend(plain(input_ids)[0].tolist())
        return base.hidden_states(self, native(backend, np.array([cache], np.int32)))[:, -input_ids.shape[1] :]

    own = type("Own", (base,), {"make_cache": lambda self: [], "hidden_states": hidden_states})
    object.__setattr__(model, "__class__", own)
    assert model.generate([[5, 6, 7]], max_new_tokens=5, temperature=0.0, details=True)[0].tokens == expected


@both_backends
def test_a_model_is_freed_with_its_copy(backend: str) -> None:
    """At once: the garbage collector may run much later, and the memory is that of the weights."""
    model = build(backend)
    gc.collect()
    gc.disable()
    try:
        model.generate([[5, 6]], max_new_tokens=3, temperature=0.0)
        kept = weakref.ref(model), weakref.ref(model.for_generation())
        del model
        assert [reference() for reference in kept] == [None, None]
    finally:
        gc.enable()
