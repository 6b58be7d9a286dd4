"""The PyTorch engine. The mirror is `icenet/engine/engine.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from icenet.core import engine
from icenet.core.config import Config
from icenet.core.engine import Batch, MicroBatch, call_model
from icenet_torch import nn as ops
from icenet_torch.engine import distributed
from icenet_torch.engine.build import build_model
from icenet_torch.engine.ema import WeightAverage
from icenet_torch.engine.optimizers import Optimizer
from icenet_torch.nn.arrays import DTYPES, from_numpy, is_half, to_channels_first, to_numpy


class Engine(engine.Engine):
    """See `icenet.core.engine.Engine`. With `dtype` float64 it is a reference.

    With `model.compile_model` the model is compiled by `torch.compile`.
    """

    backend: ClassVar = "torch"
    detaches: ClassVar = "detach(), torch.no_grad()"
    nn: ClassVar = ops
    optimizer: Optimizer
    process_group: distributed.ProcessGroup

    def __init__(self, config: Config, device: str = "auto", dtype: str = "float32") -> None:
        super().__init__(config, distributed.join(device))
        training = config.training
        self.dtype = getattr(torch, dtype)
        model = build_model(config, distributed.local_device(device), seed=config.seed).to(self.dtype)
        is_reference = self.dtype == torch.float64
        self._set_model(model, self.dtype if is_reference else DTYPES[training.mixed_precision])
        self.device = str(self.model.device)
        local = self.process_group.local_parameters(self.model)
        self.optimizer = Optimizer(training, local)
        self.parameters = self.optimizer.parameters
        self._trainable = list(self.parameters)
        in_place = local is not self.model
        self.average = WeightAverage(local, training.ema_decay, in_place) if training.ema_decay else None
        parallel = self.process_group.parallel(self.model)
        self._compiled_model: Any = parallel
        if config.model.compile_model:
            ops.loss.register_for_compiler()
            self._compiled_model = torch.compile(parallel)

    # ---- training ----------------------------------------------------------------------------------------

    def _accumulate(self, batch: Batch, step: int, loss_scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        self.optimizer.zero_grad()
        loss = torch.zeros((), dtype=self.dtype, device=self.device)
        for part in self._micro_batches(batch, step):
            with self.process_group.accumulating(last=part.is_last):
                loss = loss + self._backward(part, loss_scale)
        gradients = self.process_group.all_reduce_gradients(self.parameters)
        if self.config.training.mixed_precision == "fp16":
            torch._foreach_div_(list(gradients.values()), loss_scale)
        return loss, gradients

    def _backward(self, part: MicroBatch, loss_scale: float) -> Tensor:
        """Adds the gradients of a micro-batch to `grad` of the parameters; returns its loss times its share."""
        self._seed_dropouts(part.dropout_keys)
        loss = self._training_loss(part.arrays)
        if not loss.requires_grad:
            raise self._detached_logits()
        (loss * (part.share * loss_scale)).backward()
        return loss.detach() * part.share

    def _outputs(self, arrays: Mapping[str, Tensor], as_loss: bool = False) -> Tensor:
        return call_model(self._compiled_model, arrays, self._num_classes, as_loss)

    def _update(self, gradients: dict[str, Tensor], norm: Tensor, average_weight: float) -> None:
        training = self.config.training
        for path, parameter in self.parameters.items():  # the functions that clip read it there
            parameter.grad = gradients[path]
        if training.max_grad_value is not None:
            torch.nn.utils.clip_grad_value_(self.parameters.values(), training.max_grad_value)
            norm, _ = self._norms(gradients)
        if training.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), training.max_grad_norm, norm)
        self.optimizer.update(gradients)
        if self.average is not None:
            self.average.update(average_weight)

    def _seed_generator(self, seed: int) -> None:
        torch.manual_seed(seed)

    # ---- evaluation and arrays ---------------------------------------------------------------------------

    @torch.no_grad()
    def _predict(self, arrays: Mapping[str, Tensor], as_loss: bool = False) -> Tensor:
        return self._outputs(arrays, as_loss)

    def _to_canonical(self, arrays: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        return {path: to_numpy(tensor).copy() for path, tensor in arrays.items()}

    def _from_canonical(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        return {path: from_numpy(arrays[path]).to(p) for path, p in self.parameters.items()}

    def _to_device(self, array: np.ndarray) -> Tensor:
        # dropout keys are kept as int32, because PyTorch has no arithmetic for uint32
        tensor = torch.from_numpy(array.view(np.int32) if array.dtype == np.uint32 else array)
        if self.device.startswith("cuda"):  # pinned memory: the host does not wait for earlier steps
            tensor = tensor.pin_memory().to(self.device, non_blocking=True)
        else:
            tensor = tensor.to(self.device)
        tensor = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        return to_channels_first(tensor) if tensor.ndim == 4 else tensor

    def _to_full_precision(self, array: Tensor) -> Tensor:
        return array.float() if is_half(array) else array

    def _to_float_numpy(self, array: Tensor) -> np.ndarray:
        return to_numpy(self._to_full_precision(array)).copy()
