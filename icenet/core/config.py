"""The configuration: one YAML file, one tree of checked sections, shared by both backends.

    config = Config.from_yaml("configs/quickstart.yaml", overrides=["training.learning_rate=1e-3"])
    config.training.mixed_precision = "bf16"      # an assignment is checked too

Strict on purpose: an unknown key, a wrong type or an impossible combination is a `ConfigError` of one line
that names the key, the file and line where it stands, what is allowed and the nearest known key.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from typing_extensions import Self

from icenet.core import custom, stages, yaml_file
from icenet.core.errors import ConfigError

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]


class Section(BaseModel):
    """A part of the configuration: strict keys, strict types, checked assignments."""

    model_config = ConfigDict(
        extra="forbid", strict=True, validate_assignment=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
    section: ClassVar[str] = ""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self), prefix=self.section)) from None

    # pydantic calls a custom __init__ for nested sections too, which would hide where an error stands
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        before = dict(self.__dict__)
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            self.__dict__.update(before)  # a check across fields runs after the value is in place
            raise ConfigError(explain(error, type(self), prefix=self.section)) from None


# ---- model ------------------------------------------------------------------------------------------------


class ModelConfig(Section):
    """What every model family has. `ModelConfig(type="transformer", ...)` gives that family's section."""

    section: ClassVar[str] = "model"
    reads: ClassVar[str] = "tokens"
    """What a batch holds: tokens or images."""

    type: str
    """The family: transformer."""
    hidden_size: Annotated[int, Field(ge=1)] = 512
    """Width of the model (d_model)."""
    num_layers: Annotated[int, Field(ge=1)] = 6
    """Number of blocks."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Probability with which an activation is dropped in training."""
    vocab_size: Annotated[int, Field(ge=1)] = 50000
    """Number of tokens (or classes) the output distinguishes."""
    compile_model: bool = False
    """Compile the training step with mx.compile or torch.compile."""

    def __new__(cls, **values: Any) -> Self:
        """Chooses the section of the family that `type` names."""
        if cls is not ModelConfig:
            return super().__new__(cls)
        section = _family_section(values)
        if section is None:
            raise ConfigError(f"model.type: {_no_family(values)}")
        return super().__new__(section)  # type: ignore[type-var, return-value]


class TransformerConfig(ModelConfig):
    """A transformer: a decoder when `causal`, an encoder otherwise."""

    type: Literal["transformer"] = "transformer"
    """The family."""
    num_heads: Annotated[int, Field(ge=1)] = 8
    """Attention heads; each is hidden_size / num_heads wide."""
    max_seq_length: Annotated[int, Field(ge=1)] = 512
    """The most tokens in one sequence."""
    activation: Activation = "gelu"
    """Activation of the feed-forward network; gelu is the exact (erf) form, gelu_tanh its approximation."""
    feed_forward_multiplier: Annotated[int, Field(ge=1)] = 4
    """Width of the feed-forward network in units of hidden_size."""
    norm_position: Literal["pre", "post"] = "pre"
    """Layer norm before each sublayer (pre), or after its residual sum as in the paper (post)."""
    causal: bool = True
    """Each position sees only itself and what is before it."""
    tie_embeddings: bool = False
    """The output projection uses the embedding's weights."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size {self.hidden_size} is odd: sinusoidal positions come in pairs")
        return self


class CNNConfig(ModelConfig):
    """A convolutional network for images: a stem, stages of blocks, and a classifier (`icenet.core.stages`)."""

    reads: ClassVar[str] = "images"

    type: Literal["cnn"] = "cnn"
    hidden_size: Annotated[int, Field(ge=1)] = 512
    """Width of the classifier's hidden layer, and of the features."""
    num_layers: Annotated[int, Field(ge=1)] = 5
    """Number of blocks after the stem."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Probability with which an activation is dropped in training."""
    vocab_size: Annotated[int, Field(ge=1)] = 1000
    """Number of classes."""
    activation: Activation = "relu"
    """Activation of the blocks and of the classifier."""
    image_channels: Annotated[int, Field(ge=1)] = 3
    """Channels of an image: 3 for colour, 1 for grey."""
    stem: Literal["conv3", "conv7"] = "conv3"
    """How an image is entered: a 3x3 convolution, or one of 7x7 and a max pooling, each with stride 2."""
    base_channels: Annotated[int, Field(ge=1)] = 64
    """Channels of the stem; each stage after the first doubles them, unless stage_widths says otherwise."""
    block: Literal["alternating", "conv", "basic", "bottleneck"] = "alternating"
    """What a layer is: a conv block, a residual block (basic or bottleneck), or conv and basic in turn."""
    stage_depths: list[Annotated[int, Field(ge=1)]] | None = None
    """Blocks of each stage; when absent, num_layers over four stages, the early ones the deeper."""
    stage_widths: list[Annotated[int, Field(ge=1)]] | None = None
    """Channels of each stage (of a bottleneck: of its 3x3 convolution, a quarter of what leaves it)."""
    classifier: Literal["hidden", "linear"] = "hidden"
    """One hidden layer of hidden_size between pooling and classes, or none."""

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        stages.check(self)
        return self


