"""Cost of kills: ours against a plain loop with blocking saves, both killed at the same seeded times.

    python benchmarks/bench_goodput.py --size cpu --json goodput.json

Do not use torchrun: the benchmark starts the jobs itself, one after the other. First, each arm runs
once without kills. This gives its ideal time, its cost of a save, and the losses that every killed
run must repeat. Then, for each seed, each arm runs from its first step to its last while all its
processes are killed at once, again and again. The kills are a Poisson process in the time that the
job is up. ``--delay-s`` after each kill, the same command runs again.

  ours        scripts/train.py, async_with_pinned_mem, saves every ``--interval``
  reference   benchmarks/bench/reference_loop.py: FSDP2 and stock ``dcp.save``, which blocks the loop, every
              ``--reference-interval``

``daly`` is Daly's interval for the measured cost of a save of the arm. For the reference, this is
about the best fixed interval. ``effective`` is ideal time / wall time. The parts, which
``bench/goodput_arithmetic.py`` defines, sum to the wall time. Exit status 1: ours lost a committed
step, or a loss differs in any bit from the undisturbed run.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import goodput_arithmetic as arithmetic
from bench import machine, pairs
from bench.arms import SIZES, Arm, daly_steps, differing_files, ledger, prepare_inputs
from bench.command import parse
from bench.kills import BenchError, run_to_end

STEADY = 0.1
"""Maximum relative difference of step times between a campaign and the undisturbed run. Beyond it,
the ideal time of the undisturbed run is not meaningful."""
PROJECTED_SCALES = (1.0, 40.0)
"""Factors for the bytes per rank, relative to those saved in this benchmark."""
PROJECTED_MTTI_H = (1.0, 3.0, 24.0)
PROJECTED_RESTART_S = 300.0


def kill_gaps(seed: int, mtti_s: float, max_kills: int) -> Iterator[float]:
    """Yield the seconds from each launch to the kill, without end if ``max_kills`` is 0."""
    rng = random.Random(seed)
    numbers = range(max_kills) if max_kills else itertools.count()
    return (rng.expovariate(1 / mtti_s) for _ in numbers)


def campaign(arm: Arm, seed: int, folder: Path, given: argparse.Namespace) -> pairs.Measured:
    """Run one arm through the kills of one seed."""
    job = arm.job(folder, given, arm.interval)
    gaps = kill_gaps(seed, given.mtti_s, given.max_kills)
    attempts = run_to_end(job, gaps, delay_s=given.delay_s)
    parts = arithmetic.parts_of(attempts, step_s=arm.cost.step_s)
    wall_s = attempts[-1].ended - attempts[0].launched
    kills_s = [attempt.killed_after_s for attempt in attempts if attempt.killed_after_s is not None]
    planned_s = list(itertools.islice(kill_gaps(seed, given.mtti_s, given.max_kills), len(kills_s)))
    saved = [[save["step"] for save in attempt.saves] for attempt in attempts]
    intervals = [after - before for steps in saved for before, after in itertools.pairwise(steps)]
    clean_s = [seconds for attempt in attempts for seconds in arithmetic.clean_steps_s(attempt)]
    result: dict[str, Any] = {
        "seed": seed,
        "clean_step_s": statistics.fmean(clean_s) if clean_s else None,
        "planned_kills_s": planned_s,
        "killed_after_s": kills_s,
        "saved_steps": saved,
        "interval_steps": statistics.median(intervals) if intervals else daly_steps(arm.cost, given.mtti_s),
        "wrong_losses": arithmetic.wrong_losses(attempts, arm.undisturbed),
        "differing_shards": differing_shards(arm, folder, given.steps),
        "lost_committed_steps": arithmetic.lost_committed_steps(attempts),
        "attempts": [asdict(attempt) for attempt in attempts],
    }
    measured = {
        "effective": arm.ideal_s / wall_s,
        "wall_s": wall_s,
        "kills": float(len(kills_s)),
        "lost_steps": float(arithmetic.lost_steps(attempts)),
        **{f"{name}_s": seconds for name, seconds in parts.items()},
    }
    if arm.name == "ours":
        result["ledger"] = ledger(folder, wall_s)
    arm.campaigns.append({**result, **measured})
    same = not (result["wrong_losses"] or result["differing_shards"])
    print(
        f"seed {seed}, {arm.name}: {len(kills_s)} kills, {wall_s:.1f} s, "
        f"effective {measured['effective']:.1%}, {measured['lost_steps']:.0f} "
        f"steps lost, {result['lost_committed_steps']} of them committed; "
        f"losses{' and last checkpoint' if arm.name == 'ours' else ''} {'' if same else 'NOT '}bitwise equal "
        "to those of the undisturbed run",
        flush=True,
    )
    shutil.rmtree(folder)
    return measured


def drift(arm: Arm) -> float:
    """Return the largest relative difference of step times, without saves, from the undisturbed run."""
    steps_s = [run["clean_step_s"] for run in arm.campaigns if run["clean_step_s"] is not None]
    return max((abs(step_s / arm.cost.step_s - 1) for step_s in steps_s), default=0.0)


def differing_shards(arm: Arm, folder: Path, steps: int) -> list[str]:
    """Return files of our last checkpoint whose bytes differ from those of the undisturbed run."""
    undisturbed = folder.with_name(f"{arm.name}-undisturbed")
    return differing_files(folder, undisturbed, steps) if arm.name == "ours" else []


def predictions(arm: Arm, given: argparse.Namespace) -> dict[str, float]:
    """Return the effective ratios that the model predicts from the undisturbed run and the used interval."""
    steps = statistics.median(run["interval_steps"] for run in arm.campaigns)
    rates = {"mtti_s": given.mtti_s, "delay_s": given.delay_s}
    interval_s = steps * arm.cost.step_s
    return {
        "interval_s": interval_s,
        "first_order": arithmetic.first_order_ratio(arm.cost, interval_s=interval_s, **rates),
        "exponential": arithmetic.exponential_ratio(arm.cost, interval_s=interval_s, **rates),
    }


def project(arms: dict[str, Arm]) -> list[dict[str, float]]:
    """Return the model's predictions from the measured costs for rarer failures and longer restarts."""
    return [
        {
            "scale": scale,
            "mtti_h": mtti_h,
            **{
                name: arithmetic.projected_ratio(
                    arm.cost, scale=scale, restart_s=PROJECTED_RESTART_S, mtti_s=3600 * mtti_h
                )
                for name, arm in arms.items()
            },
        }
        for scale in PROJECTED_SCALES
        for mtti_h in PROJECTED_MTTI_H
    ]


