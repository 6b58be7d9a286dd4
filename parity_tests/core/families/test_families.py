"""Each family against the models of `transformers`: logits, greedy tokens, and folders in both directions."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import native, plain, same_bits, token_ids, version

import icenet
from icenet.core.weights import files as weight_files

for _name in ("torch", "mlx", "transformers"):
    pytest.importorskip(_name)
importlib.import_module("icenet.blas")  # before mlx.core
torch: Any = importlib.import_module("torch")
transformers: Any = importlib.import_module("transformers")

VOCABULARY, LENGTH, NEW = 61, 20, 12
SIZES = {
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "num_hidden_layers": 2, "intermediate_size": 20,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
HEADS = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
THETA = {"rope_type": "default", "rope_theta": 5000.0}
LONG_ROPE = {"rope_type": "longrope", "short_factor": [1.1, 1.3, 1.7], "long_factor": [1.5, 3.0, 7.5]}
GPT2 = {
    "vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 24, "n_layer": 2, "n_head": 3,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip

# Sizes that divide nothing where the family allows it, and windows shorter than the prompt.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**SIZES, **HEADS, "head_dim": 10, "attention_bias": True, "rope_parameters": THETA}),
    "llama-tied": ("Llama", {**SIZES, **HEADS, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-3": (
        "Llama",
        {**SIZES, **HEADS, "head_dim": 16,
         "rope_parameters": {**THETA, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    ),
    "mistral": (
        "Mistral",
        {**SIZES, "hidden_size": 20, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 6,
         "sliding_window": 7},
    ),
    "qwen2": (
        "Qwen2",
        {**SIZES, **HEADS, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1,
         "tie_word_embeddings": True},
    ),
    "qwen3": (
        "Qwen3",
        {**SIZES, "hidden_size": 20, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
         "attention_bias": True,
         "rope_parameters": {**THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    ),
    "olmo2": ("Olmo2", {**SIZES, **HEADS, "rope_parameters": {**THETA, "rope_type": "linear", "factor": 3.0}}),
    "gemma2": (
        "Gemma2",
        {**SIZES, **HEADS, "head_dim": 10, "num_hidden_layers": 3, "query_pre_attn_scalar": 7, "sliding_window": 6,
         "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
    ),
    "phi3": (
        "Phi3",
        {**SIZES, **HEADS, "pad_token_id": 0, "sliding_window": 7,
         "rope_parameters": {**THETA, "partial_rotary_factor": 1.0}},
    ),
    # above original_max_position_embeddings after some new tokens
    "phi3-long-rope": (
        "Phi3",
        {**SIZES, **HEADS, "pad_token_id": 0, "original_max_position_embeddings": LENGTH + 4,
         "rope_parameters": {**LONG_ROPE, "attention_factor": 1.3}},
    ),
    "phi3-long-prompt": (
        "Phi3",
        {**SIZES, **HEADS, "pad_token_id": 0, "original_max_position_embeddings": LENGTH - 4,
         "rope_parameters": LONG_ROPE},
    ),
    "llama-dynamic": (
        "Llama",
        {**SIZES, **HEADS, "max_position_embeddings": LENGTH + 4, "head_dim": 10,
         "rope_parameters": {**THETA, "rope_type": "dynamic", "factor": 3.3}},
    ),
    "gpt_neox-dynamic": (
        "GPTNeoX",
        {**SIZES, "hidden_size": 24, "num_attention_heads": 3, "max_position_embeddings": LENGTH - 4,
         "rope_parameters": {**THETA, "rope_type": "dynamic", "factor": 3.0, "partial_rotary_factor": 0.5}},
    ),
    "gemma3": (
        "Gemma3Text",
        {**SIZES, **HEADS, "head_dim": 10, "num_hidden_layers": 4, "query_pre_attn_scalar": 7, "sliding_window": 6,
         "sliding_window_pattern": 3, "final_logit_softcapping": 1.5,
         "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5e4},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 700.0}}},
    ),
    "smollm3": (
        "SmolLM3",
        {**SIZES, **HEADS, "num_hidden_layers": 3, "head_dim": 10, "tie_word_embeddings": False, "mlp_bias": True,
         "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 6,
         "rope_parameters": {**THETA, "rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.2,
                             "original_max_position_embeddings": 16}},
    ),
    "mixtral": (
        "Mixtral",
        {**SIZES, **HEADS, "head_dim": 10, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 7},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {**SIZES, **HEADS, "head_dim": 8, "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 9,
         "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1], "attention_bias": True,
         "use_sliding_window": True, "sliding_window": 6},
    ),
    "qwen3_moe-all-layers": (
        "Qwen3Moe",
        {**SIZES, **HEADS, "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 9,
         "norm_topk_prob": True, "tie_word_embeddings": True, "rope_parameters": THETA},
    ),
    "gpt2": ("GPT2", {**GPT2, "n_inner": 20}),
    "gpt2-untied": ("GPT2", {**GPT2, "tie_word_embeddings": False, "scale_attn_weights": False}),
    "gpt_neox": (
        "GPTNeoX",
        {**SIZES, "hidden_size": 24, "num_attention_heads": 3, "tie_word_embeddings": True,
         "rope_parameters": {**THETA, "partial_rotary_factor": 0.5}},
    ),
    "gpt_neox-sequential": (
        "GPTNeoX",
        {**SIZES, "hidden_size": 24, "num_attention_heads": 3, "use_parallel_residual": False,
         "attention_bias": False, "hidden_act": "gelu_new"},
    ),
}  # fmt: skip


class Case:
    """A random model of `transformers`, its folder, and what it computes.

    Attributes:
        folder: Written by `save_pretrained`.
        tokens: A prompt, `[1, LENGTH]`.
        single, exact: Its logits in float32 and float64.
        greedy: The continuation of the prompt, with a cache.
    """

    def __init__(self, folder: Path, kind: str, options: dict[str, Any]) -> None:
        config = getattr(transformers, f"{kind}Config")(**options)
        config._attn_implementation = "eager"  # the other implementations have no soft cap
        config._experts_implementation = "eager"  # the others have no float64
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                is_norm = parameter.ndim == 1 and name.endswith("weight")
                parameter.copy_(0.8 + 0.5 * noise if is_norm else 0.3 * noise)
        self.folder = folder
        model.save_pretrained(folder)
        self.tokens = token_ids(1, LENGTH, vocab_size=VOCABULARY)
        ids = torch.tensor(self.tokens)
        with torch.no_grad():
            self.single = model(ids).logits.numpy()
            self.greedy = model.generate(ids, do_sample=False, max_new_tokens=NEW)[0, LENGTH:].tolist()
            self.exact = model.double()(ids).logits.numpy()


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield Case(tmp_path_factory.mktemp("families") / request.param, *CASES[request.param])


def logits_of(folder: Path, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", experts_implementation="eager"
        )
        return np.asarray(model(torch.tensor(tokens)).logits.numpy())


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_logits_and_greedy_tokens_are_those_of_transformers(case: Case, backend: str) -> None:
    """The error is at most 8 times that of `transformers` in float32, both against `transformers` in float64."""
    model = icenet.load(case.folder, backend, "cpu")
    found = plain(model(native(backend, case.tokens)))
    noise = max(np.abs(case.single - case.exact).max(), 2**-23 * np.abs(case.exact).max())
    assert np.abs(found - case.exact).max() <= 8 * noise
    if case.folder.name == "phi3-long-rope" and version(transformers.__version__) < (5, 24):
        return  # it read only the last token again where the factors change
    continued = np.asarray(model.generate(case.tokens, max_new_tokens=NEW, temperature=0))
    assert continued[0, -NEW:].tolist() == case.greedy


def test_an_exported_folder_has_the_same_tensors_and_is_loaded(case: Case, tmp_path: Path) -> None:
    """Directly, and by way of IceNet's own folder."""
    original = weight_files.read(case.folder)
    icenet.convert(case.folder, tmp_path / "again", "hf")
    assert same_bits(dict(weight_files.read(tmp_path / "again")), dict(original))
    icenet.save(icenet.load(case.folder, "torch", "cpu"), tmp_path / "ours")
    icenet.convert(tmp_path / "ours", tmp_path / "hf", "hf")
    written = json.loads((case.folder / "config.json").read_text())
    prefix = "transformer." if case.folder.name == "gpt2" else ""  # which mlx-lm does not read
    expected = {name.removeprefix(prefix): array for name, array in original.items()}
    assert same_bits(dict(weight_files.read(tmp_path / "hf")), expected)
    found = json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"]
    assert found == written["model_type"]
    np.testing.assert_array_equal(logits_of(tmp_path / "again", case.tokens), case.single)
    np.testing.assert_allclose(logits_of(tmp_path / "hf", case.tokens), case.single, rtol=0, atol=1e-5)
