"""Models of the user's: the same weights on every layout, the same bits after a kill, any other layout."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.patch_target import patch_target
from support.run_files import tensor_digests
from support.runs import Launcher, Run, copy_run, make_run

from kempnerforge.checkpoint.format.step_info import StepView

pytest_plugins = ["support.run_fixtures"]

UPDATE = patch_target("kempnerforge.train.step:TrainStepBase.update")
MODELS = Path(__file__).parents[1] / "support" / "own_models.py"
WITHOUT_LLAMA: dict[str, Any] = {
    "model.dim": None,
    "model.n_layers": None,
    "model.n_heads": None,
    "model.max_seq_len": None,
}
STEPS = 6


def own_run(base: Path, corpus: Path, name: str, **settings: Any) -> Run:
    own = {"model.name": f"lab_models:{name}", "train.max_steps": STEPS, "checkpoint.interval": 2}
    run = make_run(
        base, corpus, **WITHOUT_LLAMA | own | {"eval.interval": 3, "scheduler.warmup_steps": 0} | settings
    )
    shutil.copyfile(MODELS, base / "lab_models.py")
    return run


def digests_below(prefix: str, run: Run, step: int) -> dict[str, str]:
    digests = tensor_digests(run.step_folder(step))
    return {name: digest for name, digest in digests.items() if name.startswith(prefix)}


LAYOUTS = {
    "fsdp 2": (2, ()),
    "hsdp 2 x 2": (4, ("--distributed.dp_replicate=2",)),
    "tp 2": (2, ("--distributed.tp=2",)),
    "pp 2": (2, ("--distributed.pp=2",)),
    "pp 2 interleaved": (
        2,
        ("--distributed.pp=2", "--distributed.pp_schedule=interleaved_1f1b"),
    ),
}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("Plain", "fsdp 2"),
        ("Tied", "fsdp 2"),
        ("Plain", "hsdp 2 x 2"),
        *(("Planned", name) for name in LAYOUTS),
    ],
)
def test_own_model_starts_alike_on_every_layout(
    launcher: Launcher, corpus: Path, tmp_path: Path, name: str, layout: str
) -> None:
    ranks, overrides = LAYOUTS[layout]
    settings = {"checkpoint.save_first": True, "train.max_steps": 2, "train.batch_size": 1}
    alone = own_run(tmp_path / "alone", corpus, name, **settings)
    launcher.finish(alone)
    together = own_run(tmp_path / "together", corpus, name, **settings)
    launcher.finish(together, *overrides, ranks=ranks)
    assert digests_below("model.", together, 0) == digests_below("model.", alone, 0)
    one, two = alone.counting(), together.counting()
    for step in (1, 2):
        assert two[step]["train/loss"] == pytest.approx(one[step]["train/loss"], rel=1e-5)
        assert two[step]["train/grad_norm"] == pytest.approx(one[step]["train/grad_norm"], rel=1e-4)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_own_model_with_dropout_resumes_bitwise(
    launcher: Launcher, corpus: Path, tmp_path: Path, checkpointing: str
) -> None:
    settings = {
        "model.args.dropout": 0.2,
        "train.activation_checkpointing": checkpointing,
        "train.mixed_precision": "bf16",
    }
    whole = own_run(tmp_path / "whole", corpus, "Plain", **settings)
    launcher.finish(whole, ranks=2)
    killed = own_run(tmp_path / "killed", corpus, "Plain", **settings)
    fault = ("kill_at_call", {"target": UPDATE, "call": 5, "rank": 1})
    launcher.run(killed, ranks=2, faults=[fault])
    launcher.finish(killed, ranks=2)
    assert killed.receipts()[-1]["source"] == "resume"
    assert killed.counting() == whole.counting()
    assert tensor_digests(killed.step_folder(STEPS)) == tensor_digests(whole.step_folder(STEPS))


def test_own_model_resumes_on_other_layout(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    saved = own_run(tmp_path / "saved", corpus, "Planned", **{"train.max_steps": 2})
    launcher.finish(saved, "--distributed.pp=2", ranks=2)
    for number, (ranks, overrides) in enumerate([(1, ()), (2, ("--distributed.tp=2",)), (2, ())]):
        run = copy_run(saved, tmp_path / f"copy_{number}")
        report = tmp_path / f"loaded_{number}"
        faults = [("report_loaded", {"path": str(report)})]
        ended = launcher.run(run, *overrides, "--train.max_steps=4", ranks=ranks, faults=faults)
        assert ended.statuses == [0] * ranks, ended.output
        loaded = json.loads(Path(f"{report}.rank_0.json").read_text())
        for prefix in ("model.", "optimizer."):
            expected = digests_below(prefix, saved, 2)
            assert {name: loaded[name] for name in expected} == expected


def test_own_model_source_change_is_in_receipt(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    run = own_run(tmp_path, corpus, "Plain", **{"train.max_steps": 2})
    launcher.finish(run)
    with (tmp_path / "lab_models.py").open("a") as file:
        file.write("# changed\n")
    launcher.finish(run, "--train.max_steps=4")
    receipt = run.receipts()[-1]
    assert any("plugin model.name" in str(change) for change in receipt["version_changes"]), receipt
    assert not receipt["bitwise"]


@pytest.mark.parametrize(
    ("name", "overrides", "problem"),
    [
        ("Careless", (), "leaves table uninitialized"),
        ("Broken", (), "lab_models:Broken(...) raised ValueError: width 3 is odd; see "),
        ("Flat", (), "returned [] for tokens [1, 32]"),
        ("Plain", ("--distributed.tp=2",), "2 needs a plan, and lab_models:Plain has no tp_plan()"),
        ("Plain", ("--distributed.pp=2",), "2 needs stages, and lab_models:Plain has no pipeline_stages()"),
        ("Plain", ("--model.args.layer=2",), 'has no argument layer; did you mean "layers"?'),
        ("Plein", (), 'lab_models has no Plein; did you mean "Plain"?'),
    ],
)
def test_own_model_that_cannot_train_exits_2(
    launcher: Launcher, corpus: Path, tmp_path: Path, name: str, overrides: tuple[str, ...], problem: str
) -> None:
    run = own_run(tmp_path, corpus, name)
    ended = launcher.run(run, *overrides, ranks=2)
    assert ended.statuses == [2, 2], ended.output
    assert problem in ended.outputs[0]
    assert "Traceback" not in ended.output
    assert ended.outputs[1] == ""
    assert not run.committed()


@pytest.mark.parametrize("layout", ["fsdp 2", "pp 2"])
def test_own_model_validation_uses_no_random_numbers(
    launcher: Launcher, corpus: Path, tmp_path: Path, layout: str
) -> None:
    ranks, overrides = LAYOUTS[layout]
    losses = []
    for interval in (0, 1):
        settings = {"model.args.dropout": 0.2, "train.max_steps": 4, "eval.interval": interval}
        run = own_run(tmp_path / str(interval), corpus, "Planned", **settings)
        launcher.finish(run, *overrides, ranks=ranks)
        losses.append([run.counting()[step]["train/loss"] for step in range(1, 5)])
    assert losses[0] == losses[1]


def test_own_model_tp_ranks_draw_the_same_numbers(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    """Parameters outside the plan would get other gradients on every rank."""
    settings = {"model.args.dropout": 0.2, "train.max_steps": 2}
    run = own_run(tmp_path, corpus, "Planned", **settings)
    launcher.finish(run, "--distributed.tp=2", ranks=4)
    digests = [tensor_digests(run.step_folder(2))[f"rng.rank_{rank:05d}"] for rank in range(4)]
    assert digests[0] == digests[1] != digests[2] == digests[3]


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, ()),
        (2, ("--distributed.tp=2",)),
        (4, ("--distributed.tp=2", "--distributed.pp=2")),
        (2, ("--optimizer.name=muon", "--optimizer.fused=none")),
    ],
)
def test_own_model_plan_is_what_a_run_writes(
    launcher: Launcher, corpus: Path, tmp_path: Path, ranks: int, overrides: tuple[str, ...]
) -> None:
    run = own_run(tmp_path, corpus, "Planned", **{"train.max_steps": 2, "eval.interval": 0})
    launcher.finish(run, *overrides, ranks=ranks)
    command = ["plan", run.config.name, *overrides, f"--world-size={ranks}", "--json"]
    planned = json.loads(launcher.run(run, command=command).outputs[0])
    entries = StepView.open(run.step_folder(2)).tensors()
    payload = sum(chunk.end - chunk.begin for entry in entries.values() for chunk in entry.chunks)
    without_cuda = 16 * ranks
    assert planned["checkpoint"]["payload_bytes"] - without_cuda == payload
    assert planned["parameters"] == sum(
        math.prod(entry.shape) for name, entry in entries.items() if name.startswith("model.")
    )
    assert planned["activation_bytes"] is None
