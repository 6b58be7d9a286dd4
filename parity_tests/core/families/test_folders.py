"""Folders of Hugging Face without `transformers`: names, layouts, settings, and everything that is refused."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import is_one_line, same_bits

import icenet
from icenet.core import backends
from icenet.core.config import Config, ModelConfig, TransformerConfig, transformer_plan
from icenet.core.data.datasets import dataset_for
from icenet.core.errors import ConfigError, DataError, IceNetError, UsageError, WeightsError
from icenet.core.families import FAMILIES, family_of, folder
from icenet.core.families.family import Family, different_options
from icenet.core.families.weights import ExportedWeights, family_tensors
from icenet.core.runs.open_model import open_target
from icenet.core.weights import files as weight_files

SIZES = {
    "vocab_size": 7, "hidden_size": 6, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 5,
    "max_position_embeddings": 8, "eos_token_id": 2,
}  # fmt: skip
LLAMA: dict[str, Any] = {"model_type": "llama", **SIZES, "num_key_value_heads": 1}
LLAMA_SHAPES = {
    "model.embed_tokens.weight": (7, 6),
    "model.layers.0.input_layernorm.weight": (6,),
    "model.layers.0.self_attn.q_proj.weight": (6, 6),
    "model.layers.0.self_attn.k_proj.weight": (2, 6),
    "model.layers.0.self_attn.v_proj.weight": (2, 6),
    "model.layers.0.self_attn.o_proj.weight": (6, 6),
    "model.layers.0.post_attention_layernorm.weight": (6,),
    "model.layers.0.mlp.gate_proj.weight": (5, 6),
    "model.layers.0.mlp.up_proj.weight": (5, 6),
    "model.layers.0.mlp.down_proj.weight": (6, 5),
    "model.norm.weight": (6,),
    "lm_head.weight": (7, 6),
}


def random_arrays(shapes: dict[str, tuple[int, ...]], dtype: str = "float32") -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    return {name: generator.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_folder(
    path: Path, values: dict[str, Any], arrays: dict[str, np.ndarray], generation: dict[str, Any] | None = None
) -> Path:
    weight_files.write(path, arrays)
    (path / "config.json").write_text(json.dumps(values))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "llama", LLAMA, random_arrays(LLAMA_SHAPES))


def changed(path: Path, **values: Any) -> Path:
    """Changes keys of the config.json of a folder; None removes a key."""
    found = {**json.loads((path / "config.json").read_text()), **values}
    (path / "config.json").write_text(json.dumps({key: value for key, value in found.items() if value is not None}))
    return path


IMAGES: dict[str, dict[str, Any]] = {
    "resnet": {"embedding_size": 5, "hidden_sizes": [8, 12], "depths": [1, 2], "num_labels": 3},
    "vit": {
        "hidden_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 5, "image_size": 9,
        "patch_size": 4, "num_labels": 3,
    },
}  # fmt: skip
IMAGES["deit"] = IMAGES["vit"]


def tiny_config(model_type: str) -> ModelConfig:
    """Returns the model that a family's defaults give with tiny sizes."""
    if model_type in IMAGES:
        return Config.from_dict({"model": FAMILIES[model_type].read(IMAGES[model_type])}).model
    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    values = {**SIZES, "num_hidden_layers": 2, "hidden_size": 12}
    if model_type == "gpt2":
        values = {names.get(key, key): value for key, value in values.items() if key in {*names, "vocab_size"}}
        values |= {"n_positions": 8, "n_inner": 5}
    elif model_type in ("bert", "roberta", "xlm-roberta", "mpnet"):
        values["architectures"] = [FAMILIES[model_type].architecture]
    elif model_type == "distilbert":
        sizes = {"dim": 12, "hidden_dim": 5, "n_heads": 3, "n_layers": 2}
        values = {"vocab_size": 7, "max_position_embeddings": 8, **sizes, "architectures": ["DistilBertForMaskedLM"]}
    elif model_type == "qwen3_moe":
        sizes = {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 6, "mlp_only_layers": [0]}
        values |= {"num_key_value_heads": 1, **sizes}
    else:
        values |= {"rotary_pct": 0.5} if model_type == "gpt_neox" else {"num_key_value_heads": 1}
    values = {"text_config": values} if model_type == "gemma3" else values
    return Config.from_dict({"model": FAMILIES[model_type].read(values)}).model


