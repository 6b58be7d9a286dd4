"""The MLX engine: one model and its optimizer, numpy in and out. The mirror is `icenet_torch/engine/engine.py`."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from icenet import nn as ops
from icenet.core import rng
from icenet.core.config import Config
from icenet.core.distributed import processes
from icenet.core.engine import (
    Batch,
    Evaluation,
    StepResult,
    check_ids,
    micro_batches,
    new_model,
    split_averages,
    step_result,
)
from icenet.core.errors import BackendError
from icenet.core.models import buckets
from icenet.core.training.schedule import ema_weight
from icenet.core.weights import layout
from icenet.engine import distributed
from icenet.engine.ema import WeightAverage
from icenet.engine.optimizers import new_optimizer, set_state_arrays, state_arrays
from icenet.models import MODELS, BaseModel
from icenet.nn.arrays import on_cpu
from icenet.nn.dropout import seed_dropouts
from icenet.nn.exact import gradient_norms
from icenet.nn.loss import count_correct
from icenet.nn.norm import keep_running_statistics, running_statistics, set_running_statistics

COMPUTE_DTYPES = {"fp32": mx.float32, "bf16": mx.bfloat16, "fp16": mx.float16}


def choose_device(name: str) -> mx.Device:
    """auto: a GPU where there is one; gpu and cuda mean the same to MLX."""
    if name in ("cpu", "auto") and not (name == "auto" and mx.is_available(mx.gpu)):
        return mx.Device(mx.cpu)
    if name == "mps":
        raise BackendError("device mps is PyTorch's name for the GPU: with MLX say --device gpu, or --backend torch")
    index = int(name.partition(":")[2] or 0)
    if not mx.is_available(mx.Device(mx.gpu, index)):
        raise BackendError(f"MLX finds no device {name} here: say --device cpu, and see icenet doctor")
    return mx.Device(mx.gpu, index)


def build_model(config: Config, device: str = "auto", init_weights: bool = True) -> BaseModel:
    """A model on a device, with its initial weights or, for weights to be loaded, with none drawn."""
    mx.set_default_device(choose_device(device))
    return new_model(config.model, MODELS, "mlx", config.seed if init_weights else None)


def meta_model(config: Config) -> BaseModel:
    """A model that knows its shapes and holds no values, whatever its size: MLX's arrays are lazy."""
    return new_model(config.model, MODELS, "mlx", None)