class RecurrentConfig(ModelConfig):
    """A recurrent network: an LSTM, a GRU, or the simple RNN. It has no longest sequence."""

    type: Literal["lstm", "gru", "rnn"] = "lstm"
    """The family: the kind of its layers."""
    num_layers: Annotated[int, Field(ge=1)] = 4
    """Number of recurrent layers."""
    bidirectional: bool = False
    """Each layer reads from both ends: for features, not for generation."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Activation of the simple RNN; the gates of lstm and gru have their own."""
    tie_embeddings: bool = False
    """The output projection uses the embedding's weights."""

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        if self.activation != "tanh" and self.type != "rnn":
            raise ValueError(f"activation {self.activation} is for type rnn; the gates of {self.type} have their own")
        if self.tie_embeddings and self.bidirectional:
            raise ValueError(
                "tie_embeddings needs bidirectional: false: two directions are twice as wide as the embedding"
            )
        return self


class CustomConfig(ModelConfig):
    """A model of the user's own, with whatever options its class reads (`icenet.core.custom`)."""

    model_config = ConfigDict(extra="allow")
    reads: ClassVar[str] = "anything"

    type: Annotated[str, Field(pattern=r"^.+\.py:[A-Za-z_][A-Za-z0-9_]*$")]
    """A file and a class in it: my_models.py:CustomModel."""


FAMILIES: dict[str, type[ModelConfig]] = {
    "cnn": CNNConfig,
    "transformer": TransformerConfig,
    "lstm": RecurrentConfig,
    "gru": RecurrentConfig,
    "rnn": RecurrentConfig,
}
"""The section of each family by its `type`; a new family adds its line here."""


def _family_section(value: Any) -> type[ModelConfig] | None:
    """The section that a tree of values (or a section itself) asks for by its `type`."""
    family = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    if custom.is_custom(family):
        return CustomConfig
    return FAMILIES.get(family) if isinstance(family, str) else None


def _family_tag(value: Any) -> str | None:
    section = _family_section(value)
    return section.__name__ if section else None


def _no_family(values: Any) -> str:
    family = values.get("type") if isinstance(values, Mapping) else None
    if family is None:
        return f"required; one of {', '.join(FAMILIES)}, or my_models.py:MyModel"
    return f"no family {family!r}{_nearest(str(family), list(FAMILIES))}"


_TAGGED = tuple(Annotated[section, Tag(section.__name__)] for section in dict.fromkeys((*FAMILIES.values(), CustomConfig)))
if TYPE_CHECKING:
    AnyModelConfig = ModelConfig
else:
    AnyModelConfig = Annotated[Union[_TAGGED], Discriminator(_family_tag)]  # noqa: UP007 - made of a tuple

# ---- data, training, generation ---------------------------------------------------------------------------


