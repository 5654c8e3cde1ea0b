"""Rows to Weights & Biases: one run over all attempts, offline where there is no key, never a reason to stop.

Without a key the client would stop at once or ask for one, so ``online`` becomes ``offline`` there. When the
server does not answer, the run goes on offline too: a compute node often has the key and no internet.

wandb keeps one row a step. Online it ignores a step that is below its newest one; offline every attempt
writes a fragment of its own, and ``wandb sync`` appends the fragments in order of time, moving a step that is
not above the newest one to a number that is. So the steps that an attempt trains again after it went back to
a checkpoint are held back here, and that is said once. (A fragment is appended only because it was written
with ``resume``; without, the upload of the second one overwrites the first.) A kill loses what the client has
not written or sent yet; the next attempt logs that anew, from ``metrics.jsonl`` (``catch_up``).
"""

from __future__ import annotations

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

_Mode = Literal["online", "offline", "disabled", "shared", "dryrun", "run"]
_INIT_TIMEOUT_S = 30.0
_FINISH_TIMEOUT_S = 30.0
"""A preempted job has no more to give: what is not uploaded by then is for ``kempnerforge wandb sync``."""


class Earlier(NamedTuple):
    """What earlier attempts logged to the same wandb run."""

    config: Mapping[str, Any]
    """Their entries of the run's config."""
    rows: Mapping[int, Row]
    """The rows that count, by step, in order."""
    newest_steps: Mapping[int, int]
    """Attempt -> the newest step that it logged, whether it counts or not."""


class WandbSink:
    """Writes rows to one wandb run. Every failure ends in one warning and a sink that does nothing.

    ``WANDB_MODE``, ``WANDB_BASE_URL`` and wandb's own settings files are respected.

    Args:
        run_dir: the run's folder; wandb keeps its files in ``wandb/`` there.
        project: the wandb project.
        name: the display name.
        run_id: the same for all attempts of a run, but for those after a rollback.
        config: the resolved configuration, nested.
        attempt: which start of this run this is, counted from 1.
        place: where this attempt runs: ``hosts``, and in a SLURM job its id and restart count.
        first_new_step: one above the newest step that earlier attempts have logged under ``run_id``
            (``read_rows(...).next_step(...)``). Rows below it are held back until ``catch_up`` has looked
            at what is on disk; online the server is asked.
        note: told in one line where the rows go.
        warn: told once when wandb cannot be used, or no longer.
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
        note: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self._run_dir = run_dir
        self._attempt = attempt
        self._place = place
        self._note = note
        self._warn = warn
        self._told_of_repeats = False
        self._run = self._start(
            {"dir": str(run_dir), "project": project, "name": name, "id": run_id, "config": dict(config)}
        )
        self._first_new_step = first_new_step
        if self._run and not self._run.offline:
            self._first_new_step = self._run.starting_step

    def write(self, row: Row) -> None:
        """Log ``row`` at its own step. Rows of one step are merged by wandb."""
        if self._run is None:
            return
        step = row["step"]
        if step < self._first_new_step:
            self._tell_of_repeats()
            return
        metrics = {key: value for key, value in row.items() if key not in ("step", "time")}
        self._guarded(lambda run: run.log({**metrics, "attempt": self._attempt}, step=step))

    def receipt(self, receipt: Mapping[str, Any]) -> None:
        """Put how this attempt began, and where it runs, into the run's config."""
        values = attempt_config(self._attempt, receipt, self._place)
        self._guarded(lambda run: run.config.update(values, allow_val_change=True))

    def catch_up(self, earlier: Callable[[], Earlier]) -> None:
        """Log what earlier attempts logged and wandb may not have. Before any row of this one.

        What ends a job ends wandb's process too, with all that it has not sent or, offline, written, and
        wandb takes no step below its newest one.
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
        except Exception as error:  # noqa: BLE001 - of another version of wandb, whatever that raises
            self._note(f"wandb: what is on disk cannot be read, and rows may be missing: {first_line(error)}")
            return self._first_new_step

    def close(self) -> None:
        """Finish the run. Online this waits for the upload, for a bounded time.

        Called while an exception is on its way up (in a ``finally``), it marks the run as failed.
        """
        exit_code = 0 if sys.exception() is None else 1
        self._guarded(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _tell_of_repeats(self) -> None:
        if not self._told_of_repeats:
            self._told_of_repeats = True
            self._note(
                f"wandb: an earlier attempt has logged up to step {self._first_new_step - 1}; "
                "what is trained again up to there goes to metrics.jsonl only"
            )

    def _start(self, identity: dict[str, Any]) -> Any:
        try:
            # Imported here: it costs about a second, which runs without wandb do not pay.
            import wandb

            settings = wandb.setup(wandb.Settings(silent=True)).settings
            if settings.mode != "online":
                return self._init(identity, mode=settings.mode)
            online_run = self._start_online(identity) if has_key(settings) else None
            return online_run or self._init(identity, mode="offline")
        except Exception as error:  # noqa: BLE001 - whatever wandb raises, training goes on
            self._warn(f"wandb could not start, so nothing is logged there: {first_line(error)}")
            return None

    def _start_online(self, identity: dict[str, Any]) -> Any:
        import wandb

        try:
            return self._init(identity, mode="online")
        except (wandb.Error, TimeoutError) as error:
            self._warn(f"wandb cannot be used online, so this attempt is logged offline: {first_line(error)}")
            # The service still holds the run id for the attempt to reach the server.
            wandb.teardown(1)
            wandb.setup(wandb.Settings(silent=True))
            return None

    def _init(self, identity: dict[str, Any], *, mode: _Mode) -> Any:
        import wandb

        if mode != "disabled":
            # Made by us, so that others of the group may go on with the run.
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
                # By default a kill loses what was logged in the last 15 s.
                x_transaction_log_flush_interval=0.5,
            ),
        )
        if run.offline:
            wandb_fragments.mark(Path(run.settings.sync_dir), self._attempt)
            self._note(f"wandb: offline; to upload: kempnerforge wandb sync {identity['dir']}")
        elif not run.disabled:
            self._note(f"wandb: {run.url}")
        return run

    def _guarded(self, call: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:  # noqa: BLE001 - whatever wandb raises, training goes on
            self._run = None
            self._warn(
                f"wandb failed and is switched off: {first_line(error)}. "
                f"To upload what is missing there: kempnerforge wandb sync {self._run_dir}"
            )


def attempt_config(attempt: int, receipt: Mapping[str, Any], place: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a run's config: how ``attempt``, the newest one, began, with what changed, and where it ran.

    ``place``: ``hosts``, and in a SLURM job ``slurm_job_id`` and ``slurm_restart_count``.
    """
    key = f"attempt_{attempt:04d}"
    return {"attempt": attempt, **place, f"receipt/{key}": dict(receipt), f"place/{key}": dict(place)}


def has_key(settings: Any) -> bool:
    """Whether the client could log in without asking a person."""
    if settings.api_key or settings.identity_token_file:
        return True
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc.netrc(path).authenticators(urlsplit(settings.base_url).netloc) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
