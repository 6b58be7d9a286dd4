"""Wrong commands, options, configs, files and runs: one line that names the cause, the exit code, no side effects."""

from __future__ import annotations

import importlib.util
import os
import pickle
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import error_line, icenet, is_one_line, start_icenet, tiny, train, tree

from icenet.cli.main import main

torch: Any = pytest.importorskip("torch")
pytest.importorskip("icenet.models")  # chooses the BLAS before mlx is imported
mx: Any = pytest.importorskip("mlx.core")

USAGE, FAILURE = 2, 1


class Hostile:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return (os.system, ("touch PWNED",))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a good config, text and run, and with damaged or misleading files."""
    folder = tmp_path_factory.mktemp("bad")
    config = tiny(folder, "data.source=text.txt", "training.keep_checkpoints=2")
    text = config.to_yaml()
    (folder / "tiny.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ICENET_CACHE", str(folder / "cache"))
        train(config, folder / "run", "mlx")
        pickle.dump(Hostile(), (folder / "hostile.pt").open("wb"))
        pickle.dump({"a": Hostile()}, (folder / "hostile.bin").open("wb"))
        torch.save({"a": Hostile()}, folder / "hostile.pth")
    (folder / "unknown.yaml").write_text(text.replace("\nseed:", "\nsede:"))
    (folder / "type.yaml").write_text(text.replace("max_steps: 20", "max_steps: many"))
    (folder / "tabs.yaml").write_text("model:\n\ttype: transformer\n")
    (folder / "list.yaml").write_text("- one\n- two\n")
    (folder / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    (folder / "empty.yaml").write_text("")
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    (folder / "short.txt").write_text("too short")
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(b"\x00\xff" * 999)
    (folder / "folder").mkdir()
    for name, other in (("loop", "pool"), ("pool", "loop")):
        (folder / name).symlink_to(other)
    shutil.copytree(folder / "run", folder / "damaged")
    for path in (folder / "damaged" / "checkpoints").iterdir():
        (path / "model.safetensors").write_bytes(b"x")
    weights = folder / "run" / "checkpoints" / "step-00000020" / "model.safetensors"
    shutil.copy(weights, folder / "good.safetensors")
    (folder / "cut.safetensors").write_bytes(weights.read_bytes()[:-100])
    (folder / "text.safetensors").write_text("this is a text and holds no tensors")
    return folder


# the arguments, the exit code, and what the message names: the cause and the way out
TABLE: list[tuple[str, int, list[str]]] = [
    # the command
    ("trian tiny.yaml", USAGE, ["'trian'", "did you mean train?", "(see icenet --help)"]),
    ("frobnicate", USAGE, ["'frobnicate'", "quickstart, train, ", "(see icenet --help)"]),
    ("--nope", USAGE, ["--nope", "(see icenet --help)"]),
    ("train tiny.yaml --nope", USAGE, ["--nope", "(see icenet train --help)"]),
    ("train tiny.yaml tiny.yaml", USAGE, ["(tiny.yaml)", "(see icenet train --help)"]),
    ("doctor extra", USAGE, ["(extra)", "(see icenet doctor --help)"]),
    ("generate", USAGE, ["'MODEL'", "(see icenet generate --help)"]),
    ("train", USAGE, ["CONFIG", "--resume"]),
    ("train tiny.yaml --resume run", USAGE, ["CONFIG", "--resume"]),
    ("train tiny.yaml --backend jax", USAGE, ["--backend", "'jax'", "'auto', 'mlx', 'torch'"]),
    # the config
    ("train missing.yaml", USAGE, ["missing.yaml", "quickstart", "transformer-tiny"]),
    ("train transfomer-tiny", USAGE, ["transfomer-tiny", "did you mean transformer-tiny?"]),
    ("train folder", USAGE, ["folder", "YAML file", "preset"]),
    ("train unknown.yaml", USAGE, ["unknown.yaml:", "sede", "did you mean seed?"]),
    ("train type.yaml", USAGE, ["type.yaml:", "training.max_steps", "an integer", "'many'"]),
    ("train tabs.yaml", USAGE, ["tabs.yaml:2", "YAML"]),
    ("train list.yaml", USAGE, ["list.yaml", "model:", "training:"]),
    ("train twice.yaml", USAGE, ["twice.yaml:2", "seed"]),
    ("train empty.yaml", USAGE, ["empty.yaml", "model", "required"]),
    ("train binary.yaml", USAGE, ["binary.yaml", "UTF-8"]),
    ("train tiny.yaml --set training.max_step=3", USAGE, ["--set training.max_step", "did you mean max_steps?"]),
    ("train tiny.yaml --set max_steps", USAGE, ["--set max_steps", "key=value"]),
    ("train tiny.yaml --set training.max_steps=abc", USAGE, ["--set training.max_steps", "an integer", "'abc'"]),
    ("train tiny.yaml --set training.max_steps=0", USAGE, ["--set training.max_steps", "1", "not 0"]),
    ("train tiny.yaml --set training.learning_rate=.nan", USAGE, ["--set training.learning_rate", "not nan"]),
    ("train tiny.yaml --set training=3", USAGE, ["--set training", "not 3"]),
    ("train tiny.yaml --set model.activation=[", USAGE, ["--set model.activation: must be", "not '['"]),
    ("train tiny.yaml --set data.kind=imags", USAGE, ["--set data.kind", "'imags'", "did you mean images?"]),
    ("train tiny.yaml --set model.hidden_size=99999999999999999999", USAGE, ["--set model.hidden_size", "less"]),
    ("train tiny.yaml --set model.num_heads=5", USAGE, ["--set model", "hidden_size 32", "num_heads 5"]),
    ("train tiny.yaml --set model.type=transfromer", USAGE,
     ["--set model.type", "'transfromer'", "did you mean transformer?"]),
    ("train tiny.yaml --set data.seq_length=64", USAGE,
     ["--set data.seq_length", "64", "model.max_seq_length", "32"]),
    ("train tiny.yaml --set model.vocab_size=100", USAGE, ["model.vocab_size", "100", "257", "bytes"]),
    # devices
    ("train tiny.yaml --device banana", USAGE, ["device", "auto, cpu, gpu", "cuda:N", "'banana'"]),
    ("generate run --device cuda:x", USAGE, ["device", "auto", "'cuda:x'"]),
    ("train tiny.yaml --backend mlx --device mps", FAILURE, ["mps", "--device gpu", "--backend torch"]),
    # data
    ("train tiny.yaml --set data.source=txet.txt", USAGE,
     ["data.source", "'txet.txt'", "did you mean 'text.txt'?"]),
    ("train tiny.yaml --set data.source=short.txt", USAGE, ["short.txt", "0 tokens", "validation", "data.source"]),
    ("train tiny.yaml --set data.source=short.txt --set data.validation_fraction=0", USAGE,
     ["short.txt", "9 ", "160", "data.source"]),
    ("train tiny.yaml --set data.source=empty.txt", USAGE, ["data.source", "empty.txt"]),
    ("train tiny.yaml --set data.source=binary.txt", USAGE, ["data.source", "binary.txt", "UTF-8"]),
    ("train tiny.yaml --set data.source=folder", USAGE, ["data.source", "'folder'", "folder without files"]),
    ("train tiny.yaml --set data.source=https://host/x.txt", USAGE, ["data.source", "URL", "download"]),
    ("eval run --text txet.txt", USAGE, ["--text 'txet.txt'", "did you mean 'text.txt'?"]),
    ("eval run --text binary.txt", USAGE, ["--text: binary.txt", "UTF-8"]),
    # runs
    ("train tiny.yaml --run run", USAGE, ["run: ", "--resume run", "another --run"]),
    ("train tiny.yaml --run text.txt", USAGE, ["text.txt", "not a folder", "another --run"]),
    ("train tiny.yaml --run text.txt/below", USAGE, ["text.txt/below", "cannot be written", "another --run"]),
    ("train --resume nothing", USAGE, ["nothing", "no such run or checkpoint"]),
    ("train --resume folder", USAGE, ["folder", "no checkpoint"]),
    ("train --resume text.txt", USAGE, ["text.txt", "no checkpoint"]),
    ("train --resume run", USAGE, ["run: ", "complete at step 20", "--set training.max_steps=40"]),
    ("train --resume damaged", FAILURE, ["damaged/checkpoints/", "model.safetensors", "cut short", "--resume"]),
    ("train --resume run/checkpoints/step-00000015", USAGE,
     ["run/checkpoints/step-00000015", "step-00000020", "resume run"]),
    ("train --resume run --run damaged --set training.max_steps=40", USAGE, ["damaged: ", "a run already"]),
    ("train --resume run --set training.max_steps=40 --set model.hidden_size=64", FAILURE, ["config"]),
    # generation
    ("generate nothing", USAGE, ["nothing: no such file or folder", "a run, a checkpoint", "Hugging Face"]),
    ("generate folder", USAGE, ["folder", "no checkpoint"]),
    ("generate damaged", FAILURE, ["damaged: ", "2 checkpoints"]),
    ("generate good.safetensors", FAILURE, ["good.safetensors", "config", "icenet convert"]),
    ("generate tiny.yaml", USAGE, ["tiny.yaml", "a run, a checkpoint, a saved model"]),
    ("generate run --max-new-tokens 500", USAGE, ["500", "model.max_seq_length 32", "slide"]),
    ("generate run --prompt 'this is a prompt of more than 32 tokens'", USAGE, ["39", "model.max_seq_length 32"]),
    ("generate run --max-length 3 --prompt alpha", USAGE, ["max_length 3", "5 tokens", "max_new_tokens"]),
    ("generate run --max-new-tokens 0", USAGE, ["generation.max_new_tokens", "1", "not 0"]),
    ("generate run --max-new-tokens ten", USAGE, ["'--max-new-tokens'", "'ten'"]),
    ("generate run --temperature -1", USAGE, ["generation.temperature", "0", "not -1.0"]),
    ("generate run --temperature nan", USAGE, ["generation.temperature", "not nan"]),
    ("generate run --top-p 2", USAGE, ["generation.top_p", "1", "not 2.0"]),
    ("generate run --top-k -1", USAGE, ["generation.top_k", "0", "not -1"]),
    ("generate run --repetition-penalty 0", USAGE, ["generation.repetition_penalty", "0", "not 0.0"]),
    ("generate run --stop ''", USAGE, ["stop", "empty"]),
    ("generate run --prompt-file nothing", USAGE, ["nothing", "No such file"]),
    ("generate run --prompt-file binary.txt", USAGE, ["binary.txt", "UTF-8"]),
    ("generate run --prompt-file folder", USAGE, ["folder", "Is a directory"]),
    ("generate run --prompt a --prompt-file text.txt", USAGE, ["--prompt", "--prompt-file"]),
    # conversion
    ("convert good.safetensors out.safetensors", USAGE, ["'--to'", "canonical", "mlx", "torch"]),
    ("convert good.safetensors text.txt --to canonical", USAGE, ["text.txt", ".txt"]),
    ("convert good.safetensors good.safetensors --to canonical", USAGE, ["good.safetensors", "another destination"]),
    ("convert good.safetensors cut.safetensors --to canonical", USAGE,
     ["cut.safetensors", "exists", "another name", "--overwrite"]),
    ("convert good.safetensors run/checkpoints/step-00000020 --to canonical", USAGE,
     ["run/checkpoints/step-00000020/model.safetensors", "exists"]),
    ("convert good.safetensors out.safetensors --to mlx", USAGE, ["good.safetensors", "mlx", "kinds", "--config"]),
    ("convert good.safetensors out.pt --to mlx --config tiny.yaml", USAGE, ["out.pt", "mlx", "safetensors"]),
    ("convert good.safetensors out.safetensors --to mlx --config transformer-tiny", FAILURE,
     ["good.safetensors", "config"]),
    ("convert nothing.safetensors out.pth --to torchvision", USAGE, ["nothing.safetensors", "no such file"]),
    ("convert loop out.pt --to torch", USAGE, ["loop"]),
    ("prepare text.txt --train-tokenizer bpe --vocab-size 99999999999999999999", USAGE, ["--vocab-size", "at most"]),
    ("predict loop x.png", USAGE, ["loop", "a link to 'pool'"]),
    ("train tiny.yaml --set data.source=loop", USAGE, ["data.source", "a link to 'pool'"]),
    ("convert nothing out --to hf", USAGE, ["nothing: no such file or folder", "a run", "Hugging Face"]),
    ("convert nothing.safetensors out.safetensors --to canonical", USAGE, ["nothing.safetensors", "no such file"]),
    ("convert folder out.safetensors --to canonical", FAILURE, ["folder", "model.safetensors"]),
    ("convert cut.safetensors out.safetensors --to canonical", FAILURE, ["cut.safetensors", "damaged"]),
    ("convert text.safetensors out.safetensors --to canonical", FAILURE, ["text.safetensors", "is a text file"]),
    ("convert good.safetensors out --to canonical --config nothing.yaml", USAGE, ["nothing.yaml", "quickstart"]),
    # info, parity, quickstart
    ("info --set model.num_layers=3", USAGE, ["--set", "TARGET", "(see icenet info --help)"]),
    ("info nothing", USAGE, ["nothing", "no such file or preset", "quickstart"]),
    ("info folder", USAGE, ["folder", "no checkpoint"]),
    ("info good.safetensors", FAILURE, ["good.safetensors", "config"]),
    ("info tiny.yaml --set model.foo=1", USAGE, ["--set model.foo", "icenet schema"]),
    ("parity nothing", USAGE, ["nothing", "no such file or preset", "quickstart"]),
    ("parity run --dtype int8", USAGE, ["'--dtype'", "'int8'", "'fp32', 'bf16', 'fp16'"]),
    ("parity run --steps -1", USAGE, ["'--steps'", "-1", "x>=0"]),
    ("quickstart --out text.txt", USAGE, ["text.txt", "file", "--out"]),
    ("quickstart --out run", USAGE, ["run: ", "other files", "--out"]),
    ("quickstart --out new --set training.max_steps=1", USAGE, ["training.max_steps", "at least 2"]),
    ("quickstart --out new --set foo=1", USAGE, ["--set foo", "model"]),
]  # fmt: skip


def test_the_table_is_long_enough() -> None:
    assert len({arguments for arguments, _, _ in TABLE}) == len(TABLE) >= 80


def files(place: Path) -> dict[str, str]:
    """Returns the files and their hashes, without the cache of tokens."""
    return {name: digest for name, digest in tree(place).items() if not name.startswith("cache")}


@pytest.mark.parametrize(("arguments", "code", "names"), TABLE, ids=[row[0] for row in TABLE])
def test_bad_input(
    arguments: str, code: int, names: list[str], place: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(place)
    monkeypatch.setenv("ICENET_CACHE", str(place / "cache"))
    before = files(place)
    assert main(shlex.split(arguments)) == code
    out, err = capfd.readouterr()
    line = error_line(err)
    assert is_one_line(line, *names), line
    assert out == ""
    assert files(place) == before, "a rejected command must change nothing"
    assert not (place / "runs").exists() and not (place / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("train tiny.yaml --backend mlx --set data.source=txet.txt", USAGE),
        ("generate run --backend torch --max-new-tokens 500", USAGE),
        pytest.param("convert cut.safetensors out.safetensors --to canonical", FAILURE, marks=pytest.mark.slow),
        pytest.param("parity damaged", FAILURE, marks=pytest.mark.slow),
    ],
)
def test_a_new_process_prints_one_line_too(arguments: str, code: int, place: Path) -> None:
    """Includes what Python and the frameworks print when they start and exit."""
    result = icenet(*shlex.split(arguments), folder=place, code=code)
    assert result.stdout == ""
    error_line(result.stderr)


@pytest.mark.parametrize("name", ["hostile.pt", "hostile.bin", "hostile.pth"])
@pytest.mark.parametrize("to", ["canonical", "torch", "mlx"])
def test_a_hostile_pickle_does_not_run(
    name: str, to: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    command = ["convert", str(place / name), "out.safetensors", "--to", to, "--config", str(place / "tiny.yaml")]
    assert main(command) == FAILURE
    assert is_one_line(error_line(capfd.readouterr().err), name)
    assert list(tmp_path.iterdir()) == [] and not (place / "PWNED").exists()


def test_the_hostile_pickle_is_hostile(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above proves something only if unpickling the file runs its command."""
    monkeypatch.chdir(tmp_path)
    with (place / "hostile.pt").open("rb") as file:
        pickle.load(file)  # noqa: S301
    assert (tmp_path / "PWNED").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "gpu"])
