"""Faults in the models of our families, and faults of training and of precision, with the module that differs.

`make(fault)` returns the MLX model with the fault, its PyTorch twin, the inputs, and the options of `compare`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import icenet.blas

import mlx.core as mx
import mlx.optimizers as optimizers
import torch
from pair_faults import FAULTS as PAIR_FAULTS
from pair_faults import PAIRS
from pairs import Fault, draw, randomized, tokens

import icenet
from icenet import nn as ops
from icenet.core.config import Config
from icenet.core.models.modules import copy_weights

Plant = Callable[[Any], None]

MODELS: dict[str, dict[str, Any]] = {
    "gpt": {"type": "transformer", "positions": "learned", "activation": "gelu", "num_heads": 2},
    "decoder": {
        "type": "transformer",
        "positions": "rotary",
        "norm": "rms_norm",
        "feed_forward": "gated",
        "activation": "silu",
        "num_heads": 4,
        "num_kv_heads": 2,
        "attention_bias": False,
        "feed_forward_bias": False,
        "tie_embeddings": False,
        "head_size": 8,
    },
    "cnn": {"type": "cnn", "base_channels": 4, "hidden_size": 8, "image_channels": 3, "vocab_size": 5},
    "lstm": {"type": "lstm"},
    "gru": {"type": "gru"},
}
FAULTS: list[Fault] = []
_PLANTS: dict[tuple[str, str], Plant] = {}
_OPTIONS: dict[tuple[str, str], Callable[[], dict[str, Any]]] = {}


def family(model: str) -> tuple[Any, Any, Any]:
    """Returns the twins of a family with the same random weights, and inputs."""
    settings = {"hidden_size": 16, "num_layers": 2, "vocab_size": 11, "dropout": 0.1, **MODELS[model]}
    if settings["type"] == "transformer":
        settings["max_seq_length"] = 16
    config = Config.from_dict({"seed": 1, "device": "cpu", "model": settings})
    ours, theirs = (icenet.build(config, backend=name).train() for name in ("mlx", "torch"))
    randomized(theirs)
    copy_weights(theirs, ours)
    return ours, theirs, draw(3, 12, 12, 3) if model == "cnn" else tokens(2, 7, below=11)


def make(fault: Fault) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Returns the twins, of which that of MLX has the fault, the inputs, and the options of `compare`."""
    key = fault.model, fault.name
    if fault.model not in MODELS:
        twins = PAIRS[fault.model](fault.name if key not in _OPTIONS else "")
    else:
        twins = family(fault.model)
    if key in _PLANTS:
        _PLANTS[key](twins[0])
    return *twins, _OPTIONS[key]() if key in _OPTIONS else {}


def fault(model: str, name: str, path: str, cause: str, kind: str) -> Callable[[Plant], Plant]:
    def add(plant: Plant) -> Plant:
        FAULTS.append(Fault(model, name, path, cause, kind))
        _PLANTS[model, name] = plant
        return plant

    return add


def changed(module: Any, call: Callable[..., Any], method: str = "__call__") -> None:
    """Gives one module another method: `call(original, module, *args)`."""
    original = getattr(type(module), method)
    module.__class__ = type(
        type(module).__name__,
        (type(module),),
        {"__module__": type(module).__module__, method: lambda self, *a, **k: call(original, self, *a, **k)},
    )


# ---- transformers -------------------------------------------------------------------------------------------


@fault("gpt", "eps", "blocks.1.attention_norm", "eps", "eps")
def _(model: Any) -> None:
    model.blocks[1].attention_norm.eps = 1e-3


@fault("gpt", "gelu", "blocks.0.feed_forward", "tanh", "gelu")
def _(model: Any) -> None:
    model.blocks[0].feed_forward.activation = "gelu_tanh"


@fault("gpt", "relu", "blocks.1.feed_forward", "ReLU", "activation")
def _(model: Any) -> None:
    model.blocks[1].feed_forward.activation = "relu"


@fault("gpt", "scale", "blocks.1.attention", "scale", "attention scale")
def _(model: Any) -> None:
    attention = model.blocks[1].attention
    attention.plan = attention.plan._replace(scale=1 / attention.plan.head_size)


@fault("gpt", "causal", "blocks.1.attention", "mask", "missing mask")
def _(model: Any) -> None:
    changed(model.blocks[1].attention, lambda call, self, x, mask, *rest: call(self, x, None, *rest))


@fault("gpt", "post", "blocks.0", "", "place of a norm")
def _(model: Any) -> None:
    model.blocks[0].norm_position = "post"


@fault("gpt", "parallel", "blocks.1", "", "wrong residual")
def _(model: Any) -> None:
    model.blocks[1].parallel = True


@fault("gpt", "rate", "blocks.0.attention.dropout", "dropout", "dropout")
def _(model: Any) -> None:
    model.blocks[0].attention.dropout.p = 0.2
    model.blocks[0].attention.dropout._p_1 = 0.8


