"""The record of each attempt of a job in the run's folder: environment, git revision, configuration."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

_SHOWN = re.compile(
    r"(SLURM|SBATCH|CUDA|NVIDIA|ROCR|HIP|NCCL|GLOO|TORCH|PYTORCH|OMP|MKL|KMP|OPENBLAS|UCX|FI|CONDA|LC)_\w+"
    r"|KEMPNERFORGE_\w+|WANDB_(MODE|PROJECT|ENTITY|DIR)|PATH|LD_LIBRARY_PATH|PYTHONPATH|PYTHONHASHSEED"
    r"|VIRTUAL_ENV|HOME|USER|LOGNAME|HOSTNAME|SHELL|PWD|TMPDIR|LANG|TZ|XDG_CACHE_HOME|HF_HOME"
)
"""Variables whose values are recorded. A list of secret names to exclude would never be complete."""
_SECRET = re.compile(r"key|token|secret|passw|credential|auth|cookie|jwt", re.IGNORECASE)
HIDDEN = "(not recorded)"


def describe_attempt(
    environ: Mapping[str, str], *, command: list[str], config_toml: str, revision: str
) -> str:
    """Return the text of the record. Variables that are not known to be harmless appear without values."""

    def shown(name: str, value: str) -> str:
        return repr(value) if _SHOWN.fullmatch(name) and not _SECRET.search(name) else HIDDEN

    variables = "\n".join(f"{name}={shown(name, value)}" for name, value in sorted(environ.items()))
    when = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return (
        f"# {when}\n# {' '.join(command)}\n\n== git ==\n{revision}\n"
        f"== config ==\n{config_toml}\n== environment ==\n{variables}\n"
    )


def git_revision(folder: Path) -> str:
    """Return commit and changed files of the checkout in ``folder``, or why they are unknown."""
    lines = []
    for command in (["rev-parse", "HEAD"], ["status", "--short", "--untracked-files=no"]):
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=30, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"unknown: {error}\n"
        if done.returncode:
            return f"unknown: {done.stderr.strip()}\n"
        lines.append(done.stdout)
    return "".join(lines)
