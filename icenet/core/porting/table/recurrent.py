"""Recurrent layers and their cells, and whole modules of torch.nn whose classes the source has."""

from __future__ import annotations

from icenet.core.porting.record import Ref
from icenet.core.porting.table.base import Operation, entry, training_flag


@entry("lstm", "gru", "rnn_tanh", "rnn_relu")
def layers(n: Operation) -> str:
    layer = n.helper({"rnn_tanh": "rnn"}.get(n.node.base, n.node.base))
    given = {"num_layers": n["num_layers"], "has_biases": n["has_biases"]}
    keywords = {key: value for key, value in given.items() if value not in ("1", "True")}
    if n.args["bidirectional"]:
        keywords["bidirectional"] = "True"
    if n.args["batch_first"]:
        keywords["batch_first"] = "True"
    if n.args["dropout"]:
        keywords["p"] = n["dropout"]
        keywords["training"] = training_flag(n, "train")
    states = f"[{n['hx']}]" if isinstance(n.args["hx"], Ref) else n["hx"]
    return n.call("recurrent", layer, n["input"], states, n["params"], **keywords)


@entry("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(n: Operation) -> str:
    names = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")
    return n.call(n.node.base, *(n.source(n.args.get(name)) for name in names))


@entry("recurrent")
def module(n: Operation) -> str:
    """A whole module of torch.nn, whose class `icenet.core.porting.layers.recurrent` writes."""
    states = n.args["hx"]
    if states is None:
        return f"{n.args['text']}({n['self']})"
    given = n.source(states) if isinstance(states, Ref) else f"({', '.join(map(n.source, states))})"
    return f"{n.args['text']}({n['self']}, {given})"


@entry("attention")
def attention(n: Operation) -> str:
    """A whole module of torch.nn, whose class `icenet.core.porting.layers.attention` writes."""
    given = [n["query"]] if n.args["is_self"] else [n["query"], n["key"], n["value"]]
    given += [f"{name}={n[name]}" for name in ("attn_mask", "key_padding_mask") if name in n.args]
    return f"{n.args['text']}({', '.join(given)})"
