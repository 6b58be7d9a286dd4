"""Generation: both backends against each other and against a separate loop in float64 (no cache, batch or padding,
the sampling filters in plain NumPy); what must not have an effect."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import icenet.blas

from generation_models import PROMPTS, VOCAB, build, fresh, run

# isort: split
import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers import BACKENDS, PACKAGES, both_backends, build_model, native, plain

import icenet.generation.sampling
import icenet.models
import icenet_torch.generation.sampling
import icenet_torch.models
from icenet.core import rng
from icenet.core.config import GenerationConfig, ModelConfig
from icenet.core.errors import UsageError
from icenet.core.generation.sampling import compute_scores, draw_keys

EPS = 2.0**-23

# ---- the reference ----------------------------------------------------------------------------------------


def plain_softmax(x: Any) -> Any:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def plain_scores(logits: Any, options: Any, seen: set[int], key: Any) -> Any:
    """Returns the scores of one row, float64 `[V]`, with the steps that `core.generation.sampling` documents."""
    scores = np.array(logits, np.float64)
    penalty = options.get("repetition_penalty", 1.0)
    for token in seen:
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    temperature = options.get("temperature", 1.0)
    if temperature == 0:
        return scores
    scores = scores / temperature
    top_k = options.get("top_k", 0)
    if 0 < top_k < len(scores):
        scores[scores < sorted(scores)[-top_k]] = -math.inf
    if options.get("top_p", 1.0) < 1:
        probabilities, dropped = plain_softmax(scores), 0.0
        for token in np.argsort(probabilities)[:-1]:
            dropped += probabilities[token]
            if dropped > 1 - options["top_p"]:
                break
            scores[token] = -math.inf
    if options.get("min_p", 0.0) > 0:
        probabilities = plain_softmax(scores)
        scores[probabilities < options["min_p"] * probabilities.max()] = -math.inf
    uniform = rng.uniform(key, (len(scores),)).astype(np.float64)
    with np.errstate(divide="ignore"):
        return scores - np.log(-np.log(uniform))


def plain_key(options: Any, row: int, index: int) -> Any:
    return rng.fold(rng.fold(rng.key(options.get("seed", 0), "sample"), row), index)


def exact_scores(context: list[int], seen: set[int], options: Any, row: int, index: int, **changes: Any) -> Any:
    """Returns the scores of the token after `context` in float64, from the whole context without padding."""
    with torch.no_grad():
        logits = build("exact", **changes)(torch.tensor([context]))[0, -1].numpy()
    return plain_scores(logits, options, seen, plain_key(options, row, index))


def rounding(
    context: list[int], seen: set[int], options: Any, row: int, index: int, exact: Any, **changes: Any
) -> float:
    """Returns the largest error of fp32 scores among the tokens that both keep, on the worse backend."""
    worst = 0.0
    for backend in PACKAGES:
        logits = build(backend, **changes)(native(backend, np.array([context])))[0, -1]
        scores = plain_scores(plain(logits), options, seen, plain_key(options, row, index))
        both = np.isfinite(scores) & np.isfinite(exact)
        worst = max(worst, float(np.abs(scores - exact)[both].max()))
    return worst


def contexts(prompts: Any, row: int, tokens: Any, window: int) -> Iterator[tuple[list[int], set[int]]]:
    """Yields the context before each new token of a row, and the set of tokens in the row.

    If the window of the row is full, its older half is dropped.
    """
    context, seen = list(prompts[row])[-window:], set(prompts[row])
    for token in [*tokens, None]:
        yield list(context), set(seen)
        context = [*context, token][-(max(window // 2, 1) if len(context) >= window else window) :]
        seen.add(token)


def check_tokens(
    out: Any, prompts: Any, options: Any, window: int = 330, limit: int | None = None, **changes: Any
) -> int:
    """Checks that each token is the one that the float64 loop chooses after the tokens before it.

    A token may differ only if the exact scores of the two are closer than the rounding errors of both. Returns the
    number of such ties.
    """
    width, ties = max(map(len, prompts)), 0
    for row, prompt in enumerate(prompts):
        assert out[row, width - len(prompt) : width].tolist() == list(prompt)
        tokens = out[row, width:].tolist()[:limit]
        for index, (context, seen) in zip(range(len(tokens)), contexts(prompts, row, tokens, window), strict=False):
            exact = exact_scores(context, seen, options, row, index, **changes)
            best = int(np.argmax(exact))
            token = tokens[index]
            if token == best:
                continue
            gap = exact[best] - exact[token]
            allowed = 2 * rounding(context, seen, options, row, index, exact, **changes)
            assert gap <= allowed, (
                f"row {row}, token {index}: {token}, but {best} is better by {gap:.3g} > {allowed:.3g}"
            )
            ties += 1
    return ties


def check_same(first: Any, second: Any, prompts: Any, options: Any, window: int = 330, **changes: Any) -> None:
    """Checks that two outputs are equal; the first difference of a row must be a tie."""
    assert first.shape == second.shape
    width = max(map(len, prompts))
    for row in range(len(prompts)):
        apart = np.flatnonzero(first[row] != second[row])
        if len(apart) == 0:
            continue
        index = int(apart[0]) - width
        tokens = first[row, width:].tolist()
        context, seen = list(contexts(prompts, row, tokens[:index], window))[-1]
        exact = exact_scores(context, seen, options, row, index, **changes)
        one, other = exact[first[row, apart[0]]], exact[second[row, apart[0]]]
        gap = abs(one - other)
        allowed = 2 * rounding(context, seen, options, row, index, exact, **changes)
        assert gap <= allowed, f"row {row} differs at token {index}, whose scores differ by {gap:.3g} > {allowed:.3g}"


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.8, "top_k": 50},
    {"temperature": 1.3, "top_k": 5, "seed": 9},
    {"top_p": 0.7, "seed": 1},
    {"min_p": 0.1, "seed": 2},
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {"repetition_penalty": 4.0, "seed": 3},
    {"repetition_penalty": 0.7, "temperature": 0.9, "seed": 4},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2, "seed": 2**40 + 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
def test_tokens_are_equal_on_both_backends(options: Any) -> None:
    """The first options also make the cache grow beyond 256 columns."""
    new_tokens = 300 if options == OPTIONS[0] else 40
    outputs = [run(backend, PROMPTS, max_new_tokens=new_tokens, **options) for backend in BACKENDS]
    assert outputs[0].shape == (3, 18 + new_tokens)
    check_same(*outputs, PROMPTS, options)


@both_backends
@pytest.mark.parametrize("options", OPTIONS, ids=repr)
def test_tokens_equal_those_of_the_reference(backend: str, options: Any) -> None:
    out = run(backend, PROMPTS, max_new_tokens=30, prefill_chunk=7, **options)
    ties = check_tokens(out, PROMPTS, options)
    assert ties <= 1
    if options.get("temperature") != 0:
        assert len(set(out[0, 18:].tolist())) > 3  # not one repeated token


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_1000_tokens_are_equal_on_both_backends(seed: int) -> None:
    options = {"temperature": 0.8, "top_k": 50, "seed": seed}
    outputs = [run(b, PROMPTS, model=build(b, max_seq_length=1100), max_new_tokens=1000, **options) for b in PACKAGES]
    check_same(*outputs, PROMPTS, options, window=1100, max_seq_length=1100)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"seed": 5, "repetition_penalty": 1.3}], ids=repr)
@pytest.mark.parametrize("window", [1, 2, 5, 17])
def test_a_sliding_window(window: int, options: Any) -> None:
    changes = {"max_seq_length": window}
    outputs = []
    for backend in PACKAGES:
        model = build(backend, **changes)
        outputs.append(run(backend, PROMPTS, model=model, max_new_tokens=25, overflow="slide", **options))
        check_tokens(outputs[-1], PROMPTS, options, window, **changes)
        with pytest.raises(UsageError, match=r"exceed model\.max_seq_length"):
            model.generate(PROMPTS, max_new_tokens=25, **options)
    check_same(*outputs, PROMPTS, options, window, **changes)


def test_the_checks_can_fail() -> None:
    """Both checks detect one wrong token."""
    options = {"temperature": 0.0}
    right = run("torch", PROMPTS, max_new_tokens=6, **options)
    wrong = right.copy()
    wrong[1, 20] = (wrong[1, 20] + 1) % VOCAB
    with pytest.raises(AssertionError, match=r"row 1, token 2: \d+, but \d+ is"):
        check_tokens(wrong, PROMPTS, options)
    with pytest.raises(AssertionError, match="row 1 differs at token 2"):
        check_same(right, wrong, PROMPTS, options)
    with pytest.raises(AssertionError):
        check_tokens(right, PROMPTS, {"temperature": 0.0, "repetition_penalty": 2.0})
    with pytest.raises(AssertionError):
        check_tokens(run("torch", PROMPTS, max_new_tokens=6, seed=1), PROMPTS, {"seed": 2})


# ---- scores -----------------------------------------------------------------------------------------------


def backend_scores(backend: str, logits: Any, options: Any, keys: Any, seen: Any) -> Any:
    config = GenerationConfig(**{key: value for key, value in options.items() if key != "seed"})
    if backend == "mlx":
        drawn = None if keys is None else mx.array(keys)
        held = None if seen is None else mx.array(seen)
        return np.array(compute_scores(icenet.generation.sampling, mx.array(logits), config, drawn, held))
    drawn = None if keys is None else torch.from_numpy(keys.view(np.int32))
    held = None if seen is None else torch.from_numpy(seen)
    return compute_scores(icenet_torch.generation.sampling, torch.from_numpy(logits), config, drawn, held).numpy()


FILTERS: list[dict[str, Any]] = [
    *OPTIONS,
    *({"top_k": k} for k in (1, 2, 96, 97, 98, 10**6)),
    *({"top_p": p} for p in (1e-9, 0.05, 0.5, 0.999, 1 - 1e-12)),
    *({"min_p": p} for p in (1e-6, 0.5, 1.0)),
    {"temperature": 0.01, "top_p": 0.9},
    {"temperature": 100.0, "min_p": 0.9},
    {"top_k": 3, "top_p": 0.2, "min_p": 0.99, "repetition_penalty": 10.0},
]


@both_backends
@pytest.mark.parametrize("options", FILTERS, ids=repr)
def test_scores_equal_the_reference(backend: str, options: Any) -> None:
    generator = np.random.default_rng(3)
    logits = (3 * generator.normal(size=(5, 97))).astype(np.float32)
    seen = generator.random((5, 97)) < 0.3
    keys = None if options.get("temperature") == 0 else draw_keys(4, 5, 8)[6]
    held = seen if "repetition_penalty" in options else None
    found = backend_scores(backend, logits, options, keys, held)
    assert found.shape == (5, 97) and found.dtype == np.float32
    for row in range(5):
        tokens = set(np.flatnonzero(seen[row]).tolist()) if held is not None else set()
        exact = plain_scores(logits[row], options, tokens, None if keys is None else keys[row])
        assert np.array_equal(np.isfinite(found[row]), np.isfinite(exact))
        kept = np.isfinite(exact)
        assert kept.any() and np.argmax(found[row]) == np.argmax(exact)
        size = np.maximum(np.abs(exact), np.abs(exact).max() if options.get("temperature", 1) < 1 else 1)
        assert (np.abs(found[row] - exact) <= 8 * EPS * size)[kept].all()


@both_backends
def test_ties_are_kept_together_by_top_k(backend: str) -> None:
    """As in Hugging Face's TopKLogitsWarper, ties with the k-th highest are kept."""
    logits = np.array([[1, 3, 3, 3, 0, 2]], np.float32)
    found = backend_scores(backend, logits, {"top_k": 2}, draw_keys(0, 1, 1)[0], None)
    assert np.isfinite(found[0]).tolist() == [False, True, True, True, False, False]


