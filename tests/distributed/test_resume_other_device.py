"""A step that was saved on another type of device. There is no GPU here: the saved generators are made up."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from kempnerforge import CheckpointConfig, CheckpointManager, TrainState
from kempnerforge.checkpoint.run.resume_report import Receipt
from kempnerforge.checkpoint.state import rng_state

pytestmark = pytest.mark.smoke


def run_one_step(folder: Path) -> Receipt:
    model = torch.nn.Linear(4, 2)
    state = TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters()))
    with CheckpointManager(CheckpointConfig(interval=1), state=state, run_dir=folder) as ckpt:
        receipt = ckpt.resume(state)
        state.advance()
        ckpt.finish(state)
    return receipt


def test_resume_rng_of_other_device_is_derived_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = rng_state.capture

    def with_cuda_generator(device: torch.device) -> torch.Tensor:
        raw = capture(device).numpy().tobytes()
        return torch.frombuffer(bytearray(raw[:-4] + struct.pack("<I", 16) + bytes(16)), dtype=torch.uint8)

    with monkeypatch.context() as patch:
        patch.setattr(rng_state, "capture", with_cuda_generator)
        run_one_step(tmp_path)
    receipt = run_one_step(tmp_path)
    assert (receipt.source, receipt.step) == ("resume", 1)
    assert receipt.rng == "derived from (seed, step, rank): captured on cuda, now on cpu"
    assert not receipt.bitwise()
    assert "captured on cuda, now on cpu" in "\n".join(receipt.lines())
    again = run_one_step(tmp_path)
    assert (again.step, again.rng, again.bitwise()) == (2, "restored", True)
