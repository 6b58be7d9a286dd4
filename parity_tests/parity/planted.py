"""Planted faults of arithmetic: small wrong changes of MLX's layers, loss and optimizers.

Each is planted at run time into MLX in several random configurations (`sweep.py --faults N`). A fault counts as found
if the parity report does not pass. A case in which the fault does not change a single bit of what MLX computes (such
as a wrong dropout scale without dropout) does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import icenet.blas

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from sweep import batch_of, case

import icenet.engine.optimizers as optimizers
import icenet.nn
from icenet.core.config import Config
from icenet.core.engine import Batch, Engine
from icenet.nn import activations, attention, conv, dropout, exact, linear, loss, norm, recurrent
from icenet.nn.arrays import Array
from icenet.parity.configuration.engines import Engines, build, record
from icenet.parity.configuration.report import Report
from icenet.parity.configuration.run import compare_engines

Patch = pytest.MonkeyPatch
STEP = 3


class Fault(NamedTuple):
    """A wrong change.

    Attributes:
        name: What is wrong.
        plant: Changes MLX; called with the patch and the MLX engine.
        families: Model families that have the layer.
        fits: Whether the configuration uses it.
    """

    name: str
    plant: Callable[[Patch, Engine], None]
    families: tuple[str, ...] = ("transformer", "lstm", "gru", "rnn", "cnn")
    fits: Callable[[Config], bool] = lambda config: True


FAULTS: list[Fault] = []
RNN = ("lstm", "gru", "rnn")


def fault(name: str, *families: str, fits: Callable[[Config], bool] = lambda config: True) -> Callable[..., Any]:
    """Adds a function to the table: it changes MLX, given the patch and the MLX engine."""

    def add(plant: Callable[[Patch, Engine], None]) -> Callable[[Patch, Engine], None]:
        FAULTS.append(Fault(name, plant, families or Fault._field_defaults["families"], fits))
        return plant

    return add


def replaces(name: str, module: Any, attribute: str, *families: str, **options: Any) -> Callable[..., Any]:
    """Adds a function to the table that replaces `module.attribute`; it receives the original as first argument."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        def plant(patch: Patch, engine: Engine) -> None:
            original = getattr(module, attribute)

            def wrong(*args: Any, **kwargs: Any) -> Any:
                return function(original, *args, **kwargs)

            for place in (module, icenet.nn, recurrent):  # names that were imported from the module
                if getattr(place, attribute, None) is original:
                    patch.setattr(place, attribute, wrong)

        FAULTS.append(Fault(name, plant, families or Fault._field_defaults["families"], **options))
        return function

    return add


def modules(engine: Engine, cls: type) -> list[Any]:
    return [module for module in engine.model.modules() if isinstance(module, cls)]


def sets(name: str, cls: type, attribute: str, value: Callable[[Any], Any], *families: str, **options: Any) -> None:
    """Adds a fault that changes an attribute of every module of a class; `value` maps the old one to the new one."""

    def plant(patch: Patch, engine: Engine) -> None:
        for module in modules(engine, cls):
            setattr(module, attribute, value(getattr(module, attribute)))

    FAULTS.append(Fault(name, plant, families or Fault._field_defaults["families"], **options))


def has_dropout(config: Config) -> bool:
    return config.model.dropout > 0


def uses(*names: str) -> Callable[[Config], bool]:
    return lambda config: config.training.optimizer in names


def has_layer_norm(config: Config) -> bool:
    return getattr(config.model, "norm", None) == "layer_norm"


# ---- norms --------------------------------------------------------------------------------------------------

sets("layer norm: eps 1e-6", nn.LayerNorm, "eps", lambda _: 1e-6, "transformer", fits=has_layer_norm)
sets("layer norm: eps 2e-5", nn.LayerNorm, "eps", lambda _: 2e-5, "transformer", fits=has_layer_norm)
sets("batch norm: eps 1e-3", nn.BatchNorm, "eps", lambda _: 1e-3, "cnn")
sets("batch norm: eps 2e-5", nn.BatchNorm, "eps", lambda _: 2e-5, "cnn")
sets("batch norm: momentum 0.01", nn.BatchNorm, "momentum", lambda _: 0.01, "cnn")


