"""Keys of a configuration that have no effect on its run, for notices at the start of training.

A key is reported if the user wrote it. Keys with default values in a file that contains every key, such as the
config.yaml of a run, do not count as written. A combination that contradicts itself is an error instead, here or when
the configuration is read. docs/configuration.md lists the keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from icenet.core.config import FAMILIES, Config, CustomConfig, GenerationConfig, ModelConfig, TrainingConfig, custom
from icenet.core.config.written import is_written
from icenet.core.data.datasets import Dataset
from icenet.core.data.images.dataset import ImageDataset
from icenet.core.engine import parameter_groups
from icenet.core.errors import ConfigError
from icenet.core.training.schedule import learning_rate, length

Reasons = Iterator[tuple[str, str]]
"""Keys with the reason why they have no effect."""

_OPTIMIZERS: Mapping[str, Sequence[str]] = {
    "beta1": ("adamw", "adam", "lion", "muon"),
    "beta2": ("adamw", "adam", "lion", "muon"),
    "eps": ("adamw", "adam", "muon"),
    "momentum": ("sgd", "muon"),
    "nesterov": ("sgd", "muon"),
}
"""The optimizers that read a key. Muon updates vectors and embeddings as AdamW."""
_SCHEDULES: Mapping[str, Sequence[str]] = {
    "decay_every": ("step", "exponential"),
    "decay_factor": ("step", "exponential"),
    "decay_steps": ("wsd",),
    "min_learning_rate": ("cosine", "linear", "step", "exponential", "inverse_sqrt", "wsd"),
}
"""The schedules that read a key."""


@dataclass(frozen=True)
class Circumstances:
    """What decides the effect of keys but is not in the configuration.

    Attributes:
        backend, device: Where the run is computed.
        tf32: `on` or `off`.
        num_processes: Number of processes.
        parameters: Settings of each trainable parameter, by path.
    """

    backend: str
    device: str
    tf32: str
    num_processes: int
    parameters: Mapping[str, parameter_groups.Group]


def notices(config: Config, dataset: Dataset, circumstances: Circumstances) -> list[str]:
    """Returns one line for each reason why keys that the user wrote have no effect.

    Raises:
        ConfigError: `training.early_stopping` or `training.keep_best` is set, and there is no validation data.
    """
    has_validation = next(iter(dataset.validation_batches(1, 1)), None) is not None
    if not has_validation:
        _check_needs_validation(config.training, dataset)
    found: dict[str, list[str]] = {}
    for key, reason in (
        *_of_run(config, circumstances),
        *_of_images(dataset),
        *_of_port(config.model),
        *_of_training(config.training, config.model),
        *_of_groups(config.training, circumstances.parameters),
        *(_without_validation(config.training, dataset) if not has_validation else ()),
        *of_generation(config.generation, config.model),
    ):
        if is_written(config, key) and not any(key in keys for keys in found.values()):
            found.setdefault(reason, []).append(key)
    return [*_of_lengths(config.training), *(f"no effect: {', '.join(keys)}: {why}" for why, keys in found.items())]


def _of_lengths(training: TrainingConfig) -> Iterator[str]:
    """Yields notices about parts of the schedule that are longer than the run."""
    warmup, steps = training.warmup_steps, length(training)
    if warmup > training.max_steps:
        highest = f"a learning rate of {learning_rate(training.max_steps - 1, training):.3g}"
        yield f"training.warmup_steps: the run ends within its {warmup:,} warmup steps, at {highest}"
    elif training.schedule == "wsd" and (training.decay_steps or 0) > steps - warmup:
        yield (
            f"training.decay_steps: {steps - warmup:,} instead of {training.decay_steps:,}, because the schedule has "
            "no more steps after the warmup"
        )


def _check_needs_validation(training: TrainingConfig, dataset: Dataset) -> None:
    for key in ("early_stopping", "keep_best"):
        if getattr(training, key):
            off = "null" if key == "early_stopping" else "false"
            raise ConfigError(
                f"training.{key}: needs validation data, and {dataset.description} has none with "
                f"data.validation_fraction 0; raise that, or set training.{key}={off}"
            )


def _without_validation(training: TrainingConfig, dataset: Dataset) -> Reasons:
    for key in ("eval_every", "eval_batches") if training.eval_every is not None else ("eval_batches",):
        yield f"training.{key}", f"{dataset.description} has no validation data (data.validation_fraction is 0)"


def _of_run(config: Config, circumstances: Circumstances) -> Reasons:
    place = f"{circumstances.backend} on {circumstances.device}"
    if config.allow_tf32 and circumstances.tf32 == "off":
        yield "allow_tf32", f"{place} computes fp32 products in fp32"
    if circumstances.backend != "mlx" or "cpu" not in circumstances.device.lower():
        yield "blas", f"it is the library of MLX on a CPU, and this is {place}"
    if config.training.sharded and circumstances.num_processes == 1:
        yield "training.sharded", "there is only one process (mlx.launch or torchrun starts several)"


def _of_images(dataset: Dataset) -> Reasons:
    if not isinstance(dataset, ImageDataset):
        return
    if dataset.source.held_out:
        yield "data.validation_fraction", f"{dataset.description} has a validation set of its own"
    if dataset.source.is_transparent is False:
        yield "data.background", f"{dataset.description} has no transparent images"


def _of_port(model: ModelConfig) -> Reasons:
    if not isinstance(model, CustomConfig) or model.port is None:
        return
    known = {name for family in FAMILIES.values() for name in family.model_fields}  # IceNet may read these
    others = [key for key in model.model_extra or {} if key not in known]
    for key in (*model.without_effect_on_ports, *others):
        yield f"model.{key}", "a port has the sizes and layers of its PyTorch module, which gets no options"


def _of_training(training: TrainingConfig, model: ModelConfig) -> Reasons:
    if training.init_from is None:
        yield "training.new_head", "training.init_from is null: all initial values are new"
    for key, optimizers in _OPTIMIZERS.items():
        if training.optimizer not in optimizers:
            yield f"training.{key}", f"training.optimizer {training.optimizer} does not use it"
    if parameter_groups.momentum(training) == 0:
        yield "training.nesterov", "training.momentum is 0"
    if training.warmup_steps >= training.max_steps:
        for key in ("schedule", "schedule_steps", *_SCHEDULES):
            yield f"training.{key}", f"the run ends within its {training.warmup_steps:,} warmup steps"
    for key, schedules in _SCHEDULES.items():
        if training.schedule not in schedules:
            yield f"training.{key}", f"training.schedule {training.schedule} does not use it"
    steps = (training.schedule_steps or training.max_steps) - training.warmup_steps
    if training.schedule == "step" and training.decay_every is not None and training.decay_every >= steps:
        for key in ("decay_every", "decay_factor"):
            yield f"training.{key}", f"the schedule ends before the first decay, after {steps:,} steps"
    if training.eval_every is None:
        yield "training.eval_batches", "training.eval_every is null: there are no evaluations"
    elif training.early_stopping:
        evaluations = -(-training.max_steps // training.eval_every)
        if training.early_stopping >= evaluations:
            yield "training.early_stopping", f"the run has only {evaluations} evaluations (training.eval_every)"
    is_regular = not isinstance(model, CustomConfig)
    if is_regular and model.dropout == 0:
        yield "training.rng", "the model has no dropout (model.dropout is 0)"
    if is_regular and model.type in ("lstm", "gru", "rnn") and model.num_layers == 1:
        for key in ("model.dropout", "training.rng"):
            yield key, "dropout is between recurrent layers, and model.num_layers is 1"


def _of_groups(training: TrainingConfig, parameters: Mapping[str, parameter_groups.Group]) -> Reasons:
    owners = {path: parameter_groups.index_of(training, path) for path in parameters}
    for index, group in enumerate(training.parameter_groups):
        key = f"training.parameter_groups.{index}"
        if group.learning_rate is None and group.weight_decay is None:
            yield f"{key}.parameters", "the group sets neither learning_rate nor weight_decay"
        if group.learning_rate == 0:
            yield f"{key}.weight_decay", "learning_rate 0 freezes the parameters of the group"
        own = [path for path, owner in owners.items() if owner == index]
        unused = [pattern for pattern in group.parameters if not parameter_groups.matching([pattern], own)]
        if unused:
            yield f"{key}.parameters", f"what {', '.join(unused)} matches belongs to earlier groups"
    if training.optimizer == "muon" and all(group.method != "muon" for group in parameters.values()):
        for key in ("optimizer", "momentum", "nesterov"):
            yield f"training.{key}", "the model has no hidden matrix for muon: adamw updates all parameters"


def of_generation(generation: GenerationConfig, model: ModelConfig) -> Reasons:
    """Yields the keys of `generation` that have no effect with these settings, and the reason."""
    causes = [
        (model.input_kind == "images", f"a model of type {model.type} does not generate text"),
        (not getattr(model, "causal", True), "a model with model.causal false does not generate text"),
        (getattr(model, "bidirectional", False), "a bidirectional model does not generate text"),
    ]
    for applies, reason in causes:
        if applies:
            yield from ((f"generation.{key}", reason) for key in GenerationConfig.model_fields)
    if generation.temperature == 0:
        for key in ("top_k", "top_p", "min_p", "seed"):
            yield f"generation.{key}", "generation.temperature is 0: always the most likely token"
    if generation.ignore_eos:
        yield "generation.eos_token_id", "generation.ignore_eos is true: texts continue after these tokens"
    if generation.max_new_tokens is not None:
        yield "generation.max_length", "generation.max_new_tokens is set"
    if not custom.is_custom(model.type) and not hasattr(model, "max_seq_length"):
        yield "generation.overflow", f"a model of type {model.type} reads texts of any length"
