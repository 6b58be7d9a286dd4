"""A new run begins with the weights of a trained model: `training.init_from` and `model.path`."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import is_one_line, losses, same_bits, state, tiny, train
from PIL import Image

import icenet
from icenet.core.config import Config
from icenet.core.errors import ConfigError, IceNetError
from icenet.core.families import FAMILIES
from icenet.core.runs import checkpoint
from icenet.core.training.trainer import Trainer
from icenet.core.weights.origin import Origin
from icenet.parity.curves import judge_curve
from icenet.parity.nearby import nearby
from icenet.parity.resampling import Samples

pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("no_plots")


def trained(folder: Path, *overrides: str) -> Path:
    """Returns a run of two steps."""
    return train(tiny(folder, "training.max_steps=2", *overrides), folder / "first", "torch").run


def test_a_run_begins_with_the_weights_of_another_and_a_fresh_optimizer(tmp_path: Path) -> None:
    """Of a run, a checkpoint and a saved model, on the other backend; the averages begin there, too."""
    run = trained(tmp_path, "training.ema_decay=0.5")
    weights = checkpoint.find(run).weights
    icenet.save(icenet.load(run, "torch"), tmp_path / "saved")
    for index, source in enumerate((run, run / "checkpoints" / "step-00000002", tmp_path / "saved")):
        config = tiny(tmp_path, f"training.init_from={source}", "training.ema_decay=0.5")
        trainer = Trainer.start(
            config, tmp_path / f"run-{index}", backend="mlx" if index == 0 else "torch", quiet=True
        )
        assert same_bits(trainer.engine.weights(), weights)
        optimizer = trainer.engine.optimizer_state()
        averages = {name.removesuffix(".ema"): array for name, array in optimizer.items() if name.endswith(".ema")}
        assert averages and all(np.array_equal(averages[name], weights[name]) for name in averages)
        assert trainer.step == 0 and not any(
            array.any() for name, array in optimizer.items() if not name.endswith(".ema")
        )
        assert any(str(source) in note for note in trainer.notes)


def test_a_continued_run_does_not_read_them_again(tmp_path: Path) -> None:
    """The folder may be gone; and the key has no effect, which is said."""
    source = tmp_path / "saved"
    icenet.save(icenet.load(trained(tmp_path), "torch"), source)
    config = tiny(tmp_path, f"training.init_from={source}", "training.max_steps=4")
    train(config, tmp_path / "whole", "torch")
    run = train(config, tmp_path / "run", "torch", until=2).run
    source.rename(tmp_path / "moved")
    trainer = Trainer.resume(run, overrides=["training.init_from=elsewhere"], quiet=True)
    assert any("training.init_from has no effect from step 3 on" in note for note in trainer.notes)
    trainer.fit()
    assert losses(run) == losses(tmp_path / "whole") and same_bits(state(run), state(tmp_path / "whole"))


def test_what_differs_from_the_source_is_said(tmp_path: Path) -> None:
    run = trained(tmp_path)
    config = tiny(tmp_path, f"training.init_from={run}", "model.activation=relu", "model.dropout=0.3")
    notes = Trainer.start(config, tmp_path / "run", backend="torch", quiet=True).notes
    assert any("model.activation is 'relu', and 'gelu' there" in note for note in notes)
    assert not any("dropout" in note for note in notes)


@pytest.mark.parametrize(
    ("override", "source", "names"),
    [
        ("model.hidden_size=16", "first", ["first", "do not fit", "--set model.path="]),
        ("seed=1", "nowhere", ["nowhere"]),
        ("seed=1", "transformer-tiny", ["training.init_from: transformer-tiny has no weights"]),
        ("seed=1", "text.txt", ["text.txt"]),
    ],
)
def test_weights_that_cannot_be_used_are_one_line(
    override: str, source: str, names: list[str], tmp_path: Path
) -> None:
    trained(tmp_path)
    place = str(tmp_path / source) if (tmp_path / source).exists() else source
    config = tiny(tmp_path, f"training.init_from={place}", override)
    with pytest.raises(IceNetError) as caught:
        Trainer.start(config, tmp_path / "run", backend="torch", quiet=True)
    assert is_one_line(caught.value, *names)
    assert not (tmp_path / "run").exists()


# ---- model.path -------------------------------------------------------------------------------------------


def written(folder: Path, *lines: str) -> Path:
    """Writes a configuration of text data."""
    path = folder / "my.yaml"
    text = ["data:", f"  source: {tiny(folder).data.source}", "  validation_fraction: 0", *lines]
    path.write_text("\n".join([*text, "training:", "  max_steps: 2", "  batch_size: 2", ""]))
    return path


def test_the_model_of_a_folder(tmp_path: Path) -> None:
    """Its architecture, tokenizer and settings; a path in the file is relative to it, and keys next to it count."""
    config = tiny(tmp_path, "generation.top_k=7", "model.activation=relu")
    icenet.save(model := icenet.build(config, "torch"), tmp_path / "saved")
    found = Config.from_yaml(written(tmp_path), [f"model.path={tmp_path / 'saved'}"])
    assert found.model == model.config and found.training.init_from == str(tmp_path / "saved")
    near = Config.from_yaml(written(tmp_path, "model:", "  path: saved", "  dropout: 0.25"), ["model.norm_eps=0.5"])
    assert near.model == model.config.model_copy(update={"dropout": 0.25, "norm_eps": 0.5})
    assert near.training.init_from == str(tmp_path / "saved")
    other = Config.from_yaml(
        written(tmp_path, "model: {type: lstm, hidden_size: 4}"), [f"model.path={tmp_path / 'saved'}"]
    )
    assert other.model == model.config
    trainer = Trainer.start(near, tmp_path / "run", backend="torch", quiet=True)
    assert same_bits(trainer.engine.weights(), model.weights())
    trainer.fit()
    assert Config.from_yaml(tmp_path / "run" / "config.yaml").model == near.model  # without the path


def test_a_long_context_is_not_a_long_training_sequence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    icenet.save(icenet.build(tiny(tmp_path, "model.max_seq_length=4096"), "torch"), tmp_path / "saved")
    path = written(tmp_path)
    assert Config.from_yaml(path, [f"model.path={tmp_path / 'saved'}"]).data.seq_length == 1024
    assert "data.seq_length: 1024" in caplog.text
    caplog.clear()
    assert Config.from_yaml(path, [f"model.path={tmp_path / 'saved'}", "data.seq_length=9"]).data.seq_length == 9
    assert caplog.text == ""


def test_the_code_of_a_model_is_not_trusted_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise SystemExit('run')")
    folder = tmp_path / "saved"
    icenet.save(icenet.build(tiny(tmp_path), "torch"), folder)
    (folder / "config.yaml").write_text(f"model: {{type: '{tmp_path / 'mine.py'}:Model'}}")
    with pytest.raises(ConfigError, match=r"Python code.*training\.init_from"):
        Config.from_yaml(written(tmp_path), [f"model.path={folder}"])
    with pytest.raises(IceNetError) as caught:
        Config.from_yaml(written(tmp_path), ["model.path=nowhere"])
    assert is_one_line(caught.value, "nowhere")
    with pytest.raises(ConfigError, match="has no weights"):
        Config.from_yaml(written(tmp_path), ["model.path=transformer-tiny"])


# ---- trained by IceNet and by a plain loop ----------------------------------------------------------------


def llama(transformers: Any) -> Any:
    """Returns a small model of Llama with random weights: grouped heads of another size than width / heads."""
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10}
    sizes |= {"num_hidden_layers": 2, "intermediate_size": 20, "max_position_embeddings": 16, "vocab_size": 257}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, eos_token_id=256, tie_word_embeddings=True)
    )


def gpt2(transformers: Any) -> Any:
    """Returns a small GPT-2 with random weights."""
    sizes = {"n_embd": 21, "n_head": 3, "n_layer": 2, "n_inner": 50, "n_positions": 16, "vocab_size": 257}
    dropout = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, **dropout, bos_token_id=None, eos_token_id=256)
    )


@pytest.mark.parametrize(
    ("build", "steps"),
    [
        (llama, 3),
        pytest.param(llama, 50, marks=pytest.mark.slow),
        pytest.param(gpt2, 50, marks=pytest.mark.slow),
    ],
)
def test_a_model_goes_from_transformers_to_mlx_and_back(
    build: Callable[[Any], Any], steps: int, tmp_path: Path
) -> None:
    """Some steps on MLX; exported; as many more by a plain loop of `transformers`, and by IceNet on PyTorch.

    The two curves are compared by the yardstick: the distance is at most 8 times that of the loop in float32 from
    itself in float64.
    """
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("mlx")
    importlib.import_module("icenet.blas")
    torch = importlib.import_module("torch")
    torch.manual_seed(0)
    build(transformers).save_pretrained(tmp_path / "folder")
    options = [f"training.max_steps={steps}", "training.weight_decay=0.1", "training.schedule=constant"]
    options += ["training.learning_rate=3e-3", "training.eval_every=null"]
    first = Config.from_yaml(written(tmp_path), [f"model.path={tmp_path / 'folder'}", *options])
    train(first, tmp_path / "mlx", "mlx")
    icenet.convert(tmp_path / "mlx", tmp_path / "out", "hf")

    second = Config.from_yaml(written(tmp_path), [f"model.path={tmp_path / 'out'}", "seed=5", *options])
    trainer = Trainer.start(second, tmp_path / "torch", backend="torch", quiet=True)
    batches = [trainer.dataset.train_batch(step, second.training.batch_size) for step in range(steps)]
    trainer.fit()

    def plain_loop(dtype: Any, sample: int | None = None) -> list[float]:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        if sample is not None:
            for parameter in model.parameters():
                moved = nearby(parameter.detach().numpy(), "fp32", sample)
                parameter.data = torch.tensor(moved, dtype=torch.float32)
            model.tie_weights()
        model = model.to(dtype)
        vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
        matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
        found = []
        for batch in batches:
            logits = model(torch.tensor(batch["inputs"])).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), torch.tensor(batch["labels"]).long().flatten()
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            found.append(loss.item())
        return found

    single, exact = plain_loop(torch.float32), plain_loop(torch.float64)
    samples = Samples(partial(plain_loop, torch.float64), partial(plain_loop, torch.float32))
    judgement = judge_curve(losses(tmp_path / "torch"), single, exact, samples)
    assert judgement.passed, f"ratio {judgement.worst:.3g} at step {judgement.worst_step + 1}"
    assert np.mean(exact[-3:]) < losses(tmp_path / "mlx")[0]


def mistral(folder: Path, ids: dict[str, Any]) -> str:
    """Writes a folder of Mistral with random weights and a tokenizer with a chat template, which is returned.

    Args:
        folder: The folder.
        ids: The ids in generation_config.json. Those of config.json are 0, 1 and null.
    """
    tokenizers = pytest.importorskip("tokenizers")
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 8}
    values = {**sizes, "model_type": "mistral", "vocab_size": 6, "max_position_embeddings": 32}
    values |= {"num_key_value_heads": 1, "sliding_window": None}
    model = icenet.build(Config.from_dict({"model": FAMILIES["mistral"].read(values, True)}), "torch")
    model.origin = Origin("mistral")
    icenet.save(model, folder.with_name("base"))
    icenet.convert(folder.with_name("base"), folder, "hf")

    words = {word: index for index, word in enumerate(["<s>", "</s>", "<pad>", "<end>", "x", "<unk>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(words)[:4])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    written = json.loads((folder / "config.json").read_text())
    files = {
        "config.json": {**written, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None},
        "generation_config.json": {**ids, "do_sample": True, "top_p": 0.9, "suppress_tokens": [4]},
        "tokenizer_config.json": {**names, "tokenizer_class": "PreTrainedTokenizerFast"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    (folder / "chat_template.jinja").write_text(template)
    return template


def test_a_trained_import_is_exported_as_what_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The family, the special tokens of both files, the settings and the chat template; each warning comes once."""
    ids = {"bos_token_id": 0, "eos_token_id": [1, 3], "pad_token_id": 2}
    template = mistral(tmp_path / "folder", ids)
    options = [f"model.path={tmp_path / 'folder'}", "data.seq_length=8", "training.max_steps=1"]
    options += ["training.eval_every=null", "training.ema_decay=0.5"]
    trainer = Trainer.start(
        Config.from_yaml(written(tmp_path), options), tmp_path / "run", backend="torch", quiet=True
    )
    trainer.fit()
    assert sum("suppress_tokens has no effect" in record.message for record in caplog.records) == 1
    Trainer.resume(tmp_path / "run", overrides=["training.max_steps=2"], quiet=True).fit()
    icenet.save(icenet.load(tmp_path / "run", "torch"), tmp_path / "saved")
    exports = {"run": False, "saved": False, "averaged": True}
    for name, averaged in exports.items():
        icenet.convert(tmp_path / ("run" if averaged else name), tmp_path / f"{name}-hf", "hf", averaged=averaged)
        ours, theirs = (
            {file.name: json.loads(file.read_text()) for file in (tmp_path / folder).glob("*.json")}
            for folder in (f"{name}-hf", "folder")
        )
        for key in ("model_type", "bos_token_id", "eos_token_id", "pad_token_id"):
            assert ours["config.json"][key] == theirs["config.json"][key]
        generation = {key: ours["generation_config.json"][key] for key in (*ids, "do_sample", "top_p")}
        assert generation == {**ids, "do_sample": True, "top_p": 0.9}
        assert ours["tokenizer.json"] == theirs["tokenizer.json"]
        assert ours["tokenizer_config.json"] == theirs["tokenizer_config.json"]
        assert (tmp_path / f"{name}-hf" / "chat_template.jinja").read_text() == template


