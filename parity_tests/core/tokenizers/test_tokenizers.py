"""The byte tokenizer, tokenizers of the library `tokenizers`, and the training of one.

Expected values come from `tokenizers` itself.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import icenet, is_one_line, source_code

from icenet.commands.prepare import train_tokenizer
from icenet.core.data.text import reading
from icenet.core.data.text.cache import load_tokens
from icenet.core.data.text.left_out import NO_TOKEN
from icenet.core.data.text.sources import find_source
from icenet.core.errors import DataError, UsageError
from icenet.core.tokenizers import get_tokenizer
from icenet.core.tokenizers.bytes import ByteTokenizer
from icenet.core.tokenizers.huggingface import EOT_TOKENS, HFTokenizer

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("tokenizers.models")

EOT = 256
TEXTS = ["", " ", "plain", "zażółć  gęślą\n\n\njaźń ", "日本 🎿\r\n\t", "\0\x7f", "don't "]

# ---- bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_decode_to_the_text(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode([EOT, *ids, EOT]) == text
    assert tokenizer.decode(np.array(ids, np.int32)) == text
    assert tokenizer.encode_batch([text, "x"])[0].tolist() == ids


def test_bytes_decode_any_ids() -> None:
    assert ByteTokenizer().decode([0xE2, 0x82, ord("a")]) == "\ufffda"
    larger_vocabulary = [ord("a"), 257, ord("b"), -1, 256, 50_000]
    assert ByteTokenizer().decode(larger_vocabulary) == "a\ufffdb\ufffd\ufffd"


def test_lone_surrogates_are_refused(bpe: Path) -> None:
    assert ByteTokenizer().encode("a\udcff") == [97, 255]  # an invalid byte of the command line
    for tokenizer in (ByteTokenizer(), get_tokenizer(str(bpe))):
        with pytest.raises(DataError, match="surrogate at 1"):
            tokenizer.encode("a\ud83d")


# ---- tokenizer.json ---------------------------------------------------------------------------------------


def new(model: Any, **parts: Any) -> Any:
    """Returns a tokenizer of the library with a model and its other parts."""
    found = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(found, name, part)
    return found


def trained(tokenizer: Any, kind: str, **options: Any) -> Any:
    trainer = getattr(tokenizers.trainers, f"{kind}Trainer")(vocab_size=500, show_progress=False, **options)
    tokenizer.train_from_iterator([source_code(60_000)], trainer)
    return tokenizer


def roberta() -> Any:
    from tokenizers import decoders, models, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=True)
    found = new(models.BPE(), pre_tokenizer=byte_level, decoder=decoders.ByteLevel())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(found, "Bpe", special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)


def gpt4() -> Any:
    from tokenizers import Regex, decoders, models, pre_tokenizers

    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(words), "isolated")
    both = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    found = new(models.BPE(), pre_tokenizer=both, decoder=decoders.ByteLevel())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(found, "Bpe", special_tokens=["<|end_of_text|>"], initial_alphabet=alphabet)


def llama() -> Any:
    from tokenizers import decoders, models, pre_tokenizers

    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    found = new(model, pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoder)
    values = json.loads(trained(found, "Bpe", special_tokens=special).to_str())
    values["pre_tokenizer"] = None  # the whole text is one word
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    values["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
    return tokenizers.Tokenizer.from_str(json.dumps(values))


def t5() -> Any:
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

    found = new(models.Unigram(), pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace())
    found.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    return trained(found, "Unigram", special_tokens=["<unk>", "</s>"], unk_token="<unk>")


def bert() -> Any:
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    found = new(models.WordPiece(unk_token="[UNK]"), pre_tokenizer=pre_tokenizers.BertPreTokenizer())
    found.normalizer, found.decoder = normalizers.BertNormalizer(), decoders.WordPiece()
    return trained(found, "WordPiece", special_tokens=["[UNK]", "[CLS]", "[SEP]"])


KINDS: dict[str, Callable[[], Any]] = {"roberta": roberta, "gpt4": gpt4, "llama": llama, "t5": t5, "bert": bert}


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_have_the_tokens_of_the_whole_text(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are encoded one by one. Together they have the tokens that the library gives to the whole text."""
    monkeypatch.setattr(reading, "CHUNK_BYTES", 1 << 13)
    content = KINDS[kind]().to_str()
    theirs, ours = tokenizers.Tokenizer.from_str(content), HFTokenizer(content.encode())
    texts = source_code(450_000)
    for text in (texts[:150_000], texts[150_000:300_000], texts[300_000:]):
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == expected
        chunks = chunks_of(text)
        assert len(chunks) > 15 and "".join(chunks) == text
        tokens = ours.encode_batch(chunks, [index > 0 for index in range(len(chunks))])
        assert np.concatenate(tokens).tolist() == expected
    # the text after another keeps the space at its beginning
    words = theirs.encode("alpha beta", add_special_tokens=False)
    after = [token for token, (first, _) in zip(words.ids, words.offsets, strict=True) if first >= 5]
    assert after and ours.decode_continuation(after) == " beta"


