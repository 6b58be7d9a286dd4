"""One config, one arithmetic: TF32 only where the config allows it, and no setting of the process is changed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import icenet.blas

import pytest
from helpers import both_backends, is_one_line, python, start_python, tiny, token_ids, train

import icenet as front_door
from icenet.core import backends
from icenet.core.config import Config
from icenet.core.errors import ArithmeticWarning, BackendError
from icenet.core.training.trainer import Trainer
from icenet.parity.configuration import engines as parity_engines

torch: Any = pytest.importorskip("torch")
mx: Any = pytest.importorskip("mlx.core")
torch_arithmetic: Any = pytest.importorskip("icenet_torch.nn.arithmetic")
mlx_arithmetic: Any = pytest.importorskip("icenet.nn.arithmetic")

pytestmark = pytest.mark.usefixtures("no_plots")
both_settings = pytest.mark.parametrize("allow", [False, True])


# ---- PyTorch's switches -----------------------------------------------------------------------------------

PER_OPERATION = hasattr(torch.backends, "fp32_precision")
"""Whether PyTorch has a switch per library and operation."""


def operations() -> dict[str, Any]:
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    cuda = {"cuda matmul": torch.backends.cuda.matmul, "cuda conv": cudnn.conv, "cuda rnn": cudnn.rnn}
    return {**cuda, "cpu matmul": mkldnn.matmul, "cpu conv": mkldnn.conv} if PER_OPERATION else {}


def switches() -> dict[str, object]:
    """Returns PyTorch's settings of the precision of fp32 products."""
    newer = {name: operation.fp32_precision for name, operation in operations().items()}
    try:
        older = {
            "matmul": torch.backends.cuda.matmul.allow_tf32,
            "cudnn": torch.backends.cudnn.allow_tf32,
            "precision": torch.get_float32_matmul_precision(),
        }
    except RuntimeError:  # some of the newer ones are set
        older = {}
    return {**newer, **older}


def allows_tf32() -> list[bool]:
    """Returns whether PyTorch may use TF32 on CUDA: in matrix products, and in convolutions."""
    if not PER_OPERATION:
        return [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]
    return [operations()[name].fp32_precision == "tf32" for name in ("cuda matmul", "cuda conv")]


def set_conv_only() -> None:
    if not PER_OPERATION:
        pytest.skip("this PyTorch has no switch per operation")
    torch.backends.cudnn.conv.fp32_precision = "ieee"


USERS: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "no TF32": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "conv only": set_conv_only,
}
"""What a user may have set in the process."""


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Restores PyTorch's settings after each test."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = True


@both_settings
@pytest.mark.parametrize("user", USERS)
def test_the_switches_are_set_inside_the_context_and_restored_after_it(user: str, allow: bool) -> None:
    USERS[user]()
    before = switches()
    for _ in range(2):
        with pytest.raises(KeyError), torch_arithmetic.tf32(allow):
            assert allows_tf32() == [allow, allow]
            assert "bf16" not in switches().values()  # `medium` is bf16 on a CPU
            raise KeyError
        assert switches() == before


class Observed:
    """The settings in each forward and backward pass of the first block of a model of PyTorch."""

    def __init__(self, model: Any) -> None:
        self.passes: list[list[bool]] = []
        layer = model.blocks[0]
        layer.register_forward_hook(lambda *_: self.passes.append(allows_tf32()))
        layer.register_full_backward_hook(lambda *_: self.passes.append(allows_tf32()))


@both_settings
def test_each_use_of_a_pytorch_model_has_its_arithmetic(allow: bool, tmp_path: Path) -> None:
    config = tiny(tmp_path, f"allow_tf32={str(allow).lower()}")
    engine = backends.engine(config, "torch", "cpu")
    observed, before = Observed(engine.model), switches()
    assert allow or allows_tf32() == [False, True]  # PyTorch's own setting
    tokens = token_ids(2, 8, vocab_size=257)
    batch = {"inputs": tokens, "labels": tokens}
    uses: dict[str, tuple[Callable[[], object], int]] = {
        "a step": (lambda: engine.read(engine.train_step(batch, 0, 1e-3)), 2),
        "gradients": (lambda: engine.gradients(batch), 2),
        "an evaluation": (lambda: engine.evaluate(batch), 1),
        "outputs": (lambda: engine.forward(batch), 1),
        "a call": (lambda: engine.model(torch.from_numpy(tokens)), 1),
        "generation": (lambda: engine.model.generate(tokens, max_new_tokens=2, temperature=0), 2),
    }
    for name, (use, number) in uses.items():
        observed.passes.clear()
        use()
        assert observed.passes == [[allow, allow]] * number, name
        assert switches() == before, name


