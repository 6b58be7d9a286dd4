"""Gradients of a port that agree with the layers of IceNet and differ with those of MLX, or vice versa."""

from __future__ import annotations

from typing import Any

import pytest

from icenet.parity.ports.report import ROUNDING, Check, PortReport, settle


def report(mlx: float, icenet: float | None, what: str = "gradients", **changes: Any) -> PortReport:
    given = {"mode": "training", "sizes": "2x3x64x64", "what": what, "difference": 0.1, "name": "bn.bias", **changes}
    checks = [Check(ratio=mlx, **given)] + ([] if icenet is None else [Check(ratio=icenet, layers="icenet", **given)])
    found = PortReport(checks)
    for _ in range(2):  # after each mode
        settle(found)
    return found


@pytest.mark.parametrize(("mlx", "icenet", "who"), [(18.0, 1.7, "MLX's"), (3.0, 12.0, "IceNet's")])
def test_a_gradient_that_agrees_with_other_layers_is_rounding(mlx: float, icenet: float, who: str) -> None:
    found = report(mlx, icenet)
    assert found.passed and len(found.notes) == 1
    assert found.notes[0].startswith(
        f"with {who} layers the gradient of bn.bias in training mode on 2x3x64x64 differs"
    )
    assert str(found).startswith(
        f"the port computes what the module computes (largest ratio {min(mlx, icenet):.2g} of"
    )
    assert f"ratio {max(mlx, icenet):.2g}" in str(found)


@pytest.mark.parametrize(
    ("mlx", "icenet", "changes"),
    [
        (18.0, 9.0, {}),
        (18.0, None, {}),
        (1.1 * ROUNDING, 1.0, {}),
        (float("inf"), 1.0, {}),
        (18.0, 1.0, {"what": "outputs"}),
        (18.0, 1.0, {"what": "buffers"}),
        (18.0, 1.0, {"note": "another shape"}),
    ],
)
def test_other_differences_stay(mlx: float, icenet: float | None, changes: dict[str, Any]) -> None:
    found = report(mlx, icenet, **changes)
    assert not found.passed and not found.notes
