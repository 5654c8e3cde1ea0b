"""Rules of ``[checkpoint]``: the requested saves and retention must be possible. See ``rules``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from kempnerforge.config.checkpoint import DIR_PLACEHOLDERS, CheckpointConfig, unknown_placeholder
from kempnerforge.config.evaluation import EvalConfig
from kempnerforge.config.run import PLACEHOLDERS, RunConfig
from kempnerforge.config.suggestions import nearest
from kempnerforge.config.train import TrainConfig
from kempnerforge.errors import ConfigIssue

METRICS = ("eval/loss", "train/loss")
"""Metrics that a training run stores with a checkpoint if they were measured at its step."""

CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def checkpoint_dir_can_be_filled(checkpoint: CheckpointConfig) -> list[ConfigIssue]:
    """Refuse a placeholder that nothing fills: it would silently become part of the folder's name."""
    unknown = unknown_placeholder(checkpoint.dir)
    if not unknown:
        return []
    expanded = " and ".join(f"{{{name}}}" for name in DIR_PLACEHOLDERS)
    elsewhere = "put it into run.dir" if unknown[1:-1] in PLACEHOLDERS else "write the folder out"
    return [ConfigIssue("checkpoint.dir", f"{unknown} is not expanded here", f"{expanded} are; {elsewhere}")]


def paths_are_usable(run: RunConfig, checkpoint: CheckpointConfig) -> list[ConfigIssue]:
    """Refuse URLs and control characters in paths.

    A URL would name a local folder such as ``s3:``. A line break would end a line of a script or a
    log.
    """
    paths = {
        "run.dir": run.dir,
        "checkpoint.dir": checkpoint.dir,
        "checkpoint.load_path": checkpoint.load_path,
    }
    faults = []
    for key, path in paths.items():
        if path and CONTROL_CHARACTER.search(path):
            faults.append(
                ConfigIssue(key, f"{path!r} has a control character", "write it without line breaks and tabs")
            )
        elif path and "://" in path:
            allowed = "checkpoints are on a mounted file system: give a path, not a URL"
            faults.append(ConfigIssue(key, f'"{path}" is a URL', allowed))
    return faults


def saves_happen(checkpoint: CheckpointConfig, train: TrainConfig) -> list[ConfigIssue]:
    """Require at least one save in a run that asks for checkpoints."""
    by_time = checkpoint.interval_minutes is not None or checkpoint.interval == "auto"
    if checkpoint.save_last or checkpoint.save_first or by_time:
        return []
    steps = _scheduled_steps(checkpoint)
    if not steps or min(steps) <= train.max_steps:
        return []
    key = "interval" if checkpoint.interval else "at_steps" if checkpoint.at_steps else "dyn_ckpt_window"
    problem = f"{min(steps)} is more than train.max_steps {train.max_steps}, and save_last is false"
    fits = f"at most {train.max_steps}, or 0 for no checkpoints, or set save_last = true"
    return [ConfigIssue(f"checkpoint.{key}", problem, f"no checkpoint would be written: {fits}")]


def _scheduled_steps(checkpoint: CheckpointConfig) -> list[int]:
    """Return the listed steps, those of the window, and the first step of the interval."""
    steps = [*checkpoint.at_steps, *_window_steps(checkpoint)]
    every = _every(checkpoint)
    return [*steps, every] if every else steps


def _every(checkpoint: CheckpointConfig) -> int:
    """Return the steps between saves; 0 without saves by step count."""
    return 0 if checkpoint.interval == "auto" else checkpoint.interval


def _window_steps(checkpoint: CheckpointConfig) -> list[int]:
    window = checkpoint.dyn_ckpt_window
    if window is None:
        return []
    powers = (1 << exponent for exponent in range(window.stop.bit_length()))
    return [step for step in powers if window.start <= step <= window.stop]


def dynamics_window_holds_steps(checkpoint: CheckpointConfig) -> list[ConfigIssue]:
    """Require a power of two in the window of early saves."""
    window = checkpoint.dyn_ckpt_window
    if window is None or _window_steps(checkpoint):
        return []
    problem = f"{window.stop}: no power of two lies between start {window.start} and stop {window.stop}"
    fits = f"{1 << (window.start - 1).bit_length()} or more would fit"
    return [ConfigIssue("checkpoint.dyn_ckpt_window.stop", problem, fits)]


