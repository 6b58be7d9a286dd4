"""The configuration's section `training`: how weights are fitted."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from icenet.core.config.section import Section

Positive = Annotated[int, Field(ge=1)]


class ParameterGroup(Section):
    """Parameters that are fitted otherwise than the rest. What is not given is as for the rest."""

    section: ClassVar[str] = "training.parameter_groups"

    parameters: Annotated[list[str], Field(min_length=1)]
    """Names of parameters, or patterns of them: `lm_head.*`, `*.bias`. A parameter belongs to the first that fits."""
    learning_rate: Annotated[float, Field(ge=0)] | None = None
    """Their highest learning rate, in place of training.learning_rate; 0 leaves them as they are."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Their decay, of matrices and vectors alike."""


class TrainingConfig(Section):
    """How weights are fitted."""

    section: ClassVar[str] = "training"

    max_steps: Positive = 1000
    """Optimizer steps in the whole run."""
    batch_size: Positive = 16
    """Sequences or images in one step, however many micro-batches and processes share them."""
    gradient_accumulation: Positive = 1
    """Micro-batches that a process computes one after the other, to need less memory; the gradients stay the same."""
    sharded: bool = False
    """Of several processes, each keeps a part of parameters and optimizer state instead of all."""

    optimizer: Literal["adamw", "adam", "sgd", "adafactor", "lion", "muon"] = "adamw"
    """docs/training.md gives their formulas and papers."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """The highest learning rate, reached after the warm-up."""
    min_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    """The lowest learning rate after the warm-up; cosine, linear and wsd reach it at the last step."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps in which the learning rate rises linearly."""
    schedule: Literal["cosine", "linear", "constant", "step", "exponential", "inverse_sqrt", "wsd"] = "cosine"
    """How the learning rate falls after the warm-up; `icenet info CONFIG --schedule` draws it."""
    decay_every: Positive | None = None
    """Schedules step and exponential: the steps in which the rate falls by decay_factor; absent: a tenth of all."""
    decay_factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Schedules step and exponential: what the rate is multiplied by."""
    decay_steps: Annotated[int, Field(ge=0)] | None = None
    """Schedule wsd (warm-up, stable, decay): the steps of the decay, at the end; absent: a fifth of all."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Decay of matrices, of vectors only where a parameter group says so; absent: 0.1, and 0 with adam and sgd."""
    parameter_groups: list[ParameterGroup] = Field(default_factory=list)
    """Parameters with a learning rate or decay of their own."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the gradient's running mean (Adam, AdamW, Lion; Adafactor has none)."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the squared gradient's running mean (Adam, AdamW); of the momentum (Lion, whose paper has 0.99)."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment (Adam, AdamW)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of SGD and Muon; absent: 0.9 and 0.95."""
    nesterov: bool = True
    """Nesterov's momentum, of SGD and Muon."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this global norm; null: never."""
    max_grad_value: Annotated[float, Field(gt=0)] | None = None
    """Each value of a gradient is cut off here, before the norm is; null: never."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep a running mean of the weights, with this decay, and evaluate it; null: none."""

    mixed_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """The type of matrix products and activations; weights, moments, norms and the loss stay in fp32."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward pass instead of keeping them."""
    rng: Literal["keyed", "native"] = "keyed"
    """Dropout masks: the same on both backends, or each framework's own, with which curves agree only on average."""
    on_nan: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is no number ends the run, or its step is left out (ten in a row end the run)."""

    eval_every: Positive | None = 100
    """Steps between evaluations; null: never."""
    eval_batches: Positive | None = 8
    """Validation batches in one evaluation; null: all."""
    early_stopping: Positive | None = None
    """Stop after so many evaluations without a lower validation loss; null: never."""
    checkpoint_every: Positive = 100
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: Positive | None = 3
    """How many of the newest checkpoints stay; null: all."""
    keep_best: bool = False
    """Also save and keep the checkpoint of the lowest validation loss, as RUN/best."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, in RUN/tensorboard."""

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate:g} is above learning_rate {self.learning_rate:g}"
            )
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be cut into {self.gradient_accumulation} micro-batches "
                "(gradient_accumulation) of one size"
            )
        for key in ("early_stopping", "keep_best"):
            if getattr(self, key) and self.eval_every is None:
                raise ValueError(f"{key} needs evaluations; set eval_every")
        return self
