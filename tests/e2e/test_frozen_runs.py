"""Training with ``model.freeze``: the same run on every layout, killed and resumed, and its checkpoints."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.patch_target import patch_target
from support.run_files import digest_of, each_step_alone, tensor_digests
from support.runs import Launcher, Run, make_run

from kempnerforge.checkpoint.tools.verify import verify

pytest_plugins = ["support.run_fixtures"]

PUBLISH = patch_target("kempnerforge.fsio:publish")
WRITE = patch_target("kempnerforge.checkpoint.save.writer_client:Writer.write")
DIGEST = patch_target("kempnerforge.checkpoint.save.writer_client:Writer.digest")
LINK = patch_target("kempnerforge.checkpoint.save.writer_client:Writer.link")
DELETE_TREE = patch_target("kempnerforge.fsio:delete_tree")
OWN_MODELS = Path(__file__).parents[1] / "support" / "own_models.py"

FREEZE = ["tok_embeddings", r"layers\.[01]\.", "wq", "feed_forward"]
SETTINGS: dict[str, Any] = {
    "model.n_layers": 4,
    "model.n_heads": 4,
    "model.n_kv_heads": 2,
    "model.freeze": FREEZE,
    "train.global_batch_size": 8,
    "train.batch_size": 2,
    "train.max_steps": 6,
    "train.grad_clip_norm": 0.5,
    "eval.interval": 0,
    "checkpoint.interval": 2,
    "checkpoint.keep_last_n": 10,
}
"""The first two of four layers are frozen completely, so a first pipeline stage has nothing to train."""
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2 recomputed": (2, {"train.activation_checkpointing": "full"}),
    "dp2 compiled": (2, {"train.compile_model": True, "distributed.timeout_s": 200.0}),
    "tp2": (2, {"distributed.tp": 2}),
    "pp2 interleaved": (2, {"distributed.pp": 2, "distributed.pp_schedule": "interleaved_1f1b"}),
    "pp2": (2, {"distributed.pp": 2}),
    "pp2tp2": (4, {"distributed.pp": 2, "distributed.tp": 2}),
    "hsdp2x2": (4, {"distributed.dp_replicate": 2}),
}


def is_frozen(name: str) -> bool:
    return any(part in name for part in ("tok_embeddings", "layers.0.", "layers.1.", "wq", "feed_forward"))


def checkpoint_rows(run: Run) -> list[tuple[int, int]]:
    rows = [row for row in run.rows() if "checkpoint/size_bytes" in row]
    return [(row["checkpoint/size_bytes"], row["checkpoint/written_bytes"]) for row in rows]


@pytest.fixture(scope="module")
def alone(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run on one rank."""
    run = make_run(tmp_path_factory.mktemp("alone"), corpus, **SETTINGS)
    launcher.finish(run)
    return run


def test_run_frozen_parameters_have_no_state_and_no_change(alone: Run) -> None:
    first, last = (tensor_digests(alone.step_folder(step)) for step in (2, 6))
    names = [name.removeprefix("model.") for name in first if name.startswith("model.")]
    for name in names:
        same = first[f"model.{name}"] == last[f"model.{name}"]
        has_state = f"optimizer.state.{name}.exp_avg" in last
        assert (same, has_state) == (is_frozen(name), not is_frozen(name)), name
    assert sum(map(is_frozen, names)) > len(names) / 2
    (size, all_bytes), *later = checkpoint_rows(alone)
    assert size == all_bytes
    assert all(written < 0.4 * size for _, written in later)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_run_frozen_is_alike_on_every_layout(
    launcher: Launcher, corpus: Path, tmp_path: Path, alone: Run, layout: str
) -> None:
    ranks, changes = LAYOUTS[layout]
    run = make_run(tmp_path, corpus, **SETTINGS, **changes)
    ended = launcher.run(run, ranks=ranks, timeout_s=300)
    assert ended.statuses == [0] * ranks, ended.output
    expected, found = alone.rows(), run.rows()
    for key in ("train/loss", "train/grad_norm"):
        numbers = [[row[key] for row in rows if key in row] for rows in (expected, found)]
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-4), key
    before, after = (tensor_digests(of.step_folder(6)) for of in (alone, run))
    assert all(before[n] == after[n] for n in before if n.startswith("model.") and is_frozen(n))
    assert all(written < 0.5 * size for size, written in checkpoint_rows(run)[1:])
    for step in (2, 4, 6):
        assert verify(run.step_folder(step)).problems == ()


ADAPTED: dict[str, Any] = SETTINGS | {
    "model.dim": 256,
    "model.n_heads": 8,
    "model.n_kv_heads": 1,
    "model.freeze": [r"layers\.0\.", "embeddings", "output", "norm", "feed_forward", "w[qko]"],
    "train.global_batch_size": 4,
    "train.seq_len": 16,
    "train.max_steps": 14,
    "checkpoint.keep_last_n": 3,
}
"""Three matrices of 256 x 32 are trained, 0.8% of the parameters."""
ADAPTER = 3 * 256 * 32
ADAPTER_BYTES = 3 * 4 * ADAPTER
"""The trained weights and their two moments."""
NOT_PERMUTED = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.3.attention.wv.weight": "model.layers.3.self_attn.v_proj.weight",
    "layers.3.feed_forward.w2.weight": "model.layers.3.mlp.down_proj.weight",
}
"""Weights whose rows have the same order in an export, and their names there."""


