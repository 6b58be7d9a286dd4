"""The transformer on both backends: the guide's snippets, sizes, masks, the cache, weights, gradient checkpointing,
compilation. `parity/test_parity.py` compares its outputs and gradients."""

from __future__ import annotations

import importlib
import re
import textwrap
from typing import Any

import icenet.blas

# isort: split
import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
import torch
from helpers import PACKAGES, both_backends, build_model, check_close, is_one_line, native, plain, token_ids
from mlx.utils import tree_flatten

import icenet.models
import icenet.nn
import icenet_torch.models
import icenet_torch.nn
from icenet.core import backends, rng
from icenet.core.config import Config, ModelConfig, TransformerConfig
from icenet.core.errors import ConfigError, UsageError, WeightsError
from icenet.core.generation.request import make_request

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 61,
    "max_seq_length": 48,
    "dropout": 0.2,
}


def config_of(**changes: Any) -> Any:
    return ModelConfig(type="transformer", **{**SMALL, **changes})


def build(backend: str, seed: int = 3, **changes: Any) -> Any:
    """Returns a model in evaluation mode; backend "exact" is PyTorch in float64."""
    return build_model(backend, config_of(**changes), seed)


def ids(*shape: int, seed: int = 0) -> Any:
    return token_ids(*shape, vocab_size=SMALL["vocab_size"], seed=seed)


# ---- the guide --------------------------------------------------------------------------------------------

GUIDE = """
from icenet.models import TransformerModel
from icenet.core.config import ModelConfig

config = ModelConfig(
    type="transformer",
    hidden_size=512,
    num_layers=6,
    num_heads=8,
)

model = TransformerModel(config)

# Forward pass
output = model(input_ids)  # [batch, seq_len, vocab_size]

# Generation
generated = model.generate(
    input_ids,
    max_length=100,
    temperature=0.8,
    top_k=50,
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
        scope: dict[str, Any] = {"input_ids": native(backend, prompt)}
        exec(GUIDE.replace("icenet.", f"{package}.").replace("512", f"{size}"), scope)
        output = scope["output"]
        assert type(output) is (mx.array if backend == "mlx" else torch.Tensor)
        assert tuple(output.shape) == (2, 4, 50000) and np.isfinite(plain(output)).all()
        assert scope["model"].num_params == expected_parameters(scope["config"])
        generated[backend] = plain(scope["generated"])
        assert generated[backend].shape == (2, 100)
        assert np.array_equal(generated[backend][:, :4], prompt)
    assert np.array_equal(generated["mlx"], generated["torch"])


@pytest.mark.parametrize("name", ["core.config", "models", "models.base"])
def test_the_guides_module_names_exist_under_icenet_torch_too(name: str) -> None:
    """The guide's imports work with the package name replaced."""
    names = {"core.config": "ModelConfig", "models": "TransformerModel", "models.base": "BaseModel"}
    assert hasattr(importlib.import_module(f"icenet_torch.{name}"), names[name])


# ---- sizes ------------------------------------------------------------------------------------------------


def expected_parameters(config: Any) -> int:
    """Embedding, blocks (four projections, two linear layers, two norms), final norm and output, counted by hand."""
    d, f, v = config.hidden_size, config.feed_forward_multiplier * config.hidden_size, config.vocab_size
    block = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 2 * (2 * d)
    final_norm = 2 * d if config.norm_position == "pre" else 0
    output = 0 if config.tie_embeddings else v * d
    return v * d + config.num_layers * block + final_norm + output


@both_backends
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"norm_position": "post"},
        {"feed_forward_multiplier": 3, "num_layers": 1},
        {"causal": False, "tie_embeddings": True, "norm_position": "post", "num_heads": 1, "vocab_size": 1},
    ],
)
def test_sizes(backend: str, changes: Any) -> None:
    model = build(backend, **changes)
    expected = expected_parameters(model.config)
    assert model.num_params == expected == sum(array.size for array in model.weights().values())
    assert model.memory() == model.memory("fp32") == 4 * expected
    assert model.memory("fp16") == model.memory("bf16") == 2 * expected and model.memory("int8") == expected
    with pytest.raises(UsageError) as caught:
        model.memory("fp8")
    assert is_one_line(caught.value, "'fp8'", "fp32", "bf16", "fp16", "int8")


