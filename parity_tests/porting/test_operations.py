"""The table of operations against PyTorch: samples of its operator database, and kinds of inputs that it lacks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import icenet.blas  # before mlx

import mlx.core as mx
import numpy as np
import op_db
import pytest
import torch
import torch.nn.functional as F
from made_ports import close, ported
from torch import nn

import icenet

QUICK = [
    "add",
    "cumsum",
    "gather",
    "scatter_add",
    "index_put",
    "masked_fill",
    "topk",
    "sort",
    "floor_divide",
    "remainder",
    "where",
    "var",
    "clamp",
    "nn.functional.pad",
    "nn.functional.interpolate",
    "nn.functional.avg_pool2d",
    "nn.functional.conv2d",
    "nn.functional.group_norm",
]


@pytest.fixture(autouse=True)
def no_compile() -> Iterator[None]:
    """Runs MLX's functions as they are: on a CPU each compiled one costs a second."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def test_some_operations() -> None:
    chosen = [op for op in op_db.operations() if op.name in QUICK]
    checks = [(op, check) for op in chosen for check in itertools.islice(op_db.samples(op, torch.float32), 3)]
    found = [(op.name, *check()) for op, check in checks]
    assert sum(status == "passed" for _, status, _ in found) > 40
    assert [item for item in found if item[1] not in ("passed", "skipped")] == []


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


