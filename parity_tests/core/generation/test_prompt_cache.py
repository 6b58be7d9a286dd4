"""Prompt caches: the same tokens, only the rest is read, files of either backend, chats, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BACKENDS, both_backends, build_model, is_one_line, plain
from safetensors.numpy import load_file, save_file

import icenet
from icenet.cli.main import main
from icenet.commands.chat import Conversation
from icenet.core import backends
from icenet.core.config import Config, ModelConfig
from icenet.core.errors import IceNetError, NonFiniteError, UsageError, WeightsError
from icenet.core.generation.prompt_cache import FORMAT
from icenet.core.tokenizers.bytes import ByteTokenizer
from icenet.core.tokenizers.huggingface import HFTokenizer

MODEL: dict[str, Any] = {
    **{"type": "transformer", "hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 257},
    **{"max_seq_length": 400, "positions": "rotary", "num_kv_heads": 2},
}
TEXT = "A text of some length, which is read once. "
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<a>"


def build(backend: str, tokenizer: Any = None, **changes: Any) -> Any:
    model = build_model(backend, ModelConfig(**{**MODEL, **changes}))
    model.tokenizer = tokenizer or ByteTokenizer()
    model.tokenizer.chat_template = TEMPLATE
    return model


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of tokens of each forward pass with a cache over more than one of them."""
    widths: list[int] = []
    for backend in BACKENDS:
        model = backends.module(backend, "models").TransformerModel
        original = model.hidden_states

        def hidden_states(self: Any, input_ids: Any, *args: Any, _original: Any = original) -> Any:
            if input_ids.shape[1] > 1:
                widths.append(input_ids.shape[1])
            return _original(self, input_ids, *args)

        monkeypatch.setattr(model, "hidden_states", hidden_states)
    yield widths


def details(model: Any, prompt: str, cache: Any = None, **options: Any) -> Any:
    return icenet.generate(model, prompt, **{"max_new_tokens": 8, "seed": 1, "details": True, **options}, cache=cache)


@both_backends
def test_only_what_follows_the_cached_tokens_is_read(backend: str, read: list[int]) -> None:
    model = build(backend)
    cache = icenet.prompt_cache(model, TEXT)
    assert read == [len(TEXT)] and cache.tokens == model.tokenizer.encode(TEXT)
    for rest, count in (("First", 5), ("Second one", 10), ("", 0), ("Sa", 2)):
        expected = details(model, TEXT + rest, seed=len(rest))
        read.clear()
        found = details(model, TEXT + rest, cache, seed=len(rest))
        assert found == expected
        assert sum(read) == count  # a forward pass of one token is not counted
        known = [*model.tokenizer.encode(TEXT + rest), *found.tokens]
        assert cache.tokens == known[: len(cache.tokens)] and len(cache.tokens) >= len(known) - 1
    other = [1, 2, 3]
    with pytest.raises(UsageError) as error:
        model.generate([other], max_new_tokens=2, cache=cache)
    assert is_one_line(error.value, "differs", "token 0", str(len(TEXT)))


@both_backends
def test_an_empty_cache_takes_any_prompt(backend: str, read: list[int], tmp_path: Path) -> None:
    """Tokens in common are kept, the others are rolled back, with a draft as well."""
    model = build(backend)
    draft = build(backend, num_layers=1)
    cache = icenet.prompt_cache(model)
    for prompt, small, count in (
        ("abcdef", None, 6),
        ("abcxyzuvw", None, 6),
        ("qrs", draft, 6),
        ("qrst", draft, None),
    ):
        expected = details(model, prompt)
        read.clear()
        assert details(model, prompt, cache, draft=small, num_draft_tokens=small and 1).tokens == expected.tokens
        if small is None:
            assert read == [count]
    stream = icenet.generate(model, "qrstuv", stream=True, max_new_tokens=8, cache=cache)
    next(stream)
    assert cache.tokens == []  # in use
    with pytest.raises(UsageError, match="a stream that has not ended uses it"):
        cache.save(tmp_path / "cache.safetensors")
    stream.close()
    assert cache.tokens[:6] == model.tokenizer.encode("qrstuv")
    assert details(model, "qrstuv", cache) == details(model, "qrstuv")


