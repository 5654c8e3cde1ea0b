"""Saves with frozen tensors: what is linked, what is written again, and when."""

from __future__ import annotations

import errno
import os
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.ranks import gloo_group, run_ranks
from support.run_files import each_step_alone
from support.tmpfs import mounted_tmpfs
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kempnerforge import CheckpointConfig, CheckpointManager, TrainState
from kempnerforge.checkpoint.format import manifest, paths
from kempnerforge.checkpoint.format.step_info import StepView
from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader, load_tensors
from kempnerforge.checkpoint.results import SaveReport
from kempnerforge.checkpoint.save import frozen, pipeline
from kempnerforge.checkpoint.tools import safetensors_export
from kempnerforge.checkpoint.tools.verify import verify
from kempnerforge.errors import NoSoundCheckpointError, SaveFailedError

WIDTH, RANK = 700, 2
WIDE, WIDE_RANK = 3600, 18
"""The adapter and its state have 1.6 MB, against which headers, generators and small files are little."""


class Adapted(nn.Module):
    """A frozen base with at least 99% of the parameters, and an adapter of low rank."""

    def __init__(self, width: int = WIDTH, rank: int = RANK) -> None:
        super().__init__()
        self.base = nn.Linear(width, width)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Loop:
    """A loop of one's own around the model, sharded over the ranks if there are several."""

    def __init__(self, run_dir: Path, *shape: int, **config: Any) -> None:
        torch.manual_seed(7)
        self.model = Adapted(*shape)
        group = gloo_group() if dist.is_initialized() else None
        if group is not None and dist.get_world_size() > 1:
            fully_shard(self.model)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        self.state = TrainState(model=self.model, optimizer=self.optimizer)
        settings = {"interval": 1, "keep_last_n": 3, "save_last": False, **config}
        self.ckpt = CheckpointManager(
            CheckpointConfig.model_validate(settings), state=self.state, run_dir=run_dir, control_group=group
        )
        self.receipt = self.ckpt.resume(self.state)

    def step(self, change: Callable[[Adapted], None] = lambda _: None) -> SaveReport:
        """Train one step, apply ``change``, save and wait for the commit."""
        width = self.model.base.in_features
        self.model(torch.full((3, width), 0.01 * self.state.step)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            change(self.model)
        self.state.advance()
        self.ckpt.save(self.state, wait=True)
        (report,) = self.ckpt.poll()
        return report

    def path(self, step: int | None = None) -> Path:
        return self.ckpt.folder / paths.step_name(self.state.step if step is None else step)

    def close(self) -> None:
        self.ckpt.finish(self.state)
        self.ckpt.close()


def shards(step_folder: Path) -> list[os.stat_result]:
    return [file.stat() for file in sorted(step_folder.glob("*.safetensors"))]


def stored(step_folder: Path, name: str) -> Tensor:
    """Return a whole tensor of a step, with every digest verified."""
    reader = SafetensorsReader(step_folder)
    target = torch.empty(reader.index[name].shape)
    load_tensors({name: target}, reader)
    reader.close()
    return target


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def save_adapters(folder: str) -> list[tuple[int, int, int]]:
    """Save three steps. Return bytes of the step, bytes reported as written, blocks of new files."""
    loop, seen, found = Loop(Path(folder), WIDE, WIDE_RANK), set[int](), []
    for _ in range(3):
        report = loop.step()
        new = [status for status in map(os.stat, loop.path().iterdir()) if status.st_ino not in seen]
        seen |= {status.st_ino for status in new}
        found.append((report.size_bytes, report.written_bytes, sum(512 * s.st_blocks for s in new)))
    loop.close()
    return found


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.smoke)])
def test_save_frozen_base_writes_only_the_adapter(tmp_path: Path, ranks: int) -> None:
    """At most 1.2 times the trained weights and their two moments, with everything that is beside them."""
    trained, frozen_parameters = 2 * WIDE * WIDE_RANK, WIDE * (WIDE + 1)
    assert frozen_parameters >= 0.99 * (frozen_parameters + trained)
    trained_bytes = 3 * 4 * trained
    for first, *others in run_ranks(save_adapters, ranks, str(tmp_path)):
        assert first[1] == first[0] > 4 * frozen_parameters + trained_bytes
        for size, written, blocks in others:
            assert abs(size - first[0]) < 1000
            assert trained_bytes < written <= 1.2 * trained_bytes
            assert trained_bytes < blocks <= 1.2 * trained_bytes


