"""Text in earnest: tokenizers of Hugging Face's, JSON lines, packed files, preparation that survives kills, rows that
are filled up, and runs that carry their tokenizer with them. What is expected comes from `tokenizers`, `json` and
`gzip` themselves, or from a loop written here."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BACKENDS, environment, tiny
from helpers import icenet as command

import icenet
from icenet.cli.main import main
from icenet.commands.prepare import train_tokenizer
from icenet.core import backends as backend
from icenet.core import rng
from icenet.core.config import Config, DataConfig
from icenet.core.data.datasets import ByteTokenizer, dataset_for, get_tokenizer, open_dataset
from icenet.core.data.text import reading, shards, workers
from icenet.core.data.text.cache import load_tokens
from icenet.core.data.text.documents import DocumentDataset
from icenet.core.data.text.sources import find_source
from icenet.core.data.text.token_file import TokenFile
from icenet.core.errors import ConfigError, DataError, IceNetError, UsageError
from icenet.core.tokenizers import from_files
from icenet.core.tokenizers.base import text_after
from icenet.core.tokenizers.huggingface import ENDS, HFTokenizer
from icenet.core.training import checkpoint
from icenet.core.training.trainer import Trainer
from icenet.parity import run as parity
from icenet.parity.yardstick import judge, rms

tokenizers = pytest.importorskip("tokenizers")

EOT = 256
SOURCE = [path for path in sorted(Path(textwrap.__file__).parent.glob("*.py")) if 2000 < path.stat().st_size < 60_000]


def code(size: int) -> str:
    """So much of the standard library's source, with what is hard in a text put in."""
    odd = "größe = '日本語。\n全角\u3000空白' # \U0001f600\r\n\r\n\t\n  \n x\u00a0y don't 12345678\n"
    text = ""
    for path in SOURCE:
        text += path.read_text(encoding="utf-8") + odd
        if len(text) >= size:
            break
    return text[:size]


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 400 tokens, trained by `icenet.commands.prepare`."""
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "text.txt").write_text(code(60_000), encoding="utf-8")
    train_tokenizer(str(folder / "text.txt"), vocab_size=400, out=folder / "tokenizer.json", quiet=True)
    return folder / "tokenizer.json"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ICENET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made(source: Path | str, cache: Path, tokenizer: Any = None, **options: Any) -> TokenFile:
    return load_tokens(find_source(str(source)), tokenizer or ByteTokenizer(), cache, **options)


def texts_in(file: TokenFile, end: int = EOT) -> list[list[int]]:
    """The tokens of each text, by a loop."""
    found: list[list[int]] = [[]]
    for token in file.tokens.tolist():
        found.append([]) if token == end else found[-1].append(token)
    return found


# ---- tokenizers -------------------------------------------------------------------------------------------


def new(model: Any, **parts: Any) -> Any:
    """A tokenizer of the library's, of a model and its other parts."""
    found = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(found, name, part)
    return found


def kinds() -> dict[str, Callable[[], Any]]:
    """The kinds of tokenizers that are in use, as GPT-2, GPT-4, Llama 2, T5 and BERT have them."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

    gpt4 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    spaces = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    training = [code(60_000)]

    def trained(tokenizer: Any, kind: str, **options: Any) -> Any:
        trainer = getattr(trainers, f"{kind}Trainer")(vocab_size=500, show_progress=False, **options)
        tokenizer.train_from_iterator(training, trainer)
        return tokenizer

    def gpt2_like() -> Any:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=True)  # RoBERTa's
        return trained(
            new(models.BPE(), pre_tokenizer=byte_level, decoder=decoders.ByteLevel()),
            "Bpe", special_tokens=["<|endoftext|>"], initial_alphabet=alphabet,
        )  # fmt: skip

    def gpt4_like() -> Any:
        cut = pre_tokenizers.Split(Regex(gpt4), "isolated")
        both = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        return trained(
            new(models.BPE(), pre_tokenizer=both, decoder=decoders.ByteLevel()),
            "Bpe", special_tokens=["<|end_of_text|>"], initial_alphabet=alphabet,
        )  # fmt: skip

    def llama_like() -> Any:
        special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        found = new(model, pre_tokenizer=pre_tokenizers.Metaspace(), decoder=spaces)
        values = json.loads(trained(found, "Bpe", special_tokens=special).to_str())
        values["pre_tokenizer"] = None  # the whole text is one word
        prepend = {"type": "Prepend", "prepend": "▁"}
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        values["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
        return tokenizers.Tokenizer.from_str(json.dumps(values))

    def t5_like() -> Any:
        normal = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
        found = new(models.Unigram(), pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace())
        found.normalizer = normal
        return trained(found, "Unigram", special_tokens=["<unk>", "</s>"], unk_token="<unk>")

    def bert_like() -> Any:
        found = new(models.WordPiece(unk_token="[UNK]"), pre_tokenizer=pre_tokenizers.BertPreTokenizer())
        found.normalizer, found.decoder = normalizers.BertNormalizer(), decoders.WordPiece()
        return trained(found, "WordPiece", special_tokens=["[UNK]", "[CLS]", "[SEP]"])

    return {"gpt2": gpt2_like, "gpt4": gpt4_like, "llama": llama_like, "t5": t5_like, "bert": bert_like}


@pytest.mark.parametrize("kind", ["gpt2", "gpt4", "llama", "t5", "bert"])
def test_a_text_read_in_parts_has_the_tokens_of_the_whole(
    kind: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file in many segments and shards, against the library's own encoding of all of it at once."""
    monkeypatch.setattr(reading, "SEGMENT_BYTES", 1 << 13)
    monkeypatch.setattr(shards, "SEGMENT_BYTES", 1 << 13)
    monkeypatch.setattr(shards, "SHARD_BYTES", 3 << 13)
    content = kinds()[kind]().to_str()
    theirs, ours = tokenizers.Tokenizer.from_str(content), HFTokenizer(content.encode())
    text = code(150_000)
    (tmp_path / "a.txt").write_bytes(text.encode())
    wanted = theirs.encode(text, add_special_tokens=False).ids
    assert made(tmp_path / "a.txt", cache, ours).tokens.tolist() == wanted
    assert ours.encode(text) == wanted
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    assert made(tmp_path / "a.jsonl", cache, ours).tokens.tolist() == wanted
    # what follows a text keeps the space that it begins with
    words = theirs.encode("alpha beta", add_special_tokens=False)
    after = [token for token, (first, _) in zip(words.ids, words.offsets, strict=True) if first >= 5]
    assert after and ours.continuation(after) == " beta"


