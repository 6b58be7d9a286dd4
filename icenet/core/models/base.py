"""The framework-free base class of all models: size, weights, checks of inputs, dropout keys."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from icenet.core import backends
from icenet.core.config import EmbeddingConfig, ImageModelConfig, ModelConfig, custom, user_code
from icenet.core.errors import IceNetError, OutsideTableError, UsageError
from icenet.core.generation.prompts import check_mask, check_vocabulary
from icenet.core.generation.request import Tokens
from icenet.core.models import init, inputs
from icenet.core.models.generation import GenerationMixin
from icenet.core.nn.dropout import dropout_keys, dropout_layers, seed_dropouts
from icenet.core.weights import arrays, layout, quantization, sharing
from icenet.core.weights import files as weight_files
from icenet.core.weights.origin import Origin
from icenet.core.weights.packed import KINDS
from icenet.core.weights.quantization import Quantization
from icenet.core.weights.safetensors import release

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}


class ModelBase(GenerationMixin):
    """The part of `BaseModel` that is the same on both backends.

    `icenet.models.base.BaseModel` and `icenet_torch.models.base.BaseModel` derive from it and from the framework's
    `nn.Module`. They define what `ModelInterface` lists.

    Attributes:
        origin: Where the weights were imported from, if they were.
        embedding_options: Default options of `icenet.embed`, if any.
        image_facts: How images are read and the names of the classes (an `ImageFacts`), if that is known.
        allow_tf32: Whether fp32 products may use TF32. None, for a model that `icenet.build` did not make, leaves it
            to the framework.
        computes_loss: Whether `forward` takes `labels` and returns their mean loss without keeping the logits.
        checks_ids: Whether `check_tokens` also reads the ids and the mask. False where the caller has checked them on
            the host.
    """

    embedding_options: EmbeddingConfig | None = None
    origin: Origin | None = None
    image_facts: Any = None
    allow_tf32: bool | None = None
    checks_ids: bool = True
    computes_loss: bool = False

    @classmethod
    def checked_config(cls, config: Any) -> ModelConfig:
        """Returns a model section of a configuration as it is.

        Raises:
            UsageError: It is something else, such as a dict or the whole configuration.
        """
        if not isinstance(config, ModelConfig):
            given = type(config).__name__
            remedy = "give its section model" if hasattr(config, "model") else "write ModelConfig(type=..., ...)"
            raise UsageError(f"{cls.__name__}: needs a ModelConfig, not a {given}; {remedy}")
        return config

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
        if quantized := self.quantized_layers():
            lines.append(f"  {'values':<24}{sum(sizes.values()):>14,}   {quantization.describe(quantized)}")
        else:
            lines.append(f"  {'parameters':<24}{self.num_params:>14,}   {fp32:,.1f} MB fp32, {fp16:,.1f} MB fp16")
        return "\n".join(lines)

    def part_sizes(self) -> dict[str, int]:
        """Returns the number of values in each top-level part of the model, without running statistics.

        A shared array is counted where it is first.
        """
        sizes: dict[str, int] = {}
        shared, quantized = self.shared_arrays(), self.quantized_layers()
        for path, shape in self.weight_shapes().items():
            part, (layer, _, leaf) = path.split(".")[0], path.rpartition(".")
            if layer in quantized and leaf in KINDS:
                shape = quantized[layer].shape(shape) if leaf == "weight" else (0,)
            if leaf not in layout.STATISTICS and path not in shared:
                sizes[part] = sizes.get(part, 0) + int(np.prod(shape))
        return sizes

    def _numbered_children(self, part: str) -> set[str]:
        """Returns the numbered children of a part: `0` and `1` for `blocks.0` and `blocks.1`."""
        shared = self.shared_arrays()
        paths = (p.split(".") for p in self.weight_shapes() if p.startswith(part + ".") and p not in shared)
        return {path[1] for path in paths if path[1].isdigit()}

    # ---- weights -----------------------------------------------------------------------------------------

    def init_weights(self, seed: int = 0) -> None:
        """Sets all parameters to their initial values, a pure function of the seed and the parameter path."""
        if not self.is_meta:
            with self.arithmetic():
                # one at a time, not a second copy of the model
                self._assign_weights(self.initial_weights(seed, self._host_memory()))

    def initial_weights(
        self, seed: int = 0, memory: Mapping[str, np.ndarray] | None = None, paths: Collection[str] | None = None
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the path and the initial value of each parameter, in PyTorch's layout; shared arrays once.

        Args:
            seed: Seed of the run.
            memory: Arrays by path that initial values may be drawn into, which saves a copy.
            paths: The parameters; None yields all.
        """
        kinds, scales, shared = self.layer_kinds(), self.init_scales(), self.shared_arrays()
        own: dict[str, np.ndarray] | None = None
        for path, shape in self.weight_shapes().items():
            if path in shared or (paths is not None and path not in paths):
                continue
            module, _, name = path.rpartition(".")
            kind = layout.parameter_kind(kinds, path)
            if kind == "plain":  # an array that a user's module has initialized
                own = self.weights() if own is None else own
                yield path, own[path]
                continue
            scale = scales.get(module, 1.0)
            yield path, init.initial_value(kind, name, path, shape, seed, scale, out=(memory or {}).get(path))

    @property
    def code(self) -> str:
        """The module of Python that defines the model."""
        return type(self).__module__

    def set_weights(self, values: Mapping[str, np.ndarray]) -> None:
        """Sets all weights.

        Args:
            values: Canonical weights by path: every weight of the model and no other, in PyTorch's layouts. Of an
                array that the model shares, one name is enough.

        Raises:
            WeightsError: A name, a shape or a dtype does not match, or two names of a shared array have unequal
                values; the model is unchanged.
        """
        shared = self.shared_arrays()
        values = sharing.complete(self.with_canonical_names(arrays.NumpyWeights(values)), shared)
        weight_files.check(self.weight_shapes(), weight_files.shapes(values))
        arrays.check_dtypes({path: str(array.dtype) for path, array, _ in self._named_arrays()}, values)
        with self.arithmetic():
            self._assign_weights(_one_by_one((path, array) for path, array in values.items() if path not in shared))

    def with_canonical_names(self, values: Mapping[str, Any], is_state: bool = False) -> Mapping[str, Any]:
        """Returns weights, or with `is_state` optimizer state by `PATH.SLOT`, by canonical name.

        Checkpoints of version 0.1 name the parts of MLX's containers as MLX does.
        """
        found = sharing.renamed(values, self.mlx_names(), is_state)
        changed = [(old, new) for old, new in zip(values, found, strict=True) if old != new]
        if changed and not is_state:
            old, new = changed[0]
            logging.getLogger("icenet").warning(
                f"{len(changed)} names of weights are MLX's own, such as {old}, which is read as {new}"
            )
        return found

    def quantized_layers(self) -> dict[str, Quantization]:
        """Returns how each quantized layer is quantized, by module path."""
        of = backends.module(self.backend, "nn.quantized").quantization_of
        return {path: found for path, module in self._named_layers() if (found := of(module)) is not None}

    def quantizable_layers(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of the weight of each layer that can be quantized, by module path."""
        shapes, can_quantize = self.weight_shapes(), backends.module(self.backend, "nn.quantized").is_quantizable
        return {path: shapes[f"{path}.weight"] for path, module in self._named_layers() if can_quantize(module)}

    def quantize_layers(self, layers: Mapping[str, Quantization]) -> set[str]:
        """Makes layers quantized ones, in place, whose values are undefined until `set_weights` sets them.

        Args:
            layers: The settings of each layer, by module path.

        Returns:
            The paths of the layers that the backend computes with quantized weights; the others stay as they are.
        """
        return set(backends.module(self.backend, "nn.quantized").quantize_layers(self._named_layers(), layers))

    def shared_arrays(self) -> dict[str, str]:
        """Returns the owner's path of each further path of an array that the model shares, in the model's order."""
        return sharing.find_shared((path, array) for path, array, _ in self._named_arrays())

    def trainable_paths(self) -> set[str]:
        """Returns the paths of the trainable parameters; a shared one has its owner's path.

        Raises:
            UsageError: A shared array is frozen at one of its places only.
        """
        return sharing.trainable_paths(self._named_arrays(), self.shared_arrays())

    def init_scales(self) -> dict[str, float]:
        """Returns the `init_scale` of each layer that has one, by module path."""
        return {path: module.init_scale for path, module in self._named_layers() if hasattr(module, "init_scale")}

    def explain_non_finite(self) -> str:
        """Returns why a result of the model may be NaN or infinite: the first weight that is, or an overflow."""
        if (path := arrays.first_non_finite(self.weights())) is not None:
            return f"{path} has values that are NaN or infinite"
        return f"the weights are finite, so the arithmetic in {self.compute_dtype} overflows; compute in fp32"

    def check_length(self, length: int) -> None:
        """Raises UsageError if a sequence of `length` tokens is longer than `max_seq_length`."""
        longest = getattr(self.config, "max_seq_length", None)
        if longest is not None and length > longest:
            raise UsageError(f"a sequence of {length} tokens is longer than model.max_seq_length {longest}")

    def auxiliary_loss(self, attention_mask: Any = None) -> Any:
        """Returns what is added to the loss of the last forward pass in training, an array; None is nothing.

        Args:
            attention_mask: `[B, T]` of that pass, 0 or False for padding.
        """
        return None

    # ---- inputs ------------------------------------------------------------------------------------------

    def check_tokens(
        self, input_ids: Any, attention_mask: Any = None, past: int | None = 0, left_padded: bool = False
    ) -> None:
        """Checks the arguments of `forward` of a model of text.

        Args:
            input_ids: Tokens, int `[B, T]`.
            attention_mask: `[B, past + T]`, or None.
            past: Number of tokens before; None if it is unknown.
            left_padded: Whether padding must be on the left, as a cache needs it.

        Raises:
            UsageError: A shape or dtype is wrong, an id is outside the vocabulary, or the mask has other values than
                0 and 1. Values are not read in a function that the framework is tracing. On CUDA, PyTorch checks ids
                itself, and of the masks only those of floats are read, because the host must wait for them.
        """
        inputs.check_tokens(input_ids, attention_mask, past, self.array_type)
        if self.checks_ids and (tokens := self._to_host(input_ids)) is not None:
            check_vocabulary(tokens, self.config.vocab_size, "input_ids")
        if self.checks_ids and attention_mask is not None:
            dtype = inputs.dtype_name(attention_mask)
            if "bool" not in dtype and (mask := self._to_host(attention_mask, waits="float" in dtype)) is not None:
                check_mask(mask, "attention_mask")
        if left_padded and attention_mask is not None and (mask := self._to_host(attention_mask)) is not None:
            inputs.check_left_padding(mask)

    def check_token_types(self, token_type_ids: Any, input_ids: Any) -> None:
        """Checks the types of tokens of a transformer, int `[B, T]` or None.

        Raises:
            UsageError: The model has no types, the shape is not that of `input_ids`, or an id is outside the table.
        """
        if token_type_ids is None:
            return
        count: int = getattr(self.config, "token_types", 0)
        inputs.check_token_types(token_type_ids, input_ids, count, self.array_type)
        if self.checks_ids and (types := self._to_host(token_type_ids)) is not None:
            check_vocabulary(types, count, "token_type_ids", "model.token_types")

    def check_images(self, images: Any, channel_axis: int) -> None:
        """Checks the argument of `forward` of a model of images, whose channels are at axis 1 or 3.

        Raises:
            UsageError: The number of axes or channels is wrong, or the model does not accept the size.
        """
        assert isinstance(self.config, ImageModelConfig)
        inputs.check_images(self.config, images, channel_axis, self.array_type)

    # ---- embeddings --------------------------------------------------------------------------------------

    def check_embeddings(self, tokens: Sequence[int]) -> None:
        """Checks the ids that a user's model looks up for one sequence, after a result that is not finite.

        Raises:
            OutsideTableError: An id is outside the table of an embedding, whose vector is NaN on MLX.
        """
        if not custom.is_custom(self.config.type):
            return
        model: Any = self
        row = self._to_native_tokens(np.array([tokens], np.int32))
        try:
            with self.arithmetic(), self.reading_ids(), user_code.explain_errors(row):
                model(row)
        except OutsideTableError:
            raise
        except IceNetError:  # of a sequence that was longer than the context, for example
            return

    # ---- dropout -----------------------------------------------------------------------------------------

    def dropout_layers(self) -> dict[str, Any]:
        """Returns the dropout layers with a probability above zero, by module path, sorted.

        A layer that is used at several places has the first of its paths.
        """
        return dropout_layers(self._named_layers())

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
        return dropout_keys(seed, step, rows, self.dropout_sites() if sites is None else sites)

    def seed_dropout(self, keys: Any) -> None:
        """Sets the keys of all dropout layers.

        Args:
            keys: `dropout_keys` as a native array (uint32 on MLX, int32 with the same bits on PyTorch), or None for
                the framework's own generator.
        """
        seed_dropouts(self.dropout_layers().values(), keys)

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """A context in evaluation mode. The modes of all modules are restored, also those of frozen parts."""
        modes: list[tuple[Any, bool]] = []
        if self.training:  # otherwise a decoding step would visit all modules
            modes = [(module, module.training) for _, module in self._named_layers()]
            self.eval()
        try:
            yield
        finally:
            for module, mode in modes:  # parents first: the mode of a module is also set in its parts
                module.train(mode)

    # ---- features ----------------------------------------------------------------------------------------

    def compute_hidden_states(self, tokens: Tokens, mask: np.ndarray | None) -> np.ndarray:
        """Returns the hidden states of a transformer on the host, float32 `[B, T, D]`.

        They are computed in evaluation mode and without gradients.

        Args:
            tokens: Tokens, int32 `[B, T]`.
            mask: bool `[B, T]`, False for padding; None without padding.
        """
        model: Any = self
        native = None if mask is None else self._to_native_tokens(mask.astype(np.int32))
        with self.evaluation(), self.arithmetic(), self.without_gradients():
            return self._to_float_host(model.hidden_states(self._to_native_tokens(tokens), native))

    def compute_loss(self, tokens: Tokens, labels: Tokens) -> tuple[float, int]:
        """Returns the mean cross-entropy in nats, computed as `compute_hidden_states` is, and the number of labels.

        Args:
            tokens, labels: int32 `[B, T]`; negative labels are ignored.
        """
        model: Any = self
        cross_entropy = backends.module(self.backend, "nn").cross_entropy
        with self.evaluation(), self.arithmetic(), self.without_gradients():
            loss, count = cross_entropy(model(self._to_native_tokens(tokens)), self._to_native_tokens(labels))
            return loss.item(), int(count.item())


def _one_by_one(values: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields weights; a view of a file that the caller has copied does not stay in memory next to the copy."""
    for path, array in values:
        yield path, array
        release(array)
