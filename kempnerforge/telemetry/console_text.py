"""Format rows as readable lines. The functions use neither a terminal nor a clock."""

from __future__ import annotations

import math

from kempnerforge.telemetry.sinks import Row


def train_fields(row: Row, eta_s: float | None) -> list[str]:
    """Return the fields that follow the step in a training line, for the metrics that the row has.

    Args:
        row: may have ``train/loss``, ``train/grad_norm``, ``train/lr``, ``train/tokens_per_s`` and
            ``train/mfu``.
        eta_s: seconds until the last step; None if unknown.
    """
    formats = (
        ("train/loss", lambda value: f"loss {value:.4f}"),
        ("train/grad_norm", lambda value: f"grad_norm {_short(value)}"),
        ("train/lr", lambda value: f"lr {value:.1e}"),
        ("train/tokens_per_s", lambda value: f"{si(value)} tok/s"),
        ("train/mfu", lambda value: f"mfu {100 * value:.1f}%"),
    )
    fields = [form(row[key]) for key, form in formats if row.get(key) is not None]
    if eta_s is not None:
        fields.append(f"eta {duration(eta_s)}")
    return fields


def eval_line(row: Row) -> str:
    """Return a line such as ``eval  step 150  loss 2.4100``."""
    return f"eval  step {row['step']}  loss {row['eval/loss']:.4f}"


def commit_line(row: Row) -> str:
    """Return a line for a commit.

    ``checkpoint step 150 committed: 12.4 MB in 0.08 s (write 0.05 s, commit 0.02 s), blocked 0.08 s``
    """
    step = row.get("checkpoint/step", row["step"])
    parts = [f"{part} {seconds(row[key])}" for part in ("write", "commit") if (key := _timing(part)) in row]
    size = si_bytes(row["checkpoint/size_bytes"]) if "checkpoint/size_bytes" in row else ""
    if (written := row.get("checkpoint/written_bytes", math.inf)) < row.get("checkpoint/size_bytes", 0):
        size += f" ({si_bytes(written)} written)"
    total = f"in {seconds(row[_timing('total')])}" if _timing("total") in row else ""
    detail = f"({', '.join(parts)})" if parts else ""
    text = " ".join(part for part in (size, total, detail) if part)
    blocked = f", blocked {seconds(row[_timing('blocking')])}" if _timing("blocking") in row else ""
    return f"checkpoint step {step} committed: {text}{blocked}"


def is_non_finite(row: Row) -> bool:
    """Return whether the step's loss or gradient norm is not finite."""
    return any(not math.isfinite(row.get(key, 0.0)) for key in ("train/loss", "train/grad_norm"))


def si(value: float) -> str:
    """Return a number with a decimal prefix: ``950``, ``41.2k``, ``1.8M``."""
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{prefix}"
    return f"{value:.0f}"


def si_bytes(size_bytes: float) -> str:
    """Return a size with a decimal unit: ``812 B``, ``12.4 MB``, ``1.8 GB``."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size_bytes >= limit:
            return f"{size_bytes / limit:.1f} {unit}"
    return f"{size_bytes:.0f} B"


def seconds(value_s: float) -> str:
    """Return ``0.08 s`` or ``12.3 s``; from two minutes on, the result of ``duration``."""
    if value_s >= 120:
        return duration(value_s)
    return f"{value_s:.1f} s" if value_s >= 10 else f"{value_s:.2f} s"


def duration(value_s: float) -> str:
    """Return ``00:41``, ``1:02:03`` or ``2d 03:04:05``."""
    minutes, second = divmod(round(value_s), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    if hours:
        return f"{hour}:{minute:02}:{second:02}"
    return f"{minute:02}:{second:02}"


def _timing(part: str) -> str:
    return f"checkpoint/{part}_s"


def _short(value: float) -> str:
    return f"{value:.1e}" if value and not 0.01 <= abs(value) < 1e4 else f"{value:.2f}"
