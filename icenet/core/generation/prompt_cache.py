"""Prompt caches: keys and values of tokens that a model has read, for later prompts that begin with the same tokens.

A cache in memory belongs to one model. A file of it (safetensors) can be loaded for a model with the same weights on
either backend:

    layers.I.keys, layers.I.values      `[1, K, S, E]` for K heads of keys and values of size E, in the model's dtype;
                                        keys are rotated by their rotary positions
    tokens                              int32 `[S]`

The metadata are `format`, `version`, `model` (see `fingerprint`) and `prompt_length` (see `PromptCache`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from icenet.core import files
from icenet.core.config import transformer_plan
from icenet.core.errors import UsageError, WeightsError
from icenet.core.generation.prompts import batch_of, encode_prompts
from icenet.core.generation.request import SLIDE
from icenet.core.messages import option
from icenet.core.tokenizers.base import Tokenizer
from icenet.core.weights import safetensors
from icenet.core.weights.safetensors_writer import write_file

if TYPE_CHECKING:
    from icenet.core.generation.request import Request

FORMAT, VERSION = "icenet.prompt_cache", "1"
_REMEDY = "icenet generate --save-prompt-cache FILE makes a prompt cache"
_ENDING = 4
"""Number of tokens at the end of a cached text that may differ, because tokens depend on the text that follows."""
_SAMPLED = 8
"""Number of arrays by which a change of the weights in memory is noticed."""
_FLOATS = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class CacheError(UsageError):
    """A request that needs to go back to an earlier token, of a model or a text for which this is not possible."""


class PromptCache:
    """The tokens that a transformer has read, with their keys and values.

    A request with the cache reads only what follows the tokens that its prompt has in common with the cache. The
    cache then has the tokens of this request: those of its prompt and its new ones. `icenet.prompt_cache` makes one.

    Args:
        model: The model.

    Attributes:
        tokens: The tokens that the cache holds.
        prompt_length: Number of tokens at the beginning of `tokens` with which each prompt must begin: those that
            the cache was made for. 0 without such a prompt.

    Raises:
        UsageError: The model has no cache that can be shortened.
    """

    def __init__(self, model: Any) -> None:
        check_model(model, "a prompt cache")
        self.tokens: list[int] = []
        self.prompt_length = 0
        self._prompt: list[int] = []
        self._cache: Any = None
        self._model = getattr(model, "_orig_mod", model)  # torch.compile wraps it
        self._identity = _identity(model)
        self._draft: PromptCache | None = None

    def __repr__(self) -> str:
        return f"PromptCache({len(self.tokens)} tokens)"

    def of_draft(self, draft: Any) -> PromptCache:
        """Returns the cache of the same conversation for a draft model."""
        if (
            self._draft is None
            or self._draft._model is not getattr(draft, "_orig_mod", draft)
            or self._draft._identity != _identity(draft)
        ):
            self._draft = PromptCache(draft)
        return self._draft

    # ---- use in a request ----------------------------------------------------------------------------------

    def check(self, model: Any, request: Request) -> None:
        """Checks that a request can use the cache.

        Raises:
            UsageError: It cannot, and why.
        """
        check_request(model, request, "a prompt cache")
        if self._model is not getattr(model, "_orig_mod", model):
            raise UsageError(
                "generate: the prompt cache is of another model; make one with icenet.prompt_cache(model), or load "
                "its file for this model"
            )
        if self._identity != _identity(model):
            raise UsageError(
                "generate: the weights of the model are others than when its prompt cache was made; make a new one"
            )
        tokens = request.rows()[0].tolist()
        common = _common_length(self._prompt, tokens)
        if common < self.prompt_length and not self._continues(tokens, common, request.tokenizer):
            raise UsageError(
                f"generate: the prompt differs from the cached one at token {common} of {self.prompt_length}; begin "
                "it with the cached text, or leave the prompt cache out"
            )

    def _continues(self, tokens: Sequence[int], common: int, tokenizer: Tokenizer | None) -> bool:
        """Returns whether a prompt begins with the cached text, although its last tokens there are others."""
        if tokenizer is None or common < self.prompt_length - _ENDING:
            return False
        text = tokenizer.decode(self._prompt).rstrip("\ufffd")  # bytes of an unfinished character
        return tokenizer.decode(tokens).startswith(text)

    def take(self, tokens: Sequence[int]) -> tuple[Any, int]:
        """Returns the model's cache of the first tokens, and their number; None and 0 if there are none.

        The last token is not among them, because its logits are needed. The prompt cache is empty until `put`.
        """
        cache, length = self._cache, min(_common_length(self.tokens, tokens), len(tokens) - 1)
        self._cache, self.tokens = None, []
        if cache is None or length == 0:
            return None, 0
        cache.truncate(length)
        return cache, length

    def put(self, cache: Any, tokens: Sequence[int]) -> None:
        """Keeps a cache of the model, which has read the first of these tokens.

        Args:
            cache: The cache; its columns beyond the tokens are dropped. None is no cache.
            tokens: The known tokens.
        """
        if cache is None:
            return
        length = min(cache.length, len(tokens))
        cache.truncate(length)
        self._cache, self.tokens = cache, list(tokens[:length])

    # ---- reading and files ---------------------------------------------------------------------------------

    def read(self, prompt: str | Sequence[int], add_special_tokens: bool = False) -> None:
        """Reads a prompt, with which each later prompt must then begin.

        Args:
            prompt: A text or token ids.
            add_special_tokens: See `GenerationConfig`.

        Raises:
            UsageError: The prompt is invalid or too long.
        """
        from icenet.core.generation.request import make_request

        model = self._model
        if isinstance(prompt, str):
            if model.tokenizer is None:
                raise UsageError("prompt_cache: the model has no tokenizer; pass token ids")
            [tokens] = encode_prompts(model.tokenizer, [prompt], add_special_tokens)
        else:
            found, mask = batch_of(prompt, None, 0, model.config.vocab_size)
            if len(found) != 1 or mask is not None:
                raise UsageError(f"prompt_cache: takes one prompt, not {len(found)}")
            tokens = found[0].tolist()
        longest = getattr(model.config, "max_seq_length", None)
        if longest is not None and len(tokens) >= longest:
            raise UsageError(
                f"prompt_cache: a prompt of {len(tokens)} tokens leaves no room in model.max_seq_length {longest}"
            )
        request = make_request(model, [tokens], None, 0, {"max_new_tokens": 1, "max_length": None})
        self._prompt, self.prompt_length = [], 0
        self.check(model, request)
        with model.decoder_type(model, request, self) as decoder:
            decoder.fetch(decoder.submit(0))
        self.fix(tokens)

    def fix(self, tokens: Sequence[int]) -> None:
        """Makes these tokens the ones with which each prompt must begin."""
        self._prompt, self.prompt_length = list(tokens), len(tokens)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Writes the cache to a file that `icenet.load_prompt_cache` reads on either backend.

        Args:
            path: The file (safetensors).
            overwrite: Whether to replace a file.

        Raises:
            UsageError: The cache is empty or in use, or there is a file.
            FileError: The file cannot be written.
        """
        path = files.output_file(files.user_path(path, "save"), overwrite=overwrite)
        if self._cache is None:
            raise UsageError("save: the prompt cache has no tokens, or a stream that has not ended uses it")
        if self._identity != _identity(self._model):
            raise UsageError("save: the weights of the model have changed since the prompt cache was made")
        model, length = self._model, len(self.tokens)
        dtype = _FLOATS[str(model.compute_dtype).rpartition(".")[2]]
        arrays: dict[str, Any] = {"tokens": np.array(self.tokens, np.int32)}
        with model.arithmetic(), model.without_gradients():
            for index, layer in enumerate(self._cache.layers):
                for name, buffer in (("keys", layer.keys), ("values", layer.values)):
                    host = model._to_float_host(buffer[:, :, :length])
                    arrays[f"layers.{index}.{name}"] = np.ascontiguousarray(host).astype(dtype)
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "model": fingerprint(model),
            "prompt_length": str(self.prompt_length),
        }
        specs = {name: safetensors.spec_of(arrays, name) for name in arrays}
        with files.staged(path) as stage, stage.open(path) as file:
            write_file(file, arrays, specs, metadata, lambda size: None)


