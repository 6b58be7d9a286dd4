"""The fixture `assert_parity` in tests of a user: its failure message, its pages, its option."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("icenet.models")  # chooses the BLAS before mlx is imported
pytest.importorskip("torch")

pytest_plugins = "pytester"

PROGRAM = """
import icenet.blas
import mlx.nn
import numpy as np
import pytest
import torch

class Mine(mlx.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = mlx.nn.Linear(3, 2)

    def __call__(self, x):
        return mlx.nn.relu(self.layer(x))

class Theirs(torch.nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.layer, self.activation = torch.nn.Linear(3, 2), activation

    def forward(self, x):
        return self.activation(self.layer(x))

X = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
OPTIONS = dict(copy_weights=True, stages=["forward"])

def test_same(assert_parity):
    assert assert_parity(Mine(), Theirs(torch.relu), X, **OPTIONS).passed

@pytest.mark.parametrize("kind", ["a/b"])
def test_other(assert_parity, kind):
    assert_parity(Mine(), Theirs(torch.relu), X, **OPTIONS)
    assert_parity(Mine(), Theirs(torch.tanh), X, **OPTIONS)
"""


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Imports all that a comparison imports: pytester forgets what a run imports, so that the next one fails."""
    import mlx.nn
    import torch

    import icenet.parity.results.html  # noqa: F401
    from icenet.parity import compare

    assert not compare(mlx.nn.Tanh(), torch.nn.Sigmoid(), np.ones((2, 3), np.float32)).passed


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads no other plugin in a run: pytester would forget its modules, such as hypothesis, which load once only."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def run(pytester: pytest.Pytester, *arguments: str) -> tuple[str, Path]:
    """Runs the tests of the user and returns the message of the failure and the path of the page."""
    pytester.makepyfile(PROGRAM)
    loaded = any(point.name == "icenet" for point in metadata.entry_points(group="pytest11"))
    plugin = "icenet" if loaded else "icenet.parity.pytest_plugin"
    result = pytester.runpytest_inprocess("-p", plugin, *arguments)
    result.assert_outcomes(passed=1, failed=1)
    lines = result.stdout.lines
    place = next(index for index, line in enumerate(lines) if line.startswith("page: "))
    return lines[place - 1], Path(lines[place][6:])


@pytest.mark.parametrize("arguments", [(), ("-p", "no:cacheprovider"), ("--parity-reports", "pages")], ids=str)
def test_a_failure_is_the_verdict_and_the_page(pytester: pytest.Pytester, arguments: tuple[str, ...]) -> None:
    verdict, page = run(pytester, *arguments)
    assert verdict.startswith("differs in the model (Mine) itself, after layer; output is off by ")
    assert page.is_absolute() and "after layer" in page.read_text(encoding="utf-8")
    assert "test_other-a-b" in page.name and page.name.endswith("-2.html")
    if arguments[:1] == ("--parity-reports",):
        assert page.parent == pytester.path / "pages"
