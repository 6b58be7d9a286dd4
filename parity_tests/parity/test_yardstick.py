"""The parity criterion, on arrays whose error and noise are known."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from icenet.core import rng
from icenet.parity import resampling
from icenet.parity.curves import judge_curve
from icenet.parity.measures import BLOCK, half_ulp, rms, round_to
from icenet.parity.nearby import nearby, perturb_by_ulp
from icenet.parity.resampling import FEW, LIMITS, REPEATS, SAMPLES, Samples, judge_values
from icenet.parity.trace import Value
from icenet.parity.yardstick import FACTOR, Judgement, judge


def noisy(seed: int, scale: float, shape: tuple[int, ...] = (64, 32)) -> tuple[np.ndarray, np.ndarray]:
    """Returns normal variates, and the same plus noise of RMS `scale`."""
    generator = np.random.default_rng(seed)
    reference = generator.standard_normal(shape)
    return reference, reference + scale * generator.standard_normal(shape)


def test_seven_times_the_noise_passes_and_ten_times_does_not() -> None:
    reference, torch = noisy(0, 1e-6)
    _, mlx = noisy(0, 7e-6)
    assert judge(mlx, torch, reference).ratio == pytest.approx(7, rel=0.3)
    assert judge(mlx, torch, reference).passed
    assert not judge(reference + 10 * (torch - reference), torch, reference).passed


@pytest.mark.parametrize("factor", [FACTOR * 0.99, FACTOR * 1.01])
def test_a_ratio_up_to_factor_passes(factor: float) -> None:
    reference, torch = noisy(1, 1e-4)
    assert judge(reference + factor * (torch - reference), torch, reference).passed is (factor < FACTOR)


def test_one_wrong_element_in_a_million_fails() -> None:
    reference, torch = noisy(2, 1e-6, (1000, 1000))
    mlx = torch.copy()
    mlx[3, 4] += 1e-4
    judgement = judge(mlx, torch, reference)
    assert judgement.rms_ratio < FACTOR < judgement.peak_ratio and not judgement.passed


@pytest.mark.parametrize(("dtype", "numpy_dtype"), [("fp32", np.float32), ("fp16", np.float16), ("fp64", np.float64)])
def test_half_ulp_is_numpys_spacing(dtype: str, numpy_dtype: Any) -> None:
    values = np.concatenate([np.random.default_rng(0).standard_normal(1000) * 100, [1, 2, 0.5, 1000, 1e-3, 0, 1e-7]])
    values = values.astype(numpy_dtype)
    expected = np.spacing(np.abs(values)).astype(np.float64) / 2
    np.testing.assert_array_equal(half_ulp(values.astype(np.float64), dtype), expected)


def test_half_ulp_of_zero_is_that_of_the_smallest_number() -> None:
    """frexp returns the exponent 0 for zero. Used directly it would give zeros the noise of ones."""
    assert half_ulp(0.0, "fp32") == 2.0**-150
    reference = np.zeros(100)
    reference[0] = 1e-9
    assert not judge(reference + 1e-11, reference, reference).passed


def test_a_correctly_rounded_result_passes_where_pytorch_is_exact() -> None:
    reference = np.random.default_rng(3).standard_normal(500)
    assert judge(reference.astype(np.float32), reference, reference).passed
    assert not judge(reference * (1 + 2.0**-19), reference, reference).passed
    assert judge(round_to(reference, "bf16"), reference, reference, "bf16").passed
    assert not judge(round_to(reference, "bf16"), reference, reference, "fp32").passed


def test_a_gradient_that_cancels_to_zero_has_the_noise_of_its_terms() -> None:
    """A sum of terms that cancel is, in fp32, the rounding error of the terms, in any order of summation."""
    terms = np.random.default_rng(4).standard_normal((4096, 48))
    terms -= terms.mean(axis=0)
    exact = terms.sum(axis=0)
    mlx = terms.astype(np.float32).reshape(64, 64, 48).sum(axis=0).sum(axis=0) / np.float32(64)
    assert rms(exact) < 1e-12
    layer_rms = 1.0  # RMS of sums of 4096 such terms times inputs of order 1, over 64
    assert judge(mlx, np.zeros(48), exact / 64, layer_rms=layer_rms).passed
    assert judge(mlx, np.zeros(48), exact / 64).ratio > 1e6
    # the floor applies to zeros only: a small gradient that is not zero keeps its own noise
    small = np.full(48, 1e-6)
    assert not judge(small * (1 + 1e-4), small, small, layer_rms=layer_rms).passed


def test_a_sum_of_inexact_terms_that_cancel_has_their_noise() -> None:
    """The gradient of a bias before a batch norm over two values, by its textbook formula in fp32."""
    generator = np.random.default_rng(5)
    x, upstream = generator.standard_normal((2, 8)), 100 * generator.standard_normal((2, 64))
    weight = 3 * generator.standard_normal((64, 8))

    def gradients(dtype: str, opposite: bool) -> dict[str, Value]:
        inputs, dy = x.astype(dtype), upstream.astype(dtype)
        h = inputs @ weight.T.astype(dtype)
        std = np.sqrt(h.var(0) + np.asarray(1e-5, dtype))
        normal = (h - h.mean(0)) / std
        dh = (dy - dy.mean(0) - normal * (dy * normal).mean(0)) / std
        if opposite:  # PyTorch's two terms
            dh = (dh[:1] - dh[1:]) / 2 * np.array([[1], [-1]], dtype)
        return {"gradient:weight": Value(dh.T @ inputs, "fp32"), "gradient:bias": Value(dh.sum(0), "fp32")}

    exact, torch, mlx = gradients("float64", True), gradients("float32", True), gradients("float32", False)
    assert np.abs(torch["gradient:bias"].array).max() == 0 < np.abs(mlx["gradient:bias"].array).max()
    assert judge_values(mlx, torch, exact)["gradient:bias"].passed
    wrong = Value(mlx["gradient:bias"].array + 0.1, "fp32")
    assert not judge_values({**mlx, "gradient:bias": wrong}, torch, exact)["gradient:bias"].passed


def test_values_below_the_smallest_normal_number_may_be_flushed_to_zero() -> None:
    tiny = np.full(8, 1e-41)
    assert judge(np.zeros(8), tiny, tiny).passed
    assert not judge(np.zeros(8), tiny * 1e6, tiny * 1e6).passed


def test_known_and_sampled_noise_are_floors() -> None:
    reference = np.ones(4)
    mlx = reference + 1e-5
    assert not judge(mlx, reference, reference).passed
    assert judge(mlx, reference, reference, min_noise=1e-5).ratio == pytest.approx(1, rel=1e-6)
    assert judge(mlx, reference, reference, sampled_noise=np.full(4, 2e-6)).ratio == pytest.approx(5, rel=1e-6)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_perturbation_is_as_large_as_a_rounding(dtype: str) -> None:
    """Each value moves by one ulp in exactly one of the samples: the mean square is ulp^2 / 12, without chance."""
    values = round_to(rng.normal(rng.key(0, "values"), (5000,)), dtype).astype(np.float64)
    values[:3] = [0, -math.inf, math.inf]
    key = rng.key(1, "perturbation")
    samples = np.stack([perturb_by_ulp(values, dtype, key, sample) for sample in range(SAMPLES)])
    np.testing.assert_array_equal(round_to(samples, dtype).astype(np.float64), samples)
    assert (samples[:, :3] == values[:3]).all()
    ulps = (samples[:, 3:] - values[3:]) / (2 * half_ulp(values[3:], dtype))
    assert set(ulps.ravel().tolist()) == {-1.0, 0.0, 1.0}
    np.testing.assert_array_equal((ulps**2).sum(axis=0), 1)
    assert SAMPLES == 12
    assert abs(ulps.sum()) < 300  # half of them up
    assert ((ulps**2).sum(axis=1) > 330).all()  # 5000 / 12 = 417 in each sample


def test_each_block_of_an_array_has_perturbations_of_its_own() -> None:
    moved = perturb_by_ulp(np.ones((2, BLOCK)), "fp32", rng.key(1, "perturbation"), 0) != 1
    both = (moved[0] & moved[1]).sum()
    assert both < 1.5 * BLOCK / SAMPLES**2  # those of independent draws


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_nearby_values_differ_by_up_to_four_ulps(dtype: str) -> None:
    values = round_to(rng.normal(rng.key(0, "values"), (40, 30)), dtype).astype(np.float64)
    special = [0, -math.inf, math.nan]
    np.testing.assert_array_equal(nearby(special, dtype, 0), special)
    moved = nearby(values, dtype, 0)
    ulps = (moved - values) / (2 * half_ulp(values, dtype))
    assert -4 < ulps.min() < -3.9 and 3.9 < ulps.max() < 4 and abs(ulps.mean()) < 0.3
    # a function of value and sample: independent of the axes, other for each sample, the same on both backends
    np.testing.assert_array_equal(nearby(values.T, dtype, 0), moved.T)
    assert (nearby(values, dtype, 1) != moved).mean() > 0.99
    np.testing.assert_array_equal(nearby(np.ones(3), dtype, 5), nearby(np.ones(()), dtype, 5))


# ---- values of a run ----------------------------------------------------------------------------------------


class Runs:
    """Runs of one number with normal errors: their RMS is 1e-6 in PyTorch, `factor` times that in MLX, plus a bias.

    The number is 1, and 1.25 in the nearby problems: only its errors count there.
    """

    def __init__(self, seed: int, factor: float = 1.0, bias: float = 0.0) -> None:
        self._generator = np.random.default_rng(seed)
        self._factor, self._bias = factor, bias
        self.counts = dict.fromkeys(("reference", "torch", "mlx"), 0)

    def run(self, role: str, number: float) -> dict[str, Value]:
        self.counts[role] += 1
        error = self._generator.standard_normal()
        errors = {"reference": 0.0, "torch": error, "mlx": self._factor * error + self._bias}
        return {"output": Value(np.array([number + 1e-6 * errors[role]]), "fp32")}

    def judge(self, with_samples: bool = True) -> Judgement:
        reference, torch, mlx = (self.run(role, 1.0) for role in self.counts)
        samples = Samples(*(lambda index, role=role: self.run(role, 1.25) for role in self.counts))
        return judge_values(mlx, torch, reference, samples=samples if with_samples else None)["output"]


def test_a_single_number_passes_whatever_the_luck_of_one_run() -> None:
    """One run of PyTorch has a noise below a tenth of its expectation in one of 13 runs."""
    by_one_run = [Runs(seed).judge(with_samples=False) for seed in range(400)]
    assert 15 < sum(not judgement.passed for judgement in by_one_run) < 60
    assert all(Runs(seed, factor).judge().passed for seed in range(400) for factor in (1, 3))


def test_a_bias_and_a_larger_error_of_a_single_number_are_found() -> None:
    for faults, share in (({"bias": 16}, 0.9), ({"bias": 32}, 1.0), ({"factor": 40}, 0.75)):
        found = [not Runs(seed, **faults).judge().passed for seed in range(100)]
        assert np.mean(found) >= share, faults
    assert all(Runs(seed, bias=4).judge().passed for seed in range(100))


def test_samples_are_taken_only_if_they_are_needed() -> None:
    runs = Runs(0)
    assert runs.judge().passed and runs.counts == {"reference": 1, "torch": 1, "mlx": 1}
    runs = Runs(0, bias=14)
    assert not runs.judge().passed
    assert runs.counts["torch"] == 1 + SAMPLES and runs.counts["mlx"] == 1 + REPEATS // 2  # decided by then
    assert runs.counts["reference"] == 1 + SAMPLES  # the repetitions use those of the first samples
    runs = Runs(0, bias=1e4)
    assert not runs.judge().passed
    assert runs.counts["torch"] == 1 + min(LIMITS) and runs.counts["mlx"] == 3


@pytest.mark.parametrize("factor", [1, 8, 20])
def test_a_value_that_passes_early_passes_with_all_samples(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With k samples the noise is at least sqrt(k / SAMPLES) times that with all of them."""
    seeds = [seed for seed in range(300) if Runs(seed, factor).judge(with_samples=False).is_over]
    early = [Runs(seed, factor) for seed in seeds]
    passed = [runs.judge().passed for runs in early]
    monkeypatch.setattr(resampling, "sure_limit", lambda count, samples: FACTOR if count == samples else 0.0)
    complete = [Runs(seed, factor) for seed in seeds]
    assert [runs.judge().passed for runs in complete] == passed and any(passed)
    if factor == 1:
        assert sum(runs.counts["torch"] for runs in early) < sum(runs.counts["torch"] for runs in complete) / 3


