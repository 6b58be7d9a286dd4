"""The MLX engine: one model and its optimizer, numpy in and out. The mirror is `icenet_torch/engine.py`."""

from __future__ import annotations

from functools import partial
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from icenet import nn as ops
from icenet.core import buckets, layout
from icenet.core.backend import Batch, Evaluation, StepResult, check_ids, new_model
from icenet.core.config import Config
from icenet.core.errors import BackendError
from icenet.models import MODELS, BaseModel
from icenet.optimizers import OPTIMIZERS, set_state_arrays, state_arrays

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


def build_model(config: Config, device: str = "auto", initialise: bool = True) -> BaseModel:
    """A model on a device, with its initial weights or, for weights to be loaded, with none drawn."""
    mx.set_default_device(choose_device(device))
    return new_model(config.model, MODELS, "mlx", config.seed if initialise else None)


def outline(config: Config) -> BaseModel:
    """A model that knows its shapes and holds no values, whatever its size: MLX's arrays are lazy."""
    return new_model(config.model, MODELS, "mlx", None)


class Engine:
    """See `icenet.core.backend.Engine` for what each method takes and gives."""

    backend = "mlx"

    def __init__(self, config: Config, device: str = "auto", dtype: str = "float32") -> None:
        if dtype != "float32":
            raise BackendError(f"MLX is no {dtype} reference: some of its functions are computed in fp32")
        self.config = config
        training = config.training
        self.model = build_model(config, device)
        self.device = "cpu" if ops.on_cpu() else "gpu"
        self.model.compute_dtype = COMPUTE_DTYPES[training.mixed_precision]
        self.model.gradient_checkpointing = training.gradient_checkpointing
        self.optimizer = OPTIMIZERS[training.optimizer](training)
        self.optimizer.init(self.model.trainable_parameters())
        self.optimizer.prepare(0, training.learning_rate)
        self._differentiate = nn.value_and_grad(self.model, self._mean_loss)
        self._compute: Any = self._gradients
        self._apply: Any = self._update
        self._evaluate: Any = self._outputs
        if config.model.compile_model:
            state = [self.model.state, self.optimizer.state]
            self.model.seed_dropout(self._keys(0))
            self._compute = partial(mx.compile, inputs=state, outputs=state)(self._gradients)
            self._apply = partial(mx.compile, inputs=state, outputs=state)(self._update)
            self._evaluate = partial(mx.compile, inputs=[self.model.state])(self._outputs)

    # ---- training ----------------------------------------------------------------------------------------

    def train_step(self, batch: Batch, step: int, learning_rate: float, loss_scale: float = 1.0) -> Any:
        self.model.train()
        arrays, keys = self._arrays(batch), self._keys(step)
        statistics = ops.statistics(self.model)
        loss, norm, gradients = self._compute(arrays, keys, mx.array(loss_scale, mx.float32))
        if self.config.training.mixed_precision == "fp16" and not np.isfinite(_number(norm)):
            ops.set_statistics(self.model, statistics)  # a skipped step leaves no trace
            return loss, norm
        self.optimizer.prepare(step, learning_rate)
        self._apply(gradients, norm)
        mx.async_eval(loss, norm, self.model.parameters(), self.optimizer.state)
        return loss, norm

    def read(self, handle: Any) -> StepResult:
        loss, norm = _number(handle[0]), _number(handle[1])
        return StepResult(loss, norm, bool(np.isfinite(norm)))

    def _mean_loss(self, batch: dict[str, mx.array], scale: mx.array) -> tuple[mx.array, mx.array]:
        loss, _ = ops.cross_entropy(self._outputs(batch), batch["labels"])
        return loss * scale, loss

    def _outputs(self, batch: dict[str, mx.array]) -> mx.array:
        mask = batch.get("attention_mask")
        return self.model(batch["inputs"]) if mask is None else self.model(batch["inputs"], attention_mask=mask)

    def _gradients(self, batch: dict[str, mx.array], keys: mx.array, scale: mx.array) -> tuple[Any, ...]:
        self.model.seed_dropout(keys)
        (_, loss), gradients = self._differentiate(batch, scale)
        if self.config.training.mixed_precision == "fp16":
            gradients = tree_map(lambda gradient: gradient / scale, gradients)
        norm = ops.global_norm([gradient for _, gradient in tree_flatten(gradients)])
        return loss, norm, gradients

    def _update(self, gradients: Any, norm: mx.array) -> None:
        limit = self.config.training.max_grad_norm
        if limit is not None:  # as torch.nn.utils.clip_grad_norm_
            factor = mx.minimum(limit / (norm + 1e-6), 1.0)
            gradients = tree_map(lambda gradient: gradient * factor, gradients)
        self.optimizer.update(self.model, gradients)

    def gradients(self, batch: Batch, step: int = 0) -> tuple[float, dict[str, np.ndarray]]:
        self.model.train()
        with ops.keep_statistics(self.model):
            loss, _, gradients = self._compute(self._arrays(batch), self._keys(step), mx.array(1.0))
        return _number(loss), self._canonical(dict(tree_flatten(gradients)))

    def apply_gradients(self, gradients: dict[str, np.ndarray], step: int, learning_rate: float) -> None:
        arrays = layout.tree_to_mlx(gradients, self.model.layer_kinds())
        self.optimizer.prepare(step, learning_rate)
        self.optimizer.update(self.model, tree_unflatten([(path, mx.array(a)) for path, a in arrays.items()]))
        mx.eval(self.model.parameters(), self.optimizer.state)

    # ---- evaluation --------------------------------------------------------------------------------------

    def evaluate(self, batch: Batch) -> Evaluation:
        self.model.eval()
        arrays = self._arrays(self._bucketed(batch))
        logits, labels = self._evaluate(arrays), arrays["labels"]
        loss, count = ops.cross_entropy(logits, labels)
        correct = int(_number(ops.correct(logits, labels))) if labels.ndim == 1 else None
        return Evaluation(_number(loss), int(_number(count)), correct)

    def forward(self, batch: Batch) -> np.ndarray:
        self.model.eval()
        outputs = np.array(self._evaluate(self._arrays(self._bucketed(batch))).astype(mx.float32))
        rows, length = batch["inputs"].shape[:2]
        return outputs[:rows, :length] if outputs.ndim == 3 else outputs[:rows]

    def _bucketed(self, batch: Batch) -> Batch:
        return buckets.pad(batch, self.config.model) if self.config.model.compile_model else batch

    # ---- state in and out --------------------------------------------------------------------------------

    def weights(self) -> dict[str, np.ndarray]:
        return self.model.weights()

    def set_weights(self, weights: dict[str, np.ndarray]) -> None:
        self.model.set_weights(weights)

    def optimizer_state(self) -> dict[str, np.ndarray]:
        by_slot = state_arrays(self.optimizer, self.model.trainable_paths())
        kinds = self.model.layer_kinds()
        return {name: _relay(kinds, name, np.array(array), layout.to_torch) for name, array in by_slot.items()}

    def set_optimizer_state(self, state: dict[str, np.ndarray]) -> None:
        kinds = self.model.layer_kinds()
        arrays = {name: mx.array(_relay(kinds, name, array, layout.to_mlx)) for name, array in state.items()}
        set_state_arrays(self.optimizer, arrays)
        mx.eval(self.optimizer.state)

    def _canonical(self, arrays: dict[str, mx.array]) -> dict[str, np.ndarray]:
        return layout.tree_to_torch({path: np.array(a) for path, a in arrays.items()}, self.model.layer_kinds())

    def _arrays(self, batch: Batch) -> dict[str, mx.array]:
        check_ids(batch, self.config.model.vocab_size)
        return {name: mx.array(array) for name, array in batch.items()}

    def _keys(self, step: int) -> mx.array:
        return mx.array(self.model.dropout_keys(self.config.seed, step))


def _number(array: mx.array) -> float:
    return float(np.array(array))


def _relay(kinds: dict[str, str], name: str, array: np.ndarray, direction: Any) -> np.ndarray:
    """A slot `PATH.SLOT` has its parameter's layout."""
    path = name.rpartition(".")[0]
    return direction(layout.parameter_kind(kinds, path), path.rpartition(".")[2], array)
