"""Imported models of images: saved, trained further and exported, with their labels and image processor."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import both_backends, is_one_line, native, plain, same_bits, train
from PIL import Image

import icenet
from icenet.cli.main import main
from icenet.commands.predict import predict
from icenet.core.config import Config
from icenet.core.data.datasets import dataset_for
from icenet.core.errors import ConfigError, IceNetError
from icenet.core.training.trainer import Trainer

for _name in ("torch", "mlx", "transformers"):
    pytest.importorskip(_name)
importlib.import_module("icenet.blas")  # before mlx.core

pytestmark = pytest.mark.usefixtures("no_plots")
torch: Any = importlib.import_module("torch")
transformers: Any = importlib.import_module("transformers")

MODELS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "vit": (
        "ViT",
        {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
         "image_size": [20, 27], "patch_size": 7},
        "ViT",
        {"size": {"height": 20, "width": 27}, "image_mean": [0.4, 0.5, 0.6]},
    ),
    "resnet": (
        "ResNet",
        {"embedding_size": 5, "hidden_sizes": [8, 12], "depths": [1, 1]},
        "ConvNext",
        {"size": {"shortest_edge": 36}, "crop_pct": 0.8},
    ),
}  # fmt: skip
LABELS = ["cat", "dog", "newt"]


@pytest.fixture(params=MODELS)
def imported(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return imported_folder(tmp_path / "imported", request.param)


def imported_folder(path: Path, name: str) -> Path:
    kind, options, processor, settings = MODELS[name]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**options, id2label=dict(enumerate(LABELS)))
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(path)
    processor_of(processor)(**settings).save_pretrained(path)
    return path


def processor_of(kind: str) -> Any:
    name = kind.lower()
    module = importlib.import_module(f"transformers.models.{name}.image_processing_pil_{name}")
    return getattr(module, f"{kind}ImageProcessorPil")


def pictures(folder: Path, *classes: str) -> Path:
    """Writes three random pictures of different sizes for each class."""
    random = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index, size in enumerate(((24, 30), (40, 33), (21, 21))):
            pixels = random.integers(0, 255, (*size, 3), np.uint8) // (1 + number)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def config_of(imported: Path, source: Path, **model: Any) -> Config:
    return Config.from_dict(
        {
            "model": {"path": str(imported), **model},
            "data": {"kind": "images", "source": str(source), "validation_fraction": 0},
            "training": {"max_steps": 1, "batch_size": 3, "eval_every": None},
            "seed": 3,
            "device": "cpu",
        }
    )


def settings_of(folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Returns the labels and the image processor of a folder of Hugging Face."""
    names = json.loads((folder / "config.json").read_text())["id2label"]
    return list(names.values()), json.loads((folder / "preprocessor_config.json").read_text())


def test_saved_and_converted_models_predict_as_the_folder(imported: Path, tmp_path: Path) -> None:
    files = sorted(pictures(tmp_path / "images", "a").rglob("*.png"))
    expected = predict(imported, files, "torch", "cpu")
    assert expected.classes == LABELS
    icenet.save(icenet.load(imported, "mlx", "cpu"), tmp_path / "saved")
    icenet.save(icenet.load(tmp_path / "saved", "torch", "cpu"), tmp_path / "again")
    icenet.convert(imported, tmp_path / "converted", "canonical")
    icenet.convert(tmp_path / "converted", tmp_path / "copied", "canonical")
    for name in ("saved", "again", "converted", "copied"):
        found = predict(tmp_path / name, files, "torch", "cpu")
        assert found.classes == LABELS and np.array_equal(found.probabilities, expected.probabilities)
    icenet.convert(tmp_path / "again", tmp_path / "hf", "hf")
    assert settings_of(tmp_path / "hf") == settings_of(imported)


def test_a_run_reads_images_as_the_model_that_it_begins_with(imported: Path, tmp_path: Path) -> None:
    """Its pixels are those of the processor; the run, a saved model and an export keep it and have the new labels."""
    source = pictures(tmp_path / "images", *LABELS)
    config = config_of(imported, source)
    files = sorted(source.rglob("*.png"))
    dataset = dataset_for(config)
    kind = MODELS["vit" if config.model.type == "vit" else "resnet"][2]
    processor = processor_of(kind).from_pretrained(imported)
    pixels = processor([Image.open(file) for file in files], return_tensors="np")["pixel_values"]
    rows = {array.tobytes() for array in pixels.transpose(0, 2, 3, 1).astype(np.float32)}
    found = [row.tobytes() for step in range(3) for row in dataset.train_batch(step, 3)["inputs"]]
    assert len(rows) == 9 and set(found) == rows

    run = train(config, tmp_path / "run", "torch").run
    assert Config.from_yaml(run / "config.yaml").data == config.data  # without the folder
    icenet.save(icenet.load(run, "torch"), tmp_path / "saved")
    expected = predict(run, files, "torch", "cpu")
    for number, name in enumerate(("run", "saved")):
        icenet.convert(tmp_path / name, tmp_path / f"hf-{number}", "hf")
        assert settings_of(tmp_path / f"hf-{number}") == (LABELS, settings_of(imported)[1])
    for name in ("saved", "hf-0"):
        assert np.array_equal(predict(tmp_path / name, files, "torch", "cpu").probabilities, expected.probabilities)
    again = config_of(run, source)
    assert again.data == config.data and not again.training.new_head


