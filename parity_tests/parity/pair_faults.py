"""Models as users write them, of plain layers of MLX and PyTorch, and the faults that can be planted in each.

`PAIRS` holds a function per model: called with the name of a fault, or "", it returns the MLX model, the PyTorch
model, and the inputs of the MLX model. Every fault has the path of the module in which it is, and words of its cause.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from image_pairs import convnext, unet, vit
from other_pairs import diffusion, graph, tcn
from pairs import Fault
from recurrence_pairs import mingru, retnet
from text_pairs import llama, tagger

PAIRS: dict[str, Callable[[str], tuple[Any, Any, Any]]] = {
    "unet": unet,
    "convnext": convnext,
    "llama": llama,
    "tagger": tagger,
    "tcn": tcn,
    "diffusion": diffusion,
    "graph": graph,
    "vit": vit,
    "retnet": retnet,
    "mingru": mingru,
}

FAULTS = [
    Fault("unet", "eps", "down1.norm1", "eps", "eps"),
    Fault("unet", "padding", "down1", "", "padding mode"),
    Fault("unet", "momentum", "down1.norm1", "momentum", "momentum"),
    Fault("unet", "activation", "down1", "leaky", "activation"),
    Fault("unet", "biased", "down2.norm1", "biased", "running variance"),
    Fault("unet", "frozen", "down2.norm2", "mode", "batch-norm mode"),
    Fault("unet", "pool", "pool", "average", "pooling"),
    Fault("unet", "corners", "up", "align_corners", "align_corners"),
    Fault("unet", "order", "", "order", "order of a concatenation"),
    Fault("unet", "swap", "", "transpose", "swapped axes"),
    Fault("convnext", "eps", "blocks.1.norm", "eps", "eps"),
    Fault("convnext", "gelu", "blocks.1", "tanh", "gelu"),
    Fault("convnext", "silu", "blocks.1", "SiLU", "activation"),
    Fault("convnext", "gamma", "blocks.1", "gamma|product", "missing scale"),
    Fault("convnext", "residual", "blocks.1", "not added|left out", "missing residual"),
    Fault("convnext", "gradient", "blocks.1", "stop_gradient", "wrong gradient"),
    Fault("convnext", "pooling", "", "maximum|max", "pooling"),
    Fault("llama", "theta", "layers.1.self_attn", "theta", "theta"),
    Fault("llama", "pairs", "layers.1.self_attn", "rotary", "rotary pairs"),
    Fault("llama", "sign", "layers.1.self_attn", "rotary", "rotary sign"),
    Fault("llama", "tile", "layers.1.self_attn", "tile", "order of grouped heads"),
    Fault("llama", "scale", "layers.1.self_attn", "scale", "attention scale"),
    Fault("llama", "mask", "layers.1.self_attn", "mask", "mask off by one"),
    Fault("llama", "causal", "layers.1.self_attn", "mask", "missing mask"),
    Fault("llama", "softmax", "layers.1.self_attn", "softmax", "axis of softmax"),
    Fault("llama", "heads", "layers.1.self_attn", "swapped axes", "swapped axes"),
    Fault("llama", "gate", "layers.1.mlp", "exchanged", "order of a gate"),
    Fault("llama", "geglu", "layers.1.mlp", "GELU", "activation"),
    Fault("llama", "eps", "layers.1.input_layernorm", "eps", "eps"),
    Fault("llama", "branch", "layers.1", "not added", "wrong residual"),
    Fault("llama", "embedding", "", "multiplied", "missing scale"),
    Fault("tagger", "rate", "dropout", "dropout", "dropout"),
    Fault("tagger", "direction", "", "reversed", "direction of a sequence"),
    Fault("tagger", "reversed", "", "reversed", "direction of a sequence"),
    Fault("tagger", "order", "", "order", "order of a concatenation"),
    Fault("tagger", "gates", "backward_lstm", "gate", "gate order"),
    Fault("tagger", "tanh", "", "tanh", "activation"),
    Fault("tcn", "dilation", "body.1", "", "dilation"),
    Fault("tcn", "groups", "body.1.norm", "pytorch_compatible", "grouping of a norm"),
    Fault("tcn", "centre", "body.1", "padding", "padding side"),
    Fault("tcn", "edge", "body.1", "padding", "padding mode"),
    Fault("tcn", "relu", "body.1", "ReLU", "activation"),
    Fault("tcn", "step", "", "position 0", "index"),
    Fault("diffusion", "base", "", "theta", "theta"),
    Fault("diffusion", "count", "", "", "off by one"),
    Fault("diffusion", "sincos", "", "order", "order of a concatenation"),
    Fault("diffusion", "modulation", "", "order", "order of a gate"),
    Fault("diffusion", "one", "", "not added", "missing scale"),
    Fault("diffusion", "bias", "", "bias", "bias twice"),
    Fault("diffusion", "normalize", "", "unbiased", "biased variance"),
    Fault("graph", "direction", "layers.1", "order", "gather"),
    Fault("graph", "degree", "layers.1", "", "scatter"),
    Fault("graph", "sum", "layers.1", "quotient", "scatter"),
    Fault("graph", "maximum", "layers.1", "", "scatter"),
    Fault("graph", "slope", "", "slope", "activation"),
    Fault("graph", "readout", "", "sum", "pooling"),
    Fault("vit", "post", "blocks.0", "output of attn", "place of a norm"),
    Fault("vit", "quick", "blocks.0", "GELU", "gelu"),
    Fault("vit", "dropout", "blocks.0", "dropout", "dropout"),
    Fault("vit", "columns", "", "", "swapped axes"),
    Fault("vit", "last", "", "order", "order of a concatenation"),
    Fault("vit", "positions", "", "", "position"),
    Fault("vit", "mean", "", "mean", "pooling"),
    Fault("vit", "qkv", "blocks.1.attn", "order", "swapped weights"),
    Fault("retnet", "halves", "layers.1.retention", "", "rotary pairs"),
    Fault("retnet", "scale", "layers.1.retention", "scale", "attention scale"),
    Fault("retnet", "eps", "layers.1.retention.group_norm", "eps", "eps"),
    Fault("retnet", "total", "layers.1.retention", "detach", "wrong gradient"),
    Fault("retnet", "gate", "layers.1.retention", "sigmoid", "activation"),
    Fault("retnet", "glu", "layers.1", "exchanged", "order of a gate"),
    Fault("mingru", "split", "layers.1.gru", "split", "order of a gate"),
    Fault("mingru", "offset", "layers.1.gru", "0.5", "missing constant"),
    Fault("mingru", "gates", "layers.1.gru", "sign", "sign"),
    Fault("mingru", "detached", "layers.1.gru", "", "wrong gradient"),
    Fault("mingru", "delay", "layers.1.gru", "shifted", "position"),
    Fault("mingru", "centre", "layers.1", "shifted", "padding side"),
    Fault("mingru", "residual", "layers.1", "not added", "missing residual"),
    Fault("mingru", "post", "layers.1", "before norm1", "place of a norm"),
]
