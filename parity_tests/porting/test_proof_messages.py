"""What `icenet.port` says of sizes that are fixed, of bad inputs, and of a port that differs."""

from __future__ import annotations

import contextlib
import runpy
from pathlib import Path
from typing import Any

import icenet.blas

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import is_one_line
from torch import nn

import icenet
from icenet.core.errors import FileError, PortError, UsageError
from icenet.core.porting.table import TABLE
from icenet.parity.ports.inputs import drawn_like
from icenet.parity.ports.proof import locate
from icenet.parity.ports.report import Check, PortReport

R = torch.randn


class Sampler(nn.Module):
    """Resizes to the size of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(F.max_pool2d(self.conv(x), 2), size=x.shape[-2:], mode="nearest")


class Steps(nn.Module):
    """A loop over the axis 1 whose turns differ in a factor, too; the axis 2 is fixed by the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        h = x.new_zeros(x.shape[0], 3)
        for t in range(x.shape[1]):
            h = torch.tanh(self.fc(x[:, t]) + h * (0.5 + t / 3))
        return {"h": h, "nothing": None}


class StepsOfDict(Steps):
    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        return super().forward(batch["x"])["h"]


class Rows(nn.Module):
    """A loop over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.fc(row) for row in x])


class Masked(nn.Module):
    """Two inputs whose sizes must agree, though no guard of the export says so."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = self.fc(x)
        h[mask] = 0.0
        return h


class NoBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) // 0.3


def test_a_fixed_size_is_said_and_another_one_is_an_error(tmp_path: Path) -> None:
    torch.manual_seed(0)
    port = icenet.port(Steps(), R(2, 4, 5))
    assert port.report.fixed == {"x": {1: 4}}
    assert any("x has a fixed size, 4 in dimension 1" in note for note in port.report.notes)
    assert port.module(mx.zeros((3, 4, 5)))["h"].shape == (3, 3)
    with pytest.raises(ValueError, match="x has 6 in dimension 1; the port was made for 4"):
        port.module(mx.zeros((2, 6, 5)))
    saved = runpy.run_path(str(port.save(tmp_path) / "model.py"), run_name="__main__")["load"]()  # prints a None
    with pytest.raises(ValueError, match="made for 4"):
        saved(mx.zeros((2, 6, 5)))


def test_dynamic_is_no_flag() -> None:
    with pytest.raises(UsageError, match=r"dynamic=False: give the dynamic_shapes of torch.export.export"):
        icenet.port(Steps(), R(2, 4, 5), dynamic=False)
    assert icenet.port(nn.Linear(3, 2), R(2, 3), dynamic=(None,)).report.passed


def test_a_fixed_size_in_a_structure_is_refused() -> None:
    torch.manual_seed(0)
    port = icenet.port(StepsOfDict(), ({"x": R(2, 3, 5)},))
    with pytest.raises(ValueError, match=r"batch\['x'\] has 6 in dimension 1; the port was made for 3"):
        port.module({"x": mx.zeros((2, 6, 5))})


def test_a_fixed_batch_of_one_stays_one() -> None:
    torch.manual_seed(0)
    port = icenet.port(Rows(), R(1, 4))
    assert port.report.fixed == {"x": {0: 1}} and port.module(mx.zeros((1, 4))).shape == (1, 4)


