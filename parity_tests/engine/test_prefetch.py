"""Batches are read ahead in a thread, and images go to the device as bytes, with the same numbers."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import both_backends, plain, tiny

from icenet.core import backends
from icenet.core.data.datasets import dataset_for
from icenet.core.data.images.dataset import ImageDataset
from icenet.core.training import prefetch
from icenet.core.training.prefetch import Prefetch
from icenet.core.training.trainer import Trainer

torch: Any = pytest.importorskip("torch")
pytest.importorskip("mlx")


def batch(step: int) -> dict[str, np.ndarray]:
    return {"inputs": np.full(1, step)}


def test_each_step_has_its_batch() -> None:
    """Also after a step back and after a gap."""
    with Prefetch(batch, 6) as data:
        assert [int(data.batch(step)["inputs"][0]) for step in (0, 1, 2, 1, 2, 4, 5)] == [0, 1, 2, 1, 2, 4, 5]


def test_the_next_batch_is_read_while_a_step_is_computed() -> None:
    begun: list[tuple[int, str]] = []
    is_read = threading.Event()

    def read(step: int) -> dict[str, np.ndarray]:
        begun.append((step, threading.current_thread().name))
        if step == 1:
            is_read.set()
        return batch(step)

    with Prefetch(read, 3) as data:
        data.batch(0)
        assert is_read.wait(5)  # without a request
        data.batch(1)
        data.batch(2)
    assert [step for step, _ in begun] == [0, 1, 2]  # none after the last
    assert begun[0][1] == "MainThread" and begun[1][1].startswith("icenet-data")


@pytest.mark.parametrize("in_thread", [True, False])
def test_the_wait_for_a_batch(in_thread: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that was read ahead costs no wait; the first one and those of a user cost the time to read them.

    Time passes in `read` only: a second of the main thread's clock, none where it reads in the other thread.
    """
    now = [0.0]
    are_read = [threading.Event() for _ in range(2)]

    def read(step: int) -> dict[str, np.ndarray]:
        if threading.current_thread() is threading.main_thread():
            now[0] += 1
        are_read[step].set()
        return batch(step)

    monkeypatch.setattr(prefetch.time, "perf_counter", lambda: now[0])
    with Prefetch(read, 2, in_thread) as data:
        data.batch(0)
        assert data.waited == 1
        if in_thread:
            assert are_read[1].wait(5)  # without a request
        data.batch(1)
        assert data.waited == (0 if in_thread else 1)


def test_an_error_is_raised_where_its_batch_is_requested() -> None:
    def read(step: int) -> dict[str, np.ndarray]:
        if step == 2:
            raise ValueError("damaged")
        return batch(step)

    with Prefetch(read, 5) as data:
        data.batch(0)
        data.batch(1)
        with pytest.raises(ValueError, match="damaged"):
            data.batch(2)


def test_a_class_of_the_user_is_read_in_the_main_thread() -> None:
    names: list[str] = []

    def read(step: int) -> dict[str, np.ndarray]:
        names.append(threading.current_thread().name)
        return batch(step)

    with Prefetch(read, 5, in_thread=False) as data:
        for step in range(3):
            data.batch(step)
    assert names == ["MainThread"] * 3


@both_backends
def test_bytes_become_the_values_of_the_host(backend: str, tmp_path: Path) -> None:
    """The normalized images on the device have the bits of those in a batch of values, with augmentation."""
    config = tiny(tmp_path, "data.horizontal_flip=true", "data.crop_padding=1", family="cnn")
    dataset = dataset_for(config)
    assert isinstance(dataset, ImageDataset)
    engine = backends.engine(config, backend, "cpu")
    expected = engine.to_device(dataset.train_batch(3, 8))
    engine.pixel_scale = dataset.pixel_scale
    pixels = dataset.train_pixels(3, 8)
    assert pixels["inputs"].dtype == np.uint8
    found = engine.to_device(pixels)
    for name in ("inputs", "labels"):
        assert np.array_equal(plain(found[name]), plain(expected[name])), name


@pytest.mark.usefixtures("no_plots")
def test_a_run_sends_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(tmp_path, "training.max_steps=3", family="cnn")
    trainer = Trainer.start(config, tmp_path / "run", backend="torch", device="cpu")
    sent: list[Any] = []
    own = trainer.engine.train_step

    def train_step(batch: Any, *arguments: Any) -> Any:
        sent.append(batch["inputs"].dtype)
        return own(batch, *arguments)

    monkeypatch.setattr(trainer.engine, "train_step", train_step)
    trainer.fit()
    assert sent == [np.uint8] * 3