class Several:
    """Runs of three numbers with normal errors: two outputs and a gradient, each with its own error in MLX."""

    def __init__(self, **errors: float) -> None:
        self._generator, self._errors = np.random.default_rng(0), errors
        self.torch = self.mlx = 0

    def run(self, error: float = 0.0, **errors: float) -> dict[str, Value]:
        draws = {name: error * self._generator.standard_normal() + errors.get(name, 0.0) for name in self._errors}
        return {name: Value(np.array([1 + 1e-6 * draw]), "fp32") for name, draw in draws.items()}

    def sample(self, index: int) -> dict[str, Value]:
        self.torch += 1
        return self.run(1.0)

    def repeat(self, index: int) -> dict[str, Value]:
        self.mlx += 1
        return self.run(1.0, **self._errors)

    def judge(self, **options: Any) -> dict[str, Judgement]:
        samples = Samples(lambda index: self.run(), self.sample, self.repeat)
        ours, theirs = self.run(1.0, **self._errors), self.run(1.0)
        return judge_values(ours, theirs, self.run(), samples=samples, **options)


def test_one_value_over_the_tolerance_ends_the_sampling_of_the_others() -> None:
    runs = Several(output=1e5, other=14.0)
    found = runs.judge()
    assert not found["output"].passed and runs.torch == FEW and runs.mlx == 2
    # where the verdict depends on the other value, it has all samples
    runs = Several(output=0.0, other=14.0)
    assert not runs.judge()["other"].passed and runs.torch == SAMPLES


