"""Learning rates, compared with PyTorch's schedulers and the formulas of the papers; `icenet info --schedule`."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import error_line, is_one_line, metrics, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from icenet.cli.main import main
from icenet.commands import schedule as schedule_report
from icenet.core.config import Config
from icenet.core.config.training import TrainingConfig
from icenet.core.errors import ConfigError
from icenet.core.report import canvas
from icenet.core.training.schedule import adafactor_scalars, decay_start, explain_change, learning_rate
from icenet.core.training.trainer import Trainer

SCHEDULES = ("constant", "linear", "cosine", "step", "exponential", "inverse_sqrt", "wsd")


def rates(**settings_: Any) -> list[float]:
    training = TrainingConfig(**settings_)
    return [learning_rate(step, training) for step in range(training.max_steps)]


# ---- the formulas -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule, least", [
    ("constant", 0.0), ("linear", 0.002), ("cosine", 0.002), ("step", 0.0), ("exponential", 0.0)
])  # fmt: skip
def test_as_pytorchs_schedulers(schedule: str, least: float) -> None:
    """20 steps after a warmup of 5 steps. The last one has the lowest rate."""
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    schedulers = torch.optim.lr_scheduler
    theirs = {
        "constant": lambda: schedulers.ConstantLR(optimizer, factor=1.0),
        "linear": lambda: schedulers.LinearLR(optimizer, 1.0, least / 0.01, total_iters=19),
        "cosine": lambda: schedulers.CosineAnnealingLR(optimizer, T_max=19, eta_min=least),
        "step": lambda: schedulers.StepLR(optimizer, step_size=4, gamma=0.3),
        "exponential": lambda: schedulers.ExponentialLR(optimizer, gamma=0.3 ** (1 / 4)),
    }[schedule]()
    found = rates(
        schedule=schedule, learning_rate=0.01, min_learning_rate=least, max_steps=25, warmup_steps=5,
        decay_every=4, decay_factor=0.3,
    )  # fmt: skip
    assert found[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01], rel=1e-15)
    for rate in found[5:]:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        theirs.step()


def test_inverse_sqrt_is_that_of_the_transformer() -> None:
    """Vaswani et al. (2017), equation 3: d^-0.5 min(s^-0.5, s w^-1.5) in steps s = 1, 2, ..., warmup included."""
    width, warmup = 512, 40
    peak = width**-0.5 * warmup**-0.5
    found = rates(schedule="inverse_sqrt", learning_rate=peak, max_steps=400, warmup_steps=warmup)
    by_hand = [width**-0.5 * min(s**-0.5, s * warmup**-1.5) for s in range(1, 401)]
    assert found == pytest.approx(by_hand, rel=1e-12)
    floored = rates(schedule="inverse_sqrt", learning_rate=0.1, min_learning_rate=0.05, max_steps=9)
    assert floored == pytest.approx([0.1, 0.1 / math.sqrt(2), 0.1 / math.sqrt(3), *[0.05] * 6], rel=1e-12)


def test_warm_up_stable_decay_by_hand() -> None:
    given_ = {"schedule": "wsd", "learning_rate": 1.0, "min_learning_rate": 0.2, "max_steps": 10, "warmup_steps": 2}
    assert rates(**given_, decay_steps=4) == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert rates(**given_) == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 1, 0.6, 0.2])  # default: a fifth of the steps
    assert rates(**given_, decay_steps=0) == pytest.approx([0.5, *[1] * 9])
    # longer than the steps after the warmup: it starts at the end of the warmup, without a jump
    assert rates(**given_, decay_steps=40) == pytest.approx([0.5, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    assert decay_start(TrainingConfig(**given_, decay_steps=4)) == 6
    assert decay_start(TrainingConfig(**given_, decay_steps=0)) is None
    assert decay_start(TrainingConfig(schedule="cosine")) is None


def test_step_and_exponential_by_hand() -> None:
    given_ = {"learning_rate": 0.8, "max_steps": 40}  # default: falls every tenth of the steps
    assert rates(schedule="step", **given_)[::4] == pytest.approx([0.8 * 0.5**n for n in range(10)])
    assert rates(schedule="step", **given_)[3::4] == pytest.approx([0.8 * 0.5**n for n in range(10)])
    assert rates(schedule="exponential", **given_) == pytest.approx([0.8 * 0.5 ** (n / 4) for n in range(40)])
    assert min(rates(schedule="step", min_learning_rate=0.3, **given_)) == 0.3
    assert len(set(rates(schedule="step", learning_rate=1.0, max_steps=5))) == 5  # a tenth of 5 is at least a step


# ---- a run longer or shorter than its schedule ------------------------------------------------------------

WITH_AN_END = ("linear", "cosine", "step", "exponential", "wsd")


@pytest.mark.parametrize("schedule", WITH_AN_END)
def test_the_steps_of_the_schedule(schedule: str) -> None:
    given_: Any = {"schedule": schedule, "learning_rate": 0.1, "min_learning_rate": 0.01, "warmup_steps": 3}
    short, long = rates(max_steps=20, **given_), rates(max_steps=30, **given_)
    assert rates(max_steps=30, schedule_steps=20, **given_) == short + [short[-1]] * 10
    assert rates(max_steps=20, schedule_steps=30, **given_) == long[:20]
    assert rates(max_steps=20, schedule_steps=20, **given_) == short


@pytest.mark.parametrize("schedule", ["constant", "inverse_sqrt"])
def test_a_schedule_without_an_end_has_no_number_of_steps(schedule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(schedule=schedule, schedule_steps=3)
    assert is_one_line(caught.value, "schedule_steps", schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_note_about_a_changed_rate(schedule: str) -> None:
    """Of the step at which the run continues, if another number of steps has changed it by more than 1 %."""
    given_: Any = {"schedule": schedule, "learning_rate": 0.1, "min_learning_rate": 1e-5}
    before, after = (TrainingConfig(max_steps=steps, **given_) for steps in (20, 40))
    note = explain_change(20, before, after)
    if schedule not in WITH_AN_END:
        assert note is None
        return
    rates_ = [f"{learning_rate(step, training):.3g}" for step, training in ((20, after), (19, before))]
    assert rates_[0] != rates_[1]
    assert is_one_line(note, "step 21", *rates_, "training.schedule_steps=20")
    assert explain_change(20, before, before.model_copy(update={"max_steps": 40, "schedule_steps": 20})) is None
    assert explain_change(20, before, before.model_copy(update={"learning_rate": 0.2})) is None
    assert explain_change(20, before, TrainingConfig(max_steps=40, learning_rate=0.1, schedule="constant")) is None
    assert explain_change(1, before, after) is None or schedule in ("exponential", "linear")


def test_a_continued_run_says_that_its_rate_changes(tmp_path: Path, no_plots: None) -> None:
    config = tiny(tmp_path, "training.max_steps=4", "training.warmup_steps=0", "training.eval_every=null")
    Trainer.start(config, tmp_path / "run", backend="torch", quiet=True).fit()
    overrides = ["training.max_steps=8"]
    longer = Trainer.resume(tmp_path / "run", overrides=overrides, quiet=True)
    assert any(is_one_line(note, "learning rate of step 5", "schedule_steps=4") for note in longer.notes)
    kept = Trainer.resume(tmp_path / "run", overrides=[*overrides, "training.schedule_steps=4"], quiet=True)
    assert not kept.notes
    kept.fit()
    assert [record["learning_rate"] for record in metrics(tmp_path / "run")][3:] == [1e-4] * 5


def test_adafactors_scalars() -> None:
    """Shazeer and Stern (2018): 1 - beta_2 of step t is t^-0.8, the step at most 1 / sqrt(t)."""
    assert adafactor_scalars(0, 0.01) == (1.0, 0.01)
    assert adafactor_scalars(9, 0.5) == pytest.approx((10**-0.8, 10**-0.5))


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(SCHEDULES), st.integers(1, 60), st.integers(0, 90),
    st.one_of(st.just(0.0), st.floats(1e-9, 1)), st.floats(1e-6, 10),
    st.one_of(st.none(), st.integers(0, 90)), st.one_of(st.none(), st.integers(1, 90)), st.floats(0.01, 1),
)  # fmt: skip
def test_whatever_the_lengths(
    schedule: str,
    last: int,
    warmup: int,
    share: float,
    peak: float,
    decay: int | None,
    every: int | None,
    factor: float,
) -> None:
    """Rises to the peak, then never again; also for a warmup or decay longer than the run and a run of one step."""
    least = share * peak
    found = rates(
        schedule=schedule, max_steps=last, warmup_steps=warmup, learning_rate=peak, min_learning_rate=least,
        decay_steps=decay, decay_every=every, decay_factor=factor,
    )  # fmt: skip
    rising = min(warmup, last)
    assert found[:rising] == pytest.approx([peak * (step + 1) / warmup for step in range(rising)])
    after = found[rising:]
    room = 1e-12 * peak
    assert all(least - room <= rate <= peak + room for rate in after)
    assert all(later <= sooner + room for sooner, later in itertools.pairwise(after))
    decays = schedule in ("linear", "cosine") or (schedule == "wsd" and (last // 5 if decay is None else decay) > 0)
    if len(after) > 1 and decays:
        assert after[-1] == pytest.approx(least, abs=room)
    if len(after) > 1 and schedule in ("constant", "linear", "cosine", "step", "exponential"):
        assert after[0] == pytest.approx(peak)


# ---- what is shown ----------------------------------------------------------------------------------------


SCHEDULE = ("training.max_steps=200", "training.learning_rate=5e-3", "training.min_learning_rate=5e-4")


def report(folder: Path, *overrides: str) -> schedule_report.ScheduleReport:
    return schedule_report.of_target("quickstart", (f"data.source={tiny(folder).data.source}", *SCHEDULE, *overrides))


def test_the_table_is_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICENET_CACHE", str(tmp_path / "cache"))
    found = report(tmp_path)
    training = found.training
    assert [(name, step) for name, step, _ in found.rows()] == [
        ("first", 1), ("end of warmup", 20), ("a quarter", 50), ("half", 100), ("three quarters", 150), ("last", 200)
    ]  # fmt: skip
    assert all(rate == learning_rate(step - 1, training) for _, step, rate in found.rows())
    assert found.rate(20) == training.learning_rate and found.rate(200) == training.min_learning_rate
    config = tiny(tmp_path, "training.eval_every=null")
    Trainer.start(config, tmp_path / "run", backend="torch", quiet=True).fit(until=8)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    of_run = schedule_report.of_target(str(tmp_path / "run"))
    assert [record["learning_rate"] for record in logged] == [of_run.rate(record["step"]) for record in logged]
    assert of_run.draw() == tmp_path / "run" / "schedule.png"


def test_rows_of_short_runs_and_of_a_decay(tmp_path: Path) -> None:
    assert report(tmp_path, "training.max_steps=1", "training.warmup_steps=0").rows() == [("first, last", 1, 0.005)]
    rows = report(tmp_path, "training.schedule=wsd", "training.max_steps=1000").rows()
    assert ("start of decay", 800, 0.005) in rows
    cut = report(tmp_path, "training.warmup_steps=300").rows()
    assert cut[-1][:2] == ("end of warmup, last", 200) and cut[-1][2] == pytest.approx(0.005 * 200 / 300)


def test_the_line_of_blocks(tmp_path: Path) -> None:
    line = report(tmp_path, "training.schedule=linear", "training.min_learning_rate=0").sparkline(40)
    assert len(line) == 40 and line[0] == line[-1] == "▁" and "█" in line
    heights = ["▁▂▃▄▅▆▇█".index(block) for block in line]
    top = heights.index(7)
    assert heights[:top] == sorted(heights[:top]) and heights[top:] == sorted(heights[top:], reverse=True)
    assert len(report(tmp_path, "training.max_steps=7").sparkline(40)) == 7


def test_groups_are_told(tmp_path: Path) -> None:
    groups = 'training.parameter_groups=[{parameters: ["token_embedding.*"], learning_rate: 0.001}]'
    found = report(tmp_path, groups, "training.optimizer=muon").groups
    assert [(group.method, group.learning_rate, group.weight_decay, group.tensors) for group in found] == [
        ("adamw", pytest.approx(0.001), 0.1, 1), ("adamw", 0.005, 0.0, 22), ("muon", 0.005, 0.1, 12),
        ("adamw", 0.005, 0.1, 1),
    ]  # fmt: skip
    assert found[0].values == 257 * 128 and found[0].parameters == "token_embedding.weight"
    assert found[1].parameters.endswith("and 21 more")


@pytest.mark.parametrize(
    "schedule",
    [name if name in ("constant", "wsd") else pytest.param(name, marks=pytest.mark.slow) for name in SCHEDULES],
)
def test_the_picture(tmp_path: Path, schedule: str) -> None:
    found = report(tmp_path, f"training.schedule={schedule}")
    path = found.draw(tmp_path / "new" / "x.png")
    assert path is not None and path.read_bytes().startswith(b"\x89PNG")
    image = pytest.importorskip("matplotlib.image").imread(path)
    image = image[:, : int(0.85 * image.shape[1])]  # without the last value's label
    blue = abs(image[..., :3] - [0, 0x72 / 255, 0xB2 / 255]).max(-1) < 0.02
    columns = blue.any(0).nonzero()[0]
    heights = blue.argmax(0)[columns]  # of the topmost blue point, from above
    assert columns.size > 0.8 * image.shape[1]
    # the curve is at its highest at a tenth of the run, where the warmup ends, and lower before
    highest = columns[heights <= heights.min() + 2]
    assert highest[0] - columns[0] == pytest.approx(0.1 * (columns[-1] - columns[0]), abs=25)
    groups = 'training.parameter_groups=[{parameters: ["token_embedding.*"], learning_rate: 0.001}]'
    several = report(tmp_path, f"training.schedule={schedule}", groups).draw(tmp_path / "y.png")
    drawn = pytest.importorskip("matplotlib.image").imread(several)
    assert (abs(drawn[..., :3] - [0xD5 / 255, 0x5E / 255, 0]).max(-1) < 0.02).any(0).mean() > 0.7  # its own curve


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not canvas.available()
    found = report(tmp_path)
    assert found.draw(tmp_path / "x.png") is None and not (tmp_path / "x.png").exists()
    found.render(None)
    assert "pip install 'icenet[plot]'" in capsys.readouterr().out


def test_the_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "quickstart", "--schedule"]) == 0
    out = capsys.readouterr().out
    training = Config.from_yaml("quickstart").training
    for shown in (f"cosine, {training.max_steps} steps", "end of warmup", "█", "schedule.png"):
        assert shown in out
    assert (here / "schedule.png").is_file()
    (here / "schedule.png").unlink()
    assert main(["info", "quickstart", "--schedule", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    steps = range(training.max_steps)
    assert numbers["steps"] == [step + 1 for step in steps]
    assert numbers["learning_rates"] == [learning_rate(step, training) for step in steps]
    assert not (here / "schedule.png").exists()


@pytest.mark.parametrize("arguments, names", [
    ("info --schedule", ["--schedule", "TARGET"]),
    ("info quickstart --out x.png", ["--out", "--schedule"]),
    ("info quickstart --schedule --out x.svg", ["x.svg", "PNG"]),
])  # fmt: skip
def test_wrong_requests(here: Path, arguments: str, names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    assert is_one_line(error_line(capsys.readouterr().err), *names)
