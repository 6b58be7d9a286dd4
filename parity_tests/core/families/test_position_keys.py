"""Keys of rotary positions in config.json: published models, old and new spellings, models of text and images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import is_one_line, same_bits

import icenet
from icenet.core.config import Config, TransformerConfig, transformer_plan
from icenet.core.errors import ConfigError
from icenet.core.families import FAMILIES, folder
from icenet.core.families.family import different_options
from icenet.core.families.weights import ExportedWeights, OriginalWeights, family_tensors
from icenet.core.weights import files as weight_files

SHORT, LONG = [1.0 + 0.05 * pair for pair in range(48)], [1.0 + pair for pair in range(48)]

# The configs of published models, without the keys that all families ignore.
PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma-3-1b-it": {
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
        "attn_logit_softcapping": None, "cache_implementation": "hybrid", "final_logit_softcapping": None,
        "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
        "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
    },
    "gemma-3-4b-it": {
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
        "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144, "mm_tokens_per_image": 256,
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    },
    "SmolLM3-3B": {
        "model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 11008, "layer_types": ["full_attention"] * 36,
        "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False, "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16, "num_hidden_layers": 36,
        "num_key_value_heads": 4, "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False, "vocab_size": 128256,
    },
    "Phi-3-mini-128k-instruct": {
        "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-05,
        "original_max_position_embeddings": 4096, "rope_theta": 10000.0, "sliding_window": 262144,
        "rope_scaling": {"long_factor": LONG, "short_factor": SHORT, "type": "su"}, "vocab_size": 32064,
    },
    "Phi-4-mini-instruct": {
        "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "full_attn_mod": 1,
        "hidden_size": 3072, "intermediate_size": 8192, "interpolate_factor": 1, "lm_head_bias": False,
        "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 24, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True,
        "rope_scaling": {"long_factor": LONG, "short_factor": SHORT, "type": "longrope"}, "vocab_size": 200064,
    },
    "Llama-2-7b, dynamic": {
        "model_type": "llama", "max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 2.5},
    },
}  # fmt: skip


def model_of(values: dict[str, Any]) -> TransformerConfig:
    model = Config.from_dict({"model": FAMILIES[values["model_type"]].read(values)}).model
    assert isinstance(model, TransformerConfig)
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_and_written(name: str) -> None:
    values = PUBLISHED[name]
    model = model_of(values)
    family = FAMILIES[values["model_type"]]
    assert different_options(family, model) == []


def test_the_positions_of_published_models() -> None:
    small, large = model_of(PUBLISHED["gemma-3-1b-it"]), model_of(PUBLISHED["gemma-3-4b-it"])
    assert small.rotary_scaling is None and large.rotary_scaling is not None
    assert (large.rotary_scaling.type, large.rotary_scaling.factor) == ("linear", 8.0)
    for model, window in ((small, 512), (large, 1024)):
        assert (model.rotary_theta, model.sliding_rotary_theta) == (1e6, 1e4)
        plans = transformer_plan.blocks(model)
        assert [plan.attention.window for plan in plans[:7]] == [window] * 5 + [None, window]
        assert [plan.attention.rotary for plan in plans[:7]] == ["sliding"] * 5 + ["full", "sliding"]
        assert set(transformer_plan.rotary_plans(model)) == {"full", "sliding"}
        assert transformer_plan.rotary_plans(model)["sliding"].scaling is None
    assert (large.num_heads, large.num_kv_heads, large.head_size, large.vocab_size) == (8, 4, 256, 262208)

    smol = model_of(PUBLISHED["SmolLM3-3B"])
    assert smol.rotary_theta == 5e6
    assert smol.rotary_layers == [index for index in range(36) if index % 4 != 3]

    phi = model_of(PUBLISHED["Phi-3-mini-128k-instruct"])
    assert phi.rotary_scaling is not None and phi.max_seq_length == 131072
    assert (phi.rotary_scaling.factor, phi.rotary_scaling.original_length) == (32.0, 4096)
    assert (phi.rotary_scaling.short_factors, phi.rotary_scaling.long_factors) == (SHORT, LONG)
    llama = model_of(PUBLISHED["Llama-2-7b, dynamic"])
    assert llama.rotary_scaling is not None
    assert (llama.rotary_scaling.original_length, llama.max_seq_length) == (4096, 10240)


SIZES = {
    "vocab_size": 60, "hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 5,
    "num_key_value_heads": 1, "head_dim": 6, "max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 500.0, "rope_local_base_freq": 50.0, "rope_scaling": LINEAR},
        {
            "rope_parameters": {
                "full_attention": {"rope_theta": 500.0, **LINEAR},
                "sliding_attention": {"rope_theta": 50.0, "rope_type": "default"},
            }
        },
        {"rope_parameters": {"full_attention": LINEAR}, "rope_theta": 500.0, "rope_local_base_freq": 50.0},
    ],
)
def test_spellings_of_two_bases(spelling: dict[str, Any]) -> None:
    model = model_of(
        {"model_type": "gemma3_text", **SIZES, "sliding_window": 4, "sliding_window_pattern": 2, **spelling}
    )
    assert (model.rotary_theta, model.sliding_rotary_theta) == (500.0, 50.0)
    assert model.rotary_scaling is not None and model.rotary_scaling.factor == 2.0
    assert model.layer_types == ["sliding", "full", "sliding"]
    written = FAMILIES["gemma3_text"].write(model)
    assert (written["rope_local_base_freq"], written["sliding_window_pattern"]) == (50.0, 2)  # which mlx-lm reads


def test_spellings_of_long_rope_and_yarn() -> None:
    factors = {"short_factor": [1, 2, 3], "long_factor": [2, 4, 6]}
    expected = {"type": "longrope", "short_factors": [1, 2, 3], "long_factors": [2, 4, 6], "original_length": 16}
    for scaling in (
        {"rope_scaling": {"type": "su", **factors}},
        {"rope_scaling": {"type": "yarn", **factors}},  # Phi-3's first name
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **factors}},
    ):
        values = {**SIZES, "original_max_position_embeddings": 16, **scaling}
        assert FAMILIES["phi3"].read(values)["rotary_scaling"] == {**expected, "factor": 2.0}
    values = {**SIZES, "rope_scaling": {"type": "longrope", "original_max_position_embeddings": 16, **factors}}
    assert FAMILIES["llama"].read(values)["rotary_scaling"] == {**expected, "factor": 2.0}
    yarn = {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.2}
    found = FAMILIES["qwen3"].read({**SIZES, "rope_scaling": yarn})["rotary_scaling"]["attention_factor"]
    assert found == pytest.approx((0.07 * np.log(4) + 1) / (0.12 * np.log(4) + 1))


@pytest.mark.parametrize(
    ("interval", "layers"), [(2, [0, 2, 4, 6]), (3, [0, 1, 3, 4, 6]), (None, [0, 1, 2, 4, 5, 6])]
)
def test_layers_without_positions_by_an_interval(interval: int | None, layers: list[int]) -> None:
    """As the library's `SmolLM3Config` lists them if the file does not: every second, third, or fourth has none."""
    given = {} if interval is None else {"no_rope_layer_interval": interval}
    model = model_of({"model_type": "smollm3", **SIZES, "num_hidden_layers": 7, **given})
    assert model.rotary_layers == layers