# The configs of published models, without the keys whose values are the same in all of them.
PUBLISHED: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_size": 576,
        "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "vocab_size": 49152,
        "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
        "max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
        "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
        "transformers_version": "4.40.1", "_name_or_path": "x",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "Llama-3.2-1B": {
        "model_type": "llama", "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "mlp_bias": False,
        "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "vocab_size": 128256,
    },
    "Qwen2.5-0.5B": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
        "max_window_layers": 24, "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
        "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
    },
    "Mixtral-8x7B-v0.1": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
        "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
        "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001, "sliding_window": None, "use_sliding_window": False, "vocab_size": 151936,
    },
    "gpt2": {
        "model_type": "gpt2", "activation_function": "gelu_new", "attn_pdrop": 0.1, "embd_pdrop": 0.1,
        "layer_norm_epsilon": 1e-05, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
        "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
        "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 50257,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "pythia-70m": {
        "model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 512, "intermediate_size": 2048,
        "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "num_attention_heads": 8, "num_hidden_layers": 6,
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "use_parallel_residual": True,
        "vocab_size": 50304,
    },
    "gemma-2-2b": {
        "model_type": "gemma2", "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid", "head_dim": 256,
        "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 2304,
        "hidden_activation": "gelu_pytorch_tanh", "intermediate_size": 9216, "max_position_embeddings": 8192,
        "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000,
    },
    "Phi-3-mini-4k-instruct": {
        "model_type": "phi3", "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "embd_pdrop": 0.0,
        "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096,
        "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
        "sliding_window": 2047, "attention_bias": False, "vocab_size": 32064,
    },
}  # fmt: skip


# ---- names, layouts, settings -----------------------------------------------------------------------------


