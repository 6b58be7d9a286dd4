"""Files of SentencePiece without a tokenizer.json, against the packages `sentencepiece` and `transformers`."""

from __future__ import annotations

import io
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import is_one_line, source_code

import icenet
from icenet.core.config import Config
from icenet.core.errors import DataError
from icenet.core.families import FAMILIES
from icenet.core.tokenizers import find_file, get_tokenizer, tokenizer_files
from icenet.core.tokenizers.huggingface import HFTokenizer
from icenet.core.tokenizers.protobuf import read_fields

library: Any = pytest.importorskip("sentencepiece")
pytest.importorskip("tokenizers")

BPE = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
SYMBOLS = ["<start_of_turn>", "<end_of_turn>", "▁▁", "▁▁▁", "\n\n", "[x]", "+*"]
# Name of the file, the class, and options of the training.
KINDS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "llama": ("tokenizer.model", "LlamaTokenizer", {**BPE, "remove_extra_whitespaces": False, "split_digits": True}),
    "gemma": (
        "tokenizer.model",
        "GemmaTokenizer",
        {**BPE, "remove_extra_whitespaces": False, "add_dummy_prefix": False, "user_defined_symbols": SYMBOLS},
    ),
    "spaces": ("spiece.model", None, {"model_type": "bpe", "user_defined_symbols": ["[x]", "+*", "日本"]}),
    "xlm-roberta": ("sentencepiece.bpe.model", None, {"model_type": "unigram"}),
    "nfkc": ("tokenizer.model", "", {"byte_fallback": True, "normalization_rule_name": "nfkc_cf", "pad_id": 3}),
}
WORDS = [
    *("the", " of", "Hello", "Straße", "def f(x):", "日本", "テキスト", "🎿", "👨‍👩‍👧", "zażółć"),
    *("e\u0301", "ﬁ", "Ⅷ", "ＡＢＣ", "①"),
    *("\u00a0", "\u3000", "\u200b", "\t", "\n", "\n\n", "\r\n", " ", "  ", "   ", "▁", "▁▁", "don't", "4,567.89"),
    *("हिन्दी", "\ufeff", "\u00ad", "½", "\x07", "ÀÉ", "عربى", "𝓗", "<0x41>", "κόσμε", "...", "[x]", "+*"),
]  # fmt: skip


def texts(count: int = 200) -> list[str]:
    drawn, found = random.Random(11), ["", " ", "  ", "a", " a", "a ", "  a  b  ", "\n"]
    while len(found) < count:
        text = "".join(drawn.choice(WORDS) + drawn.choice(["", "", " "]) for _ in range(drawn.randrange(1, 14)))
        ranges = [(33, 127), (0xA1, 0x250), (0x3041, 0x3096), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF)]
        more = [chr(drawn.randrange(*drawn.choice(ranges))) for _ in range(drawn.randrange(6))]
        found.append(text + "".join(more))
    return found


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """Returns a small file of each kind."""
    corpus = [*source_code(40_000).splitlines(), *WORDS, "日本 テキスト zażółć κόσμε", "हिन्दी عربى 🎿 die Straße"] * 2
    found = {}
    for kind, (_, _, options) in KINDS.items():
        writer = io.BytesIO()
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus), model_writer=writer, vocab_size=700, character_coverage=0.998,
            num_threads=1, minloglevel=2, **options,
        )  # fmt: skip
        found[kind] = writer.getvalue()
    return found


def write(folder: Path, kind: str, content: bytes, **config: Any) -> Path:
    """Writes a folder of a kind, and returns the path of its file."""
    folder.mkdir(exist_ok=True)
    name, class_name, _ = KINDS[kind]
    (folder / name).write_bytes(content)
    if class_name is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": class_name, **config}))
    return folder / name


def reference_ids(processor: Any, kind: str, text: str) -> list[int]:
    """Returns what the package returns, with the ids of fairseq for XLM-RoBERTa."""
    ids: list[int] = processor.encode(text)
    if kind == "xlm-roberta":
        ids = [{0: 3, 1: 0, 2: 2}.get(index, index + 1) for index in ids]
    return ids


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_texts_are_those_of_sentencepiece(kind: str, files: dict[str, bytes], tmp_path: Path) -> None:
    path = write(tmp_path, kind, files[kind])
    processor, tokenizer = library.SentencePieceProcessor(model_proto=files[kind]), get_tokenizer(str(tmp_path))
    assert find_file(tmp_path) == path and isinstance(tokenizer, HFTokenizer)
    for text in texts():
        if text.endswith("\u0301") or not all(turn not in text for turn in SYMBOLS[:2]):
            continue
        ids = reference_ids(processor, kind, text)
        assert tokenizer.encode(text) == ids, repr(text)
        if processor.unk_id() not in processor.encode(text):  # which it writes as "⁇"
            assert tokenizer.decode(ids) == processor.decode(processor.encode(text)), repr(text)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_transformers(kind: str, files: dict[str, bytes], tmp_path: Path) -> None:
    """Of XLM-RoBERTa's class, or of its tokenizer for any file of SentencePiece.

    That one takes "<0x41>" for a byte, and keeps "▁" at the end of a text.
    """
    transformers: Any = pytest.importorskip("transformers")
    path = write(tmp_path, kind, files[kind])
    theirs = getattr(transformers, "XLMRobertaTokenizer" if kind == "xlm-roberta" else "TokenizersBackend")
    theirs, ours = theirs(**theirs.convert_to_native_format(vocab_file=str(path))), get_tokenizer(str(tmp_path))
    for text in texts():
        if kind == "xlm-roberta":
            assert ours.encode_prompt(text) == theirs.encode(text), repr(text)
        elif "<0x" not in text and not (kind == "nfkc" and "▁" in text):
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), repr(text)


