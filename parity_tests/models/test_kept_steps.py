"""Steps that are captured for one request are used for the next ones of the same form."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import icenet.blas  # before mlx: it decides which BLAS MLX finds

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers import both_backends, build_model

import icenet
from icenet.core.config import ModelConfig
from icenet.generation import capture, decoder
from icenet.nn import snapshot
from icenet_torch.generation import capture as torch_capture
from icenet_torch.generation import decoder as torch_decoder

MODELS: dict[str, dict[str, Any]] = {
    "transformer": {"type": "transformer", "num_heads": 2, "max_seq_length": 600, "positions": "rotary"},
    "lstm": {"type": "lstm"},
}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]


def build(name: str, backend: str = "mlx", **options: Any) -> Any:
    sizes = {"hidden_size": 16, "num_layers": 2, "vocab_size": 61, "dropout": 0.0}
    return build_model(backend, ModelConfig(**{**sizes, **MODELS[name], **options}))


def texts(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    settings: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0, **options}
    return [row.tokens for row in model.generate(prompts, details=True, **settings)]


class StaticStep(torch_capture.CapturedStep):
    """A CUDA graph on the CPU: it reads and writes the same memory each time, and capturing it changes nothing."""

    made: list[int]  # the number of rows of each one

    def __init__(self, step: Any, state: Any, token: Any) -> None:
        owner = copy.copy(step.__self__)  # a graph does not see what the request changes later
        if isinstance(owner, torch_decoder.Decoder):  # nor does it keep the model
            owner.model, owner.step = weakref.proxy(owner.model), None
            owner.cache = copy.copy(owner.cache)
            owner.cache._prepare = None
        self.token, self.step = token.clone(), getattr(owner, step.__name__)
        others = [array if array is None else array.clone() for array in (state.index, state.keys, state.seen)]
        self.state = type(state)(list(state.cache), *others)
        before = [array.clone() for array in self.state.arrays]
        after, _ = self.step(self.state, self.token)
        self._separate(after)
        _, self.choice = self.step(self.state, self.token)
        for own, old in zip(self.state.arrays, before, strict=True):
            own.copy_(old)
        self.made.append(len(token))

    def _replay(self) -> None:
        after, choice = self.step(self.state, self.token)
        for own, new in zip(self.choice, choice, strict=True):
            own.copy_(new)
        self._copy(after, self.choice.token)


def capture_steps(backend: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Captures steps on the CPU, too. Returns the number of rows of each one that Python has computed."""
    rows: list[int] = []
    if backend == "torch":
        StaticStep.made = rows
        monkeypatch.setattr(torch_decoder, "CAPTURED_DEVICES", ("cpu",))
        monkeypatch.setattr(torch_decoder, "CapturedStep", StaticStep)
        start_copy = torch_decoder.Decoder.start_copy

        def start(self: Any, token: Any, best: Any, state: Any) -> Any:
            return start_copy(self, token.clone(), best.clone(), state)  # as on a GPU

        monkeypatch.setattr(torch_decoder.Decoder, "start_copy", start)
        return rows
    monkeypatch.setattr(decoder, "on_cpu", lambda: False)
    monkeypatch.setattr(snapshot, "on_cpu", lambda: False)
    step = decoder.Decoder.decode_step

    def record(self: Any, state: Any, token: Any) -> Any:
        rows.append(len(token))
        return step(self, state, token)

    monkeypatch.setattr(decoder.Decoder, "decode_step", record)
    return rows