def layer_norm(x: Array, weight: Array, bias: Array, eps: float, axis: int = -1, ddof: int = 0) -> Array:
    mean, var = x.mean(axis=axis, keepdims=True), x.var(axis=axis, keepdims=True, ddof=ddof)
    result: Array = (x - mean) * mx.rsqrt(var + eps) * weight + bias
    return result


@replaces("layer norm: unbiased variance", norm.LayerNorm, "__call__", "transformer", fits=has_layer_norm)
def _(original: Any, self: Any, x: Array) -> Array:
    return layer_norm(x.astype(mx.float32), self.weight, self.bias, self.eps, ddof=1).astype(x.dtype)


@replaces("layer norm: over the positions", norm.LayerNorm, "__call__", "transformer", fits=has_layer_norm)
def _(original: Any, self: Any, x: Array) -> Array:
    return layer_norm(x.astype(mx.float32), self.weight, self.bias, self.eps, axis=-2).astype(x.dtype)


@replaces("layer norm: the variance has no gradient", norm.LayerNorm, "__call__", "transformer", fits=has_layer_norm)
def _(original: Any, self: Any, x: Array) -> Array:
    y = x.astype(mx.float32)
    mean, var = y.mean(axis=-1, keepdims=True), y.var(axis=-1, keepdims=True)
    return ((y - mean) * mx.rsqrt(mx.stop_gradient(var) + self.eps) * self.weight + self.bias).astype(x.dtype)  # type: ignore


@replaces("layer norm: gradient of the bias doubled", norm.LayerNorm, "__call__", "transformer", fits=has_layer_norm)
def _(original: Any, self: Any, x: Array) -> Array:
    y = original(self, x)
    return y + (self.bias - mx.stop_gradient(self.bias)).astype(y.dtype)  # type: ignore[no-any-return]


@replaces("batch norm: unbiased variance", exact, "moments", "cnn")
def _(original: Any, x: Array) -> Any:
    mean, var = original(x)
    count = x.size // x.shape[-1]
    return mean, var * (count / (count - 1))


@replaces("batch norm: biased running variance", norm.BatchNorm2d, "__call__", "cnn")
def _(original: Any, self: Any, x: Array) -> Array:
    before = self.running_var
    y = original(self, x)
    count = x.size // x.shape[-1]
    if self.training:
        self.running_var = before * 0.9 + (self.running_var - before * 0.9) * ((count - 1) / count)
    return y  # type: ignore[no-any-return]


# ---- attention, embeddings ----------------------------------------------------------------------------------


@replaces("attention: no scale", attention, "scaled_dot_product_attention", "transformer")
def _(original: Any, q: Array, *others: Any) -> Any:
    return original(q * q.shape[-1] ** 0.5, *others)


@replaces("attention: scale off by 1e-5", attention, "scaled_dot_product_attention", "transformer")
def _(original: Any, q: Array, *others: Any) -> Any:
    return original(q * (1 + 1e-5), *others)


@replaces("attention: scaled by all heads' size", attention, "scaled_dot_product_attention", "transformer")
def _(original: Any, q: Array, *others: Any) -> Any:
    return original(q * q.shape[1] ** -0.5, *others)


def is_sinusoidal(config: Config) -> bool:
    return getattr(config.model, "positions", None) == "sinusoidal"


def is_rotary(config: Config) -> bool:
    return getattr(config.model, "positions", None) == "rotary"


def reserved(model: Any) -> Any:
    """Returns a model whose tables of positions have their rows."""
    model.reserve_positions(model.config.max_seq_length)
    return model


def shifted(mask: Any, length: int, offset: int) -> Array:
    positions = mx.arange(length)
    causal = positions <= positions[:, None] + offset
    return causal if isinstance(mask, str) or mask is None else mask | causal


@replaces(
    "causal mask: one position too many",
    attention,
    "scaled_dot_product_attention",
    "transformer",
    fits=lambda config: getattr(config.model, "causal", False),
)
def _(original: Any, q: Array, k: Array, v: Array, mask: Any, *others: Any) -> Any:
    return original(q, k, v, shifted(mask, q.shape[2], 1) if isinstance(mask, str) else mask, *others)


