"""Apply many seeded mutations to one checkpoint, and count the results."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from support.crash.mutation_kinds import draw
from support.crash.mutations import Mutation, Subject
from support.crash.save_driver import Plan, save_all
from support.crash.watched_loading import Loader
from support.ranks import run_ranks

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.load import candidates

REFUSED = ("DamagedCheckpointError", "MismatchError", "NoTrainingStateError")


def make_target(base: Path) -> tuple[Loader, Subject]:
    """Create a run of two ranks with two steps, of which the newer one will be mutated."""
    run_dir, outside = base / "run", base / "outside"
    run_dir.mkdir()
    run_ranks(save_all, 2, Plan(str(run_dir), (3, 4), keep_last_n=2))
    loader = Loader(run_dir, 4, ranks=2)
    outside.mkdir()
    for name, data in loader.files.items():
        (outside / name).write_bytes(data)
    older = {path.name: path.read_bytes() for path in (loader.folder / paths.step_name(3)).iterdir()}
    return loader, Subject(loader.files, older, outside)


def run_mutations(
    loader: Loader, subject: Subject, count: int, seed: int, patch: pytest.MonkeyPatch
) -> Counter[str]:
    """Apply ``count`` mutations in turn and count the outcomes. Fail if any is wrongly accepted.

    Every mutation is loaded as a resume loads it. Every tenth is instead loaded by a manager that
    can fall back to the step before, and every tenth is also checked by ``verify``.
    """
    patch.setattr(candidates, "RETRY_DELAYS_S", (0.0,))
    assert (loader.load(), loader.resume(3), loader.verify()) == ("loaded", "loaded", "sound")
    counts: Counter[str] = Counter()
    problems: list[str] = []
    for number in range(count):
        kind, mutation = draw(subject, random.Random(f"{seed} {number}"))
        with loader.changed(mutation.changes):
            try:
                outcome = loader.resume(3) if number % 10 == 0 else loader.load()
                if problem := _problem(loader, mutation, outcome):
                    problems.append(f"{number}, {kind}, {mutation.label}: {problem}")
                if number % 10 == 1:
                    _verify(loader, mutation, outcome, problems)
            except Exception as error:  # noqa: BLE001 - the campaign looks for any other error
                outcome = "crashed"
                problems.append(f"{number}, {kind}, {mutation.label}: {type(error).__name__}: {error}")
        counts[outcome] += 1
    assert not problems, f"{len(problems)} of {count}:\n" + "\n".join(problems[:40])
    return counts


def _problem(loader: Loader, mutation: Mutation, outcome: str) -> str:
    if loader.opened.outside:
        return f"read {loader.opened.outside}"
    if outcome in (*REFUSED, "older"):
        return ""
    if not outcome.startswith("loaded"):
        return outcome
    harmless = mutation.may_load or _says_the_same(loader, mutation)
    if not harmless or (outcome != "loaded" and mutation.objects_too):
        return outcome
    return ""


def _says_the_same(loader: Loader, mutation: Mutation) -> bool:
    """Return whether the only change is white space in the manifest."""
    data = mutation.changes.get(paths.MANIFEST)
    if set(mutation.changes) != {paths.MANIFEST} or not isinstance(data, bytes):
        return False
    try:
        return json.loads(data) == json.loads(loader.files[paths.MANIFEST])
    except (ValueError, RecursionError):
        return False


def _verify(loader: Loader, mutation: Mutation, outcome: str, problems: list[str]) -> None:
    found = loader.verify()
    if loader.opened.outside:
        problems.append(f"{mutation.label}: verify read {loader.opened.outside}")
    if found == "sound" and outcome == "DamagedCheckpointError":
        problems.append(f"{mutation.label}: verify finds nothing")
