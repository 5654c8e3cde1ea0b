"""Beginning from another run's checkpoint, continuing with other data, and what else lies in the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.run_files import digest_of_folder, tensor_digests
from support.runs import Ended, Launcher, Run, copy_run, make_run, write_corpus

pytest_plugins = ["support.run_fixtures"]

SAVED, STEPS = 4, 6
SETTINGS = {"train.max_steps": SAVED, "checkpoint.interval": 2, "eval.interval": 0}
PARTS = ("model", "optimizer", "scheduler", "data", "rng")


def reporting(path: Path) -> list[tuple[str, dict[str, Any]]]:
    return [("report_loaded", {"path": str(path)})]


def loaded(path: Path) -> dict[str, str]:
    """Digests of what the ranks held before their first step, as ``reporting`` left them."""
    return json.loads(Path(f"{path}.rank_0.json").read_text())


@pytest.fixture(scope="module")
def source(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two ranks with steps 2 and 4, and a report of what it began with. Only copies are changed."""
    run = make_run(tmp_path_factory.mktemp("source") / "base", corpus, **SETTINGS)
    ended = launcher.run(run, ranks=2, faults=reporting(run.base / "initial"))
    assert ended.statuses == [0, 0], ended.output
    return run


@pytest.fixture(scope="module")
def continued(launcher: Launcher, source: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``source``, continued to ``STEPS``."""
    run = copy_run(source, tmp_path_factory.mktemp("continued") / "base")
    launcher.finish(run, f"--train.max_steps={STEPS}", ranks=2)
    return run


def warm(source: Path, corpus: Path, base: Path, **settings: Any) -> Run:
    """A new run that begins from ``source``."""
    return make_run(
        base, corpus, **SETTINGS | {"train.max_steps": STEPS, "checkpoint.load_path": str(source), **settings}
    )


def trained(digests: dict[str, str], prefix: str = "") -> dict[str, str]:
    return {k: v for k, v in digests.items() if k.startswith(prefix) and not k.startswith("rng.")}


@pytest.mark.parametrize("given", ["the step's folder", "the folder of all steps", "the run's folder"])
def test_warm_start_continues_as_source_would(
    launcher: Launcher, corpus: Path, tmp_path: Path, source: Run, continued: Run, given: str
) -> None:
    paths = {
        "the step's folder": source.step_folder(SAVED),
        "the folder of all steps": source.checkpoints,
        "the run's folder": source.folder,
    }
    before = {step: digest_of_folder(source.step_folder(step)) for step in (2, 4)}
    run = warm(paths[given], corpus, tmp_path / "warm")
    launcher.finish(run, ranks=2)
    receipt = run.receipts()[-1]
    assert (receipt["source"], receipt["step"]) == ("warm start", SAVED)
    assert receipt["path"] == str(source.step_folder(SAVED))
    expected = {step: row for step, row in continued.counting().items() if step > SAVED}
    assert run.counting() == expected
    assert tensor_digests(run.step_folder(STEPS)) == tensor_digests(continued.step_folder(STEPS))
    assert {step: digest_of_folder(source.step_folder(step)) for step in (2, 4)} == before


def test_warm_start_ignored_once_run_has_own_step(
    launcher: Launcher, corpus: Path, tmp_path: Path, source: Run
) -> None:
    run = warm(source.step_folder(SAVED), corpus, tmp_path / "warm")
    launcher.finish(run, ranks=2)
    launcher.finish(run, f"--train.max_steps={STEPS + 1}", ranks=2)
    assert [(one["source"], one["step"]) for one in run.receipts()] == [("warm start", 4), ("resume", 6)]


@pytest.mark.parametrize("part", PARTS)
def test_warm_start_excluded_part_begins_anew(
    launcher: Launcher, corpus: Path, tmp_path: Path, source: Run, continued: Run, part: str
) -> None:
    """All other parts are loaded."""
    run = warm(source.folder, corpus, tmp_path / "warm", **{"checkpoint.exclude_from_loading": [part]})
    report = tmp_path / "loaded"
    ended = launcher.run(run, ranks=2, faults=reporting(report))
    assert ended.statuses == [0, 0], ended.output
    receipt = run.receipts()[-1]
    assert receipt["not_loaded"] == [part]

    stored, initial = tensor_digests(source.step_folder(SAVED)), loaded(source.base / "initial")
    for prefix in ("model", "optimizer"):
        expected = initial if part == prefix else stored
        assert trained(loaded(report), prefix) == trained(expected, prefix)

    step = 0 if part == "scheduler" else SAVED
    samples = 0 if part == "data" else SAVED
    assert receipt["step"] == step
    assert receipt["cursor"] == ("start" if part == "data" else "restored")
    assert receipt["rng"] == ("left as the program has them" if part == "rng" else "restored")
    whole, found = continued.counting(), run.counting()
    steps = [number for number in sorted(found) if "train/loss" in found[number]]
    assert steps == list(range(step + 1, STEPS + 1))
    for number in steps[:2]:
        assert found[number]["data/digest"] == whole[number - step + samples]["data/digest"]
        assert found[number]["train/lr"] == whole[number]["train/lr"]
    if part == "rng":  # nothing in training draws random numbers
        assert found[STEPS] == whole[STEPS]


def assert_refused(run: Run, ended: Ended, status: int, *reported: str) -> None:
    """All ranks ended with ``status``, rank 0 reported why, and nothing was trained."""
    assert ended.statuses == [status, status], ended.output
    assert "Traceback" not in ended.output
    for text in reported:
        assert text in ended.outputs[0]
    assert ended.outputs[1] == ""
    assert run.committed() == []
    assert run.rows() == []


@pytest.mark.smoke
def test_warm_start_missing_path_is_refused(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    run = warm(tmp_path / "nowhere", corpus, tmp_path / "warm")
    assert_refused(run, launcher.run(run, ranks=2), 2, "checkpoint.load_path", "nowhere", "does not exist")


def test_warm_start_path_without_checkpoint_is_refused(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    run = warm(corpus, corpus, tmp_path / "warm")
    reported = ("checkpoint.load_path", str(corpus), "no committed checkpoint")
    assert_refused(run, launcher.run(run, ranks=2), 2, *reported)


def test_warm_start_damaged_source_fails_unrenamed(
    launcher: Launcher, corpus: Path, tmp_path: Path, source: Run
) -> None:
    damaged = copy_run(source, tmp_path / "damaged")
    shard = damaged.step_folder(SAVED) / "shard_00001_of_00002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    names, before = damaged.names(), digest_of_folder(damaged.step_folder(SAVED))
    run = warm(damaged.folder, corpus, tmp_path / "warm")
    for _ in range(2):
        reported = ("checkpoint.load_path", "is damaged", shard.name)
        assert_refused(run, launcher.run(run, ranks=2), 1, *reported)
    (damaged.step_folder(SAVED) / "manifest.json").write_text("{}")
    before["manifest.json"] = digest_of_folder(damaged.step_folder(SAVED))["manifest.json"]
    assert_refused(run, launcher.run(run, ranks=2), 1, "is damaged", "manifest.json")
    assert damaged.names() == names
    assert digest_of_folder(damaged.step_folder(SAVED)) == before


@pytest.mark.smoke
def test_warm_start_other_model_is_mismatch(
    launcher: Launcher, corpus: Path, tmp_path: Path, source: Run
) -> None:
    run = warm(source.folder, corpus, tmp_path / "warm", **{"model.n_layers": 3})
    reported = ("checkpoint.load_path", "model.n_layers was 2, is 3")
    assert_refused(run, launcher.run(run, ranks=2), 2, *reported)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--model.n_heads=4", "model.n_heads was 2, is 4"),
        ("--model.n_kv_heads=2", ""),
        ("--model.rope_theta=500000", "model.rope_theta was 10000.0, is 500000.0"),
    ],
)
def test_resume_same_shapes_other_model_is_refused(
    launcher: Launcher, tmp_path: Path, source: Run, override: str, said: str
) -> None:
    """All tensors would fit, and compute something else. ``n_kv_heads`` of 2 is what none means here."""
    run = copy_run(source, tmp_path / "copy")
    rows, names = run.rows(), run.names()
    ended = launcher.run(run, override, f"--train.max_steps={STEPS}", ranks=2)
    if not said:
        assert ended.statuses == [0, 0], ended.output
        return
    assert ended.statuses == [2, 2], ended.output
    way_on = f"--run.name=NEW --checkpoint.load_path={run.step_folder(SAVED)}"
    assert said in ended.outputs[0]
    assert way_on in ended.outputs[0]
    assert "Traceback" not in ended.output
    assert (run.rows(), run.names()) == (rows, names)
    new = [override, f"--run.dir={tmp_path}/new", f"--checkpoint.load_path={run.step_folder(SAVED)}"]
    begun = launcher.finish(run, *new, f"--train.max_steps={STEPS}", ranks=2)
    assert f"config: {said.split(' was ')[0]} was" in begun.outputs[0]


@pytest.mark.smoke
def test_resume_other_data_is_refused_unless_allowed(launcher: Launcher, tmp_path: Path, source: Run) -> None:
    run = copy_run(source, tmp_path / "copy")
    other = write_corpus(tmp_path / "other", seed=2)
    command = (f'--data.text=["{other}/*.txt"]', f"--train.max_steps={STEPS}")
    rows, names = run.rows(), run.names()
    refused = launcher.run(run, *command, ranks=2)
    assert refused.statuses == [2, 2], refused.output
    assert "other data" in refused.outputs[0]
    assert "--data.allow_changed=true" in refused.outputs[0]
    assert "Traceback" not in refused.output
    assert (run.rows(), run.names()) == (rows, names)

    launcher.finish(run, *command, "--data.allow_changed=true", ranks=2)
    receipt = run.receipts()[-1]
    assert receipt["step"] == SAVED
    assert receipt["data_changes"]
    assert not receipt["bitwise"]
    assert sorted(run.counting()) == [0, *range(1, STEPS + 1)][-STEPS:]


def test_retention_foreign_entries_are_left_alone(launcher: Launcher, tmp_path: Path, source: Run) -> None:
    """What is not a checkpoint of this run's making is left alone and not counted."""
    run = copy_run(source, tmp_path / "copy")
    backup, foreign = run.checkpoints / "step_9.bak", run.checkpoints / "step_00000099"
    shutil.copytree(run.step_folder(SAVED), backup)
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    (run.checkpoints / "step_00000098").mkdir()
    (run.checkpoints / "step_00000050").write_text("a file")
    (run.checkpoints / "step_00000097").symlink_to(run.step_folder(2))
    shutil.copytree(run.step_folder(SAVED), run.checkpoints / "step_7")
    lost = run.checkpoints / "step_00000001"  # one of ours without its manifest
    shutil.copytree(run.step_folder(2), lost)
    (lost / "manifest.json").unlink()
    strangers = run.names() - {"step_00000002", "step_00000004", "latest"}
    launcher.finish(run, f"--train.max_steps={STEPS + 2}", "--checkpoint.keep_last_n=2", ranks=2)
    assert run.receipts()[-1]["step"] == SAVED
    assert run.receipts()[-1]["rejected"] == []
    assert run.names() == strangers | {"step_00000006", "step_00000008", "latest"}
    assert (foreign / "notes.txt").read_text() == "mine"
    assert digest_of_folder(backup) == digest_of_folder(source.step_folder(SAVED))


def test_save_name_taken_fails_only_that_save(launcher: Launcher, tmp_path: Path, source: Run) -> None:
    run = copy_run(source, tmp_path / "copy")
    (run.checkpoints / "step_00000006").write_text("mine")
    ended = launcher.finish(run, "--train.max_steps=8", ranks=2)
    assert "step_00000006" in ended.outputs[0]
    assert "training continues" in ended.outputs[0]
    assert (run.checkpoints / "step_00000006").read_text() == "mine"
    assert run.sound() == [8, 4, 2]
    assert run.unfinished() == []