def milestones_are_saved(checkpoint: CheckpointConfig, train: TrainConfig) -> list[ConfigIssue]:
    """Require a save at each milestone within the run."""
    interval, saved = _every(checkpoint), {*checkpoint.at_steps, *_window_steps(checkpoint)}
    if checkpoint.save_first:
        saved.add(0)
    if checkpoint.save_last:
        saved.add(train.max_steps)
    missed = [
        step
        for step in checkpoint.keep_steps
        if step <= train.max_steps and step not in saved and not (interval and step and step % interval == 0)
    ]
    if not missed:
        return []
    steps = ", ".join(map(str, missed))
    how = "set save_first = true" if missed == [0] else f"add {steps} to at_steps"
    return [ConfigIssue("checkpoint.keep_steps", f"no setting saves {steps}", how)]


def interval_settings_have_saves(checkpoint: CheckpointConfig) -> list[ConfigIssue]:
    """Refuse settings of automatic intervals and of the overhead bound that have no saves to act on."""
    faults = []
    hours, percent = checkpoint.expected_mtti_hours, checkpoint.max_overhead_pct
    if hours is not None and checkpoint.interval != "auto":
        problem = f'{hours:g} has no effect unless checkpoint.interval is "auto"'
        faults.append(ConfigIssue("checkpoint.expected_mtti_hours", problem, "leave it out"))
    if percent is not None and checkpoint.interval == 0 and checkpoint.interval_minutes is None:
        problem = f"{percent:g} has no effect: interval is 0 and interval_minutes is not set"
        faults.append(ConfigIssue("checkpoint.max_overhead_pct", problem, "set one of them, or leave it out"))
    return faults


def best_goes_by_a_metric(checkpoint: CheckpointConfig, eval: EvalConfig) -> list[ConfigIssue]:
    """Require a metric for ``keep_best_n`` that this run measures."""
    count, metric = checkpoint.keep_best_n, checkpoint.best_metric
    if count is None:
        return [
            ConfigIssue(
                f"checkpoint.{key}", f'"{value}" has no effect without keep_best_n', "set keep_best_n too"
            )
            for key, value, unset in (
                ("best_metric", metric, None),
                ("best_mode", checkpoint.best_mode, "min"),
            )
            if value != unset
        ]
    if metric is None:
        problem = f"{count} needs a metric, and best_metric is not set"
        return [ConfigIssue("checkpoint.keep_best_n", problem, 'set best_metric, such as "eval/loss"')]
    if metric not in METRICS:
        close = nearest(metric, list(METRICS))
        listed = " | ".join(f'"{name}"' for name in METRICS)
        hint = f'did you mean "{close}"? allowed: {listed}' if close else f"allowed: {listed}"
        return [ConfigIssue("checkpoint.best_metric", f'"{metric}" is not a metric of checkpoints', hint)]
    if metric.startswith("eval/") and eval.interval == 0:
        problem = f'"{metric}" is never measured: eval.interval is 0'
        return [
            ConfigIssue("checkpoint.best_metric", problem, "set eval.interval, or choose a train/ metric")
        ]
    return []


def why_best_has_no_choice(checkpoint: CheckpointConfig, eval: EvalConfig, train: TrainConfig) -> str:
    """Explain why ``keep_best_n`` has nothing to choose from; empty if it has.

    This is the case when no step before the last is both saved and validated. It is a warning, not
    an error, because with ``save_last`` the last step is both. Saves by time can happen at any
    step.
    """
    by_time = checkpoint.interval_minutes is not None or checkpoint.interval == "auto"
    metric, every = checkpoint.best_metric or "", _every(checkpoint)
    if checkpoint.keep_best_n is None or by_time or not metric.startswith("eval/"):
        return ""
    steps = [
        *checkpoint.at_steps,
        *_window_steps(checkpoint),
        *([math.lcm(every, eval.interval)] if every else []),
    ]
    if any(0 < step < train.max_steps and step % eval.interval == 0 for step in steps):
        return ""
    return (
        f"no step before the last is both saved and validated (checkpoint.interval {every}, eval.interval "
        f"{eval.interval}): make one a multiple of the other"
    )


def exclusions_have_a_source(checkpoint: CheckpointConfig) -> list[ConfigIssue]:
    """Refuse ``exclude_from_loading`` without a warm start, except for extras."""
    parts = [name for name in checkpoint.exclude_from_loading if not name.startswith("extra.")]
    if not parts or checkpoint.load_path is not None:
        return []
    problem = f"{parts[0]} has no effect without checkpoint.load_path: a resume always loads it"
    return [ConfigIssue("checkpoint.exclude_from_loading", problem, "set load_path, or leave it out")]


RULES: tuple[Callable[..., list[ConfigIssue]], ...] = (
    checkpoint_dir_can_be_filled,
    paths_are_usable,
    saves_happen,
    dynamics_window_holds_steps,
    milestones_are_saved,
    interval_settings_have_saves,
    best_goes_by_a_metric,
    exclusions_have_a_source,
)
