"""Requests: lengths, stops, streams and errors."""

from __future__ import annotations

import contextlib
import importlib
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

from generation_models import PROMPTS, build, config_of, fresh, run

# isort: split
import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers import PACKAGES, TINY_MODELS, both_backends, build_model, is_one_line
from hypothesis import example, given, settings
from hypothesis import strategies as st

from icenet.core.config import GenerationConfig, ModelConfig
from icenet.core.errors import UsageError
from icenet.core.generation import streaming
from icenet.core.generation.request import Request
from icenet.core.generation.stopping import StoppingCriteria
from icenet.core.tokenizers.bytes import ByteTokenizer

# ---- lengths ----------------------------------------------------------------------------------------------


@both_backends
def test_lengths(backend: str) -> None:
    model = fresh(backend)  # 48 positions

    def length(**options: Any) -> int:
        return run(backend, [[1, 2, 3]], model=model, temperature=0, **options).shape[1]

    assert length() == 48  # 100 new tokens, limited by the context
    assert length(overflow="slide") == 103
    assert length(max_length=10) == 10 and length(max_new_tokens=10) == 13
    assert length(max_length=10, max_new_tokens=20) == 23  # max_new_tokens takes precedence
    assert length(max_length=48) == 48 and length(max_new_tokens=1) == 4
    assert length(max_length=60, overflow="slide") == 60
    assert run(backend, [[1] * 60], model=model, max_new_tokens=3, overflow="slide").shape == (1, 63)


@both_backends
def test_the_models_own_settings(backend: str) -> None:
    model = fresh(backend)
    model.generation = GenerationConfig(max_new_tokens=4, temperature=0.0, stop=[])
    greedy = run(backend, [[1, 2]], model=model)
    assert np.array_equal(greedy, run(backend, [[1, 2]], model=fresh(backend), max_new_tokens=4, temperature=0))
    assert run(backend, [[1, 2]], model=model, max_length=20).shape == (1, 20)
    assert run(backend, [[1, 2]], model=model, max_new_tokens=7).shape == (1, 9)
    sampled = run(backend, [[1, 2]], model=model, temperature=1.0, max_new_tokens=20, seed=5)
    assert np.array_equal(sampled, run(backend, [[1, 2]], model=fresh(backend), max_new_tokens=20, seed=5))
    model.generation = GenerationConfig(max_length=9, seed=5)
    assert np.array_equal(run(backend, [[1, 2]], model=model), sampled[:, :9])
    assert model.generation == GenerationConfig(max_length=9, seed=5)


# ---- stops ------------------------------------------------------------------------------------------------


@both_backends
def test_stop_tokens(backend: str) -> None:
    options = {"max_new_tokens": 40, "seed": 12}
    free = run(backend, PROMPTS, **options)
    stop = [int(free[0, 18 + 9]), int(free[2, 18 + 4])]
    ends = [int(np.flatnonzero(np.isin(row[18:], stop))[0]) if np.isin(row[18:], stop).any() else 40 for row in free]
    out = run(backend, PROMPTS, stop=stop, pad_token_id=33, **options)
    assert ends[0] <= 9 and ends[2] <= 4 and out.shape[1] == 18 + max(ends)
    for row, end in enumerate(ends):
        assert np.array_equal(out[row, 18 : 18 + end], free[row, 18 : 18 + end])
        assert (out[row, 18 + end :] == 33).all()
        assert (out[row, : 18 - len(PROMPTS[row])] == 33).all()
    one = run(backend, PROMPTS[:1], stop=int(free[0, 18]), max_new_tokens=5, seed=12)
    assert one.tolist() == PROMPTS[:1]  # the first token is a stop
    assert run(backend, [[stop[0], 1]], stop=stop, **options).shape[1] >= 2  # a stop in the prompt has no effect


class Scripted:
    """A model that counts: token n is followed by n + 1 (bytes, so "a" is followed by "bcd...")."""

    @staticmethod
    def build(backend: str) -> Any:
        base = importlib.import_module(f"{PACKAGES[backend]}.models").BaseModel

        class Counter(base):  # type: ignore[misc, valid-type]
            def __init__(self, config: Any) -> None:
                super().__init__(config)
                zero = np.zeros(1, np.float32)
                self.bias = mx.array(zero) if backend == "mlx" else torch.nn.Parameter(torch.from_numpy(zero))

            def forward(self, input_ids: Any) -> Any:
                if backend == "mlx":
                    return 50.0 * (mx.arange(257) == ((input_ids + 1) % 257)[..., None]) + self.bias
                return 50.0 * (torch.arange(257) == ((input_ids + 1) % 257)[..., None]) + self.bias

        model = Counter(config_of(vocab_size=257, hidden_size=2, num_heads=1, max_seq_length=200))
        model.tokenizer = ByteTokenizer()
        return model


