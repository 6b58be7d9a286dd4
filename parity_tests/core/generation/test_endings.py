"""Where and why a row of generated text ends: end-of-text tokens, stop texts with special tokens, limits of each row,
logits that are not finite, Ctrl-C. Streams, and what a request computes in advance."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import icenet.blas

# isort: split
import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers import BACKENDS, PACKAGES, both_backends, build_model, is_one_line, plain

import icenet as api
import icenet.generation.sampling
import icenet_torch.generation.sampling
from icenet.cli.main import main
from icenet.core.config import Config, GenerationConfig, ModelConfig
from icenet.core.errors import NonFiniteError, UsageError
from icenet.core.generation import decoder, streaming
from icenet.core.generation.request import Request
from icenet.core.generation.sampling import draw_keys
from icenet.core.generation.stopping import StoppingCriteria
from icenet.core.tokenizers.bytes import ByteTokenizer
from icenet.core.tokenizers.huggingface import HFTokenizer

END = 256  # the end-of-text token of the bytes


def counter(backend: str, marks: dict[int, float] | None = None, vocab_size: int = 257) -> Any:
    """Returns a model without a cache that counts: token n is followed by n + 1, and the last one by 0.

    Args:
        backend: Its framework.
        marks: Values that replace the logit of token 7 after each of these tokens.
        vocab_size: Number of tokens.
    """
    base = importlib.import_module(f"{PACKAGES[backend]}.models").BaseModel
    table = 50 * np.roll(np.eye(vocab_size, dtype=np.float32), 1, axis=1)
    for token, value in (marks or {}).items():
        table[token, 7] = value

    class Counter(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__(ModelConfig(type="transformer", vocab_size=vocab_size, max_seq_length=300))
            self.table = mx.array(table) if backend == "mlx" else torch.nn.Parameter(torch.from_numpy(table))

        def forward(self, input_ids: Any) -> Any:
            return self.table[input_ids]

    model = Counter()
    model.tokenizer = ByteTokenizer()
    return model


# ---- the end of a text ------------------------------------------------------------------------------------


@both_backends
def test_a_row_ends_at_the_end_of_text_token(backend: str) -> None:
    model = counter(backend)
    rows = model.generate([[250], [40], [253]], max_new_tokens=8, details=True)
    assert [row.tokens for row in rows] == [[251, 252, 253, 254, 255], list(range(41, 49)), [254, 255]]
    assert [row.finish_reason for row in rows] == ["end", "length", "end"]
    assert rows[1].text == bytes(range(41, 49)).decode()
    out = plain(model.generate([[250], [253]], max_new_tokens=8, pad_token_id=9))
    assert out.tolist() == [[250, 251, 252, 253, 254, 255], [253, 254, 255, 9, 9, 9]]

    def reason(**options: Any) -> tuple[list[int], str]:
        (row,) = model.generate([254], max_new_tokens=4, details=True, **options)
        return row.tokens, row.finish_reason

    everything = [255, 256, 0, 1]
    assert reason() == ([255], "end")
    assert reason(ignore_eos=True) == (everything, "length")
    assert reason(eos_token_id=[]) == (everything, "length")
    assert reason(eos_token_id=1) == ([255, 256, 0], "end")
    assert reason(eos_token_id=[1, 0]) == reason(eos_token_id=np.array([1, 0])) == ([255, 256], "end")
    assert reason(eos_token_id=1, ignore_eos=True) == (everything, "length")
    assert reason(stop=[END]) == ([255], "stop")  # a stop of the user's takes precedence
    model.generation = GenerationConfig(ignore_eos=True)
    assert reason() == (everything, "length") and reason(ignore_eos=False) == ([255], "end")
    model.generation = GenerationConfig(eos_token_id=0)
    assert reason() == ([255, 256], "end")
    model.generation, model.tokenizer = None, None
    assert reason() == (everything, "length")
    for wrong in (257, -1, [3, 999]):
        with pytest.raises(UsageError) as caught:
            reason(eos_token_id=wrong)
        assert is_one_line(caught.value, "eos_token_id", "0 to 256")


@both_backends
def test_texts_end_too(backend: str) -> None:
    """Streamed and not; the iterators return why."""
    model = counter(backend)
    prompts = ["{", "f", "0"]
    texts = [bytes(range(ord("{") + 1, 128)).decode("utf-8"), "ghijklmnop", "123456789:"]
    found = api.generate(model, prompts, max_new_tokens=10, stop=["q", "\x80"], eos_token_id=128, details=True)
    assert [row.text for row in found] == texts
    assert [row.finish_reason for row in found] == ["end", "length", "length"]
    assert api.generate(model, prompts, max_new_tokens=10, eos_token_id=128) == texts
    for prompt, text, row in zip(prompts, texts, found, strict=True):
        stream = api.generate(model, prompt, max_new_tokens=10, eos_token_id=128, stream=True)
        pieces, reason = drain(stream)
        assert "".join(pieces) == text and reason == row.finish_reason
    tokens, reasons = drain(model.generate([[250], [1]], max_new_tokens=7, stream=True))
    assert reasons == ["end", "length"] and [int(step[1]) for step in tokens] == list(range(2, 9))
    assert [int(step[0]) for step in tokens] == [251, 252, 253, 254, 255, 0, 0]
    for generate in (model.generate, lambda ids, **options: api.generate(model, "a", **options)):
        with pytest.raises(UsageError, match="details"):
            generate([[1]], stream=True, details=True)


def drain(generator: Iterator[Any]) -> tuple[list[Any], Any]:
    """Returns what a generator yields, and what it returns."""
    items = []
    while True:
        try:
            items.append(next(generator))
        except StopIteration as end:
            return items, end.value


@both_backends
def test_limits_are_those_of_each_row(backend: str) -> None:
    model = counter(backend)  # 300 positions
    model.tokenizer = None
    cached = build_model(backend, ModelConfig(type="transformer", hidden_size=8, num_layers=1, num_heads=1,
                                              vocab_size=300, max_seq_length=12))  # fmt: skip
    prompts = [[5], [5] * 4, [5] * 9]
    for options in ({}, {"max_length": 11}, {"max_length": 20, "overflow": "slide"}, {"seed": 2}):
        together = cached.generate(prompts, details=True, **options)
        longest = options.get("max_length", 12)
        assert [len(row.tokens) for row in together] == [longest - len(prompt) for prompt in prompts]
        assert together[0] == cached.generate(prompts[:1], details=True, **options)[0]
    with pytest.raises(UsageError) as caught:
        cached.generate(prompts, max_new_tokens=4)
    assert is_one_line(caught.value, "prompt of 9 tokens", "4 new tokens")


# ---- special tokens ---------------------------------------------------------------------------------------


def special_tokenizer(*names: str) -> HFTokenizer:
    """Returns a tokenizer of bytes with special tokens, and "#" as an ordinary added token."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({name: index for index, name in enumerate(alphabet)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(names))
    return HFTokenizer(tokenizer.to_str().encode())


