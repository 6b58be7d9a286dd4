"""Text sources: files and folders, reading in chunks, JSON lines and gzip files.

Expected values come from `tokenizers`, `json` and `gzip`, or from a loop written here.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import is_one_line, source_code, tiny
from token_files import fails, fingerprint_of, left_over, make, some_texts, text_of, write_lines

from icenet.cli.main import main
from icenet.core import listing, rng
from icenet.core.config import DataConfig
from icenet.core.data.datasets import open_dataset
from icenet.core.data.text import left_out, prepare, reading
from icenet.core.data.text.cache import load_tokens
from icenet.core.data.text.sources import find_source
from icenet.core.data.text.token_file import TokenFile
from icenet.core.errors import DataError
from icenet.core.runs import run_folder
from icenet.core.tokenizers import get_tokenizer
from icenet.core.tokenizers.bytes import ByteTokenizer

EOT = 256


def documents_of(file: TokenFile) -> list[str]:
    """Returns the text of each document, by a loop."""
    found: list[list[int]] = [[]]
    for token in file.tokens.tolist():
        found.append([]) if token == EOT else found[-1].append(token)
    return [bytes(tokens).decode() for tokens in found]


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