@both_backends
def test_frozen_weights_still_take_memory(backend: str) -> None:
    model = build(backend)
    memory, count = model.memory(), model.num_params
    if backend == "mlx":
        model.token_embedding.freeze()
    else:
        model.token_embedding.requires_grad_(False)
    assert model.num_params == count - 61 * 32  # the trainable ones
    assert model.memory() == memory


def test_repr_reads_well_and_is_the_same_on_both() -> None:
    ours, theirs = build("mlx"), build("torch")
    assert repr(ours) == repr(theirs)
    expected = """\
        TransformerModel(hidden_size=32, num_layers=2, dropout=0.2, vocab_size=61, num_heads=4, max_seq_length=48)
          token_embedding                  1,952
          blocks x 2                      25,408
          final_norm                          64
          output                           1,952
          parameters                      29,376   0.1 MB fp32, 0.1 MB fp16"""
    assert repr(ours) == textwrap.dedent(expected)
    assert str(ours) == repr(ours)
    assert repr(build("torch", num_layers=1)).splitlines()[2].split() == ["blocks", "12,704"]


@both_backends
def test_the_model_knows_its_config(backend: str) -> None:
    config = config_of()
    models = importlib.import_module(f"{PACKAGES[backend]}.models")
    model = models.MODELS[config.type](config)
    assert isinstance(model, models.BaseModel) and type(model) is models.TransformerModel
    assert model.config is config and model.backend == backend


def test_model_config_chooses_the_family() -> None:
    assert type(config_of()) is TransformerConfig
    with pytest.raises(ConfigError, match="unknown family 'mlp'"):
        ModelConfig(type="mlp", hidden_size=512)


@both_backends
def test_a_sequence_too_long(backend: str) -> None:
    model = build(backend)
    assert model(native(backend, ids(1, 48))).shape[1] == 48
    cache = model.make_cache()
    model(native(backend, ids(1, 40)), None, cache)
    for arguments in ((native(backend, ids(1, 49)),), (native(backend, ids(1, 9)), None, cache)):
        with pytest.raises(UsageError) as caught:
            model(*arguments)
        assert is_one_line(caught.value, "49", "model.max_seq_length 48")


# ---- masks and the cache ----------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("changes", [{}, {"causal": False}, {"norm_position": "post"}, {"num_heads": 1}])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_real_positions(backend: str, changes: Any, side: str) -> None:
    model, exact_model = build(backend, **changes), build("exact", **changes)
    lengths, width = [9, 1, 4, 6], 9
    rows = [ids(1, length, seed=length) for length in lengths]
    tokens, mask = np.full((4, width), 60, np.int32), np.zeros((4, width), np.int32)
    spans = [slice(width - n, width) if side == "left" else slice(0, n) for n in lengths]
    for index, (row, span) in enumerate(zip(rows, spans, strict=True)):
        tokens[index, span], mask[index, span] = row[0], 1
    for kind in (np.int32, np.bool_, np.float32):
        padded = plain(model(native(backend, tokens), native(backend, mask.astype(kind))))
        assert np.isfinite(padded).all()  # padding too: a NaN there would spread
        for index, (row, span) in enumerate(zip(rows, spans, strict=True)):
            exact = plain(exact_model(torch.from_numpy(row)))[0]
            check_close(padded[index, span], exact, plain(model(native(backend, row)))[0])


