"""Every layout, one checkpoint: saved under one it is the same state and data under each other one."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.patch_target import patch_target
from support.run_files import Counting, digest_of, tensor_digests
from support.runs import Launcher, Run, copy_run, make_run

from kempnerforge.checkpoint.format import paths, safetensors_file
from kempnerforge.checkpoint.format.tensor_index import ITEM_BYTES
from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader

pytest_plugins = ["support.run_fixtures"]

SETTINGS: dict[str, Any] = {
    "model.n_layers": 4,
    "model.n_heads": 4,
    "model.n_kv_heads": 2,
    "train.global_batch_size": 8,
    "train.batch_size": 2,
    "train.grad_clip_norm": 0.5,
    "eval.interval": 0,
    "checkpoint.interval": 0,
    "scheduler.warmup_steps": 1,
    "checkpoint.keep_last_n": 100,
}
"""``grad_clip_norm`` is below the norms of this run, so that every update depends on the whole model's."""


def pipeline(pp: int, **more: object) -> dict[str, object]:
    return {"distributed.pp": pp, "distributed.pp_microbatch_size": 2, **more}


LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "1": (1, {}),
    "pp4": (4, pipeline(4)),
    "dp2": (2, {}),
    "pp2dp2 interleaved": (4, pipeline(2, **{"distributed.pp_schedule": "interleaved_1f1b"})),
    "tp2": (2, {"distributed.tp": 2}),
    "pp2": (2, {"distributed.pp": 2}),
    "hsdp2x2": (4, {"distributed.dp_replicate": 2}),
    "pp2tp2": (4, pipeline(2, **{"distributed.tp": 2})),
    "dp4": (4, {}),
    "pp2dp2 gpipe": (4, pipeline(2, **{"distributed.pp_schedule": "gpipe"})),
    "dp2tp2": (4, {"distributed.tp": 2}),
    "pp2dp2 1f1b": (4, pipeline(2)),
}
"""Name -> ranks and settings, in the order in which the chain below goes through them."""
MORE_LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "hsdp2tp2": (4, {"distributed.dp_replicate": 2, "distributed.tp": 2}),
    "pp2hsdp2": (4, pipeline(2, **{"distributed.dp_replicate": 2})),
}
"""Compared for twenty steps, but not with each other layout."""
TOLERANCE = 1e-4
"""Relative, of losses and gradient norms in fp32: layouts add the same numbers in another order."""


def overrides_of(name: str) -> tuple[str, ...]:
    return tuple(f"--{key}={value}" for key, value in (LAYOUTS | MORE_LAYOUTS)[name][1].items())


def train_to(
    launcher: Launcher, run: Run, name: str, *, to: int, report: Path | None = None, **more: object
) -> None:
    """Train under a layout until step ``to``."""
    ranks, _ = (LAYOUTS | MORE_LAYOUTS)[name]
    faults = [("report_loaded", {"path": str(report)})] if report else []
    extra = (f"--{key}={value}" for key, value in more.items())
    arguments = (*overrides_of(name), f"--train.max_steps={to}", *extra)
    ended = launcher.run(run, *arguments, ranks=ranks, faults=faults, timeout_s=400)
    assert ended.statuses == [0] * ranks, ended.output


def loaded_digests(report: Path, ranks: int) -> dict[str, str]:
    """What all ranks together held after resuming; those that hold the same tensor must agree."""
    found: dict[str, str] = {}
    for rank in range(ranks):
        for name, digest in json.loads(Path(f"{report}.rank_{rank}.json").read_text()).items():
            assert found.setdefault(name, digest) == digest, (name, rank)
    return found


def trained_tensors(step_folder: Path) -> dict[str, str]:
    """Digests of weights and moments; random numbers belong to a layout."""
    return {n: digest for n, digest in tensor_digests(step_folder).items() if not n.startswith("rng.")}


def train_state(step_folder: Path) -> dict[str, Any]:
    return json.loads((step_folder / paths.TRAIN_STATE).read_text())


def assert_same_course(found: Counting, expected: Counting) -> None:
    assert sorted(found) == sorted(expected)
    for step, row in expected.items():
        for key in ("data/digest", "train/tokens", "train/lr"):
            assert found[step].get(key) == row.get(key), (step, key)
        for key in ("train/loss", "train/grad_norm", "eval/loss"):
            if key in row:
                assert found[step][key] == pytest.approx(row[key], rel=TOLERANCE), (step, key)


@pytest.fixture(scope="module")
def uninterrupted(
    launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Run]:
    """By number of steps, one process that was never stopped."""
    made: dict[int, Run] = {}

    def get(steps: int) -> Run:
        if steps not in made:
            made[steps] = make_run(tmp_path_factory.mktemp("uninterrupted"), corpus, **SETTINGS)
            train_to(launcher, made[steps], "1", to=steps)
        return made[steps]

    return get


