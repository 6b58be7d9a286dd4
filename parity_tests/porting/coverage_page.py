"""The page of what ports cover, from the results of `coverage_table.py`."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from typing import Any

TITLES = {
    "ops": "samples of PyTorch's operator database",
    "layers": "layers of `torch.nn`, each in every option",
    "torchvision": "models of torchvision",
    "timm": "families of timm, one model each",
    "transformers": "families of transformers",
}
HEAD = """# What ports cover

Measured with [`icenet.port`](porting.md) by the program below, which writes this page. A layer or a model passes if
the port is proved: the outputs and the gradients of all parameters, in evaluation and in training mode, are within 8
times the noise of rounding. A sample of an operation passes if its outputs and, in float32, the gradients of its
inputs agree to rounding. Integers (int64), booleans and bfloat16 are tried where PyTorch has the operation for them.

```
python parity_tests/porting/coverage_table.py all --jobs 16
python parity_tests/porting/coverage_table.py ops --only "float32 cumsum" --show
```

The models have random weights, and inputs of 64 pixels where they allow it. Of consecutive blocks of the same
structure two are kept; with `COVERAGE_WHOLE=1` all are. The detection models are their backbones. Of an entry that
was tried several times the last result is shown.
`icenet port TARGET --check` lists the operations that a module needs and the table lacks.
"""

RUNS = """## When it was measured

The table has the number of entries of each day, latest first; `parity_tests/porting/coverage.json` has the commit of
each entry. Results that are "stored in" a commit were measured before it, at one that was not noted.
"""

LEFT_OUT = """Left out on purpose:

- sparse and hashed tensors, which MLX does not have;
- `unique` and others whose shape depends on values; `histogram`;
- eigenvalues of matrices that are not symmetric, LDL factors and `geqrf`, which MLX lacks;
- Bessel functions of the first and second kind, and Airy's;
- what only PyTorch's own backward passes call.

Causes of the differences above and of those of layers:

- PyTorch's gradient is not that of its function (`torch.autograd.gradcheck` fails); the port has the true gradient.
  `as_strided_scatter` gives its first argument the gradient of the values that it replaces.
  `EmbeddingBag(scale_grad_by_freq=True)` divides rows by the number of another id. The backward of `CrossMapLRN2d` is
  another function.
- Inputs that are infinite: `masked.prod` and `masked.logsumexp` have NaN at other places of the gradient.
- Rounding: the gradient of `cosine_similarity` of two numbers is 0 in exact arithmetic. In bfloat16, PyTorch adds the
  steps of `arange`, and its `matrix_exp` overflows; the port computes both in fp32.
