"""`icenet.parity.compare` on models as users write them: correct twins pass, each fault is found in its module."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import icenet.blas

import mlx.core as mx
import mlx.nn as M
import mlx.optimizers as optimizers
import numpy as np
import pytest
import torch
import torch.nn as T
from pair_faults import FAULTS, PAIRS
from pairs import Fault, draw, with_equal_weights
from random_pairs import make

import icenet
from icenet.core.errors import UsageError
from icenet.core.models.modules import get_weights
from icenet.parity import Report, compare
from icenet.parity.results.status import ALL_STAGES
from icenet.parity.trace import Value
from icenet_torch.tools.calls import evaluate


@pytest.fixture(autouse=True)
def seeded(mlx_on_cpu: None) -> None:
    """Draws the same initial values in each run, on the CPU."""
    torch.manual_seed(0)


QUICK = ("tagger", "diffusion", "graph")
"""Models whose faults the default tests plant."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in PAIRS])
def test_correct_twins_pass(name: str) -> None:
    report = compare(*PAIRS[name](""))
    assert report.passed, str(report)
    assert report.culprit is None and [stage.status for stage in report.stages] == ["passed"] * len(ALL_STAGES)


def _marks(fault: Fault) -> Any:
    is_quick = fault.model in QUICK or (fault.model, fault.name) in (("unet", "padding"), ("tcn", "edge"))
    return () if is_quick else pytest.mark.slow


@pytest.mark.parametrize("fault", [pytest.param(f, marks=_marks(f), id=f"{f.model}-{f.name}") for f in FAULTS])
def test_a_fault_is_found_in_its_module_with_its_cause(fault: Fault) -> None:
    report = compare(*PAIRS[fault.model](fault.name))
    assert not report.passed
    assert report.culprit == fault.path, report.verdict
    assert any(word in report.cause for word in fault.cause.split("|")), report.verdict
    assert str(report).startswith(f"differs in {fault.path or 'the model'}")


def test_there_are_faults_of_many_kinds() -> None:
    assert len({fault.kind for fault in FAULTS}) >= 25 and len(FAULTS) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(0, 60))
def test_random_correct_models_pass(seed: int) -> None:
    ours, theirs, x, dtype = make(seed)
    report = compare(ours, theirs, x, dtype=dtype)
    assert report.passed, str(report)


# ---- what is left unchanged -------------------------------------------------------------------------------------


class Block(M.Module):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.norm, self.fc, self.drop = M.BatchNorm(6), M.Linear(6, 6), M.Dropout(0.1)
        self.fault = fault

    def __call__(self, x: mx.array) -> mx.array:
        y = self.drop(self.fc(self.norm(x)))
        return x + (1.001 * y if self.fault == "scale" else y)


class TorchBlock(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc, self.drop = T.BatchNorm1d(6), T.Linear(6, 6), T.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.fc(self.norm(x)))


def blocks(fault: str = "") -> tuple[Any, Any]:
    return with_equal_weights(Block(fault), TorchBlock())


def test_modules_and_generators_stay_unchanged() -> None:
    ours, theirs = blocks()
    ours.norm.eval()
    theirs.norm.eval()
    before = get_weights(ours), {name: value.clone() for name, value in theirs.state_dict().items()}
    states = torch.get_rng_state(), np.array(mx.random.state[0]), np.random.get_state()[1].copy(), random.getstate()
    report = compare(ours, theirs, draw(9, 6))
    assert report.passed, str(report)
    assert all(np.array_equal(value, before[0][name]) for name, value in get_weights(ours).items())
    assert all(torch.equal(value, before[1][name]) for name, value in theirs.state_dict().items())
    assert (ours.training, ours.norm.training, theirs.training, theirs.norm.training) == (True, False) * 2
    assert type(ours.drop) is M.Dropout and type(theirs.drop) is T.Dropout and "forward" not in vars(theirs.fc)
    assert torch.equal(torch.get_rng_state(), states[0]) and np.array_equal(np.array(mx.random.state[0]), states[1])
    assert np.array_equal(np.random.get_state()[1], states[2]) and random.getstate() == states[3]


# ---- stages -----------------------------------------------------------------------------------------------------


