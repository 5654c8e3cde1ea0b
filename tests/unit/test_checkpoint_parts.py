"""Small parts of the checkpoint package: leaves, generators, outcomes, receipts, file system."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kempnerforge import fsio
from kempnerforge.checkpoint.format import json_values
from kempnerforge.checkpoint.format.checksums import FileRecord
from kempnerforge.checkpoint.format.safetensors_file import ShardItem, plan_image, split_by_name
from kempnerforge.checkpoint.load import candidates, load_step
from kempnerforge.checkpoint.run.resume_report import Receipt
from kempnerforge.checkpoint.save.commit import ExpectedFiles, FileReport, PlannedFile, PlannedItem
from kempnerforge.checkpoint.state import rng_state
from kempnerforge.errors import MismatchError, SaveFailedError, UnreachableCheckpointError
from kempnerforge.goodput.run_history import METRICS, last_logged_step

CPU = torch.device("cpu")

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.booleans(), inner)
        | st.frozensets(scalars)
    ),
    max_leaves=12,
)


@given(values)
def test_leaves_json_round_trip_equal(value: object) -> None:
    assert (
        json_values.decode(json.loads(json.dumps(json_values.encode(value, name="x"), allow_nan=False)))
        == value
    )


@pytest.mark.parametrize("bad", [object(), {"a": [1, {"b": object()}]}, np.float32(1), Path("a"), lambda: 1])
def test_leaves_unsupported_value_named(bad: object) -> None:
    with pytest.raises(TypeError, match=r"state.*a checkpoint cannot hold"):
        json_values.encode({"state": bad}, name="root")


def test_leaves_unknown_tag_refused() -> None:
    with pytest.raises(ValueError, match="__reduce__"):
        json_values.decode({"__reduce__": ["os.system", "true"]})


def draw() -> list[object]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()]


def test_rng_restore_exact_capture_draws_nothing() -> None:
    rng_state.derive(1, 2, 3, CPU)
    draw()  # leaves a Gaussian behind in Python and in NumPy
    random.gauss(0, 1)
    np.random.randn()
    state = rng_state.capture(CPU)
    assert state.dtype == torch.uint8
    assert rng_state.captured_on(state) == "cpu"
    expected = draw()
    rng_state.restore(state, CPU)
    assert torch.equal(rng_state.capture(CPU), state)
    assert draw() == expected


def test_rng_derive_depends_on_seed_step_rank() -> None:
    seen = []
    for key in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 2, 3)]:
        rng_state.derive(*key, CPU)
        seen.append(str(draw()))
    assert seen[0] == seen[4]
    assert len(set(seen)) == 4


def test_rng_other_format_is_mismatch() -> None:
    with pytest.raises(MismatchError, match="RNG state has format"):
        rng_state.restore(torch.zeros(5000, dtype=torch.uint8), CPU)


FAULT = ("Exception", "TypeError: x")
UNREACHABLE = ("UnreachableCheckpointError", "u")
MISMATCH = ("MismatchError", "m")
DAMAGED = ("DamagedCheckpointError", "d")


@pytest.mark.parametrize(
    ("outcomes", "agreed"),
    [
        ([None], None),
        ([None, None], None),
        ([DAMAGED], DAMAGED),
        ([None, DAMAGED], ("DamagedCheckpointError", "d (rank 1)")),
        ([DAMAGED, MISMATCH], ("MismatchError", "m (rank 1)")),
        ([DAMAGED, None, UNREACHABLE, MISMATCH], ("UnreachableCheckpointError", "u (rank 2)")),
        ([DAMAGED, UNREACHABLE, FAULT], ("Exception", "TypeError: x (rank 2)")),
        ([("SomethingNew", "n"), DAMAGED], ("SomethingNew", "n (rank 0)")),
    ],
)
def test_resume_worst_outcome_damage_ranks_last(
    outcomes: list[tuple[str, str] | None], agreed: tuple[str, str] | None
) -> None:
    """Damage renames a step only when nothing else went wrong on any rank."""
    assert load_step.most_severe(outcomes) == agreed


def test_resume_read_errors_retried_then_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "RETRY_DELAYS_S", (0.0, 0.0))
    calls: list[int] = []

    def fail_twice() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise OSError(5, "Input/output error")
        return "read"

    assert candidates.with_retries(fail_twice, what="x") == "read"
    calls.clear()
    calls_needed = 4

    def fail_always() -> None:
        calls.append(1)
        raise OSError(116, "Stale file handle")

    with pytest.raises(UnreachableCheckpointError, match=r"the step cannot be read.*nothing was renamed"):
        candidates.with_retries(fail_always, what="the step")
    assert len(calls) == calls_needed - 1


def planned(*names: str, file: str = "a") -> PlannedFile:
    return PlannedFile(file, tuple(PlannedItem(ShardItem(n, "F32", (0,), (2,)), (2,)) for n in names))


def reported(plan: PlannedFile, *, missing_bytes: int = 0) -> FileReport:
    image = plan_image(plan.shard_items)
    record = FileRecord(image.size_bytes - missing_bytes, ())
    return FileReport(record, xxhash.xxh3_128_hexdigest(image.header))


@pytest.mark.parametrize(
    ("reports", "problem"),
    [
        ({"a": reported(planned("w")), "b": reported(planned("v", file="b"))}, None),
        ({"a": reported(planned("w"))}, "b was not written"),
        ({"a": reported(planned("w"), missing_bytes=4), "b": reported(planned("v"))}, "a has .* of .* bytes"),
        ({"a": reported(planned("w")), "b": reported(planned("x"))}, "b was written to another plan"),
        (
            {"a": reported(planned("w")), "b": reported(planned("v")), "c": reported(planned("u"))},
            "c was written and not planned",
        ),
    ],
)
def test_commit_missing_or_extra_bytes_refused(reports: dict[str, FileReport], problem: str | None) -> None:
    expected = ExpectedFiles((planned("w"), planned("v", file="b")))
    if problem is None:
        expected.check(reports)
    else:
        with pytest.raises(SaveFailedError, match=problem):
            expected.check(reports)


def test_shards_split_by_name_once_per_file() -> None:
    assert split_by_name(["a", "b", "a", "c", "a", "b"]) == [[0, 1, 3], [2, 5], [4]]
    assert split_by_name([]) == []


def test_receipt_changes_reported() -> None:
    assert Receipt(1).lines() == ["fresh start at step 0"]
    same = Receipt(2, source="resume", step=5, rng="restored", config_changes={"checkpoint.interval": [1, 2]})
    assert same.bitwise()
    assert not replace(same, rng="derived from (seed, step, rank)").bitwise()
    assert not replace(same, nondeterministic=True).bitwise()
    assert replace(same, config_changes={"train.shutdown_timeout_s": [25, 30]}).bitwise()
    for field, change in [
        ("config_changes", {"optimizer.lr": [0.1, 0.2]}),
        ("layout_changes", {"num_ranks": [1, 2]}),
        ("version_changes", {"torch": ["2.11", "2.13"]}),
    ]:
        changed = Receipt(2, source="resume", step=5, rng="restored", **{field: change})
        assert not changed.bitwise()
        (before, now) = next(iter(change.values()))
        assert any(f"was {before!r}, is {now!r}" in line for line in changed.lines())
        assert "may differ" in changed.lines()[-1]


def test_receipt_learning_rate_change_said_with_numbers() -> None:
    changed = Receipt(2, source="resume", learning_rate=[1e-4, 6e-4], keeps_schedule="decay_steps = 9")
    line = "  learning rate of the next step: was 0.0001, is 0.0006"
    assert f"{line} (to keep the old schedule: decay_steps = 9)" in changed.lines()
    assert line in replace(changed, keeps_schedule="").lines()


def test_receipt_last_logged_step_skips_other_lines(tmp_path: Path) -> None:
    """Torn lines and rows of other kinds do not count."""
    assert last_logged_step(tmp_path) == 0
    rows = ['{"step": 3, "train/loss": 1}', '{"step": 4, "train/loss": 1}', '{"step": 4, "eval/loss": 2}']
    (tmp_path / METRICS).write_text("\n".join([*rows, '{"step": 5, "train/lo']))
    assert last_logged_step(tmp_path) == 4
    assert last_logged_step(tmp_path, [(2, 3)]) == 3, "a rollback gave the rest up"


def test_atomic_write_failure_keeps_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    fsio.atomic_write(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fsio, "write_all", fail)
    with pytest.raises(OSError, match="No space"):
        fsio.atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_append_line_after_torn_line_stays_separate(tmp_path: Path) -> None:
    path = tmp_path / "receipts.jsonl"
    path.write_text('{"a": 1}\n{"b": ')
    fsio.append_line(path, '{"c": 3}')
    fsio.append_line(path, '{"d": 4}')
    assert path.read_text().splitlines() == ['{"a": 1}', '{"b": ', '{"c": 3}', '{"d": 4}']


def test_publish_existing_target_refused(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "final").mkdir()
    with pytest.raises(FileExistsError):
        fsio.publish(tmp_path / "tmp", tmp_path / "final")
    fsio.publish(tmp_path / "tmp", tmp_path / "other")
    assert (tmp_path / "other").is_dir()
