"""The classes of recurrent layers in a port: those of torch.nn with its parameters, and with the options in use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from icenet.core.porting.graph.calls import Call
from icenet.core.porting.layers.mlx_layers import WrittenLayer
from icenet.core.porting.record import Graph, Module, Node, Ref, Tensor, refs
from icenet.core.porting.source.lines import wrapped
from icenet.core.porting.source.specialize import NOT_NONE

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_SIZES = ("input_size", "hidden_size", "num_layers", "proj_size", "dropout")
"""The arguments of constructors in their order."""


@dataclass(frozen=True)
class Recurrent(WrittenLayer):
    """A module that is a recurrent layer.

    Attributes:
        kind: LSTM, GRU or RNN.
        options: bias, bidirectional, batch_first, relu, unbatched.
        sizes: The arguments of the constructor by name.
        states: Whether calls give an initial state: "never", "always" or "some".
    """

    kind: str = ""
    options: frozenset[str] = frozenset()
    sizes: tuple[tuple[str, Any], ...] = ()
    states: str = "never"

    @property
    def name(self) -> str:
        return f"Bi{self.kind}" if "bidirectional" in self.options else self.kind

    def instance(self, name: str) -> str:
        first = [str(value) for key, value in self.sizes[:2]]
        return f"{name}({', '.join([*first, *(f'{key}={value}' for key, value in self.sizes[2:])])})"

    def class_source(self, name: str) -> str:
        return "\n".join(_Class(name, self).lines())

    def functions(self) -> dict[str, dict[str, Any]]:
        keys = ["x", "h", "w_ih", "w_hh", *(["c"] if self.kind == "LSTM" else [])]
        keys += ["b_ih", "b_hh"] if "bias" in self.options else []
        keys += ["w_hr"] if any(key == "proj_size" for key, _ in self.sizes) else []
        keys += ["activation"] if "relu" in self.options else []
        return {self.kind.lower(): dict.fromkeys(keys, NOT_NONE)}


def recurrent_of(module: Module) -> Recurrent | None:
    """Returns the recurrent layer of a module of torch.nn, None for another one."""
    if module.kind not in {f"torch.nn.modules.rnn.{kind}" for kind in _GATES} or module.children:
        return None
    s = module.settings
    if not s.get("is_plain_call", True):
        return None
    options = {name for name in ("bias", "bidirectional", "batch_first") if s[name]}
    if s.get("nonlinearity") == "relu":
        options.add("relu")
    sizes = [("input_size", s["input_size"]), ("hidden_size", s["hidden_size"])]
    if s["num_layers"] > 1:
        sizes.append(("num_layers", s["num_layers"]))
    if s.get("proj_size"):
        sizes.append(("proj_size", s["proj_size"]))
    if s["dropout"] and s["num_layers"] > 1:
        sizes.append(("dropout", s["dropout"]))
    return Recurrent(module.class_name, kind=module.class_name, options=frozenset(options), sizes=tuple(sizes))


def call_of(
    graph: Graph, call: Call, layer: Recurrent, uses: dict[str, list[str]]
) -> tuple[Recurrent, list[Node]] | None:
    """Returns the layer as a call needs it and the nodes of the call; None if it computes something else.

    Args:
        graph: The graph of the call.
        call: A call of the module.
        layer: The layer of its module.
        uses: The calls in which each value is used.
    """
    nodes = list(call.nodes())
    layers = [node for node in nodes if node.base in ("lstm", "gru", "rnn_tanh", "rnn_relu")]
    given, results = call.given.get("input"), list(refs(call.results))
    if len(layers) != 1 or not isinstance(given, Ref) or len(results) != (3 if layer.kind == "LSTM" else 2):
        return None
    owners = {
        graph.arrays[name].path.rpartition(".")[0] for name in refs(layers[0].args["params"]) if name in graph.arrays
    }
    if owners != {call.path} or any(name not in graph.arrays for name in refs(layers[0].args["params"])):
        return None  # another module computes the weights
    made = {node.name: node for node in nodes}
    for node in nodes:
        used = any(call.entered not in stack.split("/") for stack in uses.get(node.name, ()))
        if used and node.name not in results and not node.base.startswith("sym."):
            return None
    if any(name not in made or not isinstance(made[name].out, Tensor) for name in results):
        return None
    states = call.given.get("hx")
    source = graph.tensors.get(given.name) or next(node.out for node in graph.nodes if node.name == given.name)
    if source.ndim == 2:
        layer = replace(layer, options=layer.options | {"unbatched"})
    layer = replace(layer, states="never" if states is None else "always")
    whole = Node(
        f"{call.entered}_layer",
        "recurrent",
        {"path": call.path, "self": given, "hx": states},
        [made[name].out for name in results],
        call.place,
    )
    indices = [0, (1, 0), (1, 1)] if layer.kind == "LSTM" else [0, 1]
    items = [
        Node(name, "item", {"self": Ref(whole.name), "index": number, "place": index}, made[name].out, call.place)
        for number, (name, index) in enumerate(zip(results, indices, strict=True))
    ]
    return layer, [whole, *items]


def joined(layers: list[Recurrent]) -> Recurrent | None:
    """Returns the layer that serves several calls, None if one does not."""
    if len({layer.options for layer in layers}) != 1:
        return None
    states = {layer.states for layer in layers}
    return replace(layers[0], states=states.pop() if len(states) == 1 else "some")


def shared(layers: dict[str, Recurrent]) -> dict[str, Recurrent]:
    """Returns layers that differ in sizes only where they can: one class has one or several layers of a kind."""
    groups: dict[tuple[str, frozenset[str], bool], list[str]] = {}
    for path, layer in layers.items():
        groups.setdefault((layer.kind, layer.options, "proj_size" in dict(layer.sizes)), []).append(path)
    found = {}
    for paths in groups.values():
        used = {key for path in paths for key, _ in layers[path].sizes}
        states = {layers[path].states for path in paths}
        for path in paths:
            sizes = {"num_layers": 1, "dropout": 0.0, **dict(layers[path].sizes)}
            keys = [key for key in _SIZES if key in used]
            found[path] = replace(
                layers[path],
                sizes=tuple((key, sizes[key]) for key in keys),
                states=states.copy().pop() if len(states) == 1 else "some",
            )
    return found


class _Class:
    def __init__(self, name: str, layer: Recurrent) -> None:
        self.name, self.layer = name, layer
        self.sizes = [key for key, _ in layer.sizes]
        self.parts = ["h", "c"] if layer.kind == "LSTM" else ["h"]
        self.is_deep, self.is_double = "num_layers" in self.sizes, self.has("bidirectional")
        self.state = "proj_size" if "proj_size" in self.sizes else "hidden_size"
        self.keys = ["weight_ih", "weight_hh"]
        self.keys += ["bias_ih", "bias_hh"] if self.has("bias") else []
        self.keys += ["weight_hr"] if "proj_size" in self.sizes else []

    def has(self, option: str) -> bool:
        return option in self.layer.options

    def lines(self) -> list[str]:
        words = "Bidirectional " * self.is_double + self.layer.kind + " layers" * self.is_deep
        sizes = "T, input_size" if self.has("unbatched") else "B, T" if self.has("batch_first") else "T, B"
        sizes += "" if self.has("unbatched") else ", input_size"
        return [
            f"class {self.name}(nn.Module):",
            f'    """{words} with the parameters of torch.nn.{self.layer.kind}, for x [{sizes}]."""',
            "",
            *_indented(self.init(), 1),
            "",
            *(part for line in _indented(self.call(), 1) for part in wrapped(line.lstrip(), _depth(line))),
        ]

    def init(self) -> list[str]:
        kept = [name for name in (self.state, "hidden_size") if self.layer.states != "always"][: 1 + len(self.parts)]
        kept = [*dict.fromkeys(kept), *(["num_layers"] if self.is_deep else [])]
        lines = [f"def __init__(self, {', '.join(self.sizes)}):", "    super().__init__()"]
        if kept:
            lines.append(f"    {', '.join(f'self.{name}' for name in kept)} = {', '.join(kept)}")
        if "dropout" in self.sizes:
            lines.append("    self.dropout = nn.Dropout(dropout)")
        rows = f"{_GATES[self.layer.kind]} * hidden_size" if self.layer.kind != "RNN" else "hidden_size"
        shapes = {
            "weight_ih": f"{rows}, input_size",
            "weight_hh": f"{rows}, {self.state}",
            "bias_ih": f"{rows},",
            "bias_hh": f"{rows},",
            "weight_hr": "proj_size, hidden_size",
        }
        name = "{name}" if self.is_double else "l{layer}" if self.is_deep else ""
        inner = []
        for key in self.keys:
            target = f'self[f"{key}_{name}"]' if name else f"self.{key}_l0"
            inner.append(f"{target} = mx.random.uniform(-bound, bound, ({shapes[key]}))")
        if self.is_double:
            inner = [f"for name in ({self.ends()}):", *_indented(inner, 1)]
        if self.is_deep:
            wide = f"{'2 * ' * self.is_double}{self.state}"
            inner = ["for layer in range(num_layers):", *_indented([*inner, f"input_size = {wide}"], 1)]
        return [*lines, "    bound = hidden_size**-0.5", *_indented(inner, 1)]

    def ends(self) -> str:
        return 'f"l{layer}", f"l{layer}_reverse"' if self.is_deep else '"l0", "l0_reverse"'

    def weights(self) -> list[str]:
        """Returns the method that gathers the weights of a layer, if there is more than one."""
        if not (self.is_deep or self.is_double):
            return []
        keys = ", ".join(f'"{key}"' for key in self.keys)
        return ["def weights(self, name):", f'    return [self[f"{{key}}_{{name}}"] for key in ({keys})]', ""]

    def call(self) -> list[str]:
        argument = "states" if len(self.parts) > 1 else "h0"
        given = {"never": "", "always": f", {argument}", "some": f", {argument}=None"}[self.layer.states]
        lines = [f"def __call__(self, x{given}):", *_indented(self.prepared(argument), 1)]
        ran = self.run("layer") if self.is_deep else self.run("")
        if self.is_deep:
            lists = [f"all_{part}" for part in self.parts]
            ends = [
                f"all_{part} += [{part}, {part}_back]" if self.is_double else f"all_{part}.append({part})"
                for part in self.parts
            ]
            if "dropout" in self.sizes:
                ends += ["if layer + 1 < self.num_layers:", "    x = self.dropout(x)"]
            lines += [f"    {', '.join(lists)} = {', '.join('[]' for _ in lists)}"]
            lines += ["    for layer in range(self.num_layers):", *_indented([*ran, *ends], 2)]
            finals = [f"mx.stack({name})" for name in lists]
        else:
            lines += _indented(ran, 1)
            finals = [
                f"mx.stack([{part}, {part}_back])" if self.is_double else f"{part}[None]" for part in self.parts
            ]
        output = "x"
        if self.has("unbatched"):
            output, finals = "x[:, 0]", [f"{text}[:, 0]" for text in finals]
        elif self.has("batch_first"):
            output = "x.swapaxes(0, 1)"
        states = f"({', '.join(finals)})" if len(finals) > 1 else finals[0]
        return [*self.weights(), *lines, f"    return {output}, {states}"]

    def prepared(self, argument: str) -> list[str]:
        """Returns the statements before the layers: the steps first, and the initial state."""
        lines = []
        if self.has("unbatched"):
            lines.append("x = x[:, None]")
        elif self.has("batch_first"):
            lines.append("x = x.swapaxes(0, 1)")
        sizes = dict(zip(self.parts, (self.state, "hidden_size"), strict=False))
        count = "" if self.layer.states == "never" else f"{'2 * ' * self.is_double}{'self.num_layers' * self.is_deep}"
        count = count if self.is_deep or not count else "2"
        count = (count or "1") + ", " if self.layer.states == "some" else ""
        zeros = [f"mx.zeros(({count}x.shape[1], self.{size}), x.dtype)" for size in sizes.values()]
        if self.layer.states == "never":
            names = [f"{part}0" for part in self.parts]
            if len(set(zeros)) == 1:
                return [*lines, f"{' = '.join(names)} = {zeros[0]}"]
            return [*lines, *(f"{name} = {text}" for name, text in zip(names, zeros, strict=True))]
        if self.layer.states == "some":
            lines += [f"if {argument} is None:", f"    {argument} = {', '.join(zeros)}"]
        states = "[:, None]" if self.has("unbatched") and self.layer.states == "always" else ""
        if len(self.parts) > 1:
            lines.append(f"h0, c0 = {'(state[:, None] for state in states)' if states else 'states'}")
        elif states:
            lines.append("h0 = h0[:, None]")
        return lines

    def run(self, layer: str) -> list[str]:
        """Returns the calls of one layer in its directions."""
        function = self.layer.kind.lower()
        activation = ", activation=nn.relu" if self.has("relu") else ""

        def states(direction: int) -> str:
            if self.layer.states == "never":
                return ", ".join(f"{part}0" for part in self.parts)
            index = str(direction)
            if layer:
                index = layer if not self.is_double else f"2 * {layer}{' + 1' * direction}"
            return ", ".join(f"{part}0[{index}]" for part in self.parts)

        def call(x: str, direction: int, name: str) -> str:
            weights = f"*self.weights({name})" if name else ", ".join(f"self.{key}_l0" for key in self.keys)
            return f"{function}({x}, {states(direction)}, {weights}{activation})"

        if not self.is_double:
            return [f"x, {', '.join(self.parts)} = {call('x', 0, self.ends().split(', ')[0] if layer else '')}"]
        first, second = self.ends().split(", ")
        back = ", ".join(f"{part}_back" for part in self.parts)
        return [
            f"forward, {', '.join(self.parts)} = {call('x', 0, first)}",
            f"backward, {back} = {call('x[::-1]', 1, second)}",
            "x = mx.concatenate([forward, backward[::-1]], axis=-1)",
        ]


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def _indented(lines: list[str], depth: int) -> list[str]:
    return [f"{'    ' * depth}{line}" if line else "" for line in lines]
