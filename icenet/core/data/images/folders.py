"""Folders of images: one folder for each class, directly or below a folder for each split (train, valid, test).

The names of splits are those of the exports of Roboflow, Kaggle, torchvision, Keras and Hugging Face. A folder with
such a name is a split if the folder of training images next to it contains class folders. Otherwise it is a class (of
vehicles, `train` may be one), and a note says so, or the data is refused.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from icenet.core.data.images.decode import SUFFIXES
from icenet.core.errors import DataError
from icenet.core.listing import identity, is_run
from icenet.core.messages import some

TRAIN, VALIDATION, TEST = "train", "validation", "test"

_ROLES = {
    TRAIN: ("train", "training", "trn"),
    VALIDATION: ("val", "valid", "validate", "validation", "dev", "development", "holdout", "heldout"),
    TEST: ("test", "testing", "tst", "eval", "evaluation"),
}
"""Names of splits, in lower case, without digits, punctuation and `_ENDINGS`.

Shorter ones (tr, va, te) are not recognized: they may as well be classes, such as languages.
"""
_ENDINGS = re.compile(r"(?<=.)(set|data|dataset|split|images?|imgs?|folder)$")
"""Words that may follow the name of a split: training_set, train-data, test images."""
_SYSTEM = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
    *("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"),
}
"""Files and folders that operating systems create, in lower case. They are not images, whatever they contain."""
_RUN = "folder of a run"
_NAMED = 3
"""Number of names in a message."""


@dataclass
class Folder:
    """A folder and its image files, below it too."""

    path: Path
    images: list[Path] = field(default_factory=list)
    """The image files directly in it, by suffix."""
    subfolders: dict[str, Folder] = field(default_factory=dict)

    @property
    def filled(self) -> dict[str, Folder]:
        """The subfolders that contain images."""
        return {name: folder for name, folder in self.subfolders.items() if folder.has_images}

    @property
    def has_images(self) -> bool:
        """Whether it or a folder below it contains images."""
        return bool(self.images) or any(folder.has_images for folder in self.subfolders.values())

    def all_images(self) -> list[Path]:
        """Returns the image files in it and below it, sorted."""
        return sorted(self._collect())

    def _collect(self) -> Iterable[Path]:
        yield from self.images
        for folder in self.subfolders.values():
            yield from folder._collect()


@dataclass(frozen=True)
class Scan:
    """The image files of a folder, and what is not one.

    Attributes:
        folder: The folder.
        skipped: Paths relative to it of what was left out, by the reason.
    """

    folder: Folder
    skipped: dict[str, list[str]]

    @property
    def notes(self) -> list[str]:
        """One line that counts and names what was left out, or none."""
        if not self.skipped:
            return []
        parts = [f"{len(paths):,} {reason} ({some(paths)})" for reason, paths in self.skipped.items()]
        return [f"{self.folder.path}: not read: {'; '.join(parts)}"]


@dataclass(frozen=True)
class ClassFolders:
    """The image files of each class.

    Attributes:
        classes: Names of the classes, sorted.
        train: The image files of each class.
        validation: Those of the source's own validation part; None without one.
        notes: Messages for the user.
    """

    classes: list[str]
    train: list[list[Path]]
    validation: list[list[Path]] | None
    notes: list[str]


def scan(path: Path) -> Scan:
    """Lists the image files in a folder and its subfolders. Links to folders are followed, each folder once.

    Raises:
        DataError: A folder cannot be read.
    """
    scanner = _Scanner(path)
    try:
        scanner.list(scanner.root, _entries(path))
        while scanner.links:  # last, so that a folder is listed where it is, not where a link to it is
            parent, link = scanner.links.pop(0)
            scanner.add(parent, link)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    return Scan(scanner.root, {reason: sorted(paths) for reason, paths in sorted(scanner.skipped.items())})


class _Scanner:
    """Lists a folder.

    Attributes:
        root: The folder.
        links: Links to folders that were not followed, each with the folder that contains it.
        skipped: See `Scan`.
    """

    def __init__(self, path: Path) -> None:
        self.root = Folder(path)
        self.links: list[tuple[Folder, os.DirEntry[str]]] = []
        self.skipped: dict[str, list[str]] = {}
        self._seen = {identity(path)}

    def list(self, folder: Folder, entries: Iterable[os.DirEntry[str]]) -> None:
        """Lists the entries of a folder and the folders in it."""
        for entry in entries:
            if entry.name.startswith("."):
                self._skip(entry, "hidden")
            elif entry.name.lower() in _SYSTEM:
                self._skip(entry, "of the operating system")
            elif entry.is_dir():
                if entry.is_symlink():
                    self.links.append((folder, entry))
                else:
                    self.add(folder, entry)
            elif os.path.splitext(entry.name)[1].lower() not in SUFFIXES:
                self._skip(entry, "without the suffix of an image")
            elif entry.is_file():
                folder.images.append(folder.path / entry.name)
            else:
                self._skip(entry, "neither file nor folder" if os.path.exists(entry.path) else "linked to nothing")

    def add(self, parent: Folder, entry: os.DirEntry[str]) -> None:
        """Lists a subfolder, unless it was listed before."""
        found = identity(entry.path)
        if found in self._seen:
            self._skip(entry, "linked to a folder that is read already")
            return
        self._seen.add(found)
        entries = _entries(entry.path)
        if is_run([each.name for each in entries]):
            self._skip(entry, _RUN)
            return
        folder = Folder(parent.path / entry.name)
        self.list(folder, entries)
        if entries and all(self._name(each) in self.skipped.get(_RUN, ()) for each in entries):
            return  # a folder of runs is no empty class
        parent.subfolders[entry.name] = folder

    def _skip(self, entry: os.DirEntry[str], reason: str) -> None:
        self.skipped.setdefault(reason, []).append(self._name(entry))

    def _name(self, entry: os.DirEntry[str]) -> str:
        return Path(entry.path).relative_to(self.root.path).as_posix()


def _entries(path: str | Path) -> Sequence[os.DirEntry[str]]:
    with os.scandir(path) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def split_role(name: str) -> str | None:
    """Returns the split that a folder's name means: train, validation or test; None if it is not such a name."""
    word = re.sub(r"[\W\d_]+", "", name.casefold())
    while word not in _WORDS and (shorter := _ENDINGS.sub("", word)) != word:
        word = shorter
    return _WORDS.get(word)


