"""`icenet embed`: files of texts and of vectors."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY_MODELS, is_one_line

import icenet
from icenet.cli.main import cli
from icenet.core.config import Config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embed") / "model"
    icenet.save(icenet.build(Config.from_dict({"model": TINY_MODELS["transformer"]}), "torch", "cpu"), folder)
    return folder


def run(*arguments: object) -> None:
    cli.main([*map(str, arguments), "--backend", "torch", "--device", "cpu"], standalone_mode=False)


def test_lines_and_json_lines(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["one", "", " two and three"]
    expected = icenet.embed(model, texts, backend="torch", device="cpu")
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    run("embed", model, tmp_path / "a.txt", "--out", tmp_path / "a.npz")
    assert is_one_line(capsys.readouterr().out.strip(), "3 embeddings")
    with np.load(tmp_path / "a.npz") as found:
        np.testing.assert_array_equal(found["embeddings"], expected)
        assert found["texts"].tolist() == texts
    run("embed", model, tmp_path / "b.jsonl", "--text-key", "body", "--out", tmp_path / "b.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), expected)


def test_options_and_the_standard_input(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"pooling": ["last", "max"], "normalize": True, "max_seq_length": 4, "prompt": "x"}
    expected = icenet.embed(model, ["one", "two three"], backend="torch", device="cpu", **options)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo three"))
    arguments = ("--pooling", "last", "--pooling", "max", "--normalize", "--max-seq-length", 4, "--prompt", "x")
    run("embed", model, "-", "--out", tmp_path / "c.npy", *arguments)
    np.testing.assert_array_equal(np.load(tmp_path / "c.npy"), expected)


@pytest.mark.parametrize(
    ("name", "content", "arguments", "message"),
    [
        ("a.txt", "a\n", ("--out", "v.txt"), ".npz or .npy"),
        ("a.txt", "a\n", ("--out", "there.npy"), "there.npy: exists"),
        ("a.txt", "a\n", ("--out", "v.npy", "--text-key", "body"), "--text-key"),
        ("a.txt", "", ("--out", "v.npy"), "is empty"),
        ("a.jsonl", '{"text": "a"}\n{"body": "b"}\n', ("--out", "v.npy"), "line 2"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b"}\n', ("--out", "v.npy"), "line 2 is empty"),
        ("a.jsonl", "a\n", ("--out", "v.npy"), "line 1 is not JSON"),
    ],
)
def test_wrong_files_are_one_line(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: str,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(content)
    Path("there.npy").write_text("x")
    with pytest.raises(Exception) as error:
        run("embed", model, name, *arguments)
    assert getattr(error.value, "exit_code", None) == 2
    assert is_one_line(str(error.value), message)
    assert Path("there.npy").read_text() == "x"
    assert not Path("v.npy").exists()