def test_the_files_next_to_it_are_used(files: dict[str, bytes], tmp_path: Path) -> None:
    """Tokens around a text, further tokens with their ids, names of pieces, and the space after special tokens."""
    path = write(tmp_path, "llama", files["llama"])
    plain, processor = get_tokenizer(str(path)), library.SentencePieceProcessor(model_proto=files["llama"])
    assert isinstance(plain, HFTokenizer)
    assert plain.encode_prompt("a b") == [1, *processor.encode("a b")]
    assert plain.template_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert (plain.eot_id, plain.vocab_size) == (2, 700)
    assert plain.encode("a</s>b") == [*processor.encode("a"), 2, *processor.encode("b")]
    settings: dict[str, Any] = {"add_bos_token": False, "add_eos_token": True, "legacy": False}
    decoder = {"701": {"content": "<|turn|>", "special": True}, "450": {"content": "<|other|>", "special": True}}
    write(tmp_path, "llama", files["llama"], **settings, added_tokens_decoder=decoder)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 700}))
    found = get_tokenizer(str(tmp_path))
    assert isinstance(found, HFTokenizer)
    assert found.encode_prompt("a b")[-1] == 2 and found.vocab_size == 702
    assert found.encode("<pad><|turn|><|other|>") == [700, 701, 450]
    assert found.decode([*processor.encode("a"), 701, *processor.encode("b")]) == "a b"
    assert found.encode("a</s>b") == [*processor.encode("a"), 2, processor.piece_to_id("b")]
    # a checkpoint has the tokenizer.json that was made
    copied = tmp_path / "copy"
    copied.mkdir()
    for name, content in tokenizer_files(str(tmp_path)).items():
        (copied / name).write_bytes(content)
    again = get_tokenizer(str(copied))
    assert again.name == found.name and again.encode(" a b</s>") == found.encode(" a b</s>")


def test_a_folder_is_loaded_saved_and_exported(files: dict[str, bytes], tmp_path: Path) -> None:
    """To Hugging Face as it is, and to GGUF with its tokenizer."""
    for name in ("torch", "gguf"):
        pytest.importorskip(name)
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 32, "vocab_size": 700}  # fmt: skip
    icenet.save(icenet.build(Config(model=FAMILIES["llama"].read(config)), "torch", "cpu"), tmp_path / "plain")
    icenet.convert(tmp_path / "plain", tmp_path / "hf", "hf")
    write(tmp_path / "hf", "llama", files["llama"])
    loaded = icenet.load(tmp_path / "hf", "torch", "cpu")
    assert loaded.generation.add_special_tokens
    expected = icenet.generate(loaded, "the  town", max_new_tokens=6, details=True).tokens
    icenet.save(loaded, tmp_path / "saved")
    icenet.convert(tmp_path / "hf", tmp_path / "again", "hf")
    icenet.convert(tmp_path / "hf", tmp_path / "model.gguf", "gguf")
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == files["llama"]
    for name in ("saved", "again", "model.gguf"):
        found = icenet.load(tmp_path / name, "torch", "cpu")
        assert found.tokenizer.encode_prompt(" the  town🎿") == loaded.tokenizer.encode_prompt(" the  town🎿")
        if name != "model.gguf":  # whose weights are rounded
            assert icenet.generate(found, "the  town", max_new_tokens=6, details=True).tokens == expected


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"legacy": True, "tokenizer_class": "LlamaTokenizerFast"}),
        ("gemma2", {"legacy": False, "add_prefix_space": False}),
        ("mistral", {"legacy": False}),
    ],
)
def test_a_llama_tokenizer_has_the_rules_of_transformers(
    model_type: str, changes: dict[str, Any], files: dict[str, bytes], tmp_path: Path
) -> None:
    """Also as a checkpoint stores it, whose folder has no config.json."""
    transformers: Any = pytest.importorskip("transformers")
    write(tmp_path / "source", "llama", files["llama"])
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(tokenizer_files(str(tmp_path / "source"))["tokenizer.json"])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    config = {"tokenizer_class": "LlamaTokenizer", **named, **changes}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), get_tokenizer(str(folder))
    assert isinstance(ours, HFTokenizer)
    copied = tmp_path / "copy"
    copied.mkdir()
    for name, content in tokenizer_files(str(folder)).items():
        (copied / name).write_bytes(content)
    again = get_tokenizer(str(copied))
    for text in [*texts(60), "a</s> b</s>c", "<s>[x] a"]:
        expected = theirs.encode(text)
        assert ours.encode_prompt(text) == expected, repr(text)
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True), repr(text)
        assert again.encode(text) == ours.encode(text)


