"""Activations."""

from __future__ import annotations

from icenet.core.porting.table.base import Operation, entry, helper_entry, templates, training_flag

templates(
    {
        "relu": "nn.relu({self})",
        "silu": "nn.silu({self})",
        "mish": "nn.mish({self})",
        "log_sigmoid": "nn.log_sigmoid({self})",
    }
)

helper_entry("log_sigmoid_forward", function="log_sigmoid_forward")
helper_entry("softsign", function="softsign")
helper_entry("tanhshrink", function="tanhshrink")
helper_entry("hardswish", function="hardswish")
helper_entry("hardsigmoid", function="hardsigmoid")
helper_entry("relu6", function="relu6")
helper_entry("selu", function="selu")
helper_entry("leaky_relu", function="leaky_relu", arguments=("self", "negative_slope"))
helper_entry("hardshrink", function="hardshrink", arguments=("self", "lambd"))
helper_entry("softshrink", function="softshrink", arguments=("self", "lambd"))
helper_entry("celu", function="celu", arguments=("self", "alpha"))
helper_entry("threshold", function="threshold", arguments=("self", "threshold", "value"))


@entry("softplus")
def softplus(n: Operation) -> str:
    beta, threshold = n.get("beta", 1), n.get("threshold", 20)
    if beta == 1 and threshold >= 20:  # above 20 softplus(x) is x in fp32
        return f"nn.softplus({n['self']})"
    return n.call("softplus", n["self"], n["beta"], n["threshold"])


@entry("hardtanh")
def hardtanh(n: Operation) -> str:
    bounds = [n.args["min_val"], n.args["max_val"]]
    bounds = bounds if n.out.is_floating else [int(bound) for bound in bounds]
    return n.call("hardtanh", n["self"], *map(n.source, bounds))


@entry("gelu")
def gelu(n: Operation) -> str:
    function = {"tanh": "gelu_approx", "sigmoid": "gelu_fast_approx"}.get(n.get("approximate", "none"), "gelu")
    return f"nn.{function}({n['self']})"


@entry("elu")
def elu(n: Operation) -> str:
    return n.call("elu", n["self"], n["alpha"], n["scale"], n["input_scale"])


@entry("prelu", "_prelu_kernel")
def prelu(n: Operation) -> str:
    x, weight = n.tensor("self"), n.tensor("weight")
    assert x is not None and weight is not None
    text = n.atom("weight")
    if not x.ndim and weight.ndim:
        text = f"{text}.reshape(())"
    following = x.ndim - 1 - n.get("channels", 1)
    if weight.ndim == 1 and weight.shape[0] != 1 and following > 0:
        text = f"{text}.reshape({', '.join(['-1'] + ['1'] * following)})"
    return n.call("leaky_relu", n["self"], text)


@entry("rrelu", "rrelu_with_noise")
def rrelu(n: Operation) -> str:
    return n.call("rrelu", n["self"], n["lower"], n["upper"], training_flag(n))


@entry("glu")
def glu(n: Operation) -> str:
    return f"nn.glu({n['self']}, axis={n['dim']})"
