"""The model of a measurement of inference, as a folder that every side can read."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import icenet
from icenet.commands.bench import limits
from icenet.core import backends, rng
from icenet.core.config import Config, presets, yaml_file
from icenet.core.dtypes import FLOAT_DTYPES
from icenet.core.errors import CheckpointError, ConfigError, IceNetError, UsageError
from icenet.core.families import folder
from icenet.core.runs import saved_model
from icenet.core.runs.open_model import open_target
from icenet.core.weights.safetensors import Spec

_LLAMA = {
    "positions": "rotary",
    "rotary_theta": 500000.0,
    "norm": "rms_norm",
    "activation": "silu",
    "feed_forward": "gated",
    "attention_bias": False,
    "feed_forward_bias": False,
    "embedding_scale": 1.0,
    "max_seq_length": 2048,
}
_GPT2 = {
    "positions": "learned",
    "activation": "gelu_tanh",
    "embedding_scale": 1.0,
    "tie_embeddings": True,
    "vocab_size": 50257,
    "max_seq_length": 1024,
}


def _sizes(base: Mapping[str, Any], width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {**base, "hidden_size": width, "num_layers": layers, "num_heads": heads, **more}


SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": _sizes(_GPT2, 768, 12, 12),
    "gpt2-large": _sizes(_GPT2, 1280, 36, 20),
    "gpt2-xl": _sizes(_GPT2, 1600, 48, 25),
    "smollm2-135m": _sizes(
        _LLAMA, 576, 30, 9, num_kv_heads=3, feed_forward_size=1536, vocab_size=49152, tie_embeddings=True
    ),
    "llama-1b": _sizes(
        _LLAMA, 2048, 16, 32, num_kv_heads=8, feed_forward_size=8192, vocab_size=128256, tie_embeddings=True
    ),
    # between Llama 3.2's 1B and 3B, with the vocabulary of Llama 2
    "llama-1.5b": _sizes(
        _LLAMA, 2048, 24, 32, num_kv_heads=8, feed_forward_size=8192, vocab_size=32000, tie_embeddings=True
    ),
    "llama-8b": _sizes(_LLAMA, 4096, 32, 32, num_kv_heads=8, feed_forward_size=14336, vocab_size=128256),
}
"""The model section of published sizes (124M, 774M, 1.6B, 135M, 1.2B, 1.5B, 8B), for weights that are random."""


class RandomWeights(Mapping[str, np.ndarray]):
    """Random weights of a model, drawn when they are looked up: matrices from a normal distribution, norms of 1.

    They repeat one block of values, because drawing billions takes longer than the measurement.

    Args:
        shapes: The shape of each array by path.
        dtype: fp32, bf16 or fp16.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
        self._shapes = shapes
        self._dtype = np.dtype(FLOAT_DTYPES[dtype])  # type: ignore[index]
        self._block: np.ndarray | None = None

    def spec(self, path: str) -> Spec:
        """Returns the dtype and the shape of an array."""
        return Spec(self._dtype, self._shapes[path])

    def __getitem__(self, path: str) -> np.ndarray:
        shape = self._shapes[path]
        if len(shape) == 1:
            return np.full(shape, 0.0 if "bias" in path else 1.0, self._dtype)
        if self._block is None:  # not a power of two, so that the rows of a matrix differ
            self._block = rng.normal(rng.key(0, "bench"), ((1 << 20) + 7,), 0.02).astype(self._dtype)
        return np.resize(self._block, math.prod(shape)).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def config_of(name: str, overrides: Sequence[str], tokens: int) -> Config | None:
    """Returns the configuration of a name in `SHAPES`, a preset or a YAML file; None for a path with weights.

    Args:
        name: The name or path.
        overrides: `KEY=VALUE` changes.
        tokens: Number of tokens that the model must be able to attend to. A smaller model.max_seq_length is raised.

    Raises:
        UsageError: `overrides` for a path with weights.
    """
    if name in SHAPES:
        config = Config.from_dict({"model": {"type": "transformer", **SHAPES[name]}}, overrides)
    elif Path(name).is_dir() or Path(name).suffix == ".gguf":
        if overrides:
            raise UsageError(f"--set: {name} has weights, so its sizes are fixed; give a shape or a config instead")
        return None
    else:
        config = Config.from_yaml(name, overrides)
    if getattr(config.model, "max_seq_length", tokens) < tokens:
        config = config.with_overrides(f"model.max_seq_length={tokens}")
    return config


