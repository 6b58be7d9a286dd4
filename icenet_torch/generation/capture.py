"""The captured step of a decoder, PyTorch."""

from __future__ import annotations

import torch
from torch import nn

from icenet.core.generation.decoder import Choice, State, Step
from icenet.core.models.classes import change_classes
from icenet_torch.nn import tree

CAPTURED_TYPES: dict[type, type] = {}
"""Classes of modules, and the classes that compute the same in fewer kernels where a step is captured."""


def merge_kernels(model: nn.Module) -> None:
    """Gives the modules of a model that generates the classes for captured steps, in place; subclasses stay."""
    change_classes(tree.named_modules(model), CAPTURED_TYPES)


class CapturedStep:
    """A step as a CUDA graph: its kernels are started together, in 0.6 ms instead of 5 ms for 12 layers.

    The graph reads and writes the same memory each time. Its first run gets copies of the state's arrays; after that
    the state is that memory. The buffers of the cache are written in place, so they are not copied. Capturing takes
    about as long as two steps.

    Args:
        step: `DecoderBase.decode_step`, which depends on its arrays only.
        state, token: The arguments of the first call.
    """

    def __init__(self, step: Step, state: State, token: torch.Tensor) -> None:
        self.token = token.clone()
        self.state = State(
            list(state.cache), state.index.clone(), *(a if a is None else a.clone() for a in (state.keys, state.seen))
        )
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries are initialized in a run that is not captured
            after, _ = step(self.state, self.token)
            # arrays that the step replaces get memory of their own; the others, the buffers, are written in place
            self.state.cache[:] = [
                old if new is old else old.clone() for old, new in zip(self.state.cache, after.cache, strict=True)
            ]
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            after, self.choice = step(self.state, self.token)
            self._keep(after, self.choice.token)

    def _keep(self, state: State, token: torch.Tensor) -> None:
        """Copies arrays that are not yet in the memory of the graph."""
        for own, new in zip([*self.state.arrays, self.token], [*state.arrays, token], strict=True):
            if new is not own:
                own.copy_(new)

    def __call__(self, state: State, token: torch.Tensor) -> tuple[State, Choice]:
        self._keep(state, self.token if token is self.choice.token else token)
        self.graph.replay()
        return self.state, self.choice
