"""Answers in a chat: the prompt that they continue, where they end, and how long they may be."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import BACKENDS, both_backends, build_model, is_one_line, tiny, train

import icenet
from icenet.core.config import GenerationConfig, ModelConfig
from icenet.core.errors import UsageError
from icenet.core.generation.chat import DEFAULT_ANSWER_TOKENS, chat_request
from icenet.core.tokenizers.bytes import ByteTokenizer
from icenet.core.tokenizers.huggingface import HFTokenizer

pytest.importorskip("jinja2")

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "Zażółć"}]


def build(backend: str, tokenizer: Any = None, **options: Any) -> Any:
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 1, "vocab_size": 460, "max_seq_length": 64, **options}
    model = build_model(backend, ModelConfig(type="transformer", **sizes))
    model.tokenizer = tokenizer or ByteTokenizer()
    if tokenizer is None:
        model.tokenizer.chat_template = TEMPLATE
    return model


@both_backends
def test_an_answer_continues_the_rendered_text(backend: str) -> None:
    model = build(backend)
    options: dict[str, Any] = {"max_new_tokens": 20, "seed": 1, "eos_token_id": [256]}
    prompt = "<system>s<user>Zażółć<a>"
    expected = icenet.generate(model, prompt, details=True, **options)
    assert icenet.chat(model, TURNS, **options) == expected.text
    assert icenet.chat(model, TURNS, details=True, **options) == expected
    assert "".join(icenet.chat(model, TURNS, stream=True, **options)) == expected.text
    asked = icenet.chat(model, "Hi", **options)
    assert asked == icenet.generate(model, "<user>Hi<a>", **options)
    thinking = model.tokenizer.chat_template = TEMPLATE + "{% if thinks %}<think>{% endif %}"
    assert icenet.chat(model, "Hi", template_options={"thinks": False}, **options) == asked and thinking
    expected = icenet.generate(model, "<user>Hi<a><think>", **options)
    assert icenet.chat(model, "Hi", template_options={"thinks": True}, **options) == expected


def test_every_end_token_ends_an_answer(bpe: Path) -> None:
    """Those of the settings, and those of the tokenizer: the end of a text, of a turn, and `eos_token`."""
    content = bpe.read_bytes()
    config = b'{"eos_token": "<|done|>", "additional_special_tokens": ["<|eot_id|>", "<|other|>"]}'
    files = {"tokenizer_config.json": config, "chat_template.jinja": TEMPLATE.encode()}
    tokenizer = HFTokenizer(content, companions=files)
    model = build("torch", tokenizer)
    model.generation = GenerationConfig(eos_token_id=[7])
    ids = tokenizer.special_tokens
    ends = (7, ids["<|endoftext|>"], ids["<|done|>"], ids["<|eot_id|>"])
    assert {*chat_request(model, "Hi", None, {}).end_ids} == {*ends}
    assert chat_request(model, "Hi", None, {"eos_token_id": 5}).end_ids == (5,)
    assert chat_request(model, "Hi", None, {"ignore_eos": True}).end_ids == ()
    small = build("torch", tokenizer, vocab_size=401)  # ids without a row in the embedding end nothing
    assert max(chat_request(small, "Hi", None, {}).end_ids) < 401


def test_a_saved_model_keeps_its_template(bpe: Path, tmp_path: Path) -> None:
    """Also where its tokenizer has more tokens than the embedding has rows, for padding."""
    files = {"tokenizer_config.json": b'{"pad_token": "<pad>"}', "chat_template.jinja": b"old"}
    model = build("torch", HFTokenizer(bpe.read_bytes(), companions=files), vocab_size=400)
    assert model.tokenizer.vocab_size == 401
    model.tokenizer.chat_template = TEMPLATE
    icenet.save(model, tmp_path / "m")
    loaded = icenet.load(tmp_path / "m", "mlx")
    assert loaded.tokenizer.name == model.tokenizer.name and loaded.tokenizer.chat_template == TEMPLATE
    options = {"max_new_tokens": 5, "temperature": 0}
    assert icenet.chat(loaded, TURNS, **options) == icenet.chat(model, TURNS, **options)


def test_a_run_keeps_the_template_of_its_tokenizer(bpe: Path, tmp_path: Path) -> None:
    """In its folder and in its checkpoints, so that it can be moved."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_bytes(bpe.read_bytes())
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    config = tiny(tmp_path, f"data.tokenizer={tmp_path / 'tokenizer'}", "model.vocab_size=400")
    train(config, tmp_path / "run", "torch", until=1)
    shutil.rmtree(tmp_path / "tokenizer")
    checkpoint = next((tmp_path / "run" / "checkpoints").iterdir())
    for path in (tmp_path / "run", checkpoint):
        assert (path / "chat_template.jinja").read_text() == TEMPLATE
    (tmp_path / "run").rename(tmp_path / "moved")
    assert icenet.load(tmp_path / "moved", "torch").tokenizer.chat_template == TEMPLATE


