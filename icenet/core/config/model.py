"""The model families' sections of the configuration; a new family adds its own and a line in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator
from typing_extensions import Self

from icenet.core.config import cnn_plan, custom
from icenet.core.config.section import Section, no_family
from icenet.core.errors import ConfigError

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]


Size = Annotated[int, Field(ge=1, le=2**24)]
"""A width, a depth or a count: beyond 16 million nothing that is made of them could be built."""


class ModelConfig(Section):
    """What every model family has. `ModelConfig(type="transformer", ...)` gives that family's section."""

    section: ClassVar[str] = "model"
    input_kind: ClassVar[str] = "tokens"
    """What a batch holds: tokens or images."""

    type: str
    """The family: transformer."""
    hidden_size: Size = 512
    """Width of the model (d_model)."""
    num_layers: Size = 6
    """Number of blocks."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Probability with which an activation is dropped in training."""
    vocab_size: Size = 50000
    """Number of tokens (or classes) the output distinguishes."""
    compile_model: bool = False
    """Compile the training step with mx.compile or torch.compile."""

    def __new__(cls, **values: Any) -> Self:
        """Chooses the section of the family that `type` names."""
        if cls is not ModelConfig:
            return super().__new__(cls)
        section = _family_section(values)
        if section is None:
            raise ConfigError(f"model.type: {no_family(values, list(FAMILIES))}")
        return super().__new__(section)  # type: ignore[type-var, return-value]


class TransformerConfig(ModelConfig):
    """A transformer: a decoder when `causal`, an encoder otherwise."""

    type: Literal["transformer"] = "transformer"
    """The family."""
    num_heads: Size = 8
    """Attention heads; each is hidden_size / num_heads wide."""
    max_seq_length: Size = 512
    """The most tokens in one sequence."""
    activation: Activation = "gelu"
    """Activation of the feed-forward network; gelu is the exact (erf) form, gelu_tanh its approximation."""
    feed_forward_multiplier: Size = 4
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
    """A convolutional network for images: a stem, stages of blocks, and a classifier (`cnn_plan`)."""

    input_kind: ClassVar[str] = "images"

    type: Literal["cnn"] = "cnn"
    hidden_size: Size = 512
    """Width of the classifier's hidden layer, and of the features."""
    num_layers: Size = 5
    """Number of blocks after the stem."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Probability with which an activation is dropped in training."""
    vocab_size: Size = 1000
    """Number of classes."""
    activation: Activation = "relu"
    """Activation of the blocks and of the classifier."""
    image_channels: Size = 3
    """Channels of an image: 3 for colour, 1 for grey."""
    stem: Literal["conv3", "conv7"] = "conv3"
    """How an image is entered: a 3x3 convolution, or one of 7x7 and a max pooling, each with stride 2."""
    base_channels: Size = 64
    """Channels of the stem; each stage after the first doubles them, unless stage_widths says otherwise."""
    block: Literal["alternating", "conv", "basic", "bottleneck"] = "alternating"
    """What a layer is: a conv block, a residual block (basic or bottleneck), or conv and basic in turn."""
    stage_depths: list[Size] | None = None
    """Blocks of each stage; when absent, num_layers over four stages, the early ones the deeper."""
    stage_widths: list[Size] | None = None
    """Channels of each stage (of a bottleneck: of its 3x3 convolution, a quarter of what leaves it)."""
    classifier: Literal["hidden", "linear"] = "hidden"
    """One hidden layer of hidden_size between pooling and classes, or none."""

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        cnn_plan.check(self)
        return self


class RecurrentConfig(ModelConfig):
    """A recurrent network: an LSTM, a GRU, or the simple RNN. It has no longest sequence."""

    type: Literal["lstm", "gru", "rnn"] = "lstm"
    """The family: the kind of its layers."""
    num_layers: Size = 4
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
    """A model of the user's own, with whatever options its class reads (`icenet.core.config.custom`)."""

    model_config = ConfigDict(extra="allow")
    input_kind: ClassVar[str] = "anything"

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


SECTIONS: tuple[type[ModelConfig], ...] = tuple(dict.fromkeys((*FAMILIES.values(), CustomConfig)))
"""Every model section once."""

if TYPE_CHECKING:
    AnyModelConfig = ModelConfig
else:
    AnyModelConfig = Annotated[
        Union[tuple(Annotated[section, Tag(section.__name__)] for section in SECTIONS)],  # noqa: UP007
        Discriminator(
            _family_tag,
            custom_error_type="family",
            custom_error_message="no such family",
            custom_error_context={"known": ", ".join(FAMILIES)},
        ),
    ]