@pytest.mark.parametrize(
    ("names", "ends"),
    [
        (["<|endoftext|>"], ["<|endoftext|>"]),
        (["<s>", "</s>", "<unk>"], ["</s>"]),
        (["[CLS]", "[SEP]", "[PAD]"], ["[SEP]"]),
        (["<|im_start|>", "<|im_end|>", "<|endoftext|>"], ["<|endoftext|>", "<|im_end|>"]),
        (["<|end_of_text|>", "<|eot_id|>", "[SEP]"], ["<|end_of_text|>", "<|eot_id|>"]),
    ],
)
def test_the_tokens_that_end_a_text(names: list[str], ends: list[str]) -> None:
    tokenizer = special_tokenizer(*names)
    found = [
        next(name for name, token in tokenizer.special_tokens.items() if token == end) for end in tokenizer.end_ids
    ]
    assert found == ends and tokenizer.end_ids[0] == tokenizer.eot_id
    assert set(names) == set(tokenizer.special_tokens)


@pytest.mark.parametrize(
    ("stop", "kept"),
    [
        ("<|im_end|>", "one\n"),
        ("<|endoftext|>", "one\ntwo"),
        ("\n<|im_end|>", "one"),
        ("e\n<|im_end|>tw", "on"),
        ("\n<|im_end|>three", None),
        ("<|im_end|>two<|endoftext|>th", "one\n"),
        ("<|im_end|><|im_end|>", None),
        ("ntwot", None),
        ("twothree", "one\n"),  # a special token has no text
        ("<|im_", None),
    ],
)
def test_a_stop_text_with_special_tokens(stop: str, kept: str | None) -> None:
    tokenizer = special_tokenizer("<|endoftext|>", "<|im_end|>")
    ids = tokenizer.encode("one\n<|im_end|>two<|endoftext|>three")
    assert len(ids) == 14  # two of them special
    stopping = StoppingCriteria(1, [stop], tokenizer, 0)
    for token in ids:
        stopping.update(np.array([token], np.int32))
        if stopping.all_done:
            break
    text = tokenizer.decode_continuation(stopping.tokens[0]) + stopping.endings[0]
    assert text == ("one\ntwothree" if kept is None else kept)
    assert stopping.finish_reasons == [None if kept is None else "stop"]
    # the stream shows the same, and holds back what may begin a stop
    pieces, reason = drain(streaming.stream_text(FixedDecoder(ids), request_of(tokenizer, len(ids), [stop])))
    assert "".join(pieces) == text and reason == ("length" if kept is None else "stop")


