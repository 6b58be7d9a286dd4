"""Writes the Python source of a port: one class for each class of the original, as a person would write it."""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from icenet.core.porting.graph.calls import Call
from icenet.core.porting.layers.mlx_layers import DEFAULTS, Layer, WrittenLayer
from icenet.core.porting.names import flat
from icenet.core.porting.record import Graph, Module
from icenet.core.porting.source import sequences
from icenet.core.porting.source.body import Frame
from icenet.core.porting.source.classes import MARK, class_source, resolve
from icenet.core.porting.source.configurations import with_configuration
from icenet.core.porting.source.instances import Class, Instance
from icenet.core.porting.source.joined_names import join_names
from icenet.core.porting.source.lines import Body
from icenet.core.porting.source.modes import either
from icenet.core.porting.source.renaming import free_arguments, free_names
from icenet.core.porting.source.simplify import Constructors, simplified, text
from icenet.core.porting.source.specialize import Calls, specialized
from icenet.core.porting.source.structure import Structure, member
from icenet.core.porting.source.values import Values


def write(graph: Graph, layers: dict[str, Layer], train: Graph | None, title: str, trace: bool = False) -> str:
    """Returns the source of a module.

    Args:
        graph: The graph in evaluation mode, with the axes in memory.
        layers: Its layers of mlx.nn by path.
        train: The graph in training mode, None if there is none.
        title: First line of the docstring.
        trace: Whether to record every value.
    """
    return _Writer(graph, layers, train, title, trace).source()


def class_of(module: Module) -> str:
    """Returns the name of the class of a module."""
    name = module.class_name.lstrip("_")
    return name if name.isidentifier() and not keyword.iskeyword(name) and name not in ("nn", "mx") else "Module"


_SEQUENTIAL = '''class Sequential(list):
    """Layers that run one after another. As a list it gives its arrays the names that they have in PyTorch."""

    def __call__(self, x):
        for layer in self:
            x = layer(x)
        return x'''
_NAMED = "NamedSequential"
_NAMED_SEQUENTIAL = f'''class {_NAMED}(dict):
    """Layers with names that run one after another."""

    def __call__(self, x):
        for layer in self.values():
            x = layer(x)
        return x'''


def _constructed(code: str) -> str:
    """Returns a statement of a constructor in its simplest form, with its indentation."""
    bare = code.lstrip()
    if bare.endswith(":"):
        return code
    return code[: len(code) - len(bare)] + text(Constructors().visit(simplified(bare)))


