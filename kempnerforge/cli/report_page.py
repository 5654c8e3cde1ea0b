"""The page of ``kempnerforge report --html``: one file without scripts that needs no network.

Text from a run, such as an error message, is arbitrary: all of it is escaped. In addition, a
content security policy forbids the page to load anything.
"""

from __future__ import annotations

import importlib.resources
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from kempnerforge import __version__
from kempnerforge.cli import report_text
from kempnerforge.cli.formatting import count
from kempnerforge.cli.report_figures import loss_figure, metric_figure, mfu_figure, throughput_figure
from kempnerforge.cli.report_saving import saving_section
from kempnerforge.cli.report_table import row, table
from kempnerforge.cli.report_timeline import Commit, end_sign, timeline_figure
from kempnerforge.cli.run_facts import fact_rows, setting
from kempnerforge.goodput.plot import duration
from kempnerforge.telemetry.curves import Curves

MAX_ATTEMPTS = 200
"""Maximum number of rows in the table of attempts. The page says how many older ones are omitted."""
KEYS = ("train/loss", "eval/loss", "train/tokens_per_s", "train/lr", "train/grad_norm", "train/mfu")
"""Metrics that the page reads from ``metrics.jsonl``."""


@dataclass(frozen=True)
class Report:
    """The data of a report."""

    run_dir: str
    body: Mapping[str, Any]
    """The object that ``--json`` prints."""
    curves: Curves
    commits: Sequence[Commit]
    now: float
    """Time of the report in seconds since the epoch."""


def page(report: Report) -> bytes:
    """Return the page in UTF-8. Its size is at most about 1 MB, however long the run is."""
    body = report.body
    name = escape(report.run_dir.rstrip("/").rpartition("/")[2] or report.run_dir)
    style = importlib.resources.files("kempnerforge.cli").joinpath("report.css").read_text()
    created = f"{_utc(report.now)}, kempnerforge {escape(__version__)}"
    text = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name}: report</title>
<style>
{style}</style>
</head>
<body>
<header><p class="eyebrow">Report of a training run</p><h1>{name}</h1>
<p class="words">{escape(report.run_dir)} · created {created}</p></header>
<main>
{_cards(body)}
{_facts(body)}
{timeline_figure(body["attempts"], report.commits, wall_s=body["span_s"])}
{loss_figure(report.curves)}
{throughput_figure(report.curves)}
<div class="pair">
{metric_figure(report.curves, "train/lr", "Learning rate", "learning rate")}
{metric_figure(report.curves, "train/grad_norm", "Gradient norm", "gradient norm")}
</div>
{mfu_figure(report.curves)}
<div class="pair">
{_parts(body)}
{saving_section(body["saving"])}
</div>
{_attempts(body["attempts"])}
</main>
</body>
</html>
"""
    return text.encode(errors="replace")


def _utc(then: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(then))


def _cards(body: Mapping[str, Any]) -> str:
    attempts, saving = body["attempts"], body["saving"]
    done = sum(attempt["last_step"] - (attempt["began_at"] or 0) for attempt in attempts)
    lost = f"of {count(done, 'completed step')}" if done else "no completed step yet"
    low, high = saving["mtti_95_s"]
    rate, bounds = "none yet", f"mean time to interruption above {duration(low)} (95%)"
    if saving["mtti_s"] is not None:
        rate = f"1 in {duration(saving['mtti_s'])}"
        bounds = f"{count(saving['failures'], 'failure')}; 95%: {duration(low)} to {duration(high)}"
    ended = f"newest attempt: {end_sign(attempts[-1]['kind'])}" if attempts else ""
    cards = (
        ("Effective training time", f"{100 * body['ettr']:.1f}%", f"of {duration(body['wall_s'])} wall time"),
        ("Lost steps", f"{body['lost_steps']:,}", lost),
        ("Restarts", f"{max(0, len(attempts) - 1):,}", ended),
        ("Failure rate", rate, bounds),
    )
    tiles = "".join(
        f'<div class="card tile"><dt>{name}</dt><dd><strong>{value}</strong><span>{note}</span></dd></div>'
        for name, value, note in cards
    )
    return f'<dl class="cards">{tiles}</dl>'


def _facts(body: Mapping[str, Any]) -> str:
    """Return what the run is: model, devices, code, progress, and its config, which opens on a click."""
    facts, attempts = body["run"], body["attempts"]
    known = fact_rows(facts, step=attempts[-1]["last_step"] if attempts else 0)
    items = "".join(f"<div><dt>{name}</dt><dd>{escape(fact)}</dd></div>" for name, fact in known)
    config = ""
    if facts["config"]:
        rows = [row(escape(str(key)), escape(setting(content))) for key, content in facts["config"].items()]
        config = (
            "<details><summary>Config of the newest attempt</summary>"
            f"{table(('key', 'value'), rows)}</details>"
        )
    return f'<section id="run" class="card"><h2>Run</h2><dl class="facts">{items}</dl>{config}</section>'


def _parts(body: Mapping[str, Any]) -> str:
    wall_s = body["wall_s"]
    bars, rows = [], []
    for key, name in report_text.PARTS.items():
        seconds = body["parts_s"][key]
        share = report_text.percent(seconds, wall_s)
        if wall_s and seconds > 0:
            width = 100 * seconds / wall_s
            bars.append(f'<i class="bar c-{key}" style="width:{width:.3f}%" title="{name}: {share}"></i>')
        rows.append(row(f'<i class="key c-{key}"></i>{name}', duration(max(0.0, seconds)), share))
        if key == "setup":
            rows += [
                row(f'<span class="sub">{escape(part)}</span>', duration(max(0.0, part_s)), "", css="minor")
                for part, part_s in report_text.setup_rows(body["setup_parts_s"])
            ]
    rows.append(row("wall time", duration(wall_s), "100.0%" if wall_s else "-", css="sum"))
    return (
        '<section id="parts" class="card"><h2>Time breakdown</h2>'
        f'<div class="stack" aria-hidden="true">{"".join(bars)}</div>'
        f"{table(('part', 'time', 'share'), rows)}</section>"
    )


def _attempts(attempts: Sequence[Mapping[str, Any]]) -> str:
    heads = ("attempt", "started", "duration", "steps", "lost", "end", "reason", "changed")
    rows = []
    for attempt in attempts[-MAX_ATTEMPTS:]:
        began_at, last_step = attempt["began_at"], attempt["last_step"]
        steps = f"{began_at:,} to {last_step:,}" if began_at is not None else "none"
        cells = (
            str(attempt["attempt"]),
            _utc(attempt["started"]),
            duration(attempt["wall_s"]),
            steps,
            f"{attempt['lost_steps']:,}",
            end_sign(attempt["kind"]),
            escape(report_text.clipped(report_text.reason_of(attempt))),
            "<br>".join(escape(report_text.clipped(line)) for line in attempt["changes"]),
        )
        rows.append(row(*cells, heads=heads))
    older = len(attempts) - len(rows)
    note = f"{count(older, 'older attempt')} omitted; kempnerforge report --json has all."
    return (
        '<section id="attempts" class="card"><h2>Attempts</h2>'
        + (f'<p class="words">{note}</p>' if older else "")
        + table(heads, rows)
        + "</section>"
    )
