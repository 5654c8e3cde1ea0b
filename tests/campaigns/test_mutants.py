"""The default run catches faults in the product: each of these changes of the source makes it fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """One change of one place in the source."""

    file: str
    old: str
    new: str

    def apply(self, repo: Path) -> None:
        """Change the copy of the product in ``repo``. Fail when the place is not there exactly once."""
        path = repo / "kempnerforge" / self.file
        text = path.read_text()
        assert text.count(self.old) == 1, f"{self.file} has {self.old!r} {text.count(self.old)} times"
        path.write_text(text.replace(self.old, self.new))


MUTANTS = {
    "the digest is not compared": Mutant(
        "checkpoint/format/checksums.py",
        "        return digester.hexdigest() == self.record.xxh3_128[number]\n",
        "        return True\n",
    ),
    "the folder of a commit is not synced": Mutant(
        "fsio.py",
        "        os.rename(temporary, final)\n        fsync_folder(final.parent)\n",
        "        os.rename(temporary, final)\n",
    ),
    "a stop is decided by rank 0 alone": Mutant(
        "train/step_consensus.py",
        "own = [self._stop_vote(), self.hooks.vote(), self.profiler.vote()]",
        "own = [self._stop_vote() if self._group.rank == 0 else 0, self.hooks.vote(), self.profiler.vote()]",
    ),
    "the cursor is not saved": Mutant(
        "checkpoint/state/train_state.py",
        '                "cursor": self.cursor,\n',
        '                "cursor": {},\n',
    ),
    "retention deletes before it renames": Mutant(
        "checkpoint/retention/pruner.py",
        "            os.rename(path, doomed)\n        except FileNotFoundError:",
        "            fsio.delete_tree(path)\n            path.mkdir()\n            os.rename(path, doomed)\n"
        "        except FileNotFoundError:",
    ),
}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone of this repository: committed files only."""
    subprocess.run(["git", "clone", "--quiet", str(REPO), str(tmp_path / "clone")], check=True)
    return tmp_path / "clone"


def default_run(clone: Path) -> subprocess.CompletedProcess[str]:
    """``python -m pytest`` in a clone, up to the first failure."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=1"],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": str(clone)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_applies_to_the_source(name: str) -> None:
    mutant = MUTANTS[name]
    assert (REPO / "kempnerforge" / mutant.file).read_text().count(mutant.old) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_mutant_passes_the_default_run(clone: Path) -> None:
    done = default_run(clone)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails_the_default_run(clone: Path, name: str) -> None:
    MUTANTS[name].apply(clone)
    done = default_run(clone)
    assert done.returncode == 1, done.stdout
    failed = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    assert failed, done.stdout
    print(f"{name}: {failed[0]}")