def test_a_llama_folder_has_our_names(llama: Path) -> None:
    config, weights = open_target(llama)
    assert weights is not None
    theirs = weight_files.read(llama)
    pairs = {
        "token_embedding.weight": "model.embed_tokens.weight",
        "blocks.0.attention_norm.weight": "model.layers.0.input_layernorm.weight",
        "blocks.0.attention.k_proj.weight": "model.layers.0.self_attn.k_proj.weight",
        "blocks.0.attention.out_proj.weight": "model.layers.0.self_attn.o_proj.weight",
        "blocks.0.feed_forward_norm.weight": "model.layers.0.post_attention_layernorm.weight",
        "blocks.0.feed_forward.gate_proj.weight": "model.layers.0.mlp.gate_proj.weight",
        "final_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    for ours, name in pairs.items():
        np.testing.assert_array_equal(weights[ours], theirs[name])
        assert not weights[ours].flags.owndata  # a view of the file
    assert len(weights) == len(theirs)
    assert config.generation.eos_token_id == [2]
    assert icenet.load(llama, "torch").weights().keys() == weights.keys()


def shapes_of(family: Family, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in family_tensors(family, Config(model=config)).items()}


def test_packed_tensors_are_split_and_joined(tmp_path: Path) -> None:
    """GPT-2 has (in, out) weights, GPT-NeoX stacks within each head, Phi-3 has fewer keys and values than queries."""
    config = tiny_config("gpt2")
    arrays = random_arrays(shapes_of(FAMILIES["gpt2"], config))
    values = {"model_type": "gpt2", **FAMILIES["gpt2"].write(config)}
    found = folder.read(write_folder(tmp_path / "gpt2", values, arrays)).weights
    packed = arrays["transformer.h.1.attn.c_attn.weight"]
    assert packed.shape == (12, 36)
    np.testing.assert_array_equal(found["blocks.1.attention.k_proj.weight"], packed[:, 12:24].T)
    np.testing.assert_array_equal(
        found["blocks.1.feed_forward.up_proj.weight"], arrays["transformer.h.1.mlp.c_fc.weight"].T
    )
    np.testing.assert_array_equal(
        found["blocks.0.attention.v_proj.bias"], arrays["transformer.h.0.attn.c_attn.bias"][24:]
    )

    config = tiny_config("gpt_neox")
    arrays = random_arrays(shapes_of(FAMILIES["gpt_neox"], config))
    values = {"model_type": "gpt_neox", **FAMILIES["gpt_neox"].write(config)}
    found = folder.read(write_folder(tmp_path / "neox", values, arrays)).weights
    packed = arrays["gpt_neox.layers.1.attention.query_key_value.weight"]  # 3 heads of 4: q, k, v of head 0, ...
    rows = [*range(4, 8), *range(16, 20), *range(28, 32)]
    np.testing.assert_array_equal(found["blocks.1.attention.k_proj.weight"], packed[rows])

    config = tiny_config("phi3")
    arrays = random_arrays(shapes_of(FAMILIES["phi3"], config))
    values = {"model_type": "phi3", **FAMILIES["phi3"].write(config)}
    found = folder.read(write_folder(tmp_path / "phi3", values, arrays)).weights
    packed = arrays["model.layers.0.self_attn.qkv_proj.weight"]
    assert packed.shape == (20, 12)
    np.testing.assert_array_equal(found["blocks.0.attention.v_proj.weight"], packed[16:])
    joined = arrays["model.layers.0.mlp.gate_up_proj.weight"]
    np.testing.assert_array_equal(found["blocks.0.feed_forward.up_proj.weight"], joined[5:])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_export_is_the_inverse_of_import(model_type: str, tmp_path: Path) -> None:
    """The config has the same options and the tensors the same bits, in the dtype of the file."""
    family, config = FAMILIES[model_type], tiny_config(model_type)
    written = family.write(config)
    arrays = random_arrays(shapes_of(family, config), "float16")
    found = folder.read(write_folder(tmp_path / "in", written, arrays))
    assert found.config.model == config
    exported = dict(ExportedWeights(family, found.config, found.weights))
    assert same_bits({name: a for name, a in exported.items() if not name.endswith("batches_tracked")}, arrays)
    shapes = backends.meta_model(found.config).weight_shapes()
    assert {path: array.shape for path, array in found.weights.items()} == shapes


def test_scaled_positions_are_read() -> None:
    found = FAMILIES["llama"].read(PUBLISHED["Llama-3.2-1B"])["rotary_scaling"]
    limits = {"low_frequency_factor": 1.0, "high_frequency_factor": 4.0}
    assert found == {"type": "llama3", "factor": 32.0, "original_length": 8192, **limits}
    values = {"max_position_embeddings": 64, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    assert FAMILIES["qwen2"].read(values)["rotary_scaling"] == {"type": "yarn", "factor": 4.0, "original_length": 64}


def test_the_options_of_gemma() -> None:
    """Which a table must state, because config.json does not."""
    model = Config.from_dict({"model": FAMILIES["gemma2"].read(PUBLISHED["gemma-2-2b"])}).model
    assert isinstance(model, TransformerConfig)
    assert (model.norm, model.norm_offset, model.norm_position) == ("rms_norm", True, "sandwich")
    assert (model.attention_scale, model.attention_softcap, model.logit_softcap) == (1 / 16, 50.0, 30.0)
    assert (model.embedding_scale, model.tie_embeddings, model.activation) == (None, True, "gelu_tanh")


def test_the_strides_of_a_resnet() -> None:
    """Which its config.json has as flags, both false by default."""
    for flags, expected in (
        ({}, (1, "conv3")),
        ({"downsample_in_first_stage": True}, (2, "conv3")),
        ({"downsample_in_bottleneck": True}, (1, "conv1")),
    ):
        found = FAMILIES["resnet"].read({**IMAGES["resnet"], **flags})
        assert (found["first_stage_stride"], found["bottleneck_stride"]) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_configs_of_published_models_are_read(name: str) -> None:
    """And nothing in them but dropout is lost."""
    values = PUBLISHED[name]
    family = FAMILIES[values["model_type"]]
    config = Config.from_dict({"model": family.read(values)}).model
    assert isinstance(config, TransformerConfig)
    assert different_options(family, config) == []
    for field, ours in (("vocab_size", config.vocab_size), ("rms_norm_eps", config.norm_eps)):
        assert values.get(field, ours) == ours
    expected = {"gemma-2-2b": [4096, None] * 13, "Phi-3-mini-4k-instruct": [2047] * 32}
    windows = [block.attention.window for block in transformer_plan.blocks(config)]
    assert windows == expected.get(name, [None] * config.num_layers)


def test_files_without_the_prefix_and_with_buffers(tmp_path: Path) -> None:
    """As OpenAI's own GPT-2: `wte.weight`, and masks that are no weights."""
    config = tiny_config("gpt2")
    shapes = shapes_of(FAMILIES["gpt2"], config)
    arrays = random_arrays({name.removeprefix("transformer."): shape for name, shape in shapes.items()})
    arrays["h.0.attn.bias"] = np.ones((1, 1, 8, 8), np.float32)
    found = folder.read(write_folder(tmp_path / "bare", FAMILIES["gpt2"].write(config), arrays))
    np.testing.assert_array_equal(found.weights["token_embedding.weight"], arrays["wte.weight"])
    assert found.weights.left_out == ["h.0.attn.bias"]


def test_a_tied_head_may_be_present_absent_or_different(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    arrays = random_arrays(LLAMA_SHAPES)
    changed(llama, tie_word_embeddings=True)
    found = folder.read(llama)  # the files say that the two differ, which transformers obeys
    assert found.config.model.tie_embeddings is False
    assert is_one_line(caplog.messages[-1], "lm_head.weight")
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    weight_files.write(llama, arrays)
    found = folder.read(llama)
    assert (found.config.model.tie_embeddings, found.weights.left_out) == (True, ["lm_head.weight"])
    del arrays["lm_head.weight"]
    weight_files.write(llama, arrays)
    assert folder.read(llama).config.model.tie_embeddings is True


def test_old_and_new_spellings_of_rotary_positions(llama: Path) -> None:
    for values in (
        {"rope_theta": 500.0, "rope_scaling": None},
        {"rope_theta": 500.0, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    ):
        found = folder.read(
            changed(llama, rope_theta=None, rope_scaling=None, rope_parameters=None) and changed(llama, **values)
        )
        assert found.config.model.rotary_theta == 500.0


def test_generation_settings_are_those_of_the_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arrays = random_arrays(LLAMA_SHAPES)
    settings = {
        "eos_token_id": [3, 2],
        "do_sample": True,
        "temperature": 0.6,
        "repetition_penalty": 1.5,
        "num_beams": 4,
    }
    generation = folder.read(write_folder(tmp_path / "a", LLAMA, arrays, settings)).config.generation
    assert generation.eos_token_id == [3, 2]
    assert (generation.temperature, generation.top_k, generation.top_p) == (0.6, 50, 1.0)
    assert generation.repetition_penalty == 1.5
    assert is_one_line(caplog.messages[-1], "generation_config.json", "num_beams")
    path = write_folder(tmp_path / "b", LLAMA, arrays, {"eos_token_id": 5, "do_sample": False, "temperature": 0.6})
    assert folder.read(path).config.generation.temperature == 0
    assert folder.read(path).config.generation.eos_token_id == [5, 2]


def test_generation_settings_of_the_tokenizer(llama: Path, bpe: Path) -> None:
    """Its `eos_token` ends a text, and a prompt has the tokens that it puts around a text."""
    shapes = {name: (400, 6) if shape == (7, 6) else shape for name, shape in LLAMA_SHAPES.items()}
    weight_files.write(llama, random_arrays(shapes))
    changed(llama, vocab_size=400, eos_token_id=5)
    found = folder.read(llama).config.generation
    assert (found.eos_token_id, found.add_special_tokens, found.temperature) == ([5], False, 0)
    (llama / "tokenizer.json").write_bytes(bpe.read_bytes())
    (llama / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    found = folder.read(llama).config.generation
    assert (found.eos_token_id, found.add_special_tokens) == ([5, 0], True)
    content = json.loads(bpe.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 400, "content": "<|end|>"})
    (llama / "tokenizer.json").write_text(json.dumps(content))
    (llama / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    assert folder.read(llama).config.generation.eos_token_id == [5]  # the model has no such token
    assert icenet.load(llama, "torch").tokenizer.vocab_size == 401


def test_a_folder_converts_to_our_form_and_generates(llama: Path, tmp_path: Path, bpe: Path) -> None:
    """With its tokenizer. Its files next to the weights are kept in an export."""
    from icenet.cli.main import main

    shapes = {name: (400, 6) if shape == (7, 6) else shape for name, shape in LLAMA_SHAPES.items()}
    weight_files.write(llama, random_arrays(shapes))
    changed(llama, vocab_size=400, eos_token_id=0)
    (llama / "tokenizer.json").write_bytes(bpe.read_bytes())
    (llama / "chat_template.jinja").write_text("{{ messages }}")
    assert main(["convert", str(llama), str(tmp_path / "ours"), "--to", "canonical"]) in (0, None)
    options = {"max_new_tokens": 3, "temperature": 0, "details": True}
    expected = icenet.generate(icenet.load(llama, "torch"), "def", **options)
    assert icenet.generate(icenet.load(tmp_path / "ours", "torch"), "def", **options) == expected
    assert main(["convert", str(llama), str(tmp_path / "hf"), "--to", "hf"]) in (0, None)
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")
    }
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "from-ours"), "--to", "hf"]) in (0, None)
    assert (tmp_path / "from-ours" / "tokenizer.json").read_bytes() == bpe.read_bytes()
    written = json.loads((tmp_path / "from-ours" / "config.json").read_text())
    assert (written["model_type"], written["eos_token_id"]) == ("llama", 0)
    settings = json.loads((tmp_path / "from-ours" / "generation_config.json").read_text())
    assert settings["do_sample"] is False  # the default of the library, which the folder had
    names = json.loads((tmp_path / "from-ours" / "tokenizer_config.json").read_text())
    assert names["eos_token"] == "<|endoftext|>"


def test_text_is_not_bytes_without_a_tokenizer(llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Except in an exported run of bytes, which has as many tokens. Arrays of tokens are read."""
    shapes = {name: (400, 6) if shape == (7, 6) else shape for name, shape in LLAMA_SHAPES.items()}
    weight_files.write(llama, random_arrays(shapes))
    changed(llama, vocab_size=400, eos_token_id=0)
    icenet.convert(llama, tmp_path / "ours", "canonical")
    for path in (llama, tmp_path / "ours"):
        model = icenet.load(path, "torch")
        with pytest.raises(UsageError, match="has no tokenizer"):
            icenet.generate(model, "a")
        assert tuple(model.generate(np.array([[5]]), max_new_tokens=1).shape) == (1, 2)
        trained = Config.from_dict({"model": {"path": str(path)}, "data": {"source": str(llama / "config.json")}})
        with pytest.raises(DataError, match=r"data\.tokenizer: .*tokenizer\.json: no such file"):
            dataset_for(trained)
    assert "has no tokenizer.json" in caplog.text
    weight_files.write(
        llama, random_arrays({name: (257, 6) if shape == (400, 6) else shape for name, shape in shapes.items()})
    )
    changed(llama, vocab_size=257)
    assert icenet.load(llama, "torch").tokenizer.name == "bytes"


@pytest.mark.parametrize(
    ("to", "name"), [("canonical", "out"), ("torch", "out.pt"), ("hf", "out"), ("gguf", "out.gguf")]
)
def test_only_what_cannot_be_made_again_waits_for_the_disk(
    to: str, name: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip({"torch": "torch", "gguf": "gguf"}.get(to, "numpy"))
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    icenet.convert(llama, tmp_path / name, to)
    assert (tmp_path / name).exists() and not flushed
    if to == "canonical":
        icenet.save(icenet.load(llama), tmp_path / "saved")
        assert len(flushed) == 3  # two files and their folder


def test_shards_are_read_and_written(llama: Path, tmp_path: Path) -> None:
    icenet.convert(llama, tmp_path / "shards", "hf", max_shard_bytes=300)
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    assert same_bits(dict(folder.read(tmp_path / "shards").weights), dict(folder.read(llama).weights))


# ---- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"attention_sinks": 4}, ["attention_sinks", "llama"]),
        ({"s": 4}, ["'s'", "llama"]),
        ({"model_type": "mamba"}, ["mamba", "llama"]),
        ({"model_type": None}, ["model_type"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, ["rotary_scaling", "short_factors"]),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1], "long_factor": [1, 2]}}, ["long_factors"]),
        ({"rope_scaling": {"rope_type": "mrope", "factor": 8.0}}, ["rope_scaling", "mrope"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0, "mscale": 2}}, ["rope_scaling", "mscale"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 1e9}}, ["max_seq_length"]),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 1.0}}}, ["rope_parameters", "sliding_attention"]),
        ({"rope_parameters": "x"}, ["rope_parameters"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"hidden_act": "quick_gelu"}, ["hidden_act", "quick_gelu"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config"]),
        ({"quantization": {"bits": 4}}, ["quantization"]),
        ({"is_encoder_decoder": True}, ["is_encoder_decoder"]),
        ({"hidden_size": "6"}, ["hidden_size"]),
        ({"num_attention_heads": 0}, ["num_attention_heads"]),
        ({"num_hidden_layers": 10**7}, ["num_hidden_layers: 10000000 is more"]),
    ],
)
def test_a_config_that_is_not_supported_is_one_line(llama: Path, values: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        folder.read(changed(llama, **values))
    assert is_one_line(error.value, "config.json", *names)


def test_an_end_token_outside_the_vocabulary_has_no_effect(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = json.loads((llama / "config.json").read_text())["vocab_size"]
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, rows, -1]}))
    assert folder.read(llama).config.generation.eos_token_id == [2]
    assert f"eos_token_id {rows}, -1 is outside the vocabulary of {rows} tokens" in caplog.text


NONSENSE = (
    *(0, -1, 2**40, 10**30, 1e400, float("nan"), -0.5, 1.5, "", "x", True, False, None, [], [1], {}, {"a": 1}),
    *(["sliding_attention"], {"rope_type": ["x"]}, {"rope_type": "yarn"}, {"rope_theta": []}, {"type": "linear"}),
)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_nonsense_in_a_config_is_one_line(model_type: str, tmp_path: Path) -> None:
    family, config = FAMILIES[model_type], tiny_config(model_type)
    arrays = random_arrays(shapes_of(family, config))
    path = write_folder(tmp_path / "in", values := family.write(config), arrays)
    keys = sorted({key for part in family.parts for key in part.keys} | {"eos_token_id", "auto_map"})
    settings = ("eos_token_id", "do_sample", "temperature", "top_k", "repetition_penalty", "max_new_tokens")
    draws = random.Random(0)
    for _ in range(25):
        chosen = {key: draws.choice(NONSENSE) for key in draws.sample(keys, draws.randint(1, 2))}
        (path / "config.json").write_text(json.dumps({**values, **chosen}))
        generation = {draws.choice(settings): draws.choice(NONSENSE)}
        (path / "generation_config.json").write_text(json.dumps(generation))
        try:
            folder.read(path)
        except IceNetError as error:
            assert is_one_line(error, str(path)), (chosen, generation)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"a": 1, "a": 2}', b"[" * 100_000])
def test_a_damaged_config_is_one_line(llama: Path, content: bytes) -> None:
    (llama / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        folder.read(llama)
    assert is_one_line(error.value, "config.json")


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe{", b"[[[", b'{"model": ', b"version https://git-lfs.example/spec/v1"]
)
def test_a_damaged_tokenizer_is_said_when_it_is_copied(llama: Path, tmp_path: Path, content: bytes) -> None:
    (llama / "tokenizer.json").write_bytes(content)
    note = icenet.convert(llama, tmp_path / "out", "hf").note
    assert "tokenizer.json is damaged" in note
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == content
    (llama / "tokenizer.json").write_bytes(b'{"model": {}}\n')
    assert "damaged" not in icenet.convert(llama, tmp_path / "other", "hf").note


def test_all_tensors_that_do_not_fit_are_listed(llama: Path) -> None:
    arrays = random_arrays(LLAMA_SHAPES)
    arrays["model.layers.0.extra"] = arrays.pop("model.norm.weight")
    arrays["score.weight"] = arrays.pop("lm_head.weight")
    arrays["model.layers.0.mlp.up_proj.weight"] = np.zeros((6, 5), np.float32)
    weight_files.write(llama, arrays)
    with pytest.raises(WeightsError) as error:
        folder.read(llama)
    names = ["model.layers.0.extra", "score.weight", "model.norm.weight", "lm_head.weight"]
    assert is_one_line(error.value, *names, "model.layers.0.mlp.up_proj.weight is [6, 5], not [5, 6]")


def test_code_is_not_run(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    (llama / "modeling.py").write_text("raise SystemExit('executed')")
    folder.read(changed(llama, auto_map={"AutoModelForCausalLM": "modeling.Model"}))
    assert is_one_line(caplog.messages[-1], "auto_map")


def test_pickled_weights_are_refused(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(WeightsError) as error:
        folder.read(llama)
    assert is_one_line(error.value, "pytorch_model.bin", "icenet convert")


def test_more_layers_than_tensors(llama: Path) -> None:
    with pytest.raises(WeightsError) as error:
        folder.read(changed(llama, num_hidden_layers=5000))
    assert is_one_line(error.value, "5000 layers")


def test_options_that_no_family_has_are_named(tmp_path: Path, llama: Path) -> None:
    options = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 300, "max_seq_length": 8}
    icenet.save(icenet.build(Config(model=TransformerConfig(**options)), "torch"), tmp_path / "guide")
    with pytest.raises(ConfigError) as error:
        icenet.convert(tmp_path / "guide", tmp_path / "out", "hf")
    assert is_one_line(error.value, "gpt2", "model.positions", "model.embedding_scale")
    assert not (tmp_path / "out").exists()
    for destination, name in ((llama, "same folder"), (tmp_path / "x.safetensors", "folder")):
        with pytest.raises(UsageError) as error:
            icenet.convert(llama, destination, "hf")
        assert is_one_line(error.value, name)
    icenet.convert(llama, tmp_path / "hf", "hf")
    with pytest.raises(IceNetError) as refused:
        icenet.convert(llama, tmp_path / "hf", "hf")
    assert is_one_line(refused.value, "exists", "overwrite")


@pytest.mark.parametrize("form", ["hf", "canonical"])
def test_an_output_in_the_source_or_around_it_is_refused(llama: Path, form: str) -> None:
    before = sorted(llama.parent.rglob("*"))
    for destination in (llama / "out", llama.parent, llama / "out" / ".." / "again"):
        with pytest.raises(UsageError) as error:
            icenet.convert(llama, destination, form, overwrite=True)
        assert is_one_line(error.value, str(destination), str(llama), "next to it")
    assert sorted(llama.parent.rglob("*")) == before


def test_links_out_of_the_folder(llama: Path, tmp_path: Path) -> None:
    """They are refused: an export would copy what they lead to. Those of the hub's cache stay within the model."""
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    link = llama / "generation_config.json"
    link.symlink_to(secret)
    for use in (folder.read, lambda path: icenet.convert(path, tmp_path / "out", "hf")):
        with pytest.raises(ConfigError) as caught:
            use(llama)
        assert is_one_line(caught.value, "generation_config.json", "secret.json", "copy")
    assert not (tmp_path / "out").exists()
    link.unlink()
    (llama / "1_Pooling").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="1_Pooling"):
        folder.read(llama)
    (llama / "1_Pooling").unlink()
    (llama / "notes.pdf").symlink_to(secret)  # not read
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for index, file in enumerate(llama.glob("*.*s*")):
        blob = tmp_path / "models--a--b" / "blobs" / str(index)
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    (tmp_path / "named").symlink_to(llama)
    for place in (snapshot, tmp_path / "named", llama):
        assert folder.read(place).weights


def test_a_saved_model_keeps_its_family_and_the_settings_of_generation(llama: Path, tmp_path: Path) -> None:
    """Without them this Mistral is a Llama."""
    changed(llama, model_type="mistral", sliding_window=None)
    (llama / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.6, "max_new_tokens": 3}')
    model = icenet.load(llama, "torch")
    icenet.save(model, tmp_path / "saved")
    icenet.convert(llama, tmp_path / "converted", "canonical")
    for name in ("saved", "converted"):
        again = icenet.load(tmp_path / name, "torch")
        assert again.generation.model_copy(update={"seed": model.generation.seed}) == model.generation
        icenet.convert(tmp_path / name, tmp_path / f"hf-{name}", "hf")
        assert json.loads((tmp_path / f"hf-{name}/config.json").read_text())["model_type"] == "mistral"


def test_a_folder_for_mlx_lm(tmp_path: Path) -> None:
    """Its config.json has the older spellings, and GPT-2 the names of the model without its head."""
    config = tiny_config("gpt2")
    icenet.save(icenet.build(Config.from_dict({"model": config.model_dump()}), "torch"), tmp_path / "own")
    icenet.convert(tmp_path / "own", tmp_path / "out", "mlx-lm")
    found = weight_files.read(tmp_path / "out")
    assert found.metadata["format"] == "mlx" and "h.0.attn.c_attn.weight" in found and "wte.weight" in found
    assert json.loads((tmp_path / "out/config.json").read_text())["n_ctx"] == config.max_seq_length
    assert icenet.load(tmp_path / "out", "torch").config == config


YARN = {"type": "yarn", "factor": 4.0, "original_length": 4}


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("mistral", {"sliding_window": 5}, "no sliding window: texts of more than 5 tokens"),
        ("mistral", {"sliding_window": None}, None),
        ("gemma3_text", {"layer_types": ["sliding", "sliding"], "sliding_window": 5}, "regular intervals"),
        (
            "gemma3_text",
            {"layer_types": ["sliding", "full"], "sliding_window": 5, "hidden_size": 16, "num_heads": 4},
            None,
        ),
        ("mixtral", {"head_size": 6}, "its heads have hidden_size / num_heads"),
        ("gpt_neox", {"feed_forward_size": 12}, "feed_forward_size is 4 x hidden_size"),
        ("gpt_neox", {"attention_bias": False}, "its attention has biases"),
        ("gpt_neox", {"activation": "gelu"}, "computes gelu_tanh in place of gelu"),
        ("gpt2", {"tie_embeddings": False}, "its GPT-2 has tied embeddings"),
        ("gpt2", {"attention_scale": 1.0}, "scales the scores"),
        ("qwen3", {"attention_bias": True}, "its attention has no biases"),
        ("llama", {"activation": "relu"}, "computes silu in place of relu"),
        ("llama", {"rotary_scaling": {**YARN, "attention_factor": 2.0}}, "attention_factor"),
        ("llama", {"rotary_scaling": YARN}, None),
        ("gemma2", {"attention_softcap": None}, "needs attention_softcap"),
        ("gemma3_text", {"logit_softcap": 3.0}, "has no logit_softcap"),
        ("gemma3_text", {}, "to bfloat16"),  # the root of 12
        ("smollm3", {"layer_types": ["sliding", "full"], "sliding_window": 5}, None),
        ("smollm3", {"layer_types": ["sliding", "sliding"], "sliding_window": 5}, "no sliding window"),
    ],
)
def test_what_mlx_lm_computes_otherwise_is_said(
    family: str, changes: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    config = Config.from_dict({"model": {**tiny_config(family).model_dump(), **changes}})
    icenet.save(icenet.build(config, "torch"), tmp_path / "own")
    notes = icenet.convert(tmp_path / "own", tmp_path / "out", "mlx-lm").note
    assert (words in notes) if words else "mlx-lm" not in notes


def test_mlx_lm_has_no_encoders(tmp_path: Path) -> None:
    config = Config.from_dict({"model": tiny_config("bert").model_dump()})
    icenet.save(icenet.build(config, "torch"), tmp_path / "own")
    with pytest.raises(UsageError, match="--to mlx-lm: mlx-lm has no encoders"):
        icenet.convert(tmp_path / "own", tmp_path / "out", "mlx-lm")


def test_keys_that_mlx_lm_reads_are_added(llama: Path, tmp_path: Path) -> None:
    changed(llama, rope_parameters={"rope_theta": 7.0, "rope_type": "linear", "factor": 2.0})
    icenet.convert(llama, tmp_path / "out", "hf")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["rope_theta"] == 7.0 and written["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert folder.read(tmp_path / "out").config.model == folder.read(llama).config.model


def test_the_nearest_family_is_not_one_that_refuses_a_value() -> None:
    """A decoder is no RoBERTa, whose head refuses the activation before other options are compared."""
    model = Config.from_yaml(Path("quickstart")).model
    with pytest.raises(ConfigError) as error:
        family_of(model)
    assert is_one_line(error.value, "gpt2, the nearest, lacks model.positions: sinusoidal (it has learned)")
