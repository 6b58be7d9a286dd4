"""The signature of a port: that of the original's `forward`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from icenet.core.porting.record import Argument, Ref, map_refs, refs


def arguments(signature: list[Argument], inputs: list[Ref], flat: list[Any]) -> list[Any]:
    """Returns the arguments of a port in the order of its parameters.

    Args:
        signature: The parameters; none if the port takes its arrays one by one.
        inputs: The arrays of the example in their order.
        flat: Their values.
    """
    if not signature:
        return flat
    values = dict(zip((ref.name for ref in inputs), flat, strict=True))
    return [map_refs(item.value, lambda ref: values[ref.name]) for item in signature]


def parameters(signature: list[Argument], variable: Callable[[str, str], str]) -> tuple[list[str], list[str]]:
    """Returns the source of the parameters, and statements that check constants and take structures apart.

    Args:
        signature: The parameters.
        variable: Returns the variable of a value from a proposed name.
    """
    found, lines, absent = [], [], []
    variables = [  # before those of the arrays in structures
        variable(item.name, item.value.name if isinstance(item.value, Ref) else f"argument {item.name}")
        for item in signature
    ]
    has_default = is_keyword_only = False
    for item, name in zip(signature, variables, strict=True):
        if item.is_keyword_only and not is_keyword_only:
            is_keyword_only = True
            found.append("*")
        has_default = has_default and not is_keyword_only
        if any(refs(item.value)):
            found.append(f"{name}=None" if has_default else name)
            if has_default:  # Python needs a default value after another one
                lines += [f"if {name} is None:", f"    raise ValueError('the port was made with {item.name}')"]
            if isinstance(item.value, (list, tuple)) and all(isinstance(leaf, Ref) for leaf in item.value):
                parts = [variable(hint, leaf) for leaf, _, hint in leaves(item.value, name, item.name)]
                lines.append(f"{', '.join(parts)}{',' if len(parts) == 1 else ''} = {name}")
            elif not isinstance(item.value, Ref):
                lines += [
                    f"{variable(hint, leaf)} = {text}" for leaf, text, hint in leaves(item.value, name, item.name)
                ]
            continue
        # a constant of the example takes the place of the original's default, which the port may not serve
        found.append(f"{name}={item.value!r}" if item.has_default else f"{name}=None" if has_default else name)
        has_default = has_default or item.has_default
        if item.value is None:
            absent.append((name, item.name))
        else:
            test = "is not" if isinstance(item.value, bool) else "!="
            message = f"the port was made for {item.name}={item.value!r}"
            lines += [f"if {name} {test} {item.value!r}:", f"    raise ValueError({message!r})"]
    if absent:
        names, own = (list(column) for column in zip(*absent, strict=True))
        joined = ", ".join(names)
        test = f"{joined} is not None" if len(absent) == 1 else f"any(item is not None for item in ({joined}))"
        said = ", ".join(own) if len(own) < 4 else f"{', '.join(own[:2])} and {len(own) - 2} other arguments"
        lines += [f"if {test}:", f"    raise ValueError('the port was made without {said}')"]
    return found, lines


def leaves(value: Any, text: str, hint: str) -> Iterator[tuple[str, str, str]]:
    """Yields the name, the expression and a proposed variable of each array of a structure."""
    if isinstance(value, Ref):
        yield value.name, text, hint
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{text}[{key!r}]", str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from leaves(item, f"{text}[{index}]", f"{hint}_{index}")


def call_text(signature: list[Argument], inputs: list[Ref], texts: list[str], names: list[str]) -> str:
    """Returns the source of the arguments of a call; constants that are the defaults of the port are left out.

    Args:
        signature: The parameters of the original.
        inputs: The arrays of the example in their order.
        texts: Their source.
        names: The parameters of the port, in the order of the original's.
    """
    if not signature:
        return ", ".join(texts)
    values = dict(zip((ref.name for ref in inputs), texts, strict=True))
    parts = []
    by_name = False
    for item, name in zip(signature, names, strict=True):
        is_default = item.has_default and not any(refs(item.value))
        by_name = by_name or item.is_keyword_only or is_default
        if not is_default:
            text = _source(item.value, values)
            parts.append(f"{name}={text}" if by_name else text)
    return ", ".join(parts)


def _source(value: Any, values: dict[str, str]) -> str:
    if isinstance(value, Ref):
        return values[value.name]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_source(item, values)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_source(item, values) for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if len(value) == 1 else f"({inner})"
    return repr(value)
