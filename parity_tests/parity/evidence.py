"""The evidence of the parity tool: planted faults that it finds, and correct models on which it raises no alarm.

    python -m parity_tests.parity.evidence all --jobs 16
    python -m parity_tests.parity.evidence faults
    python -m parity_tests.parity.evidence models --count 1000 --seed 1 --out models.json

`faults` plants each fault of `pair_faults.py` and `family_faults.py` and counts those that are found, found at their
own module, and whose cause is named. `models` compares random correct models of `written_pairs.py` and
`random_pairs.py`. The models are divided among the settings of instructions and threads of `sweep.environments`, a
process each. Both judge the outputs of the same pairs by fixed tolerances as well. All depends on the seed only, but
for the rounding of the processor. One fault or model takes about a second, so `all` takes 20 minutes of
processor time.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # for `python -m`

TOLERANCES = (1e-5, 1e-4, 1e-3)
ASSERT_CLOSE = {"fp32": (1.3e-6, 1e-5), "bf16": (1.6e-2, 1e-5), "fp16": (1e-3, 1e-5)}
"""rtol and atol of `torch.testing.assert_close` for each dtype."""
JUDGES = (*(f"{tolerance:g}" for tolerance in TOLERANCES), "assert_close")
MODELS = 1000
CHUNK = 25
"""Number of models of a process: one that runs for long holds the kernels and caches of all of them."""

Result = dict[str, Any]


# ---- one fault, one model -----------------------------------------------------------------------------------


def outputs(ours: Any, theirs: Any, given: Any, dtype: str, moves: bool) -> list[tuple[Any, Any]]:
    """Returns the outputs of both modules in evaluation mode and a dtype, in fp32, with the axes of PyTorch.

    It is what somebody writes who compares two modules by hand. The modules are changed.

    Args:
        ours, theirs: The modules of MLX and PyTorch.
        given: An array, a tuple or a dict of arrays: the arguments of `ours`.
        dtype: fp32, bf16 or fp16.
        moves: Whether PyTorch has the channels of images and sequences before their other axes.
    """
    import mlx.core as mx
    import numpy as np
    import torch

    dtypes = {
        "fp32": (mx.float32, torch.float32),
        "bf16": (mx.bfloat16, torch.bfloat16),
        "fp16": (mx.float16, torch.float16),
    }
    own, other = dtypes[dtype]

    def convert(array: Any) -> tuple[Any, Any]:
        is_float = array.dtype.kind == "f"
        first = mx.array(array).astype(own) if is_float else mx.array(array)
        moved = np.moveaxis(array, -1, 1) if is_float and moves and array.ndim > 2 else array
        second = torch.from_numpy(np.ascontiguousarray(moved))
        return first, second.to(other) if is_float else second

    ours.set_dtype(own)
    ours.eval()
    theirs.to(other).eval()
    with torch.no_grad():
        if isinstance(given, dict):
            pairs = {name: convert(array) for name, array in given.items()}
            results = [m(**{n: p[i] for n, p in pairs.items()}) for i, m in enumerate((ours, theirs))]
        else:
            arrays = given if isinstance(given, tuple) else (given,)
            results = [m(*(convert(array)[i] for array in arrays)) for i, m in enumerate((ours, theirs))]
    first = np.array(results[0].astype(mx.float32))
    second = results[1].float().numpy()
    if first.ndim > 2 and moves:
        first = np.moveaxis(first, -1, 1)
    return [(first, second)]


def judged_by_tolerances(pairs: Iterable[tuple[Any, Any]], dtype: str) -> dict[str, bool]:
    """Returns whether each fixed tolerance accepts all pairs of outputs."""
    import numpy as np
    import torch

    accepted = dict.fromkeys(JUDGES, True)
    for ours, theirs in pairs:
        if ours.shape != theirs.shape:
            return dict.fromkeys(JUDGES, False)
        with np.errstate(all="ignore"):
            for name, tolerance in zip(JUDGES, TOLERANCES, strict=False):
                accepted[name] &= np.allclose(ours, theirs, rtol=0, atol=tolerance, equal_nan=True)
        rtol, atol = ASSERT_CLOSE[dtype]
        try:
            options = {"rtol": rtol, "atol": atol, "equal_nan": True}
            torch.testing.assert_close(torch.from_numpy(ours), torch.from_numpy(theirs), **options)
        except AssertionError:
            accepted["assert_close"] = False
    return {name: bool(value) for name, value in accepted.items()}


MOVED = ("unet", "convnext", "tcn", "vit", "cnn")
"""Models of faults whose PyTorch twin has its channels first."""


def compared(ours: Any, theirs: Any, given: Any, options: dict[str, Any]) -> Any:
    """Returns the report of a pair with the weights that it has."""
    from icenet.parity import compare

    return compare(ours, theirs, given, copy_weights=False, **options)


def check_fault(index: int) -> Result:
    """Plants a fault, compares the twins, and judges their outputs by fixed tolerances."""
    import family_faults

    fault = family_faults.ALL[index]
    ours, theirs, given, options = family_faults.make(fault)
    began = time.process_time()
    report = compared(ours, theirs, given, options)
    seconds = time.process_time() - began
    stage = report.failed_stage
    words = fault.cause.split("|")
    accepted = judged_by_tolerances(
        outputs(ours, theirs, given, options.get("dtype", "fp32"), fault.model in MOVED), options.get("dtype", "fp32")
    )
    is_optimizer = fault.path == "*"  # then no module is at fault
    place, expected = (stage and stage.name, "optimizer") if is_optimizer else (report.culprit, fault.path)
    is_at_place = not report.passed and place == expected
    return {
        "name": f"{fault.model} {fault.name}",
        "kind": fault.kind,
        "model": fault.model,
        "found": not report.passed,
        "placed": is_at_place,
        "caused": is_at_place and bool(report.cause) and any(word in report.cause for word in words),
        "stage": stage.name if stage is not None else "",
        "verdict": report.verdict,
        "accepted": accepted,
        "seconds": seconds,
    }


def model_pair(seed: int) -> tuple[Any, Any, Any, str, bool]:
    """Returns a random correct pair: three in four are written by hand, the others are of layers only."""
    if seed % 4:
        import written_pairs

        kind = written_pairs.MODELS[seed % len(written_pairs.MODELS)]
        return *written_pairs.make(seed), kind in written_pairs.WITH_IMAGES
    import random_pairs

    ours, theirs, given, dtype = random_pairs.make(seed)
    return ours, theirs, given, dtype, given.ndim == 4


def check_model(seed: int) -> Result:
    """Compares a random correct pair, and judges its outputs by fixed tolerances."""
    ours, theirs, given, dtype, moves = model_pair(seed)
    began = time.process_time()
    report = compared(ours, theirs, given, {"dtype": dtype})
    seconds = time.process_time() - began
    accepted = judged_by_tolerances(outputs(ours, theirs, given, dtype, moves), dtype)
    ratios = [row.ratio for stage in report.stages for row in stage.rows if row.passed and row.ratio < 1e3]
    return {
        "name": str(seed),
        "dtype": dtype,
        "alarm": "" if report.passed else report.verdict,
        "ratio": max(ratios, default=0.0),
        "accepted": accepted,
        "seconds": seconds,
    }


CHECKS: dict[str, Callable[[int], Result]] = {"faults": check_fault, "models": check_model}


def run_part(what: str, numbers: Sequence[int]) -> None:
    """Checks some faults or models in this process, on the CPU; prints a line of JSON for each."""
    import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    for number in numbers:
        try:
            found = CHECKS[what](number)
        except Exception as error:
            found = {"name": str(number), "error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"number": number, **found}), flush=True)


# ---- all of them, in several processes ----------------------------------------------------------------------


def run_all(what: str, numbers: Sequence[int], jobs: int) -> list[Result]:
    """Divides faults or models among processes, each with the next setting of instructions; draws a bar."""
    from sweep import environments

    chosen = [v for v in environments() if "ORDER" not in v] if what == "models" else [{}]
    size = max(1, min(CHUNK, -(-len(numbers) // max(jobs, len(chosen)))))
    parts = [list(numbers[start : start + size]) for start in range(0, len(numbers), size)]
    results: list[Result] = []
    lock, began = threading.Lock(), time.monotonic()

    def take(result: Result) -> None:
        with lock:
            results.append(result)
            if sys.stderr.isatty():
                done = 30 * len(results) // len(numbers)
                bar = "━" * done + " " * (30 - done)
                text = f"\r{what} {bar} {len(results)} of {len(numbers)}, {time.monotonic() - began:.0f} s"
                print(text, end="" if len(results) < len(numbers) else "\n", file=sys.stderr, flush=True)
            elif 10 * len(results) // len(numbers) > 10 * (len(results) - 1) // len(numbers):
                print(f"{what}: {len(results)} of {len(numbers)}, {time.monotonic() - began:.0f} s", file=sys.stderr)

    def run(index: int) -> None:
        variables = chosen[index % len(chosen)]
        threads = variables.get("OMP_NUM_THREADS", "1")
        settings = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": "1"}
        env = {**os.environ, "MLX_ENABLE_TF32": "0", **settings, **variables}
        arguments = [sys.executable, __file__, what, "--only", ",".join(map(str, parts[index]))]
        left = set(parts[index])
        with subprocess.Popen(arguments, env=env, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    result = json.loads(line)
                    left.discard(result["number"])
                    take({**result, "environment": variables})
        for number in sorted(left):
            take({"number": number, "name": str(number), "error": f"the process ended with {process.returncode}"})

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, range(len(parts))))
    return sorted(results, key=lambda result: result["number"])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
    return "\n".join(lines)


def names(judge: str) -> str:
    return "`torch.testing.assert_close`" if judge == "assert_close" else f"tolerance {judge}"


def report_faults(results: Sequence[Result]) -> int:
    """Prints what was found; returns the number of faults that were missed or found elsewhere."""
    valid = [r for r in results if "error" not in r]
    kinds = {r["kind"] for r in valid}
    groups = collections.Counter(r["model"] for r in valid)
    counts = {name: sum(r[name] for r in valid) for name in ("found", "placed", "caused")}
    print(f"{len(results)} faults of {len(kinds)} kinds in {len(groups)} models")
    print(f"found: {counts['found']}; at their own module: {counts['placed']}; cause named: {counts['caused']}\n")
    for r in results:
        problem = r.get("error") or (
            "missed" if not r["found"] else "elsewhere" if not r["placed"] else "" if r["caused"] else "no cause"
        )
        if problem:
            print(f"  {r['name']}: {problem}. {r.get('verdict', '')}")
    return len(results) - counts["placed"]


def report_models(results: Sequence[Result]) -> int:
    """Prints the false alarms; returns their number."""
    alarms = [r for r in results if r.get("error") or r.get("alarm")]
    dtypes = collections.Counter(r["dtype"] for r in results if "dtype" in r)
    settings = {json.dumps(r.get("environment"), sort_keys=True) for r in results}
    listed = ", ".join(f"{count} in {dtype}" for dtype, count in sorted(dtypes.items()))
    print(f"{len(results)} correct models ({listed}), {len(settings)} settings of instructions and threads")
    print(f"false alarms: {len(alarms)}\n")
    for r in alarms:
        shown = " ".join(f"{key}={value}" for key, value in r.get("environment", {}).items())
        print(f"  {shown} --only {r['name']}: {r.get('error') or r['alarm']}")
    return len(alarms)


def comparison(faults: Sequence[Result], models: Sequence[Result]) -> str:
    """Returns the table of the tool next to fixed tolerances."""
    faults, models = ([r for r in results if "accepted" in r] for results in (faults, models))
    head = ["judged by", *(["faults missed"] if faults else []), *(["false alarms"] if models else [])]
    own = [sum(not r["found"] for r in faults), sum(bool(r["alarm"]) for r in models)]
    rows = [
        head,
        ["`icenet.parity.compare`", *(f"{n} of {len(r)}" for n, r in zip(own, (faults, models), strict=True) if r)],
    ]
    for judge in JUDGES:
        missed = sum(r["accepted"][judge] for r in faults)
        alarms = sum(not r["accepted"][judge] for r in models)
        rows.append(
            [
                names(judge),
                *(f"{n} of {len(r)}" for n, r in zip((missed, alarms), (faults, models), strict=True) if r),
            ]
        )
    return table(rows)


def machine() -> str:
    """Returns the processor, the number of its cores, and the versions of the frameworks."""
    from importlib.metadata import version

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cpu}, {cores} cores, mlx {version('mlx')}, torch {version('torch')}, Python {platform.python_version()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("faults", "models", "all"))
    parser.add_argument("--seed", type=int, default=1, help="the models depend on it (default: 1)")
    parser.add_argument("--count", type=int, default=MODELS, help=f"number of models (default: {MODELS})")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes at a time (default: 1)")
    parser.add_argument("--out", metavar="FILE", help="write all results to this file, as JSON")
    parser.add_argument("--only", metavar="N,N", help="check these in this process and its environment, as JSON")
    given = parser.parse_args()
    if given.only is not None:
        if given.what == "all":
            parser.error("--only: name faults or models")
        run_part(given.what, [int(number) for number in given.only.split(",")])
        return 0
    began = time.monotonic()
    found: dict[str, list[Result]] = {"faults": [], "models": []}
    problems = 0
    print(machine(), flush=True)
    if given.what in ("faults", "all"):
        import family_faults

        found["faults"] = run_all("faults", range(len(family_faults.ALL)), given.jobs)
        problems += report_faults(found["faults"])
    if given.what in ("models", "all"):
        found["models"] = run_all("models", range(given.seed * 10000, given.seed * 10000 + given.count), given.jobs)
        problems += report_models(found["models"])
    print(f"\n{comparison(found['faults'], found['models'])}\n")
    seconds = sum(r.get("seconds", 0.0) for results in found.values() for r in results)
    print(f"{time.monotonic() - began:.0f} s; the comparisons took {seconds:.0f} s of processor time")
    if given.out:
        Path(given.out).write_text(json.dumps({"machine": machine(), "seed": given.seed, **found}, indent=1))
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main())