def test_data_of_the_user_keep_the_labels_of_the_model(tmp_path: Path) -> None:
    """The run and its continuation, whose data are arrays of the user, without facts."""

    class Arrays:
        def train_batch(self, step: int, batch_size: int) -> dict[str, Any]:
            inputs = np.random.default_rng(step).normal(size=(batch_size, 20, 27, 3)).astype(np.float32)
            return {"inputs": inputs, "labels": np.arange(batch_size, dtype=np.int32) % 3}

    imported = imported_folder(tmp_path / "imported", "vit")
    config = config_of(imported, tmp_path).with_overrides("training.max_steps=2")
    trainer = Trainer.start(config, tmp_path / "run", backend="torch", quiet=True, data=Arrays())
    assert any(is_one_line(note, "names of the classes", str(imported)) for note in trainer.notes)
    trainer.fit(until=1)
    Trainer.resume(tmp_path / "run", quiet=True, data=Arrays()).fit()
    icenet.convert(tmp_path / "run", tmp_path / "hf", "hf")
    assert settings_of(tmp_path / "hf") == settings_of(imported)


def test_keys_of_the_user_come_before_the_processor(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    imported = imported_folder(tmp_path / "imported", "resnet")
    source = pictures(tmp_path / "images", *LABELS)
    values = {"model": {"path": str(imported)}, "data": {"kind": "images", "source": str(source)}}
    data: Any = Config.from_dict(values, ["data.image_size=32"]).data
    assert (data.image_size, data.preprocessor, data.channels) == (32, None, 3)
    assert is_one_line(caplog.messages[-1], "data.preprocessor", "data.image_size")
    caplog.clear()
    off: Any = Config.from_dict(values, ["data.preprocessor=null"]).data
    assert (off.preprocessor, off.image_size, off.mean, caplog.messages) == (None, None, None, [])
    with pytest.raises(ConfigError) as error:
        Config.from_dict(values).with_overrides("data.mean=[0.5,0.5,0.5]")
    assert is_one_line(error.value, "mean has no effect", "preprocessor")
    with pytest.raises(ConfigError) as error:
        dataset_for(Config.from_dict(values, ['data.preprocessor={"do_flip": true}']))
    assert is_one_line(error.value, "data.preprocessor", "do_flip")
    with pytest.raises(ConfigError) as error:
        dataset_for(Config.from_dict(values, ['data.preprocessor={"image_processor_type": "BitImageProcessor"'
                                              ', "do_center_crop": false}']))  # fmt: skip
    assert is_one_line(error.value, "data.preprocessor", "crop_size")


# ---- another number of classes ----------------------------------------------------------------------------


def test_a_new_head(imported: Path, tmp_path: Path) -> None:
    """The initial values are those of a new model for the head, and of the folder for all else, on both backends."""
    source = pictures(tmp_path / "images", "ant", "bee")
    config = config_of(imported, source, vocab_size=2)
    assert config.training.new_head and not config_of(imported, source, vocab_size=3).training.new_head
    new, old = icenet.build(config, "torch").weights(), icenet.load(imported, "torch").weights()
    expected = {**old, **{name: new[name] for name in ("output.weight", "output.bias")}}
    assert expected["output.weight"].shape[0] == 2 and expected["output.weight"].any()
    for backend in ("mlx", "torch"):
        trainer = Trainer.start(config, tmp_path / backend, backend=backend, quiet=True)
        assert same_bits(trainer.engine.weights(), expected)
        notes = [note for note in trainer.notes if "output layer" in note]
        assert len(notes) == 1 and is_one_line(notes[0], "training.new_head", "2", "3")
        assert not any("meaning" in note for note in trainer.notes)
        trainer.fit()
        files = sorted(source.rglob("*.png"))
        assert predict(tmp_path / backend, files, "torch", "cpu").classes == ["ant", "bee"]

    icenet.convert(tmp_path / "mlx", tmp_path / "hf", "hf")
    assert settings_of(tmp_path / "hf") == (["ant", "bee"], settings_of(imported)[1])
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "hf").eval()
    assert model.config.label2id == {"ant": 0, "bee": 1}
    images = torch.randn(2, 3, 20, 27, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        single = model(images).logits.numpy()
        exact = model.double()(images.double()).logits.numpy()
    noise = max(np.abs(single - exact).max(), 2**-23 * np.abs(exact).max())
    for backend in ("mlx", "torch"):
        inputs = native(backend, images.permute(0, 2, 3, 1).numpy(), images=True)
        assert np.abs(plain(icenet.load(tmp_path / "mlx", backend, "cpu")(inputs)) - exact).max() <= 8 * noise


def test_both_classifiers_of_a_distilled_model_are_new(tmp_path: Path) -> None:
    torch.manual_seed(1)
    options = {**MODELS["vit"][1], "num_labels": 3, "architectures": ["DeiTForImageClassificationWithTeacher"]}
    model = transformers.AutoModelForImageClassification.from_config(transformers.DeiTConfig(**options))
    model.save_pretrained(tmp_path / "imported")
    processor_of("DeiT")(size={"height": 22, "width": 30}, crop_size=[20, 27]).save_pretrained(tmp_path / "imported")
    source = pictures(tmp_path / "images", "ant", "bee")
    config = config_of(tmp_path / "imported", source, vocab_size=2)
    trainer = Trainer.start(config, tmp_path / "run", backend="torch", quiet=True)
    new, found = icenet.build(config, "torch").weights(), trainer.engine.weights()
    old = icenet.load(tmp_path / "imported", "torch").weights()
    heads = [name for name in new if name.startswith(("output.", "distillation_output."))]
    assert len(heads) == 4 and same_bits(found, {**old, **{name: new[name] for name in heads}})
    trainer.fit()
    icenet.convert(tmp_path / "run", tmp_path / "hf", "hf")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "hf")
    assert type(again) is type(model) and again.config.id2label == {0: "ant", 1: "bee"}
    file = source / "ant" / "1.png"
    expected = again.eval()(
        **processor_of("DeiT").from_pretrained(tmp_path / "hf")(Image.open(file), return_tensors="pt")
    )
    probabilities = expected.logits.double().softmax(-1).detach().numpy()
    np.testing.assert_allclose(predict(tmp_path / "run", [file], "torch", "cpu").probabilities, probabilities, 1e-5)


