"""Decide whether the state after a crash keeps all promises."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from support.crash.disk_model import Op
from support.crash.file_trees import Tree, write_tree
from support.crash.known_states import check_step, expected_tensors
from torch import Tensor

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.load import candidates
from kempnerforge.checkpoint.retention.start_cleanup import StartCleanup
from kempnerforge.checkpoint.run.resume_report import Rejected

CHECKPOINTS = "checkpoints"
_FINAL = re.compile(rf"{CHECKPOINTS}/step_(\d{{8}})")


@dataclass(frozen=True)
class Commit:
    """When one step was committed, as numbers of operations."""

    step: int
    renamed: int
    """Number, from 1, of the operation that gave it its final name."""
    durable: int
    """Number of the first sync of the parent folder after that."""


def find_commits(ops: Sequence[Op]) -> list[Commit]:
    """Return the commits in a recording, in order."""
    found = []
    for number, op in enumerate(ops, 1):
        match = _FINAL.fullmatch(op.to) if op.op == "rename" else None
        if match and ".tmp" in op.path:
            later = (
                n for n, o in enumerate(ops, 1) if n > number and o.op == "fsync" and o.path == CHECKPOINTS
            )
            found.append(Commit(int(match[1]), number, next(later, len(ops) + 1)))
    return found


def allowed_after(commits: Sequence[Commit], done: int) -> set[int | None]:
    """Return the steps that may be the newest after a crash that follows ``done`` operations; None: no step.

    These are the newest step whose commit was durable, and any later step whose rename was done.
    """
    durable = [one.step for one in commits if one.durable <= done]
    newest = durable[-1] if durable else None
    return {newest, *(one.step for one in commits if one.renamed <= done and one.step > (newest or 0))}


class Oracle:
    """Checks trees. A tree that was checked before is not checked again."""

    def __init__(self, scratch: Path, *, ranks: int) -> None:
        self._scratch = scratch
        self._ranks = ranks
        self._expected: dict[int, dict[str, Tensor]] = {}
        self._known: dict[object, int | None] = {}

    @property
    def distinct(self) -> int:
        """Number of different trees that were checked."""
        return len(self._known)

    def check_tree(self, tree: Tree, allowed: set[int | None]) -> int | None:
        """Recover ``tree`` and load the step that a resume chooses: one of ``allowed``, bit for bit."""
        key = frozenset((path, hash(content)) for path, content in tree.items())
        if key not in self._known:
            folder = self._scratch / "tree"
            write_tree(tree, folder)
            try:
                self._known[key] = self.recover(folder)
            finally:
                shutil.rmtree(folder)
        found = self._known[key]
        assert found in allowed, f"resumed {found}; allowed are {allowed}\n{describe(tree)}"
        return found

    def recover(self, run_dir: Path) -> int | None:
        """Do what a resume does, and check every bit of every step.

        Return the step that is chosen; None if there is none.
        """
        folder = run_dir / CHECKPOINTS
        folder.mkdir(exist_ok=True)
        StartCleanup(folder, attempt=1_000_000).remove_leftovers()
        rejected: list[Rejected] = []
        found = candidates.select(folder, rejected)
        assert not rejected, rejected
        listing = paths.list_folder(folder)
        assert not listing.temporary
        assert not listing.deleting
        assert not listing.quarantined
        if found is None:
            return None
        for step in listing.steps:
            self.check(folder / paths.step_name(step), step)
        return found.step

    def check(self, path: Path, step: int) -> None:
        """Load a whole step and compare every bit with what was saved."""
        expected = self._expected.setdefault(step, expected_tensors(step, self._ranks))
        check_step(path, step, expected)


def describe(tree: Tree) -> str:
    """Return one line per path."""
    lines = []
    for path, content in sorted(tree.items()):
        kind = (
            "folder"
            if content is None
            else f"{len(content)} bytes"
            if isinstance(content, bytes)
            else content
        )
        lines.append(f"  {path}: {kind}")
    return "\n".join(lines)