@both_backends
def test_a_failure_leaves_no_tokens(backend: str) -> None:
    model = build(backend, output_bias=True)
    cache = icenet.prompt_cache(model)
    details(model, "abc", cache)
    assert cache.tokens
    weights = model.weights()
    model.set_weights({**weights, "output.bias": np.full(257, np.nan, np.float32)})
    fresh = icenet.prompt_cache(model)
    with pytest.raises(NonFiniteError):
        details(model, "abc", fresh)
    assert fresh.tokens == []
    with pytest.raises(UsageError) as error:
        details(model, "abc", cache)
    assert is_one_line(error.value, "weights", "prompt cache")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_file_is_read_by_either_backend(dtype: str, tmp_path: Path, read: list[int]) -> None:
    """And is the same, up to roundings, whichever wrote it."""
    models, arrays = {}, {}
    icenet.save(build("torch"), tmp_path / "model")
    for backend in BACKENDS:
        model = models[backend] = icenet.load(tmp_path / "model", backend, "cpu", dtype=dtype)
        icenet.prompt_cache(model, TEXT).save(tmp_path / backend)
        arrays[backend] = {name: np.float64(array) for name, array in _load(tmp_path / backend).items()}
    shape = (1, 2, len(TEXT), 8)
    assert {name: array.shape for name, array in arrays["mlx"].items()} == {
        "tokens": (len(TEXT),),
        **{f"layers.{index}.{name}": shape for index in (0, 1) for name in ("keys", "values")},
    }
    for name, array in arrays["torch"].items():
        assert np.abs(array - arrays["mlx"][name]).max() <= (2.0**-18 if dtype == "fp32" else 2.0**-5)
    for backend, model in models.items():
        expected = details(model, TEXT + "More")
        for writer in BACKENDS:
            cache = icenet.load_prompt_cache(tmp_path / writer, model)
            read.clear()
            found = details(model, TEXT + "More", cache)
            assert sum(read) == 4 and (dtype == "bf16" or found == expected)
            cache.save(tmp_path / "again", overwrite=True)
            again = icenet.load_prompt_cache(tmp_path / "again", model)
            assert again.tokens == cache.tokens and again.prompt_length == len(TEXT)
        assert backend


def _load(path: Path) -> dict[str, Any]:
    """Returns the arrays of a file, by the safetensors package; numpy has no bfloat16."""
    torch = pytest.importorskip("torch")
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).to(torch.float64).numpy() for name in file.keys()}  # noqa: SIM118


@both_backends
def test_the_keys_are_those_of_the_layers(backend: str, tmp_path: Path) -> None:
    """Of the first layer, by its formula in float64: rotated projections of the normalized embeddings."""
    model = build(backend)
    icenet.prompt_cache(model, TEXT).save(tmp_path / "cache")
    found = load_file(tmp_path / "cache")
    weights = {name: np.float64(array) for name, array in model.weights().items()}
    x = weights["token_embedding.weight"][model.tokenizer.encode(TEXT)] * 32**0.5
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    normed = normed * weights["blocks.0.attention_norm.weight"] + weights["blocks.0.attention_norm.bias"]
    for name, place in (("k_proj", "keys"), ("v_proj", "values")):
        y = normed @ weights[f"blocks.0.attention.{name}.weight"].T + weights[f"blocks.0.attention.{name}.bias"]
        y = y.reshape(len(TEXT), 2, 8).swapaxes(0, 1)
        if name == "k_proj":
            angles = np.arange(len(TEXT))[:, None] * 10000.0 ** (-np.arange(4) / 4)
            cos, sin = np.cos(angles), np.sin(angles)
            y = np.concatenate([y[..., :4] * cos - y[..., 4:] * sin, y[..., 4:] * cos + y[..., :4] * sin], -1)
        assert np.abs(found[f"layers.0.{place}"][0] - y).max() <= 2.0**-16 * np.abs(y).max()


