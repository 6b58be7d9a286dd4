"""Speculative decoding: the tokens are those without a draft, and proposals are counted as by a plain loop."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from helpers import BACKENDS, LLAMA, both_backends, build_model, is_one_line, native, plain

import icenet
from icenet.core.config import ModelConfig
from icenet.core.errors import NonFiniteError, UsageError
from icenet.core.generation.speculative import DraftReport
from icenet.core.tokenizers.bytes import ByteTokenizer

MODELS: dict[str, dict[str, Any]] = {
    "default": {},
    "windows": {**LLAMA, "sliding_window": 5, "layer_types": ["sliding", "full"]},
}
PROMPT = [5, 6, 7, 8, 9]


def build(backend: str, seed: int = 3, **changes: Any) -> Any:
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 257, "max_seq_length": 96}
    model = build_model(backend, ModelConfig(type="transformer", **{**sizes, **changes}), seed=seed)
    model.tokenizer = ByteTokenizer()
    return model


def build_draft(model: Any, noise: float = 0.02, **changes: Any) -> Any:
    """Returns a model with nearly the same weights, which often chooses the same token."""
    draft = build(model.backend, **{**model.config.model_dump(exclude={"type"}), **changes})
    rng = np.random.default_rng(2)
    weights = model.weights()
    shapes = draft.weight_shapes()
    draft.set_weights(
        {
            path: (weights[path][tuple(map(slice, shape))] + noise * rng.standard_normal(shape)).astype(np.float32)
            for path, shape in shapes.items()
        }
    )
    return draft


def continued(model: Any, count: int = 40, **options: Any) -> Any:
    return model.generate([PROMPT], max_new_tokens=count, details=True, **options)[0]


@both_backends
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_without_a_draft(backend: str, name: str) -> None:
    model = build(backend, **MODELS[name])
    draft = build_draft(model)
    for count, options in (
        (4, {"temperature": 0.0}),
        (1, {"temperature": 0.0, "repetition_penalty": 1.3}),
        (3, {"seed": 1, "top_k": 50, "repetition_penalty": 1.2}),
    ):
        expected = continued(model, 24, **options)
        found = continued(model, 24, draft=draft, num_draft_tokens=count, **options)
        assert found.tokens == expected.tokens, options
        assert expected.draft is None and found.finish_reason == expected.finish_reason
        assert 0 < found.draft.accepted < found.draft.compared <= found.draft.proposed


@both_backends
def test_proposals_are_counted_as_a_plain_loop_counts_them(backend: str) -> None:
    """The draft's choice after each part of the text comes from a forward pass without a cache."""
    model = build(backend, **LLAMA)
    draft = build_draft(model, 0.03)
    tokens = continued(model, temperature=0.0).tokens
    logits = plain(draft(native(backend, [[*PROMPT, *tokens]])))[0]
    choices = logits.argmax(-1)[len(PROMPT) - 1 :].tolist()  # after 0, 1, ... new tokens, where all were accepted
    for size in (1, 3, 5):
        expected, place = DraftReport(), 1
        while place < len(tokens):
            count = min(size, len(tokens) - place - 1)
            if count == 0:
                break
            same = [choices[place + offset] == tokens[place + offset] for offset in range(count)]
            accepted = same.index(False) if False in same else count
            expected.proposed, expected.accepted = expected.proposed + count, expected.accepted + accepted
            expected.compared, expected.rounds = expected.compared + min(accepted + 1, count), expected.rounds + 1
            place += accepted + 1
        found = continued(model, temperature=0.0, draft=draft, num_draft_tokens=size).draft
        assert found == expected
        assert found.agreement == expected.accepted / expected.compared


@both_backends
def test_a_penalty_counts_the_proposals_before_a_place(backend: str) -> None:
    """With tied embeddings a model repeats its last token, which the penalty prevents."""
    model = build(backend, tie_embeddings=True)
    assert continued(model, 3, temperature=0.0).tokens == [PROMPT[-1]] * 3
    options = {"temperature": 0.0, "repetition_penalty": 20.0}
    expected = continued(model, 16, **options).tokens
    assert len({*expected}) == 16
    found = continued(model, 16, draft=build_draft(model, 0.0), num_draft_tokens=4, **options)
    assert found.tokens == expected and found.draft.agreement == 1


