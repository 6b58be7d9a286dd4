"""Embeddings of texts against `transformers` and the formulas of sentence-transformers, and files of its folders."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import both_backends, is_one_line

import icenet
from icenet.core.config import Config
from icenet.core.embedding import dense
from icenet.core.embedding.pooling import normalize, pool
from icenet.core.errors import ConfigError, UsageError, WeightsError
from icenet.core.training.trainer import Trainer
from icenet.core.weights import files as weight_files

for _name in ("torch", "mlx", "transformers", "tokenizers"):
    pytest.importorskip(_name)
torch: Any = importlib.import_module("torch")
transformers: Any = importlib.import_module("transformers")
tokenizers: Any = importlib.import_module("tokenizers")

TEXTS = [
    "The cafés of the old town.",
    "a",
    "",
    "The town, the old town, and the sea beyond the town: the café is old, and so is the sea.",
    "  Zebra crossing ahead \n",
    "the SEA",
]
CORPUS = [*TEXTS, "and of the a is so beyond old ahead crossing zebra sea café town"] * 3
LIMIT = 14
MODES = ("cls", "max", "mean", "mean_sqrt_length", "weighted_mean", "last")
SIZES: dict[str, Any] = {
    "hidden_size": 21, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 17,
    "max_position_embeddings": 43,
}  # fmt: skip


def wordpiece() -> Any:
    """Returns a tokenizer of BERT: lower case, without accents."""
    found = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    found.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    found.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    found.train_from_iterator(CORPUS, trainer)
    around = [("[CLS]", 2), ("[SEP]", 3)]
    found.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=around)
    return found


def byte_level() -> Any:
    """Returns a tokenizer of RoBERTa."""
    found = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    found.train_from_iterator(CORPUS, trainer)
    found.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return found


def unigram() -> Any:
    """Returns a tokenizer of XLM-RoBERTa."""
    found = tokenizers.Tokenizer(tokenizers.models.Unigram())
    found.normalizer = tokenizers.normalizers.NFKC()
    found.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    found.train_from_iterator(CORPUS, trainer)
    around = [("<s>", 0), ("</s>", 2)]
    found.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", special_tokens=around)
    return found


def decoder_tokens() -> Any:
    """Returns a tokenizer of Qwen3-Embedding: an end-of-text token after each text."""
    found = byte_level()
    found.add_special_tokens(["<|endoftext|>"])
    around = [("<|endoftext|>", found.token_to_id("<|endoftext|>"))]
    found.post_processor = tokenizers.processors.TemplateProcessing("$A <|endoftext|>", special_tokens=around)
    return found


KINDS: dict[str, tuple[str, Callable[[], Any], dict[str, Any]]] = {
    "bert": ("Bert", wordpiece, SIZES),
    "roberta": ("Roberta", byte_level, {**SIZES, "type_vocab_size": 1}),
    "mpnet": ("MPNet", unigram, SIZES),
    "qwen3": ("Qwen3", decoder_tokens, {**SIZES, "head_dim": 8, "num_key_value_heads": 1}),
}


def write_json(file: Path, values: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(values))


def add_modules(folder: Path, *steps: str, pooling: dict[str, Any] | None = None, limit: int | None = LIMIT) -> None:
    """Writes the files that sentence-transformers writes."""
    kinds = ["Transformer", "Pooling", *steps]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    write_json(folder / "modules.json", modules)
    given = {"pooling_mode_mean_tokens": True} if pooling is None else pooling
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 21, **given})
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": limit, "do_lower_case": False})


class Model:
    """A random model of `transformers` and its folder.

    Attributes:
        folder: The folder, with a tokenizer.json.
        tokenizer: Its tokenizer, of `tokenizers`.
        reference: The model in float64.
    """

    def __init__(self, folder: Path, name: str) -> None:
        kind, make_tokenizer, options = KINDS[name]
        self.folder, self.tokenizer = folder, make_tokenizer()
        torch.manual_seed(3)
        config = getattr(transformers, f"{kind}Config")(**options, vocab_size=self.tokenizer.get_vocab_size())
        model = transformers.AutoModel.from_config(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
        self.tokenizer.save(str(folder / "tokenizer.json"))
        self.reference = model.double()

    def hidden(self, text: str, limit: int = LIMIT) -> np.ndarray:
        """Returns the hidden states of a text alone, cut as the library does."""
        self.tokenizer.enable_truncation(limit)
        ids = torch.tensor([self.tokenizer.encode(text).ids])
        self.tokenizer.no_truncation()
        with torch.no_grad():
            return np.asarray(self.reference(input_ids=ids).last_hidden_state[0].numpy())


def pooled(x: np.ndarray, mode: str) -> np.ndarray:
    """Returns the pooling of hidden states `[tokens, D]` by the formulas of sentence-transformers' documentation."""
    if mode == "max":
        return x.max(axis=0)
    if mode == "weighted_mean":
        weights = np.arange(1, len(x) + 1)
        return (x * weights[:, None]).sum(axis=0) / weights.sum()
    return {"cls": x[0], "last": x[-1], "mean": x.mean(axis=0), "mean_sqrt_length": x.sum(axis=0) / len(x) ** 0.5}[
        mode
    ]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return Model(tmp_path_factory.mktemp("embed") / request.param, request.param)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("embed") / "bert", "bert")


