"""A Python file that only a checkpoint names is not run without --trust-code."""

from __future__ import annotations

import itertools
import py_compile
import shutil
from pathlib import Path

import icenet.blas

import numpy as np
import pytest
import yaml
from custom_models import ONLY, SETTINGS, TEXT, failure
from helpers import BACKENDS, is_one_line, losses, start_python, train, tree

import icenet as front_door
from icenet.cli.main import main
from icenet.core.config import Config, custom
from icenet.core.errors import IceNetError, UsageError
from icenet.core.runs import checkpoint

pytest.importorskip("mlx.core")
pytest.importorskip("torch")


# ---- trust ------------------------------------------------------------------------------------------------


_numbers = itertools.count()


def evil(marker: Path) -> str:
    """Returns code that writes a mark. A process runs a text once, and tests may have a folder of the same name."""
    return f"from pathlib import Path  # {next(_numbers)}\nPath(r'{marker}').write_text('run')\n"


@pytest.fixture
def trap(here: Path) -> Path:
    """Runs, a checkpoint and a saved model from elsewhere. Their Python files write a mark when they are run."""
    for name, model in (("my.yaml", "run"), ("images.yaml", "pictures")):
        train(Config.from_yaml(name), here / model, "torch", until=2)
    front_door.save(front_door.build("my.yaml", "torch"), here / "saved")
    for name in ("my_models.py", "my_models_torch.py"):
        (here / name).write_text(evil(here / "MARK") + TEXT[name])
    custom._trusted.clear()
    return here


NEWEST = "run/checkpoints/step-00000002"

COMMANDS = {
    "resume": "train --resume run",
    "resume a checkpoint": f"train --resume {NEWEST} --run other",
    "resume elsewhere": "train --resume run --backend mlx --set seed=3",
    "generate": "generate run --prompt x --max-new-tokens 1",
    "generate a checkpoint": f"generate {NEWEST} --prompt x --backend mlx",
    "generate a saved model": "generate saved --prompt x --max-new-tokens 1",
    "predict": "predict pictures picture.png",
    "convert": "convert run x.safetensors --to mlx",
    "convert a checkpoint": f"convert {NEWEST} x.safetensors --to mlx",
    "convert a saved model": "convert saved/model.safetensors y.pt --to torch",
    "convert to a folder": "convert saved folder --to canonical",
    "info": "info run",
    "info of a checkpoint": f"info {NEWEST}",
    "info of a saved model": "info saved",
    "parity": "parity run",
    "parity of a checkpoint": f"parity {NEWEST}",
    "parity of a saved model": "parity saved",
}