NAN = float("nan")
IDS = torch.tensor([[3, 0, -1, 1, 2], [1, -1, 0, 0, 0]])
POSITIVE = random(4, 4) @ random(4, 4).T + torch.eye(4)
LENGTHS = torch.tensor([6, 5]), torch.tensor([3, 2])
CASES: dict[str, tuple[Callable[..., object], tuple[torch.Tensor, ...]]] = {
    "sum of nothing": (lambda x: x.t().sum(1), (random(0, 5),)),
    "mean of nothing": (lambda x: x.t().mean(1), (random(0, 5),)),
    "axes of one number": (lambda x: x.transpose(0, 0) + x.swapaxes(0, -1), (torch.tensor(2.0),)),
    "variance of nothing": (lambda x: x.var(), (random(0),)),
    "any of nothing": (lambda x: ((x > 0).t().any(1), (x > 0).t().all(1)), (random(0, 5),)),
    "softmax of nothing": (lambda x: x.log_softmax(-1), (random(5, 0),)),
    "group norm of nothing": (lambda x: F.group_norm(x, 1), (random(0, 2),)),
    "put of nothing": (lambda x, i, y: x.put(i, y), (random(0), torch.zeros(0, dtype=torch.long), random(0))),
    "median with NaN": (lambda x: (x.median(), x.median(1)), (torch.tensor([[1.0, NAN, 3], [4, 2, 9]]),)),
    "nanmedian": (lambda x: (x.nanmedian(), x.nanmedian(1)), (torch.tensor([[1.0, NAN, 3, 7], [4, 2, 9, 8]]),)),
    "tensordot of size 1": (lambda a, b: torch.tensordot(a, b, ([0, 1], [2, 0])), (random(1, 1, 3), random(2, 3, 2))),
    "nuclear norm": (lambda x: (x.norm("nuc"), torch.linalg.matrix_norm(x, 2)), (random(4, 3),)),
    "gradient by frequency": (
        lambda w, i: F.embedding(i, w, scale_grad_by_freq=True),
        (random(6, 3), torch.tensor([1, 2, 1, 1])),
    ),
    "transposed convolution, large output padding": (
        lambda x, w: F.conv_transpose1d(x, w, stride=3, padding=1, output_padding=2),
        (random(2, 4, 9), random(4, 6, 3)),
    ),
    "transposed convolution, groups": (
        lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=(1, 0), output_padding=1, groups=2),
        (random(2, 4, 5, 4), random(4, 3, 3, 3)),
    ),
    "transposed convolution, large padding": (
        lambda x, w: F.conv_transpose1d(x, w, stride=2, padding=1, output_padding=1),
        (random(1, 2, 5), random(2, 3, 1)),
    ),
    "integers": (
        lambda x, w: (F.conv2d(x, w), F.avg_pool2d(x, 2), F.linear(x, w[0, 0]), torch.linspace(0.9, 9.2, 4).long()),
        ((random(2, 3, 5, 4) * 9).long(), (random(4, 3, 4, 4) * 9).long()),
    ),
    "smallest integers at places": (
        lambda x, i, y: x.scatter_reduce(0, i, y, "amin", include_self=False),
        (torch.arange(6), torch.tensor([4, 1, 4]), torch.tensor([7, 3, 5])),
    ),
    "poles of the gamma function": (
        lambda x: (torch.lgamma(x).detach(), torch.digamma(x).detach()),
        (torch.tensor([-2.0, -1.5, 0.0, 0.3, -0.2, 5.0]),),
    ),
    "padding from the end": (
        lambda w, i: F.embedding_bag(i, w, padding_idx=-1),
        (random(5, 3), torch.tensor([[1, 4, 2], [0, 0, 4]])),
    ),
    "circular, cut": (lambda x: F.pad(x, (-1, 1, -2, 1), mode="circular"), (random(1, 3, 4, 4),)),
    "unpool": (lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), (random(2, 3, 6, 4),)),
    "fractional pool": (
        lambda x, s: F.fractional_max_pool2d(x, (3, 2), (4, 5), _random_samples=s, return_indices=True),
        (random(2, 3, 9, 8), torch.rand(2, 3, 2)),
    ),
    "multilabel margin": (lambda x: F.multilabel_margin_loss(x, IDS), (random(2, 5),)),
    "product at places": (
        lambda x, i, y: x.scatter_reduce(0, i, y, "prod"),
        (random(5), torch.tensor([4, 1, 4]), torch.tensor([0.0, 3.0, 5.0])),
    ),
    "largest at places, equal ones": (
        lambda x, i, y: (
            x.scatter_reduce(0, i, y, "amax"),
            x.relu().scatter_reduce(0, i, y.relu(), "amax", include_self=False),
            x.relu().index_reduce(0, i, -y.relu(), "amin"),
        ),
        (torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([2, 0, 2, 1, 1, 2, 3]), random(7).round() * 2),
    ),
    "ctc loss": (lambda x, y: F.ctc_loss(x, y, *LENGTHS), (random(6, 2, 5).log_softmax(2), IDS[:, :3].abs())),
    "decompositions": (
        lambda x: (torch.linalg.qr(x), *torch.linalg.svd(x.T.relu(), False)[1:2], torch.linalg.pinv(x)),
        (random(5, 3),),
    ),
    "wide decompositions": (
        lambda x: (torch.linalg.qr(x)[1], (torch.linalg.svd(x, False)[2] ** 2), torch.linalg.qr(x, "r")[1]),
        (random(3, 5),),
    ),
    "symmetric matrices": (
        lambda x: (
            torch.linalg.eigh(x)[1].abs(),
            torch.linalg.eigvalsh(x),
            torch.linalg.cholesky_ex(x).L,
            x.slogdet(),
        ),
        (POSITIVE,),
    ),
    "triangular systems": (
        lambda a, b: (
            torch.linalg.solve_triangular(a, b, upper=False),
            torch.linalg.solve_triangular(a, b.T, upper=True, left=False, unitriangular=True),
            torch.cholesky_solve(b, a.tril()),
        ),
        (POSITIVE, random(4, 2)),
    ),
    "exponential of matrices": (
        lambda x: (x.matrix_exp(), (9 * x).matrix_exp(), (1e6 * x.triu(3)).matrix_exp()),
        (random(4, 4),),
    ),
    "quantiles": (
        lambda x, q: (x.quantile(q, 1), x.quantile(0.3, 0, True), x.nanquantile(q), x.mode(1)[0]),
        (random(3, 4), torch.tensor([0.1, 0.75])),
    ),
    "statistics": (lambda x: (x.cov(), x.corrcoef(), x.histc(5), torch.gradient(x, spacing=0.5)), (random(3, 4),)),
    "gamma functions": (
        lambda x: (torch.polygamma(1, x), torch.polygamma(2, x), torch.mvlgamma(x + 1, 3)),
        (torch.rand(9, generator=torch.Generator().manual_seed(0)) * 5 + 0.1,),
    ),
    "rows with a largest norm": (
        lambda w, i: (F.embedding(i, w, max_norm=1.0), F.embedding_bag(i, w, mode="sum"), w),
        (random(6, 3), torch.tensor([[1, 2], [1, 4]])),
    ),
    "index fill with a repeated index": (
        lambda x, i, v: x.index_fill(1, i, v),
        (random(2, 4), torch.tensor([1, -1, 1]), torch.tensor(2.0)),
    ),
    "native batch norm": (
        lambda x: torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5),
        (random(3, 2),),
    ),
    "more integers": (
        lambda a, b: (
            torch.div(a, b, rounding_mode="trunc"),
            torch.arange(0, -8.000001, -4.0, dtype=torch.long),
            torch.linspace(4, -3, 50, dtype=torch.long),
            torch.logspace(0, 3.9, 4, dtype=torch.long),
        ),
        (torch.tensor([-8, 7, 9]), torch.tensor([6, -2, 4])),
    ),
    "copies of views": (lambda x: (torch.view_copy(x, (3, 2)), torch.expand_copy(x, (2, 2, 3))), (random(2, 3),)),
}


