"""Damaged, unreachable, foreign and other checkpoints: each is distinguished from the others.

A damaged step is named, set aside and never loaded, and all ranks resume from the step before it. What cannot
be read, or does not fit, stops the run and is left as it is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.run_files import digest_of_folder, tensor_digests
from support.runs import Ended, Fault, Launcher, Run, copy_run, make_run

pytest_plugins = ["support.run_fixtures"]

STEPS, BEFORE = 6, 4
SETTINGS = {"train.max_steps": STEPS, "checkpoint.interval": 2, "eval.interval": 3}
SHARDS = ("shard_00000_of_00002.safetensors", "shard_00001_of_00002.safetensors")
Damage = Callable[[Path], object]
"""Is given the folder of the step to damage."""


@pytest.fixture(scope="module")
def base(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of two ranks with steps 2, 4 and 6. Tests work on copies."""
    run = make_run(tmp_path_factory.mktemp("damage") / "base", corpus, **SETTINGS)
    launcher.finish(run, ranks=2)
    assert run.committed() == [6, 4, 2]
    return run


@pytest.fixture
def run(base: Run, tmp_path: Path) -> Run:
    """A copy of ``base``."""
    return copy_run(base, tmp_path / "copy")


def flip(path: Path, offset: int) -> None:
    """Flip one bit of the byte at ``offset``; negative ones count from the end."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def flipped(name: str, offset: int) -> Damage:
    return lambda step: flip(step / name, offset)


def cut(name: str, missing_bytes: int) -> Damage:
    return lambda step: (step / name).write_bytes((step / name).read_bytes()[:-missing_bytes])


def removed(name: str) -> Damage:
    return lambda step: (step / name).unlink()


def of_step(name: str, other: str) -> Damage:
    """The file of the same name from another step."""
    return lambda step: shutil.copy(step.parent / other / name, step / name)


def swapped(step: Path) -> None:
    """The two shards under each other's name."""
    one, other = (step / name for name in SHARDS)
    one.rename(step / "between")
    other.rename(one)
    (step / "between").rename(other)


def header_end(step: Path) -> int:
    """Where the data of shard 0 begins; the bytes just before it are padding."""
    begin = 8 + int.from_bytes((step / SHARDS[0]).read_bytes()[:8], "little")
    assert (step / SHARDS[0]).read_bytes()[begin - 1 : begin] == b" "
    return begin


def garbage_index(step: Path) -> None:
    """Not an index, of the right size."""
    size = (step / "index.bin").stat().st_size
    (step / "index.bin").write_bytes(b"not an index" * size)
    with open(step / "index.bin", "r+b") as file:
        file.truncate(size)


DAMAGES: dict[str, tuple[str, Damage]] = {
    "a flipped bit in the first header byte": (SHARDS[0], flipped(SHARDS[0], 0)),
    "a flipped bit in a name in the header": (SHARDS[1], flipped(SHARDS[1], 60)),
    "a flipped bit in the padding": (SHARDS[0], lambda step: flip(step / SHARDS[0], header_end(step) - 1)),
    "a flipped bit in the first weight": (SHARDS[0], lambda step: flip(step / SHARDS[0], header_end(step))),
    "a flipped bit in the middle": (SHARDS[1], flipped(SHARDS[1], 200_000)),
    "a flipped bit in the last byte": (SHARDS[1], flipped(SHARDS[1], -1)),
    "a shard that is one byte short": (SHARDS[0], cut(SHARDS[0], 1)),
    "a shard cut in half": (SHARDS[1], cut(SHARDS[1], 200_000)),
    "two shards swapped": ("shard_0000", swapped),
    "a shard of another step": (SHARDS[1], of_step(SHARDS[1], "step_00000004")),
    "a shard that is missing": (SHARDS[1], removed(SHARDS[1])),
    "the manifest of another step": ("manifest", of_step("manifest.json", "step_00000004")),
    "a flipped bit in the manifest": ("manifest.json", flipped("manifest.json", 700)),
    "half a manifest": ("manifest.json", cut("manifest.json", 800)),
    "an empty manifest": ("manifest.json", lambda step: (step / "manifest.json").write_bytes(b"")),
    "no manifest": ("manifest.json", removed("manifest.json")),
    "no index": ("index.bin", removed("index.bin")),
    "an invalid index": ("index.bin", garbage_index),
    "a flipped bit in the index": ("index.bin", flipped("index.bin", 300)),
    "a flipped bit in train_state.json": ("train_state.json", flipped("train_state.json", 12)),
    "no train_state.json": ("train_state.json", removed("train_state.json")),
    "a flipped bit in config.toml": ("config.toml", flipped("config.toml", 30)),
}
"""What happens -> part of the file's name that must be reported, and how to do it."""


