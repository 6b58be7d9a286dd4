"""The framework-free base class of all models: size, weights, dropout keys, generation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from icenet.core import rng
from icenet.core.config import GenerationConfig, ModelConfig
from icenet.core.errors import UsageError
from icenet.core.generation.decoder import DecoderBase
from icenet.core.generation.request import Tokens, make_request
from icenet.core.generation.streaming import append_to_prompts, generate_tokens, stream_tokens
from icenet.core.models import init
from icenet.core.models.dropout import seed_dropouts
from icenet.core.tokenizers.base import Tokenizer
from icenet.core.weights import files as weight_files
from icenet.core.weights import layout

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}


class ModelBase:
    """The part of `BaseModel` that is the same on both backends.

    `icenet.models.base.BaseModel` and `icenet_torch.models.base.BaseModel` derive from it and from the framework's
    `nn.Module`. They define the class variables and the methods in the last section.

    Attributes:
        config: The model section of the configuration.
        tokenizer: Tokenizer of the model's text, if any.
        generation: Default options of `generate`, if any.
    """

    backend: ClassVar[str]
    decoder_type: ClassVar[type[DecoderBase]]
    dropout_type: ClassVar[type[Any]]

    config: ModelConfig
    tokenizer: Tokenizer | None = None
    generation: GenerationConfig | None = None

    if TYPE_CHECKING:

        def named_modules(self) -> Iterable[tuple[str, Any]]: ...

    # ---- size --------------------------------------------------------------------------------------------

    @property
    def num_params(self) -> int:
        """Number of trainable values."""
        trainable = self.trainable_paths()
        return sum(int(np.prod(shape)) for path, shape in self.weight_shapes().items() if path in trainable)

    def memory(self, dtype: str = "fp32") -> int:
        """Returns the size of the weights in bytes, in fp32, bf16, fp16 or int8."""
        if dtype not in BYTES:
            raise UsageError(f"memory: no dtype {dtype!r}; one of {', '.join(BYTES)}")
        return sum(self.part_sizes().values()) * BYTES[dtype]

    def __repr__(self) -> str:
        settings = self.config.model_dump(exclude={"type"}, exclude_defaults=True)
        lines = [f"{type(self).__name__}({', '.join(f'{key}={value}' for key, value in settings.items())})"]
        sizes = self.part_sizes()
        counts = {part: len(self._numbered_children(part)) for part in sizes}
        for part, size in sizes.items():
            repeat = f" x {counts[part]}" if counts[part] > 1 else ""
            lines.append(f"  {part + repeat:<24}{size:>14,}")
        fp32, fp16 = self.memory("fp32") / 1e6, self.memory("fp16") / 1e6
        lines.append(f"  {'parameters':<24}{self.num_params:>14,}   {fp32:,.1f} MB fp32, {fp16:,.1f} MB fp16")
        return "\n".join(lines)

    def part_sizes(self) -> dict[str, int]:
        """Returns the number of values in each top-level part of the model, without running statistics."""
        sizes: dict[str, int] = {}
        for path, shape in self.weight_shapes().items():
            part, leaf = path.split(".")[0], path.rpartition(".")[2]
            if leaf not in layout.STATISTICS:
                sizes[part] = sizes.get(part, 0) + int(np.prod(shape))
        return sizes

    def _numbered_children(self, part: str) -> set[str]:
        """Returns the numbered children of a part: `0` and `1` for `blocks.0` and `blocks.1`."""
        paths = (path.split(".") for path in self.weight_shapes() if path.startswith(part + "."))
        return {path[1] for path in paths if path[1].isdigit()}

    # ---- weights -----------------------------------------------------------------------------------------

    def init_weights(self, seed: int = 0) -> None:
        """Sets all parameters to their initial values, a pure function of the seed and the parameter path."""
        self.set_weights(dict(self.initial_weights(seed)))

    def initial_weights(self, seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the path and the initial value of each parameter, in PyTorch's layout."""
        kinds, scales = self.layer_kinds(), self.init_scales()
        for path, shape in self.weight_shapes().items():
            module, _, name = path.rpartition(".")
            kind = layout.parameter_kind(kinds, path)
            if kind == "plain":  # an array that a user's module has initialized
                yield path, self.weights()[path]
                continue
            yield path, init.initial_value(kind, name, path, shape, seed, scales.get(module, 1.0))

    def set_weights(self, values: Mapping[str, np.ndarray]) -> None:
        """Sets all weights.

        Args:
            values: Canonical weights by path: every weight of the model and no other, in PyTorch's layouts.

        Raises:
            WeightsError: A name or a shape does not match; the model is unchanged.
        """
        weight_files.check(self.weight_shapes(), {path: tuple(array.shape) for path, array in values.items()})
        self._assign_weights(values)

    def layer_kinds(self) -> dict[str, str]:
        """Returns the kind of each layer with parameters, by module path (see `icenet.core.weights.layout`)."""
        return {path: kind for path, module in self.named_modules() if (kind := self._kind_of(module))}

    def init_scales(self) -> dict[str, float]:
        """Returns the `init_scale` of each layer that has one, by module path."""
        return {path: module.init_scale for path, module in self.named_modules() if hasattr(module, "init_scale")}

    def check_length(self, length: int) -> None:
        """Raises UsageError if a sequence of `length` tokens is longer than `max_seq_length`."""
        longest = getattr(self.config, "max_seq_length", None)
        if longest is not None and length > longest:
            raise UsageError(f"a sequence of {length} tokens is longer than model.max_seq_length {longest}")

    # ---- dropout -----------------------------------------------------------------------------------------

    def dropout_layers(self) -> dict[str, Any]:
        """Returns the dropout layers with a probability above zero, by module path, sorted."""
        found = {path: m for path, m in self.named_modules() if isinstance(m, self.dropout_type) and m.p > 0}
        return dict(sorted(found.items()))

    def dropout_sites(self) -> list[str]:
        """Returns the module paths of `dropout_layers`."""
        return list(self.dropout_layers())

    def dropout_keys(self, seed: int, step: int, rows: int | range, sites: list[str] | None = None) -> np.ndarray:
        """Returns the keys of all dropout layers in one training step.

        Each row has its own key, so its mask does not depend on how the batch is divided into micro-batches or among
        processes.

        Args:
            seed: Seed of the run.
            step: Training step.
            rows: Number of rows of the batch, or the range of its rows within the whole batch of the step.
            sites: Module paths of the dropout layers; by default `dropout_sites()`.

        Returns:
            uint32 `[sites, rows, 2]`.
        """
        rows = range(rows) if isinstance(rows, int) else rows
        by_site = rng.keys_for_names(rng.key(seed, "dropout", step), self.dropout_sites() if sites is None else sites)
        return rng.fold(by_site[:, None, :], np.arange(rows.start, rows.stop, dtype=np.uint64)[None, :])

    def seed_dropout(self, keys: Any) -> None:
        """Sets the keys of all dropout layers.

        Args:
            keys: `dropout_keys` as a native array (uint32 on MLX, int32 with the same bits on PyTorch), or None for
                the framework's own generator.
        """
        seed_dropouts(self.dropout_layers().values(), keys)

    # ---- generation --------------------------------------------------------------------------------------

    def generate(
        self,
        input_ids: Any,
        *,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: Sequence[int | str] | None = None,
        overflow: str | None = None,
        prefill_chunk: int | None = None,
        attention_mask: Any = None,
        pad_token_id: int = 0,
        stream: bool = False,
    ) -> Any:
        """Continues prompts. The other options are those of `icenet.core.config.GenerationConfig`.

        Args:
            input_ids: Token ids `[B, T]`, `[T]`, or a list of lists of unequal length.
            attention_mask: `[B, T]`, 0 or False for padding, which must be on the left.
            pad_token_id: Token that pads prompts on the left and ended rows on the right.
            stream: Whether to return an iterator.

        Returns:
            Prompts and new tokens, `[B, L]`, a native array (int32 on MLX, int64 on PyTorch). With `stream`, an
            iterator over the next token of each row, numpy int32 `[B]`.

        Raises:
            UsageError: A prompt or an option is invalid.
        """
        options = {
            "max_length": max_length,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            "stop": stop,
            "overflow": overflow,
            "prefill_chunk": prefill_chunk,
        }
        request = make_request(self, input_ids, attention_mask, pad_token_id, options)
        decoder = self.decoder_type(self, request)
        if stream:
            return stream_tokens(decoder, request)
        return self._to_native_tokens(append_to_prompts(generate_tokens(decoder, request), request))

    # ---- defined by each backend's BaseModel -------------------------------------------------------------

    def weights(self) -> dict[str, np.ndarray]:
        """Returns copies of the canonical weights: numpy arrays in PyTorch's layouts, by path."""
        raise NotImplementedError

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each parameter and statistic in PyTorch's layout, by path, in the model's order."""
        raise NotImplementedError

    def trainable_paths(self) -> set[str]:
        """Returns the paths of the trainable parameters."""
        raise NotImplementedError

    def _kind_of(self, module: Any) -> str | None:
        """Returns the kind of a module with parameters, or None."""
        raise NotImplementedError

    def _assign_weights(self, values: Mapping[str, np.ndarray]) -> None:
        """Sets all weights, whose names and shapes have been checked."""
        raise NotImplementedError

    def _to_native_tokens(self, tokens: Tokens) -> Any:
        """Returns tokens, int32 `[B, L]`, as an array of the framework on the model's device."""
        raise NotImplementedError