def test_resume_chain_of_layouts_same_course(
    launcher: Launcher, corpus: Path, tmp_path: Path, uninterrupted: Callable[[int], Run]
) -> None:
    run = make_run(tmp_path / "chain", corpus, **SETTINGS)
    for step, name in enumerate(LAYOUTS, 1):
        report = tmp_path / f"loaded_{step}"
        train_to(launcher, run, name, to=step, report=report)
        if step > 1:
            stored = trained_tensors(run.step_folder(step - 1))
            assert loaded_digests(report, LAYOUTS[name][0]) == stored, name
            receipt = run.receipts()[-1]
            assert receipt["step"] == step - 1
            assert receipt["rng"].startswith("derived")
            assert receipt["layout_changes"]
            assert not receipt["data_changes"]
    whole = uninterrupted(len(LAYOUTS))
    assert_same_course(run.counting(), whole.counting())
    last, theirs = run.step_folder(len(LAYOUTS)), whole.step_folder(len(LAYOUTS))
    assert set(trained_tensors(last)) == set(trained_tensors(theirs))
    assert train_state(last) == train_state(theirs), "counters, cursor, schedule and hyperparameters"
    for step, name in enumerate(LAYOUTS, 1):
        assert_writing_is_shared(run.step_folder(step), LAYOUTS[name][0], name)


def assert_writing_is_shared(step_folder: Path, ranks: int, name: str) -> None:
    """No byte is written twice, and ranks that hold the same bytes share them out."""
    shards = sorted(step_folder.glob("*.safetensors"))
    assert len(shards) == ranks
    # Reading a header fails unless what it lists fills the file without gaps.
    written = [
        sum(c.end - c.begin for _, c in safetensors_file.read_header(shard).values()) for shard in shards
    ]
    index = SafetensorsReader(step_folder).index.values()
    assert sum(written) == sum(math.prod(entry.shape) * ITEM_BYTES[entry.dtype] for entry in index)
    if "pp" not in name:  # stages hold different layers
        assert max(written) < 1.1 * min(written), written


def twenty_steps(launcher: Launcher, corpus: Path, base: Path, whole: Run, name: str) -> None:
    """From the same initial weights, bit for bit, to the same losses, norms and validation losses."""
    run = make_run(base / "run", corpus, **SETTINGS | COMPARED)
    train_to(launcher, run, name, to=20)
    assert trained_tensors(run.step_folder(0)) == trained_tensors(whole.step_folder(0))
    assert_same_course(run.counting(), whole.counting())
    assert train_state(run.step_folder(20)) == train_state(whole.step_folder(20))


COMPARED = {"checkpoint.save_first": True, "eval.interval": 10}