def test_a_device_that_does_not_exist(
    device: str, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if device == "gpu" and torch.backends.mps.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(place)
    assert main(["train", "tiny.yaml", "--run", "cuda", "--backend", "torch", "--device", device]) == FAILURE
    assert is_one_line(error_line(capfd.readouterr().err), "PyTorch", device, "--device cpu")
    assert not (place / "cuda").exists()
    if not mx.is_available(mx.gpu):
        assert main(["generate", "run", "--backend", "mlx", "--device", device]) == FAILURE
        assert is_one_line(error_line(capfd.readouterr().err), "MLX", device, "--device cpu", "icenet doctor")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission(place: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    for run in (closed / "run", closed):
        result = icenet("train", "tiny.yaml", "--run", run, folder=place, code=FAILURE)
        assert is_one_line(error_line(result.stderr), f"{run}: cannot be written", "another --run")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="this machine has no /proc")
def test_a_file_system_that_cannot_be_written(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Holds for root as well."""
    monkeypatch.chdir(place)
    for command, option in ((["train", "tiny.yaml", "--run"], "--run"), (["quickstart", "--out"], "--out")):
        assert main([*command, "/proc/run"]) == FAILURE
        assert is_one_line(error_line(capfd.readouterr().err), "/proc/run: cannot be written", f"another {option}")
    assert main(["convert", "good.safetensors", "/proc/x.safetensors", "--to", "torch"]) == FAILURE
    assert is_one_line(error_line(capfd.readouterr().err), "/proc/x.safetensors: cannot be written")


BLOCKER = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Absent())
import importlib.util
found = importlib.util.find_spec
def find_spec(name, package=None):
    return None if name.split(".")[0] in {blocked!r} else found(name, package)
importlib.util.find_spec = find_spec
"""


def without(folder: Path, *blocked: str) -> dict[str, str]:
    """Returns an environment in which packages seem not to be installed."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(BLOCKER.format(blocked=blocked))
    return {"PYTHONPATH": str(folder)}


def hide(patch: pytest.MonkeyPatch, *blocked: str) -> None:
    """Makes packages seem not to be installed, for what this process imports from here on."""
    found = importlib.util.find_spec
    patch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in blocked else found(name, *rest))
    for name in blocked:
        patch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(
    "new_process", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["in this process", "in new processes"]
)
def test_a_backend_that_is_not_installed(
    new_process: bool, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(place)
    run = ["--run", str(tmp_path / "run"), "--quiet", "--set", "training.max_steps=2"]

    def rejected(arguments: list[str], *blocked: str) -> str:
        if new_process:
            environ = without(tmp_path / f"without-{'-'.join(blocked)}", *blocked)
            return error_line(icenet(*arguments, folder=place, code=FAILURE, ICENET_BLAS="none", **environ).stderr)
        with monkeypatch.context() as patch:
            hide(patch, *blocked)
            assert main(arguments) == FAILURE
        return error_line(capfd.readouterr().err)

    install_torch = "pip install 'icenet[torch]'"
    line = rejected(["train", "tiny.yaml", "--backend", "torch", *run], "torch")
    assert is_one_line(line, "backend torch", "not installed", install_torch, "--backend mlx")
    line = rejected(["generate", "run", "--backend", "mlx"], "mlx")
    assert is_one_line(line, "backend mlx", "not installed", "pip install 'icenet[cpu]'")
    line = rejected(["train", "tiny.yaml", *run], "mlx", "torch")
    assert is_one_line(line, "backend mlx", "backend torch", "pip install 'icenet[cpu]'", install_torch)
    line = rejected(["quickstart", "--out", str(tmp_path / "quick")], "torch")
    assert is_one_line(line, "quickstart", "torch", "pip install 'icenet[all]'")
    assert is_one_line(rejected(["parity", "tiny.yaml"], "torch"), install_torch)
    assert "torch" in rejected(["convert", "good.safetensors", str(tmp_path / "x.pt"), "--to", "torch"], "torch")
    assert not (tmp_path / "run").exists() and not (tmp_path / "quick").exists()


@pytest.mark.slow
def test_commands_that_do_not_need_the_missing_backend(place: Path, tmp_path: Path) -> None:
    """They work, and auto takes the installed one."""
    no_torch, no_mlx = without(tmp_path / "a", "torch"), without(tmp_path / "b", "mlx")
    run = ["--run", str(tmp_path / "run"), "--quiet", "--set", "training.max_steps=2"]
    icenet("train", "tiny.yaml", *run, folder=place, ICENET_BLAS="none", **no_torch)
    icenet("generate", "run", "--backend", "torch", "--max-new-tokens", "2", folder=place, **no_mlx)
    icenet("info", "tiny.yaml", folder=place, **no_mlx)


@pytest.mark.skipif(sys.platform != "linux", reason="IceNet chooses a BLAS on Linux only")
def test_a_blas_that_does_not_exist(place: Path) -> None:
    result = icenet("generate", "run", "--backend", "mlx", folder=place, code=FAILURE, ICENET_BLAS="/no/lib.so")
    assert is_one_line(error_line(result.stderr), "ICENET_BLAS", "/no/lib.so", "openblas")


@pytest.mark.slow
def test_pytorch_does_not_need_the_blas(place: Path) -> None:
    icenet("generate", "run", "--backend", "torch", "--max-new-tokens", "1", folder=place, ICENET_BLAS="/no/lib.so")


def test_a_cache_that_cannot_be_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(place)
    monkeypatch.setenv("ICENET_CACHE", str(tmp_path / "file"))
    assert main(["train", "tiny.yaml", "--run", str(tmp_path / "run")]) == FAILURE
    assert is_one_line(error_line(capfd.readouterr().err), str(tmp_path / "file"), "ICENET_CACHE")


def test_ctrl_c_before_the_first_checkpoint(place: Path, tmp_path: Path) -> None:
    """At any time of the start: at most one line, and no traceback."""
    for wait in (0.2, 0.5):
        options = ["--set", "training.max_steps=1000000", "--quiet"]
        process = start_icenet(["train", "tiny.yaml", "--run", tmp_path / str(wait), *options], place)
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode in (130, -signal.SIGINT)  # the last: Python was starting
        if process.returncode != -signal.SIGINT:
            assert is_one_line(err, "icenet: ", "Ctrl-C"), err