@replaces("padding mask: ignored", attention, "make_attention_mask", "transformer")
def _(original: Any, attention_mask: Any, queries: Array, causal: bool, window: int | None = None) -> Any:
    return original(None, queries, causal, window)


@fault("positions: shifted by one", "transformer", fits=is_sinusoidal)
def _(patch: Patch, engine: Engine) -> None:
    table = reserved(engine.model)._positions
    table.array = mx.concatenate([table.array[1:], table.array[:1]])


@fault("positions: rounded to bf16", "transformer", fits=is_sinusoidal)
def _(patch: Patch, engine: Engine) -> None:
    table = reserved(engine.model)._positions
    table.array = table.array.astype(mx.bfloat16).astype(mx.float32)


@fault("rotary positions: sines rounded to bf16", "transformer", fits=is_rotary)
def _(patch: Patch, engine: Engine) -> None:
    for table in reserved(engine.model)._rotary.tables.values():
        table.array = table.array.astype(mx.bfloat16).astype(mx.float32)


@replaces("rotary positions: the other pairs", attention, "rotate", "transformer", fits=is_rotary)
def _(original: Any, x: Array, angles: Array, pairs: str) -> Array:
    return original(x, angles, "half" if pairs == "interleaved" else "interleaved")  # type: ignore[no-any-return]


@replaces(
    "sliding window: one token more",
    attention,
    "make_attention_mask",
    "transformer",
    fits=lambda config: getattr(config.model, "sliding_window", None) is not None,
)
def _(original: Any, attention_mask: Any, queries: Array, causal: bool, window: int | None = None) -> Any:
    return original(attention_mask, queries, causal, None if window is None else window + 1)


@replaces("embedding: scaled by 1.00001", nn.Embedding, "__call__", "transformer", *RNN)
def _(original: Any, self: Any, ids: Array) -> Array:
    return original(self, ids) * (1 + 1e-5)  # type: ignore[no-any-return]


# ---- activations, linear layers, convolutions ---------------------------------------------------------------


def of_activation(name: str) -> Callable[[Config], bool]:
    return lambda config: config.model.activation == name


@replaces("gelu: tanh approximation", activations, "activation", "transformer", "cnn", fits=of_activation("gelu"))
def _(original: Any, name: str, x: Array) -> Any:
    return original("gelu_tanh" if name == "gelu" else name, x)


@replaces("gelu_tanh: exact", activations, "activation", "transformer", "cnn", fits=of_activation("gelu_tanh"))
def _(original: Any, name: str, x: Array) -> Any:
    return original("gelu" if name == "gelu_tanh" else name, x)


@replaces("silu: beta 1.01", activations, "activation", "transformer", "cnn", fits=of_activation("silu"))
def _(original: Any, name: str, x: Array) -> Any:
    return x * mx.sigmoid(1.01 * x) if name == "silu" else original(name, x)


@replaces("relu: leaky by 1e-4", activations, "activation", "transformer", "cnn", fits=of_activation("relu"))
def _(original: Any, name: str, x: Array) -> Any:
    return mx.maximum(x, 1e-4 * x) if name == "relu" else original(name, x)


@replaces("linear: bias missing", linear, "linear")
def _(original: Any, x: Array, weight: Array, bias: Array | None = None, *_: Any) -> Array:
    return original(x, weight, None if bias is None else bias * 0)  # type: ignore[no-any-return]


@replaces("linear: bias added twice", linear, "linear")
def _(original: Any, x: Array, weight: Array, bias: Array | None = None, *_: Any) -> Array:
    return original(x, weight, None if bias is None else bias * 2)  # type: ignore[no-any-return]


@replaces("linear: gradient of the bias too large by 1e-5", linear, "linear")
def _(original: Any, x: Array, weight: Array, bias: Array | None = None, *_: Any) -> Array:
    y = original(x, weight, bias)
    return y if bias is None else y + (1e-5 * (bias - mx.stop_gradient(bias))).astype(y.dtype)  # type: ignore


def to_tf32(x: Array) -> Array:
    """Returns x with 10 bits of mantissa, rounded to nearest; the gradient is that of the identity."""
    factor = x * (2.0**13 + 1)
    return x + mx.stop_gradient(factor - (factor - x) - x)


