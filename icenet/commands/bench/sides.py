"""The sides of a measurement of inference: IceNet on each backend, and what users would run instead.

A `Session` runs one side in a process of its own (see `icenet.commands.isolated`).
"""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import icenet
from icenet.commands.bench.session import SessionBase, fastest
from icenet.commands.bench.target import RandomWeights
from icenet.core import backends
from icenet.core.config import Config, ModelConfig, TransformerConfig
from icenet.core.dtypes import FLOAT_DTYPES
from icenet.core.errors import IceNetError, UsageError
from icenet.core.generation.request import make_request
from icenet.core.generation.speculative import make_decoder
from icenet.core.generation.streaming import stream_tokens
from icenet.core.models.inference import build_for_inference
from icenet.core.report import resident_memory


@dataclass(frozen=True)
class Kind:
    """What a side is.

    Attributes:
        backend: The backend whose framework it runs on.
        rows: The rows that it can measure.
        package: The package that it needs; None for IceNet.
        options: Further arguments of the peer.
        cuda_only: Whether it is measured on CUDA only.
    """

    backend: str
    rows: tuple[str, ...]
    package: str | None = None
    options: tuple[Any, ...] = ()
    cuda_only: bool = False


_GENERATION = ("decode", "prefill", "batch", "quantized", "speculative")
USES_MODEL = (*_GENERATION, "load")
"""The rows of which the memory and the first call count."""
_OWN = (*USES_MODEL, "start", "convert")
_PEERS = ("decode", "prefill", "batch", "load", "start")
KINDS: dict[str, Kind] = {
    "icenet mlx": Kind("mlx", _OWN),
    "icenet torch": Kind("torch", _OWN),
    "mlx-lm": Kind("mlx", (*_PEERS, "quantized"), "mlx_lm"),
    "transformers": Kind("torch", _PEERS, "transformers"),
    "transformers compiled": Kind("torch", ("decode",), "transformers", ("static",), cuda_only=True),
}
"""The sides by name. A compiled peer has a cache of fixed size, and `generate` compiles its model on CUDA."""

_ROBUST = {"temperature": 100.0, "top_k": 0}
"""The settings of text that does not depend on rounding, so that proposals of a draft can be set before. In bf16 the
most likely token of random weights can be another one if several rows are read than if one is."""
_FIRST_TOKEN = """
import sys, icenet
model = icenet.load(sys.argv[1], {backend!r}, sys.argv[2], dtype=sys.argv[3])
model.generate([[1, 2, 3]], max_new_tokens=1, temperature=0.0, ignore_eos=True)
"""
_READ = """
import sys
from pathlib import Path
for file in Path(sys.argv[1]).iterdir():
    if file.suffix in (".safetensors", ".gguf"):
        file.read_bytes()
"""


def reason_missing(name: str) -> str:
    """Returns why a side cannot run here; an empty text if its packages are installed."""
    kind = KINDS[name]
    for package in (kind.backend, kind.package):
        if package is not None and importlib.util.find_spec(package) is None:
            remedy = f" (pip install {package.replace('_', '-')})" if package == kind.package else ""
            return f"{package} is not installed{remedy}"
    return ""


