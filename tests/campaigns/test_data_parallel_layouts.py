"""One TOML, any number of processes: what one saved each other loads, and the data stays the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.run_files import Counting, tensor_digests
from support.runs import Launcher, Run, copy_run, make_run

pytest_plugins = ["support.run_fixtures"]

SAVED, STEPS = 3, 6
SETTINGS = {"train.max_steps": SAVED, "eval.interval": 3, "checkpoint.interval": 0}
HSDP = "2 x 2"
"""Four ranks, two copies of a model that two ranks share each."""
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1": (1, ()),
    "2": (2, ()),
    "4": (4, ()),
    HSDP: (4, ("--distributed.dp_replicate=2",)),
}
"""Name -> ranks and overrides."""
PAIRS = [(saved, resumed) for saved in LAYOUTS for resumed in LAYOUTS if saved != resumed]


@pytest.fixture(scope="module")
def sources(
    launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Run]:
    """By layout, a run that saved ``SAVED`` steps under it."""
    made: dict[str, Run] = {}

    def source(name: str) -> Run:
        if name not in made:
            ranks, overrides = LAYOUTS[name]
            run = make_run(tmp_path_factory.mktemp("source") / "base", corpus, **SETTINGS)
            launcher.finish(run, *overrides, ranks=ranks)
            made[name] = run
        return made[name]

    return source


@pytest.fixture(scope="module")
def uninterrupted(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Counting:
    """The rows of one process that trained all steps without a stop."""
    run = make_run(tmp_path_factory.mktemp("uninterrupted"), corpus, **SETTINGS | {"train.max_steps": STEPS})
    launcher.finish(run)
    return run.counting()


def loaded_digests(report: Path, ranks: int) -> dict[str, str]:
    """What all ranks together held after resuming, on which all must agree."""
    texts = {Path(f"{report}.rank_{rank}.json").read_text() for rank in range(ranks)}
    assert len(texts) == 1
    return json.loads(texts.pop())


@pytest.mark.parametrize(("saved", "resumed"), PAIRS)
def test_resume_other_layout_same_state_and_data(
    launcher: Launcher,
    tmp_path: Path,
    sources: Callable[[str], Run],
    uninterrupted: Counting,
    saved: str,
    resumed: str,
) -> None:
    run = copy_run(sources(saved), tmp_path / "copy")
    ranks, overrides = LAYOUTS[resumed]
    report = tmp_path / "loaded"
    ended = launcher.run(
        run,
        *overrides,
        f"--train.max_steps={STEPS}",
        ranks=ranks,
        faults=[("report_loaded", {"path": str(report)})],
    )
    assert ended.statuses == [0] * ranks, ended.output

    stored = tensor_digests(run.step_folder(SAVED))
    trained = {name: digest for name, digest in stored.items() if not name.startswith("rng.")}
    assert loaded_digests(report, ranks) == trained
    assert {name.split(".")[0] for name in trained} == {"model", "optimizer"}

    found = run.counting()
    assert sorted(found) == sorted(uninterrupted)
    for step in range(1, STEPS + 1):
        assert found[step]["data/digest"] == uninterrupted[step]["data/digest"]
        assert found[step]["train/tokens"] == uninterrupted[step]["train/tokens"]
        for key in ("train/loss", "train/grad_norm"):
            assert found[step][key] == pytest.approx(uninterrupted[step][key], rel=1e-4), (step, key)
    for step in (0, SAVED, STEPS):
        assert found[step]["eval/loss"] == pytest.approx(uninterrupted[step]["eval/loss"], rel=1e-4)

    receipt = run.receipts()[-1]
    assert receipt["step"] == SAVED
    assert receipt["layout_changes"]
    assert not receipt["bitwise"]


def test_resume_same_layout_is_bitwise(
    launcher: Launcher, tmp_path: Path, sources: Callable[[str], Run]
) -> None:
    ranks, overrides = LAYOUTS[HSDP]
    source = sources(HSDP)
    whole = copy_run(source, tmp_path / "whole")
    shutil.rmtree(whole.folder)
    launcher.finish(whole, *overrides, f"--train.max_steps={STEPS}", ranks=ranks)
    run = copy_run(source, tmp_path / "copy")
    launcher.finish(run, *overrides, f"--train.max_steps={STEPS}", ranks=ranks)
    assert run.receipts()[-1]["rng"] == "restored"
    assert run.receipts()[-1]["layout_changes"] == {}
    assert run.counting() == whole.counting()
    assert tensor_digests(run.step_folder(STEPS)) == tensor_digests(whole.step_folder(STEPS))


def test_epoch_ranks_change_every_sample_read_once(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    settings = {"train.global_batch_size": 8, "eval.interval": 0, "data.prefetch_batches": 0}
    of_19_batches = {"data.val_fraction": 0.12, "checkpoint.interval": 0}
    run = make_run(tmp_path / "base", corpus, **settings, **of_19_batches)
    read = tmp_path / "read"
    read.mkdir()
    step, ids, output = 0, [], ""
    for number, (ranks, steps) in enumerate([(2, 6), (1, 5), (4, 8)]):
        step += steps
        record = [("record_samples", {"path": str(read / str(number))})]
        ended = launcher.run(run, f"--train.max_steps={step}", ranks=ranks, faults=record)
        output = ended.output
        assert ended.statuses == [0] * ranks, output
        files = [read / f"{number}.rank_{rank}.jsonl" for rank in range(ranks)]
        of_ranks = [[i for line in file.read_text().splitlines() for i in json.loads(line)] for file in files]
        assert [len(one) for one in of_ranks] == [8 * steps // ranks] * ranks
        ids += [i for one in of_ranks for i in one]
    assert f"data: {len(ids)} samples" in output, "these steps are not one epoch of this corpus"
    assert sorted(ids) == list(range(len(ids)))


def test_batch_size_unset_is_kept_on_other_ranks(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    open_size = {"train.global_batch_size": None, "train.batch_size": 2}
    run = make_run(tmp_path / "open", corpus, **SETTINGS, **open_size)
    launcher.finish(run, ranks=2)
    assert run.record["global_batch_size"] == 4
    launcher.finish(run, f"--train.max_steps={STEPS}", ranks=1)
    assert run.record["global_batch_size"] == 4

    stated = make_run(tmp_path / "stated", corpus, **SETTINGS, **open_size | {"train.global_batch_size": 4})
    launcher.finish(stated, f"--train.max_steps={STEPS}", ranks=1)
    digests = [(step, row.get("data/digest")) for step, row in run.counting().items()]
    assert digests == [(step, row.get("data/digest")) for step, row in stated.counting().items()]


def test_batch_size_not_divisible_refused_with_values(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, corpus, **SETTINGS, **{"train.global_batch_size": None, "train.batch_size": 3})
    launcher.finish(run, ranks=1)
    rows = run.rows()
    refused = launcher.run(run, f"--train.max_steps={STEPS}", ranks=2)
    assert refused.statuses == [2, 2], refused.output
    assert "train.global_batch_size" in refused.outputs[0]
    assert "6" in refused.outputs[0]
    assert "Traceback" not in refused.output
    assert refused.outputs[1] == ""
    assert run.rows() == rows
    launcher.finish(run, f"--train.max_steps={STEPS}", ranks=1)
