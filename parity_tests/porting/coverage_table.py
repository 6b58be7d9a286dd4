"""Measures what `icenet.port` covers, and writes the table of docs/port-coverage.md.

python parity_tests/porting/coverage_table.py ops --jobs 16
python parity_tests/porting/coverage_table.py ops --only "float32 cumsum" "int64 gather" --show
python parity_tests/porting/coverage_table.py layers torchvision timm transformers
python parity_tests/porting/coverage_table.py all --jobs 16 --new --budget 480
python parity_tests/porting/coverage_table.py page          # the page alone, from the results of earlier runs

Each sample runs in a worker process with a limit of time. A sample that crashes its worker or does not end counts as
failed, and another worker goes on with the next one. All groups advance equally, and begin with one small model of
each family, so that a short budget sees all of them. Results of a whole group replace those of an earlier run, others
are added to them.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import platform
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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

        operations = op_db.operations()
        return {
            f"{dtype} {op_db.name_of(op)}": lambda op=op, dtype=dtype: op_db.samples(op, getattr(torch, dtype))
            for dtype in ("float32", "int64", "bool", "bfloat16")
            for op in operations
            if getattr(torch, dtype) in op.supported_dtypes("cpu")
        }
    if group == "layers":
        import layer_cases

        return layer_cases.entries()
    import model_cases

    return model_cases.entries(group)


def work(groups: list[str], channel: Any) -> None:
    """Says the entries of groups, runs those that the parent names, one line each, and reports every sample."""

    def tell(**message: Any) -> None:
        print(json.dumps(message), file=channel, flush=True)

    found = {group: entries(group) for group in groups}
    tell(entries={group: list(names) for group, names in found.items()})
    for line in sys.stdin:
        group, name, skip = line.rstrip("\n").split("\t")
        if group not in found:
            tell(loading=group)
            found[group] = entries(group)
        import mlx.core as mx

        if group in ("ops", "layers"):  # many small functions, each compiled by g++ on a CPU; results are the same
            mx.disable_compile()
        else:
            mx.enable_compile()
        for number, check in enumerate(found[group][name]()):
            if number < int(skip):
                continue
            tell(number=number)
            begin = time.perf_counter()
            status, detail = check()
            tell(status=status, detail=detail, seconds=round(time.perf_counter() - begin, 1))
        tell(done=True)


# ---- the parent ---------------------------------------------------------------------------------------------


class Worker:
    """A worker process. Its messages arrive in a queue, so that waiting for one has a limit.

    Args:
        groups: The groups whose entries it says. It loads another group when it gets an entry of it.
    """

    def __init__(self, groups: Sequence[str] = ()) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "coverage_table.py"), "--worker", *groups],
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
            raise RuntimeError(f"a worker {reason}, exit status {self.process.returncode}:\n{told}")
        self.entries: dict[str, list[str]] = first["entries"]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.messages.put(json.loads(line))
        self.messages.put(None)

    def next(self, limit: float) -> dict[str, Any] | None:
        """Returns the next message, None if the process ended; raises queue.Empty after a number of seconds."""
        return self.messages.get(timeout=limit)

    def send(self, group: str, name: str, skip: int) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended: the next message says so
            self.process.stdin.write(f"{group}\t{name}\t{skip}\n")
            self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def interleaved(names: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Returns the entries of groups in an order in which all groups advance equally."""
    placed = [
        ((index + 0.5) / len(listed), group, name)
        for group, listed in names.items()
        for index, name in enumerate(listed)
    ]
    return [(group, name) for _, group, name in sorted(placed, key=lambda item: item[0])]


class Run:
    """One run: its workers and their results.

    Args:
        groups: The groups.
        jobs: How many workers.
        limit: The seconds of a sample by its group.
        chosen: Returns the entries of a group to run from all of its entries.
        budget: The seconds after which the run ends; entries under way get no result.
        keep: Called with the run now and then, and stores its results.
    """

    def __init__(
        self,
        groups: Sequence[str],
        jobs: int,
        limit: Callable[[str], float],
        chosen: Callable[[str, list[str]], list[str]],
        budget: float,
        keep: Callable[[Run], None],
    ) -> None:
        self.limit, self.keep = limit, keep
        self.results: dict[str, dict[str, dict[str, Any]]] = {group: {} for group in groups}
        self.kept, until = time.monotonic(), time.monotonic() + budget
        first = Worker(groups)
        self.all = first.entries
        self.chosen = {group: chosen(group, self.all[group]) for group in groups}
        self.rest = collections.deque(interleaved(self.chosen))
        self.lock, self.stopped, self.workers = threading.Lock(), False, [first]
        threads = [
            threading.Thread(target=self._serve, args=(first if number == 0 else None,), daemon=True)
            for number in range(max(1, min(jobs, len(self.rest))))
        ]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads) and time.monotonic() < until:
                time.sleep(0.05)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        with self.lock:
            self.stopped = True
            workers = list(self.workers)
        for worker in workers:
            worker.end()
        for thread in threads:
            thread.join(10)

    def _start(self) -> Worker:
        """Returns a further worker. The thread waits for it, so that workers start side by side."""
        worker = Worker()
        with self.lock:
            self.workers.append(worker)
            if self.stopped:
                worker.end()
        return worker

    def _serve(self, worker: Worker | None) -> None:
        try:
            worker = worker or self._start()
            while self.rest and not self.stopped:
                try:
                    group, name = self.rest.popleft()
                except IndexError:
                    break
                worker = self._entry(worker, group, name)
            worker.end()
        except RuntimeError as error:  # the other workers go on
            print(error, flush=True)

    def _entry(self, worker: Worker, group: str, name: str) -> Worker:
        counts, problems, skip, note, begin = Counter[str](), list[str](), 0, "", time.monotonic()
        worker.send(group, name, 0)
        limit = self.limit(group)
        while True:
            try:
                message = worker.next(limit)
                reason = "crashes the process"
            except queue.Empty:
                message, reason = None, f"does not end in {limit:.0f} s"
            if self.stopped:
                return worker
            if message is None:
                counts["failed"] += 1
                problems.append(f"failed: sample {skip} {reason}")
                worker.end()
                worker = self._start()
                skip += 1
                worker.send(group, name, skip)
            elif "loading" in message:
                limit = START
            elif "done" in message:
                break
            elif "number" in message:
                skip, limit = message["number"], self.limit(group)
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
            self.results[group][name] = result
            done = f"{len(self.results[group])}/{len(self.chosen[group])}"
            told = ", ".join(f"{count} {status}" for status, count in counts.items())
            if problems or LIMITS[group] > 100:
                note = note if not problems else ""
                print(f"{group} [{done}] {name}: {told} ({result['seconds']} s) {note}", flush=True)
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


