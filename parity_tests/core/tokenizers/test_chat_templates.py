"""Chat templates: where they are found, what they render, and what hostile ones can do.

Expected texts come from `apply_chat_template` of `transformers`.
"""

from __future__ import annotations

import importlib.metadata
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import is_one_line, version
from test_prompts import auto_tokenizer, write_folder

from icenet.core.errors import DataError, IceNetError, UsageError
from icenet.core.tokenizers import chat, get_tokenizer
from icenet.core.tokenizers.chat import render
from icenet.core.tokenizers.companions import COMPANIONS

pytest.importorskip("jinja2")

TEMPLATES = {
    "chatml": """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are helpful<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}""",
    "llama3": """\
{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{ tools | tojson(indent=4) }}{% endif %}
{{- "Today Date: " + date_string + "\\n\\n" + system_message }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'
        + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "gemma": """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception(\
'Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == \
'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + \
role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}""",
    "mistral": """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
""",
    "zephyr": """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "phi3": """\
{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'user' %}{{'<|user|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>
' + message['content'] + '<|end|>
'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% else %}{{ eos_token }}{% endif %}""",
    "qwen3": """\
{%- set ns = namespace(multi_step_tool=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "system" %}{% continue %}{% endif %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.reasoning_content is string %}
        {%- set reasoning = message.reasoning_content %}
    {%- elif '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- else %}{% set reasoning = '' %}{% endif %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' }}
    {%- if loop.index0 > ns.last and reasoning %}
        {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {%- if message.role == 'assistant' %}{% generation %}{{ content }}{{ '<|im_end|>' }}{% endgeneration %}
    {%- else %}{{ content + '<|im_end|>' }}{% endif %}
    {{- '\\n' + message|items|list|length|string + message | tojson }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
{# a comment #}
{%- macro dump(x) %}{{ x|upper }}{% endmacro %}{{ dump(dict(a='é"<')['a']) }}
""",
}
TURNS = [
    {"role": "user", "content": " What is <b>1 + 1</b>? é 日本 \U0001f3bf\n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTwo.", "tool_calls": None},
    {"role": "user", "content": 'And </s> "quoted" {{ messages }} {% raw %}?'},
]
SYSTEM = {"role": "system", "content": "Be\tbrief. "}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("chat"), "gpt4")


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_are_those_of_transformers(name: str, folder: Path) -> None:
    theirs, ours = auto_tokenizer(folder), get_tokenizer(str(folder))
    if name == "qwen3" and version(importlib.metadata.version("transformers")) < (5, 24):
        pytest.skip("earlier versions add keys to messages, which this template prints")
    theirs.chat_template = ours.chat_template = TEMPLATES[name]  # type: ignore[attr-defined]
    for messages in (TURNS[:1], TURNS, [SYSTEM, *TURNS], [*TURNS[:1], {**TURNS[1], "reasoning": "why"}]):
        for ends in (True, False):
            for options in ({}, {"enable_thinking": False, "tools": [{"a": [1, None, "é"]}]}):
                asked: dict[str, Any] = {"add_generation_prompt": ends, "tokenize": False, **options}
                if name == "gemma" and messages[0] is SYSTEM:
                    with pytest.raises(UsageError) as error:
                        render(ours, messages)
                    assert is_one_line(error.value, "System role not supported")
                    continue
                expected = theirs.apply_chat_template(messages, **asked)
                found = render(ours, messages, add_generation_prompt=ends, template_options=options)
                assert found == expected
                tokenized = theirs.apply_chat_template(messages, **{**asked, "tokenize": True})
                assert ours.encode(found) == tokenized["input_ids"]


def test_a_text_is_a_message_of_the_user() -> None:
    tokenizer: Any = SimpleNamespace(chat_template=TEMPLATES["chatml"])
    assert render(tokenizer, "Hi") == render(tokenizer, [{"role": "user", "content": "Hi"}])


def test_where_a_template_is_found(tmp_path: Path) -> None:
    """The file of its own first, then tokenizer_config.json. Setting it changes the files that are saved."""
    (write_folder(tmp_path, "gpt4") / "chat_template.json").write_text('{"chat_template": "json"}')

    def found() -> str | None:
        return get_tokenizer(str(tmp_path)).chat_template  # type: ignore[attr-defined]

    assert found() == "json"
    write_folder(tmp_path, "gpt4", chat_template=[{"name": n, "template": n} for n in ("default", "tool_use")])
    assert found() == "default"
    write_folder(tmp_path, "gpt4", chat_template="config")
    assert found() == auto_tokenizer(tmp_path).chat_template == "config"
    (tmp_path / "chat_template.jinja").write_bytes(b"line\r\n{{ bos_token }}\n")
    assert found() == auto_tokenizer(tmp_path).chat_template == "line\n{{ bos_token }}\n"
    tokenizer: Any = get_tokenizer(str(tmp_path))
    for template in ("new {{ eos_token }}", None):
        tokenizer.chat_template = template
        for name in COMPANIONS:
            (tmp_path / name).unlink(missing_ok=True)
        for name, content in tokenizer.files.items():
            (tmp_path / name).write_bytes(content)
        assert found() == template


