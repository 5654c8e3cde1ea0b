"""TensorBoard: event files in the run's folder, written with the record writer of its own package.

Each attempt writes one file. It begins with a session log that makes TensorBoard drop what earlier
attempts logged above the step that was resumed, so that curves do not run twice over these steps.
torch's ``SummaryWriter`` needs the same package, and imports more.
"""

from __future__ import annotations

import os
import socket
import time
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from kempnerforge import fsio
from kempnerforge.telemetry.sinks import Row, RunInfo, Sink
from kempnerforge.write_behind import WriteBehind

# Imported by name, because an optional package is not there for the type checker.
_events: Any = import_module("tensorboard.compat.proto.event_pb2")
_summaries: Any = import_module("tensorboard.compat.proto.summary_pb2")
_records: Any = import_module("tensorboard.summary.writer.record_writer")

_CLOSE_WAIT_S = 5.0


class TensorBoardSink(Sink):
    """Writes every number of a row as a scalar at its step.

    Args:
        log_dir: folder of the event files. A relative path is below the run's folder.
    """

    def __init__(self, log_dir: str = "tensorboard") -> None:
        self._log_dir = Path(log_dir).expanduser()
        self._file: BinaryIO | None = None
        self._failed: Exception | None = None
        self._queue = WriteBehind("tensorboard", failed=self._fail)

    def start(self, info: RunInfo) -> None:
        """Open the file of this attempt."""
        folder = info.run_dir / self._log_dir
        fsio.make_folder(folder)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{info.attempt:010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = os.fdopen(fsio.open_file(folder / name, os.O_WRONLY | os.O_APPEND), "ab")
        self._write(_events.Event(wall_time=time.time(), file_version="brain.Event:2"))
        restart = _events.SessionLog(status=_events.SessionLog.START)
        self._write(_events.Event(wall_time=time.time(), step=info.step + 1, session_log=restart))

    def write(self, row: Row) -> None:
        """Queue the numbers of ``row``."""
        values = [
            _summaries.Summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name not in ("step", "time") and isinstance(value, int | float)
        ]
        self._write(
            _events.Event(wall_time=row["time"], step=row["step"], summary=_summaries.Summary(value=values))
        )

    def close(self) -> None:
        """Write the queued rows, for 5 s at most, and close the file."""
        if self._file is not None:
            if left := self._queue.flush(_CLOSE_WAIT_S):
                raise TimeoutError(f"{left} rows were not written within {_CLOSE_WAIT_S:g} s of the end")
            self._file.close()
        self._raise_failure()

    def _write(self, event: Any) -> None:
        assert self._file is not None
        file, data = self._file, event.SerializeToString()

        def append() -> None:
            _records.RecordWriter(file).write(data)
            file.flush()

        if not self._queue.submit(append):
            raise TimeoutError("too many rows are waiting for a slow file system")
        self._raise_failure()

    def _fail(self, error: Exception) -> None:
        self._failed = self._failed or error

    def _raise_failure(self) -> None:
        if self._failed is not None:
            raise self._failed


PLUGIN = TensorBoardSink
