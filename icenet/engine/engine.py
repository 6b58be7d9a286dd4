"""The MLX engine. The mirror is `icenet_torch/engine/engine.py`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from icenet import nn as ops
from icenet.core import engine
from icenet.core.config import Config
from icenet.core.config.custom import is_custom
from icenet.core.engine import Batch, call_model
from icenet.core.errors import BackendError
from icenet.core.weights import layout
from icenet.engine import distributed
from icenet.engine.build import build_model
from icenet.engine.compiled import Compiled
from icenet.engine.ema import WeightAverage
from icenet.engine.optimizers import Optimizer
from icenet.nn import tree
from icenet.nn.arrays import DTYPES, from_numpy, is_half, to_numpy


class Engine(engine.Engine):
    """See `icenet.core.engine.Engine`. If `compiles`, the passes and the update are compiled functions.

    A compiled function captures the arrays of model, optimizer and average as its inputs and outputs, so that these
    must keep their containers.

    Raises:
        BackendError: `dtype` is not float32; some functions of MLX are not exact in float64.
    """

    backend: ClassVar = "mlx"
    detaches: ClassVar = "mx.stop_gradient()"
    nn: ClassVar = ops
    # MLX collects kernels in CUDA graphs. To make or update a graph, and to start it, takes the host longer than to
    # start the kernels one by one: on an H200 a step of ResNet-50 took 70 ms, and 39 without graphs. Memory is freed
    # after so many operations only, then; with MLX's 100 the peak was 8.7 GB instead of 5.1.
    environment: ClassVar = {"MLX_USE_CUDA_GRAPHS": "0", "MLX_MAX_OPS_PER_BUFFER": "50"}
    optimizer: Optimizer

    def __init__(self, config: Config, device: str = "auto", dtype: str = "float32") -> None:
        if dtype != "float32":
            raise BackendError(f"MLX cannot be a {dtype} reference: it computes some functions in float32")
        self.prepare_process()
        super().__init__(config, distributed.join(device))
        training = config.training
        model = build_model(config, distributed.local_device(device), seed=config.seed)
        self._set_model(model, DTYPES[training.mixed_precision])
        self.device = "cpu" if model.device == mx.Device(mx.cpu) else "gpu"
        self.optimizer = Optimizer(training, self.model)
        self.average = WeightAverage(self.model, training.ema_decay) if training.ema_decay else None
        self._parameters = tree.Arrays(self.model)
        self._trainable = list(self._parameters.get())
        self._value_and_grad = mx.value_and_grad(self._scaled_loss)
        self._compiled_gradients: Any = self._gradients
        self._compiled_update: Any = self._update_arrays
        self._compiled_outputs: Any = self._outputs
        self.compiles = config.model.compile_model is True
        if config.model.compile_model is None:  # custom models may compute what cannot be compiled
            # on CUDA, compiling the kernels of a step takes a minute or more in a new installation
            self.compiles = self.device == "gpu" and not mx.cuda.is_available() and not is_custom(config.model.type)
        if self.compiles:
            state = [self.model.state, self.optimizer.state, mx.random.state]
            state += [self.average.arrays] if self.average else []
            self.seed_dropouts(0, range(1))
            self._compiled_gradients = Compiled(self._gradients, inputs=state, outputs=state)
            self._compiled_update = partial(mx.compile, inputs=state, outputs=state)(self._update_arrays)
            self._compiled_outputs = Compiled(self._outputs, inputs=[self.model.state])

    @classmethod
    def prepare_process(cls) -> None:
        if mx.cuda.is_available():  # Metal reads one of the variables, too
            super().prepare_process()

    # ---- training ----------------------------------------------------------------------------------------

    def _accumulate(self, batch: Batch, step: int, loss_scale: float = 1.0) -> tuple[mx.array, dict[str, mx.array]]:
        loss: Any = None
        gradients: Any = None
        for part in self._micro_batches(batch, step):
            scales = mx.array([part.share, loss_scale], mx.float32)
            part_loss, part_gradients = self._compiled_gradients(part.arrays, part.dropout_keys, scales)
            loss = part_loss if loss is None else loss + part_loss
            gradients = part_gradients if gradients is None else tree_map(mx.add, gradients, part_gradients)
            mx.async_eval(loss, gradients)  # frees the activations before the next micro-batch
        return loss, self.process_group.all_reduce_gradients(gradients)

    def _gradients(
        self, arrays: dict[str, mx.array], dropout_keys: mx.array | None, scales: mx.array
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """Returns the loss and the gradients of a micro-batch, multiplied by its share, which is `scales[0]`.

        `scales[1]` is the loss scale. Both are arrays, because a compiled function is traced again for each number.
        """
        self._seed_dropouts(dropout_keys)
        share, loss_scale = scales[0], scales[1]
        parameters = self._parameters.get()
        (_, loss), gradients = self._value_and_grad(parameters, arrays, share * loss_scale)
        self._parameters.set(parameters)
        if self.config.training.mixed_precision == "fp16":
            gradients = {path: gradient / loss_scale for path, gradient in gradients.items()}
        return loss * share, gradients

    def _scaled_loss(
        self, parameters: dict[str, mx.array], arrays: dict[str, mx.array], scale: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Returns the scaled and the unscaled loss as a function of the parameters, which are set for that.

        A parameter that the model shares is set at all of its places, so its gradient is the sum over them.
        """
        self._parameters.set(parameters)
        loss = self._training_loss(arrays)
        return loss * scale, loss

    def _outputs(self, arrays: Mapping[str, mx.array], as_loss: bool = False) -> mx.array:
        return call_model(self.model, arrays, self._num_classes, as_loss)

    def _update(self, gradients: dict[str, mx.array], norm: mx.array, average_weight: float) -> None:
        self._compiled_update(gradients, norm, mx.array(average_weight, mx.float32))

    def _update_arrays(self, gradients: dict[str, mx.array], norm: mx.array, average_weight: mx.array) -> None:
        training = self.config.training
        if training.max_grad_value is not None:
            limit = training.max_grad_value
            gradients = tree_map(lambda gradient: mx.clip(gradient, -limit, limit), gradients)
            norm, _ = self._norms(gradients)
        factor = None
        if training.max_grad_norm is not None:  # as torch.nn.utils.clip_grad_norm_
            factor = mx.minimum(training.max_grad_norm / (norm + 1e-6), 1.0)
        self.optimizer.update(gradients, factor)
        if self.average is not None:
            self.average.update(average_weight)

    def _submit(self, *results: mx.array) -> Any:
        averages = self.average.arrays if self.average else {}
        mx.async_eval(*results, self.model.parameters(), self.optimizer.state, averages)
        return results

    def _seed_generator(self, seed: int) -> None:
        mx.random.seed(seed)

    # ---- evaluation and arrays ---------------------------------------------------------------------------

    def _predict(self, arrays: Mapping[str, mx.array], as_loss: bool = False) -> mx.array:
        return self._compiled_outputs(arrays, as_loss)

    def _to_canonical(self, arrays: Mapping[str, mx.array]) -> dict[str, np.ndarray]:
        return layout.tree_to_torch({path: to_numpy(a) for path, a in arrays.items()}, self.model.layer_kinds())

    def _from_canonical(self, arrays: Mapping[str, np.ndarray]) -> dict[str, mx.array]:
        own = layout.tree_to_mlx(arrays, self.model.layer_kinds())
        return {path: from_numpy(array) for path, array in own.items()}

    def _to_device(self, array: np.ndarray) -> mx.array:
        moved = mx.array(array)
        is_image = array.ndim == 4 and array.dtype == np.float32
        if is_image and self.device == "gpu" and self.loss is None and not is_custom(self.config.model.type):
            moved = moved.astype(self.model.compute_dtype)  # as the model would do; see _normalize
            mx.async_eval(moved)
        return moved

    def _normalize(self, pixels: mx.array, scale: np.ndarray, shift: np.ndarray) -> mx.array:
        images = pixels.astype(mx.float32) * mx.array(scale) - mx.array(shift)
        # On CUDA the first kernel that reads an array of the host copies its pages: here while Python describes the
        # step. On an H200, 38 MB took 13 ms, bytes a fifth. A stream of its own for it made no difference.
        mx.async_eval(images)
        return images

    def _to_full_precision(self, array: mx.array) -> mx.array:
        return array.astype(mx.float32) if is_half(array) else array

    def _to_float_numpy(self, array: mx.array) -> np.ndarray:
        return to_numpy(self._to_full_precision(array))
