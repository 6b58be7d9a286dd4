"""mlx-lm as a peer of `icenet bench`. The mirror is `icenet_torch/tools/peers.py`, with Hugging Face's transformers.

Both run a folder of weights with the functions that their users call.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import numpy as np

from icenet.nn.arrays import DTYPES

TEMPERATURE, TOP_K = 0.8, 50
"""The settings of sampled tokens, also those of IceNet's sides."""
FRAMEWORK = "import mlx.core, mlx.nn"
FIRST_TOKEN = """
import sys
from pathlib import Path
import mlx.core as mx
mx.set_default_device(mx.cpu if sys.argv[2] == "cpu" else mx.gpu)
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
model, _ = load_model(Path(sys.argv[1]))
model.set_dtype(getattr(mx, sys.argv[4]))
next(generate_step(mx.array([1, 2, 3]), model, max_tokens=1))
"""
"""Programs that import the framework, and that generate a token. Arguments: folder, device, dtype, its long name."""


class Peer:
    """A model of mlx-lm.

    Args:
        folder: A folder of Hugging Face or of mlx-lm.
        device: The device. It becomes MLX's default device.
        dtype: fp32, bf16 or fp16. Quantized weights stay as they are.
        sample: Whether to sample tokens, instead of taking the most likely ones.
    """

    def __init__(self, folder: str, device: mx.Device, dtype: str, sample: bool) -> None:
        mx.set_default_device(device)  # mlx_lm.generate creates its stream on it when it is imported
        from mlx_lm.sample_utils import make_sampler
        from mlx_lm.utils import load_model

        self._model, _ = load_model(Path(folder), lazy=True)
        self._model.set_dtype(DTYPES[dtype])
        mx.eval(self._model.parameters())
        self._model.eval()
        self._sampler = make_sampler(temp=TEMPERATURE, top_k=TOP_K) if sample else None
        self._batch_options: dict[str, int] | None = None

    def generate(self, prompts: Any, new_tokens: int) -> list[list[int]]:
        """Returns the new tokens of each row of prompts `[B, T]`.

        `generate_step` continues one prompt. Several of equal length are continued by the same loop over the model
        and its cache, which queues the next step before it reads the last token.
        """
        from mlx_lm.generate import generate_step
        from mlx_lm.models.cache import make_prompt_cache

        if len(prompts) == 1:
            options: dict[str, Any] = {"max_tokens": new_tokens, "sampler": self._sampler}
            return [[int(token) for token, _ in generate_step(mx.array(prompts[0]), self._model, **options)]]
        cache = make_prompt_cache(self._model)
        token = self._choose(self._last_logits(mx.array(prompts), cache))
        mx.async_eval(token)
        columns = []
        for _ in range(new_tokens - 1):
            following = self._choose(self._model(token[:, None], cache=cache)[:, -1])
            mx.async_eval(following)
            columns.append(np.array(token))
            token = following
        return np.stack([*columns, np.array(token)], 1).tolist()

    def prefill(self, prompts: Any) -> list[list[int]]:
        """Reads prompts `[B, T]` into a new cache. Returns the next token of each."""
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(self._model)
        token = self._choose(self._last_logits(mx.array(prompts), cache))
        mx.eval(token, [layer.state for layer in cache])
        return np.array(token)[:, None].tolist()

    def continue_all(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """Returns the new tokens of prompts of unequal lengths, by mlx-lm's batch generator.

        Its sizes of batches are its defaults, or all prompts at once, whichever is faster in the first two calls.
        """
        if self._batch_options is None:
            seconds = []
            choices = [{}, {"completion_batch_size": len(prompts), "prefill_batch_size": len(prompts)}]
            for options in choices:
                begin = perf_counter()
                self._continue(prompts, new_tokens, options)
                seconds.append(perf_counter() - begin)
            self._batch_options = choices[int(np.argmin(seconds))]
        return self._continue(prompts, new_tokens, self._batch_options)

    def _continue(self, prompts: Sequence[Sequence[int]], new_tokens: int, options: dict[str, int]) -> Any:
        from mlx_lm.generate import BatchGenerator

        generator = BatchGenerator(self._model, max_tokens=new_tokens, sampler=self._sampler, **options)
        rows: dict[int, list[int]] = {uid: [] for uid in generator.insert([list(prompt) for prompt in prompts])}
        while responses := generator.next_generated():
            for response in responses:
                rows[response.uid].append(int(response.token))
        generator.close()
        return list(rows.values())

    def _choose(self, logits: mx.array) -> mx.array:
        return mx.argmax(logits, -1) if self._sampler is None else self._sampler(logits)

    def _last_logits(self, tokens: mx.array, cache: Any) -> mx.array:
        """Returns the logits `[B, V]` after the last tokens, without those of the others."""
        inner = getattr(self._model, "model", None)
        head = getattr(self._model, "lm_head", None)
        if head is None and inner is not None:
            embedding = getattr(inner, "embed_tokens", None) or getattr(inner, "wte", None)
            head = getattr(embedding, "as_linear", None)
        if inner is None or head is None:
            return self._model(tokens, cache=cache)[:, -1]
        return head(inner(tokens, cache=cache)[:, -1])