@pytest.mark.parametrize(
    "spelling",
    [
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ],
)
def test_spellings_of_the_rotated_part_of_a_head(spelling: dict[str, Any]) -> None:
    assert FAMILIES["phi3"].read({**SIZES, **spelling})["rotary_fraction"] == 0.5


def test_options_that_are_equal_are_written() -> None:
    """An attention factor that is the default of the library is left out, and any other is written."""
    model = model_of(PUBLISHED["Phi-3-mini-128k-instruct"])
    assert "attention_factor" not in FAMILIES["phi3"].write(model)["rope_scaling"]
    assert model.rotary_scaling is not None
    for change in ({"factor": 3.0}, {"attention_factor": 1.5}):
        scaling = {**model.rotary_scaling.model_dump(), **change}
        other = TransformerConfig(**{**model.model_dump(), "rotary_scaling": scaling})
        assert "attention_factor" in FAMILIES["phi3"].write(other)["rope_scaling"]
        assert different_options(FAMILIES["phi3"], other) == []
    assert different_options(FAMILIES["llama"], model_of(PUBLISHED["SmolLM3-3B"])) == ["rotary_layers"]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, ["no_rope_layers"]),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0, 2]}, ["no_rope_layers"]),
        (
            {"model_type": "smollm3", "sliding_window": 4, "layer_types": ["sliding_attention"] * 3},
            ["layer_types", "use_sliding_window"],
        ),
        ({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 5.0}}, ["rope_parameters", "rope_theta"]),
        ({"model_type": "gemma3_text", "rope_parameters": {"sliding_attention": LINEAR}}, ["sliding_attention"]),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 5.0}, ["attn_logit_softcapping"]),
        ({"model_type": "phi3", "rope_scaling": LINEAR}, ["rope_scaling", "linear"]),
        ({"model_type": "gemma3", "text_config": None}, ["text_config"]),
        ({"model_type": "gemma3", "text_config": {**SIZES, "x": 1}}, ["text_config", "'x'"]),
    ],
)
def test_what_is_not_supported_is_named(values: dict[str, Any], names: list[str]) -> None:
    sizes = {} if values["model_type"] == "gemma3" else SIZES
    with pytest.raises(ConfigError) as error:
        model_of({**sizes, **values})
    assert is_one_line(error.value, *names)


def test_the_text_part_of_a_model_of_text_and_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its tensors have one of two beginnings. The other tensors are named, and kept in an export without change."""
    text = {**SIZES, "model_type": "gemma3_text", "sliding_window": 4}
    values = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "mm_tokens_per_image": 4}
    family, model = FAMILIES["gemma3"], model_of(values)
    config = Config(model=model)
    generator = np.random.default_rng(0)
    arrays = {
        name: generator.normal(size=tensor.shape).astype(np.float32)
        for name, tensor in family_tensors(family, config).items()
    }
    assert all(name.startswith("language_model.model.") for name in arrays)
    images = {f"vision_tower.layers.{index}.weight": np.ones(2, np.float32) for index in range(10)}
    weight_files.write(tmp_path / "a", {**arrays, **images})
    renamed = {
        name.replace("language_model.model.", "model.language_model."): array for name, array in arrays.items()
    }
    weight_files.write(tmp_path / "b", renamed)
    for name in "ab":
        (tmp_path / name / "config.json").write_text(json.dumps(values))
    first, second = folder.read(tmp_path / "a"), folder.read(tmp_path / "b")
    assert is_one_line(caplog.messages[-1], "10 tensors of vision_tower")
    assert same_bits(dict(first.weights), dict(second.weights))
    assert same_bits(dict(OriginalWeights(first.weights)), {**arrays, **images})
    icenet.save(icenet.load(tmp_path / "a", "torch", "cpu"), tmp_path / "ours")
    icenet.convert(tmp_path / "ours", tmp_path / "text", "hf")
    exported = folder.read(tmp_path / "text")
    assert exported.family.model_type == "gemma3_text" and exported.config.model == model
    plain = {name.removeprefix("language_model."): array for name, array in arrays.items()}
    assert same_bits(dict(ExportedWeights(exported.family, exported.config, exported.weights)), plain)