_WORDS = {word: role for role, words in _ROLES.items() for word in words}


def class_folders(path: Path) -> ClassFolders:
    """Finds the classes, and the splits if there are any, in a folder.

    Raises:
        DataError: The folder has no images, one class only, or a structure that may mean something else than classes.
    """
    found = scan(path)
    root, notes = found.folder, found.notes
    if not root.subfolders:
        have = "images, but no" if root.images else "no"
        raise DataError(
            f"data.source {str(path)!r} contains {have} folders; it needs one for each class, with its images"
        )
    splits = {name: role for name in root.filled if (role := split_role(name))}
    others = [name for name in root.filled if name not in splits]
    trains = [name for name, role in splits.items() if role == TRAIN]
    if any(_contains_classes(root.filled[name]) for name in trains):
        if others:
            raise DataError(
                f"data.source {str(path)!r}: next to the split {trains[0]!r} there may only be other splits (valid, "
                f"test), not {some(others)}; move it out or rename it (or {trains[0]!r}, if that is a class)"
            )
        return _split_folders(root, splits, notes)
    if len(splits) > 1:
        raise _no_splits(root, splits, trains)
    for name in splits:
        if others:
            notes.append(f"{path / name}: is read as a class, because the folders next to it ({some(others)}) are")
    return ClassFolders(_classes(root), _images(root), None, [*_without_class(root), *notes])


