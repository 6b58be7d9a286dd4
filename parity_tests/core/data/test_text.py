"""The text pipeline: sources, reading in chunks, JSON lines, gzip files, the token cache, and resuming after a kill.

Expected values come from `tokenizers`, `json` and `gzip`, or from a loop written here.
"""

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
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import is_one_line, source_code, start_python, tiny

from icenet.cli.main import main
from icenet.core import files, listing, rng
from icenet.core.config import DataConfig
from icenet.core.data.datasets import open_dataset
from icenet.core.data.text import left_out, prepare, reading
from icenet.core.data.text.cache import load_tokens
from icenet.core.data.text.sources import find_source
from icenet.core.data.text.token_file import HEADER_BYTES, TokenFile
from icenet.core.errors import DataError, FileError, IceNetError
from icenet.core.runs import run_folder
from icenet.core.tokenizers import get_tokenizer
from icenet.core.tokenizers.bytes import ByteTokenizer

EOT = 256
posix = pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits on memory differ")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks and batches, and a journal after each batch."""
    monkeypatch.setattr(reading, "CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr(prepare, "BATCH_BYTES", 1 << 14)
    monkeypatch.setattr(prepare, "SAVE_SECONDS", 0.0)


def make(source: Path | str, cache: Path, tokenizer: Any = None, **options: Any) -> TokenFile:
    found = find_source(str(source), options.get("errors", "stop"))
    return load_tokens(found, tokenizer or ByteTokenizer(), cache, **options)


def text_of(source: Path | str, cache: Path) -> str:
    """Returns the tokens of a source of one document, as text."""
    return bytes(make(source, cache).tokens.tolist()).decode()


def documents_of(file: TokenFile) -> list[str]:
    """Returns the text of each document, by a loop."""
    found: list[list[int]] = [[]]
    for token in file.tokens.tolist():
        found.append([]) if token == EOT else found[-1].append(token)
    return [bytes(tokens).decode() for tokens in found]


def fingerprint_of(file: TokenFile) -> str:
    """Returns the fingerprint of a file's bytes as documented: SHA-256 of the tokenizer's name and the tokens."""
    return hashlib.sha256(b"bytes\n" + file.tokens.astype("<u2").tobytes()).hexdigest()


def left_over(cache: Path) -> list[str]:
    """Returns the names in the cache besides lock files, which stay."""
    return sorted(path.name for path in cache.glob("*") if path.suffix != ".lock")


def fails(source: Path | str, cache: Path, *names: str, **options: Any) -> None:
    """Requires an error of one line with these names."""
    with pytest.raises(DataError) as caught:
        make(source, cache, **options)
    assert is_one_line(caught.value, *names) and caught.value.exit_code == 2, caught.value


# ---- sources ----------------------------------------------------------------------------------------------


def test_one_file_is_its_bytes(tmp_path: Path, cache: Path) -> None:
    data = "eins\r\nzwei\näöü".encode()
    (tmp_path / "a.txt").write_bytes(data)
    file = make(tmp_path / "a.txt", cache)
    assert file.tokens.tolist() == list(data) and file.num_documents == 1


def test_folder_takes_text_in_shuffled_order(tmp_path: Path, cache: Path) -> None:
    """Files that are not text are left out, also those that begin as text; hidden files are ignored."""
    corpus = tmp_path / "corpus"
    (corpus / "sub" / ".hidden").mkdir(parents=True)
    files = {f"sub/{i}.txt": f"text {i}".encode() for i in range(6)}
    files |= {"a.txt": b"first", "empty.txt": b"", "z.md": "ź".encode()}
    late = b"a" * (3 * reading.CHUNK_BYTES + 5) + b"\xff"
    binary = {"image.png": b"\x89PNG\r\n", "zeros": b"abc\0def", "late": late, "cut": b"x\xc3"}
    hidden = {".dot": b"no", "sub/.hidden/x.txt": b"no"}
    for name, data in (files | binary | hidden).items():
        (corpus / name).write_bytes(data)
    listed = sorted(files | binary)
    order = [listed[i] for i in rng.permutation(rng.key(0, "documents"), len(listed))]
    file = make(corpus, cache, errors="skip")
    assert documents_of(file) == [files[name].decode() for name in order if files.get(name)]
    assert order != listed and file.num_documents == 8 and file.fingerprint == fingerprint_of(file)
    assert file.left_out.counts == {left_out.BINARY: 2, left_out.NOT_UTF8: 2, left_out.EMPTY: 1}
    assert file.left_out.names[left_out.NOT_UTF8] == [
        "cut: is not UTF-8 text (unexpected end of data at byte 1)",
        f"late: is not UTF-8 text (invalid start byte at byte {len(late) - 1})",
    ]
    fails(corpus, cache, f"{corpus}/cut", "byte 1", "data.errors=replace", "data.errors=skip")


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.txt").write_text("linked")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "link").symlink_to(tmp_path / "elsewhere")
    (corpus / "loop").symlink_to(corpus)
    (corpus / "broken").symlink_to(tmp_path / "nowhere")
    assert [document.name for document in find_source(str(corpus)).documents] == ["link/x.txt"]


def test_a_file_is_read_once_whatever_leads_to_it(tmp_path: Path, cache: Path) -> None:
    """Two links to parents, links to files and folders, a hard link: with a glob, too, and each is named."""
    corpus = tmp_path / "corpus"
    (corpus / "sub").mkdir(parents=True)
    (corpus / "sub" / "x.txt").write_text("only once")
    (corpus / "sub" / "up").symlink_to(corpus)
    (corpus / "again").symlink_to(corpus / "sub")
    (corpus / "a.txt").symlink_to(corpus / "sub" / "x.txt")
    os.link(corpus / "sub" / "x.txt", corpus / "z.txt")
    (corpus / "broken.txt").symlink_to(tmp_path / "nowhere")
    for source in (corpus, f"{corpus}/**/*.txt", f"{corpus}/**", f"{corpus}/**/sub/**/*.txt"):
        assert text_of(source, cache) == "only once", source
        found = find_source(str(source)).left_out
        assert "sub/up" in found.names[left_out.LINKED_TWICE] and found.counts[left_out.LINKED_TWICE] >= 4
    assert find_source(str(corpus)).left_out.names[left_out.BROKEN_LINKS] == ["broken.txt"]
    found = find_source(f"{corpus}/*").left_out
    assert found.names[left_out.FOLDERS] == ["again", "sub"] and "'**/*'" in found.summary()


def test_a_folder_is_listed_once_although_a_link_leads_back_to_it(tmp_path: Path) -> None:
    (tmp_path / "x.txt").touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    assert find_source(str(tmp_path)).left_out.names == {left_out.LINKED_TWICE: ["loop"]}


def test_runs_below_a_source_are_left_out(tmp_path: Path) -> None:
    """A run that its own data contained would be another run when it is continued."""
    (tmp_path / "runs" / "x" / "checkpoints").mkdir(parents=True)
    for name in ("a.txt", "runs/x/config.yaml", "runs/x/run.json", "runs/x/checkpoints/config.yaml"):
        (tmp_path / name).touch()
    for source in (str(tmp_path), f"{tmp_path}/**/*"):
        found = find_source(source)
        assert [document.name for document in found.documents] == ["a.txt"]
        assert found.left_out.names == {left_out.RUNS: ["runs/x"]}
    assert len(find_source(str(tmp_path / "runs" / "x")).documents) == 3  # named itself
    assert listing.is_run([run_folder.RECORD, "config.yaml"]) and not listing.is_run(["config.yaml", "notes.txt"])


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus" / "locked").mkdir(parents=True)
    (tmp_path / "corpus" / "a.txt").write_text("open")

    def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(path: Any) -> Any:
            if str(path).endswith("locked"):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path)

        return refuse

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    for source in (tmp_path / "corpus", f"{tmp_path}/corpus/**/*.txt", f"{tmp_path}/corpus/*/*.txt"):
        fails(source, cache, f"{tmp_path}/corpus/locked", "permission denied", "data.errors=skip")
    for source in (tmp_path / "corpus", f"{tmp_path}/corpus/**/*.txt"):
        assert find_source(str(source), "skip").left_out.names == {left_out.UNREADABLE: ["locked: permission denied"]}
        assert documents_of(make(source, cache, errors="skip")) == ["open"]


