"""Normalizations and losses."""

from __future__ import annotations

from icenet.core.porting.record import Ref
from icenet.core.porting.table.base import Operation, entry


@entry("layer_norm")
def layer_norm(n: Operation) -> str:
    shape = n.args["normalized_shape"]
    if len(shape) == 1:
        return f"mx.fast.layer_norm({n['input']}, {n['weight']}, {n['bias']}, {n['eps']})"
    return n.call("layer_norm", n["input"], repr(len(shape)), n["weight"], n["bias"], n["eps"])


@entry("rms_norm", "_fused_rms_norm")
def rms_norm(n: Operation) -> str:
    eps = n.args.get("eps")
    text = n.source(1.1920928955078125e-07 if eps is None else eps)
    if len(n.args["normalized_shape"]) == 1:
        return f"mx.fast.rms_norm({n['input']}, {n['weight']}, {text})"
    return n.call("rms_norm", n["input"], repr(len(n.args["normalized_shape"])), n["weight"], text)


@entry("group_norm")
def group_norm(n: Operation) -> str:
    return n.call("group_norm", n["input"], n["num_groups"], n["weight"], n["bias"], n["eps"])


@entry("instance_norm")
def instance_norm(n: Operation) -> str:
    if not n.args["use_input_stats"]:
        return n.call("batch_norm", n["input"], n["running_mean"], n["running_var"], n["weight"], n["bias"], n["eps"])
    return n.call("instance_norm", n["input"], n["weight"], n["bias"], n["eps"])


@entry("batch_norm")
def batch_norm(n: Operation) -> str:
    if n.args["training"] or n.args.get("running_mean") is None:
        return n.call("batch_norm_of_batch", n["input"], n["weight"], n["bias"], n["eps"])
    return n.call("batch_norm", n["input"], n["running_mean"], n["running_var"], n["weight"], n["bias"], n["eps"])


@entry("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
def native_batch_norm(n: Operation) -> str:
    is_training = n.get("training", False) or n.args.get("running_mean") is None
    running = ["None", "None"] if is_training else [n["running_mean"], n["running_var"]]
    return n.call("native_batch_norm", n["input"], *running, n["weight"], n["bias"], n["eps"])


@entry("_batch_norm_with_update")
def batch_norm_with_update(n: Operation) -> str:
    text = n.call("native_batch_norm", n["input"], "None", "None", n["weight"], n["bias"], n["eps"])
    return f"(*{text}, mx.zeros((0,), mx.uint8))"


@entry("native_group_norm")
def native_group_norm(n: Operation) -> str:
    return n.call("native_group_norm", n["input"], n["group"], n["weight"], n["bias"], n["eps"])


@entry("batch_norm_statistics", "instance_norm_statistics")
def statistics(n: Operation) -> str:
    return n.call(n.node.base, n["input"], n["running"], n["momentum"], n["which"])


@entry("native_layer_norm")
def native_layer_norm(n: Operation) -> str:
    return n.call(
        "native_layer_norm", n["input"], repr(len(n.args["normalized_shape"])), n["weight"], n["bias"], n["eps"]
    )


@entry("weight_norm", "_weight_norm", "_weight_norm_interface")
def weight_norm(n: Operation) -> str:
    return n.call("weight_norm", n["v"], n["g"], n["dim"])


# ---- losses ------------------------------------------------------------------------------------------------

_REDUCTIONS = {0: "none", 1: "mean", 2: "sum"}


def _loss(name: str, *arguments: str):  # type: ignore[no-untyped-def]
    def write(n: Operation) -> str:
        return n.call(
            name, *(n.source(n.args.get(item)) for item in arguments), repr(_REDUCTIONS[n.get("reduction", 0)])
        )

    return write


entry("mse_loss")(_loss("mse_loss", "self", "target"))
entry("l1_loss")(_loss("l1_loss", "self", "target"))
entry("smooth_l1_loss")(_loss("smooth_l1_loss", "self", "target", "beta"))
entry("huber_loss")(_loss("huber_loss", "self", "target", "delta"))
entry("soft_margin_loss")(_loss("soft_margin_loss", "self", "target"))
entry("binary_cross_entropy")(_loss("binary_cross_entropy", "self", "target", "weight"))
entry("binary_cross_entropy_with_logits")(
    _loss("binary_cross_entropy_with_logits", "self", "target", "weight", "pos_weight")
)
entry("kl_div")(_loss("kl_div", "self", "target", "log_target"))
entry("hinge_embedding_loss")(_loss("hinge_embedding_loss", "self", "target", "margin"))
entry("margin_ranking_loss")(_loss("margin_ranking_loss", "input1", "input2", "target", "margin"))
entry("cosine_embedding_loss")(_loss("cosine_embedding_loss", "input1", "input2", "target", "margin"))
entry("triplet_margin_loss")(
    _loss("triplet_margin_loss", "anchor", "positive", "negative", "margin", "p", "eps", "swap")
)
entry("poisson_nll_loss")(_loss("poisson_nll_loss", "input", "target", "log_input", "full", "eps"))
entry("nll_loss", "nll_loss_nd", "nll_loss2d")(_loss("nll_loss", "self", "target", "weight", "ignore_index"))
entry("cross_entropy_loss")(_loss("cross_entropy", "self", "target", "weight", "ignore_index", "label_smoothing"))
entry("multilabel_margin_loss")(_loss("multilabel_margin_loss", "self", "target"))
entry("multi_margin_loss")(_loss("multi_margin_loss", "self", "target", "p", "margin", "weight"))


_CHUNKED = "torch_nn::_linear_cross_entropy_batch_chunked"


@entry(_CHUNKED, f"{_CHUNKED}_no_reduction")
def linear_cross_entropy(n: Operation) -> str:
    """The loss without PyTorch's chunks, which bound its memory; its other results are gradients for its backward."""
    logits = f"{n.atom('input')} @ {n.atom('linear_weight')}.T"
    logits += "" if n.args.get("linear_bias") is None else f" + {n.atom('linear_bias')}"
    reduction = repr(n.get("reduction", "none"))
    weight = "None" if n.args.get("weight") is None else f"mx.stop_gradient({n['weight']})"
    loss = n.call("cross_entropy", logits, n["target"], weight, n["ignore_index"], "0.0", reduction)
    return loss if n.node.base.endswith("_no_reduction") else f"({loss}, None, None, None)"


@entry("ctc_loss")
def ctc_loss(n: Operation) -> str:
    lengths = n.args["input_lengths"], n.args["target_lengths"]
    texts = [n.source(item) if isinstance(item, Ref) else f"mx.array({n.source(item)})" for item in lengths]
    reduction = repr(_REDUCTIONS[n.get("reduction", 1)])
    return n.call(
        "ctc_loss", n["log_probs"], n["targets"], *texts, n["blank"], reduction, repr(bool(n.get("zero_infinity")))
    )