@pytest.fixture
def folder(bert: Model, tmp_path: Path) -> Path:
    """Returns a copy of the folder of BERT."""
    return Path(shutil.copytree(bert.folder, tmp_path / "bert"))


# ---- vectors ---------------------------------------------------------------------------------------------------


@both_backends
def test_each_pooling_is_that_of_its_formula(model: Model, backend: str, tmp_path: Path) -> None:
    """Within 2e-5, for all kinds of tokenizers, texts of unequal lengths, and texts that are cut."""
    folder = Path(shutil.copytree(model.folder, tmp_path / "model"))
    flags = {f"pooling_mode_{name}": True for name in ("cls_token", "max_tokens", "mean_tokens", "lasttoken")}
    flags |= {"pooling_mode_mean_sqrt_len_tokens": True, "pooling_mode_weightedmean_tokens": True}
    add_modules(folder, "Normalize", pooling=flags)
    found = icenet.embed(folder, TEXTS, batch_size=4, backend=backend, device="cpu")
    assert (found.shape, found.dtype) == ((len(TEXTS), 6 * 21), np.float32)
    for text, vector in zip(TEXTS, found, strict=True):
        expected = unit(np.concatenate([pooled(model.hidden(text), mode) for mode in MODES]))
        np.testing.assert_allclose(vector, expected, rtol=0, atol=2e-5)


@both_backends
def test_a_vector_does_not_depend_on_its_neighbours(bert: Model, backend: str) -> None:
    loaded = icenet.load(bert.folder, backend, "cpu")
    together = icenet.embed(loaded, TEXTS, batch_size=100)
    done: list[tuple[int, int]] = []
    alone = icenet.embed(loaded, TEXTS, 1, progress=lambda *counts: done.append(counts))
    np.testing.assert_allclose(together, alone, rtol=0, atol=2e-6)
    assert done == [(index + 1, len(TEXTS)) for index in range(len(TEXTS))]
    np.testing.assert_allclose(icenet.embed(loaded, TEXTS[::-1], 2), together[::-1], rtol=0, atol=2e-6)
    one = icenet.embed(loaded, TEXTS[3])
    assert one.shape == (21,)
    np.testing.assert_allclose(one, alone[3], rtol=0, atol=2e-6)
    assert icenet.embed(loaded, []).shape == (0, 21)
    np.testing.assert_allclose(alone[0], pooled(bert.hidden(TEXTS[0], 43), "mean"), rtol=0, atol=2e-5)


