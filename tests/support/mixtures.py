"""Tiny runs on a mixture of three sources and two phases, and the rows that their ranks trained on."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.runs import Ended, Fault, Launcher, Run, make_run

SOURCES = {"web": 0.5, "books": 0.3, "code": 0.2}
PHASE = (6, {"web": 0.4, "books": 0.6})
_LETTERS = {"web": "netwid ", "books": "onceupatim ", "code": "def(x): rtun\n", "extra": "more "}


def mixture_run(
    base: Path,
    settings: Mapping[str, Any] | None = None,
    *,
    sources: Mapping[str, float] = SOURCES,
    phases: Sequence[tuple[int, Mapping[str, float]]] = (PHASE,),
    ends: Mapping[str, str] | None = None,
) -> Run:
    """Write texts and config of a run in ``base``, or the config of the run that is there anew.

    ``sources``: name -> weight. ``ends``: name -> ``when_used_up``, "repeat" where it is left out.
    """
    values = {
        "data.text": None,
        "data.cache_dir": str(base / "cache"),
        "eval.interval": 0,
        "checkpoint.interval": 2,
    }
    run = make_run(base, base, **{**values, **(settings or {})})
    tables = []
    for number, (name, weight) in enumerate(sources.items()):
        path = base / f"{name}.txt"
        if not path.exists():
            # No two rows are alike, so that a wrong one is noticed.
            letters = random.Random(name).choices(_LETTERS[name], k=1000 * (number + 2))
            path.write_text("".join(letters))
        end = (ends or {}).get(name, "repeat")
        tables.append(
            f'[[data.sources]]\nname = "{name}"\ntext = "{path}"\nweight = {weight}\nwhen_used_up = "{end}"\n'
        )
    for step, weights in phases:
        inner = ", ".join(f"{name} = {weight}" for name, weight in weights.items())
        tables.append(f"[[data.phases]]\nstart_step = {step}\nweights = {{ {inner} }}\n")
    run.config.write_text(run.config.read_text() + "\n".join(tables))
    return run


def recorded(launcher: Launcher, run: Run, *, ranks: int, faults: Sequence[Fault] = ()) -> Ended:
    """Call ``launcher.run`` and record the rows of each step, for ``rows_by_step``."""
    record = ("record_rows", {"path": str(run.base / f"rows_{run.starts + 1}")})
    return launcher.run(run, ranks=ranks, faults=[record, *faults])


def assert_trained_on_same(run: Run, whole: Run) -> None:
    """Fail unless both runs have trained on the same rows in each step, with equal losses up to rounding."""
    expected = rows_by_step(whole)
    assert len({row for rows in expected.values() for row in rows}) > len(expected), "they can be told apart"
    assert rows_by_step(run) == expected
    ours, theirs = run.counting(), whole.counting()
    for key, tolerance in (("data/digest", None), ("train/loss", 1e-4)):
        found, wanted = ([of[step][key] for step in sorted(expected)] for of in (ours, theirs))
        assert found == (wanted if tolerance is None else pytest.approx(wanted, rel=tolerance)), key


def rows_by_step(run: Run) -> dict[int, list[str]]:
    """Return the digests of the rows that all ranks trained on in each step, in the order of the batch.

    Rank ``m % ranks`` has micro-batch ``m``. Fails if an attempt repeated a step with other rows.
    """
    found: dict[int, list[str]] = {}
    for start, receipt in enumerate(run.receipts(), 1):
        files = sorted(run.base.glob(f"rows_{start}.rank_*.jsonl"))
        of_ranks = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        for step, parts in enumerate(zip(*of_ranks, strict=True), receipt["step"] + 1):
            micro_batches = itertools.chain.from_iterable(zip(*parts, strict=True))
            rows = list(itertools.chain.from_iterable(micro_batches))
            assert found.setdefault(step, rows) == rows, f"start {start} has other rows in step {step}"
    return found


def sources_of(run: Run) -> dict[str, int]:
    """Return the name of each source and its number of samples, as the newest step records them."""

    state = json.loads((run.step_folder(run.committed()[0]) / "train_state.json").read_text())
    return {name: source["num_samples"] for name, source in state["data"]["fingerprint"]["sources"].items()}