@pytest.mark.parametrize("name", CASES)
def test_an_operation(name: str) -> None:
    assert op_db.check_function(*CASES[name]) == ("passed", "")


class Losses(nn.Module):
    """Layers whose code in torch reads values, or has no shapes for an export; dropout in place, statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.adaptive = nn.AdaptiveLogSoftmaxWithLoss(8, 9, [3, 6], div_value=2.0)
        self.ctc, self.gaussian = nn.CTCLoss(), nn.GaussianNLLLoss()
        self.norm = nn.InstanceNorm1d(6, track_running_stats=True, momentum=0.3)
        self.drop = nn.Sequential(nn.Dropout(0.3, inplace=True), nn.Dropout1d(0.3, inplace=True))

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.drop(self.norm(x))  # [B, T, 8]
        flat = self.adaptive(x[:, 0], targets[:, 0])
        ctc = self.ctc(x.transpose(0, 1).log_softmax(-1), targets, *LENGTHS)
        return flat.output, flat.loss, ctc, self.gaussian(x[:, 0], x[:, 1], x[:, 2].exp())


class Changed(nn.Module):
    """A weight that the forward pass changes without a gradient: in place, and by layers of torch.nn."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(5) * 2)
        self.rows = nn.Embedding(5, 4, max_norm=1.0)
        self.bags = nn.EmbeddingBag(5, 4, max_norm=0.5)
        self.norm = nn.CrossMapLRN2d(3)

    def forward(self, ids: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            self.weight.clamp_(-1, 1)
        return self.rows(ids) * self.weight[:4], self.bags(ids), self.norm(image)


@pytest.mark.slow
def test_weights_that_the_forward_pass_changes() -> None:
    port = icenet.port(Changed(), (torch.tensor([[1, 2, 4], [2, 0, 3]]), random(2, 5, 3, 3)))
    assert {check.mode for check in port.report.checks} == {"evaluation", "training"}


def test_losses_that_torch_cannot_export() -> None:
    torch.manual_seed(0)
    module, x, targets = Losses(), random(2, 6, 8), torch.tensor([[1, 2, 2], [7, 5, 1]])
    port = icenet.port(module, (x, targets))
    assert {check.mode for check in port.report.checks} == {"evaluation", "training"}
    found = port.module(mx.array(x.numpy()), mx.array(targets.numpy()))
    for ours, theirs in zip(found, module.eval()(x, targets), strict=True):
        np.testing.assert_allclose(np.array(ours), theirs.detach().numpy(), rtol=1e-5)


class Correlation(nn.Module):
    """A filter for each image of the batch, as in hypernetworks and trackers: the groups are sizes of an input."""

    def forward(self, x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        groups = x.reshape(1, b * c, h, w), filters.reshape(b * c, 1, *filters.shape[-2:])
        return (
            F.conv2d(*groups, groups=b * c, padding=h // 2).sum(1) + F.conv_transpose2d(*groups, groups=b * c).mean()
        )


def test_groups_and_padding_of_convolutions_may_be_sizes_of_an_input() -> None:
    model, _ = ported(Correlation(), torch.randn(2, 3, 6, 7), torch.randn(2, 3, 3, 2))
    x, filters = torch.randn(3, 3, 5, 9), torch.randn(3, 3, 3, 2)
    close(model(mx.array(x.numpy()), mx.array(filters.numpy())), Correlation()(x, filters))


def test_what_passes_through_an_integer_has_no_gradient() -> None:
    class Truncated(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 + x.long().float() + (3 * x).int().to(x.dtype)

    assert icenet.port(Truncated(), torch.randn(2, 4)).report.passed