def load(path: str | Path, model: Any) -> PromptCache:
    """Returns a prompt cache from a file. See `icenet.load_prompt_cache`."""
    path = files.user_path(path, "load_prompt_cache")
    cache = PromptCache(model)
    if not path.exists():
        raise UsageError(f"{path}: no such file", _REMEDY)
    try:
        metadata, entries, data = safetensors.open_file(path)
    except WeightsError as error:  # its remedy is one for weights
        raise WeightsError(error.problem, _REMEDY) from None
    if metadata.get("format") != FORMAT:
        raise WeightsError(f"{path}: not a prompt cache of IceNet", _REMEDY)
    if metadata.get("version") != VERSION:
        raise WeightsError(
            f"{path}: version {metadata.get('version')!r:.20} of prompt caches is unknown; make it again"
        )
    if metadata.get("model") != fingerprint(model):
        raise WeightsError(
            f"{path}: the prompt cache is of a model with other weights or another configuration; make it again with "
            "this model"
        )
    tokens = _read_tokens(path, entries, data, model)
    prompt_length = metadata.get("prompt_length", "")
    if not (prompt_length.isascii() and prompt_length.isdecimal() and int(prompt_length[:20]) <= len(tokens)):
        raise WeightsError(f"{path}: damaged prompt cache: prompt_length is {prompt_length!r:.20}; make it again")
    arrays = _read_layers(path, entries, data, model, len(tokens))
    with model.arithmetic(), model.without_gradients():
        native = model.make_cache()
        native.begin(model._to_native_tokens(np.array([tokens], np.int32)), None, ())
        for index, layer in enumerate(native.layers):
            layer.append(*(model._to_native_floats(arrays[f"layers.{index}.{name}"]) for name in ("keys", "values")))
        native.end(len(tokens))
    cache.put(native, tokens)
    cache.fix(tokens[: int(prompt_length)])
    return cache


