"""Layers of torch.nn that are one layer of mlx.nn: the constructor, the axes of its images and of its arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from icenet.core.porting.record import Module


@dataclass(frozen=True)
class Layer:
    """A layer of mlx.nn in the place of a module.

    `axes` says how it reads its inputs: "last" if images have their channels last (`rank` spatial axes), "any" if it
    computes each element, "same" if the axes are the original's.
    """

    constructor: str
    arguments: list[Any] = field(default_factory=list)
    keywords: dict[str, Any] = field(default_factory=dict)
    axes: str = "same"
    rank: int = 0
    permutations: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """The axes of PyTorch in MLX's order, of arrays that have another order."""
    left_out: tuple[str, ...] = ()
    """Arrays of PyTorch that MLX's layer lacks and that change no result."""
    is_stateless: bool = False

    def source(self) -> str:
        given = [
            *map(_literal, self.arguments),
            *(f"{key}={_literal(value)}" for key, value in self.keywords.items()),
        ]
        return f"{self.constructor}({', '.join(given)})"


class WrittenLayer(Layer):
    """A layer of torch.nn whose class the source has, because that of mlx.nn has other parameters."""

    @property
    def name(self) -> str:
        """The name of the class."""
        raise NotImplementedError

    def instance(self, name: str) -> str:
        """Returns the source of a new instance of a class with a name."""
        raise NotImplementedError

    def class_source(self, name: str) -> str:
        """Returns the source of the class under a name."""
        raise NotImplementedError

    def functions(self) -> dict[str, dict[str, Any]]:
        """Returns the functions that the class calls, each with what it gives to their parameters."""
        raise NotImplementedError


NAMES = {
    "nn.Linear": ["input_dims", "output_dims"],
    "nn.Embedding": ["num_embeddings", "dims"],
    "PaddedEmbedding": ["num_embeddings", "dims", "padding_idx"],
    "nn.LayerNorm": ["dims"],
    "nn.RMSNorm": ["dims"],
    "nn.BatchNorm": ["num_features"],
    "nn.GroupNorm": ["num_groups", "dims"],
    "nn.InstanceNorm": ["dims"],
    "nn.Dropout": ["p"],
    **{
        f"nn.Conv{t}{n}d": ["in_channels", "out_channels", "kernel_size"]
        for t in ("", "Transpose")
        for n in (1, 2, 3)
    },
    **{f"{bi}{kind}": ["input_size", "hidden_size"] for bi in ("", "Bi") for kind in ("LSTM", "GRU", "RNN")},
    **{f"nn.{kind}Pool{n}d": ["kernel_size", "stride", "padding"] for kind in ("Max", "Avg") for n in (1, 2, 3)},
}
"""The names of positional arguments, for the arguments of the classes that hold such layers."""
DEFAULTS = {
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "groups": 1,
    "bias": True,
    "output_padding": 0,
    "eps": 1e-5,
    "momentum": 0.1,
}
"""The defaults of keywords. A pool has another stride."""


def layer_of(module: Module) -> Layer | None:
    """Returns the layer of mlx.nn that computes what a module computes, in forward and backward, or None."""
    if not module.kind.startswith("torch.nn.modules.") or not module.settings.get("is_plain_call", True):
        return None
    if module.children or (module.class_name in _WEIGHTED and not module.settings.get("has_weight")):
        return None  # a parametrization computes the weight
    make = _MAKERS.get(module.class_name)
    return make(module.settings) if make is not None else None


def _literal(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_literal, value)) + ("," if len(value) == 1 else "") + ")"
    return repr(value)


def _square(value: Any) -> Any:
    """Returns (3, 3) as 3."""
    if isinstance(value, tuple) and len(set(value)) == 1:
        return value[0]
    return value


def _linear(s: dict[str, Any]) -> Layer:
    return Layer("nn.Linear", [s["in_features"], s["out_features"]], {} if s["has_bias"] else {"bias": False})


def _embedding(s: dict[str, Any]) -> Layer | None:
    if (
        s.get("max_norm") is not None
        or s.get("sparse")
        or s.get("scale_grad_by_freq")
        or s["padding_idx"] is not None
    ):
        return None
    return Layer("nn.Embedding", [s["num_embeddings"], s["embedding_dim"]])