@both_backends
def test_stop_texts(backend: str) -> None:
    model = Scripted.build(backend)
    tokenizer = model.tokenizer

    def text(prompt: str, **options: Any) -> str:
        out = run(backend, [list(prompt.encode())], model=model, **options)
        return tokenizer.decode(out[0].tolist())

    assert text("ab", max_new_tokens=4) == "abcdef"  # a model without a cache
    assert text("ab", max_new_tokens=20, stop="gh") == "abcdef"
    assert text("ab", max_new_tokens=20, stop=["xyz", "hi", "gh"]) == "abcdef"
    assert (
        text("ab", max_new_tokens=20, stop=["bc", "e"]) == "abcd"
    )  # a stop text that begins in the prompt has no effect
    assert text("ab", max_new_tokens=20, stop=["ghi", ord("h")]) == "abcdefg"
    assert text("ab", max_new_tokens=20, stop=["c"]) == "ab"
    assert text("ab", max_new_tokens=3, stop=["cdef"]) == "abcde"  # not complete: kept
    rows = run(backend, [list(b"a"), list(b"m")], model=model, max_new_tokens=6, stop=["de"], pad_token_id=256)
    assert [tokenizer.decode(row.tolist()) for row in rows] == ["abc", "mnopqrs"]


WORDS = st.text(st.sampled_from("abé€😀 \n"), max_size=12)


def until_stopped(tokens: list[int], stop: list[Any]) -> list[int]:
    """Returns the tokens before a stop, found by decoding the whole text after each token."""
    tokenizer = ByteTokenizer()
    for n in range(1, len(tokens) + 1):
        if tokens[n - 1] in [item for item in stop if isinstance(item, int)]:
            return tokens[: n - 1]
        text = tokenizer.decode(tokens[:n])
        found = [text.find(item) for item in stop if isinstance(item, str) and item in text]
        if found:
            return tokenizer.encode(text[: min(found)])
    return tokens


@settings(max_examples=200, deadline=None)
@given(text=WORDS, stop=st.lists(WORDS.filter(bool) | st.sampled_from([10, 0xE9, 0x80]), max_size=3))
@example(text="aab", stop=["ab"])
@example(text="éa", stop=["é"])
def test_stops_against_decoding_everything(text: str, stop: list[Any]) -> None:
    tokens, stops = list(text.encode()), StoppingCriteria(1, stop, ByteTokenizer(), 0)
    for token in tokens:
        chosen = stops.update(np.array([token], np.int32))
        assert chosen[0] == (0 if stops.all_done else token)
        if stops.all_done:
            break
    assert stops.tokens[0] == until_stopped(tokens, stop)


@settings(max_examples=200, deadline=None)
@given(text=WORDS, stop=st.lists(WORDS.filter(bool) | st.sampled_from([10]), max_size=3))
@example(text="aEND", stop=["END"])
@example(text="aEN", stop=["END"])
@example(text="a\U0001f600", stop=[])
def test_the_pieces_of_a_streamed_text_add_up_to_the_text(text: str, stop: list[Any]) -> None:
    """No part of a stop text and no incomplete character is shown, and nothing is missing."""
    tokenizer = ByteTokenizer()
    ids = list(text.encode())

    class FixedDecoder(contextlib.nullcontext):  # type: ignore[type-arg]
        """A decoder that generates the text."""

        def submit(self, index: int) -> int:
            return ids[index]

        def fetch(self, handle: int) -> Any:
            return np.array([handle], np.int32)

    prompt = np.zeros((1, 1), np.int32)
    options = GenerationConfig(stop=stop)
    request = Request(prompt, None, options, (len(ids),), None, 0, 0, tokenizer)
    pieces = [piece for piece in streaming.stream_text(FixedDecoder(), request) if piece] if ids else []
    assert "".join(pieces) == tokenizer.decode(until_stopped(list(text.encode()), stop))
    assert all(pieces) and not any("\ufffd" in piece for piece in pieces)


