"""``[checkpoint]``: when and how to save, what to keep, what to start from."""

from __future__ import annotations

import re
from enum import Enum
from typing import Annotated, Literal

from pydantic import Field

from kempnerforge.config.section import AtLeastOne, AtLeastZero, NonEmpty, Positive, Section

Percent = Annotated[float, Field(gt=0, le=100)]
LoadablePart = Literal["model", "optimizer", "scheduler", "data", "rng"]
ExtraName = Annotated[str, Field(pattern=r"^extra\.[A-Za-z0-9_-]+$")]


class AsyncCheckpointMode(str, Enum):  # noqa: UP042 - code in the field formats members as plain strings
    """What the training loop waits for when it saves."""

    disabled = "disabled"
    """The commit: written, durable and published."""
    async_ = "async"
    """The copy to host buffers; writing and commit happen behind."""
    async_pinned = "async_with_pinned_mem"
    """Only what the copy has not finished when the optimizer is about to step."""


DIR_PLACEHOLDERS = ("run_name", "run_id")
"""Placeholders in ``checkpoint.dir``, filled when the run starts."""

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def fill_dir(folder: str, *, run_name: str, run_id: str) -> str:
    """``checkpoint.dir`` with its placeholders filled in."""
    return folder.replace("{run_name}", run_name).replace("{run_id}", run_id)


def unknown_placeholder(folder: str | None) -> str:
    """The first placeholder in ``checkpoint.dir`` that nothing fills, in braces; empty without one."""
    found = (match for match in _PLACEHOLDER.finditer(folder or "") if match[1] not in DIR_PLACEHOLDERS)
    return next((match[0] for match in found), "")


class DynCkptWindow(Section):
    """Steps early in a run, where much changes, that are saved beside the regular ones."""

    start: AtLeastOne = 1
    """First step of the window."""

    stop: AtLeastOne
    """Last step of the window."""

    strategy: Literal["power2"] = "power2"
    """Which steps of it are saved: power2: 1, 2, 4, 8 and so on."""


class CheckpointConfig(Section):
    """When and how to save, what to keep, what to start from."""

    dir: NonEmpty | None = None
    """Where the checkpoints are; none means checkpoints/ in the run's folder. A folder has the checkpoints
    of one run. {run_name} and {run_id} are replaced by the run's."""

    interval: AtLeastZero | Literal["auto"] = 100
    """Steps between saves; 0 means that no number of steps makes a save due; "auto" works out the seconds
    between saves from what a save is measured to cost and how often this run was interrupted."""

    interval_minutes: Positive | None = None
    """A save is due, too, when the last one is this many minutes ago."""

    max_overhead_pct: Percent | None = None
    """At most this share of the time goes into the saves that interval and interval_minutes ask for, by the
    measured tax of a save: they come less often when it is too high. Left at none, there is no bound, and
    one of 1 with interval = "auto"."""

    expected_mtti_hours: Positive | None = None
    """For interval = "auto": mean hours to an interruption to begin with, worth one that was seen; none means
    50,000 h shared by the ranks, at most 24 h."""

    at_steps: list[AtLeastOne] = []  # noqa: RUF012 - pydantic copies it
    """Further steps to save."""

    dyn_ckpt_window: DynCkptWindow | None = None
    """Early training dynamics: a window of steps to save more densely."""

    save_first: bool = False
    """Save step 0 too: the weights that training starts from."""

    save_last: bool = True
    """Commit the last step when the run ends, however it was asked to."""

    # Not strict: TOML has strings where Python has members.
    async_mode: Annotated[AsyncCheckpointMode, Field(strict=False)] = AsyncCheckpointMode.disabled
    """What training waits for at a save: disabled: the commit; async: the copy to host memory;
    async_with_pinned_mem: only what of that copy the next step does not hide."""

    max_host_memory_gb: Positive | None = None
    """Bound on the host memory of a node for the buffers that saving needs, checked before training;
    none means what the system has to spare. They take one copy of what a node's ranks write."""

    keep_last_n: AtLeastOne = 3
    """How many of the newest checkpoints are kept. What other rules keep comes on top."""

    keep_every_n_steps: AtLeastOne | None = None
    """Keep for ever the first checkpoint at or after each multiple of this many steps."""

    keep_steps: list[AtLeastZero] = []  # noqa: RUF012 - pydantic copies it
    """Milestones: keep for ever the first checkpoint at or after each of these steps."""

    keep_best_n: AtLeastOne | None = None
    """Keep, too, this many checkpoints: those with the best values of best_metric."""

    best_metric: NonEmpty | None = None
    """The metric that keep_best_n goes by, such as "eval/loss"; only steps at which it was taken compete."""

    best_mode: Literal["min", "max"] = "min"
    """Whether the lowest or the highest values of best_metric are the best."""

    load_path: NonEmpty | None = None
    """Warm start: the checkpoint folder that a run without committed steps begins from."""

    exclude_from_loading: list[LoadablePart | ExtraName] = []  # noqa: RUF012 - pydantic copies it
    """Parts that a warm start leaves out of load_path: model, optimizer, scheduler, data, rng. "extra.NAME",
    one of the objects that a loop of your own hands over as extra=, is left out of resumes too."""

    save_timeout_s: Positive | Literal["auto"] = "auto"
    """Seconds after which a save that is still being written is given up, on all ranks; training goes on.
    "auto": 10 times what the rank with most bytes needs at the slowest rate of earlier saves, at least
    600."""

    max_failed_saves: AtLeastOne = 3
    """Failed saves in a row after which the run stops."""

    export_dtype: Literal["bf16", "fp16", "fp32"] = "fp32"
    """Type of the weights that `kempnerforge ckpt export` writes unless told otherwise; fp32 is exact."""
