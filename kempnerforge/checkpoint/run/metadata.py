"""``run.json``: what all attempts of a run share. Only the process that holds the run's lease writes it."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kempnerforge import fsio
from kempnerforge.errors import RunFolderError

RUN_FILE = "run.json"


@dataclass(frozen=True)
class Parent:
    """The checkpoint that a run was forked from."""

    run_id: str
    step: int
    path: str
    """Where it was at the time."""


@dataclass(frozen=True)
class Rollback:
    """A return to an older step. It is an attempt of its own, which trains nothing."""

    attempt: int
    step: int
    """Steps above it, of this and older attempts, no longer count."""
    time: float
    wandb_id: str
    """The run in wandb until then."""
    wandb_first_attempt: int
    set_aside: list[str]
    """Names that the later steps got, in the checkpoint folder."""
    cleared: list[str] = field(default_factory=list)
    """Of a return to step 0: what had been set aside before, which is given up too."""


@dataclass(frozen=True)
class Restored:
    """A suspect step that ``unblock`` gave its name back."""

    step: int
    since: int
    """The first attempt that began below it."""
    attempt: int
    """The number that ``unblock`` took. Where attempts from ``since`` to it began no longer counts
    against the step, nor against the rows up to it."""


@dataclass(frozen=True)
class RunRecord:
    """``run.json``, and how the last attempt ended."""

    run_id: str
    wandb_id: str
    created: float
    attempt: int = 0
    """Number of the last attempt; the first is 1."""
    global_batch_size: int = 0
    """Sequences per optimizer step, fixed at the first start for configs that leave it open."""
    last_exit: dict[str, Any] | None = None
    """Status, reason, step and time of the last attempt that ended by itself."""
    checkpoint_dir: str = ""
    """Where the checkpoints are when ``checkpoint.dir`` moves them; empty for ``checkpoints/`` in here."""
    wandb_first_attempt: int = 0
    """The first attempt that logs to ``wandb_id``; rows of older ones went to another run in wandb."""
    parent: Parent | None = None
    rollbacks: tuple[Rollback, ...] = ()
    """Those that stand, oldest first. The next start completes what a command that was killed left."""
    restored: tuple[Restored, ...] = ()

    def checkpoint_folder(self, run_dir: Path) -> Path:
        """Where this run's checkpoints are."""
        return Path(self.checkpoint_dir) if self.checkpoint_dir else run_dir / "checkpoints"


def new(**known: Any) -> RunRecord:
    """A record of a run that begins now, under an id of its own."""
    identity = secrets.token_hex(6)
    return RunRecord(identity, identity, time.time(), **known)


def read(run_dir: Path) -> RunRecord | None:
    """The record of the run in ``run_dir``; None when there is none.

    Raises RunFolderError for one that cannot be parsed, OSError as it comes.
    """
    path = run_dir / RUN_FILE
    try:
        body = json.loads(fsio.read_file(path))
        parent = body.pop("parent", None)
        rollbacks, restored = body.pop("rollbacks", ()), body.pop("restored", ())
        return RunRecord(
            **body,
            parent=Parent(**parent) if parent is not None else None,
            rollbacks=tuple(Rollback(**rollback) for rollback in rollbacks),
            restored=tuple(Restored(**one) for one in restored),
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
    """The bytes of ``run.json``."""
    return (json.dumps(asdict(record), indent=1) + "\n").encode()
