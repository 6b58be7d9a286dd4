"""IceNet: one config, two backends, one result.

    import icenet

    model = icenet.build("transformer-tiny")                 # on the backend that the config names
    model = icenet.load("runs/quickstart/mlx", backend="torch")
    text = icenet.generate(model, "def main(", max_new_tokens=100, temperature=0.8, seed=1)
    text = icenet.chat("SmolLM2-135M-Instruct", "What is the capital of France?")
    cache = icenet.prompt_cache(model, long_text)            # later prompts that begin with it read the rest only
    text = icenet.generate(model, long_text + "def", cache=cache, draft=small_model)
    vectors = icenet.embed("all-MiniLM-L6-v2", ["a text", "another"])
    icenet.save(model, "my-model")
    icenet.from_torch(torch_module, mlx_module)              # the weights of any two modules, and to_torch back

Importing this package loads neither MLX nor PyTorch. Each function loads the framework that it needs. What they raise
for a bad input is an `IceNetError`, with one line that names it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import icenet._deprecated  # noqa: F401  (old module names)
from icenet.core.errors import IceNetError
from icenet.core.importing import without_garbage_collection

__all__ = [
    "IceNetError",
    "__version__",
    "build",
    "chat",
    "convert",
    "embed",
    "from_torch",
    "generate",
    "load",
    "load_prompt_cache",
    "port",
    "prompt_cache",
    "save",
    "to_torch",
]
__version__: str

_FUNCTIONS = {
    "icenet.api.models": ("build", "convert", "load", "save"),
    "icenet.api.text": ("chat", "embed", "generate", "load_prompt_cache", "prompt_cache"),
    "icenet.core.models.modules": ("from_torch", "to_torch"),
    "icenet.parity.ports.port": ("port",),
}
"""The functions of each module. It is imported when the first of them is used: the command line needs few."""

if TYPE_CHECKING:
    from icenet.api.models import build, convert, load, save
    from icenet.api.text import chat, embed, generate, load_prompt_cache, prompt_cache
    from icenet.core.models.modules import from_torch, to_torch
    from icenet.parity.ports.port import port
else:  # a type checker that reads `__getattr__` takes every name for one of this package

    def __getattr__(name: str) -> Any:
        """Returns a function of `_FUNCTIONS`, `__version__` or the package `parity`, and keeps it."""
        if name == "__version__":
            found = _version()
        elif name == "parity":
            import icenet.parity as found
        else:
            module = next((module for module, names in _FUNCTIONS.items() if name in names), None)
            if module is None:
                raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
            with without_garbage_collection():
                found = getattr(importlib.import_module(module), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib import metadata  # takes half the time of `icenet --help`

    try:
        return metadata.version("icenet")
    except metadata.PackageNotFoundError:  # a source tree on the path that is not installed
        return "0+unknown"
