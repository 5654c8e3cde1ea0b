"""Upload the rows of a run to one wandb run afterwards. Implements ``kempnerforge wandb sync``.

wandb accepts no step below the newest one of a run. Therefore each step is logged once, in order,
and with all its values. A repeated or interrupted upload continues after the newest step on the
server.

The client reports success even if the server has rejected the rows permanently (seen with wandb
0.31 and status 404). Therefore the upload ends with a query for the server's newest step.
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
_QUERY_INTERVAL_S = 1.0
_CONFIRM_S = 30.0


@dataclass(frozen=True)
class Content:
    """The content of a wandb run."""

    run_id: str
    project: str
    entity: str | None
    """The user or team; None for the default of the account."""
    name: str
    config: Mapping[str, Any]
    """The resolved configuration, nested."""
    receipts: Sequence[Mapping[str, Any]]
    """How each attempt started, oldest first."""
    places: Mapping[int, Mapping[str, Any]]
    """Where each attempt ran, if known."""
    steps: Mapping[int, Row]
    """Rows by step, in order; see ``jsonl.by_step``."""
    failed: bool
    """Whether to mark the run as failed."""


@dataclass(frozen=True)
class Uploaded:
    """The result of an upload."""

    url: str
    first_new_step: int
    """Steps below it were already in wandb."""
    num_steps: int
    """Number of steps that were uploaded."""


def upload(content: Content, *, timeout_s: float) -> Uploaded:
    """Upload the new steps of ``content`` to wandb. Ignores ``WANDB_MODE``.

    Blocks until the server has the rows. The upload itself takes ``timeout_s`` at most. Writes only
    temporary files. Raises UploadError if there is no key or no network, or if rows are missing on
    the server. An upload can be repeated safely.
    """
    # Imported here: wandb takes about a second to import.
    import wandb

    settings = wandb.setup(wandb.Settings(silent=True)).settings
    server = settings.base_url
    try:
        if not has_key(settings):
            raise UploadError(f"there is no API key for {server}: run wandb login, or set WANDB_API_KEY")
        with tempfile.TemporaryDirectory(prefix="kempnerforge-wandb-") as folder:
            return _send(content, folder, timeout_s)
    except (wandb.Error, ValueError, OSError) as error:  # TimeoutError is an OSError
        raise UploadError(
            f"the upload to wandb ({server}) is incomplete: {first_line(error)}. Check the network and the "
            "key, then run the command again: it uploads only missing steps"
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
            # These would describe this machine and the current folder, not the training job.
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
            raise TimeoutError(f"the newest step on the server is {newest}, but step {step} was uploaded")
        time.sleep(_QUERY_INTERVAL_S)
