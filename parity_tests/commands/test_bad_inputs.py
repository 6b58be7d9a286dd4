"""What a person can get wrong on the command line: one line that names the thing, and the exit code."""

from __future__ import annotations

import os
import pickle
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import environment, icenet, start_icenet, tiny, tree

from icenet.cli.main import main
from icenet.core.training.trainer import Trainer

torch: Any = pytest.importorskip("torch")
mx: Any = pytest.importorskip("icenet.engine.engine").mx

PRESETS = r"presets: .*quickstart, .*transformer-tiny"
USAGE, FAILURE = 2, 1


class Hostile:
    """What it does when it is unpickled leaves a trace."""

    def __reduce__(self) -> Any:
        return (os.system, ("touch PWNED",))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder full of things that are not what they should be, beside a good config, text and run."""
    folder = tmp_path_factory.mktemp("bad")
    config = tiny(folder, "data.source=text.txt", "training.keep_checkpoints=2")
    text = config.to_yaml()
    (folder / "tiny.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ICENET_CACHE", str(folder / "cache"))
        Trainer.start(config, folder / "run", backend="mlx", quiet=True).fit()
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
    shutil.copytree(folder / "run", folder / "damaged")
    for path in (folder / "damaged" / "checkpoints").iterdir():
        (path / "model.safetensors").write_bytes(b"x")
    weights = folder / "run" / "checkpoints" / "step-00000020" / "model.safetensors"
    shutil.copy(weights, folder / "good.safetensors")
    (folder / "cut.safetensors").write_bytes(weights.read_bytes()[:-100])
    (folder / "text.safetensors").write_text("this is a text and holds no tensors")
    return folder


# arguments, exit code, what the line says (a pattern that it matches in full, after "icenet: ")
TABLE: list[tuple[str, int, str]] = [
    # the command
    ("trian tiny.yaml", USAGE, r"no command 'trian'; did you mean train\? \(see icenet --help\)"),
    ("frobnicate", USAGE, r"no command 'frobnicate'; there are quickstart, train, .* \(see icenet --help\)"),
    ("--nope", USAGE, r"No such option.*--nope.*\(see icenet --help\)"),
    ("train tiny.yaml --nope", USAGE, r"No such option.*--nope.*\(see icenet train --help\)"),
    ("train tiny.yaml tiny.yaml", USAGE, r"Got unexpected extra argument \(tiny\.yaml\).*"),
    ("doctor extra", USAGE, r"Got unexpected extra argument \(extra\) \(see icenet doctor --help\)"),
    ("generate", USAGE, r"Missing argument 'MODEL'. \(see icenet generate --help\)"),
    ("train", USAGE, r"give either a CONFIG, or --resume RUN.*"),
    ("train tiny.yaml --resume run", USAGE, r"give either a CONFIG, or --resume RUN.*"),
    ("train tiny.yaml --backend jax", USAGE, r".*'--backend': 'jax' is not one of 'auto', 'mlx', 'torch'.*"),
    # the config
    ("train missing.yaml", USAGE, rf"missing\.yaml: no such file or preset; {PRESETS}.*"),
    ("train transfomer-tiny", USAGE, r"transfomer-tiny: no such file or preset; did you mean transformer-tiny\?"),
    ("train folder", USAGE, r"folder: is a folder; .*YAML file or a preset"),
    ("train unknown.yaml", USAGE, r"unknown\.yaml:\d+: sede: unknown key; did you mean seed\?"),
    ("train type.yaml", USAGE, r"type\.yaml:\d+: training\.max_steps: must be an integer, not 'many'"),
    ("train tabs.yaml", USAGE, r"tabs\.yaml:2: not valid YAML: .*"),
    ("train list.yaml", USAGE, r"list\.yaml: must be a mapping of sections \(model:, training:, \.\.\.\)"),
    ("train twice.yaml", USAGE, r"twice\.yaml:2: duplicate key seed"),
    ("train empty.yaml", USAGE, r"empty\.yaml: model: required, but missing"),
    ("train binary.yaml", USAGE, r"binary\.yaml: cannot be read: not UTF-8 text"),
    ("train tiny.yaml --set training.max_step=3", USAGE,
     r"--set training\.max_step: unknown key; did you mean max_steps\?"),
    ("train tiny.yaml --set max_steps", USAGE, r"--set max_steps: must be key=value, such as .*"),
    ("train tiny.yaml --set training.max_steps=abc", USAGE,
     r"--set training\.max_steps: must be an integer, not 'abc'"),
    ("train tiny.yaml --set training.max_steps=0", USAGE, r"--set training\.max_steps: must be .* 1, not 0"),
    ("train tiny.yaml --set training.learning_rate=.nan", USAGE,
     r"--set training\.learning_rate: must be .*, not nan"),
    ("train tiny.yaml --set training=3", USAGE, r"--set training: must be .*, not 3"),
    ("train tiny.yaml --set model.activation=[", USAGE, r"--set model\.activation=\[: the value is not valid YAML.*"),
    ("train tiny.yaml --set data.kind=imags", 2, r"--set data\.kind: unknown kind 'imags'; did you mean images\?"),
    ("train tiny.yaml --set model.hidden_size=99999999999999999999", 2, r"--set model\.hidden_size: must be less .*"),
    ("info --set model.num_layers=3", 2, r"--set needs a TARGET to change \(see icenet info --help\)"),
    ("train tiny.yaml --set model.num_heads=5", USAGE,
     r"--set model: hidden_size 32 is not a multiple of num_heads 5"),
    ("train tiny.yaml --set model.type=transfromer", USAGE,
     r"--set model\.type: unknown family 'transfromer'; did you mean transformer\?"),
    ("train tiny.yaml --set data.seq_length=64", USAGE,
     r"--set data\.seq_length 64 is more than model\.max_seq_length 32"),
    ("train tiny.yaml --set model.vocab_size=100", USAGE,
     r"model\.vocab_size: 100 is less than the 257 tokens of data\.tokenizer bytes; set .*=257 or more"),
    # devices
    ("train tiny.yaml --device banana", USAGE,
     r"device: must be auto, cpu, gpu, mps, cuda or cuda:N, not 'banana'"),
    ("generate run --device cuda:x", USAGE, r"device: must be auto, .*, not 'cuda:x'"),
    ("train tiny.yaml --backend mlx --device mps", FAILURE,
     r"device mps is PyTorch's name for the GPU: with MLX say --device gpu, or --backend torch"),
    # data
    ("train tiny.yaml --set data.source=txet.txt", USAGE,
     r"data\.source 'txet\.txt' is not there; did you mean 'text\.txt'\?"),
    ("train tiny.yaml --set data.source=short.txt", USAGE,
     r"file short\.txt leaves 0 tokens for validation, .*: name a longer data\.source, .*"),
    ("train tiny.yaml --set data.source=short.txt --set data.validation_fraction=0", USAGE,
     r"file short\.txt has 9 training tokens, and one batch needs 160: name a longer data\.source, .*"),
    ("train tiny.yaml --set data.source=empty.txt", USAGE, r"data\.source: there is no text in file empty\.txt.*"),
    ("train tiny.yaml --set data.source=binary.txt", USAGE, r"data\.source: binary\.txt is not UTF-8 text .*"),
    ("train tiny.yaml --set data.source=folder", USAGE, r"data\.source 'folder' is a folder without files.*"),
    ("train tiny.yaml --set data.source=https://host/x.txt", USAGE, r"data\.source .* is a URL; download it first.*"),
    # runs
    ("train tiny.yaml --run run", USAGE,
     r"run: contains a run already; continue it with --resume run, or choose another --run"),
    ("train tiny.yaml --run text.txt", USAGE, r"text\.txt: cannot be written \(.*\); choose another --run"),
    ("train tiny.yaml --run text.txt/below", USAGE,
     r"text\.txt/below: cannot be written \(.*\); choose another --run"),
    ("train --resume nothing", FAILURE, r"nothing: no such run or checkpoint"),
    ("train --resume folder", FAILURE, r"folder: holds no checkpoint; give .*"),
    ("train --resume text.txt", FAILURE, r"text\.txt: holds no checkpoint; give .*"),
    ("train --resume run", USAGE, r"run: the run is complete at step 20; to continue: --set training\.max_steps=40"),
    ("train --resume damaged", FAILURE,
     r"damaged: all of its 2 checkpoints are damaged; .*/model\.safetensors: damaged .*"),
    ("train --resume run/checkpoints/step-00000015", USAGE,
     r"run/checkpoints/step-00000015: the run continued to step-00000020; resume run to continue there, or give .*"),
    ("train --resume run --run damaged --set training.max_steps=40", USAGE, r"damaged: contains a run already; .*"),
    ("train --resume run --set training.max_steps=40 --set model.hidden_size=64", FAILURE,
     r".*not the parameters of this model: .*use the config"),
    # generation
    ("generate nothing", FAILURE, r"nothing: holds no weights; give a run, a checkpoint or a saved model's folder"),
    ("generate folder", FAILURE, r"folder: holds no checkpoint; give .*"),
    ("generate damaged", FAILURE, r"damaged: all of its 2 checkpoints are damaged; .*"),
    ("generate good.safetensors", FAILURE, r"good\.safetensors: weights without a config; icenet convert .*"),
    ("generate tiny.yaml", FAILURE, r"tiny\.yaml: holds no weights; give a run, .*"),
    ("generate run --max-new-tokens 500", USAGE,
     r"generate: a prompt of 1 tokens and 500 new ones exceed model\.max_seq_length 32; ask for fewer, .*"),
    ("generate run --prompt 'this is a prompt of more than 32 tokens'", USAGE,
     r"generate: a prompt of 39 tokens and 1 new ones exceed model\.max_seq_length 32; .*"),
    ("generate run --max-length 3 --prompt alpha", USAGE,
     r"generate: max_length 3 leaves no room after a prompt of 5 tokens; raise it or use max_new_tokens"),
    ("generate run --max-new-tokens 0", USAGE, r"generation\.max_new_tokens: must be .* 1, not 0"),
    ("generate run --max-new-tokens ten", USAGE, r".*'--max-new-tokens': 'ten' is not a valid integer.*"),
    ("generate run --temperature -1", USAGE, r"generation\.temperature: must be .* 0, not -1\.0"),
    ("generate run --temperature nan", USAGE, r"generation\.temperature: must be .*, not nan"),
    ("generate run --top-p 2", USAGE, r"generation\.top_p: must be less than or equal to 1, not 2\.0"),
    ("generate run --top-k -1", USAGE, r"generation\.top_k: must be .* 0, not -1"),
    ("generate run --repetition-penalty 0", USAGE, r"generation\.repetition_penalty: must be .* 0, not 0\.0"),
    ("generate run --stop ''", USAGE, r"generate: an empty stop text would end every text"),
    ("generate run --prompt-file nothing", USAGE, r"nothing: the prompt cannot be read: No such file or directory"),
    ("generate run --prompt-file binary.txt", USAGE, r"binary\.txt: the prompt cannot be read: not a text in UTF-8"),
    ("generate run --prompt-file folder", USAGE, r"folder: the prompt cannot be read: Is a directory"),
    ("generate run --prompt a --prompt-file text.txt", USAGE, r"give either --prompt or --prompt-file.*"),
    # conversion
    ("convert good.safetensors out.safetensors", USAGE, r"Missing option '--to'.*canonical, mlx, torch.*"),
    ("convert good.safetensors text.txt --to canonical", USAGE, r"text\.txt: cannot write \.txt files; name .*"),
    ("convert good.safetensors good.safetensors --to canonical", USAGE,
     r"good\.safetensors: is the source itself; name another destination"),
    ("convert good.safetensors cut.safetensors --to canonical", USAGE,
     r"cut\.safetensors: exists; name another destination, or give --overwrite to replace it"),
    ("convert good.safetensors run/checkpoints/step-00000020 --to canonical", USAGE,
     r"run/checkpoints/step-00000020/model\.safetensors: exists; .*"),
    ("convert good.safetensors out.safetensors --to mlx", USAGE,
     r"good\.safetensors: converting canonical to mlx needs the layers' kinds, .*; name it with --config"),
    ("convert good.safetensors out.pt --to mlx --config tiny.yaml", USAGE,
     r"out\.pt: the mlx form is safetensors; .*"),
    ("convert good.safetensors out.safetensors --to mlx --config transformer-tiny", FAILURE,
     r"good\.safetensors: not the parameters of this model: .*use the config"),
    ("convert nothing.safetensors out.safetensors --to canonical", FAILURE,
     r"nothing\.safetensors: no such file; check the path"),
    ("convert folder out.safetensors --to canonical", FAILURE, r"folder: holds neither model\.safetensors nor .*"),
    ("convert cut.safetensors out.safetensors --to canonical", FAILURE,
     r"cut\.safetensors: it is cut short, at \d+ of \d+ bytes; it is damaged .*"),
    ("convert text.safetensors out.safetensors --to canonical", FAILURE,
     r"text\.safetensors: its header claims \d+ bytes .*"),
    ("convert good.safetensors out --to canonical --config nothing.yaml", USAGE,
     rf"nothing\.yaml: no such file or preset; {PRESETS}.*"),
    # info, parity, quickstart
    ("info nothing", USAGE, rf"nothing: no such file or preset; {PRESETS}.*"),
    ("info folder", FAILURE, r"folder: holds no checkpoint; .*"),
    ("info good.safetensors", FAILURE, r"good\.safetensors: weights without a config; .*"),
    ("info tiny.yaml --set model.foo=1", USAGE, r"--set model\.foo: unknown key; known: .*hidden_size.*"),
    ("parity nothing", USAGE, rf"nothing: no such file or preset; {PRESETS}.*"),
    ("parity run --dtype int8", USAGE, r".*'--dtype': 'int8' is not one of 'fp32', 'bf16', 'fp16'.*"),
    ("parity run --steps -1", USAGE, r".*'--steps': -1 is not in the range x>=0.*"),
    ("quickstart --out text.txt", USAGE, r"text\.txt: a file; give --out a folder"),
    ("quickstart --out run", USAGE, r"run: holds other files; give --out an empty folder"),
    ("quickstart --out new --set training.max_steps=1", USAGE,
     r"quickstart: training\.max_steps must be at least 2, to change backend half way"),
    ("quickstart --out new --set foo=1", USAGE, r"--set foo: unknown key; known: .*model.*"),
]  # fmt: skip


def test_the_table_is_long_enough() -> None:
    assert len({arguments for arguments, _, _ in TABLE}) == len(TABLE) >= 80


def told(err: str) -> str:
    """The one line on standard error, without the name of the command."""
    assert err.count("\n") == 1 and err.startswith("icenet: ") and err.endswith("\n"), err
    return err[len("icenet: ") : -1]


@pytest.mark.parametrize(("arguments", "code", "pattern"), TABLE, ids=[row[0] for row in TABLE])
def test_bad_input(
    arguments: str, code: int, pattern: str, place: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(place)
    monkeypatch.setenv("ICENET_CACHE", str(place / "cache"))
    before = {name: digest for name, digest in tree(place).items() if not name.startswith("cache")}
    assert main(shlex.split(arguments)) == code
    out, err = capfd.readouterr()
    line = told(err)
    assert re.fullmatch(pattern, line), line
    assert out == ""
    after = {name: digest for name, digest in tree(place).items() if not name.startswith("cache")}
    assert after == before, "a request that is refused changes nothing"
    assert not (place / "runs").exists() and not (place / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("train unknown.yaml", USAGE),
        ("train tiny.yaml --backend torch --set data.source=txet.txt", USAGE),
        ("generate run --backend mlx --max-new-tokens 500", USAGE),
        ("generate run --backend torch --top-p 2", USAGE),
        ("convert cut.safetensors out.safetensors --to canonical", FAILURE),
        ("parity damaged", FAILURE),
    ],
)
def test_in_a_process_of_its_own(arguments: str, code: int, place: Path) -> None:
    """As above, with everything that Python and the frameworks may say when they start and end."""
    result = icenet(*shlex.split(arguments), folder=place, code=code)
    assert result.stdout == ""
    told(result.stderr)


@pytest.mark.parametrize("name", ["hostile.pt", "hostile.bin", "hostile.pth"])
@pytest.mark.parametrize("to", ["canonical", "torch", "mlx"])
def test_a_hostile_pickle_does_not_run(
    name: str, to: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    command = ["convert", str(place / name), "out.safetensors", "--to", to, "--config", str(place / "tiny.yaml")]
    assert main(command) == FAILURE
    assert re.fullmatch(rf"\S+{name}: (holds more than tensors and is not loaded|is damaged or not).*",
                        told(capfd.readouterr().err))  # fmt: skip
    assert list(tmp_path.iterdir()) == [] and not (place / "PWNED").exists()


def test_the_hostile_pickle_is_hostile(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof above is one only if the file does harm to those who unpickle it."""
    monkeypatch.chdir(tmp_path)
    with (place / "hostile.pt").open("rb") as file:
        pickle.load(file)  # noqa: S301
    assert (tmp_path / "PWNED").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "gpu"])
