"""A data set and a loss of the user: `data.kind: mine.py:MyData`, `training.loss: mine.py:my_loss`, and `Trainer`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, both_backends, is_one_line, losses, metrics, resume, same_bits, state

from icenet.cli.main import main
from icenet.core.config import Config, custom
from icenet.core.data.user import UserDataset
from icenet.core.errors import DataError, IceNetError, UsageError
from icenet.core.training.trainer import Trainer

pytest.importorskip("torch")
pytest.importorskip("mlx")
importlib.import_module("icenet.blas")

pytestmark = pytest.mark.usefixtures("no_plots")

DATA = """
import numpy as np


class Sums:
    '''Rows of tokens; the label is how many of them are odd.'''

    def __init__(self, options, seed):
        self.options, self.seed = options, seed

    def train_batch(self, step, batch_size):
        draws = np.random.default_rng([self.seed, step])
        inputs = draws.integers(0, 8, (batch_size, self.options.length))
        return {"inputs": inputs, "labels": (inputs % 2).astype(np.float64), "weight": np.full(batch_size, 2.0)}

    def validation_batches(self, batch_size, count):
        for index in range(2):
            yield self.train_batch(10**6 + index, batch_size)
"""
LOSS = {
    "mine_mlx.py": """
import mlx.core as mx


def squares(output, batch):
    errors = (output.mean(axis=-1) - batch["labels"]) ** 2
    return (errors.mean(axis=1) * batch["weight"]).mean()
""",
    "mine_torch.py": """
def squares(output, batch):
    errors = (output.mean(dim=-1) - batch["labels"]).square()
    return (errors.mean(dim=1) * batch["weight"]).mean()
""",
}
LABELLED = """
def squares(output, batch):
    counted = (batch["labels"] >= 0).FLOAT
    return ((output.mean(-1).mean(-1) - batch["labels"]) ** 2 * counted).sum() / counted.sum()
"""
"""A loss whose value is 0 / 0 without labels."""
CONFIG = """
model: {type: transformer, hidden_size: 8, num_layers: 1, num_heads: 2, vocab_size: 8, max_seq_length: 6}
data: {kind: "mine.py:Sums", length: 6}
training:
  max_steps: 4
  batch_size: 4
  learning_rate: 1e-2
  checkpoint_every: 2
  eval_every: 2
  loss: "mine.py:squares"
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in {"mine.py": DATA, **LOSS, "my.yaml": CONFIG}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(custom, "_trusted", set())
    return tmp_path


def trainer(run: str, backend: str = "torch", *overrides: str) -> Trainer:
    return Trainer.start(Config.from_yaml("my.yaml", overrides), Path(run), backend=backend, quiet=True)


