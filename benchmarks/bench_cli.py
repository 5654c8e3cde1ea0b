"""Time of commands: ``kempnerforge --help`` and ``ckpt ls`` against ``python -c pass``.

    python benchmarks/bench_cli.py

The commands alternate. ``ckpt ls`` lists a run with ``--steps`` committed, valid steps of
``--shards`` shards each (``benchmarks/bench/many_steps.py``), with files in the page cache. The
benchmark measures for every process:

  wall_s  from its start to its end
  cpu_s   its processor time, of user and kernel: less noisy on a busy machine

The goal is at most 0.3 s more than ``python -c pass``. The benchmark needs neither torch nor a GPU.
The size "gpu" is that of a long run on many ranks.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from bench import command, machine, pairs
from bench.many_steps import make_run

SIZES = {
    "tiny": {"steps": 5, "shards": 2, "pairs": 2},
    "cpu": {"steps": 1000, "shards": 8},
    "gpu": {"steps": 1000, "shards": 64},
}
MOST_EXTRA_S = 0.3


def measure(process: list[str], _pair: int) -> pairs.Measured:
    """Run the process once."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run(process, check=True, stdout=subprocess.DEVNULL)
    wall_s = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall_s": wall_s, "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def extra_s(ours: list[float], nothing: list[float]) -> tuple[float, tuple[float, float]]:
    """Return the difference of medians with bootstrap bounds, as ``pairs.compare`` does for ratios."""
    both = np.array([ours, nothing])
    chosen = np.random.default_rng(0).integers(both.shape[1], size=(4000, both.shape[1]))
    medians = np.median(both[:, chosen], axis=2)
    low, high = np.quantile(medians[0] - medians[1], (0.025, 0.975))
    return float(np.median(both[0]) - np.median(both[1])), (float(low), float(high))


def main() -> None:
    """Measure and print."""
    arguments = command.parse(__doc__, SIZES)
    folder = Path(tempfile.mkdtemp(dir=arguments.dir or Path.cwd(), prefix="bench-"))
    try:
        make_run(folder / "run", steps=arguments.steps, shards=arguments.shards)
        kempnerforge = [sys.executable, "-m", "kempnerforge"]
        processes = {
            "pass": [sys.executable, "-c", "pass"],
            "--help": [*kempnerforge, "--help"],
            "ckpt ls": [*kempnerforge, "ckpt", "ls", str(folder / "run")],
        }
        listed = subprocess.run(processes["ckpt ls"], check=True, capture_output=True, text=True).stdout
        if listed.count("ok (unverified)") != arguments.steps:
            sys.exit(f"ckpt ls did not find {arguments.steps} sound steps:\n{listed}")
        found = pairs.alternate(
            {name: partial(measure, process) for name, process in processes.items()}, arguments.pairs
        )
        facts = machine.facts(folder)
    finally:
        shutil.rmtree(folder)
    print(f"{arguments.steps} steps of {arguments.shards} shards; {machine.describe(facts)}")
    rows, extra = [], {}
    for name in ("--help", "ckpt ls"):
        for value in ("wall_s", "cpu_s"):
            columns = [pairs.column(found[arm], value) for arm in (name, "pass")]
            rows.append(pairs.compare(f"{name} {value}", *columns))
            more_s, (low_s, high_s) = extra_s(*columns)
            met = more_s <= MOST_EXTRA_S
            extra[f"{name} {value}"] = {"extra_s": more_s, "extra_s_95": (low_s, high_s), "met": met}
    pairs.show(rows, reference="python -c pass", others={})
    for name, result in extra.items():
        low_s, high_s = result["extra_s_95"]
        reached = "reached" if result["met"] else "NOT reached"
        print(
            f"{name}: {result['extra_s']:+.3f} s ({low_s:.3f} to {high_s:.3f}), "
            f"goal at most +{MOST_EXTRA_S} s: {reached}"
        )
    if arguments.json:
        pairs.write_json(arguments.json, rows, extra=extra, machine=facts, measured=found)


if __name__ == "__main__":
    main()
