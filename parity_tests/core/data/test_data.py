"""Text data: which tokens, which windows, in which order, and what is said when it cannot be."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from icenet.core import rng
from icenet.core.config import DataConfig
from icenet.core.data.datasets import ByteTokenizer, TextDataset, get_tokenizer, open_dataset
from icenet.core.data.text import cache as cache_module
from icenet.core.data.text.cache import HEADER_BYTES, load_tokens
from icenet.core.data.text.sources import CHUNK_BYTES, find_source
from icenet.core.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[3]
EOT = 256


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def tokens_of(source: str | Path, cache: Path) -> list[int]:
    return list(map(int, load_tokens(find_source(str(source)), ByteTokenizer(), cache).tokens))


def counting(n: int, seq_length: int, seed: int = 0, fraction: float = 0.0) -> TextDataset:
    """A data set in which each token is its own position."""
    return TextDataset(np.arange(n), ByteTokenizer(), seq_length=seq_length, seed=seed, validation_fraction=fraction)


# ---- tokenizer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "plain", "zażółć gęślą jaźń", "日本語 🎿\n\r\n\t", "\0\x7f"])
def test_any_text_comes_back(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode([EOT, *ids, EOT]) == text
    assert tokenizer.decode(np.array(ids, np.int32)) == text


def test_decode_never_fails() -> None:
    assert ByteTokenizer().decode([0xE2, 0x82, ord("a")]) == "�a"
    assert ByteTokenizer().decode([ord("a"), 257, ord("b"), -1, 256, 50_000]) == "a�b��"  # a larger vocabulary's


def test_text_that_is_no_text() -> None:
    assert ByteTokenizer().encode("a\udcff") == [97, 255]  # a byte of the command line that is no UTF-8
    with pytest.raises(DataError, match="surrogate at 1"):
        ByteTokenizer().encode("a\ud83d")


def test_tokenizer_by_name() -> None:
    assert get_tokenizer("bytes").vocab_size == 257
    with pytest.raises(DataError, match="did you mean 'bytes'"):
        get_tokenizer("byte")


# ---- sources ----------------------------------------------------------------------------------------------


def test_one_file_is_its_bytes(tmp_path: Path, cache: Path) -> None:
    data = "eins\r\nzwei\näöü".encode()
    (tmp_path / "a.txt").write_bytes(data)
    assert tokens_of(tmp_path / "a.txt", cache) == list(data)


def test_characters_across_chunks(tmp_path: Path, cache: Path) -> None:
    text = "x" * (CHUNK_BYTES - 1) + "€" + "y" * CHUNK_BYTES + "ä"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert bytes(tokens_of(tmp_path / "a.txt", cache)).decode() == text


def test_folder_takes_text_only_and_orders_by_drawn_permutation(tmp_path: Path, cache: Path) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "sub" / ".hidden").mkdir(parents=True)
    files = {f"sub/{i}.txt": f"text {i}".encode() for i in range(6)}
    files |= {"a.txt": b"first", "empty.txt": b"", "z.md": "ź".encode()}
    binary = {"image.png": b"\x89PNG\r\n", "zeros": b"abc\0def", "late": b"a" * (CHUNK_BYTES + 5) + b"\xff"}
    hidden = {".dot": b"no", "sub/.hidden/x.txt": b"no"}
    for name, data in (files | binary | hidden).items():
        (corpus / name).write_bytes(data)
    listed = sorted(files | binary)
    order = [listed[i] for i in rng.permutation(rng.key(0, "documents"), len(listed))]
    expected: list[int] = []
    for name in order:
        if files.get(name):
            expected += ([EOT] if expected else []) + list(files[name])
    assert order != listed
    assert tokens_of(corpus, cache) == expected
    assert open_dataset(DataConfig(source=str(corpus), validation_fraction=0), 4, 0, cache).num_documents == 8


def test_links_are_followed_but_not_round_in_circles(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.txt").write_text("linked")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "link").symlink_to(tmp_path / "elsewhere")
    (corpus / "loop").symlink_to(corpus)
    (corpus / "broken").symlink_to(tmp_path / "nowhere")
    assert [document.name for document in find_source(str(corpus)).documents] == ["link/x.txt"]


def test_glob(tmp_path: Path, cache: Path) -> None:
    for name in ("a.txt", "d/b.txt", "d/e/c.txt", "d/no.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    names = [document.name for document in find_source(f"{tmp_path}/**/*.txt").documents]
    assert names == ["a.txt", "d/b.txt", "d/e/c.txt"]
    (tmp_path / "odd[1].txt").write_text("its name is a pattern")
    assert bytes(tokens_of(tmp_path / "odd[1].txt", cache)) == b"its name is a pattern"


def test_relative_and_home_paths(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert bytes(tokens_of("a.txt", cache)) == b"here"
    assert bytes(tokens_of("~/a.txt", cache)) == b"here"
    assert bytes(tokens_of("*.txt", cache)) == b"here"
    load_tokens(find_source(str(tmp_path / "a.txt")), ByteTokenizer(), cache)
    assert len(list(cache.glob("*.tokens"))) == 2  # one file, however written, and one glob


def test_stdlib_is_the_library(cache: Path) -> None:
    found = find_source("stdlib")
    names = {document.name for document in found.documents}
    assert {"dataclasses.py", "json/decoder.py", "asyncio/tasks.py"} <= names
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {
        "test",
        "tests",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "idlelib",
        "lib2to3",
    }
    assert all(name.endswith(".py") and not name.startswith("_sysconfigdata") for name in names)
    data = open_dataset(DataConfig(), seq_length=128, seed=0, cache_dir=cache)
    assert data.num_train_tokens + data.num_validation_tokens > 3_000_000
    assert data.num_documents > 200
    assert "standard library of Python" in data.description


# ---- windows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "seq_length", "batch_size"), [(1000, 7, 4), (64, 16, 3), (33, 16, 1), (500, 1, 5)])
def test_an_epoch_covers_windows_once(n: int, seq_length: int, batch_size: int) -> None:
    data = counting(n, seq_length, seed=3)
    steps = data.steps_per_epoch(batch_size)
    assert steps == ((n - seq_length) // seq_length) // batch_size
    for epoch in range(3):
        starts = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            assert data.epoch_of(step, batch_size) == epoch
            batch = data.train_batch(step, batch_size)
            assert batch["inputs"].shape == batch["labels"].shape == (batch_size, seq_length)
            assert batch["inputs"].dtype == batch["labels"].dtype == np.int32
            # every token is its position, so a window counts up, and its labels are one further on
            np.testing.assert_array_equal(
                batch["inputs"], batch["inputs"][:, :1] + np.arange(seq_length, dtype=np.int32)
            )
            np.testing.assert_array_equal(batch["labels"], batch["inputs"] + 1)
            assert batch["labels"].max() < n
            starts += batch["inputs"][:, 0].tolist()
        assert len({start % seq_length for start in starts}) == 1
        assert len(set(starts)) == len(starts) == steps * batch_size


def test_order_is_a_pure_function_of_seed_and_step() -> None:
    data = counting(5000, 8, seed=1)
    forward = [data.train_batch(step, 16)["inputs"] for step in range(100)]
    fresh = counting(5000, 8, seed=1)
    for step in (99, 0, 50, 38, 39, 3):
        np.testing.assert_array_equal(fresh.train_batch(step, 16)["inputs"], forward[step])
    assert not np.array_equal(counting(5000, 8, seed=2).train_batch(0, 16)["inputs"], forward[0])
    steps = data.steps_per_epoch(16)
    firsts = [np.sort(np.concatenate([b[:, 0] for b in forward[e * steps : (e + 1) * steps]])) for e in (0, 1)]
    assert (firsts[0] % 8)[0] != (firsts[1] % 8)[0]  # another offset (by this seed) in each epoch
    assert not np.array_equal(forward[0] % 5000, forward[steps] % 5000)
    with pytest.raises(ValueError, match="from 0"):
        data.train_batch(-1, 16)


def test_documented_formula_of_the_order() -> None:
    """The windows of a step, computed here from the random words alone."""
    data = counting(999, 10, seed=5)
    windows, batch_size = (999 - 10) // 10, 9
    steps = windows // batch_size
    step = steps + 4
    offset = int(rng.bits(rng.key(5, "data offset", 1), 1)[0]) % 10
    order = rng.permutation(rng.key(5, "data", 1), windows)
    expected = offset + 10 * order[4 * batch_size : 5 * batch_size]
    np.testing.assert_array_equal(data.train_batch(step, batch_size)["inputs"][:, 0], expected)


def test_validation_is_the_tail_and_always_the_same() -> None:
    data = counting(1000, 9, fraction=0.25)
    assert (data.num_train_tokens, data.num_validation_tokens) == (750, 250)
    every = list(data.validation_batches(4))
    starts = np.concatenate([batch["inputs"][:, 0] for batch in every])
    np.testing.assert_array_equal(starts, 750 + 9 * np.arange(249 // 9))
    assert [len(batch["inputs"]) for batch in every] == [4] * 6 + [3]
    assert all((batch["labels"] == batch["inputs"] + 1).all() and batch["labels"].max() < 1000 for batch in every)
    some = [batch["inputs"][:, 0] for batch in data.validation_batches(4, 3)]
    np.testing.assert_array_equal(some, [batch["inputs"][:, 0] for batch in data.validation_batches(4, 3)])
    spread = np.concatenate(some)
    assert len(set(spread.tolist())) == 12 and set(spread.tolist()) <= set(starts.tolist())
    assert spread[0] == 750 and spread[-1] > 950 and np.ptp(np.diff(spread)) <= 9
    trained = np.concatenate([data.train_batch(step, 8)["labels"].ravel() for step in range(40)])
    assert trained.max() < 750
    assert len(list(data.validation_batches(1000, 5))) == 1


def test_no_validation() -> None:
    data = counting(100, 9)
    assert data.num_validation_tokens == 0 and list(data.validation_batches(4, 2)) == []


# ---- cache ------------------------------------------------------------------------------------------------


def test_fingerprint_is_of_tokenizer_and_tokens(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.txt").write_text("häuser")
    file = load_tokens(find_source(str(tmp_path / "a.txt")), ByteTokenizer(), cache)
    little_endian = b"".join(byte.to_bytes(2, "little") for byte in "häuser".encode())
    assert file.fingerprint == hashlib.sha256(b"bytes\n" + little_endian).hexdigest()
    assert file.tokens.dtype == np.uint16 and isinstance(file.tokens, np.memmap)
    assert file.intact(ByteTokenizer())


def test_fingerprint_without_what_was_taken_back(tmp_path: Path, cache: Path) -> None:
    for folder in ("with", "without"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m.txt").write_text("the only text")
    (tmp_path / "with" / "a.bin").write_bytes(b"b" * CHUNK_BYTES + b"\xc3")
    (tmp_path / "with" / "z.bin").write_bytes(b"begins as text \xc3\x28")
    files = [load_tokens(find_source(str(tmp_path / f)), ByteTokenizer(), cache) for f in ("with", "without")]
    assert files[0].fingerprint == files[1].fingerprint and files[0].intact(ByteTokenizer())


def test_made_once_and_again_when_the_source_changes(tmp_path: Path, cache: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("first")
    first = load_tokens(find_source(str(source)), ByteTokenizer(), cache)
    written = first.path.stat().st_mtime_ns
    assert load_tokens(find_source(str(source)), ByteTokenizer(), cache).path == first.path
    assert first.path.stat().st_mtime_ns == written
    source.write_text("other")
    os.utime(source, ns=(1, 1))
    assert bytes(tokens_of(source, cache)) == b"other"
    assert [path.suffix for path in cache.iterdir()] == [".tokens"]  # the old one is gone
    assert bytes(first.tokens.tolist()) == b"first"  # and still whole for who has it open


@pytest.mark.parametrize("damage", ["truncated", "longer", "header", "empty", "json", "count"])
def test_damaged_cache_is_made_again(tmp_path: Path, cache: Path, damage: str) -> None:
    source = tmp_path / "a.txt"
    source.write_text("some text of some length")
    path = load_tokens(find_source(str(source)), ByteTokenizer(), cache).path
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
    assert bytes(tokens_of(source, cache)) == b"some text of some length"
    assert path.read_bytes() == data


def test_altered_tokens_are_found_by_their_fingerprint(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    path = load_tokens(find_source(str(tmp_path / "a.txt")), ByteTokenizer(), cache).path
    data = bytearray(path.read_bytes())
    data[HEADER_BYTES + 4] ^= 1
    path.write_bytes(data)
    assert not load_tokens(find_source(str(tmp_path / "a.txt")), ByteTokenizer(), cache).intact(ByteTokenizer())


def child(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=60)[0]


BUILD = """
    import sys
    from icenet.core.data.text.cache import load_tokens
    from icenet.core.data.text.sources import find_source
    from icenet.core.tokenizers import ByteTokenizer
    from icenet.core.errors import DataError
    from pathlib import Path
    {before}
    try:
        print(load_tokens(find_source(sys.argv[1]), ByteTokenizer(), Path(sys.argv[2])).fingerprint)
    except DataError as error:
        print("DataError:", error)
