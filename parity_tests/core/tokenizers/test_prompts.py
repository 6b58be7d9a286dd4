"""What the files of a folder make of a text: tokens around it, added tokens, special tokens, and decoding.

Expected values come from `transformers.AutoTokenizer`.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import is_one_line
from test_tokenizers import bert, gpt4, llama, new, trained

from icenet.core.config import GenerationConfig
from icenet.core.errors import DataError
from icenet.core.generation.request import Request
from icenet.core.generation.streaming import stream_text
from icenet.core.tokenizers import get_tokenizer, tokenizer_files
from icenet.core.tokenizers.base import decode_continuation
from icenet.core.tokenizers.companions import eos_token_id
from icenet.core.tokenizers.huggingface import HFTokenizer

tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    *("Hello world", " lead", "a\n  b  ", "é 日本 🎿 x", "<s>hi</s> there", "", "x <pad> y<|turn|>z", "<custom>"),
    *("[INST] hi [/INST]", "do n't , yes . It 's"),
]


def unigram() -> Any:
    from tokenizers import decoders, models, pre_tokenizers

    found = new(models.Unigram(), pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace())
    return trained(found, "Unigram", special_tokens=["<unk>", "</s>"], unk_token="<unk>")


KINDS: dict[str, Callable[[], Any]] = {"gpt4": gpt4, "llama": llama, "unigram": unigram, "bert": bert}


@functools.cache
def content_of(kind: str) -> str:
    return str(KINDS[kind]().to_str())


def write_folder(path: Path, kind: str, template: str | None = "<s> $A", **config: Any) -> Path:
    """Writes a folder with a tokenizer of a kind, which puts special tokens around a text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizers.Tokenizer.from_str(content_of(kind))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([tokenizers.AddedToken("<custom>", lstrip=True)])
    if template is not None:
        tokens = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=tokens)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (path / "tokenizer_config.json").write_text(json.dumps(values))
    (path / "config.json").write_text('{"model_type": "llama"}')
    return path


def auto_tokenizer(folder: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "template", "config"),
    [
        ("gpt4", "<s> $A", {"pad_token": "<pad>"}),
        ("gpt4", None, {"add_bos_token": True, "additional_special_tokens": ["<|turn|>"]}),
        ("gpt4", "<s> $A </s>", {"extra_special_tokens": {"turn_token": "<|turn|>"}}),
        ("llama", "<s> $A", {"add_bos_token": True, "legacy": False}),
        ("llama", "<s> $A", {"add_bos_token": False, "clean_up_tokenization_spaces": True}),
        ("llama", "<s> $A", {"split_special_tokens": True}),
        (
            "unigram",
            "$A </s>",
            {"clean_up_tokenization_spaces": True, "pad_token": {"__type": "AddedToken", "content": "<pad>"}},
        ),
        ("bert", "<s> $A </s>", {"clean_up_tokenization_spaces": True, "unk_token": "[UNK]"}),
        (
            "llama",
            "<s> $A",
            {"added_tokens_decoder": {"502": {"content": "<|turn|>", "lstrip": True, "special": False}}},
        ),
    ],
)
def test_tokens_and_texts_are_those_of_transformers(
    kind: str, template: str | None, config: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "x", kind, template, **config)
    theirs, ours = (
        auto_tokenizer(folder),
        HFTokenizer.from_file(folder / "tokenizer.json"),
    )
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ours.encode_prompt(text) == ids, text
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, text
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.template_tokens == theirs.special_tokens_map
    assert {*ours.special_tokens.values()} >= {*theirs.all_special_ids}
    assert theirs.eos_token_id in ours.end_ids and eos_token_id(folder) == theirs.eos_token_id
    assert ours.vocab_size == len(theirs) and ours.text_vocab_size <= 500


@pytest.mark.parametrize(("template", "says"), [("<s> $A", False), ("$A </s>", True), (None, True), (None, None)])
def test_a_setting_that_the_post_processor_contradicts_is_named(
    template: str | None, says: bool | None, tmp_path: Path
) -> None:
    found = get_tokenizer(str(write_folder(tmp_path, "gpt4", template, add_bos_token=says)))
    notes = found.contradictions()  # type: ignore[attr-defined]
    assert len(notes) == (says is not None) and all(
        is_one_line(note, "add_bos_token", "post_processor") for note in notes
    )
    assert not get_tokenizer(str(write_folder(tmp_path, "gpt4", add_bos_token=True))).contradictions()  # type: ignore[attr-defined]


