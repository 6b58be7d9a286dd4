"""The section `model`, one class per family. A new family adds its class and a line in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import ConfigDict, Discriminator, Field, Tag, field_validator, model_validator
from typing_extensions import Self

from icenet.core.config import cnn_plan, custom, transformer_plan, vit_plan
from icenet.core.config.open_section import OpenSection
from icenet.core.config.rotary_scaling import RotaryScaling
from icenet.core.config.section import PositiveFloat, Section, Size, unknown_family
from icenet.core.errors import ConfigError


class ModelConfig(Section):
    """The fields of every family. `ModelConfig(type="transformer", ...)` returns a `TransformerConfig`."""

    section: ClassVar[str] = "model"
    input_kind: ClassVar[str] = "tokens"
    """Content of `inputs` in a batch: tokens, images, or anything."""

    type: str
    """Model family."""
    hidden_size: Size = 512
    """Width of the model (d_model)."""
    num_layers: Size = 6
    """Number of blocks."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Probability of zeroing an activation in training."""
    vocab_size: Size = 50000
    """Number of tokens in the vocabulary, or of classes."""
    compile_model: bool | None = None
    """Compile the training step with mx.compile or torch.compile; null: with MLX on Metal."""

    def __new__(cls, **values: Any) -> Self:
        """Creates an instance of the class of the family `type`."""
        if cls is not ModelConfig:
            return super().__new__(cls)
        section = _family_section(values)
        if section is None:
            raise ConfigError(f"model.type: {unknown_family(values, list(FAMILIES))}")
        return super().__new__(section)  # type: ignore[type-var, return-value]


class TransformerConfig(ModelConfig):
    """A transformer: a decoder if `causal`, otherwise an encoder. `docs/models.md` has the formula of each option."""

    type: Literal["transformer"] = "transformer"
    """Model family."""
    num_heads: Size = 8
    """Number of attention heads."""
    num_kv_heads: Size | None = None
    """Number of heads of keys and values, shared by equal groups of queries; null: num_heads."""
    head_size: Size | None = None
    """Width of a head; null: hidden_size / num_heads."""
    max_seq_length: Size = 512
    """Maximum number of tokens in a sequence."""
    causal: bool = True
    """Each position attends only to itself and to earlier positions."""
    positions: transformer_plan.Positions = "sinusoidal"
    """How the model knows positions: added to the embedding (sinusoidal, learned), or rotating queries and keys."""
    position_offset: Annotated[int, Field(ge=0, le=2**24)] = 0
    """Rows of the table of learned positions before the row of the first position."""
    relative_buckets: Size | None = None
    """Number of groups of distances that have a learned bias of attention scores for each head; null: no bias."""
    relative_max_distance: Size = 128
    """Tokens that are at least so far apart are in the same group."""
    rotary_theta: PositiveFloat = 10000.0
    """Base of the angles of rotary positions."""
    sliding_rotary_theta: PositiveFloat | None = None
    """Base of the angles in sliding layers, which then have no rotary_scaling; null: that of the other layers."""
    rotary_scaling: RotaryScaling | None = None
    """Scaling of rotary positions for long contexts: type (linear, dynamic, yarn, longrope, llama3), factor, ..."""
    rotary_layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Indices of the layers with rotary positions, from 0, in ascending order; null: all."""
    rotary_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Part of each head that rotary positions rotate."""
    rotary_pairs: transformer_plan.RotaryPairs = "half"
    """Values that rotate together: i and i + size / 2 (half), or 2i and 2i + 1 (interleaved)."""
    attention_bias: bool = True
    """Biases of the projections to queries, keys and values."""
    attention_output_bias: bool | None = None
    """Bias of the attention's output projection; null: attention_bias."""
    attention_scale: PositiveFloat | None = None
    """Factor of the product of queries and keys; null: 1 / sqrt(head_size)."""
    attention_softcap: PositiveFloat | None = None
    """Limit c of attention scores s, which become c * tanh(s / c); null: no limit."""
    query_key_norm: transformer_plan.QueryKeyNorm = "none"
    """RMS norm of queries and keys, of each head by itself or of all heads together."""
    sliding_window: Size | None = None
    """Number of tokens that a token attends to, itself included; null: all."""
    layer_types: list[transformer_plan.LayerType] | None = None
    """Which layers use sliding_window; null: all."""
    activation: transformer_plan.Activation = "gelu"
    """Activation of the feed-forward network; gelu is the exact form (erf), gelu_tanh its approximation."""
    feed_forward: transformer_plan.FeedForward = "plain"
    """down(activation(up(x))), or gated: down(activation(gate(x)) * up(x))."""
    feed_forward_multiplier: Size = 4
    """Width of the feed-forward network divided by hidden_size."""
    feed_forward_size: Size | None = None
    """Width of the feed-forward network; null: feed_forward_multiplier * hidden_size."""
    feed_forward_bias: bool = True
    """Biases of the feed-forward network."""
    num_experts: Size | None = None
    """Number of experts: feed-forward networks of which a router chooses some for each token; null: no experts."""
    experts_per_token: Size = 2
    """Number of experts that each token uses."""
    expert_size: Size | None = None
    """Width of an expert; null: that of the feed-forward network."""
    expert_layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Indices of the layers with experts, from 0, in ascending order; null: all."""
    normalize_expert_weights: bool = True
    """The weights of a token's experts add up to 1; otherwise they are a part of the softmax over all experts."""
    router_aux_loss_coef: Annotated[float, Field(ge=0)] = 0.0
    """Factor of a loss that balances the use of experts, which is added to the loss in training."""
    norm: transformer_plan.Norm = "layer_norm"
    """Normalization layers."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the variance in norms."""
    norm_offset: bool = False
    """RMS norms multiply by 1 + weight."""
    norm_position: transformer_plan.NormPosition = "pre"
    """Norm before each sublayer (pre), after the residual sum (post), on both sides of it, or after it (branch)."""
    parallel_residual: bool = False
    """Attention and feed-forward network read the same input: x + attention(norm(x)) + feed_forward(norm(x))."""
    embedding_scale: PositiveFloat | None = None
    """Factor of the token embedding; null: sqrt(hidden_size)."""
    token_types: Annotated[int, Field(ge=0, le=2**24)] = 0
    """Number of types of tokens (segments), each with an embedding that is added; 0: none."""
    embedding_norm: bool = False
    """Norm of the sum of embeddings, before the first block."""
    output: transformer_plan.Output = "linear"
    """Projection to logits (linear), the same after a dense layer, activation and norm (transform), or none."""
    tie_embeddings: bool = False
    """The output projection shares the weights of the token embedding."""
    output_bias: bool = False
    """Bias of the output projection."""
    logit_softcap: PositiveFloat | None = None
    """Limit c of logits l, which become c * tanh(l / c); null: no limit."""

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        transformer_plan.check(self)
        return self


class ImageModelConfig(ModelConfig):
    """The fields of every classifier of images."""

    input_kind: ClassVar[str] = "images"

    vocab_size: Size = 1000
    """Number of classes."""
    image_channels: Size = 3
    """Channels of an image: 3 for RGB, 1 for grayscale."""

    def size_problem(self, height: int, width: int) -> str:
        """Returns why the model does not accept a size of images; an empty text if it does."""
        raise NotImplementedError

    @property
    def smallest_size(self) -> tuple[int, int]:
        """The smallest height and width that the model accepts."""
        raise NotImplementedError

    @property
    def example_size(self) -> tuple[int, int]:
        """A height and width for a quick comparison."""
        return self.smallest_size


class CNNConfig(ImageModelConfig):
    """A convolutional network for images: a stem, stages of blocks, and a classifier (see `cnn_plan`)."""

    type: Literal["cnn"] = "cnn"
    """Model family."""
    hidden_size: Size = 512
    """Width of the classifier's hidden layer, and of the features."""
    num_layers: Size = 5
    """Number of blocks after the stem."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Probability of zeroing an activation in training."""
    activation: transformer_plan.Activation = "relu"
    """Activation of the blocks and of the classifier."""
    stem: cnn_plan.Stem = "conv3"
    """First layers: conv3 is a 3x3 convolution; conv7 is 7x7 with stride 2, then max pooling with stride 2."""
    base_channels: Size = 64
    """Channels of the stem; each stage after the first doubles them, unless stage_widths is given."""
    block: cnn_plan.BlockType = "alternating"
    """Type of the blocks: plain convolution (conv), residual (basic, bottleneck), or conv and basic alternating."""
    stage_depths: list[Size] | None = None
    """Number of blocks in each stage; null: num_layers are distributed over up to four stages."""
    stage_widths: list[Size] | None = None
    """Channels of each stage; for bottleneck those of the 3x3 convolution, a quarter of the output; null: doubled."""
    first_stage_stride: Literal[1, 2] = 1
    """Stride of the first stage; that of the others is 2."""
    bottleneck_stride: cnn_plan.BottleneckStride = "conv3"
    """Convolution of a bottleneck block that has its stride: the 3x3 one (conv3), or the first 1x1 one (conv1)."""
    classifier: cnn_plan.Classifier = "hidden"
    """hidden: one hidden layer of hidden_size before the classes; linear: none."""

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        cnn_plan.check(self)
        return self

    def size_problem(self, height: int, width: int) -> str:
        return cnn_plan.size_problem(self, height, width)

    @property
    def smallest_size(self) -> tuple[int, int]:
        return (cnn_plan.min_image_size(self),) * 2

    @property
    def example_size(self) -> tuple[int, int]:
        return (max(8, 2 * cnn_plan.min_image_size(self)),) * 2


ImageSize = Annotated[
    Annotated[Size, Tag("[number]")] | Annotated[list[Size], Field(min_length=2, max_length=2), Tag("[list]")],
    Discriminator(lambda value: "[list]" if isinstance(value, list) else "[number]"),
]
"""The side of a square, or height and width. With tags an error is about one of the two; `explain` drops them."""


