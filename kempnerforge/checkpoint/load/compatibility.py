"""Whether a step can fill the state of this run. No rank reads more of the index than it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.format.dtypes import DTYPE_NAMES
from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader
from kempnerforge.checkpoint.load.load_path import missing_parts, only_weights
from kempnerforge.errors import MismatchError


def check_parts(parts: Sequence[str], reader: SafetensorsReader) -> None:
    """Raise MismatchError when the step has nothing of a part that is asked for: it holds weights only.

    Generators may be missing: they are derived then, as under another layout.
    """
    if absent := missing_parts(parts, reader.raw_objects, reader.index.has_prefix):
        raise only_weights(reader.path, absent)


def check_fits(
    wanted: Mapping[str, torch.Tensor], reader: SafetensorsReader, known_problems: Sequence[str] = ()
) -> None:
    """Raise MismatchError unless the step has these tensors, of these shapes and dtypes."""
    problems = list(known_problems)
    for name, tensor in wanted.items():
        here = (DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
        try:
            dtype, shape = reader.index.head(name)
        except KeyError:
            problems.append(f"{name} is not in the checkpoint")
            continue
        if shape != here[1]:
            problems.append(f"{name} has shape {shape} in the checkpoint, {here[1]} here")
        elif dtype != here[0]:
            problems.append(f"{name} is {dtype} in the checkpoint, {here[0]} here")
    _raise_misfits(problems, reader)


def _raise_misfits(problems: Sequence[str], reader: SafetensorsReader) -> None:
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:8])
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise MismatchError(
            f"{reader.path} cannot fit this config ({len(problems)} tensors differ):{shown}{more}\n"
            f"The config that it was saved with: {reader.path / paths.CONFIG}"
        )
