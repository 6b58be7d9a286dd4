"""The PyTorch engine: one model and its optimizer, numpy in and out. The mirror is `icenet/engine.py`."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from icenet.core import buckets
from icenet.core.backend import Batch, Evaluation, StepResult, check_ids, new_model
from icenet.core.config import Config
from icenet.core.errors import BackendError
from icenet_torch import nn as ops
from icenet_torch.models import MODELS, BaseModel
from icenet_torch.optimizers import OPTIMIZERS, set_state_arrays, state_arrays
from icenet_torch.state_dict import from_numpy

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """auto: MPS, else CUDA, else the CPU."""
    if os.environ.get("MLX_ENABLE_TF32") == "0":  # see icenet.core.backend.exact_products
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


def build_model(config: Config, device: str = "auto", initialise: bool = True) -> BaseModel:
    """A model on a device, with its initial weights or, for weights to be loaded, with none drawn."""
    chosen = choose_device(device)
    return new_model(config.model, MODELS, "torch", config.seed if initialise else None).to(chosen)


def outline(config: Config) -> BaseModel:
    """A model that knows its shapes and holds no values, whatever its size."""
    with torch.device("meta"):
        return new_model(config.model, MODELS, "torch", None)


class Engine:
    """See `icenet.core.backend.Engine` for what each method takes and gives."""

    backend = "torch"

    def __init__(self, config: Config, device: str = "auto", dtype: str = "float32") -> None:
        self.dtype = getattr(torch, dtype)
        self.config = config
        training = config.training
        self.model = build_model(config, device).to(self.dtype)
        self.device = str(self.model.device)
        self.model.compute_dtype = COMPUTE_DTYPES[training.mixed_precision]
        if self.dtype == torch.float64:
            self.model.compute_dtype = self.dtype
        self.model.gradient_checkpointing = training.gradient_checkpointing
        self.parameters = {path: p for path, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = OPTIMIZERS[training.optimizer](self.parameters, training)
        self._call = torch.compile(self.model) if config.model.compile_model else self.model

    # ---- training ----------------------------------------------------------------------------------------

    def train_step(self, batch: Batch, step: int, learning_rate: float, loss_scale: float = 1.0) -> Any:
        self.model.train()
        fp16 = self.config.training.mixed_precision == "fp16"
        statistics = ops.statistics(self.model) if fp16 else None
        loss, norm = self._gradients(self._arrays(batch), self._keys(step), loss_scale)
        if fp16 and not torch.isfinite(norm).item():
            ops.set_statistics(self.model, statistics)  # a skipped step leaves no trace
            return loss, norm
        self.optimizer.prepare(step, learning_rate)
        self._update(norm)
        return loss, norm

    def read(self, handle: Any) -> StepResult:
        loss, norm = handle[0].item(), handle[1].item()
        return StepResult(loss, norm, bool(np.isfinite(norm)))

    def _mean_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return ops.cross_entropy(self._outputs(batch), batch["labels"])[0]

    def _outputs(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = batch.get("attention_mask")
        return self._call(batch["inputs"]) if mask is None else self._call(batch["inputs"], attention_mask=mask)

    def _gradients(
        self, batch: dict[str, torch.Tensor], keys: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.model.seed_dropout(keys)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._mean_loss(batch)
        (loss * scale).backward()
        gradients = [p.grad for p in self.parameters.values()]
        if self.config.training.mixed_precision == "fp16":
            torch._foreach_div_(gradients, scale)
        return loss.detach(), ops.global_norm(gradients)

    def _update(self, norm: torch.Tensor) -> None:
        limit = self.config.training.max_grad_norm
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), limit, norm)
        self.optimizer.step()

    def gradients(self, batch: Batch, step: int = 0) -> tuple[float, dict[str, np.ndarray]]:
        self.model.train()
        with ops.keep_statistics(self.model):
            loss, _ = self._gradients(self._arrays(batch), self._keys(step), 1.0)
        return loss.item(), {path: _numpy(p.grad) for path, p in self.parameters.items()}

    def apply_gradients(self, gradients: dict[str, np.ndarray], step: int, learning_rate: float) -> None:
        for path, p in self.parameters.items():
            p.grad = from_numpy(gradients[path]).to(p)
        self.optimizer.prepare(step, learning_rate)
        self.optimizer.step()

    # ---- evaluation --------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Evaluation:
        self.model.eval()
        arrays = self._arrays(self._bucketed(batch))
        logits, labels = self._outputs(arrays), arrays["labels"]
        loss, count = ops.cross_entropy(logits, labels)
        correct = int(ops.correct(logits, labels).item()) if labels.ndim == 1 else None
        return Evaluation(loss.item(), int(count.item()), correct)

    @torch.no_grad()
    def forward(self, batch: Batch) -> np.ndarray:
        self.model.eval()
        found = self._outputs(self._arrays(self._bucketed(batch)))
        outputs = _numpy(found.float() if ops.is_half(found) else found)
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
        return {name: _numpy(tensor) for name, tensor in state_arrays(self.optimizer, self.parameters).items()}

    def set_optimizer_state(self, state: dict[str, np.ndarray]) -> None:
        tensors = {name: from_numpy(array) for name, array in state.items()}
        set_state_arrays(self.optimizer, self.parameters, tensors)

    def _arrays(self, batch: Batch) -> dict[str, torch.Tensor]:
        check_ids(batch, self.config.model.vocab_size)
        arrays = {name: torch.from_numpy(array).to(self.device) for name, array in batch.items()}
        arrays = {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in arrays.items()}
        return {name: ops.to_channels_first(x) if x.ndim == 4 else x for name, x in arrays.items()}

    def _keys(self, step: int) -> torch.Tensor:
        keys = self.model.dropout_keys(self.config.seed, step)
        return torch.from_numpy(keys.view(np.int32)).to(self.device)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().numpy().copy()
