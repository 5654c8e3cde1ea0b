"""A run whose newest checkpoint holds weights and no training state: resume and retention see through it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.crash.known_states import make_state
from support.crash.save_driver import Plan, make_manager, save_all

from kempnerforge.checkpoint.async_save import AsyncCheckpointer
from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.format.manifest import Provenance
from kempnerforge.errors import NoSoundCheckpointError


def save_weights(run_dir: Path, step: int, provenance: Provenance) -> None:
    weights = {"model.weight": torch.ones(37, 24)}
    AsyncCheckpointer().save(weights, run_dir / "checkpoints" / paths.step_name(step), provenance=provenance)


@pytest.mark.parametrize("provenance", [Provenance(), Provenance(step=5)], ids=["of no run", "of the run"])
def test_resume_weights_only_step_passed_over_uncounted(tmp_path: Path, provenance: Provenance) -> None:
    save_all(Plan(str(tmp_path), (1, 2)))
    save_weights(tmp_path, 5, provenance)
    state = make_state()
    manager = make_manager(Plan(str(tmp_path), attempt=2), state)
    receipt = manager.resume(state)
    manager.close()
    assert receipt.step == 2
    (passed_over,) = receipt.rejected
    assert (passed_over.step, passed_over.outcome, passed_over.moved_to) == (5, "no training state", "")
    assert any("step 5 was left as it is" in line for line in receipt.lines())
    # Were it the newest of the last one, step 2 would have gone.
    assert paths.committed_steps(tmp_path / "checkpoints") == [5, 2]
    learnt = save_all(Plan(str(tmp_path), (3, 4), attempt=3))
    assert (learnt["resumed"], learnt["errors"]) == (2, ["", ""])
    assert paths.committed_steps(tmp_path / "checkpoints") == [5, 4]


def test_resume_weights_only_does_not_start_afresh(tmp_path: Path) -> None:
    save_weights(tmp_path, 5, Provenance())
    state = make_state()
    manager = make_manager(Plan(str(tmp_path)), state)
    with pytest.raises(NoSoundCheckpointError, match="no training state"):
        manager.resume(state)
    manager.close()
    assert paths.committed_steps(tmp_path / "checkpoints") == [5]
