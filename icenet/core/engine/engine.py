"""The training engine: one model and its optimizer on one backend and device, with numpy arrays in and out.

`Engine` is the base class of `icenet.engine.engine.Engine` and `icenet_torch.engine.engine.Engine`. It holds
everything that does not depend on the framework.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from icenet.core import rng
from icenet.core.config import Config, custom, output_size, user_code
from icenet.core.distributed import processes
from icenet.core.engine.batches import Array, Batch, MicroBatch, check_ids, count_labels, labelled_rows, micro_batches
from icenet.core.engine.interface import EngineInterface
from icenet.core.engine.logits import call_model
from icenet.core.engine.results import Evaluation, StepResult, step_result
from icenet.core.errors import UsageError
from icenet.core.host.allocator import keep_freed_memory
from icenet.core.models import buckets, randomness
from icenet.core.nn.dropout import seed_dropouts

P = ParamSpec("P")
R = TypeVar("R")


def in_arithmetic(method: Callable[Concatenate[Engine, P], R]) -> Callable[Concatenate[Engine, P], R]:
    """Decorates a method of an engine: it runs in the arithmetic of the model (see `ModelBase.arithmetic`)."""

    @functools.wraps(method)
    def run(engine: Engine, /, *arguments: P.args, **options: P.kwargs) -> R:
        with engine.model.arithmetic():
            return method(engine, *arguments, **options)

    return run


class Engine(EngineInterface):
    """One model and its optimizer on one backend and device.

    Arrays are numpy in and out. Weights, gradients and optimizer state are canonical: PyTorch's layouts, by path.

    Args:
        config: The configuration.
        process_group: The processes that train together.

    Raises:
        ConfigError: The processes cannot share the training (see `processes.check_training`).

    Attributes:
        config: The configuration.
        process_group: The processes that train together.
        pixel_scale: Scale and shift `[C]` of images of bytes, whose values are byte * scale - shift; None: of values.
        loss: The loss of the user, (output, batch) -> mean loss; None is the cross-entropy.
    """

    def __init__(self, config: Config, process_group: processes.ProcessGroup) -> None:
        processes.check_training(config.training, process_group.size)
        keep_freed_memory()  # also on a GPU: for the batches that a thread reads
        self.config = config
        self.process_group = process_group
        self._is_checked = False  # see _checked_gradients
        self.pixel_scale: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
        self.loss: Callable[..., Any] | None = None
        if custom.is_custom(config.training.loss):
            self.loss = custom.loss_function(config.training.loss, self.backend)

    def _set_model(self, model: Any, compute_dtype: Any) -> None:
        """Sets the model, and copies rank 0's parameters to all processes or shards them."""
        training = self.config.training
        with model.arithmetic():
            self.process_group.broadcast_or_shard(model, training.sharded)
        model.checks_ids = False  # to_device does
        model.compute_dtype = compute_dtype
        model.gradient_checkpointing = training.gradient_checkpointing
        self.model = model
        self._dropouts = model.dropout_layers()

    @classmethod
    def prepare_process(cls) -> None:
        """Sets `environment`, which the framework reads once: call it before the first kernel of the process."""
        for name, value in cls.environment.items():
            os.environ.setdefault(name, value)

    @functools.cached_property
    def tf32(self) -> str:
        """`on` if fp32 products are computed in TF32, otherwise `off`; decided by a product on the device."""
        with self.model.arithmetic():
            return "on" if self.nn.arithmetic.uses_tf32(self.model.device) else "off"

    # ---- training ----------------------------------------------------------------------------------------

    @in_arithmetic
    def train_step(self, batch: Batch, step: int, learning_rate: float, loss_scale: float = 1.0) -> Any:
        """Submits one optimizer step and returns a handle for `read`.

        With fp16 or `training.on_nan: skip`, a step without finite loss and gradients changes nothing.

        Args:
            batch: The whole batch, also in each of several processes.
            step: The number of the step; the first one is 0.
            learning_rate: The schedule's learning rate.
            loss_scale: The factor of the loss in the backward pass of fp16.
        """
        training = self.config.training
        self._set_mode(train=True)
        may_skip = training.mixed_precision == "fp16" or training.on_nan == "skip"
        statistics = self.nn.norm.running_statistics(self.model) if may_skip else {}
        loss, gradients = self._checked_gradients(batch, step, loss_scale)
        norm, norms = self._norms(gradients)
        loss = self.process_group.all_reduce_loss(loss)
        if may_skip and not math.isfinite((loss + norm).sum().item()):
            self.nn.norm.set_running_statistics(self.model, statistics)
            return self._submit(loss, norm, norms)
        self.optimizer.prepare(step, learning_rate)
        self._update(gradients, norm, self.average.weight(step) if self.average else 0.0)
        return self._submit(loss, norm, norms)

    @in_arithmetic
    def read(self, handle: Any) -> StepResult:
        """Waits for the step of a handle and returns its result."""
        loss, norm, norms = self._wait(handle)
        mean, stop = self.process_group.read_loss(loss)
        return step_result(mean, norm.item(), stop, lambda: dict(zip(self._trainable, norms.tolist(), strict=True)))

    @in_arithmetic
    def gradients(
        self, batch: Batch, step: int = 0, loss_scale: float = 1.0
    ) -> tuple[float, dict[str, NDArray[Any]]]:
        """Returns the mean loss and the unclipped gradient of every parameter, with the dropout masks of `step`.

        Weights and running statistics do not change. The batch is split, and in fp16 the loss is scaled in the
        backward pass, as in a training step.
        """
        self._set_mode(train=True)
        with self.nn.norm.keep_buffers(self.model):
            loss, gradients = self._checked_gradients(batch, step, loss_scale)
        mean, _ = self.process_group.read_loss(self.process_group.all_reduce_loss(loss))
        return mean, self.process_group.gather_full(self._to_canonical(gradients))

    @in_arithmetic
    def apply_gradients(
        self, gradients: Mapping[str, NDArray[Any]], step: int, learning_rate: float, *, clip: bool = False
    ) -> None:
        """Runs one optimizer step with the given gradients.

        Args:
            gradients: The gradient of every parameter, as `gradients` returns them.
            step: The number of the step; the first one is 0.
            learning_rate: The schedule's learning rate.
            clip: Clip the gradients and update the weight average, as a training step does.
        """
        self.optimizer.prepare(step, learning_rate)
        arrays = self._from_canonical(gradients)
        if clip:
            self._update(arrays, self._norms(arrays)[0], self.average.weight(step) if self.average else 0.0)
        else:
            self.optimizer.update(arrays)
        self._submit()

    @in_arithmetic
    def check_draws(self, batch: Batch, step: int = 0) -> None:
        """Checks that the model draws no random numbers in its forward pass but the masks of its dropout layers.

        Weights and running statistics do not change.

        Raises:
            UsageError: A module draws from a generator of the framework, Python or numpy.
        """
        self._set_mode(train=True)
        part = next(self._micro_batches(batch, step))
        self._seed_dropouts(part.dropout_keys)
        with self.nn.norm.keep_buffers(self.model):
            call = functools.partial(call_model, self.model, part.arrays, self._num_classes)
            randomness.check_draws(self.backend, self.nn, self.model, call)

    @in_arithmetic
    def check_embeddings(self, batch: Batch, step: int = 0) -> None:
        """Checks the ids that a user's model looks up for a training batch, after a result that is not finite.

        Raises:
            OutsideTableError: An id is outside the table of an embedding, whose vector is NaN on MLX.
        """
        self._set_mode(train=True)
        for part in self._micro_batches(batch, step) if custom.is_custom(self.config.model.type) else ():
            self._seed_dropouts(part.dropout_keys)
            self._check_embeddings(part.arrays)

    def _check_embeddings(self, arrays: dict[str, Array]) -> None:
        """Checks the ids that a user's model looks up for a batch on the device, in the current mode."""
        if custom.is_custom(self.config.model.type):
            with self.model.reading_ids(), self.nn.norm.keep_buffers(self.model):
                call_model(self.model, arrays, self._num_classes)

    def _checked_gradients(self, batch: Batch, step: int, loss_scale: float = 1.0) -> tuple[Array, dict[str, Array]]:
        """Returns `_accumulate`, and checks the first one, which costs waiting for the device.

        Raises:
            UsageError: The model draws random numbers without a key, or its logits have no gradient.
        """
        if self._is_checked:
            return self._accumulate(batch, step, loss_scale)
        before = self._generators()
        loss, gradients = self._accumulate(batch, step, loss_scale)
        after = self._generators()
        if after != before and self.config.training.rng != "native":
            self.check_draws(batch, step)  # calls the model again, to find the module
            # Another thread may have used a generator of the host, and a compiler that of the framework.
            if after[0] != before[0] and not self.compiles:
                raise randomness.unkeyed_draw(self.backend, "", self.model)
        norm, _ = self._norms(gradients)  # collective, so each process calls it
        if norm.item() == 0 and self._is_detached(batch, step) and loss.item() > 0:
            raise self._detached_logits()  # at a loss of zero, the gradients of the logits are zero
        self._is_checked = True
        return loss, gradients

    def _is_detached(self, batch: Batch, step: int) -> bool:
        """Returns whether the gradients are zero for other labels too.

        Those of a batch can cancel out: equal images with as many labels of each class, at equal logits.
        """
        if self.loss is not None:  # the labels may be anything
            return True
        labels = batch["labels"]
        with self.nn.norm.keep_buffers(self.model):
            _, gradients = self._accumulate({**batch, "labels": np.where(labels < 0, labels, labels.max())}, step)
        return bool(self._norms(gradients)[0].item() == 0)

    @property
    def _has_own_loss(self) -> bool:
        """Whether the model computes the loss, without keeping the logits; the class of a user need not."""
        return self.loss is None and self.model.computes_loss and not custom.is_custom(self.config.model.type)

    def _training_loss(self, arrays: Mapping[str, Array]) -> Array:
        """Returns the mean loss of a batch on the device, and what the model adds to it in training."""
        output = self._outputs(arrays, self._has_own_loss)
        loss = output if self._has_own_loss else self._mean_loss(output, arrays)
        more = self.model.auxiliary_loss(arrays.get("attention_mask"))
        return loss if more is None else loss + more

    def _mean_loss(self, output: Array, arrays: Mapping[str, Array]) -> Array:
        """Returns the mean loss of a batch on the device.

        Raises:
            UsageError: The loss of the user fails, or is not one number.
        """
        if self.loss is None:
            return self.nn.cross_entropy(output, arrays["labels"])[0]
        if isinstance(output, self.model.array_type):  # the loss is computed in fp32
            output = self._to_full_precision(output)
        with user_code.explain_errors(arrays["inputs"], "loss"):
            loss = self.loss(output, dict(arrays))
        if not isinstance(loss, self.model.array_type) or loss.ndim or "float" not in str(loss.dtype):
            found = getattr(loss, "shape", None)
            given = type(loss).__name__ if found is None else f"an array {list(found)} of {loss.dtype}"
            raise UsageError(
                f"training.loss: {self.config.training.loss} returned {given}; return the mean, one float"
            )
        return loss

    @property
    def _num_classes(self) -> int | None:
        """Number of logits that the labels need; None if a loss of the user gives them another meaning."""
        return output_size(self.config.model) if self.loss is None else None

    def _detached_logits(self) -> UsageError:
        result, cause = ("logits do", "forward detaches them")
        if self.loss is not None:
            result, cause = ("loss does", "forward or the function of training.loss detaches it")
        return UsageError(
            f"the {result} not depend on any trained array, so all gradients are zero: {cause}, for "
            f"example by {self.detaches} or a conversion to numpy, or all of its activations are 0"
        )

    def _generators(self) -> tuple[object, ...]:
        """Returns the states of the generators of the framework, Python and numpy."""
        return randomness.generator_states(self.nn)

    def _micro_batches(self, batch: Batch, step: int) -> Iterator[MicroBatch]:
        """Yields this process's micro-batches of a training batch, each moved to the device when it is requested."""
        training, group = self.config.training, self.process_group
        if training.rng == "native":
            self._seed_generator(rng.native_seed(self.config.seed, step, group.rank))
        parts = micro_batches(batch, training.gradient_accumulation, group.rank, group.size)
        for index, (part, rows, share) in enumerate(parts):
            keys = self._dropout_keys(step, rows)
            if not share and self.loss is not None:  # the mean of nothing may be NaN, and so is its product with 0
                part = labelled_rows(batch, len(rows)) or part
            yield MicroBatch(self.to_device(part), keys, share, is_last=index + 1 == len(parts))

    def _norms(self, gradients: Mapping[str, Array]) -> tuple[Array, Array]:
        """Returns the norm of all gradients together, and of each, `[N]`, float32. Shards are combined."""
        return self.process_group.all_reduce_norms(*self.nn.exact.gradient_norms(list(gradients.values())))

    def _set_mode(self, train: bool) -> None:
        if self.model.training != train:  # it visits all modules, half a millisecond for a small GPT
            self.model.train(train)

    # ---- evaluation --------------------------------------------------------------------------------------

    @in_arithmetic
    def evaluate(self, batch: Batch) -> Evaluation:
        """Returns the loss of a batch in evaluation mode, with the averaged weights if `training.ema_decay` is set.

        Each of several processes passes its own rows.
        """
        self._set_mode(train=False)
        with self.average.applied() if self.average else contextlib.nullcontext():
            arrays = self.to_device(self._padded(batch))
            output = self._predict(arrays, self._has_own_loss)
            # a process that has no rows may have labels for which a loss of the user is NaN
            counted = count_labels(batch["labels"])
            mean = output if self._has_own_loss or not counted else self._mean_loss(output, arrays)
            loss = mean.item() if counted else 0.0
            if not math.isfinite(loss):
                self._check_embeddings(arrays)
            labels, correct = batch["labels"], None
            if labels.ndim == 1 and labels.dtype.kind in "iu" and getattr(output, "ndim", 0) == 2:
                correct = int(self.nn.loss.count_correct(output, arrays["labels"]).item())
            return Evaluation(loss, counted, correct)

    @in_arithmetic
    def forward(self, batch: Batch) -> NDArray[Any]:
        """Returns the model's output in evaluation mode; half precision as float32."""
        self._set_mode(train=False)
        arrays = self.to_device(self._padded(batch))
        outputs = self._to_float_numpy(self._predict(arrays))
        if not np.isfinite(outputs).all():
            self._check_embeddings(arrays)
        rows, length = batch["inputs"].shape[:2]
        return outputs[:rows, :length] if outputs.ndim == 3 else outputs[:rows]

    @in_arithmetic
    def average_statistics(self) -> None:
        """Replaces the running statistics of batch norms by their mean over the processes.

        They are linear in the batches, so averaging when they are needed is the same as averaging at every step.
        A collective operation: all processes must call it.
        """
        values = self.nn.norm.running_statistics(self.model)
        if self.process_group.size > 1 and values:
            means = self.process_group.mean(list(values.values()))
            self.nn.norm.set_running_statistics(self.model, dict(zip(values, means, strict=True)))

    def _padded(self, batch: Batch) -> Batch:
        """Returns the batch, padded to one of a few shapes if the model is compiled."""
        return buckets.pad(batch, self.config.model) if self.compiles else batch

    # ---- state -------------------------------------------------------------------------------------------

    @in_arithmetic
    def weights(self) -> dict[str, NDArray[Any]]:
        """Returns the canonical weights by path. With several processes a collective operation."""
        self.average_statistics()
        return self.process_group.gather_full(self.model.weights())

    @in_arithmetic
    def set_weights(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Sets the canonical weights: all of them, no others."""
        self.model.set_weights(self.process_group.local_shard(self.model.with_canonical_names(weights)))

    @in_arithmetic
    def initialize(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Sets the canonical weights with which training begins; averages of them begin with the same values."""
        self.set_weights(weights)
        if self.average is not None:
            self.average.assign(self.average.current())
        self._submit()

    @in_arithmetic
    def optimizer_state(self) -> dict[str, NDArray[Any]]:
        """Returns the optimizer's arrays by `PATH.SLOT`, with PyTorch's slot names, and averages by `PATH.ema`.

        With several processes a collective operation.
        """
        averages = self._to_canonical(self.average.arrays) if self.average else {}
        return self.process_group.gather_full(
            {**self.optimizer.state_arrays(), **{f"{path}.ema": array for path, array in averages.items()}}
        )

    @in_arithmetic
    def set_optimizer_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Sets what `optimizer_state` returned, on either backend.

        Raises:
            CheckpointError: It is the state of another optimizer or model; nothing is changed then.
        """
        named = self.model.with_canonical_names(state, is_state=True)
        averages, slots = _split_averages(self.process_group.local_shard(named))
        self.optimizer.set_state_arrays(slots)
        if self.average is not None:
            # a checkpoint that has no averages starts them from the current weights
            self.average.assign(self._from_canonical(averages) if averages else self.average.current())
        self._submit()

    # ---- inputs ------------------------------------------------------------------------------------------

    @in_arithmetic
    def to_device(self, batch: Batch) -> dict[str, Array]:
        """Returns a batch as the backend's arrays on the device, in the layout that the model takes.

        Raises:
            DataError: An id is outside the vocabulary.
        """
        are_pixels = self.pixel_scale is not None and batch["inputs"].dtype == np.uint8
        ids = ([] if are_pixels else ["inputs"]) + (["labels"] if self.loss is None else [])
        check_ids(batch, self.config.model.vocab_size, ids)
        arrays = {name: self._to_device(array) for name, array in batch.items()}
        if are_pixels and self.pixel_scale is not None:
            arrays["inputs"] = self._normalize(arrays["inputs"], *self.pixel_scale)
        return arrays

    @in_arithmetic
    def seed_dropouts(self, step: int, rows: range) -> None:
        """Sets the keys of all dropout layers to those of the given rows of the batch of `step`."""
        self._seed_dropouts(self._dropout_keys(step, rows))

    def _dropout_keys(self, step: int, rows: range) -> Array | None:
        if self.config.training.rng == "native" or not self._dropouts:
            return None
        return self._to_device(self.model.dropout_keys(self.config.seed, step, rows, list(self._dropouts)))

    def _seed_dropouts(self, keys: Array | None) -> None:
        seed_dropouts(self._dropouts.values(), keys)


def _split_averages(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits optimizer state by `PATH.SLOT` into averaged weights by path and the other slots."""
    averages = {name.removesuffix(".ema"): array for name, array in state.items() if name.endswith(".ema")}
    return averages, {name: array for name, array in state.items() if not name.endswith(".ema")}
