"""`icenet parity` for modules that files define: modules, record and check, their output, exit codes and errors."""

from __future__ import annotations

import json
import pickle
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import error_line, is_one_line

from icenet.cli.main import main
from icenet.parity.recordings import recording

pytest.importorskip("icenet.models")  # chooses the BLAS before mlx is imported
torch: Any = pytest.importorskip("torch")

USAGE, FAILURE = 2, 1

REFERENCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())

class Wide(nn.Module):
    def __init__(self, width):
        super().__init__()

class Broken(Net):
    def forward(self, x):
        return missing

net = Net()
number = 7

def make():
    return [1, 2]

def fails():
    raise OSError("no license")
"""

MINE = """
import icenet.blas
import mlx.core as mx
import mlx.nn as nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 2)

    def __call__(self, x):
        return self.fc2(nn.relu(self.fc1(x)))

class Leaky(Net):
    def __call__(self, x):
        return self.fc2(nn.leaky_relu(self.fc1(x)))

class Renamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 5), nn.Linear(5, 2)

    def __call__(self, x):
        return self.leave(nn.relu(self.enter(x)))
"""


class Hostile:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return open, ("PWNED", "w")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with modules, inputs, weights and a trace, and with what is none of them."""
    folder = tmp_path_factory.mktemp("parity")
    (folder / "ref.py").write_text(REFERENCE)
    (folder / "mine.py").write_text(MINE)
    (folder / "syntax.py").write_text("def\n")
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    np.savez(folder / "x.npz", x)
    np.savez(folder / "named.npz", x=x)
    np.savez(folder / "wrong_name.npz", y=x)
    np.savez(folder / "wrong_shape.npz", np.ones((3, 7), np.float32))
    np.savez(folder / "objects.npz", np.array([Hostile()], dtype=object))
    np.savez(folder / "strings.npz", x=x, texts=np.array(["a", "b"]))
    np.savez(folder / "nothing.npz")
    (folder / "pickled.npz").write_bytes(pickle.dumps(Hostile()))
    (folder / "text.npz").write_text("1, 2, 3")
    (folder / "short.npz").write_bytes((folder / "x.npz").read_bytes()[:100])
    names: dict[str, Any] = {"__name__": "ref"}
    exec(REFERENCE, names)
    from safetensors.torch import save_file

    state = names["net"].state_dict()
    save_file(state, folder / "w.safetensors")
    save_file({"fc1.weight": torch.ones(9, 9), "other": torch.ones(1)}, folder / "others.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(recording, "SAMPLES", 1)
        assert main(shlex.split("parity record ref.py:net --input x.npz --out trace")) == 0
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the same folder, as the working directory of this process."""
    monkeypatch.chdir(place)
    return place


# ---- results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "parity mine.py:Net ref.py:net --input x.npz --weights w.safetensors",
        "parity modules mine.py:Net ref.py:Net --input named.npz --copy-weights --stages forward,gradients",
        "parity mine.py:Net ref.py:Net --copy-weights --seed 3 --stages forward",
        "parity mine.py:Renamed ref.py:Net --rename enter=fc1 --rename leave=fc2 --copy-weights --stages forward",
        "parity mine.py:Renamed ref.py:net --rename enter=fc1 --rename leave=fc2 --weights w.safetensors",
        "parity check mine.py:Net trace --weights w.safetensors",
        "parity check mine.py:Net trace --copy-weights --stages forward",
        "parity check mine.py:Renamed trace --rename enter=fc1 --rename leave=fc2 --copy-weights",
    ],
)
def test_equal_modules(here: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out.startswith("passed: ")


@pytest.mark.parametrize("reference", ["ref.py:net --input x.npz", "trace"])
def test_a_difference_is_exit_code_1(here: Path, reference: str, capsys: pytest.CaptureFixture[str]) -> None:
    form = "check" if reference == "trace" else "modules"
    command = f"parity {form} mine.py:Leaky {reference} --weights w.safetensors --html page.html"
    assert main(shlex.split(command)) == FAILURE
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("differs in the model (Leaky) itself, between fc1 and fc2; input of fc2 is off by ")
    assert rest[-1] == "page: page.html"
    page = Path("page.html").read_text(encoding="utf-8")
    assert "between fc1 and fc2" in page and "<script src" not in page
    assert main([*shlex.split(command), "--json"]) == FAILURE
    report = json.loads(capsys.readouterr().out)
    assert report["culprit"] == "" and report["passed"] is False and report["verdict"] == first


def test_the_smallest_input_is_saved(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "parity mine.py:Leaky ref.py:net --input x.npz --weights w.safetensors --stages forward"
    assert main([*shlex.split(command), "--replay", "small.npz"]) == FAILURE
    verdict = capsys.readouterr().out.splitlines()[0].partition(";")[0]
    assert np.load("small.npz")["arr_0"].shape[0] == 1
    assert main(shlex.split(command.replace("x.npz", "small.npz"))) == FAILURE
    assert capsys.readouterr().out.startswith(verdict)


# ---- errors -------------------------------------------------------------------------------------------------

ERRORS = [
    ("parity absent.py:Net ref.py:Net", USAGE, ["absent.py"]),
    ("parity syntax.py:Net ref.py:Net", USAGE, ["syntax.py"]),
    ("parity mine.py:Nett ref.py:Net", USAGE, ["mine.py", "'Nett'"]),
    ("parity mine.py:Net ref.py:Wide", USAGE, ["ref.py:Wide", "without arguments", "width"]),
    ("parity mine.py:Net ref.py:fails", USAGE, ["ref.py:fails", "no license", "ref.py, line"]),
    ("parity mine.py:Net ref.py:number", USAGE, ["module"]),
    ("parity mine.py:Net ref.py:make", USAGE, ["module"]),
    ("parity mine.py:Net ref.py:Broken --input x.npz --copy-weights", USAGE, ["Broken", "missing"]),
    ("parity mine.py:Net", USAGE, ["REFERENCE"]),
    ("parity mine.py:Net ref.py:Net --input absent.npz", USAGE, ["absent.npz"]),
    ("parity mine.py:Net ref.py:Net --input text.npz", USAGE, ["text.npz", "no .npz file"]),
    ("parity mine.py:Net ref.py:Net --input short.npz", USAGE, ["short.npz", "no .npz file"]),
    ("parity mine.py:Net ref.py:Net --input pickled.npz", USAGE, ["pickled.npz", "no .npz file"]),
    ("parity mine.py:Net ref.py:Net --input objects.npz", USAGE, ["objects.npz"]),
    ("parity mine.py:Net ref.py:Net --input strings.npz", USAGE, ["strings.npz: texts", "not of numbers"]),
    ("parity mine.py:Net ref.py:Net --input nothing.npz", USAGE, ["nothing.npz", "no arrays"]),
    ("parity mine.py:Net ref.py:Net --input wrong_shape.npz --copy-weights", USAGE, ["fails on the inputs", "fc1"]),
    ("parity mine.py:Net ref.py:Net --input wrong_name.npz --copy-weights", USAGE, ["'y'"]),
    ("parity mine.py:Net ref.py:Net --weights absent.safetensors", USAGE, ["absent.safetensors"]),
    ("parity mine.py:Net ref.py:Net --weights text.npz", FAILURE, ["text.npz"]),
    (
        "parity mine.py:Net ref.py:Net --weights others.safetensors",
        FAILURE,
        ["others.safetensors: there", "fc1.weight"],
    ),
    ("parity mine.py:Net ref.py:Net --rename enter", USAGE, ["'enter'", "A=B"]),
    ("parity mine.py:Net ref.py:Net --rename enter=fc1", USAGE, ["rename", "'enter'"]),
    ("parity mine.py:Net ref.py:Net --stages forwards", USAGE, ["'forwards'", "forward"]),
    ("parity mine.py:Net ref.py:Net --dtype fp8", USAGE, ["'fp8'", "bf16"]),
    ("parity record ref.py:Net", USAGE, ["--out"]),
    ("parity record ref.py:Net --out . --input x.npz", USAGE, ["other files"]),
    ("parity record ref.py:make --out new --input x.npz", USAGE, ["module"]),
    ("parity record ref.py:Broken --out new --input x.npz", USAGE, ["Broken", "missing"]),
    (
        "parity record ref.py:Net --out x.npz/trace --input x.npz",
        FAILURE,
        ["x.npz is not a folder", "cannot be written"],
    ),
    ("parity check mine.py:Net absent", USAGE, ["absent", "icenet parity record"]),
    ("parity check mine.py:Net .", USAGE, ["not a trace"]),
    ("parity check mine.py:Net trace --input x.npz", USAGE, ["--input"]),
]


@pytest.mark.parametrize(("command", "code", "words"), ERRORS, ids=[case[0] for case in ERRORS])
def test_errors(here: Path, command: str, code: int, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(command)) == code
    captured = capsys.readouterr()
    assert captured.out == "" and is_one_line(error_line(captured.err), *words), captured.err
    assert not (here / "PWNED").exists()


@pytest.mark.parametrize("page", ["mine.py/page.html", "mine.py"])
def test_a_page_that_cannot_be_written_stops_before_the_comparison(
    here: Path, page: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.py").write_text("raise RuntimeError('the file was run')")
    assert main(["parity", "mine.py:Net", "mine.py:Net", "--html", page]) == 2
    assert is_one_line(capsys.readouterr().err.strip(), "mine.py", "choose another")
    assert Path("mine.py").read_text() == "raise RuntimeError('the file was run')"
