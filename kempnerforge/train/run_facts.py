"""What the ledger records of an attempt's start, besides where it runs: config, device and code."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import torch

from kempnerforge import __version__
from kempnerforge.config.schema import JobConfig

_GIT_TIMEOUT_S = 5.0
_GIT = (
    # No locks: it changes nothing. No monitor: it starts no program that the repository names.
    *("git", "--no-optional-locks", "-c", "core.fsmonitor=false"),
    *("status", "--porcelain=v2", "--branch", "--untracked-files=no", "--ignore-submodules"),
)


def run_facts(job: JobConfig, device: torch.device) -> dict[str, Any]:
    """Return config, device, version, and the commit of the code in the current folder."""
    return {
        "config": job.flat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "version": __version__,
        "git": git_state(Path.cwd()),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit of the repository around ``folder``, and whether its files differ from it.

    None without a repository or without git, or if git does not answer. Untracked files do not count.
    """
    try:
        done = subprocess.run(
            _GIT, cwd=folder, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=False
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    lines = done.stdout.splitlines()
    commit = next((line.rpartition(" ")[2] for line in lines if line.startswith("# branch.oid ")), "")
    if done.returncode != 0 or not commit.isalnum():  # "(initial)" in a repository without commits
        return None
    return {"commit": commit, "dirty": any(not line.startswith("#") for line in lines)}
