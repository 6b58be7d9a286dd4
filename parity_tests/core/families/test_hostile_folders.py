"""Folders whose files lie or attack: one line within two seconds, without much memory, and nothing executed.

The files are changed at random (a fixed seed), and by the cases of `CORPUS`, which are faults that were found.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import is_one_line

from icenet.core.errors import IceNetError
from icenet.core.runs.open_model import open_target
from icenet.core.tokenizers import get_tokenizer
from icenet.core.weights import files as weight_files

pytest.importorskip("tokenizers")

SECONDS, MEGABYTES = 2.0, 400
VOCABULARY = {character: index for index, character in enumerate("abcdefghij<>")}
FILES: dict[str, Any] = {
    "config.json": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 12, "hidden_size": 8,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 6,
        "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "eos_token_id": [11],
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 16},
    },
    "generation_config.json": {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [11, 10]},
    "tokenizer.json": {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "decoder": None,
        "added_tokens": [{"id": 11, "content": ">", "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True}],
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": VOCABULARY,
                  "merges": []},
    },
    "tokenizer_config.json": {
        "eos_token": ">", "model_max_length": 32, "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {"11": {"content": ">", "special": True}},
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    },
    "special_tokens_map.json": {"eos_token": {"content": ">", "lstrip": False}},
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ],
    "1_Pooling/config.json": {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True},
    "config_sentence_transformers.json": {"prompts": {"query": "a"}, "default_prompt_name": None},
}  # fmt: skip
NONSENSE: list[Any] = [
    *(0, -1, 1, 2**31, 2**63, 10**40, 1e308, -0.5, 1.5, float("nan"), float("inf"), True, False, None, "", "x"),
    *("a" * 100_000, "../../etc/passwd", "/etc/passwd", "\u0000", "\ud800", [], {}, [[]], [0], [None], {"a": {}}),
    *([1] * 10_000, {str(i): i for i in range(2000)}, ["x" * 10] * 1000, "{{ ''.__class__ }}", "os.system"),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is read."""
    folder = tmp_path_factory.mktemp("good")
    for name, values in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(values))
    shapes = {"model.embed_tokens.weight": (12, 8), "model.norm.weight": (8,)}
    for index in range(2):
        parts = {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8)}
        parts |= {"self_attn.o_proj": (8, 8), "mlp.gate_proj": (6, 8), "mlp.up_proj": (6, 8), "mlp.down_proj": (8, 6)}
        parts |= {"input_layernorm": (8,), "post_attention_layernorm": (8,)}
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in parts.items()}
    arrays = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    weight_files.write(folder, arrays, max_shard_bytes=2000)
    assert (folder / "model.safetensors.index.json").is_file()
    use(folder)
    return folder


def use(folder: Path) -> None:
    """Reads everything of a folder."""
    config, weights = open_target(folder)
    assert weights is not None
    for name in list(weights)[:3]:
        assert weights[name].nbytes >= 0
    tokenizer = get_tokenizer(config.data.tokenizer)
    assert isinstance(tokenizer.decode(tokenizer.encode("abc")), str)


