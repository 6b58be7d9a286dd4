"""Special functions, LU factors, segments, and gradients at edges: the table of operations against PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import icenet.blas  # before mlx

import mlx.core as mx
import numpy as np
import op_db
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import icenet
from icenet.porting.functions import digits, special


@pytest.fixture(autouse=True)
def no_compile() -> Iterator[None]:
    """Runs MLX's functions as they are: on a CPU each compiled one costs a second."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def grid(align: bool) -> torch.Tensor:
    """Returns the grid of all pixels of an image of 3x4 and of some outside, exactly at their centers."""
    places = [torch.arange(-2.0, size + 2) for size in (3, 4)]
    y, x = (
        2 * place / (size - 1) - 1 if align else (2 * place + 1) / size - 1
        for place, size in zip(places, (3, 4), strict=True)
    )
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]


SPECIAL = torch.special
X = torch.tensor([-3.7, -0.4, 0.2, 1.0, 2.5, 9.0])
P = torch.tensor([1e-30, 1e-5, 0.1, 0.5, 0.8, 0.9999])
CASES: dict[str, tuple[Callable[..., object], tuple[torch.Tensor, ...]]] = {
    "Bessel functions": (lambda x: (SPECIAL.i0(x), SPECIAL.i0e(x), SPECIAL.i1(x), SPECIAL.i1e(x)), (X,)),
    "quantiles of the normal distribution": (lambda p: SPECIAL.ndtri(p), (P,)),
    "scaled error function": (lambda x: SPECIAL.erfcx(x), (X,)),
    "entropy below 0": (lambda x: SPECIAL.entr(x), (X,)),
    "zeta": (lambda s, q: SPECIAL.zeta(s, q).detach(), (X.abs() + 1.1, X.abs())),
    "mantissas": (lambda x: torch.frexp(x)[0], (X,)),
    "divisors": (
        lambda a, b: (torch.gcd(a, b), torch.lcm(a, b)),
        (torch.tensor([12, -18, 0]), torch.tensor([18, 4, 5])),
    ),
    "LU factors": (lambda x: torch.linalg.lu(x), (random(3, 4, 4),)),
    "LU factors of wide matrices": (lambda x: torch.linalg.lu_factor(x)[0], (random(3, 5),)),
    "LU factors of tall matrices": (lambda x: torch.linalg.lu(x)[1:], (random(5, 3),)),
    "systems with LU factors": (
        lambda a, b: (
            torch.linalg.lu_solve(*torch.linalg.lu_factor(a), b),
            torch.linalg.lu_solve(*torch.linalg.lu_factor(a), b.mT, left=False, adjoint=True),
        ),
        (random(2, 4, 4), random(4, 3)),
    ),
    "least squares": (lambda a, b: torch.linalg.lstsq(a, b)[0], (random(5, 3), random(5, 2))),
    "systems of tensors": (
        lambda a, b: (torch.linalg.tensorinv(a), torch.linalg.tensorsolve(a, b)),
        (random(2, 3, 6), random(2, 3)),
    ),
    "segments": (
        lambda x, n: (
            torch.segment_reduce(x, "mean", lengths=n),
            torch.segment_reduce(x, "max", lengths=n, initial=0),
        ),
        (random(6, 2), torch.tensor([2, 0, 4])),
    ),
    "symmetric in time": (lambda x: torch.fft.hfftn(torch.fft.ihfftn(x, norm="ortho"), s=x.shape), (random(4, 5),)),
    "spaces between integers": (
        lambda a, b: (torch.linspace(a, b, 51, dtype=torch.long), torch.linspace(-3, 7, 51, dtype=torch.long)),
        (torch.tensor(-3), torch.tensor(7.9)),
    ),
    "inner product of integers": (lambda a: (torch.inner(a, a), F.hardtanh(a, -0.5, 2.5)), (torch.tensor([3, -4]),)),
}
for _align in (False, True):
    for _padding in (0, 1, 2):
        CASES[f"grid of pixels, {_align}, {_padding}"] = (
            lambda x, g, padding=_padding, align=_align: torch.grid_sampler(x, g, 0, padding, align),
            (random(1, 2, 3, 4), grid(_align)),
        )


@pytest.mark.parametrize("name", CASES)
def test_an_operation(name: str) -> None:
    assert op_db.check_function(*CASES[name]) == ("passed", "")


def test_incomplete_gamma_functions_in_float64() -> None:
    rng = np.random.default_rng(0)
    a = np.exp(rng.uniform(-3, 10, 300)).astype(np.float32)
    x = (a * np.exp(rng.normal(size=300) * np.minimum(1, 3 / np.sqrt(a)))).astype(np.float32)
    lower, upper = special.gamma_tails(mx.array(a), mx.array(x))
    wide = torch.tensor(a).double(), torch.tensor(x).double()
    np.testing.assert_allclose(np.array(lower), SPECIAL.gammainc(*wide), rtol=2e-4, atol=1e-12)
    np.testing.assert_allclose(np.array(upper), SPECIAL.gammaincc(*wide), rtol=2e-4, atol=1e-12)


def test_neighbours_have_the_bits_of_pytorch() -> None:
    a = torch.tensor([0.0, 1.0, -1.0, 3e38, float("inf"), 1e-45, -2.5])
    b = torch.tensor([-1.0, 2.0, 2.0, float("inf"), 0.0, -1.0, -2.5])
    for dtype, kind in ((torch.float32, mx.float32), (torch.bfloat16, mx.bfloat16)):
        ours = digits.nextafter(*(mx.array(item.numpy()).astype(kind) for item in (a, b)))
        theirs = torch.nextafter(a.to(dtype), b.to(dtype)).float().numpy()
        np.testing.assert_array_equal(np.array(ours.astype(mx.float32)), theirs)


class Attention(nn.Module):
    """Its softmax is NaN where a row is masked as a whole, and the NaN are replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = (self.q(x) @ self.k(x).mT).masked_fill(~mask, float("-inf"))
        weights = scores.softmax(-1)
        return (torch.where(mask, weights, 0.0) + weights.masked_fill(~mask, 0.0)) @ x


def test_a_row_that_is_masked_as_a_whole_has_the_gradient_of_pytorch() -> None:
    torch.manual_seed(0)
    mask = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    mask[:, 2] = False
    port = icenet.port(Attention(), (random(2, 5, 4), mask))
    assert "exact_where(mask, weights, 0.0) + exact_where(" in port.source, port.source
    assert any("exact_where" in note for note in port.report.notes)
