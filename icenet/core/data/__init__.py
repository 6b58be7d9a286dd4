"""Data as numpy batches, in an order that is a pure function of (seed, step)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from icenet.core.data.text import Batch, TextDataset
from icenet.core.data.tokenizer import ByteTokenizer, Tokenizer, get_tokenizer

if TYPE_CHECKING:
    from icenet.core.config import DataConfig

__all__ = ["Batch", "ByteTokenizer", "TextDataset", "Tokenizer", "get_tokenizer", "open_dataset"]


def open_dataset(
    data_config: DataConfig, seq_length: int, seed: int, cache_dir: str | Path | None = None
) -> TextDataset:
    """Opens the data that a configuration names. A new kind of source adds its branch here.

    Args:
        data_config: the section `data` of a configuration.
        seq_length: tokens in one sequence (`data.seq_length`, or else the model's longest).
        seed: of the order of batches.
        cache_dir: where prepared data is kept; $ICENET_CACHE or ~/.cache/icenet when absent.

    Raises:
        DataError: the source is missing, empty, not text or too short, or the cache cannot be written.
    """
    return TextDataset.open(
        data_config.source,
        seq_length=seq_length,
        seed=seed,
        tokenizer=data_config.tokenizer,
        validation_fraction=data_config.validation_fraction,
        cache_dir=cache_dir,
    )
