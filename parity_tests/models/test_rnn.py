"""The recurrent models: MLX against PyTorch by the yardstick, PyTorch against its own modules and the published
equations, sequences in pieces, generation, weights and errors."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import icenet.blas  # noqa: F401  (first: it decides which BLAS MLX finds)

# isort: split
import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
import torch
from helpers import (
    BACKENDS,
    PACKAGES,
    both_backends,
    build_model,
    is_one_line,
    losses,
    native,
    plain,
    resume,
    tiny,
    token_ids,
    train,
)
from mlx.utils import tree_flatten

from icenet.commands.convert import convert_model
from icenet.core import backends, rng
from icenet.core.config import Config, ModelConfig
from icenet.core.errors import ConfigError, UsageError, WeightsError
from icenet.core.weights.torch_rnn import from_torch, to_torch
from icenet.parity.configuration.engines import build
from icenet.parity.configuration.run import compare_engines, curves, optimizer_rows, random_batch
from icenet.parity.curves import judge_curve
from icenet.parity.yardstick import FACTOR, judge

FAMILIES = pytest.mark.parametrize("family", ["lstm", "gru", "rnn"])
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
VOCAB = 61

CASES: dict[str, dict[str, Any]] = {
    "lstm": {"type": "lstm"},
    "lstm, three layers, dropout": {"type": "lstm", "num_layers": 3, "dropout": 0.3},
    "lstm, bidirectional": {"type": "lstm", "bidirectional": True, "num_layers": 2},
    "lstm, tied": {"type": "lstm", "tie_embeddings": True},
    "gru": {"type": "gru"},
    "gru, two layers, dropout, tied": {"type": "gru", "num_layers": 2, "dropout": 0.2, "tie_embeddings": True},
    "gru, bidirectional, dropout": {"type": "gru", "bidirectional": True, "num_layers": 2, "dropout": 0.1},
    "rnn": {"type": "rnn"},
    "rnn, relu, three layers": {"type": "rnn", "activation": "relu", "num_layers": 3},
    "rnn, bidirectional, dropout": {"type": "rnn", "bidirectional": True, "num_layers": 3, "dropout": 0.1},
    "rnn, one layer has no dropout": {"type": "rnn", "dropout": 0.5},
    "lstm, odd sizes": {"type": "lstm", "hidden_size": 7, "vocab_size": 257, "num_layers": 2},
}


def config(**model: Any) -> Config:
    base = {"hidden_size": 48, "num_layers": 1, "vocab_size": 83, "dropout": 0.0}
    return Config.from_dict({"seed": 7, "device": "cpu", "model": {**base, **model}})


def model_of(backend: str, seed: int = 3, **changes: Any) -> Any:
    """Returns a small model in evaluation mode; backend "exact" is PyTorch in float64."""
    given: Any = {"hidden_size": 24, "num_layers": 2, "vocab_size": VOCAB, "dropout": 0.2, **changes}
    return build_model(backend, ModelConfig(**given), seed)


def parts(hidden: Any) -> list[Any]:
    return [plain(part) for part in (hidden if isinstance(hidden, tuple) else (hidden,))]


def ids(*shape: int, seed: int = 0) -> Any:
    return token_ids(*shape, vocab_size=VOCAB, seed=seed)


def left_padding(lengths: list[int], longest: int) -> Any:
    return np.arange(longest) >= longest - np.array(lengths)[:, None]


# ---- MLX against PyTorch ----------------------------------------------------------------------------------


def judged(given: Config, batch: Any, dtype: str = "fp32") -> None:
    report = compare_engines(build(given, dtype), batch, step=2)
    assert report.unequal_weights == []
    assert report.passed, report.verdict()
    gradients = {row.path for row in report.sections[-2].rows if row.kind == "gradient"}
    assert len(gradients) == report.num_weights  # each parameter has a gradient
    layers = {row.path for row in report.sections[0].rows if row.own is not None}
    assert {f"layers.{index}" for index in range(given.model.num_layers)} <= layers  # each was replayed


@pytest.mark.parametrize("name", CASES)
def test_fp32(name: str) -> None:
    given = config(**CASES[name])
    judged(given, random_batch(given, rows=3, length=17))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("lstm, three layers, dropout", "bf16"),
        ("gru, bidirectional, dropout", "fp16"),
        ("rnn", "bf16"),
        pytest.param("lstm, three layers, dropout", "fp16", marks=pytest.mark.slow),
        pytest.param("gru, bidirectional, dropout", "bf16", marks=pytest.mark.slow),
        ("rnn", "fp16"),
    ],
)
def test_half_precision(name: str, dtype: str) -> None:
    given = config(**CASES[name])
    judged(given, random_batch(given, rows=3, length=17), dtype)


@pytest.mark.parametrize("side", [pytest.param("left", marks=pytest.mark.slow), "right", "scattered"])
@pytest.mark.parametrize("name", ["lstm", "gru, bidirectional, dropout", "rnn, relu, three layers"])
def test_padding(name: str, side: str) -> None:
    given = config(**CASES[name])
    batch = random_batch(given, rows=4, length=11)
    mask = {
        "left": left_padding([11, 7, 1, 0], 11),
        "right": left_padding([11, 7, 1, 0], 11)[:, ::-1],
        "scattered": np.random.default_rng(0).random((4, 11)) < 0.6,
    }[side]
    batch["labels"] = np.where(mask, batch["labels"], -100).astype(np.int32)
    judged(given, {**batch, "attention_mask": np.ascontiguousarray(mask).astype(np.int32)})


@FAMILIES
def test_one_token(family: str) -> None:
    given = config(type=family)
    judged(given, random_batch(given, rows=1, length=1))


@FAMILIES
def test_large_weights(family: str) -> None:
    """Saturated gates, as in a trained model."""
    given = config(type=family, num_layers=2, dropout=0.1)
    engines = build(given)
    weights = {path: array * np.float32(3) for path, array in engines.torch.weights().items()}
    for engine in engines:
        engine.set_weights(weights)
    report = compare_engines(engines, random_batch(given, rows=3, length=17))
    assert report.passed, report.verdict()


@FAMILIES
def test_ten_optimizer_steps_on_equal_gradients(family: str) -> None:
    engines = build(config(type=family))
    gradients = [
        {path: rng.normal(rng.key(step, "gradient", path), a.shape) for path, a in engines.torch.weights().items()}
        for step in range(10)
    ]
    worst = max(optimizer_rows(engines, gradients), key=lambda row: row.ratio)
    assert worst.ratio <= FACTOR, f"{worst.path}: {worst.ratio}"


def test_a_long_sequence() -> None:
    """512 steps: gradients of 2048 terms are as accurate as PyTorch's, and memory is that of the gates."""
    given = config(type="lstm", num_layers=2, hidden_size=64)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    engines = build(given)
    batch = random_batch(given, rows=4, length=512)
    for engine in engines:
        engine.gradients(batch)
    kept = 4 * 512 * 4 * 64 * 7 * 2  # bytes of four gates, c, tanh(c) and h, of all steps, in both layers
    assert mx.get_peak_memory() - before < 6 * kept
    judged(given, batch)


