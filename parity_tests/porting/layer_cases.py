"""Every layer of torch.nn in every option of its signature, as modules to port.

The options are those of the constructor's signature: for each parameter with a default, other values by its name, by
its class where a name has several meanings, or by the type of the default. Each case changes one of them, and one
case of a layer all switches.
"""

from __future__ import annotations

import inspect
import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

Outcome = tuple[str, str]

# fmt: off
CONTAINERS = {
    "Container", "DataParallel", "Module", "ModuleDict", "ModuleList", "ParameterDict", "ParameterList", "RNNBase",
    "RNNCellBase", "Sequential",
}
"""Classes that compute nothing themselves. Lazy layers become another class at their first call."""

NOT_VARIED = {
    "device",
    "dtype",
    "size_average",
    "reduce",
    "process_group",
    "sparse",
    "_weight",
    "_freeze",
    "_random_samples",
}
"""Where a layer is, what is deprecated for `reduction`, and how a gradient is stored: no result depends on it."""

REQUIRED: dict[str, Any] = {
    "in_features": 6, "out_features": 5, "in1_features": 6, "in2_features": 4, "in_channels": 4, "out_channels": 6,
    "kernel_size": 3, "num_features": 4, "num_channels": 4, "num_groups": 2, "normalized_shape": 6, "n_classes": 12,
    "cutoffs": [3, 7], "num_embeddings": 9, "embedding_dim": 5, "input_size": 6, "hidden_size": 5, "groups": 2,
    "padding": 1, "value": 0.5, "output_size": 3, "upscale_factor": 2, "downscale_factor": 2, "size": 3,
    "norm_type": 2.0, "embed_dim": 8, "num_heads": 2, "d_model": 8, "nhead": 2, "num_layers": 2, "threshold": 0.1,
    "num_classes": 7, "dim": 1, "unflattened_size": (2, 3), "mode": "nearest",
}
"""Arguments without a default."""

BASE: dict[str, dict[str, Any]] = {
    "Fold": {"output_size": (6, 5), "kernel_size": (2, 3)},
    "Unfold": {"kernel_size": (2, 3)},
    "Transformer": {
        "d_model": 8,
        "nhead": 2,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "dim_feedforward": 12,
    },
    "TransformerEncoderLayer": {"dim_feedforward": 12},
    "TransformerDecoderLayer": {"dim_feedforward": 12},
    "Upsample": {"scale_factor": 2},
    "UpsamplingBilinear2d": {"scale_factor": 2},
    "UpsamplingNearest2d": {"scale_factor": 2},
    "FractionalMaxPool2d": {"output_size": 4, "_random_samples": torch.rand(2, 4, 2)},
    "FractionalMaxPool3d": {"output_size": (3, 4, 3), "_random_samples": torch.rand(2, 4, 3)},
    "ChannelShuffle": {"groups": 2},
    "Flatten": {},
    "GLU": {},
    "Softmax": {"dim": 1},
    "LogSoftmax": {"dim": 1},
    "Softmin": {"dim": 1},
    "LinearCrossEntropyLoss": {"in_features": 6, "num_classes": 7},
    "AdaptiveLogSoftmaxWithLoss": {"in_features": 32},
}
"""Arguments of the plain case of a layer, where they are others."""

