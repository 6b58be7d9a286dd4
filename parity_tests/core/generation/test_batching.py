"""Several prompts in the slots of a batch: each row is as it is alone, whenever it joins and whoever leaves."""

from __future__ import annotations

from typing import Any

import icenet.blas

# isort: split
import numpy as np
import pytest
from helpers import BACKENDS, both_backends, build_model, is_one_line, native, plain

import icenet.generation.cache
import icenet_torch.generation.cache
from icenet.core import backends
from icenet.core.config import ModelConfig
from icenet.core.errors import NonFiniteError, UsageError
from icenet.core.generation import batching
from icenet.core.generation.request import make_request
from icenet.core.generation.streaming import generate_text, stream_tokens
from icenet.core.tokenizers import get_tokenizer

VOCAB = 61
LENGTHS = [3, 17, 1, 9, 9, 30, 2, 12, 5, 21, 1]
PROMPTS = [np.random.default_rng(row).integers(0, VOCAB, length).tolist() for row, length in enumerate(LENGTHS)]
MODELS: dict[str, dict[str, Any]] = {
    "learned positions": {"max_seq_length": 64},
    "rotary positions, windows": {
        **{"max_seq_length": 64, "positions": "rotary", "num_kv_heads": 2, "norm": "rms_norm"},
        **{"sliding_window": 5, "layer_types": ["sliding", "full"]},
    },
    "angles of the length": {
        **{"max_seq_length": 64, "positions": "rotary"},
        "rotary_scaling": {"type": "dynamic", "factor": 4.0, "original_length": 16},
    },
    "lstm": {"type": "lstm"},
    "gru": {"type": "gru", "num_layers": 1},
}
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_new_tokens": 14, "eos_token_id": [7, 20, 33, 46, 50]},
    {"seed": 5, "top_k": 20, "max_length": 34, "prefill_chunk": 4},
    {"seed": 6, "top_p": 0.9, "repetition_penalty": 1.4, "max_new_tokens": 11, "stop": [9, 28, 31, 45]},
]
_built: dict[Any, Any] = {}
_alone: dict[Any, Any] = {}


def build(backend: str, name: str) -> Any:
    if (backend, name) not in _built:
        sizes = {"hidden_size": 32, "num_layers": 2, "vocab_size": VOCAB, "type": "transformer"}
        values = {**sizes, **MODELS[name]}
        if values["type"] == "transformer":
            values["num_heads"] = 4
        model = build_model(backend, ModelConfig(**values), seed=7)  # type: ignore[arg-type]
        # larger weights of the attention than those of a new model, so that a choice depends on the context
        factors = {
            name: 8 if "attention." in name else 3 if name == "output.weight" else 1 for name in model.weights()
        }
        weights = {name: array * np.float32(factors[name]) for name, array in model.weights().items()}
        model.set_weights(weights)
        _built[backend, name] = model
    return _built[backend, name]


def alone(model: Any, row: int, options: dict[str, Any], prompts: list[list[int]] | None = None) -> tuple[Any, Any]:
    """Returns the tokens of one row and why it has ended, without a batch."""
    request = make_request(model, prompts or PROMPTS, None, 0, options).select([row])
    stopping = request.stopping_criteria()
    for _ in stream_tokens(model.decoder_type(model, request), request, stopping):
        pass
    return stopping.tokens[0], stopping.reasons()[0]


