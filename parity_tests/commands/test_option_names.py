"""Messages name the options of the command that runs, and Python's keywords and the keys of a config otherwise."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from helpers import is_one_line, tiny

import icenet
from icenet.cli import options, parity
from icenet.cli.main import cli, main
from icenet.core.config import Config
from icenet.core.errors import IceNetError
from icenet.core.messages import option, options_of_command
from icenet.core.training.perplexity import evaluate_text

_SOURCE = Path(icenet.__file__).parent
_KEYWORDS = ("layout", "copy_weights", "trust_code", "replay", "inputs")
"""Keywords of Python that are no parameters of a command, under this name."""


def options_below(command: click.Command) -> Iterator[str]:
    for inner in getattr(command, "commands", {}).values():
        yield from options_below(inner)
    yield from (found.name for found in command.params if isinstance(found, click.Option) and found.name)


def messages(file: Path) -> Iterator[tuple[str, bool]]:
    """Yields each text in a file that is no docstring, and whether it is an argument of `option`."""
    tree = ast.parse(file.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = {id(arg) for call in calls if getattr(call.func, "id", "") == "option" for arg in call.args}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value, id(node) in named


def test_no_message_has_a_keyword_where_a_command_has_an_option() -> None:
    names = "|".join({*options_below(cli), *_KEYWORDS})
    keyword = re.compile(rf"(?<![\w.`-])({names})=(True|False|'\w+'|\[)")
    files = [file for folder in ("core", "parity") for file in (_SOURCE / folder).rglob("*.py")]
    for file in files:
        if "porting" not in file.parts:  # which writes programs
            for text, is_named in messages(file):
                wrong = keyword.search(text) and not is_named and "--" not in text and text != "overflow='slide'"
                assert not wrong, f"{file}: {text}"


def test_the_options_that_commands_name_are_those_of_messages() -> None:
    named = {text for file in _SOURCE.rglob("*.py") for text, is_named in messages(file) if is_named}
    assert {*options.TEXT_OPTIONS, *parity._OPTIONS, "data.source"} <= named


def test_words_of_a_command() -> None:
    with options_of_command({"data.source": "--text"}):
        assert (option("data.source"), option("data.errors=skip")) == ("--text", "data.errors=skip")
    assert option("data.source") == "data.source"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    icenet.save(icenet.build(Config.from_dict(tiny(tmp_path).model_dump()), "torch"), tmp_path / "model")
    (tmp_path / "bad.jsonl").write_text('{"body": "x"}\n')
    return tmp_path / "model"


def test_texts(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source, words in (("absent.txt", ["--text 'absent.txt'"]), ("bad.jsonl", ["--text-key", "--errors skip"])):
        assert main(["eval", "model", "--backend", "torch", "--text", source, "--quiet"]) == 2
        line = capsys.readouterr().err
        assert is_one_line(line, *words) and "data." not in line
        with pytest.raises(IceNetError) as caught:
            evaluate_text(icenet.load(model, "torch"), source)
        assert "data.source" in str(caught.value) and "--" not in str(caught.value)
        assert main(["prepare", source, "--train-tokenizer", "bpe", "--quiet"]) == 2
        line = capsys.readouterr().err
        assert is_one_line(line, "TEXT") and "data." not in line


def test_generation(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "model", "--backend", "torch", "--prompt", "x" * 99]) == 2
    line = capsys.readouterr().err
    assert is_one_line(line, "--overflow slide") and "overflow=" not in line


def test_parity(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlx")
    monkeypatch.chdir(tmp_path)
    for framework, call in (("mlx", "__call__"), ("torch", "forward")):
        text = (
            f"import {framework}.nn as nn\nclass Net(nn.Module):\n    def {call}(self, x):\n        raise ValueError"
        )
        (tmp_path / f"{framework}_net.py").write_text(text)
    assert main(["parity", "mlx_net.py:Net", "torch_net.py:Net"]) == 2
    line = capsys.readouterr().err
    assert is_one_line(line, "--input") and "layout" not in line
