"""`icenet quickstart`: one run that changes backend half way, judged against one that does not."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from icenet.core import backends
from icenet.core import files as staging
from icenet.core.config import Config
from icenet.core.errors import BackendError, UsageError
from icenet.core.report import plots
from icenet.core.report.metrics import MetricsLog
from icenet.core.training.checkpoint import path_of
from icenet.core.training.trainer import Trainer
from icenet.parity import yardstick
from icenet.parity.texts import TextComparison, compare_texts

PROMPT = "def "
_MARK = "quickstart.json"
_OURS = ("mlx", "torch", "quickstart.png", _MARK)
_SCRATCH = ".reference-"


@dataclass(frozen=True)
class Report:
    """What quickstart found."""

    out: Path
    half: int
    steps: list[int]
    judgement: yardstick.CurveJudgement
    final_loss: dict[str, float]
    texts: TextComparison
    plot: Path | None
    seconds: float

    @property
    def passed(self) -> bool:
        return self.judgement.passed and self.texts.equal_but_for_ties


def run(out: Path, overrides: Sequence[str] = (), quiet: bool = False) -> Report:
    """Trains, resumes on the other backend, compares; leaves its runs, metrics and plot in `out`.

    Raises:
        BackendError: one of the backends is missing.
        UsageError: `out` holds something that is not an earlier quickstart.
    """
    began = time.perf_counter()
    missing = [name for name in backends.PACKAGES if not backends.installed(name)]
    if missing:
        raise BackendError(f"quickstart needs both backends, and {missing[0]} is missing: pip install 'icenet[all]'")
    backends.exact_products()
    config = Config.from_yaml("quickstart", overrides)
    half = config.training.max_steps // 2
    if half < 1:
        raise UsageError("quickstart: training.max_steps must be at least 2, to change backend half way")
    _clear(out)

    # the half-way checkpoint stays: the run in MLX ends by adding to it
    Trainer.start(config, out / "mlx", backend="mlx", quiet=quiet).fit(until=half)
    checkpoint = path_of(out / "mlx", half)
    Trainer.resume(checkpoint, run=out / "torch", backend="torch", quiet=quiet).fit()
    with tempfile.TemporaryDirectory(dir=out, prefix=_SCRATCH) as scratch:  # the yardstick: that half in float64
        reference = Path(scratch) / "torch float64"
        Trainer.resume(checkpoint, run=reference, backend="torch", device="cpu", dtype="float64", quiet=quiet).fit()
        curves = {"reference": _losses(reference)}
    # last: it may remove the half-way checkpoint, if few are kept
    Trainer.resume(out / "mlx", backend="mlx", quiet=quiet).fit()
    curves |= {name: _losses(out / name) for name in ("mlx", "torch")}

    steps = sorted(curves["mlx"])
    after = [step for step in steps if step > half]
    mlx, torch, exact = (np.array([curves[name][step] for step in after]) for name in ("mlx", "torch", "reference"))
    judgement = yardstick.judge_curve(mlx, torch, exact)
    texts = compare_texts(out / "mlx", PROMPT, seed=config.seed)
    plot = plots.plot_parity(
        out / "quickstart.png",
        steps=steps,
        curves={"MLX": [curves["mlx"][step] for step in steps], "PyTorch, from MLX's checkpoint": torch},
        gap=judgement.gap,
        allowed=yardstick.FACTOR * judgement.noise,
        switch_step=half,
        switch_label=f"checkpoint at step {half}",
        title="One run, two backends",
        passed=judgement.passed,
    )
    report = Report(
        out,
        half,
        after,
        judgement,
        {name: curves[name][steps[-1]] for name in ("mlx", "torch")},
        texts,
        plot,
        time.perf_counter() - began,
    )
    staging.write_text(out / _MARK, json.dumps(_figures(report), indent=1))
    return report


def _losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in MetricsLog.read(run / "metrics.jsonl") if "loss" in record}


def _clear(out: Path) -> None:
    """Makes room for the result; only what an earlier quickstart left is removed."""
    ours = (out / _MARK).is_file()
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: a file; give --out a folder")
    if out.is_dir() and any(out.iterdir()) and not ours:
        raise UsageError(f"{out}: holds other files; give --out an empty folder")
    try:
        if ours:
            for path in [*(out / name for name in _OURS), *out.glob(f"{_SCRATCH}*")]:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        (out / _MARK).write_text("{}", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{out}: cannot be written ({error.strerror}); give another --out") from None


def _figures(report: Report) -> dict[str, object]:
    judgement = report.judgement
    return {
        "passed": report.passed,
        "largest_gap": float(judgement.gap.max()),
        "largest_torch_fp32_to_fp64": float(judgement.noise.max()),
        "worst_ratio": judgement.worst,
        "worst_step": report.steps[judgement.worst_step],
        "allowed_ratio": yardstick.FACTOR,
        "final_loss": report.final_loss,
        "texts_equal": report.texts.equal,
        "seconds": round(report.seconds, 1),
    }


def render(report: Report) -> None:
    """Prints the report for a person."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    judgement = report.judgement
    table = Table(title=f"The same run, steps {report.half + 1} to {report.steps[-1]}, on each backend")
    table.add_column("")
    table.add_column("figure", justify="right")
    table.add_row("final loss, MLX all the way", f"{report.final_loss['mlx']:.6f}")
    table.add_row("final loss, finished in PyTorch", f"{report.final_loss['torch']:.6f}")
    table.add_row("largest gap between the two curves", f"{judgement.gap.max():.2e}")
    table.add_row("largest gap between PyTorch's fp32 and fp64", f"{judgement.noise.max():.2e}")
    table.add_row(
        f"gap / PyTorch's own noise, worst (step {report.steps[judgement.worst_step]})",
        f"{judgement.worst:.2f} of {yardstick.FACTOR:g} allowed",
    )
    console.print(table)
    title = f"Both backends, one seed: {report.texts.verdict}"
    console.print(Panel(Text(PROMPT + report.texts.text), title=title, title_align="left"))
    if report.passed:
        console.print("[bold green]PASSED[/]  MLX and PyTorch are one run: as close as PyTorch is to itself.")
    else:
        console.print("[bold red]DIFFERS[/]  more than rounding explains; icenet parity finds where.")
    for name, what in (
        ("mlx", "the run in MLX, with the half-way and the last checkpoint"),
        ("torch", "the same run, finished in PyTorch"),
        ("quickstart.png", "the picture"),
    ):
        if (report.out / name).exists():
            console.print(f"  {report.out / name}  {what}", soft_wrap=True)
    if report.plot is None:
        console.print("  no picture: pip install 'icenet[plot]'", markup=False)
    console.print(f"  took {report.seconds:.0f} s. Next: icenet generate {report.out / 'mlx'} --prompt 'import '")
