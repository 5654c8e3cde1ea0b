"""Log rows to Weights & Biases: one wandb run for all attempts. Failures of wandb never stop training.

Without an API key the client would fail or prompt for one, so ``online`` becomes ``offline``. If
the server does not answer, the attempt is logged offline too: compute nodes often have the key but
no internet access.

wandb has one row per step. Online, it ignores a step below its newest one. Offline, every attempt
writes its own fragment (a folder with its rows). ``wandb sync`` appends the fragments in order of
time and renumbers steps that are not above the newest one. Therefore this sink skips the steps that
an attempt repeats after it resumed from a checkpoint, and logs this once. (Fragments are appended
because they are written with ``resume``. Without it, the upload of the second fragment would
overwrite the first.) A kill loses rows that the client has not written or sent. The next attempt
logs them again from ``metrics.jsonl`` (``catch_up``).
"""

from __future__ import annotations

import logging
import netrc
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from kempnerforge import fsio
from kempnerforge.telemetry import wandb_fragments
from kempnerforge.telemetry.sinks import Row

log = logging.getLogger(__name__)

_Mode = Literal["online", "offline", "disabled", "shared", "dryrun", "run"]
_INIT_TIMEOUT_S = 30.0
_FINISH_TIMEOUT_S = 30.0
"""A preempted job has no more time. ``kempnerforge wandb sync`` uploads the remaining rows."""


class Earlier(NamedTuple):
    """The data that earlier attempts logged to the same wandb run."""

    config: Mapping[str, Any]
    """Their entries in the run's config."""
    rows: Mapping[int, Row]
    """The rows of the final timeline by step, in order."""
    newest_steps: Mapping[int, int]
    """Attempt -> the newest step that it logged, including lost steps."""