def assert_reported(run: Run, ended: Ended, step: int, name: str) -> None:
    """The newest receipt and the console name the step and the file."""
    (rejected,) = run.receipts()[-1]["rejected"]
    assert (rejected["step"], rejected["outcome"]) == (step, "damaged")
    assert rejected["moved_to"] == f"quarantined.step_{step:08d}.1"
    assert f"step_{step:08d}" in rejected["reason"]
    assert name in rejected["reason"]
    assert rejected["reason"] in ended.outputs[0]
    assert rejected["moved_to"] in ended.outputs[0]


@pytest.mark.parametrize("what", DAMAGES)
def test_resume_damaged_step_quarantined_uses_previous(
    launcher: Launcher, base: Run, run: Run, what: str
) -> None:
    """A damaged step is named and set aside, and all ranks resume from the one before."""
    name, damage = DAMAGES[what]
    damage(run.step_folder(STEPS))
    damaged = digest_of_folder(run.step_folder(STEPS))
    ended = launcher.finish(run, ranks=2)
    assert_reported(run, ended, STEPS, name)
    receipt = run.receipts()[-1]
    assert (receipt["source"], receipt["step"], receipt["lost_steps"]) == ("resume", BEFORE, STEPS - BEFORE)
    assert digest_of_folder(run.checkpoints / f"quarantined.step_{STEPS:08d}.1") == damaged
    assert run.sound() == [6, 4, 2]
    assert run.counting() == base.counting()
    assert tensor_digests(run.step_folder(STEPS)) == tensor_digests(base.step_folder(STEPS))


@pytest.mark.smoke
def test_resume_damage_seen_by_rank_1_moves_both_ranks_back(launcher: Launcher, base: Run, run: Run) -> None:
    """Damage that only the second rank reads sends both ranks to the step before."""
    report = run.base / "loaded"
    ended = launcher.run(
        run,
        ranks=2,
        faults=[
            ("misread", {"name": f"step_{STEPS:08d}/{SHARDS[1]}", "rank": 1}),
            ("report_loaded", {"path": str(report)}),
        ],
    )
    assert ended.statuses == [0, 0], ended.output
    assert "(rank 1)" in run.receipts()[-1]["rejected"][0]["reason"]
    stored = tensor_digests(base.step_folder(BEFORE))
    for rank in range(2):
        loaded = json.loads(Path(f"{report}.rank_{rank}.json").read_text())
        assert loaded == {name: one for name, one in stored.items() if not name.startswith("rng.")}
    assert run.counting() == base.counting()


def test_resume_several_damaged_steps_all_quarantined(launcher: Launcher, base: Run, run: Run) -> None:
    flip(run.step_folder(6) / SHARDS[0], -1)
    (run.step_folder(4) / "manifest.json").unlink()
    launcher.finish(run, ranks=2)
    receipt = run.receipts()[-1]
    assert [one["step"] for one in receipt["rejected"]] == [6, 4]
    assert receipt["step"] == 2
    assert {"quarantined.step_00000006.1", "quarantined.step_00000004.1"} <= run.names()
    assert run.counting() == base.counting()

    flip(run.step_folder(6) / SHARDS[0], -1)  # and the same step once more
    launcher.finish(run, ranks=2)
    assert run.receipts()[-1]["rejected"][0]["moved_to"] == "quarantined.step_00000006.2"
    assert {"quarantined.step_00000006.1", "quarantined.step_00000006.2"} <= run.names()
    assert run.counting() == base.counting()


