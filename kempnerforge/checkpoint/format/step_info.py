"""What a step holds, read without torch: for looking at it, not for loading it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli

from kempnerforge.checkpoint.format import manifest, paths, structure
from kempnerforge.checkpoint.format.checksums import VerifiedFile
from kempnerforge.checkpoint.format.json_values import MALFORMED
from kempnerforge.checkpoint.format.manifest import Manifest
from kempnerforge.errors import DamagedCheckpointError

if TYPE_CHECKING:
    from kempnerforge.checkpoint.format.tensor_index import TensorEntry

KINDS = ("model", "optimizer", "rng")
"""First part of a tensor's name; tensors of any other name, headers and small files are ``other``."""


def kind_of(tensor_name: str) -> str:
    """Which of ``KINDS`` a tensor is, or ``other``."""
    first = tensor_name.partition(".")[0]
    return first if first in KINDS else "other"


@dataclass(frozen=True)
class StepView:
    """A step whose manifest, names and sizes are right. The digests of small files are checked when read."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path, *, step: int | None = None) -> StepView:
        """Look at the step in ``path``. Raises DamagedCheckpointError, MismatchError, OSError."""
        return cls(path, manifest.load(path, step=step))

    @property
    def size_bytes(self) -> int:
        """Bytes of all its files, the manifest's own included."""
        return self.manifest.size_bytes + (self.path / paths.MANIFEST).stat().st_size

    def tensors(self) -> dict[str, TensorEntry]:
        """All tensors by name, sorted. Raises DamagedCheckpointError, OSError."""
        from kempnerforge.checkpoint.format.tensor_index import Index  # listing steps needs none of it

        with VerifiedFile(self.path / paths.INDEX, self.manifest.files[paths.INDEX], keep=True) as file:
            return dict(Index(file))

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of model, optimizer, rng, and all else. Raises DamagedCheckpointError, OSError."""
        sums: dict[str, int] = dict.fromkeys((*KINDS, "other"), 0)
        for name, entry in self.tensors().items():
            sums[kind_of(name)] += tensor_bytes(entry)
        sums["other"] += self.size_bytes - sum(sums.values())
        return sums

    def train_state(self) -> dict[str, Any]:
        """What is no tensor, tagged JSON as it is stored. Raises DamagedCheckpointError, OSError."""
        try:
            body = json.loads(manifest.read_verified(self.path, self.manifest, paths.TRAIN_STATE))
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"{paths.TRAIN_STATE} cannot be parsed ({error})") from None
        if not isinstance(body, dict):
            raise self._damaged(f"{paths.TRAIN_STATE} is not a JSON object")
        try:
            structure.decode(body.pop(structure.PATHS, None))  # not a leaf: where the leaves stood
        except MALFORMED as error:
            raise self._damaged(f"{paths.TRAIN_STATE}: {error}") from None
        return body

    def config(self) -> dict[str, Any]:
        """The run's config as tables; empty when none is stored. Raises DamagedCheckpointError, OSError."""
        if paths.CONFIG not in self.manifest.files:
            return {}
        try:
            return tomli.loads(manifest.read_verified(self.path, self.manifest, paths.CONFIG).decode())
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"{paths.CONFIG} cannot be parsed ({error})") from None

    def shards(self) -> Iterator[str]:
        """Names of its tensor files."""
        return (name for name in self.manifest.files if name.endswith(paths.SHARD_SUFFIX))

    def _damaged(self, what: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(f"{self.path.name} is damaged: {what}")


def tensor_bytes(entry: TensorEntry) -> int:
    """Bytes that the chunks of a tensor take."""
    return sum(chunk.end - chunk.begin for chunk in entry.chunks)