POOLS = {"padding": [1], "stride": [1, 2], "dilation": [2]}
CONV = {
    "stride": [2], "padding": [1, "same", "valid"], "dilation": [2], "groups": [2],
    "padding_mode": [{"padding_mode": mode, "padding": 1} for mode in ("reflect", "replicate", "circular")],
    "kernel_size": [1],
}
OPTIONS: dict[str, dict[str, list[Any]]] = {
    "Conv": CONV,
    "ConvTranspose": {
        "stride": [2], "padding": [1], "dilation": [2], "groups": [2], "padding_mode": [], "kernel_size": [1],
        "output_padding": [{"output_padding": 1, "stride": 2}, {"output_padding": 1, "dilation": 2}],
    },
    "MaxPool": POOLS, "AvgPool": {**POOLS, "divisor_override": [5]},
    "LPPool": {"stride": [1], "norm_type": [1.0, 3.0]},
    "MaxUnpool": {"stride": [2], "padding": [1]},
    "AdaptiveAvgPool": {"output_size": [1, 4]}, "AdaptiveMaxPool": {"output_size": [1, 4]},
    "Fold": {"dilation": [{"dilation": 2, "kernel_size": 2}], "padding": [1], "stride": [2]},
    "Unfold": {"dilation": [{"dilation": 2, "kernel_size": 2}], "padding": [1], "stride": [2]},
    "Upsample": {
        "mode": [{"mode": mode} for mode in ("nearest", "nearest-exact", "bilinear", "bicubic", "area")],
        "align_corners": [{"mode": mode, "align_corners": True} for mode in ("bilinear", "bicubic")],
        "size": [{"size": (5, 9), "scale_factor": None}], "scale_factor": [1.7, (0.5, 3.0)],
        "recompute_scale_factor": [{"scale_factor": 1.7, "recompute_scale_factor": True}],
    },
    "UpsamplingBilinear": {"size": [{"size": (5, 9), "scale_factor": None}], "scale_factor": [3]},
    "UpsamplingNearest": {"size": [{"size": (5, 9), "scale_factor": None}], "scale_factor": [3]},
    "FractionalMaxPool": {"output_size": [2], "output_ratio": [{"output_ratio": 0.5, "output_size": None}]},
    "Flatten": {"start_dim": [0, 2], "end_dim": [2]}, "Unflatten": {},
    "BatchNorm": {"momentum": [0.3, None]}, "SyncBatchNorm": {"momentum": [0.3, None]},
    "InstanceNorm": {"momentum": [{"momentum": 0.3, "track_running_stats": True}]},
    "LayerNorm": {"normalized_shape": [(4, 6)]}, "RMSNorm": {"normalized_shape": [(4, 6)], "eps": [1e-2]},
    "GroupNorm": {"num_groups": [1, 4]},
    "Embedding": {"padding_idx": [2, -1], "max_norm": [1.0], "norm_type": [{"norm_type": 1.0, "max_norm": 1.0}]},
    "EmbeddingBag": {
        "mode": ["sum", "max"], "max_norm": [1.0], "norm_type": [{"norm_type": 1.0, "max_norm": 1.0}],
        "padding_idx": [2], "include_last_offset": [],
    },
    "RNN": {"nonlinearity": ["relu"]}, "LSTM": {"proj_size": [3]}, "GRU": {}, "RNNCell": {"nonlinearity": ["relu"]},
    "MultiheadAttention": {"kdim": [{"kdim": 5, "vdim": 6}], "vdim": [{"vdim": 6}]},
    "GELU": {"approximate": ["tanh"]}, "PReLU": {"num_parameters": [4]}, "Softplus": {"threshold": [1.0]},
    "Hardtanh": {"min_value": [], "max_value": []}, "RReLU": {"lower": [0.2], "upper": [0.5]},
    "CosineSimilarity": {"dim": [0, -1]},
    "Softmax": {"dim": [0, -1]}, "LogSoftmax": {"dim": [0, -1]}, "Softmin": {"dim": [0, -1]}, "GLU": {"dim": [1]},
    "MultiMarginLoss": {"p": [2], "weight": ["weight"]}, "TripletMarginLoss": {"p": [1.0, 3.0]},
    "PairwiseDistance": {"p": [1.0, 3.0]},
    "CrossEntropyLoss": {"ignore_index": [2], "weight": ["weight"]},
    "NLLLoss": {"ignore_index": [2], "weight": ["weight"]},
    "LinearCrossEntropyLoss": {
        "ignore_index": [2], "weight": ["weight"], "out_features": [], "options": [], "chunking_method": [],
        "acc_policy": [], "grad_inplace": [],
    },
    "BCELoss": {"weight": ["weight"]}, "BCEWithLogitsLoss": {"weight": ["weight"], "pos_weight": ["weight"]},
    "MultiLabelSoftMarginLoss": {"weight": ["weight"]},
    "CTCLoss": {"blank": [6]}, "TripletMarginWithDistanceLoss": {"distance_function": [nn.CosineSimilarity()]},
    "Transformer": {
        "num_encoder_layers": [2], "num_decoder_layers": [2], "dim_feedforward": [16], "custom_encoder": [],
        "custom_decoder": [], "activation": ["gelu"], "d_model": [], "nhead": [4],
    },
    "TransformerEncoderLayer": {"activation": ["gelu"], "dim_feedforward": [16]},
    "TransformerDecoderLayer": {"activation": ["gelu"], "dim_feedforward": [16]},
    "TransformerEncoder": {"norm": [nn.LayerNorm(8)], "enable_nested_tensor": [False], "mask_check": [False]},
    "TransformerDecoder": {"norm": [nn.LayerNorm(8)]},
}
"""Other values of options by class, without the number of axes in its name. A dict changes several arguments."""

