"""``kempnerforge report A B``: how two runs differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import typer

from kempnerforge.checkpoint.run.lineage import ResumePoint
from kempnerforge.cli import formatting as text
from kempnerforge.cli.run_facts import config_differences, fact_rows, setting
from kempnerforge.goodput.history import AttemptHistory
from kempnerforge.goodput.plot import duration
from kempnerforge.goodput.run_history import METRICS
from kempnerforge.telemetry.curves import Curve, Curves, read_curves

LOSSES = ("train/loss", "eval/loss")
KEYS = (*LOSSES, "train/tokens_per_s")
MAX_STEPS = 12
"""Maximum number of common steps that are shown of each loss."""


@dataclass(frozen=True)
class RunRead:
    """A run as ``report`` reads it."""

    run_dir: Path
    body: dict[str, Any]
    """The object that ``--json`` prints."""
    history: Sequence[AttemptHistory]
    cuts: Sequence[ResumePoint]
    now: float


def compare_runs(runs: Sequence[RunRead], *, as_json: bool) -> None:
    """Print how two runs differ."""
    first, second = runs
    curves = [
        read_curves(run.run_dir / METRICS, KEYS, {cut.attempt: cut.step for cut in run.cuts}) for run in runs
    ]
    body = {
        "runs": [_summary(run, curve) for run, curve in zip(runs, curves, strict=True)],
        "config": config_differences(first.body["run"]["config"] or {}, second.body["run"]["config"] or {}),
        "losses": {
            key: common_steps(curves[0].counting[key], curves[1].counting[key], most=MAX_STEPS)
            for key in LOSSES
        },
    }
    if as_json:
        text.print_json(body)
        return
    _print(runs, body)


def common_steps(first: Curve, second: Curve, *, most: int) -> list[list[float]]:
    """Return step and both values at up to ``most`` steps that both curves have, the last one included."""
    values = dict(zip(second.steps, second.values, strict=True))
    both = [
        [step, value, values[step]]
        for step, value in zip(first.steps, first.values, strict=True)
        if step in values and math.isfinite(value) and math.isfinite(values[step])
    ]
    if len(both) <= most:
        return both
    chosen = {round(number * (len(both) - 1) / (most - 1)) for number in range(most)}
    return [both[index] for index in sorted(chosen)]


def _summary(run: RunRead, curves: Curves) -> dict[str, Any]:
    body = run.body
    speeds = [speed for speed in curves.counting["train/tokens_per_s"].values if math.isfinite(speed)]
    return {
        "run": str(run.run_dir),
        "facts": {name: fact for name, fact in body["run"].items() if name != "config"},
        "last_step": _last_step(body),
        "ettr": body["ettr"],
        "wall_s": body["wall_s"],
        "lost_steps": body["lost_steps"],
        "attempts": len(body["attempts"]),
        "failures": body["saving"]["failures"],
        "tokens_per_s": median(speeds) if speeds else None,
    }


def _last_step(body: Mapping[str, Any]) -> int:
    return body["attempts"][-1]["last_step"] if body["attempts"] else 0


def _print(runs: Sequence[RunRead], body: Mapping[str, Any]) -> None:
    names = [str(run.run_dir) for run in runs]
    facts = [dict(fact_rows(run.body["run"], step=_last_step(run.body))) for run in runs]
    rows = [("", *names)]
    rows += [
        (name, *(one.get(name, "unknown") for one in facts)) for name in dict.fromkeys((*facts[0], *facts[1]))
    ]
    goodput = {
        "effective training": lambda one: f"{100 * one['ettr']:.1f}% of {duration(one['wall_s'])}",
        "lost steps": lambda one: f"{one['lost_steps']:,}",
        "attempts": lambda one: f"{one['attempts']:,}, {text.count(one['failures'], 'failure')}",
        "tokens/s, median": lambda one: f"{one['tokens_per_s']:,.0f}" if one["tokens_per_s"] else "unknown",
    }
    rows += [(name, *map(describe, body["runs"])) for name, describe in goodput.items()]
    text.print_columns(rows)
    if any(run.body["run"]["config"] is None for run in runs):
        typer.echo("\nconfig: a run by an older version, or of a loop of your own, has not recorded it")
    elif body["config"]:
        typer.echo("\nconfig")
        changed = [(key, setting(old), setting(new)) for key, (old, new) in body["config"].items()]
        text.print_columns([(f"  {key}", old, new) for key, old, new in changed])
    else:
        typer.echo("\nconfig: no difference")
    for key, steps in body["losses"].items():
        if not steps:
            typer.echo(f"\n{key}: no common steps")
            continue
        typer.echo(f"\n{key}")
        lines = [
            (f"  step {int(step):,}", f"{old:.4f}", f"{new:.4f}", f"{new - old:+.4f}")
            for step, old, new in steps
        ]
        text.print_columns(lines, right=(0, 1, 2, 3))
