"""``kempnerforge ckpt ls``, ``explain``, ``inspect`` and ``du``, on checkpoints that were really saved."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.ckpt_cli import CONFIG, Ckpt, shard, step_folder
from support.step_maker import flip_byte, write_step

from kempnerforge.checkpoint.format import manifest, paths

pytest_plugins = ["support.ckpt_fixtures"]


# ls and explain


def test_ckpt_ls_lists_steps_with_reasons(ckpt: Ckpt, run: Path) -> None:
    ckpt("pin", run, 10)
    done = ckpt("ls", run)
    assert done.status == 0
    rows = [line.split("  ") for line in done.out.splitlines()]
    assert rows[0][0] == "step"
    assert [line.split()[0] for line in done.out.splitlines()[1:]] == ["40", "30", "20", "10"]
    for line, kept in zip(done.out.splitlines()[1:], ["newest, last", "last", "best", "pinned"], strict=True):
        assert f"interval   {kept}  " in line
        assert line.endswith("ok (unverified)")
    body = ckpt("ls", run, "--json").json
    assert [one["step"] for one in body["steps"]] == [40, 30, 20, 10]
    first = body["steps"][0]
    assert (first["saved_for"], first["attempt"], first["parent_step"]) == ("interval", 2, 30)
    assert first["metrics"] == {"eval/loss": 2.0}
    assert [reason["rule"] for reason in first["reasons"]] == ["newest", "last"]
    assert first["time"] == manifest.load(step_folder(run, 40)).time
    assert first["size_bytes"] > 64 * 32 * 8


def test_ckpt_ls_accepts_checkpoint_folder(ckpt: Ckpt, run: Path, tmp_path: Path) -> None:
    listed = ckpt("ls", run, "--json").json["steps"]
    assert ckpt("ls", run / "checkpoints", "--json").json["steps"] == listed
    moved = shutil.move(run / "checkpoints", tmp_path / "elsewhere")
    assert len(ckpt("ls", moved, "--json").json["steps"]) == 4


def test_ckpt_ls_shows_damage_and_other_folders(ckpt: Ckpt, run: Path) -> None:
    os.truncate(shard(run, 40), 1000)
    (step_folder(run, 30) / "manifest.json").unlink()
    folder = run / "checkpoints"
    for name in (".step_00000050.3.tmp", ".step_00000005.deleting", "quarantined.step_00000007.1"):
        (folder / name).mkdir()
        (folder / name / "x").write_bytes(bytes(2000))
    done = ckpt("ls", run)
    assert done.status == 0
    lines = done.out.splitlines()
    assert "corrupt: step_00000040 is damaged: shard_00000_of_00001.safetensors has 1000 of" in lines[1]
    assert "corrupt: step_00000030 is damaged: manifest.json is missing" in lines[2]
    assert lines[-3:] == [
        "in flight: .step_00000050.3.tmp, 2.0 kB",
        "being deleted: .step_00000005.deleting, 2.0 kB",
        "quarantined: quarantined.step_00000007.1, 2.0 kB",
    ]
    body = ckpt("ls", run, "--json").json
    assert [one["state"] for one in body["steps"]] == ["not sound", "not sound", "looks sound", "looks sound"]
    assert [other["what"] for other in body["others"]] == ["in flight", "being deleted", "quarantined"]


def test_ckpt_ls_verify_checks_every_byte(ckpt: Ckpt, run: Path) -> None:
    done = ckpt("ls", run, "--verify")
    assert done.status == 0
    assert all(line.endswith("  ok") for line in done.out.splitlines()[1:])
    flip_byte(shard(run, 20), -5)
    assert ckpt("ls", run).status == 0
    done = ckpt("ls", run, "--verify")
    assert done.status == 1
    assert "wrong digest" in done.out


def test_ckpt_ls_empty_run_has_no_step(ckpt: Ckpt, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    done = ckpt("ls", tmp_path)
    assert (done.status, done.out) == (0, f"{tmp_path}/checkpoints: no committed step\n")


def test_ckpt_explain_names_rule_for_every_step(ckpt: Ckpt, run: Path) -> None:
    (run / "checkpoints" / "pins").mkdir()
    (run / "checkpoints" / "pins" / "step_00000099").touch()
    done = ckpt("explain", run)
    assert done.status == 0
    assert done.out.splitlines() == [
        "retention rules, from the config in step_00000040: the last 2; the best 1 by eval/loss (min)",
        "step 40: kept: the newest sound step; among the last 2",
        "step 30: kept: among the last 2",
        "step 20: kept: among the best 1: eval/loss 1",
        "step 10: will be deleted after the next save: no rule keeps it",
        "step 99 is pinned but does not exist",
    ]
    body = ckpt("explain", run, "--json").json
    assert body["policy"] == ["the last 2", "the best 1 by eval/loss (min)"]
    assert body["pins_without_step"] == [99]
    assert [(one["step"], one["keep"]) for one in body["steps"]] == [
        (40, True),
        (30, True),
        (20, True),
        (10, False),
    ]


def test_ckpt_explain_missing_metric_reported(ckpt: Ckpt, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_step(tmp_path, step, config=CONFIG)
    assert ckpt("explain", tmp_path).out.splitlines()[-1] == (
        "step 1: will be deleted after the next save: no rule keeps it "
        "(eval/loss was not measured at this step)"
    )


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (None, "the config of step 3 has no [checkpoint]"),
        ("[train]\nseed = 1\n", "the config of step 3 has no [checkpoint]"),
        (
            "[checkpoint]\nkeep_latest = 2\n",
            "cannot read the config in step_00000003 (checkpoint.keep_latest: Extra inputs",
        ),
        ("checkpoint = 2\n", "cannot read the config in step_00000003 (checkpoint: Input should be"),
    ],
)
def test_ckpt_explain_without_config_rules_unknown(
    ckpt: Ckpt, tmp_path: Path, config: str | None, problem: str
) -> None:
    for step in (1, 2, 3):
        write_step(tmp_path, step, config=config)
    done = ckpt("explain", tmp_path)
    assert done.status == 0
    assert problem in done.out
    assert "step 3: kept: the newest sound step" in done.out
    assert "step 1: not known" in done.out
    assert ckpt("explain", tmp_path, "--json").json["policy"] is None
    assert "  ?  " in ckpt("ls", tmp_path).out
    refused = ckpt("prune", tmp_path)
    assert refused.status == 2
    assert problem in refused.err
    assert paths.committed_steps(tmp_path) == [3, 2, 1]


# inspect and du


def test_ckpt_inspect_shows_step_contents(ckpt: Ckpt, run: Path) -> None:
    done = ckpt("inspect", step_folder(run, 30))
    assert done.status == 0
    for part in (
        "step: 30, saved for: interval",
        "run: abc, attempt 2, after step 20",
        "layout: num_ranks 1",
        "versions: torch 2.13",
        "metrics: eval/loss 3.0",
        "data.cursor.samples = 120",
        "tensors: 5",
        "F32 [64, 32]  8.2 kB  shard_00000_of_00001.safetensors",
    ):
        assert part in done.out, part
    body = ckpt("inspect", run / "checkpoints" / "latest", "--json").json
    assert body["step"] == 40
    assert body["tensors"]["model.b"]["dtype"] == "BF16"
    assert body["tensors"]["model.b"]["shape"] == [32]
    (chunk,) = body["tensors"]["model.w"]["chunks"]
    assert (chunk["end"] - chunk["begin"], chunk["offsets"], chunk["sizes"]) == (8192, [0, 0], [64, 32])
    assert body["config"]["checkpoint"]["keep_last_n"] == 2
    assert body["train_state"]["data"] == {"cursor": {"samples": 160}}


def test_ckpt_inspect_match_selects_tensors(ckpt: Ckpt, run: Path) -> None:
    done = ckpt("inspect", step_folder(run, 30), "--match", "model.*", "--json")
    assert sorted(done.json["tensors"]) == ["model.b", "model.w"]
    assert "tensors: 0 that match none" in ckpt("inspect", step_folder(run, 30), "--match", "none").out


def test_ckpt_du_accounts_for_every_byte(ckpt: Ckpt, run: Path) -> None:
    (run / "checkpoints" / ".step_00000050.3.tmp").mkdir()
    (run / "checkpoints" / ".step_00000050.3.tmp" / "x").write_bytes(bytes(777))
    (step_folder(run, 10) / "index.bin").unlink()
    body = ckpt("du", run, "--json").json
    kinds = {one["step"]: one["bytes"] for one in body["steps"]}
    assert {name: kinds[40][name] for name in ("model", "optimizer", "rng")} == {
        "model": 64 * 32 * 4 + 32 * 2,
        "optimizer": 64 * 32 * 4,
        "rng": 100,
    }
    for one in body["steps"][:-1]:
        assert sum(one["bytes"].values()) == one["total_bytes"]
    assert set(kinds[10].values()) == {None}
    assert "index.bin is missing" in body["steps"][-1]["problem"]
    on_disk = sum(
        path.stat().st_size
        for path in (run / "checkpoints").rglob("*")
        if path.is_file() and "latest" not in path.parts
    )
    assert body["total_bytes"] == on_disk
    done = ckpt("du", run)
    assert done.status == 0
    assert done.out.splitlines()[0].split() == ["step", "model", "optimizer", "rng", "other", "total"]
    assert "in flight: .step_00000050.3.tmp, 777 B" in done.out