class DataConfig(Section):
    """Where batches of text come from."""

    section: ClassVar[str] = "data"

    kind: Literal["text"] = "text"
    """What is read: text."""
    source: str = "stdlib"
    """A text file, a folder, a glob, or 'stdlib': the Python standard library's own source."""
    tokenizer: Literal["bytes"] = "bytes"
    """How text becomes tokens: UTF-8 bytes 0 to 255, and 256 for the end of a text."""
    seq_length: Annotated[int, Field(ge=1)] | None = None
    """Tokens in one training sequence; the model's max_seq_length when absent."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The share of tokens held out for evaluation."""


class ImageDataConfig(Section):
    """Where batches of images and their classes come from."""

    section: ClassVar[str] = "data"

    kind: Literal["images"] = "images"
    """What is read: images."""
    source: str = "digits"
    """A folder of class folders, of MNIST's IDX files or of CIFAR-10's binary files; or 'digits', scikit-learn's."""
    image_size: Annotated[int, Field(ge=1)] | None = None
    """Height and width; images of another size are resized and their middle is taken. Absent: as they are."""
    channels: Literal[1, 3] | None = None
    """1 turns colour to grey, 3 grey to colour. Absent: as the source has them (a folder: 3)."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """The share of each class held out for evaluation, where the source has no test files of its own."""
    horizontal_flip: bool = False
    """Mirror every second training image, at random."""
    crop_padding: Annotated[int, Field(ge=0)] = 0
    """Pad training images with so many zeros on each side and cut a random piece of the old size."""
    normalize: bool = True
    """Subtract the mean of each channel and divide by its standard deviation."""
    mean: list[float] | None = None
    """Mean of each channel, of values from 0 to 1; that of the training images when absent."""
    std: list[Annotated[float, Field(gt=0)]] | None = None
    """Standard deviation of each channel; that of the training images when absent."""

    @model_validator(mode="after")
    def _mean_is_used(self) -> Self:
        if not self.normalize and (self.mean is not None or self.std is not None):
            raise ValueError("normalize is off, so mean and std are not used; leave them out, or turn it on")
        return self


def _data_tag(value: Any) -> str:
    kind = value.get("kind", "text") if isinstance(value, Mapping) else getattr(value, "kind", "text")
    return next((section.__name__ for section in DATA if kind == section.model_fields["kind"].default), "DataConfig")


DATA: tuple[type[Section], ...] = (DataConfig, ImageDataConfig)
"""The kinds of data; a new one adds its section here."""

if TYPE_CHECKING:
    AnyDataConfig = DataConfig
else:
    AnyDataConfig = Annotated[
        Union[tuple(Annotated[section, Tag(section.__name__)] for section in DATA)],  # noqa: UP007
        Discriminator(_data_tag),
    ]

_TAGS: dict[Any, type[Section]] = {section.__name__: section for section in (*FAMILIES.values(), CustomConfig, *DATA)}


class TrainingConfig(Section):
    """How weights are fitted."""

    section: ClassVar[str] = "training"

    max_steps: Annotated[int, Field(ge=1)] = 1000
    """Optimizer steps in the whole run."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Sequences in one step."""
    optimizer: Literal["adamw"] = "adamw"
    """Decoupled weight decay (Loshchilov and Hutter, 2019), with bias correction."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """The highest learning rate, reached after the warm-up."""
    min_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    """The learning rate at the last step."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps in which the learning rate rises linearly."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decay of matrices; vectors (biases, norms) are never decayed."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the gradient's running mean."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the squared gradient's running mean."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this global norm; null: never."""
    mixed_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """The type of matrix products and activations; weights, moments, norms and the loss stay in fp32."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward pass instead of keeping them."""
    eval_every: Annotated[int, Field(ge=1)] | None = 100
    """Steps between evaluations; null: never."""
    eval_batches: Annotated[int, Field(ge=1)] | None = 8
    """Validation batches in one evaluation; null: all."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 100
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: Annotated[int, Field(ge=1)] | None = 3
    """How many of the newest checkpoints stay; null: all."""

    @model_validator(mode="after")
    def _rates_in_order(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate:g} is above learning_rate {self.learning_rate:g}"
            )
        return self


class GenerationConfig(Section):
    """How tokens are chosen. `icenet.core.sampling` says in which order the filters apply."""

    section: ClassVar[str] = "generation"

    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens to add to the prompt."""
    max_length: Annotated[int, Field(ge=1)] | None = None
    """Tokens in prompt and continuation together, when max_new_tokens is absent."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Logits are divided by it; 0 chooses the most likely token."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Only the k most likely tokens; 0: all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the most likely tokens whose probabilities add up to p."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Only tokens at least this share as likely as the most likely one."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Logits of tokens already there are divided by it when positive, multiplied when negative."""
    seed: int | None = None
    """Seed of the draws; the configuration's own when absent."""
    stop: list[int | str] = Field(default_factory=list)
    """Tokens and texts after which a sequence ends; they are not part of what is returned."""
    overflow: Literal["error", "slide"] = "error"
    """Beyond max_seq_length: refuse before any work, or forget the older half of the context."""
    prefill_chunk: Annotated[int, Field(ge=1)] = 512
    """Prompt tokens read in one forward pass."""


