"""Text data sets: the windows or rows of each batch, their order, and runs that carry their tokenizer."""

from __future__ import annotations

import hashlib
import json
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BACKENDS, is_one_line, resume, tiny, train

import icenet
from icenet.cli.main import main
from icenet.core import backends, rng
from icenet.core.config import Config, DataConfig
from icenet.core.data.datasets import dataset_for, open_dataset
from icenet.core.data.text.documents import DocumentDataset
from icenet.core.data.text.packed import TextDataset
from icenet.core.errors import ConfigError, DataError
from icenet.core.runs import checkpoint
from icenet.core.tokenizers import get_tokenizer
from icenet.core.tokenizers.base import decode_continuation
from icenet.core.tokenizers.bytes import ByteTokenizer
from icenet.core.training.trainer import Trainer
from icenet.parity.configuration import run as parity
from icenet.parity.measures import rms
from icenet.parity.yardstick import judge

EOT = 256


def counting(n: int, seq_length: int, seed: int = 0, fraction: float = 0.0) -> TextDataset:
    """Returns a data set in which each token is its own position."""
    return TextDataset(np.arange(n), ByteTokenizer(), seq_length=seq_length, seed=seed, validation_fraction=fraction)


# ---- windows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "seq_length", "batch_size"), [(1000, 7, 4), (64, 16, 3), (33, 16, 1), (500, 1, 5)])
def test_an_epoch_covers_windows_once(n: int, seq_length: int, batch_size: int) -> None:
    data = counting(n, seq_length, seed=3)
    steps = data.steps_per_epoch(batch_size)
    assert steps == ((n - seq_length) // seq_length) // batch_size
    for epoch in range(3):
        starts = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            batch = data.train_batch(step, batch_size)
            assert batch["inputs"].shape == batch["labels"].shape == (batch_size, seq_length)
            assert batch["inputs"].dtype == batch["labels"].dtype == np.int32
            # every token is its position, so a window counts up, and its labels are one further on
            np.testing.assert_array_equal(
                batch["inputs"], batch["inputs"][:, :1] + np.arange(seq_length, dtype=np.int32)
            )
            np.testing.assert_array_equal(batch["labels"], batch["inputs"] + 1)
            assert batch["labels"].max() < n
            starts += batch["inputs"][:, 0].tolist()
        assert len({start % seq_length for start in starts}) == 1
        assert len(set(starts)) == len(starts) == steps * batch_size


def test_order_is_a_pure_function_of_seed_and_step() -> None:
    data = counting(5000, 8, seed=1)
    forward = [data.train_batch(step, 16)["inputs"] for step in range(100)]
    fresh = counting(5000, 8, seed=1)
    for step in (99, 0, 50, 38, 39, 3):
        np.testing.assert_array_equal(fresh.train_batch(step, 16)["inputs"], forward[step])
    assert not np.array_equal(counting(5000, 8, seed=2).train_batch(0, 16)["inputs"], forward[0])
    steps = data.steps_per_epoch(16)
    firsts = [np.sort(np.concatenate([b[:, 0] for b in forward[e * steps : (e + 1) * steps]])) for e in (0, 1)]
    assert (firsts[0] % 8)[0] != (firsts[1] % 8)[0]  # another offset (by this seed) in each epoch
    assert not np.array_equal(forward[0] % 5000, forward[steps] % 5000)
    with pytest.raises(ValueError, match="from 0"):
        data.train_batch(-1, 16)


def test_order_follows_the_documented_formula() -> None:
    """The windows of a step, computed here from the random words alone."""
    data = counting(999, 10, seed=5)
    windows, batch_size = (999 - 10) // 10, 9
    steps = windows // batch_size
    step = steps + 4
    offset = int(rng.bits(rng.key(5, "data offset", 1), 1)[0]) % 10
    order = rng.permutation(rng.key(5, "data", 1), windows)
    expected = offset + 10 * order[4 * batch_size : 5 * batch_size]
    np.testing.assert_array_equal(data.train_batch(step, batch_size)["inputs"][:, 0], expected)


def test_validation_is_the_tail_and_always_the_same() -> None:
    data = counting(1000, 9, fraction=0.25)
    assert (data.num_train_tokens, data.num_validation_tokens) == (750, 250)
    every = list(data.validation_batches(4))
    starts = np.concatenate([batch["inputs"][:, 0] for batch in every])
    np.testing.assert_array_equal(starts, 750 + 9 * np.arange(249 // 9))
    assert [len(batch["inputs"]) for batch in every] == [4] * 6 + [3]
    assert all((batch["labels"] == batch["inputs"] + 1).all() and batch["labels"].max() < 1000 for batch in every)
    some = [batch["inputs"][:, 0] for batch in data.validation_batches(4, 3)]
    np.testing.assert_array_equal(some, [batch["inputs"][:, 0] for batch in data.validation_batches(4, 3)])
    spread = np.concatenate(some)
    assert len(set(spread.tolist())) == 12 and set(spread.tolist()) <= set(starts.tolist())
    assert spread[0] == 750 and spread[-1] > 950 and np.ptp(np.diff(spread)) <= 9
    trained = np.concatenate([data.train_batch(step, 8)["labels"].ravel() for step in range(40)])
    assert trained.max() < 750
    assert len(list(data.validation_batches(1000, 5))) == 1
    exact = counting(1000, 9, fraction=0.252)  # 28 windows; the last input has no next token
    assert sum(len(batch["labels"]) for batch in exact.validation_batches(4)) == 27


def test_no_validation() -> None:
    data = counting(100, 9)
    assert data.num_validation_tokens == 0 and list(data.validation_batches(4, 2)) == []


@pytest.mark.parametrize(
    ("n", "options", "batch_size", "names"),
    [
        (100, {"seq_length": 20}, 5, ("100 training tokens", " 120", "data.source", "data.seq_length (20)", "(5)")),
        (100, {"seq_length": 20, "validation_fraction": 0.1}, 1, (" 10 ", " 21", "data.validation_fraction (0.1")),
        (100, {"seq_length": 20}, 0, ("training.batch_size", " 0")),
        (100, {"seq_length": 0}, 1, ("data.seq_length", " 0")),
        (100, {"seq_length": 4, "validation_fraction": 1.0}, 1, ("data.validation_fraction", "1.0")),
    ],
)
def test_too_few_tokens_are_one_line(
    n: int, options: dict[str, Any], batch_size: int, names: tuple[str, ...]
) -> None:
    """The error gives what there is, what is needed and which keys to change."""
    with pytest.raises(DataError) as caught:
        TextDataset(np.arange(n), ByteTokenizer(), seed=0, **options).steps_per_epoch(batch_size)
    assert is_one_line(caught.value, *names)


def test_just_enough_tokens() -> None:
    assert counting(100, 20).steps_per_epoch(4) == 1
    assert counting(120, 20).steps_per_epoch(5) == 1
    with pytest.raises(DataError):
        counting(100, 20).train_batch(0, 5)


# ---- padded rows of documents -----------------------------------------------------------------------------


def expected_rows(texts: list[list[int]], length: int) -> list[tuple[list[int], list[int]]]:
    """Returns inputs and labels of each row, by a loop: end of text, the text, end of text, in steps of `length`."""
    rows = []
    for text in texts:
        whole = [EOT, *text, EOT]
        for first in range(0, len(whole) - 1, length):
            labels = whole[1:][first : first + length]
            rows.append((whole[:-1][first : first + length], labels))
    return rows


def documents(lengths: list[int], length: int, seed: int = 0, fraction: float = 0.0) -> DocumentDataset:
    """Returns a data set of documents with so many tokens, all different."""
    texts = np.split(np.arange(sum(lengths)) % 250, np.cumsum(lengths)[:-1])
    tokens = np.concatenate([np.append(text, EOT) for text in texts])[:-1]
    starts = np.flatnonzero(np.append(EOT, tokens[:-1]) == EOT)
    return DocumentDataset(
        tokens, ByteTokenizer(), starts=starts, seq_length=length, seed=seed, validation_fraction=fraction
    )


def rows_of(batch: dict[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    """Yields inputs and labels of each row without the padding, which is checked here."""
    inputs, labels, mask = batch["inputs"], batch["labels"], batch["attention_mask"]
    assert inputs.dtype == labels.dtype == np.int32 and mask.dtype == np.bool_
    assert inputs.shape == labels.shape == mask.shape
    counts = mask.sum(axis=1)
    np.testing.assert_array_equal(mask, np.arange(mask.shape[1]) < counts[:, None])  # padding on the right
    np.testing.assert_array_equal(labels == -100, ~mask)
    for row, count in enumerate(counts.tolist()):
        yield inputs[row, :count].tolist(), labels[row, :count].tolist()


@pytest.mark.parametrize(("lengths", "length"), [([3, 40, 1, 16, 17, 15, 200, 2, 33], 16), ([1], 4), ([5, 5, 9], 50)])
def test_every_document_begins_a_row(lengths: list[int], length: int) -> None:
    data = documents(lengths, length, seed=3)
    texts = [text.tolist() for text in np.split(np.arange(sum(lengths)) % 250, np.cumsum(lengths)[:-1])]
    expected = expected_rows(texts, length)
    assert data.steps_per_epoch(1) == len(expected) and data.steps_per_epoch(2 if len(expected) > 1 else 1) >= 1
    for epoch in range(2):
        batches = [data.train_batch(epoch * len(expected) + step, 1) for step in range(len(expected))]
        found = [row for batch in batches for row in rows_of(batch)]
        order = rng.permutation(rng.key(3, "data", epoch), len(expected))
        assert found == [expected[index] for index in order]
        for batch, (inputs, _) in zip(batches, found, strict=True):  # one row: up to the next multiple of 16
            assert batch["inputs"].shape[1] == min(length, -(-len(inputs) // 16) * 16)
    assert data.items_per_row == max(1, round(sum(len(labels) for _, labels in expected) / len(expected)))


def test_the_order_of_rows_is_a_pure_function_of_seed_and_step() -> None:
    lengths = np.random.default_rng(1).integers(1, 90, 500).tolist()
    data, fresh = documents(lengths, 32, seed=1), documents(lengths, 32, seed=1)
    forward = [data.train_batch(step, 8) for step in range(150)]
    for step in (149, 0, 75, 3):
        again = fresh.train_batch(step, 8)
        assert all((again[name] == forward[step][name]).all() for name in again)
    other = documents(lengths, 32, seed=2).train_batch(0, 8)["inputs"]
    assert other.shape != forward[0]["inputs"].shape or (other != forward[0]["inputs"]).any()
    assert max(batch["inputs"].shape[1] for batch in forward) == 32


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("lengths", [[30] * 10, [300], [1] * 300, [7, 250, 3, 60], [100, 100]])
def test_no_label_is_in_both_parts_and_none_is_lost(lengths: list[int], fraction: float) -> None:
    """All tokens except the one at the cut are a label in exactly one part, wherever the cut is."""
    data = documents(lengths, 16, fraction=fraction)
    train = [row for step in range(data.steps_per_epoch(1)) for row in rows_of(data.train_batch(step, 1))]
    validation = [row for batch in data.validation_batches(3) for row in rows_of(batch)]
    labels = [sorted(label for row in rows for label in row[1]) for rows in (train, validation)]
    tokens = data._tokens.tolist()
    cut = data.num_train_tokens
    expected = [tokens[:cut], [*tokens[cut:], EOT]]
    if tokens[cut] == EOT or tokens[cut - 1] != EOT:  # the first token is an input only, or the end of a text before
        expected[1] = expected[1][1:]
    assert labels == [sorted(part) for part in expected]
    some = [row for batch in data.validation_batches(2, 1) for row in rows_of(batch)]
    assert len(some) == min(2, len(validation)) and all(row in validation for row in some)


def test_repeated_ends_of_text_and_too_few_rows(bpe: Path, tmp_path: Path) -> None:
    """A file may contain end-of-text tokens, as a file of stories does. Two in a row have no document between."""
    end = "<|endoftext|>"
    (tmp_path / "stories.txt").write_text(f"{end}one day{end}{end}the next{end}and so on{end}")
    tokenizer = get_tokenizer(str(bpe))
    config = DataConfig(source=str(tmp_path / "stories.txt"), packing=False, validation_fraction=0)
    data = open_dataset(config, 64, 0, tokenizer=tokenizer)
    assert isinstance(data, DocumentDataset) and data.num_documents == 3 and data.steps_per_epoch(3) == 1
    found = {tokenizer.decode(inputs): labels[-1] for inputs, labels in rows_of(data.train_batch(0, 3))}
    assert found == dict.fromkeys(("one day", "the next", "and so on"), tokenizer.eot_id)
    with pytest.raises(DataError) as caught:
        data.train_batch(0, 4)
    assert is_one_line(caught.value, " 3 rows", " 4", "data.packing=true")
    with pytest.raises(DataError) as caught:
        documents([1, 1], 4, fraction=0.1)
    assert is_one_line(caught.value, "validation", "data.validation_fraction")


def row_by_row(engine: Any, batch: dict[str, Any]) -> tuple[float, dict[str, np.ndarray]]:
    """Returns loss and gradients of the rows one by one, without padding, weighted by their labels, in float64."""
    total, loss, sums = int(batch["attention_mask"].sum()), 0.0, dict[str, np.ndarray]()
    for row, count in enumerate(batch["attention_mask"].sum(axis=1).tolist()):
        alone = {name: batch[name][row : row + 1, :count] for name in ("inputs", "labels")}
        found, gradients = engine.gradients(alone)
        loss += found * count / total
        for path, gradient in gradients.items():
            sums[path] = sums.get(path, 0) + gradient.astype(np.float64) * (count / total)
    return loss, sums


LENGTHS = [5, 16, 1, 30, 11, 2]

FAMILIES = {
    "transformer": ["model.num_layers=2"],
    "encoder": ["model.num_layers=2", "model.causal=false"],
    **{
        family: [f"model={{type: {family}, hidden_size: 32, num_layers: 2, vocab_size: 257}}", "data.seq_length=32"]
        for family in ("lstm", "gru", "rnn")
    },
    "bidirectional": [
        "model={type: gru, hidden_size: 32, num_layers: 2, vocab_size: 257, bidirectional: true}",
        "data.seq_length=32",
    ],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str, tmp_path: Path) -> None:
    """Loss and gradients of a padded batch equal those of its rows one by one: to the last digits in float64, and by
    the yardstick on both backends. Models that look ahead need the mask for this."""
    options = FAMILIES[family]
    config = tiny(tmp_path, *options, "model.dropout=0")
    batch = documents(LENGTHS, 32).train_batch(0, len(LENGTHS))
    assert batch["inputs"].shape == (6, 32) and not batch["attention_mask"].all()
    exact = backends.engine(config, "torch", "cpu", dtype="float64")
    expected_loss, expected = row_by_row(exact, batch)
    loss, gradients = exact.gradients(batch)
    assert abs(loss - expected_loss) < 1e-13 * expected_loss
    for path, gradient in gradients.items():
        assert np.abs(gradient - expected[path]).max() <= 1e-11 * np.abs(expected[path]).max() + 1e-15, path
    plain = backends.engine(config, "torch", "cpu")
    noise_loss, noise = row_by_row(plain, batch)
    for name in BACKENDS:
        loss, gradients = backends.engine(config, name, "cpu").gradients(batch)
        assert judge(loss, noise_loss, expected_loss, min_noise=half_ulp_of_the_loss(expected_loss, batch)).passed
        for path, gradient in gradients.items():
            verdict = judge(gradient, noise[path], expected[path], layer_rms=layer_rms(expected, path))
            assert verdict.passed, (name, path, verdict)


def half_ulp_of_the_loss(loss: float, batch: dict[str, Any]) -> float:
    """Returns the rounding error of the mean loss: half an ulp of each label's loss."""
    return float(2.0**-24 * loss / np.sqrt(batch["attention_mask"].sum()))


def layer_rms(gradients: dict[str, np.ndarray], path: str) -> float:
    """Returns the RMS of all gradients of a parameter's layer."""
    layer = path.rpartition(".")[0]
    return rms(np.concatenate([g.ravel() for p, g in gradients.items() if p.rpartition(".")[0] == layer]))


@pytest.mark.parametrize("family", ["transformer", "gru"])
def test_a_padded_batch_agrees_between_the_backends(family: str, tmp_path: Path) -> None:
    """The complete parity report, with dropout: every layer, every gradient and the step."""
    gru = ["model={type: gru, hidden_size: 32, num_layers: 1, vocab_size: 257}", "data.seq_length=32"]
    options = gru if family == "gru" else []
    config = tiny(tmp_path, *options)
    report = parity.run(config, batch=documents(LENGTHS, 32).train_batch(0, len(LENGTHS)))
    assert report.passed


@pytest.mark.parametrize("name", BACKENDS)
def test_training_on_padded_rows(name: str, tmp_path: Path, no_plots: None) -> None:
    """Batches of changing length, with micro-batches: the loss falls, and a resumed run equals an unpaused one."""
    texts = [f"{i % 7} and {i % 7} is {2 * (i % 7)}. " * (1 + i % 3) for i in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    overrides = [f"data.source={tmp_path / 'a.jsonl'}", "data.packing=false", "training.gradient_accumulation=2"]
    overrides += ["training.max_steps=8", "training.checkpoint_every=4", "training.eval_every=4"]
    config = tiny(tmp_path, *overrides)
    whole = Trainer.start(config, tmp_path / "whole", backend=name, quiet=True)
    result = whole.fit()
    train(config, tmp_path / "part", name, until=4)
    assert resume(tmp_path / "part").loss == result.loss < 5.5 and result.validation_loss is not None
    shapes = {whole.dataset.train_batch(step, 4)["inputs"].shape[1] for step in range(8)}
    assert shapes <= {16, 32} and len(shapes) == 2


def test_a_model_without_attention_mask_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        from torch import nn
        from icenet_torch.models.base import BaseModel
        class Plain(BaseModel):
            def __init__(self, config):
                super().__init__(config)
                self.embedding = nn.Embedding(config.vocab_size, 8)
                self.output = nn.Linear(8, config.vocab_size)
            def forward(self, input_ids):
                return self.output(self.embedding(input_ids))
        class Masked(Plain):
            def forward(self, input_ids, attention_mask=None):
                return super().forward(input_ids)
        """)
    )
    from icenet.core.config import custom

    for name in ("Plain", "Masked"):
        family = f"{tmp_path / 'mine.py'}:{name}"
        custom.trust(family)
        model = f"model={{type: '{family}', vocab_size: 257, hidden_size: 8, num_layers: 1}}"
        config = tiny(tmp_path, model, "data.seq_length=16", "data.packing=false", "backend=torch")
        config.training.batch_size = 1
        if name == "Plain":
            with pytest.raises(ConfigError) as caught:
                dataset_for(config)
            assert is_one_line(caught.value, "data.packing", "attention_mask", "Plain")
        else:
            assert dataset_for(config).train_batch(0, 1)["attention_mask"].any()


# ---- runs that carry their tokenizer ----------------------------------------------------------------------


def test_a_moved_run_needs_no_tokenizer_file(
    bpe: Path, tmp_path: Path, no_plots: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained on MLX, moved, its tokenizer file removed: resumed on PyTorch, generating, saved, converted, loaded."""
    mine = tmp_path / "home" / "tokenizer.json"
    mine.parent.mkdir()
    shutil.copy(bpe, mine)
    overrides = ["model.vocab_size=400", f"data.tokenizer={mine}", "training.max_steps=6", "training.eval_every=null"]
    config = tiny(tmp_path, *overrides, "training.keep_checkpoints=1", "training.checkpoint_every=2")
    whole = train(config, tmp_path / "whole", "mlx")
    train(config, tmp_path / "home" / "run", "mlx", until=3)
    shutil.move(tmp_path / "home" / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "home")
    found = checkpoint.find(tmp_path / "run")
    manifest = json.loads((found.path / "manifest.json").read_text())["files"]
    assert manifest["tokenizer.json"]["sha256"] == hashlib.sha256(bpe.read_bytes()).hexdigest()
    assert Path(found.config.data.tokenizer) == found.path / "tokenizer.json"
    assert str(tmp_path) not in (found.path / "config.yaml").read_text().split("tokenizer:")[1].split("\n")[0]

    resumed = Trainer.resume(tmp_path / "run", backend="torch", quiet=True)
    assert resumed.notes == []  # the data is unchanged
    result = resumed.fit()
    assert abs(result.loss - whole.loss) < 1e-4 * whole.loss  # curves by the yardstick: test_trainer.py
    texts = {name: icenet.generate(icenet.load(tmp_path / "run", name), "alpha", max_new_tokens=12, temperature=0)
             for name in BACKENDS}  # fmt: skip
    assert texts["mlx"] == texts["torch"] != ""
    options = ["--prompt", "alpha", "--max-new-tokens", "12", "--temperature", "0"]
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "run", *options]) == 0
    assert capsys.readouterr().out == f"alpha{texts['torch']}\n"

    icenet.save(icenet.load(tmp_path / "run"), tmp_path / "saved")
    assert main(["convert", "run", "converted", "--to", "canonical"]) == 0
    shutil.rmtree(tmp_path / "run")
    for folder in ("saved", "converted"):
        shutil.move(tmp_path / folder, tmp_path / f"{folder} and moved")
        model = icenet.load(tmp_path / f"{folder} and moved", "torch")
        assert icenet.generate(model, "alpha", max_new_tokens=12, temperature=0) == texts["torch"]
        assert model.tokenizer.name == get_tokenizer(str(bpe)).name


def test_a_checkpoint_with_a_damaged_tokenizer_is_skipped(bpe: Path, tmp_path: Path, no_plots: None) -> None:
    config = tiny(tmp_path, "model.vocab_size=400", f"data.tokenizer={bpe}", "training.max_steps=4")
    config = config.with_overrides("training.checkpoint_every=2", "training.eval_every=null")
    train(config, tmp_path / "run", "torch")
    newest = checkpoint.newest(tmp_path / "run")
    assert newest is not None and newest.name == "step-00000004"
    (newest / "tokenizer.json").write_bytes(bpe.read_bytes()[:-1])
    notes: list[str] = []
    assert checkpoint.find(tmp_path / "run", notes.append).step == 2
    assert is_one_line(notes[0], "tokenizer.json", "damaged")


def test_a_path_in_a_configuration_is_relative_to_its_folder_first(
    bpe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "my.yaml").write_text("model: {type: transformer}\ndata: {tokenizer: t.json}\n")
    monkeypatch.chdir(tmp_path)
    read = lambda *overrides: Config.from_yaml("conf/my.yaml", overrides).data.tokenizer  # noqa: E731
    assert read() == "t.json"  # missing: an error when it is needed
    shutil.copy(bpe, tmp_path / "t.json")
    assert read() == str(tmp_path / "t.json")
    shutil.copy(bpe, tmp_path / "conf" / "t.json")
    assert read() == str(tmp_path / "conf" / "t.json")
    assert read("data.tokenizer=t.json") == str(
        tmp_path / "t.json"
    )  # on the command line: relative to the working folder
    assert read("data.tokenizer=bytes") == "bytes"


def test_stop_texts_end_within_a_token(bpe: Path) -> None:
    """The part of a token before the stop text belongs to the result."""
    from icenet.core.generation.stopping import StoppingCriteria

    tokenizer = get_tokenizer(str(bpe))
    text = "def main(self):\n    return self.value  # end"
    tokens = tokenizer.encode(text)
    joined = [tokenizer.decode([token]) for token in tokens]
    assert any(len(piece) > 2 for piece in joined)
    for stop in ("elf", "n", "):", "lue  #", "\n  "):
        stops = StoppingCriteria(1, [stop], tokenizer, 0)
        for token in tokens:
            stops.update(np.array([token], np.int32))
            if stops.all_done:
                break
        assert stops.all_done
        assert decode_continuation(tokenizer, stops.tokens[0]) + stops.endings[0] == text[: text.index(stop)]