@pytest.mark.parametrize("kind", ["roberta", "gpt4", "llama"])
@pytest.mark.parametrize(
    "text", ["word" * 9000, " " * 30_000, "\n" * 30_000, "語" * 9000, "a\r\n  b \u3000\n" * 3000]
)
def test_chunks_without_good_boundaries_decode_to_the_text(
    kind: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a text is cut, decoding returns it: no spaces are added or lost."""
    monkeypatch.setattr(reading, "CHUNK_BYTES", 1 << 13)
    tokenizer = HFTokenizer(KINDS[kind]().to_str().encode())
    chunks = chunks_of(text)
    assert len(chunks) > 2
    tokens = np.concatenate(tokenizer.encode_batch(chunks, [index > 0 for index in range(len(chunks))]))
    whole = tokenizer.decode(tokenizer.encode(text))  # RoBERTa adds a space before the first word
    assert tokenizer.decode(tokens) == whole and whole.strip() == text.strip()


def chunks_of(text: str) -> list[str]:
    import io

    return [chunk.decode() for chunk in reading.split(io.BytesIO(text.encode()).read)]


@pytest.mark.parametrize("text", TEXTS)
def test_a_trained_bpe_decodes_to_the_text(text: str, bpe: Path) -> None:
    tokenizer = get_tokenizer(str(bpe))
    ids = tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.eot_id, *ids, tokenizer.eot_id]) == tokenizer.decode(np.array(ids)) == text
    assert tokenizer.decode_continuation(ids) == text
    batch = tokenizer.encode_batch([text, text], [False, True])
    assert [tokenizer.decode_continuation(tokens) for tokens in batch] == [text, text]


def test_name_and_end_of_text(bpe: Path, tmp_path: Path) -> None:
    found = get_tokenizer(str(bpe))
    content = bpe.read_bytes()
    assert found.name == f"hf:{hashlib.sha256(content).hexdigest()[:32]}"
    assert (found.vocab_size, found.eot_id) == (400, json.loads(content)["model"]["vocab"]["<|endoftext|>"])
    assert get_tokenizer(str(bpe.parent)).name == found.name  # the folder of a model
    assert dict(found.files) == {"tokenizer.json": content} and not get_tokenizer("bytes").files
    other = tmp_path / "other.json"
    for name in EOT_TOKENS:
        other.write_text(content.decode().replace("<|endoftext|>", name))
        assert json.loads(other.read_text())["model"]["vocab"][name] == get_tokenizer(str(other)).eot_id
    other.write_text(content.decode().replace("<|endoftext|>", "<|startoftext|>"))
    with pytest.raises(DataError) as caught:
        get_tokenizer(str(other))
    assert is_one_line(caught.value, str(other), "<|endoftext|>", "added_tokens")


def test_a_cut_character_leaves_the_characters_before_it() -> None:
    values = json.loads(llama().to_str())
    values["added_tokens"] = [token for token in values["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = HFTokenizer(json.dumps(values).encode())
    content = "é日😀\n".encode()
    ids = [values["model"]["vocab"][f"<0x{byte:02X}>"] for byte in content]
    word = tokenizer.encode("def")
    for stop in range(1, len(ids) + 1):
        text = content[:stop].decode(errors="replace")
        assert tokenizer.decode_continuation(ids[:stop]) == text
        assert tokenizer.decode_continuation([*ids[:stop], *word, ids[0]]) == f"{text} def\ufffd"
    split = [ids[0], tokenizer.eot_id, ids[1]]  # a special token has no text
    assert tokenizer.decode_continuation(split) == "é"


def test_ids_outside_the_vocabulary_and_invalid_text(bpe: Path) -> None:
    tokenizer = get_tokenizer(str(bpe))
    a, b = tokenizer.encode("a")[0], tokenizer.encode(" b")
    assert tokenizer.decode([a, 400, *b, -1, 2**40]) == "a\ufffd b\ufffd\ufffd"
    assert tokenizer.encode("a\udcff") == tokenizer.encode("a\ufffd")  # an invalid byte of the command line


def test_truncation_padding_post_processing_and_dropout_are_not_used(bpe: Path) -> None:
    values = json.loads(bpe.read_text())
    values["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    values["padding"] = {
        "strategy": {"Fixed": 999},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    values["model"]["dropout"] = 0.5
    both = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": both,
        "pair": [*both, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    text = source_code(3000)
    found, expected = HFTokenizer(json.dumps(values).encode()), get_tokenizer(str(bpe)).encode(text)
    assert found.encode(text) == found.encode_batch([text], [False])[0].tolist() == expected


HOSTILE = {
    "cut": lambda text, values: text[:1000],
    "empty": lambda text, values: "",
    "binary": lambda text, values: b"\x80\x04\x95\0",
    "lfs pull": lambda text, values: "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "deep": lambda text, values: "[" * 100_000,
    "deeper": lambda text, values: '{"model":' * 3000 + "{}" + "}" * 3000,
    "list": lambda text, values: "[1]",
    "other": lambda text, values: '{"a": 1}',
    "merge": lambda text, values: {**values, "model": {**values["model"], "merges": [["zz", "qq"]]}},
    "negative": lambda text, values: {**values, "model": {**values["model"], "vocab": {"a": -1}}},
    "panic": lambda text, values: {**values, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAB"}},
    "regex": lambda text, values: {
        **values,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
    },
    "words": lambda text, values: {
        **values,
        "model": {"type": "WordLevel", "vocab": {}, "unk_token": "[UNK]"},
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_one_line(name: str, bpe: Path, tmp_path: Path, capfd: Any) -> None:
    content = HOSTILE[name](bpe.read_text(), json.loads(bpe.read_text()))
    path = tmp_path / f"{name}.json"
    data = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(DataError) as caught:
        get_tokenizer(str(path))
    remedy = "run `git lfs pull`" if name == "lfs pull" else ""
    assert is_one_line(caught.value, "data.tokenizer", str(path), remedy) and caught.value.exit_code == 2
    assert capfd.readouterr().err == ""  # a panic of the library writes there


def letters(kind: str) -> bytes:
    """Returns a tokenizer of the letters A, C, G and T without an unknown token, of a model of the library."""
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {letter: index for index, letter in enumerate("ACGT")}
    model = {
        "words": lambda: models.WordLevel(vocabulary),
        "bpe": lambda: models.BPE({**vocabulary, "AC": 4}, [("A", "C")]),
        "pieces": lambda: models.WordPiece(vocabulary),
        "unigram": lambda: models.Unigram([(letter, -1.0) for letter in "ACGT"]),
    }[kind]()
    split = None if kind in ("bpe", "unigram") else pre_tokenizers.Split("", "isolated")
    found = new(model, decoder=decoders.Fuse(), **({"pre_tokenizer": split} if split else {}))
    found.add_special_tokens(["<eos>"])
    return bytes(found.to_str().encode())


@pytest.mark.parametrize("kind", ["words", "bpe", "pieces", "unigram"])
def test_letters_without_an_unknown_token(kind: str, tmp_path: Path) -> None:
    """The tokenizer loads; a letter without a token is named, in a prompt and in a text, or left out and counted."""
    tokenizer = HFTokenizer(letters(kind))
    text = "ACGT" * 40_000  # several chunks
    (tmp_path / "a.txt").write_text(text)
    found = load_tokens(find_source(str(tmp_path / "a.txt")), tokenizer, tmp_path / "cache")
    expected = tokenizers.Tokenizer.from_str(letters(kind).decode()).encode(text).ids
    assert tokenizer.decode(found.tokens) == tokenizer.decode(expected) == text
    assert tokenizer.encode("AC<eos>GT") == [*tokenizer.encode("AC"), tokenizer.eot_id, *tokenizer.encode("GT")]
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["A", text], [False, True])):
        with pytest.raises(DataError) as caught:
            encode("ACGNT")
        assert is_one_line(caught.value, "no token", "'N'", "character 4", "unk_token")
    (tmp_path / "b.txt").write_text("ACGT\nANGN")
    source = find_source(str(tmp_path / "b.txt"))
    with pytest.raises(DataError) as caught:
        load_tokens(source, tokenizer, tmp_path / "cache")
    assert is_one_line(caught.value, "b.txt, line 1, byte 4", repr("\n"), "data.errors=skip")
    found = load_tokens(source, tokenizer, tmp_path / "cache", errors="skip")
    assert tokenizer.decode(found.tokens) == "ACGTAG" and found.left_out.counts == {NO_TOKEN: 3}


def test_a_byte_order_mark_before_a_tokenizer(bpe: Path, tmp_path: Path) -> None:
    (tmp_path / "marked.json").write_bytes(b"\xef\xbb\xbf" + bpe.read_bytes())
    assert get_tokenizer(str(tmp_path / "marked.json")).name == get_tokenizer(str(bpe)).name


def test_unknown_names_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text("")
    names = {
        "byte": "did you mean 'bytes'",
        "gpt2": "tokenizer.json",
        f"{tmp_path}/cutt.json": f"{tmp_path}/cut.json",
        "no/t.json": "no such file",
        "a\0b.json": "no such file",
        str(tmp_path): "no such file",
        "": "''",
        "x" * 5000: "xxx",
    }
    for name, expected in names.items():
        with pytest.raises(DataError) as caught:
            get_tokenizer(name)
        assert is_one_line(caught.value, "data.tokenizer", expected)


def test_without_the_library_the_error_names_the_package(bpe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError) as caught:
        get_tokenizer(str(bpe))
    assert is_one_line(caught.value, "data.tokenizer", "pip install 'icenet[text]'")
    assert get_tokenizer("bytes").vocab_size == 257


# ---- training one -----------------------------------------------------------------------------------------


def test_training_equals_the_librarys_and_is_reproducible(tmp_path: Path) -> None:
    """From a folder with a text, JSON lines and a gzip file, by the command and by a function of this process."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    texts = [source_code(20_000), "second\n\nsecond text ", "third"]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_bytes(texts[0].encode())
    (tmp_path / "corpus" / "b.jsonl").write_text(json.dumps({"body": texts[1] + "<|endoftext|>"}) + "\n")
    (tmp_path / "corpus" / "c.txt.gz").write_bytes(gzip.compress(texts[2].encode()))
    (tmp_path / "corpus" / "d.bin").write_bytes(b"\0\1\2")
    options = ["--train-tokenizer", "bpe", "--vocab-size", "300", "--text-key", "body"]
    done = icenet("prepare", "corpus", *options, "--out", "one.json", folder=tmp_path)
    assert re.match(r"300 tokens .*folder corpus.*\n.*--set model\.vocab_size=300\n", done.stdout)
    train_tokenizer(str(tmp_path / "corpus"), vocab_size=300, out=tmp_path / "two.json", text_key="body", quiet=True)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    reference = new(models.BPE(), pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False))
    reference.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    reference.train_from_iterator(texts, trainer)
    assert json.loads((tmp_path / "one.json").read_text()) == json.loads(reference.to_str())
    with pytest.raises(UsageError) as caught:
        train_tokenizer(str(tmp_path / "corpus"), vocab_size=300, out=tmp_path / "one.json", text_key="body")
    assert is_one_line(caught.value, f"{tmp_path}/one.json: exists", "--overwrite")