# ---- the whole --------------------------------------------------------------------------------------------


class Config(Section):
    """One run: a model, its data, its training, and the backend that carries it out."""

    backend: Literal["auto", "mlx", "torch"] = "auto"
    """mlx, torch, or auto: mlx where it runs, else torch."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|gpu|mps|cuda(:[0-9]+)?)$")] = "auto"
    """auto, cpu, gpu (MLX), cuda, cuda:N or mps (PyTorch)."""
    blas: str = "auto"
    """MLX on a Linux CPU: auto, torch, openblas, none, or the path of a library; ICENET_BLAS goes first."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Initial weights, data order, dropout and sampling follow from it."""
    model: AnyModelConfig
    data: AnyDataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    generation: GenerationConfig = Field(default_factory=GenerationConfig)

    @model_validator(mode="after")
    def _sequence_fits(self) -> Self:
        longest = getattr(self.model, "max_seq_length", None)
        wanted = getattr(self.data, "seq_length", None)
        if longest and wanted and wanted > longest:
            raise ValueError(f"data.seq_length {wanted} is more than model.max_seq_length {longest}")
        return self

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = (), *, trust_code: bool = True) -> Config:
        """Reads a YAML file, or a preset by its name (`transformer-tiny`), and applies `key=value` overrides.

        A file of the user's own that `model.type` names may be run from now on, unless `trust_code` is False
        (a configuration that came with a checkpoint).

        Raises:
            ConfigError: the file cannot be read, or what it says is wrong.
        """
        from icenet.core.presets import find

        file = find(path)
        values, lines = yaml_file.read(file)
        config = cls._checked(values, overrides, lines, file)
        if isinstance(config.model, CustomConfig):
            config.model.type = custom.beside(config.model.type, file.parent)
            if trust_code:
                custom.trust(config.model.type)
        return config

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
        """Checks a tree of plain values, as YAML would give it."""
        return cls._checked(values, overrides, {}, None)

    @classmethod
    def _checked(
        cls, values: Mapping[str, Any], overrides: Sequence[str], lines: yaml_file.Lines, file: Path | None
    ) -> Config:
        tree = yaml_file.copy_tree(values)
        for override in overrides:
            key, value = yaml_file.parse_override(override)
            key = yaml_file.assign(tree, key, value)
            lines = {path: line for path, line in lines.items() if path[: len(key)] != key} | {key: 0}
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError(explain(error, cls, lines=lines, file=file)) from None

    def with_overrides(self, *overrides: str) -> Config:
        """A new configuration in which `key=value` texts replace values (`training.learning_rate=1e-3`)."""
        return self.from_dict(self.to_dict(), overrides)

    def checked(self) -> Config:
        """The same configuration, checked as a whole: assignments check one section at a time."""
        return self.from_dict(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """A tree of plain values; `from_dict` gives the same configuration back."""
        return self.model_dump(mode="python")

    def to_yaml(self) -> str:
        """The configuration as YAML text, every key written out."""
        return yaml_file.dump(self.to_dict())


def check_device(device: str) -> None:
    """Refuses a device of the command line that no configuration could name."""
    Config(model=TransformerConfig(), device=device)


def json_schema() -> dict[str, Any]:
    """The JSON schema of the configuration, for editors: `icenet schema` prints it."""
    schema = Config.model_json_schema()
    schema["title"] = "IceNet configuration"
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


# ---- errors a person can act on ---------------------------------------------------------------------------


def explain(
    error: ValidationError,
    schema: type[Section],
    *,
    prefix: str = "",
    lines: yaml_file.Lines | None = None,
    file: Path | None = None,
) -> str:
    """One line for a validation error: where it stands, which key, what is wrong, what is allowed.

    `lines` maps key paths to line numbers of `file`. Of several errors the first is told, and how many follow.
    """
    details = error.errors(include_url=False)
    # a misspelt section is also a missing one: the misspelling says more
    details.sort(key=lambda detail: detail["type"] != "extra_forbidden")
    first = details[0]
    path = tuple(part for part in first["loc"] if part not in _TAGS and not str(part).startswith("function-"))
    if first["type"].startswith("union_tag") and path == ("model",):
        path = ("model", "type")
    if first["type"] in ("int_type", "string_type") and path[-1:] in (("int",), ("str",)):  # one side of a union
        path = path[:-1]
        details = [detail for detail in details if detail["loc"][:-1] != first["loc"][:-1]] + [first]
        first["msg"] = "must be an integer or a text"
    where = ""
    line = next((lines[path[:n]] for n in range(len(path), -1, -1) if lines and path[:n] in lines), None)
    if line == 0:  # see Config._checked
        where = "--set "
    elif file is not None:
        where = f"{file}:{line}: " if line else f"{file}: "
    name = _dotted(prefix, *map(str, path))
    value = first.get("input")
    kind = first["type"]
    if kind in ("extra_forbidden", "no_such_attribute"):
        section = _section_at(schema, path[:-1], first["loc"])
        problem = f"unknown key{_nearest(str(path[-1]), list(section.model_fields) if section else [])}"
    elif kind == "missing":
        problem = "required, and not given"
    elif kind.startswith("union_tag"):
        problem = _no_family(value)
    elif kind == "string_pattern_mismatch" and path[-1:] == ("device",):
        problem = f"must be auto, cpu, gpu, mps, cuda or cuda:N, not {value!r}"
    elif kind == "value_error":
        problem = str(first["ctx"]["error"])
    else:
        message = first["msg"].replace("Input should be", "must be").replace("a valid ", "a ")
        message = message.replace("a integer", "an integer")
        allowed = str(first.get("ctx", {}).get("expected", ""))
        choices = [choice.strip(" '") for choice in allowed.replace(" or ", ", ").split(",")]
        close = difflib.get_close_matches(value, choices, 1) if isinstance(value, str) and allowed else []
        problem = f"{message}, not {value!r}" + (f"; did you mean {close[0]!r}?" if close else "")
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{where}{name + ': ' if name else ''}{problem}{more}"


def _section_at(schema: type[Section], path: tuple[Any, ...], loc: tuple[Any, ...]) -> type[Section] | None:
    """The section class that stands at a key path."""
    section: type[Section] | None = schema
    for part in path:
        if section is Config and part in ("model", "data"):
            section = next((_TAGS[tag] for tag in loc if tag in _TAGS), None)
            continue
        annotation = section.model_fields[part].annotation if section and part in section.model_fields else None
        section = annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None
    return section


def _dotted(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(known)}" if known else ""