def test_pooling_counts_the_tokens_of_the_mask_only() -> None:
    """Also where the padding is not finite, on both sides."""
    drawn = np.random.default_rng(1).normal(size=(2, 5, 3)).astype(np.float32)
    mask = np.array([[0, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.bool_)
    drawn[~mask] = np.inf
    for mode in MODES:
        if mode == "weighted_mean":  # the positions are those of the columns
            continue
        found = pool(drawn, mask, [mode])  # type: ignore[list-item]
        for row in range(2):
            np.testing.assert_allclose(found[row], pooled(drawn[row, mask[row]], mode), rtol=1e-6)
    unit_vectors = normalize(np.array([[3, 4], [0, 0]], np.float32))
    np.testing.assert_allclose(unit_vectors, [[0.6, 0.8], [0, 0]], rtol=1e-7)


# ---- settings --------------------------------------------------------------------------------------------------


def test_texts_are_cut_with_a_notice(bert: Model, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_modules(folder, limit=5)
    found = icenet.embed(folder, TEXTS[:2], backend="torch", device="cpu")
    assert is_one_line(caplog.messages[-1], "1 of 2 texts", "5 tokens")
    np.testing.assert_allclose(found[0], pooled(bert.hidden(TEXTS[0], 5), "mean"), rtol=0, atol=2e-5)
    write_json(folder / "tokenizer_config.json", {"model_max_length": 7})
    add_modules(folder, limit=None)
    assert icenet.load(folder, "torch", "cpu").embedding_options.max_seq_length == 7


def test_prompts(bert: Model, folder: Path) -> None:
    settings = {"prompts": {"query": "the sea: ", "document": ""}, "default_prompt_name": "query"}
    write_json(folder / "config_sentence_transformers.json", settings)
    add_modules(folder, limit=40)
    loaded = icenet.load(folder, "torch", "cpu")
    expected = pooled(bert.hidden("the sea: old town", 40), "mean")
    np.testing.assert_allclose(icenet.embed(loaded, "old town"), expected, rtol=0, atol=2e-5)
    plain = pooled(bert.hidden("old town", 40), "mean")
    for options in ({"prompt_name": "document"}, {"prompt": ""}):
        np.testing.assert_allclose(icenet.embed(loaded, "old town", **options), plain, rtol=0, atol=2e-5)
    add_modules(folder, pooling={"pooling_mode_mean_tokens": True, "include_prompt": False}, limit=40)
    without = icenet.embed(folder, "old town", backend="torch", device="cpu")
    count = len(bert.tokenizer.encode("the sea: ").ids) - 1
    expected = pooled(bert.hidden("the sea: old town", 40)[count:], "mean")
    np.testing.assert_allclose(without, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("given", "pooling"),
    [
        ({"pooling_mode": "lasttoken"}, ["last"]),
        ({"pooling_mode": ["weightedmean", "cls"], "embedding_dimension": 21}, ["weighted_mean", "cls"]),
        ({"pooling_mode_lasttoken": True, "pooling_mode_cls_token": True}, ["cls", "last"]),
        ({}, ["mean"]),
    ],
)
def test_spellings_of_the_pooling(folder: Path, given: dict[str, Any], pooling: list[str]) -> None:
    add_modules(folder, pooling=given)
    assert icenet.load(folder, "torch", "cpu").embedding_options.pooling == pooling


def test_a_step_that_is_not_supported_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_modules(folder, "LayerNorm", "Normalize")
    loaded = icenet.load(folder, "torch", "cpu")
    assert any(is_one_line(message, "LayerNorm", "2_LayerNorm", "embedding.pooling") for message in caplog.messages)
    with pytest.raises(UsageError, match=r"embedding\.pooling is empty"):
        icenet.embed(loaded, "a")
    assert icenet.embed(loaded, "a", pooling="mean", normalize=True).shape == (21,)
    icenet.convert(folder, folder.parent / "out", "hf")  # without files that promise the step
    assert not (folder.parent / "out" / "modules.json").exists()


def add_dense(folder: Path, name: str, width_in: int, width_out: int, activation: str = "", **options: Any) -> Any:
    """Writes a layer as sentence-transformers does, and returns it in float64."""
    torch.manual_seed(7)
    layer = torch.nn.Linear(width_in, width_out, bias=options.get("bias", True))
    arrays = {f"linear.{key}": value.detach().numpy() for key, value in layer.named_parameters()}
    projection = None
    if options.get("use_residual") and width_in != width_out:
        projection = torch.nn.Linear(width_in, width_out, bias=False)
        arrays["residual.weight"] = projection.weight.detach().numpy()
    config = {"in_features": width_in, "out_features": width_out, "bias": True, **options}
    if activation:
        config["activation_function"] = activation
    write_json(folder / name / "config.json", config)
    weight_files.write(folder / name / "model.safetensors", arrays)
    function = getattr(torch.nn, (activation or "torch.nn.modules.activation.Tanh").rpartition(".")[2])()

    def apply(x: np.ndarray) -> np.ndarray:
        given = torch.tensor(x)
        with torch.no_grad():
            found = function(layer.double()(given))
            if options.get("use_residual"):
                found = found + (given if projection is None else projection.double()(given))
        return np.asarray(found.numpy())

    return apply


@both_backends
def test_dense_layers_after_the_pooling(bert: Model, folder: Path, backend: str, tmp_path: Path) -> None:
    """In their order, before the normalization; also saved, exported, and without them."""
    flags = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}
    add_modules(folder, "Dense", "Dropout", "Dense", "Normalize", pooling=flags)
    first = add_dense(folder, "2_Dense", 42, 30)
    second = add_dense(folder, "4_Dense", 30, 11, "torch.nn.modules.linear.Identity", bias=False)
    loaded = icenet.load(folder, backend, "cpu")
    found = icenet.embed(loaded, TEXTS, batch_size=4)
    assert found.shape == (len(TEXTS), 11)
    for text, vector in zip(TEXTS, found, strict=True):
        hidden = bert.hidden(text)
        expected = unit(second(first(np.concatenate([hidden[0], hidden.mean(axis=0)]))))
        np.testing.assert_allclose(vector, expected, rtol=0, atol=2e-5)
    assert icenet.embed(loaded, TEXTS, dense=[]).shape == (len(TEXTS), 42)
    with pytest.raises(UsageError) as error:
        icenet.embed(loaded, TEXTS, pooling="mean")
    assert is_one_line(str(error.value), "2_Dense", "42", "21")
    icenet.save(loaded, tmp_path / "ours")
    icenet.convert(tmp_path / "ours", tmp_path / "theirs", "hf")
    icenet.convert(folder, tmp_path / "again", "hf")
    assert (tmp_path / "again" / "4_Dense" / "config.json").read_bytes() == (
        folder / "4_Dense" / "config.json"
    ).read_bytes()
    shutil.rmtree(folder)
    for name in ("ours", "theirs", "again"):
        again = icenet.embed(tmp_path / name, TEXTS, batch_size=4, backend=backend, device="cpu")
        np.testing.assert_array_equal(again, found)


def test_a_run_has_the_dense_layers_of_its_model(folder: Path, tmp_path: Path) -> None:
    """In each checkpoint, next to a config.yaml that can be moved; also if it continues without the one before."""
    add_modules(folder, "Dense", pooling={"pooling_mode_mean_tokens": True})
    add_dense(folder, "2_Dense", 21, 11)
    icenet.convert(folder, tmp_path / "canonical", "canonical")
    code = "import numpy as np\n\nclass Ones:\n    def __init__(self, options, seed):\n        pass\n\n"
    code += "    def train_batch(self, step, batch_size):\n        ones = np.ones((batch_size, 4), int)\n"
    (tmp_path / "mine.py").write_text(code + "        return {'inputs': ones, 'labels': ones}\n")
    (tmp_path / "loss.py").write_text("def first(output, batch):\n    return output.float().mean()\n")
    training = {"max_steps": 2, "loss": f"{tmp_path / 'loss.py'}:first", "keep_checkpoints": 1, "eval_every": None}
    config = Config.from_dict(
        {
            "model": {"path": str(folder)},
            "data": {"kind": f"{tmp_path / 'mine.py'}:Ones"},
            "training": {**training, "learning_rate": 1e-30},
        }
    )
    Trainer.start(config, tmp_path / "run", backend="torch", quiet=True).fit(1)
    expected = icenet.embed(folder, TEXTS, backend="torch", device="cpu")
    shutil.rmtree(folder)
    Trainer.resume(tmp_path / "run", quiet=True).fit()
    [last] = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert last.name == "step-00000002"
    last.rename(tmp_path / "moved")
    for place in ("moved", "canonical"):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        found = icenet.embed(tmp_path / place, TEXTS, backend="torch", device="cpu")
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["Tanh", "ReLU", "GELU", "Sigmoid", "SiLU"])
def test_activations_and_residuals_of_dense_layers(name: str, tmp_path: Path) -> None:
    x = np.random.default_rng(3).normal(scale=20, size=(7, 9))
    for width in (9, 5):
        path = tmp_path / str(width)
        layer = add_dense(tmp_path, path.name, 9, width, f"torch.nn.modules.activation.{name}", use_residual=True)
        np.testing.assert_allclose(dense.read(path)(x.astype(np.float32)), layer(x), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"activation_function": "mine.Snake"}, ("'mine.Snake'", "Tanh", "2_Dense")),
        ({"activation_function": "torch.nn.modules.activation.CELU"}, ("CELU", "2_Dense")),
        ({"module_input_name": "token_embeddings"}, ("module_input_name", "'token_embeddings'")),
        ({"scale": 2}, ("config.json", "'scale'")),
        ({"in_features": 1 << 40}, ("config.json", "in_features")),
        ({"in_features": 20}, ("model.safetensors", "linear.weight", "[11, 21]", "[11, 20]")),
        ({"bias": False}, ("model.safetensors", "linear.bias")),
        ({"bias": 1}, ("config.json", "bias")),
        (None, ("pickled", "icenet convert")),
    ],
)
def test_a_dense_layer_that_cannot_be_used_is_named(
    folder: Path, change: dict[str, Any] | None, names: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    add_modules(folder, "Dense")
    add_dense(folder, "2_Dense", 21, 11)
    file = folder / "2_Dense" / "config.json"
    if change is None:
        (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")
    else:
        write_json(file, {**json.loads(file.read_text()), **change})
    try:
        icenet.load(folder, "torch", "cpu")
    except (ConfigError, WeightsError) as error:
        assert is_one_line(str(error), *names)
    else:
        assert any(is_one_line(message, *names) for message in caplog.messages)


@pytest.mark.parametrize("name", ["1_Pooling", "2_Dense"])
def test_a_folder_that_was_copied_in_part_is_named(folder: Path, name: str) -> None:
    """A model that pools by its first token would give other vectors with the mean."""
    add_modules(folder, "Dense")
    add_dense(folder, "2_Dense", 21, 11)
    (folder / name / "config.json").unlink()
    with pytest.raises(ConfigError) as caught:
        icenet.load(folder, "torch", "cpu")
    assert is_one_line(caught.value, f"{name}/config.json", "no such file", "modules.json")


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("modules.json", {"a": 1}, "modules.json: not a list"),
        ("modules.json", "[", "modules.json: not JSON"),
        ("1_Pooling/config.json", {"pooling_mode_cls": True}, "'pooling_mode_cls'"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": 1}, "pooling_mode_mean_tokens"),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "'median'"),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "prompt_name 'query'"),
        ("config_sentence_transformers.json", {"prompts": [1]}, "embedding.prompts"),
        ("sentence_bert_config.json", {"do_lower_case": "no"}, "embedding.lower_case"),
    ],
)
def test_a_damaged_file_is_one_line(folder: Path, file: str, values: Any, message: str) -> None:
    add_modules(folder)
    if isinstance(values, str):
        (folder / file).write_text(values)
    else:
        write_json(folder / file, values)
    with pytest.raises(ConfigError) as error:
        icenet.load(folder, "torch", "cpu")
    assert is_one_line(str(error.value), message)


def test_a_module_outside_the_folder_is_refused(folder: Path) -> None:
    add_modules(folder)
    modules = json.loads((folder / "modules.json").read_text())
    for path in ("../1_Pooling", "/etc", 3):
        modules[1]["path"] = path
        write_json(folder / "modules.json", modules)
        with pytest.raises(ConfigError, match="not the name of a folder"):
            icenet.load(folder, "torch", "cpu")


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["a", 3], {}, "text 1 is of type int"),
        (["a"], {"batch_size": 0}, "batch_size"),
        (["a"], {"pooling": "median"}, "pooling"),
        (["a"], {"poolling": "mean"}, "poolling"),
        (["a"], {"max_seq_length": 44}, "max_seq_length 44"),
        (["a"], {"max_seq_length": 2}, "2 tokens around a text"),
        (["a"], {"prompt": "x", "prompt_name": "y"}, "prompt or prompt_name"),
        (["a"], {"prompt_name": "query"}, "prompt_name 'query'"),
        (["a"], {"device": "cpu"}, "loaded already"),
    ],
)
def test_wrong_requests_are_one_line(bert: Model, texts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        icenet.embed(icenet.load(bert.folder, "torch", "cpu"), texts, **options)
    assert is_one_line(str(error.value), message)


def test_models_without_a_tokenizer_or_of_other_kinds(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="no tokenizer"):
        icenet.embed(folder, "a", backend="torch", device="cpu")
    with pytest.raises(UsageError, match="transformer"):
        icenet.embed(icenet.build("lstm-small", "torch", "cpu"), "a")


# ---- folders ---------------------------------------------------------------------------------------------------


def test_settings_are_saved_and_exported(folder: Path, tmp_path: Path) -> None:
    write_json(folder / "config_sentence_transformers.json", {"prompts": {"q": "sea "}, "default_prompt_name": "q"})
    add_modules(folder, "Normalize", pooling={"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True})
    loaded = icenet.load(folder, "torch", "cpu")
    icenet.save(loaded, tmp_path / "ours")
    icenet.convert(tmp_path / "ours", tmp_path / "theirs", "hf")
    icenet.convert(folder, tmp_path / "again", "hf")
    for name in ("ours", "theirs", "again"):
        found = icenet.load(tmp_path / name, "torch", "cpu")
        assert found.embedding_options == loaded.embedding_options
        np.testing.assert_array_equal(icenet.embed(found, TEXTS), icenet.embed(loaded, TEXTS))
    loaded.embedding_options.pooling = ["weighted_mean", "cls"]  # in another order than that of the older keys
    icenet.save(loaded, tmp_path / "order")
    icenet.convert(tmp_path / "order", tmp_path / "order-hf", "hf")
    assert icenet.load(tmp_path / "order-hf", "torch", "cpu").embedding_options.pooling == ["weighted_mean", "cls"]
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_a_vocabulary_of_bert_is_its_tokenizer(bert: Model, folder: Path, tmp_path: Path) -> None:
    """As folders of its time have it, with the tokens of `transformers`."""
    vocabulary = bert.tokenizer.get_vocab()
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)) + "\n")
    texts = [*TEXTS, "[MASK] 中文 naïve\x00 Ünknown"]
    expected = icenet.embed(bert.folder, texts, backend="torch", device="cpu")
    np.testing.assert_array_equal(icenet.embed(folder, texts, backend="torch", device="cpu"), expected)
    write_json(folder / "tokenizer_config.json", {"do_lower_case": False, "strip_accents": False})
    theirs = transformers.BertTokenizer.from_pretrained(folder)
    ours = icenet.load(folder, "torch", "cpu")
    assert [row.tolist() for row in ours.tokenizer.encode_texts(texts, 40)[0]] == theirs(texts)["input_ids"]
    icenet.save(ours, tmp_path / "ours")
    assert icenet.load(tmp_path / "ours", "torch", "cpu").tokenizer.encode("the Sea") == ours.tokenizer.encode(
        "the Sea"
    )
    (folder / "vocab.txt").write_text("a\n[CLS]\n")
    with pytest.raises(UsageError, match=r"no \[UNK\], \[SEP\]"):
        icenet.load(folder, "torch", "cpu")


def test_texts_that_are_no_texts_are_named(folder: Path) -> None:
    with pytest.raises(UsageError) as error:
        icenet.embed(icenet.load(folder, "torch", "cpu"), 5)  # type: ignore[arg-type]
    assert is_one_line(str(error.value), "int", "a list of texts")
