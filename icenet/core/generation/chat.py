"""Answers in a chat: the chat template of a model's tokenizer makes a prompt of messages."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from icenet.core.errors import UsageError
from icenet.core.generation.request import SLIDE, Request, check_reads_tokens, make_request, settings_of
from icenet.core.generation.speculative import make_decoder
from icenet.core.generation.streaming import generate_tokens, stream_text
from icenet.core.messages import option
from icenet.core.tokenizers.base import end_ids
from icenet.core.tokenizers.chat import render

DEFAULT_ANSWER_TOKENS = 1024
"""Maximum length of an answer if neither the options nor the model's settings have one."""


def chat_text(
    model: Any,
    messages: object,
    stream: bool,
    details: bool,
    template_options: Mapping[str, Any] | None,
    options: dict[str, Any],
    speedups: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Answers messages. Returns what `icenet.chat` describes.

    Args:
        model: A `ModelBase` of either backend, with a tokenizer that has a chat template.
        messages: A text, or a list of dicts with `role` and `content`.
        stream: Whether to return an iterator over pieces of text.
        details: Whether to return tokens and the finish reason too.
        template_options: Variables of the chat template.
        options: Keys of `GenerationConfig`.
        speedups: Arguments of `make_decoder`: cache, draft, num_draft_tokens.
    """
    if stream and details:
        raise UsageError("chat: details=True needs stream=False; a stream returns the finish reason at its end")
    request = chat_request(model, messages, template_options, options)
    decoder = make_decoder(model, request, **speedups)
    if stream:
        return stream_text(decoder, request)
    found = generate_tokens(decoder, request)[0]
    return found if details else found.text


def chat_request(
    model: Any, messages: object, template_options: Mapping[str, Any] | None, options: Mapping[str, Any]
) -> Request:
    """Returns the request for an answer to messages. Its arguments are those of `chat_text`.

    An end-of-text token of the model's settings ends the answer, and so does each token of the tokenizer that ends a
    text or a turn.

    Raises:
        UsageError: There is no chat template, it refuses the messages, or they leave no room for an answer.
        DataError: The chat template is faulty.
    """
    check_reads_tokens(model)
    if model.tokenizer is None:
        raise UsageError("chat: the model has no tokenizer; set model.tokenizer to one with a chat template")
    given = {name: value for name, value in options.items() if value is not None}
    if "max_batch_size" in given:
        raise UsageError("chat: max_batch_size has no effect, because one conversation is one prompt")
    if given.pop("add_special_tokens", False):
        raise UsageError("chat: add_special_tokens has no effect, because the chat template has the special tokens")
    prompt = render(model.tokenizer, messages, template_options=template_options)
    ids = model.tokenizer.encode(prompt)
    if not ids:
        raise UsageError("chat: the chat template makes an empty text of these messages")
    settings = settings_of(model, given)
    if "eos_token_id" not in given:
        ends = dict.fromkeys((*(settings.eos_token_id or ()), *end_ids(model.tokenizer)))
        given["eos_token_id"] = [token for token in ends if token < model.config.vocab_size]
    context = getattr(model.config, "max_seq_length", None) if settings.overflow == "error" else None
    if context is not None and len(ids) >= context:
        raise UsageError(
            f"chat: the conversation has {len(ids):,} tokens, and model.max_seq_length is {context:,}, answer "
            f"included; begin a new conversation, shorten it, or pass {option(SLIDE)} to drop the oldest tokens"
        )
    if not given.keys() & {"max_new_tokens", "max_length"}:
        wanted = settings.max_new_tokens or (settings.max_length or 0) - len(ids)
        wanted = wanted if wanted > 0 else DEFAULT_ANSWER_TOKENS
        given["max_new_tokens"] = wanted if context is None else min(wanted, context - len(ids))
    return make_request(model, [ids], None, 0, given)
