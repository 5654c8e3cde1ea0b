"""``kempnerforge ckpt verify``, ``diff``, ``pin``, ``unpin``, ``prune``, on checkpoints that were saved."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.ckpt_cli import CONFIG, Ckpt, shard, step_folder
from support.step_maker import flip_byte, resign, write_step

from kempnerforge import fsio
from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.retention import read_locks

pytest_plugins = ["support.ckpt_fixtures"]


# verify and diff


def test_ckpt_verify_sound_steps_status_0(ckpt: Ckpt, run: Path) -> None:
    for path in (run, run / "checkpoints", step_folder(run, 20), run / "checkpoints" / "latest"):
        done = ckpt("verify", path)
        assert done.status == 0, done
        assert done.out.count(": ok, ") == (4 if path in (run, run / "checkpoints") else 1)
    body = ckpt("verify", run, "--json", "--threads", 1).json
    assert body["sound"]
    assert [Path(one["path"]).name for one in body["steps"]] == [
        f"step_000000{step}" for step in (40, 30, 20, 10)
    ]


def test_ckpt_verify_damaged_step_continues(ckpt: Ckpt, run: Path) -> None:
    flip_byte(shard(run, 30), -5)
    (step_folder(run, 10) / "manifest.json").unlink()
    (step_folder(run, 20) / "notes.txt").write_text("mine")
    done = ckpt("verify", run)
    assert done.status == 1
    assert "step_00000040: ok" in done.out
    assert "step_00000030: corrupt\n  shard_00000_of_00001.safetensors has a wrong digest" in done.out
    assert "step_00000020: ok" in done.out
    assert "  not part of it: notes.txt" in done.out
    assert "step_00000010: corrupt\n  manifest.json is missing" in done.out
    body = ckpt("verify", run, "--json").json
    assert [one["sound"] for one in body["steps"]] == [True, False, True, False]
    assert not body["sound"]
    assert ckpt("verify", step_folder(run, 30)).status == 1
    assert ckpt("verify", step_folder(run, 20)).status == 0


def test_ckpt_verify_unknown_format_status_2(ckpt: Ckpt, run: Path) -> None:
    resign(step_folder(run, 30), format=2)
    done = ckpt("verify", run)
    assert done.status == 2
    assert "step_00000030 has checkpoint format 2" in done.out
    assert done.out.count(": ok") == 3
    assert ckpt("verify", run, "--json").json["errors"][0]["path"].endswith("step_00000030")


def test_ckpt_verify_many_problems_cut_json_complete(ckpt: Ckpt, tmp_path: Path) -> None:
    path = write_step(tmp_path, 1)
    for number in range(30):
        (path / f"{number:02}.safetensors").touch()
    done = ckpt("verify", path)
    assert "and 10 more; --json shows all" in done.out
    assert len(ckpt("verify", path, "--json").json["steps"][0]["problems"]) == 30


def test_ckpt_diff_same_run_reports_changes(ckpt: Ckpt, run: Path) -> None:
    done = ckpt("diff", step_folder(run, 10), run / "checkpoints" / "latest")
    assert done.status == 0
    for part in (
        "config: no differences",
        "train state: 2 differences\n  data.cursor.samples: 40 -> 160\n  step: 10 -> 40",
        "tensors that differ in content: 2\n  model.w\n  optimizer.state.w.exp_avg",
        "equal tensors: 3",
    ):
        assert part in done.out, part
    body = ckpt("diff", step_folder(run, 10), step_folder(run, 10), "--json").json
    assert body["same"]
    body = ckpt("diff", step_folder(run, 10), step_folder(run, 20), "--no-content", "--json").json
    assert body["tensors"]["content"] is None
    assert body["train_state"]["step"] == [10, 20]
    assert not body["same"]


def test_ckpt_diff_other_run_reports_every_section(ckpt: Ckpt, run: Path, tmp_path: Path) -> None:
    config = CONFIG.replace("seed = 1", "seed = 2")
    other = write_step(tmp_path, 7, config=config, layout={"num_ranks": 8}, versions={"torch": "2.11"})
    done = ckpt("diff", step_folder(run, 10), other)
    assert done.status == 0
    for part in (
        "config: 1 differences\n  train.seed: 1 -> 2",
        "layout: 1 differences\n  num_ranks: 1 -> 8",
        'versions: 1 differences\n  torch: "2.13" -> "2.11"',
        "tensors only in A: 1\n  extra",
        "tensors only in B: 1\n  optimizer.state.w.step",
        "  model.b: BF16 [32] -> F32 [5]",
    ):
        assert part in done.out, part


# pin, unpin, prune


def test_ckpt_prune_deletes_what_explain_listed(ckpt: Ckpt, run: Path) -> None:
    before = sorted(path for path in run.rglob("*"))
    done = ckpt("prune", run, "--dry-run")
    assert done.status == 0
    assert done.out.startswith("would delete 1 step (")
    assert done.out.endswith("): 10\n")
    assert sorted(path for path in run.rglob("*")) == before
    body = ckpt("prune", run, "--json").json
    assert body["steps"] == [10]
    assert body["freed_bytes"] > 10_000
    assert paths.committed_steps(run / "checkpoints") == [40, 30, 20]
    assert ckpt("prune", run).out == "deleted 0 steps (0 B)\n"


def test_ckpt_pin_keeps_step_until_unpinned(ckpt: Ckpt, run: Path) -> None:
    assert ckpt("pin", run, 10, "--note", "for the paper").out == "step 10 is pinned\n"
    assert ckpt("pin", run, "step_00000010").out == "step 10 was already pinned\n"
    assert "step 10: kept: pinned by" in ckpt("explain", run).out
    assert ": for the paper" in ckpt("explain", run).out
    assert ckpt("prune", run, "--json").json["steps"] == []
    assert ckpt("unpin", run, 10, "--json").json == {"step": 10, "pinned": False, "changed": True}
    assert ckpt("unpin", run, 10).out == "step 10 was not pinned\n"
    assert ckpt("prune", run, "--json").json["steps"] == [10]


def test_ckpt_prune_read_locked_step_stays(ckpt: Ckpt, run: Path) -> None:
    with read_locks.lock_for_reading(step_folder(run, 10), what="export"):
        assert "step 10: kept: being read: export (pid" in ckpt("explain", run).out
        assert ckpt("prune", run, "--json").json["steps"] == []
    assert ckpt("prune", run, "--json").json["steps"] == [10]


def test_ckpt_prune_deletion_fails_status_1(ckpt: Ckpt, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(doomed: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(fsio, "delete_tree", fail)
    done = ckpt("prune", run)
    assert done.status == 1
    assert "could not be deleted: [Errno 5] Input/output error" in done.err