def test_both_backends_train_alike_and_resume_exactly(project: Path) -> None:
    """With micro-batches too, whose losses add up to that of the batch; the loss falls; validation has the loss."""
    for backend in ("mlx", "torch"):
        trainer(backend, backend).fit()
    ours, theirs = losses(Path("mlx")), losses(Path("torch"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert theirs[-1] < theirs[0]
    evaluated = [record["validation_loss"] for record in metrics(Path("torch")) if "validation_loss" in record]
    assert len(evaluated) == 2 and "rows_per_second" in metrics(Path("torch"))[0]
    trainer("parts", "torch", "training.gradient_accumulation=2", "model.dropout=0").fit()
    trainer("whole", "torch", "model.dropout=0").fit()
    np.testing.assert_allclose(losses(Path("parts")), losses(Path("whole")), rtol=1e-6)
    first = trainer("cut", "torch")
    first.fit(until=2)
    resume(Path("cut"), "torch")
    assert same_bits(state(Path("cut")), state(Path("torch"))) and losses(Path("cut")) == theirs


def test_a_batch_that_depends_on_earlier_ones_is_seen_when_a_run_continues(project: Path) -> None:
    """A new run cannot see it: two calls for the first step agree. Data of seed and step have no such note."""
    stateful = DATA.replace(
        "def train_batch(self, step, batch_size):",
        """last = None

    def train_batch(self, step, batch_size):
        if step != self.last:
            self.last, self.draws = step, getattr(self, "draws", 0) + 1
        step = self.draws""",
    )
    (project / "stateful.py").write_text(stateful)
    for file, is_said in (("mine.py", False), ("stateful.py", True)):
        trainer(file.removesuffix(".py"), "torch", f"data.kind={file}:Sums").fit(until=3)
        notes = Trainer.resume(Path(file.removesuffix(".py")), quiet=True).notes
        assert any("the batch of step 3 is not the one" in note for note in notes) is is_said


def test_a_checkpoint_does_not_run_the_code_it_names(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer("run", "torch").fit(until=2)
    custom._trusted.clear()
    assert main(["train", "--resume", "run", "--quiet"]) == 2
    assert is_one_line(capsys.readouterr().err.strip(), "mine.py", "--trust-code")
    assert main(["train", "--resume", "run", "--quiet", "--trust-code"]) == 0


def test_the_losses_of_the_two_backends_are_compared(project: Path) -> None:
    assert not any("training.loss" in note for note in trainer("same").notes)
    (project / "mine_torch.py").write_text(LOSS["mine_torch.py"].replace(".mean()\n", ".sum()\n"))
    assert any("make the two functions agree" in note for note in trainer("other").notes)
    (project / "mine_mlx.py").unlink()
    (project / "mine.py").write_text(DATA + LOSS["mine_torch.py"])
    assert any("mine_mlx.py" in note for note in trainer("missing").notes)


@both_backends
def test_parity_uses_the_loss(project: Path, backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    if backend == "torch":  # a constant factor of the loss, which no other check sees
        (project / "mine_torch.py").write_text(
            LOSS["mine_torch.py"].replace('batch["weight"]', '(batch["weight"] * 1.01)')
        )
    code = main(["parity", "my.yaml", "--steps", "1"])
    assert code == (1 if backend == "torch" else 0), capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("draws = np.random.default_rng([self.seed, step])", "draws = np.random.default_rng()", ["seed and step"]),
        ('"inputs": inputs, ', "", ["has no inputs"]),
        ("np.full(batch_size, 2.0)", "2.0", ["weight", "numpy array"]),
        ("np.full(batch_size, 2.0)", "np.full(3, 2.0)", ["rows", "weight 3"]),
        ("np.full(batch_size, 2.0)", "np.full(batch_size, 'x')", ["weight", "dtype"]),
        ("np.full(batch_size, 2.0)", "np.full(batch_size, 2**40)", ["weight", "int32"]),
        ("inputs % 2", "inputs % self.zero", ["AttributeError", "mine.py, line 14"]),
        ("self.options.length", "self.options.size", ["data.size", "known: kind, length"]),
        ("def train_batch", "def batch", ["no class Sums", "train_batch"]),
        ("import numpy as np", "import nampy", ["nampy"]),
        ("self.options, self.seed = options, seed", "raise ValueError('no')", ["cannot be created", "no"]),
        ("0, 8, (batch", "0, 9, (batch", ["vocabulary"]),
    ],
)
def test_a_data_set_that_is_wrong_is_one_line(old: str, new: str, names: list[str], project: Path) -> None:
    assert old in DATA
    (project / "mine.py").write_text(DATA.replace(old, new))
    with pytest.raises(IceNetError) as caught:
        trainer("run").fit()
    assert is_one_line(caught.value, *names[:1]) and all(name in str(caught.value) for name in names[1:])


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("def squares(output, batch):\n    return output\n", ["returned an array"]),
        ("def squares(output, batch):\n    return 1.0\n", ["returned float"]),
        ("def squares(output, batch):\n    return batch['label'].mean()\n", ["line 2", "the loss fails", "KeyError"]),
        ("squares = 3\n", ["no function squares"]),
        (
            "def squares(output, batch):\n    return output.detach().mean()\n",
            ["the loss does not depend", "training.loss"],
        ),
    ],
)
def test_a_loss_that_is_wrong_is_one_line(text: str, names: list[str], project: Path) -> None:
    (project / "mine_torch.py").write_text(text)
    with pytest.raises(IceNetError) as caught:
        trainer("run").fit()
    assert is_one_line(caught.value, *names[:1]) and all(name in str(caught.value) for name in names[1:])


