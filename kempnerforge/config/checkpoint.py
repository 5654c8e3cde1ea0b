"""``[checkpoint]``: when and how to save, which checkpoints to keep, which one to start from."""

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
    """The commit: the files are written, durable and published."""
    async_ = "async"
    """The copy to host buffers. Writing and commit run in the background."""
    async_pinned = "async_with_pinned_mem"
    """The part of the copy that is not finished when the optimizer is about to step."""


DIR_PLACEHOLDERS = ("run_name", "run_id")
"""Placeholders in ``checkpoint.dir``, filled when the run starts."""

_PLACEHOLDER = re.compile(r"(?<!\$)\{([^{}]*)\}")


def fill_dir(folder: str, *, run_name: str, run_id: str) -> str:
    """Return ``checkpoint.dir`` with its placeholders filled in."""
    return folder.replace("{run_name}", run_name).replace("{run_id}", run_id)


def unknown_placeholder(folder: str | None) -> str:
    """Return the first unknown placeholder in ``checkpoint.dir``, in braces, or an empty string."""
    unknown = (match for match in _PLACEHOLDER.finditer(folder or "") if match[1] not in DIR_PLACEHOLDERS)
    return next((match[0] for match in unknown), "")


class DynCkptWindow(Section):
    """A window of early steps that is saved more densely, for studies of early training dynamics."""

    start: AtLeastOne = 1
    """First step of the window."""

    stop: AtLeastOne
    """Last step of the window."""

    strategy: Literal["power2"] = "power2"
    """Which steps of the window are saved. power2: the powers of two (1, 2, 4, 8, ...)."""


class CheckpointConfig(Section):
    """When and how to save, which checkpoints to keep, which one to start from."""

    dir: NonEmpty | None = None
    """Folder of the checkpoints. None means checkpoints/ in the run's folder. A folder holds the
    checkpoints of one run. {run_name} and {run_id} are replaced by the name and id of the run."""

    interval: AtLeastZero | Literal["auto"] = 100
    """Steps between saves. 0 disables saves by step count. "auto" derives the time between saves from
    the measured cost of a save and from how often this run was interrupted."""

    interval_minutes: Positive | None = None
    """Also save when the last save is this many minutes ago."""

    max_overhead_pct: Percent | None = None
    """Upper bound in percent of the time that the saves of interval and interval_minutes may take,
    by their measured overhead. Saves are spaced further apart if it is exceeded. None means no bound,
    or 1 with interval = "auto"."""

    expected_mtti_hours: Positive | None = None
    """Only for interval = "auto": prior mean time to interruption in hours, weighted as one observed
    interruption. None means 50,000 h divided by the number of ranks, at most 24 h."""

    at_steps: list[AtLeastOne] = []  # noqa: RUF012 - pydantic copies it
    """Additional steps to save."""

    dyn_ckpt_window: DynCkptWindow | None = None
    """Window of early steps to save more densely, for studies of early training dynamics."""

    save_first: bool = False
    """Also save step 0, the initial weights."""

    save_last: bool = True
    """Commit the last step when the run finishes or stops on request, whatever requested it."""

    # Not strict: TOML has strings where Python has members.
    async_mode: Annotated[AsyncCheckpointMode, Field(strict=False)] = AsyncCheckpointMode.disabled
    """What training waits for at a save. disabled: the commit. async: the copy to host memory.
    async_with_pinned_mem: the part of that copy that the next step does not overlap."""

    max_host_memory_gb: Positive | None = None
    """Upper bound on the host memory per node for the save buffers, checked before training. They
    hold one copy of what the ranks of a node write. None means the memory that the system can spare."""

    keep_last_n: AtLeastOne = 3
    """Number of newest checkpoints to keep, in addition to those that other rules keep."""

    keep_every_n_steps: AtLeastOne | None = None
    """Keep the first checkpoint at or after each multiple of this many steps forever."""

    keep_steps: list[AtLeastZero] = []  # noqa: RUF012 - pydantic copies it
    """Milestones: keep the first checkpoint at or after each of these steps forever."""

    keep_best_n: AtLeastOne | None = None
    """Also keep this many checkpoints with the best values of best_metric."""

    best_metric: NonEmpty | None = None
    """Metric that ranks checkpoints for keep_best_n, such as "eval/loss". Only steps at which it was
    measured compete."""

    best_mode: Literal["min", "max"] = "min"
    """Whether the lowest or the highest values of best_metric are the best."""

    load_path: NonEmpty | None = None
    """Warm start: the checkpoint folder from which a run without committed steps starts."""

    exclude_from_loading: list[LoadablePart | ExtraName] = []  # noqa: RUF012 - pydantic copies it
    """Parts of load_path that a warm start does not load: model, optimizer, scheduler, data, rng.
    "extra.NAME", an object that your own loop passes as extra=, is not loaded at a resume either."""

    save_timeout_s: Positive | Literal["auto"] = "auto"
    """Seconds after which all ranks give up a save that is still being written. Training continues.
    "auto" means 10 times what the rank with the most bytes needs at the slowest rate of earlier
    saves, at least 600."""

    max_failed_saves: AtLeastOne = 3
    """Stop the run after this many failed saves in a row."""

    export_dtype: Literal["bf16", "fp16", "fp32"] = "fp32"
    """Default dtype of the weights that `kempnerforge ckpt export` writes. fp32 is exact."""