def _split_folders(root: Folder, splits: dict[str, str], notes: list[str]) -> ClassFolders:
    """Returns the classes of a folder with a folder for each split."""
    names: dict[str, str] = {}
    for name, role in splits.items():
        if role in names:
            raise DataError(
                f"data.source {str(root.path)!r}: {names[role]!r} and {name!r} are both the {role} split; "
                "move one of them out, or join them"
            )
        names[role] = name
    folders = {role: _without_extra_level(root.filled[name], role) for role, name in names.items()}
    train, validation, test = (folders.get(role) for role in (TRAIN, VALIDATION, TEST))
    assert train is not None
    if test is not None:
        count = f"its {len(test.all_images()):,} images are not used"
        if validation is not None:
            notes.append(f"{test.path}: {count}: {validation.path.name} is the validation set")
        elif _contains_classes(test):
            validation = test
            notes.append(f"{test.path}: is used as the validation set, because there is no other one")
        else:
            notes.append(f"{test.path}: {count}: they are in no class folders")
    for name, folder in root.subfolders.items():
        if name not in root.filled:
            notes.append(f"{folder.path}: contains no images and is not used")
    classes = _classes(train)
    if validation is None:
        return ClassFolders(classes, _images(train), None, [*_without_class(root), *_without_class(train), *notes])
    if not _contains_classes(validation):
        raise DataError(
            f"{validation.path} has images, but no class folders; it needs those of {train.path}: {some(classes)}"
        )
    _check_same_classes(train, validation)
    notes = [note for folder in (root, train, validation) for note in _without_class(folder)] + notes
    return ClassFolders(classes, _images(train), _images(validation), notes)


def _without_extra_level(folder: Folder, role: str) -> Folder:
    """Returns the folder of a split, or the only folder in it if that has the name of the same split."""
    below = folder.filled
    name = next(iter(below)) if len(below) == 1 and not folder.images else ""
    return _without_extra_level(below[name], role) if name and split_role(name) == role else folder


def _contains_classes(folder: Folder) -> bool:
    return bool(folder.filled)


def _classes(root: Folder) -> list[str]:
    """Returns the names of the class folders.

    Raises:
        DataError: There is one only, one is empty, or they do not seem to be classes.
    """
    names = sorted(root.subfolders)
    if not names:
        raise DataError(f"{root.path} contains no folders; it needs one for each class, with its images")
    if {"images", "labels"} <= {name.lower() for name in names}:
        raise DataError(
            f"{root.path} contains 'images' and 'labels', as for object detection; a classifier needs a folder of "
            "images for each class: export the data for classification"
        )
    if len(root.filled) == 1:
        name, only = next(iter(root.filled.items()))
        below = _first_with_classes(only)
        remedy = f"if its folders are the classes, set data.source={below.path}" if below else "add another one"
        raise DataError(f"folder {root.path} has only one class ({name}); a classifier needs two or more: {remedy}")
    _check_filled(root)
    _check_different_names(root)
    _check_not_like_splits(root)
    _check_not_the_same_subfolders(root)
    return names


def _check_filled(root: Folder) -> None:
    empty = [name for name in sorted(root.subfolders) if name not in root.filled]
    if empty:
        raise DataError(
            f"class folder {root.path / empty[0]} contains no images ({', '.join(sorted(SUFFIXES))}); add some, or "
            "remove it"
        )


def _check_different_names(root: Folder) -> None:
    """Raises DataError if two classes have one name in two forms of Unicode, as after a copy from another system."""
    seen: dict[str, str] = {}
    for name in sorted(root.subfolders):
        if (other := seen.setdefault(unicodedata.normalize("NFC", name), name)) != name:
            raise DataError(
                f"{root.path}: two folders have the name {name} in two forms of Unicode ({other!a} and "
                f"{name!a}); join them, or rename one"
            )