@pytest.mark.parametrize(
    ("source", "size", "names"),
    [
        ("a.txt", 256, ("--vocab-size 256", "257")),
        ("my.yaml", 300, ("my.yaml", "configuration")),
        ("quickstart", 300, ("quickstart", "configuration")),
        ("b.txt", 300, ("b.txt", "did you mean")),
        ("empty.txt", 300, ("no text", "empty.txt")),
        ("bad.jsonl", 300, ("bad.jsonl", "line 1", "'text'", "a number")),
        ("binary.txt", 300, ("binary.txt", "not UTF-8", "100000")),
    ],
)
def test_training_refuses(
    source: str, size: int, names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("abab")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": 1}')
    (tmp_path / "binary.txt").write_bytes(b"a" * 100_000 + b"\xff")
    with pytest.raises(UsageError) as caught:
        train_tokenizer(source, vocab_size=size, out=tmp_path / "t.json", quiet=True)
    assert is_one_line(caught.value, *names) and not (tmp_path / "t.json").exists()


def test_training_on_a_short_text(tmp_path: Path) -> None:
    text, out = tmp_path / "a.txt", tmp_path / "t.json"
    text.write_text("abab")
    with pytest.raises(UsageError) as caught:
        train_tokenizer(str(text), vocab_size=300, out=tmp_path, quiet=True)
    assert is_one_line(caught.value, f"{tmp_path}: is a folder")
    assert train_tokenizer(str(text), vocab_size=300, out=out, quiet=True).startswith("259 tokens (of the 300 ")
    said = train_tokenizer(str(text), vocab_size=300, out=out, text_key="body", overwrite=True, quiet=True)
    assert f"--text-key body has no effect: file {text} has no JSON lines" in said.splitlines()
    assert train_tokenizer(str(text), vocab_size=258, out=out, overwrite=True, quiet=True).startswith("258 tokens ")