def together(model: Any, prompts: Any = None, **options: Any) -> list[tuple[Any, Any]]:
    rows = model.generate(prompts or PROMPTS, details=True, **options)
    return [(row.tokens, row.finish_reason) for row in rows]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The rows in the slots of each step of a batch."""
    found: list[Any] = []
    submit = batching.Batch.submit

    def recorded(self: Any) -> Any:
        rows = list(self.slots)
        pending = submit(self)
        if pending is not None:
            assert len(plain(pending[0][0])) == len(rows)
            found.append(rows)
        return pending

    monkeypatch.setattr(batching.Batch, "submit", recorded)
    return found


@both_backends
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("costs", ["cpu", "gpu"])
def test_each_row_is_as_it_is_alone(
    backend: str, name: str, costs: str, monkeypatch: pytest.MonkeyPatch, steps: list[Any]
) -> None:
    if costs == "gpu":
        monkeypatch.setattr(batching, "ON_CPU", batching.ON_GPU)
    model = build(backend, name)
    for options, sizes in zip(OPTIONS, ((1, 64), (4,), (3, 64)), strict=True):
        key = (backend, name, *options)
        if key not in _alone:
            _alone[key] = [alone(model, row, options) for row in range(len(PROMPTS))]
        expected = _alone[key]
        assert len({len(tokens) for tokens, _ in expected}) >= 3  # the rows end at different times
        for size in sizes:
            steps.clear()
            assert together(model, max_batch_size=size, **options) == expected
            assert {row for rows in steps for row in rows} - {None} >= {
                row for row, (tokens, _) in enumerate(expected) if len(tokens) > 1
            }
            assert max(map(len, steps)) <= size


@pytest.mark.usefixtures("mlx_on_cpu")  # a captured step of a GPU calls no Python
@both_backends
def test_rows_join_and_leave(backend: str, steps: list[Any]) -> None:
    """Without ends, row r has r + 2 new tokens: its first one is chosen when its prompt has been read."""
    model = build(backend, "learned positions")
    prompts = [[row] * (30 - row) for row in range(8)]
    options = {"max_length": 32, "temperature": 0.0, "ignore_eos": True}
    found = together(model, prompts, max_batch_size=3, **options)
    assert [len(tokens) for tokens, _ in found] == [2, 3, 4, 5, 6, 7, 8, 9]
    assert found == [alone(model, row, options, prompts) for row in range(8)]
    for row in range(8):
        assert sum(row in rows for rows in steps) == row + 1  # no step is for a row that has ended
    assert steps[0] == [2, 1, 0]
    assert steps[1] == [2, 1, 3]  # the place of row 0
    waiting = [row for rows in steps[:1] for row in rows]
    for rows in steps:
        waiting += [row for row in rows if row not in waiting]
        assert None not in rows  # also when none waits: the batch becomes smaller
    assert waiting == [2, 1, 0, 3, 4, 5, 6, 7]
    assert [len(rows) for rows in steps][-3:] == [1, 1, 1]


@both_backends
def test_a_batch_on_a_gpu_is_halved(backend: str, steps: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size is captured again. A free slot is computed until then."""
    monkeypatch.setattr(batching, "ON_CPU", batching.ON_GPU)
    model = build(backend, "learned positions")
    prompts = [[row] * (20 - row) for row in range(8)]
    options = {"max_length": 22, "temperature": 0.0, "ignore_eos": True}
    assert together(model, prompts, **options) == [alone(model, row, options, prompts) for row in range(8)]
    assert [len(rows) for rows in steps] == [8] * 4 + [4] * 2 + [2] + [1] * 2 or sorted(
        {len(rows) for rows in steps}
    ) == [1, 2, 4, 8]
    assert [rows.count(None) for rows in steps[:3]] == [0, 1, 2]


@both_backends
@pytest.mark.parametrize("name", ["rotary positions, windows", "lstm"])
@pytest.mark.parametrize("size", [1, 2, 64])
def test_rows_that_end_with_their_first_token(backend: str, name: str, size: int, steps: list[Any]) -> None:
    model = build(backend, name)
    first = [tokens[0] for tokens, _ in together(model, temperature=0.0, max_new_tokens=1, ignore_eos=True)]
    assert steps == []  # one token needs no step
    options = {"temperature": 0.0, "max_new_tokens": 6, "eos_token_id": sorted(first)[::2]}
    found = together(model, max_batch_size=size, **options)
    assert found == [alone(model, row, options) for row in range(len(PROMPTS))]
    assert 2 <= sum(tokens == [] for tokens, _ in found) < len(PROMPTS)
    assert together(model, max_batch_size=size, temperature=0.0, eos_token_id=first) == [([], "end")] * len(PROMPTS)