def _first_with_classes(folder: Folder) -> Folder | None:
    """Returns the first of a folder and the only folders in it that contains two folders of images or more."""
    while len(folder.filled) == 1 and not folder.images and split_role(next(iter(folder.filled))) is None:
        folder = next(iter(folder.filled.values()))
    return folder if folder.filled and not folder.images else None


def _check_not_like_splits(root: Folder) -> None:
    """Raises DataError if folders of folders have names that contain those of splits: seg_train, seg_test."""
    likely: dict[str, str] = {}
    for name, folder in root.filled.items():
        roles = {_WORDS.get(word) for word in re.split(r"[\W\d_]+", name.casefold())} - {None}
        if len(roles) == 1 and folder.filled and not folder.images:
            likely[name] = str(roles.pop())
    if len(likely) > 1 and TRAIN in likely.values():
        raise DataError(
            f"{root.path}: {some(likely)} seem to be splits, not classes; rename them to train, valid and test and "
            "move other folders out, or set data.source to one of them; if they are classes, rename them too"
        )


def _check_not_the_same_subfolders(root: Folder) -> None:
    """Raises DataError if the folders are not classes, because all contain the same folders."""
    folders = list(root.subfolders.values())
    shared = set(folders[0].filled).intersection(*(folder.filled for folder in folders))
    every = set().union(*(folder.filled for folder in folders))
    if not shared or all(folder.images for folder in folders) or (len(shared) == 1 and shared != every):
        return
    names = some(sorted(root.subfolders))
    train = next((name for name in sorted(shared) if split_role(name) == TRAIN), None)
    if train is not None and not folders[0].filled[train].filled:
        remedy = f"the splits must contain the classes, as in {train}/{folders[0].path.name}"
    elif train is not None:
        remedy = f"set data.source to one of them, such as {folders[0].path}"
    else:
        remedy = (
            "if these are the classes, name the splits train and valid, or set data.source to one of them; if not, "
            "put the images directly into the class folders"
        )
    raise DataError(
        f"{root.path}: the folders {names} cannot be classes: all contain the same folders {some(sorted(shared))}; "
        f"{remedy}"
    )


def _check_same_classes(train: Folder, validation: Folder) -> None:
    ours, theirs = set(train.subfolders), set(validation.subfolders)
    if ours == theirs:
        _check_filled(validation)
        return
    by_form = [{unicodedata.normalize("NFC", name): name for name in names} for names in (ours, theirs)]
    pairs = [(name, by_form[1][form]) for form, name in sorted(by_form[0].items()) if form in by_form[1]]
    for name, other in pairs:
        if name != other:
            raise DataError(
                f"the splits have the class folder {name} in two forms of Unicode ({name!a} in {train.path}, "
                f"{other!a} in {validation.path}); rename one"
            )
    parts = [
        f"only {folder.path} has {some(sorted(names))}"
        for folder, names in ((train, ours - theirs), (validation, theirs - ours))
        if names
    ]
    raise DataError(f"the splits have not the same class folders: {', and '.join(parts)}; add them, or remove them")


def _no_splits(root: Folder, splits: dict[str, str], trains: Sequence[str]) -> DataError:
    """Returns the error for folders with names of splits that contain no class folders or no training images."""
    source = f"data.source {str(root.path)!r} contains {some(splits)}, which are names of splits, not of classes"
    if not trains:
        return DataError(f"{source}, but none of training images; name one train, or rename them if they are classes")
    return DataError(
        f"{source}, but {trains[0]!r} contains no class folders; put the images of each class into a folder "
        f"({trains[0]}/CLASS), or rename them if they are classes"
    )


def _images(root: Folder) -> list[list[Path]]:
    return [root.subfolders[name].all_images() for name in sorted(root.subfolders)]


def _without_class(root: Folder) -> list[str]:
    """Returns a note on images that are in no class folder."""
    if not root.images:
        return []
    names = some([path.name for path in root.images])
    count = f"{len(root.images):,} image" + ("s are" if len(root.images) > 1 else " is")
    return [f"{root.path}: {count} in no class folder and not used ({names})"]
