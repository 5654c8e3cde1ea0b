"""Start processes of KempnerForge's own, which import what this process has imported.

With ``python -m``, the working directory is the first folder of ``sys.path``, and it is the first one of a
rank that uses a plug-in. A ``random.py`` or ``socket.py`` of the user's there would stand for Python's own
in a new process, although this one has imported Python's long before.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

PROGRAM = """
import importlib, sys
module, count = sys.argv[1], int(sys.argv[2])
sys.path[:] = sys.argv[3 + count:]
sys.argv[1:] = sys.argv[3:3 + count]
importlib.import_module(module).main()
"""
"""What a process runs, with a module, the number of its arguments, these arguments, and a search path."""


def python_options() -> list[str]:
    """Return the options with which ``python -m`` finds KempnerForge, and no module of the user's."""
    return [] if _is_working_directory(str(Path(__file__).parents[1])) else ["-P"]


def search_path() -> list[str]:
    """Return ``sys.path``, with the working directory last unless it is KempnerForge's own folder."""
    if not python_options():
        return list(sys.path)
    return sorted(sys.path, key=_is_working_directory)


def _is_working_directory(folder: str) -> bool:
    try:
        return os.path.realpath(folder) == os.path.realpath("")
    except OSError:  # it was deleted
        return False


def command(module: str, *arguments: int) -> list[str]:
    """Return the command of a process that calls ``main()`` of ``module``, with these in ``sys.argv``."""
    words = [module, str(len(arguments)), *map(str, arguments), *search_path()]
    return [sys.executable, "-P", "-c", PROGRAM, *words]


def start_with_socket(
    module: str, *, environ: Mapping[str, str] | None = None, new_session: bool = False
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start ``main()`` of ``module`` with a socket's descriptor and this process's id; return our end too.

    Raises OSError.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = subprocess.Popen(
                command(module, theirs.fileno(), os.getpid()),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environ,
                start_new_session=new_session,
            )
        except OSError:
            ours.close()
            raise
    return process, ours
