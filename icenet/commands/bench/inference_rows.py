"""The rows of `icenet bench decode`, `prefill`, `batch` and others: options, cases, and the least work of a case."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from icenet.commands.bench import limits


@dataclass(frozen=True)
class Options:
    """What is measured. None selects a default, which is smaller on a CPU.

    Attributes:
        target: A shape, a preset, a YAML file, or a folder that `icenet.load` reads.
        overrides: `KEY=VALUE` changes of a configuration.
        backend: The only backend of IceNet and of its peers.
        device: The device of all sides.
        only: Names of the sides to measure; empty for all.
        dtypes: fp32, bf16, fp16.
        batches: Numbers of prompts of `decode`.
        prompts: Lengths of the prompts of `decode`, in tokens.
        prefill: Number and length of the prompts of `prefill`.
        mixed: Number, shortest and longest length of the prompts of `batch`.
        new_tokens: Number of new tokens of `decode`, and of `batch` if it is given.
        batch_tokens: Number of new tokens of `batch`.
        bits: Numbers of bits of `quantized`.
        group_size: Number of weights of `quantized` that share a scale.
        agreement: Probability that the draft of `speculative` proposes the next token.
        repeats: Number of rounds that count.
        sample: Whether to sample tokens, instead of taking the most likely ones.
    """

    target: str = "gpt2"
    overrides: Sequence[str] = ()
    backend: str | None = None
    device: str | None = None
    only: Sequence[str] = ()
    dtypes: Sequence[str] | None = None
    batches: Sequence[int] | None = None
    prompts: Sequence[int] | None = None
    prefill: tuple[int, int] | None = None
    mixed: tuple[int, int, int] | None = None
    new_tokens: int | None = None
    batch_tokens: int | None = None
    bits: Sequence[int] = (8, 4)
    group_size: int = 64
    agreement: float = 0.7
    repeats: int = 5
    sample: bool = False

    def for_device(self, device: str) -> Options:
        """Returns the options without None: on a GPU the sizes of the published table, on a CPU smaller ones."""
        defaults: dict[str, Any] = (
            {
                "dtypes": ["bf16"],
                "batches": [1, 32],
                "prompts": [64],
                "prefill": (8, 1024),
                "mixed": (64, 32, 512),
                "new_tokens": 256,
                "batch_tokens": self.new_tokens or 128,
            }
            if device == "gpu"
            else {
                "dtypes": ["fp32"],
                "batches": [1, 8],
                "prompts": [64],
                "prefill": (1, 256),
                "mixed": (8, 16, 64),
                "new_tokens": 32,
                "batch_tokens": self.new_tokens or 32,
            }
        )
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})


@dataclass(frozen=True)
class Row:
    """A kind of measurement.

    Attributes:
        title: What is measured, with fields of a case.
        unit: tok/s, or s: then less is better.
        cases: Returns the cases of the options: `lengths` of the prompts, `new_tokens`.
        tokens: Returns the number of tokens of a case that count; None for seconds.
        work: Returns the least work of a case. None: the limit is the second part of each measurement.
        limit: What that second part is.
        variants: Returns the variants of each side, which are measured in turn. The first one has no name.
        first: What the first variant is.
    """

    title: str
    unit: str
    cases: Callable[[Options], list[dict[str, Any]]]
    tokens: Callable[[Mapping[str, Any]], int] | None
    work: Callable[[limits.ModelSize, Mapping[str, Any], int], limits.Work] | None
    limit: str = ""
    variants: Callable[[Options], list[str]] = lambda options: [""]
    first: str = ""


def _decode_cases(options: Options) -> list[dict[str, Any]]:
    found = product(options.prompts or (), options.batches or ())
    return [{"lengths": [length] * batch, "new_tokens": options.new_tokens} for length, batch in found]


def _prefill_cases(options: Options) -> list[dict[str, Any]]:
    assert options.prefill is not None
    return [{"lengths": [options.prefill[1]] * options.prefill[0], "new_tokens": 1}]


def _batch_cases(options: Options) -> list[dict[str, Any]]:
    assert options.mixed is not None
    count, shortest, longest = options.mixed
    spacing = (longest - shortest) / max(count - 1, 1)
    lengths = [round(shortest + spacing * (7 * index % count)) for index in range(count)]  # short and long ones mixed
    return [{"lengths": lengths, "new_tokens": options.batch_tokens}]


def _quantized_cases(options: Options) -> list[dict[str, Any]]:
    return [{**case, "group_size": options.group_size} for case in _decode_cases(options)]


def _speculative_cases(options: Options) -> list[dict[str, Any]]:
    lengths = options.prompts or ()
    return [
        {"lengths": [length], "new_tokens": options.new_tokens, "agreement": options.agreement} for length in lengths
    ]


def _decode_work(size: limits.ModelSize, case: Mapping[str, Any], value_bytes: float) -> limits.Work:
    new_tokens = case["new_tokens"]
    held = [length + (new_tokens + 1) / 2 for length in case["lengths"]]  # in the mean
    weight_bytes = value_bytes
    if bits := case.get("bits"):  # each group has a scale and a bias
        weight_bytes = bits / 8 + 2 * value_bytes / case["group_size"]
    one = limits.step(size, held, weight_bytes, value_bytes)
    return limits.Work(one.nbytes * new_tokens, one.operations * new_tokens)


def _prefill_work(size: limits.ModelSize, case: Mapping[str, Any], value_bytes: int) -> limits.Work:
    return limits.prompt(size, case["lengths"], value_bytes)


def _batch_work(size: limits.ModelSize, case: Mapping[str, Any], value_bytes: int) -> limits.Work:
    # the first new token needs no step
    rest = _decode_work(size, {**case, "new_tokens": case["new_tokens"] - 1}, value_bytes)
    return _prefill_work(size, case, value_bytes) + rest


_NO_TEXT: dict[str, Any] = {"lengths": [], "new_tokens": 0}

ROWS = {
    "decode": Row(
        "Decoding, {count} x {longest} prompt tokens, {new_tokens} new tokens, {dtype}",
        "tok/s",
        _decode_cases,
        lambda case: len(case["lengths"]) * case["new_tokens"],
        _decode_work,
    ),
    "prefill": Row(
        "Reading prompts, {count} x {longest} tokens, {dtype}",
        "tok/s",
        _prefill_cases,
        lambda case: sum(case["lengths"]),
        _prefill_work,
    ),
    "batch": Row(
        "Batching, {count} prompts of {shortest} to {longest} tokens, {new_tokens} new tokens each, {dtype}",
        "tok/s",
        _batch_cases,
        lambda case: len(case["lengths"]) * case["new_tokens"],
        _batch_work,
    ),
    "quantized": Row(
        "Decoding with quantized weights, {count} x {longest} prompt tokens, {new_tokens} new tokens, {dtype}",
        "tok/s",
        _quantized_cases,
        lambda case: len(case["lengths"]) * case["new_tokens"],
        _decode_work,
        variants=lambda options: ["", *(f"{bits} bits" for bits in options.bits)],
        first="unquantized",
    ),
    "speculative": Row(
        "Decoding with a draft that agrees at {agreement:.0%}, {longest} prompt tokens, {new_tokens} new tokens, "
        "{dtype}",
        "tok/s",
        _speculative_cases,
        lambda case: case["new_tokens"],
        _decode_work,
        variants=lambda options: ["", "draft"],
        first="no draft",
    ),
    "load": Row("Loading the weights, {dtype}", "s", lambda options: [_NO_TEXT], None, None, "reading the file"),
    "convert": Row(
        "Converting the weights to the form {form}",
        "s",
        lambda options: [{**_NO_TEXT, "form": form, "once": True} for form in ("canonical", "mlx", "mlx-lm")],
        None,
        None,
        "copying the file",
    ),
    "start": Row(
        "A process: {program}",
        "s",
        lambda options: [
            {**_NO_TEXT, "program": "help", "once": True, "least": "an empty process"},
            {**_NO_TEXT, "program": "first token", "lengths": [3], "new_tokens": 1},
        ],
        None,
        None,
        "a process that imports the framework and reads the file",
    ),
}
"""The rows by name. Another one adds its line here, its calls to `sides.Session.measure`, and a command."""
