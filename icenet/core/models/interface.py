"""What the framework-free code needs of a model: the methods that each backend's `BaseModel` defines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import numpy as np

from icenet.core.generation.decoder import DecoderBase
from icenet.core.generation.request import Tokens


class ModelInterface:
    """A model of a framework, as `ModelBase` uses it.

    Attributes:
        backend: mlx or torch.
        decoder_type: The decoder that generates its text.
        array_type: The framework's class of arrays.
        compute_dtype: The framework's dtype of the activations.
        device: The framework's device of the weights; None is MLX's default device.
        training: Whether it is in training mode, as the framework has it.
        eval: Sets evaluation mode.
    """

    backend: ClassVar[str]
    decoder_type: ClassVar[type[DecoderBase]]
    array_type: ClassVar[type[Any]]
    compute_dtype: Any
    device: Any
    training: Any
    eval: Any

    # ---- computation -------------------------------------------------------------------------------------

    def arithmetic(self) -> AbstractContextManager[None]:
        """Returns a context in which operations have the model's device (MLX) and its precision (PyTorch).

        A call of the model and `generate` open it. Open it around the whole step of your own training loop.
        """
        raise NotImplementedError

    @property
    def is_on_cpu(self) -> bool:
        """Whether the device of the model is a CPU."""
        raise NotImplementedError

    @property
    def cpu_prefill_columns(self) -> int:
        """Number of columns of prompts that a CPU reads in one forward pass."""
        return 512

    def without_gradients(self) -> AbstractContextManager[None]:
        """Returns a context in which the framework records nothing for gradients."""
        raise NotImplementedError

    # ---- weights -----------------------------------------------------------------------------------------

    def weights(self) -> dict[str, np.ndarray]:
        """Returns copies of the canonical weights: numpy arrays in PyTorch's layouts, by path."""
        raise NotImplementedError

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each parameter and statistic in PyTorch's layout, by path, in the model's order.

        A shared array has all of its paths.
        """
        raise NotImplementedError

    def layer_kinds(self) -> dict[str, str]:
        """Returns the kind of each layer with parameters, by module path (see `icenet.core.weights.layout`)."""
        raise NotImplementedError

    @property
    def is_meta(self) -> bool:
        """Whether the parameters have no values."""
        raise NotImplementedError

    def unregistered(self) -> list[str]:
        """Returns the paths of attributes with layers or arrays that the framework neither trains nor saves."""
        raise NotImplementedError

    def mlx_names(self) -> dict[str, str]:
        """Returns the canonical path of each array by the path that it has in MLX, where the two differ."""
        raise NotImplementedError

    def set_weight_dtype(self, dtype: str) -> None:
        """Holds the floating weights in fp32, bf16 or fp16, and computes in it, for inference.

        Their values are undefined until `set_weights` sets them.
        """
        raise NotImplementedError

    # ---- layers ------------------------------------------------------------------------------------------

    def guard_embeddings(self, reads_all: bool = False) -> None:
        """Makes the embeddings of a user's model check their ids, in place (see `nn/embedding.py` of the backend).

        Args:
            reads_all: Whether they read the ids of each call on the host, not only where their shape is new.
        """
        raise NotImplementedError

    def reading_ids(self) -> AbstractContextManager[None]:
        """Returns a context in which the embeddings read and check the ids of each call on the host."""
        raise NotImplementedError

    def match_gradients_at_zero(self) -> None:
        """Gives the framework's own activations PyTorch's gradients at 0, in place (see `nn/activations.py`).

        Does nothing by default.
        """

    def key_dropouts(self) -> None:
        """Turns the framework's own dropout layers into keyed ones, in place (see `nn/dropout.py` of the backend)."""
        raise NotImplementedError

    def _named_layers(self) -> Iterable[tuple[str, Any]]:
        """Yields all modules with their canonical paths, parents first; a shared one under each of its paths."""
        raise NotImplementedError

    # ---- arrays ------------------------------------------------------------------------------------------

    def _named_arrays(self) -> Sequence[tuple[str, Any, bool]]:
        """Returns path, array and whether it is trainable for each parameter and buffer, in the model's order."""
        raise NotImplementedError

    def _assign_weights(self, values: Iterable[tuple[str, np.ndarray]]) -> None:
        """Sets weights with the model's names and shapes; a shared one has its owner's name."""
        raise NotImplementedError

    def _host_memory(self) -> Mapping[str, np.ndarray]:
        """Returns C-contiguous float32 views of the weights that numpy can write to, by path."""
        raise NotImplementedError

    def _to_host(self, array: Any, waits: bool = False) -> np.ndarray | None:
        """Returns an array of the framework as numpy, or None if its values are unknown.

        Args:
            array: Any array.
            waits: Whether to wait for an array on CUDA too; otherwise it gives None.
        """
        raise NotImplementedError

    def _to_float_host(self, array: Any) -> np.ndarray:
        """Returns an output of the model as numpy; half precision as float32."""
        raise NotImplementedError

    def _to_native_floats(self, array: np.ndarray) -> Any:
        """Returns float32 values as an array of the framework in `compute_dtype` on the model's device."""
        raise NotImplementedError

    def _to_native_tokens(self, tokens: Tokens) -> Any:
        """Returns tokens, int32 `[B, L]`, as an array of the framework on the model's device."""
        raise NotImplementedError
