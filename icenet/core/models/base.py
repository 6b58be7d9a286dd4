"""What every model can say of itself, whatever its framework."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from icenet.core import rng
from icenet.core.config import GenerationConfig, ModelConfig
from icenet.core.errors import UsageError
from icenet.core.models import init
from icenet.core.tokenizers.base import Tokenizer
from icenet.core.weights import files as weight_files
from icenet.core.weights import layout

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}


class ModelBase:
    """The framework-free half of `BaseModel`; the other half answers the four methods at the end."""

    backend: ClassVar[str]
    config: ModelConfig
    tokenizer: Tokenizer | None = None
    generation: GenerationConfig | None = None

    @property
    def num_params(self) -> int:
        """Number of trainable values."""
        trainable = self.trainable_paths()
        return sum(int(np.prod(shape)) for path, shape in self.weight_shapes().items() if path in trainable)

    def memory(self, dtype: str = "fp32") -> int:
        """Bytes of the weights in a dtype: fp32, bf16, fp16 or int8."""
        if dtype not in BYTES:
            raise UsageError(f"memory: no dtype {dtype!r}; one of {', '.join(BYTES)}")
        return sum(self.part_sizes().values()) * BYTES[dtype]

    def __repr__(self) -> str:
        settings = self.config.model_dump(exclude={"type"}, exclude_defaults=True)
        lines = [f"{type(self).__name__}({', '.join(f'{key}={value}' for key, value in settings.items())})"]
        sizes = self.part_sizes()
        counts = {part: len(self._children(part)) for part in sizes}
        for part, size in sizes.items():
            repeat = f" x {counts[part]}" if counts[part] > 1 else ""
            lines.append(f"  {part + repeat:<24}{size:>14,}")
        fp32, fp16 = self.memory("fp32") / 1e6, self.memory("fp16") / 1e6
        lines.append(f"  {'parameters':<24}{self.num_params:>14,}   {fp32:,.1f} MB fp32, {fp16:,.1f} MB fp16")
        return "\n".join(lines)

    def part_sizes(self) -> dict[str, int]:
        """Values in each of the model's top-level parts, in its order; running statistics do not count."""
        sizes: dict[str, int] = {}
        for path, shape in self.weight_shapes().items():
            part, leaf = path.split(".")[0], path.rpartition(".")[2]
            if leaf in layout.STATISTICS:
                continue
            sizes[part] = sizes.get(part, 0) + int(np.prod(shape))
        return sizes

    def _children(self, part: str) -> set[str]:
        """The numbered children below a part (`blocks.0`, `blocks.1`, ...)."""
        paths = (path.split(".") for path in self.weight_shapes() if path.startswith(part + "."))
        return {path[1] for path in paths if path[1].isdigit()}

    # ---- weights in the canonical form -------------------------------------------------------------------

    def init_weights(self, seed: int = 0) -> None:
        """Sets every parameter to its initial value, a pure function of (seed, path)."""
        self.set_weights(dict(self.initial_weights(seed)))

    def initial_weights(self, seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
        """The initial values by path, in PyTorch's layouts."""
        kinds, scales = self.layer_kinds(), self.init_scales()
        for path, shape in self.weight_shapes().items():
            module, _, name = path.rpartition(".")
            kind = layout.parameter_kind(kinds, path)
            if kind == "plain":  # an array that a model of the user's own made itself
                yield path, self.weights()[path]
                continue
            yield path, init.initial_value(kind, name, path, shape, seed, scales.get(module, 1.0))

    def set_weights(self, values: Mapping[str, np.ndarray]) -> None:
        """Takes canonical weights: all of them, no others, in the right shapes.

        Raises:
            WeightsError: a name or shape does not fit; nothing is changed then.
        """
        weight_files.check(self.weight_shapes(), {path: tuple(array.shape) for path, array in values.items()})
        self._assign_weights(values)

    def check_length(self, length: int) -> None:
        """Refuses a sequence longer than the model's positions."""
        longest = getattr(self.config, "max_seq_length", None)
        if longest is not None and length > longest:
            raise UsageError(f"a sequence of {length} tokens is longer than model.max_seq_length {longest}")

    def dropout_keys(self, seed: int, step: int, rows: int | range, sites: list[str] | None = None) -> np.ndarray:
        """The keys of each dropout in one step, uint32 `[sites, rows, 2]`, in the order of `dropout_sites()`.

        `rows` counts the rows of a batch, or says which rows of the step's whole batch it holds: a row has its own
        key, so that its mask does not depend on how the batch is cut into micro-batches or shared by processes.
        """
        rows = range(rows) if isinstance(rows, int) else rows
        by_site = rng.keys_for_names(rng.key(seed, "dropout", step), self.dropout_sites() if sites is None else sites)
        return rng.fold(by_site[:, None, :], np.arange(rows.start, rows.stop, dtype=np.uint64)[None, :])

    # ---- answered by each backend's BaseModel ------------------------------------------------------------

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter and statistic in PyTorch's layout, by path, in the model's order."""
        raise NotImplementedError

    def trainable_paths(self) -> set[str]:
        """The paths that gradients are taken for."""
        raise NotImplementedError

    def layer_kinds(self) -> dict[str, str]:
        """The kind of each layer that holds parameters, by module path (see `icenet.core.weights.layout`)."""
        raise NotImplementedError

    def init_scales(self) -> dict[str, float]:
        """The `init_scale` of each layer that has one, by module path."""
        raise NotImplementedError

    def dropout_layers(self) -> dict[str, Any]:
        """The dropouts that leave something out, by module path, sorted."""
        raise NotImplementedError

    def dropout_sites(self) -> list[str]:
        """Their module paths."""
        return list(self.dropout_layers())

    def _assign_weights(self, values: Mapping[str, np.ndarray]) -> None:
        raise NotImplementedError

    def weights(self) -> dict[str, Any]:
        """The canonical weights as numpy arrays, by path."""
        raise NotImplementedError