@pytest.mark.smoke
def test_resume_no_sound_step_stops_and_never_restarts_at_0(launcher: Launcher, run: Run) -> None:
    rows, receipts = run.rows(), run.receipts()
    for step in (2, 4, 6):
        flip(run.step_folder(step) / SHARDS[step % 4 // 2], -1)
    for _ in range(2):  # the second time, only quarantined steps are there
        ended = launcher.run(run, ranks=2)
        assert ended.statuses == [1, 1], ended.output
        assert "no sound checkpoint is left" in ended.outputs[0]
        for step in (2, 4, 6):
            assert f"quarantined.step_{step:08d}.1" in ended.outputs[0]
        assert "--run.name" in ended.outputs[0]
        assert "Traceback" not in ended.output
        assert run.committed() == []
        assert run.rows() == rows
        assert run.receipts() == receipts
        assert "no sound checkpoint" in run.record["last_exit"]["reason"]
        assert run.record["last_exit"]["status"] == 1
    for step in (2, 4, 6):
        assert (run.checkpoints / f"quarantined.step_{step:08d}.1" / "manifest.json").exists()


@pytest.mark.smoke
def test_resume_other_model_mismatch_names_keys(launcher: Launcher, run: Run) -> None:
    """A mismatch names what was changed, instead of all tensors, and nothing is renamed."""
    names = run.names()
    ended = launcher.run(run, "--model.dim=48", "--model.n_heads=3", ranks=2)
    assert ended.statuses == [2, 2], ended.output
    assert "does not fit this config" in ended.outputs[0]
    for line in ("model.dim was 32, is 48", "model.n_heads was 2, is 3", "--run.name=NEW"):
        assert line in ended.outputs[0]
    assert "layers.0" not in ended.outputs[0]
    assert "Traceback" not in ended.output
    assert run.names() == names
    assert run.sound() == [6, 4, 2]


@pytest.mark.parametrize(
    ("rank", "how", "error"),
    [
        (0, ("unreadable", {}), "Input/output error"),
        (1, ("failing", {"operation": "open", "error": "ENOENT"}), "No such file or directory"),
    ],
    ids=["EIO on rank 0", "missing on rank 1"],
)
def test_resume_unreadable_on_one_rank_stops_all_ranks(
    launcher: Launcher, run: Run, rank: int, how: Fault, error: str
) -> None:
    """The step is left as it is."""
    names, rows = run.names(), run.rows()
    # That the other rank sees damage must not count: what this one cannot read may be sound.
    at = f"step_{STEPS:08d}/{SHARDS[rank]}"
    name, arguments = how
    faults = [(name, {**arguments, "name": at, "rank": rank}), ("misread", {"name": at, "rank": 1 - rank})]
    ended = launcher.run(run, ranks=2, faults=faults)
    assert ended.statuses == [1, 1], ended.output
    assert "cannot be read" in ended.outputs[0]
    assert error in ended.outputs[0]
    assert f"(rank {rank})" in ended.outputs[0]
    assert "Traceback" not in ended.output
    assert run.names() == names
    assert run.rows() == rows


def test_resume_transient_read_error_is_retried(launcher: Launcher, base: Run, run: Run) -> None:
    again = f"--train.max_steps={STEPS + 1}"
    ended = launcher.run(
        run, again, ranks=2, faults=[("unreadable", {"name": "step_", "rank": 1, "times": 2})]
    )
    assert ended.statuses == [0, 0], ended.output
    receipt = run.receipts()[-1]
    assert (receipt["step"], receipt["rejected"]) == (STEPS, [])