def test_a_training_curve_on_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curve("lstm", 20, tmp_path, monkeypatch)


@pytest.mark.slow
@FAMILIES
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_long_training_curve_on_text(
    family: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curve(family, 200, tmp_path, monkeypatch, dtype)


def curve(family: str, steps: int, folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str = "fp32") -> None:
    monkeypatch.setenv("ICENET_CACHE", str(folder / "cache"))
    text = folder / "text.txt"
    text.write_bytes(b"".join(b"line %d: the quick brown fox, %d times\n" % (i, i * i % 97) for i in range(3000)))
    given = config(type=family, num_layers=2, dropout=0.1, vocab_size=257)
    given.data.source, given.data.seq_length = str(text), 40
    given.training.learning_rate = 5e-3
    given.training.max_steps, given.training.warmup_steps, given.training.batch_size = steps, 5, 8
    losses = curves(build(given, dtype), steps)
    assert losses["PyTorch float64"][-1] < losses["PyTorch float64"][0] - 1.5  # it has learned
    verdict = judge_curve(*losses.values())
    assert verdict.passed, f"{verdict.worst} at step {verdict.worst_step}"


@both_backends
@FAMILIES
def test_gradient_checkpointing_changes_nothing(backend: str, family: str) -> None:
    given = config(type=family, num_layers=2, dropout=0.2, bidirectional=True)
    batch = random_batch(given, rows=2, length=9)
    batch["attention_mask"] = left_padding([9, 4], 9)
    engine = build(given)[BACKENDS.index(backend)]
    loss, gradients = engine.gradients(batch)
    engine.model.gradient_checkpointing = True
    again, recomputed = engine.gradients(batch)
    assert again == pytest.approx(loss, abs=1e-6)
    for path, gradient in gradients.items():
        np.testing.assert_allclose(recomputed[path], gradient, rtol=0, atol=1e-6 * np.abs(gradient).max())


@pytest.mark.slow
@both_backends
def test_compiled(backend: str) -> None:
    given = config(type="lstm", num_layers=2, dropout=0.2)
    batch = random_batch(given, rows=2, length=9)
    engines = {}
    for compiled in (False, True):
        given.model.compile_model = compiled
        engines[compiled] = backends.engine(given, backend, "cpu")
    (loss, plainly), (again, compiled) = (engines[key].gradients(batch) for key in (False, True))
    assert again == pytest.approx(loss, abs=1e-6)
    for path, gradient in plainly.items():
        np.testing.assert_allclose(compiled[path], gradient, rtol=0, atol=1e-5 * np.abs(gradient).max())


# ---- the published equations ---------------------------------------------------------------------------


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def equations(family: str, layer: dict[str, Any], x: Any, h: Any, c: Any, activation: str = "tanh") -> Any:
    """Returns h and c `[H]` after one step of one row in float64, gate by gate; x is `[I]`."""
    size = len(h)

    def gate(index: int, *, bias: bool = True) -> tuple[Any, Any]:
        rows = slice(index * size, (index + 1) * size)
        return layer["weight_ih"][rows] @ x + bias * layer["bias"][rows], layer["weight_hh"][rows] @ h

    if family == "lstm":  # Gers et al., 2000
        i, f, g, o = (sum(gate(index)) for index in range(4))
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c
    if family == "gru":  # Cho et al., 2014, in cuDNN's form
        r, z = (sigmoid(sum(gate(index))) for index in range(2))
        own, recurrent = gate(2)
        n = np.tanh(own + r * (recurrent + layer["bias_hn"]))
        return (1 - z) * n + z * h, c
    a = sum(gate(0))
    return (np.maximum(a, 0) if activation == "relu" else np.tanh(a)), c


def expected_logits(weights: dict[str, Any], given: Any, tokens: Any, mask: Any) -> Any:
    """Returns the logits of one row `[T, V]`; padding is skipped."""
    directions = ["", "_reverse"] if given.bidirectional else [""]
    kept = np.flatnonzero(mask)
    xs = weights["token_embedding.weight"][tokens[kept]] * given.hidden_size**0.5
    for index in range(given.num_layers):
        joined = []
        for direction in directions:
            names = ["weight_ih", "weight_hh", "bias", *(["bias_hn"] if given.type == "gru" else [])]
            layer = {name: weights[f"layers.{index}.{name}{direction}"] for name in names}
            h = c = np.zeros(given.hidden_size)
            outputs = {}
            for step in range(len(xs))[:: -1 if direction else 1]:
                h, c = equations(given.type, layer, xs[step], h, c, given.activation)
                outputs[step] = h
            joined.append([outputs[step] for step in range(len(xs))])
        xs = np.concatenate(joined, axis=-1)
    output = weights["token_embedding.weight" if given.tie_embeddings else "output.weight"]
    logits = np.zeros((len(tokens), given.vocab_size))
    logits[kept] = xs @ output.T
    return logits


def with_random_weights(model: Any) -> Any:
    """Also sets the biases, which are zero in a new model."""
    drawn = {path: rng.normal(rng.key(1, path), array.shape) / 4 for path, array in model.weights().items()}
    model.set_weights({path: array.astype(model.weights()[path].dtype) for path, array in drawn.items()})
    return model


@pytest.mark.parametrize("name", CASES)
def test_the_equations(name: str) -> None:
    model = with_random_weights(model_of("exact", **{**CASES[name], "vocab_size": VOCAB, "hidden_size": 12}))
    tokens, mask = ids(3, 9), np.random.default_rng(1).random((3, 9)) < 0.7
    mask[0] = True
    found = plain(model(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask)))
    for row in range(3):
        expected = expected_logits(model.weights(), model.config, tokens[row], mask[row])
        np.testing.assert_allclose(found[row], expected, rtol=0, atol=1e-12 * np.abs(expected).max())
        assert np.abs(expected).max() > 0.1