def test_how_long_an_answer_may_be() -> None:
    model = build("torch")
    length = len("<user>Hi<a>")

    def limit(**options: Any) -> int:
        return chat_request(model, "Hi", None, options).new_tokens

    assert limit() == 64 - length
    assert limit(max_new_tokens=5) == 5 and limit(max_length=length + 3) == 3
    assert limit(overflow="slide") == DEFAULT_ANSWER_TOKENS
    model.generation = GenerationConfig(max_new_tokens=1000)
    assert limit() == 64 - length  # the setting of the model is a maximum
    model.generation = GenerationConfig(max_length=length + 9)
    assert limit() == 9
    with pytest.raises(UsageError) as error:
        limit(max_new_tokens=64)
    assert is_one_line(error.value, "64")
    for length in (64, 65, 500):
        with pytest.raises(UsageError) as error:
            icenet.chat(model, "x" * (length - len("<user><a>")), stream=True)
        assert is_one_line(error.value, f"{length} tokens", "max_seq_length is 64", "new conversation", "slide")
    slid = icenet.chat(model, "x" * 100, overflow="slide", max_new_tokens=3, details=True)
    assert len(slid.tokens) <= 3


def test_requests_that_are_refused() -> None:
    model = build("torch")
    for options, names in (
        ({"stream": True, "details": True}, ["details"]),
        ({"add_special_tokens": True}, ["add_special_tokens", "template"]),
        ({"temperature": -1}, ["temperature"]),
        ({"max_batch_size": 2}, ["max_batch_size", "one"]),
    ):
        with pytest.raises(UsageError) as error:
            icenet.chat(model, "Hi", **options)
        assert is_one_line(error.value, *names)
    model.tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(UsageError) as error:
        icenet.chat(model, "Hi")
    assert is_one_line(error.value, "empty")
    model.tokenizer = ByteTokenizer()
    with pytest.raises(UsageError) as error:
        icenet.chat(model, "Hi")
    assert is_one_line(error.value, "chat template", "icenet generate")
    model.tokenizer = None
    with pytest.raises(UsageError) as error:
        icenet.chat(model, "Hi")
    assert is_one_line(error.value, "tokenizer")
    with pytest.raises(UsageError) as error:
        icenet.chat(5, "Hi")
    assert is_one_line(error.value, "chat", "int")


@both_backends
def test_prompts_have_the_tokens_that_the_tokenizer_puts_around_a_text(backend: str, bpe: Path) -> None:
    """Only if the settings say so: a run was trained without them."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    found = Tokenizer.from_file(str(bpe))
    found.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    assert found.token_to_id("<|endoftext|>") == 0
    model = build(backend, HFTokenizer(found.to_str().encode()))
    prompt = "def main("
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True, "details": True}
    ids = model.tokenizer.encode(prompt)
    without, around = (model.generate([x], **{**options, "details": False}) for x in (ids, [0, *ids]))
    for settings, expected in ((GenerationConfig(), without), (GenerationConfig(add_special_tokens=True), around)):
        model.generation = settings
        new = [int(token) for token in expected[0]][-8:]
        assert icenet.generate(model, prompt, **options).tokens == new
    model.generation = None
    assert icenet.generate(model, prompt, add_special_tokens=True, **options).tokens == new
    assert icenet.generate(model, "", add_special_tokens=True, **options).tokens


def test_both_backends_answer_the_same() -> None:
    options = {"max_new_tokens": 12, "seed": 3}
    assert len({icenet.chat(build(backend), "Hi", **options) for backend in BACKENDS}) == 1