def test_of_a_replay_the_worst_output_is_needed_or_else_the_worst_gradient() -> None:
    runs = Several(output=1e5, **{"gradient:weight": 14.0, "input 0": 14.0})
    assert not runs.judge(only_worst=True)["output"].passed and runs.torch == min(LIMITS) and runs.mlx == 2
    # an undecided output is needed, because a gradient over the tolerance may be its consequence
    runs = Several(output=14.0, **{"gradient:weight": 1e5})
    assert not runs.judge(only_worst=True)["output"].passed and runs.torch == SAMPLES
    runs = Several(**{"gradient:weight": 1e5, "input 0": 14.0})
    assert not runs.judge(only_worst=True)["gradient:weight"].passed and runs.torch == min(LIMITS)


def test_a_value_that_passes_by_repetition_does_not_end_the_sampling_of_the_others() -> None:
    """One outlier of MLX is no difference, so the other values need all samples."""
    runs = Several(output=1e5, other=14.0)
    runs.repeat = lambda index: runs.run(1.0, other=14.0)  # type: ignore[method-assign]
    found = runs.judge()
    assert found["output"].passed and not found["other"].passed and runs.torch == FEW + SAMPLES


def test_a_gradient_may_be_repeated_in_problems_further_away() -> None:
    """In all nearby problems the input of a ReLU is on the other side in MLX; further away it is not."""
    exact, noise = np.ones(100), 1e-7 * np.random.default_rng(0).standard_normal(100)

    def judged(nearby: float, further: float) -> Judgement:
        def of(array: np.ndarray) -> Callable[[int], dict[str, Value]]:
            return lambda index: {"gradient:weight": Value(array, "fp32")}

        far = 1.5 * exact
        samples = Samples(of(exact), of(exact + noise), of(far + noise + further * (np.arange(100) == 3)))
        samples = dataclasses.replace(samples, repeated=of(far), may_jump=True)
        ours = of(exact + noise + nearby * (np.arange(100) == 3))(0)
        found = judge_values(ours, of(exact + noise)(0), of(exact)(0), samples=samples)
        return found["gradient:weight"]

    assert judged(0.02, 0.0).passed
    assert not judged(0.02, 0.02).passed