# ---- the modules of the frameworks ------------------------------------------------------------------------


def torch_module(given: Any, **more: Any) -> Any:
    """Returns PyTorch's own module for the layers of a model, in float64."""
    kind = getattr(torch.nn, given.type.upper())
    options = {"nonlinearity": given.activation} if given.type == "rnn" else {}
    return kind(
        given.hidden_size,
        given.hidden_size,
        given.num_layers,
        bidirectional=given.bidirectional,
        dtype=torch.float64,
        **options,
        **more,
    )


@pytest.mark.parametrize("name", CASES)
def test_torchs_module_imported_and_exported(name: str) -> None:
    """With two random biases: our layers equal the module after import, and the module ours after export."""
    model = model_of("exact", **{**CASES[name], "hidden_size": 12})
    given = model.config
    theirs = torch_module(given)
    imported = from_torch({n: t.detach().numpy() for n, t in theirs.state_dict().items()}, given.type)
    model.set_weights({**model.weights(), **imported})
    x = torch.from_numpy(rng.normal(rng.key(0, "x"), (9, 3, 12)).astype(np.float64))
    shape = (given.num_layers * (1 + given.bidirectional), 3, 12)
    h, c = (torch.from_numpy(rng.normal(rng.key(0, part), shape).astype(np.float64)) for part in "hc")
    hidden = (h, c) if given.type == "lstm" else h
    y, states = x, model.split_hidden(hidden, 3)
    ends = []
    for layer, start in zip(model.layers, states, strict=True):
        y, end = layer(y, start)
        ends.append(end)
    expected, last = theirs(x, hidden)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)
    for ours, expected_part in zip(parts(model.join_hidden(ends)), parts(last), strict=True):
        np.testing.assert_allclose(ours, expected_part, rtol=0, atol=1e-13)

    exported = torch_module(given)
    state = to_torch(model.weights(), given.type)
    exported.load_state_dict({n: torch.from_numpy(a) for n, a in state.items()}, strict=True)
    torch.testing.assert_close(exported(x, hidden)[0], expected, rtol=0, atol=1e-13)
    back = from_torch(state, given.type)
    assert {n: a.tobytes() for n, a in back.items()} == {n: a.tobytes() for n, a in imported.items()}


