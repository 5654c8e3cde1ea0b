"""The words of ``kempnerforge report``, for the terminal and for its page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import typer

from kempnerforge.cli.formatting import count, print_columns
from kempnerforge.goodput.plot import duration

PARTS = {
    "effective": "effective training",
    "lost": "steps that were lost and done again",
    "data": "waiting for data",
    "eval": "validation",
    "checkpoint": "waiting for checkpoints",
    "setup": "set-up",
    "load": "load",
    "rest": "rest: logging, ending",
    "idle": "idle between attempts",
}
SETUP_PARTS = {
    "launch": "torchrun, Python and its imports",
    "program": "the program, before it resumed",
    "process_groups": "process groups",
    "folder": "run folder and lease",
    "data": "data",
    "model": "model and optimizer",
    "resume": "checkpoint engine, choice of the step",
    "unfinished": "attempts that ended before it did",
}
"""Of the part ``setup``, by the laps of ``resume`` events; other names are shown as they are."""
TIMINGS = {
    "blocking_s": "training waits",
    "write_s": "writing",
    "commit_s": "committing",
    "total_s": "from the step to its commit",
}
INTERVALS = {"interval_s": "measured, median", "young_s": "Young's best", "daly_s": "Daly's best"}

MAX_REASON = 600
"""Characters of a reason that a page shows."""


def print_report(run_dir: str, body: Mapping[str, Any]) -> None:
    """Print what ``--json`` has, for people."""
    wall_s, found = body["wall_s"], body["saving"]
    typer.echo(f"{run_dir}: {100 * body['ettr']:.1f}% of {wall_s:.1f} s were effective training")
    rows = []
    for key, name in PARTS.items():
        rows.append((name, f"{body['parts_s'][key]:.1f} s", percent(body["parts_s"][key], wall_s)))
        if key == "setup":
            rows += [(f"  {part}", f"{each:.1f} s", "") for part, each in setup_rows(body["setup_parts_s"])]
    print_columns(rows, right=(1, 2))
    for one in body["attempts"]:
        typer.echo(f"{attempt_words(one)}; {one['kind']}: {one['reason']}")
    for line in remarks(body):
        typer.echo(line)
    for name, timing in found["timings"].items():
        if timing["p50"] is not None:
            typer.echo(f"checkpoint {name}: p50 {timing['p50']:.3f}, p99 {timing['p99']:.3f}")
    low, high = found["mtti_95_s"]
    if found["mtti_s"] is None:
        typer.echo(f"no failure yet; the mean time to interrupt is above {low:.0f} s (95%)")
    else:
        bounds = f"95%: {low:.0f} to {high:.0f}"
        typer.echo(f"{count(found['failures'], 'failure')}: one in {found['mtti_s']:.0f} s ({bounds})")
    if found["daly_s"] is not None:
        typer.echo(f"best interval: Young {found['young_s']:.1f} s, Daly {found['daly_s']:.1f} s")
    for line in saving_lines(found):
        typer.echo(line)


def remarks(body: Mapping[str, Any]) -> list[str]:
    """What has to be known to read the times."""
    found = []
    if body["refused_starts"]:
        found.append(
            f"{count(body['refused_starts'], 'start')} refused by the config or the guard, not counted"
        )
    if body["clocks_disagree"]:
        found.append("attempts overlap, or their clocks disagree: times are approximate")
    return found


def attempt_words(one: Mapping[str, Any]) -> str:
    """An attempt in words, without its end."""
    where = f"steps {one['began_at']} to {one['last_step']}" if one["began_at"] is not None else "no step"
    lost = f", {one['lost_steps']} lost" if one["lost_steps"] else ""
    return f"attempt {one['attempt']}: {one['wall_s']:.1f} s, {where}{lost}"


def clipped(reason: str) -> str:
    """The beginning of a reason: a fault may have recorded pages."""
    return reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]} …"


def percent(seconds: float, wall_s: float) -> str:
    """A share of the wall time; ``-`` where there is none."""
    return f"{100 * seconds / wall_s:.1f}%" if wall_s else "-"


def setup_rows(setup_parts_s: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """The parts of the set-up with their names, in order."""
    for key in dict.fromkeys((*SETUP_PARTS, *setup_parts_s)):
        if key in setup_parts_s:
            yield SETUP_PARTS.get(key, key), setup_parts_s[key]


def saving_lines(found: Mapping[str, Any]) -> list[str]:
    """What Daly's interval would have saved, or why that cannot be said."""
    expected, measured_s = found["expected"], found["interval_s"]
    if expected is None or measured_s is None:
        lacks = "failure" if found["mtti_s"] is None else "commit that training waited for"
        return [f"There was no {lacks} yet, so what another interval would cost cannot be said."]
    best_s = expected["best_interval_s"]
    whose = "Daly's" if best_s == found["daly_s"] else "the shortest that a save takes, above Daly's"
    lines = [
        f"Expected to first order: with a save every {duration(measured_s)} (measured), "
        f"{100 * expected['overhead']:.1f}% of the time goes into stalls, lost work and restarts; "
        f"with one every {duration(best_s)} ({whose}), {100 * expected['best_overhead']:.1f}%: "
        f"{_difference(expected['saved_s'])}."
    ]
    if max(measured_s, best_s) > found["mtti_s"] / 2:
        lines.append("Failures come about as often as saves, so this is rough.")
    return lines


def _difference(saved_s: float) -> str:
    what = "less" if saved_s >= 0 else "more"
    return f"{duration(abs(saved_s))} {what} over this run"
