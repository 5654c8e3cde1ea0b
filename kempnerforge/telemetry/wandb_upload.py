"""A run's rows into one wandb run, afterwards: what ``kempnerforge wandb sync`` does.

wandb takes no step below the newest one that a run has. So each step is handed over once, complete, in order,
and an upload that is repeated, or goes on where one was cut off, begins above what is there.

The client says that it has finished even when the server has refused the rows for good (seen with 0.31 and
status 404). So at the end the server is asked for its newest step.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kempnerforge.errors import UploadError
from kempnerforge.telemetry.sinks import Row
from kempnerforge.telemetry.wandb_sink import attempt_config, first_line, has_key

_INIT_TIMEOUT_S = 30.0
_ASK_EVERY_S = 1.0
_CONFIRM_S = 30.0


@dataclass(frozen=True)
class Content:
    """What a wandb run is to show."""

    run_id: str
    project: str
    entity: str | None
    """The user or team; None for the account's own."""
    name: str
    config: Mapping[str, Any]
    """The resolved configuration, nested."""
    receipts: Sequence[Mapping[str, Any]]
    """How each attempt began, oldest first."""
    places: Mapping[int, Mapping[str, Any]]
    """Where each attempt ran, as far as it is known."""
    steps: Mapping[int, Row]
    """By step, in order; see ``jsonl.by_step``."""
    failed: bool
    """Whether wandb is to show the run as failed."""


@dataclass(frozen=True)
class Uploaded:
    """What an upload did."""

    url: str
    first_new_step: int
    """Steps below it were in wandb already."""
    num_steps: int
    """Steps that were handed over now."""


def upload(content: Content, *, timeout_s: float) -> Uploaded:
    """Bring what is new of ``content`` to wandb, whatever ``WANDB_MODE`` says.

    Blocks: until the server has it, ``timeout_s`` at most for the upload itself. Writes nothing but temporary
    files. Raises UploadError: no key, no network, or not everything arrived; repeating it does no harm.
    """
    # Here, not above: it takes about a second to import.
    import wandb

    settings = wandb.setup(wandb.Settings(silent=True)).settings
    server = settings.base_url
    try:
        if not has_key(settings):
            raise UploadError(f"there is no key for {server}: type wandb login, or set WANDB_API_KEY")
        with tempfile.TemporaryDirectory(prefix="kempnerforge-wandb-") as folder:
            return _send(content, folder, timeout_s)
    except (wandb.Error, ValueError, OSError) as error:  # TimeoutError is an OSError
        raise UploadError(
            f"not everything is in wandb ({server}): {first_line(error)}. Check the network and the key, "
            "then repeat the command: it uploads only what is missing"
        ) from error
    finally:
        wandb.teardown()


def _send(content: Content, folder: str, timeout_s: float) -> Uploaded:
    import wandb

    run = wandb.init(
        id=content.run_id,
        project=content.project,
        entity=content.entity,
        name=content.name,
        config=dict(content.config),
        dir=folder,
        resume="allow",
        allow_val_change=True,
        settings=wandb.Settings(
            mode="online",
            silent=True,
            console="off",
            init_timeout=_INIT_TIMEOUT_S,
            finish_timeout=timeout_s,
            finish_timeout_raises=True,
            # They would be those of this machine, and of what lies in the current folder.
            disable_code=True,
            disable_git=True,
            x_disable_stats=True,
            x_disable_meta=True,
        ),
    )
    new = {step: row for step, row in content.steps.items() if step >= run.starting_step}
    for receipt in content.receipts:
        attempt = receipt["attempt"]
        values = attempt_config(attempt, receipt, content.places.get(attempt, {}))
        run.config.update(values, allow_val_change=True)
    for step, row in new.items():
        metrics = {key: value for key, value in row.items() if key not in ("step", "time")}
        run.log({**metrics, "_timestamp": row["time"]}, step=step)
    uploaded = Uploaded(str(run.url), run.starting_step, len(new))
    path = f"{run.entity}/{run.project}/{run.id}"
    run.finish(exit_code=1 if content.failed else 0)
    if new:
        _confirm(path, max(new))
    return uploaded


def _confirm(path: str, step: int) -> None:
    """Wait until the server's newest step is ``step``. Raises TimeoutError."""
    import wandb

    run = wandb.Api().run(path)
    deadline = time.monotonic() + _CONFIRM_S
    while (newest := run.lastHistoryStep) < step:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the server's newest step is {newest}, and {step} was handed over")
        time.sleep(_ASK_EVERY_S)