@replaces("linear: factors rounded to TF32", linear, "linear")
def _(original: Any, x: Array, weight: Array, bias: Array | None = None, *_: Any) -> Array:
    return original(to_tf32(x), to_tf32(weight), bias)  # type: ignore[no-any-return]


@replaces("linear: products too large by 1e-5", linear, "linear")
def _(original: Any, x: Array, weight: Array, bias: Array | None = None, *_: Any) -> Array:
    return original(x * (1 + 1e-5), weight, bias)  # type: ignore[no-any-return]


@replaces("linear: gradient of the weight missing its first row", linear, "linear")
def _(original: Any, x: Array, weight: Array, bias: Array | None = None, *_: Any) -> Array:
    return original(x, mx.concatenate([mx.stop_gradient(weight[:1]), weight[1:]]), bias)  # type: ignore


@replaces("convolution: kernel flipped", conv, "conv2d", "cnn")
def _(original: Any, x: Array, weight: Array, stride: int, padding: int) -> Array:
    return original(x, weight[:, ::-1], stride, padding)  # type: ignore[no-any-return]


@replaces("convolution: edges repeated instead of zeros", conv, "conv2d", "cnn")
def _(original: Any, x: Array, weight: Array, stride: int, padding: int) -> Array:
    pad = [(0, 0), (padding, padding), (padding, padding), (0, 0)]
    return original(mx.pad(x, pad, mode="edge"), weight, stride, 0)  # type: ignore[no-any-return]


@replaces("convolution: factors rounded to TF32", conv, "conv2d", "cnn")
def _(original: Any, x: Array, weight: Array, stride: int, padding: int) -> Array:
    return original(to_tf32(x), to_tf32(weight), stride, padding)  # type: ignore[no-any-return]


@replaces("mean over pixels: one row left out", conv, "global_average_pool", "cnn")
def _(original: Any, x: Array) -> Any:
    return original(x[:, 1:] if x.shape[1] > 1 else x)


@replaces("mean over pixels: divided by one more", conv, "global_average_pool", "cnn")
def _(original: Any, x: Array) -> Any:
    pixels = x.shape[1] * x.shape[2]
    return original(x) * (pixels / (pixels + 1))


@replaces("max pooling: padded with zeros", conv, "max_pool", "cnn", fits=lambda c: c.model.stem == "conv7")
def _(original: Any, x: Array, size: int, stride: int, padding: int) -> Array:
    edge = (padding, padding)
    return original(mx.pad(x, [(0, 0), edge, edge, (0, 0)]), size, stride, 0)  # type: ignore[no-any-return]


# ---- dropout ------------------------------------------------------------------------------------------------


@replaces("dropout: no scale", dropout.Dropout, "__call__", fits=has_dropout)
def _(original: Any, self: Any, x: Array) -> Array:
    y = original(self, x)
    return y * (1 - self.p) if self.is_active else y  # type: ignore[no-any-return]


@replaces("dropout: masks of other rows", dropout, "dropout_mask", fits=has_dropout)
def _(original: Any, shape: Any, p: float, keys: Any) -> Array:
    return original(shape, p, None if keys is None else keys[::-1] + mx.array(1, keys.dtype))  # type: ignore


@replaces("dropout: rate too large by 0.02", dropout, "dropout_mask", fits=has_dropout)
def _(original: Any, shape: Any, p: float, keys: Any) -> Array:
    return original(shape, p + 0.02, keys)  # type: ignore[no-any-return]


@replaces("dropout: also in evaluation", dropout.Dropout, "__call__", fits=has_dropout)
def _(original: Any, self: Any, x: Array) -> Array:
    return original(self, x) if self.is_active else x * (1 - self.p)  # type: ignore[no-any-return]


# ---- recurrent layers ---------------------------------------------------------------------------------------


@replaces("recurrent: gates swapped", recurrent.Recurrent, "project", "lstm", "gru")
def _(original: Any, self: Any, x: Array, direction: str) -> Array:
    gates = mx.split(original(self, x, direction), self.gates, axis=-1)
    return mx.concatenate([gates[1], gates[0], *gates[2:]], axis=-1)


