"""`icenet chat`: a conversation with a model, in a terminal, from a pipe, or with messages of the command line."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import icenet
from icenet.commands.generate import load_model, name_unused
from icenet.core.errors import IceNetError, UsageError
from icenet.core.generation.prompt_cache import CacheError, can_go_back
from icenet.core.report import streams
from icenet.core.runs.open_model import check_chat_template
from icenet.core.tokenizers.chat import render

HELP = """\
/reset   begin a new conversation
/help    show this list
/exit    end the chat (also Ctrl-D, or Ctrl-C twice)
Ctrl-C stops an answer; what there is of it stays in the conversation."""
QUESTION = {"role": "user", "content": "?"}
"""With which a chat template is checked before there is a message."""
_PROMPT = "> "
_REPEAT_SECONDS = 1.0
"""Within this time a Ctrl-C at the prompt is a repetition of the one that has stopped the answer."""


def chat(
    path: Path,
    messages: Sequence[str] = (),
    *,
    system: str | None = None,
    backend: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    averaged: bool = False,
    quantize: int | None = None,
    group_size: int | None = None,
    template_options: Mapping[str, Any] | None = None,
    draft: Path | None = None,
    num_draft_tokens: int | None = None,
    **options: Any,
) -> None:
    """Answers messages, and writes the answers to standard output.

    Args:
        path: A run, a checkpoint, a saved model or a folder of Hugging Face.
        messages: Messages of the user; without them, lines of standard input.
        system: The message before the conversation that describes the task.
        backend, device, dtype, averaged, quantize, group_size: See `icenet.commands.generate.stream`.
        template_options: Variables of the chat template.
        draft, num_draft_tokens: See `icenet.generate`.
        options: Keys of `GenerationConfig`; None keeps the model's own setting.

    Raises:
        UsageError: The model has no chat template, it refuses the messages, or standard input is closed.
    """
    first = [{"role": "system", "content": system}] if system is not None else []
    check_chat_template(path, [*first, QUESTION], template_options)
    model = load_model(path, backend, device, dtype, averaged, quantize, group_size)
    if draft is None and num_draft_tokens is not None:
        raise UsageError("chat: --num-draft-tokens has no effect without --draft")
    small = None if draft is None else icenet.load(draft, backend or model.backend, device, dtype=dtype)
    speedups = {"draft": small, "num_draft_tokens": num_draft_tokens}
    conversation = Conversation(model, system, template_options, {**options, **speedups})
    conversation.check()
    name_unused(model, options)
    if messages:
        for text in messages:
            conversation.reply(text)
    elif sys.stdin.isatty():
        _in_terminal(conversation)
    else:
        for line in _piped_lines():
            if not _follow(conversation, line):
                return


class Conversation:
    """Messages of a user and the answers of a model. What the model has read stays in its cache.

    Attributes:
        messages: The messages so far, as `icenet.chat` takes them.
    """

    def __init__(
        self,
        model: Any,
        system: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._model = model
        self._options = {"template_options": template_options, **(options or {})}
        self._first = [{"role": "system", "content": system}] if system is not None else []
        self.messages: list[dict[str, str]] = []
        self._cache = icenet.prompt_cache(model) if can_go_back(model) else None
        self.reset()

    def reset(self) -> None:
        """Begins a new conversation. The system message stays."""
        self.messages = list(self._first)

    def check(self) -> None:
        """Raises UsageError if the model has no chat template, or if it refuses the system message."""
        if self._model.tokenizer is None:
            raise UsageError("chat: the model has no tokenizer; add tokenizer.json to its folder")
        render(
            self._model.tokenizer,
            [*self._first, QUESTION],
            template_options=self._options["template_options"],
        )

    def reply(self, text: str) -> None:
        """Writes the answer to a message piece by piece, and a newline.

        An answer that Ctrl-C stops stays in the conversation. A message without an answer does not.

        Raises:
            IceNetError: There is no answer.
            KeyboardInterrupt: Ctrl-C has stopped the answer.
        """
        self.messages.append({"role": "user", "content": text})
        answer = ""
        try:
            pieces = self._answer()
            try:
                while True:
                    answer += (piece := next(pieces))
                    streams.write(piece, end="")
            except StopIteration as end:
                if end.value == "length":
                    streams.write("")
                    streams.write_error("icenet: the answer is longer than its limit; --max-new-tokens raises it")
                    return
            finally:
                pieces.close()
            streams.write("")
        except (KeyboardInterrupt, IceNetError):
            if answer:
                streams.write("")
            raise
        finally:
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
            else:
                self.messages.pop()

    def _answer(self) -> Any:
        """Returns the pieces of the answer to the messages. The tokens in the cache are not read again."""
        try:
            return icenet.chat(self._model, self.messages, stream=True, cache=self._cache, **self._options)
        except CacheError:  # a text that slides out of the context, for example, is read without the cache
            return icenet.chat(self._model, self.messages, stream=True, **self._options)


def _follow(conversation: Conversation, line: str) -> bool:
    """Does what a line of the user says. Returns whether the chat continues."""
    command = line.strip()
    if command == "/exit":
        return False
    if command == "/reset":
        conversation.reset()
    elif command == "/help":
        streams.write(HELP)
    elif command:
        conversation.reply(line)
    return True


def _in_terminal(conversation: Conversation) -> None:
    """Reads lines from a terminal until the user ends the chat. Errors and Ctrl-C end an answer only."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` a history and editing keys)
    has_prompt = sys.stdout.isatty()
    if has_prompt:
        streams.write("/help lists the commands; Ctrl-D ends the chat.")
    interrupted, stopped_at = False, -_REPEAT_SECONDS
    while True:
        try:
            line = input(_PROMPT if has_prompt else "")
        except EOFError:
            streams.write("")
            return
        except KeyboardInterrupt:
            streams.write("")
            if interrupted and time.monotonic() - stopped_at > _REPEAT_SECONDS:
                return
            interrupted = True
            streams.write("(Ctrl-C again, Ctrl-D or /exit ends the chat)")
            continue
        interrupted = False
        if re.fullmatch(r"/[a-z]+", line.strip()) and line.strip() not in ("/exit", "/reset", "/help"):
            streams.write(f"no command {line.strip()}; /help lists them")
            continue
        try:
            if not _follow(conversation, line):
                return
            if line.strip() == "/reset":
                streams.write("(a new conversation)")
        except KeyboardInterrupt:
            interrupted, stopped_at = True, time.monotonic()
            streams.write("(stopped)")
        except IceNetError as error:
            streams.write_error(f"icenet: {' '.join(str(error).split())}; /reset begins a new conversation")


def _piped_lines() -> Iterator[str]:
    """Yields the lines of standard input, without line ends.

    Raises:
        UsageError: It is closed, or a line is not UTF-8.
    """
    buffer = getattr(sys.stdin, "buffer", sys.stdin)  # a replaced stdin may have only text
    number = 0
    while True:
        try:
            line = buffer.readline()
        except (OSError, ValueError):
            raise UsageError("the standard input is closed; give --message TEXT") from None
        if not line:
            return
        number += 1
        try:
            yield (line if isinstance(line, str) else line.decode("utf-8")).rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UsageError(f"line {number} of standard input is not UTF-8 text ({error.reason})") from None