class OwnModel:
    """IceNet's side: a model that `icenet.load` reads, continued by its `generate`.

    Args:
        backend: mlx or torch.
        folder: What `icenet.load` accepts.
        device: The name of the device.
        dtype: fp32, bf16 or fp16; None keeps the dtype of a quantized folder.
        sample: Whether to sample tokens, instead of taking the most likely ones.
    """

    def __init__(self, backend: str, folder: str, device: str, dtype: str | None, sample: bool) -> None:
        peers = backends.module(backend, "tools.peers")
        self._model = icenet.load(folder, backend, device, dtype=dtype)
        self._device, self._dtype = device, dtype
        self._draft: Any = None
        self._texts: dict[tuple[bytes, int], list[int]] = {}
        self._options: dict[str, Any] = {
            **({"temperature": peers.TEMPERATURE, "top_k": peers.TOP_K} if sample else {"temperature": 0.0}),
            "repetition_penalty": 1.0,
            "stop": [],
            "ignore_eos": True,
            "seed": 0,
        }

    def generate(self, prompts: Any, new_tokens: int, **options: Any) -> Any:
        """Returns the new tokens of each row of prompts `[B, T]`."""
        out = self._model.generate(prompts, max_new_tokens=new_tokens, **{**self._options, **options})
        return out[:, -new_tokens:].tolist()

    def prefill(self, prompts: Any) -> Any:
        """Reads prompts `[B, T]`, and chooses one token."""
        return self.generate(prompts, 1)

    def text(self, prompts: Any, new_tokens: int) -> list[int]:
        """Returns the new tokens of one prompt, `[1, T]`, which are generated once."""
        key = prompts.tobytes(), new_tokens
        if key not in self._texts:
            self._texts[key] = self.generate(prompts, new_tokens, **_ROBUST)[0]
        return self._texts[key]

    def speculate(self, prompts: Any, new_tokens: int, agreement: float) -> tuple[Any, float]:
        """Returns the new tokens of one prompt, `[1, T]`, and the part of the compared proposals that were accepted.

        The draft is a model of `draft_config` with random weights, whose computation takes its time. Its proposals
        are replaced: by the token of the text with the given probability, otherwise by another one.
        """
        if self._draft is None:
            config = draft_config(self._model.config)
            shapes = backends.meta_model(config).weight_shapes()
            weights: Any = RandomWeights(shapes, self._dtype or "fp32")
            backend = self._model.backend
            self._draft = build_for_inference(config, backend, self._device, weights=weights, dtype=self._dtype)
        text, length = self.text(prompts, new_tokens), prompts.shape[1]
        options = {**self._options, **_ROBUST, "max_new_tokens": new_tokens}
        request = make_request(self._model, prompts, None, 0, options)
        decoder = make_decoder(self._model, request, draft=self._draft)
        draft, vocab_size = decoder.draft, self._model.config.vocab_size
        agrees = np.random.default_rng(0).random(new_tokens) < agreement
        proposals = [token if ok else (token + 1) % vocab_size for token, ok in zip(text, agrees, strict=True)]
        arrays = [draft.to_device(np.array([token], np.uint32)) for token in proposals]
        decode = draft.decode

        def replaced(token: Any) -> Any:
            choice = decode(token)
            place = draft.cache.length - length
            return choice._replace(token=arrays[place]) if place < new_tokens else choice

        draft.decode = replaced
        found = [int(row[0]) for row in stream_tokens(decoder, request)]
        return [found], decoder.report.agreement

    def continue_all(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Any:
        """The same as `generate` for prompts of unequal lengths."""
        return self.generate([list(prompt) for prompt in prompts], new_tokens)


def draft_config(model: ModelConfig) -> Config:
    """Returns the configuration of a draft: a quarter of the layers of a transformer, half as wide.

    Raises:
        UsageError: The model is no transformer.
    """
    if not isinstance(model, TransformerConfig):
        raise UsageError(f"speculative decoding needs a transformer, and this is a model of type {model.type}")
    heads, layers = max(model.num_heads // 2, 1), max(model.num_layers // 4, 1)
    groups = model.num_heads // (model.num_kv_heads or model.num_heads)
    changes = {
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": heads // groups if heads % groups == 0 else heads,
        "hidden_size": model.hidden_size // model.num_heads * heads,
        "feed_forward_size": None if model.feed_forward_size is None else max(model.feed_forward_size // 2, 1),
        "layer_types": None if model.layer_types is None else model.layer_types[:layers],
    }
    return Config.from_dict({"model": {**model.model_dump(mode="python"), **changes}})


class Session(SessionBase):
    """One side.

    Args:
        name: One of `KINDS`.
        device: auto, cpu, gpu, ...
    """

    def __init__(self, name: str, device: str) -> None:
        self._kind = kind = KINDS[name]
        super().__init__(kind.backend, device)
        if kind.cuda_only and "cuda" not in str(self._device):
            raise UsageError("transformers compiles on CUDA only")
        self._sides: dict[str, Any] = {}
        self._arguments: tuple[Any, ...] = ()
        self._loads = 0
        self._peak: int | None = None

    def rates(self, dtype: str) -> dict[str, float]:
        """Returns the rates of this framework: bytes per second of a copy, operations per second of products.

        Args:
            dtype: The dtype of the products.
        """
        largest = 1 << (30 if self.device == "gpu" else 28)
        copies = [(2.0 * size, self._tools.memory_copy(size, self._device)) for size in _doubled(1 << 24, largest)]
        products = (
            (2.0 * size**3, self._tools.matrix_product(size, dtype, self._device)) for size in _doubled(256, 8192)
        )
        return {"bytes": fastest(copies), "operations": fastest(products)}

    def load(self, row: str, folder: str, dtype: str, sample: bool, variant: str = "") -> str:
        """Loads the model for a row that needs it. Returns its folder.

        The models before are freed, unless they are other variants of the same measurement.
        """
        self._arguments = (folder, dtype, sample)
        if not variant:
            self._free()
            self._memory.begin()
        self._loads += 1
        self._peak = None
        if row == "speculative" and variant:
            self._sides[variant] = self._sides[""]
        elif row in _GENERATION:
            self._load(variant)
        return folder

    def _free(self) -> None:
        self._sides.clear()
        gc.collect()

    def _load(self, variant: str = "") -> None:
        folder, dtype, sample = self._arguments
        if self._kind.package is None:
            self._sides[variant] = OwnModel(self._kind.backend, folder, self._device_name, dtype, sample)
        else:
            peer = backends.module(self._kind.backend, "tools.peers").Peer
            self._sides[variant] = peer(folder, self._device, dtype, sample, *self._kind.options)
        self._tools.synchronize(self._device)

    def measure(self, row: str, case: Mapping[str, Any], variant: str = "") -> dict[str, Any]:
        """Returns the seconds of each part of a measurement (`seconds`), and `tokens` of the first prompt.

        With a draft, `agreement` is the part of the compared proposals that were accepted.

        Args:
            row: One of the kind's rows.
            case: For `make_prompts`, and `new_tokens`, `form` (the result of a conversion), `program` (help, or
                first token), `agreement` (that of a draft).
            variant: The variant that was loaded.
        """
        others = {"load": self._measure_load, "convert": self._measure_convert, "start": self._measure_start}
        if row in others:
            return {"seconds": others[row](case), "tokens": []}
        prompts = make_prompts(case)
        side, new_tokens = self._sides[variant], case["new_tokens"]
        if row == "speculative" and variant:
            return self._measure_draft(side, prompts, new_tokens, case["agreement"])
        if row == "speculative":  # as with the draft
            robust = partial(side.generate, prompts, **_ROBUST)
            done = [self._timed(partial(robust, count)) for count in (1, 1 + new_tokens)]
            return {"seconds": [seconds for seconds, _ in done], "tokens": done[-1][1][0]}
        row = "decode" if row == "quantized" else row
        calls: dict[str, list[Callable[[], Any]]] = {
            "decode": [lambda: side.generate(prompts, 1), lambda: side.generate(prompts, 1 + new_tokens)],
            "prefill": [lambda: side.prefill(prompts)],
            "batch": [lambda: side.continue_all(prompts, new_tokens)],
        }
        done = [self._timed(call) for call in calls[row]]
        return {"seconds": [seconds for seconds, _ in done], "tokens": done[-1][1][0]}

    def _measure_draft(self, side: OwnModel, prompts: Any, new_tokens: int, agreement: float) -> dict[str, Any]:
        """Returns the seconds of generating one token and all of them with a draft."""
        done = []
        for count in (1, 1 + new_tokens):
            side.text(prompts, count)  # that its proposals are made of
            done.append(self._timed(partial(side.speculate, prompts, count, agreement)))
        tokens, accepted = done[-1][1]
        return {"seconds": [seconds for seconds, _ in done], "tokens": tokens[0], "agreement": accepted}

    def _measure_load(self, case: Mapping[str, Any]) -> list[float]:
        """Returns the seconds of loading the weights, and of reading the file."""
        self._free()
        seconds = self._timed(self._load)[0]
        if self._peak is None:  # of the first load, before this process reads the file, which takes memory, too
            self._peak = int(self._memory.growth())
        return [seconds, _read_files(self._arguments[0])]

    def _measure_convert(self, case: Mapping[str, Any]) -> list[float]:
        """Returns the seconds of a conversion, and of copying the files of weights."""
        folder = self._arguments[0]
        with tempfile.TemporaryDirectory(prefix="icenet-bench-") as work:
            seconds = self._timed(lambda: icenet.convert(folder, Path(work) / case["form"], case["form"]))[0]
        with tempfile.TemporaryDirectory(prefix="icenet-bench-") as work:
            files = _weight_files(folder)
            copy = self._timed(lambda: [shutil.copyfile(file, Path(work) / file.name) for file in files])[0]
        return [seconds, copy]

    def _measure_start(self, case: Mapping[str, Any]) -> list[float]:
        """Returns the seconds of a whole process, and of one that does only what it cannot avoid."""
        folder, dtype, _ = self._arguments
        if case["program"] == "help":
            return [_time_process("-m", "icenet", "--help"), _time_process("-c", "pass")]
        peers = backends.module(self._kind.backend, "tools.peers")
        own = _FIRST_TOKEN.format(backend=self._kind.backend)
        program = own if self._kind.package is None else peers.FIRST_TOKEN
        arguments = (folder, self.device, dtype, FLOAT_DTYPES[dtype])
        return [_time_process("-c", program, *arguments), _time_process("-c", peers.FRAMEWORK + _READ, *arguments)]

    def _timed(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Returns the seconds of a call and its result. The device is idle before and after."""
        self._tools.synchronize(self._device)
        begin = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - begin
        self._tools.synchronize(self._device)
        return seconds, result

    def peak(self) -> int | None:
        """Returns the peak of the memory since the model was loaded, with its weights, in bytes; None if unknown.

        Resident memory does not grow where memory of the model before is used again, so it is known for the first.
        """
        is_known = self._memory.source != resident_memory.SOURCE or self._loads == 1
        if self._peak is not None and is_known:
            return self._peak
        return int(self._memory.growth()) if is_known else None


def make_prompts(case: Mapping[str, Any]) -> Any:
    """Returns the random prompts of a case: int32 `[B, T]`, or a list of lists if their lengths differ.

    Args:
        case: `lengths`, the number of tokens of each prompt, and `vocab_size`.
    """
    lengths = case["lengths"]
    draws = np.random.default_rng(0)
    if len(set(lengths)) == 1:
        return draws.integers(0, case["vocab_size"], (len(lengths), lengths[0])).astype(np.int32)
    return [draws.integers(0, case["vocab_size"], length).tolist() for length in lengths]


def _doubled(first: int, last: int) -> list[int]:
    return [first << shift for shift in range((last // first).bit_length())]


def _weight_files(folder: str) -> list[Path]:
    return [file for file in Path(folder).iterdir() if file.suffix in (".safetensors", ".gguf")]


def _read_files(folder: str) -> float:
    """Returns the seconds of reading the weights of a folder, which are in the cache of the system."""
    files = _weight_files(folder)
    begin = time.perf_counter()
    for file in files:
        file.read_bytes()
    return time.perf_counter() - begin


def _time_process(*arguments: str) -> float:
    """Returns the seconds of a Python process.

    Raises:
        IceNetError: It failed.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    with tempfile.TemporaryDirectory() as empty:  # Python imports from the current folder
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=empty, capture_output=True, check=False
        )
        seconds = time.perf_counter() - begin
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise IceNetError(lines[-1] if lines else f"the process exited with code {done.returncode}")
    return seconds