def test_a_text_whose_last_token_continues(bpe: Path) -> None:
    """The tokens of a text are not always the first ones of a longer text."""
    model = build("torch", HFTokenizer(bpe.read_bytes()), vocab_size=500)
    encode = model.tokenizer.encode
    whole = "return return"
    part = next(
        whole[:end]
        for end in range(len(whole) - 1, 7, -1)
        if encode(whole)[: len(encode(whole[:end]))] != encode(whole[:end])
    )
    cache = icenet.prompt_cache(model, part)
    assert details(model, whole, cache) == details(model, whole)
    with pytest.raises(UsageError, match="differs"):
        details(model, "return x", icenet.prompt_cache(model, part))


@both_backends
def test_a_chat_reads_each_message_once(backend: str, read: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    """`icenet chat` and `icenet.chat` with a cache; the answers are those of whole prompts."""
    model = build(backend)
    options: dict[str, Any] = {"max_new_tokens": 9, "temperature": 0.0}
    conversation, cache = Conversation(model, "s", None, options), icenet.prompt_cache(model)
    messages = [{"role": "system", "content": "s"}]
    for text in ("Hello", "What?", "And then?"):
        messages.append({"role": "user", "content": text})
        expected = icenet.chat(model, messages, **options)
        read.clear()
        assert icenet.chat(model, messages, cache=cache, **options) == expected
        by_session = sum(read)
        read.clear()
        conversation.reply(text)
        assert conversation.messages == [*messages, {"role": "assistant", "content": expected}]
        whole = len("".join(f"<{m['role']}>{m['content']}" for m in messages).encode()) + len("<a>")
        assert sum(read) == by_session
        assert by_session == whole if len(messages) == 2 else by_session < whole - len(messages[1]["content"])
        messages.append({"role": "assistant", "content": expected})
    capsys.readouterr()
    conversation.reset()
    conversation.reply("Hello")
    first = capsys.readouterr().out
    other = Conversation(model, "s", None, {**options, "overflow": "slide", "max_new_tokens": 500})
    other.reply("Hello")  # it slides out of the context, so it is read without the cache
    assert capsys.readouterr().out.startswith(first[:3])


WRONG: dict[str, Any] = {
    "rnn": (lambda: icenet.prompt_cache(_rnn()), ("transformer", "gru")),
    "two prompts": (lambda: icenet.generate(_model(), ["a", "b"], cache=_cache()), ("one prompt", "2")),
    "another object": (lambda: icenet.generate(_model(), "a", cache="x"), ("prompt_cache", "str")),
    "another model": (lambda: icenet.generate(build("torch"), "a", cache=_cache()), ("another model",)),
    "too long": (lambda: icenet.prompt_cache(_model(), "a" * 400), ("400", "max_seq_length")),
    "no tokens": (lambda: _cache().save("x"), ("no tokens",)),
    "slides": (
        lambda: icenet.generate(_model(), "a", cache=_cache(), max_new_tokens=500, overflow="slide"),
        ("slide", "400"),
    ),
    "two rows": (lambda: icenet.prompt_cache(_model(), [[1, 2], [3, 4]]), ("one prompt", "2")),
    "no file": (lambda: icenet.load_prompt_cache("absent", _model()), ("absent", "--save-prompt-cache")),
    "a number": (lambda: icenet.load_prompt_cache(5, _model()), ("load_prompt_cache", "int")),
}
_made: dict[str, Any] = {}


def _model() -> Any:
    return _made.setdefault("model", build("torch"))


def _cache() -> Any:
    return icenet.prompt_cache(_model())


def _rnn() -> Any:
    return icenet.build(Config(device="cpu", model={"type": "gru", "hidden_size": 8, "num_layers": 1}), "torch")


@pytest.mark.parametrize("name", WRONG)
def test_requests_that_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call, words = WRONG[name]
    with pytest.raises(UsageError) as error:
        call()
    assert is_one_line(error.value, *words)


FAULTS: dict[str, Any] = {
    "format": (lambda arrays, metadata: metadata.pop("format"), "not a prompt cache"),
    "version": (lambda arrays, metadata: metadata.update(version="9" * 99), "version"),
    "model": (lambda arrays, metadata: metadata.update(model="0"), "other weights"),
    "prompt_length": (lambda arrays, metadata: metadata.update(prompt_length="9" * 5000), "prompt_length"),
    "negative": (lambda arrays, metadata: metadata.update(prompt_length="-1"), "prompt_length"),
    "no tokens": (lambda arrays, metadata: arrays.pop("tokens"), "tokens"),
    "empty": (lambda arrays, metadata: arrays.update(tokens=np.zeros(0, np.int32)), "tokens"),
    "many tokens": (lambda arrays, metadata: arrays.update(tokens=np.zeros(401, np.int32)), "401"),
    "outside": (lambda arrays, metadata: arrays.update(tokens=np.array([999], np.int32)), "vocabulary"),
    "dtype of tokens": (lambda arrays, metadata: arrays.update(tokens=np.array([1.0])), "tokens"),
    "a layer less": (lambda arrays, metadata: arrays.pop("layers.1.keys"), "2 layers"),
    "an array more": (lambda arrays, metadata: arrays.update(x=np.ones(1)), "2 layers"),
    "shape": (
        lambda arrays, metadata: arrays.update({"layers.0.keys": np.ones((1, 2, 3, 8), np.float32)}),
        "layers.0",
    ),
    "dtype": (lambda arrays, metadata: arrays.update({"layers.0.keys": np.ones((1, 2, 5, 8))}), "F64"),
    "nan": (
        lambda arrays, metadata: arrays.update({"layers.0.keys": np.full((1, 2, 5, 8), np.nan, np.float32)}),
        "not finite",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_file_is_one_line(name: str, tmp_path: Path) -> None:
    path, model = tmp_path / "cache", _model()
    icenet.prompt_cache(model, "abcde").save(path)
    with path.open("rb") as file:
        metadata = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    assert metadata["format"] == FORMAT
    arrays = load_file(path)
    change, word = FAULTS[name]
    change(arrays, metadata)
    save_file(arrays, path, metadata)
    with pytest.raises(WeightsError) as error:
        icenet.load_prompt_cache(path, model)
    assert is_one_line(error.value, str(path), word) and len(str(error.value)) < len(str(path)) + 200


def test_a_cut_file_is_one_line(tmp_path: Path) -> None:
    path, model = tmp_path / "cache", _model()
    icenet.prompt_cache(model, "abcde").save(path)
    content = path.read_bytes()
    for length in (0, 3, 8, 50, 400, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(IceNetError) as error:
            icenet.load_prompt_cache(path, model)
        assert is_one_line(error.value, str(path))
    path.write_text("a text\n")
    with pytest.raises(WeightsError) as error:
        icenet.load_prompt_cache(path, model)
    assert is_one_line(error.value, str(path), "is a text file", "--save-prompt-cache")
    with pytest.raises(UsageError, match="exists"):
        icenet.prompt_cache(model, "a").save(path)


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    icenet.save(build("torch"), tmp_path / "m")
    cache = tmp_path / "cache.safetensors"
    options = ("--max-new-tokens", "6", "--seed", "2", "--device", "cpu")

    def generate(backend: str, prompt: str, *more: str) -> str:
        assert main(["generate", str(tmp_path / "m"), "--backend", backend, "--prompt", prompt, *options, *more]) == 0
        return capfd.readouterr().out

    expected = generate("mlx", TEXT + "x")
    assert generate("torch", TEXT, "--save-prompt-cache", str(cache)) == generate("torch", TEXT)
    assert generate("mlx", TEXT + "x", "--prompt-cache", str(cache)) == expected
    found = json.loads(generate("mlx", TEXT + "x", "--draft", str(tmp_path / "m"), "--json"))
    assert found["draft"]["accepted"] == found["draft"]["proposed"] > 0
    assert "draft" not in json.loads(generate("mlx", TEXT, "--json"))


@both_backends
def test_a_cache_follows_the_model(backend: str) -> None:
    """A cache of weights that were trained since then is refused."""
    model = build(backend)
    cache = icenet.prompt_cache(model, TEXT)
    model.set_weights({path: array * np.float32(1.5) for path, array in model.weights().items()})
    for call in (lambda: details(model, TEXT, cache), lambda: cache.save("x")):
        with pytest.raises(UsageError) as error:
            call()
        assert is_one_line(error.value, "weights")
    assert plain(model.generate([[1]], max_new_tokens=2, cache=icenet.prompt_cache(model))).shape == (1, 3)