COMMON: dict[str, list[Any]] = {
    "reduction": ["none", "sum"], "eps": [1e-2], "num_layers": [2], "dropout": [{"dropout": 0.3, "num_layers": 2}],
    "p": [0.2], "size": [5], "activation": ["gelu"], "norm": [],
}
"""Other values of options by name."""
# fmt: on


def layers() -> list[str]:
    """Returns the names of the layers of torch.nn."""
    names = [name for name in sorted(set(dir(nn))) if inspect.isclass(getattr(nn, name))]
    return [
        name
        for name in names
        if issubclass(getattr(nn, name), nn.Module) and name not in CONTAINERS and not name.startswith("Lazy")
    ]


def _signature(name: str) -> dict[str, inspect.Parameter]:
    cls = getattr(nn, name)
    if name in ("RNN", "LSTM", "GRU"):
        found = dict(inspect.signature(nn.RNNBase.__init__).parameters)
        del found["mode"]
        if name != "LSTM":
            del found["proj_size"]
        if name == "RNN":
            found["nonlinearity"] = inspect.Parameter("nonlinearity", inspect.Parameter.KEYWORD_ONLY, default="tanh")
    else:
        found = dict(inspect.signature(cls.__init__).parameters)
    return {key: value for key, value in found.items() if key != "self" and value.kind.value not in (2, 4)}


def _key(name: str) -> str:
    return re.sub(r"[123]d$", "", name)


def plain(name: str) -> dict[str, Any]:
    """Returns the arguments of the plain case of a layer."""
    given = dict(BASE.get(name, {}))
    for key, parameter in _signature(name).items():
        if parameter.default is inspect.Parameter.empty and key not in given:
            if key == "encoder_layer":
                given[key] = nn.TransformerEncoderLayer(8, 2, 12)
            elif key == "decoder_layer":
                given[key] = nn.TransformerDecoderLayer(8, 2, 12)
            elif key not in REQUIRED:
                raise AssertionError(f"{name}: no value for {key}")
            else:
                given[key] = REQUIRED[key]
    return given


def variants(name: str) -> dict[str, dict[str, Any]]:
    """Returns the arguments of the cases of a layer, by what they change."""
    base = plain(name)
    cases: dict[str, dict[str, Any]] = {"": base}
    known = OPTIONS.get(_key(name), {})
    switches: dict[str, Any] = {}
    for key, parameter in _signature(name).items():
        default = parameter.default
        if key in NOT_VARIED:
            continue
        if key in known:
            values = known[key]
        elif key in COMMON:
            values = COMMON[key]
        elif default is inspect.Parameter.empty:
            values = []
        elif isinstance(default, bool):
            values = [not default]
            switches[key] = not default
        elif isinstance(default, (int, float)):
            values = [default * 0.5 + 0.3] if isinstance(default, float) else [default + 1]
        else:
            raise AssertionError(f"{name}: no other value for {key}={default!r}")
        for value in values:
            change = value if isinstance(value, dict) else {key: value}
            made = {**base, **{k: v for k, v in change.items() if k in _signature(name)}}
            text = ", ".join(
                f"{k}={v if not isinstance(v, nn.Module) else type(v).__name__}" for k, v in change.items()
            )
            cases[text] = made
    if len(switches) > 1 and not any(key in switches for key in ("return_indices", "add_zero_attn")):
        cases["all switches"] = {**base, **switches}
    if name in ("LSTM", "GRU", "RNN"):
        cases["all"] = {**base, **switches, "num_layers": 2}
    return cases


