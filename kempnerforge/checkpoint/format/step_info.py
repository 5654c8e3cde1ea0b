"""Read what a step contains, without torch: for inspection, not for loading."""

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
"""First parts of tensor names. Other tensors, headers and small files count as ``other``."""


def kind_of(tensor_name: str) -> str:
    """Return which of ``KINDS`` a tensor is, or ``other``."""
    first = tensor_name.partition(".")[0]
    return first if first in KINDS else "other"


@dataclass(frozen=True)
class StepView:
    """A step whose manifest, file names and sizes are correct.

    Digests of small files are verified on access.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path, *, step: int | None = None) -> StepView:
        """Open the step in ``path``. Raises DamagedCheckpointError, MismatchError, OSError."""
        return cls(path, manifest.load(path, step=step))

    @property
    def size_bytes(self) -> int:
        """Size of all its files, including the manifest."""
        return self.manifest.size_bytes + (self.path / paths.MANIFEST).stat().st_size

    def tensors(self) -> dict[str, TensorEntry]:
        """Return all tensors by name, sorted. Raises DamagedCheckpointError, OSError."""
        from kempnerforge.checkpoint.format.tensor_index import Index  # listing steps does not need it

        with VerifiedFile(self.path / paths.INDEX, self.manifest.files[paths.INDEX], keep=True) as file:
            return dict(Index(file))

    def bytes_by_kind(self) -> dict[str, int]:
        """Return the bytes of model, optimizer, rng, and everything else.

        Raises DamagedCheckpointError, OSError.
        """
        sums: dict[str, int] = dict.fromkeys((*KINDS, "other"), 0)
        for name, entry in self.tensors().items():
            sums[kind_of(name)] += tensor_bytes(entry)
        sums["other"] += self.size_bytes - sum(sums.values())
        return sums

    def train_state(self) -> dict[str, Any]:
        """Return the entries that are not tensors, as stored: tagged JSON.

        Raises DamagedCheckpointError, OSError.
        """
        try:
            body = json.loads(manifest.read_verified(self.path, self.manifest, paths.TRAIN_STATE))
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"{paths.TRAIN_STATE} cannot be parsed ({error})") from None
        if not isinstance(body, dict):
            raise self._damaged(f"{paths.TRAIN_STATE} is not a JSON object")
        try:
            structure.decode(body.pop(structure.PATHS, None))  # the paths of the leaves, not a leaf
        except MALFORMED as error:
            raise self._damaged(f"{paths.TRAIN_STATE}: {error}") from None
        return body

    def config(self) -> dict[str, Any]:
        """Return the run's config as tables; empty if none is stored.

        Raises DamagedCheckpointError, OSError.
        """
        if paths.CONFIG not in self.manifest.files:
            return {}
        try:
            return tomli.loads(manifest.read_verified(self.path, self.manifest, paths.CONFIG).decode())
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"{paths.CONFIG} cannot be parsed ({error})") from None

    def shards(self) -> Iterator[str]:
        """Return the names of its tensor files."""
        return (name for name in self.manifest.files if name.endswith(paths.SHARD_SUFFIX))

    def _damaged(self, what: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(f"{self.path.name} is damaged: {what}")


def tensor_bytes(entry: TensorEntry) -> int:
    """Return the size of all chunks of a tensor."""
    return sum(chunk.end - chunk.begin for chunk in entry.chunks)