def test_a_module_without_biases_is_imported() -> None:
    model = model_of("exact", type="gru")
    theirs = torch_module(model.config, bias=False)
    model.set_weights({**model.weights(), **from_torch(numpy_state(theirs), "gru")})
    x = torch.randn(5, 2, 24, dtype=torch.float64)
    y = x
    for layer in model.layers:
        y, _ = layer(y)
    torch.testing.assert_close(y, theirs(x)[0], rtol=0, atol=1e-13)


def numpy_state(module: Any) -> dict[str, Any]:
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def test_weights_that_cannot_be_imported() -> None:
    lstm = numpy_state(torch.nn.LSTM(3, 4))
    for weights, family, names in [
        (lstm, "elman", ("'elman'", "lstm, gru, rnn")),
        (lstm, "gru", ("weight_hh_l0", "[16, 4]", "[12, 4]")),
        ({"weight": lstm["weight_ih_l0"]}, "lstm", ("'weight'", "torch.nn.LSTM")),
        ({"weight_hh_l0": lstm["weight_hh_l0"]}, "lstm", ("weight_ih_l0", "missing")),
        (numpy_state(torch.nn.LSTM(3, 4, proj_size=2)), "lstm", ("proj_size",)),
        ({"weight_ih_l0": np.zeros((4, 4), np.int8)}, "lstm", ("weight_ih_l0", "int8")),
    ]:
        with pytest.raises(WeightsError) as caught:
            from_torch(weights, family)
        assert is_one_line(caught.value, *names)
    with pytest.raises(WeightsError) as caught:
        to_torch({"layers.0.weight": lstm["weight_hh_l0"]}, "lstm")
    assert is_one_line(caught.value, "'layers.0.weight'")