# ---- streams ----------------------------------------------------------------------------------------------


@both_backends
def test_a_stream_yields_the_same_tokens(backend: str) -> None:
    options = {"max_new_tokens": 30, "seed": 4}
    expected = run(backend, PROMPTS, **options)[:, 18:]
    stream = build(backend).generate(PROMPTS, stream=True, **options)
    tokens = list(stream)
    assert all(token.dtype == np.int32 and token.shape == (3,) for token in tokens)
    assert np.array_equal(np.stack(tokens, axis=1), expected)
    stop = int(expected[1, 3])
    stopped = run(backend, PROMPTS, stop=stop, pad_token_id=7, **options)[:, 18:]
    tokens = list(build(backend).generate(PROMPTS, stream=True, stop=stop, pad_token_id=7, **options))
    assert np.array_equal(np.stack(tokens, axis=1)[:, : stopped.shape[1]], stopped)


@both_backends
@pytest.mark.parametrize("ending", ["exhausted", "closed", "forgotten", "error"])
def test_the_mode_is_restored_after_a_stream(backend: str, ending: str) -> None:
    model = fresh(backend)
    model.train()
    stream = model.generate([[1, 2]], max_new_tokens=6, stream=True)
    if ending == "exhausted":
        assert len(list(stream)) == 6
    else:
        next(stream), next(stream)
        if ending == "closed":
            stream.close()
        elif ending == "error":
            with pytest.raises(KeyboardInterrupt):
                stream.throw(KeyboardInterrupt())
        del stream
    assert model.training and model.blocks[0].attention.dropout.training


@both_backends
def test_two_streams_of_one_model(backend: str) -> None:
    """The end of one stream must not activate dropout for the other."""
    model = fresh(backend, dropout=0.5)
    options = {"max_new_tokens": 12, "temperature": 0}
    model.eval()
    expected = [run(backend, [prompt], model=model, **options)[0, 1:].tolist() for prompt in ([1], [2])]
    model.train()
    first = model.generate([[1]], stream=True, **{**options, "max_new_tokens": 3})
    second = model.generate([[2]], stream=True, **options)
    found: list[list[int]] = [[], []]
    found[0].append(int(next(first)[0]))
    found[1].append(int(next(second)[0]))
    found[0] += [int(token[0]) for token in first]
    found[1] += [int(token[0]) for token in second]
    assert found[0] == expected[0][:3]
    assert found[1] == expected[1]
    assert model.training


