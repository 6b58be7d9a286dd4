"""IceNet: one config, two backends, one result.

    import icenet

    model = icenet.build("transformer-tiny")                 # on the backend the config names
    model = icenet.load("runs/quickstart/mlx", backend="torch")
    text = icenet.generate(model, "def main(", max_new_tokens=100, temperature=0.8, seed=1)
    icenet.save(model, "my-model")

Importing this package loads neither MLX nor PyTorch; a function loads the one it needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icenet.core.config import Config
    from icenet.core.weights.convert import Conversion

try:
    __version__ = metadata.version("icenet")
except metadata.PackageNotFoundError:  # a checkout that is on the path without being installed
    __version__ = "0+unknown"

__all__ = ["__version__", "build", "convert", "generate", "load", "save"]


def build(config: Config | str | Path, backend: str | None = None, device: str | None = None) -> Any:
    """A new model with its initial weights.

    Args:
        config: a `Config`, a YAML file, or the name of a preset.
        backend: mlx, torch or auto; what the config says when absent.
        device: auto, cpu, gpu, cuda, cuda:N or mps; likewise.

    Returns:
        A `BaseModel` of the backend (`icenet.models` or `icenet_torch.models`), in evaluation mode.
    """
    from icenet.core.config import Config, custom

    config = config.checked() if isinstance(config, Config) else Config.from_yaml(config)
    custom.trust(config.model.type)
    return _model(config, backend, device, init_weights=True)


def _model(config: Config, backend: str | None, device: str | None, init_weights: bool) -> Any:
    from icenet.core import backends
    from icenet.core.tokenizers import get_tokenizer

    name = backends.choose(config, backend)
    model = backends.module(name, "engine.engine").build_model(config, device or config.device, init_weights)
    model.eval()
    if config.model.input_kind in ("tokens", "anything") and config.data.kind == "text":
        tokenizer = get_tokenizer(getattr(config.data, "tokenizer", "bytes"))
        if tokenizer.vocab_size <= config.model.vocab_size:
            model.tokenizer = tokenizer
    seed = config.generation.seed if config.generation.seed is not None else config.seed
    model.generation = config.generation.model_copy(update={"seed": seed})
    return model


def load(
    path: str | Path,
    backend: str | None = None,
    device: str | None = None,
    *,
    averaged: bool = False,
    trust_code: bool = False,
) -> Any:
    """The model of a run (its newest good checkpoint), a checkpoint, or a folder that `save` wrote.

    The backend need not be the one that wrote it. `averaged` takes the running mean of the weights that
    `training.ema_decay` kept, in place of the weights. Where the model is code of the user's own, its file is run
    only with `trust_code`.
    """
    from icenet.core.config import custom
    from icenet.core.errors import CheckpointError
    from icenet.core.training.open_model import open_averaged, open_target

    opened = open_averaged if averaged else open_target
    config, values = opened(Path(path)) if Path(path).exists() else (None, None)
    if config is None or values is None:
        raise CheckpointError(f"{path}: holds no weights; give a run, a checkpoint or a saved model's folder")
    if trust_code:
        custom.trust(config.model.type)
    model = _model(config, backend, device, init_weights=False)
    model.set_weights(dict(values))
    return model


def save(model: Any, path: str | Path) -> Path:
    """Writes a model's canonical weights, its config and its tokenizer's file to a folder; gives the folder."""
    from icenet.core import files as staging
    from icenet.core.config import yaml_file
    from icenet.core.weights import files as weights

    folder = Path(path)
    weights.write(folder, model.weights())
    values = {"model": model.config.model_dump(mode="python")}
    for name, content in getattr(model.tokenizer, "files", {}).items():
        staging.write_bytes(folder / name, content)
        values["data"] = {"tokenizer": name}
    staging.write_text(folder / "config.yaml", yaml_file.dump(values))
    return folder


def generate(
    model: Any, prompt: str | Sequence[str], *, stream: bool = False, **options: Any
) -> str | list[str] | Iterator[str]:
    """Continues a text, or several; gives what follows the prompt.

    `model` is a model or what `load` takes. `options` are those of `GenerationConfig` (max_new_tokens,
    temperature, top_k, top_p, min_p, repetition_penalty, seed, stop, overflow). With `stream`, an iterator
    of pieces of text, for one prompt.
    """
    from icenet.core import backends as backend
    from icenet.core.errors import UsageError
    from icenet.core.generation import request as generation
    from icenet.core.generation import streaming

    if isinstance(model, (str, Path)):
        model = load(model)
    generation.check_reads_tokens(model)
    if model.tokenizer is None:
        raise UsageError("generate: the model has no tokenizer; set model.tokenizer, or use model.generate with ids")
    prompts: list[Any] = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
    wrong = next((item for item in prompts if not isinstance(item, str)), None)
    if wrong is not None:
        raise UsageError(f"generate: a prompt must be a text, not {type(wrong).__name__}; model.generate takes ids")
    ids = generation.encode_prompts(model.tokenizer, prompts)
    if stream and len(ids) != 1:
        raise UsageError("generate: stream=True takes one prompt")
    request = generation.request(model, ids, None, 0, options)
    decoder = backend.module(model.backend, "generation.decoder").Decoder(model, request)
    if stream:
        return streaming.text_pieces(decoder, request)
    texts = streaming.texts(decoder, request)
    return texts[0] if isinstance(prompt, str) else texts


def convert(source: str | Path, destination: str | Path, to: str, **options: Any) -> Conversion:
    """Converts weights between canonical, mlx and torch form; see `icenet.core.weights.convert.convert`."""
    from icenet.core.weights.convert import convert as run

    return run(source, destination, to, **options)  # type: ignore[arg-type]
