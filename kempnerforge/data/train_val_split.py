"""Choose the documents, and the ends of documents, that are held out for validation.

The rule, for a ``fraction`` of the bytes of text, decided from sizes and digests alone:

1. Documents that are small against what is held out of their file (at most a twentieth of it) are
   chosen whole, evenly over the file (:class:`EvenChoice`).
2. Any other document of which at least ``CUT_BYTES`` are to be held out is cut near its end.
3. The rest, which are small documents in small files, are chosen whole by their digest: those
   below a limit, so equal documents are in the same split. The limit is ``fraction`` of all
   digests if that gives the share of bytes within a tenth, else the nearest on a fixed scale that
   does (:class:`DigestChoice`).
4. If no limit does, because there are too few documents, they are all cut instead, together by the
   share.

1 and 2 depend on one file only. 3 is the same for the document whatever other files there are,
as long as the limit is.
"""

from __future__ import annotations

import numpy as np

TOLERANCE = 0.1
"""The share of bytes that is held out may differ from the fraction by this part of it."""

SMALL_PART = 0.05
"""A document is small if it has at most this part of the bytes that are held out of its file."""

CUT_BYTES = 4 << 10
"""A document is cut if at least so many of its bytes are to be held out."""

CUT_SLACK = 0.04
"""A cut may hold out this part more or less than asked, to be at the end of a line."""
MAX_CUT_SLACK_BYTES = 64 << 10

_SCALE = 1.05
_STEPS = 40
_DIGESTS = 2.0**64

WHOLE, CUT, POOL = 0, 1, 2
"""Rules 1, 2 and 3."""


def rules_for(
    sizes: np.ndarray, file_bytes: int | np.ndarray, fraction: float, *, may_cut: bool = True
) -> np.ndarray:
    """Return ``WHOLE``, ``CUT`` or ``POOL`` for each document of a file, uint8 [documents].

    ``sizes`` in bytes [documents]. ``file_bytes`` are the bytes of text of the file, or of the file
    of each document.
    """
    rules = np.full(sizes.size, POOL, dtype=np.uint8)
    if may_cut:
        rules[sizes * fraction >= CUT_BYTES] = CUT
    rules[sizes <= file_bytes * fraction * SMALL_PART] = WHOLE
    return rules


def max_lead_bytes(file_bytes: int, num_documents: int, fraction: float) -> float:
    """Return the ``max_lead_bytes`` of the :class:`EvenChoice` of a file.

    It is the mean size of its documents. A few huge ones can raise the mean above the size of any
    document that is chosen whole, and then too little would be held out: so it is at most that size.
    """
    return min(file_bytes / num_documents, file_bytes * fraction * SMALL_PART)


class EvenChoice:
    """Choose documents of one file, in order, so that at each place the share of bytes is the fraction.

    A document is chosen when fewer bytes were chosen before it than the fraction asks for. So the
    choice does not depend on its own size, and the chosen bytes never differ from the fraction by
    more than one document and the lead. The lead is a part of ``max_lead_bytes``, which the
    ``digest``, uint64, of the first document of the file decides. So it decides where the first
    choice is.
    """

    def __init__(self, fraction: float, digest: int, max_lead_bytes: float) -> None:
        self._fraction = fraction
        self._lead = digest / _DIGESTS * max_lead_bytes
        self._seen = self._chosen = 0

    def choose(self, sizes: np.ndarray) -> np.ndarray:
        """Return which of the next documents are chosen, bool [documents]. ``sizes`` in bytes."""
        # As floats, in which searchsorted looks for a float without a copy.
        before = np.cumsum(sizes, dtype=np.float64) - sizes + self._seen
        held_out = np.zeros(sizes.size, dtype=bool)
        position = 0
        while position < sizes.size:
            # The first document before which fraction * seen - lead >= chosen.
            enough = (self._chosen + self._lead) / self._fraction
            position = max(position, int(np.searchsorted(before, enough, side="left")))
            if position < sizes.size:
                held_out[position] = True
                self._chosen += int(sizes[position])
                position += 1
        self._seen += int(sizes.sum())
        return held_out


class DigestChoice:
    """Find the limit of the digests, uint64, below which documents are chosen."""

    def __init__(self, fraction: float) -> None:
        factors = _SCALE ** np.arange(-_STEPS, _STEPS + 1)
        limits = np.minimum(fraction * factors * _DIGESTS, np.nextafter(_DIGESTS, 0))
        self._limits = limits.astype(np.uint64)
        self._bytes = np.zeros(limits.size + 1)

    def add(self, digests: np.ndarray, sizes: np.ndarray) -> None:
        """Count documents: ``digests``, uint64 [documents], and ``sizes`` in bytes."""
        places = np.searchsorted(self._limits, digests, side="right")
        self._bytes += np.bincount(places, weights=sizes, minlength=self._bytes.size)

    @property
    def total_bytes(self) -> int:
        """Bytes of all documents that were counted."""
        return int(self._bytes.sum())

    def limit(self, wanted_bytes: float, tolerance_bytes: float) -> int | None:
        """Return the limit with which ``wanted_bytes`` are chosen, within ``tolerance_bytes``, or None.

        Of several, return the one that is nearest to the fraction on the scale.
        """
        chosen = np.cumsum(self._bytes)[:-1]
        for step in sorted(range(-_STEPS, _STEPS + 1), key=abs):
            if abs(chosen[step + _STEPS] - wanted_bytes) <= tolerance_bytes:
                return int(self._limits[step + _STEPS])
        return None


def cut_position(
    lengths: np.ndarray, ends_line: np.ndarray, begins_character: np.ndarray, target: float, slack: float
) -> int:
    """Return where to cut the end of a document's tokens: the number of tokens before the cut.

    ``lengths``, ``ends_line`` and ``begins_character`` [tokens] describe the last tokens of it: how
    many bytes each has, whether it ends a line, and whether it begins with a character's first
    byte. ``target``: the bytes after the cut. Within ``slack`` bytes of it, the nearest end of a
    line is preferred, then the nearest character.
    """
    after = np.concatenate((np.cumsum(lengths[::-1])[::-1], [0])).astype(np.int64)
    distance = np.abs(after - target)
    places = np.arange(after.size)
    for allowed in (
        (distance <= slack) & np.concatenate(([False], ends_line)),
        np.concatenate((begins_character, [True])),
    ):
        if allowed.any():
            return int(places[allowed][np.argmin(distance[allowed])])
    return int(np.argmin(distance))
