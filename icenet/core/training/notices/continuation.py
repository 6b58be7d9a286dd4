"""How a continued run differs from the run before, for notes at the start of training."""

from __future__ import annotations

from icenet.core.config import Config
from icenet.core.data.datasets import Dataset
from icenet.core.data.user import UserDataset
from icenet.core.engine import Engine
from icenet.core.models import twins
from icenet.core.runs.checkpoint import Checkpoint
from icenet.core.training.notices import changed_keys
from icenet.core.training.schedule import explain_change


def notes(found: Checkpoint, config: Config, engine: Engine, dataset: Dataset) -> list[str]:
    """Returns what the user should know about changes of the code, the schedule, TF32, the keys and the data."""
    lines = []
    for key, reference in (("code", config.model.type), ("loss_code", config.training.loss)):
        lines.append(twins.changed_code(found.state.get(key), reference, str(found.path)))
    lines.append(explain_change(found.step, found.config.training, config.training))
    before = found.state.get("tf32")  # None in a checkpoint of an earlier version
    if before is not None and before != engine.tf32:
        place = f"{engine.backend} {engine.device}, allow_tf32: {str(config.allow_tf32).lower()}"
        lines.append(
            f"TF32 is {engine.tf32} from step {found.step + 1} ({place}), and was {before} before: the losses "
            "change by more than rounding"
        )
    same_data = found.state.get("data") == dataset.fingerprint
    lines += changed_keys.notes(found.config, config, found.step, dataset, same_data=same_data)
    if not same_data:
        lines.append(f"the {_name_data(config, dataset)} not what the checkpoint was trained on")
    elif isinstance(dataset, UserDataset):
        lines += dataset.changed_batch(found.state.get("last_batch"))
    return [line for line in lines if line]


def _name_data(config: Config, dataset: Dataset) -> str:
    if isinstance(dataset, UserDataset):
        return f"data of {dataset.description} is"
    content, verb = ("images", "are") if dataset.unit == "img" else ("text", "is")
    return f"{content} of data.source {config.data.source} {verb}"
