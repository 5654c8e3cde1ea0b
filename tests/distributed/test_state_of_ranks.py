"""What ranks may hold differently: one rank's whole state, or an error that names it; never a mixture."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import RanksFailed, gloo_group, run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from kempnerforge import CheckpointConfig, CheckpointManager, SafetensorsReader, TrainState
from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.load.dcp_reader import load_tensors
from kempnerforge.checkpoint.save.staging import ThreadCopy
from kempnerforge.errors import MismatchError

STEPS = 9


def manager(folder: str, state: TrainState, **config: Any) -> CheckpointManager:
    settings = CheckpointConfig.model_validate({"interval": 2, "async_mode": "async", **config})
    group = gloo_group() if dist.get_world_size() > 1 else None
    return CheckpointManager(settings, state=state, run_dir=Path(folder), control_group=group)


# -- batch normalization ---------------------------------------------------------------------------------


def norms(folder: str, wrapped: str, kill_at: int) -> list[torch.Tensor]:
    """Train with running statistics that every rank keeps for itself."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.BatchNorm1d(2))
    if wrapped == "ddp":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(dist.get_rank())
    state = TrainState(model=model, optimizer=optimizer)
    with manager(folder, state, async_mode="async_with_pinned_mem") as ckpt:
        ckpt.resume(state)
        while state.step < STEPS:
            model(torch.randn(5, 4)).square().mean().backward()
            ckpt.wait_for_staging()
            optimizer.step()
            optimizer.zero_grad()
            state.advance()
            ckpt.after_step(state)
            if state.step == kill_at:
                ckpt.wait()
                os.kill(os.getpid(), signal.SIGKILL)
        ckpt.finish(state)
    return [tensor.clone() for tensor in model.buffers()]


def test_ddp_running_statistics_resume_as_never_stopped(tmp_path: Path) -> None:
    """DDP broadcasts those of the first rank: the checkpoint has to have them."""
    whole = run_ranks(norms, 2, str(tmp_path / "whole"), "ddp", 0)
    with pytest.raises(RanksFailed, match="SIGKILL"):
        run_ranks(norms, 2, str(tmp_path / "parts"), "ddp", 5)
    parts = run_ranks(norms, 2, str(tmp_path / "parts"), "ddp", 0)
    assert all(map(torch.equal, whole[0], parts[0]))


def test_fsdp2_running_statistics_are_of_one_rank(tmp_path: Path) -> None:
    """Plain tensors beside sharded ones: all from the first rank."""
    first, second = run_ranks(norms, 2, str(tmp_path), "fsdp2", 0)
    assert not torch.equal(first[0], second[0])
    names = [f"model.{layer}.{kind}" for layer in (1, 3) for kind in ("running_mean", "running_var")]
    found = {name: torch.empty(4 if ".1." in name else 2) for name in names}
    load_tensors(found, SafetensorsReader(tmp_path / "checkpoints" / paths.step_name(STEPS)))
    for name, want in zip(names, [first[0], first[1], first[3], first[4]], strict=True):
        assert torch.equal(found[name], want), name


# -- values of an optimizer, and of a model, that are not tensors --------------------------------------------


class Recording(nn.Linear):
    """Has extra state."""

    seen: Any = None

    def get_extra_state(self) -> Any:
        """What ``state_dict`` has."""
        return self.seen

    def set_extra_state(self, state: Any) -> None:
        """What ``load_state_dict`` gives."""
        self.seen = state


def differing(folder: str, what: str) -> str:
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = Recording(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * (1 + rank) if what == "lr" else 0.1)
    if what == "number":
        optimizer.state[model.weight]["norm"] = float(rank)
    if what == "extra state":
        model.seen = {"rank": rank}
    state = TrainState(model=model, optimizer=optimizer)
    with pytest.raises(ValueError) as caught, manager(folder, state) as ckpt:  # noqa: PT012
        ckpt.resume(state)
        ckpt.save(state, wait=True)
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "names"),
    [("lr", "optimizer.groups"), ("number", "optimizer.state"), ("extra state", "model._extra_state")],
)
def test_values_that_differ_between_ranks_are_refused(what: str, names: str, tmp_path: Path) -> None:
    texts = run_ranks(differing, 2, str(tmp_path), what)
    assert len(set(texts)) == 1
    assert f"{names} differs between ranks 0 and 1" in texts[0]