@pytest.mark.usefixtures("mlx_on_cpu")  # a captured step of a GPU calls no Python
@both_backends
def test_prompts_of_similar_length_are_read_together(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group has little padding, and at most `PREFILL_TOKENS` tokens with it; no token is read twice."""
    model = build(backend, "learned positions")
    shapes: list[tuple[int, ...]] = []
    own = type(model).hidden_states
    monkeypatch.setattr(
        type(model),
        "hidden_states",
        lambda self, ids, *rest: (shapes.append(tuple(ids.shape)), own(self, ids, *rest))[1],
    )
    prompts = [[1] * length for length in (2, 60, 3, 58, 28, 1, 59)]
    for limit, expected in ((8192, [(3, 60), (2, 28), (2, 2)]), (125, [(2, 60), (2, 58), (3, 3)])):
        shapes.clear()
        monkeypatch.setattr(batching, "PREFILL_TOKENS", limit)
        model.generate(prompts, max_new_tokens=1)
        assert shapes == expected


@both_backends
def test_a_context_that_slides_is_decoded_by_itself(backend: str) -> None:
    """Rows that fit share slots. The others are decoded together, at most `max_batch_size` at a time."""
    model = build(backend, "learned positions")
    prompts = [[4] * 60, [5, 6], [7] * 62, [8] * 20, [9] * 55]
    options = {"seed": 2, "overflow": "slide", "max_new_tokens": 9}
    assert batching.rows_that_join(model, make_request(model, prompts, None, 0, options)) == [1, 3, 4]
    expected = [alone(model, row, options, prompts) for row in range(5)]
    for size in (1, 2, 64):
        assert together(model, prompts, max_batch_size=size, **options) == expected


@both_backends
def test_what_cannot_share_a_batch(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of a user's class may have more arrays; long-rope needs the tokens again at a length."""
    model = build(backend, "rotary positions, windows")
    request = make_request(model, PROMPTS, None, 0, {"max_new_tokens": 5})
    assert batching.rows_that_join(model, request) == list(range(len(PROMPTS)))
    assert batching.rows_that_join(model, request.select([3])) == []
    cache = type(model.make_cache())
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "make_cache", lambda self: type("Own", (cache,), {})(2))
        assert batching.rows_that_join(model, request) == []
    monkeypatch.setattr(type(model), "rereads_above", property(lambda self: 12))
    joining = batching.rows_that_join(model, request)
    assert [LENGTHS[row] for row in joining] == [3, 17, 1, 30, 2, 5, 21, 1]  # not those that pass 12 tokens: 9, 9, 12


