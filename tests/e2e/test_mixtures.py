"""Runs on a mixture: the same samples after kills on other ranks, and what a resume may change."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.mixtures import SOURCES, assert_trained_on_same, mixture_run, recorded, sources_of
from support.patch_target import patch_target
from support.runs import Ended, Launcher, Run

pytest_plugins = ["support.run_fixtures"]

UPDATE = patch_target("kempnerforge.train.step:LocalStep.update")


def refusal(ended: Ended) -> str:
    assert set(ended.statuses) == {2}, ended.output
    assert "Traceback" not in ended.output
    return ended.output


def digests(run: Run) -> dict[int, str]:
    """Return the digest of the samples of each step that counts."""
    return {step: row["data/digest"] for step, row in run.counting().items() if "data/digest" in row}


def rows_with(run: Run, key: str) -> dict[int, dict[str, Any]]:
    return {row["step"]: row for row in run.rows() if key in row}


@pytest.mark.smoke
def test_mixture_killed_on_other_ranks_has_the_same_samples(launcher: Launcher, tmp_path: Path) -> None:
    """Three sources and two phases. The kills are in both, and one resume is where the second begins."""
    whole = mixture_run(tmp_path / "whole")
    ended = recorded(launcher, whole, ranks=2)
    assert ended.statuses == [0, 0], ended.output
    assert "mixture: books 30%, code 20%, web 50%; books 60%, web 40% from step 6 on" in ended.output
    assert "epochs of books" in ended.output
    reported = launcher.run(whole, str(whole.folder), command=["report"])
    assert "tokens" in reported.output
    assert "epochs" not in reported.output, "the sources have epochs of their own"
    run = mixture_run(tmp_path / "killed")
    for ranks, call in ((1, 5), (4, 3), (2, 4)):
        kill = {"target": UPDATE, "call": call, "rank": 0}
        ended = recorded(launcher, run, ranks=ranks, faults=[("kill_at_call", kill)])
        assert -9 in ended.statuses, ended.output
    assert recorded(launcher, run, ranks=4).statuses == [0] * 4
    assert len(digests(whole)) == 12
    assert_trained_on_same(run, whole)
    resumes = [receipt for receipt in run.receipts() if receipt["source"] == "resume"]
    assert [receipt["next_batch"] for receipt in resumes] == ["proved"] * len(resumes) == ["proved"] * 3

    for row in rows_with(whole, "train/loss").values():
        drawn = {key.rpartition("/")[2] for key in row if key.startswith("data/epoch/")}
        assert drawn == {"books", "code", "web"}
        losses = {key.rpartition("/")[2]: row[key] for key in row if key.startswith("train/loss/")}
        assert losses.keys() <= ({"books", "web"} if row["step"] > 6 else drawn)
        assert min(losses.values()) <= row["train/loss"] <= max(losses.values())
    last = rows_with(whole, "train/loss")[12]
    samples = {name: last[f"data/epoch/{name}"] * size for name, size in sources_of(whole).items()}
    assert {name: round(count) for name, count in samples.items()} == {"books": 22, "code": 5, "web": 21}


def test_mixture_validates_each_source_and_weights_them(launcher: Launcher, tmp_path: Path) -> None:
    run = mixture_run(tmp_path / "run", {"eval.interval": 4, "data.document_mask": True})
    launcher.finish(run, ranks=2)
    rows = rows_with(run, "eval/loss")
    assert sorted(rows) == [0, 4, 8, 12]
    for step, row in rows.items():
        weights = {"web": 0.4, "books": 0.6} if step >= 6 else {"web": 0.5, "books": 0.3, "code": 0.2}
        assert {f"eval/loss/{name}" for name in SOURCES} <= row.keys()
        mean = sum(row[f"eval/loss/{name}"] * weight for name, weight in weights.items())
        assert row["eval/loss"] == pytest.approx(mean, rel=1e-12)
    step = str(run.step_folder(12))
    ended = launcher.run(run, "--json", step, command=["eval"], ranks=2)
    assert ended.statuses == [0, 0], ended.output
    printed = json.loads(ended.outputs[0][ended.outputs[0].index("{\n") :])
    assert printed["eval/loss"] == rows[12]["eval/loss"]
    assert printed["source_losses"] == {name: rows[12][f"eval/loss/{name}"] for name in sorted(SOURCES)}
    # The same sequences in larger batches: the phases remain where they were.
    larger = ("--train.global_batch_size=8", "--eval.num_batches=1")
    ended = launcher.run(run, "--json", step, *larger, command=["eval"])
    printed = json.loads(ended.outputs[0][ended.outputs[0].index("{\n") :])
    assert printed["eval/loss"] == pytest.approx(rows[12]["eval/loss"], rel=1e-6)
    assert printed["data_changes"] == []


def test_source_added_at_a_resume_is_in_the_receipt(launcher: Launcher, tmp_path: Path) -> None:
    run = mixture_run(tmp_path / "run", {"train.max_steps": 8}, phases=[])
    launcher.finish(run, ranks=2)
    before = digests(run)
    extra = {**SOURCES, "extra": 0}
    mixture_run(run.base, sources=extra, phases=[(8, {"web": 1, "extra": 1})])
    ended = launcher.finish(run, ranks=4)
    assert 'data: new source "extra" from step 8 on' in ended.output
    assert "data: weights: extra 50%, web 50% from step 8 on" in ended.output
    after = digests(run)
    assert {step: after[step] for step in before} == before
    last = rows_with(run, "train/loss")[12]
    assert last["data/epoch/extra"] * sources_of(run)["extra"] == pytest.approx(8)

    mixture_run(run.base, {"train.max_steps": 16}, sources=extra, phases=[(6, {"web": 1, "extra": 1})])
    refused = refusal(launcher.run(run, ranks=2))
    assert "was trained on other data" in refused
    assert "the weights: were books 30%, code 20%, web 50% from step 0 on; extra 50%" in refused
    assert "--data.allow_changed=true" in refused
    launcher.finish(run, "--data.allow_changed=true", ranks=2)


def test_source_used_up_stops_the_run_as_its_last_step(launcher: Launcher, tmp_path: Path) -> None:
    """The step is known at the start, and committed. More samples of others continue the run."""
    ends = {"code": "stop"}
    run = mixture_run(tmp_path / "run", {"train.max_steps": 500, "eval.interval": 40}, phases=[], ends=ends)
    ended = launcher.finish(run, "--checkpoint.interval=0", ranks=2)
    size = sources_of(run)["code"]
    found = re.search(r'length: (\d+) steps \(then source "code" is used up\)', ended.output)
    assert found is not None, ended.output
    step = int(found[1])
    assert run.committed() == [step, 0] or run.committed() == [step]
    assert abs(step * 4 * 0.2 - size) <= 2, "code is every fifth sample, and the steps have four"
    assert f'finished at step {step}: source "code" is used up.' in ended.output
    assert max(rows_with(run, "eval/loss")) == step
    row = rows_with(run, "train/loss")[step]
    assert 1 - 1 / size <= row["data/epoch/code"] <= 1
    again = launcher.finish(run, ranks=4)
    assert f"finished at step {step}" in again.output

    mixture_run(run.base, {"train.max_steps": step + 3}, ends=ends, phases=[(step, {"web": 1})])
    launcher.finish(run, ranks=1)
    assert run.committed()[0] == step + 3


def test_source_used_up_before_the_first_step_is_refused(launcher: Launcher, tmp_path: Path) -> None:
    run = mixture_run(tmp_path / "run", {"train.global_batch_size": 2000}, ends={"code": "stop"}, phases=[])
    ended = launcher.run(run, "--train.batch_size=1000", ranks=2)
    assert 'source "code" is used up after step 0' in refusal(ended)


def test_mixture_mistakes_name_the_source(launcher: Launcher, tmp_path: Path) -> None:
    run = mixture_run(tmp_path / "run")
    text = run.config.read_text()
    for change, message in (
        ("weight = 0.5", "data.sources[0].weight: -1 is too small"),
        ('name = "books"', 'data.sources[1].name: "web" is also the name of sources[0]'),
        ('when_used_up = "repeat"', 'data.sources[0].when_used_up: "halt" is not allowed'),
        ("start_step = 6", "data.phases[0].start_step: 0 is too small"),
        ("books = 0.6", 'data.phases[0].weights: "boks" is not the name of a source; did you mean "books"?'),
    ):
        new = {
            "weight = 0.5": "weight = -1",
            'name = "books"': 'name = "web"',
            "start_step = 6": "start_step = 0",
        }
        new |= {'when_used_up = "repeat"': 'when_used_up = "halt"', "books = 0.6": "boks = 0.6"}
        assert change in text
        run.config.write_text(text.replace(change, new[change], 1))
        assert message in refusal(launcher.run(run, "config.toml", command=["config", "check"]))


def test_mixture_source_that_cannot_be_read_is_named(launcher: Launcher, tmp_path: Path) -> None:
    run = mixture_run(tmp_path / "run")
    (run.base / "code.txt").write_text("too short")
    ended = launcher.run(run, ranks=2)
    assert 'data.sources[2] "code": ' in refusal(ended)
    (run.base / "code.txt").unlink()
    assert "data.sources[2].text: " in refusal(launcher.run(run, ranks=2))


def test_exported_mixture_has_the_tokenizer(launcher: Launcher, tmp_path: Path) -> None:
    run = mixture_run(tmp_path / "run", {"train.max_steps": 3})
    launcher.finish(run)
    out = tmp_path / "exported"
    ended = launcher.run(run, str(run.step_folder(3)), "--out", str(out), command=["ckpt", "export"])
    assert ended.statuses == [0], ended.output
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 256