def test_two_pytorch_models_keep_their_own_arithmetic(tmp_path: Path) -> None:
    """Also next to a model that the user computes himself."""
    config = tiny(tmp_path)
    exact, fast = (front_door.build(config.with_overrides(f"allow_tf32={v}"), "torch") for v in ("false", "true"))
    observed = [Observed(model) for model in (exact, fast)]
    own = torch.nn.Linear(4, 4)
    seen: list[list[bool]] = []
    own.register_forward_hook(lambda *_: seen.append(allows_tf32()))
    tokens = torch.from_numpy(token_ids(1, 4, vocab_size=257))
    for _ in range(2):
        exact(tokens), own(torch.ones(1, 4)), fast(tokens), own(torch.ones(1, 4))
    assert [o.passes for o in observed] == [[[False, False]] * 2, [[True, True]] * 2]
    assert seen == [[False, True]] * 4  # as PyTorch starts


# ---- MLX's switch -----------------------------------------------------------------------------------------


class Process:
    """A process that computes on a GPU with TF32: it reads the environment at its first product, as MLX does."""

    def __init__(self) -> None:
        self.uses: bool | None = None

    def product(self, device: object = None) -> bool:
        if self.uses is None:
            self.uses = os.environ.get("MLX_ENABLE_TF32", "1") != "0"
        return self.uses


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Process:
    process = Process()
    monkeypatch.setattr(mlx_arithmetic, "has_tf32", lambda device: True)
    monkeypatch.setattr(mlx_arithmetic, "uses_tf32", process.product)
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    return process


@both_settings
def test_the_first_model_on_a_gpu_decides(allow: bool, process: Process, tmp_path: Path) -> None:
    front_door.build(tiny(tmp_path, f"allow_tf32={str(allow).lower()}"), "mlx")
    assert process.uses is allow
    assert "MLX_ENABLE_TF32" not in os.environ  # programs that are started later have their own


def test_full_fp32_in_a_process_that_computes_in_tf32_is_an_error(process: Process, tmp_path: Path) -> None:
    process.product()  # the user's own
    with pytest.raises(BackendError) as error:
        front_door.build(tiny(tmp_path), "mlx")
    assert is_one_line(error.value, "allow_tf32", "MLX_ENABLE_TF32=0 before Python starts")
    assert front_door.build(tiny(tmp_path, "allow_tf32=true"), "mlx").allow_tf32 is True


def test_tf32_in_a_process_that_computes_in_full_fp32_is_a_warning(process: Process, tmp_path: Path) -> None:
    front_door.build(tiny(tmp_path), "mlx")
    with pytest.warns(ArithmeticWarning, match="allow_tf32: true has no effect"):
        front_door.build(tiny(tmp_path, "allow_tf32=true"), "mlx")


