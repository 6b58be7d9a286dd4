"""Ports of models with tied weights are trained like any model: a weight that the original has under several names is
one parameter, with one gradient, optimizer state and weight decay, and files have it under each name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import icenet.blas

import mlx.core as mx
import numpy as np
import pytest
import torch
import yaml
from helpers import is_one_line, losses, resume, same_bits, state, train

import icenet
from icenet.core.config import Config, user_code
from icenet.core.data.datasets import dataset_for
from icenet.core.errors import WeightsError
from icenet.core.models.twins import compare_with_twin
from icenet.core.weights import files
from icenet.parity.configuration.run import run as parity
from icenet_torch.porting.sources import load_weights

pytestmark = pytest.mark.usefixtures("in_folder")

TEXT = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(8), mix

    def forward(self, x):
        return x + self.mix(self.norm(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(257, 8)
        mix = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.blocks = nn.ModuleList([Block(mix) for _ in range(2)])
        self.head = nn.Linear(8, 257)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        h = self.embedding(ids)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def net():
    torch.manual_seed(1)
    return Net()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    sizes = {"vocab_size": 257, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **off, use_cache=False))
"""
CONFIG: dict[str, Any] = {
    "device": "cpu",
    "seed": 3,
    "model": {"type": "mine.py:net", "port": "net", "vocab_size": 257},
    "data": {"kind": "text", "source": "text.txt", "seq_length": 8},
    "training": {
        "max_steps": 15,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "schedule": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.1,
        "max_grad_norm": None,
        "eval_every": None,
    },
}
TIED = {
    "net.head.weight": "net.embedding.weight",
    "net.blocks.1.mix.0.weight": "net.blocks.0.mix.0.weight",
    "net.blocks.1.mix.0.bias": "net.blocks.0.mix.0.bias",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tied")
    (found / "mine.py").write_text(TEXT)
    (found / "net.yaml").write_text(yaml.safe_dump(CONFIG))
    (found / "text.txt").write_text(" ".join(f"{n}*{n}={n * n}" for n in range(200)))
    icenet.port(user_code.run_file(found / "mine.py").net(), torch.zeros(2, 8, dtype=torch.int64)).save(found / "net")
    return found


def of_pytorch(config: Config, module: torch.nn.Module) -> list[float]:
    """Trains a module with `torch.optim.AdamW` on the batches of a config. Returns the loss of each step."""
    options, data = config.training, dataset_for(config)
    groups = [
        {"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in module.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, options.beta2), eps=options.eps)
    found = []
    for step in range(options.max_steps):
        batch = {name: torch.from_numpy(array).long() for name, array in data.train_batch(step, 4).items()}
        optimizer.zero_grad()
        output = module(batch["inputs"])
        logits = getattr(output, "logits", output)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def changes_backend_twice(config: Config, module: torch.nn.Module, run: Path) -> None:
    """Checks a run on MLX, PyTorch and MLX against plain PyTorch: the losses and the weights at the end."""
    train(config, run, "mlx", until=5)
    resume(run, "torch", until=10)
    resume(run, "mlx")
    np.testing.assert_allclose(losses(run), of_pytorch(config, module.train()), rtol=2e-6)
    found = state(run)
    for name, value in module.state_dict().items():
        np.testing.assert_allclose(found[f"net.{name}"], value.numpy(), atol=2e-5)


def test_a_run_changes_backend_twice(tmp_path: Path) -> None:
    config = Config.from_yaml("net.yaml")
    changes_backend_twice(config, user_code.run_file(Path("mine.py")).net(), tmp_path / "run")
    found = state(tmp_path / "run")
    for name, owner in TIED.items():
        assert found[name].tobytes() == found[owner].tobytes()
        assert f"{owner}.exp_avg" in found and f"{name}.exp_avg" not in found


@pytest.mark.slow
def test_a_run_of_gpt2_changes_backend_twice(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    module = user_code.run_file(Path("mine.py")).gpt2()
    icenet.port(module, torch.zeros(2, 8, dtype=torch.int64)).save(tmp_path / "port")
    model = {**CONFIG["model"], "type": "mine.py:gpt2", "port": str(tmp_path / "port")}
    (tmp_path / "gpt2.yaml").write_text(yaml.safe_dump({**CONFIG, "model": model}))
    changes_backend_twice(Config.from_yaml(tmp_path / "gpt2.yaml"), module, tmp_path / "run")


def test_what_is_tied_is_one_parameter_on_both_backends(caplog: pytest.LogCaptureFixture) -> None:
    config, module = Config.from_yaml("net.yaml"), user_code.run_file(Path("mine.py")).net()
    for backend in ("mlx", "torch"):
        model = icenet.build(config, backend, "cpu")
        assert model.shared_arrays() == TIED
        assert model.num_params == sum(value.numel() for value in module.parameters())
        assert model.trainable_paths() == {f"net.{name}" for name, _ in module.named_parameters()}
        assert compare_with_twin(config, model) is None
        assert set(model.weights()) == {f"net.{name}" for name in module.state_dict()}
    assert not caplog.messages


def test_parity_passes() -> None:
    report = parity(Config.from_yaml("net.yaml"))
    assert report.passed, report.verdict()
    assert report.shared == TIED


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_files_have_all_names_and_one_is_enough(backend: str, tmp_path: Path) -> None:
    model = icenet.build("net.yaml", backend, "cpu")
    icenet.save(model, tmp_path / "saved")
    stored = {name: np.array(array) for name, array in files.read(tmp_path / "saved").items()}
    assert set(TIED) < stored.keys()
    values = {name: array + 1 for name, array in stored.items()}
    for missing in ("net.head.weight", "net.embedding.weight"):
        other = icenet.build("net.yaml", backend, "cpu")
        other.set_weights({name: array for name, array in values.items() if name != missing})
        assert same_bits(other.weights(), values)
    with pytest.raises(WeightsError) as caught:
        model.set_weights({**values, "net.head.weight": values["net.head.weight"] + 1})
    assert is_one_line(caught.value, "net.embedding.weight", "net.head.weight")


def test_weights_of_the_original_load_under_any_name() -> None:
    ours, theirs = icenet.build("net.yaml", "mlx", "cpu").net, user_code.run_file(Path("mine.py")).net()
    with torch.no_grad():
        for value in theirs.parameters():
            value.add_(0.125)
    ids = torch.arange(16).reshape(2, 8)
    wanted = theirs(ids).detach().numpy()
    given = {name: value.clone() for name, value in theirs.state_dict().items()}
    for missing in ("", "head.weight", "embedding.weight", "blocks.0.mix.0.weight"):
        model = icenet.build("net.yaml", "mlx", "cpu").net
        icenet.from_torch({name: value for name, value in given.items() if name != missing}, model)
        np.testing.assert_allclose(np.array(model(mx.array(ids.numpy()))), wanted, rtol=1e-5, atol=1e-5)
    icenet.from_torch(theirs, ours)
    again = user_code.run_file(Path("mine.py")).net()
    icenet.to_torch(ours, again)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in given.items())
    assert again.head.weight is again.embedding.weight
    theirs.head.weight = torch.nn.Parameter(theirs.head.weight.detach() + 1)
    for source in (theirs, theirs.state_dict()):
        with pytest.raises(WeightsError) as caught:
            icenet.from_torch(source, ours)
        assert is_one_line(caught.value, "embedding.weight", "head.weight")


def test_files_of_weights_to_port_may_lack_a_name(tmp_path: Path) -> None:
    theirs, module = (user_code.run_file(Path("mine.py")).net() for _ in range(2))
    with torch.no_grad():
        theirs.embedding.weight.add_(1)
    path, given = tmp_path / "net.pt", {name: value.clone() for name, value in theirs.state_dict().items()}
    for missing in ("", "head.weight", "embedding.weight"):
        torch.save({name: value for name, value in given.items() if name != missing}, path)
        load_weights(module, path)
        assert torch.equal(module.head.weight, theirs.head.weight)
        with torch.no_grad():
            module.head.weight.zero_()
    torch.save({**given, "head.weight": given["head.weight"] + 1}, path)
    with pytest.raises(WeightsError) as caught:
        load_weights(module, path)
    assert is_one_line(caught.value, "net.pt", "embedding.weight", "head.weight", "unequal")


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_the_mlx_form_has_what_the_port_has(backend: str, tmp_path: Path) -> None:
    config = Config.from_dict({**yaml.safe_load(Path("net.yaml").read_text()), "backend": backend})
    model = icenet.build(config, backend, "cpu")
    model.set_weights({name: array + 0.5 for name, array in model.weights().items()})
    icenet.save(model, tmp_path / "saved")
    converted, again = tmp_path / "mlx.safetensors", tmp_path / "again.safetensors"
    icenet.convert(tmp_path / "saved", converted, to="mlx", config=config)
    port = icenet.build(config, "mlx", "cpu")
    port.load_weights(str(converted))  # strict
    assert same_bits(port.weights(), model.weights())
    icenet.convert(converted, again, to="canonical", config=config)
    assert same_bits(files.read(again), model.weights())
    icenet.convert(tmp_path / "saved" / "model.safetensors", again, to="mlx", model=port, overwrite=True)
    assert files.read(again).keys() == files.read(converted).keys()
