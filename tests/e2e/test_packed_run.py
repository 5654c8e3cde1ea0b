"""Runs on packed rows with a document mask: the same on any number of ranks, and after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.runs import Launcher, Run, make_run

pytest_plugins = ["support.run_fixtures"]

PACKED = {"data.packing": "best_fit", "data.document_mask": True}


def losses(run: Run) -> list[float]:
    return [row["train/loss"] for row in run.counting().values() if "train/loss" in row]


def digests(run: Run) -> list[str]:
    return [row["data/digest"] for row in run.counting().values() if "data/digest" in row]


def short_documents(folder: Path) -> Path:
    """Forty documents of 3 to 81 bytes."""
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(
            "".join(chr(97 + i * number % 26) for i in range(3 + 2 * number))
        )
    return folder


def test_packed_run_is_the_same_on_other_ranks(launcher: Launcher, tmp_path: Path) -> None:
    corpus = short_documents(tmp_path / "corpus")
    settings = {**PACKED, "data.cache_dir": str(tmp_path / "cache")}
    alone = make_run(tmp_path / "alone", corpus, **settings)
    ended = launcher.finish(alone)
    assert "documents in each" in ended.output
    two = make_run(tmp_path / "two", corpus, **settings)
    launcher.run(two, "--train.max_steps=6", ranks=2)
    launcher.finish(two)
    assert digests(two) == digests(alone)
    assert losses(two) == pytest.approx(losses(alone), rel=1e-4)
    assert alone.counting()[4]["train/tokens"] < 4 * 4 * 32, "padding is not counted"

    changed = launcher.run(alone, "--data.packing=contiguous", "--train.max_steps=14")
    assert changed.statuses == [2]
    assert "data.packing: was 'best_fit" in changed.output


def test_packed_run_without_validation_is_evaluated(launcher: Launcher, tmp_path: Path) -> None:
    """The command makes the packing of the validation split, which the run did not need."""
    corpus = short_documents(tmp_path / "corpus")
    cache = tmp_path / "cache"
    settings = {**PACKED, "data.cache_dir": str(cache), "train.max_steps": 4}
    validated = make_run(tmp_path / "validated", corpus, **settings)
    launcher.finish(validated, ranks=2)
    for packing in cache.glob("packing-*.bin"):
        packing.unlink()
    run = make_run(tmp_path / "run", corpus, **settings, **{"eval.interval": 0})
    launcher.finish(run, ranks=2)
    assert len(list(cache.glob("packing-*.bin"))) == 1
    step = str(run.checkpoints / "step_00000004")
    ended = launcher.run(run, "--json", ranks=2, command=["eval", step])
    assert ended.statuses == [0, 0], ended.output
    result = json.loads(ended.outputs[0][ended.outputs[0].index("{") :])
    assert result["eval/loss"] == validated.counting()[4]["eval/loss"]
    assert len(list(cache.glob("packing-*.bin"))) == 2
