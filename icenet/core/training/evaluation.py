"""The evaluation of a model on validation data, with all processes of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from icenet.core.distributed import processes
from icenet.core.engine import Batch, Engine


class Validation(NamedTuple):
    """The means over all labels of the validation data."""

    loss: float
    """In nats."""
    accuracy: float | None
    """From 0 to 1; None if the model is no classifier."""
    num_labels: float


def evaluate(engine: Engine, batches: Iterable[Batch], beat: Callable[[], None]) -> Validation | None:
    """Evaluates the model of an engine.

    Args:
        engine: The engine. The statistics of its norms are averaged over the processes first.
        batches: The same batches in all processes. Each process evaluates its rows of them.
        beat: Called before each batch, for a watchdog.

    Returns:
        The same result in all processes; None without labels.
    """
    total = count = num_correct = 0.0
    is_classifier = False
    engine.average_statistics()
    for batch in batches:
        beat()
        found = engine.evaluate(processes.local_batch(batch, engine.process_group))
        total, count = total + found.loss * found.labels, count + found.labels
        num_correct, is_classifier = num_correct + (found.correct or 0), found.correct is not None
    total, count, num_correct = engine.process_group.gather([total, count, num_correct]).sum(axis=0).tolist()
    if not count:
        return None
    return Validation(total / count, num_correct / count if is_classifier else None, count)