def test_a_difference_between_two_calls_names_the_place() -> None:
    report = compare(*blocks("scale"), draw(9, 6))
    assert (report.culprit, report.where) == ("", "after drop")
    assert "differs in the model (Block) itself, after drop" in str(report).splitlines()[0]
    assert "multiplied" in report.cause or "times more" in report.cause
    assert [stage.status for stage in report.stages] == ["passed"] * 2 + ["failed"] + ["not run"] * 4


def test_the_first_of_several_places_is_named() -> None:
    assert compare(*PAIRS["graph"]("slope")).where == "between layers.0 and layers.1"


def test_the_reference_computes_in_float64_where_code_names_fp32() -> None:
    third, _, _ = evaluate(lambda x: [x.float() / 3], [Value(np.ones(1), "fp64")], T.Linear(1, 1), exact=True)
    assert third[0].dtype == "fp64" and third[0].array == 1 / 3


def test_unequal_weights_are_a_finding_unless_they_are_copied() -> None:
    ours, theirs = blocks()
    ours.fc.weight = ours.fc.weight.T
    report = compare(ours, theirs, draw(9, 6))
    assert report.culprit == "fc" and "transpose" in report.verdict and report.failed_stage is not None
    assert report.failed_stage.name == "weights"
    assert compare(Block(), theirs, draw(9, 6), copy_weights=True).passed
    report = compare(Block(), theirs, draw(9, 6), copy_weights=False)
    assert "copy_weights=True" in report.stages[1].note and "never copied" in report.verdict


def test_weights_that_were_never_copied_are_those_of_the_reference() -> None:
    theirs = blocks()[1]
    ours = Block()
    before = get_weights(ours)
    report = compare(ours, theirs, draw(9, 6))
    assert report.passed and report.copied_weights, report
    assert "the weights were not equal: those of b were used; icenet.from_torch copies them" in report.verdict
    assert all(np.array_equal(value, before[name]) for name, value in get_weights(ours).items())
    wrong = Block("scale")
    report = compare(wrong, theirs, draw(9, 6), stages=["forward"])
    assert report.where == "after drop" and "those of b were used" in report.verdict


@pytest.mark.parametrize("change", [lambda w: w.T, lambda w: -w, lambda w: w[::-1], lambda w: w * 1.1, mx.zeros_like])
def test_one_array_that_differs_is_found(change: Callable[[Any], Any]) -> None:
    ours, theirs = blocks()
    ours.fc.weight = change(ours.fc.weight)
    report = compare(ours, theirs, draw(9, 6))
    assert (report.culprit, report.failed_stage.name) == ("fc", "weights") and not report.copied_weights


def test_an_unrelated_array_is_found() -> None:
    ours, theirs = blocks()
    ours.fc.weight = mx.array(draw(*ours.fc.weight.shape))
    report = compare(ours, theirs, draw(9, 6))
    assert (report.culprit, report.failed_stage.name) == ("fc", "weights") and not report.copied_weights


def test_shapes_and_missing_parameters_fail_in_the_first_stage() -> None:
    report = compare(
        M.Sequential(M.Linear(6, 4), M.Linear(4, 4)), T.Sequential(T.Linear(6, 4), T.Linear(4, 5)), draw(2, 6)
    )
    assert report.culprit == "1" and "[4, 4] in a, [5, 4] in b" in report.verdict
    report = compare(M.Sequential(M.Linear(6, 4, bias=False)), T.Sequential(T.Linear(6, 4)), draw(2, 6))
    assert report.culprit == "0" and "bias exists in b only" in report.verdict


class Adds(M.Module):
    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fc, self.fails = M.Linear(6, 6), fails

    def __call__(self, x: mx.array) -> mx.array:
        if self.fails:
            raise ValueError("no such head")
        return self.fc(x)[:, :3]