@both_backends
@pytest.mark.parametrize("causal", [True, False])
def test_the_tokens_of_padding_have_no_effect(backend: str, causal: bool) -> None:
    model = build(backend, causal=causal)
    tokens, mask = ids(2, 8), np.ones((2, 8), np.int32)
    mask[0, :3] = mask[1, :5] = 0
    first = plain(model(native(backend, tokens), native(backend, mask)))
    second = plain(model(native(backend, np.where(mask == 1, tokens, 7).astype(np.int32)), native(backend, mask)))
    assert np.array_equal(first[mask == 1], second[mask == 1])
    unmasked = plain(model(native(backend, tokens)))
    assert not np.allclose(first[0, 3:], unmasked[0, 3:], atol=1e-3)  # the mask does something


@both_backends
def test_a_causal_model_does_not_see_ahead_and_a_bidirectional_one_does(backend: str) -> None:
    tokens = ids(1, 12)
    other = tokens.copy()
    other[0, -1] = (other[0, -1] + 1) % 61
    for mask in (None, np.ones((1, 12), np.int32), np.array([[0] * 3 + [1] * 9])):
        for causal in (True, False):
            model = build(backend, causal=causal)
            masks = () if mask is None else (native(backend, mask),)
            first, second = (plain(model(native(backend, x), *masks))[0] for x in (tokens, other))
            assert np.array_equal(first[3:-1], second[3:-1]) == causal


@both_backends
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("pieces", [[1] * 40, [3] * 13 + [1], [40], [1, 39], [39, 1], [17, 1, 5, 1, 1, 15]])
def test_a_sequence_in_pieces_through_the_cache_equals_the_whole(backend: str, norm: str, pieces: list[int]) -> None:
    model, tokens = build(backend, norm_position=norm), ids(2, 40)
    exact = plain(build("exact", norm_position=norm)(torch.from_numpy(tokens)))
    whole = plain(model(native(backend, tokens)))
    mask = np.ones((2, 40), np.int32)
    mask[1, :11] = 0
    padded = plain(model(native(backend, tokens), native(backend, mask)))
    padded_exact = plain(build("exact", norm_position=norm)(torch.from_numpy(tokens), torch.from_numpy(mask)))
    for expected, noise, given_mask in ((exact, whole, None), (padded_exact, padded, mask)):
        cache, start, parts = model.make_cache(), 0, []
        for length in pieces:
            stop = start + length
            piece_mask = None if given_mask is None else native(backend, given_mask[:, :stop])
            parts.append(plain(model(native(backend, tokens[:, start:stop]), piece_mask, cache)))
            start = stop
        assert cache.length == plain(cache.position).item() == 40
        kept = np.ones((2, 40), bool) if given_mask is None else given_mask.astype(bool)
        check_close(np.concatenate(parts, axis=1)[kept], expected[kept], noise[kept])


@both_backends
@pytest.mark.parametrize("pieces", [[256, 1, 300], [255, 2, 1, 255], [600], [250] + [1] * 12])
def test_the_cache_grows(backend: str, pieces: list[int]) -> None:
    changes = {"max_seq_length": 600, "hidden_size": 16, "num_layers": 1}
    model, tokens = build(backend, **changes), ids(2, sum(pieces))
    exact = plain(build("exact", **changes)(torch.from_numpy(tokens)))
    cache, start, parts = model.make_cache(), 0, []
    for length in pieces:
        parts.append(plain(model(native(backend, tokens[:, start : start + length]), None, cache)))
        start += length
        assert cache.length == start <= cache.capacity <= 2 * max(start, 256)
        assert cache.layers[0].keys.shape[2] == cache.layers[0].values.shape[2] == cache.capacity
    check_close(np.concatenate(parts, axis=1), exact, plain(model(native(backend, tokens))))


@both_backends
def test_project_of_hidden_states_is_the_output(backend: str) -> None:
    for tie in (True, False):
        model, tokens = build(backend, tie_embeddings=tie), native(backend, ids(2, 5))
        hidden = model.hidden_states(tokens)
        assert tuple(hidden.shape) == (2, 5, 32)
        assert np.array_equal(plain(model.project(hidden)), plain(model(tokens)))


