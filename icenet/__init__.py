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

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import icenet._deprecated  # noqa: F401  (old module names)
from icenet.core.errors import IceNetError
from icenet.core.importing import without_garbage_collection

if TYPE_CHECKING:
    from icenet.core.config import Config
    from icenet.core.generation.prompt_cache import PromptCache
    from icenet.core.weights.convert import Conversion
    from icenet.core.weights.rename import Rename
    from icenet.parity.ports.port import Port

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


def __getattr__(name: str) -> str:
    """Returns `__version__`. It is read when needed, because importlib.metadata takes half the time of `--help`."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import metadata

    try:
        return metadata.version("icenet")
    except metadata.PackageNotFoundError:  # a source tree on the path that is not installed
        return "0+unknown"


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
    with without_garbage_collection():
        from icenet.core import files
        from icenet.core.config import Config, custom
        from icenet.core.models.inference import build_for_inference

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
    group_size: int = 64,
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
        group_size: Number of values that share a scale and a bias: 32, 64 or 128.

    Returns:
        A `BaseModel` (`icenet.models` or `icenet_torch.models`) in evaluation mode.

    Raises:
        MissingCheckpointError: The path does not exist or contains no weights.
        UsageError: The weights cannot be quantized like this.
        BackendError: As in `build`.
    """
    with without_garbage_collection():
        from icenet.core import backends, files
        from icenet.core.config import custom
        from icenet.core.errors import MissingCheckpointError
        from icenet.core.models.inference import build_for_inference, quantized
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
    if quantize is not None:
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
    from icenet.core import files
    from icenet.core.runs import saved_model

    _check_model(model, "save")
    folder = files.user_path(path, "save")
    saved_model.save_model(model, folder, overwrite)
    return folder


def generate(
    model: Any,
    prompt: str | Sequence[str],
    *,
    stream: bool = False,
    details: bool = False,
    draft: Any = None,
    num_draft_tokens: int | None = None,
    cache: PromptCache | None = None,
    **options: Any,
) -> Any:
    """Continues text.

    Args:
        model: A model, or a path that `load` accepts.
        prompt: One text, or a list of texts.
        stream: Whether to return an iterator over pieces of text, for one prompt.
        details: Whether to return text, tokens and finish reason.
        draft: A smaller model with the same tokenizer, or a path that `load` accepts, which proposes tokens
            (speculative decoding). The text of one prompt is the same, and takes less time. With `details` the result
            has the number of accepted tokens.
        num_draft_tokens: Number of tokens that the draft proposes at a time; 3 by default.
        cache: What `prompt_cache` returns. Tokens of the prompt that the cache has are not read again.
        options: Keys of `icenet.core.config.GenerationConfig`: max_new_tokens, temperature, top_k, top_p, min_p,
            repetition_penalty, seed, stop, eos_token_id, ignore_eos, overflow, max_batch_size.

    Returns:
        The new text without the prompt: a string for one prompt, a list for a list of prompts, an iterator of
        strings with `stream`. With `details`, `icenet.core.generation.streaming.Continuation` instead of a string.

    Raises:
        UsageError: A prompt or an option is invalid.
        NonFiniteError: The model's logits are NaN or infinite.
    """
    from icenet.core.generation.streaming import generate_text

    model = load(model) if isinstance(model, (str, Path)) else model
    _check_model(model, "generate")
    speedups = {"cache": cache, "draft": _draft(model, draft), "num_draft_tokens": num_draft_tokens}
    return generate_text(model, prompt, stream, details, options, speedups)


def chat(
    model: Any,
    messages: str | Sequence[Mapping[str, Any]],
    stream: bool = False,
    *,
    details: bool = False,
    template_options: Mapping[str, Any] | None = None,
    draft: Any = None,
    num_draft_tokens: int | None = None,
    cache: PromptCache | None = None,
    **options: Any,
) -> Any:
    """Answers messages, by the chat template of the model's tokenizer.

    Args:
        model: A model, or a path that `load` accepts.
        messages: One text of the user, or a list of messages: `{"role": "user", "content": "Hello"}`, with the roles
            system, user and assistant.
        stream: Whether to return an iterator over pieces of text.
        details: Whether to return text, tokens and finish reason.
        template_options: Variables of the chat template, such as `{"enable_thinking": False}`.
        draft, num_draft_tokens: See `generate`.
        cache: What `prompt_cache(model)` returns. Given for each answer of a conversation, only the new messages are
            read. The answers are the same.
        options: Keys of `icenet.core.config.GenerationConfig`, as for `generate`. Without `max_new_tokens` an answer
            has at most 1,024 tokens, or those that fit into the context.

    Returns:
        The text of the answer, an iterator of strings with `stream`, or with `details` an
        `icenet.core.generation.streaming.Continuation`.

    Raises:
        UsageError: There is no chat template, it refuses the messages, or they exceed the context.
        DataError: The chat template is faulty, takes too long or needs too much memory.
        NonFiniteError: The model's logits are NaN or infinite.
    """
    from icenet.core import files
    from icenet.core.generation.chat import chat_text
    from icenet.core.runs.open_model import check_chat_template

    if isinstance(model, (str, Path)):
        check_chat_template(files.user_path(model, "chat"), messages, template_options)
        model = load(model)
    _check_model(model, "chat")
    speedups = {"cache": cache, "draft": _draft(model, draft), "num_draft_tokens": num_draft_tokens}
    return chat_text(model, messages, stream, details, template_options, options, speedups)


