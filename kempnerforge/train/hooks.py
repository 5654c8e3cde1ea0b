"""Hooks: code of the user's that runs at fixed points of the training loop.

An exception of a hook must not end one rank alone, because the others would wait for it. The rank
votes in the agreement after the step instead. Then all ranks commit a save that is due and raise
HookError together.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from kempnerforge.checkpoint.results import SaveReport
from kempnerforge.checkpoint.state import rng_state
from kempnerforge.config.hooks import method_issues
from kempnerforge.config.plugin_uses import PluginUse, hook_uses
from kempnerforge.config.schema import JobConfig
from kempnerforge.distributed.context import DistributedContext
from kempnerforge.errors import ConfigError, HookError
from kempnerforge.goodput.faults import is_peer_loss
from kempnerforge.log_setup import THIS_RANK
from kempnerforge.telemetry.sinks import RunInfo

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainInfo(RunInfo):
    """What ``on_train_start`` is told."""

    model: tuple[nn.Module, ...]
    """This rank's parts of the model. Changing weights, modes or gradients breaks bitwise resume."""


class Hook:
    """The base class of hooks that a config names in ``[[hooks]]``. Override any of its methods.

    Rank 0 calls them, or every rank if ``every_rank`` is True. Only then may a hook use collectives.
    The training loop waits for each call. Random numbers that a hook draws do not change those of
    the training.
    """

    every_rank: bool = False

    def on_train_start(self, info: TrainInfo) -> None:
        """Run once, when the state of step ``info.step`` is loaded."""

    def on_step_end(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Run after every step. ``metrics`` is its row of ``metrics.jsonl``, read-only."""

    def on_checkpoint_committed(self, step: int, path: Path, report: SaveReport) -> None:
        """Run when all ranks know that ``step`` is committed in ``path``, at the end of a step."""

    def on_eval_end(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Run after a complete validation of ``step``. ``metrics`` has ``eval/loss``."""

    def on_train_end(self, step: int, reason: str) -> None:
        """Run once, when the last save is committed. ``reason``: ``finished``, or what stopped the run.

        It is not called when an error ends the run.
        """


def load_hooks(job: JobConfig, world: DistributedContext) -> dict[int, Any]:
    """Construct the hooks of this rank. Return position in the config -> hook.

    A hook without ``every_rank`` is constructed on rank 0 only.

    Collective: all ranks. Raises ConfigError or HookError on all ranks.
    """
    uses = hook_uses(job)
    if not uses:
        return {}
    on_rank0: dict[int, Any] = {}

    def construct_all() -> list[int]:
        on_rank0.update({index: _construct(use, job, world) for index, use in enumerate(uses)})
        return [index for index, hook in on_rank0.items() if getattr(hook, "every_rank", False)]

    on_every_rank = world.control.run_on_rank0(construct_all)
    if world.rank == 0:
        world.control.raise_on_any_error(None)
        return on_rank0
    hooks: dict[int, Any] = {}
    error: Exception | None = None
    try:
        hooks = {index: _construct(uses[index], job, world) for index in on_every_rank}
    except Exception as raised:  # noqa: BLE001 - the code of the user may raise anything
        error = raised
    world.control.raise_on_any_error(error)
    return hooks


def _construct(use: PluginUse, job: JobConfig, world: DistributedContext) -> Any:
    with rng_state.forked(f"hooks:{job.train.seed}:{world.rank}", world.device):
        target = use.resolve().target
        try:
            hook = target(**use.args)
        except Exception as error:
            raise _failure(use, "the constructor", error, world.rank) from error
    if issues := method_issues(hook, use.key):
        raise ConfigError(issues)
    return hook


class HookSet:
    """Calls the hooks of this rank. Without hooks in the config, every method returns at once.

    Args:
        hooks: the result of ``load_hooks``.
        begin: called with the step before hooks are called.
        spent: called with the seconds that they took.
        record: called on the rank of a hook that raised, with the error that will end the run.
    """

    def __init__(
        self,
        job: JobConfig,
        world: DistributedContext,
        hooks: Mapping[int, Any],
        *,
        begin: Callable[[int], None],
        spent: Callable[[float], None],
        record: Callable[[Exception], None],
    ) -> None:
        self._seed, self._world = job.train.seed, world
        self._configs, self._uses = job.hooks, hook_uses(job)
        self._hooks = dict(hooks)
        self._begin, self._spent, self._record = begin, spent, record
        self._failure: HookError | None = None
        self._num_errors: Counter[tuple[int, str]] = Counter()
        self._seconds = 0.0

    def train_start(self, info: TrainInfo) -> None:
        """Call ``on_train_start`` of all hooks."""
        self._call("on_train_start", info.step, (info,))

    def step_end(self, step: int, row: Mapping[str, Any]) -> None:
        """Call ``on_step_end`` of all hooks."""
        self._call("on_step_end", step, (step, MappingProxyType(row)))

    def checkpoint_committed(self, path: Path, report: SaveReport) -> None:
        """Call ``on_checkpoint_committed`` of all hooks."""
        self._call("on_checkpoint_committed", report.step, (report.step, path, report))

    def eval_end(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Call ``on_eval_end`` of all hooks."""
        self._call("on_eval_end", step, (step, MappingProxyType(metrics)))

    def train_end(self, step: int, reason: str) -> None:
        """Call ``on_train_end`` of all hooks. Raise the HookError of any rank, also of earlier calls.

        Collective: all ranks. Raises HookError on all ranks.
        """
        if not self._uses:
            return
        self._call("on_train_end", step, (step, reason))
        for (index, method), times in self._num_errors.items():
            if times > 1:
                name = self._uses[index].name
                log.warning(f"hook {name}: {method} raised {times} exceptions in all", extra=THIS_RANK)
        if any(self._world.control.agree([self.vote()])):
            self.raise_failure()

    def vote(self) -> int:
        """Return 1 if a hook of this rank has failed, so that the run must end."""
        return int(self._failure is not None)

    def raise_failure(self) -> None:
        """Raise the failure of the lowest rank that has one. Collective: all ranks."""
        self._world.control.raise_on_any_error(self._failure)

    def take_seconds(self) -> float | None:
        """Return the time in hooks since the last call; None if the config has no hooks."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds if self._uses else None

    def _call(self, method: str, step: int, arguments: Sequence[Any]) -> None:
        calls = {index: call for index, hook in self._hooks.items() if (call := _method(hook, method))}
        if not calls:
            return
        self._begin(step)
        began = time.perf_counter()
        key = f"hooks:{self._seed}:{self._world.rank}:{step}:{method}"
        with rng_state.forked(key, self._world.device):
            for index, call in calls.items():
                try:
                    call(*arguments)
                except (Exception, SystemExit) as error:  # noqa: BLE001 - the code of the user
                    self._handle(index, method, error)
        seconds = time.perf_counter() - began
        self._seconds += seconds
        self._spent(seconds)

    def _handle(self, index: int, method: str, error: BaseException) -> None:
        failure = _failure(self._uses[index], method, error, self._world.rank)
        if self._configs[index].on_error == "warn":
            self._num_errors[index, method] += 1
            if self._num_errors[index, method] == 1:
                rest = f"Training continues; later exceptions of {method} are only counted"
                log.warning(f"{failure}. {rest}", extra=THIS_RANK)
            return
        del self._hooks[index]  # it is not called again
        self._failure = self._failure or failure
        failure.__cause__ = error  # the record has its traceback
        # A collective of a hook fails when another rank is lost. torch raises RuntimeErrors then.
        if isinstance(error, RuntimeError) and is_peer_loss(type(error).__name__, str(error)):
            self._record(error)
        else:
            self._record(failure)


def _method(hook: Any, name: str) -> Callable[..., None] | None:
    """Return a method of ``hook``; None if the hook does not have it or inherits it from ``Hook``."""
    method = getattr(hook, name, None)
    return None if getattr(method, "__func__", None) is getattr(Hook, name) else method


def _failure(use: PluginUse, method: str, error: BaseException, rank: int) -> HookError:
    # The first frame is the call in this module, the second one is in the hook.
    frame = traceback.extract_tb(error.__traceback__)[:2][-1]
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return HookError(
        f"hook {use.name}: {method} raised {what} (rank {rank}, {frame.filename}:{frame.lineno})"
    )