"""

# numpy imports mmap late, from where a user without rights may not be allowed to read
NO_RIGHTS = "import os, mmap\n    if os.getuid() == 0: os.setuid(65534)"


def test_two_processes_and_a_kill_leave_a_whole_cache(tmp_path: Path, cache: Path) -> None:
    source = tmp_path / "big.txt"
    source.write_bytes(b"0123456789abcdef" * (1 << 20))  # 16 MB
    code = BUILD.format(before="print('up', flush=True)")
    for delay in (0.0, 0.02, 0.05):
        process = child(code, source, cache)
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    together = [child(code, source, cache) for _ in range(2)]
    said = [output(process).split()[-1] for process in together]
    expected = hashlib.sha256(b"bytes\n" + np.frombuffer(source.read_bytes(), np.uint8).astype("<u2").tobytes())
    assert said == [expected.hexdigest()] * 2
    assert load_tokens(find_source(str(source)), ByteTokenizer(), cache).intact(ByteTokenizer())


def test_what_a_kill_left_is_removed(tmp_path: Path, cache: Path) -> None:
    cache.mkdir()
    for name, age in (("old.tmp", 7200), ("fresh.tmp", 0)):
        (cache / name).write_bytes(b"half")
        os.utime(cache / name, (time.time() - age, time.time() - age))
    (tmp_path / "a.txt").write_text("text")
    tokens_of(tmp_path / "a.txt", cache)
    assert not (cache / "old.tmp").exists() and (cache / "fresh.tmp").exists()  # another process may be at work


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX")
def test_no_room_and_no_permission_are_told(tmp_path: Path, cache: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("long enough " * 1000)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))"
    said = output(child(BUILD.format(before=limit), source, cache))
    assert said.startswith("DataError: cannot keep tokens in") and "no space left; set ICENET_CACHE" in said
    assert list(cache.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot keep tokens in .*: .*set ICENET_CACHE"):
        tokens_of(source, tmp_path / "file" / "cache")


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX")
def test_what_may_only_be_read() -> None:
    """As a user without rights: what is cached is read, what is not is an error that names the folder."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        folder, cache = Path(name), Path(name, "cache")
        folder.chmod(0o755)
        (folder / "a.txt").write_text("cached")
        (folder / "b.txt").write_text("not cached")
        fingerprint = load_tokens(find_source(str(folder / "a.txt")), ByteTokenizer(), cache).fingerprint
        cache.chmod(0o555)
        said = [output(child(BUILD.format(before=NO_RIGHTS), folder / file, cache)) for file in ("a.txt", "b.txt")]
        cache.chmod(0o755)
    assert said[0] == fingerprint + "\n"
    assert said[1].startswith(f"DataError: cannot keep tokens in {cache}: permission denied; set ICENET_CACHE")


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    """The cache is writable, the source is not readable."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        (folder / "secret.txt").write_text("no")
        (folder / "secret.txt").chmod(0)
        said = output(child(BUILD.format(before=NO_RIGHTS), folder / "secret.txt", folder / "cache"))
    assert said == f"DataError: cannot read {folder}/secret.txt: permission denied\n"


def test_cache_folder_by_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text " * 10)
    monkeypatch.setenv("ICENET_CACHE", str(tmp_path / "here"))
    open_dataset(DataConfig(source=str(tmp_path / "a.txt"), validation_fraction=0), 4, 0)
    assert len(list((tmp_path / "here").glob("*.tokens"))) == 1
    monkeypatch.delenv("ICENET_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_module.default_folder() == tmp_path / ".cache" / "icenet"


# ---- what is refused --------------------------------------------------------------------------------------


def test_bad_sources_are_named_with_a_way_out(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "corpus.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "a.bin").write_bytes(b"\0\1")
    (tmp_path / "data.gz").write_bytes(b"\x1f\x8b\x08\x00")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "nothing.txt").write_text("")
    cases = {
        f"{tmp_path}/corpus.text": rf"is not there; did you mean '{tmp_path}/corpus\.txt'\?",
        f"{tmp_path}/no/where.txt": rf"the folder '{tmp_path}/no' is not there either",
        f"{tmp_path}/qqqq": r"is not there \(looked in",
        f"{tmp_path}/empty": "folder without files",
        f"{tmp_path}/binary": r"no text in folder .*binary \(1 file looked at\)",
        f"{tmp_path}/data.gz": r"data\.gz is not UTF-8 text \(.*\); unpack it",
        f"{tmp_path}/latin.txt": r"latin\.txt is not UTF-8 text .*convert it to UTF-8",
        f"{tmp_path}/nothing.txt": "there is no text in file",
        f"{tmp_path}/*.md": "matches no files",
        f"{tmp_path}/em*": r"matches folders but no files; '\*\*/\*'",
        f"{tmp_path}/absent/*.txt": "matches no files: there is no folder",
        "https://example.com/corpus.txt": "is a URL; download it first",
        "s3://bucket/corpus": "is a URL",
        "": "data.source is empty",
        "a\0b": "cannot be read|is not there",
        os.devnull: "neither a file nor a folder",
        "stdlibs": "is not there",
    }
    for source, message in cases.items():
        with pytest.raises(DataError, match=message) as caught:
            tokens_of(source, cache)
        assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert not cache.exists() or list(cache.iterdir()) == []


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "log.txt").write_text("so far")
    found = find_source(str(tmp_path / "log.txt"))
    (tmp_path / "log.txt").write_text("so far and further")
    with pytest.raises(DataError, match=r"log\.txt changed while it was read"):
        load_tokens(found, ByteTokenizer(), cache)
    (tmp_path / "log.txt").unlink()
    with pytest.raises(DataError, match=r"cannot read .*log\.txt: no such file"):
        load_tokens(found, ByteTokenizer(), cache)


def test_too_short_says_what_there_is_and_what_is_needed(tmp_path: Path, cache: Path) -> None:
    data = counting(100, 20)
    assert data.steps_per_epoch(4) == 1
    with pytest.raises(DataError, match=r"has 100 training tokens, and one batch needs 120: .*data\.source"):
        data.train_batch(0, 5)
    with pytest.raises(DataError, match=r"lower data\.seq_length \(20\) or training\.batch_size \(5\)"):
        data.steps_per_epoch(5)
    assert counting(120, 20).steps_per_epoch(5) == 1
    with pytest.raises(DataError, match=r"leaves 10 tokens for validation, and one window needs 21: .*\(0\.1; 0"):
        counting(100, 20, fraction=0.1)
    with pytest.raises(DataError, match="batch_size"):
        data.steps_per_epoch(0)
    with pytest.raises(DataError, match="seq_length"):
        counting(100, 0)
    with pytest.raises(DataError, match="validation_fraction"):
        counting(100, 4, fraction=1.0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits on memory differ")
def test_data_larger_than_memory_is_streamed(tmp_path: Path, cache: Path) -> None:
    """96 MB of text in a process that may take 64 MB more than it has: only a stream can do it."""
    with open(tmp_path / "big.txt", "wb") as file:
        for _ in range(96):
            file.write(b"0123456789abcdef" * (1 << 16))
    limit = """
    import resource, re
    import numpy
    from icenet.core import rng
    used = int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (used + (64 << 20), used + (64 << 20)))
    """
    code = BUILD.format(before=textwrap.dedent(limit).replace("\n", "\n    "))
    said = output(child(code, tmp_path / "big.txt", cache))
    assert len(said.strip()) == 64, said
    (tmp_path / "big.txt").unlink()
