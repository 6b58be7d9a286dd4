"""The sides of `icenet bench train`: IceNet's engines, and training loops that users would write instead.

A `Session` runs one side in a process of its own (see `icenet.commands.isolated`).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from icenet.commands.bench.session import SessionBase, fastest
from icenet.core import backends
from icenet.core.config import Config
from icenet.core.data.datasets import Dataset
from icenet.core.data.images.dataset import ImageDataset
from icenet.core.data.images.files import ArrayImages, ImageSource
from icenet.core.data.text.packed import TextDataset
from icenet.core.engine import Batch
from icenet.core.errors import UsageError
from icenet.core.tokenizers import get_tokenizer
from icenet.core.training.prefetch import Prefetch

BATCHES = 4
"""Number of different batches, which are trained on in turn."""


@dataclass(frozen=True)
class Kind:
    """What a side is.

    Attributes:
        backend: The backend whose framework it runs on.
        is_peer: Whether it is a loop written by hand.
        compiled: Whether the model or the step is compiled. Such sides are measured on a GPU only: on a CPU,
            compiling takes up to minutes and gains little.
    """

    backend: str
    is_peer: bool = False
    compiled: bool = False


KINDS = {
    "icenet mlx": Kind("mlx"),
    "icenet mlx compiled": Kind("mlx", compiled=True),
    "icenet torch": Kind("torch"),
    "icenet torch compiled": Kind("torch", compiled=True),
    "torch loop": Kind("torch", is_peer=True),
    "torch loop compiled": Kind("torch", is_peer=True, compiled=True),
    "mlx.nn loop": Kind("mlx", is_peer=True),
    "mlx.nn loop compiled": Kind("mlx", is_peer=True, compiled=True),
}
"""The sides by name. For images, the loop of PyTorch trains torchvision's ResNet."""