def test_a_run_with_data_of_a_user_keeps_the_tokenizer_of_its_model(tmp_path: Path) -> None:
    """Also after it was continued, and without its options changing."""
    template = mistral(tmp_path / "folder", {"eos_token_id": 1})
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n\nclass Ones:\n    def __init__(self, options, seed):\n"
        "        assert not hasattr(options, 'tokenizer')\n\n    def train_batch(self, step, batch_size):\n"
        "        ones = np.ones((batch_size, 4), int)\n        return {'inputs': ones, 'labels': ones}\n"
    )
    values = {"data": {"kind": f"{tmp_path / 'mine.py'}:Ones"}, "training": {"max_steps": 2, "ema_decay": 0.5}}
    config = Config.from_dict(values | {"model": {"path": str(tmp_path / "folder")}})
    run = train(config, tmp_path / "run", "torch", until=1).run
    (tmp_path / "folder").rename(tmp_path / "moved")
    resumed = Trainer.resume(run, quiet=True)
    assert not any("trained on" in note for note in resumed.notes)
    resumed.fit()
    expected = (tmp_path / "moved" / "tokenizer.json").read_bytes()
    for averaged in (False, True):
        tokenizer = icenet.load(run, "torch", averaged=averaged).tokenizer
        assert tokenizer.files["tokenizer.json"] == expected and tokenizer.chat_template == template
        icenet.convert(run, tmp_path / f"hf-{averaged}", "hf", averaged=averaged)
        assert (tmp_path / f"hf-{averaged}" / "tokenizer.json").read_bytes() == expected
    again = Config.from_dict({"model": {"path": str(run)}, "data": {"kind": "text"}})
    assert Path(again.data.tokenizer).read_bytes() == expected