@both_settings
def test_the_config_goes_before_the_environment(
    allow: bool, process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = str(int(not allow))
    monkeypatch.setenv("MLX_ENABLE_TF32", value)
    with pytest.warns(ArithmeticWarning, match=f"MLX_ENABLE_TF32={value} has no effect on IceNet"):
        front_door.build(tiny(tmp_path, f"allow_tf32={str(allow).lower()}"), "mlx")
    assert process.uses is allow and os.environ["MLX_ENABLE_TF32"] == value


def test_a_model_on_the_cpu_decides_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(device: object) -> bool:
        raise AssertionError("a product was computed")

    monkeypatch.setattr(mlx_arithmetic, "uses_tf32", fail)
    for value in ("true", "false"):
        front_door.build(tiny(tmp_path, f"allow_tf32={value}"), "mlx", "cpu")


class Gpu:
    type = mx.DeviceType.gpu


@pytest.mark.parametrize(
    ("cuda", "chip", "expected"),
    [(False, "Apple M4 Max", False), (False, "Apple M5", True), (False, "Apple M10", True), (True, "H200", True)],
)
def test_tf32_is_on_cuda_and_from_m5_on(
    cuda: bool, chip: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(mlx_arithmetic, "chip", lambda: chip)
    assert mlx_arithmetic.has_tf32(Gpu()) is expected
    assert mlx_arithmetic.has_tf32(mx.Device(mx.cpu)) is False
    assert torch_arithmetic.has_tf32(torch.device("cuda")) and not torch_arithmetic.has_tf32(torch.device("mps"))


# ---- MLX's devices ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("mlx_on_cpu")
def test_each_use_of_an_mlx_model_is_on_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second stream of the CPU stands for a second device: MLX places operations on either in the same way."""
    monkeypatch.setattr(mx, "set_default_device", lambda device: pytest.fail("the default device was changed"))
    engine, model = backends.engine(tiny(tmp_path), "mlx", "cpu"), front_door.build(tiny(tmp_path), "mlx", "cpu")
    assert engine.tf32 == "off"
    default, other = mx.default_stream(mx.cpu), mx.new_stream(mx.cpu)
    engine.model.device = other
    used: list[Any] = []
    call = type(model).hidden_states

    def observed(*arguments: Any, **options: Any) -> Any:
        used.append(mx.default_stream(mx.default_device()))
        return call(*arguments, **options)

    monkeypatch.setattr(type(model), "hidden_states", observed)
    monkeypatch.setattr(type(engine.optimizer), "update", lambda self, *g: used.append(mx.default_stream(mx.cpu)))
    tokens = token_ids(2, 8, vocab_size=257)
    batch = {"inputs": tokens, "labels": tokens}
    uses: dict[str, Callable[[], object]] = {
        "a step": lambda: engine.train_step(batch, 0, 1e-3),
        "gradients": lambda: engine.gradients(batch),
        "an optimizer step": lambda: engine.apply_gradients(engine.weights(), 0, 1e-3),
        "an evaluation": lambda: engine.evaluate(batch),
        "outputs": lambda: engine.forward(batch),
        "a call": lambda: engine.model(mx.array(tokens)),
        "generation": lambda: engine.model.generate(tokens, max_new_tokens=2, temperature=0),
        "a replay": lambda: parity_engines.record(engine, batch),
    }
    for name, use in uses.items():
        used.clear()
        use()
        assert used and all(stream == other for stream in used), name
        assert mx.default_stream(mx.cpu) == default, name
    used.clear()
    model(mx.array(tokens))
    assert used == [default]


def test_kernels_are_started_one_by_one_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the user decides; nothing is set where MLX has no CUDA, because Metal reads one of the variables."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    engine = backends.module("mlx", "engine.engine").Engine
    names = engine.environment.keys()
    for name in names:
        os.environ.pop(name, None)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    engine.prepare_process()
    assert not names & os.environ.keys()
    os.environ["MLX_MAX_OPS_PER_BUFFER"] = "7"
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    engine.prepare_process()
    assert (os.environ["MLX_USE_CUDA_GRAPHS"], os.environ["MLX_MAX_OPS_PER_BUFFER"]) == ("0", "7")


def test_the_device_of_a_model_that_is_not_built_from_a_config() -> None:
    """It follows MLX's default device, as any `mlx.nn.Module`."""
    from icenet.models import TransformerModel

    model = TransformerModel(Config.from_dict({"model": {"type": "transformer", "hidden_size": 8}}).model)
    assert model.device is None and model.allow_tf32 is None
    other, used = mx.new_stream(mx.cpu), []
    model.forward = lambda: used.append(mx.default_stream(mx.cpu))
    with mx.stream(other):
        model()
    model.device = mx.cpu
    model()
    assert used == [other, mx.default_stream(mx.cpu)]


# ---- runs -------------------------------------------------------------------------------------------------


@both_backends
def test_a_run_records_its_arithmetic(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(tmp_path, "training.max_steps=3", "training.eval_every=null")
    run = train(config, tmp_path / "run", backend, until=2).run
    state = json.loads((run / "checkpoints" / "step-00000002" / "state.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert state["tf32"] == "off" and [record["tf32"] for record in records] == ["off", "off"]
    assert not [note for note in Trainer.resume(run, quiet=True).notes if "TF32" in note]
    module = backends.module(backend, "nn.arithmetic")
    monkeypatch.setattr(module, "uses_tf32", lambda device: True)
    trainer = Trainer.resume(run, overrides=["allow_tf32=true"], quiet=True)
    [note] = [note for note in trainer.notes if "TF32" in note]
    assert is_one_line(note, "TF32 is on from step 3", "was off before", "allow_tf32: true")
    trainer.fit()
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["tf32"] == "on"


def test_parity_compares_in_full_fp32(tmp_path: Path) -> None:
    built = parity_engines.build(tiny(tmp_path, "allow_tf32=true"))
    assert [engine.model.allow_tf32 for engine in built] == [False] * 3


# ---- on a GPU ---------------------------------------------------------------------------------------------

has_cuda = torch.cuda.is_available()
has_mlx_gpu = mx.is_available(mx.gpu)


def on_gpu(test: Any) -> Any:
    needs = pytest.mark.skipif(not (has_cuda and has_mlx_gpu), reason="needs CUDA in MLX and in PyTorch")
    return pytest.mark.gpu(needs(test))


FRESH = "import os; os.environ.pop('MLX_ENABLE_TF32', None)\n"
"""The tests' own processes have TF32 off."""

ERRORS = (
    FRESH
    + """
import sys, json
import numpy as np
import icenet
from icenet.core import backends
from icenet.core.config import Config
backend, allow = sys.argv[1:]
model = {"type": "cnn", "base_channels": 32, "num_layers": 2, "hidden_size": 64, "vocab_size": 10}
data = {"kind": "images", "source": "digits"}
config = Config.from_dict({"allow_tf32": allow == "true", "model": {**model, "image_channels": 1}, "data": data})
x = np.random.default_rng(0).standard_normal((8, 32, 32, config.model.image_channels)).astype(np.float32)
import torch
reference = icenet.build(config, "torch", "cpu").double()
reference.compute_dtype = torch.float64
nchw = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
exact = reference(nchw.double()).detach().numpy()
model = icenet.build(config, backend, "cuda")
if backend == "mlx":
    import mlx.core as mx
    y = np.array(model(mx.array(x)))
else:
    y = model(nchw.cuda()).detach().cpu().numpy()
error = float(np.abs(y - exact).max() / np.abs(exact).max())
arithmetic = backends.module(backend, "nn.arithmetic")
with model.arithmetic():
    print(json.dumps([error, arithmetic.uses_tf32(model.device)]))
assert torch.backends.cudnn.allow_tf32, "PyTorch's own setting was changed"
"""
)


@on_gpu
def test_doctor_measures_the_default_arithmetic() -> None:
    """It times products on the GPU, and MLX decides about TF32 at the first one."""
    code = "from icenet.tools.environment import environment; print(environment()['tf32']['used'])"
    assert python(code).strip() == "False"


@on_gpu
@both_backends
def test_a_convolutional_model_on_a_gpu_is_in_full_fp32_by_default(backend: str) -> None:
    errors = {allow: json.loads(python(ERRORS, backend, allow).splitlines()[-1]) for allow in ("false", "true")}
    assert errors["false"][0] < 1e-5 < errors["true"][0], errors  # TF32 has an error of about 1e-3
    assert [errors[allow][1] for allow in ("false", "true")] == [False, True]


DEVICES = (
    FRESH
    + """
import mlx.core as mx, numpy as np
import icenet
from icenet.core.config import Config
config = Config.from_yaml("quickstart")
tokens = np.arange(64, dtype=np.int32)[None]
gpu = icenet.build(config, "mlx", "cuda")
first = np.array(gpu(mx.array(tokens)))
assert mx.default_device() == mx.Device(mx.gpu)
cpu = icenet.build(config, "mlx", "cpu")
assert mx.default_device() == mx.Device(mx.gpu)
np.testing.assert_array_equal(first, np.array(gpu(mx.array(tokens))))
with mx.stream(mx.cpu):
    on_cpu = np.array(cpu(mx.array(tokens)))
np.testing.assert_array_equal(on_cpu, np.array(cpu(mx.array(tokens))))
assert not np.array_equal(first, on_cpu)
texts = [icenet.generate(model, "def ", max_new_tokens=8, seed=1) for model in (gpu, cpu, gpu)]
assert texts[0] == texts[2]
"""
)

CURVES = (
    FRESH
    + """
from icenet.core.config import Config
from icenet.parity.configuration.run import curves
from icenet.parity.curves import judge_curve
from icenet.core import backends
from icenet.parity.configuration.engines import Engines
config = Config.from_yaml("quickstart", ["training.max_steps=100"])
engines = Engines(
    backends.engine(config, "mlx", "cuda"),
    backends.engine(config, "torch", "cuda"),
    backends.engine(config, "torch", "cpu", dtype="float64"),
)
assert [engine.tf32 for engine in engines] == ["off"] * 3
judgement = judge_curve(*curves(engines, 100).values())
print(judgement.worst)
assert judgement.passed, judgement
"""
)


@on_gpu
@pytest.mark.parametrize("program", [DEVICES, CURVES], ids=["devices", "curves"])
def test_two_devices_and_a_hundred_steps_on_a_gpu(program: str) -> None:
    """A second model on another device keeps its arithmetic. MLX's curve is as close to PyTorch's as fp32 allows."""
    process = start_python(program)
    _, err = process.communicate(timeout=560)
    assert process.returncode == 0, err[-2000:]