def port(
    torch_module: Any,
    example_inputs: Any,
    *,
    dynamic: Any = None,
    dtype: str = "fp32",
    layout: str = "nchw",
    example_kwargs: Mapping[str, Any] | None = None,
) -> Port:
    """Ports a PyTorch module to MLX, as source and as a module, and proves that both compute the same.

    Args:
        torch_module: A `torch.nn.Module` on the CPU. It stays unchanged.
        example_inputs: The arguments of one call: a tensor, or a tuple of tensors.
        dynamic: What `torch.export.export` takes as `dynamic_shapes`. By default every dimension is open that the
            module allows.
        dtype: Dtype of the weights of the result: fp32, bf16 or fp16. The comparison is in fp32.
        layout: nchw if the port takes and returns images as the original, nhwc if their channels are last.
        example_kwargs: Keyword arguments of the call.

    Returns:
        A `Port` with `module`, an `mlx.nn.Module` with the names of the original's parameters, `source`, the text of
        a Python file that depends on mlx only, `report`, the comparison, and the method `save(folder)`. The module
        has the parameters of the original's `forward`; what is no array in the example is a constant.

    Raises:
        PortError: The graph of the module cannot be exported, an operation has no counterpart, or the port differs.
        UsageError: An argument is wrong.
        BackendError: MLX or PyTorch is not installed.
    """
    from icenet.parity.ports.port import port as port_module

    kwargs = dict(example_kwargs or {})
    return port_module(
        torch_module, example_inputs, dynamic=dynamic, dtype=dtype, layout=layout, example_kwargs=kwargs
    )


def prompt_cache(
    model: Any, prompt: str | Sequence[int] | None = None, *, add_special_tokens: bool = False
) -> PromptCache:
    """Reads a prompt, so that later prompts that begin with it take less time.

    Args:
        model: A transformer, or a path that `load` accepts.
        prompt: A text or token ids, with which the prompts of all requests with this cache must begin. None makes an
            empty cache, for any prompts and for chats.
        add_special_tokens: See `icenet.core.config.GenerationConfig`, for a text.

    Returns:
        A `PromptCache` for the argument `cache` of `generate`, `chat` and `model.generate`. Its method `save(path)`
        writes a file.

    Raises:
        UsageError: The model is no transformer, or the prompt is invalid.
    """
    from icenet.core.generation.prompt_cache import PromptCache

    model = load(model) if isinstance(model, (str, Path)) else model
    _check_model(model, "prompt_cache")
    cache = PromptCache(model)
    if prompt is not None:
        cache.read(prompt, add_special_tokens)
    return cache


def load_prompt_cache(path: str | Path, model: Any) -> PromptCache:
    """Loads a prompt cache that `PromptCache.save` or `icenet generate --save-prompt-cache` wrote, on any backend.

    Args:
        path: The file (safetensors).
        model: A model with the same weights as the one of which the cache was made.

    Raises:
        WeightsError: The file is damaged, is none of a prompt cache, or is one of another model.
    """
    from icenet.core.generation import prompt_cache

    _check_model(model, "load_prompt_cache")
    return prompt_cache.load(path, model)


def embed(
    model: Any,
    texts: str | Sequence[str],
    batch_size: int = 32,
    *,
    backend: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: Any = None,
    **options: Any,
) -> Any:
    """Returns one vector for each text, by the pooling and normalization that the folder of the model states.

    Args:
        model: A transformer, or a path that `load` accepts, such as a folder of sentence-transformers.
        texts: The texts. Those that are longer than the model can read are cut, and a warning says how many.
        batch_size: Number of texts that are computed together. It does not change the vectors.
        backend, device, dtype: See `load`, for a path.
        progress: Called with the number of texts that are done and that of all, after each batch.
        options: Keys of `icenet.core.config.EmbeddingConfig`: pooling, dense, normalize, max_seq_length, lower_case,
            prompt, prompt_name, prompts, include_prompt. By default those of the folder; otherwise the mean over the
            tokens.

    Returns:
        float32 `[N, D]` in the order of the texts, or `[D]` for one text that is not in a list.

    Raises:
        UsageError: The model is no transformer or has no tokenizer, or an option or a text is invalid.
        NonFiniteError: A vector is NaN or infinite.
    """
    from icenet.core.embedding.texts import embed_texts
    from icenet.core.errors import UsageError

    chosen = {"backend": backend, "device": device, "dtype": dtype}
    if isinstance(model, (str, Path)):
        model = load(model, backend, device, dtype=dtype)
    elif given := [name for name, value in chosen.items() if value is not None]:
        raise UsageError(f"embed: {', '.join(given)}: only for a path; the model is loaded already")
    _check_model(model, "embed")
    return embed_texts(model, texts, batch_size, options, progress)


