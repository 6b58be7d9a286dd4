"""Values of YAML files and of `--set`: texts as given, decimal numbers, empty sections, merge keys, hostile files."""

from __future__ import annotations

import datetime
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import is_one_line, tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st

from icenet.core.config import Config, yaml_file
from icenet.core.config.section import nearest
from icenet.core.data.datasets import dataset_for
from icenet.core.errors import ConfigError, DataError

MODEL = "model:\n  type: transformer\n"
CUSTOM = "model:\n  type: m.py:M\n"


def read(text: str, *overrides: str) -> Config:
    values, _ = yaml_file.parse(text, "c.yaml")
    return Config.from_dict(values, overrides)


def in_file(folder: Path, text: str | bytes, *overrides: str) -> Config:
    file = folder / "c.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return Config.from_yaml(file, overrides)


def error(folder: Path, text: str | bytes, *overrides: str) -> str:
    """Returns the error of a file, which is one line, without the path of the folder."""
    with pytest.raises(ConfigError) as caught:
        in_file(folder, text, *overrides)
    assert is_one_line(str(caught.value))
    return str(caught.value).replace(f"{folder}/", "")


# ---- numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("010", 10), ("08", 8), ("+5", 5), ("1_000", 1000), ("007", 7), ("10", 10), ("1_0_0", 100)],
)
def test_numbers_are_decimal(text: str, value: int) -> None:
    for config in (read(f"{MODEL}training: {{max_steps: {text}}}"), read(MODEL, f"training.max_steps={text}")):
        assert config.training.max_steps == value
    for config in (read(f"{MODEL}training:\n  eps: {text}"), read(MODEL, f"training.eps= {text} ")):
        assert config.training.eps == value and type(config.training.eps) is float
    for config in (read(f"{CUSTOM}  x: [{text}]"), read(CUSTOM, f"model.x=[{text}]")):
        assert config.model.x == [value] and type(config.model.x[0]) is int


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("0x10", "write 16"),
        ("-0x1F", "write -31"),
        ("0b101", "write 5"),
        ("0o17", "write 15"),
        ("1:00", "colons"),
        ("-1:30:00.5", "colons"),
        ("1__0", "decimal"),
        ("1e999", "range"),
        ("9" * 500, "500 characters"),
    ],
)
def test_other_notations_are_one_line_with_the_decimal_number(tmp_path: Path, text: str, advice: str) -> None:
    for section, key in (("training", "max_steps"), ("training", "learning_rate"), ("data", "seq_length")):
        found = error(tmp_path, f"{MODEL}{section}:\n  {key}: {text}\n")
        assert found.startswith(f"c.yaml:4: {section}.{key}: ") and advice in found
        found = error(tmp_path, MODEL, f"{section}.{key}={text}")
        assert found.startswith(f"--set {section}.{key}: ") and advice in found
    for found in (error(tmp_path, f"{CUSTOM}  x: {text}\n"), error(tmp_path, CUSTOM, f"model.x={text}")):
        assert "model.x: " in found and advice in found and f"'{text}' for a text" in found
    if text[0] != "-":
        assert read(f"{CUSTOM}  x: '{text}'\n").model.x == text  # the way out that the message names


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("1e3", "write 1000"),
        ("'5'", "write 5 without quotes"),
        ("1,000", "write 1000"),
        ("0,5", "0.001"),
        ("10k", "1e-3"),
        ("\uff11\uff12", "write 12"),
        ("\u22125", "write -5"),
    ],
)
def test_how_to_write_an_integer(tmp_path: Path, text: str, advice: str) -> None:
    for found in (
        error(tmp_path, f"{MODEL}training:\n  max_steps: {text}\n"),
        error(tmp_path, MODEL, f"training.max_steps={text}"),
    ):
        assert "training.max_steps: must be an integer, not " in found and advice in found.rpartition("; ")[2]