@pytest.mark.parametrize("jumps", [True, False])
def test_a_gradient_may_differ_by_what_it_jumps_with_sums_term_by_term(jumps: bool) -> None:
    """Their rounding moves a value across the edge of a ReLU in every second problem, also in those further away."""
    exact, noise = np.ones(100), 1e-7 * np.random.default_rng(0).standard_normal(100)

    def judged(ours: np.ndarray) -> Judgement:
        def of(array: np.ndarray, jump: float = 0.0) -> Callable[[int], dict[str, Value]]:
            changed = 0.02 * jump * (np.arange(100) == 3)
            return lambda index: {"gradient:weight": Value(array + changed * (index % 2), "fp32")}

        far = 1.5 * exact
        samples = Samples(of(exact), of(exact + noise), of(far + ours - exact), may_jump=True)
        samples = dataclasses.replace(samples, repeated=of(far), jumping=of(far + noise, float(jumps)))
        found = judge_values(of(ours)(0), of(exact + noise)(0), of(exact)(0), samples=samples)
        return found["gradient:weight"]

    assert judged(exact - 0.02 * (np.arange(100) == 7)).passed == jumps
    assert not judged(exact * 1.02).passed
    assert not judged(exact - 0.2 * (np.arange(100) == 7)).passed


@pytest.mark.parametrize(
    ("wrong", "ties", "row", "passes"),
    [
        ([1, 2, 3, 5, 6], [1, 3], 30, True),  # ties are as frequent in PyTorch, in other rows by chance
        (range(8), [1, 3], 30, False),
        ([1, 2, 3, 5, 6], [1], 30, False),  # one tie elsewhere does not explain what is wrong in most problems
        ([1, 2, 3, 5, 6], [1], 7, True),
    ],
)
def test_a_small_jump_is_noise_if_it_is_frequent_or_at_the_same_elements(
    wrong: Sequence[int], ties: list[int], row: int, passes: bool
) -> None:
    """A near tie of a max pooling moves one of a hundred rows by 1e-5, in PyTorch too, and MLX agrees in others."""
    exact, noise = np.ones(100), 1e-7 * np.random.default_rng(0).standard_normal(100)
    error = 1e-5 * (np.arange(100) == 7)

    def of(array: np.ndarray, jump: np.ndarray, places: Sequence[int]) -> Callable[[int], dict[str, Value]]:
        return lambda index: {"gradient:weight": Value(array + jump * (index in places), "fp32")}

    samples = Samples(of(exact, error, []), of(exact + noise, error, []), of(exact + noise, error, wrong))
    tie = 2e-5 * (np.arange(100) == row)
    samples = dataclasses.replace(
        samples, repeated=of(exact, error, []), jumping=of(exact + noise, tie, ties), may_jump=True
    )
    ours, torch, reference = (of(array, error, [])(0) for array in (exact + error, exact + noise, exact))
    assert judge_values(ours, torch, reference, samples=samples)["gradient:weight"].passed == passes


