"""The part of the base class of models that generates text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from icenet.core import backends
from icenet.core.config import GenerationConfig, ModelConfig
from icenet.core.errors import UsageError
from icenet.core.generation.copies import GenerationCopy
from icenet.core.generation.prompt_cache import PromptCache
from icenet.core.generation.request import make_request
from icenet.core.generation.speculative import make_decoder
from icenet.core.generation.streaming import append_to_prompts, generate_tokens, stream_tokens
from icenet.core.models.interface import ModelInterface
from icenet.core.tokenizers.base import Tokenizer


class GenerationMixin(ModelInterface):
    """The methods of a model that continue prompts.

    Attributes:
        config: The model section of the configuration.
        tokenizer: Tokenizer of the model's text, if any.
        generation: Default options of `generate`, if any.
    """

    config: ModelConfig
    tokenizer: Tokenizer | None = None
    generation: GenerationConfig | None = None
    _generation_copy: GenerationCopy | None = None

    def for_generation(self) -> Any:
        """Returns a copy of the model, in evaluation mode, whose layers are prepared for single tokens."""
        if self._generation_copy is None:
            self._generation_copy = GenerationCopy()
        with self.arithmetic():
            tree = backends.module(self.backend, "nn.tree")
            return self._generation_copy.of(self, tree, backends.module(self.backend, "nn.snapshot").Snapshot)

    def generate(
        self,
        input_ids: Any,
        *,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: Sequence[int | str] | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        ignore_eos: bool | None = None,
        overflow: str | None = None,
        prefill_chunk: int | None = None,
        max_batch_size: int | None = None,
        attention_mask: Any = None,
        pad_token_id: int = 0,
        stream: bool = False,
        details: bool = False,
        draft: Any = None,
        num_draft_tokens: int | None = None,
        cache: PromptCache | None = None,
    ) -> Any:
        """Continues prompts. The other options are those of `icenet.core.config.GenerationConfig`.

        Each row ends by itself, and its tokens do not depend on the other prompts of the batch.

        Args:
            input_ids: Token ids `[B, T]`, `[T]`, or a list of lists of unequal length.
            attention_mask: `[B, T]`, 0 or False for padding, which is left out wherever it is.
            pad_token_id: Token that pads prompts on the left and ended rows on the right.
            stream: Whether to return an iterator.
            details: Whether to return the new tokens, the text and the finish reason of each row instead.
            draft, num_draft_tokens, cache: See `icenet.generate`.

        Returns:
            Prompts and new tokens, `[B, L]`, a native array (int32 on MLX, int64 on PyTorch). With `stream`, an
            iterator over the next token of each row, numpy int32 `[B]`; the finish reasons are the value of its
            `StopIteration`. With `details`, one `icenet.core.generation.streaming.Continuation` per row.

        Raises:
            UsageError: A prompt or an option is invalid.
            NonFiniteError: The logits of a row are NaN or infinite.
        """
        options = {
            "max_length": max_length,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            "stop": stop,
            "eos_token_id": eos_token_id,
            "ignore_eos": ignore_eos,
            "overflow": overflow,
            "prefill_chunk": prefill_chunk,
            "max_batch_size": max_batch_size,
        }
        if stream and details:
            raise UsageError("generate: details=True needs stream=False; a stream returns the reasons at its end")
        if stream and max_batch_size is not None:
            raise UsageError(
                "generate: max_batch_size has no effect with stream=True, which decodes all rows together"
            )
        request = make_request(self, input_ids, attention_mask, pad_token_id, options)
        decoder = make_decoder(self, request, cache, draft, num_draft_tokens)
        if stream:
            return stream_tokens(decoder, request)
        found = generate_tokens(decoder, request)
        if details:
            return found
        return self._to_native_tokens(append_to_prompts([row.tokens for row in found], request))
