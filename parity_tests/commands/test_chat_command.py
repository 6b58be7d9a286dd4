"""`icenet chat`: messages of the command line, of a pipe and of a terminal, Ctrl-C, and errors."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import build_model, is_one_line

import icenet
from icenet.cli.main import main
from icenet.commands import chat as command
from icenet.core.config import Config, ModelConfig
from icenet.core.errors import IceNetError, NonFiniteError
from icenet.core.families import FAMILIES
from icenet.core.tokenizers.bytes import ByteTokenizer

pytest.importorskip("jinja2")

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not this') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 1, "vocab_size": 257, "max_seq_length": 200}
    found = build_model("torch", ModelConfig(type="transformer", **sizes))
    found.tokenizer = ByteTokenizer()
    found.tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr(command, "load_model", lambda *_: found)
    return found


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Makes answers that name the number of messages. Returns the contents of the messages of each call."""
    calls: list[list[str]] = []

    def chat(model: Any, messages: Any, **options: Any) -> Iterator[str]:
        calls.append([message["content"] for message in messages])
        assert options["stream"] and options["temperature"] == 0.5
        return pieces(messages[-1]["content"], len(messages))

    def pieces(text: str, count: int) -> Any:
        yield "answer "
        if text == "stop":
            raise KeyboardInterrupt
        if text == "fail":
            raise NonFiniteError("the logits are not finite")
        yield f"{count}"
        return "length" if text == "long" else "end"

    monkeypatch.setattr(icenet, "chat", chat)
    return calls


def run(*arguments: str) -> int:
    return main(["chat", "x", "--temperature", "0.5", *arguments])


