"""Chat templates: they turn messages into the text of a prompt. The rendering process is `template_worker.py`."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import json
import logging
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icenet.core.errors import ChatTemplateError, DataError, UsageError
from icenet.core.tokenizers.base import Tokenizer
from icenet.core.tokenizers.template_worker import CPU_SECONDS, MAX_BYTES

MAX_TEMPLATE = 1 << 20
"""Maximum length of a template in characters; published ones have up to 50,000."""
_START_SECONDS, _ANSWER_SECONDS = 60.0, 10.0
"""Time to wait for the process; `CPU_SECONDS` is reached much earlier, unless the machine is busy."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of the text in which a model reasons. Templates read the first or the second."""


def to_messages(messages: object) -> list[dict[str, Any]]:
    """Returns checked messages.

    Args:
        messages: A text, which is one message of the user, or a list of dicts with `role` and `content`. Further keys
            are passed to the template.

    Raises:
        UsageError: It is neither.
    """
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, (list, tuple)) or not messages:
        kind = "an empty list" if isinstance(messages, (list, tuple)) else type(messages).__name__
        raise UsageError(f'chat: messages must be a text or a list of {{"role": ..., "content": ...}}, not {kind}')
    found = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UsageError(f'chat: message {index} must be {{"role": ..., "content": ...}} with a text as its role')
        content = message.get("content")
        if not isinstance(content, (str, list, tuple)) and not (content is None and len(message) > 2):
            raise UsageError(f"chat: the content of message {index} must be a text, not {type(content).__name__}")
        kept = {str(key): value for key, value in message.items() if value is not None}
        reasoning = next((kept[name] for name in _REASONING if name in kept), None)
        found.append(kept if reasoning is None else {"thinking": reasoning, **kept, _REASONING[0]: reasoning})
    return found


def render(
    tokenizer: Tokenizer,
    messages: object,
    *,
    add_generation_prompt: bool = True,
    template_options: Mapping[str, Any] | None = None,
) -> str:
    """Returns the text of messages, by the chat template of a tokenizer.

    It has its special tokens: encode it with `tokenizer.encode`, which adds none.

    Args:
        tokenizer: A tokenizer with a `chat_template`.
        messages: See `to_messages`.
        add_generation_prompt: Whether the text ends where the answer begins.
        template_options: Variables of the template, such as `enable_thinking`.

    Raises:
        UsageError: There is no template, or it refuses the messages.
        DataError: The template is faulty, takes too long or needs too much memory.
        ChatTemplateError: It renders no messages: its syntax is wrong, or jinja2 is not installed.
    """
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        names = [name for name in getattr(tokenizer, "chat_templates", {}) if name != "default"]
        several = f"; it has others ({', '.join(names)}), of which you can choose one" if names else ""
        raise UsageError(
            "chat: the model's tokenizer has no chat template. Base models have none; use icenet generate for them, "
            f"or set model.tokenizer.chat_template, or add chat_template.jinja next to tokenizer.json{several}"
        )
    if not isinstance(template, str) or len(template) > MAX_TEMPLATE:
        raise ChatTemplateError(f"chat: a chat template is a text of at most {MAX_TEMPLATE:,} characters")
    values = {
        **getattr(tokenizer, "template_tokens", {}),
        "tools": None,
        "documents": None,
        **(template_options or {}),
        "messages": to_messages(messages),
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        request = json.dumps({"template": template, "values": values, "options": list(template_options or {})})
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"chat: messages consist of texts, numbers, lists and dicts: {error}") from None
    answer = _renderer().render(request)
    if "text" in answer:
        _warn_of_unused(tuple(answer["unused"]))
        return str(answer["text"])
    problem = " ".join(answer["error"].split())[:300]
    if answer["kind"] == "refused":
        raise UsageError(f"chat: the chat template refuses the messages: {problem}")
    if answer["kind"] == "version":
        raise ChatTemplateError(
            f"chat: chat templates need jinja2 3.1.6 or later, and this is {problem}: pip install -U jinja2"
        )
    kind = ChatTemplateError if answer["kind"] == "syntax" else DataError
    raise kind(f"chat: the chat template cannot be used: {problem}")


@functools.lru_cache(maxsize=64)
def _warn_of_unused(names: tuple[str, ...]) -> None:
    """Logs once per set of names that they are no variables of a template."""
    if names:
        logging.getLogger("icenet").warning(
            f"chat: no effect: the chat template has no variable {' and no variable '.join(names)}"
        )


class _Renderer:
    """The process that renders templates. It is started when needed, and again after it has ended.

    A process can be stopped at any time and limited in memory, on every platform and from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        atexit.register(self._end)

    def render(self, request: str) -> dict[str, Any]:
        """Returns the answer of the process to a request."""
        with self._lock:
            if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
                self._start()
            assert self._process is not None and self._process.stdin is not None
            try:
                with contextlib.suppress(BrokenPipeError):
                    self._process.stdin.write(request.encode() + b"\n")
                    self._process.stdin.flush()
                line = self._read_line(_ANSWER_SECONDS)
                answer: dict[str, Any] = json.loads(line)
                return answer
            except ValueError:  # no complete line: the process has ended
                self._stop()
                reason = f"it takes more than {CPU_SECONDS:g} s or {MAX_BYTES >> 20} MB"
                return {"kind": "limit", "error": reason}
            except BaseException:  # Ctrl-C: the answer would be read as that of the next request
                self._stop()
                raise

    def _start(self) -> None:
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(Path(__file__).with_name("template_worker.py")), *_jinja_folders()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # so that Ctrl-C in the terminal does not reach it
            )
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise ChatTemplateError(
                f"chat: the process that renders chat templates cannot be started: {reason}"
            ) from None
        self._owner = os.getpid()
        try:
            json.loads(self._read_line(_START_SECONDS))
        except ValueError:
            self._stop()
            raise ChatTemplateError(
                "chat: the process that renders chat templates does not start: pip install --force-reinstall jinja2"
            ) from None
        except BaseException:
            self._stop()
            raise

    def _read_line(self, seconds: float) -> bytes:
        """Returns the next line of the process, or what there is of it after some seconds or at its end."""
        assert self._process is not None and self._process.stdout is not None
        handle, deadline, line = self._process.stdout.fileno(), time.monotonic() + seconds, bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(handle, selectors.EVENT_READ)
            while not line.endswith(b"\n") and (remaining := deadline - time.monotonic()) > 0:
                if selector.select(remaining):
                    if not (piece := os.read(handle, 1 << 16)):
                        break
                    line += piece
        return bytes(line)

    def _end(self) -> None:
        if self._owner == os.getpid():  # a forked process leaves it to its parent
            self._stop()

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]
        process.wait()


@functools.cache
def _renderer() -> _Renderer:
    return _Renderer()


def _jinja_folders() -> Sequence[str]:
    """Returns the folders of jinja2 and its dependency, because the process ignores PYTHONPATH."""
    return list(dict.fromkeys(_folder(name) for name in ("jinja2", "markupsafe")))


def _folder(name: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ChatTemplateError(f"chat: chat templates need the package {name}: pip install 'icenet[text]'")
    return str(Path(spec.origin).parent.parent)