@both_backends
def test_half_precision_logits_are_scored_in_single(backend: str) -> None:
    logits = np.random.default_rng(0).normal(size=(2, 40)).astype(np.float16)
    keys = draw_keys(1, 2, 1)[0]
    found = backend_scores(backend, logits, {"top_p": 0.9}, keys, None)
    assert found.dtype == np.float32
    assert np.array_equal(found, backend_scores(backend, logits.astype(np.float32), {"top_p": 0.9}, keys, None))


@both_backends
@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-37, 1e-40, 1e-300])
def test_a_temperature_near_zero_is_greedy(backend: str, temperature: float) -> None:
    """Logits divided by it would overflow fp32."""
    logits = (5 * np.random.default_rng(1).normal(size=(6, 50))).astype(np.float32)
    for options in ({}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}):
        found = backend_scores(backend, logits, {"temperature": temperature, **options}, draw_keys(1, 6, 1)[0], None)
        assert found.argmax(-1).tolist() == logits.argmax(-1).tolist(), options


@pytest.mark.parametrize("options", [o for o in FILTERS if o.get("temperature", 1) > 0], ids=repr)
def test_scores_follow_hugging_face(options: Any) -> None:
    transformers = pytest.importorskip("transformers")
    generator = np.random.default_rng(5)
    logits = (3 * generator.normal(size=(4, 97))).astype(np.float32)
    prompt = generator.integers(0, 97, (4, 20))
    seen = np.zeros((4, 97), bool)
    for row in range(4):
        seen[row, prompt[row]] = True
    steps = [transformers.TemperatureLogitsWarper(float(options.get("temperature", 1.0)))]
    if "repetition_penalty" in options:
        steps.insert(0, transformers.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if "top_k" in options:
        steps.append(transformers.TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        steps.append(transformers.TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        steps.append(transformers.MinPLogitsWarper(options["min_p"]))
    expected = torch.from_numpy(logits)
    for step in steps:
        expected = step(torch.from_numpy(prompt), expected)
    keys = draw_keys(2, 4, 1)[0]
    gumbel = np.stack([-np.log(-np.log(rng.uniform(key, (97,)))) for key in keys])
    for backend in PACKAGES:
        found = backend_scores(backend, logits, options, keys, seen if "repetition_penalty" in options else None)
        kept = torch.isfinite(expected).numpy()
        assert np.array_equal(np.isfinite(found), kept)
        np.testing.assert_allclose((found - gumbel)[kept], expected.numpy()[kept], rtol=1e-5, atol=1e-5)


# 0.999 quantile of chi-square by degrees of freedom
CHI_SQUARE = {2: 13.82, 5: 20.52}


@both_backends
@pytest.mark.parametrize("many", ["rows", "tokens"])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 2.0}, {"top_k": 3}, {"temperature": 0.5, "top_k": 3}], ids=repr
)
def test_draws_follow_the_softmax(backend: str, many: str, options: Any) -> None:
    n, logits = 20_000, np.array([0.3, -1.0, 1.7, 0.0, -2.0, 1.1])
    keys = draw_keys(11, n, 1)[0] if many == "rows" else draw_keys(11, 1, n)[:, 0]
    found = backend_scores(backend, np.tile(logits.astype(np.float32), (n, 1)), options, keys, None)
    counts = np.bincount(found.argmax(-1), minlength=6)
    scaled = logits / options.get("temperature", 1.0)
    if "top_k" in options:
        scaled[np.argsort(scaled)[:-3]] = -np.inf
    expected = n * plain_softmax(scaled)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < CHI_SQUARE[int(kept.sum()) - 1]