def test_special_tokens_map_and_names_of_older_folders(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "llama", bos_token=None, eos_token=None)
    names = {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "<custom>",
        "additional_special_tokens": [],
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    theirs, ours = auto_tokenizer(folder), get_tokenizer(str(folder))
    assert isinstance(ours, HFTokenizer) and ours.template_tokens == theirs.special_tokens_map
    assert theirs.eos_token_id in ours.end_ids
    text = "a <custom> b"
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text).input_ids, skip_special_tokens=True)


def test_an_end_of_text_token_with_a_name_of_its_own(tmp_path: Path, bpe: Path) -> None:
    """tokenizer_config.json names it. Without that file there is none."""
    content = bpe.read_text().replace("<|endoftext|>", "<|fin|>")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError) as error:
        get_tokenizer(str(tmp_path))
    assert is_one_line(error.value, "end-of-text")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|fin|>"}')
    assert get_tokenizer(str(tmp_path)).eot_id == json.loads(content)["model"]["vocab"]["<|fin|>"]


def test_files_that_change_no_tokens_keep_the_name(tmp_path: Path) -> None:
    """The name is that of token files in the cache. It changes with the tokens only."""
    folder = write_folder(tmp_path, "gpt4", chat_template="{{ messages }}")
    alone = HFTokenizer((folder / "tokenizer.json").read_bytes())
    found = get_tokenizer(str(folder))
    assert found.name == alone.name
    assert dict(found.files) == tokenizer_files(str(folder)) and {*found.files} == {
        *("tokenizer.json", "tokenizer_config.json")
    }
    assert get_tokenizer(str(write_folder(tmp_path / "more", "gpt4", pad_token="<pad>"))).name != alone.name


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5": {"lstrip": true}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5": 7}}'),
        ("tokenizer_config.json", '{"chat_template": 5}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "a"}]}'),
        ("tokenizer_config.json", '{"additional_special_tokens": 5}'),
        ("special_tokens_map.json", "\x00"),
        ("chat_template.json", "nonsense"),
        ("chat_template.jinja", b"\xff\xfe"),
    ],
)
def test_damaged_files_are_one_line(name: str, content: str | bytes, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "gpt4")
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        get_tokenizer(str(folder))
    assert is_one_line(error.value, "tokenizer.json", name)
    if name == "tokenizer_config.json":
        assert eos_token_id(folder) is None


# ---- streams ----------------------------------------------------------------------------------------------

SPOKEN = "größe 日本語 \U0001f3bf\U0001f468‍\U0001f469‍\U0001f467 do n ' t , yes . I 've\n  x"


class FixedDecoder(contextlib.nullcontext):  # type: ignore[type-arg]
    """A decoder that generates given tokens."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__()
        self.ids = ids

    def submit(self, index: int) -> int:
        return self.ids[index]

    def fetch(self, handle: int) -> Any:
        return np.array([handle], np.int32)


@pytest.mark.parametrize("clean_up", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_of_a_stream_are_the_text(kind: str, clean_up: bool, tmp_path: Path) -> None:
    """No piece has half a character, whatever the kind of the tokenizer. The pieces are the text of all tokens."""
    folder = write_folder(tmp_path, kind, clean_up_tokenization_spaces=clean_up)
    tokenizer = get_tokenizer(str(folder))
    draws = np.random.default_rng(0)
    spoken = tokenizer.encode(" ".join([SPOKEN] * 6))
    random = draws.integers(0, tokenizer.vocab_size, 200).tolist()
    for ids in (spoken, random, [token for pair in zip(spoken, random, strict=False) for token in pair]):
        for stop in ([], ["语zz", " yesterday"]):
            request = Request(
                *(np.zeros((1, 1), np.int32), None, GenerationConfig(stop=stop), (len(ids),), None, 0, 0, tokenizer)
            )
            pieces = list(stream_text(FixedDecoder(ids), request))  # type: ignore[arg-type]
            whole = decode_continuation(tokenizer, ids)
            assert "".join(pieces) == whole and all(pieces)
            assert ids is not spoken or (len(pieces) > 100 and "\ufffd" not in whole)
    whole, prompt = decode_continuation(tokenizer, spoken), tokenizer.encode("one")
    theirs = auto_tokenizer(folder)
    before, after = (theirs.decode(tokens, skip_special_tokens=True) for tokens in (prompt, prompt + spoken))
    assert after.startswith(before) and after[len(before) :] == whole
