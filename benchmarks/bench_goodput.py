"""What kills cost: ours against a plain loop that saves blocking, both killed at the same seeded times.

    python benchmarks/bench_goodput.py --size cpu --json goodput.json

Not under torchrun: it starts the jobs itself, one after the other. First each arm once undisturbed, which
gives its ideal time, what a save costs it, and the losses that every killed run must repeat. Then, for each
seed, each arm from its first step to its last through SIGKILLs of all its processes at once, a Poisson
process in the time that the job is up; after each, a pause of ``--delay-s`` and the same command again.

  ours        scripts/train.py, async_with_pinned_mem, saves as ``--interval`` says
  reference   benchmarks/bench/reference_loop.py: FSDP2 and stock ``dcp.save``, for which the loop waits, as
              ``--reference-interval`` says

``daly`` is Daly's interval for the arm's own measured cost of a save: for the reference, about the best that
a fixed interval can do. ``effective`` is ideal time / wall time; the parts, of goodput_arithmetic.py, sum to
the wall time. Exit status 1: ours lost a committed step, or a loss has not the bits of the undisturbed run.
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
"""How far a campaign's steps may be from the undisturbed ones for its ideal time to mean something."""
PROJECTED_SCALES = (1.0, 40.0)
"""Bytes a rank, of those saved here."""
PROJECTED_MTTI_H = (1.0, 3.0, 24.0)
PROJECTED_RESTART_S = 300.0


def kill_gaps(seed: int, mtti_s: float, max_kills: int) -> Iterator[float]:
    """Seconds from each launch to the kill; without end if ``max_kills`` is 0."""
    drawn = random.Random(seed)
    numbers = range(max_kills) if max_kills else itertools.count()
    return (drawn.expovariate(1 / mtti_s) for _ in numbers)


def campaign(arm: Arm, seed: int, folder: Path, given: argparse.Namespace) -> pairs.Measured:
    """One arm through the kills of one seed."""
    job = arm.job(folder, given, arm.interval)
    gaps = kill_gaps(seed, given.mtti_s, given.max_kills)
    attempts = run_to_end(job, gaps, delay_s=given.delay_s)
    parts = arithmetic.parts_of(attempts, step_s=arm.cost.step_s)
    wall_s = attempts[-1].ended - attempts[0].launched
    kills_s = [one.killed_after_s for one in attempts if one.killed_after_s is not None]
    planned_s = list(itertools.islice(kill_gaps(seed, given.mtti_s, given.max_kills), len(kills_s)))
    saved = [[save["step"] for save in one.saves] for one in attempts]
    apart = [after - before for steps in saved for before, after in itertools.pairwise(steps)]
    clean_s = [seconds for one in attempts for seconds in arithmetic.clean_steps_s(one)]
    told: dict[str, Any] = {
        "seed": seed,
        "clean_step_s": statistics.fmean(clean_s) if clean_s else None,
        "planned_kills_s": planned_s,
        "killed_after_s": kills_s,
        "saved_steps": saved,
        "interval_steps": statistics.median(apart) if apart else daly_steps(arm.cost, given.mtti_s),
        "wrong_losses": arithmetic.wrong_losses(attempts, arm.undisturbed),
        "differing_shards": differing_shards(arm, folder, given.steps),
        "lost_committed_steps": arithmetic.lost_committed_steps(attempts),
        "attempts": [asdict(one) for one in attempts],
    }
    measured = {
        "effective": arm.ideal_s / wall_s,
        "wall_s": wall_s,
        "kills": float(len(kills_s)),
        "lost_steps": float(arithmetic.lost_steps(attempts)),
        **{f"{name}_s": seconds for name, seconds in parts.items()},
    }
    if arm.name == "ours":
        told["ledger"] = ledger(folder, wall_s)
    arm.campaigns.append({**told, **measured})
    same = not (told["wrong_losses"] or told["differing_shards"])
    print(
        f"seed {seed}, {arm.name}: {len(kills_s)} kills, {wall_s:.1f} s, "
        f"effective {measured['effective']:.1%}, {measured['lost_steps']:.0f} "
        f"steps lost, {told['lost_committed_steps']} of them committed; "
        f"losses{' and last checkpoint' if arm.name == 'ours' else ''} {'' if same else 'NOT '}bitwise those "
        "of the undisturbed run",
        flush=True,
    )
    shutil.rmtree(folder)
    return measured


