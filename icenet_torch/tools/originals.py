"""The modules that `icenet bench port` ports: torchvision's ResNet-50 and the GPT-2 of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from icenet.core.weights import files
from icenet_torch.porting import sources


def resnet50(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Returns torchvision's ResNet-50 with random weights, and an example; writes `weights.safetensors`."""
    module, _ = sources.torchvision("resnet50")
    files.write(folder / "weights.safetensors", {name: value.numpy() for name, value in module.state_dict().items()})
    return module.eval(), {"x": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))}


def gpt2(folder: Path, layers: int) -> tuple[nn.Module, dict[str, Any]]:
    """Returns a GPT-2 of transformers with random weights and without dropout, and an example; writes its folder."""
    transformers = sources.package("transformers")
    options = transformers.GPT2Config(n_layer=layers, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    module = transformers.GPT2LMHeadModel(options).eval()
    module.save_pretrained(folder)
    example = sources.example_of(module)
    del example["attention_mask"]  # IceNet's model gets none either
    return module, example
