"""The section `training`: optimizer, schedule, precision, evaluation and checkpoints."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from icenet.core.config import custom
from icenet.core.config.section import Section
from icenet.core.dtypes import FloatDtype

Positive = Annotated[int, Field(ge=1)]


class ParameterGroup(Section):
    """Parameters with their own learning rate or weight decay; null takes the value of all other parameters."""

    section: ClassVar[str] = "training.parameter_groups"

    parameters: Annotated[list[str], Field(min_length=1)]
    """Names or patterns: `lm_head.*`, `*.bias`. A parameter belongs to the first group with a matching pattern."""
    learning_rate: Annotated[float, Field(ge=0)] | None = None
    """Peak learning rate, instead of training.learning_rate; 0 freezes the parameters."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay, of matrices and vectors."""


class TrainingConfig(Section):
    """Settings of training."""

    section: ClassVar[str] = "training"

    max_steps: Positive = 1000
    """Number of optimizer steps of the run."""
    batch_size: Positive = 16
    """Sequences or images per step, summed over all micro-batches and processes."""
    gradient_accumulation: Positive = 1
    """Number of micro-batches that a process computes one after the other to save memory; same gradients."""
    sharded: bool = False
    """Shard parameters, gradients and optimizer state over the processes."""
    init_from: Annotated[str, Field(min_length=1)] | None = None
    """Initial weights of a new run: a folder of a model, a run or a checkpoint; null: drawn from seed."""
    new_head: bool = False
    """New initial values for the output layer of a classifier of images instead of those of init_from."""

    loss: Annotated[str, Field(pattern=rf"^cross_entropy$|{custom.PATTERN}")] = "cross_entropy"
    """cross_entropy, or a function in a file: my_loss.py:my_loss (output, batch) -> mean loss."""
    optimizer: Literal["adamw", "adam", "sgd", "adafactor", "lion", "muon"] = "adamw"
    """Optimizer; docs/optimizers.md has the formulas and papers."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """Peak learning rate, reached at the end of the warmup."""
    min_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    """Lowest learning rate after the warmup; cosine, linear and wsd reach it at the end of the schedule."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Number of steps in which the learning rate rises linearly."""
    schedule: Literal["cosine", "linear", "constant", "step", "exponential", "inverse_sqrt", "wsd"] = "cosine"
    """Learning rate schedule after the warmup; `icenet info CONFIG --schedule` draws it."""
    schedule_steps: Positive | None = None
    """Number of steps of the schedule, after which the learning rate stays as it is; null: max_steps."""
    decay_every: Positive | None = None
    """Schedules step and exponential: steps per decay by decay_factor; null: a tenth of the schedule."""
    decay_factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Schedules step and exponential: factor of each decay."""
    decay_steps: Annotated[int, Field(ge=0)] | None = None
    """Schedule wsd (warmup, stable, decay): number of decay steps at the end; null: a fifth of the schedule."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay of matrices (of vectors: see parameter_groups); null: 0.1, and 0 for adam and sgd."""
    parameter_groups: list[ParameterGroup] = Field(default_factory=list)
    """Parameters with their own learning rate or weight decay."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay rate of the first moment (Adam, AdamW), or interpolation of the update (Lion)."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay rate of the second moment (Adam, AdamW), or of the momentum (Lion; its paper has 0.99)."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the square root of the second moment (Adam, AdamW)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Momentum of SGD and Muon; null: 0.9 for SGD and 0.95 for Muon."""
    nesterov: bool = True
    """Nesterov momentum of SGD and Muon."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip gradients to this global norm; null: no clipping."""
    max_grad_value: Annotated[float, Field(gt=0)] | None = None
    """Clip each value of a gradient to this magnitude, before the norm; null: no clipping."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of the weights with this decay, and evaluate it; null: none."""

    mixed_precision: FloatDtype = "fp32"
    """Dtype of matrix products and activations; weights, moments, norms and the loss stay in fp32."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward pass instead of keeping them."""
    rng: Literal["keyed", "native"] = "keyed"
    """Dropout masks: keyed are the same on both backends; with native ones, loss curves agree only on average."""
    on_nan: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop the run, or skip the step (ten in a row stop the run)."""

    eval_every: Positive | None = 100
    """Steps between evaluations; null: never."""
    eval_batches: Positive | None = 8
    """Validation batches in one evaluation; null: all."""
    early_stopping: Positive | None = None
    """Stop after this number of evaluations without a lower validation loss; null: never."""
    checkpoint_every: Positive = 100
    """Steps between checkpoints; there is always one of the last step."""
    keep_checkpoints: Positive | None = 3
    """Number of newest checkpoints to keep; null: all."""
    keep_best: bool = False
    """Also save and keep the checkpoint of the lowest validation loss, with the link RUN/best."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, to RUN/tensorboard."""

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate:g} is above learning_rate {self.learning_rate:g}"
            )
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be split into {self.gradient_accumulation} micro-batches "
                "(gradient_accumulation) of equal size"
            )
        if self.schedule_steps is not None and self.schedule in ("constant", "inverse_sqrt"):
            raise ValueError(f"schedule_steps has no effect on schedule {self.schedule}, which has no end; remove it")
        for key in ("early_stopping", "keep_best"):
            if getattr(self, key) and self.eval_every is None:
                raise ValueError(f"{key} needs evaluations; set eval_every")
        return self
