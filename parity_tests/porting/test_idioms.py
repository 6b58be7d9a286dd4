"""Ports of what people write: heads in a dict, skips between modules of other sizes, names that begin with "_"."""

from __future__ import annotations

import copy
import importlib.util
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import icenet.blas

import mlx.core as mx
import pytest
import torch
import torch.nn.functional as F
from helpers import is_one_line
from made_ports import close, ported
from mlx.utils import tree_flatten, tree_map
from torch import nn

import icenet
from icenet.core.errors import PortError, WeightsError


class Heads(nn.Module):
    """The last head is a list, over which the port runs in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(5, 8)
        lists = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 8), "b": lists})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.trunk(x)
        return {name: head(h) for name, head in self.heads.items()}


def test_a_loop_over_one_head_keeps_the_argument_of_another() -> None:
    module, x = Heads().eval(), torch.randn(3, 5)
    model, _ = ported(module, x)
    ours, theirs = model(mx.array(x.numpy())), module(x)
    assert list(ours) == ["a", "b"]
    for name in ours:
        close(ours[name], theirs[name])


class Up(nn.Module):
    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        dy, dx = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
        return F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2]) + skip


class Skips(nn.Module):
    """The size of a pooled image is computed in a norm and used in another module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.pool1, self.pool2 = nn.MaxPool2d(2), nn.MaxPool2d(2)
        self.up1, self.up2 = Up(), Up()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x1 = self.first(x)
        x2 = self.norm(self.pool1(x1))
        x3 = self.pool2(x2)
        return self.up2(self.up1(x3, x2), x1)


def test_a_size_of_one_module_is_known_in_another() -> None:
    module = Skips().eval()
    model, _ = ported(module, torch.randn(2, 3, 16, 16))
    for shape in ((2, 3, 16, 16), (1, 3, 18, 21)):
        x = torch.randn(shape)
        close(model(mx.array(x.numpy())), module(x))


