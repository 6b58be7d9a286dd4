"""BERT, RoBERTa, MPNet and DistilBERT: encoders with learned positions and layer norms after the sublayers.

Sources: the classes `BertConfig`, `BertForMaskedLM`, ... of Hugging Face's `transformers` 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from icenet.core.config import TransformerConfig
from icenet.core.errors import ConfigError
from icenet.core.families.family import Family
from icenet.core.families.keys import Activation, Dropout, Key, Only, Options, Part, Values
from icenet.core.families.tensors import Row

_FIXED = {
    "type": "transformer",
    "causal": False,
    "positions": "learned",
    "embedding_scale": 1.0,
    "embedding_norm": True,
    "norm": "layer_norm",
    "norm_position": "post",
    "feed_forward": "plain",
}

_RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Endings of names in the first files of BERT."""


@dataclass(frozen=True)
class _OffsetPositions:
    """`max_position_embeddings` of a table whose first rows, up to that of padding, belong to no position."""

    padding_key: str | None
    """Key of the row of padding; None: it is row 1 always."""

    @property
    def keys(self) -> Sequence[str]:
        return ("max_position_embeddings", *([self.padding_key] if self.padding_key else []))

    def read(self, values: Values) -> dict[str, Any]:
        padding = values.whole(self.padding_key, 1, least=0) if self.padding_key else 1
        rows = values.whole("max_position_embeddings", 512) or 0
        if padding is None or padding + 1 >= rows:
            raise ConfigError(
                f"max_position_embeddings: {rows} are too few, as positions begin after that of padding, {padding}"
            )
        return {"position_offset": padding + 1, "max_seq_length": rows - padding - 1}

    def write(self, options: Options) -> dict[str, Any]:
        offset = options["position_offset"] if self.padding_key else 2
        padding = {self.padding_key: max(0, offset - 1)} if self.padding_key else {}
        return {"max_position_embeddings": options["max_seq_length"] + offset, **padding}


@dataclass(frozen=True)
class _TokenTypes:
    """`type_vocab_size`, of which the library needs one."""

    keys: Sequence[str] = ("type_vocab_size",)

    def read(self, values: Values) -> dict[str, Any]:
        return {"token_types": values.whole("type_vocab_size", 2)}

    def write(self, options: Options) -> dict[str, Any]:
        return {"type_vocab_size": max(1, options["token_types"])}


def _parts(vocabulary: int) -> tuple[Part, ...]:
    """Returns the keys that BERT, RoBERTa and MPNet have."""
    return (
        Key("vocab_size", "vocab_size", vocabulary),
        Key("hidden_size", "hidden_size", 768),
        Key("num_hidden_layers", "num_layers", 12),
        Key("num_attention_heads", "num_heads", 12),
        Key("intermediate_size", "feed_forward_size", 3072),
        Key("layer_norm_eps", "norm_eps", 1e-12),
        Key("tie_word_embeddings", "tie_embeddings", True),
        Activation("hidden_act", "gelu"),
        Dropout(("hidden_dropout_prob",), 0.1),
        Only("position_embedding_type", "absolute"),
        Only("is_decoder", False),
    )


_IGNORED = frozenset(
    {
        "attention_probs_dropout_prob",  # as attention_dropout
        *("output_past", "directionality"),  # of old versions of the library
        *("pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head"),
        "pooler_type",
    }
)


def _rows(prefix: str, attention: str, projections: Sequence[str], output: str, norm: str) -> list[Row]:
    """Returns the names of the tensors of BERT, RoBERTa and MPNet without their heads.

    Args:
        prefix: Name of the encoder.
        attention: Name of the attention layer in a block.
        projections: Names of its projections to queries, keys and values.
        output: Name of its output projection in a block.
        norm: Name of its norm in a block.
    """
    block = f"{prefix}.encoder.layer.{{i}}"
    return [
        Row(f"{prefix}.embeddings.word_embeddings", ["token_embedding"]),
        Row(f"{prefix}.embeddings.position_embeddings", ["position_embedding"]),
        Row(f"{prefix}.embeddings.token_type_embeddings", ["token_type_embedding"]),
        Row(f"{prefix}.embeddings.LayerNorm", ["embedding_norm"]),
        Row(f"{prefix}.encoder.relative_attention_bias", ["relative_bias"]),
        *(
            Row(f"{block}.{attention}.{name}", [f"blocks.{{i}}.attention.{ours}_proj"])
            for name, ours in zip(projections, "qkv", strict=True)
        ),
        Row(f"{block}.{output}", ["blocks.{i}.attention.out_proj"]),
        Row(f"{block}.{norm}", ["blocks.{i}.attention_norm"]),
        Row(f"{block}.intermediate.dense", ["blocks.{i}.feed_forward.up_proj"]),
        Row(f"{block}.output.dense", ["blocks.{i}.feed_forward.down_proj"]),
        Row(f"{block}.output.LayerNorm", ["blocks.{i}.feed_forward_norm"]),
    ]


_BERT_BLOCK = (
    "attention.self",
    ("query", "key", "value"),
    "attention.output.dense",
    "attention.output.LayerNorm",
)


@dataclass(frozen=True)
class _HeadRows:
    """The names of the projection to logits, which depend on whether its weight is that of the embedding."""

    name: str

    def __call__(self, config: TransformerConfig) -> Sequence[Row]:
        return [Row(self.name if config.tie_embeddings else f"{self.name}.decoder", ["output"])]


def _unused(prefix: str, *others: str) -> list[str]:
    """Returns the patterns of the pooler, of heads of other tasks, and of copies of the bias of the head."""
    names = (rf"({prefix}\.)?pooler\.dense", "classifier", r"classifier\.(dense|out_proj)", "qa_outputs", *others)
    return [rf"({'|'.join(names)})\.(weight|bias)"]


def _buffers(prefix: str) -> list[str]:
    return [rf"({prefix}\.)?embeddings\.(position_ids|token_type_ids)"]


BERT = Family(
    "bert",
    "BertForMaskedLM",
    _FIXED,
    [*_parts(30522), Key("max_position_embeddings", "max_seq_length", 512), _TokenTypes()],
    "bert.",
    [
        *_rows("bert", *_BERT_BLOCK),
        Row("cls.predictions.transform.dense", ["output_dense"]),
        Row("cls.predictions.transform.LayerNorm", ["output_norm"]),
    ],
    head="cls.predictions.decoder.weight",
    masked_head="cls.predictions.transform.dense.weight",
    rows_of=_HeadRows("cls.predictions"),
    copies=[r"cls\.predictions\.(decoder\.)?bias"],
    buffers=_buffers("bert"),
    unused=_unused("bert", r"cls\.seq_relationship"),
    renamed=_RENAMED,
    ignored=_IGNORED,
    divides_width=True,
)


def _with_lm_head(
    model_type: str,
    architecture: str,
    prefix: str,
    parts: Sequence[Part],
    block: tuple[str, Sequence[str], str, str] = _BERT_BLOCK,
    fixed: Mapping[str, Any] = _FIXED,
) -> Family:
    """Returns a family whose head for masked language models is `lm_head`.

    Args:
        model_type, architecture, parts, fixed: See `Family`.
        prefix: Beginning of the names, without the dot.
        block: Names of the layers of a block, see `_rows`.
    """
    return Family(
        model_type,
        architecture,
        fixed,
        parts,
        f"{prefix}.",
        [
            *_rows(prefix, *block),
            Row("lm_head.dense", ["output_dense"]),
            Row("lm_head.layer_norm", ["output_norm"]),
        ],
        head="lm_head.decoder.weight",
        masked_head="lm_head.dense.weight",
        head_activation="gelu",
        rows_of=_HeadRows("lm_head"),
        copies=[r"lm_head\.(decoder\.)?bias"],
        buffers=_buffers(prefix),
        unused=_unused(prefix),
        renamed=_RENAMED,
        ignored=_IGNORED,
        divides_width=True,
    )


def _roberta(model_type: str, architecture: str, vocabulary: int) -> Family:
    parts = [*_parts(vocabulary), _OffsetPositions("pad_token_id"), _TokenTypes()]
    return _with_lm_head(model_type, architecture, "roberta", parts)


ROBERTA = _roberta("roberta", "RobertaForMaskedLM", 50265)
XLM_ROBERTA = _roberta("xlm-roberta", "XLMRobertaForMaskedLM", 30522)

MPNET = _with_lm_head(
    "mpnet",
    "MPNetForMaskedLM",
    "mpnet",
    [*_parts(30527), _OffsetPositions(None), Only("relative_attention_num_buckets", 32)],
    ("attention.attn", "qkv", "attention.attn.o", "attention.LayerNorm"),
    {**_FIXED, "relative_buckets": 32, "relative_max_distance": 128},
)

_BLOCK = "distilbert.transformer.layer.{i}"

DISTILBERT = Family(
    "distilbert",
    "DistilBertForMaskedLM",
    {**_FIXED, "norm_eps": 1e-12, "token_types": 0},
    [
        Key("vocab_size", "vocab_size", 30522),
        Key("dim", "hidden_size", 768),
        Key("n_layers", "num_layers", 6),
        Key("n_heads", "num_heads", 12),
        Key("hidden_dim", "feed_forward_size", 3072),
        Key("max_position_embeddings", "max_seq_length", 512),
        Key("tie_word_embeddings", "tie_embeddings", True),
        Activation("activation", "gelu"),
        Dropout(("dropout",), 0.1),
    ],
    "distilbert.",
    [
        Row("distilbert.embeddings.word_embeddings", ["token_embedding"]),
        Row("distilbert.embeddings.position_embeddings", ["position_embedding"]),
        Row("distilbert.embeddings.LayerNorm", ["embedding_norm"]),
        *(Row(f"{_BLOCK}.attention.{name}_lin", [f"blocks.{{i}}.attention.{name}_proj"]) for name in "qkv"),
        Row(f"{_BLOCK}.attention.out_lin", ["blocks.{i}.attention.out_proj"]),
        Row(f"{_BLOCK}.sa_layer_norm", ["blocks.{i}.attention_norm"]),
        Row(f"{_BLOCK}.ffn.lin1", ["blocks.{i}.feed_forward.up_proj"]),
        Row(f"{_BLOCK}.ffn.lin2", ["blocks.{i}.feed_forward.down_proj"]),
        Row(f"{_BLOCK}.output_layer_norm", ["blocks.{i}.feed_forward_norm"]),
        Row("vocab_transform", ["output_dense"]),
        Row("vocab_layer_norm", ["output_norm"]),
        Row("vocab_projector", ["output"]),
    ],
    head="vocab_projector.weight",
    masked_head="vocab_transform.weight",
    buffers=_buffers("distilbert"),
    unused=_unused("distilbert", "pre_classifier"),
    renamed=_RENAMED,
    # the table of positions is in the file, also if it was sinusoidal at first
    ignored=_IGNORED | {"sinusoidal_pos_embds", "tie_weights_", "qa_dropout", "seq_classif_dropout"},
    divides_width=True,
)
