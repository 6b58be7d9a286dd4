"""Modules to port: classes of a user's file, and models of torchvision, timm and transformers; their weights."""

from __future__ import annotations

import importlib
import inspect
import pickle
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from icenet.core.config import user_code
from icenet.core.errors import UsageError, WeightsError
from icenet.core.messages import first_line
from icenet.core.weights import files, sharing
from icenet_torch.nn.arrays import to_numpy


def modules_in(module: ModuleType) -> list[str]:
    """Returns the names of the torch modules that a file defines."""
    return [
        name
        for name, value in vars(module).items()
        if (inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__ == module.__name__)
        or isinstance(value, nn.Module)
    ]


def instance(made: Any, target: str) -> nn.Module:
    """Returns a module: itself, or the result of a class or function without arguments."""
    if isinstance(made, nn.Module):
        return made
    if not callable(made):
        raise UsageError(
            f"{target}: is of type {type(made).__name__}, not a torch.nn.Module or a function that returns one"
        )
    module = user_code.call(made, target)
    if not isinstance(module, nn.Module):
        raise UsageError(f"{target}: returns an object of {type(module).__name__}, which is no torch.nn.Module")
    return module


def package(name: str) -> Any:
    """Imports a package that IceNet does not need by itself; an error says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"{name} cannot be imported ({error}); pip install {name.partition('.')[0]}") from None


def torchvision(name: str) -> tuple[nn.Module, None]:
    """Returns a model of torchvision with random weights."""
    models = package("torchvision.models")
    try:
        return models.get_model(name, weights=None), None
    except (ValueError, KeyError) as error:
        raise UsageError(f"torchvision:{name}: {error}") from None


def timm(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Returns a model of timm with random weights, and an example image."""
    timm_package = package("timm")
    try:
        model = timm_package.create_model(name, pretrained=False)
    except RuntimeError as error:
        raise UsageError(f"timm:{name}: {error}") from None
    size = model.default_cfg.get("input_size", (3, 224, 224))
    return model, {"x": torch.randn(1, *size, generator=torch.Generator().manual_seed(0))}


def transformers(folder: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Returns the model of a folder of Hugging Face, and example inputs. No code of the folder is run."""
    library = package("transformers")
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        what = "it has no config.json" if path.is_dir() else "no such folder"
        raise UsageError(f"transformers:{folder}: {what}; give a folder of Hugging Face on your disk")
    try:
        config = library.AutoConfig.from_pretrained(path, local_files_only=True)
        names = getattr(config, "architectures", None) or []
        kind = next((getattr(library, name) for name in names if hasattr(library, name)), library.AutoModel)
        model = kind.from_pretrained(path, local_files_only=True, dtype=torch.float32)
    except Exception as error:  # of transformers, and of the readers of weights
        reason = first_line(error).rstrip(".")
        raise WeightsError(
            f"transformers:{folder}: transformers cannot read it ({reason}); download or save it again"
        ) from None
    return model, example_of(model)


def example_of(model: Any) -> dict[str, Any]:
    """Returns example inputs of a model of transformers."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    size = getattr(config, "image_size", None) or 224
    vocabulary: Any = getattr(config, "vocab_size", None)
    if vocabulary is None:
        vocabulary = getattr(getattr(config, "text_config", None), "vocab_size", 100)
    size = getattr(getattr(config, "vision_config", config), "image_size", size)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(config, "num_channels", None) or 3
    ids = torch.randint(0, int(vocabulary), (2, 12), generator=generator)
    made = {
        "input_ids": ids,
        "attention_mask": torch.ones(2, 12, dtype=torch.long),
        "decoder_input_ids": ids[:, :5].contiguous(),
        "pixel_values": torch.randn(2, channels, height, width, generator=generator),
        "input_values": torch.randn(2, 4000, generator=generator),
        "input_features": torch.randn(
            2,
            getattr(config, "num_mel_bins", 80),
            2 * getattr(config, "max_source_positions", 100),
            generator=generator,
        ),
    }
    wanted = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    names = [main, *(["attention_mask"] if main == "input_ids" else [])]
    if {"input_ids", "pixel_values"} <= set(wanted) and hasattr(config, "vision_config"):
        names = ["input_ids", "pixel_values"]
    if getattr(config, "is_encoder_decoder", False):
        names.append("decoder_input_ids")
    found = {name: made[name] for name in wanted if name in names and name in made}
    if "use_cache" in wanted:
        found["use_cache"] = False
    return found


def _tensor(value: np.ndarray) -> torch.Tensor:
    if value.dtype.name == "bfloat16":  # which PyTorch does not share with numpy
        return torch.from_numpy(np.array(value).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(value))


def load_weights(module: nn.Module, path: Path) -> None:
    """Sets the weights of a module to those of a file. A pickle of other things than tensors is refused."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        state = {name: _tensor(value) for name, value in files.read(path).items()}
    else:
        try:
            with warnings.catch_warnings():  # about old protocols of pickle, before the error that says what to do
                warnings.simplefilter("ignore", UserWarning)
                state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            first = first_line(error, "damaged")
            if isinstance(error, pickle.UnpicklingError):  # PyTorch's text recommends to run the code of the file
                first = "it has other objects, or is no file of torch.save; save the state_dict() of the module"
            raise WeightsError(f"{path}: cannot be read as a file of tensors only: {first[:160]}") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if isinstance(state, dict):
        state.update(_of_shared(module, state, path))  # in place: the metadata of a state dict stay
        expected, found = (
            {name: tuple(value.shape) for name, value in table.items() if isinstance(value, torch.Tensor)}
            for table in (module.state_dict(), state)
        )
        files.check(expected, found, str(path), "give the weights of this module, under its names")
    try:
        module.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise WeightsError(f"{path}: {' '.join(str(error).split())[:400]}") from None


def _of_shared(module: nn.Module, state: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """Returns the weights that a module has under several names, under all of them; the file may have one of them."""
    shared = sharing.find_shared(module.state_dict(keep_vars=True).items())
    names = {*shared, *shared.values()}
    given = {name: to_numpy(value) for name, value in state.items() if name in names and torch.is_tensor(value)}
    try:
        return {name: _tensor(value) for name, value in sharing.complete(given, shared).items()}
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
