"""ResNet and ViT against the models and image processors of `transformers`: logits, folders and predictions."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import both_backends, is_one_line, native, plain, same_bits
from torchvision_models import randomize

import icenet
from icenet.cli.main import main
from icenet.commands.predict import predict
from icenet.core.config import CNNConfig, Config, ViTConfig, cnn_plan
from icenet.core.errors import ConfigError, IceNetError, UsageError, WeightsError
from icenet.core.families import FAMILIES, folder
from icenet.core.families.family import different_options
from icenet.core.weights import files as weight_files

for _name in ("torch", "mlx", "transformers"):
    pytest.importorskip(_name)
importlib.import_module("icenet.blas")  # before mlx.core
torch: Any = importlib.import_module("torch")
transformers: Any = importlib.import_module("transformers")

VIT = {
    "hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 12, "image_size": 30,
    "patch_size": 7,
}  # fmt: skip
NAMES = {"id2label": {0: "cat", 1: "dog", 2: "a\nnewt", 3: "owl", 4: "fox"}}
WITH_TEACHER = "DeiTForImageClassificationWithTeacher"
RESNET = {"embedding_size": 9, "hidden_sizes": [12, 20], "depths": [2, 1]}

# Sizes that divide nothing where the family allows it, strides at each place, and numbers of classes with no names.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", {**VIT, **NAMES, "qkv_bias": False}),
    "vit, grey": ("ViT", {**VIT, "head_dim": 8, "num_channels": 1, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3}),
    "vit, no squares": ("ViT", {**VIT, **NAMES, "image_size": [30, 17]}),
    "deit": ("DeiT", {**VIT, **NAMES, "architectures": ["DeiTForImageClassification"]}),
    "deit, two classifiers": ("DeiT", {**VIT, "num_labels": 4, "architectures": [WITH_TEACHER]}),
    "resnet, basic": (
        "ResNet",
        {"embedding_size": 9, "hidden_sizes": [12, 17], "depths": [1, 2], "layer_type": "basic", "num_labels": 7,
         "downsample_in_first_stage": True},
    ),
    "resnet, version 1.5": ("ResNet", {**RESNET, **NAMES}),
    "resnet, version 1": ("ResNet", {**RESNET, "downsample_in_bottleneck": True, "num_channels": 1}),
}  # fmt: skip
SIZE = 30


class Case:
    """A random model of `transformers`, its folder, and its logits of two images in float32 and float64."""

    def __init__(self, path: Path, kind: str, options: dict[str, Any]) -> None:
        config = getattr(transformers, f"{kind}Config")(**options)
        model = randomize(transformers.AutoModelForImageClassification.from_config(config))
        self.folder = path
        model.save_pretrained(path)
        generator = torch.Generator().manual_seed(2)
        size = getattr(config, "image_size", SIZE)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        self.images = torch.randn(2, config.num_channels, height, width, generator=generator)
        with torch.no_grad():
            self.single = model(self.images).logits.numpy()
            self.exact = model.double()(self.images.double()).logits.numpy()

    def logits_of(self, path: Path) -> np.ndarray:
        """Returns what `transformers` computes with a folder."""
        model = transformers.AutoModelForImageClassification.from_pretrained(path).eval()
        with torch.no_grad():
            return np.asarray(model(self.images).logits.numpy())


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    yield Case(tmp_path_factory.mktemp("vision") / "folder", *CASES[request.param])


@both_backends
def test_logits_are_those_of_transformers(case: Case, backend: str) -> None:
    """The error is at most 8 times that of `transformers` in float32, both against `transformers` in float64."""
    images = native(backend, case.images.permute(0, 2, 3, 1).numpy(), images=True)
    found = plain(icenet.load(case.folder, backend, "cpu")(images))
    noise = max(np.abs(case.single - case.exact).max(), 2**-23 * np.abs(case.exact).max())
    assert np.abs(found - case.exact).max() <= 8 * noise


def test_an_exported_folder_has_the_same_tensors_and_is_loaded(case: Case, tmp_path: Path) -> None:
    """Directly, with the counters of batch norms, and by way of IceNet's own folder, which knows nothing of them."""
    original = dict(weight_files.read(case.folder))
    icenet.convert(case.folder, tmp_path / "again", "hf")
    assert same_bits(dict(weight_files.read(tmp_path / "again")), original)
    again, before = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "again", case.folder))
    assert {**again, **before} == again
    assert not (tmp_path / "again" / "generation_config.json").exists()
    assert main(["convert", str(case.folder), str(tmp_path / "ours"), "--to", "canonical"]) in (0, None)
    icenet.convert(tmp_path / "ours", tmp_path / "hf", "hf")
    found = dict(weight_files.read(tmp_path / "hf"))
    assert found.keys() == original.keys()
    weights = [name for name in original if not name.endswith("num_batches_tracked")]
    assert same_bits({name: found[name] for name in weights}, {name: original[name] for name in weights})
    for path in ("again", "hf"):
        # the sums of a product are not in the same order on all processors, nor in two calls
        np.testing.assert_allclose(case.logits_of(tmp_path / path), case.single, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "deit, two classifiers", "resnet, version 1.5"])
