"""Mutated checkpoints: none loads silently, none ends in a traceback, none makes a load read elsewhere."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.crash.forged_manifests import ODD_VALUES
from support.crash.mutation_campaign import REFUSED, make_target, run_mutations
from support.crash.mutation_kinds import MAKERS
from support.crash.mutations import Changes, Maker, Mutation, Special, Subject, manifest_of, resigned, signed
from support.crash.watched_loading import Loader, peak_memory_mb

from kempnerforge.checkpoint.async_save import AsyncCheckpointer
from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.format.checksums import BLOCK_BYTES
from kempnerforge.checkpoint.format.manifest import Provenance
from kempnerforge.checkpoint.load import candidates
from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader, load_tensors
from kempnerforge.errors import DamagedCheckpointError

SEED = 20261122
MEMORY_MB = 400
"""A load of a few kilobytes may take this much more, whatever the files say."""
Target = tuple[Loader, Subject]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """A checkpoint to mutate, and what it is made of."""
    return make_target(tmp_path_factory.mktemp("target"))


@pytest.mark.parametrize("maker", [maker for maker, _ in MAKERS], ids=lambda maker: maker.__name__)
def test_mutation_every_kind_changes_something(target: Target, maker: Maker) -> None:
    _, subject = target
    drawn = [maker(subject, random.Random(seed)) for seed in range(30)]
    assert all(isinstance(mutation, Mutation) and mutation.changes for mutation in drawn)
    changed = [m for m in drawn if any(subject.files.get(name) != data for name, data in m.changes.items())]
    assert len(changed) >= 15


def resigned_manifest(**fields: object) -> Callable[[Subject], Changes]:
    return lambda subject: {paths.MANIFEST: signed({**manifest_of(subject.files), **fields})}


def another_name(name: str) -> Callable[[Subject], Changes]:
    def change(subject: Subject) -> Changes:
        body = manifest_of(subject.files)
        body["files"][name] = {"size_bytes": 3, "xxh3_128": ["0" * 32]}
        return {paths.MANIFEST: signed(body)}

    return change


def link_of_the_right_size(subject: Subject) -> Changes:
    """A link whose own size, the length of its target, is that of the file which it stands for."""
    name = paths.TRAIN_STATE
    copy, size = f"{subject.outside}/{name}", len(subject.files[name])
    target = "/" * (1 + (size - len(copy)) % 2) + "./" * ((size - len(copy)) // 2) + copy[1:]
    assert len(target) == size
    return {name: Special("link", target)}


def swapped_and_signed(subject: Subject) -> Changes:
    one, other, *_ = sorted(name for name in subject.files if name.endswith(paths.SHARD_SUFFIX))
    body = manifest_of(subject.files)
    body["files"][one], body["files"][other] = body["files"][other], body["files"][one]
    return {one: subject.files[other], other: subject.files[one], paths.MANIFEST: signed(body)}


TRAPS: dict[str, Callable[[Subject], Changes]] = {
    "a manifest elsewhere": lambda s: {paths.MANIFEST: Special("link", f"{s.outside}/{paths.MANIFEST}")},
    "a manifest that links to itself": lambda _: {paths.MANIFEST: Special("link", paths.MANIFEST)},
    "a manifest that is a folder": lambda _: {paths.MANIFEST: Special("folder")},
    "a manifest that is a pipe": lambda _: {paths.MANIFEST: Special("fifo")},
    "a manifest of a terabyte": lambda _: {paths.MANIFEST: Special("sparse", size_bytes=1 << 40)},
    "a link of the right size": link_of_the_right_size,
    "a name with a null byte": another_name("x\0y"),
    "a name that no file system takes": another_name("x" * 300),
    "half a character in a name": another_name("\ud800"),
    "an endless time": resigned_manifest(time=float("inf"), attempt=float("inf")),
    "a config that is not text": lambda s: resigned(s.files, paths.CONFIG, b"\xff\xfe"),
    "a config that is not TOML": lambda s: resigned(s.files, paths.CONFIG, b"a = 1\na = 2"),
    "a train state without counters": lambda s: resigned(
        s.files, paths.TRAIN_STATE, json.dumps({"data": {"cursor": {}, "fingerprint": {}}}).encode()
    ),
    "shards that changed places, signed": swapped_and_signed,
}


@pytest.mark.parametrize("trap", TRAPS)
def test_load_trap_is_refused(target: Target, monkeypatch: pytest.MonkeyPatch, trap: str) -> None:
    loader, subject = target
    monkeypatch.setattr(candidates, "RETRY_DELAYS_S", (0.0,))
    with loader.changed(TRAPS[trap](subject)):
        assert loader.load() in REFUSED
        assert not loader.opened.outside
        assert loader.resume(3) in ("older", "MismatchError")
        assert not loader.opened.outside


@pytest.mark.parametrize("field", [*Provenance.__dataclass_fields__, "time"])
def test_resume_odd_manifest_field_is_survived(
    target: Target, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    loader, subject = target
    monkeypatch.setattr(candidates, "RETRY_DELAYS_S", (0.0,))
    for value in ODD_VALUES:
        with loader.changed(resigned_manifest(**{field: value})(subject)):
            assert loader.resume(3) in ("loaded", "older", "MismatchError"), value


def test_load_flipped_bit_in_large_shard_is_found(tmp_path: Path) -> None:
    weight = torch.arange(3 * BLOCK_BYTES // 4 + 1000, dtype=torch.float32)
    AsyncCheckpointer().save({"w": weight}, tmp_path / "c")
    (path,) = (tmp_path / "c").glob("*.safetensors")
    rng = random.Random(SEED)
    with path.open("r+b") as file:
        for _ in range(8):
            at, bit = rng.randrange(path.stat().st_size), 1 << rng.randrange(8)
            for again in (False, True):
                file.seek(at)
                (byte,) = file.read(1)
                file.seek(at)
                file.write(bytes([byte ^ bit]))
                file.flush()
                loaded = {"w": torch.zeros_like(weight)}
                if again:
                    load_tensors(loaded, SafetensorsReader(tmp_path / "c"))
                    assert torch.equal(loaded["w"], weight)
                else:
                    with pytest.raises(DamagedCheckpointError, match="wrong digest"):
                        load_tensors(loaded, SafetensorsReader(tmp_path / "c"))


def test_load_sampled_mutations_are_refused(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    before = peak_memory_mb()
    counts = run_mutations(*target, 600, SEED, monkeypatch)
    assert counts["DamagedCheckpointError"] > 300
    assert counts["older"] > 20
    assert peak_memory_mb() - before < MEMORY_MB


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_load_ten_thousand_mutations_are_refused(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    before = peak_memory_mb()
    counts = run_mutations(*target, 10_000, SEED + 1, monkeypatch)
    print(f"mutations: {counts.total()}, {dict(counts)}, {peak_memory_mb() - before:.0f} MB more at the peak")
    assert peak_memory_mb() - before < MEMORY_MB