def test_draw_keys_are_one_per_row_and_token() -> None:
    keys = draw_keys(3, 4, 5)
    assert keys.shape == (5, 4, 2) and keys.dtype == np.uint32
    assert len({tuple(key) for key in keys.reshape(-1, 2).tolist()}) == 20
    for index in range(5):
        for row in range(4):
            assert np.array_equal(keys[index, row], plain_key({"seed": 3}, row, index))
    assert np.array_equal(draw_keys(3, 2, 3), keys[:3, :2])


# ---- what must not have an effect -------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"seed": 6, "top_p": 0.95}], ids=repr)
def test_the_first_row_does_not_depend_on_the_others(backend: str, options: Any) -> None:
    for prompts in (PROMPTS, PROMPTS[::-1]):
        width = max(map(len, prompts)) - len(prompts[0])
        alone = run(backend, prompts[:1], max_new_tokens=20, **options)
        among = run(backend, prompts, max_new_tokens=20, **options)[:1, width:]
        check_same(alone, among, prompts[:1], options)


NEIGHBOURS: list[dict[str, Any]] = [
    {"max_new_tokens": 30, "overflow": "slide", "temperature": 0},
    {"max_new_tokens": 30, "overflow": "slide", "seed": 3, "repetition_penalty": 1.4, "top_k": 9},
    {"max_length": 40, "overflow": "slide", "seed": 4, "prefill_chunk": 3},
    {"seed": 5, "top_p": 0.9, "min_p": 0.01},  # the default number of new tokens
    {"max_length": 20, "seed": 6, "stop": [7, 21, 33]},
]