def extra_state_of_dtensors(folder: str) -> list[Any]:
    mesh = init_device_mesh("cpu", (2,))

    def begin(value: float) -> tuple[Recording, TrainState]:
        torch.manual_seed(0)
        model = Recording(4, 4)
        fully_shard(model, mesh=mesh)
        whole = torch.full((4, 4), value)
        model.seen = {"ema": DTensor.from_local(whole.chunk(2)[dist.get_rank()], mesh, [Shard(0)])}
        return model, TrainState(model=model, optimizer={})

    model, state = begin(3.0)
    with manager(folder, state) as ckpt:
        ckpt.resume(state)
        state.advance()
        ckpt.finish(state)
    model, state = begin(1.0)
    with manager(folder, state) as ckpt:
        ckpt.resume(state)
    found = model.seen["ema"]
    assert isinstance(found, DTensor)
    assert found.placements == (Shard(0),)
    return [found.redistribute(placements=[Replicate()]).to_local()]


def test_extra_state_of_dtensors_stays_sharded(tmp_path: Path) -> None:
    for (whole,) in run_ranks(extra_state_of_dtensors, 2, str(tmp_path)):
        assert torch.equal(whole, torch.full((4, 4), 3.0))


# -- loops -----------------------------------------------------------------------------------------------


def linear(**options: Any) -> tuple[nn.Linear, TrainState]:
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    return model, TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters()), **options)


def test_loop_that_did_not_resume_saves_beside_no_steps(tmp_path: Path) -> None:
    for resumes in (True, False):
        _, state = linear()
        ckpt = manager_of(tmp_path, state)
        if resumes:
            ckpt.resume(state)
        for _ in range(4):
            state.advance()
        if resumes:
            ckpt.finish(state)
        else:
            with pytest.raises(Exception, match=r"has steps up to 4, .* has not called resume\(\)"):
                ckpt.finish(state)
        ckpt.close()
    assert paths.committed_steps(tmp_path / "checkpoints") == [4]


def manager_of(folder: Any, state: TrainState, **config: Any) -> CheckpointManager:
    settings = CheckpointConfig.model_validate({"interval": 100, **config})
    return CheckpointManager(settings, state=state, run_dir=folder)


def test_loop_that_goes_on_after_a_mismatch_saves_nothing(tmp_path: Path) -> None:
    _, state = linear()
    with manager_of(tmp_path, state) as ckpt:
        ckpt.resume(state)
        state.advance()
        ckpt.finish(state)
    model = nn.Linear(5, 5)
    state = TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters()))
    ckpt = manager_of(tmp_path, state)
    for call in (lambda: ckpt.resume(state), lambda: ckpt.save(state, wait=True)):
        with pytest.raises(MismatchError):
            call()
    ckpt.close()


def test_save_of_a_committed_step_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, state = linear()
    with manager_of(tmp_path, state) as ckpt:
        ckpt.resume(state)
        state.advance()
        ckpt.save(state, wait=True)
        assert "is not written again" not in caplog.text
        ckpt.save(state, wait=True)
    assert "step 1 is committed already and is not written again" in caplog.text


