"""Keys that change when a run continues are named with what that means for the run."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import tiny

from icenet.core.data.datasets import dataset_for
from icenet.core.training.notices import changed_keys


def found(folder: Path, overrides: list[str], family: str = "transformer", same_data: bool = True) -> str:
    """Returns the notes of a run of the family that continues with overrides after step 3."""
    before = tiny(folder, family=family)
    after = before.with_overrides(*overrides)
    notes = changed_keys.notes(before, after, 3, dataset_for(after), same_data=same_data)
    assert not any("\n" in note for note in notes)
    return "\n".join(notes)


@pytest.mark.parametrize(
    ("override", "meaning"),
    [
        ("model.num_heads=1", "the weights compute something else"),
        ("model.activation=relu", "the weights compute something else"),
        ("seed=7", "the training data has another order"),
        ("training.batch_size=2", "the training data has another order"),
        ("data.seq_length=4", "the training data has another order"),
        ("data.packing=false", "the training data has another order"),
        ("data.validation_fraction=0.4", "the validation data contains text that the run was trained on"),
    ],
)
def test_a_changed_key_is_named_with_its_meaning(override: str, meaning: str, tmp_path: Path) -> None:
    key, _, value = override.partition("=")
    note = found(tmp_path, [override])
    plain = note.lower().replace("'", "")
    assert plain.startswith(f"{key} is {value} from step 4, and was ") and meaning in note and "\n" not in note


@pytest.mark.parametrize(
    "override",
    [
        "model.dropout=0.4",
        "training.max_steps=50",
        "training.gradient_accumulation=2",
        "data.validation_fraction=0.01",
        "data.validation_fraction=0",
        "backend=mlx",
    ],
)
def test_a_change_without_such_a_meaning_is_silent(override: str, tmp_path: Path) -> None:
    assert not found(tmp_path, [override])


def test_the_length_of_the_model_is_the_default_of_a_sequence(tmp_path: Path) -> None:
    before = tiny(tmp_path).with_overrides("data.seq_length=null")
    after = before.with_overrides(f"data.seq_length={before.model.max_seq_length}")
    assert not changed_keys.notes(before, after, 3, dataset_for(after), same_data=True)


def test_the_seed_of_images_decides_which_are_held_out(tmp_path: Path) -> None:
    text = found(tmp_path, ["seed=7"], "cnn")
    assert "some images will be read again" in text
    assert "the validation data contains images that the run was trained on" in text
    assert "validation data" not in found(tmp_path, ["seed=7", "data.validation_fraction=0"], "cnn")


def test_other_data_have_no_order_to_keep(tmp_path: Path) -> None:
    overrides = ["seed=7", "model.num_heads=1", "data.validation_fraction=0.4"]
    text = found(tmp_path, overrides, same_data=False)
    assert text.startswith("model.num_heads") and "data." not in text
