"""Read the files of a run in tests."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader, load_tensors
from kempnerforge.telemetry.jsonl import effective_rows, read_rows

BITWISE_KEYS = (
    *("train/loss", "train/z_loss", "train/grad_norm", "train/lr", "train/tokens"),
    *("data/digest", "eval/loss"),
)
"""Values that a run that was stopped and resumed must log with the same bits as an uninterrupted one."""

Counting = dict[int, dict[str, Any]]
"""Step -> its values on the final timeline."""


@dataclass
class RunFiles:
    """A run's folder and its checkpoints."""

    folder: Path = field(default_factory=Path)
    checkpoints: Path = field(default_factory=Path)

    @property
    def record(self) -> dict[str, Any]:
        """Return ``run.json``."""
        return json.loads((self.folder / "run.json").read_text())

    def receipts(self) -> list[dict[str, Any]]:
        """Return the resume receipts, oldest first, without a line that a kill has torn."""
        path = self.folder / "receipts.jsonl"
        return read_rows(path).rows if path.exists() else []

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows of ``metrics.jsonl``."""
        path = self.folder / "metrics.jsonl"
        return read_rows(path).rows if path.exists() else []

    def counting(self) -> Counting:
        """Return the values of ``BITWISE_KEYS`` of every step on the final timeline.

        Fails if two rows of the final timeline have different values.
        """
        resumes = {receipt["attempt"]: receipt["step"] for receipt in self.receipts()}
        found: Counting = defaultdict(dict)
        for row in effective_rows(self.rows(), resumes):
            for key in BITWISE_KEYS:
                if key in row:
                    known = found[row["step"]].setdefault(key, row[key])
                    same = repr(known) == repr(row[key])
                    assert same, f"step {row['step']} has two values of {key} that count"
        return dict(found)

    def step_folder(self, step: int) -> Path:
        """Return the folder of a committed step."""
        return self.checkpoints / f"step_{step:08d}"

    def committed(self) -> list[int]:
        """Return the steps that have their final name and a manifest, newest first."""
        return paths.committed_steps(self.checkpoints)

    def sound(self) -> list[int]:
        """Return the committed steps whose every byte agrees with the manifest, newest first."""
        return [step for step in self.committed() if unsound(self.step_folder(step)) is None]

    def unfinished(self) -> list[str]:
        """Return the hidden folders: checkpoints in flight and unfinished deletions."""
        return sorted(
            path.name for path in self.checkpoints.glob(".*") if path.is_dir() and not path.is_symlink()
        )

    def names(self) -> set[str]:
        """Return all names in the checkpoint folder."""
        return {path.name for path in self.checkpoints.iterdir()}


def unsound(step_folder: Path) -> str | None:
    """Return what is wrong with a committed step according to its manifest alone; None if nothing is."""
    manifest = json.loads((step_folder / "manifest.json").read_text())
    present = {path.name for path in step_folder.iterdir()} - {"manifest.json"}
    if present != set(manifest["files"]):
        return f"files are {sorted(present)}, the manifest has {sorted(manifest['files'])}"
    for name, record in manifest["files"].items():
        data = (step_folder / name).read_bytes()
        block = manifest["block_bytes"]
        digests = [xxhash.xxh3_128_hexdigest(data[at : at + block]) for at in range(0, len(data), block)]
        if len(data) != record["size_bytes"] or digests != record["xxh3_128"]:
            return f"{name} is not what the manifest says"
    return None


def each_step_alone(checkpoints: Path, target: Path) -> Iterator[Path]:
    """Yield each committed step, oldest first, in a copy of its own, without the other steps.

    ``cp -a`` keeps the hard links between the steps, as they are where the older ones were pruned.
    """
    for step in reversed(paths.committed_steps(checkpoints)):
        folder = target / str(step)
        subprocess.run(["cp", "-a", str(checkpoints), str(folder)], check=True)
        for other in paths.committed_steps(folder):
            if other != step:
                shutil.rmtree(folder / paths.step_name(other))
        yield folder / paths.step_name(step)


def tensor_digests(step_folder: Path) -> dict[str, str]:
    """Return the SHA-256 of dtype, shape and bytes of every tensor of a step, by name."""
    import torch
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = SafetensorsReader(step_folder)
    tensors = {}
    for name, meta in reader.read_metadata().state_dict_metadata.items():
        if isinstance(meta, TensorStorageMetadata):
            tensors[name] = torch.empty(meta.size, dtype=meta.properties.dtype)
    load_tensors(tensors, reader)
    reader.close()
    return {name: digest_of(tensor) for name, tensor in tensors.items()}


def digest_of(tensor: Any) -> str:
    """Return the SHA-256 of a plain tensor's dtype, shape and bytes."""
    import torch

    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digest_of_folder(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a folder, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
