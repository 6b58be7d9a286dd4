"""State dicts of torchvision's ResNets and vision transformers, which have no config: names in both directions.

Sources: `torchvision.models.resnet` and `torchvision.models.vision_transformer` of torchvision 0.28.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from icenet.core.config import CNNConfig, Config, ModelConfig, ViTConfig
from icenet.core.errors import ConfigError, MissingWeightsError, UsageError
from icenet.core.families.family import Family
from icenet.core.families.tensors import Row
from icenet.core.families.vision import cnn_options, conv_blocks, vit_options
from icenet.core.families.weights import ExportedWeights, ImportedWeights
from icenet.core.weights.convert import PICKLED
from icenet.core.weights.files import Array, StoredWeights
from icenet.core.weights.safetensors import Spec, spec_of

FORM = "torchvision"


def _resnet_rows(config: CNNConfig) -> list[Row]:
    rows = []
    for stage, place, index, count in conv_blocks(config):
        theirs, ours = f"layer{stage + 1}.{place}", f"blocks.{index}"
        for k in range(count):
            rows.append(Row(f"{theirs}.conv{k + 1}", [f"{ours}.branch.{k}.conv"]))
            rows.append(Row(f"{theirs}.bn{k + 1}", [f"{ours}.branch.{k}.norm"]))
        rows.append(Row(f"{theirs}.downsample.0", [f"{ours}.shortcut.conv"]))
        rows.append(Row(f"{theirs}.downsample.1", [f"{ours}.shortcut.norm"]))
    return rows


RESNET = Family(
    FORM,
    "ResNet",
    {
        "stem": "conv7",
        "base_channels": 64,
        "image_channels": 3,
        "classifier": "linear",
        "activation": "relu",
        "first_stage_stride": 1,
        "bottleneck_stride": "conv3",
    },
    [],
    "",
    [Row("conv1", ["stem.conv"]), Row("bn1", ["stem.norm"]), Row("fc", ["output"])],
    has_counters=True,
    section=CNNConfig,
    options=cnn_options,
    rows_of=_resnet_rows,
)

_LAYER = "encoder.layers.encoder_layer_{i}"
VIT = Family(
    FORM,
    "VisionTransformer",
    {
        "pooling": "token",
        "distillation": "none",
        "image_channels": 3,
        "attention_bias": True,
        "activation": "gelu",
        "norm_eps": 1e-6,
    },
    [],
    "",
    [
        Row("class_token", ["class_embedding"], is_array=True),
        Row("conv_proj", ["patch_embedding"]),
        Row("encoder.pos_embedding", ["position_embedding"], is_array=True),
        Row(f"{_LAYER}.ln_1", ["blocks.{i}.attention_norm"]),
        Row(
            f"{_LAYER}.self_attention.in_proj",
            [f"blocks.{{i}}.attention.{part}_proj" for part in "qkv"],
            separator="_",
        ),
        Row(f"{_LAYER}.self_attention.out_proj", ["blocks.{i}.attention.out_proj"]),
        Row(f"{_LAYER}.ln_2", ["blocks.{i}.feed_forward_norm"]),
        Row(f"{_LAYER}.mlp.0", ["blocks.{i}.feed_forward.up_proj"]),
        Row(f"{_LAYER}.mlp.3", ["blocks.{i}.feed_forward.down_proj"]),
        Row("encoder.ln", ["final_norm"]),
        Row("heads.head", ["output"]),
    ],
    section=ViTConfig,
    options=vit_options,
)

_MARKS: Mapping[type[ModelConfig], tuple[Family, tuple[str, ...]]] = {
    CNNConfig: (RESNET, ("bn1.running_var", "layer1.0.conv1.weight")),
    ViTConfig: (VIT, ("conv_proj.weight", "encoder.pos_embedding")),
}
"""The table of each class of configurations, and names that only torchvision's state dicts have."""

_OLD_NAMES = ((r"\.mlp\.linear_1\.", ".mlp.0."), (r"\.mlp\.linear_2\.", ".mlp.3."))
"""Names in published weights, which torchvision renames on loading."""


class _StateDict(StoredWeights):
    """A state dict with the names of torchvision's current classes."""

    def __init__(self, path: Path, weights: Mapping[str, Array]) -> None:
        self.path = path
        self._weights = weights
        names: dict[str, str] = {}
        for name in weights:
            new = name
            for pattern, replacement in _OLD_NAMES:
                new = re.sub(pattern, replacement, new)
            names[new] = name
        self.entries = names

    def __getitem__(self, name: str) -> Array:
        return self._weights[self.entries[name]]

    def spec(self, name: str) -> Spec:
        return spec_of(self._weights, self.entries[name])


def recognized(weights: Mapping[str, Array], config: Config, path: Path) -> ImportedWeights | None:
    """Returns the weights of a state dict of torchvision under our names; None if it is not one.

    Args:
        weights: The state dict.
        config: The configuration of the model.
        path: The file, for messages.

    Raises:
        WeightsError: Its tensors are not those of the configuration. The message lists them.
    """
    family, marks = _MARKS.get(type(config.model), (None, ()))
    if family is None or not all(mark in weights for mark in marks):
        return None
    return ImportedWeights(family, config, _StateDict(path, weights))


def exported(weights: Mapping[str, Array], config: Config) -> ExportedWeights:
    """Returns weights of ours as a state dict of torchvision.

    Raises:
        ConfigError: Torchvision's classes do not have the options of the model.
    """
    family, _ = _MARKS.get(type(config.model), (None, ()))
    if family is None:
        raise ConfigError(f"--to {FORM}: a model of type {config.model.type} has no counterpart in torchvision")
    options = family.options(config.model)
    lacking = [name for name, value in family.fixed.items() if options[name] != value]
    if family is RESNET and options["block"] not in ("basic", "bottleneck"):
        lacking.append("block")
    if family is VIT and options["head_size"] * options["num_heads"] != options["hidden_size"]:
        lacking.append("head_size")
    if family is VIT and not isinstance(options["image_size"], int):
        lacking.append("image_size")
    if lacking:
        raise ConfigError(
            f"--to {FORM}: {family.architecture} of torchvision does not have these options: "
            f"{', '.join(f'model.{name} {options[name]}' for name in lacking)}"
        )
    return ExportedWeights(family, config, weights)


def translations(config: Config | None, source: Path, destination: Path, to: str) -> dict[str, Any]:
    """Returns the arguments of `icenet.core.weights.convert.convert` that depend on torchvision's names: `to`,
    `read_as` and `write_as`.

    Raises:
        UsageError: The form is torchvision, and there is no configuration, or the destination is a folder.
        WeightsError: The form is torchvision, and there is no source.
    """
    read_as = None if config is None else partial(recognized, config=config, path=source)
    if to != FORM:
        return {"to": to, "read_as": read_as}
    if config is None and not source.exists():  # rather than of the config that would be next to it
        raise MissingWeightsError(f"{source}: no such file or folder; check the path")
    if config is None:
        raise UsageError(f"--to {FORM} needs the config of the model: give --config (in Python model=model)")
    if destination.is_dir() or not destination.suffix:
        raise UsageError(f"{destination}: the {FORM} form is one file; name it .pth or .safetensors")
    form = "torch" if destination.suffix in PICKLED else "canonical"
    return {"to": form, "read_as": read_as, "write_as": partial(exported, config=config)}
