"""Line numbers of a unit."""

from __future__ import annotations

from kempnerforge.data.reading.locations import Location
from kempnerforge.data.reading.units import Unit


class LineNumbers:
    """Counts lines from the first byte that a reader of ``unit`` sees."""

    def __init__(self, unit: Unit, start: int) -> None:
        self._path = unit.file.path
        # A unit at the beginning of a file may begin after a byte-order mark.
        self._first_byte = start if unit.start else 0
        self.passed = 0
        """Line ends that the reader has passed."""

    def current(self, more: int = 0) -> Location:
        """Return the location of the line that is ``more`` lines after the current one."""
        return Location(self._path, 1 + self.passed + more, self._first_byte)
