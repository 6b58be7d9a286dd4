"""ResNet, ViT and DeiT: classifiers of images, with the names of Hugging Face.

Sources: the classes `ResNetConfig`, `ViTConfig` and `DeiTConfig` and their models `...ForImageClassification`, and
`DeiTForImageClassificationWithTeacher`, of Hugging Face's `transformers` 5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from icenet.core.config import CNNConfig, ViTConfig, cnn_plan, vit_plan
from icenet.core.errors import ConfigError
from icenet.core.families.family import Family
from icenet.core.families.keys import Activation, Dropout, Key, Only, Options, Values, shown
from icenet.core.families.tensors import Row
from icenet.core.families.transformer_keys import MAX_LAYERS, HeadSize


@dataclass(frozen=True)
class Labels:
    """The number of classes: that of `id2label`, or `num_labels`."""

    @property
    def keys(self) -> Sequence[str]:
        return ("id2label", "label2id", "num_labels")

    def read(self, values: Values) -> dict[str, Any]:
        return {"vocab_size": len(labels(values))}

    def write(self, options: Options) -> dict[str, Any]:
        return label_keys([_default_label(index) for index in range(options["vocab_size"])])


def labels(values: Values) -> list[str]:
    """Returns the names of the classes in a config.json, as the library completes them.

    Raises:
        ConfigError: `id2label` does not have one name for each class.
    """
    count = values.whole("num_labels", None, 2**24)
    names = values.get("id2label")
    if names is None:
        return [_default_label(index) for index in range(2 if count is None else count)]
    expected = [str(index) for index in range(len(names))] if isinstance(names, dict) else []
    if not expected or set(names) != set(expected) or not all(isinstance(name, str) for name in names.values()):
        raise ConfigError(f"id2label: {shown(names)} does not have a name for each class from 0")
    if count is not None and count != len(names):
        raise ConfigError(f"num_labels: {count}, but id2label has {len(names)} names")
    return [names[index] for index in expected]


def label_keys(names: Sequence[str]) -> dict[str, Any]:
    """Returns the keys of config.json for names of classes."""
    return {
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }


def _default_label(index: int) -> str:
    return f"LABEL_{index}"


# ---- ResNet -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stages:
    """Type, depths and widths of the stages. The widths are those of their outputs."""

    @property
    def keys(self) -> Sequence[str]:
        return ("layer_type", "depths", "hidden_sizes")

    def read(self, values: Values) -> dict[str, Any]:
        kind = values.get("layer_type", "bottleneck")
        if kind not in ("basic", "bottleneck"):
            raise ConfigError(f"layer_type: {shown(kind)} is not supported, only basic and bottleneck")
        depths = _sizes(values, "depths", [3, 4, 6, 3], MAX_LAYERS)
        widths = _sizes(values, "hidden_sizes", [256, 512, 1024, 2048], 2**24)
        if len(depths) != len(widths):
            raise ConfigError(
                f"depths {shown(depths)} and hidden_sizes {shown(widths)} have unequal numbers of stages"
            )
        expansion = cnn_plan.EXPANSION if kind == "bottleneck" else 1
        if any(width % expansion for width in widths):
            raise ConfigError(
                f"hidden_sizes: {shown(widths)} of bottleneck layers are not all multiples of {expansion}"
            )
        return {
            "block": kind,
            "num_layers": sum(depths),
            "stage_depths": depths,
            "stage_widths": [width // expansion for width in widths],
            "hidden_size": widths[-1],
        }

    def write(self, options: Options) -> dict[str, Any]:
        is_bottleneck = options["block"] == "bottleneck"
        expansion = cnn_plan.EXPANSION if is_bottleneck else 1
        return {
            "layer_type": "bottleneck" if is_bottleneck else "basic",
            "depths": options["stage_depths"],
            "hidden_sizes": [expansion * width for width in options["stage_widths"]],
        }


def _sizes(values: Values, key: str, default: list[int], most: int) -> list[int]:
    given = values.get(key)
    given = default if given is None else given
    if not isinstance(given, list) or not given:
        raise ConfigError(f"{key}: {shown(given)} is not a list of whole numbers")
    if any(not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most for size in given):
        raise ConfigError(f"{key}: {shown(given)} is not a list of whole numbers from 1 to {most}")
    return given


@dataclass(frozen=True)
class Choice:
    """A flag that selects one of two values of a field."""

    key: str
    name: str
    values: tuple[Any, Any]
    """Those of false, the default, and true."""

    @property
    def keys(self) -> Sequence[str]:
        return (self.key,)

    def read(self, values: Values) -> dict[str, Any]:
        return {self.name: self.values[values.flag(self.key, False)]}

    def write(self, options: Options) -> dict[str, Any]:
        return {self.key: options[self.name] == self.values[1]}


def cnn_options(config: CNNConfig) -> dict[str, Any]:
    """Returns the options of a CNN with null resolved, so that equal models have equal options."""
    values = config.model_dump(mode="python", exclude={"type", "compile_model", "num_layers"})
    values["stage_depths"], values["stage_widths"] = cnn_plan.depths(config), cnn_plan.widths(config)
    if config.block != "bottleneck":
        values["bottleneck_stride"] = "conv3"
    return values


def conv_blocks(config: CNNConfig) -> Iterator[tuple[int, int, int, int]]:
    """Yields stage, index in the stage and index in the network of each block, and its number of convolutions."""
    index = 0
    for stage, depth in enumerate(cnn_plan.depths(config)):
        for place in range(depth):
            yield stage, place, index, 3 if config.block == "bottleneck" else 2
            index += 1


def _resnet_rows(config: CNNConfig) -> list[Row]:
    rows = []
    for stage, place, index, count in conv_blocks(config):
        theirs, ours = f"resnet.encoder.stages.{stage}.layers.{place}", f"blocks.{index}"
        pairs = [(f"{theirs}.layer.{k}", f"{ours}.branch.{k}") for k in range(count)]
        for layer, own in [*pairs, (f"{theirs}.shortcut", f"{ours}.shortcut")]:
            rows += [Row(f"{layer}.convolution", [f"{own}.conv"]), Row(f"{layer}.normalization", [f"{own}.norm"])]
    return rows


RESNET = Family(
    "resnet",
    "ResNetForImageClassification",
    {"type": "cnn", "stem": "conv7", "classifier": "linear", "activation": "relu"},
    [
        Key("num_channels", "image_channels", 3),
        Key("embedding_size", "base_channels", 64),
        Stages(),
        Choice("downsample_in_first_stage", "first_stage_stride", (1, 2)),
        Choice("downsample_in_bottleneck", "bottleneck_stride", ("conv3", "conv1")),
        Only("hidden_act", "relu"),  # the library uses relu within a block, whatever the key says
        Labels(),
    ],
    "resnet.",
    [
        Row("resnet.embedder.embedder.convolution", ["stem.conv"]),
        Row("resnet.embedder.embedder.normalization", ["stem.norm"]),
        Row("classifier.1", ["output"]),
    ],
    has_counters=True,
    ignored=frozenset({"out_features", "out_indices", "stage_names"}),  # outputs of a backbone
    section=CNNConfig,
    options=cnn_options,
    rows_of=_resnet_rows,
)


# ---- ViT --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageSize:
    """A height and width: a number, or a list of two."""

    key: str
    name: str
    default: int
    is_square: bool = False
    """Whether the two must be equal."""

    @property
    def keys(self) -> Sequence[str]:
        return (self.key,)

    def read(self, values: Values) -> dict[str, Any]:
        given = values.get(self.key)
        if not isinstance(given, list) or len(given) != 2:
            size = values.whole(self.key, self.default, 2**24)
            return {self.name: self.default if size is None else size}
        if given[0] != given[1] and self.is_square:
            raise ConfigError(f"{self.key}: {shown(given)} is not supported, only squares")
        both = [Values({self.key: length}).whole(self.key, None, 2**24) for length in given]
        return {self.name: both[0] if both[0] == both[1] else both}

    def write(self, options: Options) -> dict[str, Any]:
        return {self.key: options[self.name]}


def vit_options(config: ViTConfig) -> dict[str, Any]:
    """Returns the options of a ViT with null resolved, so that equal models have equal options."""
    values = config.model_dump(mode="python", exclude={"type", "compile_model"})
    values["head_size"] = vit_plan.head_size(config)
    values["feed_forward_size"] = vit_plan.blocks(config)[0].feed_forward.inner
    return values


_VIT_LAYERS: Mapping[str, tuple[str, str]] = {
    "attention_norm": ("layernorm_before", "layernorm_before"),
    "attention.q_proj": ("attention.attention.query", "attention.q_proj"),
    "attention.k_proj": ("attention.attention.key", "attention.k_proj"),
    "attention.v_proj": ("attention.attention.value", "attention.v_proj"),
    "attention.out_proj": ("attention.output.dense", "attention.o_proj"),
    "feed_forward_norm": ("layernorm_after", "layernorm_after"),
    "feed_forward.up_proj": ("intermediate.dense", "mlp.fc1"),
    "feed_forward.down_proj": ("output.dense", "mlp.fc2"),
}
"""Names of the parts of a block: ours, those of published files, and those of the library's modules."""


