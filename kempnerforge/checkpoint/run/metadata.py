"""``run.json``: the facts that all attempts of a run share. Only the holder of its lease writes it."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kempnerforge import fsio
from kempnerforge.errors import RunFolderError

RUN_FILE = "run.json"

_KEYS = {"timeline_id": "wandb_id", "timeline_first_attempt": "wandb_first_attempt"}
"""Field -> its key in the file, for those that differ. Format 1 named them after who reads them."""
_FIELDS = {key: field for field, key in _KEYS.items()}


@dataclass(frozen=True)
class Parent:
    """The checkpoint that a run was forked from."""

    run_id: str
    step: int
    path: str
    """Its path at that time."""


@dataclass(frozen=True)
class Rollback:
    """A rollback to an older step. It counts as an attempt that trains nothing."""

    attempt: int
    step: int
    """Steps above it, of this and older attempts, no longer count."""
    time: float
    timeline_id: str
    """``RunRecord.timeline_id`` before the rollback, and so the next field."""
    timeline_first_attempt: int
    set_aside: list[str]
    """New names of the later steps, in the checkpoint folder."""
    cleared: list[str] = field(default_factory=list)
    """For a rollback to step 0: names of steps set aside earlier, which are given up too."""


@dataclass(frozen=True)
class Restored:
    """A suspect step whose name ``unblock`` restored."""

    step: int
    since: int
    """The first attempt that began below it."""
    attempt: int
    """The attempt number of ``unblock``. The resume points of attempts from ``since`` to this one
    no longer take the step, or rows up to it, off the timeline."""


@dataclass(frozen=True)
class RunRecord:
    """The content of ``run.json``."""

    run_id: str
    timeline_id: str
    """At first ``run_id``. A rollback begins a new timeline, with a new id."""
    created: float
    attempt: int = 0
    """Number of the last attempt; the first is 1."""
    global_batch_size: int = 0
    """Sequences per optimizer step, fixed at the first start if the config does not set it."""
    last_exit: dict[str, Any] | None = None
    """Status, reason, step and time of the last attempt that recorded its end."""
    checkpoint_dir: str = ""
    """The checkpoint folder if ``checkpoint.dir`` is set; empty for ``checkpoints/`` in the run's folder."""
    timeline_first_attempt: int = 0
    """The first attempt of the timeline ``timeline_id``. Older ones belong to another timeline."""
    parent: Parent | None = None
    rollbacks: tuple[Rollback, ...] = ()
    """Rollbacks in effect, oldest first. The next start completes one that was killed."""
    restored: tuple[Restored, ...] = ()

    def checkpoint_folder(self, run_dir: Path) -> Path:
        """Return the folder of this run's checkpoints."""
        return Path(self.checkpoint_dir) if self.checkpoint_dir else run_dir / "checkpoints"


def new(**known: Any) -> RunRecord:
    """Return the record of a new run, with a new id."""
    identity = secrets.token_hex(6)
    return RunRecord(identity, identity, time.time(), **known)


def read(run_dir: Path) -> RunRecord | None:
    """Return the record of the run in ``run_dir``; None if there is none.

    Raises RunFolderError for a file that cannot be parsed, and OSError.
    """
    path = run_dir / RUN_FILE
    try:
        body = json.loads(fsio.read_file(path))
        parent = body.pop("parent", None)
        rollbacks, restored = body.pop("rollbacks", ()), body.pop("restored", ())
        return RunRecord(
            **_renamed(body, _FIELDS),
            parent=Parent(**parent) if parent is not None else None,
            rollbacks=tuple(Rollback(**_renamed(rollback, _FIELDS)) for rollback in rollbacks),
            restored=tuple(Restored(**step) for step in restored),
        )
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RunFolderError(
            f"{path} cannot be read ({error}). Restore it, or give the run another name (--run.name=NEW)"
        ) from None


def write(run_dir: Path, record: RunRecord) -> None:
    """Replace ``run.json``. Durable on return."""
    fsio.atomic_write(run_dir / RUN_FILE, encode(record))


def encode(record: RunRecord) -> bytes:
    """Return the bytes of ``run.json``."""
    body = _renamed(asdict(record), _KEYS)
    body["rollbacks"] = [_renamed(rollback, _KEYS) for rollback in body["rollbacks"]]
    return (json.dumps(body, indent=1) + "\n").encode()


def _renamed(body: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in body.items()}
