"""The command line: every subcommand on a tiny model, its help, its JSON output, its exit codes."""

from __future__ import annotations

import io
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    BACKENDS,
    environment,
    error_line,
    icenet,
    is_one_line,
    losses,
    python,
    same_bits,
    start_icenet,
    tiny,
    train,
    tree,
)

import icenet as api
from icenet.cli.main import cli, main
from icenet.commands import doctor
from icenet.core.config import Config, json_schema
from icenet.core.runs import checkpoint
from icenet.core.training.trainer import Trainer
from icenet.core.weights import files as weights

torch: Any = pytest.importorskip("torch")
pytest.importorskip("mlx")

COMMANDS = list(cli.commands)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a config, a text and a finished run of 20 steps on MLX."""
    folder = tmp_path_factory.mktemp("cli")
    config = tiny(folder, "generation.max_new_tokens=12", "model.dropout=0")
    (folder / "tiny.yaml").write_text(config.to_yaml())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICENET_CACHE", str(folder / "cache"))
        train(config, folder / "run", "mlx")
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the same folder, as the working directory of this process."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("ICENET_CACHE", str(place / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    return place


@pytest.mark.parametrize("arguments", [["runs"], ["info", "quickstart"], ["generate", "/run", "--prompt", "a"]])
def test_a_working_directory_that_was_removed(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(arguments) == 2
    assert is_one_line(error_line(capfd.readouterr().err), "working directory was removed", "cd")
    assert main(["--version"]) == 0


# ---- help -------------------------------------------------------------------------------------------------


def test_the_order_of_the_commands() -> None:
    expected = ["quickstart", "train", "generate", "convert", "parity", "info", "doctor", "schema"]
    assert [name for name in COMMANDS if name in expected] == expected


@pytest.mark.parametrize("name", ["", *COMMANDS])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(name: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*([name] if name else []), flag]) == 0
    text, err = capsys.readouterr()
    assert err == ""
    assert text.startswith(f"Usage: icenet {name}".rstrip())
    assert re.search(r"^ +Examples:$", text, re.MULTILINE)
    examples = text.split("Examples:")[1].strip().splitlines()
    assert examples and all(line.strip().startswith(f"icenet {name}".rstrip()) for line in examples)
    for option in re.findall(r"--[a-z][a-z-]+", "".join(examples)):  # every option of an example is documented
        known = text if name else "--help"
        assert option in known.split("Examples:")[0]


def test_help_and_usage_errors_import_no_library() -> None:
    program = """
    import sys
    from icenet.cli.main import main
    names = ("mlx.core", "torch", "numpy", "pydantic", "rich", "matplotlib", "yaml")
    for arguments in (["--help"], ["train", "--help"], ["--version"], ["nonsense"], []):
        code = main(arguments)
        print(f"found: {code}", [name for name in names if name in sys.modules])
    """
    found = [line for line in python(program).splitlines() if line.startswith("found: ")]
    assert found == [f"found: {code} []" for code in (0, 0, 0, 2, 2)]


@pytest.mark.parametrize(
    ("name", "advice"),
    [("export", "mean convert?"), ("finetune", "mean train?"), ("gen", "mean generate?"), ("foo", "are quickstart,")],
)
def test_an_unknown_command(name: str, advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    assert is_one_line(capsys.readouterr().err.strip(), name, advice)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert api.__version__ in capsys.readouterr().out


def test_examples_of_the_help_parse(here: Path) -> None:
    """Every example is a valid command line."""
    for command in cli.commands.values():
        for line in (command.epilog or "").splitlines():
            words = shlex.split(line.split(" > ")[0])
            if words[:1] != ["icenet"]:
                continue
            subcommand = cli.commands[words[1]]
            with subcommand.make_context(words[1], words[2:]) as context:
                assert context.params is not None


def test_python_m_icenet_is_the_command(place: Path) -> None:
    """The script and the module print the same, and their exit code is the return value of `main`."""
    assert icenet("--version", folder=place).stdout.startswith("icenet")
    script = Path(sys.executable).with_name("icenet")
    if script.exists():
        done = subprocess.run([script, "trian"], capture_output=True, text=True, check=False, cwd=place)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == icenet("trian", folder=place, code=2).stderr


# ---- train and resume -------------------------------------------------------------------------------------


def test_ctrl_c_while_the_command_line_is_imported(place: Path) -> None:
    (place / "early").mkdir()
    (place / "early" / "click.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    process = icenet("--help", folder=place, code=130, PYTHONPATH=str(place / "early"))
    assert process.stdout == "" and is_one_line(process.stderr.strip(), "icenet: ", "Ctrl-C")


def test_ctrl_c_in_a_library_that_turns_it_into_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chained() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as stop:
            raise ValueError("a callback failed") from stop

    def quoted() -> None:  # as pydantic while it builds the schema of a class
        raise ValueError("Error building 'definitions' validator:\n  KeyboardInterrupt: ")

    for examine in (chained, quoted):
        monkeypatch.setattr(doctor, "examine", examine)
        assert main(["doctor"]) == 130
        assert is_one_line(capsys.readouterr().err.strip(), "stopped by Ctrl-C")


def test_the_end_of_a_file_is_no_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """click ends a command for both in the same way."""

    def examine() -> None:
        raise EOFError("marshal data too short")

    monkeypatch.setattr(doctor, "examine", examine)
    assert main(["doctor"]) == 1
    assert is_one_line(capsys.readouterr().err.strip(), "EOFError: marshal data too short")


def test_train_and_resume_on_the_other_backend(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--set", "training.max_steps=6", "--set", "training.checkpoint_every=3"]
    assert main(["train", "tiny.yaml", "--run", "moved", "--backend", "torch", *options]) == 0
    out, err = capfd.readouterr()
    assert re.fullmatch(
        r"step 6: loss \d\.\d{4}, validation loss \d\.\d{4}\n"
        r"run +moved\ncheckpoint +moved/checkpoints/step-00000006\nplot +\S+\n",
        out,
    )
    assert "step 6/6" in err and "Traceback" not in err
    options = ["--set", "training.max_steps=9", "--quiet"]
    assert main(["train", "--resume", "moved", "--backend", "mlx", *options]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("step 9: loss") and err == ""
    records = [json.loads(line) for line in (here / "moved" / "metrics.jsonl").read_text().splitlines()]
    assert [r["backend"] for r in records if "loss" in r] == ["torch"] * 6 + ["mlx"] * 3
    assert checkpoint.find(here / "moved").state["backend"] == "mlx"
    assert Config.from_yaml(here / "moved" / "config.yaml").backend == "mlx"


def test_runs_are_named_after_the_config(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "tiny.yaml", "--set", "training.max_steps=1", "--quiet"]
    assert main(arguments) == 0 and main(arguments) == 0
    assert losses(here / "runs" / "tiny") == losses(here / "runs" / "tiny-2")
    assert capsys.readouterr().out.count("step 1: loss") == 2


def test_overrides_and_the_seed_have_an_effect(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("s1", "1"), ("s2", "2")):
        options = ["--set", "training.max_steps=1", "--set", f"seed={seed}", "--quiet"]
        assert main(["train", "tiny.yaml", "--run", name, *options]) == 0
    assert losses(here / "s1") != losses(here / "s2")


def test_a_preset_by_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["max_steps=1", "batch_size=2", "eval_every=null", "warmup_steps=0"]
    options = [part for key in small for part in ("--set", f"training.{key}")]
    text = ["--set", f"data.source={here / 'text.txt'}", "--set", "model.hidden_size=16"]
    assert main(["train", "configs/quickstart.yaml", *options, *text, "--quiet"]) == 0
    assert (here / "runs" / "quickstart" / "checkpoints" / "step-00000001").is_dir()


# ---- generate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "unused"),
    [(["--temperature", "0", "--seed", "3"], ["--seed"]), (["--seed", "7", "--top-k", "20"], [])],
)
def test_generate_on_both_backends(
    here: Path,
    options: list[str],
    unused: list[str],
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    texts = []
    for backend in BACKENDS:
        assert main(["generate", "run", "--prompt", "alpha ", "--backend", backend, *options]) == 0
        texts.append(capfd.readouterr().out)
        assert [line.split(": ")[1] for line in caplog.messages if line.startswith("no effect: ")] == unused
        caplog.clear()
    assert texts[0] == texts[1]
    assert texts[0].startswith("alpha ") and texts[0].endswith("\n")
    assert 6 < len(texts[0].encode()) - 1 <= 6 + 3 * 12  # 12 tokens; an invalid byte is printed as three


def test_generate_equals_the_python_function(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """From a run, a checkpoint and a saved model. Another seed gives another text."""
    model = api.load(here / "run", backend="mlx")
    text = api.generate(model, "if", seed=4, max_new_tokens=9)
    api.save(model, here / "saved")
    for source in ("run", "run/checkpoints/step-00000020", "saved"):
        command = ["generate", source, "--prompt", "if", "--max-new-tokens", "9", "--backend", "mlx"]
        assert main([*command, "--seed", "4"]) == 0
        assert capfd.readouterr().out == f"if{text}\n"
        assert main([*command, "--seed", "5"]) == 0
        assert capfd.readouterr().out != f"if{text}\n"


def test_the_prompt_from_a_file_and_from_standard_input(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "prompt.txt").write_text("größe ", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("größe "))
    texts = []
    for source in (["--prompt", "größe "], ["--prompt-file", "prompt.txt"], ["--prompt-file", "-"]):
        assert main(["generate", "run", *source, "--seed", "1", "--max-new-tokens", "5"]) == 0
        out, err = capfd.readouterr()
        assert err == ""
        texts.append(out)
    assert texts[0].startswith("größe ") and texts == [texts[0]] * 3


def test_stop_and_slide(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["generate", "run", "--prompt", "alpha", "--seed", "2"]
    assert main([*options, "--max-new-tokens", "100", "--overflow", "slide"]) == 0
    long = capfd.readouterr().out
    assert len(long.encode()) >= 100
    ending = long[9:11]
    assert main([*options, "--max-new-tokens", "100", "--overflow", "slide", "--stop", ending]) == 0
    assert capfd.readouterr().out == long[: long.index(ending, 5)] + "\n"


def test_a_closed_pipe(place: Path) -> None:
    """`icenet ... | head -1`: nothing on stderr."""
    for command in (["schema"], ["generate", "run", "--max-new-tokens", "60", "--overflow", "slide"]):
        process = start_icenet(command, place)
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
        process.stderr.close()
        assert process.wait(60) in (0, 1) and err == ""


def test_an_output_on_a_full_disk(place: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this machine has no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "icenet", "schema"], cwd=place, env=environment(place),
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1 and error_line(done.stderr)


# ---- convert ----------------------------------------------------------------------------------------------


def test_convert_there_and_back(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Run -> MLX -> PyTorch -> canonical folder. Each framework reads its form; the weights are equal bit for bit."""
    mx: Any = pytest.importorskip("mlx.core")
    original = dict(checkpoint.find(here / "run").weights)
    assert main(["convert", "run", "m.safetensors", "--to", "mlx"]) == 0
    out = capfd.readouterr().out
    assert "run/checkpoints/step-00000020: canonical" in out and "m.safetensors: mlx" in out and "float" not in out
    model = api.build("tiny.yaml", backend="mlx")
    model.load_weights("m.safetensors")  # mlx.nn's method, strict
    assert same_bits(model.weights(), original)
    assert set(mx.load("m.safetensors")) == set(original)
    assert main(["convert", "m.safetensors", "t.pt", "--to", "torch", "--config", "tiny.yaml"]) == 0
    theirs = api.build("tiny.yaml", backend="torch")
    theirs.load_state_dict(torch.load("t.pt", weights_only=True))
    assert same_bits(theirs.weights(), original)
    assert main(["convert", "t.pt", "back", "--to", "canonical", "--config", "tiny.yaml"]) == 0
    assert same_bits(weights.read(here / "back"), original)
    capfd.readouterr()
    assert main(["generate", "back", "--seed", "1", "--max-new-tokens", "4"]) == 0  # the folder has a config