def _vit_rows(prefix: str, is_published: bool = True) -> list[Row]:
    """Returns the rows of the blocks, by the names of published files, or by those of the library's modules.

    The library reads both, and writes the second ones with `save_original_format=False`.
    """
    place = f"{prefix}.encoder.layer" if is_published else f"{prefix}.layers"
    return [
        Row(f"{place}.{{i}}.{published if is_published else module}", [f"blocks.{{i}}.{ours}"])
        for ours, (published, module) in _VIT_LAYERS.items()
    ]


_WITH_TEACHER = "DeiTForImageClassificationWithTeacher"


@dataclass(frozen=True)
class Distillation:
    """Whether the distillation token has a classifier. The class of the library is the only sign of it."""

    @property
    def keys(self) -> Sequence[str]:
        return ("architectures",)

    def read(self, values: Values) -> dict[str, Any]:
        classes = values.get("architectures")
        has_classifier = isinstance(classes, list) and _WITH_TEACHER in classes
        return {"distillation": "classifier" if has_classifier else "token"}

    def write(self, options: Options) -> dict[str, Any]:
        return {"architectures": [_WITH_TEACHER]} if options["distillation"] == "classifier" else {}


_VIT_PARTS = (
    Key("hidden_size", "hidden_size", 768),
    Key("num_hidden_layers", "num_layers", 12),
    Key("num_attention_heads", "num_heads", 12),
    HeadSize(),
    Key("intermediate_size", "feed_forward_size", 3072),
    ImageSize("image_size", "image_size", 224),
    ImageSize("patch_size", "patch_size", 16, is_square=True),
    Key("num_channels", "image_channels", 3),
    Key("layer_norm_eps", "norm_eps", 1e-12),
    Key("qkv_bias", "attention_bias", True),
    Activation("hidden_act", "gelu"),
    Dropout(("hidden_dropout_prob",), 0.0),
    Labels(),
)
_VIT_IGNORED = frozenset({"encoder_stride", "pooler_act", "pooler_output_size", "attention_probs_dropout_prob"})
"""Of other tasks: the pooler and the decoder of masked images; and dropout of attention weights."""