class StaticStep:
    """A step with the memory of a CUDA graph: each call reads and writes the arrays of the first one."""

    key = None  # it is not kept

    def __init__(self, step: Any, state: Any, token: Any) -> None:
        self.step, self.token = step, token.clone()
        others = [a if a is None else a.clone() for a in (state.index, state.keys, state.seen)]
        self.state = type(state)([state.cache[0].clone(), *state.cache[1:]], *others)
        self.choice: Any = None

    def _keep(self, state: Any, token: Any) -> None:
        for own, new in zip([*self.state.arrays, self.token], [*state.arrays, token], strict=True):
            if new is not own:
                own.copy_(new)

    def __call__(self, state: Any, token: Any) -> Any:
        self._keep(state, token)
        after, choice = self.step(self.state, self.token)
        self._keep(after, choice.token)
        if self.choice is None:
            self.choice = choice
        for own, new in zip(self.choice, choice, strict=True):
            own.copy_(new)
        return self.state, self.choice


def test_steps_with_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the model's step, its step over proposals, and the draft's step are CUDA graphs."""
    model = build("torch", **LLAMA)
    draft = build_draft(model)
    options: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {"seed": 1, "repetition_penalty": 1.2})
    expected = [continued(model, 30, **more).tokens for more in options]
    decoder = importlib.import_module("icenet_torch.generation.decoder")
    made = []

    def capture(self: Any, state: Any, token: Any, step: Any = None) -> Any:
        made.append(StaticStep(step or self.decode_step, state, token))
        return made[-1]

    monkeypatch.setattr(decoder, "CapturedStep", StaticStep)
    monkeypatch.setattr(decoder.Decoder, "capture", capture)
    for more, tokens in zip(options, expected, strict=True):
        assert continued(model, 30, draft=draft, num_draft_tokens=3, **more).tokens == tokens
        assert 2 <= len(made) <= 3
        made.clear()


@both_backends
def test_a_draft_with_the_same_weights_proposes_the_text(backend: str) -> None:
    model = build(backend)
    for options in ({"temperature": 0.0}, {"seed": 4, "repetition_penalty": 1.2}):
        report = continued(model, draft=build_draft(model, 0.0), num_draft_tokens=4, **options).draft
        assert report.accepted == report.proposed and report.agreement == 1
        assert report.rounds == 8  # 39 tokens after the first, five in a round


@pytest.mark.usefixtures("mlx_on_cpu")  # a captured step of a GPU calls no Python
@both_backends
def test_a_token_that_is_only_read_has_no_logits(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If all proposals are accepted, the draft reads the last one, and the logits after it are not needed."""
    model = build(backend, **LLAMA)
    draft, rows = build_draft(model, 0.0), []
    project = type(model).project

    def record(self: Any, hidden: Any) -> Any:
        rows.append(int(np.prod(hidden.shape[:-1])))
        return project(self, hidden)

    monkeypatch.setattr(type(model), "project", record)
    report = continued(model, 25, temperature=0.0, draft=draft, num_draft_tokens=3).draft
    assert report.accepted == report.proposed == 18 and report.rounds == 6
    assert (rows.count(4), rows.count(1)) == (6, 18 + 2)  # each proposal, and the two prompts


@both_backends
def test_draws_are_those_of_the_seed(backend: str) -> None:
    """So the distribution is that of the model: each seed gives its token, whatever the draft proposes."""
    model = build(backend)
    draft = build(backend, seed=9, num_layers=1, hidden_size=16)  # it knows nothing of the model
    found = []
    for seed in range(24):
        expected = continued(model, 3, seed=seed).tokens
        result = continued(model, 3, seed=seed, draft=draft, num_draft_tokens=1)
        assert result.tokens == expected
        found.append(result.draft.accepted)
    assert 0 < sum(found) < 24  # the same noise makes both choose the same token at times