def test_a_head_is_replaced_on_request_only(tmp_path: Path) -> None:
    """Without it an error names the key; the command says what is done; and a text model has no such key."""
    imported = imported_folder(tmp_path / "imported", "vit")
    source = pictures(tmp_path / "images", "ant", "bee")
    with pytest.raises(ConfigError) as error:
        Trainer.start(config_of(imported, source), tmp_path / "run", backend="torch", quiet=True)
    assert is_one_line(error.value, "model.vocab_size", "2 classes", "model.vocab_size=2", "output layer")
    model = {**Config.from_dict({"model": {"path": str(imported)}}).model.model_dump(), "vocab_size": 2}
    values = config_of(imported, source).to_dict()
    other = Config.from_dict({**values, "model": model})
    with pytest.raises(ConfigError) as error:
        Trainer.start(other, tmp_path / "run", backend="torch", quiet=True)
    assert is_one_line(error.value, "output.weight", "training.new_head=true")
    Trainer.start(other.with_overrides("training.new_head=true"), tmp_path / "run", backend="torch", quiet=True)
    with pytest.raises(ConfigError) as error:
        larger = config_of(imported, source, vocab_size=2, image_size=[20, 35])
        Trainer.start(larger.with_overrides("data.preprocessor.size.width=35"), tmp_path / "run", backend="torch")
    assert is_one_line(error.value, "position_embedding.weight", "model.image_size is [20, 35], and [20, 27] there")
    assert "new_head" not in str(error.value)
    with pytest.raises(IceNetError) as wrong:
        Config.from_yaml("transformer-tiny", ["training.new_head=true"])
    assert is_one_line(wrong.value, "training.new_head", "transformer")


@both_backends
def test_the_command_takes_a_folder_and_a_number_of_classes(backend: str, tmp_path: Path) -> None:
    imported = imported_folder(tmp_path / "imported", "resnet")
    source = pictures(tmp_path / "images", "ant", "bee")
    (tmp_path / "my.yaml").write_text(
        f"data: {{kind: images, source: {source}}}\ntraining: {{max_steps: 1, batch_size: 2, eval_every: null}}\n"
    )
    sets = [f"model.path={imported}", "model.vocab_size=2", "device=cpu", "data.validation_fraction=0"]
    argv = ["train", str(tmp_path / "my.yaml"), "--run", str(tmp_path / "run"), "--backend", backend]
    assert main([*argv, *(part for key in sets for part in ("--set", key))]) in (0, None)
    found = Config.from_yaml(tmp_path / "run" / "config.yaml")
    assert found.training.new_head and found.model.vocab_size == 2