@pytest.mark.smoke
def test_run_frozen_killed_and_resumed_has_same_bits(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    """Killed before a write, a link, a comparison with the step on disk, a commit and a deletion.

    99% of the parameters are frozen. Each step that remains is complete without the others.
    """
    whole, run = (make_run(tmp_path / name, corpus, **ADAPTED) for name in ("whole", "killed"))
    launcher.finish(whole, ranks=2)
    kills = [(WRITE, 2, 1), (LINK, 1, 1), (PUBLISH, 2, 0), (DIGEST, 1, 0), (LINK, 2, 0), (DELETE_TREE, 1, 0)]
    for target, call, rank in kills:
        fault = ("kill_at_call", {"target": target, "call": call, "rank": rank})
        ended = launcher.run(run, ranks=2, faults=[fault])
        assert ended.statuses == [-signal.SIGKILL] * 2, f"{target} {call}\n{ended.output}"
        assert run.sound() == run.committed()
    launcher.finish(run, ranks=2)
    assert run.counting() == whole.counting()
    for (_, first), *later in map(checkpoint_rows, (whole, run)):
        assert first > 99 * 4 * ADAPTER + ADAPTER_BYTES
        assert all(ADAPTER_BYTES < written <= 1.2 * ADAPTER_BYTES for _, written in later)
    assert run.committed() == [14, 12, 10]
    for path in each_step_alone(run.checkpoints, tmp_path):
        digests = tensor_digests(path)
        assert digests == tensor_digests(whole.checkpoints / path.name)
        for command in (["verify", str(path)], ["export", str(path), "--out", str(tmp_path / path.name)]):
            ended = launcher.run(run, command=["ckpt", *command])
            assert ended.statuses == [0], ended.output
        exported = load_file(tmp_path / path.name / "model.safetensors")
        for name, hf_name in NOT_PERMUTED.items():
            assert digest_of(exported[hf_name]) == digests[f"model.{name}"]


def own_run(base: Path, corpus: Path, name: str, **settings: Any) -> Run:
    llama = dict.fromkeys(("model.dim", "model.n_layers", "model.n_heads", "model.max_seq_len"))
    own = {"model.name": f"lab_models:{name}", "train.max_steps": 4, "checkpoint.interval": 2}
    run = make_run(base, corpus, **llama | own | {"eval.interval": 0} | settings)
    shutil.copyfile(OWN_MODELS, base / "lab_models.py")
    return run


@pytest.mark.parametrize("ranks", [1, 2])
def test_own_model_frozen_by_itself_is_as_by_config(
    launcher: Launcher, corpus: Path, tmp_path: Path, ranks: int
) -> None:
    mine = own_run(tmp_path / "mine", corpus, "PartlyFrozen")
    config = {"model.freeze": ["tokens", r"layers\.0\."]}
    ours = own_run(tmp_path / "ours", corpus, "Plain", **config)
    for run in (mine, ours):
        launcher.finish(run, ranks=ranks)
        assert checkpoint_rows(run)[1][1] < checkpoint_rows(run)[0][1]
    assert tensor_digests(mine.step_folder(4)) == tensor_digests(ours.step_folder(4))
    assert "optimizer.state.tokens.weight.exp_avg" not in tensor_digests(mine.step_folder(4))


def test_own_model_frozen_stages_are_alike(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    """The stages are other modules than the model, and a plan of tensor parallelism makes new parameters."""
    digests = []
    for number, layout in enumerate(({}, {"distributed.pp": 2}, {"distributed.tp": 2})):
        settings = {"model.freeze": ["tokens", r"blocks\.0\."], **layout}
        run = own_run(tmp_path / str(number), corpus, "Planned", **settings)
        launcher.finish(run, ranks=2)
        digests.append(tensor_digests(run.step_folder(4)))
    for name in ("tokens.weight", "blocks.0.up.weight", "blocks.0.down.weight"):
        assert len({of[f"model.{name}"] for of in digests}) == 1
        assert not any(f"optimizer.state.{name}.exp_avg" in of for of in digests)


def test_run_frozen_begins_from_load_path(
    launcher: Launcher, corpus: Path, tmp_path: Path, alone: Run
) -> None:
    """The weights that are not trained remain those of the checkpoint that the run began with."""
    warm = {
        "model.freeze": ["tok_embeddings", "layers"],
        "checkpoint.load_path": str(alone.step_folder(6)),
        "checkpoint.exclude_from_loading": ["optimizer", "scheduler", "data", "rng"],
    }
    run = make_run(tmp_path, corpus, **SETTINGS | warm)
    launcher.finish(run, ranks=2)
    before, after = tensor_digests(alone.step_folder(6)), tensor_digests(run.step_folder(6))
    for name in before:
        if name.startswith("model."):
            is_trained = name in ("model.norm.weight", "model.output.weight")
            assert (before[name] != after[name]) == is_trained, name


def test_run_other_freeze_is_refused_at_a_resume(launcher: Launcher, alone: Run) -> None:
    ended = launcher.run(alone, '--model.freeze=["tok_embeddings"]', "--train.max_steps=8")
    assert ended.statuses == [2], ended.output
    assert "model.freeze was" in ended.output
    assert "--run.name=NEW --checkpoint.load_path=" in ended.output