@fault("gpt", "mode", "blocks.1.feed_forward.dropout", "mode", "dropout mode")
def _(model: Any) -> None:
    model.blocks[1].feed_forward.dropout.eval()


@fault("gpt", "embedding", "", "multiplied", "missing scale")
def _(model: Any) -> None:
    changed(model, lambda embed, self, *args: embed(self, *args) * 4.0, "embed")


@fault("gpt", "positions", "position_embedding", "shifted", "position")
def _(model: Any) -> None:
    changed(model.position_embedding, lambda call, self, ids: call(self, ids + 1))


@fault("gpt", "transposed", "blocks.0.attention.out_proj", "transpose", "transposed weight")
def _(model: Any) -> None:
    layer = model.blocks[0].attention.out_proj
    layer.weight = layer.weight.T


@fault("gpt", "exchanged", "blocks.1.attention.q_proj", "", "swapped weights")
def _(model: Any) -> None:
    attention = model.blocks[1].attention
    attention.q_proj, attention.k_proj = attention.k_proj, attention.q_proj


@fault("gpt", "final", "final_norm", "the input", "missing norm")
def _(model: Any) -> None:
    changed(model.final_norm, lambda call, self, x: x)


@fault("decoder", "eps", "blocks.0.feed_forward_norm", "eps", "eps")
def _(model: Any) -> None:
    model.blocks[0].feed_forward_norm.eps = 1e-3


@fault("decoder", "pairs", "blocks.1.attention", "rotary", "rotary pairs")
def _(model: Any) -> None:
    attention = model.blocks[1].attention
    attention.plan = attention.plan._replace(rotary_pairs="interleaved")


@fault("decoder", "theta", "", "theta", "theta")
def _(model: Any) -> None:
    config = model.config.model_copy(update={"rotary_theta": 500000.0})
    from icenet.core.config import transformer_plan

    model._rotary = ops.RotaryPositions(transformer_plan.rotary_plans(config), config.max_seq_length)


@fault("decoder", "gate", "blocks.0.feed_forward", "exchanged", "order of a gate")
def _(model: Any) -> None:
    def project(original: Any, self: Any, x: Any) -> Any:
        gate, up = original(self, x)
        return up, gate

    changed(model.blocks[0].feed_forward, project, "project")


@fault("decoder", "gelu", "blocks.1.feed_forward", "GELU", "activation")
def _(model: Any) -> None:
    model.blocks[1].feed_forward.activation = "gelu"


@fault("decoder", "values", "blocks.1.attention", "", "order of grouped heads")
def _(model: Any) -> None:
    attention = model.blocks[1].attention
    changed(attention, lambda mix, self, q, k, v, *rest: mix(self, q, k, v[..., ::-1], *rest), "mix")


@fault("decoder", "residual", "blocks.0", "", "missing residual")
def _(model: Any) -> None:
    changed(model.blocks[0], lambda call, self, x, *rest: call(self, x, *rest) - x)


@fault("decoder", "window", "blocks.1.attention", "a window of 4 keys", "mask off by one")
def _(model: Any) -> None:
    def call(original: Any, self: Any, x: Any, mask: Any, *rest: Any) -> Any:
        n = x.shape[1]
        keep = mx.tri(n, dtype=mx.bool_) & ~mx.tri(n, k=-4, dtype=mx.bool_)
        return original(self, x, keep[None, None], *rest)

    changed(model.blocks[1].attention, call)


# ---- image models -------------------------------------------------------------------------------------------


@fault("cnn", "eps", "stem.norm", "eps", "eps")
def _(model: Any) -> None:
    model.stem.norm.eps = 1e-3


@fault("cnn", "momentum", "blocks.0.norm", "momentum", "momentum")
def _(model: Any) -> None:
    model.blocks[0].norm.momentum = 0.9


@fault("cnn", "frozen", "blocks.1.branch.0.norm", "mode", "batch-norm mode")
def _(model: Any) -> None:
    model.blocks[1].branch[0].norm.eval()


@fault("cnn", "activation", "", "SiLU", "activation")
def _(model: Any) -> None:
    model.config = model.config.model_copy(update={"activation": "silu"})


@fault("cnn", "shortcut", "blocks.1.shortcut", "zero", "missing residual")
def _(model: Any) -> None:
    changed(model.blocks[1].shortcut, lambda call, self, x: call(self, x) * 0)


@fault("cnn", "pooling", "", "max|position", "pooling")
def _(model: Any) -> None:
    def features(original: Any, self: Any, images: Any) -> Any:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        x = x.max(axis=(1, 2))
        return self.dropout(ops.activation(self.config.activation, self.hidden(x)))

    changed(model, features, "extract_features")