def drift(arm: Arm) -> float:
    """How far, as a share, steps without a save beside them were from undisturbed ones, at worst."""
    found = [one["clean_step_s"] for one in arm.campaigns if one["clean_step_s"] is not None]
    return max((abs(step_s / arm.cost.step_s - 1) for step_s in found), default=0.0)


def differing_shards(arm: Arm, folder: Path, steps: int) -> list[str]:
    """Files of our last checkpoint that have not the bytes of the undisturbed run's."""
    undisturbed = folder.with_name(f"{arm.name}-undisturbed")
    return differing_files(folder, undisturbed, steps) if arm.name == "ours" else []


def predictions(arm: Arm, given: argparse.Namespace) -> dict[str, float]:
    """Effective ratios by the model, from the undisturbed run and the interval that was kept to."""
    steps = statistics.median(one["interval_steps"] for one in arm.campaigns)
    rates = {"mtti_s": given.mtti_s, "delay_s": given.delay_s}
    interval_s = steps * arm.cost.step_s
    return {
        "interval_s": interval_s,
        "first_order": arithmetic.first_order_ratio(arm.cost, interval_s=interval_s, **rates),
        "exponential": arithmetic.exponential_ratio(arm.cost, interval_s=interval_s, **rates),
    }


def project(arms: dict[str, Arm]) -> list[dict[str, float]]:
    """What the model makes of the measured costs where failures are rarer and restarts longer."""
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
    """The tables, for people, and the file."""
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
        tell_model(arm, predicted[name])
    tell_ledger(arms["ours"])
    projected = project(arms)
    print(
        "computed, not measured: a save costs and lags as here, times the scale; restarts take "
        f"{PROJECTED_RESTART_S:.0f} s; saves at Daly's interval"
    )
    for row in projected:
        told = ", ".join(f"{name} {row[name]:.2%}" for name in arms)
        print(f"  scale {row['scale']:.0f}, a failure every {row['mtti_h']:g} h: {told} effective")
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


def tell_model(arm: Arm, predicted: dict[str, float]) -> None:
    """What an arm costs, and what the model says of that."""
    cost, kills = arm.cost, sum(one["kills"] for one in arm.campaigns)
    print(
        f"{arm.name}: {kills:.0f} kills; step {cost.step_s:.4f} s, a save costs {cost.stall_s:.3f} s (blocks "
        f"{cost.blocking_s:.3f} s, durable {cost.lag_s:.3f} s later), restart {cost.restart_s:.2f} s, "
        f"saved every {predicted['interval_s']:.2f} s; the model predicts {predicted['exponential']:.1%} "
        f"effective, in first order {predicted['first_order']:.1%}"
    )
    if drift(arm) > STEADY:
        print(
            f"{arm.name}: THE MACHINE WAS NOT STEADY: steps without a save beside them took up to "
            f"{drift(arm):.0%} more or less than undisturbed. Trust wall_s, whose arms alternate, "
            "and not effective"
        )


def tell_ledger(arm: Arm) -> None:
    """What ``kempnerforge report`` says beside what was seen from outside."""
    for one in arm.campaigns:
        said = one["ledger"]
        print(
            f"seed {one['seed']}: the ledger says {said['lost_steps']} lost steps, "
            f"seen {one['lost_steps']:.0f}; restarts and pauses {said['restart_and_delay_s']:.1f} s, "
            f"seen {one['restart_s'] + one['delay_s']:.1f} s; it does not know of {said['unseen_s']:.1f} s"
        )


def main() -> int:
    """Measure and print."""
    given = parse(__doc__, SIZES)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    arms = {"ours": Arm("ours", given.interval), "reference": Arm("reference", given.reference_interval)}
    with tempfile.TemporaryDirectory(dir=given.dir or Path.cwd(), prefix="bench-") as name:
        folder = Path(name)
        given.config = prepare_inputs(folder, given)
        print(machine.tell(machine.facts(folder)), flush=True)
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
    return 1 if any(one[name] for one in arms["ours"].campaigns for name in promised) else 0


if __name__ == "__main__":
    sys.exit(main())
