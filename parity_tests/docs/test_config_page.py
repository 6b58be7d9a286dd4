"""What docs/configuration.md says about values and about keys without effect is so."""

from __future__ import annotations

import ast
import shlex
from pathlib import Path

import pytest
from helpers import tiny
from pages import code, rows

from icenet.core.config import Config, yaml_file
from icenet.core.data.datasets import dataset_for
from icenet.core.engine.parameter_groups import Group
from icenet.core.errors import ConfigError
from icenet.core.training.notices.unused_keys import Circumstances, notices

PAGE = "docs/configuration.md"


def quoted(cell: str) -> str:
    """Returns the code with which, or in which, a cell begins."""
    return cell.split("`")[1]


@pytest.mark.parametrize(("in_file", "with_set", "value"), rows(PAGE, "Values"))
def test_a_value_in_a_file_and_with_set(in_file: str, with_set: str, value: str) -> None:
    option, override = shlex.split(quoted(with_set))
    assert option == "--set"
    path, _ = yaml_file.parse_override(override)
    text = quoted(in_file)
    has_model = path[0] == "model"
    text = text.replace("{", "{type: transformer, ", 1) if has_model else f"model: {{type: transformer}}\n{text}"
    tree, _ = yaml_file.parse(text, "c.yaml")
    for values, overrides in ((tree, []), ({"model": {"type": "transformer"}}, [override])):
        if value.startswith("an error"):
            with pytest.raises(ConfigError) as caught:
                Config.from_dict(values, overrides)
            assert quoted(value) in str(caught.value)
        else:
            found = Config.from_dict(values, overrides)
            for key in path:
                found = getattr(found, key)
            expected = ast.literal_eval(quoted(value))
            assert found == expected and type(found) is type(expected)


def test_the_example_of_merge_keys_and_empty_sections() -> None:
    (example,) = (text for text in code(PAGE, "yaml") if "<<" in text)
    values, _ = yaml_file.parse(example, "c.yaml")
    config = Config.from_dict(values)
    slow, output = config.training.parameter_groups
    assert (slow.parameters, slow.learning_rate, slow.weight_decay) == (["token_embedding.*"], 1e-4, 0)
    assert (output.parameters, output.learning_rate, output.weight_decay) == (["output.*"], 1e-4, 0.1)
    assert config.training.max_steps == 1000 and config.generation.temperature == 1


WITHOUT_EFFECT = {
    "allow_tf32": ["true"],
    "blas": ["none"],
    "model.dropout": ["0.5", "model={type: lstm, num_layers: 1, vocab_size: 257}", "data.seq_length=8"],
    "training.sharded": ["true"],
    "training.optimizer": ["muon"],
    "training.beta1": ["0.5", "training.optimizer=sgd"],
    "training.beta2": ["0.5", "training.optimizer=adafactor"],
    "training.eps": ["1", "training.optimizer=lion"],
    "training.momentum": ["0.5"],
    "training.nesterov": ["false", "training.optimizer=sgd", "training.momentum=0"],
    "training.schedule": ["linear", "training.warmup_steps=100"],
    "training.schedule_steps": ["50", "training.warmup_steps=100"],
    "training.decay_every": ["5"],
    "training.decay_factor": ["0.1", "training.schedule=step", "training.decay_every=100"],
    "training.decay_steps": ["5"],
    "training.min_learning_rate": ["1e-5", "training.schedule=constant"],
    "training.parameter_groups": ["[{parameters: [x]}]"],
    "training.eval_every": ["5", "data.validation_fraction=0"],
    "training.eval_batches": ["5", "training.eval_every=null"],
    "training.early_stopping": ["50"],
    "training.rng": ["native", "model.dropout=0"],
    "generation.top_k": ["5", "generation.temperature=0"],
    "generation.top_p": ["0.5", "generation.temperature=0"],
    "generation.min_p": ["0.5", "generation.temperature=0"],
    "generation.seed": ["5", "generation.temperature=0"],
    "generation.max_length": ["5", "generation.max_new_tokens=5"],
    "generation.eos_token_id": ["5", "generation.ignore_eos=true"],
    "generation.overflow": ["slide", "model={type: gru, vocab_size: 257}", "data.seq_length=8"],
}
"""Of each key the value, and what takes away its effect."""
DATA = {"data.text_key", "data.validation_fraction", "data.background"}
"""Keys whose effect depends on the files; tests of data have them."""


def test_the_table_of_keys_without_effect_is_complete(tmp_path: Path) -> None:
    named = [key for cells in rows(PAGE, "Keys without effect") for key in cells[0].replace("`", "").split(", ")]
    assert sorted(named) == sorted({*WITHOUT_EFFECT, *DATA})
    for key, (value, *overrides) in WITHOUT_EFFECT.items():
        config = tiny(tmp_path, *overrides, f"{key}={value}")
        place = Circumstances("torch", "cpu", "off", 1, {"x": Group("adamw", 1.0, 0.0)})
        found = notices(config, dataset_for(config), place)
        assert any(key in line.split(": ")[1] for line in found), (key, found)