@fault("cnn", "edge", "blocks.0.conv", "padding", "padding mode")
def _(model: Any) -> None:
    def call(original: Any, self: Any, x: Any) -> Any:
        x = mx.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="edge")
        return mx.conv2d(x, self.weight, self.stride, 0)

    changed(model.blocks[0].conv, call)


@fault("cnn", "columns", "stem", "swapped axes|transpose", "swapped axes")
def _(model: Any) -> None:
    changed(model.stem, lambda call, self, x: call(self, x).swapaxes(1, 2))


@fault("cnn", "flipped", "stem.conv", "", "transposed weight")
def _(model: Any) -> None:
    model.stem.conv.weight = model.stem.conv.weight[:, ::-1]


@fault("cnn", "rate", "dropout", "dropout", "dropout")
def _(model: Any) -> None:
    model.dropout.p, model.dropout._p_1 = 0.3, 0.7


@fault("cnn", "bias", "hidden", "bias", "missing bias")
def _(model: Any) -> None:
    changed(model.hidden, lambda call, self, x: x @ self.weight.T)


# ---- recurrent models ---------------------------------------------------------------------------------------


@fault("lstm", "gates", "layers.0", "order|gate", "gate order")
def _(model: Any) -> None:
    layer = model.layers[0]
    for name, array in layer.parameters().items():
        i, f, g, o = mx.split(array, 4)
        layer[name] = mx.concatenate([i, f, o, g])


@fault("lstm", "reversed", "layers.1", "revers|order", "direction of a sequence")
def _(model: Any) -> None:
    def call(original: Any, self: Any, x: Any, *rest: Any) -> Any:
        y, state = original(self, x[::-1], *rest)
        return y[::-1], state

    changed(model.layers[1], call)


@fault("lstm", "forget", "layers.1", "", "gate bias")
def _(model: Any) -> None:
    def project(original: Any, self: Any, x: Any, direction: str) -> Any:
        i, f, g, o = mx.split(original(self, x, direction), 4, axis=-1)
        return mx.concatenate([i, f + 1.0, g, o], axis=-1)

    changed(model.layers[1], project, "project")


@fault("lstm", "dropout", "dropouts.0", "dropout|mode", "dropout mode")
def _(model: Any) -> None:
    model.dropouts[0].eval()


@fault("lstm", "residual", "", "", "wrong residual")
def _(model: Any) -> None:
    def run(original: Any, self: Any, *args: Any) -> Any:
        x, states = original(self, *args)
        return x + self.token_embedding(args[0]), states

    changed(model, run, "run_layers")


@fault("gru", "gates", "layers.1", "order|gate", "gate order")
def _(model: Any) -> None:
    layer = model.layers[1]
    for name, array in layer.parameters().items():
        if array.shape[0] % 3 == 0 and array.shape[0] > 16:
            r, z, n = mx.split(array, 3)
            layer[name] = mx.concatenate([z, r, n])


@fault("gru", "state", "layers.0", "shifted", "off by one")
def _(model: Any) -> None:
    def call(original: Any, self: Any, x: Any, *rest: Any) -> Any:
        y, state = original(self, x, *rest)
        return mx.concatenate([mx.zeros_like(y[:1]), y[:-1]]), state

    changed(model.layers[0], call)


@fault("gru", "embedding", "token_embedding", "multiplied", "missing scale")
def _(model: Any) -> None:
    changed(model.token_embedding, lambda call, self, ids: call(self, ids) * 4.0)


# ---- training and precision ---------------------------------------------------------------------------------

ADAM = {"lr": 1e-2, "weight_decay": 0.1}


def trained(model: str, name: str, cause: str, kind: str, ours: Any, theirs: Any) -> None:
    """Adds a fault of an optimizer, which no module has: its path is "*"."""
    FAULTS.append(Fault(model, name, "*", cause, kind))
    _OPTIONS[model, name] = lambda: {"optimizer": (ours(), theirs)}


def without_biases(module: Any) -> torch.optim.Optimizer:
    groups = [[p for p in module.parameters() if (p.ndim > 1) is flag] for flag in (True, False)]
    return torch.optim.AdamW([{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}], **ADAM)


def mlx_adamw(**options: Any) -> Callable[[], Any]:
    settings = {"learning_rate": 1e-2, "weight_decay": 0.1, "bias_correction": True, **options}
    return lambda: optimizers.AdamW(**settings)