def test_glob(tmp_path: Path, cache: Path) -> None:
    for name in ("a.txt", "d/b.txt", "d/e/c.txt", "d/no.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    names = [document.name for document in find_source(f"{tmp_path}/**/*.txt").documents]
    assert names == ["a.txt", "d/b.txt", "d/e/c.txt"]
    (tmp_path / "odd[1].txt").write_text("its name is a pattern")
    assert text_of(tmp_path / "odd[1].txt", cache) == "its name is a pattern"


def test_relative_and_home_paths(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in ("a.txt", "~/a.txt", "*.txt", tmp_path / "a.txt"):
        assert text_of(source, cache) == "here"
    assert len(list(cache.glob("*.tokens"))) == 2  # the file, however it is written, and the glob


def test_stdlib_is_the_library(cache: Path) -> None:
    names = {document.name for document in find_source("stdlib").documents}
    assert {"dataclasses.py", "json/decoder.py", "asyncio/tasks.py"} <= names
    folders = {part for name in names for part in name.split("/")[:-1]}
    excluded = {"test", "tests", "site-packages", "dist-packages", "__pycache__", "idlelib", "lib2to3"}
    assert not folders & excluded
    assert all(name.endswith(".py") and not name.startswith("_sysconfigdata") for name in names)
    data = open_dataset(DataConfig(), seq_length=128, seed=0, cache_dir=cache)
    assert data.num_train_tokens + data.num_validation_tokens > 3_000_000
    assert data.num_documents > 200
    assert "standard library of Python" in data.description


def test_bad_sources_are_one_line(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "corpus.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "a.bin").write_bytes(b"\0\1")
    (tmp_path / "data.gz").write_bytes(b"\x1f\x8b\x08\x00")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "nothing.txt").write_text("")
    cases: dict[str, tuple[str, ...]] = {
        f"{tmp_path}/corpus.text": ("did you mean", f"{tmp_path}/corpus.txt"),
        f"{tmp_path}/no/where.txt": (f"{tmp_path}/no/where.txt", f"'{tmp_path}/no'"),
        f"{tmp_path}/qqqq": ("looked in",),
        f"{tmp_path}/empty": (f"{tmp_path}/empty", "folder without"),
        f"{tmp_path}/binary": ("no text", f"{tmp_path}/binary", "1 file"),
        f"{tmp_path}/data.gz": ("data.gz", "not text", "unpack"),
        f"{tmp_path}/latin.txt": ("latin.txt", "not UTF-8", "byte 2", "convert"),
        f"{tmp_path}/nothing.txt": ("no text", "nothing.txt"),
        f"{tmp_path}/*.md": (f"{tmp_path}/*.md", "no files"),
        f"{tmp_path}/em*": ("folders", "**/*"),
        f"{tmp_path}/absent/*.txt": ("no files", f"'{tmp_path}/absent'"),
        "https://example.com/corpus.txt": ("URL", "download"),
        "s3://bucket/corpus": ("URL",),
        "": ("data.source", "empty"),
        "a\0b": ("data.source",),
        os.devnull: (os.devnull, "neither a file nor a folder"),
        "stdlibs": ("stdlibs",),
    }
    for source, names in cases.items():
        fails(source, cache, *names)
    assert not left_over(cache)


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.txt"
    path.write_text("so far")
    found = find_source(str(path))
    path.write_text("so far and further")
    with pytest.raises(DataError, match=r"log\.txt changed while"):
        load_tokens(found, ByteTokenizer(), cache)
    found = find_source(str(path))
    encode = ByteTokenizer.encode_batch

    def append_first(*arguments: Any) -> Any:
        path.write_text("now it is longer")
        return encode(*arguments)

    path.write_text("x" * (prepare.BATCH_BYTES + 1))
    found = find_source(str(path))
    monkeypatch.setattr(ByteTokenizer, "encode_batch", append_first)
    with pytest.raises(DataError, match=r"log\.txt changed while"):
        load_tokens(found, ByteTokenizer(), cache)
    path.unlink()
    with pytest.raises(DataError, match=r"log\.txt cannot be read: no such file"):
        load_tokens(found, ByteTokenizer(), cache)
    assert not left_over(cache)


# ---- chunks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "x" * (reading.CHUNK_BYTES - 1) + "€" + "y" * reading.CHUNK_BYTES + "ä",
        "😀" * reading.CHUNK_BYTES,
        " " * (2 * reading.CHUNK_BYTES),
        "\n" + "z" * (2 * reading.CHUNK_BYTES),
        "a" * reading.CHUNK_BYTES,
        "word\r\n" * reading.CHUNK_BYTES,
    ],
)
def test_chunks_are_bounded_and_lose_nothing(text: str, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode())
    with reading.Reader(find_source(str(tmp_path / "a.txt")).documents[0]) as reader:
        chunks = list(reader.chunks())
    assert all(len(chunk.text.encode()) <= reading.CHUNK_BYTES for chunk in chunks)
    assert [chunk.continues for chunk in chunks[:-1]] == [False] + [True] * (len(chunks) - 2)
    assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert "".join(chunk.text for chunk in chunks) == text_of(tmp_path / "a.txt", cache) == text


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz"])
def test_reading_resumes_after_any_chunk(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "CHUNK_BYTES", 1 << 10)
    path = tmp_path / name
    if "jsonl" in name:
        write_lines(path, [*some_texts(50), "long " * 1000, "", *some_texts(3)])
    else:
        data = source_code(30_000).encode()
        path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    document = find_source(str(path)).documents[0]

    def chunks(start: int) -> list[reading.Chunk]:
        with reading.Reader(document) as reader:
            return list(reader.chunks(start))

    whole = chunks(0)
    for index, chunk in enumerate(whole[:-1]):
        if chunk.end is not None:
            assert chunks(chunk.end) == whole[index + 1 :]
    assert sum(chunk.end is not None for chunk in whole) > 20