@pytest.mark.parametrize(
    ("text", "value"), [("yes", True), ("On", True), ("TRUE", True), ("no", False), ("off", False)]
)
def test_booleans(text: str, value: bool) -> None:
    assert read(f"{MODEL}  causal: {text}\n").model.causal is value
    assert read(MODEL, f"model.causal={text}").model.causal is value
    assert read(f"{CUSTOM}  x: {text}\n").model.x is value


def test_sizes_beyond_the_data_and_the_memory(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        dataset_for(tiny(tmp_path, "training.batch_size=1000000000000"))
    assert is_one_line(caught.value, "training.batch_size (1000000000000)", "29,")
    images = "model: {type: cnn}\ndata: {kind: images}\n"
    for key in ("data.image_size", "data.crop_padding"):
        assert f"{key}: must be less than or equal to 65536" in error(tmp_path, images, f"{key}=1000000000000")


def test_a_number_is_no_boolean(tmp_path: Path) -> None:
    assert error(tmp_path, MODEL, "model.causal=1").endswith("must be a boolean, not 1; write true or false")


def test_null_for_optional_keys() -> None:
    for text in ("null", "~", "Null", "NULL"):
        assert read(MODEL, f"training.max_grad_norm={text}").training.max_grad_norm is None
        assert read(f"{MODEL}training:\n  max_grad_norm: {text}\n").training.max_grad_norm is None
    assert read(f"{MODEL}training:\n  max_grad_norm:\n").training.max_grad_norm is None


# ---- texts ------------------------------------------------------------------------------------------------

AS_GIVEN = [
    "my #1 book.txt",
    "*.txt",
    "**/*.txt",
    "2024",
    "010",
    "1e3",
    "0x10",
    "12:30",
    "2024-01-01",
    "2024-99-99",
    "yes",
    "null",
    "~",
    "a: b",
    "{x}",
    "[x]",
    "[ab].txt",
    "[a.txt,b.txt]",
    "-",
    "- a",
    "? a",
    "@x",
    "%x",
    "!x",
    "!!python/name:os.system",
    "&x",
    "`x`",
    "|",
    ">",
    '"',
    "'",
    '"a" and "b"',
    "#x",
    "a=b",
    "=",
    "<<",
    "a\nb",
    "a\tb ",
    "\u00fcn\u00ef \U0001d11e",
    ",",
    "\\n",
]


@pytest.mark.parametrize("text", AS_GIVEN)
def test_a_text_of_set_is_taken_as_given(text: str) -> None:
    assert read(MODEL, f"data.source={text}").data.source == text
    assert read(MODEL, f"data.source = {text}").data.source == text
    assert read(read(MODEL, f"data.source={text}").to_yaml()).data.source == text


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_text_of_set_is_taken_as_given(text: str) -> None:
    given_text = text.lstrip(" ")
    if not given_text.strip() or given_text.strip()[0] in "'\"":
        return
    config = read(MODEL, f"data.source={text}")
    assert config.data.source == given_text
    assert read(config.to_yaml()) == config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("'my book'", "my book"),
        ('" a\\n"', " a\n"),
        ("''", ""),
        ("'it''s'", "it's"),
        ("'\"x\"'", '"x"'),
        ("'010'", "010"),
    ],
)
def test_quotes_of_set_are_those_of_yaml(text: str, value: str) -> None:
    assert read(MODEL, f"data.source={text}").data.source == value
    assert read(f"{MODEL}data:\n  source: {text}\n").data.source == value


@pytest.mark.parametrize(
    "text", ["2024", "010", "1e3", "yes", "null", "~", "2024-01-01", "1:00", "=", "<<", "1_0", ".5"]
)
def test_a_text_of_a_file_is_as_written(text: str) -> None:
    assert read(f"{MODEL}data:\n  source: {text} # a comment\n  tokenizer: {text}").data.source == text
    assert read(f"{MODEL}training: {{parameter_groups: [{{parameters: [{text}]}}]}}").training.parameter_groups[
        0
    ].parameters == [text]