class Call(nn.Module):
    """A layer, called in the way its class needs."""

    def __init__(self, layer: nn.Module, fixed: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.layer, self.fixed = layer, fixed or {}

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.layer(*inputs, **self.fixed)


class Unpool(nn.Module):
    """A pool whose indices its inverse takes."""

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        kinds = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
        stride, padding = layer.stride[0], layer.padding[0]  # type: ignore[union-attr, index]
        self.pool = kinds[rank - 1](3, stride, padding, return_indices=True)
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, indices = self.pool(x)
        return self.layer(y, indices)


SIZES = {1: (9,), 2: (8, 9), 3: (6, 7, 8)}


def _images(name: str, batched: bool = True, channels: int = 4) -> torch.Tensor:
    match = re.search(r"([123])d$", name)
    rank = int(match[1]) if match else 2
    return torch.randn(*([2] if batched else []), channels, *SIZES[rank])


def case(name: str, arguments: dict[str, Any]) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Returns a layer with its arguments, and inputs."""
    given = dict(arguments)
    classes = 5
    if given.get("weight") == "weight" or given.get("pos_weight") == "weight":
        for key in ("weight", "pos_weight"):
            if given.get(key) == "weight":
                given[key] = torch.rand(7 if name == "LinearCrossEntropyLoss" else classes) + 0.5
    layer = getattr(nn, name)(**given)
    for parameter in layer.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0, 0.3)  # weights of 1 and biases of 0 hide faults
    ids = torch.randint(0, classes, (6,), generator=torch.Generator().manual_seed(1))
    scores, other = torch.randn(6, classes), torch.randn(6, classes)
    batch_first = given.get("batch_first", False)
    if name in ("LSTM", "GRU", "RNN"):
        return layer, (torch.randn(2, 5, 6) if batch_first else torch.randn(5, 2, 6),)
    if name in ("LSTMCell", "GRUCell", "RNNCell", "Linear"):
        return layer, (torch.randn(3, 6),)
    if name in ("LayerNorm", "RMSNorm"):
        return layer, (torch.randn(2, 3, 4, 6),)
    if name == "Bilinear":
        return layer, (torch.randn(3, 6), torch.randn(3, 4))
    if name == "Embedding":
        return layer, (torch.tensor([[1, 2, 8, 2], [0, 8, 3, 5]]),)
    if name == "EmbeddingBag":
        if given.get("include_last_offset"):
            return layer, (torch.tensor([1, 2, 4, 2, 8, 3]), torch.tensor([0, 2, 6]))
        return layer, (torch.tensor([[1, 2, 4], [2, 8, 3]]),)
    if name == "MultiheadAttention":
        sizes = (8, given.get("kdim") or 8, given.get("vdim") or 8)
        return layer, tuple(torch.randn(*((2, 5) if batch_first else (5, 2)), size) for size in sizes)
    if name in ("Transformer", "TransformerDecoder", "TransformerDecoderLayer"):
        shapes = ((2, 5, 8), (2, 4, 8)) if batch_first else ((5, 2, 8), (4, 2, 8))
        return layer, tuple(torch.randn(*shape) for shape in shapes)
    if name in ("TransformerEncoder", "TransformerEncoderLayer"):
        return layer, (torch.randn(2, 5, 8) if batch_first else torch.randn(5, 2, 8),)
    if name in ("CosineSimilarity", "PairwiseDistance"):
        return layer, (scores, other)
    if name == "Fold":
        size, step = given["kernel_size"], given.get("stride", 1)
        kernel = (size, size) if isinstance(size, int) else size
        dilation, padding = given.get("dilation", 1), given.get("padding", 0)
        counts = [
            (length + 2 * padding - dilation * (k - 1) - 1) // step + 1
            for length, k in zip(given["output_size"], kernel, strict=True)
        ]
        return layer, (torch.randn(2, 3 * kernel[0] * kernel[1], counts[0] * counts[1]),)
    if name == "Unflatten":
        return layer, (torch.randn(2, 6, 3),)
    if name == "PixelUnshuffle":
        return layer, (torch.randn(2, 4, 8, 6),)
    if name.startswith("MaxUnpool"):
        size = 9 + given.get("padding", 0)
        return Unpool(layer, int(name[-2])), (torch.randn(2, 4, *(size,) * int(name[-2])),)
    if name in ("CrossEntropyLoss", "NLLLoss", "MultiMarginLoss"):
        return layer, (scores.log_softmax(1) if name == "NLLLoss" else scores, ids)
    if name == "NLLLoss2d":
        return layer, (torch.randn(2, classes, 3, 4).log_softmax(1), torch.randint(0, classes, (2, 3, 4)))
    if name == "LinearCrossEntropyLoss":
        return layer, (torch.randn(6, 6), ids)
    if name == "AdaptiveLogSoftmaxWithLoss":
        return layer, (torch.randn(8, 32), torch.tensor([0, 11, 5, 3, 7, 1, 2, 9]))
    if name in ("BCELoss", "BCEWithLogitsLoss"):
        return layer, (scores.sigmoid() if name == "BCELoss" else scores, torch.rand(6, classes))
    if name == "MultiLabelSoftMarginLoss":
        return layer, (scores, torch.randint(0, 2, (6, classes)).float())
    if name == "MultiLabelMarginLoss":
        return layer, (scores, torch.tensor([[3, 0, -1, 1, 2], [1, -1, 0, 0, 0], [4, 3, 2, 1, 0]] * 2))
    if name in ("SoftMarginLoss", "HingeEmbeddingLoss"):
        return layer, (scores, torch.randint(0, 2, (6, classes)).float() * 2 - 1)
    if name == "CosineEmbeddingLoss":
        return layer, (scores, other, torch.tensor([1.0, -1, 1, -1, -1, 1]))
    if name == "MarginRankingLoss":
        return layer, (scores[:, 0], other[:, 0], torch.tensor([1.0, -1, 1, -1, -1, 1]))
    if name in ("TripletMarginLoss", "TripletMarginWithDistanceLoss"):
        return layer, (scores, other, torch.randn(6, classes))
    if name == "GaussianNLLLoss":
        return layer, (scores, other, torch.rand(6, classes) + 0.1)
    if name == "PoissonNLLLoss":
        return layer, (scores if given.get("log_input", True) else scores.exp(), torch.rand(6, classes) * 4)
    if name == "KLDivLoss":
        target = other.log_softmax(1)
        return layer, (scores.log_softmax(1), target if given.get("log_target") else target.exp())
    if name == "CTCLoss":
        targets = torch.tensor([[1, 2, 2], [3, 5, 1]])
        lengths = {"input_lengths": torch.tensor([9, 8]), "target_lengths": torch.tensor([3, 2])}
        return Call(layer, None), (torch.randn(9, 2, 7).log_softmax(2), targets, *lengths.values())
    if name.endswith("Loss"):
        return layer, (scores, other)
    if name in ("BatchNorm1d", "InstanceNorm1d"):
        return layer, (torch.randn(3, 4, 5),)
    images = {"ChannelShuffle", "Softmax2d", "PixelShuffle", "Upsample", "Unfold", "Fold", "LocalResponseNorm"}
    if re.search(r"[123]d$", name) or name in images | {"CrossMapLRN2d", "GroupNorm", "SyncBatchNorm", "Flatten"}:
        return layer, (_images(name),)
    return layer, (torch.randn(3, 4, 6) * 2,)  # activations and dropout


def port(name: str, arguments: dict[str, Any]) -> Outcome:
    """Ports one case with its proof."""
    import icenet
    from icenet.core.errors import IceNetError

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module, inputs = case(name, arguments)
            module(*[x.clone() for x in inputs])
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            return "skipped", f"PyTorch: {' '.join(str(error).split())[:150]}"
        try:
            done = icenet.port(module, inputs)
        except IceNetError as error:
            text = " ".join(str(error).split())[:400]
            return ("missing" if "no counterpart" in text else "failed"), text
        except Exception as error:
            return "failed", " ".join(f"{type(error).__name__}: {error}".split())[:400]
    return "passed", f"ratio {max(check.ratio for check in done.report.checks):.1f}"


def entries() -> dict[str, Callable[[], Iterator[Callable[[], Outcome]]]]:
    """Returns the layers; the samples of one are its cases."""

    def checks(name: str) -> Iterator[Callable[[], Outcome]]:
        for text, arguments in variants(name).items():

            def check(text: str = text, arguments: dict[str, Any] = arguments) -> Outcome:
                status, detail = port(name, arguments)
                return status, f"{name}({text}): {detail}" if status != "passed" else detail

            yield check

    return {name: lambda name=name: checks(name) for name in layers()}  # type: ignore[misc]


def count() -> int:
    return sum(len(variants(name)) for name in itertools.chain(layers()))
