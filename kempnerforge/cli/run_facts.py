"""What a run is, by its ledger and receipts: model, devices, code, config, and what each attempt changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kempnerforge.cli.formatting import count, value
from kempnerforge.goodput.history import AttemptHistory
from kempnerforge.telemetry.console_text import si
from kempnerforge.telemetry.jsonl import decode_value

LAST = {"train/lr": "lr", "train/grad_norm": "grad_norm", "train/mfu": "mfu", "train/tokens": "tokens"}
"""Metric -> the name of its last value that counts."""


def run_facts(history: Sequence[AttemptHistory], rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the facts of the newest attempt that recorded them, and the last values of its metrics.

    A fact is None if no attempt recorded it: attempts of older versions, and of loops of one's own.
    ``rows`` is the result of ``last_rows`` for ``LAST``.
    """
    facts: dict[str, Any] = dict.fromkeys(("parameters", "device", "version", "git", "config", "layout"))
    facts |= {"hosts": [], "train_samples": None}
    for attempt in history:
        for event in (attempt.start, attempt.resume):
            facts |= {name: event[name] for name in facts if event and event.get(name)}
    for metric, name in LAST.items():
        number = decode_value(rows[metric][metric]) if metric in rows else None
        facts[name] = number if isinstance(number, int | float) else None
    config = facts["config"] or {}
    facts["max_steps"], seq_len = config.get("train.max_steps"), config.get("train.seq_len")
    samples = facts["train_samples"]
    seen = facts["tokens"] / seq_len if facts["tokens"] and seq_len else None
    facts["epochs"] = seen / samples if seen is not None and samples else None
    return facts


def attempt_changes(
    history: Sequence[AttemptHistory], receipts: Sequence[Mapping[str, Any]]
) -> dict[int, list[str]]:
    """Return what each attempt changed against the one before it, as ``key: old -> new``.

    Attempts of older versions recorded no config: their receipts have what differs from the checkpoint.
    """
    by_receipt = {row["attempt"]: row.get("config_changes") for row in receipts}
    changes: dict[int, list[str]] = {}
    before: dict[str, Any] = {}
    for attempt in history:
        now = attempt.start or {}
        changes[attempt.number] = _differences(before, now) if before else []
        if not now.get("config") and isinstance(differing := by_receipt.get(attempt.number), dict):
            changes[attempt.number] += [_change(key, *pair) for key, pair in differing.items()]
        before = now or before
    return changes


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the keys whose values differ -> both values; None where a key is missing."""
    keys = dict.fromkeys((*old, *new))
    return {key: [old.get(key), new.get(key)] for key in keys if old.get(key) != new.get(key)}


def code_words(git: Mapping[str, Any] | None) -> str:
    """Return the commit of the code, shortened, and whether files differed from it."""
    if not git:
        return "not in a git repository"
    return f"{str(git.get('commit'))[:12]}{' with uncommitted changes' if git.get('dirty') else ''}"


def fact_rows(facts: Mapping[str, Any], *, step: int) -> list[tuple[str, str]]:
    """Return the facts as names and text. What is not known is left out."""
    rows: list[tuple[str, str]] = []
    if facts["parameters"]:
        rows.append(("model", f"{si(facts['parameters'])} parameters"))
    layout, hosts = facts["layout"] or {}, sorted(set(facts["hosts"]))
    if layout:
        where = f" on {', '.join(hosts[:4])}{' and more' if len(hosts) > 4 else ''}" if hosts else ""
        rows.append(("devices", f"{layout.get('num_ranks')} x {facts['device'] or 'rank'}{where}"))
        sizes = [f"{name} {size}" for name, size in layout.items() if name != "num_ranks"]
        rows += [("layout", " x ".join(sizes))] if sizes else []
    if facts["config"] is not None:
        rows.append(("code", code_words(facts["git"])))
    if facts["version"]:
        rows.append(("kempnerforge", str(facts["version"])))
    last = facts["max_steps"]
    rows.append(("steps", f"{step:,} of {last:,}" if last else f"{step:,}"))
    if facts["tokens"]:
        epochs = f", {facts['epochs']:.3g} epochs" if facts["epochs"] else ""
        rows.append(("tokens", f"{si(facts['tokens'])}{epochs}"))
    if facts["lr"] is not None:
        rows.append(("learning rate", f"{facts['lr']:.3g}"))
    if facts["grad_norm"] is not None:
        rows.append(("gradient norm", f"{facts['grad_norm']:.3g}"))
    if facts["mfu"] is not None:
        rows.append(("MFU", f"{100 * facts['mfu']:.1f}%"))
    return rows


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    lines = []
    if old.get("config") and new.get("config"):
        lines += [
            _change(key, *pair) for key, pair in config_differences(old["config"], new["config"]).items()
        ]
    for name in ("layout", "device", "version"):
        if old.get(name) and new.get(name) and old[name] != new[name]:
            lines.append(_change(name, old[name], new[name]))
    if "git" in old and "git" in new and old["git"] != new["git"]:
        lines.append(f"code: {code_words(old['git'])} -> {code_words(new['git'])}")
    if (before := sorted(set(old.get("hosts", ())))) != (after := sorted(set(new.get("hosts", ())))):
        lines.append(f"hosts: {_few(before)} -> {_few(after)}")
    return lines


def _few(hosts: Sequence[str]) -> str:
    return ", ".join(hosts) if len(hosts) <= 4 else count(len(hosts), "host")


def _change(key: str, old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [f"{name} {was} -> {now}" for name, (was, now) in config_differences(old, new).items()]
        return f"{key}: {', '.join(parts)}"
    return f"{key}: {setting(old)} -> {setting(new)}"


def setting(content: Any) -> str:
    """Return a value of a config on one line."""
    return "none" if content is None else value(content)