def test_items_that_are_numbers_or_texts(tmp_path: Path) -> None:
    text = "[010, '010', yes, null, 2024-01-01, a b]"
    expected = [10, "010", "yes", "null", "2024-01-01", "a b"]
    assert read(MODEL, f"generation.stop={text}").generation.stop == expected
    assert read(f"{MODEL}generation:\n  stop: {text}").generation.stop == expected
    found = error(tmp_path, f"{MODEL}generation:\n  stop:\n    - 1\n    - 0x1f\n")
    assert found.startswith("c.yaml:6: generation.stop.1: ") and "write 31, or '0x1f' for a text" in found


@pytest.mark.parametrize("text", ["*.txt", "@x", "%x", "!x", "a: b", "- a", "`x`", "? a", ", a", '"a" b', "&x y: z"])
def test_what_yaml_does_not_allow_without_quotes(tmp_path: Path, text: str) -> None:
    found = error(tmp_path, f"{MODEL}data:\n  source: {text}\n")
    assert found.startswith("c.yaml:4: not valid YAML: ") and "in quotes" in found


def test_an_option_of_a_custom_model_has_the_type_that_its_text_shows() -> None:
    texts = [
        "a #1",
        "*.txt",
        "a",
        "@x",
        "1.5",
        "1e-3",
        ".inf",
        "5",
        "no",
        "~",
        "[1, b]",
        "{a: 1}",
        "'5'",
        "2024-01-02",
    ]
    values = [read(CUSTOM, f"model.x={text}").model.x for text in texts]
    assert values == [
        *("a #1", "*.txt", "a", "@x", 1.5, 1e-3, math.inf, 5, False, None, [1, "b"], {"a": 1}, "5"),
        datetime.date(2024, 1, 2),
    ]
    assert read(CUSTOM, "model.x.y=010", "model.x.z=a").model.x == {"y": 10, "z": "a"}


# ---- sections and files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", ["", " # max_steps: 5", " null", " ~", "\n  # max_steps: 5"])
def test_an_empty_section_has_its_defaults(empty: str) -> None:
    assert read(f"training:{empty}\ndata:{empty}\n{MODEL}generation:{empty}\n") == read(MODEL)
    assert Config.from_dict({"model": {"type": "transformer"}, "data": None}) == read(MODEL)
    assert read(f"training:{empty}\n{MODEL}", "training.max_steps=3").training.max_steps == 3
    assert read(f"{MODEL}training:\n  max_steps: 3\n", "training=null") == read(MODEL)
    assert read(f"{MODEL}training:\n  parameter_groups:{empty}\n") == read(MODEL)


@pytest.mark.parametrize("text", ["", "# a\n", "---\n# a\n", "null", "~"])
def test_an_empty_file_lacks_a_model(tmp_path: Path, text: str) -> None:
    assert error(tmp_path, text) == "c.yaml: model: required, but missing"
    assert in_file(tmp_path, text, "model={type: lstm}").model.type == "lstm"


