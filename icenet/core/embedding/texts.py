"""Embeds texts with a transformer: batches of texts of similar lengths, in the order of the texts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core.config import EmbeddingConfig, TransformerConfig
from icenet.core.embedding import dense
from icenet.core.embedding.pooling import Floats, normalize, pool
from icenet.core.errors import ConfigError, NonFiniteError, UsageError
from icenet.core.tokenizers.base import Tokenizer, encode_texts, special_tokens

_log = logging.getLogger("icenet")

Tokens = NDArray[np.int64]
Progress = Callable[[int, int], None]
"""Called with the number of texts that are embedded, and that of all."""


def embed_texts(
    model: Any,
    texts: str | Sequence[str],
    batch_size: int = 32,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Floats:
    """Returns the embedding of each text, float32 `[N, D]`, or `[D]` for one text that is not in a list.

    Args:
        model: A transformer with a tokenizer.
        texts: The texts.
        batch_size: Number of texts that are computed together, which does not change their embeddings.
        options: Keys of `EmbeddingConfig` in place of the model's own.
        progress: Called after each batch.

    Raises:
        UsageError: The model has no hidden states or no tokenizer, or an option or a text is invalid.
        NoTokenError, DataError: See `HFTokenizer.encode`.
        NonFiniteError: An embedding is NaN or infinite.
        ConfigError, WeightsError: A layer after the pooling cannot be read.
    """
    if not isinstance(texts, Iterable):
        raise UsageError(f"embed: texts is of type {type(texts).__name__}; give a text or a list of texts")
    given = [texts] if isinstance(texts, str) else list(texts)
    settings = _settings(model, options or {})
    if not isinstance(batch_size, (int, np.integer)) or isinstance(batch_size, bool) or batch_size < 1:
        raise UsageError(f"embed: batch_size must be a whole number above 0, not {batch_size!r}")
    wrong = next((index for index, text in enumerate(given) if not isinstance(text, str)), None)
    if wrong is not None:
        raise UsageError(f"embed: text {wrong} is of type {type(given[wrong]).__name__}, not a text")
    rows, prompt_length = _tokens(model, given, settings)
    layers = [dense.read(Path(folder)) for folder in settings.dense]
    width = model.config.hidden_size * len(settings.pooling)
    for folder, layer in zip(settings.dense, layers, strict=True):
        if layer.shape.width_in != width:
            raise UsageError(
                f"embed: {folder} reads vectors of {layer.shape.width_in} values, and those before it have {width}; "
                "give dense=[] or another pooling"
            )
        width = layer.shape.width_out
    found = np.empty((len(rows), width), np.float32)
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))  # the longest first: memory fails early
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        vectors = _pool_batch(model, [rows[index] for index in chosen], settings, prompt_length)
        for layer in layers:
            vectors = layer(vectors)
        found[chosen] = normalize(vectors) if settings.normalize else vectors
        wrong_rows = [index for index in chosen if not np.isfinite(found[index]).all()]
        if wrong_rows:
            raise NonFiniteError(
                f"embed: the embedding of text {min(wrong_rows)} is not finite: {model.explain_non_finite()}"
            )
        if progress is not None:
            progress(start + len(chosen), len(order))
    return np.asarray(found[0]) if isinstance(texts, str) else found


def _settings(model: Any, options: Mapping[str, Any]) -> EmbeddingConfig:
    """Returns the model's own settings with the options that are not None, after checks of the model."""
    if not isinstance(model.config, TransformerConfig):
        raise UsageError(f"embed: needs a transformer, not a model of type {model.config.type}")
    if model.tokenizer is None:
        raise UsageError(
            "embed: the model has no tokenizer; save tokenizer.json in its folder: "
            "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    given = {key: value for key, value in options.items() if value is not None}
    if "prompt" in given and "prompt_name" in given:
        raise UsageError("embed: give either prompt or prompt_name")
    base = model.embedding_options or EmbeddingConfig()
    try:
        settings = EmbeddingConfig(**{**base.model_dump(), **given})
    except ConfigError as error:
        raise UsageError(f"embed: {error}") from None
    if not settings.pooling:
        raise UsageError(
            "embed: embedding.pooling is empty, because the folder has steps that are not supported (a notice names "
            'them); give pooling, such as "mean"'
        )
    if settings.max_seq_length is not None and settings.max_seq_length > model.config.max_seq_length:
        raise UsageError(
            f"embed: max_seq_length {settings.max_seq_length} is more than the model's {model.config.max_seq_length}"
        )
    return settings


def _tokens(model: Any, texts: Sequence[str], settings: EmbeddingConfig) -> tuple[list[Tokens], int]:
    """Returns the tokens of each text, and how many tokens of the prompt are not pooled."""
    tokenizer: Tokenizer = model.tokenizer
    prompt = settings.prompt if settings.prompt is not None else settings.prompts.get(settings.prompt_name or "", "")
    limit = settings.max_seq_length or model.config.max_seq_length
    texts = [prompt + text for text in texts]
    texts = [text.lower() for text in texts] if settings.lower_case else texts
    rows, cut = encode_texts(tokenizer, texts, limit)
    if cut:
        _log.warning(f"embed: {cut:,} of {len(texts):,} texts have more than {limit:,} tokens; the rest is left out")
    rows = [row if len(row) else np.array([tokenizer.eot_id]) for row in rows]
    most = max((int(row.max()) for row in rows), default=0)
    if most >= model.config.vocab_size:
        raise UsageError(f"embed: the tokenizer has the token {most}, outside the model's {model.config.vocab_size}")
    if settings.include_prompt or not prompt:
        return rows, 0
    own = encode_texts(tokenizer, [prompt.lower() if settings.lower_case else prompt], limit)[0][0].tolist()
    # without a token after the text, such as [SEP], which does not follow the prompt in a text
    return rows, len(own) - sum(token in special_tokens(tokenizer).values() for token in own[-1:])


def _pool_batch(model: Any, rows: Sequence[Tokens], settings: EmbeddingConfig, prompt_length: int) -> Floats:
    length = max(map(len, rows))
    tokens = np.zeros((len(rows), length), np.int32)
    mask = np.zeros((len(rows), length), np.bool_)
    for index, row in enumerate(rows):
        tokens[index, : len(row)], mask[index, : len(row)] = row, True
    hidden = model.compute_hidden_states(tokens, None if mask.all() else mask)
    mask[:, :prompt_length] = False
    return pool(hidden, mask, settings.pooling)
