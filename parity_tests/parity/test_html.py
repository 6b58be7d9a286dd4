"""The page of a comparison: it is complete, it needs no other file, and nothing in it is taken as markup."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from icenet.core.errors import UsageError
from icenet.parity.results import html
from icenet.parity.results.report import Report
from icenet.parity.results.result import Histogram, Module, Row, Stage
from icenet.parity.results.status import CONTAINS, DIFFERS, FAILED, INHERITS, PASSED

HOSTILE = '<script>alert("x")</script>&amp;'
VOID = {"meta", "br", "path", "circle", "polyline", "rect", "link"}


class Checker(HTMLParser):
    """Raises AssertionError for tags that are not closed; collects texts and references."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert checker.references == []
    return checker


def report(differs: bool = True, **changes: Any) -> Report:
    """Returns a report of a model with two blocks, of which the second one's `mlp` differs."""
    paths = ["", "blocks", "blocks.0", "blocks.0.mlp", "blocks.1", "blocks.1.mlp", "head"]
    modules = {path: Module(path, path, path, "Net", "Net", PASSED, 1.5) for path in paths}
    for path in paths[1:]:
        modules[path.rpartition(".")[0]].children.append(path)
    rows = [
        Row(path, "output", (2, 3), PASSED, 1.5, 1e-7 * (i + 1), 1e-7, 1.0, depth=i) for i, path in enumerate(paths)
    ]
    if differs:
        for path, status in (("", CONTAINS), ("blocks.1", CONTAINS), ("blocks.1.mlp", DIFFERS), ("head", INHERITS)):
            modules[path].status, modules[path].ratio = status, 5e4
        edges = (-1.0, 0.0, 1.0)
        rows[5] = Row(
            "blocks.1.mlp", "output", (2, 3), DIFFERS, 5e4, 1e-2, 1e-7, 1.0, 4e4, "output", depth=5,
            histogram=Histogram(edges, (1, 5), (4, 2)),
        )  # fmt: skip
    stages = [Stage("weights", PASSED), Stage("forward", FAILED if differs else PASSED, 0.5, "", rows)]
    found = Report(
        names=("Mine", "Theirs"), stages=stages, modules=list(modules.values()),
        culprit="blocks.1.mlp" if differs else None, inputs={"x": "float32 [2, 3]"},
        environment={"a": {"framework": "MLX"}, "b": {"framework": "PyTorch"}}, command="icenet parity a.py:A b.py:B",
    )  # fmt: skip
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def test_a_page_shows_the_culprit_and_what_is_needed_to_repeat_it(tmp_path: Path) -> None:
    found = report(cause="eps is 1e-05 in a, 1e-06 in b", notes=["matched by order"])
    page = found.to_html(tmp_path / "page.html").read_text("utf-8")
    checker = checked(page)
    text = " ".join(" ".join(checker.texts).split())
    for expected in (
        found.verdict,
        "eps is 1e-05 in a, 1e-06 in b",
        "blocks.1.mlp: output",
        "matched by order",
        "icenet parity a.py:A b.py:B",
        "float32 [2, 3]",
        "begins at blocks.1.mlp: output",
    ):
        assert expected in text
    assert page.index(found.verdict) < page.index("Stages") < page.index("Modules")
    assert "Agrees" not in text
    assert "http" not in page  # nothing is fetched


def test_a_difference_before_an_inner_module_is_marked_at_the_point_where_the_lines_part() -> None:
    """The block ends after its `mlp`, whose output is off already."""
    found = report()
    rows = found.stages[1].rows
    rows[4] = replace(rows[4], status=DIFFERS, error=1e-2, own_part="input of mlp", where="between norm and mlp")
    rows[5] = replace(rows[5], status=INHERITS)
    (chart,) = (part for part in html.page(found).split("<svg") if "begins before" in part)
    marked = re.search(r'class="begins" d="M([\d.]+) ', chart)
    point = re.search(r'cx="([\d.]+)" [^>]*><title>blocks.1.mlp: output', chart)
    assert marked and point and marked[1] == point[1]
    assert "begins before blocks.1.mlp<" in chart


def test_a_page_of_models_that_agree() -> None:
    text = " ".join(checked(html.page(report(differs=False))).texts)
    assert "Agrees" in text
    assert "Where it begins" not in text and "begins at" not in text


def test_texts_are_no_markup() -> None:
    found = report(
        names=(HOSTILE, HOSTILE), notes=[HOSTILE], cause=HOSTILE, command=HOSTILE, inputs={HOSTILE: HOSTILE}
    )
    found.modules[-1].class_a = found.modules[-1].notes = HOSTILE
    found.modules[-1].notes = [HOSTILE]
    found.stages[0].note = HOSTILE
    found.stages[1].rows.append(Row(HOSTILE, HOSTILE, (), DIFFERS, 9.0, 1.0, 1.0, 1.0, note=HOSTILE, depth=9))
    page = html.page(found)
    checker = checked(page)
    assert "".join(checker.texts).count('alert("x")') >= 8
    assert "<script>alert" not in page
    assert checker.tags.count("script") == 1


def test_the_tree_shows_each_module_once_and_opens_the_way_to_the_difference() -> None:
    page = html.page(report())
    tree = page[page.index('class="tree"') : page.index("Values of the tensors")]
    assert re.findall(r"<code>([^<]*)</code>", tree) == ["(model)", "blocks", "0", "mlp", "1", "mlp", "head"]
    # the model, blocks and blocks.1 are open, blocks.0 is not
    assert tree.count("<details open>") == 3 and tree.count("<details>") == 1


def test_a_module_is_drawn_after_those_within_it() -> None:
    rows = [Row(path, "output", depth=i) for i, path in enumerate(["", "a", "a.b", "a.c", "d"])]
    assert [row.path for row in html._by_end(rows)] == ["a.b", "a.c", "a", "d", ""]


def test_numbers_without_a_logarithm_are_drawn() -> None:
    rows = [
        Row("a", "output", (1,), PASSED, 0.0, 0.0, 0.0, 1.0, depth=0),
        Row("b", "output", (1,), DIFFERS, float("inf"), float("nan"), 1e-7, 1.0, depth=1),
        Row("c", "output", (1,), DIFFERS, float("inf"), float("inf"), 1e-7, 0.0, depth=2),
        Row("d", "output", (1,), PASSED, 1.0, 1e-7, 1e-7, 1.0, depth=3),
    ]
    page = html.page(report(stages=[Stage("forward", FAILED, rows=rows)], losses={"a": [2.0, 2.0], "b": [2.0, 2.0]}))
    checked(page)
    assert "nan" not in re.sub(r"<td>.*?</td>", "", page).lower()


def test_a_long_table_keeps_the_rows_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "MAX_ROWS", 3)
    page = html.page(report())
    assert "The 3 rows with the largest ratios of 7." in page
    assert page.count("<tr class=") == 3 and '<tr class="bad">' in page


def test_only_an_earlier_page_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    report().to_html(path)
    report(differs=False).to_html(path)
    assert "Agrees" in path.read_text("utf-8")
    path.write_text("<html>mine</html>")
    with pytest.raises(UsageError, match="exists"):
        report().to_html(path)
    assert path.read_text() == "<html>mine</html>"