def test_merge_keys(tmp_path: Path) -> None:
    groups = (
        f"{MODEL}training:\n  parameter_groups:\n"
        "    - &a {parameters: [x], weight_decay: 1, learning_rate: 2}\n"
        "    - {parameters: [y], <<: *a}\n"
        "    - <<: [{parameters: [z]}, *a]\n"
        "      weight_decay: "
    )
    found = [group.model_dump() for group in read(f"{groups}3\n").training.parameter_groups]
    assert found == [
        {"parameters": ["x"], "weight_decay": 1, "learning_rate": 2},
        {"parameters": ["y"], "weight_decay": 1, "learning_rate": 2},
        {"parameters": ["z"], "weight_decay": 3, "learning_rate": 2},
    ]
    assert error(tmp_path, f"{groups}-1\n").startswith("c.yaml:8: training.parameter_groups.2.weight_decay: ")
    assert error(tmp_path, f"{groups.replace('decay: 1', 'decay: -1')}3\n").startswith("c.yaml:5: ")
    assert error(tmp_path, f"{MODEL}training: {{<<: 5}}\n") == "c.yaml:3: << takes a mapping, such as <<: *name"
    assert "nested" in error(tmp_path, "a: &a {<<: *a}")
    bomb = "a: &a {x: 1}\n" + "".join(
        f"{name}: &{name} {{<<: [{', '.join(['*' + before] * 9)}]}}\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert error(tmp_path, bomb) == "c.yaml: more than 20,000 values, the limit of a configuration"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model:\n  type:\u00a0transformer\n  hidden_size: 32\n", ["c.yaml:3: ", "line 2 contains NO-BREAK SPACE"]),
        ("model:\n  type: transformer\n  hidden_size:\u20033\n", ["c.yaml:4: ", "line 3 contains EM SPACE"]),
        (f"{MODEL}training: {{max_steps:\u00a06}}\n", ["c.yaml:3: ", "after the colon (it contains NO-BREAK SPACE)"]),
        ("model:\n\u00a0\u00a0type: transformer\n", ["c.yaml:2: ", "under model:", "(it contains NO-BREAK SPACE)"]),
        ("model:\n  type: transformer\n  hidden_size\u200b: 3\n", ["c.yaml:3: ", "ZERO WIDTH SPACE"]),
    ],
)
def test_what_only_looks_like_a_space_is_named(tmp_path: Path, text: str, parts: list[str]) -> None:
    found = error(tmp_path, text)
    assert found.startswith(parts[0]) and is_one_line(found, *parts[1:])


def test_a_duplicate_key_names_both_lines(tmp_path: Path) -> None:
    found = error(tmp_path, f"{MODEL}  num_heads: 4\n\n  num_heads: 8\n")
    assert found == "c.yaml:5: duplicate key num_heads; the first is on line 3"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (f"{MODEL}---\n{MODEL}", ["c.yaml:3: ", "document", "remove ---"]),
        (f"{MODEL}training:\n\tmax_steps: 1\n", ["c.yaml:4: ", "tab"]),
        ('seed: 1\ndata: {source: "a}\n', ["c.yaml:2: ", "quotation mark is not closed"]),
        (MODEL.encode("utf-16"), ["c.yaml: ", "not UTF-8 text (line 1)"]),
        (f"{MODEL}\x00", ["c.yaml: ", "#x0000", "line 3"]),
        (f"{MODEL}seed: !!int x\n", ["c.yaml:3: ", "!!int"]),
        ("on: 1\n", ["c.yaml:1: ", "the key on must be a string; put it in quotes"]),
        ("? [a]\n: 1\n", ["c.yaml:1: ", "key"]),
        ("[" + "a," * 500_000, ["c.yaml: ", "20,000 values"]),
        ("{" * 500_000, ["c.yaml: ", "nested"]),
    ],
)
def test_hostile_files(tmp_path: Path, text: str | bytes, parts: list[str]) -> None:
    started = time.process_time()
    found = error(tmp_path, text)
    assert found.startswith(parts[0]) and is_one_line(found, *parts[1:])
    assert time.process_time() - started < 5


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert in_file(tmp_path, f"\ufeff{MODEL}") == read(MODEL)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    pipe, sparse = tmp_path / "pipe.yaml", tmp_path / "sparse.yaml"
    os.mkfifo(pipe)
    with sparse.open("wb") as file:
        file.truncate(1 << 30)
    for path, part in {
        pipe: "no regular file",
        Path("/dev/zero"): "no regular file",
        sparse: "larger than 1 MB",
        tmp_path: "folder",
        Path("a" * 5000): "name too long",
        Path("a\0b"): "null byte",
    }.items():
        with pytest.raises(ConfigError) as caught:
            Config.from_yaml(path)
        assert is_one_line(str(caught.value), part) and len(str(caught.value)) < 300