@both_backends
def test_after_an_interruption_nothing_is_left(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(backend, "learned positions")
    options = {"seed": 3, "max_new_tokens": 12}
    expected = together(model, **options)
    decoder, calls = type(model).decoder_type, []

    def interrupted(self: Any, handle: Any) -> Any:
        calls.append(handle)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return finish_copy(self, handle)

    finish_copy = decoder.finish_copy
    model.train()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(decoder, "finish_copy", interrupted)
        model.generate(PROMPTS, max_batch_size=3, **options)
    assert model.training and model.blocks[0].attention.dropout.training
    model.eval()
    assert together(model, max_batch_size=3, **options) == expected


@both_backends
@pytest.mark.parametrize("size", [2, 64])
def test_an_error_names_the_row_of_the_call(backend: str, size: int) -> None:
    model = build_model(
        backend, ModelConfig(type="transformer", hidden_size=16, num_layers=1, num_heads=2, vocab_size=VOCAB)
    )  # type: ignore[arg-type]
    weights = {name: array.copy() for name, array in model.weights().items()}
    weights["token_embedding.weight"][60] = np.nan
    model.set_weights(weights)
    prompts = [[1, 2], [3], [5, 60, 1], [4] * 7]
    with pytest.raises(NonFiniteError) as caught:
        model.generate(prompts, temperature=0.0, max_new_tokens=4, max_batch_size=size)
    assert is_one_line(caught.value, "token 0 of row 2", "token_embedding.weight")


@both_backends
def test_an_error_in_rows_apart(backend: str) -> None:
    """Rows that slide are decoded apart from the others; the message has their number in the call."""
    model = build(backend, "learned positions")
    weights = {name: array.copy() for name, array in model.weights().items()}
    weights["token_embedding.weight"][60] = np.nan
    broken = type(model)(model.config, seed=None)
    broken.set_weights(weights)
    prompts = [[1, 2], [3], [5, 60, 1] * 20]
    with pytest.raises(NonFiniteError, match="token 0 of row 2"):
        broken.generate(prompts, temperature=0.0, max_new_tokens=5, overflow="slide")


@both_backends
def test_the_option(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(backend, "learned positions")
    with pytest.raises(UsageError, match="max_batch_size has no effect with stream=True"):
        model.generate(PROMPTS, max_batch_size=4, stream=True)
    with pytest.raises(UsageError, match="max_batch_size"):
        model.generate(PROMPTS, max_batch_size=0)
    monkeypatch.setattr(model, "tokenizer", get_tokenizer("bytes"))
    for arguments in (["a text"], [["a text"], True]):
        with pytest.raises(UsageError, match="max_batch_size has no effect with one prompt"):
            generate_text(model, arguments[0], bool(arguments[1:]), False, {"max_batch_size": 2})


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_cache_are_moved(backend: str) -> None:
    """Rows are kept in another order, and replaced by those of a longer cache: neighbours and single ones."""
    package = {"mlx": icenet, "torch": icenet_torch}[backend].generation.cache
    pick = backends.module(backend, "generation.decoder").Decoder.pick

    def cache(rows: int, columns: int, first: float) -> Any:
        made = package.KVCache(1)
        made.begin(native(backend, np.zeros((rows, columns), np.int32)), None)
        values = (
            first + np.arange(rows, dtype=np.float32)[:, None, None, None] + np.zeros((1, 2, columns, 3), np.float32)
        )
        made.layers[0].append(native(backend, values), native(backend, -values))
        made.end(columns)
        return made

    def rows(of: Any) -> Any:
        keys, values = plain(of.layers[0].keys), plain(of.layers[0].values)
        assert np.array_equal(keys, -values)
        return keys[:, 1, :, 2]

    first = cache(3, 4, 10)
    first.arrange([2, 0, 0, 1, 2, 1], lambda *arguments: pick(None, *arguments))
    assert rows(first)[:, 0].tolist() == [12, 10, 10, 11, 12, 11]
    second = cache(4, 300, 20)
    first.arrange([6, 1, 7, 8, 4, 9], lambda *arguments: pick(None, *arguments), second)
    assert first.capacity == 512 and first.length == 300
    assert rows(first)[:, 0].tolist() == [20, 10, 21, 22, 12, 23]
    assert rows(first)[:, 299].tolist() == [20, 0, 21, 22, 0, 23]
    first.place(native(backend, np.array([300, 4, 7, 0, 1, 2], np.int32)), 300)
    positions, masks = first.begin(native(backend, np.zeros((6, 1), np.int32)), None)
    assert plain(positions).tolist() == [[300], [4], [7], [0], [1], [2]]
    assert plain(masks[None]).sum(axis=-1).ravel().tolist() == [301, 5, 8, 1, 2, 3]  # its own column and those before
    new = np.full((6, 2, 1, 3), 50, np.float32)
    first.layers[0].append(native(backend, new), native(backend, -new))
    assert [np.flatnonzero(row == 50).tolist() for row in rows(first)] == [[300], [4], [7], [0], [1], [2]]
