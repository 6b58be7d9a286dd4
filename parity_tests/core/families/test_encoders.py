"""Encoders against `transformers`: outputs of padded batches in float64, and folders in both directions."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import is_one_line, native, plain, same_bits

import icenet
from icenet.core.config import Config, ModelConfig, TransformerConfig
from icenet.core.errors import ConfigError, WeightsError
from icenet.core.families import FAMILIES, different_options, folder
from icenet.core.weights import files as weight_files

for _name in ("torch", "mlx", "transformers"):
    pytest.importorskip(_name)
importlib.import_module("icenet.blas")  # before mlx.core
torch: Any = importlib.import_module("torch")
transformers: Any = importlib.import_module("transformers")

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 21, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 17, "max_position_embeddings": 43, "layer_norm_eps": 1e-5,
}  # fmt: skip
DISTIL = {
    "vocab_size": VOCABULARY, "dim": 21, "n_layers": 2, "n_heads": 3, "hidden_dim": 17, "max_position_embeddings": 43,
}  # fmt: skip
# Model, with the head of masked language models or without, and options.
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "bert": ("Bert", False, {**SIZES, "type_vocab_size": 3}),
    "bert-masked": ("Bert", True, {**SIZES, "hidden_act": "relu"}),
    "bert-untied": ("Bert", True, {**SIZES, "tie_word_embeddings": False}),
    "roberta": ("Roberta", False, {**SIZES, "type_vocab_size": 1, "pad_token_id": 3}),
    "roberta-masked": ("Roberta", True, SIZES),
    "xlm-roberta": ("XLMRoberta", False, {**SIZES, "type_vocab_size": 1}),
    "distilbert": ("DistilBert", False, DISTIL),
    "distilbert-masked": ("DistilBert", True, {**DISTIL, "activation": "gelu_new"}),
    "mpnet": ("MPNet", False, SIZES),
    "mpnet-masked": ("MPNet", True, {**SIZES, "tie_word_embeddings": False}),
}


class Case:
    """A random model of `transformers`, its folder, and what it computes of a batch with padding on the right.

    Attributes:
        name: Its key in `CASES`.
        folder: Written by `save_pretrained`.
        tokens, mask, types: The batch, `[2, 20]`; types are None if the model has none.
        single, exact: Its output in float32 and float64.
    """

    def __init__(self, folder: Path, name: str) -> None:
        kind, masked, options = CASES[name]
        config = getattr(transformers, f"{kind}Config")(**options)
        model = getattr(transformers, "AutoModelForMaskedLM" if masked else "AutoModel").from_config(config).eval()
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                is_norm = parameter.ndim == 1 and path.endswith("weight")
                parameter.copy_(0.8 + 0.5 * noise if is_norm else 0.3 * noise)
        self.name, self.folder = name, folder
        model.save_pretrained(folder)
        drawn = np.random.default_rng(4)
        self.tokens = drawn.integers(4, VOCABULARY, (2, 20))
        self.mask = np.ones((2, 20), np.int64)
        self.mask[1, 13:] = 0
        padding = getattr(config, "pad_token_id", None)  # RoBERTa finds padding by its id
        self.tokens[self.mask == 0] = 0 if padding is None else padding
        self.types = drawn.integers(0, 3, (2, 20)) if options.get("type_vocab_size") == 3 else None
        given = {} if self.types is None else {"token_type_ids": torch.tensor(self.types)}
        inputs = {"input_ids": torch.tensor(self.tokens), "attention_mask": torch.tensor(self.mask), **given}
        with torch.no_grad():
            self.single = model(**inputs)[0].numpy()
            self.exact = model.double()(**inputs)[0].numpy()


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield Case(tmp_path_factory.mktemp("encoders") / request.param, request.param)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_outputs_are_those_of_transformers(case: Case, backend: str) -> None:
    """The error is at most 8 times that of `transformers` in float32, both against `transformers` in float64."""
    model = icenet.load(case.folder, backend, "cpu")
    given = {} if case.types is None else {"token_type_ids": native(backend, case.types)}
    found = plain(model(native(backend, case.tokens), native(backend, case.mask), **given))
    real = case.mask.astype(bool)
    exact, single = case.exact[real], case.single[real]
    noise = max(np.abs(single - exact).max(), 2**-23 * np.abs(exact).max())
    assert np.abs(found[real] - exact).max() <= 8 * noise


def test_folders_are_exported_with_the_same_tensors(case: Case, tmp_path: Path) -> None:
    """All of them, the pooler included; and from IceNet's own folder those that IceNet has."""
    original = dict(weight_files.read(case.folder))
    icenet.convert(case.folder, tmp_path / "again", "hf")
    assert same_bits(dict(weight_files.read(tmp_path / "again")), original)
    icenet.save(icenet.load(case.folder, "torch", "cpu"), tmp_path / "ours")
    icenet.convert(tmp_path / "ours", tmp_path / "hf", "hf")
    ours = dict(weight_files.read(tmp_path / "hf"))
    assert same_bits(ours, {name: original[name] for name in ours})
    copies = {name for name in original if name.endswith("predictions.bias") or name == "lm_head.bias"}
    assert {name for name in original.keys() - ours.keys() if "pooler" not in name} <= copies
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    read = json.loads((case.folder / "config.json").read_text())
    assert (written["architectures"], written["model_type"]) in (
        (read["architectures"], read["model_type"]),
        (["RobertaModel"], "roberta"),  # an XLM-RoBERTa is one
    )
    model = getattr(transformers, read["architectures"][0]).from_pretrained(tmp_path / "hf").eval()
    given = {} if case.types is None else {"token_type_ids": torch.tensor(case.types)}
    with torch.no_grad():
        found = model(input_ids=torch.tensor(case.tokens), attention_mask=torch.tensor(case.mask), **given)[0].numpy()
    np.testing.assert_allclose(found, case.single, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Returns the tensors of a small BERT with its head."""
    return dict(weight_files.read(Case(tmp_path_factory.mktemp("bert") / "bert", "bert-masked").folder))


def write(path: Path, arrays: dict[str, np.ndarray], **changes: Any) -> Path:
    weight_files.write(path, arrays)
    values = {**SIZES, "model_type": "bert", "hidden_act": "relu", **changes}
    (path / "config.json").write_text(json.dumps(values))
    return path


def test_the_tensors_decide_whether_there_is_a_head(
    bert: dict[str, np.ndarray], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not `architectures`, which a program may have written for another class. Other heads are named."""
    found = folder.read(write(tmp_path / "a", bert, architectures=["BertModel"])).config.model
    assert isinstance(found, TransformerConfig)
    assert (found.output, found.tie_embeddings, found.output_bias) == ("transform", True, True)
    body = {name: array for name, array in bert.items() if not name.startswith("cls.")}
    other = {**body, "classifier.weight": np.zeros((2, 21), np.float32), "classifier.bias": np.zeros(2, np.float32)}
    read = folder.read(write(tmp_path / "b", other, architectures=["BertForMaskedLM"]))
    assert isinstance(read.config.model, TransformerConfig)
    assert read.config.model.output == "none"
    assert is_one_line(caplog.messages[-1], "classifier.bias", "classifier.weight")
    with pytest.raises(WeightsError, match=r"unknown: bert\.new"):
        folder.read(write(tmp_path / "c", {**body, "bert.new": np.zeros(2, np.float32)}))


def test_names_of_the_first_files_and_buffers(bert: dict[str, np.ndarray], tmp_path: Path) -> None:
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
        for name, array in bert.items()
    }
    assert len(old.keys() - bert.keys()) == 12
    old["cls.predictions.decoder.weight"] = bert["bert.embeddings.word_embeddings.weight"]
    found = folder.read(write(tmp_path / "old", {**old, "bert.embeddings.position_ids": np.arange(43)[None]}))
    new = folder.read(write(tmp_path / "new", bert))
    assert same_bits(dict(found.weights), dict(new.weights))
    assert sorted(found.weights.left_out) == ["bert.embeddings.position_ids", "cls.predictions.decoder.weight"]
    icenet.convert(tmp_path / "old", tmp_path / "out", "hf")
    assert weight_files.read(tmp_path / "out").keys() == old.keys() - {"cls.predictions.decoder.weight"}


PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all-MiniLM-L6-v2": (
        {"model_type": "bert", "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1,
         "gradient_checkpointing": False, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 384,
         "initializer_range": 0.02, "intermediate_size": 1536, "layer_norm_eps": 1e-12, "num_hidden_layers": 6,
         "max_position_embeddings": 512, "num_attention_heads": 12, "pad_token_id": 0, "type_vocab_size": 2,
         "position_embedding_type": "absolute", "transformers_version": "4.8.2", "use_cache": True,
         "vocab_size": 30522, "_name_or_path": "x"},
        {"token_types": 2, "norm_eps": 1e-12, "output": "none", "max_seq_length": 512},
    ),
    "bert-base-multilingual-cased": (
        {"model_type": "bert", "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1,
         "directionality": "bidi", "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
         "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12, "num_hidden_layers": 12,
         "max_position_embeddings": 512, "num_attention_heads": 12, "pad_token_id": 0, "pooler_fc_size": 768,
         "pooler_num_attention_heads": 12, "pooler_num_fc_layers": 3, "pooler_size_per_head": 128,
         "pooler_type": "first_token_transform", "type_vocab_size": 2, "vocab_size": 119547},
        {"output": "transform", "tie_embeddings": True, "output_bias": True},
    ),
    "multilingual-e5-small": (
        {"model_type": "bert", "architectures": ["BertModel"], "classifier_dropout": None, "hidden_size": 384,
         "intermediate_size": 1536, "num_attention_heads": 12, "num_hidden_layers": 12, "vocab_size": 250037,
         "tokenizer_class": "XLMRobertaTokenizer", "type_vocab_size": 2},
        {"position_offset": 0},
    ),
    "xlm-roberta-base": (
        {"model_type": "xlm-roberta", "architectures": ["XLMRobertaForMaskedLM"], "bos_token_id": 0,
         "attention_probs_dropout_prob": 0.1, "eos_token_id": 2, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
         "hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 514,
         "num_attention_heads": 12, "num_hidden_layers": 12, "output_past": True, "pad_token_id": 1,
         "position_embedding_type": "absolute", "type_vocab_size": 1, "vocab_size": 250002},
        {"position_offset": 2, "max_seq_length": 512, "token_types": 1, "norm_eps": 1e-5},
    ),
    "all-mpnet-base-v2": (
        {"model_type": "mpnet", "architectures": ["MPNetForMaskedLM"], "attention_probs_dropout_prob": 0.1,
         "bos_token_id": 0, "eos_token_id": 2, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
         "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 514, "pad_token_id": 1,
         "num_attention_heads": 12, "num_hidden_layers": 12, "relative_attention_num_buckets": 32,
         "vocab_size": 30527},
        {"relative_buckets": 32, "position_offset": 2, "token_types": 0},
    ),
    "distilbert-base-uncased": (
        {"model_type": "distilbert", "architectures": ["DistilBertForMaskedLM"], "activation": "gelu", "dim": 768,
         "attention_dropout": 0.1, "dropout": 0.1, "hidden_dim": 3072, "initializer_range": 0.02, "n_heads": 12,
         "max_position_embeddings": 512, "n_layers": 6, "pad_token_id": 0, "qa_dropout": 0.1,
         "seq_classif_dropout": 0.2, "sinusoidal_pos_embds": False, "tie_weights_": True, "vocab_size": 30522},
        {"norm_eps": 1e-12, "output": "transform"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_configs_of_published_models_are_read(name: str) -> None:
    values, expected = PUBLISHED[name]
    family = FAMILIES[values["model_type"]]
    model = Config.from_dict({"model": family.read(values)}).model
    assert different_options(family, model) == []
    assert {key: getattr(model, key) for key in expected} == expected
    encoder = (model.causal, model.norm_position, model.positions, model.embedding_norm)  # type: ignore[attr-defined]
    assert encoder == (False, "post", "learned", True)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("bert", {"is_decoder": True}, "is_decoder"),
        ("bert", {"embedding_size": 128}, "'embedding_size'"),
        ("bert", {"type_vocab_size": 0}, "type_vocab_size"),
        ("roberta", {"pad_token_id": 511}, "max_position_embeddings"),
        ("roberta", {"hidden_act": "relu", "architectures": ["RobertaForMaskedLM"]}, "activation relu"),
        ("mpnet", {"relative_attention_num_buckets": 64}, "relative_attention_num_buckets"),
        ("mpnet", {"type_vocab_size": 2}, "'type_vocab_size'"),
    ],
)
def test_a_config_that_is_not_supported_is_named(model_type: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILIES[model_type].read(changes)


def test_an_untied_decoder_without_its_projection_has_features_only(tmp_path: Path) -> None:
    """As files of embedding models that are saved without their head."""
    config = ModelConfig(
        type="transformer", hidden_size=12, num_layers=1, num_heads=3, vocab_size=7, norm="rms_norm",
        positions="rotary", feed_forward="gated", attention_bias=False, feed_forward_bias=False, activation="silu",
        embedding_scale=1.0, output="none", max_seq_length=8,
    )  # fmt: skip
    model = icenet.build(Config(model=config), "torch", "cpu")
    icenet.save(model, tmp_path / "ours")
    icenet.convert(tmp_path / "ours", tmp_path / "hf", "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == ["LlamaModel"]
    assert "embed_tokens.weight" in weight_files.read(tmp_path / "hf")
    found = icenet.load(tmp_path / "hf", "torch", "cpu")
    tokens = torch.tensor([[1, 2, 3]])
    assert found.config.output == "none"
    torch.testing.assert_close(found(tokens), model(tokens), rtol=0, atol=0)
    hidden = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()(tokens).last_hidden_state
    torch.testing.assert_close(found(tokens), hidden, rtol=1e-5, atol=1e-5)