def test_data_and_loss_from_python(project: Path) -> None:
    """The same numbers as from files; a continuation needs them again."""
    torch = importlib.import_module("torch")
    trainer("files").fit()

    class Mine:
        def __init__(self, seed: int) -> None:
            self.seed = seed

        def train_batch(self, step: int, batch_size: int) -> dict[str, np.ndarray]:
            inputs = np.random.default_rng([self.seed, step]).integers(0, 8, (batch_size, 6))
            return {"inputs": inputs, "labels": (inputs % 2) * 1.0, "weight": np.full(batch_size, 2.0)}

        def validation_batches(self, batch_size: int, count: int | None) -> Iterator[dict[str, np.ndarray]]:
            yield self.train_batch(10**6, batch_size)

    def squares(output: Any, batch: dict[str, Any]) -> Any:
        assert output.dtype == torch.float32
        return ((output.mean(-1) - batch["labels"]).square().mean(1) * batch["weight"]).mean()

    plain = Config.from_yaml("my.yaml").with_overrides("training.loss=cross_entropy", "data={kind: text}")
    options: dict[str, Any] = {"data": Mine(plain.seed), "loss": squares}
    Trainer.start(plain, Path("python"), backend="torch", quiet=True, **options).fit(until=2)
    with pytest.raises(UsageError, match=r"data and loss given in Python.*data=\.\.\., loss=\.\.\."):
        Trainer.resume(Path("python"), quiet=True)
    Trainer.resume(Path("python"), quiet=True, **options).fit()
    assert losses(Path("python")) == losses(Path("files"))


@both_backends
def test_rows_without_labels_do_not_make_the_loss_nan(project: Path, backend: str) -> None:
    """In a micro-batch, or in the evaluation of a process without rows, where a mean over labels is 0 / 0."""
    (project / "mine.py").write_text(
        DATA.replace("(inputs % 2).astype(np.float64)", "np.where(np.arange(batch_size) < 2, 1, -1)")
    )
    (project / "mine_mlx.py").write_text(LABELLED.replace("FLOAT", "astype(output.dtype)"))
    (project / "mine_torch.py").write_text(LABELLED.replace("FLOAT", "to(output.dtype)"))
    whole = trainer("whole", backend, "model.dropout=0", "training.max_steps=1")
    whole.fit()
    trainer("parts", backend, "model.dropout=0", "training.max_steps=1", "training.gradient_accumulation=2").fit()
    np.testing.assert_allclose(losses(Path("parts")), losses(Path("whole")), rtol=1e-6)
    ours, theirs = state(Path("parts")), state(Path("whole"))
    means = [name for name in theirs if name.endswith(".exp_avg")]  # Adam divides by rounding errors of zeros
    assert means and all(np.allclose(ours[name], theirs[name], atol=1e-7) for name in means)
    batch = whole.dataset.train_batch(0, 4)
    found = whole.engine.evaluate({**batch, "labels": np.full_like(batch["labels"], -1)})
    assert found.loss == 0 and found.labels == 0


def test_changed_code_is_said(project: Path) -> None:
    """That of the loss and that of the data, whatever its unit is."""
    (project / "mine.py").write_text(DATA.replace("Sums:", "Sums:\n    unit = 'tok'\n"))
    trainer("run").fit(until=2)
    assert not any("another version" in note for note in Trainer.resume(Path("run"), quiet=True).notes)
    for name in ("mine.py", "mine_torch.py"):
        (project / name).write_text((project / name).read_text() + "\n")
    notes = Trainer.resume(Path("run"), quiet=True).notes
    assert sum("was trained with another version of mine_torch.py" in note for note in notes) == 1
    assert sum("the data of mine.py:Sums is not what" in note for note in notes) == 1


def test_what_identifies_the_data(project: Path) -> None:
    """The code, the options and the seed."""
    found = set()
    for length, seed in ((6, 0), (5, 0), (6, 1)):
        section: Any = Config.from_yaml("my.yaml", [f"data.length={length}"]).data
        found.add(UserDataset.open(section, seed).fingerprint)
    (project / "mine.py").write_text(DATA + "\n")
    section = Config.from_yaml("my.yaml").data
    found.add(UserDataset.open(section, 0).fingerprint)
    assert len(found) == 4
    with pytest.raises(DataError, match="is a NoneType"):
        UserDataset(type("Bad", (), {"train_batch": lambda *_: None})(), "Bad", "").train_batch(0, 1)


def test_the_example_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = []
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    section = text.partition("\n## Your own data and loss")[2].partition("\n## ")[0]
    for language, content in re.findall(r"```(py|yaml|sh)\n(.*?)```", section, re.S):
        if language == "sh":
            commands += content.splitlines()
        else:
            Path(content.partition("\n")[0].removeprefix("# ")).write_text(content)
    assert len(commands) == 2
    for command in commands:
        assert main(command.split()[1:]) == 0
    assert losses(Path("runs/mine"))[-1] < losses(Path("runs/mine"))[0]
