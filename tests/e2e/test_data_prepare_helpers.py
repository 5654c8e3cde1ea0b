"""A file that cannot be divided is tokenized by several processes, to the same bytes."""

from __future__ import annotations

import functools
import gzip
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from support.polling import wait_until
from support.tokenizers import make_tokenizer

from kempnerforge.config.data import DataConfig
from kempnerforge.data import prepare_workers
from kempnerforge.data.index import Index
from kempnerforge.data.prepare import prepare
from kempnerforge.data.reading.options import ReadOptions
from kempnerforge.data.record_encoder import make_encoder
from kempnerforge.data.tokenizer import load_tokenizer
from kempnerforge.errors import DataError

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = [f"word{number}" for number in range(300)]


def words(generator: random.Random, most: int) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(3, most)))


def write_text(path: Path) -> None:
    generator = random.Random(1)
    path.write_text("\n".join(words(generator, 40) for _ in range(20_000)) + "\n")


def write_compressed_text(path: Path) -> None:
    write_text(path)
    path.write_bytes(gzip.compress(path.read_bytes()))


def write_json_lines(path: Path) -> None:
    """Documents of several pieces and short ones, with lines that cannot be read between them."""
    generator = random.Random(2)
    with gzip.open(path, "wt") as file:
        for number in range(3000):
            text = words(generator, 100_000 if number % 500 == 0 else 200)
            file.write(json.dumps({"text": text} if number % 7 else {"title": text}) + "\n")


def write_chats(path: Path) -> None:
    generator = random.Random(3)
    with gzip.open(path, "wt") as file:
        for number in range(2000):
            roles = ("user", "assistant" if number % 11 else "nobody")
            messages = [{"role": role, "content": words(generator, 150)} for role in roles]
            file.write(json.dumps({"messages": messages}) + "\n")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tok")
    make_tokenizer(folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def run(file: Path, out: Path, tokenizer: Path, workers: int, *, skip: bool = True) -> Index:
    form = "chat" if "chat" in file.name else "text"
    return prepare(
        str(file),
        out,
        load_tokenizer(str(tokenizer)),
        options=ReadOptions(skip_unreadable=skip),
        make_encoder=functools.partial(make_encoder, DataConfig(format=form)),
        workers=workers,
    )


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.txt", write_text),
        ("a.txt.gz", write_compressed_text),
        pytest.param("a.jsonl.gz", write_json_lines, marks=pytest.mark.smoke),
        ("chat.jsonl.gz", write_chats),
    ],
)
def test_data_prepare_helpers_give_the_same_bytes(
    tmp_path: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    write: Callable[[Path], None],
) -> None:
    write(tmp_path / name)
    alone = run(tmp_path / name, tmp_path / "alone", tokenizer, workers=1)
    monkeypatch.setattr(prepare_workers, "HELPER_BYTES", 50_000)
    assert run(tmp_path / name, tmp_path / "helped", tokenizer, workers=3) == alone
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (tmp_path / "helped" / path.name).read_bytes()
    assert ("jsonl" in name) == bool(alone.unreadable.total)


@pytest.mark.smoke
def test_data_prepare_error_in_helper_has_file_and_line(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_chats(tmp_path / "chat.jsonl.gz")
    monkeypatch.setattr(prepare_workers, "HELPER_BYTES", 50_000)
    with pytest.raises(DataError, match=r"chat\.jsonl\.gz:1: unknown role in message 2; it is 'nobody'"):
        run(tmp_path / "chat.jsonl.gz", tmp_path / "out", tokenizer, workers=3, skip=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat.jsonl.gz"]


def start(file: Path, out: Path, tokenizer: Path, *options: str) -> subprocess.Popen[str]:
    arguments = ["data", "prepare", str(file), "--out", str(out), "--tokenizer", str(tokenizer), *options]
    program = [sys.executable, "-m", "kempnerforge", *arguments]
    return subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def large_text(folder: Path) -> Path:
    path = folder / "large.txt"
    write_text(path)
    path.write_text(path.read_text() * 4)
    assert path.stat().st_size > 3 * prepare_workers.HELPER_BYTES
    return path


@pytest.mark.parametrize("options", [["--workers", "3"], pytest.param([], marks=pytest.mark.smoke)])
def test_data_prepare_large_text_uses_all_processors(
    tmp_path: Path, tokenizer: Path, options: list[str]
) -> None:
    """One process reads the file, and as many as there are processors tokenize it."""
    expected = 3 if options else min(4, prepare_workers.allowed_cpus())
    running = start(large_text(tmp_path), tmp_path / "out", tokenizer, *options)
    me = psutil.Process(running.pid)
    readers, helpers = 1, expected if expected > 1 else 0
    wait_until(lambda: len(me.children(recursive=True)) == readers + helpers, "its processes")
    assert len(me.children()) == readers
    said = running.communicate(timeout=120)[1]
    assert running.returncode == 0, said


def test_data_prepare_helper_killed_is_named(tmp_path: Path, tokenizer: Path) -> None:
    running = start(large_text(tmp_path), tmp_path / "out", tokenizer, "--workers", "2")
    me = psutil.Process(running.pid)
    wait_until(lambda: len(me.children(recursive=True)) == 3, "a reader and two helpers")
    (reader,) = me.children()
    helpers = reader.children()
    os.kill(helpers[0].pid, signal.SIGKILL)
    said = running.communicate(timeout=120)[1]
    assert running.returncode == 1, said
    assert "a process that tokenizes ended with signal 9 while it read " in said
    assert "large.txt; it may have been out of memory: run kempnerforge data prepare with fewer" in said
    assert "Traceback" not in said
    wait_until(lambda: not any(is_alive(process) for process in (reader, *helpers)), "none of them is left")


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
