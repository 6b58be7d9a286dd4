"""The PyTorch engine: one model and its optimizer, numpy in and out. The mirror is `icenet/engine/engine.py`."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import numpy as np
import torch

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
from icenet_torch import nn as ops
from icenet_torch.engine import distributed
from icenet_torch.engine.ema import WeightAverage
from icenet_torch.engine.optimizers import new_optimizer, set_state_arrays, state_arrays
from icenet_torch.models import MODELS, BaseModel
from icenet_torch.nn.arrays import from_numpy, is_half, to_channels_first
from icenet_torch.nn.dropout import seed_dropouts
from icenet_torch.nn.exact import gradient_norms
from icenet_torch.nn.loss import count_correct
from icenet_torch.nn.norm import keep_running_statistics, running_statistics, set_running_statistics

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """auto: MPS, else CUDA, else the CPU."""
    if os.environ.get("MLX_ENABLE_TF32") == "0":  # see icenet.core.backends.exact_products
        torch.backends.cudnn.allow_tf32 = False
    if name == "auto":
        if torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    asked = name
    if name == "gpu":
        name = "mps" if torch.backends.mps.is_available() else "cuda"
    device = torch.device(name)
    found = {
        "cpu": 1,
        "mps": int(torch.backends.mps.is_available()),
        "cuda": torch.cuda.device_count(),
    }
    if (device.index or 0) >= found[device.type]:
        raise BackendError(f"PyTorch finds no device {asked} here: say --device cpu, and see icenet doctor")
    return device


def build_model(config: Config, device: str = "auto", init_weights: bool = True) -> BaseModel:
    """A model on a device, with its initial weights or, for weights to be loaded, with none drawn."""
    chosen = choose_device(device)
    return new_model(config.model, MODELS, "torch", config.seed if init_weights else None).to(chosen)


def meta_model(config: Config) -> BaseModel:
    """A model that knows its shapes and holds no values, whatever its size."""
    with torch.device("meta"):
        return new_model(config.model, MODELS, "torch", None)


class Engine:
    """See `icenet.core.engine.Engine` for what each method takes and gives."""

    backend = "torch"

    def __init__(self, config: Config, device: str = "auto", dtype: str = "float32") -> None:
        self.dtype = getattr(torch, dtype)
        self.config = config
        training = config.training
        self.process_group = distributed.join(device)
        processes.check(training, self.process_group.size)
        self.model = build_model(config, distributed.own_device(device)).to(self.dtype)
        self.process_group.broadcast_or_shard(self.model, training.sharded)
        self.device = str(self.model.device)
        self.model.compute_dtype = COMPUTE_DTYPES[training.mixed_precision]
        if self.dtype == torch.float64:
            self.model.compute_dtype = self.dtype
        self.model.gradient_checkpointing = training.gradient_checkpointing
        fitted = self.process_group.fitted(self.model)
        self.parameters = {path: p for path, p in fitted.named_parameters() if p.requires_grad}
        self.optimizer = new_optimizer(training, fitted)
        in_place = fitted is not self.model
        self.average = WeightAverage(fitted, in_place) if training.ema_decay else None
        self._dropouts = self.model.dropout_layers()
        call = self.process_group.callable(self.model)
        self._call = torch.compile(call) if config.model.compile_model else call

    # ---- training ----------------------------------------------------------------------------------------

    def train_step(self, batch: Batch, step: int, learning_rate: float, loss_scale: float = 1.0) -> Any:
        self._mode(True)
        guarded = self.config.training.mixed_precision == "fp16" or self.config.training.on_nan == "skip"
        statistics = running_statistics(self.model) if guarded else []
        loss = self._accumulate(batch, step, loss_scale)
        norm, norms = self._norms()
        loss = self.process_group.all_reduce_loss(loss)
        if guarded and not torch.isfinite((loss + norm).sum()).item():
            set_running_statistics(self.model, statistics)  # a skipped step leaves no trace
            return loss, norm, norms
        self.optimizer.prepare(step, learning_rate)
        self._update(norm, ema_weight(step, self.config.training.ema_decay or 0.0))
        return loss, norm, norms

    def read(self, handle: Any) -> StepResult:
        added, norm, norms = handle
        loss, stop = distributed.read_loss(self.process_group, added)
        named = lambda: dict(zip(self.parameters, norms.tolist(), strict=True))  # noqa: E731
        return step_result(loss, norm.item(), stop, named)

    def _accumulate(self, batch: Batch, step: int, loss_scale: float = 1.0) -> torch.Tensor:
        """The mean loss of a batch, from one micro-batch after the other; the parameters then hold its gradients."""
        if self.config.training.rng == "native":
            torch.manual_seed(rng.native_seed(self.config.seed, step, self.process_group.rank))
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), dtype=self.dtype, device=self.device)
        number = self.config.training.gradient_accumulation
        parts = micro_batches(batch, number, self.process_group.rank, self.process_group.size)
        for index, (part, rows, share) in enumerate(parts):
            with self.process_group.accumulating(last=index + 1 == len(parts)):
                loss = loss + self._gradients(self._arrays(part), self._keys(step, rows), share, loss_scale)
        self.process_group.all_reduce_gradients(self.parameters)
        if self.config.training.mixed_precision == "fp16":
            torch._foreach_div_(self._gradient_list(), loss_scale)
        return loss

    def _mean_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return ops.cross_entropy(self._outputs(batch), batch["labels"])[0]

    def _outputs(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = batch.get("attention_mask")
        return self._call(batch["inputs"]) if mask is None else self._call(batch["inputs"], attention_mask=mask)

    def _gradients(
        self, batch: dict[str, torch.Tensor], keys: torch.Tensor | None, share: float, scale: float
    ) -> torch.Tensor:
        self._seed_dropouts(keys)
        loss = self._mean_loss(batch)
        (loss * (share * scale)).backward()
        return loss.detach() * share

    def _gradient_list(self) -> list[torch.Tensor]:
        for p in self.parameters.values():
            if p.grad is None:  # what a model of the user's own did not use has a gradient of zero, as in MLX
                p.grad = torch.zeros_like(p)
        return [p.grad for p in self.parameters.values()]

    def _norms(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.process_group.all_reduce_norms(*gradient_norms(self._gradient_list()))

    def _update(self, norm: torch.Tensor, weight: float) -> None:
        training = self.config.training
        if training.max_grad_value is not None:
            torch.nn.utils.clip_grad_value_(self.parameters.values(), training.max_grad_value)
            norm, _ = self._norms()
        if training.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), training.max_grad_norm, norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(weight)

    def gradients(self, batch: Batch, step: int = 0) -> tuple[float, dict[str, np.ndarray]]:
        self._mode(True)
        with keep_running_statistics(self.model):
            loss = self._accumulate(batch, step)
        number, _ = distributed.read_loss(self.process_group, self.process_group.all_reduce_loss(loss))
        gradients = dict(zip(self.parameters, map(_numpy, self._gradient_list()), strict=True))
        return number, self.process_group.gather_full(gradients)

    def apply_gradients(self, gradients: dict[str, np.ndarray], step: int, learning_rate: float) -> None:
        for path, p in self.parameters.items():
            p.grad = from_numpy(gradients[path]).to(p)
        self.optimizer.prepare(step, learning_rate)
        self.optimizer.step()

    # ---- evaluation --------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Evaluation:
        self._mode(False)
        with self.average.applied() if self.average else contextlib.nullcontext():
            arrays = self._arrays(self._bucketed(batch))
            logits, labels = self._outputs(arrays), arrays["labels"]
            loss, count = ops.cross_entropy(logits, labels)
            correct = int(count_correct(logits, labels).item()) if labels.ndim == 1 else None
            return Evaluation(loss.item(), int(count.item()), correct)

    @torch.no_grad()
    def forward(self, batch: Batch) -> np.ndarray:
        self._mode(False)
        found = self._outputs(self._arrays(self._bucketed(batch)))
        outputs = _numpy(found.float() if is_half(found) else found)
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
        arrays = {name: _numpy(tensor) for name, tensor in state_arrays(self.optimizer).items()}
        averages = self.average.arrays if self.average else {}
        return self.process_group.gather_full(
            arrays | {f"{path}.ema": _numpy(tensor) for path, tensor in averages.items()}
        )

    def set_optimizer_state(self, state: dict[str, np.ndarray]) -> None:
        averages, slots = split_averages(self.process_group.local_shard(state))
        set_state_arrays(self.optimizer, {name: from_numpy(array) for name, array in slots.items()})
        if self.average is not None:
            # a run that has kept no average yet begins with the weights it has
            self.average.assign({path: from_numpy(a) for path, a in averages.items()} or self.parameters)

    def _arrays(self, batch: Batch) -> dict[str, torch.Tensor]:
        check_ids(batch, self.config.model.vocab_size)
        arrays = {name: self._on_device(array) for name, array in batch.items()}
        arrays = {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in arrays.items()}
        return {name: to_channels_first(x) if x.ndim == 4 else x for name, x in arrays.items()}

    def _keys(self, step: int, rows: range) -> torch.Tensor | None:
        """The dropout keys of some rows of a step's batch; None: the framework's own generator draws."""
        if self.config.training.rng == "native" or not self._dropouts:
            return None
        keys = self.model.dropout_keys(self.config.seed, step, rows, list(self._dropouts))
        return self._on_device(keys.view(np.int32))

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self.device.startswith("cuda"):  # from pinned memory the host need not wait for the steps under way
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _seed_dropouts(self, keys: torch.Tensor | None) -> None:
        seed_dropouts(list(self._dropouts.values()), keys)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().numpy().copy()
