"""Two runs, one checkpoint folder: whatever is started and killed when, one owns it and the other is refused.

No step of the one is ever read, renamed or deleted by the other. Seeded; CI takes a slice.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from support.two_runs import BROKEN, Interleaving

SLICE = range(6)
ALL = range(200)


@pytest.mark.parametrize("seed", SLICE)
def test_two_runs_one_folder(tmp_path: Path, seed: int) -> None:
    tally = Interleaving(tmp_path, seed).play()
    assert tally["refused"]
    assert tally["finished"]


@pytest.mark.parametrize("broken", BROKEN)
def test_two_runs_oracle_notices_broken_run(tmp_path: Path, broken: str) -> None:
    with pytest.raises(AssertionError, match=BROKEN[broken][2]):
        Interleaving(tmp_path, 0).play_broken(broken)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_runs_one_folder_all_interleavings(tmp_path: Path) -> None:
    total: Counter[str] = Counter()
    wrong = []
    for seed in ALL:
        (tmp_path / str(seed)).mkdir()
        try:
            total += Interleaving(tmp_path / str(seed), seed).play()
        except AssertionError as error:
            wrong.append(f"seed {seed}: {error}")
    print(dict(total))
    assert not wrong, "\n\n".join(wrong)
    assert total["interleavings"] == len(ALL)
    for what in ("refused", "killed", "resumed", "at the same instant", "adoptions", "planted"):
        assert total[what] > 10, total