# ---- keys -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("Training", "did you mean training?"),
        ("training.learning_rate", "write it as learning_rate: under training:"),
        ("data/source", "write it as source: under data:"),
        ("learning_rate", "it belongs under training:"),
        ("learning-rate", "it belongs under training:"),
        ("vocab_size", "it belongs under model:"),
        ("tr\u0430ining", "did you mean training? (it contains CYRILLIC SMALL LETTER A)"),
        ("\u200bseed", "did you mean seed? (it contains ZERO WIDTH SPACE)"),
    ],
)
def test_advice_for_a_key_at_the_top_level(tmp_path: Path, key: str, advice: str) -> None:
    assert error(tmp_path, f"{MODEL}{key}: 1\n") == f"c.yaml:3: {key}: unknown key; {advice}"


@pytest.mark.parametrize(
    "key", ["learning-rate", "Learning_Rate", "LEARNING_RATE", "learningRate", "lr", "learning rate"]
)
def test_other_spellings_of_a_key(tmp_path: Path, key: str) -> None:
    advice = f"training.{key}: unknown key; did you mean learning_rate?"
    assert error(tmp_path, f"{MODEL}training:\n  {key}: 1\n") == f"c.yaml:4: {advice}"
    assert error(tmp_path, MODEL, f"training.{key}=1") == f"--set {advice}"


def test_spaces_around_a_name_are_seen(tmp_path: Path) -> None:
    """Of a key, also in a section with many, of a kind, and in a line of JSON."""
    assert "write hidden_size without spaces" in error(tmp_path, f"{MODEL}  ' hidden_size': 1\n")
    assert "write chat without spaces" in error(tmp_path, f"{MODEL}data: {{kind: ' chat'}}\n")
    assert nearest("text", [" text", ""]) == "; did you mean ' text'?"
    assert nearest("zzz", [" text", ""]) == "; known: ' text', ''"


def test_a_choice_with_a_letter_that_looks_like_another(tmp_path: Path) -> None:
    found = error(tmp_path, MODEL, "backend=t\u043erch")
    assert "did you mean 'torch'?" in found and "CYRILLIC SMALL LETTER O" in found
    assert "did you mean lstm?" in error(tmp_path, MODEL, "model.type=LSTM")


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("data.image_size", "it is for data.kind images"),
        ("data.horizontalFlip", "it is for data.kind images"),
        ("model.image_channels", "it is for model.type cnn"),
        ("model.bidirectional", "it is for model.type lstm, gru, rnn"),
        ("training:max_steps", "write it as max_steps: under training:"),
    ],
)
def test_a_key_of_another_kind_of_section(tmp_path: Path, key: str, advice: str) -> None:
    assert advice in error(tmp_path, MODEL, f"{key}=1")


def test_an_unknown_key_of_a_section_with_many_keys(tmp_path: Path) -> None:
    assert (
        error(tmp_path, MODEL, "model.kv_heads=2") == "--set model.kv_heads: unknown key; did you mean num_kv_heads?"
    )
    found = error(tmp_path, MODEL, "model.zzz=2")
    assert is_one_line(found, "--set model.zzz: unknown key", "icenet schema lists") and len(found) < 90
    assert error(tmp_path, MODEL, "data.zzz=2").endswith("seq_length, validation_fraction")


def test_keys_of_text_on_images(tmp_path: Path) -> None:
    images = "model: {type: cnn}\ndata: {kind: images}\n"
    for key in ("tokenizer", "text_key", "errors", "packing", "seq_length"):
        kinds = "data.kind text" + (" or data.kind chat" if key not in ("text_key", "packing") else "")
        assert error(tmp_path, images, f"data.{key}=1") == f"--set data.{key}: unknown key; it is for {kinds}"
    assert error(tmp_path, images, "model.num_heads=1").endswith("it is for model.type transformer or model.type vit")


def test_a_key_without_a_space_before_its_value(tmp_path: Path) -> None:
    assert error(tmp_path, MODEL, "training={max_steps:5}").endswith("unknown key; write a space after the colon")