def test_a_stop_text_as_ordinary_tokens() -> None:
    """The text of a special token's name, which a model may also write in letters, stops too."""
    tokenizer = special_tokenizer("</s>")
    letters = [tokenizer.encode(character)[0] for character in "ab</s>c"]
    stopping = StoppingCriteria(1, ["</s>"], tokenizer, 0)
    for token in letters:
        stopping.update(np.array([token], np.int32))
    assert stopping.finish_reasons == ["stop"] and tokenizer.decode(stopping.tokens[0]) == "ab"


def test_special_tokens_within_a_stop_text_do_not_hide_it() -> None:
    tokenizer = special_tokenizer("</s>")
    ids = [tokenizer.encode("x")[0], *[tokenizer.eot_id] * 20, tokenizer.encode("y")[0]]
    stopping = StoppingCriteria(1, ["xy"], tokenizer, 0)
    for token in ids:
        stopping.update(np.array([token], np.int32))
    assert stopping.finish_reasons == ["stop"] and stopping.tokens == [[]]


@both_backends
def test_a_stop_text_that_no_text_contains(backend: str) -> None:
    for stop in ("\udc80", "a\ud800"):
        with pytest.raises(UsageError) as caught:
            counter(backend).generate([[1]], stop=[stop])
        assert is_one_line(caught.value, "stop text", "UTF-8")


# ---- logits that are not finite ---------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"seed": 1, "top_k": 3, "top_p": 0.9, "min_p": 0.01}], ids=repr
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite(backend: str, value: float, options: Any) -> None:
    """After the tokens 63 and 90; both backends name the token, the row and the weight."""
    model = counter(backend, {63: value, 90: value})
    ids = [[61], [50]]
    stream = model.generate(ids, max_new_tokens=9, stream=True, **options)
    assert [next(stream).tolist() for _ in range(2)] == [[62, 51], [63, 52]]
    with pytest.raises(NonFiniteError) as caught:
        next(stream)
    assert caught.value.exit_code == 1 and is_one_line(caught.value, "token 2 of row 0", "table", "not finite")
    with pytest.raises(NonFiniteError, match="token 2 of row 0"):
        model.generate(ids, max_new_tokens=9, **options)
    # a row that has ended does not matter, and a dropped token is no fault
    rows = model.generate([[61], [50]], stop=[63], max_new_tokens=9, details=True, **options)
    assert [row.finish_reason for row in rows] == ["stop", "length"]
    masked = counter(backend, {63: -math.inf})
    assert len(masked.generate([[61]], max_new_tokens=9, details=True, **options)[0].tokens) == 9