def test_convert_keeps_an_existing_config(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "config.yaml").write_text("the: user's own\n")
    assert main(["convert", "run", "mine", "--to", "canonical"]) == 2
    assert is_one_line(error_line(capfd.readouterr().err), "mine/config.yaml", "exists", "--overwrite")
    assert tree(here / "mine").keys() == {"config.yaml"}
    assert (here / "mine" / "config.yaml").read_text() == "the: user's own\n"
    assert main(["convert", "run", "mine", "--to", "canonical", "--overwrite"]) == 0
    assert same_bits(api.load("mine").weights(), dict(checkpoint.find(here / "run").weights))


# ---- info, parity, doctor, schema -------------------------------------------------------------------------


def test_info(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Counted by hand: embedding, one block, the last norm, the output projection."""
    d, v = 32, 257
    by_hand = v * d + (4 * (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d) + 2 * 2 * d) + 2 * d + d * v
    stored = dict(checkpoint.find(here / "run").weights)
    assert by_hand == sum(array.size for array in stored.values())
    for target in ("tiny.yaml", "run", "run/checkpoints/step-00000010"):
        assert main(["info", target, "--json"]) == 0
        report = json.loads(capfd.readouterr().out)
        assert report["num_params"] == by_hand == sum(report["parts"].values())
        assert report["bytes"] == {"fp32": 4 * by_hand, "fp16": 2 * by_hand}
        assert main(["info", target]) == 0
        text = capfd.readouterr().out
        assert f"{by_hand:,}" in text and "num_layers=1" in text
    assert main(["info", "tiny.yaml", "--set", "model.num_layers=3", "--json"]) == 0
    block = 4 * (d * d + d) + 8 * d * d + 5 * d + 4 * d
    assert json.loads(capfd.readouterr().out)["num_params"] == by_hand + 2 * block


def test_info_of_all_presets(here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["info", "--json"]) == 0
    rows = {row["preset"]: row for row in json.loads(capfd.readouterr().out)}
    assert {"quickstart", "transformer-tiny", "transformer-xl"} <= rows.keys()
    assert all(row["fp16_bytes"] == 2 * row["num_params"] for row in rows.values())
    assert rows["transformer-small"]["guide_params"] == 90e6
    assert main(["info"]) == 0
    text = capfd.readouterr().out
    assert all(name in text and f"{row['num_params']:,}" in text for name, row in rows.items())
    assert "…" not in text


def test_parity_of_a_run(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "run", "--steps", "3", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report
    assert main(["parity", "tiny.yaml", "--steps", "1"]) == 0
    assert capfd.readouterr().out.strip()


WORKING_BACKEND = {
    "framework": "a framework",
    "version": "1.0",
    "devices": ["cpu"],
    "default_device": "cpu",
    "chip": None,
    "blas": {"name": "blas", "path": None, "note": "note"},
    "matmul_gflops": {"cpu": 1.0},
    "small_us": {"matrix-vector product": 110.0},
    "decoding_threads": {"of": 2, "chosen": 1},
    "tf32": {"available": False, "used": False},
    "dtypes": "",
}


@pytest.mark.parametrize(("facts", "code"), [(WORKING_BACKEND, 0), ({"error": "broken"}, 1)])
def test_doctor(
    facts: dict[str, Any], code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The exit code is 1 if no backend works. `test_doctor.py` examines the real backends."""
    monkeypatch.setattr(doctor, "backend_facts", lambda name, timeout: facts)
    assert main(["doctor", "--json"]) == code
    report = json.loads(capfd.readouterr().out)
    assert report["ok"] is (code == 0) and report["backends"] == {"mlx": facts, "torch": facts}
    assert main(["doctor"]) == code
    assert ("a framework" in facts.values()) == ("1 GFLOP/s" in capfd.readouterr().out)


def test_schema(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capfd.readouterr().out) == json_schema()


REPLACED: list[tuple[list[str], list[str], list[tuple[str, str]]]] = [
    (
        ["train", "tiny.yaml", "--backend", "mlx", "--device", "cpu"],
        ["backend=torch", "device=gpu"],
        [("backend", "--backend mlx"), ("device", "--device cpu")],
    ),
    (["train", "tiny.yaml"], ["backend=torch", "device=cpu"], []),
    (["quickstart"], ["backend=torch", "device=cpu"], [("backend", "both backends")]),
    (
        ["parity", "tiny.yaml", "--dtype", "bf16"],
        ["training.mixed_precision=fp16", "backend=mlx", "allow_tf32=true"],
        [("backend", "both"), ("allow_tf32", "without TF32"), ("training.mixed_precision", "--dtype bf16")],
    ),
    (["parity", "tiny.yaml"], ["training.mixed_precision=fp16"], []),
    (
        ["bench", "step", "tiny.yaml", "--steps", "9"],
        ["training={schedule: cosine, max_steps: 5}", "backend=mlx", "training.warmup_steps=0"],
        [
            ("backend", "choose one with --backend"),
            ("training.schedule", "training.schedule=constant"),
            ("training.max_steps", "--steps 9"),
        ],
    ),
    (
        ["bench", "memory", "tiny.yaml", "--depth", "1,2", "--device", "cpu"],
        ["model.num_layers=3", "training.mixed_precision=bf16", "device=gpu"],
        [("device", "--device cpu"), ("training.mixed_precision", "fp32,bf16"), ("model.num_layers", "--depth 1,2")],
    ),
]


@pytest.mark.parametrize(("arguments", "overrides", "expected"), REPLACED)
def test_keys_that_an_option_replaces(
    arguments: list[str],
    overrides: list[str],
    expected: list[tuple[str, str]],
    here: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = [part for override in [*overrides, "unknown_key=1"] for part in ("--set", override)]
    assert main([*arguments, *settings]) == 2  # before anything is computed
    found = [message for message in caplog.messages if "has no effect" in message]
    assert len(found) == len(expected)
    for message, (key, replacement) in zip(found, expected, strict=True):
        assert is_one_line(message, f"--set {key}: has no effect", replacement)


def test_an_unexpected_error_is_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("something\nvery odd")

    monkeypatch.setattr(Trainer, "fit", fail)
    arguments = ["train", "tiny.yaml", "--run", "odd"]
    assert main(arguments) == 1
    assert is_one_line(error_line(capfd.readouterr().err), "RuntimeError: something", "ICENET_DEBUG=1")
    monkeypatch.setattr(Trainer, "fit", lambda self: np.empty((1 << 50,), np.float64))
    assert main(arguments) == 1
    assert is_one_line(error_line(capfd.readouterr().err), "out of memory", "training.batch_size")
    monkeypatch.setattr(Trainer, "fit", fail)
    monkeypatch.setenv("ICENET_DEBUG", "1")
    with pytest.raises(RuntimeError):
        main(arguments)
