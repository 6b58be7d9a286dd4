"""What models do with texts: continue them, answer them, turn them into vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icenet.api.models import check_model, load
from icenet.core import files
from icenet.core.embedding.texts import embed_texts
from icenet.core.errors import UsageError
from icenet.core.generation import prompt_cache as caches
from icenet.core.generation.chat import chat_text
from icenet.core.generation.prompt_cache import PromptCache
from icenet.core.generation.streaming import generate_text
from icenet.core.runs.open_model import check_chat_template


def generate(
    model: Any,
    prompt: str | Sequence[str],
    *,
    stream: bool = False,
    details: bool = False,
    draft: Any = None,
    num_draft_tokens: int | None = None,
    cache: PromptCache | None = None,
    **options: Any,
) -> Any:
    """Continues text.

    Args:
        model: A model, or a path that `load` accepts.
        prompt: One text, or a list of texts.
        stream: Whether to return an iterator over pieces of text, for one prompt.
        details: Whether to return text, tokens and finish reason.
        draft: A smaller model with the same tokenizer, or a path that `load` accepts, which proposes tokens
            (speculative decoding). The text of one prompt is the same, and takes less time. With `details` the result
            has the number of accepted tokens.
        num_draft_tokens: Number of tokens that the draft proposes at a time; 3 by default.
        cache: What `prompt_cache` returns. Tokens of the prompt that the cache has are not read again.
        options: Keys of `icenet.core.config.GenerationConfig`: max_new_tokens, temperature, top_k, top_p, min_p,
            repetition_penalty, seed, stop, eos_token_id, ignore_eos, overflow, max_batch_size.

    Returns:
        The new text without the prompt: a string for one prompt, a list for a list of prompts, an iterator of
        strings with `stream`. With `details`, `icenet.core.generation.streaming.Continuation` instead of a string.

    Raises:
        UsageError: A prompt or an option is invalid.
        NonFiniteError: The model's logits are NaN or infinite.
    """
    model = load(model) if isinstance(model, (str, Path)) else model
    check_model(model, "generate")
    speedups = {"cache": cache, "draft": _draft(model, draft), "num_draft_tokens": num_draft_tokens}
    return generate_text(model, prompt, stream, details, options, speedups)


def chat(
    model: Any,
    messages: str | Sequence[Mapping[str, Any]],
    stream: bool = False,
    *,
    details: bool = False,
    template_options: Mapping[str, Any] | None = None,
    draft: Any = None,
    num_draft_tokens: int | None = None,
    cache: PromptCache | None = None,
    **options: Any,
) -> Any:
    """Answers messages, by the chat template of the model's tokenizer.

    Args:
        model: A model, or a path that `load` accepts.
        messages: One text of the user, or a list of messages: `{"role": "user", "content": "Hello"}`, with the roles
            system, user and assistant.
        stream: Whether to return an iterator over pieces of text.
        details: Whether to return text, tokens and finish reason.
        template_options: Variables of the chat template, such as `{"enable_thinking": False}`.
        draft, num_draft_tokens: See `generate`.
        cache: What `prompt_cache(model)` returns. Given for each answer of a conversation, only the new messages are
            read. The answers are the same.
        options: Keys of `icenet.core.config.GenerationConfig`, as for `generate`. Without `max_new_tokens` an answer
            has at most 1,024 tokens, or those that fit into the context.

    Returns:
        The text of the answer, an iterator of strings with `stream`, or with `details` an
        `icenet.core.generation.streaming.Continuation`.

    Raises:
        UsageError: There is no chat template, it refuses the messages, or they exceed the context.
        DataError: The chat template is faulty, takes too long or needs too much memory.
        NonFiniteError: The model's logits are NaN or infinite.
    """
    if isinstance(model, (str, Path)):
        check_chat_template(files.user_path(model, "chat"), messages, template_options)
        model = load(model)
    check_model(model, "chat")
    speedups = {"cache": cache, "draft": _draft(model, draft), "num_draft_tokens": num_draft_tokens}
    return chat_text(model, messages, stream, details, template_options, options, speedups)


def prompt_cache(
    model: Any, prompt: str | Sequence[int] | None = None, *, add_special_tokens: bool = False
) -> PromptCache:
    """Reads a prompt, so that later prompts that begin with it take less time.

    Args:
        model: A transformer, or a path that `load` accepts.
        prompt: A text or token ids, with which the prompts of all requests with this cache must begin. None makes an
            empty cache, for any prompts and for chats.
        add_special_tokens: See `icenet.core.config.GenerationConfig`, for a text.

    Returns:
        A `PromptCache` for the argument `cache` of `generate`, `chat` and `model.generate`. Its method `save(path)`
        writes a file.

    Raises:
        UsageError: The model is no transformer, or the prompt is invalid.
    """
    model = load(model) if isinstance(model, (str, Path)) else model
    check_model(model, "prompt_cache")
    cache = PromptCache(model)
    if prompt is not None:
        cache.read(prompt, add_special_tokens)
    return cache


def load_prompt_cache(path: str | Path, model: Any) -> PromptCache:
    """Loads a prompt cache that `PromptCache.save` or `icenet generate --save-prompt-cache` wrote, on any backend.

    Args:
        path: The file (safetensors).
        model: A model with the same weights as the one of which the cache was made.

    Raises:
        WeightsError: The file is damaged, is none of a prompt cache, or is one of another model.
    """
    check_model(model, "load_prompt_cache")
    return caches.load(path, model)


def embed(
    model: Any,
    texts: str | Sequence[str],
    batch_size: int = 32,
    *,
    backend: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: Any = None,
    **options: Any,
) -> Any:
    """Returns one vector for each text, by the pooling and normalization that the folder of the model states.

    Args:
        model: A transformer, or a path that `load` accepts, such as a folder of sentence-transformers.
        texts: The texts. Those that are longer than the model can read are cut, and a warning says how many.
        batch_size: Number of texts that are computed together. It does not change the vectors.
        backend, device, dtype: See `load`, for a path.
        progress: Called with the number of texts that are done and that of all, after each batch.
        options: Keys of `icenet.core.config.EmbeddingConfig`: pooling, dense, normalize, max_seq_length, lower_case,
            prompt, prompt_name, prompts, include_prompt. By default those of the folder; otherwise the mean over the
            tokens.

    Returns:
        float32 `[N, D]` in the order of the texts, or `[D]` for one text that is not in a list.

    Raises:
        UsageError: The model is no transformer or has no tokenizer, or an option or a text is invalid.
        NonFiniteError: A vector is NaN or infinite.
    """
    chosen = {"backend": backend, "device": device, "dtype": dtype}
    if isinstance(model, (str, Path)):
        model = load(model, backend, device, dtype=dtype)
    elif given := [name for name, value in chosen.items() if value is not None]:
        raise UsageError(f"embed: {', '.join(given)}: only for a path; the model is loaded already")
    check_model(model, "embed")
    return embed_texts(model, texts, batch_size, options, progress)


def _draft(model: Any, draft: Any) -> Any:
    """Returns a draft model. One that is a path is loaded on the backend and the device of the model."""
    if isinstance(draft, (str, Path)):
        device = "cpu" if model.is_on_cpu else "gpu" if model.backend == "mlx" else str(model.device)
        draft = load(draft, model.backend, device)
    if draft is not None:
        check_model(draft, "generate")
    return draft