def _read_tokens(path: Path, entries: Any, data: Any, model: Any) -> list[int]:
    entry = entries.get("tokens")
    if entry is None or entry.dtype != "I32" or len(entry.shape) != 1 or entry.shape[0] == 0:
        raise WeightsError(f"{path}: damaged prompt cache: there are no tokens; make it again")
    tokens: list[int] = safetensors.view(entry, data).tolist()
    longest = getattr(model.config, "max_seq_length", None)
    if longest is not None and len(tokens) > longest:
        raise WeightsError(f"{path}: damaged prompt cache: {len(tokens)} tokens exceed max_seq_length {longest}")
    if min(tokens) < 0 or max(tokens) >= model.config.vocab_size:
        raise WeightsError(f"{path}: damaged prompt cache: a token is outside the vocabulary; make it again")
    return tokens


def _read_layers(path: Path, entries: Any, data: Any, model: Any, length: int) -> dict[str, Any]:
    """Returns the arrays of all layers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index, block in enumerate(transformer_plan.blocks(model.config)):
        plan = block.attention
        for name in ("keys", "values"):
            shapes[f"layers.{index}.{name}"] = (1, plan.num_kv_heads, length, plan.head_size)
    if set(entries) != {*shapes, "tokens"}:
        raise WeightsError(f"{path}: damaged prompt cache: its arrays are not those of {len(shapes) // 2} layers")
    arrays = {}
    for name, shape in shapes.items():
        entry = entries[name]
        if entry.shape != shape or entry.dtype not in ("F32", "F16", "BF16"):
            raise WeightsError(
                f"{path}: damaged prompt cache: {name} is {entry.dtype} {list(entry.shape)}, not {list(shape)}"
            )
        arrays[name] = safetensors.view(entry, data).astype(np.float32)
        if not np.isfinite(arrays[name]).all():
            raise WeightsError(f"{path}: damaged prompt cache: {name} has values that are not finite; make it again")
    return arrays


# ---- checks -------------------------------------------------------------------------------------------------


def can_go_back(model: Any) -> bool:
    """Returns whether the cache of a model can be set back to an earlier token. The state of an RNN cannot."""
    return hasattr(model, "make_cache") and hasattr(model.make_cache(), "truncate")


def check_model(model: Any, what: str) -> None:
    """Raises CacheError if the state of a model cannot be set back to an earlier token. `what` needs that."""
    if not can_go_back(model):
        raise CacheError(
            f"generate: {what} needs a transformer; a model of type {model.config.type} cannot go back to an earlier "
            "token"
        )


def check_request(model: Any, request: Request, what: str) -> None:
    """Raises CacheError if a request has several prompts, or may have to read its context again."""
    check_model(model, what)
    rows = request.rows()
    if len(rows) != 1:
        raise CacheError(f"generate: {what} takes one prompt, not {len(rows)}; call generate for each of them")
    length = len(rows[0]) + request.new_tokens
    if request.context_length is not None and length > request.context_length:
        raise CacheError(
            f"generate: {what} needs the whole text in the context, and {length} tokens exceed model.max_seq_length "
            f"{request.context_length}; leave out {option(SLIDE)}"
        )
    plans = transformer_plan.rotary_plans(model.config) if model.config.positions == "rotary" else {}
    for plan in plans.values():
        if plan.scaling is not None and plan.scaling.type in ("dynamic", "longrope"):
            original = plan.scaling.original_length
            if original is not None and length > original:
                raise CacheError(
                    f"generate: {what} needs positions that do not change; with {plan.scaling.type} scaling they do "
                    f"above {original} tokens, and this text may have {length}"
                )


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns how many tokens at the beginning of two sequences are the same."""
    length = min(len(first), len(second))
    differs = np.flatnonzero(np.array(first[:length]) != np.array(second[:length]))
    return int(differs[0]) if differs.size else length


