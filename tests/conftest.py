"""Select the tests to run, and set up the environment of every test.

``python -m pytest`` runs ``tests/unit`` and the tests marked ``smoke``. A path or an expression
(``-k``, ``-m``) selects among all tests. ``--everything`` runs all tests, and ``--rest`` those that
the default run omits. Tests marked ``slow`` run only with ``-m slow``.

Every test uses one OpenMP thread, private caches and no network for wandb. A test that leaves a
process running fails.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

# Show values in the failed assertions of these modules too.
pytest.register_assert_rewrite("support")

# Set here, before any test module imports torch, because OpenMP reads its variable only once.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
for _name in ("WANDB_API_KEY", "WANDB_BASE_URL", "KEMPNERFORGE_LOG"):
    os.environ.pop(_name, None)
# Under nohup, SIGHUP is ignored, and in the background of a script SIGINT is. Training respects that.
# Tests that send them would wait in vain.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Every process that a test starts inherits this variable, so that orphans are found too. Each xdist
# worker has its own value.
_OWNER_VARIABLE = "KEMPNERFORGE_TEST_OWNER"
os.environ[_OWNER_VARIABLE] = uuid.uuid4().hex

_UNIT = Path(__file__).with_name("unit")

_GRACE_S = 10.0
# These processes are shared by all tests of one process, and Python itself ends them.
_SHARED = (b"multiprocessing.resource_tracker", b"multiprocessing.forkserver")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--everything", action="store_true", help="run all tests but the slow ones")
    parser.addoption(
        "--rest", action="store_true", help="run what the default run leaves out, but the slow ones"
    )


def _is_default_run(config: pytest.Config) -> bool:
    """Return whether nothing was selected: no path, no expression, neither option."""
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    option = config.option
    return not (named or option.everything or option.rest or option.keyword or option.markexpr != "not slow")


def pytest_report_header(config: pytest.Config) -> str | None:
    """Return a line that says which tests are omitted."""
    if _is_default_run(config):
        return "tests: tests/unit and the smoke tests; --everything runs all but the slow ones"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests outside the default run, or with ``--rest`` those in it. Run fast tests first."""
    items.sort(key=lambda item: not item.path.is_relative_to(_UNIT))
    default = _is_default_run(config)
    if not (default or config.option.rest):
        return
    chosen = [item for item in items if _is_in_default_run(item) is default]
    config.hook.pytest_deselected(items=list(set(items) - set(chosen)))
    items[:] = chosen


def _is_in_default_run(item: pytest.Item) -> bool:
    return item.path.is_relative_to(_UNIT) or item.get_closest_marker("smoke") is not None


@pytest.fixture(scope="session", autouse=True)
def private_caches() -> Iterator[None]:
    """Set ``XDG_CACHE_HOME`` to a folder of these tests, so that they do not change the user's caches."""
    with (
        tempfile.TemporaryDirectory(prefix="kempnerforge-tests-") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("XDG_CACHE_HOME", folder)
        yield


@pytest.fixture(autouse=True)
def no_process_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """End the processes that a test leaves running, and fail the test."""
    if request.path.is_relative_to(_UNIT):  # unit tests start no processes, which their conftest checks
        yield
        return
    before = _own_processes()
    yield
    deadline = time.monotonic() + _GRACE_S
    while (left := _own_processes() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    if left:
        names = [
            f"{pid}: {_command_line(pid).replace(bytes(1), b' ').decode(errors='replace')}" for pid in left
        ]
        for pid in left:
            _kill(pid)
        pytest.fail("processes left behind by this test:\n" + "\n".join(names))


def _own_processes() -> set[int]:
    """Return living processes that descend from this one, or that have its mark in their environment."""
    if not Path("/proc/self/stat").exists():
        return set()
    own_pid = os.getpid()
    parents = {pid: parent for pid in _all_pids() if (parent := _living_parent(pid)) is not None}
    mark = f"{_OWNER_VARIABLE}={os.environ[_OWNER_VARIABLE]}".encode()
    found = set()
    for pid in parents:
        ancestor: int | None = parents[pid]
        while ancestor not in (None, 0, own_pid):
            ancestor = parents.get(ancestor)
        if pid != own_pid and (ancestor == own_pid or mark in _read(pid, "environ").split(b"\0")):
            found.add(pid)
    return {pid for pid in found if not any(name in _command_line(pid) for name in _SHARED)}


def _all_pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _living_parent(pid: int) -> int | None:
    """Return the parent of a process, or None for one that is gone or a zombie."""
    # The name, in parentheses, may itself contain spaces and parentheses.
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return int(fields[1]) if fields and fields[0] not in (b"Z", b"X") else None


def _command_line(pid: int) -> bytes:
    return _read(pid, "cmdline")


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # the process has ended, or it belongs to another user
        return b""


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
