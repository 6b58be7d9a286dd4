"""The command: every subcommand for real on a tiny model, its help, its JSON, its exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BACKENDS, environment, icenet, losses, same_bits, start_icenet, tiny, tree

import icenet as front_door
from icenet.cli.main import cli, main
from icenet.core.config import Config, json_schema
from icenet.core.training import checkpoint
from icenet.core.training.trainer import Trainer
from icenet.core.weights import files as weights

torch: Any = pytest.importorskip("torch")
pytest.importorskip("mlx")

COMMANDS = list(cli.commands)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, a text and a finished run of 20 steps in MLX."""
    folder = tmp_path_factory.mktemp("cli")
    config = tiny(folder, "generation.max_new_tokens=12", "model.dropout=0")
    (folder / "tiny.yaml").write_text(config.to_yaml())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICENET_CACHE", str(folder / "cache"))
        Trainer.start(config, folder / "run", backend="mlx", quiet=True).fit()
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as the working directory of commands run in this process."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("ICENET_CACHE", str(place / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    return place


# ---- help -------------------------------------------------------------------------------------------------


def test_the_commands_in_order() -> None:
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
    for option in re.findall(r"--[a-z][a-z-]+", "".join(examples)):  # what an example shows is there
        known = text if name else "--help"
        assert option in known.split("Examples:")[0]


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"], ["nonsense"], []])
def test_answers_import_no_framework(arguments: list[str]) -> None:
    program = (
        "import sys; from icenet.cli.main import main; code = main(sys.argv[1:]); "
        "heavy = [n for n in ('mlx.core', 'torch', 'numpy', 'pydantic', 'rich', 'matplotlib', 'yaml') "
        "if n in sys.modules]; "
        "print(code, heavy, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    code = {"nonsense": 2, "": 2}.get("".join(arguments), 0)
    assert done.stderr.splitlines()[-1] == f"{code} []"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert front_door.__version__ in capsys.readouterr().out


def test_examples_of_the_help_parse(here: Path) -> None:
    """Every example is a command that click takes, with arguments that exist."""
    import shlex

    for command in cli.commands.values():
        for line in (command.epilog or "").splitlines():
            words = shlex.split(line.split(" > ")[0])
            if words[:1] != ["icenet"]:
                continue
            subcommand = cli.commands[words[1]]
            with subcommand.make_context(words[1], words[2:]) as context:
                assert context.params is not None


def test_python_m_icenet_is_the_command(place: Path) -> None:
    """The script and the module are one, and what a shell sees as the exit code is that of `main`."""
    assert icenet("--version", folder=place).stdout.startswith("icenet")
    script = Path(sys.executable).with_name("icenet")
    if script.exists():
        done = subprocess.run([script, "trian"], capture_output=True, text=True, check=False, cwd=place)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == icenet("trian", folder=place, code=2).stderr


# ---- train and resume -------------------------------------------------------------------------------------


def test_train_and_resume_on_the_other(place: Path) -> None:
    """A run is begun on one backend, stopped, and `--resume RUN --backend OTHER` is all it takes."""
    options = ["--set", "training.max_steps=6", "--set", "training.checkpoint_every=3"]
    first = icenet("train", "tiny.yaml", "--run", "moved", "--backend", "torch", *options, folder=place)
    assert re.fullmatch(
        r"step 6: loss \d\.\d{4}, validation loss \d\.\d{4}\n"
        r"run +moved\ncheckpoint +moved/checkpoints/step-00000006\nplot +\S+\n",
        first.stdout,
    )
    assert "step 6/6" in first.stderr and "Traceback" not in first.stderr
    second = icenet(
        "train", "--resume", "moved", "--backend", "mlx", "--set", "training.max_steps=9", "--quiet", folder=place
    )
    assert second.stdout.startswith("step 9: loss") and second.stderr == ""
    records = [json.loads(line) for line in (place / "moved" / "metrics.jsonl").read_text().splitlines()]
    assert [r["backend"] for r in records if "loss" in r] == ["torch"] * 6 + ["mlx"] * 3
    assert checkpoint.find(place / "moved").state["backend"] == "mlx"
    assert Config.from_yaml(place / "moved" / "config.yaml").backend == "mlx"


def test_runs_are_named_after_the_config(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "tiny.yaml", "--set", "training.max_steps=1", "--quiet"]
    assert main(arguments) == 0 and main(arguments) == 0
    assert losses(here / "runs" / "tiny") == losses(here / "runs" / "tiny-2")
    assert capsys.readouterr().out.count("step 1: loss") == 2


def test_the_overrides_and_the_seed_count(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


@pytest.mark.parametrize("options", [["--temperature", "0"], ["--seed", "7", "--top-k", "20"]])
def test_generate_on_both(here: Path, options: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    texts = []
    for backend in BACKENDS:
        assert main(["generate", "run", "--prompt", "alpha ", "--backend", backend, *options]) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("alpha ") and texts[0].endswith("\n")
    assert 6 < len(texts[0].encode()) - 1 <= 6 + 3 * 12  # 12 tokens; a broken byte becomes three


def test_generate_is_the_front_door(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """From a run, a checkpoint and a saved model; the same as from Python; a seed is a seed."""
    model = front_door.load(here / "run", backend="mlx")
    text = front_door.generate(model, "if", seed=4, max_new_tokens=9)
    front_door.save(model, here / "saved")
    for source in ("run", "run/checkpoints/step-00000020", "saved"):
        command = ["generate", source, "--prompt", "if", "--max-new-tokens", "9", "--backend", "mlx"]
        assert main([*command, "--seed", "4"]) == 0
        assert capfd.readouterr().out == f"if{text}\n"
        assert main([*command, "--seed", "5"]) == 0
        assert capfd.readouterr().out != f"if{text}\n"


def test_the_prompt_from_a_file_and_from_standard_input(place: Path) -> None:
    (place / "prompt.txt").write_text("größe ", encoding="utf-8")
    options = ["--seed", "1", "--max-new-tokens", "5"]
    by_option = icenet("generate", "run", "--prompt", "größe ", *options, folder=place)
    by_file = icenet("generate", "run", "--prompt-file", "prompt.txt", *options, folder=place)
    piped = subprocess.run(
        [sys.executable, "-m", "icenet", "generate", "run", "--prompt-file", "-", *options],
        cwd=place, env=environment(place), input="größe ", capture_output=True, encoding="utf-8", check=True,
    )  # fmt: skip
    assert by_option.stdout == by_file.stdout == piped.stdout
    assert by_option.stdout.startswith("größe ") and by_option.stderr == ""


def test_stop_and_slide(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["generate", "run", "--prompt", "alpha", "--seed", "2"]
    assert main([*options, "--max-new-tokens", "100", "--overflow", "slide"]) == 0
    long = capfd.readouterr().out
    assert len(long.encode()) >= 100
    ending = long[9:11]
    assert main([*options, "--max-new-tokens", "100", "--overflow", "slide", "--stop", ending]) == 0
    assert capfd.readouterr().out == long[: long.index(ending, 5)] + "\n"


def test_a_reader_that_goes_away(place: Path) -> None:
    """`icenet ... | head -1`: no traceback, no word."""
    for command in (["info", "--json"], ["generate", "run", "--max-new-tokens", "500", "--overflow", "slide"]):
        process = start_icenet(command, place)
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
        process.stderr.close()
        assert process.wait(60) in (0, 1) and err == ""


def test_an_output_on_a_full_disk(place: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "icenet", "info", "tiny.yaml"], cwd=place, env=environment(place),
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("icenet: ") and done.stderr.count("\n") == 1


# ---- convert ----------------------------------------------------------------------------------------------


def test_convert_around(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """run -> MLX -> PyTorch -> canonical folder: the frameworks read each, and the weights come back bit for bit."""
    mx: Any = pytest.importorskip("mlx.core")
    original = dict(checkpoint.find(here / "run").weights)
    assert main(["convert", "run", "m.safetensors", "--to", "mlx"]) == 0
    out = capfd.readouterr().out
    assert "run/checkpoints/step-00000020: canonical" in out and "m.safetensors: mlx" in out and "float" not in out
    model = front_door.build("tiny.yaml", backend="mlx")
    model.load_weights("m.safetensors")  # mlx.nn's own, strict
    assert same_bits(model.weights(), original)
    assert set(mx.load("m.safetensors")) == set(original)
    assert main(["convert", "m.safetensors", "t.pt", "--to", "torch", "--config", "tiny.yaml"]) == 0
    theirs = front_door.build("tiny.yaml", backend="torch")
    theirs.load_state_dict(torch.load("t.pt", weights_only=True))
    assert same_bits(theirs.weights(), original)
    assert main(["convert", "t.pt", "back", "--to", "canonical", "--config", "tiny.yaml"]) == 0
    assert same_bits(weights.read(here / "back"), original)
    capfd.readouterr()
    assert main(["generate", "back", "--seed", "1", "--max-new-tokens", "4"]) == 0  # a config lies beside them


def test_convert_keeps_a_config_that_is_there(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "config.yaml").write_text("the: user's own\n")
    assert main(["convert", "run", "mine", "--to", "canonical"]) == 2
    assert capfd.readouterr().err == (
        "icenet: mine/config.yaml: exists; name another destination, or give --overwrite to replace it\n"
    )
    assert tree(here / "mine").keys() == {"config.yaml"}
    assert (here / "mine" / "config.yaml").read_text() == "the: user's own\n"
    assert main(["convert", "run", "mine", "--to", "canonical", "--overwrite"]) == 0
    assert same_bits(front_door.load("mine").weights(), dict(checkpoint.find(here / "run").weights))


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


def test_info_of_all_presets(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    rows = {row["preset"]: row for row in json.loads(capfd.readouterr().out)}
    assert {"quickstart", "transformer-tiny", "transformer-xl"} <= rows.keys()
    assert all(row["fp16_bytes"] == 2 * row["num_params"] for row in rows.values())
    assert rows["transformer-small"]["guide_params"] == 90e6
    assert main(["info"]) == 0
    text = capfd.readouterr().out
    assert all(f"{row['num_params']:,}" in text for row in rows.values())


def test_parity_of_a_run(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "run", "--steps", "3", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report
    assert main(["parity", "tiny.yaml"]) == 0
    assert capfd.readouterr().out.strip()


def test_doctor(place: Path) -> None:
    result = icenet("doctor", "--json", folder=place, code=None)
    report = json.loads(result.stdout)
    assert result.returncode == (0 if report["ok"] else 1)
    assert icenet("doctor", folder=place, code=result.returncode).stdout.strip()


def test_schema(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capfd.readouterr().out) == json_schema()


def test_an_unforeseen_error_is_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def explode(*_: object, **__: object) -> None:
        raise RuntimeError("something\nvery odd")

    monkeypatch.setattr(Trainer, "fit", explode)
    arguments = ["train", "tiny.yaml", "--run", "odd"]
    assert main(arguments) == 1
    assert capfd.readouterr().err == "icenet: RuntimeError: something; ICENET_DEBUG=1 shows where\n"
    monkeypatch.setattr(Trainer, "fit", lambda self: np.empty((1 << 50,), np.float64))
    assert main(arguments) == 1
    err = capfd.readouterr().err
    assert err.startswith("icenet: out of memory (") and "lower training.batch_size" in err and err.count("\n") == 1
    monkeypatch.setattr(Trainer, "fit", explode)
    monkeypatch.setenv("ICENET_DEBUG", "1")
    with pytest.raises(RuntimeError):
        main(arguments)