def test_cuda_where_there_is_none(
    device: str, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if device == "gpu" and torch.backends.mps.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.chdir(place)
    assert main(["train", "tiny.yaml", "--run", "cuda", "--backend", "torch", "--device", device]) == FAILURE
    line = told(capfd.readouterr().err)
    assert re.fullmatch(r"PyTorch finds no device (cuda|gpu)(:1)? here: say --device cpu, and see .*", line)
    if mx.is_available(mx.gpu):
        return
    assert main(["generate", "run", "--backend", "mlx", "--device", device]) == FAILURE
    line = told(capfd.readouterr().err)
    assert line == f"MLX finds no device {device} here: say --device cpu, and see icenet doctor"
    assert not (place / "cuda").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    (tmp_path / "closed").mkdir(mode=0o555)
    result = icenet("train", "tiny.yaml", "--run", tmp_path / "closed" / "run", folder=place, code=USAGE)
    assert re.fullmatch(r"\S+closed/run: cannot be written \(.*\); choose another --run", told(result.stderr))
    result = icenet("train", "tiny.yaml", "--run", tmp_path / "closed", folder=place, code=USAGE)
    assert re.fullmatch(r"\S+closed: cannot be written \(.*\); choose another --run", told(result.stderr))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_a_place_where_nothing_can_be_written(place: Path) -> None:
    """Also for root."""
    for command in (["train", "tiny.yaml", "--run", "/proc/run"], ["quickstart", "--out", "/proc/run"]):
        result = icenet(*command, folder=place, code=USAGE)
        assert re.fullmatch(r"/proc/run: cannot be written \(.*\); (choose|give) another --(run|out)",
                            told(result.stderr))  # fmt: skip
    result = icenet("convert", "good.safetensors", "/proc/x.safetensors", "--to", "torch", folder=place, code=FAILURE)
    assert re.fullmatch(r"/proc/x\.safetensors: cannot be written .*; the existing files are unchanged", told(result.stderr))


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
    """An environment in which packages seem not to be installed."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCKER.format(blocked=blocked))
    return {"PYTHONPATH": str(folder)}


def test_a_backend_that_is_not_installed(place: Path, tmp_path: Path) -> None:
    no_torch, no_mlx = without(tmp_path / "a", "torch"), without(tmp_path / "b", "mlx")
    neither = without(tmp_path / "c", "mlx", "torch")
    run = ["--run", str(tmp_path / "run"), "--quiet", "--set", "training.max_steps=2"]

    def refused(*arguments: str, **environ: str) -> str:
        return told(icenet(*arguments, folder=place, code=FAILURE, ICENET_BLAS="none", **environ).stderr)

    line = refused("train", "tiny.yaml", "--backend", "torch", *run, **no_torch)
    assert line == "backend torch is not installed: pip install 'icenet[torch]'; or choose --backend mlx"
    line = refused("generate", "run", "--backend", "mlx", **no_mlx)
    assert line.startswith("backend mlx is not installed: pip install 'icenet[cpu]' on Linux")
    assert refused("train", "tiny.yaml", *run, **neither).startswith("no backend runs here. backend mlx is not")
    assert "quickstart needs both backends, and torch is missing" in refused(
        "quickstart", "--out", str(tmp_path / "quick"), **no_torch
    )
    assert "pip install 'icenet[torch]'" in refused("parity", "tiny.yaml", **no_torch)
    assert "torch" in refused("convert", "good.safetensors", str(tmp_path / "x.pt"), "--to", "torch", **no_torch)
    assert not (tmp_path / "run").exists() and not (tmp_path / "quick").exists()
    # and what does not need it works: auto takes the backend that is there
    icenet("train", "tiny.yaml", *run, folder=place, ICENET_BLAS="none", **no_torch)
    icenet("generate", "run", "--backend", "torch", "--max-new-tokens", "2", folder=place, **no_mlx)
    icenet("info", "tiny.yaml", folder=place, **no_mlx)


def test_a_blas_that_is_not_there(place: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("elsewhere MLX has the platform's own")
    result = icenet("generate", "run", "--backend", "mlx", folder=place, code=FAILURE, ICENET_BLAS="/no/lib.so")
    assert re.fullmatch(r"ICENET_BLAS=/no/lib\.so: /no/lib\.so cannot be loaded .*; give auto, torch, openblas, .*",
                        told(result.stderr))  # fmt: skip
    # what uses no MLX does not look for it
    icenet("generate", "run", "--backend", "torch", "--max-new-tokens", "1", folder=place, ICENET_BLAS="/no/lib.so")


def test_a_cache_that_cannot_be_written(place: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = icenet(
        "train", "tiny.yaml", "--run", tmp_path / "run", folder=place, code=USAGE, ICENET_CACHE=str(tmp_path / "file")
    )
    assert re.fullmatch(r"cannot keep tokens in \S+: .*; set ICENET_CACHE to a folder .*", told(result.stderr))


def test_ctrl_c_before_there_is_anything_to_save(place: Path, tmp_path: Path) -> None:
    """At any moment of the start: one line or none, and no traceback."""
    import signal
    import time

    for wait in (0.3, 0.6):
        process = start_icenet(["train", "tiny.yaml", "--run", tmp_path / str(wait), "--set",
                                "training.max_steps=1000000", "--quiet"], place)  # fmt: skip
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode in (1, -signal.SIGINT)
        if process.returncode == 1:
            assert re.fullmatch(r"\n?icenet: stopped by Ctrl-C.*\n", err), err


def test_the_environment_is_the_one_of_the_tests(place: Path) -> None:
    assert environment(place)["ICENET_CACHE"] == str(place / "cache")
