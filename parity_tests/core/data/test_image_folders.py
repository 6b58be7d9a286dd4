"""The structure of image folders: which folders are classes, which are splits, and what is refused or not read."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import is_one_line

from icenet.core.data.images.folders import class_folders, scan, split_role
from icenet.core.errors import DataError


def place(folder: Path, *files: str) -> Path:
    """Writes empty files, and folders for names that end in a slash. Their content is never read here."""
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            path.touch()
    return folder


def splits(*names: str, classes: str = "cat dog") -> list[str]:
    """Returns one image for each class of each split."""
    return [f"{name}/{kind}/1.png" for name in names for kind in classes.split()]


def layout(folder: Path) -> tuple[list[str], list[str], list[str] | None]:
    """Returns the classes, the training images and the validation images, by path."""
    found = class_folders(folder)
    parts = [
        None if part is None else [path.relative_to(folder).as_posix() for members in part for path in members]
        for part in (found.train, found.validation)
    ]
    assert parts[0] is not None
    return found.classes, parts[0], parts[1]


NAMES = {
    "train": "train Train TRAINING training trn train_set training-set train_data trainset train2017 01_train",
    "validation": "val Valid valid validation VALIDATION val2017 valid_set dev devset development holdout",
    "test": "test TEST testing tst test_set testImages eval evaluation",
    "None": "cat tr te va ts trainer testament vale device tested data set images 2017 seg_train cat_test valley",
}


@pytest.mark.parametrize("role", NAMES)
def test_names_of_splits(role: str) -> None:
    assert {name: str(split_role(name)) for name in NAMES[role].split()} == dict.fromkeys(NAMES[role].split(), role)


@pytest.mark.parametrize(
    ("train", "validation"),
    [("train", "valid"), ("train", "val"), ("Train", "Validation"), ("TRAINING", "dev"), ("trn", "VAL"),
     ("train2017", "val2017"), ("training_set/training_set", "valid_set/valid_set"), ("train", "test")],
)  # fmt: skip
def test_splits_are_no_classes(train: str, validation: str, tmp_path: Path) -> None:
    place(tmp_path, *splits(train, validation))
    ours, theirs = ([f"{split}/{kind}/1.png" for kind in ("cat", "dog")] for split in (train, validation))
    assert layout(tmp_path) == (["cat", "dog"], ours, theirs)


def test_a_test_split_is_named_and_not_used(tmp_path: Path) -> None:
    place(tmp_path, *splits("train", "valid", "test"), "test/cat/2.png")
    assert layout(tmp_path)[2] == ["valid/cat/1.png", "valid/dog/1.png"]
    (note,) = class_folders(tmp_path).notes
    assert is_one_line(note, str(tmp_path / "test"), "3 images", "not used", "valid")


def test_a_test_split_alone_validates_and_says_so(tmp_path: Path) -> None:
    place(tmp_path, *splits("train", "Test"))
    (note,) = class_folders(tmp_path).notes
    assert is_one_line(note, str(tmp_path / "Test"), "validation set")


def test_test_images_without_classes_are_not_used(tmp_path: Path) -> None:
    place(tmp_path, *splits("train"), "test/1.png", "test/2.png")
    assert layout(tmp_path)[2] is None
    (note,) = class_folders(tmp_path).notes
    assert is_one_line(note, str(tmp_path / "test"), "2 images", "not used", "no class folders")


@pytest.mark.parametrize(
    ("files", "classes"),
    [(["train/1.png", "car/1.png", "bus/1.png"], ["bus", "car", "train"]),
     (["valid/1.png", "invalid/1.png"], ["invalid", "valid"]),
     (["test/1.png", "control/more/1.png"], ["control", "test"])],
)  # fmt: skip
def test_a_class_with_the_name_of_a_split_is_named(files: list[str], classes: list[str], tmp_path: Path) -> None:
    place(tmp_path, *files)
    assert layout(tmp_path)[0] == classes
    (note,) = class_folders(tmp_path).notes
    assert is_one_line(note, str(tmp_path / files[0].split("/")[0]), "as a class")


REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "unknown names of splits": (splits("tr", "va"), ["tr, va", "cat, dog", "train and valid", "data.source"]),
    "names that contain those of splits": (
        [*splits("seg_train/seg_train", "seg_test/seg_test"), "seg_pred/1.png"], ["seg_test, seg_train", "rename"]),
    "the same subfolders": (splits("ape", "bee", classes="x y"), ["ape, bee", "x, y", "directly into the class"]),
    "one shared subfolder": (splits("ape", "bee", classes="x"), ["ape, bee", "same folders x"]),
    "classes above splits": (splits("cat", "dog", classes="train val"), ["cat, dog", "train/cat"]),
    "folds": (splits("f1/train", "f1/val", "f2/train", "f2/val"), ["f1, f2", "data.source", "/f1"]),
    "a level above": (splits("data/train", "data/val"), ["only one class (data)", "data.source=", "/data"]),
    "two levels above": (splits("set/set/train", "set/set/valid"), ["data.source=", "/set/set"]),
    "splits without classes": (["train/1.png", "valid/1.png"], ["train, valid", "train/CLASS"]),
    "detection": (
        ["train/images/1.png", "train/labels/1.txt", "valid/images/1.png"], ["/train", "labels", "classification"]),
    "no training images": (splits("val", "test"), ["test, val", "training images"]),
    "two training splits": (splits("train", "training"), ["'train'", "'training'"]),
    "a folder next to splits": (splits("train", "val", "more"), ["'train'", "more", "move it out"]),
    "validation without classes": ([*splits("train"), "val/1.png"], ["/val", "no class folders", "cat, dog"]),
    "other classes in validation": (
        [*splits("train", classes="ant bee cat"), *splits("val", classes="ant cat dog")],
        ["only", "/train has bee", "/val has dog"]),
    "a class without validation images": (
        [*splits("train"), "val/cat/1.png", "val/dog/"], ["/val/dog", "no images"]),
    "images without folders": (["1.png", "2.png"], ["images, but no folders"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_structures_that_are_no_classes(name: str, tmp_path: Path) -> None:
    files, names = REFUSED[name]
    place(tmp_path, *files)
    with pytest.raises(DataError) as caught:
        class_folders(tmp_path)
    assert is_one_line(caught.value, str(tmp_path), *names) and len(str(caught.value)) < 300 + 3 * len(str(tmp_path))


def test_a_name_in_two_forms_of_unicode(tmp_path: Path) -> None:
    """A folder that was packed on one system and unpacked on another one may have an accent as a character."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    place(tmp_path, f"train/{composed}/1.png", "train/tea/1.png", f"valid/{decomposed}/1.png", "valid/tea/1.png")
    with pytest.raises(DataError) as caught:
        class_folders(tmp_path)
    assert is_one_line(caught.value, "two forms of Unicode", r"'caf\xe9' in", r"'cafe\u0301' in")
    place(tmp_path, f"train/{decomposed}/1.png")
    if len(list((tmp_path / "train").iterdir())) == 3:  # not on a file system that takes them for one name
        with pytest.raises(DataError) as caught:
            class_folders(tmp_path / "train")
        assert is_one_line(caught.value, "two forms of Unicode", r"'caf\xe9'", r"'cafe\u0301'")