def _conv(rank: int, transposed: bool) -> Callable[[dict[str, Any]], Layer | None]:
    def make(s: dict[str, Any]) -> Layer | None:
        if s["padding_mode"] != "zeros" or (s["groups"] != 1 and (transposed or rank == 3)):
            return None
        padding = s["padding"]
        if transposed:
            sizes = zip(s["kernel_size"], s["dilation"], padding, s["output_padding"], strict=True)
            if any(more > size or size > d * (k - 1) for k, d, size, more in sizes):
                return None  # MLX's result, or its gradient of the input, has another shape then
        if padding == "same":
            whole = [d * (k - 1) for d, k in zip(s["dilation"], s["kernel_size"], strict=True)]
            if any(size % 2 for size in whole):
                return None
            padding = tuple(size // 2 for size in whole)
        elif padding == "valid":
            padding = 0
        keywords = {}
        given = [("stride", s["stride"], 1), ("padding", padding, 0), ("dilation", s["dilation"], 1)]
        if transposed:
            given.append(("output_padding", s["output_padding"], 0))
        else:
            given.append(("groups", s["groups"], 1))
        for name, value, default in given:
            if _square(value) != default:
                keywords[name] = _square(value)
        if not s["has_bias"]:
            keywords["bias"] = False
        spatial = tuple(range(2, 2 + rank))
        axes = (1, *spatial, 0) if transposed else (0, *spatial, 1)
        name = f"nn.Conv{'Transpose' if transposed else ''}{rank}d"
        arguments = [s["in_channels"], s["out_channels"], _square(s["kernel_size"])]
        return Layer(name, arguments, keywords, "last", rank, {"weight": axes})

    return make


def _batch_norm(rank: int) -> Callable[[dict[str, Any]], Layer | None]:
    def make(s: dict[str, Any]) -> Layer | None:
        if s["momentum"] is None or s["affine"] is False:
            return None
        keywords: dict[str, Any] = {}
        if s["eps"] != 1e-5:
            keywords["eps"] = s["eps"]
        if s["momentum"] != 0.1:
            keywords["momentum"] = s["momentum"]
        if not s["track_running_stats"]:
            keywords["track_running_stats"] = False
        return Layer("nn.BatchNorm", [s["num_features"]], keywords, "last", rank, {}, ("num_batches_tracked",))

    return make


def _layer_norm(s: dict[str, Any]) -> Layer | None:
    if len(s["normalized_shape"]) != 1:
        return None
    keywords: dict[str, Any] = {} if s["eps"] == 1e-5 else {"eps": s["eps"]}
    if not s["has_weight"]:
        keywords["affine"] = False
    elif not s["has_bias"]:
        keywords["bias"] = False
    return Layer("nn.LayerNorm", [s["normalized_shape"][0]], keywords)


def _rms_norm(s: dict[str, Any]) -> Layer | None:
    if len(s["normalized_shape"]) != 1 or not s["has_weight"] or s["eps"] is None:
        return None
    return Layer("nn.RMSNorm", [s["normalized_shape"][0]], {} if s["eps"] == 1e-5 else {"eps": s["eps"]})


def _group_norm(s: dict[str, Any]) -> Layer:
    keywords: dict[str, Any] = {} if s["eps"] == 1e-5 else {"eps": s["eps"]}
    if not s["affine"]:
        keywords["affine"] = False
    return Layer(
        "nn.GroupNorm", [s["num_groups"], s["num_channels"]], {**keywords, "pytorch_compatible": True}, "last", -1
    )


def _dropout(s: dict[str, Any]) -> Layer | None:
    return Layer("nn.Dropout", [s["p"]], axes="any") if 0 <= s["p"] < 1 else None


def _channel_dropout(rank: int) -> Callable[[dict[str, Any]], Layer | None]:
    def make(s: dict[str, Any]) -> Layer | None:
        return Layer(f"nn.Dropout{rank}d", [s["p"]], {}, "last", rank) if 0 <= s["p"] < 1 else None

    return make


def _max_pool(rank: int) -> Callable[[dict[str, Any]], Layer | None]:
    def make(s: dict[str, Any]) -> Layer | None:
        if s["ceil_mode"] or s["return_indices"] or _square(s["dilation"]) != 1:
            return None
        return Layer(f"nn.MaxPool{rank}d", *_window(s), "last", rank, is_stateless=True)

    return make


def _avg_pool(rank: int) -> Callable[[dict[str, Any]], Layer | None]:
    def make(s: dict[str, Any]) -> Layer | None:
        padded = _square(s["padding"]) not in (0, (0,))
        if s["ceil_mode"] or s.get("divisor_override") or (padded and not s["count_include_pad"]):
            return None
        return Layer(f"nn.AvgPool{rank}d", *_window(s), "last", rank, is_stateless=True)

    return make


def _window(s: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    keywords = {}
    stride = s["kernel_size"] if s["stride"] is None else s["stride"]
    if _square(stride) != _square(s["kernel_size"]):
        keywords["stride"] = _square(stride)
    if _square(s["padding"]) != 0:
        keywords["padding"] = _square(s["padding"])
    return [_square(s["kernel_size"])], keywords


def _activation(constructor: str, *arguments: Any, **keywords: Any) -> Callable[[dict[str, Any]], Layer | None]:
    return lambda s: Layer(constructor, list(arguments), keywords, "any", is_stateless=True)


def _gelu(s: dict[str, Any]) -> Layer:
    keywords = {"approx": "tanh"} if s["approximate"] == "tanh" else {}
    return Layer("nn.GELU", [], keywords, "any", is_stateless=True)


def _softplus(s: dict[str, Any]) -> Layer | None:
    if s["beta"] != 1 or s["threshold"] < 20:  # above 20 softplus(x) is x in fp32
        return None
    return Layer("nn.Softplus", [], {}, "any", is_stateless=True)


def _hardtanh(s: dict[str, Any]) -> Layer | None:
    if (s["min_val"], s["max_val"]) != (-1, 1):
        return None
    return Layer("nn.HardTanh", [], {}, "any", is_stateless=True)


def _instance_norm(rank: int) -> Callable[[dict[str, Any]], Layer | None]:
    def make(s: dict[str, Any]) -> Layer | None:
        if s["track_running_stats"] or (s["affine"] and not (s["has_weight"] and s["has_bias"])):
            return None
        keywords: dict[str, Any] = {} if s["eps"] == 1e-5 else {"eps": s["eps"]}
        if s["affine"]:
            keywords["affine"] = True
        return Layer("nn.InstanceNorm", [s["num_features"]], keywords, "last", rank)

    return make


def _upsample(s: dict[str, Any]) -> Layer | None:
    scale = s["scale_factor"]
    scales = scale if isinstance(scale, tuple) else (scale,)
    if s["mode"] != "nearest" or s["size"] is not None or any(item is None or item % 1 for item in scales):
        return None
    factor = tuple(map(int, scales)) if isinstance(scale, tuple) else int(scale)
    return Layer("nn.Upsample", [], {"scale_factor": factor, "mode": "nearest"}, "last", -1, is_stateless=True)


_WEIGHTED = {"Linear", "Embedding", *(f"Conv{t}{n}d" for t in ("", "Transpose") for n in (1, 2, 3))}

_MAKERS: dict[str, Callable[[dict[str, Any]], Layer | None]] = {
    "Linear": _linear,
    "NonDynamicallyQuantizableLinear": _linear,
    "Embedding": _embedding,
    "LayerNorm": _layer_norm,
    "RMSNorm": _rms_norm,
    "GroupNorm": _group_norm,
    "Dropout": _dropout,
    "Identity": _activation("nn.Identity"),
    "Upsample": _upsample,
    "UpsamplingNearest2d": _upsample,
    "ReLU": _activation("nn.ReLU"),
    "ReLU6": _activation("nn.ReLU6"),
    "SiLU": _activation("nn.SiLU"),
    "Tanh": _activation("nn.Tanh"),
    "Sigmoid": _activation("nn.Sigmoid"),
    "Mish": _activation("nn.Mish"),
    "Hardswish": _activation("nn.Hardswish"),
    "Softsign": _activation("nn.Softsign"),
    "LogSigmoid": _activation("nn.LogSigmoid"),
    "Softplus": _softplus,
    "Hardtanh": _hardtanh,
    "GELU": _gelu,
    **{f"Conv{rank}d": _conv(rank, False) for rank in (1, 2, 3)},
    **{f"ConvTranspose{rank}d": _conv(rank, True) for rank in (1, 2, 3)},
    **{f"BatchNorm{rank}d": _batch_norm(rank) for rank in (1, 2)},  # MLX refuses volumes
    **{f"InstanceNorm{rank}d": _instance_norm(rank) for rank in (1, 2, 3)},
    **{f"Dropout{rank}d": _channel_dropout(rank) for rank in (2, 3)},
    **{f"MaxPool{rank}d": _max_pool(rank) for rank in (1, 2, 3)},
    **{f"AvgPool{rank}d": _avg_pool(rank) for rank in (1, 2, 3)},
}