def check(name: str, overrides: Sequence[str]) -> None:
    """Checks a target before the processes of the sides start, which takes seconds.

    Raises:
        UsageError, CheckpointError: It does not exist, has no weights, or generates no text.
    """
    try:
        config = config_of(name, overrides, 1)
    except presets.NotFoundError as error:
        raise ConfigError(error.problem, f"{error.remedy}; shapes: {', '.join(SHAPES)}") from None
    if config is None:
        config, _ = _open(Path(name))
    _check_generates(name, config)


def _open(path: Path) -> tuple[Config, Any]:
    config, weights = open_target(path)
    if weights is None:
        raise CheckpointError(f"{path}: contains no weights")
    return config, weights


def _check_generates(name: str, config: Config) -> None:
    if config.model.input_kind != "tokens" or not getattr(config.model, "causal", True):
        raise UsageError(f"{name}: a model that generates no text; the bench of inference needs one that does")


def prepare(
    name: str,
    overrides: Sequence[str],
    tokens: int,
    dtype: str,
    work: str,
    bits: Sequence[int] = (),
    group_size: int = 64,
) -> dict[str, Any]:
    """Returns the folders of a model. Runs in a separate process.

    Args:
        name, overrides, tokens: See `config_of`.
        dtype: The dtype of random weights.
        work: A folder for files that are written.
        bits: Numbers of bits of the folders with quantized weights.
        group_size: Size of their groups.

    Returns:
        `own`: what `icenet.load` reads; `peers`: the folder for the peers, which is the same if they can read it, or
        None; `problem`: why there is none; `quantized`: the folder of each number of bits, which all sides read;
        `size`: see `limits.ModelSize`; `nbytes`: bytes of the weights.

    Raises:
        UsageError: The model does not generate text, or cannot attend to so many tokens.
    """
    config = config_of(name, overrides, tokens)
    is_new = config is not None
    own = Path(work) / "canonical"
    if config is not None:
        model = backends.meta_model(config)
        shared = model.shared_arrays()
        shapes = {path: shape for path, shape in model.weight_shapes().items() if path not in shared}
        files = {"config.yaml": yaml_file.dump({"model": config.model.model_dump(mode="python")}).encode()}
        saved_model.save(own, RandomWeights(shapes, dtype), files)
    else:
        own = Path(name)
        config, _ = _open(own)
        model = backends.meta_model(config)
    _check_generates(name, config)
    size = limits.size_of(config, model)
    if size.max_length is not None and size.max_length < tokens:
        raise UsageError(
            f"{name}: attends to {size.max_length} tokens, and {tokens} are needed; "
            "request shorter prompts or fewer new tokens"
        )
    peers, problem = own, ""
    if is_new or not (own.is_dir() and folder.is_folder(own)):
        peers = Path(work) / "peers"
        try:  # the names of mlx-lm's folders are read by transformers as well
            icenet.convert(own, peers, "mlx-lm")
        except IceNetError as error:
            problem = str(error)
    if is_new and not problem:
        shutil.rmtree(own)
        own = peers
    quantized = {}
    for count in bits:
        quantized[str(count)] = str(Path(work) / f"{count} bits")
        icenet.convert(own, quantized[str(count)], "mlx-lm", quantize=count, group_size=group_size)
    return {
        "own": str(own),
        "quantized": quantized,
        "peers": None if problem else str(peers),
        "problem": problem,
        "size": size.as_dict(),
        "nbytes": sum(file.stat().st_size for file in weight_files(own)),
    }


def weight_files(path: Path) -> list[Path]:
    """Returns the files of weights of a folder, or the file itself."""
    files = path.iterdir() if path.is_dir() else [path]
    return [file for file in files if file.suffix in (".safetensors", ".gguf")]