@FAMILIES
def test_mlxs_own_layers(family: str) -> None:
    """A stack of `mlx.nn` layers with our weights: our error is at most twice theirs."""
    model = with_random_weights(model_of("mlx", type=family))
    exact = model_of("exact", type=family)
    exact.set_weights({path: array.astype(np.float64) for path, array in model.weights().items()})
    tokens = ids(3, 15)
    y = model.token_embedding(mx.array(tokens)) * 24**0.5
    for index in range(2):
        layer = getattr(mlx.nn, family.upper())(24, 24)
        ours = dict(tree_flatten(model.layers[index].parameters()))
        names = {"weight_ih": "Wxh" if family == "rnn" else "Wx", "weight_hh": "Whh" if family == "rnn" else "Wh"}
        names |= {"bias": "b" if family == "gru" else "bias", "bias_hn": "bhn"}
        layer.load_weights([(names[name], array) for name, array in ours.items()])
        y = layer(y)
        y = y[0] if family == "lstm" else y
    theirs = plain(model.project(y))
    truth = plain(exact(torch.from_numpy(tokens)))
    assert judge(plain(model(mx.array(tokens))), theirs, truth).ratio <= 2


@both_backends
def test_no_second_bias_is_trained(backend: str) -> None:
    """The parameters are the canonical ones and no others."""
    model = model_of(backend, type="lstm", num_layers=1)
    assert list(model.weight_shapes()) == [
        "token_embedding.weight", "layers.0.weight_ih", "layers.0.weight_hh", "layers.0.bias", "output.weight",
    ]  # fmt: skip
    assert model.trainable_paths() == set(model.weight_shapes())


# ---- the state --------------------------------------------------------------------------------------------


@both_backends
@FAMILIES
@pytest.mark.parametrize("pieces", [[1] * 12, [3, 3, 3, 3], [5, 7], [12]])
def test_in_pieces(backend: str, family: str, pieces: list[int]) -> None:
    model = with_random_weights(model_of(backend, type=family))
    tokens = ids(2, 12)
    whole, last = model(native(backend, tokens), return_hidden=True)
    logits, hidden, start = [], None, 0
    for size in pieces:
        out, hidden = model(native(backend, tokens[:, start : start + size]), hidden, return_hidden=True)
        logits.append(plain(out))
        start += size
    np.testing.assert_allclose(np.concatenate(logits, axis=1), plain(whole), rtol=0, atol=3e-6)
    for found, expected in zip(parts(hidden), parts(last), strict=True):
        assert found.shape == (2, 2, 24)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@both_backends
def test_in_pieces_in_half_precision(backend: str, dtype: str) -> None:
    """The state is fp32, so passing it on rounds nothing."""
    model = with_random_weights(model_of(backend, type="lstm"))
    model.compute_dtype = getattr(mx if backend == "mlx" else torch, dtype)
    tokens = native(backend, ids(2, 12))
    whole = model(tokens)
    first, hidden = model(tokens[:, :5], return_hidden=True)
    assert all(part.dtype == np.float32 for part in parts(hidden))
    second = model(tokens[:, 5:], hidden)
    for found, expected in ((first, whole[:, :5]), (second, whole[:, 5:])):
        found, expected = (plain(mx.array(a).astype(mx.float32) if backend == "mlx" else a.float())
                           for a in (found, expected))  # fmt: skip
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.02)


