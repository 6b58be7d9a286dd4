"""The training engine: one model and its optimizer on one backend and device, with numpy arrays in and out."""

from __future__ import annotations

from icenet.core.engine.batches import Batch, MicroBatch, check_ids, micro_batches
from icenet.core.engine.engine import Engine
from icenet.core.engine.logits import call_model
from icenet.core.engine.results import Evaluation, StepResult, step_result

__all__ = [
    "Batch",
    "Engine",
    "Evaluation",
    "MicroBatch",
    "StepResult",
    "call_model",
    "check_ids",
    "micro_batches",
    "step_result",
]
