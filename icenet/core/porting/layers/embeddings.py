"""The class of an embedding with a padding id, which MLX's lacks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from icenet.core.porting.layers.mlx_layers import WrittenLayer
from icenet.core.porting.record import Module

_SOURCE = '''class (nn.Embedding):
    """An embedding whose row of the padding starts as zeros and gets no gradient by a lookup, as in PyTorch."""

    def __init__(self, num_embeddings, dims, padding_idx):
        super().__init__(num_embeddings, dims)
        self.padding_idx = padding_idx
        self.weight[padding_idx] = 0

    def __call__(self, ids):
        x = super().__call__(ids)
        return mx.where((ids == self.padding_idx)[..., None], mx.stop_gradient(x), x)'''


@dataclass(frozen=True)
class PaddedEmbedding(WrittenLayer):
    """A `torch.nn.Embedding` with `padding_idx`."""

    @property
    def name(self) -> str:
        return self.constructor

    def instance(self, name: str) -> str:
        return f"{name}({', '.join(map(repr, self.arguments))})"

    def class_source(self, name: str) -> str:
        return _SOURCE.replace("class (", f"class {name}(", 1)

    def functions(self) -> dict[str, dict[str, Any]]:
        return {}


def embedding_of(module: Module) -> PaddedEmbedding | None:
    """Returns the layer of an embedding with a padding id, None for another module."""
    s = module.settings
    is_plain = module.kind == "torch.nn.modules.sparse.Embedding" and s.get("is_plain_call", True) and s["has_weight"]
    if not is_plain or module.children or s["padding_idx"] is None:
        return None
    if s.get("max_norm") is not None or s.get("sparse") or s.get("scale_grad_by_freq"):
        return None
    return PaddedEmbedding("PaddedEmbedding", [s["num_embeddings"], s["embedding_dim"], s["padding_idx"]])
