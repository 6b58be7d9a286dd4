"""The fixture `assert_parity`, registered with pytest when IceNet is installed.

    def test_my_port(assert_parity):
        assert_parity(MlxNet(), TorchNet(), images)

A failure shows the culprit and the path of the page with all details.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from icenet.parity import Report


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option for the folder of the pages."""
    parser.getgroup("icenet").addoption(
        "--parity-reports",
        metavar="DIR",
        help="Folder of the pages that assert_parity writes when modules differ. Default: in pytest's cache.",
    )


@pytest.fixture
def assert_parity(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Report]:
    """Returns a function with the arguments of `icenet.parity.compare`.

    It returns the report if the modules agree. Otherwise the test fails with the first line of the report and the
    path of its page.
    """
    from icenet.parity import compare  # pytest imports this module in every project

    calls = 0

    def assert_parity(a: Any, b: Any, inputs: Any = None, **options: Any) -> Report:
        __tracebackhide__ = True
        nonlocal calls
        calls += 1
        report = compare(a, b, inputs, **options)
        if report.passed:
            return report
        name = request.node.nodeid + (f"-{calls}" if calls > 1 else "")
        page = _folder(request.config, tmp_path_factory) / f"{_file_name(name)}.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        report.to_html(page)
        pytest.fail(f"{report.verdict}\npage: {page}", pytrace=False)

    return assert_parity


def _folder(config: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of the pages: the one that the user named, or one that outlives the run."""
    chosen = config.getoption("--parity-reports")
    if chosen:
        return Path(config.invocation_params.dir, chosen)
    cache = getattr(config, "cache", None)  # None with `-p no:cacheprovider`
    return Path(cache.mkdir("parity")) if cache is not None else tmp_path_factory.mktemp("parity")


def _file_name(node: str) -> str:
    """Returns the name of a test as the name of a file, without what file systems refuse."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", node.replace("::", "-")).strip("-")[-150:]
