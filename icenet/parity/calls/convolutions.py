"""Weights of convolutions whose axes the kinds of the layers do not tell.

Those that a user's module holds itself are known from their use. The axes of a plain array are the same in both
frameworks, except that the weight of a convolution has its channels last in MLX. An array is such a weight if both
sides call the same convolution with it. If one of them computes the weight of the convolution from arrays, as a
weight norm does, the shapes decide, and they must fit in one way only.

A convolution of size 1 is a linear layer, whose weight has fewer axes.
"""

from __future__ import annotations

from icenet.core.weights import layout
from icenet.parity.calls.module_side import ModuleSide
from icenet.parity.inputs import Inputs
from icenet.parity.state import Comparison


def align_convolutions(c: Comparison, inputs: Inputs) -> None:
    """Gives the copy of `a` the layer kinds that its use of own arrays as weights of convolutions shows.

    Nothing is changed if a run fails, or if `b` is a recorded reference.
    """
    reference = c.reference
    if (c.a.backend, c.b.backend) != ("mlx", "torch") or not isinstance(reference, ModuleSide):
        return
    names = {
        ours: theirs
        for ours, theirs in c.parameter_names.items()
        if c.a.layer_kinds.get(layout.split(ours)[0]) == "plain" and layout.split(ours)[0] in c.a.modules
        if 3 <= len(c.a.shapes[ours]) <= 5
        if any(_moved(kind, c.a.shapes[ours]) == c.b.shapes[theirs] for kind in layout.RULES if "conv" in kind)
    }
    if not names:
        return
    try:
        c.reference_run(inputs)
        ours, computed = c.a.convolution_weights(inputs.given, inputs.values)
        theirs, other = reference.convolution_weights(inputs.given, c.inputs_b)
    except Exception:  # whatever a module of the user raises is a result of the runs that follow
        return
    found: dict[str, list[str]] = {}
    for own, name in names.items():
        path, leaf = layout.split(own)
        shape, expected = c.a.shapes[own], c.b.shapes[name]
        kind = ours.get(own, "")
        if not kind or theirs.get(name) != kind:
            known = {kind, *(k for k, s in computed if s == shape)} - {""}
            fits = [k for k in known if shape != expected and (theirs.get(name) == k or (k, expected) in other)]
            kind = fits[0] if len(fits) == 1 else ""
        if kind and _moved(kind, shape) == expected:
            found.setdefault(path, []).append(f"{leaf}={kind}")
            c.add_notes(
                [
                    f"{name}: the weight of a convolution, so its axes are moved; icenet.from_torch moves them "
                    f'if the class in a has layer_kind = "plain {leaf}={kind}"'
                ]
            )
    for path, items in found.items():
        c.a.set_layer_kind(path, " ".join(("plain", *items)))


def align_points(c: Comparison) -> None:
    """Gives linear layers of `b` that are convolutions of size 1 in `a` the shape of its weight, and the reverse."""
    if (c.a.backend, c.b.backend) != ("mlx", "torch") or not isinstance(c.b, ModuleSide):
        return
    for ours, theirs in c.parameter_names.items():
        own, other = c.a.shapes[ours], c.b.shapes[theirs]
        short, long = sorted((own, other), key=len)
        holder, leaf = layout.split(ours)
        path = c.a.names.get(holder)
        is_layer = c.a.layer_kinds.get(holder) in ("linear", "conv1d", "conv2d", "conv3d") and leaf == "weight"
        if path is None or layout.split(theirs)[0] != path:  # `rename` moves the array to another module
            continue
        if not is_layer or not layout.is_of_size_1(long, short):
            continue
        if all(isinstance(side, ModuleSide) and side.set_weight_shape(path, own) for side in (c.b, c.reference)):
            kinds = [side.classes[place].rpartition(".")[2] for side, place in ((c.a, holder), (c.b, path))]
            c.notes_of(path).append(f"a {kinds[0]} in a, and a {kinds[1]} in b whose weight has the same values")


def _moved(kind: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns the shape in PyTorch of the weight of a layer kind; None if it has another number of axes."""
    rule = layout.rule(kind, "weight").to_torch
    return tuple(shape[axis] for axis in rule) if rule is not None and len(rule) == len(shape) else None