@replaces("recurrent: forget gate's bias too large by 1e-4", recurrent.Recurrent, "project", "lstm")
def _(original: Any, self: Any, x: Array, direction: str) -> Array:
    gates = mx.split(original(self, x, direction), self.gates, axis=-1)
    return mx.concatenate([gates[0], gates[1] + 1e-4, *gates[2:]], axis=-1)


@replaces("recurrent: the state decays by 1e-5 per step", recurrent, "add_matmul", *RNN)
def _(original: Any, a: Any, h: Array, weight: Array) -> Array:
    return original(a, h * (1 - 1e-5), weight)  # type: ignore[no-any-return]


@replaces("recurrent: padding changes the state", recurrent, "where", *RNN)
def _(original: Any, mask: Any, value: Array, padding: Any) -> Array:
    return value


@replaces("recurrent: gradient of the weight lacks the first step", recurrent, "states_before", *RNN)
def _(original: Any, first: Array, after: Array) -> Array:
    states = original(first, after)
    return mx.concatenate([states[:1], states[1:2] * 0, states[2:]])


@replaces("recurrent: the output is not reversed back", recurrent.Recurrent, "scan", *RNN)
def _(original: Any, self: Any, x: Array, *rest: Any) -> Any:
    y, *end = original(self, x, *rest)
    return (y[::-1] if rest[-1] else y, *end)


# ---- loss, gradients, optimizers ----------------------------------------------------------------------------


@replaces("loss: mean over ignored labels too", loss, "cross_entropy", "transformer", *RNN)
def _(original: Any, logits: Array, labels: Array) -> Any:
    mean, count = original(logits, labels)
    return mean * (count / labels.size), count


@replaces("loss: label smoothing 1e-4", loss, "cross_entropy")
def _(original: Any, logits: Array, labels: Array) -> Any:
    mean, count = original(logits, labels)
    uniform = mx.logsumexp(logits.astype(mx.float32), axis=-1) - logits.astype(mx.float32).mean(axis=-1)
    counted = (labels >= 0) / mx.maximum(count, 1)
    return (1 - 1e-4) * mean + 1e-4 * (uniform * counted).sum(), count


@replaces("loss: logits rounded to bf16", loss, "cross_entropy")
def _(original: Any, logits: Array, labels: Array) -> Any:
    return original(logits.astype(mx.bfloat16), labels)


ADAM = uses("adam", "adamw")


def optimizer_fault(name: str, *methods: str, **changes: Any) -> None:
    """Adds a fault that changes attributes of an optimizer of the given methods."""

    def plant(patch: Patch, engine: Engine) -> None:
        for group in engine.optimizer.groups:
            for attribute, value in changes.items():
                setattr(group.optimizer, attribute, value)

    FAULTS.append(Fault(name, plant, fits=uses(*methods)))


optimizer_fault("Adam: beta2 0.951", "adam", "adamw", betas=[0.9, 0.951])
optimizer_fault("Adam: beta1 0.901", "adam", "adamw", betas=[0.901, 0.95])
optimizer_fault("Adam: eps 1e-7", "adam", "adamw", eps=1e-7)


@replaces("Adam: second moment without bias correction", optimizers, "adam_corrections", fits=ADAM)
def _(original: Any, *args: Any) -> Any:
    return original(*args)[0], 1.0


@replaces("Adam: bias corrections of the previous step", optimizers, "adam_corrections", fits=ADAM)
def _(original: Any, step: int, *args: Any) -> Any:
    return original(max(step - 1, 0), *args)


@replaces("AdamW: weight decay after the step", optimizers.AdamW, "apply_single", fits=uses("adamw"))
def _(original: Any, self: Any, gradient: Array, parameter: Array, state: Any) -> Any:
    return self.adam_step(gradient, parameter, state) * self.state["shrink"]


@replaces("AdamW: weight decay in the gradient", optimizers.AdamW, "apply_single", fits=uses("adamw"))
def _(original: Any, self: Any, gradient: Array, parameter: Array, state: Any) -> Any:
    return self.adam_step(gradient + self.weight_decay * parameter, parameter, state)


@replaces("Adam: decoupled weight decay", optimizers.Adam, "apply_single", fits=uses("adam"))
def _(original: Any, self: Any, gradient: Array, parameter: Array, state: Any) -> Any:
    return self.adam_step(gradient, parameter * self.state["shrink"], state)


