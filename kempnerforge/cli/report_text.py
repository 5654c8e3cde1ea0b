"""The text of ``kempnerforge report``, for the terminal and the HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import typer

from kempnerforge.cli.formatting import count, print_columns
from kempnerforge.cli.run_facts import fact_rows
from kempnerforge.goodput.plot import duration

PARTS = {
    "effective": "effective training",
    "lost": "lost steps, repeated or rolled back",
    "data": "waiting for data",
    "eval": "validation",
    "checkpoint": "waiting for checkpoints",
    "setup": "setup",
    "load": "loading a checkpoint",
    "rest": "other: logging, shutdown",
    "idle": "idle between attempts",
}
SETUP_PARTS = {
    "launch": "launcher, Python and its imports",
    "program": "the program, before it resumed",
    "process_groups": "process groups",
    "folder": "run folder and lease",
    "data": "data",
    "model": "model and optimizer",
    "resume": "checkpoint engine, selection of the step",
    "unfinished": "attempts that ended during setup",
}
"""Phases of ``setup``, by the names in ``resume`` events. Other names are shown unchanged."""
TIMINGS = {
    "blocking_s": "training waits",
    "write_s": "writing",
    "commit_s": "committing",
    "total_s": "from the step to its commit",
}
INTERVALS = {"interval_s": "measured, median", "young_s": "best by Young", "daly_s": "best by Daly"}

MAX_REASON = 600
"""Maximum number of characters of a reason on the page."""


def print_report(run_dir: str, body: Mapping[str, Any]) -> None:
    """Print the report as text. ``body`` is the object that ``--json`` prints."""
    wall_s, saving = body["wall_s"], body["saving"]
    typer.echo(run_dir)
    steps = body["attempts"][-1]["last_step"] if body["attempts"] else 0
    print_columns([(f"  {name}", fact) for name, fact in fact_rows(body["run"], step=steps)])
    typer.echo(f"{100 * body['ettr']:.1f}% of {wall_s:.1f} s were effective training")
    rows = []
    for key, name in PARTS.items():
        rows.append((name, f"{body['parts_s'][key]:.1f} s", percent(body["parts_s"][key], wall_s)))
        if key == "setup":
            rows += [
                (f"  {part}", f"{part_s:.1f} s", "") for part, part_s in setup_rows(body["setup_parts_s"])
            ]
    print_columns(rows, right=(1, 2))
    for attempt in body["attempts"]:
        typer.echo(f"{attempt_words(attempt)}; {attempt['kind']}: {reason_of(attempt)}")
        for line in attempt["changes"]:
            typer.echo(f"  changed {line}")
    for line in remarks(body):
        typer.echo(line)
    for name, timing in saving["timings"].items():
        if timing["p50"] is not None:
            typer.echo(f"checkpoint {name}: p50 {timing['p50']:.3f}, p99 {timing['p99']:.3f}")
    low, high = saving["mtti_95_s"]
    if saving["mtti_s"] is None:
        typer.echo(f"no failure yet; the mean time to interruption is above {low:.0f} s (95%)")
    else:
        bounds = f"95%: {low:.0f} to {high:.0f}"
        typer.echo(f"{count(saving['failures'], 'failure')}: one in {saving['mtti_s']:.0f} s ({bounds})")
    if saving["daly_s"] is not None:
        typer.echo(f"best interval: Young {saving['young_s']:.1f} s, Daly {saving['daly_s']:.1f} s")
    for line in saving_lines(saving):
        typer.echo(line)


def remarks(body: Mapping[str, Any]) -> list[str]:
    """Return caveats for reading the times."""
    caveats = []
    if body["refused_starts"]:
        refused = count(body["refused_starts"], "start")
        caveats.append(f"not counted: {refused} refused by the config or the crash-loop guard")
    if body["clocks_disagree"]:
        caveats.append("attempts overlap, or their clocks disagree: times are approximate")
    return caveats


def attempt_words(attempt: Mapping[str, Any]) -> str:
    """Describe an attempt, without its end."""
    began_at, last_step = attempt["began_at"], attempt["last_step"]
    steps = f"steps {began_at} to {last_step}" if began_at is not None else "no step"
    lost = f", {attempt['lost_steps']} lost" if attempt["lost_steps"] else ""
    return f"attempt {attempt['attempt']}: {attempt['wall_s']:.1f} s, {steps}{lost}"


def reason_of(attempt: Mapping[str, Any]) -> str:
    """Return why an attempt ended, without the kind of its end at the beginning of many reasons."""
    reason = str(attempt["reason"])
    return reason.removeprefix(attempt["kind"]).lstrip(" :,") or reason


def clipped(reason: str) -> str:
    """Truncate a reason: the message of a fault can be pages long."""
    return reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]} …"


def percent(seconds: float, wall_s: float) -> str:
    """Return a share of the wall time; ``-`` if the wall time is 0."""
    return f"{100 * seconds / wall_s:.1f}%" if wall_s else "-"


def setup_rows(setup_parts_s: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Yield the phases of the setup with their names, in order."""
    for key in dict.fromkeys((*SETUP_PARTS, *setup_parts_s)):
        if key in setup_parts_s:
            yield SETUP_PARTS.get(key, key), setup_parts_s[key]


def saving_lines(saving: Mapping[str, Any]) -> list[str]:
    """Describe what Daly's interval would have saved, or why that is unknown."""
    expected, measured_s = saving["expected"], saving["interval_s"]
    if expected is None or measured_s is None:
        missing = "failure" if saving["mtti_s"] is None else "commit that training waited for"
        return [f"There was no {missing} yet, so the cost of other intervals cannot be estimated."]
    best_s = expected["best_interval_s"]
    whose = "Daly's" if best_s == saving["daly_s"] else "the duration of a save, longer than Daly's"
    lines = [
        f"First-order estimate: with a save every {duration(measured_s)} (measured), "
        f"{100 * expected['overhead']:.1f}% of the time is spent on stalls, lost work and restarts; "
        f"with one every {duration(best_s)} ({whose}), {100 * expected['best_overhead']:.1f}%: "
        f"{_difference(expected['saved_s'])}."
    ]
    if max(measured_s, best_s) > saving["mtti_s"] / 2:
        lines.append("Failures are about as frequent as saves, so this is a rough estimate.")
    return lines


def _difference(saved_s: float) -> str:
    what = "less" if saved_s >= 0 else "more"
    return f"{duration(abs(saved_s))} {what} over this run"
