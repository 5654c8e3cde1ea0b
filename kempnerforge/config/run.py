"""``[run]``: what a run is called and where its files are."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from kempnerforge.config.section import AtLeastZero, NonEmpty, Section
from kempnerforge.errors import ConfigError, ConfigIssue

PLACEHOLDERS = {"job_id": "SLURM_JOB_ID", "array_task_id": "SLURM_ARRAY_TASK_ID"}
"""Placeholder in ``run.dir`` -> the environment variable that fills it."""

PLACEHOLDER = re.compile(r"\{([^{}]*)\}")

RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]


class RunConfig(Section):
    """What the run is called and where its files are."""

    name: RunName = "run"
    """Name of the run: of its folder, and in wandb. Letters, digits, '.', '_' and '-' only."""

    dir: NonEmpty | None = None
    """The run's folder, shared by all nodes; none means runs/<name>. A relative path starts at the
    current folder. {job_id} and {array_task_id} are replaced by the SLURM job's."""

    max_faults_without_progress: AtLeastZero = 3
    """Attempts that may end in a fault of their own without a new committed step; the start after that
    ends with status 76 (kempnerforge unblock RUN lets it go on). 0 means that it never does."""

    @property
    def folder(self) -> Path:
        """The run's folder, placeholders and ``~`` expanded. Does not create it.

        Raises:
            ConfigError: a placeholder has no value outside a SLURM job.
        """
        if self.dir is None:
            return Path("runs") / self.name
        if faults := unfilled_placeholders(self.dir, os.environ):
            raise ConfigError(faults)
        filled = PLACEHOLDER.sub(lambda found: os.environ[PLACEHOLDERS[found[1]]], self.dir)
        return Path(filled).expanduser()


def unfilled_placeholders(text: str, environ: Mapping[str, str]) -> list[ConfigIssue]:
    """Faults for the known placeholders in ``text`` whose variable ``environ`` does not set."""
    return [
        ConfigIssue(
            "run.dir",
            f"{{{name}}} is asked for, but {PLACEHOLDERS[name]} is not set",
            "start it in a SLURM job, or write the folder out",
        )
        for name in PLACEHOLDER.findall(text)
        if name in PLACEHOLDERS and not environ.get(PLACEHOLDERS[name])
    ]
