"""A sweep: one run for each combination of the values of some keys, as the tasks of one job array."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tomli

from kempnerforge import fsio
from kempnerforge.config.toml_text import value_text
from kempnerforge.errors import ConfigError, ConfigIssue, RunFolderError

SWEEP_FILE = "sweep.json"
MAX_CELLS = 1000


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    task: int
    """The number of its array task."""
    overrides: list[str]
    """The overrides in which it differs from the other runs."""
    run_dir: str
    run_name: str

    @property
    def arguments(self) -> list[str]:
        """All overrides of its run."""
        return [*self.overrides, f"--run.name={self.run_name}", f"--run.dir={self.run_dir}"]

    @property
    def description(self) -> str:
        """The values that it has."""
        return ", ".join(override.removeprefix("--") for override in self.overrides)


@dataclass(frozen=True)
class Sweep:
    """All cells, in the order of their tasks, and the command that they share."""

    file: str
    overrides: list[str]
    cells: list[Cell]

    def encode(self) -> bytes:
        """Return the content of ``sweep.json``."""
        return json.dumps(asdict(self), indent=1).encode() + b"\n"


def make_sweep(
    options: Sequence[str], *, file: str, overrides: Sequence[str], folder: str, run_name: str
) -> Sweep:
    """Return the sweep of options such as ``optimizer.lr=[1e-4,3e-4]``. Raises ConfigError."""
    faults = _key_faults(options)
    axes = [_axis(option, faults) for option in options]
    combinations = list(itertools.product(*axes))
    if len(combinations) > MAX_CELLS:
        faults.append(ConfigIssue("--sweep", f"{len(combinations)} runs", f"at most {MAX_CELLS}"))
    if faults:
        raise ConfigError(faults, where="command line")
    cells = [
        Cell(task, list(cell), str(Path(folder) / str(task)), f"{run_name}-{task}")
        for task, cell in enumerate(combinations)
    ]
    return Sweep(file, list(overrides), cells)


def _key_faults(options: Sequence[str]) -> list[ConfigIssue]:
    keys = [option.removeprefix("--").partition("=")[0] for option in options]
    twice = {key for key in keys if keys.count(key) > 1}
    faults = [ConfigIssue("--sweep", f"{key} is given twice", "list all values once") for key in twice]
    for key in {"run.name", "run.dir"} & set(keys):
        faults.append(ConfigIssue("--sweep", f"{key} cannot be swept", "each run has its own already"))
    return faults


def _axis(option: str, faults: list[ConfigIssue]) -> list[str]:
    """Return one override for each value."""
    key, _, text = option.removeprefix("--").partition("=")
    try:
        values = tomli.loads(f"value = {text}")["value"]
    except (ValueError, KeyError):
        values = None
    if not isinstance(values, list) or not values:
        allowed = "write --sweep 'section.key=[first,second]', with quotes around texts"
        faults.append(ConfigIssue("--sweep", f"{option} has no list of values", allowed))
        return []
    return [f"--{key}={value_text(value)}" for value in values]


def write_sweep(folder: Path, sweep: Sweep) -> None:
    """Write ``sweep.json``. Raises RunFolderError, also if the folder has a run or another sweep."""
    path = folder / SWEEP_FILE
    try:
        fsio.make_folder(folder)
        if (folder / "run.json").exists():
            raise RunFolderError(f"{folder} is the folder of a run; give the sweep a name (--run.name=NEW)")
        if path.exists() and read_sweep(folder) != sweep:
            raise RunFolderError(f"{folder} has another sweep; give this one a name (--run.name=NEW)")
        fsio.atomic_write(path, sweep.encode())
    except OSError as error:
        raise RunFolderError(f"{folder} cannot be used: {error}") from error


def read_sweep(folder: Path) -> Sweep:
    """Read ``sweep.json``. Raises RunFolderError."""
    path = folder / SWEEP_FILE
    try:
        body = json.loads(fsio.read_file(path))
        cells = [Cell(**cell) for cell in body.pop("cells")]
        return Sweep(**body, cells=cells)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}") from error
