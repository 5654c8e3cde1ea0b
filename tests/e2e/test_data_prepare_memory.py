"""The memory of data prepare does not depend on the size of the text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.tokenizers import TEXT, make_tokenizer

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
