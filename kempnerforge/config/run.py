"""``[run]``: the name of a run and where its files are."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from kempnerforge.config.path_text import expand
from kempnerforge.config.section import AtLeastZero, NonEmpty, Section
from kempnerforge.errors import ConfigError, ConfigIssue

PLACEHOLDERS = {"job_id": "SLURM_JOB_ID", "array_task_id": "SLURM_ARRAY_TASK_ID"}
"""Placeholder in ``run.dir`` -> the environment variable that fills it."""

PLACEHOLDER = re.compile(r"(?<!\$)\{([^{}]*)\}")

RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]


class RunConfig(Section):
    """The name of the run and where its files are."""

    name: RunName = "run"
    """Name of the run, used for its folder and in wandb. Letters, digits, '.', '_' and '-' only."""

    dir: NonEmpty | None = None
    """The run's folder, shared by all nodes. None means runs/<name>. A relative path is resolved against
    the current folder. {job_id} and {array_task_id} are replaced by the ids of the SLURM job."""

    max_faults_without_progress: AtLeastZero = 3
    """Number of attempts that may fail through the run's own fault without a new committed step. After
    that, every start exits with status 76 until `kempnerforge unblock RUN`. 0 disables this check."""

    @property
    def folder(self) -> Path:
        """The run's folder, with placeholders, ``~`` and ``$VAR`` expanded. Does not create it.

        Raises:
            ConfigError: a placeholder has no value outside a SLURM job, or a variable is not set.
        """
        if self.dir is None:
            return Path("runs") / self.name
        if faults := unfilled_placeholders(self.dir, os.environ):
            raise ConfigError(faults)
        filled = PLACEHOLDER.sub(lambda match: os.environ[PLACEHOLDERS[match[1]]], self.dir)
        return expand(filled, key="run.dir")


def unfilled_placeholders(text: str, environ: Mapping[str, str]) -> list[ConfigIssue]:
    """Report the known placeholders in ``text`` whose variable is not set in ``environ``."""
    return [
        ConfigIssue(
            "run.dir",
            f"{{{name}}} cannot be expanded: {PLACEHOLDERS[name]} is not set",
            "start the run in a SLURM job, or write the folder out",
        )
        for name in PLACEHOLDER.findall(text)
        if name in PLACEHOLDERS and not environ.get(PLACEHOLDERS[name])
    ]