def test_save_steps_are_complete_alone(tmp_path: Path) -> None:
    """Each step when all others are gone: verified, exported, read by stock DCP."""
    loop, adapters = Loop(tmp_path / "run"), {}
    for step in range(1, 6):
        loop.step()
        adapters[step] = loop.model.up.weight.detach().clone()
    loop.close()
    assert paths.committed_steps(loop.ckpt.folder) == [5, 4, 3]
    for step, path in enumerate(each_step_alone(loop.ckpt.folder, tmp_path), 3):
        assert all(status.st_nlink == 1 for status in shards(path)), "the others are deleted"
        assert verify(path).problems == ()
        out = tmp_path / f"out_{step}"
        safetensors_export.export(StepView.open(path, step=step), out, dtype="F32")
        exported = load_file(out / "model.safetensors")
        target = {"model.base.weight": torch.zeros(WIDTH, WIDTH)}
        load(target, storage_reader=HuggingFaceStorageReader(str(path)))
        for base in (exported["base.weight"], target["model.base.weight"], stored(path, "model.base.weight")):
            assert torch.equal(base, loop.model.base.weight)
        assert torch.equal(exported["up.weight"], adapters[step])


def test_save_first_after_resume_links_equal_files(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.step()
    loop.close()
    again = Loop(tmp_path)
    assert (again.receipt.source, again.receipt.step) == ("resume", 1)
    assert again.step().linked_bytes > 4 * WIDTH * WIDTH
    assert again.step().linked_bytes > 4 * WIDTH * WIDTH
    assert shards(again.path(1))[1].st_ino == shards(again.path(3))[1].st_ino
    again.close()


def test_save_first_after_resume_writes_other_values(tmp_path: Path) -> None:
    """A program may change frozen weights between its resume and its first save."""
    loop = Loop(tmp_path)
    loop.step()
    loop.close()
    again = Loop(tmp_path)
    again.model.base.bias.data.add_(1)
    report = again.step()
    assert (report.linked_bytes, report.warnings) == (0, ())
    assert torch.equal(stored(again.path(), "model.base.bias"), again.model.base.bias)
    assert again.step().linked_bytes > 4 * WIDTH * WIDTH
    again.close()


def through_data(model: Adapted) -> None:
    model.base.bias.data.add_(1)


def in_place(model: Adapted) -> None:
    model.base.bias.add_(1)


def other_memory(model: Adapted) -> None:
    model.base.bias.data = model.base.bias.data + 1


@pytest.mark.parametrize(
    "change", [pytest.param(through_data, marks=pytest.mark.smoke), in_place, other_memory]
)
def test_save_changed_frozen_weight_is_written(tmp_path: Path, change: Callable[[Adapted], None]) -> None:
    loop = Loop(tmp_path)
    biases = []
    for changed in (False, True, False, True):
        report = loop.step(change if changed else lambda _: None)
        assert any("base.bias requires no gradient and has changed" in w for w in report.warnings) == (
            loop.state.step == 2
        )
        biases.append(loop.model.base.bias.detach().clone())
    assert report.linked_bytes > 4 * WIDTH * WIDTH, "the weight of the base is linked again"
    for step, bias in enumerate(biases[1:], 2):
        assert torch.equal(stored(loop.path(step), "model.base.bias"), bias)
        assert verify(loop.path(step)).problems == ()
    loop.close()


def move(model: Adapted) -> None:
    for parameter in model.base.parameters():
        parameter.data.mul_(1.5)


def move_teacher(folder: str) -> None:
    """Both frozen tensors change at every step, as those of a teacher that follows the student."""
    loop = Loop(Path(folder), async_mode="async_with_pinned_mem")
    for _ in range(3):
        loop.step(move)
        weight = whole(loop.model.base.weight)
        if dist.get_rank() == 0:
            assert torch.equal(stored(loop.path(), "model.base.weight"), weight)
    assert loop.step().linked_bytes == 0
    loop.close()


def test_save_moving_teacher_has_values_of_its_step(tmp_path: Path) -> None:
    run_ranks(move_teacher, 2, str(tmp_path))


def save_on(folder: str, steps: int) -> list[int]:
    loop = Loop(Path(folder))
    linked = [loop.step().linked_bytes for _ in range(steps)]
    weight, path = whole(loop.model.base.weight), loop.path()
    if dist.get_rank() == 0:
        assert verify(path).problems == ()
        assert torch.equal(stored(path, "model.base.weight"), weight)
    loop.close()
    return linked


def test_save_other_layout_writes_once_then_links(tmp_path: Path) -> None:
    for ranks in (2, 1, 4):
        for first, second in run_ranks(save_on, ranks, str(tmp_path), 2):
            assert first == 0
            assert second > 4 * WIDTH * WIDTH


def refuse_links(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, *, after: int = 0, until: int = 1000
) -> None:
    """Let ``os.link`` fail in processes that start from now on, from call ``after`` to call ``until``."""
    folder.mkdir()
    code = f"""
        import os
        real, calls = os.link, []
        def link(*paths, **options):
            calls.append(paths)
            if {after} < len(calls) <= {until}:
                raise OSError({number}, os.strerror({number}))
            return real(*paths, **options)
        os.link = link
    """
    (folder / "sitecustomize.py").write_text(textwrap.dedent(code))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_save_link_refused_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    loop = Loop(tmp_path / "run")
    refuse_links(tmp_path / "patch", monkeypatch, number)
    assert loop.step().warnings == ()
    for step in (2, 3, 4):
        report = loop.step()
        assert (report.error, report.linked_bytes) == ("", 0)
        is_told = step == 2 or number not in frozen.NEVER
        assert any(os.strerror(number) in text for text in report.warnings) == is_told
        assert verify(loop.path()).problems == ()
    assert len({shards(loop.path(step))[1].st_ino for step in (2, 3, 4)}) == 3
    loop.close()


def test_save_link_refused_and_changed_meanwhile_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on during a save: values of a later step must not be in this one."""
    loop = Loop(tmp_path / "run")
    refuse_links(tmp_path / "patch", monkeypatch, errno.EMLINK)
    loop.step()
    link_failed = frozen.FrozenSave.link_failed

    def change_too(save: frozen.FrozenSave, *why: Any, **how: Any) -> None:
        link_failed(save, *why, **how)
        in_place(loop.model)

    with monkeypatch.context() as patched:
        patched.setattr(frozen.FrozenSave, "link_failed", change_too)
        with pytest.raises(SaveFailedError, match="require no gradient and changed during the save"):
            loop.step()
    assert paths.committed_steps(loop.ckpt.folder) == [1]
    loop.ckpt.poll()
    loop.step()
    assert torch.equal(stored(loop.path(), "model.base.bias"), loop.model.base.bias)
    loop.close()


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM])
def test_save_file_of_another_user_is_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The system may refuse to link it. The new file is this user's own, and is linked by later saves."""
    loop = Loop(tmp_path / "run")
    loop.step()
    loop.close()
    refuse_links(tmp_path / "patch", monkeypatch, number, until=1)
    loop = Loop(tmp_path / "run")
    assert os.strerror(number) in loop.step().warnings[0]
    assert (loop.step().linked_bytes > 0) == (number == errno.EPERM)
    loop.close()


def test_save_without_fingerprints_writes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full device there may be no memory to compute them. Saves go on without links."""
    loop = Loop(tmp_path)
    assert [loop.step().linked_bytes > 0 for _ in range(2)] == [False, True]
    monkeypatch.setattr(frozen, "fingerprints", failing_fingerprints)
    for warnings in (("rank 0: frozen tensors are written by every save: OutOfMemoryError: full",), ()):
        report = loop.step()
        assert (report.error, report.linked_bytes, report.warnings) == ("", 0, warnings)
        assert verify(loop.path()).problems == ()
    loop.close()


def failing_fingerprints(_: Any) -> list[str]:
    raise torch.OutOfMemoryError("full")


def test_save_source_gone_or_replaced_is_written_again(tmp_path: Path) -> None:
    """Somebody else may delete a step, or put another file in the place of one that it has."""
    loop = Loop(tmp_path)
    loop.step()
    shutil.rmtree(loop.path())
    report = loop.step()
    assert report.linked_bytes == 0
    assert any("No such file" in text for text in report.warnings)
    file = sorted(loop.path().glob("*.safetensors"))[1]
    body = bytearray(file.read_bytes())
    body[-1] ^= 1
    file.unlink()
    file.write_bytes(body)
    report = loop.step()
    assert any("was replaced by another file" in text for text in report.warnings)
    assert verify(loop.path()).problems == ()
    assert loop.step().linked_bytes > 0
    loop.close()


def test_save_frozen_buffers_are_released_after_first(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    assert loop.ckpt._checkpointer.host_bytes > 4 * WIDTH * WIDTH
    loop.step()
    assert loop.ckpt._checkpointer.host_bytes < 400_000
    pid = loop.ckpt._checkpointer.writer_pid
    for process in (os.getpid(), pid):
        assert "memfd:kempnerforge-shard_00001" not in Path(f"/proc/{process}/maps").read_text()
    loop.close()


def test_save_failed_first_keeps_no_buffers_in_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saves that are planned again have new buffers. The memory of the old ones is free."""
    loop = Loop(tmp_path)
    for _ in range(2):
        with monkeypatch.context() as patched:
            patched.setattr(pipeline, "commit", failing_commit)
            with pytest.raises(SaveFailedError, match="no commit"):
                loop.step()
    loop.ckpt.poll()
    loop.state.advance()
    loop.ckpt.save(loop.state, wait=True)
    maps = Path(f"/proc/{loop.ckpt._checkpointer.writer_pid}/maps").read_text()
    assert maps.count("memfd:kempnerforge-shard") == 1
    loop.close()


def failing_commit(*_: Any, **__: Any) -> int:
    raise OSError(errno.EIO, "no commit")


def test_save_links_need_no_space(tmp_path: Path) -> None:
    """Eight steps of 2 MB on a disk of 3.8 MB, and a resume there."""
    with mounted_tmpfs(tmp_path / "disk", "size=3800k", lazy=True) as disk:
        loop = Loop(disk, keep_last_n=10)
        for _ in range(8):
            loop.step()
        assert loop.ckpt.save(loop.state).skipped == ""
        loop.close()
        assert len(paths.committed_steps(loop.ckpt.folder)) == 8
        again = Loop(disk, keep_last_n=10)
        again.close()


def test_resume_damaged_shared_file_is_found_in_all_steps(tmp_path: Path) -> None:
    """One file on the disk: its damage is that of every step that links to it, and none is loaded."""
    loop = Loop(tmp_path)
    for _ in range(3):
        loop.step()
    loop.close()
    file = sorted(loop.path(2).glob("*.safetensors"))[1]
    with open(file, "r+b") as shard:
        shard.seek(10_000)
        shard.write(b"\xff\xff")
    for step in (1, 2, 3):
        assert any(file.name in problem for problem in verify(loop.path(step)).problems)
    with pytest.raises(NoSoundCheckpointError):
        Loop(tmp_path)


def test_manifest_of_linked_step_reads_as_format_1(tmp_path: Path) -> None:
    """Nothing in a step says that a file is a link, so every version of KempnerForge reads it."""
    loop = Loop(tmp_path)
    loop.step()
    loop.step()
    records = [manifest.load(loop.path(step)).files for step in (1, 2)]
    assert records[0].keys() == records[1].keys()
    name = "shard_00001_of_00002.safetensors"
    assert records[0][name] == records[1][name]
    assert '"format": 1,' in (loop.path() / paths.MANIFEST).read_text()
    loop.close()