@both_backends
@pytest.mark.parametrize("family", ["transformer", "lstm"])
@pytest.mark.parametrize("options", NEIGHBOURS, ids=repr)
def test_no_row_depends_on_its_neighbours(backend: str, family: str, options: Any) -> None:
    """Next to shorter and longer prompts, also beyond the window (20 positions), rows are as they are alone."""
    sizes = {"hidden_size": 32, "num_layers": 1, "vocab_size": VOCAB}
    window = {"max_seq_length": 20} if family == "transformer" else {}
    model = build_model(backend, ModelConfig(type=family, **sizes, **window), seed=7)
    prompts = [[1, 2, 3, 2], [0], [5, 9, 60] * 4 + [4] * 2]
    together = model.generate(prompts, details=True, **options)
    assert together[0] == model.generate(prompts[:1], details=True, **options)[0]  # row 0 draws with its own keys
    for row in (1, 2):
        others = [[8] * 11 for _ in prompts]
        others[row] = prompts[row]
        assert model.generate(others, details=True, **options)[row] == together[row]
    if "temperature" not in options:
        assert len({tuple(row.tokens) for row in together}) == 3


@both_backends
def test_a_longer_request_begins_with_the_shorter(backend: str) -> None:
    long = run(backend, PROMPTS, max_new_tokens=40, seed=1)
    assert np.array_equal(run(backend, PROMPTS, max_new_tokens=15, seed=1), long[:, :33])
    limited = run(backend, PROMPTS, max_length=33, seed=1)  # of each row: its prompt and its new tokens
    for row, prompt in enumerate(PROMPTS):
        end = 18 + 33 - len(prompt)
        assert np.array_equal(limited[row, :end], long[row, :end]) and not limited[row, end:].any()


