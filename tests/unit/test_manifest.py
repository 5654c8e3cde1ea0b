"""manifest.json vouches for every other file, and for itself."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import xxhash

from kempnerforge.checkpoint.format import manifest, paths
from kempnerforge.checkpoint.format.checksums import record_of
from kempnerforge.checkpoint.format.manifest import Provenance
from kempnerforge.errors import DamagedCheckpointError, MismatchError

FILES = {"index.bin": b"index", "train_state.json": b"{}", "shard_00000_of_00001.safetensors": b"x" * 100}


def write_step(folder: Path, step: int = 5) -> Path:
    path = folder / paths.step_name(step)
    path.mkdir()
    for name, data in FILES.items():
        (path / name).write_bytes(data)
    records = {name: record_of(data) for name, data in FILES.items()}
    (path / paths.MANIFEST).write_bytes(manifest.encode(Provenance(step=step, attempt=2), records))
    return path


def resign(path: Path, **changes: object) -> None:
    body = json.loads((path / paths.MANIFEST).read_text())
    del body["digest"]
    body.update(changes)
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    body["digest"] = xxhash.xxh3_128_hexdigest(canonical)
    (path / paths.MANIFEST).write_text(json.dumps(body))


def test_manifest_round_trip_equal(tmp_path: Path) -> None:
    found = manifest.load(write_step(tmp_path), step=5)
    assert found.provenance == Provenance(step=5, attempt=2)
    assert found.size_bytes == sum(map(len, FILES.values()))
    assert manifest.read_verified(tmp_path / "step_00000005", found, "index.bin") == b"index"


@pytest.mark.parametrize("position", range(0, 400, 7))
def test_manifest_any_flipped_byte_found(tmp_path: Path, position: int) -> None:
    path = write_step(tmp_path) / paths.MANIFEST
    data = bytearray(path.read_bytes())
    data[position] ^= 0x04
    path.write_bytes(data)
    with pytest.raises((DamagedCheckpointError, MismatchError)):
        manifest.load(path.parent, step=5)


def test_manifest_of_other_step_is_damage(tmp_path: Path) -> None:
    one, other = write_step(tmp_path, 5), write_step(tmp_path, 6)
    (one / paths.MANIFEST).write_bytes((other / paths.MANIFEST).read_bytes())
    with pytest.raises(DamagedCheckpointError, match="its manifest is of step 6"):
        manifest.load(one, step=5)


@pytest.mark.parametrize("name", FILES)
def test_manifest_missing_or_short_file_named(tmp_path: Path, name: str) -> None:
    path = write_step(tmp_path)
    (path / name).write_bytes(FILES[name][:-1])
    with pytest.raises(DamagedCheckpointError, match=f"{name} has {len(FILES[name]) - 1} of"):
        manifest.load(path)
    (path / name).unlink()
    with pytest.raises(DamagedCheckpointError, match=f"{name} is missing"):
        manifest.load(path)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", "..", ""])
def test_manifest_file_outside_folder_refused(tmp_path: Path, name: str) -> None:
    path = write_step(tmp_path)
    files = json.loads((path / paths.MANIFEST).read_text())["files"]
    resign(path, files={**files, name: {"size_bytes": 0, "xxh3_128": []}})
    with pytest.raises(DamagedCheckpointError, match="not a file of this folder"):
        manifest.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": 3},
        {"files": {"index.bin": {}}},
        {"files": {}},
        {"time": "soon"},
        {"files": []},
        {"metrics": 3},
        {"metrics": {"eval/loss": "low"}},
    ],
)
def test_manifest_wrong_shape_is_damage(tmp_path: Path, changes: dict[str, object]) -> None:
    path = write_step(tmp_path)
    resign(path, **changes)
    with pytest.raises(DamagedCheckpointError):
        manifest.load(path)


def test_manifest_keeps_finite_metrics_only() -> None:
    metrics = {"eval/loss": 2.5, "train/loss": float("nan"), "train/grad_norm": float("inf")}
    data = manifest.encode(Provenance(step=1, metrics=metrics), {})
    assert b"NaN" not in data
    assert b"Infinity" not in data
    assert manifest.decode(data, where="x").provenance.metrics == {"eval/loss": 2.5}


def test_manifest_of_earlier_version_has_no_metrics(tmp_path: Path) -> None:
    path = write_step(tmp_path)
    body = json.loads((path / paths.MANIFEST).read_text())
    del body["metrics"]
    (path / paths.MANIFEST).write_text(json.dumps(body))
    with pytest.raises(DamagedCheckpointError, match="own digest"):
        manifest.load(path)
    resign(path)
    assert "metrics" not in json.loads((path / paths.MANIFEST).read_text())
    assert manifest.load(path, step=5).provenance.metrics == {}


def test_manifest_newer_format_is_mismatch(tmp_path: Path) -> None:
    path = write_step(tmp_path)
    resign(path, format=2)
    with pytest.raises(MismatchError, match="format 2"):
        manifest.load(path)


def test_list_folder_step_vanishes_listed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newer step that made way for the deletion can be missing from it."""
    write_step(tmp_path, 5)
    scandir = os.scandir

    def stale_once(folder: Path | int) -> Any:
        if folder != tmp_path or not (tmp_path / "step_00000005").exists():
            return scandir(folder)
        with scandir(folder) as entries:
            found = list(entries)
        shutil.rmtree(tmp_path / "step_00000005")
        write_step(tmp_path, 6)
        return contextlib.nullcontext(found)

    monkeypatch.setattr(os, "scandir", stale_once)
    assert paths.list_folder(tmp_path).steps == [6]


def test_list_folder_knows_own_names_only(tmp_path: Path) -> None:
    write_step(tmp_path, 5)
    write_step(tmp_path, 123456789)
    for name in ("step_9.bak", "step_00000007", "step_5", "step_000000010", ".step_00000008.tmp", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000012").write_text("a file")
    (tmp_path / "latest").symlink_to("step_00000005")
    (tmp_path / "step_00000013").symlink_to("step_00000005")
    (tmp_path / ".step_00000006.3.tmp").mkdir()
    (tmp_path / ".step_00000004.deleting").mkdir()
    (tmp_path / "quarantined.step_00000003.1").mkdir()
    found = paths.list_folder(tmp_path)
    assert found.steps == [123456789, 5]
    assert [(path.name, attempt) for path, attempt in found.temporary] == [(".step_00000006.3.tmp", 3)]
    assert [path.name for path in found.deleting] == [".step_00000004.deleting"]
    assert [path.name for path in found.quarantined] == ["quarantined.step_00000003.1"]
    (tmp_path / "step_00000005" / paths.MANIFEST).unlink()
    assert paths.list_folder(tmp_path).steps == [123456789, 5], "ours, and damaged"
    assert paths.committed_steps(tmp_path) == [123456789]
