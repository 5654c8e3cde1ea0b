"""Runs with ``data.document_mask``: bitwise resumes, layouts, evaluation, models that cannot take part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.patch_target import patch_target
from support.runs import Launcher, Run, make_run

pytest_plugins = ["support.run_fixtures"]

UPDATE = patch_target("kempnerforge.train.step:LocalStep.update")
STEPS = 6
MASK: dict[str, Any] = {
    "data.document_mask": True,
    "train.max_steps": STEPS,
    "train.batch_size": 2,
    "eval.interval": 3,
    "checkpoint.interval": 3,
}
MODEL = """
from torch import nn

class Plain(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)
    def forward(self, tokens):
        return self.table(tokens)
"""


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of 6 to 45 bytes: a row of 32 tokens has the ends of some, and parts of others."""
    folder = tmp_path_factory.mktemp("notes")
    for number in range(120):
        text = " ".join(f"{number * 7919 % 97}" for _ in range(2 + number % 14))
        (folder / f"{number:03d}.txt").write_text(text)
    return folder


def masked_run(base: Path, notes: Path, **settings: Any) -> Run:
    return make_run(base, notes, **{**MASK, **settings})


@pytest.fixture(scope="module")
def undisturbed(launcher: Launcher, notes: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = masked_run(tmp_path_factory.mktemp("undisturbed"), notes)
    launcher.finish(run, ranks=2)
    return run


def values(run: Run, key: str) -> dict[int, float]:
    return {step: row[key] for step, row in run.counting().items() if key in row}


def test_masked_run_resumes_bitwise_and_is_another_training(
    launcher: Launcher, notes: Path, tmp_path: Path, undisturbed: Run
) -> None:
    run = masked_run(tmp_path / "killed", notes)
    kill = ("kill_at_call", {"target": UPDATE, "call": 5, "rank": None})
    assert set(launcher.run(run, ranks=2, faults=[kill]).statuses) == {-9}
    launcher.finish(run, ranks=2)
    assert run.counting() == undisturbed.counting()
    assert len(values(run, "train/loss")) == STEPS
    other = masked_run(tmp_path / "without", notes, **{"data.document_mask": False})
    launcher.finish(other, ranks=2)
    assert values(other, "data/digest") == values(run, "data/digest")
    assert values(other, "train/loss")[1] != pytest.approx(values(run, "train/loss")[1], rel=1e-6)
    assert values(other, "train/tokens")[STEPS] > values(run, "train/tokens")[STEPS]


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        pytest.param(1, {}, id="one"),
        pytest.param(2, {"distributed.tp": 2}, id="tp"),
        pytest.param(2, {"distributed.pp": 2, "train.batch_size": 4}, id="pp"),
        pytest.param(4, {"distributed.pp": 2, "train.activation_checkpointing": "full"}, id="pp-dp-full"),
    ],
)
def test_masked_run_layouts_agree(
    launcher: Launcher, notes: Path, tmp_path: Path, undisturbed: Run, ranks: int, settings: dict[str, Any]
) -> None:
    run = masked_run(tmp_path, notes, **settings)
    launcher.finish(run, ranks=ranks)
    for key in ("train/loss", "train/grad_norm", "eval/loss"):
        assert values(run, key) == pytest.approx(values(undisturbed, key), rel=1e-4), key
    assert values(run, "train/tokens") == values(undisturbed, "train/tokens")


def test_masked_run_evaluates_as_logged(launcher: Launcher, undisturbed: Run) -> None:
    command = ["eval", str(undisturbed.step_folder(3)), "--json"]
    ended = launcher.run(undisturbed, ranks=2, command=command)
    assert ended.statuses == [0, 0], ended.output
    found = json.loads(ended.outputs[0][ended.outputs[0].index("{") :])
    assert found["eval/loss"] == values(undisturbed, "eval/loss")[3]


def test_mask_changed_at_resume_is_in_receipt(launcher: Launcher, notes: Path, tmp_path: Path) -> None:
    run = masked_run(tmp_path, notes, **{"data.document_mask": False, "train.max_steps": 3})
    launcher.finish(run)
    launcher.finish(run, "--data.document_mask=true", "--train.max_steps=4")
    [_, receipt] = run.receipts()
    assert receipt["config_changes"]["data.document_mask"] == [False, True]
    assert receipt["data_changes"] == []


def test_masked_run_of_model_without_document_ids_exits_2(
    launcher: Launcher, notes: Path, tmp_path: Path
) -> None:
    own = dict.fromkeys(("model.dim", "model.n_layers", "model.n_heads", "model.max_seq_len"))
    run = masked_run(tmp_path, notes, **own, **{"model.name": "own:Plain", "model.args.vocab_size": 257})
    (tmp_path / "own.py").write_text(MODEL)
    ended = launcher.run(run, ranks=2)
    assert ended.statuses == [2, 2], ended.output
    assert ended.output.count("forward() of Plain (own:Plain) has no argument document_ids") == 1
    assert "write forward(self, tokens, document_ids=None)" in ended.output
    assert not run.folder.exists()
