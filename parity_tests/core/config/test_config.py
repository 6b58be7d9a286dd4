"""The configuration: YAML and Python, one-line errors with file, line and key, checked assignments."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from helpers import is_one_line
from hypothesis import example, given, settings
from hypothesis import strategies as st

from icenet.core.config import (
    FAMILIES,
    CNNConfig,
    Config,
    DataConfig,
    GenerationConfig,
    ImageDataConfig,
    ModelConfig,
    TrainingConfig,
    TransformerConfig,
    json_schema,
    presets,
    yaml_file,
)
from icenet.core.errors import ConfigError, IceNetError, UsageError

ROOT = Path(__file__).resolve().parents[3]
MODEL = "model:\n  type: transformer\n"
MODEL_KEYS = f"icenet schema lists the {len(TransformerConfig.model_fields)} keys"


def read(folder: Path, text: str, *overrides: str) -> Config:
    file = folder / "c.yaml"
    file.write_text(text, encoding="utf-8")
    return Config.from_yaml(file, overrides)


def message(folder: Path, text: str, *overrides: str) -> str:
    """Returns the error of a file, which is one line, without the path of the folder."""
    with pytest.raises(ConfigError) as caught:
        read(folder, text, *overrides)
    found = str(caught.value).replace(f"{folder}/", "")
    assert "\n" not in found and "pydantic" not in found
    return found


def is_error(found: str, parts: list[str]) -> bool:
    """Returns whether a message is one line that starts with the first part and contains the others."""
    return found.startswith(parts[0]) and is_one_line(found, *parts)


# ---- valid configurations -------------------------------------------------------------------------------

GUIDE = """
model:
  type: transformer
  hidden_size: 512        # Model dimension (d_model)
  num_layers: 6           # Number of transformer blocks
  num_heads: 8            # Attention heads
  dropout: 0.1            # Dropout rate
  vocab_size: 50000       # Vocabulary size
  max_seq_length: 512     # Maximum sequence length
  activation: gelu        # Activation function