def message(number: int, data: bytes) -> bytes:
    """Returns a field with some bytes."""
    length, lengths = len(data), bytearray()
    while length > 0x7F:
        lengths.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([number << 3 | 2, *lengths, length]) + data


def test_fields_of_a_message() -> None:
    data = message(1, b"ab" * 100) + b"\x10\xac\x02" + b"\x1d\0\0\x80?" + b"\x21" + bytes(8) + b"\x82\x01\x01z"
    assert list(read_fields(data, 5)) == [(1, b"ab" * 100), (2, 300), (3, b"\0\0\x80?"), (4, bytes(8)), (16, b"z")]
    for wrong in (data[:-1], data[:100], b"\x0b", b"\x08" + b"\xff" * 20, b"\x08"):
        with pytest.raises(ValueError, match=r"the message|a number|a field"):
            list(read_fields(wrong, 9))
    with pytest.raises(ValueError, match="more than 4"):
        list(read_fields(data, 4))


def faulty(content: bytes) -> dict[str, bytes]:
    """Returns files that are damaged, or made to exhaust the reader."""
    unknown = message(1, message(1, b"<unk>") + b"\x18\x02") + message(1, message(1, b"</s>") + b"\x18\x03")
    bpe = message(2, b"\x18\x02")
    nested = b"".join(message(1, message(1, b"%d" % index) + b"\x18\x01") for index in range(1000))
    return {
        "cut": content[: len(content) // 2],
        "empty": b"",
        "text": b"IQ== 0\nIg== 1\n" * 1000,
        "zeros": bytes(1 << 20),
        "pieces": b"\x0a\x00" * (1 << 22),
        "fields": message(1, b"\x18\x01" * (1 << 21)),
        "numbers": message(2, b"\x20\x01" * (1 << 22)),
        "large": message(9, bytes(1 << 25)),
        "long": unknown + bpe + message(1, message(1, b"a" * (1 << 18))),
        "several": unknown + unknown + nested,
        "score": unknown + message(1, message(1, b"a") + b"\x15\0\0\xc0\x7f"),
        "words": unknown + message(2, b"\x18\x03"),
        "suffix": unknown + bpe + message(2, b"\xc0\x01\x01"),
        "charsmap": unknown + nested + message(3, message(2, b"\xff" * 1000)),
        "number": unknown + b"\x10\x01",
        "symbols": unknown + message(1, message(1, b"ab" * (1 << 16)) + b"\x18\x04"),
    }


@pytest.mark.parametrize("kind", faulty(b""))
def test_a_faulty_file_is_one_line(kind: str, files: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(faulty(files["llama"])[kind])
    started = time.process_time()
    with pytest.raises(DataError) as caught:
        get_tokenizer(str(tmp_path)).encode("ab")
    assert is_one_line(caught.value, f"{tmp_path}/tokenizer.model")
    assert time.process_time() - started < 2


def test_damaged_bytes(files: dict[str, bytes], tmp_path: Path) -> None:
    """A damaged file is one line, or a tokenizer."""
    drawn = random.Random(3)
    for kind in KINDS:
        for _ in range(12):
            content = bytearray(files[kind])
            for _ in range(drawn.choice([1, 5, 50])):
                content[drawn.randrange(len(content))] = drawn.randrange(256)
            path = write(
                tmp_path, kind, bytes(content[: drawn.choice([len(content), drawn.randrange(len(content))])])
            )
            try:
                get_tokenizer(str(path)).encode("a b")
            except DataError as error:
                assert is_one_line(error, str(path))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"tokenizer_class": "CamembertTokenizer"}, ("'CamembertTokenizer'", "save_pretrained")),
        ({"added_tokens_decoder": {"720": {"content": "<x>"}}}, ("700 pieces", "save_pretrained")),
        ({"added_tokens_decoder": {"5": {"content": "<s>"}}}, ("the same name",)),
    ],
)
def test_a_folder_whose_ids_are_unknown(
    changes: dict[str, Any], names: tuple[str, ...], files: dict[str, bytes], tmp_path: Path
) -> None:
    write(tmp_path, "llama", files["llama"], **changes)
    with pytest.raises(DataError) as caught:
        get_tokenizer(str(tmp_path))
    assert is_one_line(caught.value, *names)
