"""Models in a user's Python file do what built-in models do, on both backends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import icenet.blas

import numpy as np
import pytest
import yaml
from custom_models import ONLY, SETTINGS, TEXT, failure, with_model
from helpers import BACKENDS, both_backends, is_one_line, losses, metrics, native, resume, same_bits, state, train

import icenet as front_door
from icenet.cli.main import main
from icenet.core.config import Config, CustomConfig, user_code
from icenet.core.errors import BackendError, ConfigError, IceNetError, UsageError
from icenet.core.runs import checkpoint
from icenet.core.training.trainer import Trainer
from icenet.core.weights import files as weight_files
from icenet.parity.configuration.engines import build
from icenet.parity.configuration.run import curves, run
from icenet.parity.curves import judge_curve

mx: Any = pytest.importorskip("mlx.core")
pytest.importorskip("torch")


# ---- like a built-in model --------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [("mlx", "torch"), ("torch", "mlx")])
def test_a_run_that_changes_backend(first: str, second: str, here: Path) -> None:
    config = Config.from_yaml("my.yaml")
    Trainer.start(config, here / "run", backend=first, quiet=True).fit(until=10)
    result = Trainer.resume(here / "run", backend=second, quiet=True).fit()
    assert result.validation_loss is not None and np.isfinite(result.validation_loss)
    three = curves(build(config), 20)
    assert judge_curve(losses(here / "run"), three["PyTorch"], three["PyTorch float64"]).passed
    assert losses(here / "run")[-1] < 0.8 * losses(here / "run")[0]
    assert sum("validation_loss" in record for record in metrics(here / "run")) == 2


@both_backends
def test_a_resumed_run_is_the_uninterrupted_one(backend: str, here: Path) -> None:
    config = Config.from_yaml("my.yaml")
    train(config, here / "whole", backend)
    train(config, here / "parts", backend, until=10)
    resume(here / "parts")
    assert same_bits(state(here / "parts"), state(here / "whole"))
    assert {"gain", "gain.exp_avg"} <= state(here / "parts").keys()


def test_generation_without_a_cache(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The text equals that of a forward pass over the whole context per token, on both backends, streamed or not."""
    Trainer.start(Config.from_yaml("my.yaml"), here / "run", backend="mlx", quiet=True).fit()
    texts = {}
    for backend in BACKENDS:
        model = front_door.load(here / "run", backend, "cpu", trust_code=True)
        ids = [list(b"alpha")]
        found = model.generate(native(backend, np.array(ids)), max_new_tokens=8, temperature=0).tolist()
        for _ in range(8):
            logits = np.array(model(native(backend, np.array(ids))).tolist())
            ids[0].append(int(logits[0, -1].argmax()))
        assert found == ids
        options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0.8, "top_k": 20, "seed": 4}
        texts[backend] = front_door.generate(model, "beta ", **options)
        assert "".join(front_door.generate(model, "beta ", stream=True, **options)) == texts[backend]
    assert texts["mlx"] == texts["torch"] and len(texts["mlx"]) > 20
    arguments = ["--prompt", "x", "--max-new-tokens", "3", "--temperature", "0", "--device", "cpu", "--trust-code"]
    capfd.readouterr()
    assert main(["generate", "run", *arguments]) == 0
    assert capfd.readouterr().out.startswith("x")


