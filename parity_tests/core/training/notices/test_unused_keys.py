"""Keys that the user wrote and that have no effect are named when training begins."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import is_one_line, tiny

from icenet.core.config import Config
from icenet.core.data.datasets import dataset_for
from icenet.core.engine import parameter_groups
from icenet.core.errors import ConfigError
from icenet.core.training.notices.unused_keys import Circumstances, notices

SHAPES = {
    "embedding.weight": (257, 32),
    "hidden.0.weight": (32, 32),
    "hidden.0.bias": (32,),
    "output.weight": (257, 32),
}
KINDS = {"embedding": "embedding", "hidden.0": "linear", "output": "linear"}


def found(config: Config, kinds: dict[str, str] = KINDS) -> str:
    """Returns the notices of a run in one process on a CPU, whose model has the parameters `SHAPES`."""
    parameters = parameter_groups.assign(config.training, SHAPES, kinds, outputs=257)
    place = Circumstances("torch", "cpu", tf32="off", num_processes=1, parameters=parameters)
    return "\n".join(notices(config, dataset_for(config, quiet=True), place))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["training.optimizer=sgd", "training.beta2=0.9"], "training.beta2"),
        (["training.momentum=0.5"], "training.momentum"),
        (["training.schedule=constant", "training.decay_every=5"], "training.decay_every"),
        (["allow_tf32=true"], "allow_tf32"),
        (["training.sharded=true"], "training.sharded"),
        (["generation.temperature=0", "generation.top_k=5"], "generation.top_k"),
        (["generation.ignore_eos=true", "generation.eos_token_id=5"], "generation.eos_token_id"),
        (["data.validation_fraction=0", "training.eval_batches=3"], "training.eval_batches"),
        (["training.eval_every=null", "training.eval_batches=3"], "training.eval_batches"),
    ],
)
def test_a_key_without_effect_is_named(overrides: list[str], key: str, tmp_path: Path) -> None:
    text = found(tiny(tmp_path, *overrides))
    assert f"no effect: {key}" in text or f", {key}" in text, text
    complete = Config.from_dict(tiny(tmp_path, *overrides).to_dict())
    assert key in found(complete), "a value other than the default counts in a complete file"


def test_options_of_the_model_have_no_effect_on_a_port(tmp_path: Path) -> None:
    model = {
        "type": "mine.py:Net",
        "vocab_size": 257,
        "hidden_size": 64,
        "dropout": 0.3,
        "width": 3,
        "max_seq_length": 16,
    }
    run = {name: value for name, value in tiny(tmp_path).to_dict().items() if name != "model"}
    assert "model." not in found(Config.from_dict({**run, "model": model}))
    text = found(Config.from_dict({**run, "model": {**model, "port": "ported"}}))
    assert "no effect: model.hidden_size, model.dropout, model.width: a port" in text
    assert "max_seq_length" not in text and "vocab_size" not in text


def test_defaults_and_keys_with_an_effect_are_silent(tmp_path: Path) -> None:
    off = found(tiny(tmp_path, "data.validation_fraction=0", "training.eval_every=null"))
    assert "no effect: training.eval_every" not in off
    assert "beta2" not in found(tiny(tmp_path, "training.optimizer=sgd"))
    assert "beta2" not in found(tiny(tmp_path, "training.beta2=0.9"))
    complete = Config.from_dict(tiny(tmp_path, "training.optimizer=sgd").to_dict())
    assert "beta2" not in found(complete)


@pytest.mark.parametrize(
    ("groups", "keys"),
    [
        ("{parameters: ['*'], weight_decay: 0}, {parameters: [output.*], weight_decay: 1}", ["1.parameters"]),
        ("{parameters: [hid*], weight_decay: 0}, {parameters: [out*, hid*], weight_decay: 1}", ["1.parameters"]),
        ("{parameters: [hid*], weight_decay: 0}, {parameters: ['*'], learning_rate: 1}", []),
        ("{parameters: [hid*]}", ["0.parameters"]),
        ("{parameters: [hid*], learning_rate: 0, weight_decay: 1}", ["0.weight_decay"]),
    ],
)
def test_parameter_groups_without_effect(groups: str, keys: list[str], tmp_path: Path) -> None:
    config = tiny(tmp_path, f"training.parameter_groups=[{groups}]")
    for given in (config, Config.from_dict(config.to_dict())):
        named = [line.split(": ")[1] for line in found(given).splitlines()]
        assert named == [f"training.parameter_groups.{key}" for key in keys]


def test_muon_needs_a_hidden_matrix(tmp_path: Path) -> None:
    config = tiny(tmp_path, "training.optimizer=muon", "training.nesterov=false")
    assert "muon" not in found(config)
    text = found(config, {**KINDS, "hidden.0": "lstm"})
    assert "no effect: training.optimizer, training.nesterov: " in text and "adamw" in text


@pytest.mark.parametrize("key", ["early_stopping=2", "keep_best=true"])
def test_what_needs_validation_data_is_refused_without_it(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        found(tiny(tmp_path, "data.validation_fraction=0", f"training.{key}"))
    assert is_one_line(caught.value, f"training.{key.partition('=')[0]}", "validation_fraction")


def test_a_warmup_or_decay_longer_than_the_run_is_named(tmp_path: Path) -> None:
    long = ("training.max_steps=10", "training.learning_rate=0.1", "training.warmup_steps=20")
    assert is_one_line(found(tiny(tmp_path, *long)).split("\n")[0], "training.warmup_steps", "within its 20", "0.05")
    wsd = ("training.schedule=wsd", "training.max_steps=10", "training.warmup_steps=4", "training.decay_steps")
    assert "training.decay_steps: 6 instead of 7, " in found(tiny(tmp_path, *wsd[:3], f"{wsd[3]}=7"))
    assert "instead" not in found(tiny(tmp_path, *wsd[:3], f"{wsd[3]}=6"))
