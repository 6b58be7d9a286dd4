"""The class of `nn.MultiheadAttention` in a port: PyTorch's parameters, and one call of MLX's fused attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from icenet.core.porting.graph.calls import Call
from icenet.core.porting.layers.mlx_layers import WrittenLayer
from icenet.core.porting.record import Graph, Module, Node, Ref, Tensor, refs
from icenet.core.porting.source.specialize import NOT_NONE

_ARRAYS = {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}
_MASKS = ("attn_mask", "key_padding_mask")


@dataclass(frozen=True)
class Attention(WrittenLayer):
    """A module that is a multi-head attention.

    Attributes:
        sizes: embed_dim, num_heads and the probability of the dropout.
        has_bias: Whether its projections have biases.
        batch_first: Whether its inputs are [B, T, C], not [T, B, C].
        is_self: Whether query, key and value are one array in all calls.
        weights: Whether the calls return the weights: "" for no, "mean" over the heads, or "all".
        hidden: What a query without a key gives: as in PyTorch, "zero" if no weights are needed and else "nan"; "" if
            each query has a key.
        masks: The masks that some calls give, with "bool" or "float", and their number of axes.
        always: The masks that all calls give.
    """

    sizes: tuple[int, int, float] = (0, 0, 0.0)
    has_bias: bool = True
    batch_first: bool = False
    is_self: bool = True
    weights: str = ""
    hidden: str = ""
    masks: frozenset[tuple[str, str, int]] = frozenset()
    always: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return "MultiheadSelfAttention" if self.is_self else "MultiheadAttention"

    @property
    def dropout(self) -> float:
        return self.sizes[2]

    def instance(self, name: str) -> str:
        dims, heads, dropout = self.sizes
        return f"{name}({dims}, {heads}{f', dropout={dropout}' if dropout else ''})"

    def functions(self) -> dict[str, dict[str, Any]]:
        keys = ["q", "k", "v", "scale", *(["mask"] if self.always else [])]
        return {self.helper: dict.fromkeys(keys, NOT_NONE)} if self.hidden == "zero" else {}

    @property
    def given(self) -> list[str]:
        return [key for key in _MASKS if any(key == name for name, _, _ in self.masks)]

    @property
    def is_boolean(self) -> bool:
        """Whether the class sets the results of queries without a key to 0 with a mask of booleans."""
        is_given = bool(self.masks) and len(self.always) == len(self.given)
        return self.hidden == "zero" and is_given and all(kind == "bool" for _, kind, _ in self.masks)

    @property
    def helper(self) -> str:
        """The function that attends and sets the results of queries without a key to 0."""
        return "masked_attention" if self.is_boolean else "biased_attention"

    def class_source(self, name: str) -> str:
        return "\n".join(_Class(name, self).lines())


def attention_of(module: Module, arrays: Iterable[str]) -> Attention | None:
    """Returns the attention of a module of torch.nn, None for another one.

    Args:
        module: The module.
        arrays: The paths of all arrays.
    """
    if module.kind != "torch.nn.modules.activation.MultiheadAttention":
        return None
    s = module.settings
    own = {path.removeprefix(f"{module.path}.") for path in arrays if path.startswith(f"{module.path}.")}
    has_bias = "in_proj_bias" in own
    needed = _ARRAYS if has_bias else {name for name in _ARRAYS if not name.endswith("bias")}
    if not s.get("is_plain_call", True) or own != needed or s["add_zero_attn"] or not 0 <= s["dropout"] < 1:
        return None
    sizes = (s["embed_dim"], s["num_heads"], s["dropout"])
    return Attention("MultiheadAttention", sizes=sizes, has_bias=has_bias, batch_first=s["batch_first"])


def call_of(
    graph: Graph, call: Call, layer: Attention, uses: dict[str, list[str]], needed: set[str], hiding: set[str]
) -> tuple[Attention, list[Node]] | None:
    """Returns the layer as a call needs it and the node of the call; None if it computes something else.

    Args:
        graph: The graph of the call.
        call: A call of the module.
        layer: The layer of its module.
        uses: The calls in which each value is used.
        needed: The values that the results of the graph depend on.
        hiding: The masks of numbers that may hide all keys of a query.
    """
    inputs = [call.given.get(name) for name in ("query", "key", "value")]
    masks = {name: call.given[name] for name in _MASKS if call.given.get(name) is not None}
    results = list(refs(call.results))
    outs = graph.values()
    if any(not isinstance(value, Ref) for value in (*inputs, *masks.values())) or not results:
        return None
    if any(not isinstance(outs[name], Tensor) or outs[name].ndim != 3 for name in refs([*inputs, results[0]])):
        return None
    for node in call.nodes():
        used = any(call.entered not in stack.split("/") for stack in uses.get(node.name, ()))
        if used and node.name not in results and not node.base.startswith("sym."):
            return None
    weights = ""
    if len(results) > 1 and results[1] in needed:
        weights = "mean" if call.given.get("average_attn_weights", True) else "all"
    kinds = set()
    for name, value in masks.items():
        mask = outs[value.name]
        kinds.add((name, "bool" if mask.dtype == "bool" else "float", mask.ndim))
    hides = any(outs[value.name].dtype == "bool" or value.name in hiding for value in masks.values())
    needs_weights = call.given.get("need_weights", True) is not False
    layer = replace(
        layer,
        is_self=len({value.name for value in inputs if value is not None}) == 1,
        weights=weights,
        hidden=("nan" if needs_weights else "zero") if hides else "",
        masks=frozenset(kinds),
        always=frozenset(masks),
    )
    args = {"path": call.path, **dict(zip(("query", "key", "value"), inputs, strict=True)), **masks}
    return layer, [Node(results[0], "attention", args, outs[results[0]], call.place)]


def nodes_of(nodes: list[Node], call: Call, layer: Attention, graph: Graph) -> list[Node]:
    """Returns the nodes of a call: one, and its two results if the layer returns its weights."""
    (node,), results = nodes, list(refs(call.results))
    args = {**node.args, "is_self": layer.is_self}
    if layer.is_self:
        del args["key"], args["value"]
    if not layer.weights:
        return [replace(node, args=args)]
    outs = [node.out, next(item.out for item in graph.nodes if item.name == results[1])]
    whole = replace(node, name=f"{call.entered}_layer", out=outs, args=args)
    return [
        whole,
        *(
            Node(name, "item", {"self": Ref(whole.name), "index": index, "place": index}, out, call.place)
            for index, (name, out) in enumerate(zip(results, outs, strict=True))
        ),
    ]


def joined(layers: list[Attention]) -> Attention | None:
    """Returns the layer that serves several calls, None if one does not."""
    kinds = frozenset(kind for layer in layers for kind in layer.masks)
    weights = {layer.weights for layer in layers}
    hidden = {layer.hidden for layer in layers}
    if len({name for name, _, _ in kinds}) < len(kinds) or len(weights - {""}) > 1 or len(hidden - {""}) > 1:
        return None
    return replace(
        layers[0],
        is_self=all(layer.is_self for layer in layers),
        weights=max(weights),
        hidden=max(hidden),
        masks=kinds,
        always=frozenset.intersection(*(layer.always for layer in layers)),
    )


def shared(layers: dict[str, Attention]) -> dict[str, Attention]:
    """Returns the layers with classes for several of them: the masks that one of them gets are parameters of all."""
    found = dict(layers)
    while True:
        for path, layer in found.items():
            for other in found.values():
                made = _both(layer, other)
                if made is not None and made != layer:
                    found[path] = made
                    break
            else:
                continue
            break
        else:
            return found


def _both(layer: Attention, other: Attention) -> Attention | None:
    """Returns a layer whose class is that of another one, too."""

    def key(item: Attention) -> tuple[Any, ...]:
        return item.has_bias, item.batch_first, item.is_self, item.weights, bool(item.dropout)

    made = joined([layer, other]) if key(layer) == key(other) else None
    if made is None or {layer.is_boolean, other.is_boolean} != {made.is_boolean}:
        return None
    return replace(made, sizes=layer.sizes)


class _Class:
    def __init__(self, name: str, layer: Attention) -> None:
        self.name, self.layer = name, layer

    def lines(self) -> list[str]:
        sizes = "[B, T, embed_dim]" if self.layer.batch_first else "[T, B, embed_dim]"
        dropout = ", dropout" if self.layer.dropout else ""
        biases = [
            "self.in_proj_bias = mx.zeros((3 * embed_dim,))",
            "self.out_proj = nn.Linear(embed_dim, embed_dim)",
        ]
        if not self.layer.has_bias:
            biases = ["self.out_proj = nn.Linear(embed_dim, embed_dim, bias=False)"]
        return [
            f"class {self.name}(nn.Module):",
            f'    """Attention with the parameters of torch.nn.MultiheadAttention, for queries {sizes}."""',
            "",
            f"    def __init__(self, embed_dim, num_heads{dropout}):",
            "        super().__init__()",
            "        self.num_heads = num_heads",
            *(["        self.dropout = nn.Dropout(dropout)"] if dropout else []),
            "        bound = (1.5 / embed_dim) ** 0.5",
            "        self.in_proj_weight = mx.random.uniform(-bound, bound, (3 * embed_dim, embed_dim))",
            *(f"        {line}" for line in biases),
            "",
            *(f"    {line}" if line else "" for line in self.call()),
        ]

    def call(self) -> list[str]:
        layer = self.layer
        defaults = "".join(f", {key}" if key in layer.always else f", {key}=None" for key in self.ordered())
        bias = " + self.in_proj_bias" if layer.has_bias else ""
        split = "mx.split(self.in_proj_weight, 3)"
        order = (0, 2, 1, 3) if layer.batch_first else (1, 2, 0, 3)
        back = (0, 2, 1, 3) if layer.batch_first else (2, 0, 1, 3)
        heads = f"x.reshape(*x.shape[:2], self.num_heads, -1).transpose{order}"
        if layer.is_self:
            lines = [f"def __call__(self, x{defaults}):"]
            lines += [f"    projected = mx.split(x @ self.in_proj_weight.T{bias}, 3, axis=-1)"]
            heads = heads.replace("x.", "y.")
            lines += [f"    q, k, v = ({heads} for y in projected)"]
        else:
            lines = [f"def __call__(self, query, key, value{defaults}):"]
            if layer.has_bias:
                lines += [f"    weights, biases = {split}, mx.split(self.in_proj_bias, 3)"]
                pairs = "x @ w.T + b for x, w, b in zip((query, key, value), weights, biases)"
            else:
                pairs = f"x @ w.T for x, w in zip((query, key, value), {split})"
            lines += [f"    projected = ({pairs})", f"    q, k, v = ({heads} for x in projected)"]
        lines += [f"    {line}" for line in (*self.mask(), *self.attended())]
        result = f"self.out_proj(y.transpose{back}.reshape({'x' if layer.is_self else 'query'}.shape))"
        weights = {"": "", "mean": ", weights.mean(axis=1)", "all": ", weights"}[layer.weights]
        return [*lines, f"    return {result}{weights}"]

    def ordered(self) -> list[str]:
        """Returns the names of the masks, those without a default value first."""
        return sorted(self.layer.given, key=lambda key: key not in self.layer.always)

    def mask(self) -> list[str]:
        """Returns the statements that compute the mask: True where a query may see a key, or what is added."""
        layer = self.layer
        kinds = {name: (kind, ndim) for name, kind, ndim in layer.masks}

        def shaped(name: str) -> str:
            if name == "key_padding_mask":
                return f"{name}[:, None, None]"
            return f"{name}.reshape(-1, self.num_heads, *{name}.shape[1:])" if kinds[name][1] == 3 else name

        if layer.is_boolean:
            text = " | ".join(shaped(name) for name in layer.given)
            return [f"mask = ~({text})" if len(layer.given) > 1 else f"mask = ~{text}"]
        texts = {
            name: (f"mx.where({shaped(name)}, -mx.inf, 0)" if kinds[name][0] == "bool" else shaped(name))
            + ".astype(q.dtype)"
            for name in layer.given
        }
        always = [name for name in layer.given if name in layer.always]
        some = [name for name in layer.given if name not in layer.always]
        if len(some) == 1 and not always and texts[some[0]].startswith("attn_mask."):
            return [f"mask = None if attn_mask is None else {texts[some[0]]}"]
        lines = [f"mask = {' + '.join(texts[name] for name in always) or 'None'}"] if layer.given else []
        for name in some:
            if always or name != some[0]:
                text = f"mask = {texts[name]} if mask is None else mask + {texts[name]}"
                text = f"mask = mask + {texts[name]}" if always else text
            else:
                text = f"mask = {texts[name]}"
            lines += [f"if {name} is not None:", f"    {text}"]
        return lines

    def attended(self) -> list[str]:
        layer = self.layer
        scale = "scale = q.shape[-1] ** -0.5"
        given = ", mask=mask" if layer.given else ""
        fused = [f"y = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale{given})"]
        if layer.hidden == "zero":
            fused = [f"y = {layer.helper}(q, k, v, mask, scale)"]
        if not layer.dropout and not layer.weights:
            return [scale, *fused]
        if layer.is_boolean:
            explicit = [
                "empty = ~mask.any(-1, keepdims=True)",
                "scores = mx.where(mask | empty, scale * q @ k.swapaxes(-1, -2), -mx.inf)",
                "weights = mx.where(empty, 0, mx.softmax(scores, axis=-1))",
            ]
        else:
            explicit = ["scores = scale * q @ k.swapaxes(-1, -2)"]
            if layer.always:
                explicit = [f"{explicit[0]} + mask"]
            elif layer.given:
                explicit += ["if mask is not None:", "    scores = scores + mask"]
            if layer.hidden == "zero":
                explicit += ["empty = (scores == -mx.inf).all(-1, keepdims=True)"]
                explicit += ["weights = mx.where(empty, 0, mx.softmax(mx.where(empty, 0, scores), axis=-1))"]
            else:
                explicit += ["weights = mx.softmax(scores, axis=-1)"]
        if layer.dropout:
            explicit[-1] = explicit[-1].replace("weights = ", "weights = self.dropout(") + ")"
        explicit.append("y = weights @ v")
        if layer.weights:
            return [scale, *explicit]
        head = "if self.training:  # MLX's fused attention has no dropout"
        return [scale, head, *(f"    {line}" for line in explicit), "else:", *(f"    {line}" for line in fused)]
