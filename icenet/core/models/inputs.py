"""Checks of a model's arguments before it computes, so that both backends refuse them with the same error.

The frameworks do not: MLX reads other memory for an id outside the table, and a wrong number of axes fails somewhere
inside the model or gives a wrong result.
"""

from __future__ import annotations

from typing import Any

from icenet.core.config import ImageModelConfig
from icenet.core.errors import UsageError


def check_tokens(input_ids: Any, attention_mask: Any, past: int | None, array_type: type[Any]) -> None:
    """Checks the type, the shape and the dtype of tokens and of their mask. It does not read values.

    Args:
        input_ids: Tokens, int `[B, T]`.
        attention_mask: `[B, past + T]`, or None.
        past: Number of tokens before; None if it is unknown.
        array_type: The framework's array.

    Raises:
        UsageError: Something is wrong.
    """
    _check_array("input_ids", input_ids, "token ids [batch, length]", array_type)
    shape = list(input_ids.shape)
    if len(shape) != 2:
        raise UsageError(f"input_ids must be [batch, length], not {shape}")
    if 0 in shape:
        raise UsageError(f"input_ids {shape} are empty; pass at least one row and one token")
    if not dtype_name(input_ids).startswith(("int", "uint")):
        raise UsageError(f"input_ids must be integers, not {dtype_name(input_ids)}")
    if attention_mask is None:
        return
    _check_array("attention_mask", attention_mask, "[batch, length]", array_type)
    given = list(attention_mask.shape)
    if past is None and len(given) == 2:
        past = max(given[1] - shape[1], 0)
    expected = [shape[0], (past or 0) + shape[1]]
    if given != expected:
        before = f" after {past} tokens" if past else ""
        raise UsageError(f"attention_mask must be {expected} for input_ids {shape}{before}, not {given}")


def check_token_types(token_type_ids: Any, input_ids: Any, count: int, array_type: type[Any]) -> None:
    """Checks the type, the shape and the dtype of types of tokens. It does not read values.

    Args:
        token_type_ids: Types, int `[B, T]`.
        input_ids: Tokens, int `[B, T]`.
        count: Number of types of the model.
        array_type: The framework's array.

    Raises:
        UsageError: Something is wrong.
    """
    if not count:
        raise UsageError("token_type_ids: this model has no types of tokens (model.token_types is 0); leave them out")
    _check_array("token_type_ids", token_type_ids, "types of tokens [batch, length]", array_type)
    if list(token_type_ids.shape) != list(input_ids.shape):
        raise UsageError(f"token_type_ids must be {list(input_ids.shape)}, not {list(token_type_ids.shape)}")
    if not dtype_name(token_type_ids).startswith(("int", "uint")):
        raise UsageError(f"token_type_ids must be integers, not {dtype_name(token_type_ids)}")


def check_left_padding(attention_mask: Any) -> None:
    """Raises UsageError if a row of a mask, numpy `[B, S]`, has padding after a token."""
    is_token = attention_mask.astype(bool)
    wrong = (is_token[:, :-1] & ~is_token[:, 1:]).any(axis=1)
    if wrong.any():
        raise UsageError(
            f"attention_mask: row {wrong.argmax()} has padding after a token; with a cache, pad on the left"
        )


def check_images(config: ImageModelConfig, images: Any, channel_axis: int, array_type: type[Any]) -> None:
    """Checks the type and the shape of images. It does not read values.

    Args:
        config: The model's section of the configuration.
        images: `[B, H, W, C]` or `[B, C, H, W]`.
        channel_axis: Index of the channel axis, 3 or 1.
        array_type: The framework's array.

    Raises:
        UsageError: Something is wrong.
    """
    axes = "[batch, channels, height, width]" if channel_axis == 1 else "[batch, height, width, channels]"
    _check_array("images", images, axes, array_type)
    shape = tuple(images.shape)
    if len(shape) != 4:
        raise UsageError(f"images must be {axes}, not {list(shape)}")
    if shape[0] == 0:
        raise UsageError(f"images {list(shape)} are empty; pass at least one")
    if shape[channel_axis] != config.image_channels:
        raise UsageError(
            f"images {list(shape)} have {shape[channel_axis]} channels and model.image_channels is "
            f"{config.image_channels} (the layout is {axes})"
        )
    height, width = (length for axis, length in enumerate(shape) if axis not in (0, channel_axis))
    if problem := config.size_problem(height, width):
        raise UsageError(f"{problem}; resize them")


def dtype_name(array: Any) -> str:
    """Returns the dtype of an array of any framework: int32."""
    return str(array.dtype).rpartition(".")[2]


def _check_array(name: str, value: Any, content: str, array_type: type[Any]) -> None:
    if not isinstance(value, array_type):
        wanted, given = (f"{kind.__module__}.{kind.__name__}" for kind in (array_type, type(value)))
        raise UsageError(f"{name} must be {content} in a {wanted}, not a {given.removeprefix('builtins.')}")
