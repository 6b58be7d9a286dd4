"""Names of the tensors of experts in the files of each program, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import is_one_line, same_bits

import icenet
from icenet.core.config import Config, ModelConfig
from icenet.core.errors import ConfigError, WeightsError
from icenet.core.families import FAMILIES, family_of, folder
from icenet.core.families.weights import ExportedWeights, family_tensors
from icenet.core.weights import files as weight_files

EXPERTS, WIDTH, INNER = 3, 6, 5
SIZES = {
    "vocab_size": 7, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "max_position_embeddings": 8, "num_experts_per_tok": 2,
}  # fmt: skip
VALUES: dict[str, dict[str, Any]] = {
    "mixtral": {**SIZES, "model_type": "mixtral", "num_local_experts": EXPERTS, "intermediate_size": INNER},
    "qwen3_moe": {
        **SIZES, "model_type": "qwen3_moe", "num_experts": EXPERTS, "moe_intermediate_size": INNER,
        "intermediate_size": 4, "decoder_sparse_step": 2,
    },
}  # fmt: skip
EACH = {
    "mixtral": ("model.layers.1.block_sparse_moe", {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}),
    "qwen3_moe": ("model.layers.1.mlp", {name: name for name in ("gate_proj", "up_proj", "down_proj")}),
}
OURS = "blocks.1.feed_forward.experts"
by_family = pytest.mark.parametrize("model_type", VALUES)


def config_of(model_type: str) -> Config:
    return Config.from_dict({"model": FAMILIES[model_type].read(VALUES[model_type])})


def arrays_of(model_type: str) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    found = family_tensors(FAMILIES[model_type], config_of(model_type)).items()
    return {name: generator.standard_normal(tensor.shape).astype(np.float16) for name, tensor in found}


def written(path: Path, model_type: str, arrays: dict[str, np.ndarray]) -> Path:
    weight_files.write(path, arrays)
    (path / "config.json").write_text(json.dumps(VALUES[model_type]))
    return path


def experts_of(model_type: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors of the experts of the last layer, stacked, by our names."""
    prefix, names = EACH[model_type]
    return {
        ours: np.stack([arrays[f"{prefix}.experts.{index}.{theirs}.weight"] for index in range(EXPERTS)])
        for theirs, ours in names.items()
    }