def machine(group: str) -> str:
    """Returns the processor, the number of cores, and the versions of what a group is measured with."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        processor = lines[0].partition(":")[2].strip() if lines else processor
    versions = []
    for name in dict.fromkeys(("torch", "mlx", "torch" if group in ("ops", "layers") else group)):
        try:
            versions.append(f"{name} {metadata.version(name).partition('+')[0]}")
        except metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor}, {cores} cores, Python {platform.python_version()}, {', '.join(versions)}"


def commit() -> str:
    """Returns the commit that is measured, with a "+" if files of the packages differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(HERE), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/icenet", ":/icenet_torch")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "") or "not known"


def save(group: str, results: dict[str, dict[str, Any]], partial: bool, every: list[str], measured: str) -> None:
    """Stores results of a group.

    Args:
        group: The group.
        results: Its entries by name.
        partial: Whether they are added to those of earlier runs.
        every: The names of all entries of the group.
        measured: The commit that was measured.
    """
    found = stored()
    entry = found.setdefault(group, {"entries": {}})
    text = re.sub(r"(/[^/\s\"']+)+/(?=(torch|torchvision|timm|transformers|numpy)/)", "", json.dumps(results))
    results = json.loads(text)  # without the folders of this machine
    run = {"commit": measured, "day": time.strftime("%Y-%m-%d", time.gmtime()), "machine": machine(group)}
    runs = [*entry.get("runs", [])] if partial else []
    runs += [run] if run not in runs else []
    kept = {
        name: {**{key: value for key, value in item.items() if value}, "run": runs.index(run)}
        for name, item in results.items()
    }
    entries = {**(entry["entries"] if partial else {}), **kept}
    used = sorted({item["run"] for item in entries.values()})
    entry["runs"], entry["of"] = [runs[number] for number in used], len(every)
    entry["entries"] = {name: {**item, "run": used.index(item["run"])} for name, item in sorted(entries.items())}
    write(found)


def write(results: dict[str, Any]) -> None:
    """Writes the results of all groups, one entry a line."""
    lines = []
    for name, item in sorted(results.items()):
        rows = ",\n".join(f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in item["entries"].items())
        runs = ",\n".join(f"   {json.dumps(run)}" for run in item["runs"])
        head = f'  "of": {item["of"]},\n  "runs": [\n{runs}\n  ],\n  "entries": {{\n'
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
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which the run ends")
    parser.add_argument("--only", nargs="*", default=[], help="names of entries, of operations, or a dtype")
    parser.add_argument("--part", default="0/1", help="every n-th entry, such as 0/4")
    parser.add_argument("--new", action="store_true", help="only entries that have not passed in an earlier run")
    parser.add_argument(
        "--show", action="store_true", help="print up to 20 problems of an entry, and keep no results"
    )
    parser.add_argument("--worker", nargs="*", choices=GROUPS, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker is not None:
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
    groups = list(GROUPS) if "all" in given.groups else [name for name in given.groups if name in GROUPS]
    whole = not given.only and given.part == "0/1" and not given.new
    before, measured = stored(), commit()
    index, count = map(int, given.part.split("/"))

    def chosen(group: str, names: list[str]) -> list[str]:
        known = before.get(group, {"entries": {}})["entries"] if given.new else {}
        passed = {name for name, item in known.items() if not (item.get("failed") or item.get("missing"))}
        return [name for name in names if name not in passed and (not given.only or _chosen(name, given.only))][
            index::count
        ]

    def keep(run: Run) -> None:
        for group, results in run.results.items():
            if results and not given.show:
                partial = not whole or len(results) < len(run.chosen[group])
                save(group, results, partial, run.all[group], measured)

    if groups:
        begin = time.monotonic()
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` ends a run as Ctrl-C does
        run = Run(groups, given.jobs, lambda group: given.limit or LIMITS[group], chosen, given.budget, keep)
        for group, results in run.results.items():
            total = totals(results)
            left = len(run.chosen[group]) - len(results)
            rest = f", {left} entries not reached" if left else ""
            print(f"{group}: {dict(total)}, {share(total)}{rest}, {time.monotonic() - begin:.0f} s", flush=True)
        keep(run)
    if not given.show:
        import coverage_page

        PAGE.write_text(coverage_page.page(stored()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
