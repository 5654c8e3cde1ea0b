"""The memory of data prepare does not depend on the size of the text."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import time
import weakref
from pathlib import Path

import psutil
import pytest
from support.tokenizers import TEXT, make_tokenizer

from kempnerforge.data import prepare as prepare_module
from kempnerforge.data.conversation import MAX_TOKENIZED_BYTES
from kempnerforge.data.prepare import prepare
from kempnerforge.data.reading import units
from kempnerforge.data.reading.items import MAX_RECORD_BYTES
from kempnerforge.data.token_parts import Part
from kempnerforge.data.tokenizer import ByteTokenizer

MOST_MB = 200
WORKER_MB = 30
"""What a worker needs at least for its imports."""

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

PREPARE = """
import sys
from functools import partial
from pathlib import Path
import kempnerforge.cli.data
from kempnerforge.config.data import DataConfig
from kempnerforge.data.prepare import prepare
from kempnerforge.data.reading.options import ReadOptions
from kempnerforge.data.record_encoder import make_encoder
from kempnerforge.data.tokenizer import load_tokenizer

def peak_mb():
    # Unlike ru_maxrss, it begins anew with the program.
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) // 1000 for line in lines if line.startswith("VmHWM"))

before_mb = peak_mb()
print(before_mb, flush=True)
encoder = partial(make_encoder, DataConfig(format=sys.argv[4]))
prepare(
    [sys.argv[1]],
    Path(sys.argv[2]),
    load_tokenizer(sys.argv[3]),
    options=ReadOptions(skip_unreadable=True),
    make_encoder=encoder,
    val_fraction=0.01 if sys.argv[4] == "text" else 0.0,
    workers=2,
)
print(peak_mb())
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


def dense_text(path: Path) -> None:
    """Text of which each byte is a token, as that of a language the tokenizer does not know."""
    words = ["".join(random.Random(number).choices("QZXJKVW#@!%", k=30)) for number in range(1000)]
    path.with_suffix(".txt").write_text(" ".join(words * 400))


def long_chats(path: Path) -> None:
    """Chats of dense text that are as long as a text may be, and one that is as long as a line may be."""
    sizes = [8000, MAX_TOKENIZED_BYTES - 5000] * 6 + [MAX_RECORD_BYTES // 2 - 1000]
    with path.with_suffix(".jsonl").open("w") as file:
        for size in sizes:
            text = "QZXJKVW#@!%" * (size // 11) + "\N{GRINNING FACE}"
            messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": text}]
            record = {"messages": messages, "prompt": "Hello", "completion": text}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def largest_worker_mb(process: psutil.Process) -> int:
    """Return the peak of the largest process that ``process`` and its workers have started until now."""
    most = 0
    for worker in process.children(recursive=True):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{worker.pid}/status").read_text().splitlines():
                most = max(most, int(line.split()[1]) // 1000 if line.startswith("VmHWM") else 0)
    return most


@pytest.mark.parametrize(
    ("write", "tokenizer", "form"),
    [
        (one_long_document, "bytes", "text"),
        (many_short_documents, "bytes", "text"),
        (code, "tokenizer.json", "text"),
        (dense_text, "tokenizer.json", "text"),
        (long_chats, "tokenizer.json", "chat"),
        (long_chats, "tokenizer.json", "prompt_completion"),
    ],
)
def test_data_prepare_memory_is_bounded(tmp_path: Path, write: object, tokenizer: str, form: str) -> None:
    assert callable(write)
    write(tmp_path / "text")
    if tokenizer != "bytes":
        tokenizer = str(tmp_path / "tok" / tokenizer)
        make_tokenizer(Path(tokenizer))
        (tmp_path / "tok" / "chat_template.jinja").write_text(TEMPLATE)
    paths = (str(tmp_path / "text.*"), str(tmp_path / "out"), tokenizer)
    arguments = [sys.executable, "-c", PREPARE, *paths, form]
    running = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    workers_mb = 0
    while running.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            workers_mb = max(workers_mb, largest_worker_mb(psutil.Process(running.pid)))
        time.sleep(0.02)
    said, errors = running.communicate()
    assert running.returncode == 0, errors
    before_mb, own_mb = map(int, said.split())
    print(f"{before_mb} MB before, {own_mb} MB, workers {workers_mb} MB")
    assert own_mb - before_mb < MOST_MB
    assert WORKER_MB < workers_mb < WORKER_MB + MOST_MB