@both_backends
def test_the_next_token_is_submitted_before_the_last_is_read(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = importlib.import_module(f"{PACKAGES[backend]}.models").BaseModel.decoder_type
    calls: list[str] = []
    submit, fetch = decoder.submit, decoder.fetch
    monkeypatch.setattr(decoder, "submit", lambda self, i: (calls.append(f"submit {i}"), submit(self, i))[1])
    monkeypatch.setattr(decoder, "fetch", lambda self, handle: (calls.append("fetch"), fetch(self, handle))[1])
    stream = fresh(backend).generate([[1]], max_new_tokens=3, stream=True)
    assert calls == []  # no work before the first token is requested
    assert len(list(stream)) == 3
    assert calls == ["submit 0", "submit 1", "fetch", "submit 2", "fetch", "fetch"]


# ---- errors -----------------------------------------------------------------------------------------------


BAD: list[tuple[Any, dict[str, Any], tuple[str, ...]]] = [
    # prompts, options, what the error names
    ([], {}, ("input_ids", "empty")),
    ([[1, 2], []], {}, ("prompt 1", "empty")),
    ([[]], {}, ("prompt 0", "empty")),
    (np.zeros((1, 0), int), {}, ("input_ids", "[1, 0]")),
    (np.zeros((1, 2, 3), int), {}, ("input_ids", "[1, 2, 3]")),
    (5, {}, ("input_ids", "[]")),
    ("hello", {}, ("input_ids", "text")),
    (["hello", "you"], {}, ("input_ids", "text")),
    ([[1, 2], 3], {}, ("prompt 1", "3")),
    ([np.array([[1, 2]])], {}, ("prompt 0", "[1, 2]")),
    ([[[1, 2], [3]]], {}, ("prompt 0",)),
    ([[1.0, 2.0]], {}, ("integers", "float64")),
    (np.array([[1.0]], np.float32), {}, ("integers", "float32")),
    (np.array([[True]]), {}, ("integers", "bool")),
    (None, {}, ("integers", "object")),
    ([[61]], {}, ("token 61", "row 0", "position 0", "0 to 60")),
    (np.array([[1, -1]]), {}, ("token -1", "row 0", "position 1")),
    ([[1, 2], [3, 99]], {}, ("token 99", "row 1", "position 1")),
    ([[2**32 + 5]], {}, ("token 4294967301",)),
    (np.array([[2**32 + 5]]), {}, ("token 4294967301",)),
    ([[1] * 49], {}, ("49", "model.max_seq_length 48", "overflow='slide'")),
    ([[1] * 40], {"max_new_tokens": 9}, ("40", "9", "model.max_seq_length 48", "overflow='slide'")),
    ([[1, 2, 3]], {"max_length": 3}, ("max_length 3", "3 tokens", "max_new_tokens")),
    ([[1]], {"max_new_tokens": 0}, ("generation.max_new_tokens", "0")),
    ([[1]], {"max_length": 2.5}, ("generation.max_length", "2.5")),
    ([[1]], {"temperature": -1}, ("generation.temperature", "-1")),
    ([[1]], {"temperature": math.nan}, ("generation.temperature", "nan")),
    ([[1]], {"temperature": "hot"}, ("generation.temperature", "'hot'")),
    ([[1]], {"top_k": -1}, ("generation.top_k", "-1")),
    ([[1]], {"top_k": 2.0}, ("generation.top_k", "2.0")),
    ([[1]], {"top_p": 0}, ("generation.top_p", "0")),
    ([[1]], {"top_p": 1.5}, ("generation.top_p", "1.5")),
    ([[1]], {"min_p": 2}, ("generation.min_p", "2")),
    ([[1]], {"repetition_penalty": 0}, ("generation.repetition_penalty", "0")),
    ([[1]], {"prefill_chunk": 0}, ("generation.prefill_chunk", "0")),
    ([[1]], {"seed": "a"}, ("generation.seed", "'a'")),
    ([[1]], {"seed": -(2**63) - 1}, ("generation.seed", str(-(2**63) - 1))),
    ([[1]], {"seed": 2**64 + 1}, ("generation.seed", str(2**64 + 1))),
    ([[1]], {"overflow": "slid"}, ("generation.overflow", "'slid'", "'slide'")),
    ([[1]], {"stop": "END"}, ("stop", "tokenizer")),
    ([[1]], {"stop": [1.5]}, ("stop", "1.5")),
    ([[1]], {"stop": [99]}, ("stop", "99")),
    ([[1]], {"stop": 5.0}, ("stop", "5.0")),
    ([[1]], {"stop": [None]}, ("stop",)),
    ([[1, 2]], {"attention_mask": [[1]]}, ("attention_mask", "[1, 1]", "[1, 2]")),
    ([[1, 2]], {"attention_mask": [[1, 0]]}, ("padding", "left")),
    ([[1, 2]], {"attention_mask": [[0, 0]]}, ("padding", "left")),
    ([[1, 2], [3]], {"attention_mask": [[1, 1], [1]]}, ("attention_mask",)),
    ([[1, 2]], {"attention_mask": [["0", "1"]]}, ("attention_mask", "'0'")),
    ([[1, 2]], {"attention_mask": [[-math.inf, 0.0]]}, ("attention_mask", "-inf")),
    ([[1, 2]], {"attention_mask": [[0, 2]]}, ("attention_mask", "2")),
    ([[1, 2], [3]], {"pad_token_id": 99}, ("pad_token_id", "99")),
    ([[1, 2], [3]], {"pad_token_id": -1}, ("pad_token_id", "-1")),
    ([[1, 2], [3]], {"pad_token_id": 2**40}, ("pad_token_id",)),
]


def refused(backend: str, prompts: Any, options: Any, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> str:
    """The error of a bad request, raised at once and before any work, streamed or not."""
    model = fresh(backend, **changes)
    model.train()
    monkeypatch.setattr(type(model), "hidden_states", lambda *_: pytest.fail("the model was run first"))
    messages = set()
    for stream in (False, True):
        with pytest.raises(UsageError) as caught:
            model.generate(prompts, stream=stream, **options)
        messages.add(str(caught.value))
    assert len(messages) == 1 and model.training
    return messages.pop()


@both_backends
@pytest.mark.parametrize(
    ("prompts", "options", "names"), BAD, ids=[f"{i}-{names[0]}" for i, (*_, names) in enumerate(BAD)]
)
def test_bad_requests_are_one_line_that_names_the_fault(
    backend: str, prompts: Any, options: Any, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refused(backend, prompts, options, monkeypatch)
    assert is_one_line(message, *names), message
    assert "more)" not in message
    assert ("empty" in message) == ("empty" in names), message


@both_backends
def test_a_model_without_causal_attention_cannot_generate(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_one_line(refused(backend, [[1]], {}, monkeypatch, causal=False), "model.causal: false")


@both_backends
def test_an_empty_stop_text(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icenet.core.models.base.ModelBase.tokenizer", ByteTokenizer())
    for stop in ("", ["a", ""]):
        assert is_one_line(refused(backend, [[1]], {"stop": stop}, monkeypatch), "stop text", "empty")


@both_backends
def test_an_unknown_option_is_a_python_error(backend: str) -> None:
    with pytest.raises(TypeError, match="top_kk"):
        fresh(backend).generate([[1]], top_kk=5)
    with pytest.raises(TypeError):
        fresh(backend).generate([[1]], 100)  # options are keyword-only


def test_a_prompt_file_is_its_bytes(tmp_path: Path) -> None:
    """As in training: line ends stay, a byte order mark is dropped, and other encodings are one line."""
    from icenet.core.generation.prompts import read_prompt

    path = tmp_path / "prompt.txt"
    for content in (b"one\r\ntwo\r\n", "größe\n\r".encode()):
        path.write_bytes(b"\xef\xbb\xbf" + content)
        assert read_prompt(path).encode() == content
    for content, names in (("größe".encode("utf-16"), ("UTF-16", "iconv")), (b"ab\xff", ("UTF-8", "byte 2"))):
        path.write_bytes(content)
        with pytest.raises(UsageError) as caught:
            read_prompt(path)
        assert is_one_line(caught.value, str(path), *names)


@both_backends
def test_the_modes_of_frozen_parts_are_restored(backend: str) -> None:
    model = build(backend)
    model.train()
    model.blocks[0].eval()
    stream = model.generate([[1, 2]], max_new_tokens=3, stream=True)
    next(stream)
    assert model.training and not model.blocks[0].training and not model.blocks[0].attention.training
    assert model.blocks[1].training
    model.eval()  # other tests use it


def test_a_stream_can_be_consumed_in_another_thread() -> None:
    """MLX's lazy arrays belong to the thread that made them."""
    options = {"max_new_tokens": 6, "seed": 2, "repetition_penalty": 1.2}
    expected = [token.tolist() for token in build("mlx").generate([[1, 2], [3]], stream=True, **options)]
    stream = build("mlx").generate([[1, 2], [3]], stream=True, **options)
    first = next(stream).tolist()
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(lambda: [token.tolist() for token in stream]).result()
    assert [first, *rest] == expected


@pytest.mark.parametrize("kind", ["transformer", "lstm", "without a cache"])
def test_each_token_of_a_full_window_in_another_thread(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens are read again in the thread that finds the window full."""
    if kind == "lstm":
        model = build_model("mlx", ModelConfig(**TINY_MODELS["lstm"]), seed=7)
    else:
        model = fresh("mlx")
    if kind == "without a cache":
        monkeypatch.delattr(type(model), "make_cache")
    prompts = [[1, 2], [3, 4]]
    options = {"max_new_tokens": 60, "seed": 2, "overflow": "slide", "stream": True}
    expected = [token.tolist() for token in model.generate(prompts, **options)]
    stream, found = model.generate(prompts, **options), []
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        for index in range(len(expected)):
            found.append((one, other)[index % 2].submit(lambda: next(stream).tolist()).result())
    assert found == expected and len(found) == 60


def test_the_default_device_of_pytorch_has_no_effect() -> None:
    model = build("torch")
    with torch.device("meta"):
        tokens = model.generate([[1, 2]], max_new_tokens=3, temperature=0)
    assert tokens.tolist() == model.generate([[1, 2]], max_new_tokens=3, temperature=0).tolist()
