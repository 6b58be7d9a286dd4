"""A published recipe reaches its published result: on each backend, and on a run that changes backend three times."""

from __future__ import annotations

from pathlib import Path

import pytest

from icenet.core.config import Config
from icenet.core.training.trainer import Trainer

pytest.importorskip("torch")
pytest.importorskip("mlx")

PUBLISHED = 1.88
"""Validation loss of nanoGPT's README for this recipe, on its own text; ours reads the standard library's source."""


def test_the_recipe_is_the_published_one() -> None:
    config = Config.from_yaml("nanogpt-char")
    model, training = config.model, config.training
    assert (model.num_layers, model.num_heads, model.hidden_size, config.data.seq_length) == (4, 4, 128, 64)
    assert (training.batch_size, training.max_steps, training.warmup_steps) == (12, 2000, 100)
    assert (training.optimizer, training.schedule) == ("adamw", "cosine")
    assert (training.learning_rate, training.min_learning_rate, training.beta2) == (1e-3, 1e-4, 0.99)
    assert (training.weight_decay, training.max_grad_norm, model.dropout) == (0.1, 1.0, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("backends", [("mlx",) * 4, ("torch",) * 4, ("torch", "mlx", "torch", "mlx")])
def test_nanogpt_on_characters(tmp_path: Path, backends: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icenet.core.report.plots.plot_metrics", lambda *_, **__: None)
    run = tmp_path / "run"
    result = Trainer.start(Config.from_yaml("nanogpt-char"), run, backend=backends[0], quiet=True).fit(500)
    for step, backend in zip((1000, 1500, 2000), backends[1:], strict=True):
        result = Trainer.resume(run, backend=backend, quiet=True).fit(step)
    print(f"{'-'.join(backends)}: validation loss {result.validation_loss:.4f}")
    assert result.validation_loss is not None and result.validation_loss <= PUBLISHED
