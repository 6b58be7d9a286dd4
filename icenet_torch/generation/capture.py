"""The captured step of a decoder, PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from icenet.core.generation.decoder import Choice, State, Step
from icenet.core.nn.classes import change_classes
from icenet_torch.nn import arithmetic, tree

CAPTURED_DEVICES = ("cuda",)
"""Types of devices on which steps are captured."""

CAPTURED_TYPES: dict[type, type] = {}
"""Classes of modules, and the classes that compute the same with fused kernels where a step is captured."""


def fuse_kernels(model: nn.Module) -> None:
    """Gives the modules of a model that generates their classes with fused kernels, in place; subclasses stay."""
    change_classes(tree.named_modules(model), CAPTURED_TYPES)


KEPT_STEPS = 8
"""Number of captured steps that a model keeps for later requests."""
KEPT_SHARE, KEPT_BYTES = 1 / 8, 64 * 2**20
"""Memory of the kept steps: at most this share of that of the weights, or this number of bytes if that is more."""


def kept_steps(model: nn.Module) -> dict[Any, CapturedStep]:
    """Returns the captured steps of a model that generates, by what they were captured for, the latest last.

    A request takes a step out and puts it back at its end: a step has the buffers of one request.
    """
    steps: dict[Any, CapturedStep] = vars(model).setdefault("_captured_steps", {})
    return steps


def keep_step(model: nn.Module, step: CapturedStep) -> bool:
    """Keeps a captured step for later requests, and drops earlier ones if there are too many.

    Returns:
        Whether it is kept. One whose buffers are large is not: capturing takes a small part of the time there.
    """
    weights = {array.data_ptr(): array.nbytes for array in model.parameters()}
    most = max(KEPT_BYTES, KEPT_SHARE * sum(weights.values()))
    if step.nbytes > most:
        return False
    steps = kept_steps(model)
    steps.pop(step.key, None)
    steps[step.key] = step
    while len(steps) > KEPT_STEPS or sum(kept.nbytes for kept in steps.values()) > most:
        del steps[next(iter(steps))]
    return True


def settings(device: torch.device) -> tuple[Any, ...]:
    """Returns what the kernels of a step depend on besides the model and the request.

    The stream is part of it: the kernels of two requests on one stream run one after the other.
    """
    kind = device.type
    stream = torch.cuda.current_stream(device).cuda_stream if kind == "cuda" else None
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return stream, autocast, arithmetic.switches()


class CapturedStep:
    """A step as a CUDA graph: its kernels are started together, without the Python code of the operations.

    The graph reads and writes the same memory each time. Its first run gets copies of the state's arrays; after that
    the state is that memory. The buffers of the cache are written in place, so they are not copied. Capturing takes
    about as long as two steps.

    Args:
        step: `DecoderBase.decode_step`, which depends on its arrays only.
        state, token: The arguments of the first call.

    Attributes:
        state: The arrays that the graph reads and writes.
        choice: Its outputs.
        key: What it was captured for; None if it is not to be kept.
    """

    key: Any = None

    def __init__(self, step: Step, state: State, token: torch.Tensor) -> None:
        self.token = token.clone()
        self.state = State(
            list(state.cache), state.index.clone(), *(a if a is None else a.clone() for a in (state.keys, state.seen))
        )
        self.choice: Any = None
        with torch.cuda.device(token.device):
            self._initialize(step)
            self._record(step)

    def _initialize(self, step: Step) -> None:
        """Runs the step once without capturing it, which initializes libraries, and separates its memory."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            after, _ = step(self.state, self.token)
            self._separate(after)
        torch.cuda.current_stream().wait_stream(side)

    def _separate(self, after: State) -> None:
        """Gives arrays that the step replaces memory of their own; the others, the buffers, are written in place."""
        self.state.cache[:] = [
            old if new is old else old.clone() for old, new in zip(self.state.cache, after.cache, strict=True)
        ]

    def _record(self, step: Step) -> None:
        """Captures the step, without running it."""
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            after, self.choice = step(self.state, self.token)
            self._copy(after, self.choice.token)

    def _replay(self) -> None:
        self._graph.replay()

    @property
    def nbytes(self) -> int:
        """Size of the arrays that the graph reads and writes."""
        return sum(array.nbytes for array in [*self.state.arrays, *self.choice])

    def _copy(self, state: State, token: torch.Tensor) -> None:
        """Copies arrays that are not yet in the memory of the graph."""
        for own, new in zip([*self.state.arrays, self.token], [*state.arrays, token], strict=True):
            if new is not own:
                own.copy_(new)

    def __call__(self, state: State, token: torch.Tensor) -> tuple[State, Choice]:
        self._copy(state, self.token if token is self.choice.token else token)
        self._replay()
        return self.state, self.choice