@pytest.mark.parametrize("text", ["", " ", "plain", "zażółć  gęślą\n\n\njaźń ", "日本 🎿\r\n\t", "\0\x7f", "don't "])
def test_any_text_comes_back_from_a_trained_bpe(text: str, bpe: Path) -> None:
    tokenizer = get_tokenizer(str(bpe))
    ids = tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.eot_id, *ids, tokenizer.eot_id]) == tokenizer.decode(np.array(ids)) == text
    assert tokenizer.continuation(ids) == text
    for at in range(1, len(text)):
        place = len(text[:at].encode())
        found = tokenizer.begins(text.encode(), place)
        assert found is None or (found >= place and tokenizer.begins(text.encode(), found) == found)


def test_what_a_tokenizer_is_called_and_where_it_ends(bpe: Path, tmp_path: Path) -> None:
    found = get_tokenizer(str(bpe))
    content = bpe.read_bytes()
    assert found.name == f"hf:{hashlib.sha256(content).hexdigest()[:32]}"
    assert (found.vocab_size, found.eot_id) == (400, json.loads(content)["model"]["vocab"]["<|endoftext|>"])
    assert get_tokenizer(str(bpe.parent)).name == found.name  # a folder of a model
    assert from_files(found.files).name == found.name and from_files({}).name == "bytes"
    for end in ENDS:
        other = tmp_path / "other.json"
        other.write_text(content.decode().replace("<|endoftext|>", end))
        token = get_tokenizer(str(other)).eot_id
        assert json.loads(other.read_text())["model"]["vocab"][end] == token
    other.write_text(content.decode().replace("<|endoftext|>", "<|startoftext|>"))
    with pytest.raises(DataError, match=r"other\.json: has no token that ends a text \(<\|endoftext\|>, "):
        get_tokenizer(str(other))


def test_ids_of_a_larger_vocabulary_and_of_no_text(bpe: Path) -> None:
    tokenizer = get_tokenizer(str(bpe))
    a, b = tokenizer.encode("a")[0], tokenizer.encode(" b")
    assert tokenizer.decode([a, 400, *b, -1, 2**40]) == "a\ufffd b\ufffd\ufffd"
    assert tokenizer.encode("a\udcff") == tokenizer.encode("a\ufffd")  # a byte of the command line that is no UTF-8
    with pytest.raises(DataError, match="surrogate at 1"):
        tokenizer.encode("a\ud83d")