@both_backends
def test_prefill_in_pieces(backend: str) -> None:
    whole = run(backend, PROMPTS, max_new_tokens=12, seed=8)
    for chunk in (1, 5, 17, 18, 1000):
        check_same(run(backend, PROMPTS, max_new_tokens=12, seed=8, prefill_chunk=chunk), whole, PROMPTS, {"seed": 8})


@pytest.mark.usefixtures("mlx_on_cpu")  # a captured step of a GPU calls no Python
@both_backends
def test_prefill_chunks_have_the_requested_size(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = fresh(backend), []
    original = type(model).hidden_states
    monkeypatch.setattr(
        type(model),
        "hidden_states",
        lambda self, ids, *rest: (lengths.append(ids.shape[1]), original(self, ids, *rest))[1],
    )
    model.generate([[1] * 10], max_new_tokens=4, prefill_chunk=4)
    assert lengths == [4, 4, 2, 1, 1, 1]  # the last token is not read


@both_backends
def test_each_seed_generates_another_text(backend: str) -> None:
    texts = [
        run(backend, [[1, 2]], max_new_tokens=20, seed=seed).tobytes() for seed in (0, 1, 2, 2**32, -1, 2**63 - 1)
    ]
    assert len(set(texts)) == 6
    assert run(backend, [[1, 2]], max_new_tokens=20, seed=2).tobytes() == texts[2]
    assert run(backend, [[1, 2]], max_new_tokens=20).tobytes() == texts[0]
    rows = run(backend, [[1, 2]] * 3, max_new_tokens=20)
    assert len({row.tobytes() for row in rows}) == 3  # equal prompts, independent draws


@both_backends
def test_a_greedy_text_does_not_depend_on_the_seed(backend: str) -> None:
    first = run(backend, [[1, 2]] * 2, max_new_tokens=20, temperature=0, seed=1)
    assert np.array_equal(first, run(backend, [[1, 2]] * 2, max_new_tokens=20, temperature=0, seed=2, top_k=1))
    assert np.array_equal(first[0], first[1])


@both_backends
def test_prompts_of_any_form(backend: str) -> None:
    options = {"max_new_tokens": 5, "temperature": 0}
    prompt = [[1, 2, 3], [4, 5, 6]]
    expected = run(backend, prompt, **options)
    forms: dict[str, Any] = {name: np.array(prompt, name) for name in ("int32", "int64")}
    forms |= {
        name: np.array(prompt, name) for name in ("uint8", "int8", "uint16", "int16", "uint32", "uint64", ">i4")
    }
    forms |= {"fortran": np.asfortranarray(np.array(prompt)), "reversed": np.array(prompt)[:, ::-1][:, ::-1]}
    forms |= {"tuples": tuple(map(tuple, prompt)), "rows": [np.array(row) for row in prompt]}
    forms |= {"mlx": mx.array(prompt), "torch": torch.tensor(prompt), "int32 tensor": torch.tensor(prompt).int()}
    forms |= {"native rows": [native(backend, row) for row in prompt]}
    wrong = {}
    for name, form in forms.items():
        try:
            assert np.array_equal(run(backend, form, **options), expected)
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}".splitlines()[0][:80]
    assert not wrong
    for form in (prompt[0], np.array(prompt[0]), native(backend, prompt[0]), (1, 2, 3)):
        assert np.array_equal(run(backend, form, **options), expected[:1])


