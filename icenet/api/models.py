"""Models: built, loaded, saved and converted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from icenet.core import backends, files
from icenet.core.config import Config, custom
from icenet.core.config.section import Section
from icenet.core.errors import MissingCheckpointError, UsageError
from icenet.core.importing import without_garbage_collection
from icenet.core.models.base import ModelBase
from icenet.core.models.inference import build_for_inference, quantized

if TYPE_CHECKING:
    from icenet.core.weights.convert import Conversion


def build(
    config: Config | str | Path,
    backend: str | None = None,
    device: str | None = None,
    *,
    allow_tf32: bool | None = None,
) -> Any:
    """Builds a new model with initial weights.

    Args:
        config: A `Config`, the path of a YAML file, or the name of a preset.
        backend: mlx, torch or auto; by default that of the config.
        device: auto, cpu, gpu, cuda, cuda:N or mps; by default that of the config.
        allow_tf32: Whether fp32 products may use TF32 on a GPU; by default that of the config.

    Returns:
        A `BaseModel` (`icenet.models` or `icenet_torch.models`) in evaluation mode.

    Raises:
        UsageError: The configuration is of another type, or is invalid.
        BackendError: The backend or the device does not exist, or TF32 is not allowed and MLX already uses it in this
            process.
    """
    _check_config(config)
    config = config.checked() if isinstance(config, Config) else Config.from_yaml(files.user_path(config, "build"))
    custom.trust_model(config.model)
    return build_for_inference(config, backend, device, seed=config.seed, allow_tf32=allow_tf32)


def load(
    path: str | Path,
    backend: str | None = None,
    device: str | None = None,
    *,
    allow_tf32: bool | None = None,
    dtype: str | None = None,
    averaged: bool = False,
    trust_code: bool = False,
    quantize: int | None = None,
    group_size: int | None = None,
) -> Any:
    """Loads a model, on any backend.

    Args:
        path: A run (its newest complete checkpoint), a checkpoint, a folder that `save` wrote, a folder of Hugging
            Face, a GGUF file, or the id of a repository of huggingface.co (see docs/conversion.md).
        backend: mlx, torch or auto; by default that of the config.
        device: auto, cpu, gpu, cuda, cuda:N or mps; by default that of the config.
        allow_tf32: Whether fp32 products may use TF32 on a GPU; by default that of the config.
        dtype: Dtype of the weights and of the arithmetic: fp32, bf16 or fp16. By default fp32 on a CPU, and on a GPU
            the dtype of most weights of the file.
        averaged: Whether to load the moving average of the weights (`training.ema_decay`).
        trust_code: Whether to run the user's Python file that defines the model.
        quantize: Number of bits to which the weights of linear layers and embeddings are quantized: 2, 3, 4, 5, 6 or
            8. None keeps them as they are (see docs/conversion.md).
        group_size: Number of values that share a scale and a bias, with `quantize`: 32, 64 or 128; by default 64.

    Returns:
        A `BaseModel` (`icenet.models` or `icenet_torch.models`) in evaluation mode.

    Raises:
        MissingCheckpointError: The path does not exist or contains no weights.
        UsageError: The weights cannot be quantized like this.
        BackendError: As in `build`.
    """
    with without_garbage_collection():  # `build` takes less time without them
        from icenet.core.runs.open_model import (
            WITH_WEIGHTS,
            image_facts,
            open_averaged,
            open_target,
            with_tokenizer,
        )
        from icenet.core.weights.hub import is_repository_id

    path = files.user_path(path, "load")
    if backend is not None:
        backends.check_name(backend)
    config, weights = None, None
    if path.exists() or is_repository_id(path):
        chosen = [f"backend={backend}"] if backend else []
        config, weights = open_averaged(path) if averaged else open_target(path, chosen)
    if config is None or weights is None:
        problem = "contains no weights" if path.exists() else "no such file or folder"
        raise MissingCheckpointError(f"{path}: {problem}; {WITH_WEIGHTS}")
    config = with_tokenizer(config, weights)
    if trust_code:
        custom.trust_model(config.model)
    weights = quantized(config, weights, quantize, group_size)
    model = build_for_inference(config, backend, device, weights=weights, allow_tf32=allow_tf32, dtype=dtype)
    if config.model.input_kind in ("images", "anything"):
        model.image_facts = image_facts(path)
    return model


def save(model: Any, path: str | Path, *, overwrite: bool = False) -> Path:
    """Writes the canonical weights, the config and the tokenizer of a model to a folder. Returns the folder.

    The config has the default options of generation. A seed is not among them. Of a model of images, images.json has
    the names of the classes and how images are read, if `model.image_facts` does.

    Args:
        model: A `BaseModel` of either backend.
        path: The folder, created if absent. A model that `save` wrote there before is replaced.
        overwrite: Whether to replace other files of the same names: model.safetensors, config.yaml, tokenizer.json.

    Raises:
        UsageError: The path is a file, a run or a checkpoint, or a file would be replaced; or the model has other
            arrays than its config says, so that `load` could not read it.
        FileError: A file cannot be written, for example because the disk is full.
    """
    from icenet.core.runs import saved_model

    check_model(model, "save")
    folder = files.user_path(path, "save")
    saved_model.save_model(model, folder, overwrite)
    return folder


def convert(source: str | Path, destination: str | Path, to: str, **options: Any) -> Conversion:
    """Converts the weights of a model to the form "canonical", "mlx" or "torch", as `icenet convert` does.

    The forms "hf" and "mlx-lm" are folders of Hugging Face and mlx-lm. If the model is a ResNet or a ViT, state dicts
    of torchvision are read, and the form "torchvision" writes one.

    Args:
        source: What `load` accepts, or a file or folder of weights.
        destination: A file or folder.
        to: The form.
        options: See `icenet.core.conversion.convert.convert_model`, and for "hf" and "mlx-lm"
            `icenet.core.conversion.export.export`; for example `overwrite=True`, or `quantize=4` for "mlx-lm".

    Returns:
        What was read and written, as `icenet convert` prints it: `icenet.core.weights.convert.Conversion`.

    Raises:
        UsageError: The form or an option is wrong, or a file would be replaced.
        ConfigError: The new form cannot express the model.
        WeightsError: The weights are damaged, or are not those of the config.
        FileError: A file cannot be written.
    """
    from icenet.core.conversion.convert import convert_model

    source, destination = files.user_path(source, "convert"), files.user_path(destination, "convert")
    return convert_model(source, destination, to, **options)


def check_model(model: Any, function: str) -> None:
    """Raises UsageError if the argument of a function of `icenet` is not a `BaseModel`."""
    if isinstance(getattr(model, "_orig_mod", model), ModelBase):  # torch.compile wraps it
        return
    wrapped = isinstance(getattr(model, "module", None), ModelBase)
    hint = "pass its .module" if wrapped else "icenet.from_torch and icenet.to_torch copy the weights of any module"
    raise UsageError(f"{function}: needs a BaseModel of icenet or icenet_torch, not a {type(model).__name__}; {hint}")


def _check_config(config: Any) -> None:
    """Raises UsageError for parts of a configuration in place of one."""
    if isinstance(config, Section) and not isinstance(config, Config):
        raise UsageError(f"build: takes a Config, not a {type(config).__name__}; pass Config(model=model_config)")
    if isinstance(config, dict):
        raise UsageError(
            "build: takes a Config, the path of a YAML file or the name of a preset, not a dict; "
            "pass Config.from_dict(values)"
        )
