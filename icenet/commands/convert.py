"""`icenet convert`: weights of a model from one form to another."""

from __future__ import annotations

from pathlib import Path

from icenet.core import backends
from icenet.core import files as staging
from icenet.core.config import Config
from icenet.core.errors import UsageError
from icenet.core.tokenizers import tokenizer_files
from icenet.core.training import checkpoint
from icenet.core.weights.convert import _destination, _refuse_collision, convert


def convert_model(
    source: Path, destination: Path, to: str, source_form: str | None, config: str | None, overwrite: bool
) -> str:
    """Converts with the kinds and shapes of the config beside the source, or of the one that is named.

    A run stands for its newest good checkpoint. Gives a text that says what was done.
    """
    if (source / "checkpoints").is_dir():
        source = checkpoint.find(source).path
    folder = source if source.is_dir() else source.parent
    settings = config or (folder / "config.yaml" if (folder / "config.yaml").is_file() else None)
    kinds = shapes = None
    if settings is not None:
        model = backends.meta_model(Config.from_yaml(settings, trust_code=config is not None))
        kinds, shapes = model.layer_kinds(), model.weight_shapes()
    beside = None  # a config beside the weights, for icenet.load
    if settings is not None and to == "canonical" and (destination.is_dir() or not destination.suffix):
        _refuse_collision(source, _destination(destination, to), overwrite)
        beside = destination / "config.yaml"
        if beside.exists() and Path(settings).resolve() == beside.resolve():
            beside = None
        elif beside.exists() and not overwrite:
            raise UsageError(f"{beside}: exists; name another destination, or give --overwrite to replace it")
    forms = {"to": to, "source_form": source_form}
    done = convert(source, destination, kinds=kinds, shapes=shapes, overwrite=overwrite, **forms)  # type: ignore[arg-type]
    if settings is not None and beside is not None:
        read = Config.from_yaml(settings, trust_code=False)
        files = tokenizer_files(getattr(read.data, "tokenizer", "bytes"))
        for name, content in files.items():
            staging.write_bytes(beside.with_name(name), content)
        staging.write_text(beside, checkpoint.carried(read, files).to_yaml())
    lines = [f"from  {done.source}", f"to    {done.destination}"]
    if done.left_out:
        lines.append(f"left out: {', '.join(done.left_out)}")
    return "\n".join(lines)