@both_backends
def test_unequal_prompts_of_arrays(backend: str) -> None:
    options = {"max_new_tokens": 5, "temperature": 0}
    expected = run(backend, [[1, 2, 3], [4]], **options)
    assert np.array_equal(run(backend, [np.array([1, 2, 3]), np.array([4])], **options), expected)
    assert np.array_equal(run(backend, [native(backend, [1, 2, 3]), native(backend, [4])], **options), expected)


@both_backends
def test_numpy_numbers_as_options(backend: str) -> None:
    expected = run(backend, [[1, 2]], max_new_tokens=9, temperature=0.5, top_k=5, seed=3, stop=[7])
    options = {"max_new_tokens": np.int64(9), "top_k": np.int32(5), "seed": np.uint8(3), "stop": np.int64(7)}
    assert np.array_equal(run(backend, [[1, 2]], temperature=np.float64(0.5), **options), expected)
    assert np.array_equal(run(backend, [[1, 2]], temperature=np.float32(0.5), **options), expected)


@both_backends
def test_a_mask_equals_unequal_prompts(backend: str) -> None:
    tokens = np.array([[9, 9, 4], [1, 2, 3]])
    mask = np.array([[0, 0, 1], [1, 1, 1]])
    options = {"max_new_tokens": 12, "seed": 2, "repetition_penalty": 3.0}
    expected = run(backend, [[4], [1, 2, 3]], **options)
    for form in (mask, mask.astype(bool), mask.tolist(), native(backend, mask)):
        found = run(backend, native(backend, tokens), attention_mask=form, **options)
        assert np.array_equal(found[:, 2:], expected[:, 2:])


@both_backends
def test_dropout_is_off_and_the_mode_is_restored(backend: str) -> None:
    model = fresh(backend, dropout=0.5)
    model.eval()
    expected = run(backend, [[1, 2]], model=model, max_new_tokens=20, seed=1)
    assert not model.training
    model.train()
    assert np.array_equal(run(backend, [[1, 2]], model=model, max_new_tokens=20, seed=1), expected)
    assert model.training and model.blocks[0].feed_forward.dropout.training
    with pytest.raises(UsageError):
        model.generate([[999]])
    assert model.training
