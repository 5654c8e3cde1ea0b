"""Export the weights of a step of any model as safetensors files, under the names of the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kempnerforge.checkpoint.format import hf_format, paths
from kempnerforge.checkpoint.format.step_info import StepView
from kempnerforge.checkpoint.tools import hf_export
from kempnerforge.checkpoint.tools.hf_export import Exported, Progress
from kempnerforge.errors import MismatchError


@dataclass(frozen=True)
class OwnTensor:
    """A weight that keeps its name and its rows."""

    name: str
    shape: tuple[int, ...]
    row_order: tuple[int, ...] = ()

    @property
    def hf_name(self) -> str:
        """The same name."""
        return self.name


def export(
    view: StepView,
    out: Path,
    *,
    dtype: str,
    max_shard_bytes: int = hf_format.SHARD_BYTES,
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Write all parameters and buffers of a step to ``out``: fp32, bf16 and fp16 ones cast to ``dtype``.

    Others keep their dtype. A parameter with several names is written under the first. Raises as
    ``hf_export.export`` does, and MismatchError if the step has no weights.
    """
    prefix = paths.MODEL_PREFIX
    tensors = [
        OwnTensor(name.removeprefix(prefix), entry.shape)
        for name, entry in view.tensors().items()
        if name.startswith(prefix)
    ]
    if not tensors:
        raise MismatchError(f"{view.path} cannot be exported: it has no tensors under {prefix.rstrip('.')}")
    return hf_export.export(
        view,
        out,
        tensors,
        dtype=dtype,
        small_files={},
        keep_other_dtypes=True,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )
