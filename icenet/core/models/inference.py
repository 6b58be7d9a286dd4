"""Builds a model for inference: in evaluation mode, with its tokenizer and its generation settings."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from icenet.core import backends
from icenet.core.config import Config, check_device
from icenet.core.dtypes import FLOAT_DTYPES
from icenet.core.errors import UsageError
from icenet.core.messages import some
from icenet.core.models import twins
from icenet.core.models.base import BYTES
from icenet.core.tokenizers import get_tokenizer
from icenet.core.tokenizers.bytes import ByteTokenizer
from icenet.core.tokenizers.huggingface import HFTokenizer
from icenet.core.weights.arrays import Array, float_dtype
from icenet.core.weights.origin import Origin
from icenet.core.weights.packed import (
    KINDS,
    DequantizedWeights,
    PackedWeights,
    QuantizedWeights,
    packed_of,
)
from icenet.core.weights.quantization import DEFAULT_GROUP_SIZE, check, describe, layers_to_quantize


def build_for_inference(
    config: Config,
    backend: str | None,
    device: str | None,
    *,
    seed: int | None = None,
    weights: Mapping[str, Array] | None = None,
    allow_tf32: bool | None = None,
    dtype: str | None = None,
) -> Any:
    """Returns a model in evaluation mode.

    Args:
        config: The configuration.
        backend: mlx, torch or auto; None selects `config.backend`.
        device: auto, cpu, gpu, cuda, cuda:N or mps; None selects `config.device`.
        seed: Seed of the initial weights of a model without `weights`.
        weights: Canonical weights by path.
        allow_tf32: Whether fp32 products may use TF32; None selects `config.allow_tf32`.
        dtype: Dtype of the weights and of the arithmetic: fp32, bf16 or fp16. None is fp32 on a CPU, and on a GPU
            the dtype of `weights`.

    Raises:
        UsageError: There is no such dtype.
    """
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise UsageError(f"dtype: no dtype {dtype!r}; one of {', '.join(FLOAT_DTYPES)}")
    if device is not None:
        device = str(device)  # that of a torch.device is its name
        check_device(device)
    if allow_tf32 is not None:
        config = config.model_copy(update={"allow_tf32": allow_tf32})
    name = backends.choose(config, backend)
    model = backends.module(name, "engine.build").build_model(config, device or config.device, seed=seed)
    model.eval()
    if (difference := twins.compare_with_twin(config, model)) is not None:
        logging.getLogger("icenet").warning(difference)
    if weights is not None:
        if dtype is None and not model.is_on_cpu:
            dtype = float_dtype(weights)
        if dtype is not None:
            model.set_weight_dtype(dtype)
        found = packed_of(weights)
        values = weights if found is None else _quantize_layers(model, found, dtype or "fp32")
        model.set_weights(values)
        model.origin = Origin.of(weights)
    if config.model.input_kind in ("tokens", "anything") and config.data.kind in ("text", "chat"):
        tokenizer = get_tokenizer(getattr(config.data, "tokenizer", "bytes"))
        size = getattr(tokenizer, "text_vocab_size", tokenizer.vocab_size)
        # tokens that were added to a tokenizer, such as one for padding, may have no row in the embedding
        if size <= config.model.vocab_size and not lacks_tokenizer(config, weights):
            model.tokenizer = tokenizer
            if config.generation.add_special_tokens and isinstance(tokenizer, HFTokenizer):
                for note in tokenizer.contradictions():
                    logging.getLogger("icenet").warning(note)
        elif tokenizer.files:
            logging.getLogger("icenet").warning(
                f"data.tokenizer: has {size:,} tokens and the model {config.model.vocab_size:,}; it is not used"
            )
    model.embedding_options = config.embedding
    draws = config.generation.seed if config.generation.seed is not None else config.seed
    model.generation = config.generation.model_copy(update={"seed": draws})
    return model


def quantized(
    config: Config, weights: Mapping[str, Array], bits: int | None, group_size: int | None = None
) -> Mapping[str, Array]:
    """Returns weights whose layers are quantized; a layer that is, is quantized again.

    Args:
        config: The configuration of the model.
        weights: Canonical weights.
        bits: See `icenet.core.weights.quantization.check`; None returns the weights as they are.
        group_size: See there; None is 64.

    Raises:
        UsageError: The settings are not supported, or fit no layer, or there is a size of groups alone.
    """
    if bits is None:
        if group_size is not None:
            raise UsageError(f"group_size {group_size} has no effect without quantize; give quantize, such as 4")
        return weights
    settings = check(bits, DEFAULT_GROUP_SIZE if group_size is None else group_size)
    layers, others = layers_to_quantize(backends.meta_model(config).quantizable_layers(), settings)
    if others:
        logging.getLogger("icenet").warning(
            f"not quantized, because the width is no multiple of group_size {settings.group_size}: {some(others, 8)}"
        )
    if (found := packed_of(weights)) is not None:
        logging.getLogger("icenet").warning(
            f"the weights are quantized already ({describe(found.layers)}) and are rounded a second time"
        )
    return DequantizedWeights(QuantizedWeights(weights, layers), getattr(weights, "metadata", {}))


def _quantize_layers(model: Any, weights: PackedWeights, dtype: str) -> Mapping[str, Array]:
    """Makes layers of a model quantized ones, if its backend has them. Returns the weights to set.

    The other layers get their values as s * q + b of fp32, so that the backends differ by rounding only.
    """
    kept = model.quantize_layers(weights.layers)
    if others := [layer for layer in weights.layers if layer not in kept]:
        size = sum(math.prod(weights.layers[layer].shape(weights.spec(f"{layer}.weight").shape)) for layer in others)
        packed = sum(weights.spec(f"{layer}.{kind}").nbytes for layer in others for kind in KINDS)
        logging.getLogger("icenet").warning(
            f"{describe({layer: weights.layers[layer] for layer in others})}: {model.backend} computes with "
            f"dequantized weights, {size * BYTES[dtype] / 1e6:,.1f} MB in {dtype} instead of {packed / 1e6:,.1f} MB"
        )
    return DequantizedWeights(weights, dtype=np.float32, kept=kept)


def lacks_tokenizer(config: Config, weights: Any) -> bool:
    """Returns whether weights are those of a folder of Hugging Face that has no tokenizer.

    Its tokens are bytes only if there are as many, as in an exported run, or if a run trained the weights on bytes.
    """
    origin = Origin.of(weights)
    is_imported = origin is not None and not origin.tokenizer
    reads_bytes = getattr(config.data, "tokenizer", None) == ByteTokenizer.name
    return is_imported and reads_bytes and getattr(config.model, "vocab_size", None) != ByteTokenizer.vocab_size