class _Writer:
    def __init__(
        self, graph: Graph, layers: dict[str, Layer], train: Graph | None, title: str, trace: bool = False
    ) -> None:
        self.layers, self.title = layers, title
        self.structure = Structure(graph, layers, train, trace)
        self.instances: list[Instance] = []
        self.sequence_kinds: set[str] = set()
        """The names that constructors have for sequences: `Sequential`, and classes derived from it."""
        self.written_layers: list[WrittenLayer] = []
        self.written: dict[str, str] = {}
        """The name of each class of such layers by its source without a name."""
        self.graph, self.train = self.values(graph, train)
        self.keywords = self.all_keywords()

    def values(self, graph: Graph, train: Graph | None) -> tuple[Values, Values | None]:
        """Returns the values of the graphs. A sequence whose layers take or return others is no sequence."""
        while True:
            made = [Values(self.structure, item) for item in (graph, train) if item is not None]
            wrong = {path for item in made for path in item.broken_sequences()}
            if not wrong:
                return made[0], made[1] if train is not None else None
            self.structure.sequences = self.structure.whole(self.structure.sequences - wrong)

    def sort_of(self, path: str) -> tuple[str, str, str]:
        """Returns what layers of equal role in equal classes have in common."""
        parent = path.rpartition(".")[0]
        inner = path.rpartition(".")[2]
        while parent and self.structure.is_container(parent):
            inner = f"{parent.rpartition('.')[2]}.{inner}"
            parent = parent.rpartition(".")[0]
        return self.structure.modules[parent].kind, inner, self.layers[path].constructor

    def all_keywords(self) -> dict[tuple[str, str, str], dict[str, Any]]:
        """Returns the keywords that the layers of equal role have, with their default values."""
        found: dict[tuple[str, str, str], dict[str, Any]] = {}
        for path, layer in self.layers.items():
            known = found.setdefault(self.sort_of(path), {})
            for key in layer.keywords:
                known[key] = DEFAULTS.get(key, layer.keywords[key])
        for path, layer in self.layers.items():
            known = found[self.sort_of(path)]
            if any(key not in layer.keywords and key not in DEFAULTS for key in known):
                found[self.sort_of(path)] = {}  # without a known default they differ
        return found

    # ---- classes

    def source(self) -> str:
        bodies = self.bodies()
        self.build("", bodies)
        taken = {*self.written.values(), *self.sequence_kinds}
        modules = [self.structure.modules[path] for path in self.layers]
        own = [
            (item.own_class or item.class_name, item.constructor) for item in modules if item.constructor is not None
        ]
        classes = resolve(self.instances, taken, own)
        configuration = with_configuration(classes, taken | {item.name for item in classes})
        repeated = sequences.functions(classes, self.sequence_kinds, taken)
        functions = [*self.finished(classes), *self.sequence_classes(), *repeated]
        lines = ['"""' + self.title, "", "Written by icenet.port. It depends on mlx only.", '"""', ""]
        code = "\n\n\n".join(
            [
                *filter(None, [configuration]),
                *functions,
                *self.written_sources(),
                *(class_source(item) for item in classes),
            ]
        )
        imports = ["from dataclasses import dataclass", ""] if configuration else []
        if re.search(r"\bmath\.", code):
            imports = ["import math", *(imports or [""])]
        if re.search(r"\bnp\.", code):
            imports += ["import numpy as np"]
        imports += ["import mlx.core as mx", "import mlx.nn as nn"]
        return "\n".join([*lines, *imports, "", "", code, ""])

    def sequence_classes(self) -> list[str]:
        """Returns the classes of the sequences of layers that the source has."""
        is_named = _NAMED in self.sequence_kinds
        return [_SEQUENTIAL] * bool(self.sequence_kinds - {_NAMED}) + [_NAMED_SEQUENTIAL] * is_named

    def finished(self, classes: list[Class]) -> list[str]:
        """Simplifies the statements of classes, and returns the functions that they call."""
        calls = Calls([])
        statements: list[tuple[Any, ast.stmt]] = []
        for item in classes:
            item.init = [_constructed(code) for code in item.init]
            for line in (line for body in item.bodies for line in body.lines):
                if line.code != "else:":
                    statements.append((line, simplified(line.code)))
        calls.trees += [tree for _, tree in statements]
        for layer in self.written_layers:
            for name, given in layer.functions().items():
                calls.given.setdefault(name, []).append(given)
        functions = specialized(self.structure.used_helpers, calls)
        names = {item.name for code in functions for item in ast.parse(code).body if hasattr(item, "name")}
        by_line = {id(line): tree for line, tree in statements}
        arguments = [item.name for item in self.graph.graph.signature]
        for body in (body for item in classes for body in item.bodies):
            trees = [by_line[id(line)] for line in body.lines if id(line) in by_line]
            free_names(body, trees, names)
            free_arguments(body, trees, arguments)
            join_names(body, by_line)
        for line, tree in statements:
            line.code = text(tree)
        for body in (body for item in classes for body in item.bodies):  # two values may now have one variable
            body.lines = [line for line in body.lines if not re.fullmatch(r"(\w+) = \1", line.code)]
        return functions

    def written_class(self, layer: WrittenLayer) -> str:
        """Returns the name of the class of a layer that the source has."""
        self.structure.used_helpers.update(layer.functions())
        self.written_layers.append(layer)
        key = layer.class_source("")
        if key not in self.written:
            count = sum(name.rstrip("0123456789") == layer.name for name in self.written.values())
            self.written[key] = layer.name + (str(count + 1) if count else "")
        return self.written[key]

    def written_sources(self) -> list[str]:
        return [text.replace("class (", f"class {name}(", 1) for text, name in self.written.items()]

    def bodies(self) -> dict[str, list[Body]]:
        """Returns the bodies of each module that becomes a class, one for each way in which it is called."""
        per_mode: list[dict[str, list[tuple[Call, Body]]]] = []
        for graph in (self.graph, self.train):
            if graph is None:
                continue
            found: dict[str, list[tuple[Call, Body]]] = {}
            # children first, as a method has a name when it is called
            for call in reversed(list(graph.root.calls())):
                if self.structure.is_inlined(call.path) or call.path in self.structure.sequences:
                    continue
                made = found.setdefault(call.path, [])
                other = per_mode[0].get(call.path, [])[len(made) :][:1] if per_mode else []
                names = [name for _, body in other for name in body.parameters]
                made.append((call, Frame(self.structure, graph, call, names).body()))
            per_mode.append(found)
        result: dict[str, list[Body]] = {}
        for path in dict.fromkeys(path for found in per_mode for path in found):
            modes = [found.get(path, []) for found in per_mode]
            variants: list[Body] = []
            for calls in zip(*modes, strict=False) if all(modes) else [(item,) for mode in modes for item in mode]:
                body = calls[0][1]
                if len(calls) > 1 and calls[1][1].key() != body.key():
                    body = either(calls[1][1], body)
                keys = [item.key() for item in variants]
                if body.key() not in keys:
                    variants.append(body)
                    keys.append(body.key())
                number = keys.index(body.key())
                if number:
                    for call, _ in calls:
                        self.structure.methods[call.entered] = f".call_{number + 1}"
            result[path] = variants
        wrong = {path for path, variants in result.items() if len(variants) > 1}
        wrong = {
            outer for outer in self.structure.sequences if any(path.rpartition(".")[0] == outer for path in wrong)
        }
        if wrong:  # a list cannot say which method to call
            self.structure.sequences = self.structure.whole(self.structure.sequences - wrong)
            self.structure.methods.clear()
            self.graph, self.train = self.values(self.graph.graph, self.train.graph if self.train else None)
            return self.bodies()
        if self.structure.methods and not getattr(self, "_again", False):
            self._again = True
            return self.bodies()
        return result

    def build(self, path: str, bodies: dict[str, list[Body]]) -> str:
        """Makes the class of a module and returns the source of a new instance of it."""
        if path in self.layers:
            layer = self.layers[path]
            if isinstance(layer, WrittenLayer):
                return layer.instance(self.written_class(layer))
            known = self.keywords.get(self.sort_of(path), {})
            given = {key: layer.keywords.get(key, value) for key, value in known.items()}
            return replace(
                layer, keywords=given if layer.keywords.keys() <= given.keys() else layer.keywords
            ).source()
        module = self.structure.modules[path]
        if self.structure.is_container(path):
            return self.container(path, module, bodies)
        init: list[str] = []
        frozen: list[str] = []
        for array in self.structure.arrays_by_owner.get(path, []):
            name = self.structure.names.get(array.path, array.path.rpartition(".")[2])
            init.append(f"{self.target(name)} = {self.structure.initial(array)}")
            if array.kind != "parameter" or not array.is_trainable:
                frozen.append(name)
        if path == "":
            for constant in self.structure.constants.values():
                if constant.value is not None:
                    continue  # written where it is used
                name = self.structure.names.get(constant.path, flat(constant.path))
                init.append(f"self.{name} = {self.structure.initial(constant)}")
                frozen.append(name)
        for name in module.children:
            child = f"{path}.{name}" if path else name
            if self.is_needed(child):
                init.append(f"{self.target(self.structure.names.get(child, name))} = {self.build(child, bodies)}")
        for name in module.children:
            child = f"{path}.{name}" if path else name
            if self.is_needed(child):
                attribute = self.target(self.structure.names.get(child, name))
                arrays = self.structure.arrays_by_owner.get(child, [])
                if child not in self.layers and self.structure.is_container(child) and arrays:  # of parameters
                    frozen += [self.structure.names.get(child, name)] * (
                        len(self.frozen_arrays(child)) == len(arrays)
                    )
                for owner, inner in self.layers_in(child, attribute):
                    locked = self.frozen_arrays(inner)
                    if locked:
                        init.append(f"{owner}.freeze(keys={locked!r}, recurse=False)")
        if frozen:
            init.append(f"self.freeze(keys={frozen!r}, recurse=False)")
        return self.instance_of(module, init, bodies.get(path, []))

    def layers_in(self, path: str, text: str) -> Iterator[tuple[str, str]]:
        """Yields the layers at a path, or in the lists there: the source of each, and the path of its arrays."""
        if path in self.layers:
            yield from ((text, path), (f"{text}.out_proj", f"{path}.out_proj"))
        elif path and self.structure.is_container(path):
            is_dense = self.structure.is_dense(path)
            for name in self.structure.modules[path].children:
                yield from self.layers_in(f"{path}.{name}", f"{text}[{name if is_dense else repr(name)}]")

    def frozen_arrays(self, path: str) -> list[str]:
        """Returns the names of the parameters of a layer that are not trained."""
        arrays = self.structure.arrays_by_owner.get(path, [])
        return [
            array.path.rpartition(".")[2] for array in arrays if array.kind == "parameter" and not array.is_trainable
        ]

    @staticmethod
    def target(name: str) -> str:
        return f"self{member(name)}"

    def is_needed(self, path: str) -> bool:
        return not self.structure.is_idle(path) and (
            self.structure.has_arrays(path)
            or (self.structure.in_list(path))
            or (path in self.structure.called and not self.structure.is_inlined(path))
            or any(
                inner.startswith(path + ".") and not self.structure.is_inlined(inner)
                for inner in self.structure.called
            )
        )

    def container(self, path: str, module: Module, bodies: dict[str, list[Body]]) -> str:
        arrays = self.structure.arrays_by_owner.get(path, [])  # of a ParameterList or ParameterDict
        parts = {array.path.rpartition(".")[2]: self.structure.initial(array) for array in arrays}
        parts = parts or {name: self.build(f"{path}.{name}", bodies) for name in module.children}
        if not self.structure.is_dense(path):
            listed = "{" + ", ".join(f"{name!r}: {part}" for name, part in parts.items()) + "}"
            if path not in self.structure.sequences:
                return listed
            self.sequence_kinds.add(_NAMED)
            return f"{_NAMED}({listed})"
        elements = [
            parts.get(str(index)) or self.shared_layer(f"{path}.{index}", bodies)
            for index in range(self.structure.length(path))
        ]
        listed = f"[{', '.join(elements)}]"
        if path not in self.structure.sequences:
            return listed
        kind = module.own_class.lstrip("_")
        kind = kind if re.fullmatch(r"[A-Z]\w*", kind) else "Sequential"
        self.sequence_kinds |= {kind, "Sequential"}
        return f"{kind}({listed})"

    def shared_layer(self, path: str, bodies: dict[str, list[Body]]) -> str:
        """Returns an element of a list that another module holds, too: a new one if it has no arrays."""
        owner = self.structure.element(path)
        return self.build(owner, bodies) if owner != path else "None"

    def instance_of(self, module: Module, init: list[str], bodies: list[Body]) -> str:
        """Notes an instance of a class, and returns a mark in the place of its constructor."""
        name = class_of(module)
        children = [int(found) for line in init for found in MARK.findall(line)]
        height = 1 + max((self.instances[child].height for child in children), default=0)
        self.instances.append(Instance(name, init, bodies, height, module.settings, module.constructor))
        return f"@{len(self.instances) - 1}@"