@pytest.mark.parametrize(
    ("overrides", "notice"),
    [
        (["seed=1", "seed=1"], "--set seed=1: has no effect: --set seed=1 follows"),
        (
            ["training.max_steps=5", "training={batch_size: 2}"],
            "--set training.max_steps=5: has no effect: --set training={batch_size: 2} follows",
        ),
        (
            ["training={max_steps: 5}", "training.max_steps=7"],
            "--set training={max_steps: 5}: its training.max_steps has no effect: --set training.max_steps=7 follows",
        ),
        (["training={batch_size: 2}", "training.max_steps=7", "seed=7"], ""),
    ],
)
def test_a_key_that_is_set_twice(overrides: list[str], notice: str, caplog: pytest.LogCaptureFixture) -> None:
    read(MODEL, *overrides)
    assert caplog.messages == ([notice] if notice else [])


def test_a_tokenizer_in_two_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "sub" / "c.yaml"
    file.parent.mkdir()
    file.write_text(f"{MODEL}data: {{tokenizer: t.json}}\n")
    (tmp_path / "t.json").write_text("1")
    (tmp_path / "sub" / "t.json").write_text("1")
    Config.from_yaml(file)
    assert not caplog.messages  # a copy
    (tmp_path / "t.json").write_text("2")
    assert Config.from_yaml(file).data.tokenizer == str(tmp_path / "sub" / "t.json")
    assert len(caplog.messages) == 1
    assert is_one_line(caplog.messages[0], "sub/t.json next to the config is used", str(tmp_path / "t.json"))
    caplog.clear()
    assert Config.from_yaml(file, ["data.tokenizer=t.json"]).data.tokenizer == str(tmp_path / "t.json")
    Config.from_yaml(file, trust_code=False)  # that of a checkpoint
    assert not caplog.messages


# ---- YAML and back ----------------------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=6).map(lambda text: f"x{text}")
TEXTS = st.text(st.characters(), max_size=6) | st.sampled_from(
    [
        *AS_GIVEN,
        "08",
        "0o17",
        "1:30",
        ".5",
        "1.",
        ".inf",
        ".nan",
        "1__0",
        "On",
        "",
        " a ",
        "\ufeff",
        "\x85\u2028",
        "9" * 500,
    ]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | TEXTS
    | st.dates(min_value=datetime.date(1000, 1, 1)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def test_texts_of_a_custom_model_survive_their_file() -> None:
    config = Config.from_dict({"model": {"type": "m.py:M", "x": AS_GIVEN}})
    assert read(config.to_yaml()).model.x == AS_GIVEN


@settings(max_examples=40, deadline=None)
@given(options=st.dictionaries(NAMES, VALUES, max_size=4), text=TEXTS)
@example(options={"x": {"<<": 1, "1": "1", "": None}}, text="<<")
def test_every_option_of_a_custom_model_survives_its_file(options: dict[str, Any], text: str) -> None:
    config = Config.from_dict({"model": {"type": "m.py:M", **options}, "data": {"source": text, "text_key": text}})
    written = config.to_yaml()
    again = read(written)
    assert again == config and again.to_yaml() == written
    assert repr(again.to_dict()) == repr(config.to_dict())  # also the types: 1, 1.0 and True are equal
    assert repr(yaml.safe_load(written)) == repr(config.to_dict())  # for other readers


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.loss=squares", "must be cross_entropy or FILE.py:FUNCTION, not 'squares'"),
        ("training.loss=mine.py", "must be cross_entropy or FILE.py:FUNCTION, not 'mine.py'"),
        ("data.kind=mine.py", "'mine.py' names no class; write mine.py:CLASS"),
        ("model.type=mine.py", "'mine.py' names no class; write mine.py:CLASS"),
    ],
)
def test_how_code_of_the_user_is_named(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(MODEL, override)
    assert is_one_line(error.value, words)