torch_adamw = partial(torch.optim.AdamW, **ADAM)
trained("graph", "correction", "bias_correction", "bias correction", mlx_adamw(bias_correction=False), torch_adamw)
trained("graph", "biases", "biases", "weight decay on biases", mlx_adamw(), without_biases)
trained("graph", "decay", "weight decay is 0.2", "weight decay", mlx_adamw(weight_decay=0.2), torch_adamw)
trained("graph", "betas", "betas", "betas", mlx_adamw(betas=[0.9, 0.95]), torch_adamw)
trained("tcn", "rate", "learning rate", "learning rate", mlx_adamw(learning_rate=2e-2), torch_adamw)
trained("graph", "eps of adam", "eps", "eps of an optimizer", mlx_adamw(eps=1e-5), torch_adamw)
trained(
    "graph",
    "nesterov",
    "Nesterov",
    "momentum of an optimizer",
    lambda: optimizers.SGD(1e-2, momentum=0.9, nesterov=True),
    partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
)
trained(
    "diffusion",
    "momentum",
    "momentum",
    "momentum of an optimizer",
    lambda: optimizers.SGD(1e-2, momentum=0.8),
    partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
)


def option(model: str, name: str, path: str, cause: str, kind: str, **options: Any) -> Callable[[Plant], Plant]:
    """Adds a fault that is compared with options."""

    def add(plant: Plant) -> Plant:
        fault(model, name, path, cause, kind)(plant)
        _OPTIONS[model, name] = lambda: options
        return plant

    return add


def to_tf32(x: mx.array) -> mx.array:
    """Returns x with 10 bits of mantissa, rounded to nearest; the gradient is that of the identity."""
    factor = x * (2.0**13 + 1)
    return x + mx.stop_gradient(factor - (factor - x) - x)


@option("diffusion", "tf32", "hidden", "TF32", "tf32")
def _(model: Any) -> None:
    changed(model.hidden, lambda call, self, x: to_tf32(x) @ to_tf32(self.weight).T + self.bias)


@option("convnext", "tf32", "blocks.0.pwconv1", "TF32", "tf32")
def _(model: Any) -> None:
    changed(model.blocks[0].pwconv1, lambda call, self, x: to_tf32(x) @ to_tf32(self.weight).T + self.bias)


@option("diffusion", "cast", "", "cast to fp32 is missing", "missing cast", dtype="bf16")
def _(model: Any) -> None:
    def embedded(original: Any, self: Any, t: Any) -> Any:
        frequencies = mx.exp(-math.log(10000.0) * mx.arange(8) / 8).astype(mx.bfloat16)
        angles = t[:, None].astype(mx.bfloat16) * frequencies
        return mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)

    changed(model, embedded, "embedded")


def gradient_fault(model: str, name: str, path: str, kind: str, find: Callable[[Any], Any]) -> None:
    @fault(model, name, path, "stop_gradient|zero|not passed", kind)
    def _(built: Any) -> None:
        changed(find(built), lambda call, self, x, *rest: mx.stop_gradient(call(self, x, *rest)))


gradient_fault("unet", "detached", "down2", "wrong gradient", lambda m: m.down2)
gradient_fault("graph", "detached", "layers.0", "wrong gradient", lambda m: m.layers[0])


@fault("vit", "eps", "blocks.1.norm2", "eps", "eps")
def _(model: Any) -> None:
    model.blocks[1].norm2.eps = 1e-3


@fault("vit", "transposed", "blocks.0.attn", "", "transposed weight")
def _(model: Any) -> None:
    layer = model.blocks[0].attn.out_proj
    layer.weight = layer.weight.T


@fault("tagger", "eps", "norm", "eps", "eps")
def _(model: Any) -> None:
    model.norm.eps = 1e-3


@fault("tagger", "bias", "classifier", "bias", "missing bias")
def _(model: Any) -> None:
    changed(model.classifier, lambda call, self, x: x @ self.weight.T)


@fault("tcn", "eps", "body.0.norm", "eps", "eps")
def _(model: Any) -> None:
    model.body.layers[0].norm.eps = 1e-3


@fault("tcn", "stride", "body.0", "", "missing residual")
def _(model: Any) -> None:
    changed(model.body.layers[0], lambda call, self, x: call(self, x) - self.downsample(x))


@fault("diffusion", "eps", "norm", "eps", "eps")
def _(model: Any) -> None:
    model.norm.eps = 1e-3


@fault("unet", "slope", "up1", "leaky", "activation")
def _(model: Any) -> None:
    model.up1.fault = "activation"


def rounded_weights(scale: float) -> Callable[[Any], None]:
    def plant(model: Any) -> None:
        layer = model.head if hasattr(model, "head") else model.readout
        layer.weight = layer.weight * scale

    return plant


fault("convnext", "weights", "head", "", "inexact weights")(rounded_weights(1 + 2e-6))
fault("graph", "weights", "readout", "", "inexact weights")(rounded_weights(1.001))
fault("vit", "half", "head", "", "inexact weights")(
    lambda model: model.head.update({"weight": model.head.weight.astype(mx.float16).astype(mx.float32)})
)

ALL = [*PAIR_FAULTS, *FAULTS]
"""All faults: of hand-written models, of our families, of training and of precision."""