def _identity(model: Any) -> Any:
    """Returns what changes when a model is trained, moved, or gets other weights: values of some of its arrays.

    All values would take as long to read as one token does; `fingerprint`, for files, reads them.
    """
    arrays = [array for _, array, _ in model._named_arrays()]
    chosen = sorted({round(place * (len(arrays) - 1) / (_SAMPLED - 1)) for place in range(_SAMPLED)})
    with model.arithmetic(), model.without_gradients():
        values = [model._to_float_host(arrays[index].reshape(-1)[:1024]).tobytes() for index in chosen]
    return str(model.compute_dtype), str(model.device), values


def fingerprint(model: Any) -> str:
    """Returns what a model computes with as SHA-256, hex: its configuration and the sums of the bits of its weights.

    It is the same on both backends, and in each dtype that holds the weights exactly.
    """
    content = hashlib.sha256(json.dumps(model.config.model_dump(mode="json"), sort_keys=True).encode())
    shared = model.shared_arrays()
    with model.arithmetic(), model.without_gradients():
        for path, array, _ in sorted(model._named_arrays(), key=lambda item: item[0]):
            if path in shared:
                continue
            host = np.ascontiguousarray(model._to_float_host(array)).reshape(-1).view(np.uint8)
            words = host[: host.size // 8 * 8].view(np.uint64)
            total = int(words.sum(dtype=np.uint64))
            content.update(f"{path} {host.size} {total} {host[words.nbytes :].tobytes().hex()}\n".encode())
    return content.hexdigest()