@pytest.fixture
def traced(unfused: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return capture_steps("mlx", monkeypatch)


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


@both_backends
@pytest.mark.parametrize("name", MODELS)
def test_requests_of_the_same_form_are_captured_once(
    backend: str, name: str, unfused: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [texts(build(name, backend), prompts, **options) for prompts, options in REQUESTS]
    captured = capture_steps(backend, monkeypatch)
    model = build(name, backend)
    assert [texts(model, prompts, **options) for prompts, options in REQUESTS] == expected
    longer = [1] if name == "transformer" else []  # with larger buffers
    assert captured == [1, 3, 1, 1, *longer]  # the first, of three rows, sampled, with a penalty


@both_backends
def test_a_changed_weight_or_attribute_is_seen(backend: str, unfused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def scale(model: Any) -> None:  # in place
        factors = np.linspace(-2, 2, 16, dtype=np.float32)
        if backend == "mlx":
            model.final_norm.weight *= mx.array(factors)
        else:
            model.final_norm.weight.data *= torch.from_numpy(factors)

    def replace(model: Any) -> None:
        model.set_weights({path: 1.5 * value[::-1] for path, value in model.weights().items()})

    def change(model: Any) -> None:
        model.blocks[0].attention_norm.eps = 9.0
        model.blocks[1].norm_position = "post"

    changes = scale, replace, change
    model = build("transformer", backend)
    expected = [texts(model, PROMPTS[:1], max_new_tokens=9)]
    for edit in changes:
        edit(model)
        model._generation_copy = None
        expected.append(texts(model, PROMPTS[:1], max_new_tokens=9))
    assert len({*map(tuple, (rows[0] for rows in expected))}) == 4
    capture_steps(backend, monkeypatch)
    model = build("transformer", backend)
    found = [texts(model, PROMPTS[:1], max_new_tokens=9)]
    for edit in changes:
        edit(model)
        found.append(texts(model, PROMPTS[:1], max_new_tokens=9))
    assert found == expected


def test_steps_with_memory_of_their_own_serve_one_request_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's graphs have the buffers of a request: streams at the same time have different ones."""
    model = build("transformer", "torch")
    options: list[dict[str, Any]] = [{"temperature": 0.9, "seed": seed, "max_new_tokens": 9} for seed in range(3)]
    expected = [texts(model, PROMPTS[:1], **more)[0] for more in options]
    captured = capture_steps("torch", monkeypatch)
    for count in (2, 3):
        streams = [model.generate(PROMPTS[:1], stream=True, **more) for more in options]
        found = [[int(next(stream)[0]) for stream in streams] for _ in range(9)]
        assert [list(row) for row in zip(*found, strict=True)] == expected
        for stream in streams:
            stream.close()
        assert captured == [1] * (3 + (3 - 1) * (count - 2))  # one was kept, and is used again


def test_a_prompt_cache_and_a_draft_with_kept_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers of a prompt cache are not those of a step, which the next request writes to."""
    model, draft = build("transformer", "torch"), build("transformer", "torch", num_layers=1)

    def talk() -> list[list[int]]:
        cache, found = icenet.prompt_cache(model), []
        for turn in range(3):
            prompt = [*range(1, 5), *(token for row in found for token in row)]
            found += texts(model, [prompt], cache=cache, max_new_tokens=7)
            found += texts(model, [[9, 8, 7]], max_new_tokens=5)  # it has the step of the turn before
            found += texts(model, [[turn, 4, 2]], draft=draft, max_new_tokens=9, seed=1, temperature=0.7)
        return found

    expected = talk()
    captured = capture_steps("torch", monkeypatch)
    assert talk() == expected
    first = len(captured)
    assert talk() == expected
    assert len(captured) - first <= 3  # those over proposals are not kept


def test_rows_that_join_use_kept_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("transformer", "torch")
    prompts = [[1 + row] * (1 + 7 * row % 11) for row in range(9)]
    options: list[dict[str, Any]] = [
        {"max_new_tokens": 12, "max_batch_size": 4, "seed": seed, "temperature": 0.8, "eos_token_id": [3, 4, 5]}
        for seed in range(2)
    ]
    expected = [texts(model, prompts, **more) for more in options]
    captured = capture_steps("torch", monkeypatch)
    assert [texts(model, prompts, **more) for more in options] == expected
    assert len(captured) == len({*captured})  # one for each number of slots


def test_the_memory_of_kept_steps_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    capture_steps("torch", monkeypatch)
    model = build("transformer", "torch")
    one, three = PROMPTS[:1], PROMPTS
    texts(model, one)
    steps = torch_capture.kept_steps(model.for_generation())
    size = next(iter(steps.values())).nbytes
    assert size >= 2 * 2 * 16 * 256 * 4  # keys and values of two layers
    monkeypatch.setattr(torch_capture, "KEPT_BYTES", 2 * size)
    texts(model, three)  # too large
    assert [step.token.shape[0] for step in steps.values()] == [1]
    for seed in range(4):
        texts(model, one, temperature=0.5 + seed / 10)
    assert sum(step.nbytes for step in steps.values()) <= 2 * size
    assert [step.key[0][0] for step in steps.values()] == [(1,)]
    monkeypatch.setattr(torch_capture, "KEPT_BYTES", 2**26)
    for seed in range(2 * torch_capture.KEPT_STEPS):
        texts(model, one, temperature=0.5 + seed / 10, max_new_tokens=2)
    assert len(steps) == torch_capture.KEPT_STEPS
    kept = [weakref.ref(step) for step in steps.values()]
    del steps, model  # without waiting for the garbage collector
    assert not any(step() for step in kept)


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
