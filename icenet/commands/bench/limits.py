"""The physical limits of inference: the bytes that must be read and the operations that must be computed.

Only the work that no implementation can avoid is counted. Norms, softmax, sampling and launches of kernels are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from icenet.core.config import Config, TransformerConfig


@dataclass(frozen=True)
class Work:
    """What a piece of work needs at least.

    Attributes:
        nbytes: Bytes that are read from memory.
        operations: Multiplications and additions of matrix products.
    """

    nbytes: float
    operations: float

    def seconds(self, rates: Mapping[str, float]) -> tuple[float, str]:
        """Returns the shortest time, and which of the two rates (`bytes`, `operations`, per second) decides it."""
        memory, compute = self.nbytes / rates["bytes"], self.operations / rates["operations"]
        return (memory, "memory") if memory >= compute else (compute, "compute")

    def __add__(self, other: Work) -> Work:
        return Work(self.nbytes + other.nbytes, self.operations + other.operations)


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model on which the limits depend.

    Attributes:
        parameters: Number of values of all parameters.
        vectors: Number of values of norms and biases.
        dense: Number of values of matrices that each token is multiplied by, without the output projection.
        output: Number of values of the output projection.
        experts: Number of values of all experts of all layers.
        expert_share: Part of the experts that one token uses.
        windows: Number of tokens that a token attends to at most, for each layer with a cache.
        cache_width: Values that the cache of one layer holds for a token.
        query_width: Values of the queries of all heads of one layer.
        vocab_size: Number of tokens of the vocabulary.
        max_length: Number of tokens that the model can attend to; None without a limit.
    """

    parameters: int
    vectors: int
    dense: int
    output: int
    experts: int
    expert_share: float
    windows: list[int]
    cache_width: int
    query_width: int
    vocab_size: int
    max_length: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def size_of(config: Config, model: Any) -> ModelSize:
    """Returns the sizes of a model.

    Args:
        config: Its configuration.
        model: The model; its parameters may have no values.
    """
    options, shared = config.model, model.shared_arrays()
    sizes = {"parameters": 0, "vectors": 0, "dense": 0, "output": 0, "experts": 0}
    embedding = 0
    for path, shape in model.weight_shapes().items():
        if path in shared:
            continue
        count = 1
        for length in shape:
            count *= length
        sizes["parameters"] += count
        if path == "token_embedding.weight":
            embedding = count
        elif path.startswith("output."):
            sizes["output"] += count
        elif ".experts." in path:
            sizes["experts"] += count
        elif not path.endswith("_embedding.weight"):  # of those, one row is read for each token
            sizes["dense" if len(shape) > 1 else "vectors"] += count
    if getattr(options, "tie_embeddings", False):
        sizes["output"] += embedding
    longest = getattr(options, "max_seq_length", None)
    if not isinstance(options, TransformerConfig):
        return ModelSize(**sizes, expert_share=0.0, windows=[], cache_width=0, query_width=0,
                         vocab_size=options.vocab_size, max_length=longest)  # fmt: skip
    head = options.head_size or options.hidden_size // options.num_heads
    types = options.layer_types or ["sliding" if options.sliding_window else "full"] * options.num_layers
    windows = [options.sliding_window if "sliding" in kind else None for kind in types]
    return ModelSize(
        **sizes,
        expert_share=options.experts_per_token / options.num_experts if options.num_experts else 0.0,
        windows=[window or options.max_seq_length for window in windows],
        cache_width=2 * (options.num_kv_heads or options.num_heads) * head,
        query_width=options.num_heads * head,
        vocab_size=options.vocab_size,
        max_length=longest,
    )


def step(size: ModelSize, lengths: Sequence[float], value_bytes: float, cache_bytes: float) -> Work:
    """Returns the work of one new token of each row.

    Args:
        size: The model.
        lengths: Number of tokens that the cache of each row holds.
        value_bytes: Bytes of a weight.
        cache_bytes: Bytes of a value of the cache.
    """
    rows = len(lengths)
    experts = size.experts * (1 - (1 - size.expert_share) ** rows)  # those that at least one row is expected to use
    attended = sum(min(length, window) for window in size.windows for length in lengths)
    matrices = size.dense + size.output + size.experts * size.expert_share
    return Work(
        (size.vectors + size.dense + size.output + experts) * value_bytes + attended * size.cache_width * cache_bytes,
        2.0 * rows * matrices + 4.0 * attended * size.query_width,
    )


def prompt(size: ModelSize, lengths: Sequence[int], value_bytes: float) -> Work:
    """Returns the work of reading prompts: every token, and logits of the last ones only."""
    tokens = sum(lengths)
    pairs = sum(attended_pairs(length, window) for window in size.windows for length in lengths)
    matrices = size.dense + size.experts * size.expert_share
    return Work(
        (size.vectors + size.dense + size.output + size.experts) * value_bytes,
        2.0 * tokens * matrices + 2.0 * len(lengths) * size.output + 4.0 * pairs * size.query_width,
    )


def attended_pairs(length: int, window: int) -> int:
    """Returns the number of pairs of a token and one that it attends to, in a causal layer."""
    inside = min(length, window)
    return inside * (inside + 1) // 2 + (length - inside) * window