def picture(folder: Path) -> None:
    from PIL import Image

    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "picture.png")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_does_not_run_the_file_of_a_checkpoint(
    name: str, trap: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    picture(trap)
    before = tree(trap)
    line = failure(COMMANDS[name].split(), capfd)
    assert "--trust-code" in line and "my_models.py" in line
    assert not (trap / "MARK").exists()
    assert tree(trap) == before


def test_with_trust_code_the_commands_run(trap: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With the same files, so the errors above are due to the missing flag."""
    picture(trap)
    for name in ("resume", "generate", "predict", "convert", "info of a saved model", "convert to a folder"):
        mark = trap / "MARK"
        mark.unlink(missing_ok=True)
        # a file is run once per process: write another version
        for file in ("my_models.py", "my_models_torch.py"):
            (trap / file).write_text((trap / file).read_text() + f"# {name}\n")
        quick = ["--quiet"] if name == "resume" else []
        assert main([*COMMANDS[name].split(), *quick, "--trust-code"]) == 0, (name, capfd.readouterr().err)
        assert mark.exists(), name


def test_the_flag_is_for_one_command(trap: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A program may call `main` more than once."""
    assert main([*COMMANDS["info"].split(), "--trust-code"]) == 0
    assert "--trust-code" in failure(COMMANDS["info"].split(), capfd)
    failure(["info", "nowhere", "--trust-code"], capfd)
    assert "--trust-code" in failure(COMMANDS["info"].split(), capfd)


@pytest.mark.parametrize("place", ["run", NEWEST, "saved"])
def test_load_needs_trust_code(place: str, trap: Path) -> None:
    with pytest.raises(UsageError, match="--trust-code"):
        front_door.load(place)
    with pytest.raises(UsageError, match="--trust-code"):
        front_door.generate(place, "x")
    assert not (trap / "MARK").exists()
    assert front_door.load(place, "torch", trust_code=True).num_params > 0
    assert (trap / "MARK").exists()


def test_trust_of_one_file_is_not_trust_of_another(trap: Path) -> None:
    front_door.load("run", "torch", trust_code=True)
    (trap / "MARK").unlink()
    (trap / "far").mkdir()
    shutil.copy(trap / "my_models_torch.py", trap / "far" / "my_models.py")
    text = (trap / "saved" / "config.yaml").read_text()
    (trap / "saved" / "config.yaml").write_text(text.replace("my_models.py:", "far/my_models.py:"))
    with pytest.raises(UsageError, match="--trust-code"):
        front_door.load("saved", "torch")
    assert not (trap / "MARK").exists()


@pytest.mark.parametrize("begun", ["metrics.jsonl", ".lock"])
def test_a_run_without_a_checkpoint_needs_trust_code(
    begun: str, trap: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run that was killed before its first checkpoint starts again from its config.yaml."""
    folder = trap / "sent"
    folder.mkdir()
    shutil.copy(trap / "run" / "config.yaml", folder)
    (folder / begun).touch()
    for model in ("my_models.py:CustomModel", str(trap / "my_models.py") + ":CustomModel"):
        text = yaml.safe_load((folder / "config.yaml").read_text())
        text["model"]["type"] = model
        (folder / "config.yaml").write_text(yaml.safe_dump(text))
        line = failure(["train", "--resume", str(folder), "--backend", "torch"], capfd)
        assert "--trust-code" in line
        assert not (trap / "MARK").exists()


@pytest.mark.parametrize("way", ["absolute", "parent", "next to it", "inside", "dots", "symlink"])
def test_paths_in_the_config_of_a_checkpoint(way: str, trap: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saved = trap / "saved"
    away = trap / "away"
    away.mkdir()
    (away / "x.py").write_text(evil(trap / "MARK") + TEXT["my_models_torch.py"])
    shutil.copy(away / "x.py", saved / "x.py")
    if way == "symlink":
        (trap / "link.py").symlink_to(away / "x.py")
    file = {
        "absolute": str(away / "x.py"),
        "parent": "../away/x.py",  # from the folder of the config
        "next to it": "x.py",
        "inside": "saved/x.py",
        "dots": "./away/../away/./x.py",
        "symlink": "link.py",
    }[way]
    values = yaml.safe_load((saved / "config.yaml").read_text())
    values["model"]["type"] = f"{file}:CustomModel"
    (saved / "config.yaml").write_text(yaml.safe_dump(values))
    for command in ("generate saved --prompt x", "info saved", "convert saved/model.safetensors z.pt --to torch"):
        assert "--trust-code" in failure(command.split(), capfd)
    with pytest.raises(IceNetError, match="--trust-code"):
        front_door.load("saved")
    assert not (trap / "MARK").exists()
    assert front_door.load("saved", "torch", trust_code=True).num_params > 0
    assert (trap / "MARK").exists()


def test_another_config_does_not_grant_trust(trap: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither `--config` of a built-in model nor overrides run the checkpoint's file."""
    assert "--trust-code" in failure(["info", "run", "--set", "model.hidden_size=8"], capfd)
    assert main(["convert", "run", "x.pt", "--to", "torch", "--config", "transformer-tiny"]) in (1, 2)
    assert not (trap / "MARK").exists()


def test_compiled_files_are_not_run(here: Path) -> None:
    """A compiled file next to a harmless source file, which Python would load without a check."""
    from importlib.util import cache_from_source

    (here / "helper.py").touch()
    (here / "one_torch.py").write_text("import helper\n" + TEXT["one_torch.py"])
    file, never = here / "evil.py", py_compile.PycInvalidationMode.UNCHECKED_HASH
    for name in ("one_torch.py", "helper.py"):
        file.write_text(evil(here / "MARK") + (here / name).read_text())
        cached = cache_from_source(str(here / name))
        py_compile.compile(str(file), cfile=cached, dfile=str(here / name), invalidation_mode=never)
    front_door.build(Config.from_dict({**SETTINGS, "model": {**ONLY, "type": "one_torch.py:Only"}}), "torch")
    assert not (here / "MARK").exists()


def test_reading_a_config_does_not_run_the_file(trap: Path) -> None:
    Config.from_yaml("my.yaml").checked().to_yaml()
    checkpoint.find(trap / "run")
    assert not (trap / "MARK").exists()


# ---- paths and processes ----------------------------------------------------------------------------------


def test_a_file_next_to_the_yaml_from_another_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    config = Config.from_yaml("../my.yaml", [f"data.source={here / 'text.txt'}"])
    assert custom.split(config.model.type)[0].resolve() == here / "my_models.py"
    for backend in BACKENDS:
        assert front_door.build(config, backend, "cpu").backend == backend
    train(config, here / "run", "torch", until=2)
    assert front_door.load(here / "run", "mlx", trust_code=True).num_params > 0


def test_the_working_folder_comes_first(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (here / "work").mkdir()
    shutil.copy(here / "one_torch.py", here / "work" / "my_models.py")
    monkeypatch.chdir(here / "work")
    assert custom.resolve("my_models.py:X", here) == "my_models.py:X"
    assert custom.resolve("my_models_torch.py:X", here) == "../my_models_torch.py:X"
    assert custom.resolve(f"{here}/one_mlx.py:X", here) == f"{here}/one_mlx.py:X"
    assert [is_one_line(m, "my_models.py", "../my_models.py:X") for m in caplog.messages] == [True]
    monkeypatch.chdir(here)
    assert custom.resolve("my_models.py:X", here) == "my_models.py:X" and len(caplog.messages) == 1


def test_the_documented_commands(here: Path, no_plots: None) -> None:
    """Train, fail without trust, resume with trust on the other backend, the last two in a new process."""
    short = ["--set", "training.max_steps=4", "--set", "training.checkpoint_every=2", "--quiet"]
    assert main(["train", "my.yaml", "--run", "runs/mine", "--backend", "torch", *short]) == 0
    program = """
    import os, shlex, sys
    from icenet.cli.main import main
    os.chdir(sys.argv[1])
    print([main(shlex.split(line)) for line in sys.argv[2:]])
    """
    refused = 'generate runs/mine --prompt "def "'
    resumed = "train --resume runs/mine --backend mlx --trust-code --quiet --set training.max_steps=6"
    process = start_python(program, here, refused, resumed, blocked=["matplotlib"])
    out, err = process.communicate(timeout=120)
    assert out.startswith("step 6: loss") and out.splitlines()[-1] in ("[1, 0]", "[2, 0]") and "--trust-code" in err
    assert len(losses(here / "runs/mine")) == 6
