"""Recurrent layers."""

from __future__ import annotations

from icenet.core.porting.table.base import Operation, entry
from icenet.core.porting.table.elementwise import training


@entry("lstm", "gru", "rnn_tanh", "rnn_relu")
def layers(n: Operation) -> str:
    name = n.node.base
    keywords = {"num_layers": n["num_layers"], "has_biases": n["has_biases"]}
    if n.args["bidirectional"]:
        keywords["bidirectional"] = "True"
    if n.args["batch_first"]:
        keywords["batch_first"] = "True"
    if n.args["dropout"]:
        keywords["dropout"] = n["dropout"]
        keywords["training"] = training(n, "train")
    return n.call(
        name,
        n["input"],
        n["hx"],
        n["params"],
        **{k: v for k, v in keywords.items() if (k, v) not in (("num_layers", "1"), ("has_biases", "True"))},
    )


@entry("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(n: Operation) -> str:
    names = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")
    return n.call(n.node.base, *(n.source(n.args.get(name)) for name in names))