@both_backends
@pytest.mark.parametrize("family", ["transformer", "lstm"])
def test_weights_that_are_not_finite(backend: str, family: str) -> None:
    sizes = {"hidden_size": 16, "num_layers": 1, "vocab_size": 300}
    model = build_model(backend, ModelConfig(type=family, **sizes))  # type: ignore[arg-type]
    weights = {name: array.copy() for name, array in model.weights().items()}
    name = "output.weight"
    weights[name][299, 3] = np.nan
    model.set_weights(weights)
    for options in ({"temperature": 0}, {"seed": 0}):
        with pytest.raises(NonFiniteError) as caught:
            model.generate([[1, 2], [3]], max_new_tokens=5, **options)
        assert is_one_line(caught.value, "token 0 of row 0", name)
    weights[name][:] = 3e38
    model.set_weights(weights)
    with pytest.raises(NonFiniteError) as caught:
        model.generate([[1, 2], [3]], max_new_tokens=5)
    assert is_one_line(caught.value, "the weights are finite", "overflow", "fp32")


def test_noise_of_a_draw_of_zero_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 draw in 2^32 is zero. The only token that is left after top-k must not be dropped by it."""
    logits, keys = np.array([[1, 2, 0]], np.float32), draw_keys(0, 1, 1)[0]
    monkeypatch.setattr(icenet.generation.sampling, "random_uniform", lambda keys, n: mx.zeros((1, n)))
    monkeypatch.setattr(icenet_torch.generation.sampling, "random_uniform", lambda keys, n: torch.zeros(1, n))
    ours = np.array(icenet.generation.sampling.add_gumbel_noise(mx.array(logits), mx.array(keys)))
    theirs = icenet_torch.generation.sampling.add_gumbel_noise(torch.from_numpy(logits), None).numpy()
    for scores in (ours, theirs):
        np.testing.assert_allclose(scores, logits - math.log(33 * math.log(2)), rtol=1e-6)


# ---- in advance -------------------------------------------------------------------------------------------


@both_backends
def test_sampling_keys_are_made_in_blocks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 8, "num_layers": 1, "vocab_size": 50}
    model = build_model(backend, ModelConfig(type="gru", **sizes))  # type: ignore[arg-type]
    options = {"max_new_tokens": 30, "seed": 5}
    expected = plain(model.generate([[1], [2, 3]], **options))
    made: list[tuple[int, int]] = []
    own = Request.keys
    monkeypatch.setattr(
        Request, "keys", lambda self, first, count: (made.append((first, count)), own(self, first, count))[1]
    )
    monkeypatch.setattr(decoder, "KEY_BLOCK", 7)
    assert np.array_equal(plain(model.generate([[1], [2, 3]], **options)), expected)
    assert made == [(0, 1), *(([first, first], 7) for first in (1, 8, 15, 22, 29))]
    made.clear()
    assert np.array_equal(plain(model.generate([[1]], **options))[0], expected[0, 1:])
    assert made == [(0, 7), (7, 7), (14, 7), (21, 7), (28, 7)]
    made.clear()
    stream = model.generate([[1], [2, 3]], max_new_tokens=10**12, seed=5, stream=True)
    assert [next(stream)[1] for _ in range(10)] == expected[1, 2:12].tolist()
    assert made == [(0, 7), (7, 7)]


# ---- streams ----------------------------------------------------------------------------------------------


class FixedDecoder(contextlib.nullcontext):  # type: ignore[type-arg]
    """A decoder that generates given tokens, and then raises KeyboardInterrupt."""

    def __init__(self, ids: list[Any]) -> None:
        super().__init__()
        self.ids = ids

    def submit(self, index: int) -> Any:
        return self.ids[index] if index < len(self.ids) else None

    def fetch(self, handle: Any) -> Any:
        if handle is None:
            raise KeyboardInterrupt
        return np.array([handle], np.int32)


def request_of(tokenizer: Any, new_tokens: int, stop: list[Any]) -> Request:
    prompt = np.zeros((1, 1), np.int32)
    return Request(prompt, None, GenerationConfig(stop=stop), (new_tokens,), None, 0, 0, tokenizer)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_long_stream_is_decoded_in_pieces(kind: str, bpe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece costs the same, no character is cut, and the pieces are the text."""
    tokenizer = ByteTokenizer() if kind == "bytes" else HFTokenizer.from_file(bpe)
    text = "größe 日本語 \U0001f600 x" * 60
    ids = tokenizer.encode(text)
    sizes: list[int] = []
    own = streaming.decode_continuation
    monkeypatch.setattr(
        streaming, "decode_continuation", lambda tokenizer, ids: (sizes.append(len(ids)), own(tokenizer, ids))[1]
    )
    pieces, _ = drain(streaming.stream_text(FixedDecoder(ids), request_of(tokenizer, len(ids), ["xyz", "日本本"])))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces) and all(pieces)
    assert len(ids) > 600 and sorted(sizes)[-2] <= 4 * streaming.TextTail.context  # the last one is the whole text
    assert max(map(len, pieces)) <= 3