"""


def test_the_guides_yaml(tmp_path: Path) -> None:
    config = read(tmp_path, GUIDE)
    assert isinstance(config.model, TransformerConfig) and isinstance(config.model, ModelConfig)
    assert config.model == ModelConfig(type="transformer")  # the guide's values are the defaults
    assert (config.model.hidden_size, config.model.num_heads, config.model.activation) == (512, 8, "gelu")


def test_the_guides_python() -> None:
    config = ModelConfig(
        type="transformer",
        hidden_size=512,
        num_layers=6,
        num_heads=8,
    )
    assert type(config) is TransformerConfig
    assert (config.hidden_size, config.vocab_size, config.num_heads) == (512, 50000, 8)


def test_the_guides_assignments(tmp_path: Path) -> None:
    config = read(tmp_path, MODEL)
    config.training.mixed_precision = "fp16"
    config.model.compile_model = True
    config.training.gradient_checkpointing = True
    again = Config.from_dict(config.to_dict())
    assert again == config and again.training.mixed_precision == "fp16"
    assert again.model.compile_model is again.training.gradient_checkpointing is True


def test_every_section_is_optional_but_the_model(tmp_path: Path) -> None:
    config = read(tmp_path, MODEL)
    assert config.data == DataConfig() and config.training == TrainingConfig()
    assert config.generation == GenerationConfig()
    assert (config.backend, config.device, config.seed) == ("auto", "auto", 0)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E-3", 1e-3),
        ("1.0e-3", 1e-3),
        ("+1e-3", 1e-3),
        ("1e+3", 1e3),
        ("1e3", 1e3),
        ("1.", 1.0),
        (".5", 0.5),
        (".5e-2", 0.005),
        ("2", 2.0),
        ("3.0e-4", 3e-4),
    ],
)
def test_numbers_as_people_write_them(tmp_path: Path, text: str, value: float) -> None:
    config = read(tmp_path, f"{MODEL}training:\n  learning_rate: {text}\n")
    assert config.training.learning_rate == value and type(config.training.learning_rate) is float
    assert read(tmp_path, MODEL, f"training.learning_rate={text}").training.learning_rate == value


def test_anchors_and_quotes(tmp_path: Path) -> None:
    config = read(tmp_path, f"{MODEL}data: {{source: &x 'a b'}}\ngeneration:\n  stop: [*x, '1e3', 5, \"\\n\"]\n")
    assert config.generation.stop == ["a b", "1e3", 5, "\n"]


# ---- overrides ------------------------------------------------------------------------------------------


def test_overrides_replace_what_the_file_says(tmp_path: Path) -> None:
    text = f"{MODEL}  hidden_size: 64\ntraining:\n  max_steps: 5\n"
    config = read(
        tmp_path,
        text,
        "training.max_steps=7",
        "training.max_steps=9",
        "model.dropout=0",
        "data.source=a=b.txt",
        "generation.stop=[1, 'END']",
        "data.seq_length=null",
        " seed = 3 ",
    )
    assert config.training.max_steps == 9 and config.model.hidden_size == 64 and config.model.dropout == 0.0
    assert config.data.source == "a=b.txt" and config.generation.stop == [1, "END"]
    assert config.data.seq_length is None and config.seed == 3


def test_an_override_can_mend_a_file(tmp_path: Path) -> None:
    text = f"{MODEL}  num_heads: 7\n"
    assert "num_heads 7" in message(tmp_path, text)
    assert read(tmp_path, text, "model.num_heads=4").model == TransformerConfig(num_heads=4)
    assert read(tmp_path, "seed: 4\n", "model.type=transformer").seed == 4


def test_with_overrides_leaves_the_first_alone() -> None:
    first = Config.from_dict({"model": {"type": "transformer"}})
    second = first.with_overrides("training.learning_rate=1e-3", "model.num_layers=2")
    assert (first.training.learning_rate, first.model.num_layers) == (3e-4, 6)
    assert (second.training.learning_rate, second.model.num_layers) == (1e-3, 2)
    tree = {"model": {"type": "transformer"}, "data": {}}
    Config.from_dict(tree, ["data.source=x", "model.num_layers=1"])
    assert tree == {"model": {"type": "transformer"}, "data": {}}


# ---- errors in a file -----------------------------------------------------------------------------------

KNOWN = ", ".join(FAMILIES)

BAD_FILES = [
    # text of the file; how the message starts, and what else it names
    (f"{MODEL}  hiden_size: 3\n", ["c.yaml:3: model.hiden_size:", "unknown", "hidden_size"]),
    (f"{MODEL}  zzz: 3\n", ["c.yaml:3: model.zzz:", "unknown", MODEL_KEYS]),
    (f"{MODEL}trainig:\n  max_steps: 5\n", ["c.yaml:3: trainig:", "unknown", "training"]),
    (
        f"{MODEL}training:\n  lr: 5\n  learn_rate: 1\n",
        ["c.yaml:4: training.lr:", "unknown", "learning_rate", "(and 1 more)"],
    ),
    (f"{MODEL}training:\n  learning_rate: fast\n", ["c.yaml:4: training.learning_rate:", "number", "not 'fast'"]),
    (
        f"{MODEL}training:\n  learning_rate: '1e-3'\n",
        ["c.yaml:4: training.learning_rate:", "number", "not '1e-3'"],
    ),
    (
        f"{MODEL}training:\n  learning_rate: .inf\n",
        ["c.yaml:4: training.learning_rate:", "finite number", "not inf"],
    ),
    (
        f"{MODEL}training:\n  learning_rate: .nan\n",
        ["c.yaml:4: training.learning_rate:", "finite number", "not nan"],
    ),
    (f"{MODEL}training:\n  eps: 1e-60\n", ["c.yaml:4: training.eps:", "1e-60", "float32"]),
    (f"{MODEL}training:\n  max_grad_norm: 1e39\n", ["c.yaml:4: training.max_grad_norm:", "1e+39", "float32"]),
    (f"{MODEL}generation:\n  min_p: 1e-50\n", ["c.yaml:4: generation.min_p:", "1e-50", "float32"]),
    (f"{MODEL}data:\n  kind: images\n  std: [1, 1e-60]\n", ["c.yaml:5: data.std:", "1e-60", "float32"]),
    (f"{MODEL}training:\n  learning_rate: 0\n", ["c.yaml:4: training.learning_rate:", "greater than 0", "not 0"]),
    (f"{MODEL}training:\n  batch_size: 1e3\n", ["c.yaml:4: training.batch_size:", "integer", "not 1000.0"]),
    (f"{MODEL}training:\n  batch_size: true\n", ["c.yaml:4: training.batch_size:", "integer", "not True"]),
    (f"{MODEL}training:\n  batch_size:\n", ["c.yaml:4: training.batch_size:", "integer", "not None"]),
    (
        f"{MODEL}training:\n  batch_size: 0\n",
        ["c.yaml:4: training.batch_size:", "greater than or equal to 1", "not 0"],
    ),
    (
        f"{MODEL}training:\n  mixed_precision: fp61\n",
        ["c.yaml:4: training.mixed_precision:", "'fp32', 'bf16' or 'fp16'", "not 'fp61'", "fp16"],
    ),
    (f"{MODEL}  dropout: 1\n", ["c.yaml:3: model.dropout:", "less than 1", "not 1"]),
    (f"{MODEL}  dropout: -0.1\n", ["c.yaml:3: model.dropout:", "greater than or equal to 0", "not -0.1"]),
    (f"{MODEL}  causal: 1\n", ["c.yaml:3: model.causal:", "boolean", "not 1"]),
    (
        f"{MODEL}  activation: gelu_tahn\n",
        ["c.yaml:3: model.activation:", "'gelu', 'gelu_tanh', 'relu' or 'silu'", "not 'gelu_tahn'", "gelu_tanh"],
    ),
    (f"{MODEL}  num_heads: 7\n", ["c.yaml:1: model:", "hidden_size 512", "num_heads 7"]),
    (
        f"{MODEL}  hidden_size: 15\n  num_heads: 5\n",
        ["c.yaml:1: model:", "hidden_size 15"],
    ),
    (
        f"{MODEL}training:\n  min_learning_rate: 1\n",
        ["c.yaml:3: training:", "min_learning_rate 1", "learning_rate 0.0003"],
    ),
    (
        f"{MODEL}data:\n  seq_length: 600\n",
        ["c.yaml:", "data.seq_length 600", "model.max_seq_length 512"],
    ),
    ("model: {type: tree}\n", ["c.yaml:1: model.type:", "'tree'", KNOWN]),
    ("model: {type: transfomer}\n", ["c.yaml:1: model.type:", "'transfomer'", "transformer"]),
    ("model: {hidden_size: 4}\n", ["c.yaml:1: model.type:", "required"]),
    ("model:\n", ["c.yaml:1: model.type:", "required"]),
    ("model: [1]\n", ["c.yaml:1: model.type:", "mapping of keys", "not [1]"]),
    ("seed: 3\n", ["c.yaml: model:", "required"]),
    ("", ["c.yaml: model:", "required"]),
    (f"{MODEL}seed: -1\n", ["c.yaml:3: seed:", "greater than or equal to 0", "not -1"]),
    (f"{MODEL}backend: jax\n", ["c.yaml:3: backend:", "'auto', 'mlx' or 'torch'", "not 'jax'"]),
    (f"{MODEL}device: cuda:x\n", ["c.yaml:3: device:", "auto, cpu, gpu, mps, cuda or cuda:N", "not 'cuda:x'"]),
    (f"{MODEL}data:\n  source: [a]\n", ["c.yaml:4: data.source:", "string", "not ['a']", "quotes"]),
    (f"{MODEL}data:\n  source:\n", ["c.yaml:4: data.source:", "string", "not None", "''"]),
    (f"{MODEL}generation:\n  stop: END\n", ["c.yaml:4: generation.stop:", "list", "not 'END'"]),
    (f"{MODEL}generation:\n  top_p: 0\n", ["c.yaml:4: generation.top_p:", "greater than 0", "not 0"]),
    # not a configuration
    ("- a\n", ["c.yaml:", "mapping"]),
    ("hello\n", ["c.yaml:", "mapping"]),
    ("1: 2\n", ["c.yaml:1:", "key 1"]),
    ("model: {type: transformer\n", ["c.yaml:2:", "not valid YAML", "','", "'}'", "'<stream end>'"]),
    ("\tmodel: 1\n", ["c.yaml:1:", "not valid YAML", "'\\t'"]),
    ("model: *base\n", ["c.yaml:1:", "not valid YAML", "'base'"]),
    (f"{MODEL}---\n{MODEL}", ["c.yaml:3:", "not valid YAML"]),
    (f"{MODEL}  num_heads: 4\n  num_heads: 8\n", ["c.yaml:4:", "duplicate key num_heads"]),
    (f"{MODEL}seed: 1\nmodel: 5\n", ["c.yaml:4:", "duplicate key model"]),
    ("[" * 3000, ["c.yaml:", "nested"]),
    ("a: &a [*a]\n", ["c.yaml:", "nested"]),
    (
        "seed: !!python/name:os.system\n",
        ["c.yaml:1:", "not valid YAML", "tag", "'tag:yaml.org,2002:python/name:os.system'"],
    ),
]


@pytest.mark.parametrize(("text", "parts"), BAD_FILES)
def test_bad_files(tmp_path: Path, text: str, parts: list[str]) -> None:
    assert is_error(message(tmp_path, text), parts)


def test_a_misspelt_section_is_reported(tmp_path: Path) -> None:
    """Not the missing section `model`, which follows from it."""
    found = message(tmp_path, "modle:\n  type: transformer\n")
    assert found.startswith("c.yaml:1: modle: unknown key; did you mean model?")


def test_an_unknown_key_with_the_name_of_a_family(tmp_path: Path) -> None:
    found = message(tmp_path, f"{MODEL}  transformer: 1\n")
    assert found.startswith("c.yaml:3: model.transformer: unknown key")


def test_a_wrong_stop_is_one_error_with_both_types(tmp_path: Path) -> None:
    found = message(tmp_path, f"{MODEL}generation:\n  stop: [1, a, 1.5]\n")
    assert found.startswith("c.yaml:4: generation.stop.2: ") and "not 1.5" in found
    assert "integer" in found and "string" in found and "more)" not in found


@pytest.mark.parametrize(
    "tag", ["!!python/object/new:os.system", "!!python/object/apply:os.system", "!custom", "!!set"]
)
@pytest.mark.parametrize("value", ["{type: transformer}", "[touch, x]"])
def test_tags_are_refused_and_nothing_is_run(tmp_path: Path, tag: str, value: str) -> None:
    found = message(tmp_path, f"model: {tag} {value}\n")
    assert found.startswith("c.yaml:1: ") and tag.lstrip("!").split(":")[0] in found
    assert not (tmp_path / "x").exists()


def test_an_alias_bomb_ends_at_once(tmp_path: Path) -> None:
    names = "abcdefghij"
    text = f"{names[0]}: &{names[0]} [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    for before, name in itertools.pairwise(names):
        text += f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    assert message(tmp_path, text) == "c.yaml: more than 20,000 values, the limit of a configuration"
    mappings = "a: &a {x: 1}\n" + "".join(
        f"{name}: &{name} {{{', '.join(f'k{i}: *{before}' for i in range(9))}}}\n"
        for before, name in itertools.pairwise(names)
    )
    assert message(tmp_path, mappings) == "c.yaml: more than 20,000 values, the limit of a configuration"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def error(path: Path | str) -> str:
        with pytest.raises(ConfigError) as caught:
            Config.from_yaml(path)
        return str(caught.value)

    assert is_error(error(tmp_path), [f"{tmp_path}: ", "folder"])
    assert is_error(error(tmp_path / "no.yaml"), [f"{tmp_path}/no.yaml: ", "no such file or preset"])
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("seed: é".encode("latin-1"))
    assert is_error(error(latin), [f"{latin}: ", "UTF-8"])
    large = tmp_path / "large.yaml"
    large.write_text("#" * (1 << 20) + "\nmodel: {type: transformer}\n")
    assert is_error(error(large), [f"{large}: ", "1 MB"])
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\x00\x01")
    assert is_error(error(binary), [f"{binary}: ", "not valid YAML"])


# ---- errors in an override ------------------------------------------------------------------------------

BAD_OVERRIDES = [
    ("training.learning_rte=1e-3", ["--set training.learning_rte:", "unknown", "learning_rate"]),
    ("lr", ["--set lr:", "key=value"]),
    ("=3", ["--set =3:", "key=value"]),
    ("training.=3", ["--set training.=3:", "key=value"]),
    ("training..max_steps=3", ["--set training..max_steps=3:", "key=value"]),
    ("training.learning_rate=", ["--set training.learning_rate:", "number", "not None"]),
    ("training.learning_rate=[1", ["--set training.learning_rate=[1:", "not valid YAML"]),
    ("seed=99999999999999999999", ["--set seed:", "less than 9223372036854775808", "not 99999999999999999999"]),
    ("device=tpu", ["--set device:", "auto, cpu, gpu, mps, cuda or cuda:N", "not 'tpu'"]),
    ("backend=MLX", ["--set backend:", "'auto', 'mlx' or 'torch'", "not 'MLX'"]),
    ("seed=true", ["--set seed:", "integer", "not True"]),
    ("model=!!python/name:os.system", ["--set model=!!python/name:os.system:", "not valid YAML", "not allowed"]),
    ("training=", ["--set training:", "no value", "null"]),
    ("training.max_grad_norm=", ["--set training.max_grad_norm:", "no value", "null"]),
    ("training.eval_every=None", ["--set training.eval_every:", "not 'None'; write null"]),
    ("training.parameter_groups.0.learning_rate=0", ["--set training.parameter_groups:", "list", "in brackets"]),
    ("data={kind: images, mean: '0.5, 0.6'}", ["--set data.mean:", "list", "write [0.5, 0.6]"]),
    ("data={kind: images, mean: black}", ["--set data.mean:", "list", "write ['black']"]),
]


@pytest.mark.parametrize(("override", "parts"), BAD_OVERRIDES)
def test_bad_overrides(tmp_path: Path, override: str, parts: list[str]) -> None:
    assert is_error(message(tmp_path, MODEL, override), parts)


@pytest.mark.parametrize(
    ("text", "override", "parts"),
    [
        (MODEL, "model={type: transformer, foo: 1}", ["--set model.foo:", "unknown", MODEL_KEYS]),
        (
            f"{MODEL}training:\n  learning_rate: 1.0\n",
            "training.learning_rate.x=3",
            ["--set training.learning_rate:", "number", "{'x': 3}"],
        ),
        (MODEL, "model.type=tree", ["--set model.type:", "'tree'", KNOWN]),
    ],
)
def test_an_override_is_named_and_not_the_file(tmp_path: Path, text: str, override: str, parts: list[str]) -> None:
    assert is_error(message(tmp_path, text, override), parts)


# ---- errors in Python -----------------------------------------------------------------------------------

BAD_CALLS = [
    (lambda: ModelConfig(), ["model.type:", "required"]),
    (lambda: ModelConfig(hidden_size=3), ["model.type:", "required"]),
    (lambda: ModelConfig(type="zzz"), ["model.type:", "'zzz'", KNOWN]),
    (
        lambda: ModelConfig(type="transformer", hiden_size=3),
        ["model.hiden_size:", "unknown", "hidden_size"],
    ),
    (lambda: ModelConfig(type="transformer", num_heads=7), ["model:", "hidden_size 512", "num_heads 7"]),
    (lambda: TransformerConfig(type="cnn"), ["model.type:", "'transformer'", "not 'cnn'"]),
    (lambda: Config(), ["model:", "required"]),
    (lambda: Config(model={"type": "transformer", "x": 1}), ["model.x:", "unknown", MODEL_KEYS]),
    (lambda: Config(model={"type": "transformer"}, traning=1), ["traning:", "unknown", "training"]),
    (lambda: TrainingConfig(max_grad_norm=0), ["training.max_grad_norm:", "greater than 0", "not 0"]),
    (lambda: TrainingConfig(eps=float("nan")), ["training.eps:", "finite number", "not nan"]),
    (lambda: GenerationConfig(temperature=-1), ["generation.temperature:", "greater than or equal to 0", "not -1"]),
    (lambda: DataConfig(validation_fraction=1.0), ["data.validation_fraction:", "less than 1", "not 1.0"]),
]


@pytest.mark.parametrize(("call", "parts"), BAD_CALLS)
def test_bad_calls(call: Any, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    assert is_error(str(caught.value), parts)
    assert isinstance(caught.value, (UsageError, IceNetError)) and caught.value.exit_code == 2


BAD_ASSIGNMENTS = [
    ("model", "hidden_size", 511, ["model:", "hidden_size 511", "num_heads 8"]),
    ("model", "hidden_size", "a", ["model.hidden_size:", "integer", "not 'a'"]),
    ("model", "hiden", 1, ["model.hiden:", "unknown", "hidden_size"]),
    ("model", "type", "cnn", ["model.type:", "'transformer'", "not 'cnn'"]),
    ("model", "dropout", 1.0, ["model.dropout:", "less than 1", "not 1.0"]),
    (
        "training",
        "mixed_precision",
        "fp8",
        ["training.mixed_precision:", "'fp32', 'bf16' or 'fp16'", "not 'fp8'"],
    ),
    ("training", "min_learning_rate", 1.0, ["training:", "min_learning_rate 1", "learning_rate 0.0003"]),
    ("training", "learning_rate", float("inf"), ["training.learning_rate:", "finite number", "not inf"]),
    ("generation", "top_k", -1, ["generation.top_k:", "greater than or equal to 0", "not -1"]),
    ("data", "seq_length", 0, ["data.seq_length:", "greater than or equal to 1", "not 0"]),
    ("", "seed", -1, ["seed:", "greater than or equal to 0", "not -1"]),
    ("", "backend", "jax", ["backend:", "'auto', 'mlx' or 'torch'", "not 'jax'"]),
]


@pytest.mark.parametrize(("section", "key", "value", "parts"), BAD_ASSIGNMENTS)
def test_a_bad_assignment_changes_nothing(section: str, key: str, value: Any, parts: list[str]) -> None:
    config = Config.from_dict({"model": {"type": "transformer"}})
    before = copy.deepcopy(config)
    with pytest.raises(ConfigError) as caught:
        setattr(getattr(config, section) if section else config, key, value)
    assert is_error(str(caught.value), parts)
    assert config == before and config.to_yaml() == before.to_yaml()


def test_a_section_assigned_as_a_whole_is_checked() -> None:
    config = Config.from_dict({"model": {"type": "transformer"}})
    config.training = TrainingConfig(max_steps=3)
    config.model = {"type": "transformer", "hidden_size": 64}
    assert config.model == TransformerConfig(hidden_size=64) and config.training.max_steps == 3
    config.data.seq_length = 512
    with pytest.raises(ConfigError, match=r"^data\.seq_length 512 is more than model\.max_seq_length 100$"):
        config.model = TransformerConfig(max_seq_length=100)
    assert config.model.max_seq_length == 512


def test_a_check_of_the_whole_finds_what_single_assignments_cannot() -> None:
    config = Config.from_dict({"model": {"type": "transformer"}, "data": {"seq_length": 512}})
    config.model.max_seq_length = 100
    with pytest.raises(ConfigError, match=r"^data\.seq_length 512 is more than model\.max_seq_length 100$"):
        config.checked()


# ---- YAML and back --------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    [
        "1e5",
        "1e-3",
        "1.",
        "null",
        "~",
        "yes",
        "0x1",
        "1_0",
        "1:30",
        "=",
        "<<",
        "- a",
        "# b",
        "2020-01-01",
        "\x85",
        "\r",
    ]
)
SMALL = st.integers(1, 10**6)
RATES = st.just(0.0) | st.floats(1e-7, 1, exclude_max=True)


@st.composite
def trees(draw: st.DrawFn) -> Any:
    heads = draw(st.integers(1, 8))
    longest = draw(SMALL)
    learning_rate, max_steps = draw(st.floats(1e-30, 1e30)), draw(SMALL)
    return {
        "backend": draw(st.sampled_from(["auto", "mlx", "torch"])),
        "device": draw(st.sampled_from(["auto", "cpu", "gpu", "mps", "cuda", "cuda:0", "cuda:11"])),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "model": {
            "type": "transformer",
            "hidden_size": heads * 2 * draw(st.integers(1, 64)),
            "num_heads": heads,
            "num_layers": draw(SMALL),
            "dropout": draw(RATES),
            "max_seq_length": longest,
            "activation": draw(st.sampled_from(["gelu", "gelu_tanh", "relu", "silu"])),
            "norm_position": draw(st.sampled_from(["pre", "post"])),
            "causal": draw(st.booleans()),
        },
        "data": {
            "source": draw(TEXTS),
            "seq_length": draw(st.none() | st.integers(1, longest)),
            "validation_fraction": draw(RATES),
        },
        "training": {
            "max_steps": max_steps,
            "warmup_steps": draw(st.integers(0, max_steps)),
            "learning_rate": learning_rate,
            "min_learning_rate": learning_rate * draw(RATES),
            "max_grad_norm": draw(st.none() | st.floats(1e-9, 1e9)),
            "eps": draw(st.floats(1.2e-38, 1.0)),
            "eval_every": draw(st.none() | SMALL),
        },
        "generation": {
            "stop": draw(st.lists(TEXTS | st.integers(0, 10**6), max_size=4)),
            "temperature": draw(st.just(0.0) | st.floats(1e-9, 1e9)),
            "seed": draw(st.none() | st.integers(-(2**63), 2**63 - 1)),
            "overflow": draw(st.sampled_from(["error", "slide"])),
        },
    }


@settings(max_examples=50, deadline=None)
@given(tree=trees())
@example(tree={"model": {"type": "transformer"}, "data": {"source": "1e-3"}})
@example(tree={"model": {"type": "transformer"}, "generation": {"stop": ["a\x85b"]}})
def test_to_yaml_and_back(tree: Any) -> None:
    config = Config.from_dict(tree)
    for section, values in tree.items():
        for key, value in values.items() if isinstance(values, dict) else []:
            assert getattr(getattr(config, section), key) == value
    written = config.to_yaml()
    values, lines = yaml_file.parse(written, "text")
    again = Config.from_dict(values)
    assert again == config and again.to_yaml() == written
    assert lines[("model",)] == 6  # every key is written out, in the order of the class
    assert list(values) == list(Config.model_fields)
    for name in ("model", "data", "training", "generation"):
        assert list(values[name]) == list(type(getattr(config, name)).model_fields)


def test_from_yaml_of_to_yaml(tmp_path: Path) -> None:
    config = read(tmp_path, MODEL, "training.eps=1e-12", "data.source=ünï.txt")
    assert read(tmp_path, config.to_yaml()) == config


def test_copies_and_pickles() -> None:
    config = Config.from_dict({"model": {"type": "transformer", "hidden_size": 64}})
    for twin in (copy.deepcopy(config), config.model_copy(deep=True), pickle.loads(pickle.dumps(config))):  # noqa: S301
        assert twin == config and type(twin.model) is TransformerConfig
        twin.model.hidden_size = 128
        assert config.model.hidden_size == 64


# ---- the schema and the presets -------------------------------------------------------------------------


def test_the_schema_has_every_key_and_what_it_is() -> None:
    schema = json_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert list(schema["properties"]) == list(Config.model_fields) and schema["required"] == ["model"]
    sections = {"DataConfig": DataConfig, "TrainingConfig": TrainingConfig, "GenerationConfig": GenerationConfig}
    for name, section in {**sections, "TransformerConfig": TransformerConfig}.items():
        found = schema["$defs"][name]
        assert found["additionalProperties"] is False
        assert set(found["properties"]) - {"path"} == set(section.model_fields)
        assert all(prop.get("description") for prop in found["properties"].values()), name
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["TransformerConfig"]["properties"]["type"]["const"] == "transformer"
    assert schema["$defs"]["TransformerConfig"]["properties"]["activation"]["enum"] == [
        "gelu",
        "gelu_tanh",
        "relu",
        "silu",
    ]


def test_the_schema_accepts_what_the_config_accepts() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(json_schema())
    good: list[Any] = [
        {"model": {"type": "transformer"}},
        {"model": {"type": "transformer", "num_heads": 4}, "training": {"max_grad_norm": None}, "seed": 5},
        Config.from_dict({"model": {"type": "transformer"}}).to_dict(),
    ]
    bad: list[Any] = [
        {},
        {"model": {"type": "transformer", "hiden": 1}},
        {"model": {"type": "transformer"}, "backend": "jax"},
        {"model": {"type": "transformer", "dropout": 1}},
        {"model": {"type": "transformer"}, "training": {"batch_size": 1.5}},
        {"model": {"type": "transformer"}, "device": "tpu"},
    ]
    for tree in good:
        Config.from_dict(tree)
        assert not list(check.iter_errors(tree)), tree
    for tree in bad:
        with pytest.raises(ConfigError):
            Config.from_dict(tree)
        assert list(check.iter_errors(tree)), tree


def test_the_schema_and_the_config_accept_null_for_the_same_keys() -> None:
    schema = json_schema()
    sections = (Config, TransformerConfig, CNNConfig, DataConfig, ImageDataConfig, TrainingConfig, GenerationConfig)
    for section in sections:
        described = schema if section is Config else schema["$defs"][section.__name__]
        for key, value in described["properties"].items():
            tree: dict[str, Any] = {"model": {"type": "cnn" if section is CNNConfig else "transformer"}}
            if section is ImageDataConfig:
                tree["data"] = {"kind": "images"}
            (tree.setdefault(section.section, {}) if section.section else tree)[key] = None
            if {"type": "null"} in value.get("anyOf", []):
                Config.from_dict(tree)
            else:
                with pytest.raises(ConfigError):
                    Config.from_dict(tree)


def test_the_schema_file_is_up_to_date() -> None:
    file = ROOT / "configs" / "schema.json"
    if not file.exists():
        pytest.skip("no configs/schema.json")
    assert json.loads(file.read_text(encoding="utf-8")) == json_schema()


def test_presets_are_found_by_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "presets").mkdir()
    for name in ("transformer-tiny", "quickstart"):
        (tmp_path / "presets" / f"{name}.yaml").write_text(MODEL)
    monkeypatch.setattr(presets, "folder", lambda: tmp_path / "presets")
    monkeypatch.chdir(tmp_path)
    assert presets.names() == ["quickstart", "transformer-tiny"]
    for name in ("quickstart", "quickstart.yaml", "configs/quickstart", "configs/quickstart.yaml"):
        assert presets.find(name) == tmp_path / "presets" / "quickstart.yaml"
    (tmp_path / "quickstart.yaml").write_text(MODEL)
    assert presets.find("quickstart.yaml") == Path("quickstart.yaml")  # the user's own file comes first
    for name, hint in {
        "quikstart": "did you mean quickstart?",
        "zzz": "presets: quickstart, transformer-tiny",
        "other/quickstart.yaml": "did you mean quickstart?",
        "quickstart.json": "did you mean quickstart?",
    }.items():
        with pytest.raises(ConfigError) as caught:
            presets.find(name)
        assert str(caught.value) == f"{name}: no such file or preset; {hint}"


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_is_right_and_names_the_schema(name: str) -> None:
    config = Config.from_yaml(name)
    assert Config.from_dict(config.to_dict()) == config
    first = presets.find(name).read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=") and first.endswith("schema.json")
