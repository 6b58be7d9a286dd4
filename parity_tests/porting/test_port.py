"""`icenet.port`: modules that people write, ported, proved, saved and read."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import icenet.blas

import mlx.core as mx
import numpy as np
import port_nets as nets
import pytest
import torch
from helpers import is_one_line, python
from made_ports import close
from mlx.utils import tree_flatten
from torch import nn

import icenet
from icenet.cli.main import main
from icenet.core.errors import PortError, UsageError
from icenet.core.models import modules
from icenet.core.porting.source import helpers
from icenet.core.porting.table import TABLE

FILE = Path(__file__).with_name("port_nets.py")


def image(batch: int = 2, size: int = 10) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def ids(batch: int = 2, length: int = 7, below: int = 12) -> torch.Tensor:
    return torch.randint(0, below, (batch, length), generator=torch.Generator().manual_seed(0))


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def outputs(module: Any, *inputs: torch.Tensor) -> Any:
    return module(*[mx.array(item.numpy()) for item in inputs])


EDGES = torch.tensor([[0, 1, 2, 3, 3], [1, 0, 0, 2, 0]])
CASES = {
    "ConvNet": (nets.ConvNet, (image(),), (image(3, 12),)),
    "GPT": (nets.GPT, (ids(),), (ids(3, 9),)),
    "Tagger": (nets.Tagger, (ids(),), (ids(1, 5),)),
    "UNet": (nets.UNet, (image(2, 9),), (image(1, 12),)),
    "Branches": (nets.Branches, (torch.randn(3, 4),), (torch.randn(5, 4),)),
    "Pyramid": (nets.Pyramid, (torch.randn(3, 4),), (torch.randn(5, 4),)),
    "Graph": (nets.Graph, (torch.randn(4, 3), EDGES), (torch.randn(6, 3), EDGES[:, :3])),
}


@pytest.fixture(scope="module")
def ports() -> dict[str, Any]:
    """Ports of the cases, made when they are first read."""
    return {}


def port_of(ports: dict[str, Any], name: str) -> tuple[Any, nn.Module]:
    if name not in ports:
        kind, example, _ = CASES[name]
        module = made(kind)
        ports[name] = icenet.port(module, example), module
    return ports[name]


@pytest.mark.parametrize("name", CASES)
def test_a_module_is_ported_and_serves_other_sizes(name: str, ports: dict[str, Any]) -> None:
    port, module = port_of(ports, name)
    assert port.report.passed and len(port.report.checks) >= 3, str(port.report)
    for inputs in CASES[name][1:]:
        module.eval()
        with torch.no_grad():
            theirs = module(*inputs)
        ours = outputs(port.module, *inputs)
        for key in theirs if isinstance(theirs, dict) else range(len(theirs)) if isinstance(theirs, list) else [None]:
            close(ours if key is None else ours[key], theirs if key is None else theirs[key])


def test_parameters_have_the_original_names(ports: dict[str, Any]) -> None:
    for name in ("ConvNet", "GPT", "Tagger"):
        port, module = port_of(ports, name)
        theirs = {path for path, _ in module.named_parameters()}
        assert {path for path, _ in tree_flatten(port.module.trainable_parameters())} == theirs
    moved = made(nets.ConvNet)
    modules.copy_weights(port_of(ports, "ConvNet")[0].module, moved)
    for (path, ours), theirs in zip(moved.named_parameters(), ports["ConvNet"][1].parameters(), strict=True):
        assert torch.equal(ours, theirs), path


def test_the_source_reads_as_a_person_would_write_it(ports: dict[str, Any]) -> None:
    source = port_of(ports, "ConvNet")[0].source
    assert "self.blocks = [Block(8, 8) for _ in range(3)]" in source
    assert "for block in self.blocks:\n            x = block(x)" in source
    assert "out = nn.relu(self.bn1(self.conv1(x)))" in source or "out = self.relu(self.bn1(self.conv1(x)))" in source
    assert source.count("transpose(") == 1  # of the images at the beginning
    text = port_of(ports, "GPT")[0].source
    assert "q, k, v = mx.split(self.qkv(x), 3, axis=-1)" in text and "self.mask[:T, :T]" in text
    assert "self.tokens.as_linear(self.norm(x))" in text  # the tied head
    for kept in ports.values():
        imported = {line for line in kept[0].source.splitlines() if line.startswith(("import ", "from "))}
        assert imported <= {"import mlx.core as mx", "import mlx.nn as nn", "import math"}


def test_training_follows_the_original(ports: dict[str, Any]) -> None:
    """Ten steps of SGD on both sides, with a batch norm and a module with two modes."""
    import mlx.nn
    import mlx.optimizers

    for name in ("Branches", "UNet"):
        kind, example, _ = CASES[name]
        theirs = made(kind).train()
        ours = icenet.port(theirs, example).module
        ours.train()
        optimizer, mlx_optimizer = torch.optim.SGD(theirs.parameters(), 0.05), mlx.optimizers.SGD(0.05)
        given = mx.array(example[0].numpy())
        step = mlx.nn.value_and_grad(ours, lambda x, model=ours: mx.square(model(x)).mean())
        for _ in range(10):
            optimizer.zero_grad()
            loss = theirs(*example).square().mean()
            loss.backward()
            optimizer.step()
            mlx_loss, gradients = step(given)
            mlx_optimizer.update(ours, gradients)
            assert abs(mlx_loss.item() - loss.item()) < 1e-5 * max(1, loss.item())
    close(port_of(ports, "Branches")[0].module.mean, torch.zeros(4))  # the comparison left the buffers unchanged


def test_channels_last_and_half_precision(tmp_path: Path) -> None:
    module = made(nets.Net)
    port = icenet.port(module, image(), layout="nhwc", dtype="bf16")
    ours = port.module(mx.array(image().numpy().transpose(0, 2, 3, 1)).astype(mx.bfloat16))
    assert ours.dtype == mx.bfloat16 and "transpose" not in port.source
    np.testing.assert_allclose(np.array(ours.astype(mx.float32)), module(image()).detach().numpy(), atol=0.05)
    runpy.run_path(
        str(port.save(tmp_path / "port") / "model.py"), run_name="__main__"
    )  # its images are channels last


def test_a_saved_port_runs_alone(tmp_path: Path, ports: dict[str, Any]) -> None:
    port, module = port_of(ports, "ConvNet")
    folder = port.save(tmp_path / "port")
    assert {path.name for path in folder.iterdir()} == {
        "model.py",
        "weights.safetensors",
        "config.json",
        "parity.html",
    }
    model = runpy.run_path(str(folder / "model.py"))["load"]()
    close(outputs(model, image()), module.eval()(image()))
    with pytest.raises(UsageError, match="exists"):
        port.save(folder)
    assert "icenet" not in python(
        f"import sys; sys.argv[0] = 'x'; import runpy; runpy.run_path({str(folder / 'model.py')!r})\n"
        "print(*[name for name in sys.modules if name.split('.')[0] in ('icenet', 'torch')])"
    )


def test_what_cannot_be_ported_has_a_line_per_cause() -> None:
    with pytest.raises(PortError) as caught:
        icenet.port(nets.Control(), torch.randn(3))
    assert is_one_line(str(caught.value), "port_nets.py:", "x.sum() > 0", "torch.where")
    with pytest.raises(PortError) as caught:
        icenet.port(nets.Missing(), torch.randn(3))
    first, *lines = str(caught.value).splitlines()
    assert first == "2 operations have no counterpart:" and len(lines) == 2
    assert is_one_line(lines[0], "special_airy_ai: once, at", "port_nets.py")
    assert is_one_line(lines[1], "special_bessel_j0: 2 times, first at", "port_nets.py")
    with pytest.raises(UsageError):
        icenet.port("a name", torch.randn(3))


def test_a_wrong_port_names_the_operation_and_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE, "amax", lambda n: f"{n['self']}.mean(axis={n.dims()})")
    with pytest.raises(PortError) as caught:
        icenet.port(made(nets.Net), image())
    first = str(caught.value).splitlines()[0]
    assert "aten.amax" in first and "port_nets.py" in first and ".amax((2, 3))" in first


def test_every_function_that_the_table_calls_exists() -> None:
    import re

    folder = Path(helpers.__file__).parents[1] / "table"
    texts = [path.read_text(encoding="utf-8") for path in folder.glob("*.py")]
    names = {
        name
        for text in texts
        for name in re.findall(r'n\.call\(\s*"(\w+)"|function="(\w+)"', text)
        for name in name
        if name
    }
    assert len(names) > 60
    assert [name for name in sorted(names) if not helpers.exists(name)] == []


# ---- the command ------------------------------------------------------------------------------------------


def command(*arguments: str) -> int:
    return main(["port", *arguments])


def test_the_command_writes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "w.pt"
    module = made(nets.Net)
    torch.save(module.state_dict(), weights)
    out = tmp_path / "out"
    assert command(f"{FILE}:Net", "--shape", "1x3x10x10", "--weights", str(weights), "--out", str(out)) == 0
    assert "computes what the module computes" in capsys.readouterr().out
    model = runpy.run_path(str(out / "model.py"))["load"]()
    close(outputs(model, image(1)), module(image(1)))


PADDED = """
from torch import nn

