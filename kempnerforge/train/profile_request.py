"""``profile.request`` in the run's folder: record a profiler trace of some steps while the run goes on.

The file has the number of steps, 3 if it is empty, and then the ranks, rank 0 if there are none:
``5``, ``5 0,3`` or ``5 all``. Rank 0 sees it, and all ranks agree on it after a step, so that all
listed ranks record the same steps. Whatever fails is a warning.
"""

from __future__ import annotations

import logging
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from kempnerforge import fsio
from kempnerforge.checkpoint.run.request_files import RequestFile, RequestFiles
from kempnerforge.distributed.consensus import ControlGroup

log = logging.getLogger(__name__)

NAME = "profile.request"
FOLDER = "profiles"
DEFAULT_STEPS = 3
MAX_STEPS = 100
"""A trace of more steps takes more memory than a viewer can show."""

_TEXT = re.compile(r"(?P<steps>\d+)?(?:\s+(?P<ranks>all|\d+(?:\s*,\s*\d+)*))?")


@dataclass(frozen=True)
class ProfileRequest:
    """What to profile."""

    steps: int
    ranks: tuple[int, ...]


def parse(text: str, num_ranks: int) -> ProfileRequest:
    """Parse the content of the request file. Raises ValueError."""
    match = _TEXT.fullmatch(text.strip())
    if match is None:
        raise ValueError('write a number of steps and optionally ranks, such as "3", "3 0,1" or "3 all"')
    steps = int(match["steps"] or DEFAULT_STEPS)
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"{steps} steps: allowed are 1 to {MAX_STEPS}")
    if match["ranks"] == "all":
        return ProfileRequest(steps, tuple(range(num_ranks)))
    ranks = tuple(sorted({int(rank) for rank in (match["ranks"] or "0").split(",")}))
    if ranks[-1] >= num_ranks:
        raise ValueError(f"there is no rank {ranks[-1]}: the last one is {num_ranks - 1}")
    return ProfileRequest(steps, ranks)


class Profiler:
    """Records traces of this rank when all ranks have agreed on a request.

    Args:
        requests: polls for the file, on rank 0; None on other ranks.
        spent: called with the seconds that starting and writing took.
    """

    def __init__(
        self,
        run_dir: Path,
        control: ControlGroup,
        requests: RequestFiles | None,
        *,
        spent: Callable[[float], None],
    ) -> None:
        self._folder, self._control = run_dir / FOLDER, control
        self._spent = spent
        self._file: RequestFile | None = requests.watch(NAME, look_now=True) if requests is not None else None
        self._request: ProfileRequest | None = None
        """The request that is being recorded. The same on all ranks."""
        self._first_step = self._last_step = 0
        self._profile: profile | None = None
        """The profiler, on a listed rank."""
        self._error = ""

    def vote(self) -> int:
        """Return 1 if a request waits. Never blocks."""
        return int(self._request is None and self._file is not None and self._file.is_there)

    def step_ended(self, step: int, *, requested: bool) -> None:
        """End the trace whose last step was ``step``; begin one if ``requested``, with the next step.

        Collective: all ranks, with the same ``requested``, the maximum of their votes.
        """
        if self._request is not None and step >= self._last_step:
            self.finish(step)
        if requested:
            self._begin(step)

    def finish(self, step: int) -> None:
        """Write the trace that is being recorded, if there is one. Collective: all ranks."""
        request, self._request = self._request, None
        if request is None:
            return
        began = time.perf_counter()
        if self._profile is not None:
            self._write()
        errors = self._control.gather(self._error)
        self._spent(time.perf_counter() - began)
        names = f"{self._name('*')} (ranks {', '.join(map(str, request.ranks))})"
        failed = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if error]
        if failed:
            log.warning(f"profile of steps {self._first_step} to {step} failed: {'; '.join(failed)}")
        if len(failed) < len(request.ranks):
            log.info(f"profile of steps {self._first_step} to {step}: {self._folder / names}")

    def _begin(self, step: int) -> None:
        text = self._control.run_on_rank0(lambda: self._file.take() if self._file else "", brief=True)
        try:
            request = parse(text, self._control.num_ranks)
        except ValueError as error:
            log.warning(f'{self._folder.parent / NAME}: "{text}" is not a request: {error}')
            return
        self._request, self._error = request, ""
        self._first_step, self._last_step = step + 1, step + request.steps
        if self._control.rank in request.ranks:
            self._start()

    def _start(self) -> None:
        began = time.perf_counter()
        try:
            on_cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *on_cuda])
            self._profile.start()
        except Exception as error:  # noqa: BLE001 - whatever the profiler raises, training continues
            self._profile, self._error = None, f"{type(error).__name__}: {error}"
        self._spent(time.perf_counter() - began)

    def _write(self) -> None:
        recorded, self._profile = self._profile, None
        assert recorded is not None
        try:
            recorded.stop()
            fsio.make_folder(self._folder)
            with tempfile.NamedTemporaryFile(suffix=".json.gz") as file:
                recorded.export_chrome_trace(file.name)
                fsio.atomic_write(self._folder / self._name(str(self._control.rank)), file.read())
        except Exception as error:  # noqa: BLE001 - whatever the profiler raises, training continues
            self._error = f"{type(error).__name__}: {error}"

    def _name(self, rank: str) -> str:
        return f"step_{self._first_step:08d}_rank_{rank}.json.gz"