class Names(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._conv = nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect")
        self._blocks = nn.ModuleList([nn.Linear(5, 5) for _ in range(3)])
        self.blocks = nn.Linear(5, 5)
        self.register_buffer("_cos", torch.randn(5), persistent=False)
        self._table = torch.randn(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self._conv(x) * self._cos + self._table
        h[..., 0] = 0.0
        for block in self._blocks:
            h = block(h)
        return self.blocks(h)


def test_weights_below_an_underscore_are_trained_saved_and_moved_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Names(), torch.randn(2, 4, 5)
    port = icenet.port(module, (x,))
    paths = {path for path, _ in tree_flatten(port.module.trainable_parameters())}
    assert len(paths) == len(list(module.parameters()))
    assert {"conv.weight", "blocks_.0.weight", "blocks.weight"} <= paths
    port.module.update(tree_map(lambda value: value + 0.125, port.module.trainable_parameters()))
    twin = copy.deepcopy(module)
    twin._cos.zero_()
    icenet.to_torch(port.module, twin)
    ours = port.module(mx.array(x.numpy()))
    close(ours, twin(x))
    spec = importlib.util.spec_from_file_location("saved_port", port.save(tmp_path / "port") / "model.py")
    assert spec is not None and spec.loader is not None
    saved = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(saved)
    close(saved.load()(mx.array(x.numpy())), twin(x))
    icenet.from_torch(module, port.module)
    close(port.module(mx.array(x.numpy())), module(x))
    twin.blocks = nn.Linear(5, 6)
    with pytest.raises(WeightsError, match=r"nothing is copied; blocks\.weight has the shape \[6, 5\]") as error:
        icenet.to_torch(port.module, twin)
    assert is_one_line(error.value)


class CumulativeNorm(nn.Module):
    """A batch norm that averages all batches equally."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, momentum=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def test_a_batch_norm_without_momentum_averages_its_batches() -> None:
    torch.manual_seed(0)
    module = CumulativeNorm()
    model, _ = ported(module, torch.randn(4, 3))
    model.train()
    for _ in range(3):
        x = torch.randn(4, 3) + 1
        close(model(mx.array(x.numpy())), module(x))
    close(model.norm.running_mean, module.norm.running_mean)
    close(model.norm.running_var, module.norm.running_var)
    assert model.norm.num_batches_tracked.item() == 3


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.encoder(x, mask=mask)


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_transformer_layer_takes_a_mask(is_causal: bool) -> None:
    module, x = Encoder().eval(), torch.randn(2, 5, 8)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    model, _ = ported(module, x, causal)
    mask = causal if is_causal else causal.T
    close(model(mx.array(x.numpy()), mx.array(mask.numpy())), module(x, mask))


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class StraightThrough(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Round.apply(self.linear(x))


def test_a_function_with_its_own_backward_is_named_with_its_line() -> None:
    with pytest.raises(PortError) as error:
        icenet.port(StraightThrough(), (torch.randn(4, 3),))
    line = str(error.value).splitlines()[0]
    assert is_one_line(line, "test_idioms.py:", "Round.apply has a backward of its own")


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 3, batch_first=True)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]


def test_a_packed_sequence_is_refused_at_its_line() -> None:
    with pytest.raises(PortError) as error:
        icenet.port(Packed(), (torch.randn(2, 4, 3), torch.tensor([4, 2])))
    assert is_one_line(error.value, "test_idioms.py:", "pack_padded_sequence(x", "pass the padded batch")


@dataclass
class Output:
    hidden: torch.Tensor
    loss: torch.Tensor | None = None


class DataClass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> Output:
        return Output(self.linear(x))


def test_a_data_class_is_returned_as_a_dict() -> None:
    module, x = DataClass().eval(), torch.randn(4, 3)
    model, _ = ported(module, x)
    ours = model(mx.array(x.numpy()))
    assert list(ours) == ["hidden"]
    close(ours["hidden"], module(x).hidden)


class Arguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(
        self,
        batch: dict[str, torch.Tensor],
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        power: int = 1,
        shift: torch.Tensor | None = None,
        *,
        scale: float = 1.0,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        y = self.a(batch["x"]) + self.b(batch["y"]) ** power
        y = y if shift is None else y + shift
        y = y if mask is None else y * mask
        return (y + x) * scale


def test_a_port_has_the_signature_of_the_original(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Arguments().eval()
    batch, x, shift = {"x": torch.randn(2, 4), "y": torch.randn(2, 5)}, torch.randn(2, 3), torch.randn(2, 3)
    mask = torch.ones(2, 3)
    port = icenet.port(module, (batch, x), example_kwargs={"mask": mask, "shift": shift, "scale": 0.5})
    names = "(self, batch, x, context=None, power=1, shift=None, *, scale=0.5, mask):"  # the example's scale
    assert f"def __call__{names}" in port.source
    to_mlx = {name: mx.array(value.numpy()) for name, value in batch.items()}
    given, named = (to_mlx, mx.array(x.numpy())), {"shift": mx.array(shift.numpy()), "mask": mx.array(mask.numpy())}
    ours = port.module(*given, None, scale=0.5, **named)
    close(ours, module(batch, x, shift=shift, scale=0.5, mask=mask))
    close(port.module(*given, **named), module(batch, x, shift=shift, scale=0.5, mask=mask))
    for changed, name in (({"scale": 1.0}, "scale=0.5"), ({"power": 2}, "power=1"), ({"shift": None}, "shift")):
        with pytest.raises(ValueError, match=name) as error:
            port.module(*given, **{**named, **changed})
        assert is_one_line(error.value)
    with pytest.raises(ValueError, match="without context"):
        port.module(*given, named["mask"], scale=0.5, **named)
    last = (port.save(tmp_path / "port") / "model.py").read_text().split("__main__")[-1]
    assert "shift=mx.zeros((2, 3), mx.float32), mask=mx.zeros((2, 3), mx.float32)" in " ".join(last.split())


class Words(nn.Module):
    """Windows and coordinates of the size of an input, a Fourier transform, a rotation by complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        images = x[:, None]
        pooled = F.max_pool1d(torch.relu(x.transpose(1, 2)), x.size(1)).squeeze(2)
        mean = F.avg_pool2d(images, images.size()[2:]) + F.max_pool2d(images, kernel_size=images.shape[2:])
        places = torch.linspace(0, 1, x.size(1))
        turned = torch.view_as_complex(self.project(x).reshape(*x.shape[:-1], -1, 2)) * torch.fft.rfft(x)[..., :2]
        root = x.abs().pow(-0.5)
        root[x > 0.5] = 0.0
        return (
            pooled,
            mean,
            places,
            torch.view_as_real(turned),
            torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[1:]),
            root,
        )


def test_sizes_of_inputs_stay_open_and_an_expression_is_computed_once() -> None:
    module = Words()
    model, source = ported(module, torch.randn(2, 6, 4))
    x = torch.randn(3, 9, 4).round(decimals=1) + 0.01
    for ours, theirs in zip(model(mx.array(x.numpy())), module(x), strict=True):
        close(ours, theirs)
    body = source[source.index("class Words") :]
    assert body.count("self.project(") == 1 and "mx.fft.rfft2(x)" in body and "mx.where(x > 0.5" in body
    assert "issubdtype" not in source


def test_layers_with_dropout_between_them_are_compared_in_training_mode() -> None:
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        layer = kind(3, 4, num_layers=2, dropout=0.5)
        report = icenet.port(layer, torch.randn(5, 2, 3)).report
        found = {check.what: check.difference for check in report.checks if check.mode == "training"}
        assert 0 < found["outputs"] < 1e-5 and found["gradients"] < 1e-5  # with dropout they would be other functions
        assert layer.dropout == 0.5 and not report.notes


class Scan(nn.Module):
    """A state-space model in a loop whose results are products of several arrays, and the phase of a spectrum."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h, ys = torch.zeros_like(x[:, 0]), []
        for step in range(x.size(1)):
            h = 0.5 * h + x[:, step]
            ys.append(torch.einsum("bd,bd->bd", h, x[:, step]))
        return torch.stack(ys, dim=1), torch.angle(torch.fft.fft(x)[..., 1:])


def test_products_in_a_list_are_no_joins_and_a_phase_is_that_of_a_complex_number() -> None:
    x = torch.randn(2, 4, 6)
    model, source = ported(Scan(), x)
    for ours, theirs in zip(model(mx.array(x.numpy())), Scan()(x), strict=True):
        close(mx.cos(ours), theirs.cos())
    assert "ys.append(mx.einsum(" in source


class Slopes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
        y = self.layer(x) * slopes
        slopes[1:] = 2
        return y + slopes


def test_a_tensor_that_a_forward_makes_is_no_array_of_the_port(tmp_path: Path) -> None:
    module, x = Slopes().eval(), torch.randn(2, 3)
    port = icenet.port(module, x)
    assert "stop_gradient" not in port.source and "self.lifted" not in port.source
    model = runpy.run_path(str(port.save(tmp_path / "slopes") / "model.py"))["load"]()
    close(model(mx.array(x.numpy())), module(x))
    close(model(mx.array(x.numpy())), module(x))
