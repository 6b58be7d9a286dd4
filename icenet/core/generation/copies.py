"""The copy of a model that generates.

A step of generation reads one token, so its time is that of reading the weights and of starting the operations. The
copy has the same classes and shares the model's arrays. Its layers are prepared by their own `prepare_generation`:
they join projections of the same input to one product, and cast weights once that have another dtype than the
activations. The model itself keeps its layers; weights that are joined become parts of the joined array, so that they
are in memory once.
"""

from __future__ import annotations

from typing import Any


class GenerationCopy:
    """Keeps the copy of a model, for the next call, while the model has the same weights and attributes.

    A change of a weight in place changes the copy too, because it shares the memory. Cast weights do not, so a copy
    with such weights is not kept. In training mode it is not kept either: a training step replaces the weights, and
    the copy would keep the old ones in memory.
    """

    def __init__(self) -> None:
        self._copy: Any = None
        self._settings: Any = None
        self._snapshot: Any = None

    def __deepcopy__(self, memo: Any) -> GenerationCopy:
        return GenerationCopy()

    def __reduce__(self) -> Any:
        return GenerationCopy, ()

    def of(self, model: Any, tree: Any, snapshot_type: Any) -> Any:
        """Returns the copy of a model.

        Args:
            model: A `ModelBase`.
            tree: The module `nn.tree` of its backend.
            snapshot_type: The class `nn.snapshot.Snapshot` of its backend.
        """
        settings = model.compute_dtype, str(model.device), model.allow_tf32
        if self._copy is not None and self._settings == settings and self._snapshot.is_current(model):
            return self._copy
        self._copy = self._settings = self._snapshot = None
        copy = tree.copy_modules(model)
        copy._generation_copy = None  # which would make a cycle
        pairs = zip(list(tree.named_modules(model)), list(tree.named_modules(copy)), strict=True)
        prepared = set()
        for (_, original), (_, copied) in pairs:
            if id(copied) not in prepared and hasattr(copied, "prepare_generation"):
                prepared.add(id(copied))
                copied.prepare_generation(original, model.compute_dtype)
        copy.eval()
        is_cast = any(array.dtype != model.compute_dtype for array in tree.parameters(model))
        if not model.training and not is_cast:
            # joining has changed the addresses
            self._copy, self._settings, self._snapshot = copy, settings, snapshot_type(model, copy)
        return copy