""".splitlines()


def page(results: dict[str, Any]) -> str:
    """Returns the page as Markdown."""
    lines = [HEAD, "| | tried | passed | share |", "|---|---|---|---|"]
    for group, title in TITLES.items():
        if group not in results:
            continue
        entries = results[group]["entries"]
        if len(entries) < results[group]["of"]:
            title = f"{title} ({len(entries)} of {results[group]['of']} entries tried)"
        if group == "ops":
            for dtype in ("float32", "int64", "bool", "bfloat16"):
                chosen = {name: item for name, item in entries.items() if name.startswith(f"{dtype} ")}
                if chosen:
                    total = _total(chosen)
                    tried = total["passed"] + total["failed"]
                    what = f"{title}, {dtype}, {len(chosen)} operations"
                    lines.append(_row(what, tried, total["passed"]))
        elif group == "layers":
            total = _total(entries)
            tried = total["passed"] + total["failed"] + total["missing"]
            lines.append(_row(f"{title}, {len(entries)} layers", tried, total["passed"]))
        else:
            passed = sum(bool(item.get("passed")) for item in entries.values())
            lines.append(_row(title, len(entries), passed))
    lines += ["", *_runs(results), "", "## What is not covered", ""]
    for group, title in TITLES.items():
        entries = results.get(group, {"entries": {}})["entries"]
        bad = {name: item for name, item in entries.items() if _problems(item)}
        if not bad:
            continue
        lines += [f"### {title[0].upper()}{title[1:]}", ""]
        if group == "ops":
            lines += _operations(bad)
            continue
        for name, item in bad.items():
            text = phrase(item["problems"][0])
            lines.append(f"- {text}" if text.startswith(f"`{name}(") else f"- {name}: {text}")
        lines.append("")
    for group in ("torchvision", "timm", "transformers"):
        if group in results:
            good = [name for name, item in results[group]["entries"].items() if item.get("passed")]
            lines += [f"## Ported: {TITLES[group]}", "", ", ".join(f"`{name}`" for name in good), ""]
    return "\n".join(lines).rstrip() + "\n"


def _runs(results: dict[str, Any]) -> list[str]:
    """Returns the table of the commits, days and machines at which entries were measured."""
    lines = [RUNS, "| | entries | commits | day | machine |", "|---|---|---|---|---|"]
    for group, title in TITLES.items():
        item = results.get(group, {"runs": [], "entries": {}})
        counts = Counter(entry["run"] for entry in item["entries"].values())
        days: dict[tuple[str, str, bool], list[int]] = {}
        for number, run in enumerate(item["runs"]):
            days.setdefault((run["day"], run["machine"], " " in run["commit"]), []).append(number)
        title = "operations of PyTorch's operator database" if group == "ops" else title.partition(",")[0]
        for (day, machine, _), numbers in reversed(days.items()):
            commits = list(dict.fromkeys(item["runs"][number]["commit"] for number in (numbers[0], numbers[-1])))
            count = sum(counts[number] for number in numbers)
            text = " to ".join(commits).replace("to stored in", "to")
            lines.append(f"| {title} | {count} | {text} | {day} | {machine} |")
    return lines


def _problems(item: dict[str, Any]) -> bool:
    return bool(item.get("failed") or item.get("missing"))


def _operations(bad: dict[str, Any]) -> list[str]:
    """Returns the operations with samples that differ, and the names of the operations that the table lacks."""
    lines = ["| operation | samples | first difference |", "|---|---|---|"]
    lacking: Counter[str] = Counter()
    for name, item in bad.items():
        for problem in item["problems"]:
            if problem.startswith("missing: "):
                lacking.update(set(problem.removeprefix("missing: ").split()))
        if item.get("failed"):
            tried = item.get("passed", 0) + item["failed"]
            first = next(problem for problem in item["problems"] if problem.startswith("failed"))
            lines.append(f"| {name} | {item['failed']} of {tried} | {phrase(first)} |")
    names = ", ".join(f"`{name.rstrip('.')}`" for name in sorted(lacking))
    return [*lines, "", f"Operations that the table lacks: {names}.", "", *LEFT_OUT, ""]


_PORT = re.compile(
    r"(?:(\w+\(.*?\)): )?the port of \w+ differs: (.+?) on [\dx, ]+, ([\d.e+]+) times the noise of rounding"
    r"(, with IceNet's layers; with those of MLX)?"
)
"""A layer or a model: its options, the value that differs, the ratio, and whether it passes with MLX's layers."""
_ARRAYS = re.compile(r"(forward|gradient)\b[^\[]*\[(.*?)\] instead of \[(.*?)\]")
"""A sample of an operation: the first values of the port, and of PyTorch."""


def phrase(problem: str) -> str:
    """Returns one phrase for a failure, as `coverage_table.py` stores it: what differs, and by how much."""
    text = " ".join(problem.partition(": ")[2].partition(" | ")[0].split())
    if port := _PORT.match(text):
        case, value, ratio, layers = port.groups()
        case = f"`{case}`: " if case else ""
        layers = ", with IceNet's layers only" if layers else ""
        return f"{case}{value}: {float(ratio):,.0f} times the noise{layers}"
    if arrays := _ARRAYS.search(text):
        what = "outputs" if arrays[1] == "forward" else "gradients"
        ours, theirs = (numbers.split() for numbers in arrays.groups()[1:])
        if ("nan" in ours) or ("nan" in theirs):
            if not ("nan" in ours and "nan" in theirs):
                return f"{what} are NaN in {'the port' if 'nan' in ours else 'PyTorch'} only"
            return f"{what} are NaN at other places"
        for x, y in zip(ours, theirs, strict=False):  # as they are printed: numbers or booleans
            if x != y:
                return f"{what} differ: {x.rstrip('.')} instead of {y.rstrip('.')}"
        return f"{what} differ"
    return textwrap.shorten(text.replace("|", "/"), 100, placeholder=" ...")


def _total(entries: dict[str, Any]) -> Counter[str]:
    total: Counter[str] = Counter()
    for item in entries.values():
        total.update({key: item.get(key, 0) for key in ("passed", "failed", "missing", "skipped")})
    return total


def _row(what: str, tried: int, passed: int) -> str:
    share = 1000 * passed // max(tried, 1) / 10  # 100 % only if all pass
    return f"| {what} | {tried} | {passed} | {share:.1f} % |"
