"""The memory of data prepare does not depend on the size of the text."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
from support.tokenizers import TEXT, make_tokenizer

from kempnerforge.data import prepare as prepare_module
from kempnerforge.data.prepare import prepare
from kempnerforge.data.reading import units
from kempnerforge.data.token_parts import Part
from kempnerforge.data.tokenizer import ByteTokenizer

MOST_MB = 200

PREPARE = """
import resource, sys
from pathlib import Path
import kempnerforge.cli.data
from kempnerforge.data.prepare import prepare
from kempnerforge.data.tokenizer import load_tokenizer

def peak_kb(who):
    return resource.getrusage(who).ru_maxrss

before = peak_kb(resource.RUSAGE_SELF)
prepare([sys.argv[1]], Path(sys.argv[2]), load_tokenizer(sys.argv[3]), workers=2)
for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):  # of the children: the largest
    print((peak_kb(who) - before) // 1000)
"""


def test_data_prepare_holds_one_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a part for 4 MiB of text, so many thousands for a large corpus."""
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n' * 20_000)
    monkeypatch.setattr(prepare_module, "TASK_BYTES", 10_000)
    monkeypatch.setattr(units, "UNIT_BYTES", 10_000)
    parts: weakref.WeakSet[Part] = weakref.WeakSet()
    most = [0, 0]
    read = Part.read

    def count(folder: Path) -> Part:
        part = read(folder)
        parts.add(part)
        most[:] = max(most[0], len(parts)), most[1] + 1
        return part

    monkeypatch.setattr(Part, "read", count)
    monkeypatch.setattr(Part, "__hash__", object.__hash__)
    prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", ByteTokenizer(), workers=2)
    assert most[1] > 100
    assert most[0] <= 3, "the one that is read, and the one before it"


def one_long_document(path: Path) -> None:
    with path.with_suffix(".txt").open("w") as file:
        for number in range(1_500_000):
            file.write(f"line {number} of a text that has so many lines that it does not fit\n")


def many_short_documents(path: Path) -> None:
    with path.with_suffix(".jsonl").open("w") as file:
        for number in range(400_000):
            file.write(json.dumps({"text": f"document {number}"}) + "\n")


def code(path: Path) -> None:
    path.with_suffix(".py").write_text(TEXT * 6000)


@pytest.mark.parametrize(
    ("write", "tokenizer"),
    [(one_long_document, "bytes"), (many_short_documents, "bytes"), (code, "tokenizer.json")],
)
def test_data_prepare_memory_is_bounded(tmp_path: Path, write: object, tokenizer: str) -> None:
    assert callable(write)
    write(tmp_path / "text")
    if tokenizer != "bytes":
        tokenizer = str(tmp_path / tokenizer)
        make_tokenizer(Path(tokenizer))
    arguments = [sys.executable, "-c", PREPARE, str(tmp_path / "text.*"), str(tmp_path / "out"), tokenizer]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    own_mb, workers_mb = map(int, ended.stdout.split())
    assert own_mb < MOST_MB
    assert workers_mb < MOST_MB
