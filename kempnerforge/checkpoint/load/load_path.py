"""Find the step that ``checkpoint.load_path`` names, and which parts it has. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from kempnerforge.checkpoint.format import hf_format, paths
from kempnerforge.checkpoint.run import metadata
from kempnerforge.errors import MismatchError, RunFolderError, StepNotFoundError

ALLOWED = "give a step's folder, such as RUN/checkpoints/step_00001000, or a run's folder"
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf")
STORED_AS = {
    "optimizer": ("optimizer", "optimizers"),
    "scheduler": ("step",),
    "data": ("data",),
    "rng": ("rng",),
}
"""Part of a state -> names, or first parts of tensor names, under which a step stores it."""


def candidates(path: Path) -> list[Path]:
    """Return the steps that ``path`` names: itself, or those of a run or a folder, newest first.

    Raises StepNotFoundError.
    """
    if (path / paths.MANIFEST).is_file():
        return [path]
    folders = [path, path / "checkpoints", *_moved_to(path)]
    steps = [
        folder / paths.step_name(step)
        for folder in dict.fromkeys(folders)
        for step in paths.committed_steps(folder)
    ]
    if steps:
        return steps
    raise StepNotFoundError(f"{path} {_what_it_is(path)}")


def missing_parts(
    parts: Sequence[str], objects: Collection[str], has_tensors: Callable[[str], bool]
) -> list[str]:
    """Return the parts that a step lacks, if one of ``parts`` is among them; otherwise an empty list.

    If only the random number generators are missing, the list is empty: they are then derived from
    (seed, step, rank). ``objects``: names of the entries that are not tensors. ``has_tensors``:
    returns whether there are tensors whose names begin with the given prefix.
    """
    absent = [
        part
        for part, names in STORED_AS.items()
        if not any(name in objects or has_tensors(f"{name}.") for name in names)
    ]
    return absent if any(part in absent and part != "rng" for part in parts) else []


def only_weights(path: Path, absent: Sequence[str]) -> MismatchError:
    """Return the error for a step that lacks the parts ``absent``."""
    given = json.dumps(list(absent), separators=(",", ":"))
    return MismatchError(
        f"{path} has no {', '.join(absent)}. To start a new run from what it has: "
        f"--checkpoint.load_path={path} --checkpoint.exclude_from_loading='{given}'"
    )


def _moved_to(path: Path) -> list[Path]:
    try:
        record = metadata.read(path)
    except (OSError, RunFolderError):
        return []
    return [record.checkpoint_folder(path)] if record is not None else []


def _what_it_is(path: Path) -> str:
    # The name of a model on the Hugging Face Hub is not a path, but is often given as one.
    hub = "" if path.is_absolute() or len(path.parts) != 2 else f"; {_import_hint('FOLDER')}"
    if not path.exists():
        return f"does not exist; {ALLOWED}{hub}"
    if not path.is_dir():
        is_weights = path.suffix in _OTHER_WEIGHTS
        return f"is a file; {_import_hint(path.parent) if is_weights else ALLOWED}"
    if (path / hf_format.CONFIG).is_file():
        return f"is a Hugging Face model. Import it, then use DIR: kempnerforge import hf {path} --out DIR"
    return f"holds no committed checkpoint; {ALLOWED}"


def _import_hint(folder: Path | str) -> str:
    return (
        "to start from a Hugging Face model, download it, import it, then use DIR: "
        f"kempnerforge import hf {folder} --out DIR"
    )