def test_the_names_of_the_modules_of_transformers_are_read(name: str, tmp_path: Path) -> None:
    """`save_original_format=False` writes them; `transformers` reads them, and an export has them again."""
    case = Case(tmp_path / "folder", *CASES[name])
    model = transformers.AutoModelForImageClassification.from_pretrained(case.folder)
    model.save_pretrained(tmp_path / "new", save_original_format=False)
    stored = dict(weight_files.read(tmp_path / "new"))
    assert name != "vit" or "vit.layers.1.attention.o_proj.weight" in stored
    found, expected = (icenet.load(path, "torch").weights() for path in (tmp_path / "new", case.folder))
    assert same_bits(found, expected)
    icenet.convert(tmp_path / "new", tmp_path / "again", "hf")
    assert same_bits(dict(weight_files.read(tmp_path / "again")), stored)


# ---- configs ----------------------------------------------------------------------------------------------

PUBLISHED: dict[str, dict[str, Any]] = {
    "google/vit-base-patch16-224": {
        "model_type": "vit", "architectures": ["ViTForImageClassification"], "attention_probs_dropout_prob": 0.0,
        "encoder_stride": 16, "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": 768,
        "image_size": 224, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12,
        "num_attention_heads": 12, "num_channels": 3, "num_hidden_layers": 12, "patch_size": 16, "qkv_bias": True,
        "id2label": {str(i): f"name {i}" for i in range(1000)}, "transformers_version": "4.13.0.dev0",
        "label2id": {f"name {i}": i for i in range(1000)},
    },
    "facebook/deit-tiny-distilled-patch16-224": {
        "model_type": "deit", "architectures": [WITH_TEACHER], "attention_probs_dropout_prob": 0.0,
        "encoder_stride": 16, "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": 192,
        "id2label": {str(i): f"name {i}" for i in range(1000)}, "image_size": 224, "initializer_range": 0.02,
        "intermediate_size": 768, "layer_norm_eps": 1e-12, "num_attention_heads": 3, "num_channels": 3,
        "num_hidden_layers": 12, "patch_size": 16, "qkv_bias": True, "torch_dtype": "float32",
    },
    "microsoft/resnet-50": {
        "model_type": "resnet", "architectures": ["ResNetForImageClassification"], "depths": [3, 4, 6, 3],
        "downsample_in_first_stage": False, "embedding_size": 64, "hidden_act": "relu", "num_channels": 3,
        "hidden_sizes": [256, 512, 1024, 2048], "layer_type": "bottleneck", "torch_dtype": "float32",
        "id2label": {str(i): f"name {i}" for i in range(1000)}, "transformers_version": "4.18.0.dev0",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_configs_of_published_models_are_read(name: str) -> None:
    """ResNet-50 is the preset of this name but for dropout."""
    values = PUBLISHED[name]
    family = FAMILIES[values["model_type"]]
    config = Config.from_dict({"model": family.read(values)}).model
    assert different_options(family, config) == []
    if isinstance(config, ViTConfig):
        assert (config.norm_eps, config.image_size, config.vocab_size, config.dropout) == (1e-12, 224, 1000, 0.0)
    else:
        assert isinstance(config, CNNConfig)
        preset = Config.from_yaml("resnet-50").model
        assert isinstance(preset, CNNConfig) and cnn_plan.blocks(preset) == cnn_plan.blocks(config)
        assert config.model_copy(update={"dropout": preset.dropout}) == preset.model_copy(
            update={"stage_widths": cnn_plan.widths(preset)}
        )


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    return Case(tmp_path / "vit", *CASES["vit"]).folder


def changed(path: Path, file: str = "config.json", **values: Any) -> Path:
    """Changes keys of a JSON file of a folder."""
    found = json.loads((path / file).read_text()) if (path / file).exists() else {}
    (path / file).write_text(json.dumps({**found, **values}))
    return path


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"patch_size": [7, 6]}, ["patch_size", "7, 6"]),
        ({"image_size": [30]}, ["image_size", "30"]),
        ({"image_size": [30, "36"]}, ["image_size", "36"]),
        ({"patch_size": "7"}, ["patch_size"]),
        ({"id2label": {"0": "a", "2": "b"}}, ["id2label"]),
        ({"id2label": ["a"]}, ["id2label"]),
        ({"num_labels": 4}, ["num_labels", "5"]),
        ({"hidden_act": "quick_gelu"}, ["hidden_act", "quick_gelu"]),
        ({"use_swiglu_ffn": True}, ["use_swiglu_ffn"]),
        ({"patch_size": 31}, ["patch_size", "image_size"]),
    ],
)
def test_a_config_that_is_not_supported_is_one_line(vit: Path, values: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        folder.read(changed(vit, **values))
    assert is_one_line(error.value, "config.json", *names)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"layer_type": "wide"}, ["layer_type", "wide"]),
        ({"depths": [1, 2, 3]}, ["depths", "hidden_sizes"]),
        ({"depths": 4}, ["depths"]),
        ({"hidden_sizes": [10, 20]}, ["hidden_sizes", "4"]),
        ({"downsample_in_bottleneck": 1}, ["downsample_in_bottleneck"]),
    ],
)
def test_a_resnet_that_is_not_supported_is_one_line(values: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        FAMILIES["resnet"].read({**RESNET, **values})
    assert is_one_line(error.value, *names)


def test_a_pooler_is_named_and_kept(vit: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arrays = dict(weight_files.read(vit))
    arrays |= {"vit.pooler.dense.weight": np.ones((20, 20), np.float32), "vit.pooler.dense.bias": np.ones(20)}
    weight_files.write(vit, arrays)
    folder.read(vit)
    assert is_one_line(caplog.messages[-1], "vit.pooler.dense.weight", "vit.pooler.dense.bias")
    icenet.convert(vit, tmp_path / "again", "hf")
    assert same_bits(dict(weight_files.read(tmp_path / "again")), arrays)
    arrays["vit.embeddings.mask_token"] = np.ones((1, 1, 20), np.float32)
    arrays["other.num_batches_tracked"] = np.ones((), np.int64)
    weight_files.write(vit, arrays)
    with pytest.raises(WeightsError) as error:
        folder.read(vit)
    assert is_one_line(error.value, "vit.embeddings.mask_token", "other.num_batches_tracked")


# ---- predictions ------------------------------------------------------------------------------------------

PROCESSORS = {
    "vit": ("vit", "ViT", {"size": SIZE}),
    "deit, two classifiers": ("deit", "DeiT", {"size": {"height": 36, "width": 34}, "crop_size": SIZE}),
    "resnet, version 1.5": ("convnext", "ConvNext", {"size": {"shortest_edge": 40}, "crop_pct": 0.8}),
}


def photo(path: Path, height: int, width: int, seed: int = 1) -> Path:
    image = importlib.import_module("PIL.Image")
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("name", PROCESSORS)
def test_predictions_are_those_of_transformers(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the folder's image processor and names of classes, on both backends, and in each order of files."""
    module, kind, options = PROCESSORS[name]
    case = Case(tmp_path / "model", *CASES[name])
    package = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    processor = getattr(package, f"{kind}ImageProcessorPil")(**options)
    processor.save_pretrained(case.folder)
    files = [photo(tmp_path / f"{h}.png", h, w, h) for h, w in ((50, 41), (33, 70), (44, 44))]
    image = importlib.import_module("PIL.Image")
    inputs = processor([image.open(file) for file in files], return_tensors="pt")
    model = transformers.AutoModelForImageClassification.from_pretrained(case.folder).eval()
    with torch.no_grad():
        expected = model(**inputs).logits.double().softmax(-1).numpy()
    for backend in ("mlx", "torch"):
        found = predict(case.folder, files, backend, "cpu")
        assert found.classes == list(model.config.id2label.values())
        np.testing.assert_allclose(found.probabilities, expected, rtol=2e-5, atol=2e-5)
    argv = ["predict", str(case.folder), *map(str, files), "--json", "--top-k", "2", "--backend", "torch"]
    assert main([*argv, "--device", "cpu"]) in (0, None)
    for row, printed in zip(expected, json.loads(capsys.readouterr().out), strict=True):
        best = [model.config.id2label[int(index)] for index in np.argsort(-row)[:2]]
        assert [entry["class"] for entry in printed["probabilities"]] == best and printed["class"] == best[0]


def test_a_folder_that_cannot_predict_is_one_line(vit: Path, tmp_path: Path) -> None:
    image = photo(tmp_path / "photo.png", 20, 25)

    def error() -> str:
        with pytest.raises(IceNetError) as found:
            predict(vit, [image], "torch", "cpu")
        return str(found.value)

    assert is_one_line(error(), "preprocessor_config.json")
    changed(vit, "preprocessor_config.json", do_flip_channel_order=True)
    assert is_one_line(error(), "preprocessor_config.json", "do_flip_channel_order")
    for form in ("hf", "canonical"):  # which keep the file
        done = icenet.convert(vit, tmp_path / form, form)
        assert is_one_line(done.note, "icenet predict", "preprocessor_config.json", "do_flip_channel_order")
    (vit / "preprocessor_config.json").write_text('{"size": 24}')
    assert is_one_line(error(), "photo.png", "24x24", "30x30", "preprocessor_config.json")
    icenet.save(icenet.load(vit, "torch", "cpu"), tmp_path / "saved")
    (tmp_path / "saved" / "images.json").unlink()
    with pytest.raises(UsageError) as usage:
        predict(tmp_path / "saved", [image], "torch", "cpu")
    assert is_one_line(usage.value, "images.json", "Hugging Face")
    with pytest.raises(UsageError) as usage:
        predict(vit, [image], averaged=True)
    assert is_one_line(usage.value, "--averaged")


@pytest.mark.parametrize("form", ["mlx-lm", "gguf"])
def test_forms_of_text_are_refused(form: str, vit: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        icenet.convert(vit, tmp_path / ("out.gguf" if form == "gguf" else "out"), form)
    assert is_one_line(error.value, form, "vit", "--to hf")


def test_info_and_parity_take_a_folder(vit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(vit)]) in (0, None)
    assert "patch_embedding" in capsys.readouterr().out
    assert main(["parity", str(vit), "--set", "device=cpu"]) in (0, None)