class WandbSink:
    """Writes rows to one wandb run. After a failure it warns once and then does nothing.

    ``WANDB_MODE``, ``WANDB_BASE_URL`` and wandb's own settings files are respected.

    Args:
        run_dir: the run's folder. wandb keeps its files in ``wandb/`` there.
        project: the wandb project.
        name: the display name.
        run_id: the id of the wandb run, the same for all attempts of a run until a rollback.
        config: the resolved configuration, nested.
        attempt: number of this start of the run, from 1.
        place: where this attempt runs: ``hosts``, and in a SLURM job its id and restart count.
        first_new_step: 1 + the newest step that earlier attempts have logged under ``run_id``
            (``read_rows(...).next_step(...)``). Rows below it are skipped until ``catch_up`` has
            read which steps are on disk. Online, the server's newest step is used instead.
    """

    def __init__(
        self,
        run_dir: Path,
        project: str,
        name: str,
        run_id: str,
        config: Mapping[str, Any],
        attempt: int,
        *,
        place: Mapping[str, Any],
        first_new_step: int,
    ) -> None:
        self._run_dir = run_dir
        self._attempt = attempt
        self._place = place
        self._has_noted_repeats = False
        self._run = self._start(
            {"dir": str(run_dir), "project": project, "name": name, "id": run_id, "config": dict(config)}
        )
        self._first_new_step = first_new_step
        if self._run and not self._run.offline:
            self._first_new_step = self._run.starting_step

    def write(self, row: Row) -> None:
        """Log ``row`` at its step. wandb merges rows of the same step."""
        if self._run is None:
            return
        step = row["step"]
        if step < self._first_new_step:
            self._note_repeats()
            return
        metrics = {key: value for key, value in row.items() if key not in ("step", "time")}
        self._guarded(lambda run: run.log({**metrics, "attempt": self._attempt}, step=step))

    def receipt(self, receipt: Mapping[str, Any]) -> None:
        """Add how this attempt started, and where it runs, to the run's config."""
        values = attempt_config(self._attempt, receipt, self._place)
        self._guarded(lambda run: run.config.update(values, allow_val_change=True))

    def catch_up(self, earlier: Callable[[], Earlier]) -> None:
        """Log the rows of earlier attempts that wandb may not have. Call this before the first ``write``.

        The end of a job also ends wandb's process, which loses the rows that it has not sent or,
        offline, not written. They must be logged first, because wandb accepts no step below its
        newest one.
        """
        self._guarded(lambda run: self._log_missing(run, earlier()))

    def _log_missing(self, run: Any, earlier: Earlier) -> None:
        if run.offline:
            self._first_new_step = self._first_missing_step(run, earlier)
        run.config.update(dict(earlier.config), allow_val_change=True)
        for step in [step for step in earlier.rows if step >= self._first_new_step]:
            row = earlier.rows[step]
            metrics = {key: value for key, value in row.items() if key not in ("step", "time")}
            run.log({**metrics, "_timestamp": row["time"]}, step=step)

    def _first_missing_step(self, run: Any, earlier: Earlier) -> int:
        try:
            return wandb_fragments.first_missing_step(
                self._run_dir, run.id, self._attempt, earlier.newest_steps
            )
        except Exception as error:  # noqa: BLE001 - another version of wandb may raise anything
            log.info(f"wandb: the files on disk cannot be read; rows may be missing: {first_line(error)}")
            return self._first_new_step

    def close(self) -> None:
        """Finish the run. Online this waits for the upload, for a bounded time.

        If an exception is being handled (in a ``finally``), mark the run as failed.
        """
        exit_code = 0 if sys.exception() is None else 1
        self._guarded(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _note_repeats(self) -> None:
        if not self._has_noted_repeats:
            self._has_noted_repeats = True
            log.info(
                f"wandb: an earlier attempt has logged up to step {self._first_new_step - 1}; "
                "repeated steps up to there are written to metrics.jsonl only"
            )

    def _start(self, identity: dict[str, Any]) -> Any:
        try:
            # Imported here, because it takes about a second and most runs do not use wandb.
            import wandb

            settings = wandb.setup(wandb.Settings(silent=True)).settings
            if settings.mode != "online":
                return self._init(identity, mode=settings.mode)
            online_run = self._start_online(identity) if has_key(settings) else None
            return online_run or self._init(identity, mode="offline")
        except Exception as error:  # noqa: BLE001 - whatever wandb raises, training continues
            log.warning(f"wandb could not start, so nothing is logged there: {first_line(error)}")
            return None

    def _start_online(self, identity: dict[str, Any]) -> Any:
        import wandb

        try:
            return self._init(identity, mode="online")
        except (wandb.Error, TimeoutError) as error:
            log.warning(
                f"wandb cannot be used online, so this attempt is logged offline: {first_line(error)}"
            )
            # The wandb service still holds the run id of the failed attempt to connect.
            wandb.teardown(1)
            wandb.setup(wandb.Settings(silent=True))
            return None

    def _init(self, identity: dict[str, Any], *, mode: _Mode) -> Any:
        import wandb

        if mode != "disabled":
            # Created here with group permissions, so that other members of the group can resume the
            # run.
            fsio.make_folder(Path(identity["dir"], "wandb"))
        run = wandb.init(
            **identity,
            resume="allow",
            allow_val_change=True,
            settings=wandb.Settings(
                mode=mode,
                silent=True,
                console="off",
                init_timeout=_INIT_TIMEOUT_S,
                finish_timeout=_FINISH_TIMEOUT_S,
                finish_timeout_raises=True,
                # With the default, a kill would lose the rows of the last 15 s.
                x_transaction_log_flush_interval=0.5,
            ),
        )
        if run.offline:
            wandb_fragments.mark(Path(run.settings.sync_dir), self._attempt)
            log.info(f"wandb: offline; to upload: kempnerforge wandb sync {identity['dir']}")
        elif not run.disabled:
            log.info(f"wandb: {run.url}")
        return run

    def _guarded(self, call: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:  # noqa: BLE001 - whatever wandb raises, training continues
            self._run = None
            log.warning(
                f"wandb failed and is disabled: {first_line(error)}. "
                f"To upload the missing rows: kempnerforge wandb sync {self._run_dir}"
            )


def attempt_config(attempt: int, receipt: Mapping[str, Any], place: Mapping[str, Any]) -> dict[str, Any]:
    """Return config entries about the newest attempt: its receipt, and where it ran.

    ``place`` has ``hosts``, and in a SLURM job ``slurm_job_id`` and ``slurm_restart_count``.
    """
    key = f"attempt_{attempt:04d}"
    return {"attempt": attempt, **place, f"receipt/{key}": dict(receipt), f"place/{key}": dict(place)}


def has_key(settings: Any) -> bool:
    """Return whether the client can log in without a prompt."""
    if settings.api_key or settings.identity_token_file:
        return True
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc.netrc(path).authenticators(urlsplit(settings.base_url).netloc) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class if it has none."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