class Padding(nn.Module):
    def forward(self, x, mask):
        return x.masked_fill(mask, float("-inf")).softmax(-1)

class Tokens(nn.Module):
    def forward(self, x, mask):
        return x.masked_fill(~mask, float("-inf")).softmax(-1)
"""


@pytest.mark.parametrize("name", ["Padding", "Tokens"])
def test_a_mask_of_the_command_leaves_out_some_values(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "padded.py").write_text(PADDED)
    assert command(f"{tmp_path}/padded.py:{name}", "--shape", "2x6", "--shape", "mask=2x6:bool") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("the port computes what the module computes")
    assert "finite" not in printed


def test_the_command_checks_the_operations(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(f"{FILE}:Missing", "--shape", "3", "--check") == 1
    assert "special_bessel_j0: 2 times" in capsys.readouterr().out
    assert command(f"{FILE}:Net", "--shape", "1x3x10x10", "--check") == 0


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["nowhere.py:Net", "--shape", "3"], ["nowhere.py"]),
        ([f"{FILE}:Nothing", "--shape", "3"], ["Nothing", "ConvNet"]),
        ([f"{FILE}:Block", "--shape", "3"], ["Block", "channels"]),
        ([f"{FILE}:Net"], ["--shape"]),
        ([f"{FILE}:Net", "--shape", "3;4"], ["3;4"]),
        ([f"{FILE}:Net", "--shape", "0x3x10x10"], ["0x3x10x10", "from 1"]),
        ([f"{FILE}:Net", "--shape", "1x12:int0"], ["1x12:int0", "from 1"]),
        ([f"{FILE}:Net", "--shape", "1x99999999999999999999"], ["1x99999999999999999999", "memory"]),
        ([f"{FILE}:Net", "--shape", "3", "--out", f"{FILE}/out"], [str(FILE), "not a folder"]),
        ([f"{FILE}:F", "--shape", "3"], [f"{FILE}:F", "is of type module"]),
        (["resnet50"], ["torchvision:NAME"]),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*arguments) == 2
    assert is_one_line(capsys.readouterr().err.strip(), *names)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import absent_package", ["net.py:Net", "absent_package", "line 1"]),
        ("\ndef Net():\n    raise RuntimeError('no file')", ["net.py:Net", "no file", "net.py, line 3"]),
        ("class Net(:", ["net.py:Net", "cannot be run", "line 1"]),
        ("import torch\n\ndef Net():\n    return torch.nn.Embedding(9, 3)", ["embedding", "--shape 2x12:int1000"]),
        (
            "import torch\n\nclass Net(torch.nn.Module):\n    def forward(self, x):\n"
            "        if torch.compiler.is_compiling():\n            return x + 1\n        raise OSError('no file')",
            ["on the example inputs", "no file", "net.py:7"],
        ),
    ],
)
def test_a_file_that_fails_is_one_line(
    source: str, names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text(source)
    assert command(f"{tmp_path / 'net.py'}:Net", "--shape", "3") == 2
    assert is_one_line(capsys.readouterr().err.strip(), *names)


def test_a_pickle_of_other_things_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "w.pt"
    torch.save(made(nets.Net), path)
    assert command(f"{FILE}:Net", "--shape", "1x3x10x10", "--weights", str(path)) == 1
    assert is_one_line(capsys.readouterr().err.strip(), "w.pt", "tensors only", "state_dict()")


def test_weights_of_another_model_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "w.pt"
    state = made(nets.Net).state_dict()
    first = next(iter(state))
    torch.save({f"{number}": value for number, value in enumerate(state.values())}, path)
    assert command(f"{FILE}:Net", "--shape", "1x3x10x10", "--weights", str(path)) == 1
    assert is_one_line(capsys.readouterr().err.strip(), "w.pt", f"{len(state)} missing ({first}", "of this module")


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, use_cache: bool | None = None, scale: float = 1.0) -> Any:
        y = self.fc(x) * scale
        return y if use_cache is False else (y, x)


def test_a_constant_of_the_example_is_the_default_of_the_port() -> None:
    """A model of transformers is ported with use_cache=False, and called as `model(ids)`."""
    module, x = Optional(), torch.randn(2, 4)
    port = icenet.port(module, x, example_kwargs={"use_cache": False, "scale": 2.0})
    expected = module(x, use_cache=False, scale=2.0).detach()
    for options in ({}, {"use_cache": False}, {"scale": 2.0}):
        np.testing.assert_allclose(port.module(mx.array(x.numpy()), **options), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="the port was made for use_cache=False"):
        port.module(mx.array(x.numpy()), use_cache=None)


def test_a_folder_of_transformers_that_cannot_be_read_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    for name, code, words in (
        ("absent", 2, "no such folder; give a folder"),
        ("empty", 2, "it has no config.json; give a folder"),
        ("damaged", 1, "transformers cannot read it"),
    ):
        assert main(["port", f"transformers:{tmp_path / name}", "--out", str(tmp_path / "out")]) == code
        assert is_one_line(capsys.readouterr().err.strip(), name, words)
    assert not (tmp_path / "out").exists()