@pytest.mark.parametrize("key", ["training.init_from", "model.path"])
def test_a_path_without_a_model_is_named_with_its_key(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        Trainer.start(tiny(tmp_path, f"{key}={tmp_path / 'missing'}"), tmp_path / "run", backend="torch", quiet=True)
    assert is_one_line(str(error.value))
    assert str(error.value).startswith(f"{key}: {tmp_path / 'missing'}: no such file or folder")


def test_other_images_than_those_of_the_model_are_said(tmp_path: Path) -> None:
    """Their mean and deviation, and the names of the classes: of a folder of Hugging Face, and of a run."""
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(3):
            pixels = random.integers(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
    model = {"type": "vit", "image_size": 8, "patch_size": 4, "hidden_size": 8, "num_layers": 1, "num_heads": 2}
    config = Config.from_dict(
        {
            "model": {**model, "vocab_size": 2},
            "data": {"kind": "images", "source": str(tmp_path / "images")},
            "training": {"max_steps": 1, "batch_size": 2},
        }
    )
    train(config, tmp_path / "first", "torch")
    icenet.convert(tmp_path / "first", tmp_path / "hf", "hf")

    def notes(source: str, *overrides: str) -> str:
        changed = config.with_overrides(f"training.init_from={tmp_path / source}", *overrides)
        return "\n".join(Trainer.start(changed, tmp_path / f"run-{source}", backend="torch", quiet=True).notes)

    for source in ("first", "hf"):
        assert "pixels" not in notes(source) and "classes" not in notes(source)
        assert "data.std is [0.5, 0.5, 0.5], and [0." in notes(source, "data.std=[0.5, 0.5, 0.5]")
    (tmp_path / "images" / "a").rename(tmp_path / "images" / "c")
    for source in ("first", "hf"):
        assert f"the classes are b, c, and a, b in {tmp_path / source}: the outputs have other" in notes(source)
