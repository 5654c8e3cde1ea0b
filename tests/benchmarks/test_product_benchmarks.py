"""The benchmarks of whole commands and of the loop run, and their references do the work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench.launches import Ours, largest_difference
from bench_restart import parts_of_ours

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run_tiny(name: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """Run a benchmark at its smallest size in ``folder``: its table, and its JSON."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--size", "tiny", "--json", "out.json"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=250)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [path.name for path in folder.iterdir()] == ["out.json"], "it cleans up"
    found = json.loads((folder / "out.json").read_text())
    assert found["machine"]["cpus"] >= 1
    for row in found["comparisons"]:
        assert row["ours"]["median"] > 0
        assert row["reference"]["median"] > 0
        assert row["name"] in ended.stdout
        assert len(row["ratio_95"]) == 2
    return ended.stdout, found


def test_bench_loop_trains_same_model_in_both_arms(tmp_path: Path) -> None:
    table, found = run_tiny("bench_loop", tmp_path)
    assert [(row["name"], row["goal"]) for row in found["comparisons"]] == [("step_s", 1.02)]
    assert found["losses_differ_by"] < 1e-5
    assert len(found["losses"]) == 6
    assert found["measured"]["ours"][0]["outside_ms"] > 0
    assert "ours - bare, ms per step" in table


def test_bench_restart_both_arms_load_what_they_saved(tmp_path: Path) -> None:
    """The bare loop draws no weights when it loads, and the second loss depends on the loaded moments."""
    _, found = run_tiny("bench_restart", tmp_path)
    parts = ["total_s", "start_s", "set_up_s", "load_s", "first_step_s", "imports_s"]
    assert [row["name"] for row in found["comparisons"]] == parts
    assert {row["name"]: row["goal"] for row in found["comparisons"] if row["goal"]} == {
        "total_s": 1.1,
        "imports_s": 1.1,
    }
    assert len(found["losses"]) == 2
    assert found["losses_differ_by"] < 1e-5
    (bare,) = found["measured"]["bare"]
    assert bare["total_s"] == pytest.approx(sum(bare[part] for part in parts[1:5]))
    # Ours, of times that are known: the parts lie one behind the other.
    setup_s = {"launch": 2.0, "imports": 3.0, "model": 0.5, "resume": 4.0}
    start, resume = {"process_started": 101.0}, {"setup_s": setup_s, "time": 110.5}
    ours = parts_of_ours(Ours(100.0, [{"time": 111.75, "train/loss": 1.0}], start, resume))
    assert ours == {"total_s": 11.75, "start_s": 3.0, "set_up_s": 3.5, "load_s": 4.0, "first_step_s": 1.25}


def test_bench_loss_measures_memory_of_both_losses(tmp_path: Path) -> None:
    _, found = run_tiny("bench_loss", tmp_path)
    assert [(row["name"], row["goal"]) for row in found["comparisons"]] == [("wall_s", 1.1)]
    assert [(row["vocabulary"], row["tokens"]) for row in found["memory"]] == [
        (vocabulary, tokens) for vocabulary in (600, 900) for tokens in (32, 64, 128)
    ]
    assert all(row["plain"] > 0 and row["chunked"] > 0 for row in found["memory"])


def test_bench_document_mask_compares_documents_of_every_length(tmp_path: Path) -> None:
    _, found = run_tiny("bench_document_mask", tmp_path)
    assert [row["name"] for row in found["comparisons"]] == [
        f"{seq_len} tokens, documents: {count}{mask}"
        for seq_len in (16, 64, 128)
        for count in (1, 4, 16)
        for mask in ("", ", matrix")
    ]


def test_bench_relaunch_both_arms_repeat_the_killed_steps(tmp_path: Path) -> None:
    _, found = run_tiny("bench_relaunch", tmp_path)
    assert [(row["name"], row["goal"]) for row in found["comparisons"]] == [("relaunch_s", 0.9)]
    assert set(found["losses"]) == {"ours", "torchrun"}
    assert found["losses_differ_by"] < 1e-5


def test_bench_cli_lists_as_many_steps_as_made(tmp_path: Path) -> None:
    _, found = run_tiny("bench_cli", tmp_path)
    assert set(found["extra"]) == {"--help wall_s", "--help cpu_s", "ckpt ls wall_s", "ckpt ls cpu_s"}
    assert {name: len(rows) for name, rows in found["measured"].items()} == {
        "pass": 2,
        "--help": 2,
        "ckpt ls": 2,
    }


def test_largest_difference_other_work_is_found() -> None:
    assert largest_difference([2.0, 4.0], [2.0, 4.4]) == pytest.approx(0.4 / 4.4)
    with pytest.raises(ValueError):
        largest_difference([2.0], [2.0, 4.4])


def test_bench_prepare_both_arms_give_the_same_ids(tmp_path: Path) -> None:
    table, found = run_tiny("bench_prepare", tmp_path)
    assert [row["name"] for row in found["comparisons"]] == ["mb_per_s", "peak_mb"]
    assert found["ids"] > 100_000
    assert "datasets" in table