def check(folder: Path, what: object) -> None:
    """Reads a folder, which fails in one line or succeeds, quickly and without much memory."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        use(folder)
    except IceNetError as error:
        assert is_one_line(error), what
    used = time.process_time() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert used < SECONDS, what
    assert grown / (1 << 20 if sys.platform == "darwin" else 1 << 10) < MEGABYTES, what


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the path of each value in a tree."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    tree = copy.deepcopy(tree)
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return tree


def changed_bytes(content: bytes, draws: random.Random) -> bytes:
    kind, place = draws.randrange(4), draws.randrange(len(content))
    if kind == 0:
        return content[:place]
    if kind == 1:
        return (
            content[:place] + bytes(draws.randrange(256) for _ in range(draws.randint(1, 8))) + content[place + 1 :]
        )
    if kind == 2:
        return content[:place] + content[draws.randrange(len(content)) :]
    digits = [index for index, byte in enumerate(content) if 48 <= byte < 58] or [place]
    at = draws.choice(digits)
    return content[:at] + str(draws.choice([0, 9, 2**31, 2**64, 10**30])).encode() + content[at + 1 :]


@pytest.mark.parametrize("name", FILES)
def test_values_that_lie(name: str, good: Path, tmp_path: Path) -> None:
    draws = random.Random(name)
    folder = copied(good, tmp_path)
    everything = list(places(FILES[name]))
    for _ in range(40):
        path, value = draws.choice(everything), draws.choice(NONSENSE)
        (folder / name).write_text(json.dumps(replaced(FILES[name], path, value)), errors="surrogatepass")
        check(folder, (name, path, repr(value)[:100]))


@pytest.mark.parametrize("name", [*FILES, "model.safetensors.index.json", "shard"])
def test_bytes_that_are_damaged(name: str, good: Path, tmp_path: Path) -> None:
    draws = random.Random(name)
    folder = copied(good, tmp_path)
    file = folder / name if name != "shard" else sorted(folder.glob("model-*.safetensors"))[0]
    content = file.read_bytes()
    for _ in range(40):
        file.write_bytes(damaged := changed_bytes(content, draws))
        check(folder, (name, damaged[:2000]))


CORPUS: dict[str, tuple[str, str]] = {
    "nested too deeply": ("config.json", "[" * 100_000),
    "an object without end": ("config.json", '{"model_type": "llama", "a": ' + '{"a": ' * 50_000),
    "a number of a million digits": ("config.json", '{"model_type": "llama", "vocab_size": ' + "9" * 1_000_000 + "}"),
    "a name twice": ("config.json", '{"model_type": "llama", "model_type": "gpt2"}'),
    "16 MB of spaces": ("generation_config.json", " " * (1 << 24) + "{}"),
    "code": ("config.json", json.dumps({**FILES["config.json"], "auto_map": {"AutoModel": "evil.py--x.Model"}})),
    "layers that are not there": ("config.json", json.dumps({**FILES["config.json"], "num_hidden_layers": 2**14})),
    "a vocabulary of 2**24": ("config.json", json.dumps({**FILES["config.json"], "vocab_size": 2**24})),
    "positions of 2**24": ("config.json", json.dumps({**FILES["config.json"], "max_position_embeddings": 2**24})),
    "a model_type that is an object": ("config.json", json.dumps({**FILES["config.json"], "model_type": {"a": 1}})),
    "a shard outside": (
        "model.safetensors.index.json",
        json.dumps({"weight_map": {"model.norm.weight": "../../x.safetensors"}}),
    ),
    "a shard with an absolute path": (
        "model.safetensors.index.json",
        json.dumps({"weight_map": {"model.norm.weight": "/etc/passwd"}}),
    ),
    "a module outside": (
        "modules.json",
        json.dumps([{"idx": 0, "name": "0", "path": "../../..", "type": "sentence_transformers.models.Pooling"}]),
    ),
    "a module with an impossible name": (
        "modules.json",
        json.dumps([FILES["modules.json"][0], {**FILES["modules.json"][1], "path": "a" * 100_000}]),
    ),
    "a type that is code": (
        "modules.json",
        json.dumps([{"idx": 0, "name": "0", "path": "", "type": "os.system"}]),
    ),
}


@pytest.mark.parametrize("name", CORPUS)
def test_the_corpus(name: str, good: Path, tmp_path: Path) -> None:
    folder = copied(good, tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    (folder / "evil.py").write_text("raise SystemExit('run')")
    file, content = CORPUS[name]
    (folder / file).write_text(content)
    check(folder, name)


def copied(good: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    for file in good.rglob("*.*"):
        if file.is_file():
            target = folder / file.relative_to(good)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return folder