def test_no_template_is_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        render(get_tokenizer(str(folder)), "Hi")
    assert is_one_line(error.value, "chat template", "icenet generate", "chat_template.jinja")
    write_folder(tmp_path, "gpt4", chat_template=[{"name": "rag", "template": "x"}])
    with pytest.raises(UsageError) as error:
        render(get_tokenizer(str(tmp_path)), "Hi")
    assert is_one_line(error.value, "rag")


@pytest.mark.parametrize(
    ("messages", "names"),
    [
        ([], ["empty"]),
        (5, ["int"]),
        ({"role": "user", "content": "x"}, ["dict"]),
        (["x"], ["message 0"]),
        ([{"role": "user"}], ["message 0", "NoneType"]),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": 5}], ["message 1", "int"]),
        ([{"content": "x"}], ["message 0", "role"]),
        ([{"role": "user", "content": "x", "extra": object()}], ["object"]),
    ],
)
def test_wrong_messages_are_one_line(messages: Any, names: list[str]) -> None:
    tokenizer: Any = SimpleNamespace(chat_template=TEMPLATES["chatml"])
    with pytest.raises(UsageError) as error:
        render(tokenizer, messages)
    assert is_one_line(error.value, "chat", *names)


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ (messages|attr('append')).__self__ }}",
    "{{ messages.append(1) }}",
    "{% set ns = namespace(__class__=1) %}{{ ns }}",
    "{{ '{0.__class__}'.format('') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{% for",
    "{{ undefined.attribute }}",
    "{{ 1 / 0 }}",
    "{{ 'x' * 10 ** 9 }}",
    "{{ [1, 2] * 10 ** 9 }}",
    "{{ 9 ** 99999999 }}",
    "{{ 'x'.center(10 ** 10) }}",
    "{{ 'x'|center(10 ** 10) }}",
    "{{ '%09999999999d' % 1 }}",
    "{{ range(10 ** 9)|list }}",
    "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for i in range(20000) %}{{ 'x' * 10000 }}{% endfor %}",
    "x" * (1 << 21),
)


@pytest.mark.parametrize("template", ESCAPES, ids=lambda text: "".join(filter(str.isalnum, text))[:30])
def test_a_hostile_template_is_one_line(template: str) -> None:
    tokenizer: Any = SimpleNamespace(chat_template=template)
    try:
        text = render(tokenizer, "x")
    except IceNetError as error:
        assert is_one_line(error, "chat template")
    else:
        assert "{% set ns = namespace(__class__" not in template and len(text) < 10


ENDLESS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    # one comparison in C, which takes years
    "{% set ns = namespace(x=[], y=[]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
)


@pytest.mark.parametrize("template", ENDLESS, ids=["loop", "comparison"])
def test_an_endless_template_is_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any thread, by its processor time. The next template is rendered."""
    monkeypatch.setattr(chat, "_ANSWER_SECONDS", 300.0)
    hostile: Any = SimpleNamespace(chat_template=template)
    usual: Any = SimpleNamespace(chat_template="{{ messages[0].content }}")
    assert render(usual, "before") == "before"
    errors: list[Exception] = []

    def work() -> None:
        start = time.process_time()
        with pytest.raises(DataError) as error:
            render(hostile, "x")
        errors.append(error.value)
        assert time.process_time() - start < 0.5

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(30)
    assert is_one_line(errors[0], "chat template", "0.5 s")
    assert render(usual, "after") == "after"


def test_nothing_of_the_process_is_left_after_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a template is rendered: the next text is not the one that was interrupted."""
    tokenizer: Any = SimpleNamespace(chat_template="{{ messages[0].content }}")
    assert render(tokenizer, "a") == "a"

    def interrupted(self: Any, seconds: float) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(chat._Renderer, "_read_line", interrupted)
        render(tokenizer, "b")
    assert render(tokenizer, "c") == "c"


def test_the_message_without_jinja(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError) as error:
        chat._jinja_folders()
    assert is_one_line(error.value, "jinja2", "pip install")


def test_large_messages_and_values() -> None:
    """Whatever a text contains, and however long it is."""
    tokenizer: Any = SimpleNamespace(chat_template="{{ messages[0].content }}")
    text = '\0\n\r\u2028 é\U0001f3bf"\\' * 100_000
    assert render(tokenizer, text) == json.loads(json.dumps(text))


def test_an_option_that_the_template_does_not_read_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Also if it reads it in a branch that is not taken; a variable that it sets itself is none of its options."""
    text = "{% generation %}{% if false %}{{ reads }}{% endif %}{% set own = 1 %}{{ own }}{% endgeneration %}"
    tokenizer: Any = SimpleNamespace(chat_template=text)
    assert render(tokenizer, "x", template_options={"reads": 1}) == "1" and not caplog.messages
    assert render(tokenizer, "x", template_options={"reads": 1, "raeds": 2}) == "1"
    assert caplog.messages == ["chat: no effect: the chat template has no variable raeds"]
    caplog.clear()
    tokenizer = SimpleNamespace(chat_template=TEMPLATES["llama3"])
    render(tokenizer, "x", template_options={"date_string": "today", "custom_tools": []})
    assert not caplog.messages
