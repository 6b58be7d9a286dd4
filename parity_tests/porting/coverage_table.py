"""Measures what `icenet.port` covers, and writes the table of docs/port-coverage.md.

python parity_tests/porting/coverage_table.py ops --jobs 16
python parity_tests/porting/coverage_table.py ops --only "float32 cumsum" "int64 gather" --show
python parity_tests/porting/coverage_table.py layers torchvision timm transformers
python parity_tests/porting/coverage_table.py page          # the page alone, from the results of earlier runs

Each sample runs in a worker process with a limit of time. A sample that crashes its worker or does not end counts as
failed, and another worker goes on with the next one. Results of a group replace those of an earlier run (with --only,
those of the named entries).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

GROUPS = {
    "ops": "PyTorch's operator database",
    "layers": "layers of torch.nn",
    "torchvision": "models of torchvision",
    "timm": "families of timm",
    "transformers": "families of transformers",
}
LIMITS = {"ops": 60, "layers": 120, "torchvision": 900, "timm": 900, "transformers": 900}
"""Seconds of a sample."""
START = 600
"""Seconds in which a worker imports its frameworks."""

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # also with `python -m` or PYTHONSAFEPATH
RESULTS = HERE / "coverage.json"
PAGE = HERE.parents[1] / "docs" / "port-coverage.md"
Outcome = tuple[str, str]


# ---- the worker ---------------------------------------------------------------------------------------------


def entries(group: str) -> dict[str, Callable[[], Iterator[Callable[[], Outcome]]]]:
    """Returns the entries of a group: a name, and a function that yields the checks of its samples."""
    import icenet.blas  # noqa: F401, I001  (before mlx)
    import mlx.core as mx
    import torch

    torch.set_num_threads(1)
    mx.set_default_device(mx.cpu)  # PyTorch computes on the CPU too, and many processes share no GPU
    if group == "ops":
        import op_db

        mx.disable_compile()  # a kernel is compiled by g++ on a CPU; results are the same
        operations = op_db.operations()
        return {
            f"{dtype} {op_db.name_of(op)}": lambda op=op, dtype=dtype: op_db.samples(op, getattr(torch, dtype))
            for dtype in ("float32", "int64", "bool", "bfloat16")
            for op in operations
            if getattr(torch, dtype) in op.supported_dtypes("cpu")
        }
    if group == "layers":
        import layer_cases

        mx.disable_compile()
        return layer_cases.entries()
    import model_cases

    return model_cases.entries(group)


def work(group: str, channel: Any) -> None:
    """Runs the entries that the parent names, one line each, and reports every sample."""
    found = entries(group)
    print(json.dumps({"entries": list(found)}), file=channel, flush=True)
    for line in sys.stdin:
        name, _, skip = line.rstrip("\n").rpartition("\t")
        for number, check in enumerate(found[name]()):
            if number < int(skip):
                continue
            print(json.dumps({"number": number}), file=channel, flush=True)
            begin = time.perf_counter()
            status, detail = check()
            seconds = round(time.perf_counter() - begin, 1)
            print(json.dumps({"status": status, "detail": detail, "seconds": seconds}), file=channel, flush=True)
        print(json.dumps({"done": True}), file=channel, flush=True)


# ---- the parent ---------------------------------------------------------------------------------------------


class Worker:
    """A worker process. Its messages arrive in a queue, so that waiting for one has a limit."""

    def __init__(self, group: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", group],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if SHOW else self.errors,
            env=environment,
            text=True,
        )
        self.messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            first, reason = self.next(START), "ends before it has started"
        except queue.Empty:
            first, reason = None, f"does not start in {START} s"
        if first is None:
            self.errors.seek(0)
            self.end()
            told = self.errors.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"a worker of {group} {reason}, exit status {self.process.returncode}:\n{told}")
        self.entries: list[str] = first["entries"]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.messages.put(json.loads(line))
        self.messages.put(None)

    def next(self, limit: float) -> dict[str, Any] | None:
        """Returns the next message, None if the process ended; raises queue.Empty after a number of seconds."""
        return self.messages.get(timeout=limit)

    def send(self, name: str, skip: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{name}\t{skip}\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class Run:
    """One run of a group: its workers and their results."""

    def __init__(
        self,
        group: str,
        jobs: int,
        limit: float,
        only: list[str],
        part: str,
        budget: float,
        keep: Callable[[Run], None],
    ) -> None:
        self.group, self.limit, self.results = group, limit, dict[str, dict[str, Any]]()
        self.keep, self.kept = keep, time.monotonic()
        self.until = time.monotonic() + budget
        first = Worker(group)
        self.all = first.entries
        index, count = map(int, part.split("/"))
        names = [name for name in first.entries if not only or _chosen(name, only)][index::count]
        self.names: queue.Queue[str] = queue.Queue()
        for name in names:
            self.names.put(name)
        self.lock, self.count = threading.Lock(), len(names)
        workers = [first, *[None] * (min(jobs, len(names)) - 1)]
        threads = [threading.Thread(target=self._serve, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _serve(self, worker: Worker | None) -> None:
        """Runs entries until none is left. Each thread waits for its own worker, which imports its frameworks."""
        try:
            worker = worker or Worker(self.group)
            while time.monotonic() < self.until:
                try:
                    name = self.names.get_nowait()
                except queue.Empty:
                    break
                worker = self._entry(worker, name)
            worker.end()
        except RuntimeError as error:  # the other workers go on
            print(error, flush=True)

    def _entry(self, worker: Worker, name: str) -> Worker:
        counts, problems, skip, note, begin = Counter[str](), list[str](), 0, "", time.monotonic()
        worker.send(name, 0)
        while True:
            try:
                message = worker.next(self.limit)
                reason = "crashes the process"
            except queue.Empty:
                message, reason = None, f"does not end in {self.limit:.0f} s"
            if message is None:
                counts["failed"] += 1
                problems.append(f"failed: sample {skip} {reason}")
                worker.end()
                worker = Worker(self.group)
                skip += 1
                worker.send(name, skip)
            elif "done" in message:
                break
            elif "number" in message:
                skip = message["number"]
            else:
                counts[message["status"]] += 1
                if message["status"] not in ("passed", "skipped"):
                    problems.append(f"{message['status']}: {message['detail']}")
                note = message["detail"] or note
        result = {
            **counts,
            "problems": problems if SHOW else problems[:3],
            "seconds": round(time.monotonic() - begin, 1),
        }
        if note and not problems:
            result["note"] = note
        with self.lock:
            self.results[name] = result
            done = f"{len(self.results)}/{self.count}"
            told = ", ".join(f"{count} {status}" for status, count in counts.items())
            if problems or self.limit > 100:
                print(f"[{done}] {name}: {told} ({result['seconds']} s) {note if not problems else ''}", flush=True)
            for problem in problems[: 20 if SHOW else 2]:
                print("    ", problem[:400], flush=True)
            if time.monotonic() > self.kept + 20:  # a run that is ended keeps its results
                self.keep(self)
                self.kept = time.monotonic()
        return worker


SHOW = False
"""Whether all problems of an entry are printed, and what the workers write to stderr."""


def _chosen(name: str, only: list[str]) -> bool:
    return any(name == item or name.split()[-1] == item or name.split()[0] == item for item in only)


# ---- the results and the page -------------------------------------------------------------------------------


def stored() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    return found


def machine() -> str:
    """Returns the processor, the number of cores, and the versions of the frameworks."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        processor = lines[0].partition(":")[2].strip() if lines else processor
    versions = []
    for name in ("torch", "mlx", "torchvision", "timm", "transformers"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor}, {cores} cores, Python {platform.python_version()}, {', '.join(versions)}"


