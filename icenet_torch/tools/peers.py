"""Hugging Face's transformers as a peer of `icenet bench`. The mirror is `icenet/tools/peers.py`, with mlx-lm.

Both run a folder of weights with the functions that their users call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from icenet_torch.nn.arrays import DTYPES

TEMPERATURE, TOP_K = 0.8, 50
"""The settings of sampled tokens, also those of IceNet's sides."""
FRAMEWORK = "import torch"
FIRST_TOKEN = """
import sys
import torch
from transformers import AutoModelForCausalLM
gpu = "mps" if torch.backends.mps.is_available() else "cuda"
device = "cpu" if sys.argv[2] == "cpu" else gpu
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[4]), local_files_only=True)
model = model.to(device).eval()
ids = torch.tensor([[1, 2, 3]], device=device)
model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0)
"""
"""Programs that import the framework, and that generate a token. Arguments: folder, device, dtype, its long name."""


class Peer:
    """A model of transformers, continued by its `generate`.

    Args:
        folder: A folder of Hugging Face or of mlx-lm.
        device: The device.
        dtype: fp32, bf16 or fp16.
        sample: Whether to sample tokens, instead of taking the most likely ones.
        cache: None for a cache that grows. "static" for one of fixed size, with which `generate` compiles the model
            on CUDA.
    """

    def __init__(self, folder: str, device: torch.device, dtype: str, sample: bool, cache: str | None = None) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], local_files_only=True)
        self._model = model.to(device).eval()
        self._device = device
        self._options: dict[str, Any] = {"do_sample": False}
        if sample:
            self._options = {"do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K}
        if cache is not None:
            self._options["cache_implementation"] = cache
        self._longest = 0

    @torch.no_grad()
    def generate(self, prompts: Any, new_tokens: int) -> list[list[int]]:
        """Returns the new tokens of each row of prompts `[B, T]`.

        The limit is that of the longest call, and a criterion stops earlier, so that a static cache keeps its size.
        """
        ids = torch.as_tensor(np.asarray(prompts), dtype=torch.long).to(self._device)
        return self._generate(ids, torch.ones_like(ids), new_tokens)

    @torch.no_grad()
    def prefill(self, prompts: Any) -> list[list[int]]:
        """Reads prompts `[B, T]` into a new cache. Returns the next token of each."""
        ids = torch.as_tensor(np.asarray(prompts), dtype=torch.long).to(self._device)
        return self._model(ids, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1).tolist()

    @torch.no_grad()
    def continue_all(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """Returns the new tokens of prompts of unequal lengths, padded on the left, in one batch."""
        longest = max(map(len, prompts))
        ids = np.zeros((len(prompts), longest), np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
        return self._generate(
            torch.from_numpy(ids).to(self._device), torch.from_numpy(mask).to(self._device), new_tokens
        )

    def _generate(self, ids: torch.Tensor, mask: torch.Tensor, new_tokens: int) -> list[list[int]]:
        from transformers import GenerationConfig, StoppingCriteriaList

        length = ids.shape[1]
        self._longest = max(self._longest, new_tokens)

        def stop(tokens: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
            done = tokens.shape[1] >= length + new_tokens
            return torch.full((len(tokens),), done, dtype=torch.bool, device=tokens.device)

        stops = StoppingCriteriaList([stop] if new_tokens < self._longest else [])
        options = GenerationConfig(pad_token_id=0, eos_token_id=None, max_new_tokens=self._longest, **self._options)
        out = self._model.generate(ids, attention_mask=mask, stopping_criteria=stops, generation_config=options)
        return out[:, length:].tolist()
