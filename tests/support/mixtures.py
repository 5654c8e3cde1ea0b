"""Tiny runs on a mixture of three sources and two phases."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from support.runs import Run, make_run

SOURCES = {"web": 0.5, "books": 0.3, "code": 0.2}
PHASE = (6, {"web": 0.4, "books": 0.6})
_WORDS = {
    "web": "the net is wide ",
    "books": "once upon a time ",
    "code": "def f(x): return x\n",
    "extra": "more ",
}


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
            path.write_text(_WORDS[name] * (1000 // len(_WORDS[name]) * (number + 2)))
        end = (ends or {}).get(name, "repeat")
        tables.append(
            f'[[data.sources]]\nname = "{name}"\ntext = "{path}"\nweight = {weight}\nwhen_used_up = "{end}"\n'
        )
    for step, weights in phases:
        inner = ", ".join(f"{name} = {weight}" for name, weight in weights.items())
        tables.append(f"[[data.phases]]\nstart_step = {step}\nweights = {{ {inner} }}\n")
    run.config.write_text(run.config.read_text() + "\n".join(tables))
    return run


def sources_of(run: Run) -> dict[str, int]:
    """Return the name of each source and its number of samples, as the newest step records them."""

    state = json.loads((run.step_folder(run.committed()[0]) / "train_state.json").read_text())
    return {name: source["num_samples"] for name, source in state["data"]["fingerprint"]["sources"].items()}