def in_another_form(model_type: str, form: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors by the names of `transformers` 5 in memory ("fused"), or of mlx-lm ("stacked")."""
    found: dict[str, np.ndarray] = {}
    for layer in range(2):
        prefix = EACH[model_type][0].replace("layers.1", f"layers.{layer}")
        own = {name: array for name, array in arrays.items() if name.startswith(f"{prefix}.experts.")}
        if not own:
            continue
        moved = {name.replace(f"layers.{layer}", "layers.1"): array for name, array in own.items()}
        stacked = experts_of(model_type, moved)
        if form == "stacked":
            found |= {f"{prefix}.switch_mlp.{name}.weight": array for name, array in stacked.items()}
            continue
        prefix = f"model.layers.{layer}.mlp"
        joined = np.concatenate([stacked["gate_proj"], stacked["up_proj"]], axis=1)
        found |= {f"{prefix}.experts.gate_up_proj": joined, f"{prefix}.experts.down_proj": stacked["down_proj"]}
    rest = {name: array for name, array in arrays.items() if ".experts." not in name}
    if form == "fused":
        rest = {name.replace("block_sparse_moe.gate", "mlp.gate"): array for name, array in rest.items()}
    return {**found, **rest}


@by_family
@pytest.mark.parametrize("form", ["of each expert", "fused", "stacked"])
def test_experts_are_stacked_from_the_names_of_each_program(model_type: str, form: str, tmp_path: Path) -> None:
    arrays = arrays_of(model_type)
    given = arrays if form == "of each expert" else in_another_form(model_type, form, arrays)
    found = folder.read(written(tmp_path / "in", model_type, given))
    for name, stacked in experts_of(model_type, arrays).items():
        np.testing.assert_array_equal(found.weights[f"{OURS}.{name}.weight"], stacked)
        assert found.weights.spec(f"{OURS}.{name}.weight") == (np.dtype(np.float16), stacked.shape)
    exported = ExportedWeights(found.family, found.config, dict(found.weights))
    assert same_bits(dict(exported), arrays)
    # the names are kept, but for those that no class of `transformers` has
    for target, expected in (("hf", arrays if form == "stacked" else given), ("mlx-lm", given)):
        icenet.convert(tmp_path / "in", tmp_path / target, target)
        assert same_bits(dict(weight_files.read(tmp_path / target)), expected)


def test_layers_without_experts() -> None:
    """Those of `mlp_only_layers`, and all but each `decoder_sparse_step`-th."""
    values = {**VALUES["qwen3_moe"], "num_hidden_layers": 6, "mlp_only_layers": [3]}
    model = config_of("qwen3_moe").model
    assert model.expert_layers == [1]  # type: ignore[attr-defined]
    read = FAMILIES["qwen3_moe"].read(values)
    assert (read["expert_layers"], read["expert_size"], read["feed_forward_size"]) == ([1, 5], INNER, 4)
    again = FAMILIES["qwen3_moe"].write(ModelConfig(**read))
    assert (again["mlp_only_layers"], again["decoder_sparse_step"]) == ([0, 2, 3, 4], 1)
    for key, value in (("num_experts", 0), ("mlp_only_layers", list(range(6)))):
        assert "num_experts" not in FAMILIES["qwen3_moe"].read({**values, key: value})
    new_name = {key: value for key, value in values.items() if key != "num_experts"} | {"num_local_experts": 9}
    assert FAMILIES["qwen3_moe"].read(new_name)["num_experts"] == 9
    with pytest.raises(ConfigError, match="mlp_only_layers"):
        FAMILIES["qwen3_moe"].read({**values, "mlp_only_layers": "all"})


@by_family
def test_the_loss_that_balances_experts_is_read_and_written(model_type: str) -> None:
    """The library uses the factor if `output_router_logits` is true. Its presence changes no family."""
    family, key = FAMILIES[model_type], "router_aux_loss_coef"
    assert family.read({**VALUES[model_type], key: 0.2})[key] == 0.0
    for given, expected in (({key: 0.2}, 0.2), ({}, 0.001)):
        fields = family.read({**VALUES[model_type], **given, "output_router_logits": True})
        config = ModelConfig(**fields)
        written = family.write(config)
        assert fields[key] == written[key] == expected and written["output_router_logits"] is True
        assert family.read(written)[key] == expected and family_of(config).model_type == model_type
    assert key not in family.write(config_of(model_type).model)
    dense = {**VALUES["qwen3_moe"], "mlp_only_layers": [0, 1], "output_router_logits": True}
    assert not ModelConfig(**FAMILIES["qwen3_moe"].read(dense)).router_aux_loss_coef  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=f"{key} needs num_experts"):
        Config.from_dict({"model": {"type": "transformer", key: 0.1}})


def test_the_family_of_a_mixture() -> None:
    """Weights that do not add up to 1 are Qwen3-MoE's only, and experts in some layers too."""
    mixtral = config_of("mixtral").model
    assert family_of(mixtral).model_type == "mixtral"
    assert family_of(config_of("qwen3_moe").model).model_type == "qwen3_moe"
    for change in ({"normalize_expert_weights": False}, {"expert_layers": [0]}):
        with pytest.raises(ConfigError, match=f"model.{next(iter(change))}"):
            family_of(mixtral.model_copy(update=change))
    assert family_of(mixtral.model_copy(update={"expert_size": 9})).model_type == "mixtral"


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"model.layers.0.block_sparse_moe.experts.2.w3.weight": None}, ["missing", "experts.2.w3"]),
        ({"model.layers.0.block_sparse_moe.experts.3.w3.weight": np.zeros((5, 6))}, ["unknown", "experts.3.w3"]),
        ({"model.layers.1.block_sparse_moe.experts.1.w2.weight": np.zeros((6, 4))}, ["[6, 4]", "[6, 5]"]),
        (
            {"model.layers.1.block_sparse_moe.experts.1.w2.weight": np.zeros((6, 5), np.float32)},
            ["dtype", "experts.1.w2.weight is float32"],
        ),
    ],
    ids=["missing", "one too many", "shape", "dtype"],
)
def test_wrong_experts_are_named(change: dict[str, Any], names: list[str], tmp_path: Path) -> None:
    arrays = {**arrays_of("mixtral"), **change}
    path = written(tmp_path / "in", "mixtral", {name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(WeightsError) as error:
        folder.read(path)
    assert is_one_line(str(error.value), *names)
