"""How the rows of a loss are divided so that not all logits are in memory."""

from __future__ import annotations

CHUNK = 1 << 28
"""Number of logits of a chunk: 0.5 GB in bf16. Products with fewer rows are slower."""


def rows_of_a_chunk(rows: int, vocab_size: int) -> int:
    """Returns the number of rows of a chunk, so that all chunks have about the same size.

    Args:
        rows: Number of rows.
        vocab_size: Number of logits of a row.
    """
    chunks = max(-(-rows * vocab_size // CHUNK), 1)
    return max(-(-rows // (chunks * 128)) * 128, 1)
