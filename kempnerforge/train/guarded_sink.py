"""Call a sink that a config names, so that its exceptions cost no step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch

from kempnerforge.checkpoint.state import rng_state
from kempnerforge.config.plugin_uses import PluginUse, sink_uses
from kempnerforge.config.schema import JobConfig
from kempnerforge.telemetry.sinks import Row, RunInfo

log = logging.getLogger(__name__)


class GuardedSink:
    """Constructs and calls a sink until it raises an exception, which is a warning.

    Random numbers that the sink draws do not change those of the training. ``device`` is that of
    the training.
    """

    def __init__(self, use: PluginUse, device: torch.device) -> None:
        self._use, self._device = use, device
        self._sink: Any = None
        self._is_open = True
        target = use.resolve().target
        self._guarded("the constructor", lambda: setattr(self, "_sink", target(**use.args)))

    def start(self, info: RunInfo) -> None:
        """Tell the sink which attempt begins."""
        self._guarded("start", lambda: self._sink.start(info))

    def write(self, row: Row) -> None:
        """Write ``row``."""
        self._guarded("write", lambda: self._sink.write(MappingProxyType(row)))

    def close(self) -> None:
        """Close the sink."""
        self._guarded("close", lambda: self._sink.close())

    def _guarded(self, method: str, call: Callable[[], None]) -> None:
        if not self._is_open:
            return
        try:
            with rng_state.forked(f"sink:{self._use.key}", self._device):
                call()
        except Exception as error:  # noqa: BLE001 - the code of the user may raise anything
            self._is_open = False
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            log.warning(f"sink {self._use.name}: {method} raised {what}. It gets no further rows")


def plugin_sinks(job: JobConfig, device: torch.device) -> list[GuardedSink]:
    """Return the sinks of ``[[metrics.sinks]]``. Raises ConfigError for a name that cannot be resolved."""
    return [GuardedSink(use, device) for use in sink_uses(job)]