@pytest.fixture(scope="module")
def compared(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Twenty steps of one process, with validation and a save of step 0."""
    run = make_run(tmp_path_factory.mktemp("compared"), corpus, **SETTINGS | COMPARED)
    train_to(launcher, run, "1", to=20)
    return run


@pytest.mark.parametrize("name", ["dp2tp2", "pp2", "pp2dp2 interleaved"])
def test_layout_twenty_steps_match_one_process(
    launcher: Launcher, corpus: Path, tmp_path: Path, compared: Run, name: str
) -> None:
    twenty_steps(launcher, corpus, tmp_path, compared, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAYOUTS | MORE_LAYOUTS if name != "1"])
def test_layout_all_twenty_steps_match_one_process(
    launcher: Launcher, corpus: Path, tmp_path: Path, compared: Run, name: str
) -> None:
    twenty_steps(launcher, corpus, tmp_path, compared, name)


def mixed(launcher: Launcher, corpus: Path, base: Path, name: str, **more: Any) -> None:
    """bf16 and recomputation under a layout stay near one process in fp32."""
    plain, run = (make_run(base / folder, corpus, **SETTINGS) for folder in ("plain", "run"))
    train_to(launcher, plain, "1", to=3)
    low: dict[str, Any] = {"train.mixed_precision": "bf16", "train.activation_checkpointing": "selective"}
    train_to(launcher, run, name, to=3, **low | more)
    for step, row in plain.counting().items():
        assert run.counting()[step]["train/loss"] == pytest.approx(row["train/loss"], rel=0.02)
        assert run.counting()[step]["train/loss"] != row["train/loss"]


@pytest.mark.parametrize("name", ["tp2", "pp2"])
def test_layout_bf16_recomputed_near_fp32(
    launcher: Launcher, corpus: Path, tmp_path: Path, name: str
) -> None:
    mixed(launcher, corpus, tmp_path, name)


COMPILED: dict[str, Any] = {"train.compile_model": "true", "distributed.timeout_s": 300}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", ["dp2tp2", "pp2tp2", "pp2dp2 interleaved"])
def test_layout_bf16_recomputed_compiled_near_fp32(
    launcher: Launcher, corpus: Path, tmp_path: Path, name: str
) -> None:
    mixed(launcher, corpus, tmp_path, name, **COMPILED)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", ["tp2", "pp2", "dp2tp2", "pp2tp2", "pp2dp2 interleaved"])
def test_layout_compiled_recomputed_same_course(
    launcher: Launcher, corpus: Path, tmp_path: Path, uninterrupted: Callable[[int], Run], name: str
) -> None:
    run = make_run(tmp_path / "run", corpus, **SETTINGS)
    recomputed: dict[str, Any] = {"train.activation_checkpointing": "selective"}
    train_to(launcher, run, name, to=4, **COMPILED | recomputed)
    assert_same_course(run.counting(), uninterrupted(4).counting())


def test_pipeline_loss_not_finite_is_skipped_by_all(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", corpus, **SETTINGS)
    poison = ("poison_loss", {"calls": [3], "rank": 1})
    arguments = (*overrides_of("pp2"), "--train.max_steps=2")
    ended = launcher.run(run, *arguments, ranks=2, faults=[poison], timeout_s=400)
    assert ended.statuses == [0, 0], ended.output
    losses = [row["train/loss"] for row in run.rows() if "train/loss" in row]
    skipped = [row["train/skipped_steps"] for row in run.rows() if "train/loss" in row]
    assert [math.isfinite(loss) for loss in losses] == [False, True]
    assert skipped == [1, 1]
    counts = {d for name, d in tensor_digests(run.step_folder(2)).items() if name.endswith(".step")}
    assert counts == {digest_of(torch.tensor(1.0))}, "some stage took the bad step"


KILLED_UNDER = ("dp2tp2", "pp2", "hsdp2x2", "pp2dp2 interleaved", "tp2")
SAVING = {"checkpoint.interval": 2, "checkpoint.async_mode": "disabled"}
ADVANCE = patch_target("kempnerforge.checkpoint.state.train_state:TrainState.advance")
KILL = ("kill_at_call", {"target": ADVANCE, "call": 3})


def test_resume_killed_under_five_layouts_same_course(
    launcher: Launcher, corpus: Path, tmp_path: Path, uninterrupted: Callable[[int], Run]
) -> None:
    run = make_run(tmp_path / "killed", corpus, **SETTINGS | SAVING)
    steps = len(LAYOUTS)
    for number, name in enumerate(KILLED_UNDER, 1):
        ranks, _ = LAYOUTS[name]
        arguments = (*overrides_of(name), f"--train.max_steps={steps}")
        ended = launcher.run(run, *arguments, ranks=ranks, faults=[KILL], timeout_s=180)
        assert -9 in ended.statuses, ended.output
        assert len(run.receipts()) == number
    train_to(launcher, run, "1", to=steps)
    assert_same_course(run.counting(), uninterrupted(steps).counting())


def stopped_and_resumed_is_bitwise(launcher: Launcher, corpus: Path, base: Path, name: str) -> None:
    whole, stopped = (make_run(base / folder, corpus, **SETTINGS) for folder in ("whole", "stopped"))
    train_to(launcher, whole, name, to=4)
    train_to(launcher, stopped, name, to=2)
    train_to(launcher, stopped, name, to=4)
    assert stopped.receipts()[-1]["rng"] == "restored"
    assert stopped.counting() == whole.counting()
    assert tensor_digests(stopped.step_folder(4)) == tensor_digests(whole.step_folder(4))


@pytest.mark.parametrize("name", ["tp2", "pp2dp2 interleaved"])
def test_resume_same_layout_is_bitwise(launcher: Launcher, corpus: Path, tmp_path: Path, name: str) -> None:
    stopped_and_resumed_is_bitwise(launcher, corpus, tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_resume_every_layout_is_bitwise(launcher: Launcher, corpus: Path, tmp_path: Path, name: str) -> None:
    stopped_and_resumed_is_bitwise(launcher, corpus, tmp_path, name)


@pytest.fixture(scope="module")
def sources(
    launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Run]:
    """By layout, a run that saved step 3 under it."""
    made: dict[str, Run] = {}

    def source(name: str) -> Run:
        if name not in made:
            made[name] = make_run(tmp_path_factory.mktemp("source") / "base", corpus, **SETTINGS)
            train_to(launcher, made[name], name, to=3)
        return made[name]

    return source


IN_DEFAULT_RUN = ("dp2", "tp2")
PAIRS = [
    pytest.param(*pair, marks=pytest.mark.smoke if pair == IN_DEFAULT_RUN else pytest.mark.slow)
    for pair in itertools.permutations(LAYOUTS, 2)
]


@pytest.mark.parametrize(("saved", "resumed"), PAIRS)
def test_resume_every_pair_of_layouts_same_course(
    launcher: Launcher,
    tmp_path: Path,
    sources: Callable[[str], Run],
    uninterrupted: Callable[[int], Run],
    saved: str,
    resumed: str,
) -> None:
    run = copy_run(sources(saved), tmp_path / "copy")
    train_to(launcher, run, resumed, to=6, report=tmp_path / "loaded")
    assert loaded_digests(tmp_path / "loaded", LAYOUTS[resumed][0]) == trained_tensors(run.step_folder(3))
    assert_same_course(run.counting(), uninterrupted(6).counting())
    groups = [train_state(one.step_folder(6))["optimizer"] for one in (run, uninterrupted(6))]
    assert groups[0] == groups[1]