optimizer_fault("SGD: Nesterov left out", "sgd", nesterov=False)
optimizer_fault("SGD: momentum 0.901", "sgd", momentum=0.901)
optimizer_fault("Muon: momentum 0.951", "muon", momentum=0.951)
optimizer_fault("Lion: betas 0.9, 0.98", "lion", betas=[0.9, 0.98])


@replaces("Adafactor: no limit by the parameter's size", optimizers, "_root_mean_square", fits=uses("adafactor"))
def _(original: Any, array: Array) -> Any:
    return original(array) * (1 + 1e-5)


def clips(config: Config) -> bool:
    return config.training.max_grad_norm is not None


@fault("clipping: left out", fits=clips)
def _(patch: Patch, engine: Engine) -> None:
    engine.config = engine.config.with_overrides("training.max_grad_norm=null")


@fault("clipping: by the largest norm of a parameter", fits=clips)
def _(patch: Patch, engine: Engine) -> None:
    original = engine._norms
    patch.setattr(engine, "_norms", lambda gradients: (lambda n: (n[1].max(), n[1]))(original(gradients)))


@fault("training step: gradients of the batch without its last row")
def _(patch: Patch, engine: Engine) -> None:
    original = engine.train_step

    def step(batch: Batch, *args: Any) -> Any:
        short = {name: array[:-1] if len(array) > 2 else array for name, array in batch.items()}
        return original(short, *args)

    patch.setattr(engine, "train_step", step)


# ---- the run ------------------------------------------------------------------------------------------------


def outcome(engine: Engine, batch: Batch) -> dict[str, np.ndarray]:
    """Returns everything that the engine computes for a batch, and its state after a training step."""
    weights, state = engine.weights(), engine.optimizer_state()
    found = {f"evaluation {name}": value.array for name, value in record(engine, batch).values.items()}
    trained = record(engine, batch, STEP, train=True, gradients=True)
    found |= {f"training {name}": value.array for name, value in trained.values.items()}
    engine.read(engine.train_step(batch, STEP, engine.config.training.learning_rate))
    found |= engine.weights() | engine.optimizer_state()
    engine.set_weights(weights)
    engine.set_optimizer_state(state)
    return found


def has_effect(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> bool:
    return any(
        name not in after
        or array.shape != after[name].shape
        or not np.array_equal(array, after[name], equal_nan=True)
        for name, array in before.items()
    )


def plant(fault: Fault, engines: Engines, batch: Batch) -> Report | None:
    """Compares the engines with the fault in MLX; returns None if it changes nothing. MLX stays changed."""
    before = outcome(engines.mlx, batch)
    with Patch.context() as patch:
        fault.plant(patch, engines.mlx)
        return compare_engines(engines, batch, step=STEP) if has_effect(before, outcome(engines.mlx, batch)) else None


def configurations(fault: Fault, seed: int, count: int) -> Iterator[tuple[int, Config, dict[str, Any]]]:
    """Yields the first random cases in fp32 that have what the fault changes."""
    index = 0
    while count and index < 10_000:
        config, sizes = case(seed, index, precisions=("fp32",))
        if config.model.type in fault.families and fault.fits(config):
            yield index, config, sizes
            count -= 1
        index += 1


def main(seed: int, count: int) -> int:
    """Plants each fault in `count` cases; prints a table. Returns 1 if a fault was missed."""
    total, found_total = 0, 0
    for fault in FAULTS:
        effective, missed = 0, []
        for index, config, sizes in configurations(fault, seed, count):
            report = plant(fault, build(config), batch_of(config, sizes))
            if report is None:
                continue
            effective += 1
            if report.passed:
                row = report.worst[1] if report.worst else None
                missed.append(f"{index} (largest ratio {row.ratio:.2g})" if row else str(index))
        total, found_total = total + effective, found_total + effective - len(missed)
        print(f"{effective - len(missed):3} of {effective:3} found, {count} cases: {fault.name}", flush=True)
        for text in missed:
            print(f"    missed in case {text}", flush=True)
    print(f"{len(FAULTS)} faults: found in {found_total} of {total} cases in which they change a bit")
    return int(found_total < total)