def save(group: str, results: dict[str, dict[str, Any]], partial: bool, every: list[str]) -> None:
    found = stored()
    entry = found.setdefault(group, {"entries": {}})
    text = re.sub(r"(/[^/\s\"']+)+/(?=(torch|torchvision|timm|transformers|numpy)/)", "", json.dumps(results))
    results = json.loads(text)  # without the folders of this machine
    kept = {name: {key: value for key, value in item.items() if value} for name, item in results.items()}
    entry["entries"] = dict(sorted({**(entry["entries"] if partial else {}), **kept}.items()))
    entry["machine"], entry["of"] = machine(), len(every)
    lines = []
    for name, item in sorted(found.items()):
        rows = ",\n".join(f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in item["entries"].items())
        head = f'  "machine": {json.dumps(item["machine"])},\n  "of": {item["of"]},\n  "entries": {{\n'
        lines.append(f" {json.dumps(name)}: {{\n{head}{rows}\n  }}\n }}")
    RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def totals(entries: dict[str, dict[str, Any]]) -> Counter[str]:
    total = Counter[str]()
    for item in entries.values():
        total.update({key: item.get(key, 0) for key in ("passed", "failed", "missing", "skipped")})
    return total


def share(total: Counter[str], missing: bool = False) -> str:
    """Returns the part that passed of what was tried; operations that the table lacks count or not."""
    tried = total["passed"] + total["failed"] + (total["missing"] if missing else 0)
    return f"{100 * total['passed'] / tried:.1f} %" if tried else "none"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", default=["page"], help=f"{', '.join(GROUPS)}, all, or page")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes")
    parser.add_argument("--limit", type=float, help="seconds of a sample")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no entry is begun")
    parser.add_argument("--only", nargs="*", default=[], help="names of entries, of operations, or a dtype")
    parser.add_argument("--part", default="0/1", help="every n-th entry, such as 0/4")
    parser.add_argument(
        "--show", action="store_true", help="print up to 20 problems of an entry, and keep no results"
    )
    parser.add_argument("--worker", choices=GROUPS, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        channel = os.fdopen(os.dup(1), "w")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a model prints is not a message
        del sys.argv[1:]  # PyTorch's tests read them when they are imported
        work(given.worker, channel)
        return 0
    wrong = [name for name in given.groups if name not in (*GROUPS, "all", "page")]
    if wrong:
        parser.error(f"{wrong[0]}: give one of {', '.join(GROUPS)}, all, page")
    global SHOW
    SHOW = given.show
    for group in GROUPS if "all" in given.groups else [name for name in given.groups if name in GROUPS]:
        begin = time.monotonic()
        limit = given.limit or LIMITS[group]
        whole = not given.only and given.part == "0/1"

        def keep(run: Run, group: str = group, whole: bool = whole) -> None:
            if not given.show:
                save(group, run.results, not whole or len(run.results) < run.count, run.all)

        run = Run(group, given.jobs, limit, given.only, given.part, given.budget, keep)
        total = totals(run.results)
        print(f"{group}: {dict(total)}, {share(total)}, {time.monotonic() - begin:.0f} s", flush=True)
        keep(run)
    if not given.show:
        import coverage_page

        PAGE.write_text(coverage_page.page(stored()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