class Engine:
    """See `icenet.core.engine.Engine` for what each method takes and gives."""

    backend = "mlx"

    def __init__(self, config: Config, device: str = "auto", dtype: str = "float32") -> None:
        if dtype != "float32":
            raise BackendError(f"MLX is no {dtype} reference: some of its functions are computed in fp32")
        self.config = config
        training = config.training
        self.process_group = distributed.join(device)
        processes.check(training, self.process_group.size)
        self.model = build_model(config, distributed.own_device(device))
        self.process_group.broadcast_or_shard(self.model, training.sharded)
        self.device = "cpu" if on_cpu() else "gpu"
        self.model.compute_dtype = COMPUTE_DTYPES[training.mixed_precision]
        self.model.gradient_checkpointing = training.gradient_checkpointing
        self.optimizer = new_optimizer(training, self.model)
        self.average = WeightAverage(self.model) if training.ema_decay else None
        self._dropouts = self.model.dropout_layers()
        self._paths = [path for path, _ in tree_flatten(self.model.trainable_parameters())]
        self._differentiate = nn.value_and_grad(self.model, self._mean_loss)
        self._compute: Any = self._gradients
        self._apply: Any = self._update
        self._evaluate: Any = self._outputs
        if config.model.compile_model:
            state = [self.model.state, self.optimizer.state, mx.random.state]
            state += [self.average.arrays] if self.average else []
            self._seed_dropouts(self._keys(0, range(1)))
            self._compute = partial(mx.compile, inputs=state, outputs=state)(self._gradients)
            self._apply = partial(mx.compile, inputs=state, outputs=state)(self._update)
            self._evaluate = partial(mx.compile, inputs=[self.model.state])(self._outputs)

    # ---- training ----------------------------------------------------------------------------------------

    def train_step(self, batch: Batch, step: int, learning_rate: float, loss_scale: float = 1.0) -> Any:
        self._mode(True)
        guarded = self.config.training.mixed_precision == "fp16" or self.config.training.on_nan == "skip"
        statistics = running_statistics(self.model) if guarded else []
        loss, gradients = self._accumulate(batch, step, loss_scale)
        norm, norms = self._norms(gradients)
        loss = self.process_group.all_reduce_loss(loss)
        if guarded and not np.isfinite(_number((loss + norm).sum())):
            set_running_statistics(self.model, statistics)  # a skipped step leaves no trace
            return loss, norm, norms
        self.optimizer.prepare(step, learning_rate)
        weight = ema_weight(step, self.config.training.ema_decay or 0.0)
        self._apply(gradients, norm, mx.array(weight, mx.float32))
        averages = self.average.arrays if self.average else {}
        mx.async_eval(loss, norm, norms, self.model.parameters(), self.optimizer.state, averages)
        return loss, norm, norms

    def read(self, handle: Any) -> StepResult:
        added, norm, norms = handle
        loss, stop = distributed.read_loss(self.process_group, added)
        named = lambda: dict(zip(self._paths, norms.tolist(), strict=True))  # noqa: E731
        return step_result(loss, _number(norm), stop, named)

    def _accumulate(self, batch: Batch, step: int, loss_scale: float = 1.0) -> tuple[mx.array, Any]:
        """The mean loss of a batch and its gradients, from one micro-batch after the other."""
        if self.config.training.rng == "native":
            mx.random.seed(rng.native_seed(self.config.seed, step, self.process_group.rank))
        loss: Any = None
        gradients: Any = None
        number = self.config.training.gradient_accumulation
        for part, rows, share in micro_batches(batch, number, self.process_group.rank, self.process_group.size):
            factors = mx.array([share, loss_scale], mx.float32)
            found, parts = self._compute(self._arrays(part), self._keys(step, rows), factors)
            loss = found if loss is None else loss + found
            gradients = parts if gradients is None else tree_map(mx.add, gradients, parts)
            mx.async_eval(loss, gradients)  # before the next part is looked at: its activations can go
        return loss, self.process_group.all_reduce_gradients(gradients)

    def _norms(self, gradients: Any) -> tuple[mx.array, mx.array]:
        return self.process_group.all_reduce_norms(
            *gradient_norms([gradient for _, gradient in tree_flatten(gradients)])
        )

    def _mean_loss(self, batch: dict[str, mx.array], factor: mx.array) -> tuple[mx.array, mx.array]:
        loss, _ = ops.cross_entropy(self._outputs(batch), batch["labels"])
        return loss * factor, loss

    def _outputs(self, batch: dict[str, mx.array]) -> mx.array:
        mask = batch.get("attention_mask")
        return self.model(batch["inputs"]) if mask is None else self.model(batch["inputs"], attention_mask=mask)

    def _gradients(self, batch: dict[str, mx.array], keys: mx.array | None, factors: mx.array) -> tuple[Any, ...]:
        self._seed_dropouts(keys)
        share, scale = factors[0], factors[1]
        (_, loss), gradients = self._differentiate(batch, share * scale)
        if self.config.training.mixed_precision == "fp16":
            gradients = tree_map(lambda gradient: gradient / scale, gradients)
        return loss * share, gradients

    def _update(self, gradients: Any, norm: mx.array, weight: mx.array) -> None:
        training = self.config.training
        if training.max_grad_value is not None:
            limit = training.max_grad_value
            gradients = tree_map(lambda gradient: mx.clip(gradient, -limit, limit), gradients)
            norm, _ = self._norms(gradients)
        if training.max_grad_norm is not None:  # as torch.nn.utils.clip_grad_norm_
            factor = mx.minimum(training.max_grad_norm / (norm + 1e-6), 1.0)
            gradients = tree_map(lambda gradient: gradient * factor, gradients)
        self.optimizer.update(self.model, gradients)
        if self.average is not None:
            self.average.update(weight)

    def gradients(self, batch: Batch, step: int = 0) -> tuple[float, dict[str, np.ndarray]]:
        self._mode(True)
        with keep_running_statistics(self.model):
            loss, gradients = self._accumulate(batch, step)
        number, _ = distributed.read_loss(self.process_group, self.process_group.all_reduce_loss(loss))
        return number, self.process_group.gather_full(self._canonical(dict(tree_flatten(gradients))))

    def apply_gradients(self, gradients: dict[str, np.ndarray], step: int, learning_rate: float) -> None:
        arrays = layout.tree_to_mlx(gradients, self.model.layer_kinds())
        self.optimizer.prepare(step, learning_rate)
        self.optimizer.update(self.model, tree_unflatten([(path, mx.array(a)) for path, a in arrays.items()]))
        mx.eval(self.model.parameters(), self.optimizer.state)

    # ---- evaluation --------------------------------------------------------------------------------------

    def evaluate(self, batch: Batch) -> Evaluation:
        self._mode(False)
        with self.average.applied() if self.average else contextlib.nullcontext():
            arrays = self._arrays(self._bucketed(batch))
            logits, labels = self._evaluate(arrays), arrays["labels"]
            loss, count = ops.cross_entropy(logits, labels)
            correct = int(_number(count_correct(logits, labels))) if labels.ndim == 1 else None
            return Evaluation(_number(loss), int(_number(count)), correct)

    def forward(self, batch: Batch) -> np.ndarray:
        self._mode(False)
        outputs = np.array(self._evaluate(self._arrays(self._bucketed(batch))).astype(mx.float32))
        rows, length = batch["inputs"].shape[:2]
        return outputs[:rows, :length] if outputs.ndim == 3 else outputs[:rows]

    def _bucketed(self, batch: Batch) -> Batch:
        return buckets.pad(batch, self.config.model) if self.config.model.compile_model else batch

    def _mode(self, train: bool) -> None:
        if self.model.training != train:  # it walks all modules, half a millisecond for a small GPT
            self.model.train(train)

    # ---- state in and out --------------------------------------------------------------------------------

    def weights(self) -> dict[str, np.ndarray]:
        self.process_group.average_statistics(self.model)
        return self.process_group.gather_full(self.model.weights())

    def set_weights(self, weights: dict[str, np.ndarray]) -> None:
        self.model.set_weights(self.process_group.local_shard(weights))

    def optimizer_state(self) -> dict[str, np.ndarray]:
        arrays = {name: np.array(array) for name, array in state_arrays(self.optimizer).items()}
        averages = self._canonical(self.average.arrays) if self.average else {}
        return self.process_group.gather_full(arrays | {f"{path}.ema": array for path, array in averages.items()})

    def set_optimizer_state(self, state: dict[str, np.ndarray]) -> None:
        averages, slots = split_averages(self.process_group.local_shard(state))
        set_state_arrays(self.optimizer, {name: mx.array(array) for name, array in slots.items()})
        if self.average is not None:
            # a run that has kept no average yet begins with the weights it has
            arrays = layout.tree_to_mlx(averages, self.model.layer_kinds())
            current = dict(tree_flatten(self.model.trainable_parameters()))
            self.average.assign({path: mx.array(array) for path, array in arrays.items()} or current)
        mx.eval(self.optimizer.state)

    def _canonical(self, arrays: dict[str, mx.array]) -> dict[str, np.ndarray]:
        return layout.tree_to_torch({path: np.array(a) for path, a in arrays.items()}, self.model.layer_kinds())

    def _arrays(self, batch: Batch) -> dict[str, mx.array]:
        check_ids(batch, self.config.model.vocab_size)
        return {name: mx.array(array) for name, array in batch.items()}

    def _keys(self, step: int, rows: range) -> mx.array | None:
        """The dropout keys of some rows of a step's batch; None: the framework's own generator draws."""
        if self.config.training.rng == "native" or not self._dropouts:
            return None
        return mx.array(self.model.dropout_keys(self.config.seed, step, rows, list(self._dropouts)))

    def _seed_dropouts(self, keys: mx.array | None) -> None:
        seed_dropouts(list(self._dropouts.values()), keys)


def _number(array: mx.array) -> float:
    return float(np.array(array))