@pytest.mark.parametrize(("count", "limit"), LIMITS.items())
def test_the_limits_of_early_decisions_are_as_rare_as_the_final_one(count: int, limit: float) -> None:
    """The tail of Student's t distribution, by its leading term, for an error of MLX twice that of PyTorch."""

    def tail(degrees: int, t: float) -> float:
        density = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
        return 2 * density * degrees ** ((degrees + 1) / 2) / degrees * t**-degrees

    assert tail(count, limit / 2) < 1 / 270_000 < tail(SAMPLES, FACTOR)


def test_values_that_are_infinite_in_all_runs_pass() -> None:
    values = {"output": Value(np.array([1.0, -np.inf]), "fp32")}
    moved = {"output": Value(np.array([1 + 1e-5, -np.inf]), "fp32")}
    samples = Samples(lambda index: values, lambda index: values, lambda index: values)
    assert judge_values(moved, values, values, samples=samples)["output"].passed  # MLX differs in one run of 9


def test_values_that_are_not_finite_must_agree() -> None:
    reference, torch = noisy(5, 1e-6)
    broken = torch.copy()
    broken[0, 0] = np.nan
    assert not judge(broken, torch, reference).passed
    assert "1 values" in judge(broken, torch, reference).note
    assert not judge(torch, broken, reference).passed
    both = torch.copy()
    both[0, 0] = reference[0, 0] = -np.inf
    assert judge(both, both, reference).passed
    opposite = both.copy()
    opposite[0, 0] = np.inf
    assert not judge(opposite, both, reference).passed
    nothing = np.full((2, 2), np.nan)
    assert not judge(nothing, nothing, nothing).passed
    assert judge(nothing, nothing, nothing).note == "no value is finite on either side, so nothing is compared"