def convert(source: str | Path, destination: str | Path, to: str, **options: Any) -> Conversion:
    """Converts the weights of a model to the form "canonical", "mlx" or "torch", as `icenet convert` does.

    The forms "hf" and "mlx-lm" are folders of Hugging Face and mlx-lm. If the model is a ResNet or a ViT, state dicts
    of torchvision are read, and the form "torchvision" writes one.

    Args:
        source: What `load` accepts, or a file or folder of weights.
        destination: A file or folder.
        to: The form.
        options: See `icenet.core.conversion.convert.convert_model`, and for "hf" and "mlx-lm"
            `icenet.core.conversion.export.export`.
    """
    from icenet.core import files
    from icenet.core.conversion.convert import convert_model

    source, destination = files.user_path(source, "convert"), files.user_path(destination, "convert")
    return convert_model(source, destination, to, **options)


def from_torch(torch_module: Any, mlx_module: Any, rename: Rename = None) -> Any:
    """Copies the weights of a PyTorch module to its MLX twin. The modules may be of any classes.

        net = icenet.from_torch(torch_net, MyNet())
        icenet.from_torch(state_dict, net, rename={"ln_f": "norm", "h.*.attn": "blocks.*.attention"})

    The layers of the MLX module determine the axes, and which weights of PyTorch are joined or divided:
    docs/weights.md lists all layers. Running statistics and other buffers are weights, too; counters of batches
    (`num_batches_tracked`) are left out.

    Args:
        torch_module: A `torch.nn.Module`, on any device, or a state dict: a mapping of names and tensors or numpy
            arrays, such as `torch.load(path, weights_only=True)` or `icenet.core.weights.read(path)`.
        mlx_module: The `mlx.nn.Module` to change. Each array keeps its dtype, to which the values are rounded.
        rename: Other names, if the two modules differ in them: a mapping with names of PyTorch on the left and names
            of the MLX module on the right, of layers or weights, with `*` for any text without a dot; or a function
            of a name in PyTorch that returns the name in the MLX module. None in place of a name leaves a weight out.
            A mapping with the two sides swapped is recognized by its names.

    Returns:
        `mlx_module`.

    Raises:
        UsageError: An argument is of another type, or `rename` is invalid.
        WeightsError: A weight has no place, an array gets no values, a shape or the kind of a layer differs, or a
            value is too large for the dtype. The message names all of them, and `mlx_module` is unchanged.
    """
    from icenet.core.models import modules

    return modules.from_torch(torch_module, mlx_module, rename)


def to_torch(mlx_module: Any, torch_module: Any, rename: Rename = None) -> Any:
    """Copies the weights of an MLX module to its PyTorch twin; the inverse of `from_torch`.

        icenet.to_torch(net, torch_net, rename={"ln_f": "norm", "h.*.attn": "blocks.*.attention"})

    Args:
        mlx_module: An `mlx.nn.Module`.
        torch_module: The `torch.nn.Module` to change, on any device. Each tensor keeps its dtype and its device. The
            second bias of a recurrent layer becomes zeros. Counters of batches keep their values.
        rename: The same as for `from_torch`: names of PyTorch on the left, names of the MLX module on the right.

    Returns:
        `torch_module`.

    Raises:
        UsageError, WeightsError: As in `from_torch`; `torch_module` is unchanged.
    """
    from icenet.core.models import modules

    return modules.to_torch(mlx_module, torch_module, rename)


def _check_config(config: Any) -> None:
    """Raises UsageError for parts of a configuration in place of one."""
    from icenet.core.config import Config
    from icenet.core.config.section import Section
    from icenet.core.errors import UsageError

    if isinstance(config, Section) and not isinstance(config, Config):
        raise UsageError(f"build: takes a Config, not a {type(config).__name__}; pass Config(model=model_config)")
    if isinstance(config, dict):
        raise UsageError(
            "build: takes a Config, the path of a YAML file or the name of a preset, not a dict; "
            "pass Config.from_dict(values)"
        )


def _draft(model: Any, draft: Any) -> Any:
    """Returns a draft model. One that is a path is loaded on the backend and the device of the model."""
    if isinstance(draft, (str, Path)):
        device = "cpu" if model.is_on_cpu else "gpu" if model.backend == "mlx" else str(model.device)
        draft = load(draft, model.backend, device)
    if draft is not None:
        _check_model(draft, "generate")
    return draft


def _check_model(model: Any, function: str) -> None:
    """Raises UsageError if it is not a `BaseModel`."""
    from icenet.core.errors import UsageError
    from icenet.core.models.base import ModelBase

    if isinstance(getattr(model, "_orig_mod", model), ModelBase):  # torch.compile wraps it
        return
    wrapped = isinstance(getattr(model, "module", None), ModelBase)
    hint = "pass its .module" if wrapped else "icenet.from_torch and icenet.to_torch copy the weights of any module"
    raise UsageError(f"{function}: needs a BaseModel of icenet or icenet_torch, not a {type(model).__name__}; {hint}")