class ViTConfig(ImageModelConfig):
    """A vision transformer: patches of an image as the tokens of a transformer without a causal mask."""

    type: Literal["vit"] = "vit"
    """Model family."""
    image_size: ImageSize = 224
    """Height and width of the images: one number for squares, or [height, width]."""
    patch_size: Size = 16
    """Height and width of a patch. Pixels at the right and bottom edge that fill no patch are not used."""
    pooling: vit_plan.Pooling = "token"
    """Input of the classifier: a class token in front of the patches (token), or the mean of the patches (mean)."""
    distillation: vit_plan.Distillation = "none"
    """Second token, of DeiT: none, without classifier (token), or with one; logits are the mean then (classifier)."""
    num_heads: Size = 8
    """Number of attention heads."""
    head_size: Size | None = None
    """Width of a head; null: hidden_size / num_heads."""
    attention_bias: bool = True
    """Biases of the projections to queries, keys and values."""
    activation: transformer_plan.Activation = "gelu"
    """Activation of the feed-forward network; gelu is the exact form (erf), gelu_tanh its approximation."""
    feed_forward_size: Size | None = None
    """Width of the feed-forward network; null: 4 * hidden_size."""
    norm_eps: PositiveFloat = 1e-6
    """Added to the variance in layer norms."""

    @field_validator("image_size")
    @classmethod
    def _square(cls, value: int | list[int]) -> int | list[int]:
        """Returns one number for a square, so that equal models have equal configurations."""
        return value[0] if isinstance(value, list) and value[0] == value[1] else value

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        vit_plan.check(self)
        return self

    def size_problem(self, height: int, width: int) -> str:
        return vit_plan.size_problem(self, height, width)

    @property
    def smallest_size(self) -> tuple[int, int]:
        return vit_plan.image_shape(self)


class RecurrentConfig(ModelConfig):
    """A recurrent network: LSTM, GRU or simple RNN. Sequences may have any length."""

    type: Literal["lstm", "gru", "rnn"] = "lstm"
    """Model family: the type of the recurrent layers."""
    num_layers: Size = 4
    """Number of recurrent layers."""
    bidirectional: bool = False
    """Each layer processes the sequence in both directions: for features, not for generation."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Activation of the simple RNN; those of lstm and gru are fixed."""
    tie_embeddings: bool = False
    """The output projection shares the weights of the token embedding."""

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        if self.activation != "tanh" and self.type != "rnn":
            raise ValueError(
                f"activation {self.activation} is for type rnn; the activations of {self.type} are fixed"
            )
        if self.tie_embeddings and self.bidirectional:
            raise ValueError(
                "tie_embeddings needs bidirectional: false, because two directions are twice as wide as the embedding"
            )
        return self


class CustomConfig(OpenSection, ModelConfig):
    """A model in a file of the user, with the options that its class reads (see `icenet.core.config.custom`)."""

    model_config = ConfigDict(extra="allow")
    input_kind: ClassVar[str] = "anything"

    type: Annotated[str, Field(pattern=custom.PATTERN)]
    """A file and the class in it: my_models.py:CustomModel."""
    port: str | None = None
    """The folder of a port. `type` then names the PyTorch module that `icenet port` has ported; MLX has the port."""

    without_effect_on_ports: ClassVar[tuple[str, ...]] = ("hidden_size", "num_layers", "dropout")
    """A port has the sizes and layers of its PyTorch module."""


FAMILIES: dict[str, type[ModelConfig]] = {
    "cnn": CNNConfig,
    "transformer": TransformerConfig,
    "lstm": RecurrentConfig,
    "gru": RecurrentConfig,
    "rnn": RecurrentConfig,
    "vit": ViTConfig,
}
"""The class of each family by its `type`. A new family adds its line here."""


def output_size(config: ModelConfig) -> int:
    """Returns the width of a model's output: the number of logits, or that of hidden states without a projection."""
    has_logits = not isinstance(config, TransformerConfig) or config.output != "none"
    return config.vocab_size if has_logits else config.hidden_size


def _family_section(value: Any) -> type[ModelConfig] | None:
    """Returns the class for the `type` of a mapping or a section; None if it is unknown."""
    family = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    if custom.is_custom(family):
        return CustomConfig
    return FAMILIES.get(family) if isinstance(family, str) else None


def _family_tag(value: Any) -> str | None:
    section = _family_section(value)
    return section.__name__ if section else None


SECTIONS: tuple[type[ModelConfig], ...] = tuple(dict.fromkeys((*FAMILIES.values(), CustomConfig)))
"""All classes, each once."""

if TYPE_CHECKING:
    AnyModelConfig = ModelConfig
else:
    AnyModelConfig = Annotated[
        Union[tuple(Annotated[section, Tag(section.__name__)] for section in SECTIONS)],  # noqa: UP007
        Discriminator(
            _family_tag,
            custom_error_type="family",
            custom_error_message="unknown family",
            custom_error_context={"known": ", ".join(FAMILIES)},
        ),
    ]