def test_what_a_module_raises_is_a_finding() -> None:
    class Theirs(T.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = T.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    ours, theirs = with_equal_weights(Adds(fails=True), Theirs())
    report = compare(ours, theirs, draw(2, 6))
    assert not report.passed and report.culprit == "" and "no such head" in report.verdict
    ours, theirs = with_equal_weights(Adds(), Theirs())
    report = compare(ours, theirs, draw(2, 6))
    assert report.where == "after fc" and "[2, 3] in a, [2, 6] in b" in report.verdict


def adamw(**options: Any) -> Any:
    return optimizers.AdamW(1e-2, weight_decay=0.1, **options)


@pytest.mark.parametrize("is_corrected", [True, False])
def test_optimizers(is_corrected: bool) -> None:
    ours, theirs = with_equal_weights(M.Sequential(M.Linear(6, 4)), T.Sequential(T.Linear(6, 4)))
    torch_adamw = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    report = compare(ours, theirs, draw(5, 6), optimizer=(adamw(bias_correction=is_corrected), torch_adamw))
    assert report.passed is is_corrected, str(report)
    assert is_corrected or "bias_correction" in report.cause


def test_weight_decay_on_biases() -> None:
    ours, theirs = with_equal_weights(M.Sequential(M.Linear(6, 4)), T.Sequential(T.Linear(6, 4)))

    def without_biases(module: T.Module) -> torch.optim.Optimizer:
        groups = [{"params": [module[0].weight]}, {"params": [module[0].bias], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)

    report = compare(ours, theirs, draw(5, 6), optimizer=(adamw(bias_correction=True), without_biases))
    assert report.culprit == "0" and "weight decay on biases" in report.cause
    assert str(report).startswith("differs in the optimizer, first at 0; ")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (TorchBlock, "TorchBlock: a class, not a module; create one: TorchBlock"),
        (TorchBlock().state_dict(), "icenet.from_torch copies"),
        (3, "int: not a module"),
    ],
)
def test_what_is_no_module_is_named(module: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        compare(Block(), module, draw(9, 6))


def test_a_loss_of_the_user() -> None:
    ours, theirs = with_equal_weights(M.Sequential(M.Linear(6, 4)), T.Sequential(T.Linear(6, 4)))
    labels = np.array([0, 1, 3])

    def loss(logits: mx.array) -> mx.array:
        return M.losses.cross_entropy(logits, mx.array(labels)).mean()

    def torch_loss(logits: torch.Tensor) -> torch.Tensor:
        return T.functional.cross_entropy(logits, torch.from_numpy(labels))

    assert compare(ours, theirs, draw(3, 6), loss=(loss, torch_loss)).passed
    report = compare(ours, theirs, draw(3, 6), loss=(lambda y: 2 * loss(y), torch_loss))
    assert report.failed_stage is not None and report.failed_stage.name == "loss" and "in the loss" in report.verdict


def test_chosen_stages() -> None:
    report = compare(*blocks(), draw(9, 6), stages=("structure", "forward"))
    statuses = {stage.name: stage.status for stage in report.stages}
    assert statuses["forward"] == "passed" and statuses["weights"] == statuses["training"] == "skipped"
    for stage in ("optimizer", "training"):  # which need the gradients of a run
        report = compare(*blocks(), draw(9, 6), stages=stage)
        assert {item.name for item in report.stages if item.status == "passed"} == {stage}


# ---- names, axes, frameworks, dtypes ------------------------------------------------------------------------------


class Renamed(M.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.final = M.Conv2d(3, 4, 3), M.Linear(4, 2)

    def __call__(self, images: mx.array) -> mx.array:
        return self.final(self.stem(images).mean(axis=(1, 2)))


class TorchNamed(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = T.Conv2d(3, 4, 3), T.Linear(4, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(images).mean(dim=(2, 3)))


@pytest.mark.parametrize(
    "rename",
    [
        {"stem": "conv", "final": "head"},
        {"conv": "stem", "head": "final"},
        {"con*": "stem", "head.weight": "final.weight", "head": "final"},
        lambda path: {"stem": "conv", "final": "head"}.get(path),
        lambda name: name.replace("conv", "stem").replace("head", "final"),
        None,
    ],
)
def test_modules_with_other_names(rename: Any) -> None:
    """Without `rename` they are matched by order and shape, with a note."""
    report = compare(Renamed(), TorchNamed(), {"images": draw(2, 8, 8, 3)}, rename=rename, copy_weights=True)
    assert report.passed, str(report)
    assert ("order and shape" in str(report)) is (rename is None)


def test_a_name_that_does_not_exist_is_named() -> None:
    with pytest.raises(UsageError, match="stam"):
        compare(Renamed(), TorchNamed(), draw(2, 8, 8, 3), rename={"stam": "conv"})
    with pytest.raises(UsageError, match="b has no module 'haed'; did you mean 'head'"):
        compare(Renamed(), TorchNamed(), draw(2, 8, 8, 3), rename={"stem": "conv", "final": "haed"})
    with pytest.raises(UsageError, match="'haed'"):
        compare(Renamed(), TorchNamed(), draw(2, 8, 8, 3), rename={"conv": "stem", "haed": "final"})


def test_one_mapping_copies_and_compares() -> None:
    ours, theirs = Renamed(), TorchNamed()
    rename = {"conv": "stem", "head": "final"}
    icenet.from_torch(theirs, ours, rename)
    report = compare(ours, theirs, draw(2, 8, 8, 3), rename=rename, copy_weights=False)
    assert report.passed and [m.path_a for m in report.modules] == ["", "stem", "final"]


def test_two_modules_of_one_framework() -> None:
    def torch_pair(eps: float) -> Report:
        first, second = (T.Sequential(T.Linear(6, 6), T.LayerNorm(6, eps=e)) for e in (eps, 1e-5))
        first.load_state_dict(second.state_dict())
        return compare(first, second, draw(4, 6))

    assert torch_pair(1e-5).passed
    report = torch_pair(1e-3)
    assert report.culprit == "1" and "eps" in report.cause
    first, second = (M.Sequential(M.Linear(6, 6), M.LayerNorm(6, eps=e)) for e in (1e-3, 1e-5))
    assert compare(second, second, draw(4, 6)).passed
    report = compare(first, second, draw(4, 6), copy_weights=True)
    assert report.culprit == "1" and "eps is 0.001 in a, 1e-05 in b" in report.cause


def test_pytorch_first_is_exchanged_with_a_note() -> None:
    ours, theirs = blocks()
    report = compare(theirs, ours, draw(9, 6))
    assert report.passed and report.names == ("Block", "TorchBlock") and "exchanged" in report.notes[0]


class Casts(M.Module):
    def __init__(self, casts: bool) -> None:
        super().__init__()
        self.weight, self.casts = mx.ones((64,)), casts

    def __call__(self, x: mx.array) -> mx.array:
        y = x.astype(mx.float32) if self.casts else x
        y = y * mx.rsqrt(mx.mean(y * y, axis=-1, keepdims=True) + 1e-6)
        return self.weight * y.astype(x.dtype)


class TorchCasts(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = T.Parameter(torch.ones(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def test_half_precision() -> None:
    x = draw(7, 64, scale=3.0)
    report = compare(Casts(casts=True), TorchCasts(), x, dtype="bf16")
    assert report.passed and report.stages[-1].status == "skipped", str(report)


# ---- inputs -------------------------------------------------------------------------------------------------------


def test_inputs_are_drawn_at_several_scales_and_lengths(tmp_path: Any) -> None:
    ours, theirs, _ = PAIRS["tcn"]("edge")
    report = compare(ours, theirs, replay=tmp_path / "smallest")
    assert report.culprit == "body.1" and report.draws == 3 and report.replay.endswith("smallest.npz")
    smallest = np.load(report.replay)["arr_0"]
    assert smallest.shape == (1, 1, 4)
    assert not compare(ours, theirs, smallest).passed


def several(arguments: str, body: Callable[..., Any], **layers: Any) -> Any:
    """Returns a module of both frameworks with these arguments, whose sum of outputs is the result."""
    names = {"body": body}
    exec(f"def call(self, {arguments}): return body(self, {arguments})", names)
    made = []
    for index, base in enumerate((M.Module, T.Module)):
        method = ("__call__", "forward")[index]
        net = type("Net", (base,), {method: names["call"]})()
        for name, pair in layers.items():
            setattr(net, name, pair[index])
        made.append(net)
    return with_equal_weights(*made)


EMBEDDING, LINEAR = (M.Embedding(20, 6), T.Embedding(20, 6)), (M.Linear(6, 4), T.Linear(6, 4))
CONV = (M.Conv2d(3, 6, 3), T.Conv2d(3, 6, 3))


@pytest.mark.parametrize(
    ("arguments", "body", "layers", "shapes"),
    [
        (
            "input_ids, attention_mask",
            lambda m, ids, mask: m.head(m.tokens(ids) * mask[..., None]),
            {"tokens": EMBEDDING, "head": LINEAR},
            {"input_ids": "int32 [2, 9]", "attention_mask": "int32 [2, 9]"},
        ),
        (
            "images, text",
            lambda m, images, ids: m.head(m.tokens(ids)) + m.conv(images).mean(),
            {"conv": CONV, "tokens": EMBEDDING, "head": LINEAR},
            {"images": "fp32 [2, 32, 32, 3]", "text": "int32 [2, 9]"},
        ),
        (
            "x, t",
            lambda m, x, t: m.head(x) * (t[:, None, None] / 1000.0),
            {"head": LINEAR},
            {"x": "fp32 [2, 9, 6]", "t": "int32 [2]"},
        ),
        (
            "queries, memory",
            lambda m, x, y: m.head(x) + m.other(y),
            {"head": LINEAR, "other": (M.Linear(5, 4), T.Linear(5, 4))},
            {"queries": "fp32 [2, 9, 6]", "memory": "fp32 [2, 9, 5]"},
        ),
    ],
    ids=["ids and mask", "images and text", "numbers and times", "two widths"],
)
def test_several_arguments_are_drawn(arguments: str, body: Any, layers: Any, shapes: dict[str, str]) -> None:
    report = compare(*several(arguments, body, **layers), stages=["forward"], draws=1)
    assert report.passed and report.inputs == shapes, report


def test_arguments_that_cannot_be_drawn_are_named() -> None:
    def messages(x: Any, edges: Any) -> Any:
        return x[edges[0]] + x[edges[1]]

    pair = several("x, edges", lambda m, x, edges: messages(m.head(x), edges), head=LINEAR)
    with pytest.raises(UsageError, match=r"takes x, edges: .*pass inputs") as caught:
        compare(*pair, stages=["forward"])
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="too many to draw"):
        compare(*several("a, b, c, d, e, f, g", lambda m, *args: m.head(args[0]), head=LINEAR))


@pytest.mark.parametrize(
    ("inputs", "options", "words"),
    [
        ("text", {}, "inputs"),
        ((), {}, "no array"),
        (np.zeros((0, 6), np.float32), {}, "without values"),
        (np.ones((2, 6), np.float32), {"stages": ["forwards"]}, "forwards"),
        (np.ones((2, 6), np.float32), {"dtype": "fp8"}, "fp8"),
        (np.ones((2, 6), np.float32), {"layout": "NHWC"}, "NHWC"),
        (np.ones((2, 6), np.float32), {"draws": 2}, "draws"),
        (np.ones((2, 6), np.float32), {"steps": -1}, "steps"),
        (np.ones((2, 6), np.float32), {"steps": "2"}, "steps is '2'"),
        (np.ones((2, 6), np.float32), {"seed": -1}, "seed is -1"),
        (np.ones((2, 6), np.float32), {"rename": 3}, "rename is 3"),
        (np.ones((2, 6), np.float32), {"copy_weights": "no"}, "copy_weights"),
        (np.ones((2, 6), np.float32), {"loss": torch.mean}, "loss"),
        (np.ones((2, 6), np.float32), {"loss": (3, None)}, "two functions"),
        (np.ones((2, 6), np.float32), {"optimizer": torch.optim.SGD}, "optimizer is the class SGD"),
        (np.ones((2, 6), np.float32), {"optimizer": (torch.optim.SGD, None)}, "optimizer of a: .* mlx.optimizers"),
        (np.ones((2, 6), np.float32), {"optimizer": (None, lambda module: 3)}, "optimizer of b: it returns int"),
        (np.full((2, 6), np.nan, np.float32), {}, "input 0 has NaN"),
        (np.ones((2, 7), np.float32), {}, "fails on the inputs"),
    ],
)
def test_wrong_options_are_one_line(inputs: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        compare(*blocks(), inputs, **options)
    assert "\n" not in str(caught.value)