def test_unequal_shapes_fail_with_a_note() -> None:
    assert "shape [2, 3]" in judge(np.ones((2, 3)), np.ones(6), np.ones(6)).note
    assert not judge(np.ones((2, 3)), np.ones(6), np.ones(6)).passed


def test_bf16_rounds_to_nearest_even() -> None:
    def bits(word: int) -> float:
        return struct.unpack("<f", struct.pack("<I", word))[0]

    cases = {0x3F800000: 0x3F800000, 0x3F807FFF: 0x3F800000, 0x3F808000: 0x3F800000, 0x3F818000: 0x3F820000}
    for given, expected in cases.items():
        assert round_to(np.float32(bits(given)), "bf16") == np.float32(bits(expected))
    assert np.isnan(round_to(np.float32("nan"), "bf16")) and round_to(np.float32("inf"), "bf16") == np.inf


def test_curves_are_compared_step_by_step() -> None:
    steps = np.arange(50)
    truth = 5 - 0.05 * steps
    noise = 1e-6 * (1 + steps) * np.where(steps % 7 == 6, 0.0, 1.0)  # zero at every seventh step
    torch32 = truth + noise
    result = judge_curve(torch32 + 7 * np.maximum.accumulate(noise), torch32, truth)
    assert result.passed and result.worst == pytest.approx(7, rel=1e-3)
    assert result.strict > FACTOR and result.strict_step % 7 == 6
    late = torch32.copy()
    late[30] += 9 * 1e-6 * 31
    result = judge_curve(late, torch32, truth)
    assert not result.passed and result.worst_step == 30
    # the running maximum covers earlier steps only: later noise does not count
    early = torch32.copy()
    early[2] += 1e-4
    assert judge_curve(early, torch32, truth).worst_step == 2
    assert not judge_curve(early, torch32, truth).passed


def test_curves_with_no_noise_or_values_that_are_not_finite() -> None:
    exact = np.full(3, 2.5)
    assert judge_curve(exact + 2.0**-22, exact, exact).worst == 2  # one ulp is twice the floor
    assert judge_curve([1.0, math.nan], [1.0, 1.0], [1.0, 1.0]).worst == math.inf
    assert judge_curve([1.0, math.nan], [1.0, math.nan], [1.0, 1.0]).worst_step == 1
    with pytest.raises(ValueError, match="cannot be compared"):
        judge_curve([1.0], [1.0, 2.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="cannot be compared"):
        judge_curve([], [], [])


def test_values_that_overflow_on_both_sides_are_not_judged() -> None:
    overflow = np.full(3, np.inf)
    assert judge(overflow, overflow, np.full(3, 1e9), "fp16").passed
    assert not judge(np.ones(3), overflow, np.full(3, 1e9), "fp16").passed
    assert not judge(overflow, overflow, overflow, "fp32").passed


@pytest.mark.parametrize("may_jump", [True, False])
def test_a_gradient_may_differ_by_what_it_jumps_in_nearby_problems(may_jump: bool) -> None:
    """The input of a ReLU is within rounding of 0: one of a hundred gradients changes in some problems."""
    exact = np.ones(100)

    def values(array: np.ndarray) -> dict[str, Value]:
        return {"gradient:weight": Value(array, "fp32")}

    def reference(index: int) -> np.ndarray:
        return exact + 0.02 * (index % 2) * (np.arange(100) == 3)

    def judged(ours: np.ndarray) -> Judgement:
        noise = 1e-7 * np.random.default_rng(0).standard_normal(100)
        samples = Samples(
            lambda index: values(reference(index)),
            lambda index: values(reference(index) + noise),
            lambda index: values(reference(index) + ours - exact),
            may_jump=may_jump,
        )
        return judge_values(values(ours), values(exact + noise), values(exact), samples=samples)["gradient:weight"]

    assert judged(exact - 0.02 * (np.arange(100) == 7)).passed == may_jump
    assert not judged(exact * 1.02).passed
    assert not judged(exact - 0.2 * (np.arange(100) == 7)).passed