# ---- JSON lines and gzip files ----------------------------------------------------------------------------


def write_lines(path: Path, texts: list[str], key: str = "text") -> Path:
    data = "".join(json.dumps({"id": i, key: text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts))
    path.write_bytes(gzip.compress(data.encode()) if path.suffix.lower() == ".gz" else data.encode())
    return path


def some_texts(number: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [f"{i}: " + "wörter " * draw.randrange(1, 60) for i in range(number)]


def edges(size: int) -> list[int]:
    """Returns where blocks of lines begin, as documented: each is 1/1024 of what is before it, 64 bytes to 1 MB."""
    found, edge = [], 0
    while edge < size:
        found.append(edge)
        edge += min(1 << 20, max(64, edge // 1024))
    return found


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.jsonl.gz"])
def test_lines_are_documents_in_shuffled_blocks(name: str, tmp_path: Path, cache: Path) -> None:
    texts = some_texts(400)
    path = write_lines(tmp_path / name, texts)
    data = gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes()
    begins = edges(len(data))
    blocks: list[list[str]] = [[] for _ in begins]
    position = 0
    for line in data.splitlines(keepends=True):
        blocks[int(np.searchsorted(begins, position, side="right")) - 1].append(json.loads(line)["text"])
        position += len(line)
    order = rng.permutation(rng.key(0, "documents"), len(blocks))
    expected = [text for index in order for text in blocks[index]]
    file = make(path, cache)
    assert documents_of(file) == expected and file.num_documents == 400
    assert sorted(expected) == sorted(texts) and expected != texts
    starts = np.flatnonzero(np.append(EOT, file.tokens[:-1]) == EOT)
    np.testing.assert_array_equal(file.starts, starts)
    assert file.fingerprint == fingerprint_of(file)


def test_folders_mix_texts_lines_and_gzip_files(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_lines(folder / "a.jsonl", ["line one", "", "line three"], "body")
    write_lines(folder / "b.jsonl.gz", ["packed line"], "body")
    (folder / "c.txt").write_text("a plain text")
    (folder / "d.txt.gz").write_bytes(gzip.compress("ein gepackter Größenwahn".encode()))
    (folder / "e.txt.gz").write_bytes(gzip.compress(b"\x89PNG\0binary"))
    (folder / "f.bin").write_bytes(b"\xff\xfe")
    (folder / "g.jsonl").write_text("\n \r\n\n")
    (folder / "h.jsonl").write_bytes(b'\xef\xbb\xbf{"body": "after a byte order mark"}')
    expected = {"line one", "line three", "packed line", "a plain text", "ein gepackter Größenwahn"}
    expected.add("after a byte order mark")
    for source in (folder, f"{folder}/*"):
        file = make(source, cache, text_key="body")
        assert set(documents_of(file)) == expected and file.num_documents == 6
    fails(folder, cache, "a.jsonl, line 1", "'text'", "data.text_key", "id, body")
    config = DataConfig(source=str(folder), text_key="body", validation_fraction=0)
    assert open_dataset(config, 4, 0, cache).num_documents == 6


def test_the_tokens_depend_on_the_text_alone(bpe: Path, tmp_path: Path, cache: Path, small_chunks: None) -> None:
    """They are the same from a gzip file, with any number of threads, and those of the whole text."""
    tokenizer = get_tokenizer(str(bpe))
    text = source_code(200_000)
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode(), 1))
    write_lines(tmp_path / "a.jsonl", text.split("\n\n"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes(), 1))
    prints = {
        (name, number): make(tmp_path / name, cache / str(number), tokenizer, workers=number).fingerprint
        for name in ("a.txt", "a.txt.gz", "a.jsonl", "b.jsonl.gz")
        for number in (1, 2, 3)
    }
    assert len({value for (name, _), value in prints.items() if "jsonl" in name}) == 1
    tokens = np.array(tokenizer.encode(text), "<u2").tobytes()
    expected = hashlib.sha256(f"{tokenizer.name}\n".encode() + tokens).hexdigest()
    assert {value for (name, _), value in prints.items() if "txt" in name} == {expected}


def test_one_document_in_several_batches_has_no_end_of_text(tmp_path: Path, cache: Path, small_chunks: None) -> None:
    long = source_code(50_000)
    path = write_lines(tmp_path / "a.jsonl", ["short", long, "", long[::-1], "last"])
    assert sorted(documents_of(make(path, cache))) == sorted(["short", long, long[::-1], "last"])


def test_the_validation_part_is_a_fair_sample_of_sorted_lines(tmp_path: Path, cache: Path) -> None:
    """Lines sorted by class, 20 kB and 2 MB: the tail has its share of each class, up to chance."""
    for number, size in ((1000, 20), (4000, 500)):
        path = write_lines(tmp_path / f"{number}.jsonl", [chr(97 + 10 * i // number) * size for i in range(number)])
        tokens = make(path, cache).tokens
        tail = tokens[int(0.9 * len(tokens)) :]
        counts = np.array([(tail == 97 + i).sum() for i in range(10)]) / (tail != EOT).sum()
        assert counts.min() > 0.02 and counts.max() < 0.25, counts


BAD_LINES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "json": (b'{"text": "a"}\n{"text": ', ("line 2", "not JSON", "column 10")),
    "key": (b'{"text": "a"}\n\n{"texts": "a", "n": 1}', ("line 3", "'text'", "data.text_key", "did you mean texts")),
    "number": (b'{"text": 7}', ("line 1", "'text'", "a number")),
    "null": (b'{"text": null}', ("line 1", "null")),
    "object": (b'{"text": {"a": "b"}}', ("line 1", "an object")),
    "list": (b'["text"]', ("line 1", "a list", '{"text": ...}')),
    "plain": (b"just a text\n", ("line 1", "not JSON")),
    "utf-8": (b'{"text": "\xff"}', ("line 1", "not UTF-8")),
    "deep": (b'{"text": ' + b"[" * 100_000, ("line 1", "not JSON")),
    "digits": (b'{"text": ' + b"9" * 5000 + b"}", ("line 1",)),
    "surrogate": (b'{"text": "\\ud83d"}', ("line 1", "surrogate")),
    "binary": (b"\x80\x04\x95\0\0", ("line 1", "not UTF-8")),
    "empty": (b"", ("no text", "1 file")),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named(name: str, tmp_path: Path, cache: Path) -> None:
    content, names = BAD_LINES[name]
    (tmp_path / f"{name}.jsonl").write_bytes(content)
    (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(content))
    for file in (f"{name}.jsonl", f"{name}.jsonl.gz"):
        fails(tmp_path / file, cache, str(tmp_path / file), *names)
    assert not left_over(cache)


@pytest.mark.parametrize("name", ["a.ndjson", "a.NDJSON", "a.ndjson.gz", "a.jsonlines", "a.json", "a.JSON.GZ"])
def test_other_names_of_json_lines(name: str, tmp_path: Path, cache: Path) -> None:
    texts = ["first", "second"]
    file = make(write_lines(tmp_path / name, texts, "body"), cache, text_key="body")
    assert sorted(documents_of(file)) == texts and file.has_lines


def test_json_that_is_not_lines(tmp_path: Path, cache: Path) -> None:
    """A .json file without the key on its first line is text, but an array of texts is certainly no text."""
    for name, content in {"settings": '{"name": "x"}\n', "nested": '{\n "text": "x"\n}', "list": "[1, 2]"}.items():
        (tmp_path / f"{name}.json").write_text(content)
        assert text_of(tmp_path / f"{name}.json", cache) == content
    (tmp_path / "array.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=1))
    fails(tmp_path / "array.json", cache, "array.json", "JSON array", "jq -c '.[]' array.json")


def test_a_key_of_lines_without_lines_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text " * 9)
    write_lines(tmp_path / "a.jsonl", ["text " * 9], "body")
    config = DataConfig(text_key="body", validation_fraction=0)
    notes = {
        name: list(open_dataset(config.model_copy(update={"source": str(tmp_path / name)}), 4, 0).notes)
        for name in ("a.txt", "a.jsonl", "a.*")
    }
    assert notes["a.jsonl"] == notes["a.*"] == []
    assert is_one_line(notes["a.txt"][0], "data.text_key 'body'", "no effect", ".ndjson") and len(notes["a.txt"]) == 1


@pytest.mark.parametrize(
    ("name", "way_out"),
    [("a.parquet", "JSON lines"), ("a.PDF", "convert"), ("a.docx", "convert"), ("a.csv.gz", "unpack")]
    + [(f"a.jsonl.{suffix}", "unpack") for suffix in ("zst", "xz", "bz2", "zip")],
)
def test_binary_formats_are_refused_by_name(name: str, way_out: str, tmp_path: Path, cache: Path) -> None:
    """Also if their bytes are text by chance. Next to texts they are left out and named."""
    (tmp_path / name).write_text("PAR1")
    fails(tmp_path / name, cache, name, way_out)
    (tmp_path / "b.csv").write_text("a,b\n1,2\n")
    file = make(f"{tmp_path}/*", cache)
    assert documents_of(file) == ["a,b\n1,2\n"] and file.left_out.counts == {left_out.BINARY: 1}
    assert file.left_out.names[left_out.BINARY][0].startswith(f"{name}: ")


def test_byte_order_marks_are_no_text(tmp_path: Path, cache: Path) -> None:
    text = "größe\r\n" * 9000  # several chunks
    data = b"\xef\xbb\xbf" + text.encode()
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(data))
    assert text_of(tmp_path / "a.txt", cache) == text_of(tmp_path / "b.txt.gz", cache) == text
    (tmp_path / "only.txt").write_bytes(b"\xef\xbb\xbf")
    fails(tmp_path / "only.txt", cache, "no text", "empty")
    for encoding in ("utf-16-le", "utf-16-be"):
        (tmp_path / "wide.txt").write_bytes("\ufefftext".encode(encoding))
        fails(tmp_path / "wide.txt", cache, "wide.txt", "UTF-16", "iconv")


def test_one_bad_byte_loses_nothing_in_silence(tmp_path: Path, cache: Path) -> None:
    """data.errors decides: the default stops; each of the others counts and names what it does."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "big.txt").write_bytes(b"x" * 450_000 + b"\xff")
    write_lines(corpus / "lines.jsonl", ["", "good"])
    (corpus / "lines.jsonl").open("ab").write(b'{"text": "b\xffd"}\n')
    fails(corpus, cache, f"{corpus}/big.txt", "byte 450000", "data.errors=replace", "data.errors=skip")
    skipped = make(corpus, cache, errors="skip")
    assert documents_of(skipped) == ["good"]
    assert skipped.left_out.names == {
        left_out.NOT_UTF8: ["big.txt: is not UTF-8 text (invalid start byte at byte 450000)"],
        left_out.EMPTY_LINES: ["lines.jsonl line 1"],
        left_out.BAD_LINES: ["lines.jsonl line 3: not UTF-8 (invalid start byte)"],
    }
    assert make(corpus, cache, errors="skip").left_out.names == skipped.left_out.names  # from the cache
    fails(corpus, cache, f"{corpus}/big.txt")  # what is cached for skip is no answer to stop
    replaced = make(corpus, cache, errors="replace")
    assert sorted(documents_of(replaced)) == sorted(["x" * 450_000 + "\ufffd", "good", "b\ufffdd"])
    assert replaced.left_out.counts == {left_out.REPLACED: 2, left_out.EMPTY_LINES: 1}


@pytest.mark.parametrize("name", ["a.txt", "b.txt.gz", "c.jsonl"])
def test_a_pointer_of_git_lfs_is_no_text(name: str, tmp_path: Path, cache: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "good.txt").write_text("good")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"
    (corpus / name).write_text(pointer)
    (corpus / "model.bin").write_text(pointer)
    fails(corpus, cache, f"{corpus}/{name}", "Git LFS pointer", "git lfs pull", "data.errors=skip")
    skipped = make(corpus, cache, errors="skip")
    assert documents_of(skipped) == ["good"]
    assert set(skipped.left_out.names) == {left_out.DAMAGED, left_out.BINARY}


def test_what_is_left_out_is_said_and_recorded(tmp_path: Path, capsys: Any, no_plots: None) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text(source_code(4000))
    (corpus / "photo.png").write_bytes(b"\x89PNG\0")
    (corpus / "empty.txt").write_text("")
    config = tiny(tmp_path, f"data.source={corpus}", "training.max_steps=1", "training.eval_every=null")
    (tmp_path / "my.yaml").write_text(config.to_yaml())
    assert main(["prepare", str(tmp_path / "my.yaml"), "--quiet"]) == 0
    said = capsys.readouterr().out.splitlines()[1]
    assert is_one_line(said, "binary files, left out: 1 (photo.png", "empty files: 1 (empty.txt)")
    assert main(["train", str(tmp_path / "my.yaml"), "--run", str(tmp_path / "run"), "--backend", "torch"]) == 0
    assert said in " ".join(capsys.readouterr().err.split())
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"step": 0, "note": said} in records
    options = ["--train-tokenizer", "bpe", "--vocab-size", "300", "--out", str(tmp_path / "t.json"), "--quiet"]
    assert main(["prepare", str(corpus), *options]) == 0
    assert said in capsys.readouterr().out.splitlines()


def test_damaged_gzip_files_are_named(tmp_path: Path, cache: Path) -> None:
    whole = gzip.compress(source_code(50_000).encode())
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 0xFF
    for name, content, expected in (
        ("cut.txt.gz", whole[: len(whole) // 2], ("ends too early", "gzip")),
        ("crc.txt.gz", bytes(changed), ()),
        ("not.txt.gz", b"a plain text", ("damaged", "gzip")),
        ("cut.jsonl.gz", whole[:100], ()),
        ("binary.txt.gz", gzip.compress(b"ab\0"), ("not UTF-8", "NUL byte at byte 2")),
        ("none.txt.gz", gzip.compress(b""), ("no text",)),
        ("empty.txt.gz", b"", ("no text",)),
    ):
        (tmp_path / name).write_bytes(content)
        fails(tmp_path / name, cache, name, *expected)
    (tmp_path / "several.txt.gz").write_bytes(gzip.compress(b"one, ") + gzip.compress(b"two"))
    assert text_of(tmp_path / "several.txt.gz", cache) == "one, two"


def test_long_lines(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "0123456789abcdef" * (20 << 16)  # 20 MB
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "one"}}\n{{"text": "{text}"}}\n{{"text": "three"}}\n')
    file = make(path, cache)
    begins = file.starts.tolist()
    ends = [*begins[1:], len(file.tokens) + 1]
    lengths = sorted(end - begin - 1 for begin, end in zip(begins, ends, strict=True))
    assert lengths == [3, 5, len(text)]
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 1 << 24)
    os.utime(path)
    fails(path, cache, "a.jsonl", "line", "16 MB", "JSON")


# ---- the cache --------------------------------------------------------------------------------------------


def test_fingerprint_is_of_tokenizer_and_tokens(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.txt").write_text("häuser")
    file = make(tmp_path / "a.txt", cache)
    little_endian = b"".join(byte.to_bytes(2, "little") for byte in "häuser".encode())
    assert file.fingerprint == hashlib.sha256(b"bytes\n" + little_endian).hexdigest()
    assert file.tokens.dtype == np.uint16 and isinstance(file.tokens, np.memmap)


def test_files_that_are_not_text_leave_no_trace(tmp_path: Path, cache: Path) -> None:
    for folder in ("with", "without"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m.txt").write_text("the only text")
    (tmp_path / "with" / "a.bin").write_bytes(b"b" * (2 * prepare.BATCH_BYTES) + b"\xc3")
    (tmp_path / "with" / "z.bin").write_bytes(b"begins as text \xc3\x28")
    files = [make(tmp_path / folder, cache) for folder in ("with", "without")]
    assert files[0].fingerprint == files[1].fingerprint and files[0].fingerprint == fingerprint_of(files[0])


def test_made_once_and_again_when_the_source_changes(tmp_path: Path, cache: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("first")
    first = make(source, cache)
    written = first.path.stat().st_mtime_ns
    assert make(source, cache).path == first.path and first.path.stat().st_mtime_ns == written
    source.write_text("other")
    os.utime(source, ns=(1, 1))
    assert text_of(source, cache) == "other"
    if sys.platform != "win32":  # where st_ctime is the time of creation
        source.write_text("third")  # as cp -p, rsync -t and tar do: of equal size and time of modification
        os.utime(source, ns=(1, 1))
        assert text_of(source, cache) == "third"
    assert len(left_over(cache)) == 1  # the old one is removed
    assert bytes(first.tokens.tolist()) == b"first"  # and still complete for a process that has it open


@pytest.mark.parametrize("damage", ["truncated", "longer", "header", "empty", "json", "count"])
def test_a_damaged_token_file_is_made_again(tmp_path: Path, cache: Path, damage: str) -> None:
    source = tmp_path / "a.txt"
    source.write_text("some text of some length")
    path = make(source, cache).path
    data = path.read_bytes()
    changed = {
        "truncated": data[:-3],
        "longer": data + b"\0\0",
        "header": b"\xff" * HEADER_BYTES + data[HEADER_BYTES:],
        "empty": b"",
        "json": b"[1]".ljust(HEADER_BYTES) + data[HEADER_BYTES:],
        "count": data.replace(b'"tokens": 24', b'"tokens": -4'),
    }[damage]
    assert changed != data
    path.unlink()
    path.write_bytes(changed)
    assert text_of(source, cache) == "some text of some length"
    assert path.read_bytes() == data


def test_abandoned_files_are_removed(tmp_path: Path, cache: Path) -> None:
    """Old ones of IceNet. The folder may be one of the user: a download there stays, however old it is."""
    cache.mkdir()
    hour, day = 3600, 86400
    old, fresh = "0123456789ab", "ba9876543210"
    kept = [f".{fresh}-0.tokens.1-ab.tmp", f"{fresh}.partial", f"{fresh}.shards", "movie.partial", "thesis.tmp"]
    ages = {f".{old}-0.tokens.1-ab.tmp": 2 * hour, f"{old}.partial": 8 * day, f"{old}.shards": 8 * day}
    ages |= dict(zip(kept, (0, 6 * day, 6 * day, 99 * day, 99 * day), strict=True))
    for name, age in ages.items():
        (cache / name).write_bytes(b"half") if name.endswith("tmp") else (cache / name).mkdir()
        os.utime(cache / name, (time.time() - age, time.time() - age))
    (tmp_path / "a.txt").write_text("text")
    make(tmp_path / "a.txt", cache)
    # another process may be using the fresh ones
    assert sorted(path.name for path in cache.iterdir() if path.suffix not in (".tokens", ".lock")) == sorted(kept)


def test_cache_folder_by_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text " * 10)
    monkeypatch.setenv("ICENET_CACHE", str(tmp_path / "here"))
    open_dataset(DataConfig(source=str(tmp_path / "a.txt"), validation_fraction=0), 4, 0)
    assert len(list((tmp_path / "here").glob("*.tokens"))) == 1
    monkeypatch.delenv("ICENET_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / ".cache" / "icenet"


# ---- kills, full disks, several processes -----------------------------------------------------------------

PREPARE = """
    import sys
    from pathlib import Path
    from icenet.core.data.text import prepare, reading
    from icenet.core.data.text.cache import load_tokens
    from icenet.core.data.text.sources import find_source
    from icenet.core.errors import DataError, FileError
    from icenet.core.tokenizers import get_tokenizer
    source, cache, tokenizer, workers = sys.argv[1:]
    source, tokenizer = find_source(source), get_tokenizer(tokenizer)
    prepare.SAVE_SECONDS, prepare.BATCH_BYTES = 0.0, 1 << 18
    {before}
    try:
        print(load_tokens(source, tokenizer, Path(cache), errors="skip", workers=int(workers)).fingerprint)
    except DataError as error:
        print("DataError:", error)
    except FileError as error:
        print("FileError:", error)
"""


def preparation(
    source: Path, cache: Path, tokenizer: Path | str = "bytes", workers: int = 1, before: str = ""
) -> subprocess.Popen[str]:
    """Starts a process that makes the tokens of a source, after the statements `before`."""
    program = textwrap.dedent(PREPARE).format(before=textwrap.dedent(before).strip())
    return start_python(program, source, cache, tokenizer, str(workers))


def output(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=120)[0].strip()


def prepared_with_kills(source: Path, cache: Path, tokenizer: Path, kills: int, size: int) -> tuple[str, int]:
    """Kills the preparation up to `kills` times, each time when its unfinished work has reached a random size.

    Args:
        source, cache, tokenizer: As for `preparation`.
        kills: Number of kills.
        size: Size of the finished work in bytes.

    Returns:
        Its output in the end, and the number of kills.
    """
    draw = random.Random(7)
    killed = 0
    for share in sorted(draw.uniform(0, 0.6) for _ in range(kills)):
        process = preparation(source, cache, tokenizer, draw.choice([1, 2, 3]))
        while process.poll() is None and unfinished_bytes(cache) <= share * size:
            time.sleep(0.002)
        if process.poll() is None:
            process.kill()
            killed += 1
        process.communicate()
    return output(preparation(source, cache, tokenizer, 2)), killed


def unfinished_bytes(cache: Path) -> int:
    """Returns the size of the tokens in unfinished work; -1 before it begins or after it ends."""
    try:
        return max((path.stat().st_size for path in cache.glob("*.partial/tokens")), default=-1)
    except OSError:  # removed meanwhile
        return -1


@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_kills_at_random_moments_leave_the_same_file(kills: int, bpe: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    text = source_code(500_000) * 20 if kills > 10 else source_code(200_000)
    write_lines(corpus / "a.jsonl", text.split("\n\n"))
    write_lines(corpus / "b.jsonl.gz", text.split("\n"))
    (corpus / "c.txt").write_text(text)
    (corpus / "late").write_bytes(text.encode() + b"\xff")
    expected = output(preparation(corpus, tmp_path / "whole", bpe, 1))
    assert len(expected) == 64, expected
    whole = next((tmp_path / "whole").glob("*.tokens"))
    said, killed = prepared_with_kills(corpus, tmp_path / "killed", bpe, kills, whole.stat().st_size)
    assert said == expected and killed > 1
    files = [whole, next((tmp_path / "killed").glob("*.tokens"))]
    assert files[0].name == files[1].name and files[0].read_bytes() == files[1].read_bytes()
    assert [len(left_over(tmp_path / folder)) for folder in ("whole", "killed")] == [1, 1]


class Stop(BaseException):
    """Ends a preparation at a chosen moment."""


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "folder"])
def test_stops_after_every_batch_leave_the_same_file(
    name: str, tmp_path: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt ends without warning at the first batch after it has saved its progress."""
    text = source_code(150_000)
    if name == "folder":
        source = tmp_path / "folder"
        source.mkdir()
        for index in range(10):
            (source / f"{index}.txt").write_text(text[index * 5000 : index * 9000])
        write_lines(source / "lines.jsonl", text.split("\n\n"))
        (source / "late").write_bytes(text.encode() + b"\xff")
    else:
        source = tmp_path / name
        data = text.encode()
        if "jsonl" in name:
            data = "".join(json.dumps({"text": part}) + "\n" for part in text.split("\n\n")).encode()
        source.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    whole = make(source, tmp_path / "whole", errors="skip")
    encode, save = ByteTokenizer.encode_batch, prepare.PartialTokens.save
    saved, attempts = False, 0

    def encode_or_stop(*arguments: Any) -> Any:
        if saved:
            raise Stop
        return encode(*arguments)

    def save_and_note(self: prepare.PartialTokens) -> None:
        nonlocal saved
        save(self)
        saved = True

    monkeypatch.setattr(ByteTokenizer, "encode_batch", encode_or_stop)
    monkeypatch.setattr(prepare.PartialTokens, "save", save_and_note)
    while attempts < 200:
        saved, attempts = False, attempts + 1
        try:
            stopped = make(source, tmp_path / "stopped", errors="skip")
            break
        except Stop:
            partial = next((tmp_path / "stopped").glob("*.partial"))
            for part in ("tokens", "blocks"):  # what a killed process wrote after its journal
                with open(partial / part, "ab") as file:
                    file.write(b"garbage")
    assert 5 < attempts < 200 and stopped.path.read_bytes() == whole.path.read_bytes()
    assert len(left_over(tmp_path / "stopped")) == 1


def batches_of(monkeypatch: pytest.MonkeyPatch, function: Callable[[], object]) -> list[str]:
    """Returns the texts that a call encodes."""
    encode, texts = ByteTokenizer.encode_batch, list[str]()
    with monkeypatch.context() as patch:
        patch.setattr(
            ByteTokenizer, "encode_batch", lambda self, batch, *more: texts.extend(batch) or encode(self, batch)
        )
        function()
    return texts


def test_documents_before_a_bad_line_are_not_encoded_again(
    tmp_path: Path, cache: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    lines = {f"{i}.jsonl": some_texts(300, i) for i in range(4)}
    for name, texts in lines.items():
        write_lines(corpus / name, texts)
    expected = make(corpus, tmp_path / "other").fingerprint
    with open(corpus / "3.jsonl", "a") as file:
        file.write("not JSON\n")
    fails(corpus, cache, "3.jsonl, line 301", "not JSON")
    write_lines(corpus / "3.jsonl", lines["3.jsonl"])  # corrected
    found: list[TokenFile] = []
    encoded = batches_of(monkeypatch, lambda: found.append(make(corpus, cache)))
    assert found[0].fingerprint == expected
    assert encoded == lines["3.jsonl"]
    assert len(left_over(cache)) == 1


@pytest.mark.parametrize("damage", ["journal", "tokens", "blocks", "version", "changed"])
def test_unfinished_work_that_does_not_fit_is_not_used(
    damage: str, tmp_path: Path, cache: Path, small_chunks: None
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_lines(corpus / "a.jsonl", some_texts(300))
    write_lines(corpus / "b.jsonl", [*some_texts(300), "\ud83d".encode("utf-16", "surrogatepass").decode("latin-1")])
    (corpus / "c.jsonl").write_text("bad")
    fails(corpus, cache, "c.jsonl, line 1")
    partial = next(cache.glob("*.partial"))
    if damage == "journal":
        (partial / "journal.json").write_text("{")
    elif damage in ("tokens", "blocks"):
        os.truncate(partial / damage, (partial / damage).stat().st_size - 1)
    elif damage == "version":
        (partial / "journal.json").write_text(json.dumps({"documents": "", "position": {"unknown": 1}}))
    else:
        write_lines(corpus / "a.jsonl", some_texts(300, seed=1))
    (corpus / "c.jsonl").write_text('{"text": "good"}')
    assert make(corpus, cache).fingerprint == make(corpus, tmp_path / "other").fingerprint


@posix
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_loses_nothing(workers: int, bpe: Path, tmp_path: Path, cache: Path) -> None:
    """Files may be no larger than 400 kB: the partial file fits, the token file with the starts does not."""
    write_lines(tmp_path / "a.jsonl", [f"a{i}b" for i in range(20_000)])
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))"
    said = output(preparation(tmp_path / "a.jsonl", cache, bpe, workers, limit))
    assert said.startswith("FileError: ")
    assert is_one_line(said, str(cache), "no space left", "ICENET_CACHE", "kept for the next attempt")
    assert [name.split(".")[1] for name in left_over(cache)] == ["partial"]
    broken = "get_tokenizer(sys.argv[3]).__class__.encode = None; reading.Reader = None"  # nothing is left to encode
    again = output(preparation(tmp_path / "a.jsonl", cache, bpe, 1, broken))
    assert again == make(tmp_path / "a.jsonl", tmp_path / "other", get_tokenizer(str(bpe))).fingerprint


@posix
def test_no_space_and_no_permission_are_one_line(tmp_path: Path, cache: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("long enough " * 1000)
    # Python would cut its own compiled modules off at the limit, and keep them
    limit = "sys.dont_write_bytecode = True; import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))"
    said = output(preparation(source, cache, before=limit))
    assert said.startswith("FileError: ") and is_one_line(said, str(cache), "no space left", "ICENET_CACHE")
    assert not left_over(cache)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError) as caught:
        make(source, tmp_path / "file" / "cache")
    assert is_one_line(caught.value, str(tmp_path / "file" / "cache"), "ICENET_CACHE")


# numpy imports mmap late, the cache filelock, from where a user without rights may not be allowed to read
NO_RIGHTS = """
import filelock, mmap, os
if os.getuid() == 0:
    os.setuid(65534)
"""


@posix
def test_without_write_permission_the_cache_is_read() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        folder, cache = Path(name), Path(name, "cache")
        folder.chmod(0o755)
        (folder / "a.txt").write_text("cached")
        (folder / "b.txt").write_text("not cached")
        fingerprint = make(folder / "a.txt", cache).fingerprint
        cache.chmod(0o555)
        said = [output(preparation(folder / file, cache, before=NO_RIGHTS)) for file in ("a.txt", "b.txt")]
        cache.chmod(0o755)
    assert said[0] == fingerprint
    assert said[1].startswith("FileError: ") and is_one_line(said[1], str(cache), "permission denied", "ICENET_CACHE")


@posix
def test_a_source_without_read_permission() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        (folder / "secret.txt").write_text("no")
        (folder / "secret.txt").chmod(0)
        said = output(preparation(folder / "secret.txt", folder / "cache", before=NO_RIGHTS))
    assert said.startswith("DataError: ") and is_one_line(said, f"{folder}/secret.txt", "permission denied")


def test_two_processes_and_kills_leave_a_complete_cache(tmp_path: Path, cache: Path) -> None:
    source = tmp_path / "big.txt"
    source.write_bytes(b"0123456789abcdef" * (1 << 19))  # 8 MB
    for delay in (0.0, 0.05):
        process = preparation(source, cache, before="print('up', flush=True)")
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    together = [preparation(source, cache) for _ in range(2)]
    said = [output(process) for process in together]
    expected = hashlib.sha256(b"bytes\n" + np.frombuffer(source.read_bytes(), np.uint8).astype("<u2").tobytes())
    assert said == [expected.hexdigest()] * 2
    assert fingerprint_of(make(source, cache)) == expected.hexdigest()
    assert len(left_over(cache)) == 1


# ---- files larger than memory -----------------------------------------------------------------------------

LIMIT_MEMORY = """
import resource, re
import numpy
from icenet.core import files, rng
tokenizer.encode("load what is loaded late")
used = int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) << 10
resource.setrlimit(resource.RLIMIT_DATA, (used + ({megabytes} << 20), used + ({megabytes} << 20)))
prepare.SAVE_SECONDS, prepare.BATCH_BYTES = 2.0, 1 << 20
"""


@linux
@pytest.mark.parametrize(
    ("size", "name", "memory", "hf"),
    [
        (48, "a.txt", 40, False),
        (48, "a.jsonl.gz", 40, False),
        pytest.param(150, "a.jsonl", 110, True, marks=pytest.mark.slow),
        pytest.param(150, "a.txt", 110, True, marks=pytest.mark.slow),
    ],
)
def test_a_file_larger_than_memory(size: int, name: str, memory: int, hf: bool, bpe: Path, tmp_path: Path) -> None:
    """A text of `size` MB, in a process that may use `memory` MB more than it does before it reads."""
    line = json.dumps({"text": "0123456789 abcdef " * 50}).encode() + b"\n"
    part = line * ((1 << 20) // len(line)) if "jsonl" in name else source_code(1 << 20).encode()
    with open(tmp_path / name, "wb") as file:
        into: Any = gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1) if name.endswith("gz") else file
        for _ in range(size):
            into.write(part)
        into.close()
    limit = LIMIT_MEMORY.format(megabytes=memory)
    said = preparation(tmp_path / name, tmp_path / "cache", bpe if hf else "bytes", 1, limit).communicate()[0].strip()
    assert len(said) == 64, said
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / name).unlink()


# ---- icenet prepare ---------------------------------------------------------------------------------------


def test_prepare_makes_what_train_reads(bpe: Path, here: Path, capsys: Any, no_plots: None) -> None:
    config = tiny(here, "model.vocab_size=400", "training.max_steps=2", "training.eval_every=null")
    (here / "conf").mkdir()
    shutil.copy(bpe, here / "conf" / "t.json")
    shutil.copy(bpe, here / "tokenizer.json")
    config.data.tokenizer = "t.json"  # next to the configuration
    (here / "conf" / "my.yaml").write_text(config.to_yaml())

    def run(*arguments: str) -> str:
        assert main(list(arguments)) == 0
        output = capsys.readouterr()
        assert output.err == "" or arguments[0] == "train"
        return str(output.out)

    first = run("prepare", "conf/my.yaml")
    assert re.match(r"[\d,]+ tokens of 1 \w+ \(0\.\d MB\) in /.*\.tokens\n", first)
    files = left_over(here / "cache")
    time.sleep(0.1)
    again = run("prepare", "conf/my.yaml", "--workers", "2")
    assert again.endswith(first) and again != first  # "already prepared"
    run("train", "conf/my.yaml", "--run", "run", "--backend", "torch")
    named = run("prepare", "conf/my.yaml", "--set", "data.tokenizer=tokenizer.json")
    assert named == again  # in the working folder; its content decides
    assert left_over(here / "cache") == files
    file = next((here / "cache").glob("*.tokens"))
    content = file.read_bytes()
    file.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    os.utime(file, (0, 0))
    repaired = run("prepare", "conf/my.yaml")
    assert repaired.startswith(first) and "damaged" in repaired and file.read_bytes() == content


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["text.txt"], ("text.txt", "CONFIG", "data.source", "--train-tokenizer")),
        (["stdlib"], ("stdlib", "CONFIG", "--train-tokenizer")),
        (["quickstart", "--out", "x"], ("--out", "--train-tokenizer")),
        (["quickstart", "--vocab-size", "0"], ("--vocab-size", "--train-tokenizer")),
        (["quickstart", "--set", "data.tokenizer=none.json"], ("data.tokenizer", "none.json", "no such file")),
        (["quickstart", "--set", "model.vocab_size=200"], ("model.vocab_size", "200", "257", "bytes")),
        (["cnn-small"], ("data.kind", "images", "text")),
        (["text.txt", "--train-tokenizer", "bpe", "--workers", "2"], ("--workers", "CONFIG")),
        (["text.txt", "--train-tokenizer", "bpe", "--vocab-size", "0"], ("--vocab-size 0", "257")),
        (["none.yaml"], ("none.yaml",)),
    ],
)
def test_prepare_refuses(arguments: list[str], names: tuple[str, ...], here: Path, capsys: Any) -> None:
    (here / "text.txt").write_text("a text")
    assert main(["prepare", *arguments]) == 2
    assert is_one_line(capsys.readouterr().err, "icenet: ", *names)


def test_an_interrupt_reports_that_the_work_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from icenet.commands import prepare as command

    def stopped(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "dataset_for", stopped)
    with pytest.raises(IceNetError) as caught:
        command.prepare(tiny(tmp_path), quiet=True)
    assert is_one_line(caught.value, "Ctrl-C", "kept", "same command")