def test_a_batch_of_one_by_name_that_cannot_be_larger() -> None:
    class One(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(4).exp()

    assert icenet.port(One(), (), example_kwargs={"x": R(1, 4)}).report.passed


def test_sizes_that_must_agree_are_compared() -> None:
    torch.manual_seed(0)
    report = icenet.port(Masked(), (R(2, 5, 4), R(2, 5) > 0)).report
    assert {check.sizes for check in report.checks} == {"2x5x4 2x5", "3x7x4 3x7", "1x5x4 1x5"}
    labels = drawn_like(np.array([3, -100, 0]), (50,), np.random.default_rng(0))
    assert set(labels) == {3, -100, 0}
    assert (drawn_like(np.array([0, 2, 5]), (4,), np.random.default_rng(0)) == [0, 0, 2, 5]).all()


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_size_that_is_read_from_the_input_stays_open(layout: str) -> None:
    torch.manual_seed(0)
    module = Sampler().eval()
    port = icenet.port(module, R(1, 2, 8, 9), layout=layout)
    given = R(2, 2, 12, 7)
    images = given.numpy() if layout == "nchw" else given.numpy().transpose(0, 2, 3, 1)
    assert not port.report.fixed
    ours = np.array(port.module(mx.array(images)))
    ours = ours if layout == "nchw" else ours.transpose(0, 3, 1, 2)
    np.testing.assert_allclose(ours, module(given).detach().numpy(), atol=1e-5)


def test_inputs_that_are_not_tensors() -> None:
    module = nn.Linear(4, 4)
    assert icenet.port(module, np.zeros((3, 4), np.float32)).report.passed
    with pytest.raises(UsageError) as caught:
        icenet.port(module, mx.zeros((3, 4)))
    assert is_one_line(str(caught.value), "mlx array", "torch tensors")
    with pytest.raises(UsageError) as caught:
        icenet.port(Steps(), R(2, 4, 7))
    assert is_one_line(
        str(caught.value), "example inputs", "(2x7 and 5x3)", "test_proof_messages.py", "self.fc(x[:, t])"
    )


def test_a_scripted_module_is_refused() -> None:
    class Scripted(torch.jit.ScriptModule):
        pass

    with pytest.raises(UsageError) as caught:
        icenet.port(Scripted(), R(3, 4))
    assert is_one_line(str(caught.value), "ScriptModule")


def test_an_original_without_gradients_is_compared_without_them() -> None:
    torch.manual_seed(0)
    report = icenet.port(NoBackward(), R(3, 4)).report
    assert {check.what for check in report.checks} == {"outputs"}
    assert any("no gradients were compared in training mode" in note for note in report.notes)


def test_an_error_in_the_comparison_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from icenet.porting import load

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("no memory\nat all")

    monkeypatch.setattr(load, "run", broken)
    with pytest.raises(PortError) as caught:
        icenet.port(nn.Linear(4, 4), R(3, 4))
    assert is_one_line(str(caught.value), "the port fails in evaluation mode on 3x4", "no memory")


def test_a_difference_in_training_names_mode_and_parameter() -> None:
    report = PortReport([Check("evaluation", "3x4", "outputs", 0.5, 1e-7, "output 0")])
    report.checks.append(Check("training", "3x4", "gradients", 1e5, 0.1, "fc.weight"))
    found = locate(None, None, None, ((), {}), report)  # type: ignore[arg-type]
    assert found == "gradient of fc.weight in training mode on 3x4, 1e+05 times the noise of rounding"


class Smooth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(self.first(x))
        return torch.tanh(self.last(h))


def test_a_small_error_of_an_operation_is_named_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two formulas of GELU differ by less than 1e-3."""
    monkeypatch.setitem(TABLE, "gelu", lambda n: f"nn.gelu_approx({n['self']})")
    with pytest.raises(PortError, match=r"differs: aten\.gelu at .*test_proof_messages\.py:\d+ \(h = F\.gelu"):
        icenet.port(Smooth(), torch.randn(2, 4))


class Raises(nn.Module):
    """Computes what a function says, in the user's file."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


class Lost(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x * 2

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> Any:
        raise KeyError("lost")


class DynamicCache:
    """A cache as the models of transformers return it."""


def in_training(self: Raises, x: torch.Tensor) -> torch.Tensor:
    if self.training:
        raise ValueError("not in training\nat all")
    return self.fc(x)


def test_what_the_module_raises_is_one_line_with_its_place(tmp_path: Path) -> None:
    def failure(function: Any, example: Any = None) -> str:
        with pytest.raises((PortError, UsageError)) as caught:
            icenet.port(Raises(function), R(3, 4) if example is None else example)
        return str(caught.value)

    file = "test_proof_messages.py"
    assert is_one_line(failure(lambda self, x: (row for row in x)), "a generator", "return tensors")
    assert is_one_line(failure(lambda self, x: (self.fc(x), DynamicCache())), "a DynamicCache", "'use_cache': False")
    assert is_one_line(failure(lambda self, x: self.fc(x) * float(x.sum())), file, "float(x.sum())", "torch.where")
    assert is_one_line(failure(lambda self, x: self.fc(x)[9].missing), file, "index 9")
    assert is_one_line(failure(lambda self, x: x, ()), "do not fit forward", "'x'")
    ids = torch.tensor([[1, 7]])
    assert is_one_line(failure(lambda self, x: F.embedding(x, self.fc.weight), ids), file, "4 rows: give ids below 4")
    with pytest.raises(UsageError, match="has no argument 'maks'; its arguments are x"):
        icenet.port(Raises(lambda self, x: x), R(3, 4), example_kwargs={"maks": R(3, 4)})
    notes = icenet.port(Raises(in_training), R(3, 4)).report.notes
    assert any(is_one_line(note, file, "training mode", "not in training") for note in notes)
    notes = icenet.port(Raises(lambda self, x: Lost.apply(self.fc(x))), R(3, 4)).report.notes
    assert any(file in note and "'lost'" in note and "no gradients" in note for note in notes)


def test_each_operation_that_is_missing_has_a_line() -> None:
    with pytest.raises(PortError) as caught:
        icenet.port(Raises(lambda self, x: torch.special.bessel_j1(torch.special.bessel_j0(x))), R(3, 4))
    first, *lines = str(caught.value).splitlines()
    assert first == "2 operations have no counterpart:" and len(lines) == 2
    assert all("once, at" in line and "test_proof_messages.py" in line for line in lines)


def test_a_module_without_values_or_on_another_device_is_refused() -> None:
    for module, words in (
        (nn.LazyLinear(4), "lazy layer"),
        (nn.Linear(4, 4, device="meta"), "on the device meta"),
    ):
        with pytest.raises(UsageError) as caught:
            icenet.port(module, R(3, 4))
        assert is_one_line(str(caught.value), "weight", words)


def test_a_folder_that_cannot_be_written_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = icenet.port(nn.Linear(4, 4), R(3, 4))

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("icenet.porting.load.save_weights", full)
    with pytest.raises(FileError):
        port.save(tmp_path / "port")
    assert not (tmp_path / "port").exists()


class Grid(nn.Module):
    """Samples an image on an affine grid of its own size."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Linear(2, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        theta = self.theta(x.mean((2, 3))).view(-1, 2, 3)
        return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


def test_height_and_width_of_an_affine_grid_are_open() -> None:
    torch.manual_seed(0)
    module, given = Grid(), R(2, 2, 7, 9)
    port = icenet.port(module, R(3, 2, 6, 6))  # equal in the example
    assert not port.report.fixed
    np.testing.assert_allclose(
        np.array(port.module(mx.array(given.numpy()))), module(given).detach().numpy(), atol=1e-5
    )


def test_a_width_that_is_read_from_the_height_is_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("icenet_torch.porting.sizes.open_sizes", contextlib.nullcontext)  # the grid has fixed sizes
    port = icenet.port(Grid(), R(3, 2, 6, 6))
    assert port.report.fixed == {"x": {2: 6, 3: 6}}  # a grid of 7x7 is served, one of 7x6 is not
    with pytest.raises(ValueError, match="x has 7 in dimension 2; the port was made for 6"):
        port.module(mx.zeros((3, 2, 7, 9)))


class Keeps(nn.Module):
    """Stores what it computes, also in attributes that it has only after a call."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.maps: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = self.fc(x)
        self.maps.append(self.last)
        return self.last * 2


def test_the_attributes_of_a_module_are_unchanged() -> None:
    torch.manual_seed(0)
    module = Keeps()
    before = set(vars(module))
    assert icenet.port(module, R(2, 4)).report.passed
    assert set(vars(module)) == before and not module.maps


class Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> None:
        self.last = x


def test_a_module_that_returns_nothing_is_refused() -> None:
    with pytest.raises(PortError, match="Nothing returns no tensor"):
        icenet.port(Nothing(), R(2, 4))


@pytest.mark.parametrize(
    ("version", "is_noted"), [("2.6.0+cu124", True), ("2.11.0", False), ("2.13.0a0+git1", False)]
)
def test_a_failed_export_names_an_old_version_of_pytorch(
    version: str, is_noted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(PortError, match="control flow") as error:
        icenet.port(Branch(), R(3, 4))
    assert (
        f"this is PyTorch {version}, and icenet.port is tested with 2.11 and 2.13" in str(error.value)
    ) == is_noted
    assert is_one_line(error.value)


@pytest.mark.parametrize("example", [torch.full((2, 5), np.nan), torch.zeros(0, 5)])
def test_an_example_without_finite_values_is_noted(example: torch.Tensor) -> None:
    report = icenet.port(nn.Linear(5, 3), example).report
    assert any(is_one_line(note, "no finite value") for note in report.notes)
    assert str(report).startswith("not shown that the port computes what the module computes")


class Codes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.codes.data.copy_(self.codes * 0.9 + x.mean(0))
        return x + self.codes


def test_a_change_through_data_is_named() -> None:
    notes = icenet.port(Codes(), torch.randn(3, 4)).report.notes
    assert any(".data" in note and note.endswith("write buffer.copy_(...) under torch.no_grad()") for note in notes)
    assert not any("issue" in note for note in notes)
