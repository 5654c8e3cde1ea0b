"""``kempnerforge report``: what a run's time went into, how each attempt ended, how often to save."""

from __future__ import annotations

import time
from typing import Any

import typer

from kempnerforge.checkpoint import lease, timeline
from kempnerforge.cli import ckpt_text as text
from kempnerforge.cli.ckpt_paths import AsJson, RunPath, find_run
from kempnerforge.errors import RunFolderError
from kempnerforge.goodput.accounting import account, saving
from kempnerforge.goodput.history import read_history

app = typer.Typer()

PARTS = {
    "effective": "effective training",
    "lost": "steps that were lost and done again",
    "data": "waiting for data",
    "eval": "validation",
    "checkpoint": "waiting for checkpoints",
    "setup": "set-up and load",
    "rest": "rest: logging, ending",
    "idle": "idle between attempts",
}


@app.command()
def report(run: RunPath, as_json: AsJson = False) -> None:
    """Effective training time of RUN, where the rest went, how attempts ended, how often to save."""
    run_dir = find_run(run).run_dir
    if run_dir is None:
        raise RunFolderError(f"{run} holds steps, but it is not known of which run; give the run's folder")
    cuts = timeline.cuts(run_dir)
    history = read_history(run_dir, rollbacks=[cut.attempt for cut in cuts if cut.is_rollback])
    if not history:
        raise RunFolderError(f"{run_dir} has no ledger yet: no attempt of it got as far as that")
    running = history[-1].end is None and bool(lease.live_holder(run_dir))
    if running:
        history[-1].end = {"kind": "running", "reason": "it is running", "step": None}
    body = account(history, now=time.time(), running=running)
    body["saving"] = saving(history, wall_s=body["wall_s"] - body["parts_s"]["idle"])
    if as_json:
        text.print_json(body)
    else:
        _print(str(run_dir), body)


def _print(run_dir: str, body: dict[str, Any]) -> None:
    wall_s, found = body["wall_s"], body["saving"]
    typer.echo(f"{run_dir}: {100 * body['ettr']:.1f}% of {wall_s:.1f} s were effective training")
    rows = [
        (name, f"{body['parts_s'][key]:.1f} s", _percent(body["parts_s"][key], wall_s))
        for key, name in PARTS.items()
    ]
    text.print_columns(rows, right=(1, 2))
    for one in body["attempts"]:
        where = f"steps {one['began_at']} to {one['last_step']}" if one["began_at"] is not None else "no step"
        lost = f", {one['lost_steps']} lost" if one["lost_steps"] else ""
        typer.echo(
            f"attempt {one['attempt']}: {one['wall_s']:.1f} s, {where}{lost}; {one['kind']}: {one['reason']}"
        )
    for name, timing in found["timings"].items():
        if timing["p50"] is not None:
            typer.echo(f"checkpoint {name}: p50 {timing['p50']:.3f}, p99 {timing['p99']:.3f}")
    low, high = found["mtti_95_s"]
    if found["mtti_s"] is None:
        typer.echo(f"no failure yet; the mean time to interrupt is above {low:.0f} s (95%)")
        return
    typer.echo(f"{found['failures']} failures: one in {found['mtti_s']:.0f} s (95%: {low:.0f} to {high:.0f})")
    if found["daly_s"] is not None:
        typer.echo(f"best interval: Young {found['young_s']:.1f} s, Daly {found['daly_s']:.1f} s")


def _percent(seconds: float, wall_s: float) -> str:
    return f"{100 * seconds / wall_s:.1f}%" if wall_s else "-"