def test_ctrl_c_shows_what_was_generated(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The text that was held back, and a line end. The exit code is that of an interrupted command."""
    tokenizer = ByteTokenizer()
    ids = list(b"on E")
    stream = streaming.stream_text(FixedDecoder(ids), request_of(tokenizer, 9, [" END"]))
    pieces = [next(stream) for _ in range(3)]
    assert pieces == ["o", "n", " E"]
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    error = NonFiniteError("the logits are not finite")
    for stop, code, message in ((KeyboardInterrupt(), 130, "Ctrl-C"), (error, 1, "not finite")):

        def generate(*_: Any, **__: Any) -> Iterator[str]:
            yield "some"
            raise stop  # noqa: B023

        model = type("Model", (), {"config": ModelConfig(type="gru"), "generation": None, "is_on_cpu": False})
        monkeypatch.setattr(api, "load", lambda *_, model=model, **__: model)
        monkeypatch.setattr(api, "generate", generate)
        assert main(["generate", "x", "--prompt", "a"]) == code
        out, err = capfd.readouterr()
        assert out == "asome\n" and is_one_line(err.strip(), message)


# ---- the command line -------------------------------------------------------------------------------------


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    model = {"type": "transformer", "hidden_size": 16, "num_layers": 1, "num_heads": 1, "vocab_size": 257}
    api.save(api.build(Config.from_dict({"model": model, "device": "cpu"}), "torch"), tmp_path / "m")
    command = ["generate", str(tmp_path / "m"), "--prompt", "ab", "--seed", "3", "--max-new-tokens", "6"]

    def run(*more: str) -> Any:
        assert main([*command, *more]) == 0
        return capfd.readouterr().out

    found = json.loads(run("--json"))
    assert found["prompt"] == "ab" and found["finish_reason"] == "length" and len(found["tokens"]) == 6
    assert run() == "ab" + found["text"] + "\n"
    third = str(found["tokens"][2])
    for backend in BACKENDS:
        cut = json.loads(run("--json", "--eos-token-id", "5", "--eos-token-id", third, "--backend", backend))
        assert (cut["tokens"], cut["finish_reason"]) == (found["tokens"][:2], "end")
    assert json.loads(run("--json", "--eos-token-id", third, "--ignore-eos")) == found
    assert main([*command, "--eos-token-id", "257"]) == 2
    assert is_one_line(capfd.readouterr().err.strip(), "eos_token_id 257", "0 to 256")
