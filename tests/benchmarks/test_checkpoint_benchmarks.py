"""The benchmarks run, and each arm does what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_loader import load

from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader, load_tensors
from kempnerforge.checkpoint.state.train_state import TrainState
from kempnerforge.config.schema import AsyncCheckpointMode

REPO = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run_small(name: str, folder: Path, *options: str, launcher: tuple[str, ...] = TORCHRUN) -> dict[str, Any]:
    """Run a benchmark at a small size, in ``folder``; what it measured."""
    command = [sys.executable, *launcher, str(REPO / f"benchmarks/{name}.py"), *options, "--json", "out.json"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=250)
    assert ended.returncode == 0, ended.stderr
    assert "ratio" in ended.stdout
    found = json.loads((folder / "out.json").read_text())
    assert [path.name for path in folder.iterdir()] == ["out.json"], "it cleans up"
    return found


def test_bench_save_measures_overhead(tmp_path: Path) -> None:
    found = run_small("bench_save", tmp_path, "--size", "tiny")
    assert [one["name"] for one in found["comparisons"]] == [
        "overhead_s",
        "blocking_s",
        "durable_s",
        "beside",
    ]
    assert {name: len(rows) for name, rows in found["measured"].items()} == {"ours": 2, "stock": 2}
    for rows in found["measured"].values():
        assert all(row["durable_s"] >= row["blocking_s"] > 0 for row in rows)


def test_bench_durable_has_four_arms_and_raw_limit(tmp_path: Path) -> None:
    found = run_small("bench_durable", tmp_path, "--size", "tiny")
    arms = ("ours blocking", "dcp.save", "ours async", "dcp.async_save", "raw")
    assert {name: len(rows) for name, rows in found["measured"].items()} == dict.fromkeys(arms, 2)
    assert all(row["durable_s"] > 0 for rows in found["measured"].values() for row in rows)


def test_bench_load_loads_in_every_arm(tmp_path: Path) -> None:
    found = run_small("bench_load", tmp_path, "--size", "tiny")
    for arms in found["measured"].values():
        assert {name: len(rows) for name, rows in arms.items()} == {"ours": 2, "stock": 2, "raw": 2}


def test_bench_parts_has_each_part_beside_first_step(tmp_path: Path) -> None:
    found = run_small("bench_parts", tmp_path, "--size", "tiny")
    parts = ("nothing", "copy", "write", "prompt", "save")
    assert {name: len(rows) for name, rows in found["measured"].items()} == dict.fromkeys(parts, 2)
    assert {name: len(steps) for name, steps in found["by_step"].items()} == dict.fromkeys(parts, 3)


def test_bench_memory_counts_writers_and_buffers(tmp_path: Path) -> None:
    found = run_small("bench_memory", tmp_path, "--size", "tiny")
    assert found["buffers"] == 1, "no save after the first makes buffers"
    assert {name: len(seen) for name, seen in found["measured"].items()} == {"ours": 5, "dcp.async_save": 5}
    assert found["copies"]["ours"]["beyond"] > 0.9, "a staged copy is somewhere"


def test_bench_plan_plays_all_ranks(tmp_path: Path) -> None:
    found = run_small("bench_plan", tmp_path, "--size", "tiny", launcher=())
    assert {name: len(rows) for name, rows in found["measured"].items()} == {"ours": 2, "dcp": 2, "cached": 2}
    assert set(found["sizes"]) == {"index.bin", "manifest.json", ".metadata"}


def test_bench_stop_measures_signal_to_commit(tmp_path: Path) -> None:
    found = run_small("bench_stop", tmp_path, "--size", "tiny")
    assert found["size_bytes"] > 1_800_000
    assert {name: len(rows) for name, rows in found["measured"].items()} == {"stop": 2, "raw": 2}
    assert min(row["s"] for rows in found["measured"].values() for row in rows) > 0
    assert len(found["step_s"]) == 2 * 4, "two steps before each signal, warm-ups too"


def save_with_every_arm(folder: str) -> None:
    """Each arm saves; what it wrote is read back into zeros and is the state, weights and moments."""
    from bench.savers import Ours, StockAsync, StockBlocking
    from bench.workload import model_config, sharded_llama

    model, optimizer = sharded_llama(model_config(3), torch.device("cpu"))
    state = TrainState(model=model, optimizer=optimizer)
    want = {name: tensor.clone() for name, tensor in state.tensors().items()}
    arms = {
        "ours": Ours(model, optimizer, AsyncCheckpointMode.async_pinned),
        "ours blocking": Ours(model, optimizer, AsyncCheckpointMode.disabled),
        "async_save": StockAsync(model, optimizer),
        "save": StockBlocking(model, optimizer),
    }
    for name, arm in arms.items():
        path = Path(folder) / name
        arm.begin(path)
        arm.before_update()
        arm.wait()
        arm.close()
        dist.barrier()
        for tensor in state.tensors().values():
            tensor.zero_()
        if name.startswith("ours"):
            load_tensors(state.tensors(), SafetensorsReader(path))
        else:
            weights, moments = get_state_dict(model, optimizer)
            load({"model": weights, "optimizer": moments}, checkpoint_id=path)
        for key, tensor in state.tensors().items():
            assert torch.equal(
                getattr(tensor, "_local_tensor", tensor), getattr(want[key], "_local_tensor", want[key])
            ), (name, key)


def test_savers_every_arm_saves_whole_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    run_ranks(save_with_every_arm, 2, str(tmp_path))


def test_pairs_ratios_have_bounds_and_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    from bench.pairs import Spread, alternate, compare

    order: list[str] = []
    arms = {name: lambda pair, name=name: order.append(f"{name}{pair}") or {"s": 1.0} for name in "ab"}
    assert {name: len(rows) for name, rows in alternate(arms, 2).items()} == {"a": 2, "b": 2}
    assert order == ["b-1", "a-1", "a0", "b0", "b1", "a1"]
    steady = compare("x", [1.0] * 15, [2.0] * 15, goal=0.5)
    assert (steady.ratio, steady.ratio_95, steady.met) == (0.5, (0.5, 0.5), True)
    noisy = compare("x", [1.0, 3.0] * 8, [2.0, 2.0] * 8, goal=1.1, at_most=False)
    low, high = noisy.ratio_95
    assert low < noisy.ratio < high
    assert noisy.met is False
    assert Spread.of([1, 2, 3, 4, 5]) == Spread(3, 2, 4)