def sharded_per_rank(folder: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    held = Held({"t": DTensor.from_local(torch.ones(2), mesh, [Shard(0)])})
    _, state = linear(extra={"ema": held}, per_rank=["ema"])
    match = r"extra\.ema\.rank_0000. holds a DTensor.*per_rank="
    with pytest.raises(TypeError, match=match), manager(folder, state) as ckpt:
        ckpt.save(state, wait=True)


def test_extra_per_rank_of_dtensors_is_refused(tmp_path: Path) -> None:
    run_ranks(sharded_per_rank, 2, str(tmp_path))


def test_loop_that_never_advances_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, state = linear()
    with manager_of(tmp_path, state) as ckpt:
        ckpt.resume(state)
        ckpt.finish(state)
    assert "nothing was saved: the step is 0. Call state.advance()" in caplog.text


def test_manager_arguments_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, state = linear()
    monkeypatch.chdir(tmp_path)
    for folder, config, match in (
        ("s3://b/x", {}, "s3://b/x: .*not a URL"),
        (tmp_path, {"dir": "gs://y"}, "gs://y: .*not a URL"),
        (tmp_path, {"exclude_from_loading": ["model"]}, "model has no effect without load_path"),
    ):
        with pytest.raises(ValueError, match=match):
            manager_of(folder, state, **config)
    with pytest.raises(TypeError, match="config is a dict: pass a CheckpointConfig"):
        CheckpointManager({"interval": 1}, state=state, run_dir=tmp_path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_loop_may_change_its_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, state = linear()
    with manager_of("runs/x", state) as ckpt:
        ckpt.resume(state)
        state.advance()
        monkeypatch.chdir("/")
        ckpt.finish(state)
    assert paths.committed_steps(tmp_path / "runs/x/checkpoints") == [1]


def test_state_made_in_inference_mode_can_be_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.inference_mode():
        state = TrainState(model=model, optimizer=optimizer)
        ckpt = manager_of(tmp_path, state)
        ckpt.resume(state)
    with ckpt:
        for _ in range(2):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            state.advance()
            ckpt.save(state, wait=True)
    assert paths.committed_steps(tmp_path / "checkpoints") == [2, 1]


class Held:
    """Holds what it is given."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        """What it holds."""
        return self.value

    def load_state_dict(self, value: Any) -> None:
        """Take it back."""
        self.value = value


class Nothing:
    """Its state has nothing in it."""

    def state_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take."""


def test_receipt_tells_extras_without_state_apart(tmp_path: Path) -> None:
    receipts = []
    for _ in range(2):
        _, state = linear(extra={"metric": Nothing()})
        with manager_of(tmp_path, state) as ckpt:
            receipts.append(ckpt.resume(state))
            state.advance()
            ckpt.finish(state)
    receipt = receipts[-1]
    assert (receipt.extras, receipt.empty_extras) == ([], ["metric"])
    assert "  without any state in the checkpoint: metric" in receipt.lines()


def test_warm_start_without_rng_leaves_generators(tmp_path: Path) -> None:
    _, state = linear()
    with manager_of(tmp_path / "a", state) as ckpt:
        ckpt.resume(state)
        state.advance()
        ckpt.finish(state)
    _, state = linear()
    source = str(tmp_path / "a")
    with manager_of(tmp_path / "b", state, load_path=source, exclude_from_loading=["rng"]) as ckpt:
        torch.manual_seed(77)
        receipt = ckpt.resume(state)
        drawn = torch.rand(())
    torch.manual_seed(77)
    assert torch.equal(drawn, torch.rand(()))
    assert receipt.rng == "left as the program has them"


def test_fresh_start_draws_and_seeds_nothing(tmp_path: Path) -> None:
    _, state = linear()
    torch.manual_seed(77)
    with manager_of(tmp_path, state) as ckpt:
        ckpt.resume(state)
    drawn = torch.rand(())
    torch.manual_seed(77)
    assert torch.equal(drawn, torch.rand(()))


def test_pinned_save_of_tensors_modified_meanwhile_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that does not call wait_for_staging: what it has saved would be of two steps."""
    may_copy = threading.Event()
    copy = ThreadCopy._copy

    def late(self: ThreadCopy) -> None:
        may_copy.wait(60)
        copy(self)

    monkeypatch.setattr(ThreadCopy, "_copy", late)
    model, state = linear()
    with manager_of(tmp_path, state, async_mode="async_with_pinned_mem") as ckpt:
        ckpt.resume(state)
        state.advance()
        ckpt.save(state)
        with torch.no_grad():
            model.weight.add_(1)
        may_copy.set()
        ckpt.wait()
        state.advance()
        (failed,) = [report for report in ckpt.after_step(state) if report.error]
        ckpt.finish(state)
    assert "model.weight was modified while it was being copied: call wait_for_staging()" in failed.error
    assert paths.committed_steps(tmp_path / "checkpoints") == [2]