def report(arms: dict[str, Arm], found: dict[str, list[pairs.Measured]], given: argparse.Namespace) -> None:
    """Print the tables and write the file."""
    names = [name for name in found["ours"][0] if name != "kills"]
    columns = {arm: {name: pairs.column(rows, name) for name in names} for arm, rows in found.items()}
    compared = [
        pairs.compare(name, columns["ours"][name], columns["reference"][name])
        for name in names
        if any(columns["reference"][name])
    ]
    pairs.show(compared, reference="reference", others={})
    predicted = {name: predictions(arm, given) for name, arm in arms.items()}
    for name, arm in arms.items():
        print_model(arm, predicted[name])
    print_ledger(arms["ours"])
    projected = project(arms)
    print(
        "computed, not measured: cost and lag of a save as here, times the scale; restarts of "
        f"{PROJECTED_RESTART_S:.0f} s; saves at Daly's interval"
    )
    for row in projected:
        ratios = ", ".join(f"{name} {row[name]:.2%}" for name in arms)
        print(f"  scale {row['scale']:.0f}, a failure every {row['mtti_h']:g} h: {ratios} effective")
    if given.json:
        pairs.write_json(
            given.json,
            compared,
            machine=machine.facts(given.json.resolve().parent),
            arguments=vars(given),
            arms={
                name: {
                    "interval": arm.interval,
                    "cost": asdict(arm.cost),
                    "predicted": predicted[name],
                    "drift": drift(arm),
                    "campaigns": arm.campaigns,
                }
                for name, arm in arms.items()
            },
            projected=projected,
            undisturbed={name: asdict(arm.undisturbed) for name, arm in arms.items()},
        )


def print_model(arm: Arm, predicted: dict[str, float]) -> None:
    """Print the costs of an arm, and the prediction of the model."""
    cost, kills = arm.cost, sum(run["kills"] for run in arm.campaigns)
    print(
        f"{arm.name}: {kills:.0f} kills; step {cost.step_s:.4f} s, a save costs {cost.stall_s:.3f} s (blocks "
        f"{cost.blocking_s:.3f} s, durable {cost.lag_s:.3f} s later), restart {cost.restart_s:.2f} s, "
        f"saved every {predicted['interval_s']:.2f} s; the model predicts {predicted['exponential']:.1%} "
        f"effective, in first order {predicted['first_order']:.1%}"
    )
    if drift(arm) > STEADY:
        print(
            f"{arm.name}: THE MACHINE WAS NOT STEADY: steps without a save took up to {drift(arm):.0%} more "
            "or less than undisturbed. Use wall_s, whose arms alternate, and not effective"
        )


def print_ledger(arm: Arm) -> None:
    """Print the figures of ``kempnerforge report`` next to those measured from outside."""
    for run in arm.campaigns:
        recorded = run["ledger"]
        print(
            f"seed {run['seed']}: the ledger has {recorded['lost_steps']} lost steps, "
            f"seen {run['lost_steps']:.0f}; restarts and pauses {recorded['restart_and_delay_s']:.1f} s, "
            f"seen {run['restart_s'] + run['delay_s']:.1f} s; it lacks {recorded['unseen_s']:.1f} s"
        )


def main() -> int:
    """Measure and print."""
    given = parse(__doc__, SIZES)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    arms = {"ours": Arm("ours", given.interval), "reference": Arm("reference", given.reference_interval)}
    with tempfile.TemporaryDirectory(dir=given.dir or Path.cwd(), prefix="bench-") as name:
        folder = Path(name)
        given.config = prepare_inputs(folder, given)
        print(machine.describe(machine.facts(folder)), flush=True)
        try:
            for arm in arms.values():
                arm.probe(folder / f"{arm.name}-undisturbed", given)
                print(
                    f"{arm.name}, undisturbed: ideal {arm.ideal_s:.1f} s; interval {arm.interval}", flush=True
                )
            found = pairs.alternate(
                {
                    name: lambda pair, arm=arm: campaign(
                        arm, given.first_seed + pair, folder / f"{arm.name}-{pair}", given
                    )
                    for name, arm in arms.items()
                },
                given.pairs,
                warmups=0,
            )
        except BenchError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        report(arms, found, given)
    promised = ("wrong_losses", "differing_shards", "lost_committed_steps")
    return 1 if any(run[name] for run in arms["ours"].campaigns for name in promised) else 0


if __name__ == "__main__":
    sys.exit(main())
