"""Random configurations of every model family, narrow models, and planted faults of arithmetic.

`sweep.py` has the cases and the program that checks thousands of them; docs/contributing.md describes it.
"""

from __future__ import annotations

import itertools
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import planted
import pytest
from sweep import batch_of, case, check_case, environments, reordered_products, resumed

from icenet.core.config import FAMILIES, Config
from icenet.parity.configuration.engines import build
from icenet.parity.configuration.run import compare_engines

SEED, COUNT = 2024, 24
PRECISIONS = ("fp32", "bf16", "fp32", "fp16")
SLOW_SEEDS, SLOW_COUNT = range(1, 6), 60

NARROW: dict[str, dict[str, Any]] = {
    # rows of one token, tied embeddings, a norm after each residual: almost all gradients cancel
    "one token, post-norm": {
        "seed": 805343474669,
        "model": {"norm_position": "post", "causal": False, "tie_embeddings": True, "vocab_size": 83, "dropout": 0.5},
        "rows": 2,
    },
    "one token, two classes": {
        "seed": 880418784759,
        "model": {"causal": False, "tie_embeddings": True, "vocab_size": 2, "feed_forward_multiplier": 1},
        "rows": 4,
    },
    "one row": {"seed": 7, "model": {"norm_position": "post", "vocab_size": 7}, "rows": 1},
}
"""Transformers of width two. A layer norm of two values is +1 and -1, so the gradients through it cancel, and most
tensors have one to four elements."""


@pytest.mark.parametrize("index", range(COUNT))
def test_sweep(index: int, tmp_path: Path) -> None:
    check_case(*case(SEED, index, PRECISIONS), tmp_path, resumed(index))


@pytest.mark.slow
@pytest.mark.parametrize("seed", SLOW_SEEDS)
@pytest.mark.parametrize("index", range(SLOW_COUNT))
def test_wide_sweep(seed: int, index: int, tmp_path: Path) -> None:
    check_case(*case(seed, index, compiled=True), tmp_path, resumed(index))


def narrow_case(name: str) -> tuple[Config, dict[str, Any]]:
    given = NARROW[name]
    model = {"type": "transformer", "hidden_size": 2, "num_layers": 1, "num_heads": 1, "activation": "gelu_tanh"}
    settings = {"model": {"dropout": 0.0, "max_seq_length": 16, **model, **given["model"]}, "device": "cpu"}
    return Config.from_dict({"seed": given["seed"], **settings}), {"rows": given["rows"], "length": 1, "padded": True}


@pytest.mark.parametrize("order", ["", "permuted"])
@pytest.mark.parametrize("name", NARROW)
def test_narrow_models_pass_with_any_order_of_sums(name: str, order: str, tmp_path: Path) -> None:
    """Another processor sums in another order. The noise of such small tensors must not depend on luck."""
    with reordered_products() if order else nullcontext():
        check_case(*narrow_case(name), tmp_path, "torch", convert=False)


def test_every_option_is_covered() -> None:
    """Each field of each family takes several values in the sweep, and each enumeration all of its values.

    The default sweep covers all fields but `compile_model`, and each family in each precision.
    """
    seen: dict[tuple[str, str], set[str]] = {}
    configs = [case(SEED, index, PRECISIONS)[0] for index in range(COUNT)]
    pairs = {(config.model.type, config.training.mixed_precision) for config in configs}
    assert pairs == set(itertools.product(FAMILIES, ["fp32", "bf16", "fp16"]))
    slow = [case(seed, index, compiled=True)[0] for seed in SLOW_SEEDS for index in range(SLOW_COUNT)]
    for config in configs:
        for name in type(config.model).model_fields:
            values = seen.setdefault((type(config.model).__name__, name), set())
            values.add(json.dumps(config.model.model_dump()[name]))
    for config in slow:
        values = seen[type(config.model).__name__, "compile_model"]
        values.add(json.dumps(config.model.compile_model))
    for section in set(FAMILIES.values()):
        for name, field in section.model_fields.items():
            found = seen[section.__name__, name]
            choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            choices = choices or ((False, True) if field.annotation is bool else ())
            assert {json.dumps(choice) for choice in choices} <= found, (section, name, found)
            assert len(found) > 1 or len(choices) == 1, (section, name, found)
    optimizers = {config.training.optimizer for config in slow}
    assert optimizers == {"adamw", "adam", "sgd", "adafactor", "lion", "muon"}


def test_the_environments_restrict_instructions_and_threads() -> None:
    found = environments()
    for name, values in {"ATEN_CPU_CAPABILITY": {"default", "avx2"}, "OMP_NUM_THREADS": {"1", "2"}}.items():
        assert values <= {variables.get(name) for variables in found}
    assert len({json.dumps(variables) for variables in found}) == len(found) >= 20


# ---- planted faults -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [fault.name for fault in planted.FAULTS])
def test_faults_are_found(name: str) -> None:
    fault = next(fault for fault in planted.FAULTS if fault.name == name)
    for index, config, sizes in planted.configurations(fault, SEED, 3):
        report = planted.plant(fault, build(config), batch_of(config, sizes))
        assert report is None or not report.passed, (name, index)


def test_a_fault_in_a_narrow_layer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples of the noise and the repetitions must not hide a fault of 1e-5 in a model of width two."""
    fault = next(fault for fault in planted.FAULTS if fault.name == "linear: products too large by 1e-5")
    config, sizes = narrow_case("one token, two classes")
    engines, batch = build(config), batch_of(config, sizes)
    # without a fault it passes, as test_narrow_models_pass_with_any_order_of_sums shows
    fault.plant(monkeypatch, engines.mlx)
    report = compare_engines(engines, batch)
    assert not report.passed and report.differing()


@pytest.mark.slow
@pytest.mark.parametrize("index", [791, 1426])
def test_gradients_near_the_limit_of_fp16_are_judged_at_a_smaller_scale(index: int, tmp_path: Path) -> None:
    """A gradient of 2e5 overflows on one backend or on both, depending on the last bit."""
    check_case(*case(23, index), tmp_path)
