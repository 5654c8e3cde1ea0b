"""What every attempt of a job notes in the run's folder: environment, git revision, configuration."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

_SECRET = re.compile(r"key|token|secret|passw|credential|auth|cookie", re.IGNORECASE)
HIDDEN = "(hidden)"


def attempt_note(environ: Mapping[str, str], *, command: list[str], config_toml: str, revision: str) -> str:
    """The text of the note. Values of variables that sound like secrets are hidden."""
    variables = "\n".join(
        f"{name}={HIDDEN if _SECRET.search(name) else value!r}" for name, value in sorted(environ.items())
    )
    when = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return (
        f"# {when}\n# {' '.join(command)}\n\n== git ==\n{revision}\n"
        f"== config ==\n{config_toml}\n== environment ==\n{variables}\n"
    )


def git_revision(folder: Path) -> str:
    """Commit and changed files of the checkout in ``folder``, or why they are not known."""
    lines = []
    for command in (["rev-parse", "HEAD"], ["status", "--short", "--untracked-files=no"]):
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=30, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"not known: {error}\n"
        if done.returncode:
            return f"not known: {done.stderr.strip()}\n"
        lines.append(done.stdout)
    return "".join(lines)