def test_conversion_there_and_back(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Trainer.start(Config.from_yaml("my.yaml"), here / "run", backend="torch", quiet=True).fit(until=2)
    for source, target, form in (("run", "m.safetensors", "mlx"), ("m.safetensors", "t.pt", "torch")):
        assert main(["convert", source, target, "--to", form, "--config", "my.yaml"]) == 0
    assert main(["convert", "t.pt", "back", "--to", "canonical", "--config", "my.yaml"]) == 0
    before, after = checkpoint.find(here / "run").weights, weight_files.read(here / "back")
    assert same_bits(dict(before), dict(after))
    model = front_door.build("my.yaml", "mlx")
    model.load_weights("m.safetensors")
    assert same_bits(model.weights(), dict(before))
    assert same_bits(front_door.load("back", "torch", trust_code=True).weights(), dict(before))


def test_convolutions_of_a_custom_model_are_converted(here: Path) -> None:
    models = {backend: front_door.build("images.yaml", backend, "cpu") for backend in BACKENDS}
    assert models["mlx"].conv.weight.shape == (16, 7, 7, 1)
    assert models["mlx"].weights()["conv.weight"].shape == (16, 1, 7, 7)
    assert same_bits(models["mlx"].weights(), models["torch"].weights())


def test_saved_and_loaded(here: Path) -> None:
    model = front_door.build("my.yaml", "mlx")
    front_door.save(model, here / "saved")
    again = front_door.load(here / "saved", "torch", "cpu", trust_code=True)
    assert same_bits(model.weights(), again.weights())
    assert again.config.gain == 0.125


def test_parity(here: Path) -> None:
    report = run(Config.from_yaml("my.yaml"), steps=20)
    assert report.passed and report.curve is not None
    assert report.num_weights == 8 and not report.unequal_weights  # two biases of linear layers, one of the norm
    judged = {row.path for section in report.sections for row in section.rows}
    assert any("gain" in path for path in judged)


def test_parity_finds_a_difference_between_the_backends(here: Path) -> None:
    file = here / "my_models_torch.py"
    file.write_text(file.read_text().replace("torch.tanh(", "1.001 * torch.tanh("))
    assert not run(Config.from_yaml("my.yaml")).passed


def test_an_image_classifier(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    from icenet.core.data.datasets import dataset_for

    config = Config.from_yaml("images.yaml")
    data: Any = dataset_for(config)
    assert run(config, batch=data.train_batch(0, 8)).passed
    Trainer.start(config, here / "run", backend="mlx", quiet=True).fit(until=30)
    result = Trainer.resume(here / "run", backend="torch", quiet=True).fit()
    assert result.validation_accuracy is not None and result.validation_accuracy > 0.4  # by chance: 0.1
    rows = data.validation[:40]
    (here / "pictures").mkdir()
    for number, image in enumerate(data.source.images.take(rows)):
        Image.fromarray(np.kron(image[:, :, 0], np.ones((4, 4), np.uint8))).save(here / f"pictures/{number:03}.png")
    capfd.readouterr()
    tables = []
    for backend in BACKENDS:
        arguments = ["run", "pictures", "--json", "--trust-code", "--device", "cpu", "--backend", backend]
        assert main(["predict", *arguments]) == 0
        tables.append(json.loads(capfd.readouterr().out))
    assert [row["class"] for row in tables[0]] == [row["class"] for row in tables[1]]
    right = sum(row["class"] == str(data.source.labels[index]) for row, index in zip(tables[0], rows, strict=True))
    assert right >= 14


def test_the_parity_command_on_an_image_classifier(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "images.yaml", "--json"]) == 0, capfd.readouterr()


@both_backends
def test_arrays_that_a_module_creates_keep_their_values(backend: str, here: Path) -> None:
    model = front_door.build("my.yaml", backend, "cpu")
    weights = model.weights()
    np.testing.assert_array_equal(weights["gain"], 0.125 * np.arange(1, 17, dtype=np.float32))
    assert np.abs(weights["embedding.weight"]).max() < 2 and not weights["custom_layer.bias"].any()
    assert "gain" in model.trainable_paths()
    model.set_weights({**weights, "gain": np.full(16, 3, np.float32)})
    front_door.save(model, here / "saved")
    again = front_door.load(here / "saved", backend, "cpu", trust_code=True)
    assert (again.weights()["gain"] == 3).all()  # the stored value, not that of __init__


def test_initial_weights_are_a_function_of_the_seed(here: Path) -> None:
    found = [front_door.build(Config.from_yaml("my.yaml", [f"seed={seed}"]), "torch").weights() for seed in (3, 3, 4)]
    assert same_bits(found[0], found[1]) and not same_bits(found[0], found[2])


# ---- options ----------------------------------------------------------------------------------------------


def test_custom_options(here: Path) -> None:
    config = Config.from_yaml("my.yaml", ["model.gain=0.5", "model.more={a: [1, 2.5, x]}", "model.flag=true"])
    assert isinstance(config.model, CustomConfig)
    read: Any = config.model
    assert (read.gain, read.more, read.flag) == (0.5, {"a": [1, 2.5, "x"]}, True)
    assert Config.from_dict(yaml.safe_load(config.to_yaml())) == config
    model = front_door.build(config, "torch")
    assert model.weights()["gain"][1] == 1.0
    with pytest.raises(ConfigError, match="hidden_size"):
        Config.from_yaml("my.yaml", ["model.hidden_size=-1"])


@both_backends
def test_a_missing_option(backend: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "bare.yaml").write_text(yaml.safe_dump(with_model(type="my_models.py:CustomModel")))
    line = failure(["train", "bare.yaml", "--run", "run", "--backend", backend], capfd)
    assert is_one_line(line, "model.gain", "my_models.py:CustomModel", "--set")


def test_a_missing_option_with_a_name_unlike_all_others() -> None:
    config: Any = CustomConfig(type="a.py:B", hidden_size=8, vocab_size=8)
    with pytest.raises(ConfigError) as caught:
        config.depth  # noqa: B018
    assert is_one_line(caught.value, "model.depth", "known: ", "dropout") and "did you mean" not in str(caught.value)


@both_backends
def test_an_option_that_only_forward_reads(backend: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also through `getattr` with a default, which returns the default."""
    for name, text in TEXT.items():
        text = text.replace("config.gain *", "getattr(config, 'more', 1.0) *")
        (here / name).write_text(text.replace("self.gain *", "self.config.gian *"))
    assert main(["train", "my.yaml", "--run", "run", "--backend", backend]) == 2
    note, line = capfd.readouterr().err.splitlines()
    assert note == "run: the run ended before its first step; its files are removed"
    assert is_one_line(line, "model.gian", "did you mean gain?")
    assert not (here / "run").exists()


@both_backends
def test_a_class_that_does_not_call_super(backend: str, here: Path) -> None:
    """MLX notices nothing in `__init__`, PyTorch at the first layer."""
    for name, text in TEXT.items():
        (here / name).write_text(text.replace("super().__init__(config)", "self.config = config"))
    with pytest.raises(IceNetError) as caught:
        front_door.build("my.yaml", backend, "cpu")
    assert is_one_line(caught.value, "my_models.py:CustomModel", "__init__")


@both_backends
def test_a_class_that_calls_super_late(backend: str, here: Path) -> None:
    """In MLX a frozen array needs it, in PyTorch each layer."""
    for name, text in TEXT.items():
        late = (
            "self.layer = nn.Linear(2, 2)\n        self.freeze()" if "mlx" in text else "self.layer = nn.Linear(2, 2)"
        )
        (here / name).write_text(text.replace("super().__init__(config)", late))
    with pytest.raises(UsageError) as caught:
        front_door.build("my.yaml", backend, "cpu")
    assert is_one_line(caught.value, "CustomModel: __init__", "super().__init__", ".py, line ")


@both_backends
@pytest.mark.parametrize("method", ["__call__", "run"])
def test_a_class_without_forward(method: str, backend: str, here: Path) -> None:
    for name, text in TEXT.items():
        (here / name).write_text(text.replace("def forward(", f"def {method}("))
    with pytest.raises(UsageError) as caught:
        front_door.build("my.yaml", backend, "cpu")
    assert is_one_line(
        caught.value, "my_models.py:CustomModel", "method forward", "__call__" if method == "__call__" else "no"
    )


@both_backends
def test_logits_without_a_gradient(backend: str, here: Path) -> None:
    """MLX computes gradients of zero, PyTorch none."""
    file = here / ("my_models_torch.py" if backend == "torch" else "my_models.py")
    text = file.read_text()
    line = next(line for line in text.splitlines() if "return" in line and "self.norm(past)" in line)
    logits = line.split("return ")[1]
    new = f"{logits}.detach()" if backend == "torch" else f"mx.stop_gradient({logits})"
    file.write_text(text.replace(logits, new))
    with pytest.raises(UsageError) as caught:
        train(Config.from_yaml("my.yaml"), here / "run", backend, until=1)
    assert is_one_line(caught.value, "forward detaches", "detach()" if backend == "torch" else "mx.stop_gradient()")


def test_a_file_that_imports_mlx_first_gets_the_fast_blas(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[bool] = []
    monkeypatch.setattr(icenet.blas.load.__module__ + ".load", lambda: loaded.append(True))
    (here / "imports.py").write_text("import math\n")
    user_code.run_file(here / "imports.py")
    assert not loaded
    (here / "imports.py").write_text("import math\nimport mlx.core as mx\n")
    user_code.run_file(here / "imports.py")
    assert loaded


def test_an_mlx_layer_with_the_method_forward(here: Path) -> None:
    layer = "import mlx.nn as nn\nclass Layer(nn.Module):\n    def forward(self, x):\n        return x\n"
    (here / "layer.py").write_text(f"{layer}def call(x):\n    return Layer()(x)\n")
    inputs = mx.zeros((2, 3), mx.int32)
    with pytest.raises(UsageError) as caught, user_code.explain_errors(inputs):
        user_code.run_file(here / "layer.py").call(inputs)
    assert is_one_line(caught.value, "layer.py, line 6", "__call__") and "images" not in str(caught.value)


@both_backends
def test_an_error_of_a_model_that_generates(backend: str, here: Path) -> None:
    for name, text in TEXT.items():
        (here / name).write_text(text.replace("self.gain *", "self.absent *"))
    model = front_door.build("my.yaml", backend, "cpu")
    with pytest.raises(UsageError) as caught:
        front_door.generate(model, "a", max_new_tokens=2)
    assert is_one_line(caught.value, ".py, line ", "absent")


@both_backends
def test_a_table_of_fewer_positions_than_the_context(backend: str, here: Path) -> None:
    for name, text in TEXT.items():
        (here / name).write_text(text.replace("self.gain *", "self.hidden.weight[:4, :1] +"))
    model = front_door.build("my.yaml", backend, "cpu")
    with pytest.raises(UsageError) as caught:
        front_door.generate(model, "abcd", max_new_tokens=2)
    assert is_one_line(caught.value, "fewer than 5 positions", "max_length") and "images" not in str(caught.value)


def test_an_option_of_a_wrong_type(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = failure(["train", "my.yaml", "--run", "run", "--set", "model.gain=[]", "--backend", "torch"], capfd)
    assert "my_models.py:CustomModel" in line and "under model" in line


# ---- one backend only -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "other"), [("mlx", "torch"), ("torch", "mlx")])
def test_written_for_one_backend(given: str, other: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    family = f"one_{given}.py:Only"
    config = Config.from_dict({**SETTINGS, "model": {**ONLY, "type": family}})
    (here / "one.yaml").write_text(config.to_yaml())
    assert main(["train", "one.yaml", "--run", "run", "--quiet", "--set", "training.max_steps=2"]) == 0
    assert checkpoint.find(here / "run").step == 2
    assert front_door.build("one.yaml").backend == given
    line = failure(["train", "one.yaml", "--run", "no", "--backend", other], capfd)
    assert f"{family} is written for {given} only" in line and f"--backend {given}" in line
    assert f"_{other}.py:Only" in line
    assert "is written for" in failure(["parity", "one.yaml"], capfd)
    arguments = ["train", "--resume", "run", "--trust-code", "--set", "training.max_steps=4"]
    line = failure([*arguments, "--backend", other], capfd)
    assert f"written for {given} only" in line
    assert main(["info", "run", "--trust-code"]) == 0
    assert main(["convert", "run", "x.safetensors", "--to", "mlx", "--trust-code"]) == 0
    with pytest.raises(BackendError, match=f"written for {given} only"):
        front_door.load("run", other, trust_code=True)


def test_a_file_for_the_other_backend_without_the_class(here: Path) -> None:
    (here / "both.py").write_text(TEXT["one_mlx.py"].replace("Only", "Mine"))
    (here / "both_torch.py").write_text(TEXT["one_torch.py"].replace("Only", "Other"))
    config = Config.from_dict({**SETTINGS, "model": {**ONLY, "type": "both.py:Mine"}})
    assert front_door.build(config, "mlx").backend == "mlx"
    with pytest.raises(BackendError, match="written for mlx only"):  # the class there has another name
        front_door.build(config, "torch")


def test_a_file_that_cannot_be_imported_is_not_reported_as_missing(here: Path) -> None:
    (here / "my_models_torch.py").write_text("import a_package_that_is_not_there\n")
    with pytest.raises(UsageError, match=r"my_models_torch\.py.*a_package_that_is_not_there"):
        front_door.build("my.yaml", "torch")