@both_backends
@FAMILIES
def test_padding_does_not_change_the_state(backend: str, family: str) -> None:
    """A padded row equals the row alone, and so does its state. Padding can be anywhere, also everywhere."""
    model = with_random_weights(model_of(backend, type=family))
    tokens = ids(3, 8)
    start = model(native(backend, ids(3, 4, seed=5)), return_hidden=True)[1]
    mask = np.array([[0, 0, 0, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0, 1, 0], [0] * 8])
    logits, hidden = model(native(backend, tokens), start, native(backend, mask), return_hidden=True)
    for row in range(3):
        own = [native(backend, part[:, row : row + 1]) for part in parts(start)]
        own = tuple(own) if len(own) > 1 else own[0]
        kept = np.flatnonzero(mask[row])
        if len(kept):
            expected, own = model(native(backend, tokens[row : row + 1, kept]), own, return_hidden=True)
            np.testing.assert_allclose(plain(logits)[row, kept], plain(expected)[0], rtol=0, atol=3e-6)
        for found, part in zip(parts(hidden), parts(own), strict=True):
            np.testing.assert_allclose(found[:, row], part[:, 0], rtol=0, atol=1e-6)
    for step in range(8):  # token by token, as in decoding
        piece = native(backend, tokens[:, step : step + 1])
        out, start = model(piece, start, native(backend, mask[:, : step + 1]), return_hidden=True)
        kept = mask[:, step].astype(bool)
        np.testing.assert_allclose(plain(out)[kept, 0], plain(logits)[kept, step], rtol=0, atol=3e-6)


@both_backends
def test_features_of_both_directions(backend: str) -> None:
    model = model_of(backend, type="gru", bidirectional=True)
    features = plain(model.hidden_states(native(backend, ids(2, 5))))
    assert features.shape == (2, 5, 48)
    changed = ids(2, 5)
    changed[:, -1] = (changed[:, -1] + 1) % VOCAB
    other = plain(model.hidden_states(native(backend, changed)))
    assert np.abs(features[:, 0] - other[:, 0]).max() > 1e-6  # the first position depends on the last


# ---- generation -------------------------------------------------------------------------------------------


def sharpened(backend: str, family: str) -> Any:
    """Returns a model with larger logits than a new one, so that a choice depends on the prompt."""
    model = model_of(backend, type=family, hidden_size=96)
    weights = model.weights()
    weights["output.weight"] = weights["output.weight"] * np.float32(12)
    model.set_weights(weights)
    return model


PROMPTS = [[1, 2, 3, 2], [0], [5, 9, 60] * 6]


@FAMILIES
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generated_tokens_are_equal_on_both_backends(family: str, temperature: float) -> None:
    """A batch of unequal prompts, and the first prompt alone."""
    options = {"max_new_tokens": 60, "temperature": temperature, "top_k": 50, "seed": 4}
    found = {}
    for backend in PACKAGES:
        model = sharpened(backend, family)
        found[backend] = plain(model.generate(PROMPTS, **options))
        assert found[backend].shape == (3, 78)
        alone = plain(model.generate(PROMPTS[0], **options))  # row 0 draws with the keys of row 0
        assert np.array_equal(alone[0, 4:], found[backend][0, 18:])
    assert np.array_equal(found["mlx"], found["torch"])
    assert len(set(found["mlx"][0, 18:].tolist())) > 1 + 5 * (temperature > 0)


@both_backends
@pytest.mark.usefixtures("mlx_on_cpu")  # a captured step of a GPU calls no Python
def test_each_token_is_read_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generation passes the state on, and chooses the same tokens as a forward pass over the whole sequence."""
    model = sharpened(backend, "lstm")
    lengths: list[int] = []
    layer = type(model.layers[0])
    name = "__call__" if backend == "mlx" else "forward"
    own = getattr(layer, name)
    monkeypatch.setattr(layer, name, lambda self, x, *more: (lengths.append(x.shape[0]), own(self, x, *more))[1])
    out = plain(model.generate([[4, 8, 15, 16, 23]], max_new_tokens=20, temperature=0, prefill_chunk=2))
    assert lengths == [2, 2, 2, 2, 1, 1] + [1, 1] * 19  # two layers; the last token is not read
    monkeypatch.undo()
    again = plain(model(native(backend, out)))[0].argmax(-1)
    assert again[4:-1].tolist() == out[0, 5:].tolist()


@both_backends
def test_every_option(backend: str) -> None:
    model = sharpened(backend, "gru")
    options: dict[str, Any] = {"max_new_tokens": 30, "seed": 2, "top_p": 0.95, "min_p": 0.01}
    options |= {"repetition_penalty": 1.2, "overflow": "slide"}
    whole = plain(model.generate([PROMPTS[0]], **options))[0, 4:].tolist()
    streamed = [int(row[0]) for row in model.generate([PROMPTS[0]], stream=True, **options)]
    assert streamed == whole
    stop = whole[10]
    stopped = plain(model.generate([PROMPTS[0]], stop=[stop], **options))[0, 4:].tolist()
    assert stopped == whole[: whole.index(stop)]
    assert plain(model.generate(PROMPTS[0], max_length=9)).shape == (1, 9)
    assert plain(model.generate(PROMPTS[0])).shape == (1, 104)  # without a limit of the sequence length
    assert not model.training
    mask = native(backend, np.array([[0, 0, 1, 1, 1, 1]]))
    padded = plain(model.generate(native(backend, np.array([[7, 7, *PROMPTS[0]]])), attention_mask=mask, **options))
    assert padded[0, 6:].tolist() == whole


@both_backends
def test_a_bidirectional_model_cannot_generate(backend: str) -> None:
    with pytest.raises(UsageError) as caught:
        model_of(backend, type="lstm", bidirectional=True).generate([1])
    assert is_one_line(caught.value, "model.bidirectional: true")


# ---- the guide --------------------------------------------------------------------------------------------

GUIDE = """
from icenet.models import LSTMModel, GRUModel
from icenet.core.config import ModelConfig

