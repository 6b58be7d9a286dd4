"""`icenet eval`: the perplexity of a text, against a loop over the model's logits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import is_one_line, native, plain, tiny

import icenet
from icenet.cli.main import main
from icenet.core.errors import IceNetError
from icenet.core.training.perplexity import evaluate_text

pytest.importorskip("torch")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ICENET_CACHE", str(tmp_path / "cache"))
    icenet.save(icenet.build(tiny(tmp_path, "model.max_seq_length=16"), "torch"), tmp_path / "model")
    (tmp_path / "book.txt").write_text("a text of some bytes, in windows of sixteen.")
    return tmp_path


def expected(model: Any, tokens: list[int], length: int, stride: int, prefix: list[int]) -> list[float]:
    """Returns the loss of each token, one at a time, from the definition."""
    losses: dict[int, float] = {}
    for start in range(0, len(tokens), stride):
        window = tokens[start : start + length - len(prefix) + 1]
        for place, token in enumerate(window):
            context = [*prefix, *window[:place]]
            if context and start + place not in losses:
                logits = plain(model(native(model.backend, np.array([context])))).astype(np.float64)[0, -1]
                losses[start + place] = float(
                    np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[token]
                )
    return [losses[index] for index in sorted(losses)]


@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize(("length", "stride"), [(16, None), (16, 5), (7, 7), (9, 1)])
@pytest.mark.parametrize("prefix", [[], [256]])
def test_each_token_is_predicted_once(
    folder: Path, backend: str, length: int, stride: int | None, prefix: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(backend)
    model = icenet.load(folder / "model", backend, "cpu")
    if prefix:
        encode = model.tokenizer.encode
        monkeypatch.setattr(
            type(model.tokenizer), "encode_prompt", lambda self, text: [256, *encode(text)], raising=False
        )
    if stride is not None and stride > length - len(prefix):
        stride = length - len(prefix)
    found = evaluate_text(model, str(folder / "book.txt"), length=length, stride=stride, batch_size=3)
    tokens = list((folder / "book.txt").read_bytes())
    losses = expected(model, tokens, length, stride or length - len(prefix), prefix)
    assert found.tokens == len(losses) == len(tokens) - (not prefix)
    np.testing.assert_allclose(found.loss, np.mean(losses), rtol=1e-5)
    assert found.perplexity == math.exp(found.loss)


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both backends print the same number; a part of the text, and JSON. The progress counts tokens."""
    pytest.importorskip("mlx")
    for name in ("_DELAY_SECONDS", "_LINE_SECONDS"):
        monkeypatch.setattr(f"icenet.core.report.bar.{name}", 0)
    found = {}
    for backend in ("mlx", "torch"):
        arguments = ["eval", str(folder / "model"), "--text", str(folder / "book.txt"), "--backend", backend]
        assert main([*arguments, "--json"]) == 0
        found[backend] = json.loads(capsys.readouterr().out)
    assert found["mlx"]["tokens"] == found["torch"]["tokens"] == 43
    np.testing.assert_allclose(found["mlx"]["loss"], found["torch"]["loss"], rtol=1e-6)
    for options in ([], ["--quiet"]):
        assert main([*arguments, "--max-tokens", "5", *options]) == 0
        out, err = capsys.readouterr()
        assert "4 tokens of file" in out.replace("\n", " ") and ("4 tokens of 4 tokens" in err) == (not options)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"length": 17}, ["length 17", "16"]),
        ({"length": 8, "stride": 9}, ["stride 9", "8"]),
        ({"source": "missing.txt"}, ["missing.txt"]),
        ({"max_tokens": 1}, ["too few"]),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(folder: Path, options: dict[str, Any], names: list[str]) -> None:
    model = icenet.load(folder / "model", "torch", "cpu")
    with pytest.raises(IceNetError) as caught:
        evaluate_text(model, **{"source": str(folder / "book.txt"), **options})
    assert is_one_line(caught.value, *names)
    encoder = icenet.build(tiny(folder, "model.causal=false"), "torch")
    with pytest.raises(IceNetError, match=r"model\.causal"):
        evaluate_text(encoder, str(folder / "book.txt"))