def test_what_would_drop_add_or_draw_tokens_is_not_used(bpe: Path) -> None:
    values = json.loads(bpe.read_text())
    values["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    values["padding"] = {
        "strategy": {"Fixed": 999}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }  # fmt: skip
    values["model"]["dropout"] = 0.5
    both = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    values["post_processor"] = {
        "type": "TemplateProcessing", "single": both, "pair": [*both, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": special,
    }  # fmt: skip
    text = code(3000)
    found = HFTokenizer(json.dumps(values).encode())
    assert found.encode(text) == get_tokenizer(str(bpe)).encode(text)


def test_bad_names_and_hostile_files_are_one_line(
    bpe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = bpe.read_text()
    values = json.loads(good)
    precompiled = {"type": "Precompiled", "precompiled_charsmap": "AAAAB"}  # the library panics
    split = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    words = {"type": "WordLevel", "vocab": {"</s>": 0}, "unk_token": "[UNK]"}
    cases: dict[str, tuple[Any, str]] = {
        "cut": (good[:1000], "not JSON"),
        "empty": ("", "not JSON"),
        "binary": (b"\x80\x04\x95\0", "not JSON"),
        "deep": ("[" * 100_000, "not JSON|recursion"),
        "deeper": ('{"model":' * 3000 + "{}" + "}" * 3000, "not JSON|recursion|no tokenizer"),
        "list": ("[1]", "it has no model"),
        "other": ('{"a": 1}', "it has no model"),
        "merge": (json.dumps({**values, "model": {**values["model"], "merges": [["zz", "qq"]]}}), "vocabulary"),
        "negative": (json.dumps({**values, "model": {**values["model"], "vocab": {"a": -1}}}), "invalid value"),
        "panic": (json.dumps({**values, "normalizer": precompiled}), "Precompiled"),
        "regex": (json.dumps({**values, "pre_tokenizer": split}), "Oniguruma|regex"),
        "words": (json.dumps({**values, "model": words}), r"\[UNK\]"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / f"{name}.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(DataError, match=message) as caught:
            get_tokenizer(str(path))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2
    names = {
        "byte": "did you mean 'bytes'", "gpt2": "give 'bytes' or the path of a tokenizer.json",
        f"{tmp_path}/cutt.json": rf"no such file; did you mean '{tmp_path}/cut\.json'", "no/t.json": "no such file",
        "a\0b.json": "no such file", str(tmp_path): "no such file", "": "no tokenizer ''", "x" * 5000: "no tokenizer",
    }  # fmt: skip
    for name, message in names.items():
        with pytest.raises(DataError, match=message) as caught:
            get_tokenizer(name)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_without_the_library_one_line_says_what_to_install(bpe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"^data\.tokenizer: .* pip install 'icenet\[text\]'$"):
        get_tokenizer(str(bpe))
    assert get_tokenizer("bytes").vocab_size == 257


# ---- training one -----------------------------------------------------------------------------------------


def test_a_trained_tokenizer_is_the_librarys_own_and_the_same_each_time(tmp_path: Path, cache: Path) -> None:
    """From a folder of a text, JSON lines and a packed file, in processes of their own."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    texts = [code(20_000), "second\n\nsecond text ", "third"]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_bytes(texts[0].encode())
    (tmp_path / "corpus" / "b.jsonl").write_text(json.dumps({"body": texts[1] + "<|endoftext|>"}) + "\n")
    (tmp_path / "corpus" / "c.txt.gz").write_bytes(gzip.compress(texts[2].encode()))
    (tmp_path / "corpus" / "d.bin").write_bytes(b"\0\1\2")
    options = ["--train-tokenizer", "bpe", "--vocab-size", "300", "--text-key", "body"]
    for name in ("one.json", "two.json"):
        done = command("prepare", "corpus", *options, "--out", name, folder=tmp_path)
        assert re.match(r"300 tokens from 0\.0 MB of folder corpus, in \w+\.json\ntrain with it: --set ", done.stdout)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    reference = new(models.BPE(), pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False))
    reference.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    reference.train_from_iterator(texts, trainer)
    assert json.loads((tmp_path / "one.json").read_text()) == json.loads(reference.to_str())
    again = command("prepare", "corpus", *options, "--out", "one.json", folder=tmp_path, code=2).stderr
    assert again == "icenet: --out one.json: exists; choose another, or give --overwrite to replace it\n"


def test_training_a_tokenizer_refuses_and_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("abab")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": 1}')
    (tmp_path / "binary.txt").write_bytes(b"a" * 100_000 + b"\xff")
    out = tmp_path / "t.json"
    for source, size, message in (
        ("a.txt", 256, "must be at least 257"), ("my.yaml", 300, "is a configuration"),
        ("quickstart", 300, "is a configuration"), ("b.txt", 300, "is not there; did you mean"),
        ("empty.txt", 300, "there is no text in file empty.txt"), ("bad.jsonl", 300, "line 1: 'text' .* is a number"),
        ("binary.txt", 300, "binary.txt is not UTF-8 text"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            train_tokenizer(source, vocab_size=size, out=out, quiet=True)
        assert not out.exists()
    with pytest.raises(UsageError, match="is a folder"):
        train_tokenizer("a.txt", vocab_size=300, out=tmp_path, quiet=True)
    assert "259 tokens (of the 300 wanted: " in train_tokenizer("a.txt", vocab_size=300, out=out, quiet=True)
    assert train_tokenizer("a.txt", vocab_size=258, out=out, overwrite=True, quiet=True).startswith("258 tokens from")


# ---- JSON lines and packed files --------------------------------------------------------------------------


def write_lines(path: Path, texts: list[str], key: str = "text") -> Path:
    data = "".join(json.dumps({"id": i, key: text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts))
    path.write_bytes(gzip.compress(data.encode()) if path.suffix == ".gz" else data.encode())
    return path


def some_texts(number: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [f"{i}: " + "wörter " * draw.randrange(1, 60) for i in range(number)]


def edges(size: int) -> list[int]:
    """Where blocks of lines begin, as documented: each is 1/1024 of what is before it, 64 bytes to a megabyte."""
    found, edge = [], 0
    while edge < size:
        found.append(edge)
        edge += min(1 << 20, max(64, edge // 1024))
    return found


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.jsonl.gz"])
def test_lines_are_texts_in_blocks_of_a_drawn_order(name: str, tmp_path: Path, cache: Path) -> None:
    texts = some_texts(400)
    path = write_lines(tmp_path / name, texts)
    data = gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes()
    begins = edges(len(data))
    blocks: list[list[str]] = [[] for _ in begins]
    position = 0
    for line in data.splitlines(keepends=True):
        blocks[int(np.searchsorted(begins, position, side="right")) - 1].append(json.loads(line)["text"])
        position += len(line)
    wanted = [text for index in rng.permutation(rng.key(0, "documents"), len(blocks)) for text in blocks[index]]
    file = made(path, cache)
    assert [bytes(tokens).decode() for tokens in texts_in(file)] == wanted
    assert sorted(wanted) == sorted(texts) and wanted != texts and file.num_documents == 400
    starts = np.flatnonzero(np.append(EOT, file.tokens[:-1]) == EOT)
    np.testing.assert_array_equal(file.starts, starts)
    assert file.intact(ByteTokenizer())


def test_folders_mix_texts_lines_and_packed_files(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_lines(folder / "a.jsonl", ["line one", "", "line three"], "body")
    write_lines(folder / "b.jsonl.gz", ["packed line"], "body")
    (folder / "c.txt").write_text("a plain text")
    (folder / "d.txt.gz").write_bytes(gzip.compress("ein gepackter Größenwahn".encode()))
    (folder / "e.txt.gz").write_bytes(gzip.compress(b"\x89PNG\0binary"))
    (folder / "f.bin").write_bytes(b"\xff\xfe")
    (folder / "g.jsonl").write_text("\n \r\n\n")
    wanted = {"line one", "line three", "packed line", "a plain text", "ein gepackter Größenwahn"}
    for source in (folder, f"{folder}/*"):
        file = made(source, cache, text_key="body")
        assert {bytes(tokens).decode() for tokens in texts_in(file)} == wanted and file.num_documents == 5
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: no key 'text' \(data\.text_key\); known: id, body"):
        made(folder, cache)  # another key is another file of tokens
    config = DataConfig(source=str(folder), text_key="body", validation_fraction=0)
    assert open_dataset(config, 4, 0, cache).num_documents == 5


def test_packed_or_not_and_however_many_processes_the_tokens_are_the_same(
    bpe: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In shards so small that there are dozens. The processes read the source's SHARD_BYTES from their tasks."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 1 << 19)
    tokenizer = get_tokenizer(str(bpe))
    text = code(900_000)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress((tmp_path / "a.txt").read_bytes(), 1))
    write_lines(tmp_path / "a.jsonl", text.split("\n\n"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes(), 1))
    prints = {}
    for name in ("a.txt", "a.txt.gz", "a.jsonl", "b.jsonl.gz"):
        for number in (1, 2) if name in ("a.txt", "b.jsonl.gz") else (1,):
            prints[name, number] = made(tmp_path / name, cache / str(number), tokenizer, workers=number).fingerprint
    assert len({prints[key] for key in prints if "txt" in key[0]}) == 1
    assert len({prints[key] for key in prints if "jsonl" in key[0]}) == 1
    name, tokens = tokenizer.name, np.array(tokenizer.encode(text), "<u2").tobytes()
    assert prints["a.txt", 1] == hashlib.sha256(f"{name}\n".encode() + tokens).hexdigest()


def test_the_validation_part_is_a_fair_sample_of_lines_in_order(tmp_path: Path, cache: Path) -> None:
    """Lines sorted by class, of 20 kB and of 2 MB: each class has its share of the tail, within the draw's chance."""
    for number, size in ((1000, 20), (4000, 500)):
        path = write_lines(tmp_path / f"{number}.jsonl", [chr(97 + 10 * i // number) * size for i in range(number)])
        file = made(path, cache)
        tail = file.tokens[int(0.9 * len(file.tokens)) :]
        counts = np.array([(tail == 97 + i).sum() for i in range(10)]) / (tail != EOT).sum()
        assert counts.min() > 0.02 and counts.max() < 0.25, counts


BAD_LINES: dict[str, tuple[bytes, str]] = {
    "json": (b'{"text": "a"}\n{"text": ', r"line 2: not JSON \(Expecting value at column \d+\)"),
    "key": (
        b'{"text": "a"}\n\n{"texts": "a", "n": 1}',
        r"line 3: no key 'text' \(data\.text_key\); did you mean texts",
    ),
    "number": (b'{"text": 7}', r"line 1: 'text' \(data\.text_key\) is a number, not a text"),
    "null": (b'{"text": null}', r"is null, not a text"),
    "object": (b'{"text": {"a": "b"}}', r"is an object, not a text"),
    "list": (b'["text"]', r'line 1: a list where an object like \{"text": \.\.\.\} is wanted'),
    "plain": (b"just a text\n", r"line 1: not JSON"),
    "utf-8": (b'{"text": "\xff"}', r"line 1: not UTF-8 \(invalid start byte\)"),
    "deep": (b'{"text": ' + b"[" * 100_000, r"line 1: not JSON"),
    "digits": (b'{"text": ' + b"9" * 5000 + b"}", r"line 1: (not JSON|'text' .* is a number)"),
    "surrogate": (b'{"text": "\\ud83d"}', r"line 1: the text of 'text' has a lone surrogate"),
    "binary": (b"\x80\x04\x95\0\0", r"line 1: not UTF-8"),
    "empty": (b"", r"there is no text in file .*empty\.jsonl \(1 file looked at\)"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named(name: str, tmp_path: Path, cache: Path) -> None:
    content, message = BAD_LINES[name]
    path = tmp_path / f"{name}.jsonl"
    path.write_bytes(content)
    packed = tmp_path / f"{name}.jsonl.gz"
    packed.write_bytes(gzip.compress(content))
    for file in (path, packed):
        with pytest.raises(DataError, match=message.replace(r"\.jsonl", r"\.jsonl(\.gz)?")) as caught:
            made(file, cache)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert not cache.exists() or not list(cache.iterdir())


def test_damaged_packed_files_are_named(tmp_path: Path, cache: Path) -> None:
    whole = gzip.compress(code(50_000).encode())
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 0xFF
    for name, content, message in (
        ("cut.txt.gz", whole[: len(whole) // 2], "ends too early: no whole gzip file"),
        ("crc.txt.gz", bytes(changed), "is damaged|is not UTF-8"),
        ("not.txt.gz", b"a plain text", "is damaged .*not a gzip"),
        ("cut.jsonl.gz", whole[:100], "ends too early|not JSON"),
        ("binary.txt.gz", gzip.compress(b"ab\0"), "is not UTF-8 text .NUL byte.; unpack it"),
        ("none.txt.gz", gzip.compress(b""), "there is no text"),
        ("empty.txt.gz", b"", "there is no text"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            made(tmp_path / name, cache)
        assert "\n" not in str(caught.value)
    (tmp_path / "several.txt.gz").write_bytes(gzip.compress(b"one, ") + gzip.compress(b"two"))
    assert bytes(made(tmp_path / "several.txt.gz", cache).tokens.tolist()) == b"one, two"


# ---- preparation ------------------------------------------------------------------------------------------

PREPARE = """
    import sys
    from pathlib import Path
    from icenet.core.data.text import shards
    from icenet.core.data.text.cache import load_tokens
    from icenet.core.data.text.sources import find_source
    from icenet.core.tokenizers import get_tokenizer
    from icenet.core.errors import DataError
    shards.SHARD_BYTES = int(sys.argv[5])
    source, tokenizer = find_source(sys.argv[1]), get_tokenizer(sys.argv[3])
    {before}
    try:
        print(load_tokens(source, tokenizer, Path(sys.argv[2]), workers=int(sys.argv[4])).fingerprint)
    except DataError as error:
        print("DataError:", error)
"""


def preparation(
    source: Path, cache: Path, tokenizer: Path | str, number: int, shard: int = 1 << 19, before: str = ""
) -> subprocess.Popen[str]:
    """The making of tokens in a process of its own."""
    program = textwrap.dedent(PREPARE).format(before=before)
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, (source, cache, tokenizer, number, shard))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def killed_until_done(source: Path, cache: Path, tokenizer: Path, kills: int, longest: float) -> tuple[str, int]:
    """Kills the preparation at random moments, `kills` times at most; gives what it says in the end and how often."""
    draw = random.Random(7)
    for done in range(kills):
        process = preparation(source, cache, tokenizer, draw.choice([1, 2, 3]))
        while process.poll() is None and not list(cache.glob("*.shards/lock")):
            time.sleep(0.01)
        try:
            return process.communicate(timeout=draw.uniform(0, longest))[0], done
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    return preparation(source, cache, tokenizer, 2).communicate()[0], kills


@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_kills_at_random_moments_leave_the_same_file(kills: int, bpe: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    write_lines(source, (code(500_000) * (6 if kills < 10 else 60)).split("\n\n"))
    wanted = preparation(source, tmp_path / "whole", bpe, 1).communicate()[0]
    assert len(wanted) == 65, wanted
    said, done = killed_until_done(source, tmp_path / "killed", bpe, kills, 0.3)
    assert said == wanted and done > 1
    files = [next((tmp_path / folder).glob("*")) for folder in ("whole", "killed")]
    assert files[0].name == files[1].name and files[0].read_bytes() == files[1].read_bytes()
    assert [len(list((tmp_path / folder).iterdir())) for folder in ("whole", "killed")] == [1, 1]


def test_what_is_done_is_not_done_again_but_what_is_damaged_is(
    bpe: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 1 << 19)
    tokenizer = get_tokenizer(str(bpe))
    (tmp_path / "corpus").mkdir()
    texts = {f"{i}.jsonl": some_texts(1200, i) for i in range(4)}
    for name, lines in texts.items():
        write_lines(tmp_path / "corpus" / name, lines)
    wanted = made(tmp_path / "corpus", tmp_path / "other", tokenizer).fingerprint
    with open(tmp_path / "corpus" / "3.jsonl", "a") as file:
        file.write("no JSON\n")
    with pytest.raises(DataError, match=r"3\.jsonl, line 1201: not JSON"):
        made(tmp_path / "corpus", cache, tokenizer)
    kept = sorted(cache.glob("*.shards/*.shard"))
    assert len(kept) == 3
    kept[0].write_bytes(kept[0].read_bytes()[:-1])
    changed = bytearray(kept[1].read_bytes())
    changed[-1] ^= 1
    kept[1].write_bytes(changed)
    write_lines(tmp_path / "corpus" / "3.jsonl", texts["3.jsonl"])  # mended
    tasks = []
    make = shards.Maker.make
    monkeypatch.setattr(shards.Maker, "make", lambda self, task: tasks.append(task) or make(self, task))
    assert made(tmp_path / "corpus", cache, tokenizer).fingerprint == wanted
    assert len(tasks) == 3  # two that were damaged, and the file that was mended
    assert [path.suffix for path in cache.iterdir()] == [".tokens"]


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX")
@pytest.mark.parametrize("number", [1, 2])
def test_a_full_disk_loses_nothing(number: int, bpe: Path, tmp_path: Path, cache: Path) -> None:
    """Files may be no larger than 800 kB: shards fit, the whole does not."""
    write_lines(tmp_path / "a.jsonl", code(1_500_000).split("\n\n"))
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (800_000, 800_000))"
    said = preparation(tmp_path / "a.jsonl", cache, bpe, number, before=limit).communicate()[0]
    assert said.startswith(f"DataError: cannot keep tokens in {cache}: no space left; set ICENET_CACHE to a folder")
    assert said.endswith("what is done is kept for the next attempt\n")
    assert len(list(cache.glob("*.shards/*.shard"))) >= 3 and not list(cache.glob("*.t*"))
    broken = "shards.Maker.make = None"  # nothing is left to make
    again = preparation(tmp_path / "a.jsonl", cache, bpe, 1, before=broken).communicate()[0]
    assert again.strip() == made(tmp_path / "a.jsonl", tmp_path / "other", get_tokenizer(str(bpe))).fingerprint


def test_a_process_that_ends_is_told(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr(workers, "_START", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(DataError, match=r"a process that makes tokens ended \(SIGKILL\); .*--workers 1"):
        made(tmp_path / "a.txt", cache, workers=2)
    assert not list(cache.iterdir())


def test_errors_of_other_processes_are_their_own(tmp_path: Path, cache: Path) -> None:
    write_lines(tmp_path / "a.jsonl", some_texts(10))
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("[]\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 11: a list where an object"):
        made(tmp_path / "a.jsonl", cache, workers=2)


def test_prepare_makes_what_train_reads(bpe: Path, tmp_path: Path) -> None:
    config = tiny(tmp_path, "model.vocab_size=400", "training.max_steps=2", "training.eval_every=null")
    shutil.copy(bpe, tmp_path / "tokenizer.json")
    (tmp_path / "conf").mkdir()
    shutil.copy(bpe, tmp_path / "conf" / "t.json")
    config.data.tokenizer = "t.json"  # beside the configuration
    (tmp_path / "conf" / "my.yaml").write_text(config.to_yaml())
    first = command("prepare", "conf/my.yaml", folder=tmp_path)
    assert re.match(r"[\d,]+ tokens of 1 text \(0\.\d MB\) in /.*\.tokens\n", first.stdout) and first.stderr == ""
    made_ = list((tmp_path / "cache").iterdir())
    time.sleep(0.1)
    again = command("prepare", "conf/my.yaml", "--workers", "2", folder=tmp_path)
    assert again.stdout == f"already there: {first.stdout}"
    command("train", "conf/my.yaml", "--run", "run", "--backend", "torch", folder=tmp_path)
    named = command("prepare", "conf/my.yaml", "--set", "data.tokenizer=tokenizer.json", folder=tmp_path)
    assert named.stdout == again.stdout  # in the working folder, and known by what is in it
    assert list((tmp_path / "cache").iterdir()) == made_


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text.txt"], "text.txt: is a text, and a CONFIG"),
        (["stdlib"], "stdlib: is a text"),
        (["quickstart", "--out", "x"], "--out: goes with --train-tokenizer bpe"),
        (["quickstart", "--vocab-size", "0"], "--vocab-size: goes with"),
        (["quickstart", "--set", "data.tokenizer=none.json"], "data.tokenizer: none.json: no such file"),
        (["quickstart", "--set", "model.vocab_size=200"], "model.vocab_size: 200 is less than the 257 tokens of"),
        (["cnn-small"], "data.kind images: only text is prepared"),
        (["text.txt", "--train-tokenizer", "bpe", "--workers", "2"], "--set and --workers go with a CONFIG"),
        (["text.txt", "--train-tokenizer", "bpe", "--vocab-size", "0"], "--vocab-size 0: must be at least 257"),
        (["none.yaml"], "none.yaml: "),
    ],
)
def test_prepare_says_what_it_wants(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "text.txt").write_text("a text")
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"icenet: {message}")


MEMORY = """
    import resource, re
    import numpy
    from icenet.core import rng
    tokenizer.encode("warm up")
    used = int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (used + ({room} << 20), used + ({room} << 20)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits on memory differ")
@pytest.mark.parametrize(
    ("megabytes", "name", "room", "hf"),
    [
        (80, "a.jsonl.gz", 60, False),
        pytest.param(300, "a.jsonl", 110, True, marks=pytest.mark.slow),
        pytest.param(300, "a.txt", 110, True, marks=pytest.mark.slow),
    ],
)
def test_a_file_larger_than_memory(
    megabytes: int, name: str, room: int, hf: bool, bpe: Path, tmp_path: Path, cache: Path
) -> None:
    """So much text in a process that may take `room` MB more than it has: only a stream can do it."""
    line = json.dumps({"text": "0123456789 abcdef " * 50}).encode() + b"\n"
    part = line * ((1 << 20) // len(line)) if "jsonl" in name else code(1 << 20).encode()
    with open(tmp_path / name, "wb") as file:
        into: Any = gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1) if name.endswith("gz") else file
        for _ in range(megabytes):
            into.write(part)
        into.close()
    limit = textwrap.indent(textwrap.dedent(MEMORY.format(room=room)), "    ").strip()
    tokenizer: Path | str = bpe if hf else "bytes"
    said = preparation(tmp_path / name, cache, tokenizer, 1, 1 << 23, limit.replace("\n    ", "\n")).communicate()[0]
    assert len(said.strip()) == 64, said
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / name).unlink()


def test_a_line_of_a_hundred_megabytes(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "0123456789abcdef" * (100 << 16)
    with open(tmp_path / "a.jsonl", "w") as file:
        file.write(f'{{"text": "one"}}\n{{"text": "{text}"}}\n{{"text": "three"}}\n')
    file_ = made(tmp_path / "a.jsonl", cache)
    begins = file_.starts.tolist()
    lengths = sorted(b - a - 1 for a, b in zip(begins, [*begins[1:], len(file_.tokens) + 1], strict=True))
    assert lengths == [3, 5, len(text)]
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 1 << 24)
    os.utime(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl has a line of more than 16 MB: is it JSON lines"):
        made(tmp_path / "a.jsonl", cache)
    shutil.rmtree(cache)


# ---- rows that are filled up ------------------------------------------------------------------------------


def expected_rows(texts: list[list[int]], length: int) -> list[tuple[list[int], list[int]]]:
    """Inputs and labels of each row, by a loop: end of text, the text, end of text, in steps of `length`."""
    rows = []
    for text in texts:
        whole = [EOT, *text, EOT]
        for first in range(0, len(whole) - 1, length):
            labels = whole[1:][first : first + length]
            rows.append((whole[:-1][first : first + length], labels))
    return rows


def documents(lengths: list[int], length: int, seed: int = 0, fraction: float = 0.0) -> DocumentDataset:
    """Texts of so many tokens, all different, as a data set."""
    texts = np.split(np.arange(sum(lengths)) % 250, np.cumsum(lengths)[:-1])
    tokens = np.concatenate([np.append(text, EOT) for text in texts])[:-1]
    starts = np.flatnonzero(np.append(EOT, tokens[:-1]) == EOT)
    return DocumentDataset(
        tokens, ByteTokenizer(), starts=starts, seq_length=length, seed=seed, validation_fraction=fraction
    )


def rows_of(batch: dict[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    """What a batch holds, without what it is filled up with, which is checked here."""
    inputs, labels, mask = batch["inputs"], batch["labels"], batch["attention_mask"]
    assert inputs.dtype == labels.dtype == np.int32 and mask.dtype == np.bool_
    assert inputs.shape == labels.shape == mask.shape
    counts = mask.sum(axis=1)
    np.testing.assert_array_equal(mask, np.arange(mask.shape[1]) < counts[:, None])  # filled up on the right
    np.testing.assert_array_equal(labels == -100, ~mask)
    for row, count in enumerate(counts.tolist()):
        yield inputs[row, :count].tolist(), labels[row, :count].tolist()


@pytest.mark.parametrize(("lengths", "length"), [([3, 40, 1, 16, 17, 15, 200, 2, 33], 16), ([1], 4), ([5, 5, 9], 50)])
def test_every_text_begins_a_row_of_its_own(lengths: list[int], length: int) -> None:
    data = documents(lengths, length, seed=3)
    texts = [text.tolist() for text in np.split(np.arange(sum(lengths)) % 250, np.cumsum(lengths)[:-1])]
    wanted = expected_rows(texts, length)
    assert data.steps_per_epoch(1) == len(wanted) and data.steps_per_epoch(2 if len(wanted) > 1 else 1) >= 1
    for epoch in range(2):
        batches = [data.train_batch(epoch * len(wanted) + step, 1) for step in range(len(wanted))]
        found = [row for batch in batches for row in rows_of(batch)]
        order = rng.permutation(rng.key(3, "data", epoch), len(wanted))
        assert found == [wanted[index] for index in order]
        for batch, (inputs, _) in zip(batches, found, strict=True):  # one row: up to the next multiple of 16
            assert batch["inputs"].shape[1] == min(length, -(-len(inputs) // 16) * 16)
    assert data.items_per_row == max(1, round(sum(len(labels) for _, labels in wanted) / len(wanted)))


def test_the_order_of_rows_is_a_pure_function_of_seed_and_step() -> None:
    lengths = np.random.default_rng(1).integers(1, 90, 500).tolist()
    data, fresh = documents(lengths, 32, seed=1), documents(lengths, 32, seed=1)
    forward = [data.train_batch(step, 8) for step in range(150)]
    for step in (149, 0, 75, 3):
        again = fresh.train_batch(step, 8)
        assert all((again[name] == forward[step][name]).all() for name in again)
    other = documents(lengths, 32, seed=2).train_batch(0, 8)["inputs"]
    assert other.shape != forward[0]["inputs"].shape or (other != forward[0]["inputs"]).any()
    assert max(batch["inputs"].shape[1] for batch in forward) == 32


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("lengths", [[30] * 10, [300], [1] * 300, [7, 250, 3, 60], [100, 100]])
def test_no_label_is_in_two_parts_and_none_is_lost(lengths: list[int], fraction: float) -> None:
    """All tokens but those at the cut are a label of exactly one part, whatever the cut goes through."""
    data = documents(lengths, 16, fraction=fraction)
    train = [row for step in range(data.steps_per_epoch(1)) for row in rows_of(data.train_batch(step, 1))]
    validation = [row for batch in data.validation_batches(3) for row in rows_of(batch)]
    labels = [sorted(label for row in rows for label in row[1]) for rows in (train, validation)]
    tokens = data._tokens.tolist()
    cut = data.num_train_tokens
    wanted = [tokens[:cut], [*tokens[cut:], EOT]]
    if tokens[cut] != EOT and tokens[cut - 1] != EOT:
        wanted[1] = wanted[1][1:]  # it is an input, of which the label is next
    elif tokens[cut] == EOT:
        wanted[1] = wanted[1][1:]  # the end of a text that is no other label's
    assert labels == [sorted(part) for part in wanted]
    some = [row for batch in data.validation_batches(2, 1) for row in rows_of(batch)]
    assert len(some) == min(2, len(validation)) and all(row in validation for row in some)


def test_ends_of_text_in_a_row_and_too_few_rows(bpe: Path, tmp_path: Path, cache: Path) -> None:
    """A text of its own may hold what ends a text, as a file of stories does; two in a row hold none between."""
    end = "<|endoftext|>"
    (tmp_path / "stories.txt").write_text(f"{end}one day{end}{end}the next{end}and so on{end}")
    tokenizer = get_tokenizer(str(bpe))
    data = open_dataset(
        DataConfig(source=str(tmp_path / "stories.txt"), packing=False, validation_fraction=0), 64, 0, cache,
        tokenizer=tokenizer,
    )  # fmt: skip
    assert isinstance(data, DocumentDataset) and data.num_documents == 3 and data.steps_per_epoch(3) == 1
    found = {tokenizer.decode(inputs): labels[-1] for inputs, labels in rows_of(data.train_batch(0, 3))}
    assert found == dict.fromkeys(("one day", "the next", "and so on"), tokenizer.eot_id)
    with pytest.raises(DataError, match=r"has 3 rows to train on, and one batch needs 4: .*data\.packing=true"):
        data.train_batch(0, 4)
    with pytest.raises(DataError, match="leaves no text for validation"):
        documents([1, 1], 4, fraction=0.1)


def row_by_row(engine: Any, batch: dict[str, Any]) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of each row alone, without filling, weighted by its labels, in float64."""
    total, loss, sums = int(batch["attention_mask"].sum()), 0.0, dict[str, np.ndarray]()
    for row, count in enumerate(batch["attention_mask"].sum(axis=1).tolist()):
        alone = {name: batch[name][row : row + 1, :count] for name in ("inputs", "labels")}
        found, gradients = engine.gradients(alone)
        loss += found * count / total
        for path, gradient in gradients.items():
            sums[path] = sums.get(path, 0) + gradient.astype(np.float64) * (count / total)
    return loss, sums


PADDED = [5, 16, 1, 30, 11, 2]


FAMILIES = {
    "transformer": ["model.num_layers=2"],
    "encoder": ["model.num_layers=2", "model.causal=false"],
    **{
        family: [f"model={{type: {family}, hidden_size: 32, num_layers: 2, vocab_size: 257}}", "data.seq_length=32"]
        for family in ("lstm", "gru", "rnn")
    },
    "both ways": [
        "model={type: gru, hidden_size: 32, num_layers: 2, vocab_size: 257, bidirectional: true}",
        "data.seq_length=32",
    ],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_filling_up_changes_nothing(family: str, tmp_path: Path) -> None:
    """Loss and gradients of a filled batch are those of its rows one by one: by the yardstick on both backends, and
    to the last digits of float64. Those that look ahead need the mask for it."""
    options = FAMILIES[family]
    config = tiny(tmp_path, *options, "model.dropout=0")
    batch = documents(PADDED, 32).train_batch(0, len(PADDED))
    assert batch["inputs"].shape == (6, 32) and not batch["attention_mask"].all()
    exact = backend.engine(config, "torch", "cpu", dtype="float64")
    wanted_loss, wanted = row_by_row(exact, batch)
    loss, gradients = exact.gradients(batch)
    assert abs(loss - wanted_loss) < 1e-13 * wanted_loss
    for path, gradient in gradients.items():
        assert np.abs(gradient - wanted[path]).max() <= 1e-11 * np.abs(wanted[path]).max() + 1e-15, path
    plain = backend.engine(config, "torch", "cpu")
    noise_loss, noise = row_by_row(plain, batch)
    for name in BACKENDS:
        loss, gradients = backend.engine(config, name, "cpu").gradients(batch)
        assert judge(loss, noise_loss, wanted_loss, floor=_loss_floor(wanted_loss, batch)).passed
        for path, gradient in gradients.items():
            verdict = judge(gradient, noise[path], wanted[path], beside=_beside(wanted, path))
            assert verdict.passed, (name, path, verdict)


def _loss_floor(loss: float, batch: dict[str, Any]) -> float:
    """Floor 4 of the yardstick: half an ulp of each of the labels' losses, in their mean."""
    return float(2.0**-24 * loss / np.sqrt(batch["attention_mask"].sum()))


def _beside(gradients: dict[str, np.ndarray], path: str) -> float:
    """For floor 3 of the yardstick: the RMS of all gradients of the layer."""
    layer = path.rpartition(".")[0]
    return rms(np.concatenate([g.ravel() for p, g in gradients.items() if p.rpartition(".")[0] == layer]))


@pytest.mark.parametrize("family", ["transformer", "gru"])
def test_a_filled_batch_agrees_between_the_backends(family: str, tmp_path: Path) -> None:
    """Every layer, gradient and the step itself, by the whole of the parity report; with dropout."""
    gru = ["model={type: gru, hidden_size: 32, num_layers: 1, vocab_size: 257}", "data.seq_length=32"]
    options = gru if family == "gru" else []
    config = tiny(tmp_path, *options)
    report = parity.run(config, batch=documents(PADDED, 32).train_batch(0, len(PADDED)))
    assert report.passed


@pytest.mark.parametrize("name", BACKENDS)
def test_training_on_rows_of_their_own(name: str, tmp_path: Path, cache: Path) -> None:
    """Batches of changing length, with micro-batches: they learn, and killed and resumed they go on bit for bit."""
    write_lines(tmp_path / "a.jsonl", [f"{i % 7} and {i % 7} is {2 * (i % 7)}. " * (1 + i % 3) for i in range(200)])
    overrides = [f"data.source={tmp_path / 'a.jsonl'}", "data.packing=false", "training.gradient_accumulation=2"]
    overrides += ["training.max_steps=8", "training.checkpoint_every=4", "training.eval_every=4"]
    config = tiny(tmp_path, *overrides)
    whole = Trainer.start(config, tmp_path / "whole", backend=name, quiet=True)
    result = whole.fit()
    Trainer.start(config, tmp_path / "part", backend=name, quiet=True).fit(until=4)
    resumed = Trainer.resume(tmp_path / "part", quiet=True)
    assert resumed.fit().loss == result.loss < 5.5 and result.validation_loss is not None
    shapes = {whole.dataset.train_batch(step, 4)["inputs"].shape[1] for step in range(8)}
    assert shapes <= {16, 32} and len(shapes) == 2


def test_a_model_that_takes_no_mask_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        from torch import nn
        from icenet_torch.models.base import BaseModel
        class Plain(BaseModel):
            def __init__(self, config):
                super().__init__(config)
                self.embedding = nn.Embedding(config.vocab_size, 8)
                self.output = nn.Linear(8, config.vocab_size)
            def forward(self, input_ids):
                return self.output(self.embedding(input_ids))
        class Masked(Plain):
            def forward(self, input_ids, attention_mask=None):
                return super().forward(input_ids)
        """)
    )
    from icenet.core.config import custom

    for name in ("Plain", "Masked"):
        family = f"{tmp_path / 'mine.py'}:{name}"
        custom.trust(family)
        model = f"model={{type: '{family}', vocab_size: 257, hidden_size: 8, num_layers: 1}}"
        config = tiny(tmp_path, model, "data.seq_length=16", "data.packing=false", "backend=torch")
        config.training.batch_size = 1
        if name == "Plain":
            with pytest.raises(ConfigError, match=r"data\.packing: false needs .* takes attention_mask, and"):
                dataset_for(config)
        else:
            assert dataset_for(config).train_batch(0, 1)["attention_mask"].any()


# ---- runs that carry their tokenizer ----------------------------------------------------------------------


def test_a_run_goes_on_elsewhere_without_the_tokenizers_file(bpe: Path, tmp_path: Path, cache: Path) -> None:
    """Trained on MLX, moved, its tokenizer gone: resumed on PyTorch, generating, saved, converted, loaded anew."""
    mine = tmp_path / "home" / "tokenizer.json"
    mine.parent.mkdir()
    shutil.copy(bpe, mine)
    overrides = ["model.vocab_size=400", f"data.tokenizer={mine}", "training.max_steps=6", "training.eval_every=null"]
    config = tiny(tmp_path, *overrides, "training.keep_checkpoints=1", "training.checkpoint_every=2")
    whole = Trainer.start(config, tmp_path / "whole", backend="mlx", quiet=True).fit()
    Trainer.start(config, tmp_path / "home" / "run", backend="mlx", quiet=True).fit(until=3)
    shutil.move(tmp_path / "home" / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "home")
    found = checkpoint.find(tmp_path / "run")
    manifest = json.loads((found.path / "manifest.json").read_text())["files"]
    assert manifest["tokenizer.json"]["sha256"] == hashlib.sha256(bpe.read_bytes()).hexdigest()
    assert Path(found.config.data.tokenizer) == found.path / "tokenizer.json"
    assert str(tmp_path) not in (found.path / "config.yaml").read_text().split("tokenizer:")[1].split("\n")[0]

    resumed = Trainer.resume(tmp_path / "run", backend="torch", quiet=True)
    assert resumed.notes == []  # the text is what it was trained on
    result = resumed.fit()
    assert abs(result.loss - whole.loss) < 1e-4 * whole.loss  # curves by the yardstick: test_trainer.py
    texts = {name: icenet.generate(icenet.load(tmp_path / "run", name), "alpha", max_new_tokens=12, temperature=0)
             for name in BACKENDS}  # fmt: skip
    assert texts["mlx"] == texts["torch"] != ""
    options = ["--prompt", "alpha", "--max-new-tokens", "12", "--temperature", "0"]
    told = command("generate", "run", *options, folder=tmp_path)
    assert told.stdout == f"alpha{texts['torch']}\n"

    icenet.save(icenet.load(tmp_path / "run"), tmp_path / "saved")
    command("convert", "run", "converted", "--to", "canonical", folder=tmp_path)
    shutil.rmtree(tmp_path / "run")
    for folder in ("saved", "converted"):
        shutil.move(tmp_path / folder, tmp_path / f"{folder} and moved")
        model = icenet.load(tmp_path / f"{folder} and moved", "torch")
        assert icenet.generate(model, "alpha", max_new_tokens=12, temperature=0) == texts["torch"]
        assert model.tokenizer.name == get_tokenizer(str(bpe)).name


def test_a_damaged_tokenizer_in_a_checkpoint_is_passed_over(bpe: Path, tmp_path: Path, cache: Path) -> None:
    config = tiny(tmp_path, "model.vocab_size=400", f"data.tokenizer={bpe}", "training.max_steps=4")
    config = config.with_overrides("training.checkpoint_every=2", "training.eval_every=null")
    Trainer.start(config, tmp_path / "run", backend="torch", quiet=True).fit()
    newest = checkpoint.newest(tmp_path / "run")
    assert newest is not None and newest.name == "step-00000004"
    (newest / "tokenizer.json").write_bytes(bpe.read_bytes()[:-1])
    heard: list[str] = []
    assert checkpoint.find(tmp_path / "run", heard.append).step == 2
    assert "tokenizer.json: damaged" in heard[0]


def test_a_path_in_a_configuration_is_beside_it_first(
    bpe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "my.yaml").write_text("model: {type: transformer}\ndata: {tokenizer: t.json}\n")
    monkeypatch.chdir(tmp_path)
    read = lambda *overrides: Config.from_yaml("conf/my.yaml", overrides).data.tokenizer  # noqa: E731
    assert read() == "t.json"  # nowhere: told when it is needed
    shutil.copy(bpe, tmp_path / "t.json")
    assert read() == str(tmp_path / "t.json")
    shutil.copy(bpe, tmp_path / "conf" / "t.json")
    assert read() == str(tmp_path / "conf" / "t.json")
    assert read("data.tokenizer=t.json") == str(tmp_path / "t.json")  # of the command line: in the working folder
    assert read("data.tokenizer=bytes") == "bytes"


# ---- texts that models write ------------------------------------------------------------------------------


def test_stop_texts_end_within_a_token(bpe: Path) -> None:
    """What a token holds before the stop is part of the text."""
    from icenet.core.generation.sampling import StoppingCriteria

    tokenizer = get_tokenizer(str(bpe))
    text = "def main(self):\n    return self.value  # end"
    tokens = tokenizer.encode(text)
    joined = [tokenizer.decode([token]) for token in tokens]
    assert any(len(piece) > 2 for piece in joined)
    for stop in ("elf", "n", "):", "lue  #", "\n  "):
        stops = StoppingCriteria(1, [stop], tokenizer, 0)
        for token in tokens:
            stops.update(np.array([token], np.int32))
            if stops.all_done:
                break
        assert stops.all_done
        assert text_after(tokenizer, stops.tokens[0]) + stops.endings[0] == text[: text.index(stop)]


def test_command_line_and_environment_are_clean(bpe: Path, tmp_path: Path) -> None:
    """A file of the user's that is called as a module of ours is not taken for it by the processes."""
    for name in ("json.py", "numpy.py", "icenet.py", "tokenizers.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong module')\n")
    (tmp_path / "a.txt").write_text(code(1000))
    script = (
        "import sys; sys.path.remove('') if '' in sys.path else None; from pathlib import Path; "
        "from icenet.core.data.text.cache import load_tokens; from icenet.core.data.text.sources import find_source; "
        "from icenet.core.tokenizers import get_tokenizer; "
        f"print(len(load_tokens(find_source('a.txt'), get_tokenizer({str(bpe)!r}), Path('cache'), workers=2).tokens))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.stdout.strip() == str(len(get_tokenizer(str(bpe)).encode(code(1000)))), done.stderr


def test_interrupting_tells_that_it_goes_on(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from icenet.commands import prepare

    def stopped(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "dataset_for", stopped)
    with pytest.raises(IceNetError, match="stopped by Ctrl-C; what is done is kept"):
        prepare.prepare(tiny(tmp_path), quiet=True)