# ---- gradient checkpointing and dropout -------------------------------------------------------------------


def gradients(backend: str, model: Any, keys: Any, tokens: Any, mask: Any = None) -> dict[str, Any]:
    """Returns the gradients of the mean of squared logits in training mode, by path."""
    model.train()
    if keys is not None:
        model.seed_dropout(native(backend, keys if backend == "mlx" else keys.view(np.int32)))
    inputs = [native(backend, tokens)] + ([] if mask is None else [native(backend, mask)])
    if backend == "mlx":
        _, grads = mlx.nn.value_and_grad(model, lambda: mx.square(model(*inputs)).mean())()
        return {path: np.array(array) for path, array in tree_flatten(grads)}
    model.zero_grad()
    model(*inputs).square().mean().backward()
    return {path: parameter.grad.numpy().copy() for path, parameter in model.named_parameters()}


@both_backends
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_no_gradient(backend: str, padded: bool, dropout: float) -> None:
    model, tokens = build(backend, dropout=dropout), ids(2, 12)
    mask = np.array([[1] * 12, [0] * 5 + [1] * 7]) if padded else None
    keys = model.dropout_keys(0, 5, 2)
    expected = gradients(backend, model, keys, tokens, mask)
    model.gradient_checkpointing = True
    found = gradients(backend, model, keys, tokens, mask)
    assert found.keys() == expected.keys() and len(found) == len(model.weights())
    for path in found:
        scale = np.abs(expected[path]).max()
        assert scale > 0 or "k_proj.bias" in path, path
        np.testing.assert_allclose(found[path], expected[path], rtol=0, atol=4 * 2.0**-23 * scale, err_msg=path)
    model.eval()
    assert np.isfinite(plain(model(native(backend, tokens)))).all()