def test_messages_of_the_command_line(model: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Each answer continues the conversation before it."""
    options = {"max_new_tokens": 9, "temperature": 0.5, "seed": 3}
    first = icenet.chat(model, [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}], **options)
    turns = [("system", "s"), ("user", "a"), ("assistant", first), ("user", "b")]
    second = icenet.chat(model, [{"role": role, "content": text} for role, text in turns], **options)
    more = ("--system", "s", "--max-new-tokens", "9", "--seed", "3")
    assert run("--message", "a", "--message", "b", *more) == 0
    out, err = capfd.readouterr()
    assert out == f"{first}\n{second}\n"
    assert all(is_one_line(line, "--max-new-tokens") for line in err.splitlines())


def test_lines_of_a_pipe(
    model: Any, answers: list[list[str]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = "Zażółć\n\nsecond\r\n/etc/passwd\n/reset\nthird\n/exit\nnever\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert run("--system", "s") == 0
    assert capfd.readouterr() == ("answer 2\nanswer 4\nanswer 6\nanswer 2\n", "")
    assert answers[2] == ["s", "Zażółć", "answer 2", "second", "answer 4", "/etc/passwd"]
    assert answers[3] == ["s", "third"]


@pytest.mark.parametrize(
    ("content", "code", "names"),
    [
        (b"ok\n\xff\xfe\n", 2, ["line 2", "UTF-8"]),
        (b"fail\nnever\n", 1, ["not finite"]),
        (b"stop\nnever\n", 130, ["Ctrl-C"]),
        (b"x" * 300, 2, ["200", "new conversation"]),
        (None, 2, ["standard input", "--message"]),
    ],
)
def test_a_pipe_that_fails(
    content: bytes | None,
    code: int,
    names: list[str],
    model: Any,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if content != b"x" * 300:
        request.getfixturevalue("answers")
    monkeypatch.setattr(sys, "stdin", Closed() if content is None else io.TextIOWrapper(io.BytesIO(content)))
    assert run() == code
    out, err = capfd.readouterr()
    assert "never" not in out and is_one_line(err.strip(), *names)


class Closed(io.StringIO):
    """The standard input of a process that was started without one."""

    def readline(self, *_: Any) -> str:
        raise OSError(9, "Bad file descriptor")


def in_terminal(monkeypatch: pytest.MonkeyPatch, *lines: Any) -> None:
    """Makes standard input a terminal with these lines; an exception is raised instead."""
    remaining = iter(lines)

    def read(prompt: str) -> str:
        line = next(remaining)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", read)


def test_a_conversation_in_a_terminal(
    model: Any, answers: list[list[str]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C ends an answer, not the chat. So does an error."""
    in_terminal(*(monkeypatch, "a", "stop", "b", "fail", "long", "/help", "/nonsense", "/reset", "c", "", EOFError()))
    assert run() == 0
    out, err = capfd.readouterr()
    assert out.splitlines() == [
        *("answer 1", "answer ", "(stopped)", "answer 5", "answer ", "answer 9"),
        *command.HELP.splitlines(),
        *("no command /nonsense; /help lists them", "(a new conversation)", "answer 1", ""),
    ]
    assert answers[2] == ["a", "answer 1", "stop", "answer ", "b"]
    failed, limited = err.splitlines()
    assert is_one_line(failed, "not finite", "/reset") and is_one_line(limited, "--max-new-tokens")


def test_an_error_leaves_the_conversation_as_it_was(
    model: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A message that does not fit is not part of it, so the next one is answered."""
    in_terminal(monkeypatch, "x" * 300, "a", EOFError())
    assert run("--max-new-tokens", "3") == 0
    out, err = capfd.readouterr()
    error, *notes = err.splitlines()
    assert is_one_line(error, "200", "/reset") and len(notes) <= 1 and len(out) > 1


def test_ctrl_c_at_the_prompt(
    model: Any, answers: list[list[str]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Twice in a row ends the chat. One after an answer that it has stopped does, too, unless it is a repetition."""
    stop = KeyboardInterrupt()
    in_terminal(monkeypatch, stop, "a", stop, stop)
    assert run() == 0
    assert capfd.readouterr().out.count("Ctrl-C again") == 2 and answers == [["a"]]
    in_terminal(monkeypatch, "stop", stop, "b", "/exit")  # within a second
    assert run() == 0 and answers[-1][-1] == "b"
    monkeypatch.setattr(command, "_REPEAT_SECONDS", -1.0)
    in_terminal(monkeypatch, "stop", stop)
    assert run() == 0


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--system", "no"], ["not this", "chat template"]),
        (["--template-option", "x"], ["NAME=VALUE"]),
        (["--temperature", "-1", "--message", "a"], ["temperature"]),
        (["--eos-token-id", "400", "--message", "a"], ["eos_token_id 400"]),
    ],
)
def test_wrong_options(model: Any, arguments: list[str], names: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    out, err = capfd.readouterr()
    assert not out.strip() and is_one_line(err.strip(), *names)


def test_a_model_without_a_template(model: Any, capfd: pytest.CaptureFixture[str]) -> None:
    model.tokenizer = ByteTokenizer()
    assert run("--message", "a") == 2
    assert is_one_line(capfd.readouterr().err.strip(), "chat template", "icenet generate")


def test_variables_of_the_template(model: Any, capfd: pytest.CaptureFixture[str]) -> None:
    model.tokenizer.chat_template = "{{ name }}{{ raise_exception(thinks|string + name) }}"
    arguments = ("--template-option", "thinks=false", "--template-option", "name=Bob", "--message", "a")
    assert run(*arguments) == 2
    assert is_one_line(capfd.readouterr().err.strip(), "FalseBob")


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("{% for m in messages %}", ["chat template", "endfor"]),
        ("{{ messages.__class__.__mro__ }}", ["chat template"]),
        ("{{ raise_exception('no system message') }}", ["no system message"]),
    ],
)
def test_a_faulty_template_is_refused_before_the_weights_are_read(
    template: str,
    names: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Also in Python."""
    config = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
              "intermediate_size": 16, "vocab_size": 300}  # fmt: skip
    model = icenet.build(Config(model=FAMILIES["llama"].read(config)), "torch", "cpu")
    icenet.save(model, tmp_path / "ours")
    icenet.convert(tmp_path / "ours", tmp_path / "hf", "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    (tmp_path / "hf" / "chat_template.jinja").write_text(template)
    monkeypatch.setattr(command, "load_model", lambda *_: pytest.fail("the weights are read"))
    monkeypatch.setattr("icenet.api.text.load", lambda *_: pytest.fail("the weights are read"))
    assert main(["chat", str(tmp_path / "hf"), "--system", "s", "--message", "a"]) in (1, 2)
    assert is_one_line(capfd.readouterr().err.strip(), *names)
    with pytest.raises(IceNetError) as error:
        icenet.chat(tmp_path / "hf", "a")
    assert is_one_line(str(error.value), *names)
