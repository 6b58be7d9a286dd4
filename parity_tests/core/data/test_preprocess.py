"""Image processors of Hugging Face: pixel values against `transformers` with Pillow, formulas, what is refused."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import is_one_line

from icenet.core.data.images import preprocess
from icenet.core.data.images.preprocess import Preprocessor, Resize
from icenet.core.errors import ConfigError, DataError, IceNetError

Image: Any = pytest.importorskip("PIL.Image")


def pixels(height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


# ---- against transformers ---------------------------------------------------------------------------------


def draw(choose: random.Random, kind: str) -> dict[str, Any]:
    """Returns settings of an image processor."""
    found: dict[str, Any] = {"resample": choose.choice([0, 1, 2, 3, 4, 5])}
    if kind == "ConvNext":
        found["size"] = choose.choice([20, {"shortest_edge": 33}, {"shortest_edge": 390}])
        found["crop_pct"] = choose.choice([0.875, 0.9, 1.0])
    else:
        found["size"] = choose.choice([20, {"height": 21, "width": 30}, {"shortest_edge": 25}])
    if choose.random() < 0.5:
        crop = choose.choice([18, 40, {"height": 17, "width": 44}])
        found |= {"do_center_crop": True, "crop_size": crop}
    for switch in ("do_resize", "do_rescale", "do_normalize"):
        if choose.random() < 0.2:
            found[switch] = False
    if choose.random() < 0.5:
        found |= {"rescale_factor": 1 / 127.5, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.2, 0.3, 0.4]}
    return {name: value for name, value in found.items() if name == "crop_size" or choose.random() < 0.8}


@pytest.mark.parametrize("kind", preprocess.PROCESSORS)
def test_pixel_values_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """To the bit, with the settings of a file that the library wrote and with those that a user wrote."""
    pytest.importorskip("transformers")
    module = importlib.import_module(f"transformers.models.{kind.lower()}.image_processing_pil_{kind.lower()}")
    choose = random.Random(kind)
    for index in range(12):
        settings = draw(choose, kind)
        processor = getattr(module, f"{kind}ImageProcessorPil")(**settings)
        processor.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "preprocessor_config.json").read_text())
        image = pixels(choose.randint(5, 70), choose.randint(5, 70), index)
        expected = processor(Image.fromarray(image))["pixel_values"][0].transpose(1, 2, 0)
        for values in (written, {**settings, "feature_extractor_type": f"{kind}FeatureExtractor"}):
            found = preprocess.from_values(values, "vit", 3)(image)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, expected.astype(np.float32), err_msg=str(settings))


# ---- by formulas ------------------------------------------------------------------------------------------


def test_the_files_of_published_models() -> None:
    """Those of google/vit-base-patch16-224 and microsoft/resnet-50."""
    vit = {
        "do_normalize": True, "do_resize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
        "size": 224,
    }  # fmt: skip
    resize = Resize("exact", 224, 224, 2)
    assert preprocess.from_values(vit, "vit", 3) == Preprocessor(resize, None, 1 / 255, [0.5] * 3, [0.5] * 3)
    resnet = {
        "crop_pct": 0.875, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "ConvNextFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3, "size": 224,
    }  # fmt: skip
    found = preprocess.from_values(resnet, "resnet", 3)
    assert found.resize == Resize("crop", 224, 224, 3, 0.875) and found.mean == [0.485, 0.456, 0.406]
    assert preprocess.from_values({"size": 384}, "resnet", 3).resize == Resize("exact", 384, 384, 3)


def test_values_and_crops_by_their_formulas() -> None:
    image = pixels(6, 9)
    scaled = Preprocessor(scale=1 / 255, mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 0.125])(image)
    expected = (image / 255.0 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 0.125]
    np.testing.assert_allclose(scaled, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(Preprocessor()(image), image.astype(np.float32))
    np.testing.assert_array_equal(Preprocessor(crop=(4, 4))(image), image[1:5, 2:6])
    np.testing.assert_array_equal(Preprocessor(crop=(3, 4))(image), image[1:4, 2:6])  # the odd row is at the bottom
    padded = Preprocessor(crop=(9, 4))(image)  # the odd row is at the top
    assert padded.shape == (9, 4, 3)
    np.testing.assert_array_equal(padded[2:8], image[:, 2:6])
    assert not padded[:2].any() and not padded[8].any()
    half = Preprocessor(Resize("exact", 3, 3, 4))(pixels(6, 6, channels=1))  # a box of 2x2 pixels
    mean = pixels(6, 6, channels=1).reshape(3, 2, 3, 2).astype(float).mean(axis=(1, 3))
    np.testing.assert_allclose(half[:, :, 0], mean, rtol=0, atol=1)  # Pillow rounds rows, then columns
    # int(28 / 0.875) = 32 for the shorter side, of which the centre of 28 remains
    assert Preprocessor(Resize("crop", 28, 28, 3, 0.875))(pixels(40, 90)).shape == (28, 28, 3)


def test_files_are_upright_opaque_and_of_the_models_channels(tmp_path: Path) -> None:
    image = Image.fromarray(pixels(4, 6))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees
    image.save(tmp_path / "rotated.png", exif=exif)
    found, has_more = Preprocessor().read(tmp_path / "rotated.png", 3)
    np.testing.assert_array_equal(found, np.rot90(pixels(4, 6), -1).astype(np.float32))
    assert not has_more
    assert Preprocessor().read(tmp_path / "rotated.png", 1)[0].shape == (6, 4, 1)
    Image.new("RGBA", (3, 3), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (Preprocessor().read(tmp_path / "clear.png", 3)[0] == 255).all()


# ---- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"do_pad": True}, ["do_pad"]),
        ({"pad_size": 5, "x": 1}, ["pad_size", "'x'"]),
        ({"crop_pct": 0.9}, ["crop_pct"]),
        ({"image_processor_type": "SamImageProcessor"}, ["image_processor_type", "SamImageProcessor", "ViT"]),
        ({"image_processor_type": 3}, ["image_processor_type"]),
        ({"size": {"shortest_edge": 20, "longest_edge": 30}}, ["size", "longest_edge"]),
        ({"size": {"height": 20}}, ["size", "height"]),
        ({"size": 0}, ["size"]),
        ({"size": {"height": 20, "width": 10**9}}, ["size.width"]),
        ({"size": True}, ["size"]),
        ({"do_center_crop": True}, ["crop_size"]),
        ({"do_resize": 1}, ["do_resize"]),
        ({"resample": 9}, ["resample"]),
        ({"resample": "bicubic"}, ["resample"]),
        ({"image_mean": [0.5]}, ["image_mean", "3"]),
        ({"image_std": [0.5, 0, 0.5]}, ["image_std"]),
        ({"image_mean": ["a", 0.5, 0.5]}, ["image_mean"]),
        ({"image_mean": [float("nan")] * 3}, ["image_mean"]),
        ({"rescale_factor": "1/255"}, ["rescale_factor"]),
        ({"image_processor_type": "ConvNextImageProcessor", "size": {"height": 5, "width": 5}}, ["size"]),
        ({"image_processor_type": "ConvNextImageProcessor", "size": 20, "crop_pct": 0}, ["crop_pct"]),
    ],
)
def test_a_setting_that_is_not_supported_is_one_line(
    tmp_path: Path, values: dict[str, Any], names: list[str]
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError) as error:
        preprocess.read(tmp_path, "vit", 3)
    assert is_one_line(error.value, "preprocessor_config.json", *names)


def test_settings_without_effect_are_accepted() -> None:
    values = {
        "image_processor_type": "ViTImageProcessorFast", "processor_class": "X", "do_convert_rgb": True,
        "do_pad": False, "pad_size": None, "device": "cpu", "_valid_processor_keys": ["images"],
    }  # fmt: skip
    assert preprocess.from_values(values, "resnet", 3) == preprocess.from_values({}, "vit", 3)


def test_a_missing_or_damaged_file_is_one_line(tmp_path: Path) -> None:
    for content in (None, b"[1]", b"{", b'{"size": 1, "size": 2}'):
        if content is not None:
            (tmp_path / "preprocessor_config.json").write_bytes(content)
        with pytest.raises(ConfigError) as error:
            preprocess.read(tmp_path, "vit", 3)
        assert is_one_line(error.value, "preprocessor_config.json")


def test_an_image_of_extreme_shape_is_one_line(tmp_path: Path) -> None:
    """A line of pixels would become an image of gigabytes."""
    Image.fromarray(pixels(1, 9000)).save(tmp_path / "line.png")
    processor = Preprocessor(Resize("shortest", 224, 224, 2))
    with pytest.raises(DataError) as error:
        processor.read(tmp_path / "line.png", 3)
    assert is_one_line(error.value, "line.png", "2,016,000")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(IceNetError) as wrong:
        processor.read(tmp_path / "text.png", 3)
    assert is_one_line(wrong.value, "text.png")