@both_backends
def test_endings_and_streams(backend: str) -> None:
    model = build(backend)
    draft = build_draft(model)
    tokens = continued(model, seed=5).tokens
    for options in ({"stop": [tokens[9]]}, {"eos_token_id": tokens[9]}, {"max_new_tokens": 9}, {"max_new_tokens": 1}):
        given = {"max_new_tokens": 40, "seed": 5, **options}
        [expected] = model.generate([PROMPT], details=True, **given)
        [found] = model.generate([PROMPT], details=True, draft=draft, **given)
        assert (found.tokens, found.finish_reason) == (expected.tokens, expected.finish_reason)
    stream = model.generate([PROMPT], stream=True, max_new_tokens=12, seed=5, draft=draft)
    with ThreadPoolExecutor(1) as pool:  # each token in turn in another thread
        rows = [pool.submit(next, stream).result() if index % 2 else next(stream) for index in range(12)]
    assert [int(row[0]) for row in rows] == tokens[:12]
    text = icenet.generate(model, "abc", max_new_tokens=20, seed=1)
    assert "".join(icenet.generate(model, "abc", max_new_tokens=20, seed=1, draft=draft, stream=True)) == text


@both_backends
def test_a_draft_with_a_shorter_context(backend: str) -> None:
    """Where the draft can read no more, the model continues alone."""
    model = build(backend, **LLAMA)
    draft = build_draft(model, 0.0, max_seq_length=20)
    expected = continued(model, temperature=0.0)
    found = continued(model, temperature=0.0, draft=draft, num_draft_tokens=4)
    assert found.tokens == expected.tokens and found.draft.proposed == found.draft.accepted == 12
    with pytest.raises(UsageError) as error:
        model.generate([[1] * 21], max_new_tokens=4, draft=draft)
    assert is_one_line(error.value, "draft", "20", "21")


def test_logits_that_are_not_finite() -> None:
    for backend in BACKENDS:
        model = build(backend)
        draft = build_draft(model)
        weights = draft.weights()
        draft.set_weights({path: array * np.float32(np.nan) for path, array in weights.items()})
        expected = continued(model, 6, seed=1).tokens
        found = continued(model, 6, seed=1, draft=draft)  # the model decides, whatever is proposed
        assert found.tokens == expected
        with pytest.raises(NonFiniteError) as error:
            continued(draft, 6, seed=1, draft=model)
        assert is_one_line(error.value, "NaN")


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "vocabulary": ({"vocab_size": 300}, {}, ("vocabulary", "300", "257", "tokenizer")),
    "count": ({}, {"num_draft_tokens": 0}, ("num_draft_tokens", "1 to 64")),
    "a count that is no number": ({}, {"num_draft_tokens": "3"}, ("num_draft_tokens", "'3'")),
    "no prompt in the context": ({}, {"max_new_tokens": 200, "overflow": "slide"}, ("speculative", "slide")),
    "changing positions": (
        {**LLAMA, "rotary_scaling": {"type": "dynamic", "factor": 2.0, "original_length": 12}},
        {},
        ("speculative", "dynamic", "12"),
    ),
    "a recurrent model": ({"type": "gru"}, {}, ("speculative", "transformer", "gru")),
}


@pytest.mark.parametrize("name", WRONG)
def test_drafts_that_are_refused(name: str) -> None:
    changes, options, words = WRONG[name]
    model = build("torch")
    if changes.get("type") == "gru":
        draft = build_model("torch", ModelConfig(type="gru", hidden_size=8, num_layers=1, vocab_size=257))
    else:
        draft = build("torch", **changes)
    with pytest.raises(UsageError) as error:
        model.generate([PROMPT], **{"max_new_tokens": 20, **options}, draft=draft)
    assert is_one_line(error.value, *words)


def test_requests_with_a_draft_that_are_refused() -> None:
    model, other = build("torch"), build("mlx")
    draft = build("torch", num_layers=1)

    def message(*arguments: Any, **options: Any) -> Any:
        with pytest.raises(UsageError) as error:
            icenet.generate(model, *arguments, **options)
        return error.value

    assert is_one_line(message("a", num_draft_tokens=3), "num_draft_tokens", "without a draft")
    assert is_one_line(message(["a", "b"], draft=draft), "one prompt", "2")
    assert is_one_line(message("a", draft=model), "itself")
    assert is_one_line(message("a", draft=other), "backend", "torch")
    assert is_one_line(message("a", draft=5), "BaseModel", "int")
    draft.tokenizer = type("Other", (ByteTokenizer,), {"name": "other"})()
    assert is_one_line(message("a", draft=draft), "tokenizer", "other")