config = ModelConfig(
    type="lstm",
    hidden_size=512,
    num_layers=4,
)

model = LSTMModel(config)

# Forward pass
logits = model(input_ids)  # [batch, seq_len, vocab_size]

# With hidden state
logits, hidden = model(input_ids, hidden, return_hidden=True)

# Generation
generated = model.generate(
    input_ids,
    max_length=100,
    temperature=0.8,
)
"""


@pytest.mark.parametrize("size", [64, pytest.param(512, marks=pytest.mark.slow)])
def test_the_guides_snippets(shared_initial_values: None, size: int) -> None:
    """On `icenet` and, with the package name replaced, on `icenet_torch`; the generated tokens are equal.

    Size 512 is the printed one.
    """
    prompt = np.array([[11, 2025, 7, 49999], [0, 1, 2, 3]])
    generated = {}
    for backend, package in PACKAGES.items():
        scope: dict[str, Any] = {"input_ids": native(backend, prompt), "hidden": None}
        exec(GUIDE.replace("icenet.", f"{package}.").replace("512", f"{size}"), scope)
        assert tuple(scope["logits"].shape) == (2, 4, 50000) and np.isfinite(plain(scope["logits"])).all()
        assert [part.shape for part in parts(scope["hidden"])] == [(4, 2, size)] * 2
        again, _ = scope["model"](scope["input_ids"], scope["hidden"], return_hidden=True)
        assert np.abs(plain(again) - plain(scope["logits"])).max() > 1e-4
        generated[backend] = plain(scope["generated"])
        assert generated[backend].shape == (2, 100)
    assert np.array_equal(generated["mlx"], generated["torch"])


def test_the_guides_configuration() -> None:
    values = "{type: lstm, hidden_size: 512, num_layers: 4, dropout: 0.3, vocab_size: 10000}"
    import yaml

    assert Config.from_yaml("lstm-medium").model == ModelConfig(**yaml.safe_load(values))


@pytest.mark.parametrize("family", ["lstm", "gru"])
@pytest.mark.parametrize(("row", "size", "layers", "limit"), [
    ("small", 256, 2, 5e6), ("medium", 512, 4, 20e6), ("large", 1024, 4, 80e6),
])  # fmt: skip
def test_presets(family: str, row: str, size: int, layers: int, limit: float) -> None:
    """Counted by hand; at most the guide's number, and below it by no more than the vocabulary and gates explain."""
    given = Config.from_yaml(f"{family}-{row}")
    assert (given.model.hidden_size, given.model.num_layers) == (size, layers)
    gates = GATES[family]
    biases = (gates + (family == "gru")) * size
    expected = layers * (2 * gates * size * size + biases) + 2 * size * given.model.vocab_size
    for backend in BACKENDS:
        model = backends.module(backend, "engine.build").meta_model(given)
        assert model.num_params == expected
    assert (0.93 if family == "lstm" else 0.82) * limit < expected <= limit


