"""Check the files and folders that a job names, before anything is started or created.

Folders that a run creates itself (its folder, the checkpoints, the cache of prepared text) need not
exist, but it must be possible to create them. This module does not import torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.format.step_info import StepView
from kempnerforge.checkpoint.load import load_path
from kempnerforge.checkpoint.run import metadata
from kempnerforge.config.checkpoint import LoadablePart
from kempnerforge.config.model_changes import model_changes
from kempnerforge.config.path_text import expand, unset_variables
from kempnerforge.config.run import PLACEHOLDER, unfilled_placeholders
from kempnerforge.config.schema import DataConfig, JobConfig, LoadedJob
from kempnerforge.data.mixture import SAME_TOKENIZER, tokenizer_conflict
from kempnerforge.data.reading.files import PYTHON_STDLIB, files_of, is_broken_link
from kempnerforge.data.record_encoder import make_format
from kempnerforge.data.tokenizer import load_tokenizer
from kempnerforge.data.tokens import RowOptions, load_shards
from kempnerforge.errors import (
    ConfigError,
    ConfigIssue,
    DamagedCheckpointError,
    DataError,
    MismatchError,
    RunFolderError,
    StepNotFoundError,
)

WRITABLE = "name a folder that can be created and written"


def check_files(job: JobConfig) -> None:
    """Check all files that ``job`` names, when it starts. Raises ConfigError with every fault.

    A file that cannot be read is not reported here, since it is not a fault of the config: the code
    that needs the file retries and reports it. Raises DamagedCheckpointError for a damaged
    ``load_path``.
    """
    if faults := file_faults(job, at_start=True):
        raise ConfigError(faults)


def check_files_of(loaded: LoadedJob, *, where: str) -> None:
    """Check files as ``check_files`` does, for the command line. Each fault names the source of its value."""
    faults = [replace(fault, source=loaded.sources.get(fault.key, "")) for fault in file_faults(loaded.job)]
    if faults:
        raise ConfigError(faults, where=f"{where}, with the files that it names (--no-files skips them)")


def file_faults(job: JobConfig, *, at_start: bool = False) -> list[ConfigIssue]:
    """Return the faults of the files that ``job`` names.

    With ``at_start``, unreadable files are ignored and a damaged checkpoint raises, as in
    ``check_files``. Otherwise both are faults.
    """
    faults = _variables(job)
    if faults:
        return faults
    for key, check in _CHECKS.items():
        try:
            faults += check(job)
        except OSError as error:
            faults += [] if at_start else [ConfigIssue(key, f"cannot be read: {error}")]
        except DamagedCheckpointError as error:
            if at_start:
                raise DamagedCheckpointError(f"{key}: {error}; choose another step of that run") from None
            faults.append(ConfigIssue(key, str(error)))
    return faults


def _variables(job: JobConfig) -> list[ConfigIssue]:
    """Check that the environment variables in paths are set. Without them nothing else can be checked."""
    found = {
        "run.dir": job.run.dir,
        "checkpoint.dir": job.checkpoint.dir,
        "checkpoint.load_path": job.checkpoint.load_path,
        **{f"{key}.dataset_path": data.dataset_path for key, data in job.data.parts().items()},
        "data.tokenizer": job.data.tokenizer,
        "data.cache_dir": job.data.cache_dir,
    }
    return [fault for key, text in found.items() if text for fault in unset_variables(text, key=key)]


def _folders(job: JobConfig) -> list[ConfigIssue]:
    """Check that the folders of the run can be created, or exist and can be written."""
    folders = {"run.dir": job.run.dir or f"runs/{job.run.name}", "checkpoint.dir": job.checkpoint.dir}
    parts = job.data.parts().values()
    if any(data.text is not None for data in parts) or job.data.packing != "contiguous":
        folders["data.cache_dir"] = str(job.data.cache_folder)
    faults = []
    for key, folder in folders.items():
        if folder and (problem := _why_not_writable(expand(folder, key=key))):
            faults.append(ConfigIssue(key, f'"{folder}": {problem}', WRITABLE))
    return faults


def _why_not_writable(folder: Path) -> str:
    """Return why ``folder`` cannot be created or written, without trying. Empty if it probably can."""
    path = Path(os.path.abspath(folder))
    while PLACEHOLDER.search(str(path)) or not os.path.lexists(path):
        path = path.parent
    if not path.exists():
        return f"{path} is a broken symbolic link"
    if not path.is_dir():
        return f"{path} is a file" if path.is_file() else f"{path} is not a folder"
    if not os.access(path, os.W_OK | os.X_OK):
        return f"{path} cannot be written"
    return ""


def _text(job: JobConfig) -> list[ConfigIssue]:
    return [fault for key, data in job.data.parts().items() for fault in _text_of(f"{key}.text", data)]


def _text_of(key: str, data: DataConfig) -> list[ConfigIssue]:
    text = data.text
    if text is None:
        return []
    faults = []
    for entry in [text] if isinstance(text, str) else text:
        try:
            # Broken links in folders are passed over, as when the text is read.
            files = [path for path in files_of(entry) if not is_broken_link(path)]
        except DataError as error:
            faults.append(ConfigIssue(key, str(error)))
            continue
        if entry == PYTHON_STDLIB:
            continue
        if unreadable := next((path for path in files if not os.access(path, os.R_OK)), None):
            faults.append(ConfigIssue(key, f'"{entry}": {unreadable} cannot be read', "name other files"))
        elif not any(path.stat().st_size for path in files):
            problem = "the file is empty" if len(files) == 1 else f"all {len(files)} files are empty"
            problem = problem if files else "it has only broken symbolic links"
            faults.append(ConfigIssue(key, f'"{entry}": {problem}', "name files with text"))
    return faults


def _tokenizer(job: JobConfig) -> list[ConfigIssue]:
    if all(data.text is None for data in job.data.parts().values()):
        return []
    try:
        tokenizer = load_tokenizer(job.data.tokenizer, eos=job.data.eos_token, bos=job.data.bos_token)
        size = tokenizer.vocab_size
        if job.data.format != "text":
            make_format(job.data, tokenizer)
    except DataError as error:
        return [ConfigIssue("data.tokenizer", str(error))]
    ids = job.model.vocabulary
    if ids is None or size <= ids:
        return []
    problem = f'{ids} is smaller than the vocabulary of data.tokenizer "{job.data.tokenizer}"'
    key = "model.vocab_size" if job.model.is_llama else "model.args.vocab_size"
    return [ConfigIssue(key, problem, f"allowed: at least {size}")]


def _dataset(job: JobConfig) -> list[ConfigIssue]:
    """Check the index or the headers, and the sizes of all shards. The tokens are not read."""
    parts = {f"{key}.dataset_path": data for key, data in job.data.parts().items()}
    return [fault for key, data in parts.items() for fault in _dataset_of(key, data, job)]


def _dataset_of(key: str, config: DataConfig, job: JobConfig) -> list[ConfigIssue]:
    if config.dataset_path is None:
        return []
    try:
        data = load_shards(
            config.dataset_path,
            vocab_size=job.model.vocabulary,
            val_fraction=config.val_fraction,
            rows=RowOptions.of(config),
        )
        for problem in list(data.problems(contents=False).values())[:1]:
            return [ConfigIssue(key, problem, f"see: kempnerforge data inspect {data.path}")]
        data.check_split("train", job.train.seq_len)
        if job.eval.interval:
            data.check_split("val", job.train.seq_len)
    except DataError as error:
        return [ConfigIssue(key, str(error))]
    return []


def _mixture(job: JobConfig) -> list[ConfigIssue]:
    """Check that the prepared sources have the same tokenizer."""
    found = {}
    for name, data in job.data.by_source().items():
        with contextlib.suppress(DataError):  # reported for the source
            if data.dataset_path is not None:
                found[name] = load_shards(data.dataset_path)
    conflict = tokenizer_conflict(found)
    return [ConfigIssue("data.sources", conflict, SAME_TOKENIZER)] if conflict else []


def _warm_start(job: JobConfig) -> list[ConfigIssue]:
    """Check ``load_path``, which is used only while the run has no committed step."""
    given = job.checkpoint.load_path
    if given is None or has_committed_step(job):
        return []
    try:
        return _step_issues(job, load_path.candidates(expand(given, key="checkpoint.load_path"))[0])
    except (StepNotFoundError, MismatchError) as error:
        return [ConfigIssue("checkpoint.load_path", str(error))]


def _step_issues(job: JobConfig, step_folder: Path) -> list[ConfigIssue]:
    """Return why the step cannot be loaded into the model of ``job``."""
    step = StepView.open(step_folder)
    excluded = job.checkpoint.exclude_from_loading
    parts = [part for part in LoadablePart.__args__ if part not in excluded]
    names, objects = list(step.tensors()), step.train_state()
    absent = load_path.missing_parts(
        parts, objects, lambda prefix: any(name.startswith(prefix) for name in names)
    )
    if absent:
        return [ConfigIssue("checkpoint.load_path", str(load_path.only_weights(step_folder, absent)))]
    stored = step.config().get("model")
    if stored is None or "model" in excluded:
        return []
    changes = model_changes(stored, job.model.model_dump(mode="json"))
    if changes.same_shapes:
        return []
    problem = f"{step_folder} has another model: {'; '.join(changes.lines)}"
    return [ConfigIssue("checkpoint.load_path", problem, f"set [model] as in {step_folder / paths.CONFIG}")]


def has_committed_step(job: JobConfig) -> bool:
    """Return whether the run of ``job`` has a step to resume from. False while ``run.dir`` is not known."""
    if job.run.dir is not None and unfilled_placeholders(job.run.dir, os.environ):
        return False
    folder = job.run.folder
    try:
        record = metadata.read(folder)
    except (RunFolderError, OSError):
        return False  # the start of the run reports it
    if record is None:
        return False
    moved_to = job.checkpoint.dir
    checkpoints = expand(moved_to, key="checkpoint.dir") if moved_to else record.checkpoint_folder(folder)
    return bool(paths.committed_steps(checkpoints))


_CHECKS: dict[str, Callable[[JobConfig], list[ConfigIssue]]] = {
    "run.dir": _folders,
    "data.text": _text,
    "data.tokenizer": _tokenizer,
    "data.dataset_path": _dataset,
    "data.sources": _mixture,
    "checkpoint.load_path": _warm_start,
}
"""The main key of each check -> the check."""