def test_gradient_checkpointing_without_keys_repeats_the_masks() -> None:
    """With the framework's own generator, both passes use the same mask: the gradient of x * mask / (1 - p)."""

    class Dropped(mlx.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x, self.dropout = mx.ones((1000,)), icenet.nn.Dropout(0.5)

        def __call__(self) -> Any:
            y = icenet.nn.checkpoint(self.dropout, self.x)
            return y.sum(), y

    module = Dropped()
    (_, y), gradient = mlx.nn.value_and_grad(module, lambda: module())()
    x = torch.ones(1000, requires_grad=True)
    theirs = icenet_torch.nn.checkpoint(icenet_torch.nn.Dropout(0.5), x)
    theirs.sum().backward()
    assert x.grad is not None
    found = {"mlx": np.array_equal(np.array(y), np.array(gradient["x"])), "torch": torch.equal(theirs, x.grad)}
    assert found == {"mlx": True, "torch": True}


@both_backends
def test_checkpointing_repeats_the_masks_of_each_call(backend: str) -> None:
    """The backward pass computes a block again with the keys of its calls, not with those of later calls."""
    package = {"mlx": icenet, "torch": icenet_torch}[backend]
    keys = rng.fold(rng.key(3, "dropout")[None, :], np.arange(8, dtype=np.uint64))
    dropout = package.nn.Dropout(0.5)

    class Block(mlx.nn.Module if backend == "mlx" else torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.drop = dropout

        def __call__(self, x: Any) -> Any:
            return self.drop(self.drop(x) * x)

    x, found = np.random.default_rng(0).normal(size=(8, 50)).astype(np.float32), []
    for checkpoint in (False, True):
        block: Any = Block()
        dropout.seed(native(backend, keys if backend == "mlx" else keys.view(np.int32)))
        call = (lambda x, block=block: package.nn.checkpoint(block, x)) if checkpoint else block
        if backend == "mlx":
            _, (gradient,) = mx.vjp(lambda x, call=call: call(call(x)).sum(), [mx.array(x)], [mx.array(1.0)])
        else:
            leaf = torch.tensor(x, requires_grad=True)
            call(call(leaf)).sum().backward()
            gradient = leaf.grad
        found.append(plain(gradient))
    assert np.array_equal(*found) and found[0].any()


@both_backends
def test_checkpointing_updates_buffers_once(backend: str) -> None:
    """Buffers of a user's block, that the forward pass replaces, changes in place or only reads."""
    package = {"mlx": icenet, "torch": icenet_torch}[backend]

    class Block(mlx.nn.Module if backend == "mlx" else torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            for name in ("calls", "in_place", "gain"):
                if backend == "mlx":
                    setattr(self, name, mx.full((3,), 2.0))
                    self.freeze(keys=[name])
                else:
                    self.register_buffer(
                        name, torch.full((1,), 2.0).expand(3) if name == "gain" else torch.full((3,), 2.0)
                    )

        def __call__(self, x: Any) -> Any:
            self.calls = self.calls + 1
            self.in_place += 1
            return x * x * self.gain

    block: Any = Block()
    gain, in_place = block.gain, block.in_place
    x = native(backend, np.arange(3, dtype=np.float32))
    if backend == "mlx":
        _, (gradient,) = mx.vjp(lambda x: package.nn.checkpoint(block, x).sum(), [x], [mx.array(1.0)])
        mx.eval(gradient)
    else:
        leaf = x.requires_grad_()
        package.nn.checkpoint(block, leaf).sum().backward()
        gradient = leaf.grad
    assert plain(gradient).tolist() == [0, 4, 8]
    assert plain(block.calls).tolist() == plain(block.in_place).tolist() == [3, 3, 3]
    assert block.gain is gain and block.in_place is in_place  # which other modules may share


def test_checkpointing_recomputes() -> None:
    """Each block runs twice."""
    for backend in PACKAGES:
        model = build(backend, num_layers=3)
        model.gradient_checkpointing = True
        runs, kind = [], type(model.blocks[0].attention)
        name = "__call__" if backend == "mlx" else "forward"
        original = getattr(kind, name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, name, lambda self, *x, _o=original, _r=runs: (_r.append(1), _o(self, *x))[1])
            gradients(backend, model, model.dropout_keys(0, 0, 1), ids(1, 4))
        assert len(runs) == 6, backend


@both_backends
def test_dropout_follows_its_keys(backend: str) -> None:
    model, tokens = build(backend), native(backend, ids(2, 12))
    exact = plain(model(tokens))
    model.train()

    def drawn(step: int) -> Any:
        keys = model.dropout_keys(0, step, 2)
        model.seed_dropout(native(backend, keys if backend == "mlx" else keys.view(np.int32)))
        return plain(model(tokens))

    first = drawn(1)
    assert np.array_equal(first, drawn(1)) and not np.array_equal(first, drawn(2))
    assert not np.array_equal(first, exact)
    model.eval()
    assert np.array_equal(plain(model(tokens)), exact)


# ---- weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True, "norm_position": "post", "causal": False}])
def test_weights_move_from_mlx_to_torch_and_back_bit_for_bit(changes: Any) -> None:
    generator = np.random.default_rng(1)
    first, second, third = build("mlx", 1, **changes), build("torch", 2, **changes), build("mlx", 3, **changes)
    values = {path: generator.normal(size=array.shape).astype(np.float32) for path, array in first.weights().items()}
    for array in values.values():  # values that arithmetic would change
        array.reshape(-1)[:4] = [np.float32(1e-45), -0.0, np.inf, np.nan][: array.size]
    first.set_weights(values)
    second.set_weights(first.weights())
    third.set_weights(second.weights())
    for model in (first, second, third):
        found = model.weights()
        assert list(found) == list(model.weight_shapes()) and found.keys() == values.keys()
        for path, array in found.items():
            assert array.dtype == np.float32 and tuple(array.shape) == model.weight_shapes()[path]
            assert array.tobytes() == values[path].tobytes(), path
    assert set(second.state_dict()) == set(values)


@both_backends
def test_weights_are_copies(backend: str) -> None:
    model, given = build(backend), build(backend, seed=9).weights()
    before = model.weights()
    for array in model.weights().values():
        array[...] = 7
    assert all(np.array_equal(before[path], array) for path, array in model.weights().items())
    model.set_weights(given)
    kept = {path: array.copy() for path, array in given.items()}
    for array in given.values():
        array[...] = 7
    assert all(np.array_equal(kept[path], array) for path, array in model.weights().items())


@both_backends
def test_set_weights_is_strict_and_all_or_nothing(backend: str) -> None:
    model = build(backend)
    before = model.weights()
    path, other = "blocks.1.feed_forward.up_proj.weight", "output.weight"
    right = build(backend, seed=8).weights()
    wrong = {
        "missing": {name: array for name, array in right.items() if name != path},
        "extra": {**right, "blocks.1.feed_forward.up_projection.weight": right[path]},
        "transposed": {**right, path: right[path].T},
        "flat": {**right, other: right[other].reshape(-1)},
        "none": {},
    }
    for case, values in wrong.items():
        with pytest.raises(WeightsError) as caught:
            model.set_weights(values)
        names = [] if case == "none" else [{"flat": other, "extra": "up_projection"}.get(case, path)]
        assert is_one_line(caught.value, *names), case
        assert all(np.array_equal(before[name], array) for name, array in model.weights().items()), case


@both_backends
def test_set_weights_accepts_other_dtypes_and_memory_layouts(backend: str) -> None:
    model, given = build(backend), build(backend, seed=4).weights()
    rounded = {path: array.astype(np.float16) for path, array in given.items()}
    model.set_weights(rounded)
    assert all(np.array_equal(rounded[path].astype(np.float32), array) for path, array in model.weights().items())
    strided = {path: np.asfortranarray(np.repeat(array, 2, axis=0))[::2] for path, array in given.items()}
    model.set_weights({path: array.astype(np.float64) for path, array in strided.items()})
    assert all(np.array_equal(given[path], array) for path, array in model.weights().items())
    assert {array.dtype for array in model.weights().values()} == {np.dtype(np.float32)}


@both_backends
def test_weights_of_a_model_in_half_precision(backend: str) -> None:
    for name in ("float16", "bfloat16"):
        model = build(backend)
        if backend == "mlx":
            model.set_dtype(getattr(mx, name))
        else:
            model.to(getattr(torch, name))
        assert model.weights().keys() == build(backend).weights().keys()


@both_backends
def test_init_weights_replaces_all_values(backend: str) -> None:
    model = build(backend, seed=1)
    model.init_weights(2)
    assert all(
        np.array_equal(array, model.weights()[path]) for path, array in build(backend, seed=2).weights().items()
    )


def test_both_backends_have_the_same_paths_sites_and_scales() -> None:
    for changes in ({}, {"tie_embeddings": True}, {"norm_position": "post"}):
        ours, theirs = build("mlx", **changes), build("torch", **changes)
        for method in ("weight_shapes", "trainable_paths", "layer_kinds", "init_scales", "dropout_sites"):
            first, second = getattr(ours, method)(), getattr(theirs, method)()
            assert first == second, method
            assert method != "weight_shapes" or list(first) == list(second)
        assert all(re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*", path) for path in ours.weight_shapes())


# ---- compilation ------------------------------------------------------------------------------------------


def trained(backend: str, compiled: bool, lengths: list[int], dropout: float) -> tuple[list[Any], Any]:
    """Returns the losses of one training step and one evaluation per length, and the weights after them."""
    tree = {
        "model": {"type": "transformer", **SMALL, "num_layers": 1, "dropout": dropout, "compile_model": compiled},
        "training": {"max_steps": 4, "learning_rate": 1e-2},
    }
    engine = backends.engine(Config.from_dict(tree), backend, "cpu")
    results: list[Any] = []
    for step, length in enumerate(lengths):
        batch = {"inputs": ids(2, length, seed=step), "labels": ids(2, length, seed=step + 9)}
        results.append(engine.read(engine.train_step(batch, step, 1e-2))[:2])
        results.append(engine.evaluate(batch)[:2])
    return results, engine.weights()


LENGTHS = [8, 8, 5, 8]


@pytest.mark.parametrize(
    ("backend", "compiler", "lengths", "dropout"),
    [
        ("mlx", "unfused", LENGTHS, 0.2),
        pytest.param("mlx", None, LENGTHS, 0.2, marks=pytest.mark.slow),  # about 22 kernels, a second of g++ each
        # the graphs that torch.compile captures, without the C++ compiler; tracing dropout for more lengths is slow
        ("torch", "eager", [8, 8], 0.2),
        ("torch", "eager", LENGTHS, 0.0),
        pytest.param("torch", "aot_eager", [8, 8], 0.2, marks=pytest.mark.slow),
        pytest.param("torch", "aot_eager", LENGTHS, 0.2, marks=pytest.mark.slow),
        pytest.param("torch", "inductor", LENGTHS, 0.2, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_model_gives_the_same(
    backend: str, compiler: Any, lengths: list[int], dropout: float, monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    if compiler == "unfused":
        request.getfixturevalue("unfused")
    elif compiler is not None:
        compile_model = torch.compile
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        monkeypatch.setattr(torch, "compile", lambda model: compile_model(model, backend=compiler))
    (eager, weights), (compiled, compiled_weights) = (trained(backend, on, lengths, dropout) for on in (False, True))
    assert backend == "mlx" or not torch._dynamo.utils.counters["graph_break"]
    for first, second in zip(eager, compiled, strict=True):
        np.testing.assert_allclose(second, first, rtol=2e-6)
    for path, array in weights.items():
        # AdamW divides by the size of the gradient, so rounding errors move a weight whose gradient is near zero by
        # up to the learning rate: hence the median. A key's bias has no gradient (softmax ignores a constant).
        if not path.endswith("k_proj.bias"):
            assert np.median(np.abs(compiled_weights[path] - array)) < 1e-6, path


@both_backends
def test_a_padded_batch_has_the_logits_of_each_prompt_alone(backend: str) -> None:
    """At the sizes where the buffers of the cache double, after the prompts and after three more tokens."""
    changes = {"max_seq_length": 1100, "hidden_size": 16, "num_layers": 1}
    model, exact_model = build(backend, **changes), build("exact", **changes)
    prompts = [ids(length, seed=length).tolist() for length in (1, 2, 255, 256, 257, 1030)]
    options = {"max_new_tokens": 4, "temperature": 0.0, "prefill_chunk": 100}

    def run(prompts: list[list[int]]) -> list[Any]:
        """Returns the logits `[B, V]` of each step."""
        with model.decoder_type(model, make_request(model, prompts, None, 0, options)) as decoder:
            return [(decoder.fetch(decoder.submit(index)), decoder.fetch_scores()[0])[1] for index in range(4)]

    together = run(prompts)
    for row, prompt in enumerate(prompts):
        alone = run([prompt])
        for index in range(4):
            tokens = prompt + [int(logits[0].argmax()) for logits in alone[:index]]
            exact = plain(exact_model(torch.tensor([tokens])))[0, -1]
            check_close(together[index][row], exact, alone[index][0])


@both_backends
@pytest.mark.parametrize("rows", [1, 2])
def test_the_first_step_needs_no_larger_buffers(backend: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of 256 columns fills buffers of the smallest size. Growing evaluates each layer."""
    model = build(backend, max_seq_length=300, hidden_size=16, num_layers=1)
    layer_type, grown = type(model.make_cache().layers[0]), []
    own = layer_type.grow

    def grow(self: Any, capacity: int) -> None:
        if self.keys is not None:
            grown.append(capacity)
        own(self, capacity)

    monkeypatch.setattr(layer_type, "grow", grow)
    model.generate(native(backend, ids(rows, 256)), max_new_tokens=3, temperature=0)
    assert not grown