def test_classes_may_contain_subfolders(tmp_path: Path) -> None:
    place(tmp_path, "cat/1.png", "cat/more/2.png", "dog/1.png", "dog/more/2.png", "dog/other/3.JPG")
    assert layout(tmp_path) == (
        ["cat", "dog"],
        ["cat/1.png", "cat/more/2.png", "dog/1.png", "dog/more/2.png", "dog/other/3.JPG"],
        None,
    )


def test_what_is_not_read_is_counted_and_named(tmp_path: Path) -> None:
    place(tmp_path, "a/1.png", "b/1.png", "loose.png", ".DS_Store", "a/._1.png", "__MACOSX/a/._1.png", "b/Thumbs.db",
          "b/2.heic", "b/3.heic", "labels.csv", "b/x.png/")  # fmt: skip
    (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "nowhere")
    found = class_folders(tmp_path)
    assert [len(members) for members in found.train] == [1, 1]
    loose, skipped = found.notes
    assert is_one_line(loose, str(tmp_path), "1 image", "loose.png")
    assert is_one_line(
        skipped, "2 hidden (.DS_Store, a/._1.png)", "2 of the operating system (__MACOSX, b/Thumbs.db)",
        "3 without the suffix of an image (b/2.heic, b/3.heic, labels.csv)", "1 linked to nothing (b/gone.png)",
    )  # fmt: skip


def test_links_are_followed_and_each_folder_is_read_once(tmp_path: Path) -> None:
    place(tmp_path, "data/a/1.png", "data/b/1.png", "elsewhere/1.png", "elsewhere/2.png")
    data = tmp_path / "data"
    (data / "c").symlink_to(tmp_path / "elsewhere")
    for name in ("up", "up2"):  # with two links to a parent a walk that follows them never ends
        (data / "a" / name).symlink_to(data)
    (data / "a" / "b").symlink_to(data / "b")  # b is read as the class, not as a part of a
    assert layout(data)[1] == ["a/1.png", "b/1.png", "c/1.png", "c/2.png"]
    assert scan(data).skipped == {"linked to a folder that is read already": ["a/b", "a/up", "a/up2"]}
