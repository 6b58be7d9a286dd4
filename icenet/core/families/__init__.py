"""Families of models of Hugging Face: their configs and weights, in both directions, from one table each.

A family adds its table to a module of this folder and its name to `FAMILIES` (see docs/contributing.md).
"""

from __future__ import annotations

from icenet.core.config import ModelConfig
from icenet.core.errors import ConfigError
from icenet.core.families import bert, gpt, llama, moe, multimodal, vision
from icenet.core.families.family import Family, different_options, is_refusal, with_values

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(llama.LLAMA, llama.MISTRAL, llama.QWEN2, llama.QWEN3, llama.OLMO2, llama.GEMMA2, llama.PHI3),
        *(llama.GEMMA3, llama.SMOLLM3, multimodal.GEMMA3_MULTIMODAL),
        *(moe.MIXTRAL, moe.QWEN3_MOE),
        *(gpt.GPT2, gpt.GPT_NEOX),
        *(bert.DISTILBERT, bert.BERT, bert.ROBERTA, bert.XLM_ROBERTA, bert.MPNET),
        *(vision.RESNET, vision.VIT, vision.DEIT),
    )
}
"""The families by `model_type` of config.json. The first one that has all options of a model is its family."""


def family_of(config: ModelConfig, preferred: Family | None = None) -> Family:
    """Returns the family that has all options of a model.

    Args:
        config: The options.
        preferred: The family to try first.

    Raises:
        ConfigError: No family has them. The message names those that the nearest family lacks.
    """
    families = [*([preferred] if preferred else []), *FAMILIES.values()]
    families = [family for family in families if isinstance(config, family.section)]
    scaling = getattr(config, "rotary_scaling", None)
    if scaling is not None and scaling.type == "longrope":  # of the families with it, the only one that reads the
        families.insert(0, llama.PHI3)  # context again where the angles change
    if not families:
        raise ConfigError(f"no family of Hugging Face is a {config.type}; only those of docs/conversion.md")
    found: list[tuple[list[str], Family]] = []
    for family in families:
        if not (different := different_options(family, config)):
            return family
        found.append((different, family))
    # the one entry of a family that refuses a value says nothing about how near it is
    lacking, nearest = min(found, key=lambda pair: (any(is_refusal(name) for name in pair[0]), len(pair[0])))
    names = ", ".join(name if is_refusal(name) else f"model.{name}" for name in with_values(nearest, config, lacking))
    raise ConfigError(
        f"no family of Hugging Face has these options together; {nearest.model_type}, the nearest, lacks "
        f"{names}; train a new run with its values to export it (docs/conversion.md has the options of each family)"
    )
