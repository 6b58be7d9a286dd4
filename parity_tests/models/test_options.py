"""The options of the transformer: both backends against PyTorch in float64, whole and through the cache.

`core/families` compares the options with Hugging Face's models.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import both_backends, build_model, check_close, native, plain, token_ids

from icenet.core.config import ModelConfig
from icenet.core.errors import ConfigError, UsageError
from icenet.core.nn.relative_positions import distance_buckets

SMALL: dict[str, Any] = {
    "type": "transformer",
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 61,
    "max_seq_length": 40,
    "dropout": 0.0,
}
LLAMA = {
    "positions": "rotary",
    "norm": "rms_norm",
    "feed_forward": "gated",
    "feed_forward_size": 40,
    "activation": "silu",
    "attention_bias": False,
    "feed_forward_bias": False,
    "embedding_scale": 1.0,
    "num_kv_heads": 2,
}
LONG_ROPE = {
    **{"type": "longrope", "factor": 4.0, "original_length": 19},
    **{"short_factors": [1.0, 1.5, 2.0], "long_factors": [2.0, 4.0, 9.0]},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "learned positions": {"positions": "learned", "embedding_scale": 1.0, "activation": "gelu_tanh"},
    "no positions": {"positions": "none"},
    "rotary positions": {"positions": "rotary", "head_size": 8},
    "part of a head": {"positions": "rotary", "head_size": 16, "rotary_fraction": 0.25, "rotary_theta": 500.0},
    "interleaved pairs": {"positions": "rotary", "rotary_pairs": "interleaved"},
    "llama": LLAMA,
    "scaled, linear": {**LLAMA, "rotary_scaling": {"type": "linear", "factor": 3.0}},
    "scaled, llama3": {**LLAMA, "rotary_scaling": {"type": "llama3", "factor": 8.0, "original_length": 16}},
    "scaled, yarn": {**LLAMA, "rotary_scaling": {"type": "yarn", "factor": 4.0, "original_length": 16}},
    "scaled, long-rope": {**LLAMA, "rotary_scaling": LONG_ROPE},
    "scaled, dynamic": {**LLAMA, "rotary_scaling": {"type": "dynamic", "factor": 4.0, "original_length": 19}},
    "sliding layers have another base": {
        **LLAMA,
        **{"sliding_window": 3, "layer_types": ["sliding", "full"], "sliding_rotary_theta": 50.0},
        "rotary_scaling": {"type": "linear", "factor": 3.0},
    },
    "a layer without rotation": {**LLAMA, "rotary_layers": [1], "rotary_pairs": "interleaved"},
    "one head of keys": {"num_kv_heads": 1, "head_size": 10},
    "sliding window": {**LLAMA, "sliding_window": 5},
    "every other layer slides": {**LLAMA, "sliding_window": 3, "layer_types": ["sliding", "full"]},
    "norm of each head": {**LLAMA, "query_key_norm": "head", "output_bias": True},
    "norm of all heads": {**LLAMA, "query_key_norm": "all", "norm_position": "branch"},
    "soft caps": {**LLAMA, "attention_softcap": 0.5, "logit_softcap": 0.7, "attention_scale": 0.3},
    "gemma": {**LLAMA, "norm_offset": True, "norm_position": "sandwich", "tie_embeddings": True},
    "parallel": {"parallel_residual": True, "positions": "rotary", "rotary_fraction": 0.34, "head_size": 12},
    "tied with a bias": {"tie_embeddings": True, "output_bias": True, "output": "transform"},
    "biases": {"attention_output_bias": False, "feed_forward_bias": False, "norm_position": "post"},
    "experts": {**LLAMA, "num_experts": 5, "expert_size": 20},
    "experts in one layer": {
        **{"num_experts": 4, "experts_per_token": 3, "expert_layers": [1], "normalize_expert_weights": False}
    },
}
ENCODER: dict[str, Any] = {"causal": False, "norm_position": "post", "positions": "learned", "embedding_norm": True}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {**ENCODER, "token_types": 3, "output": "none"},
    "roberta": {**ENCODER, "position_offset": 2, "output": "transform", "tie_embeddings": True, "output_bias": True},
    "mpnet": {**ENCODER, "relative_buckets": 8, "relative_max_distance": 12, "output": "none"},
    "soft cap and distances": {"causal": False, "relative_buckets": 4, "attention_softcap": 0.5},
}
CHANGES = {name: {**SMALL, **options} for name, options in OPTIONS.items()}
by_option = pytest.mark.parametrize("values", CHANGES.values(), ids=CHANGES)


def build(backend: str, values: dict[str, Any]) -> Any:
    """Returns a model whose weights, norms included, are all random."""
    model = build_model(backend, ModelConfig(**values))
    drawn = np.random.default_rng(7)
    weights = {name: array + 0.1 * drawn.normal(size=array.shape) for name, array in model.weights().items()}
    model.set_weights({name: array.astype(np.float32) for name, array in weights.items()})
    return model


@both_backends
@by_option
def test_logits_whole_padded_and_through_the_cache(backend: str, values: dict[str, Any]) -> None:
    model, exact_model, noisy = build(backend, values), build("exact", values), build("torch", values)
    tokens = token_ids(2, 20, vocab_size=61)
    mask = np.ones((2, 20), np.int32)
    mask[1, :6] = 0
    for given_mask in (None, mask):
        masks = () if given_mask is None else (torch.from_numpy(given_mask),)
        exact, noise = (plain(each(torch.from_numpy(tokens), *masks)) for each in (exact_model, noisy))
        kept = np.ones((2, 20), bool) if given_mask is None else given_mask.astype(bool)
        own = () if given_mask is None else (native(backend, given_mask),)
        check_close(plain(model(native(backend, tokens), *own))[kept], exact[kept], noise[kept])
        cache, start, parts = model.make_cache(), 0, []
        cache.row_lengths = native(backend, kept.sum(axis=1, keepdims=True, dtype=np.int32))
        for length in (4, 1, 9, 1, 1, 4):
            stop = start + length
            piece_mask = None if given_mask is None else native(backend, given_mask[:, :stop])
            parts.append(plain(model(native(backend, tokens[:, start:stop]), piece_mask, cache)))
            start = stop
        check_close(np.concatenate(parts, axis=1)[kept], exact[kept], noise[kept])


@both_backends
@by_option
def test_a_captured_step_has_the_tokens_of_the_whole_context(backend: str, values: dict[str, Any]) -> None:
    model, prompts = build(backend, values), [[5, 6, 7, 8, 9, 10, 11], [3, 4]]
    rows = model.generate(prompts, max_new_tokens=12, temperature=0.0, details=True)
    for prompt, row in zip(prompts, rows, strict=True):
        tokens = prompt + row.tokens
        logits = plain(model(native(backend, np.array([tokens], np.int32))))[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == row.tokens


@both_backends
@pytest.mark.parametrize("options", ENCODERS.values(), ids=ENCODERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_encoders_compute_each_row_as_alone(backend: str, options: dict[str, Any], side: str) -> None:
    """With padding on either side, the outputs of a row are those of its tokens alone, in float64."""
    values = {**SMALL, **options}
    model, exact_model, noisy = build(backend, values), build("exact", values), build("torch", values)
    tokens, length = token_ids(2, 20, vocab_size=61), 13
    types = np.random.default_rng(3).integers(0, 3, tokens.shape) if "token_types" in values else None
    real = np.ones((2, 20), np.int32)
    columns = slice(20 - length, 20) if side == "left" else slice(0, length)
    real[1] = 0
    real[1, columns] = 1

    def outputs(each: Any, kind: str) -> Any:
        given = {} if types is None else {"token_type_ids": native(kind, types)}
        return plain(each(native(kind, tokens), native(kind, real), **given))[1, columns]

    given = {} if types is None else {"token_type_ids": torch.from_numpy(types[1:, columns])}
    alone = plain(exact_model(torch.from_numpy(tokens[1:, columns]), **given))[0]
    check_close(outputs(model, backend), alone, outputs(noisy, "torch"))
    assert alone.shape == (length, values["hidden_size"] if values.get("output") == "none" else 61)


def test_distances_have_the_groups_of_the_formula() -> None:
    """Raffel et al. (2020): half of the groups have one distance each, the others are even in the logarithm."""
    buckets, farthest, length = 32, 128, 400
    half, exact = buckets // 2, buckets // 4
    found = distance_buckets(length, buckets, farthest)
    for distance in range(1 - length, length):
        n = abs(distance)
        if n >= exact:  # 1e-9: the logarithms of edges are rounded
            scaled = math.log(n / exact) / math.log(farthest / exact) * (half - exact) + 1e-9
            n = min(half - 1, exact + int(scaled))
        assert found[distance + length - 1] == n + (half if distance > 0 else 0)


@both_backends
@pytest.mark.parametrize(
    ("count", "shape", "most", "message"),
    [(0, (1, 4), 0, "no types"), (2, (1, 3), 1, r"must be \[1, 4\]"), (2, (1, 4), 2, r"model\.token_types")],
)
def test_types_of_tokens_are_checked(backend: str, count: int, shape: Any, most: int, message: str) -> None:
    model = build_model(backend, ModelConfig(**SMALL, token_types=count))
    types = np.full(shape, most, np.int32)
    with pytest.raises(UsageError, match=message):
        model(native(backend, token_ids(1, 4, vocab_size=61)), token_type_ids=native(backend, types))


@both_backends
@pytest.mark.parametrize("scaling", [LONG_ROPE, {"type": "dynamic", "factor": 4.0}], ids=["longrope", "dynamic"])
def test_rows_that_become_longer_than_the_original_context(backend: str, scaling: dict[str, Any]) -> None:
    """The frequencies change with the number of tokens of a row, and not with the other rows of the batch."""
    scaling = {**scaling, "original_length": 10}
    model = build(backend, {**SMALL, **LLAMA, "rotary_scaling": scaling, "num_layers": 3})
    prompts = [[5, 6, 7, 8, 9, 10, 11], [3, 4], list(range(20, 38))]
    options = {"max_new_tokens": 14, "temperature": 0.0, "details": True}
    rows = model.generate(prompts, **options)
    for prompt, row in zip(prompts, rows, strict=True):
        assert model.generate([prompt], **options)[0].tokens == row.tokens
        assert model.generate([prompt], **options, prefill_chunk=4)[0].tokens == row.tokens
        if scaling["type"] == "longrope":  # the keys of earlier tokens are computed again
            for count, token in enumerate(row.tokens):
                context = np.array([prompt + row.tokens[:count]], np.int32)
                assert plain(model(native(backend, context)))[0, -1].argmax() == token
    whole = token_ids(2, 20, vocab_size=61)
    mask = np.ones((2, 20), np.int32)
    mask[1, :12] = 0  # a row of 8 tokens next to one of 20
    logits = plain(model(native(backend, whole), native(backend, mask)))
    alone = plain(model(native(backend, whole[1:, 12:])))
    np.testing.assert_allclose(logits[1, 12:], alone[0], rtol=0, atol=1e-5)


@by_option
def test_every_option_changes_the_logits(values: dict[str, Any]) -> None:
    tokens = torch.from_numpy(token_ids(1, 20, vocab_size=61))
    whole = plain(build("torch", values)(tokens))
    for key, value in values.items():
        if key in SMALL or key in ("head_size", "num_kv_heads", "feed_forward_size"):  # which change shapes
            continue
        if ModelConfig.model_fields.get(key) or value == type(ModelConfig(**SMALL)).model_fields[key].default:
            continue
        other = {name: given for name, given in values.items() if name != key}
        try:
            assert plain(build("torch", other)(tokens)).shape != whole.shape or not np.array_equal(
                plain(build("torch", other)(tokens)), whole
            )
        except ConfigError:  # another option needs this one
            continue


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "num_heads 5"),
        ({"num_kv_heads": 3}, "num_kv_heads 3"),
        ({"positions": "rotary", "rotary_fraction": 0.1}, "rotary positions come in pairs"),
        ({"layer_types": ["full"]}, "layer_types has 1 layers"),
        ({"layer_types": ["full", "sliding"]}, "sliding_window"),
        ({"sliding_window": 3, "causal": False}, "causal: true"),
        ({"norm_offset": True}, "rms_norm"),
        ({"parallel_residual": True, "norm_position": "post"}, "norm_position"),
        ({"output": "none", "tie_embeddings": True}, "tie_embeddings"),
        ({"output": "none", "output_bias": True}, "output_bias"),
        ({"position_offset": 2}, "positions: learned"),
        ({"relative_buckets": 8}, "causal: false"),
        ({"relative_buckets": 6, "causal": False}, "multiple of 4"),
        ({"relative_buckets": 32, "relative_max_distance": 8, "causal": False}, "relative_max_distance"),
        ({"attention_softcap": 0}, "attention_softcap"),
        ({"expert_size": 3}, "needs num_experts"),
        ({"normalize_expert_weights": False}, "needs num_experts"),
        ({"num_experts": 2, "experts_per_token": 3}, "experts_per_token 3"),
        ({"num_experts": 2, "expert_layers": [2]}, r"expert_layers \[2\]"),
        ({"num_experts": 2, "expert_layers": [1, 0]}, "ascending"),
        ({"num_experts": 2, "expert_layers": []}, "expert_layers"),
        ({"rotary_scaling": {"type": "linear", "factor": 2.0}}, "positions: rotary"),
        ({"positions": "rotary", "rotary_scaling": {"type": "yarn", "factor": 2.0}}, "original_length"),
        ({"positions": "rotary", "rotary_scaling": {"type": "ntk", "factor": 2.0}}, r"rotary_scaling\.type"),
        ({"positions": "rotary", "rotary_scaling": {"factors": 2.0}}, r"rotary_scaling\.factors"),
        (
            {"positions": "rotary", "rotary_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 2.0}},
            "for type yarn",
        ),
        ({"positions": "rotary", "rotary_scaling": {"type": "longrope", "factor": 2.0}}, "original_length"),
        (
            {"positions": "rotary", "rotary_scaling": {**LONG_ROPE, "long_factors": [1.0]}},
            "long_factors has 1 factors",
        ),
        ({"positions": "rotary", "rotary_scaling": {**LONG_ROPE, "long_factors": None}}, "long_factors"),
        ({"positions": "rotary", "rotary_layers": [2]}, "rotary_layers"),
        ({"positions": "rotary", "rotary_layers": [1, 0]}, "rotary_layers"),
        ({"rotary_layers": [0]}, "positions: rotary"),
        ({"positions": "rotary", "sliding_rotary_theta": 50.0}, "sliding_window"),
    ],
)
def test_options_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**{**SMALL, **changes})


def test_the_gradient_of_the_weight_of_an_rms_norm_is_accurate() -> None:
    """As accurate as PyTorch's, also for the small values of an embedding; a sum term by term is 3 times worse."""
    mx: Any = pytest.importorskip("mlx.core")
    from icenet.nn.norm import RMSNorm

    errors: dict[str, list[float]] = {"mlx": [], "torch": []}
    for seed in range(8):
        draws = np.random.default_rng(seed)
        x, cotangent = ((0.02 * draws.standard_normal((4, 64, 16))).astype(np.float32) for _ in range(2))

        def gradient(dtype: Any, x: Any = x, cotangent: Any = cotangent) -> np.ndarray:
            layer = torch.nn.RMSNorm(16, 1e-6, dtype=dtype)
            (layer(torch.tensor(x, dtype=dtype)) * torch.tensor(cotangent, dtype=dtype)).sum().backward()
            return plain(layer.weight.grad).astype(np.float64)

        layer = RMSNorm(16, 1e-6)

        def loss(weight: Any, layer: Any = layer, x: Any = x, cotangent: Any = cotangent) -> Any:
            layer.weight = weight
            return (layer(mx.array(x)) * mx.array(cotangent)).sum()

        exact = gradient(torch.float64)
        errors["mlx"].append(np.square(plain(mx.grad(loss)(mx.ones(16))) - exact).mean())
        errors["torch"].append(np.square(gradient(torch.float32) - exact).mean())
    assert np.sqrt(np.mean(errors["mlx"])) <= 2 * np.sqrt(np.mean(errors["torch"]))
