"""The PyTorch engine. The mirror is `icenet/engine/engine.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from icenet.core import engine
from icenet.core.config import Config
from icenet.core.config.custom import is_custom
from icenet.core.engine import Batch, MicroBatch, call_model
from icenet_torch import nn as ops
from icenet_torch.engine import distributed
from icenet_torch.engine.build import build_model
from icenet_torch.engine.capture import CapturedPasses
from icenet_torch.engine.ema import WeightAverage
from icenet_torch.engine.optimizers import Optimizer
from icenet_torch.nn.arrays import DTYPES, from_numpy, is_half, to_channels_first, to_numpy


class Engine(engine.Engine):
    """See `icenet.core.engine.Engine`. With `dtype` float64 it is a reference.

    With `model.compile_model` the model is compiled by `torch.compile`. On CUDA the passes are a CUDA graph.
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
        self.compiles = config.model.compile_model is True  # it starts slowly, and the graphs are fast without it
        if self.compiles:
            ops.loss.register_for_compiler()
            self._compiled_model = torch.compile(parallel)
        passes = lambda parts, factors: self._passes(parts, 1.0, factors)  # noqa: E731
        self._captured = CapturedPasses(passes, self.model) if self._can_capture() else None

    # ---- training ----------------------------------------------------------------------------------------

    def _accumulate(self, batch: Batch, step: int, loss_scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        parts: Iterable[MicroBatch] = self._micro_batches(batch, step)
        if self._captured is None or self.loss is not None:
            loss = self._passes(parts, loss_scale)
        else:
            parts = list(parts)
            factors = np.array([[part.share, part.share * loss_scale] for part in parts], np.float32)
            loss = self._captured(parts, self._to_device(factors))
        gradients = self.process_group.all_reduce_gradients(self.parameters)
        if self.config.training.mixed_precision == "fp16":
            torch._foreach_div_(list(gradients.values()), loss_scale)
        return loss, gradients

    def _passes(self, parts: Iterable[MicroBatch], loss_scale: float, factors: Tensor | None = None) -> Tensor:
        """Sets `grad` of the parameters to the gradients of micro-batches; returns the sum of their losses.

        Args:
            parts: The micro-batches.
            loss_scale: Factor of the losses in the backward pass.
            factors: Share of each micro-batch and share times `loss_scale`, `[N, 2]`, for passes that are captured.
        """
        self.optimizer.zero_grad()
        total = torch.zeros((), dtype=self.dtype, device=self.device)
        for index, part in enumerate(parts):
            with self.process_group.accumulating(last=part.is_last):
                share, scale = (part.share, part.share * loss_scale) if factors is None else factors[index]
                self._seed_dropouts(part.dropout_keys)
                loss = self._training_loss(part.arrays)
                if not loss.requires_grad:
                    raise self._detached_logits()
                (loss * scale).backward()
                total = total + loss.detach() * share
        return total

    def _can_capture(self) -> bool:
        """Returns whether the passes depend on nothing but the batch and the arrays of the model."""
        training, model = self.config.training, self.config.model
        return (
            self.device.startswith("cuda")
            and self.process_group.size == 1
            and not is_custom(model.type)
            and not getattr(model, "num_experts", None)
            and training.rng == "keyed"
            and not training.gradient_checkpointing
        )

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

    def _submit(self, *results: Tensor) -> Any:
        """Copies the results to the host without waiting: `item` would wait for all later steps as well."""
        if not results or not self.device.startswith("cuda"):
            return results
        loss, norm, norms = results
        parts = [loss.reshape(-1), norm.reshape(1), norms]
        packed = torch.cat(parts)  # the memory of a captured loss is that of the next one
        values = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        values.copy_(packed, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return done, values.split([len(part) for part in parts]), loss.shape

    def _wait(self, handle: Any) -> tuple[Tensor, Tensor, Tensor]:
        if not isinstance(handle[0], torch.cuda.Event):
            return handle  # type: ignore[no-any-return]
        done, (loss, norm, norms), shape = handle
        done.synchronize()
        return loss.reshape(shape), norm, norms

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

    def _normalize(self, pixels: Tensor, scale: np.ndarray, shift: np.ndarray) -> Tensor:
        # Through pinned memory. Another copy waits for the step before: 4 to 5 of the 12 ms of a step of the compiled
        # ResNet-50 on an H200, in which the host cannot describe the next one.
        factor, offset = (self._to_device(array).float()[:, None, None] for array in (scale, shift))
        return (pixels.float() * factor - offset).to(self.dtype)

    def _to_full_precision(self, array: Tensor) -> Tensor:
        return array.float() if is_half(array) else array

    def _to_float_numpy(self, array: Tensor) -> np.ndarray:
        return to_numpy(self._to_full_precision(array)).copy()