# ---- weights and runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"type": "lstm"}, {"type": "gru", "bidirectional": True}, {"type": "rnn"}])
def test_conversion_there_and_back(changes: Any, tmp_path: Path) -> None:
    given = config(**changes)
    model = model_of("torch", **given.model.model_dump())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(given.to_yaml())
    from icenet.core.weights import files

    files.write(tmp_path / "run" / "model.safetensors", model.weights(), {"format": "pt"})
    forms = {"mlx": "m.safetensors", "torch": "t.pt", "canonical": "c.safetensors"}
    source = tmp_path / "run"
    for form, name in forms.items():
        settings = str(tmp_path / "run" / "config.yaml")
        convert_model(source, tmp_path / name, form, None, settings, False)
        source = tmp_path / name
    found = files.read(tmp_path / "c.safetensors")
    assert {n: a.tobytes() for n, a in found.items()} == {n: a.tobytes() for n, a in model.weights().items()}
    native_model = model_of("mlx", seed=9, **given.model.model_dump())
    native_model.load_weights(str(tmp_path / "m.safetensors"))
    assert {n: a.tobytes() for n, a in native_model.weights().items()} == {n: a.tobytes() for n, a in found.items()}


@pytest.mark.parametrize(
    ("family", "first", "second"),
    [
        ("lstm", "mlx", "torch"),
        ("gru", "torch", "mlx"),
        pytest.param("rnn", "mlx", "torch", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_changes_backend(family: str, first: str, second: str, tmp_path: Path, no_plots: None) -> None:
    """Six steps on one backend and six on the other, judged by the yardstick."""
    settings = tiny(tmp_path, "data.seq_length=16", "training.max_steps=12", family=family)
    train(settings, tmp_path / "run", first, until=6)
    resume(tmp_path / "run", second)
    three = curves(build(settings), 12)
    assert judge_curve(losses(tmp_path / "run"), three["PyTorch"], three["PyTorch float64"]).passed
    assert losses(tmp_path / "run")[-1] < 0.9 * losses(tmp_path / "run")[0]


@FAMILIES
def test_initial_weights(family: str) -> None:
    given = config(type=family, bidirectional=True, hidden_size=64)
    ours, theirs = build(given)[:2]
    weights = theirs.weights()
    assert {n: a.tobytes() for n, a in ours.weights().items()} == {n: a.tobytes() for n, a in weights.items()}
    for direction in ("", "_reverse"):
        assert not weights[f"layers.0.bias{direction}"].any()
        for name in ("weight_ih", "weight_hh"):
            array = weights[f"layers.0.{name}{direction}"]
            assert array.std() * 64**0.5 == pytest.approx(1, abs=0.03)
    assert not np.array_equal(weights["layers.0.weight_hh"], weights["layers.0.weight_hh_reverse"])


# ---- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"type": "lstm", "bidirectional": True, "tie_embeddings": True}, ("tie_embeddings", "bidirectional: false")),
        ({"type": "lstm", "activation": "relu"}, ("activation relu", "rnn")),
        ({"type": "gru", "num_heads": 8}, ("model.num_heads",)),
        ({"type": "rnn", "num_layers": 0}, ("model.num_layers",)),
        ({"type": "lstmm"}, ("'lstmm'", "lstm?")),
    ],
)
def test_invalid_configurations(values: Any, names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**values)
    assert is_one_line(caught.value, *names)


@both_backends
def test_bad_calls(backend: str) -> None:
    models = importlib.import_module(f"{PACKAGES[backend]}.models")
    with pytest.raises(UsageError) as caught:
        models.LSTMModel(ModelConfig(type="gru"))
    assert is_one_line(caught.value, "LSTMModel", "gru", "lstm")
    model = model_of(backend, type="lstm")
    tokens, h = native(backend, ids(2, 3)), native(backend, np.zeros((2, 3, 24), np.float32))
    for hidden in (h, (h, h), (h[:, :2],)):
        with pytest.raises(UsageError) as caught:
            model(tokens, hidden)
        assert is_one_line(caught.value, "hidden", "[[2, 2, 24], [2, 2, 24]]")


def test_text_needs_a_sequence_length(tmp_path: Path) -> None:
    from icenet.core.data.datasets import dataset_for

    given = config(type="lstm", vocab_size=257)
    given.data.source = str(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.seq_length"):
        dataset_for(given)