class OwnLoop:
    """IceNet's side: an engine, used as the training loop uses it."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._step = 0

    def run(self, batches: list[Batch]) -> float:
        """Trains one step per batch. Each result is read while the device computes the next step."""
        before: Any = None
        for batch in batches:
            handle = self._engine.train_step(batch, self._step, 1e-4)
            self._step += 1
            if before is not None:
                self._engine.read(before)
            before = handle
        return float(self._engine.read(before).loss)

    def data_wait(self, data: Dataset, steps: int) -> float:
        """Returns the share of the time of steps in which they wait for the batches of a data set, as a run reads it.

        The first step, whose batch is not read ahead, does not count.
        """
        read, rows, scale = data.train_batch, self._engine.config.training.batch_size, self._engine.pixel_scale
        if isinstance(data, ImageDataset):
            read, self._engine.pixel_scale = data.train_pixels, data.pixel_scale
        waited = 0.0
        try:
            with Prefetch(lambda step: read(step, rows), steps + 1) as batches:
                before = self._engine.train_step(batches.batch(0), self._step, 1e-4)
                begin = time.perf_counter()
                for step in range(1, steps + 1):
                    batch = batches.batch(step)
                    waited += batches.waited
                    handle = self._engine.train_step(batch, self._step + step, 1e-4)
                    self._engine.read(before)
                    before = handle
                self._engine.read(before)
        finally:
            self._engine.pixel_scale = scale
        self._step += steps + 1
        return waited / (time.perf_counter() - begin)


class Session(SessionBase):
    """One side.

    Args:
        name: One of `KINDS`.
        device: auto, cpu, gpu, ...
    """

    def __init__(self, name: str, device: str) -> None:
        self._kind = kind = KINDS[name]
        backends.resolve(kind.backend)
        if not kind.is_peer:
            backends.module(kind.backend, "engine.engine").Engine.prepare_process()
        super().__init__(kind.backend, device)
        if kind.compiled and self.device == "cpu":
            raise UsageError("compiled sides are measured on a GPU")
        self._loop: Any = None
        self._config: Config
        self._batches: list[Batch] = []
        self._next = 0

    def rate(self, precision: str) -> float:
        """Returns the operations per second of products of matrices, the best of several sizes."""
        sizes = [256 << shift for shift in range(6)]
        products = ((2.0 * n**3, self._tools.matrix_product(n, precision, self._device)) for n in sizes)
        return fastest(products)

    def prepare(self, config: Mapping[str, Any]) -> float:
        """Makes the model of a configuration. Returns the seconds of its first step, which compiles code."""
        self.free()
        self._memory.begin()
        chosen = Config.from_dict(config)
        if self._kind.is_peer:
            module = backends.module(self._kind.backend, "tools.loops")
            self._loop = module.Loop(chosen, self._device, self._kind.compiled)
        else:
            if self._kind.compiled:
                chosen = chosen.with_overrides("model.compile_model=true")
            self._loop = OwnLoop(backends.engine(chosen, self._kind.backend, self._device_name))
        self._config, self._batches = chosen, make_batches(chosen)
        return self._timed(1)

    def measure(self, steps: int) -> dict[str, Any]:
        """Returns the seconds and the processor time of a step, means of some steps, and the peak of the memory."""
        begin = time.process_time()
        seconds = self._timed(steps)
        processor = (time.process_time() - begin) / steps
        return {"seconds": seconds, "processor_s": processor, "peak_bytes": int(self._memory.growth())}

    def data_wait(self, steps: int) -> float:
        """Returns the share of steps in which they wait for data in memory, read and augmented as in a run."""
        data = make_dataset(self._config)
        if self.device == "gpu":
            self._loop.data_wait(data, 2)  # bytes of images are another step to compile
        return float(self._loop.data_wait(data, steps))

    def free(self) -> None:
        """Frees the model."""
        self._loop = None
        gc.collect()

    def _timed(self, steps: int) -> float:
        batches = [self._batches[(self._next + index) % BATCHES] for index in range(steps)]
        self._next += steps
        self._tools.synchronize(self._device)
        begin = time.perf_counter()
        self._loop.run(batches)
        self._tools.synchronize(self._device)
        return (time.perf_counter() - begin) / steps


def make_batches(config: Config) -> list[Batch]:
    """Returns random batches: token ids, or images in fp32 and their labels."""
    draws = np.random.default_rng(0)
    data: Any = config.data
    model: Any = config.model
    rows, classes = config.training.batch_size, model.vocab_size
    if model.input_kind == "images":
        shape = (rows, data.image_size, data.image_size, model.image_channels)
        return [
            {
                "inputs": draws.standard_normal(shape, np.float32),
                "labels": draws.integers(0, classes, rows).astype(np.int32),
            }
            for _ in range(BATCHES)
        ]
    ids = [draws.integers(0, classes, (rows, data.seq_length + 1)).astype(np.int32) for _ in range(BATCHES)]
    return [{"inputs": tokens[:, :-1].copy(), "labels": tokens[:, 1:].copy()} for tokens in ids]


def make_dataset(config: Config) -> Dataset:
    """Returns a data set of random tokens or images in memory, of a few batches."""
    draws = np.random.default_rng(0)
    data: Any = config.data
    model: Any = config.model
    count = BATCHES * config.training.batch_size
    if model.input_kind == "images":
        pixels = draws.integers(0, 256, (count, data.image_size, data.image_size, model.image_channels), np.uint8)
        labels = draws.integers(0, model.vocab_size, count).astype(np.int32)
        names = [str(index) for index in range(model.vocab_size)]
        channels = [0.5] * model.image_channels
        padding = min(data.crop_padding, data.image_size - 1)
        changes = {"mean": channels, "std": channels, "validation_fraction": 0.0, "crop_padding": padding}
        settings = data.model_copy(update=changes)
        return ImageDataset(ImageSource(ArrayImages(pixels), labels, names, "random images", ""), settings, 0)
    tokens = draws.integers(0, model.vocab_size, (count + 1) * data.seq_length + 1).astype(np.int32)
    return TextDataset(tokens, get_tokenizer("bytes"), seq_length=data.seq_length, seed=0)
