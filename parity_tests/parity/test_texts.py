"""The comparison of generated texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import is_one_line

import icenet
from icenet.core.config import Config
from icenet.parity.configuration.texts import TIE, TextComparison, compare_texts

PROMPT = [1, 2]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = {"type": "gru", "hidden_size": 4, "num_layers": 1, "vocab_size": 7}
    built = icenet.build(Config.from_dict({"seed": 3, "device": "cpu", "model": model}), "torch")
    icenet.save(built, tmp_path / "model")
    return tmp_path / "model"


def compare(path: Path, **options: Any) -> TextComparison:
    return compare_texts(path, PROMPT, device="cpu", temperature=0.0, max_new_tokens=4, **options)


def test_equal_texts(saved: Path) -> None:
    found = compare(saved)
    assert found.equal and found.differs_at is None and found.verdict == "the same 4 tokens"
    assert found.tokens["mlx"] == found.tokens["torch"] and len(found.tokens["mlx"]) == 4
    ended = compare(saved, stop=[found.tokens["mlx"][0]])
    assert ended.equal and ended.tokens == {"mlx": [], "torch": []}


def test_a_text_is_not_equal_to_its_beginning(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch chooses a stop token after the first token; MLX goes on."""
    first = compare(saved).tokens["mlx"]
    stop = next(token for token in range(7) if token not in first)
    load = icenet.load

    def altered(path: Path, name: str, device: str) -> Any:
        model = load(path, name, device)
        if name == "torch":
            forward = model.project

            def project(states: Any) -> Any:
                logits = forward(states)
                logits[..., stop] = logits.amax(dim=-1) + 1
                return logits

            monkeypatch.setattr(model, "project", project)
        return model

    monkeypatch.setattr(icenet, "load", altered)
    found = compare(saved, stop=[stop])
    assert found.tokens == {"mlx": first, "torch": []}
    assert not found.equal and not found.equal_but_for_ties and found.differs_at == 0
    assert found.margin is not None and found.margin > TIE
    assert is_one_line(found.verdict, "token 0", "not a tie")


def test_a_difference_within_rounding_is_a_tie() -> None:
    tokens = {"mlx": [1, 2], "torch": [1, 3]}
    assert TextComparison("", tokens, 1, float(np.float32(2.0**-20))).equal_but_for_ties
    assert not TextComparison("", tokens, 1, 2.0**-10).equal_but_for_ties
    assert not TextComparison("", tokens, 1, None).equal_but_for_ties
