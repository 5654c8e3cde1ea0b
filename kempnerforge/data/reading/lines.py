"""Line numbers of a unit."""

from __future__ import annotations

from kempnerforge.data.reading.streams import BLOCK_BYTES, open_file
from kempnerforge.data.reading.units import Unit


class LineNumbers:
    """Counts lines from the first byte that a reader of ``unit`` sees.

    The lines of the file before it are counted only if a number is asked for: that reads the file.
    """

    def __init__(self, unit: Unit, start: int) -> None:
        self._unit = unit
        self._start = start
        self._lines_before: int | None = None
        self.passed = 0
        """Line ends that the reader has passed."""

    def current(self, more: int = 0) -> int:
        """Return the number of the line that is ``more`` lines after the current one, from 1."""
        if self._lines_before is None:
            self._lines_before = self._count_before()
        return 1 + self._lines_before + self.passed + more

    def _count_before(self) -> int:
        # Only uncompressed files have units that begin after their first line.
        if not self._unit.start:
            return 0
        count, left = 0, self._start
        with open_file(self._unit.file.path) as file:
            while left and (block := file.read(min(BLOCK_BYTES, left))):
                count += block.count(b"\n")
                left -= len(block)
        return count
