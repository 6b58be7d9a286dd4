"""The token cache: what makes it again, kills, full disks, several processes, and files larger than memory.

The same tokens are expected as from a preparation that nothing interrupts.
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
from token_files import fails, fingerprint_of, left_over, make, some_texts, text_of, write_lines

from icenet.cli.main import main
from icenet.core import files
from icenet.core.config import DataConfig
from icenet.core.data.datasets import open_dataset
from icenet.core.data.text import prepare
from icenet.core.data.text.token_file import HEADER_BYTES, TokenFile
from icenet.core.errors import FileError, IceNetError
from icenet.core.tokenizers import get_tokenizer
from icenet.core.tokenizers.bytes import ByteTokenizer

posix = pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX")

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits on memory differ")

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
