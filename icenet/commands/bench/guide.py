"""`icenet bench guide`: the rows of the model guide's benchmark table, measured on this machine."""

from __future__ import annotations

from icenet.commands.bench.training_rows import Row

# The guide names the sizes and the batches, but not the lengths of the texts and the sizes of the images; these are
# those of the presets, and shorter on a CPU.
ROWS = {
    "transformer-small": Row("Transformer Small", "transformer-small", (32, 512), (32, 32), (), "500 tok/s"),
    "transformer-medium": Row("Transformer Medium", "transformer-medium", (16, 512), (16, 32), (), "300 tok/s"),
    "transformer-large": Row("Transformer Large", "transformer-large", (8, 512), (8, 32), (), "150 tok/s"),
    "cnn": Row("CNN Medium", "cnn-medium", (64, 64), (64, 32), (), "1000 img/s"),
    "lstm": Row("LSTM Medium", "lstm-medium", (64, 128), (64, 32), (), "800 tok/s"),
}
"""The rows with the guide's figures on an Apple M4 Pro."""