def _vit_tables(prefix: str) -> list[Row]:
    """Returns the rows of all layers but the classifiers."""
    return [
        Row(f"{prefix}.embeddings.cls_token", ["class_embedding"], is_array=True),
        Row(f"{prefix}.embeddings.distillation_token", ["distillation_embedding"], is_array=True),
        Row(f"{prefix}.embeddings.position_embeddings", ["position_embedding"], is_array=True),
        Row(f"{prefix}.embeddings.patch_embeddings.projection", ["patch_embedding"]),
        *_vit_rows(prefix),
        Row(f"{prefix}.layernorm", ["final_norm"]),
    ]


def _deit_classifiers(config: ViTConfig) -> list[Row]:
    if config.distillation != "classifier":
        return [Row("classifier", ["output"])]
    return [Row("cls_classifier", ["output"]), Row("distillation_classifier", ["distillation_output"])]


VIT = Family(
    "vit",
    "ViTForImageClassification",
    {"type": "vit", "pooling": "token", "distillation": "none"},
    _VIT_PARTS,
    "vit.",
    [*_vit_tables("vit"), Row("classifier", ["output"])],
    unused=(r"(vit\.)?pooler\.dense\.(weight|bias)",),
    ignored=_VIT_IGNORED,
    section=ViTConfig,
    options=vit_options,
    alternatives=[_vit_rows("vit", is_published=False)],
)

DEIT = Family(
    "deit",
    "DeiTForImageClassification",
    {"type": "vit", "pooling": "token"},
    [*_VIT_PARTS, Distillation()],
    "deit.",
    _vit_tables("deit"),
    unused=(r"(deit\.)?pooler\.dense\.(weight|bias)",),
    ignored=_VIT_IGNORED,
    section=ViTConfig,
    options=vit_options,
    rows_of=_deit_classifiers,
    alternatives=[_vit_rows("deit", is_published=False)],
)
