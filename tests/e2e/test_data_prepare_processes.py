"""Preparing data with several processes: killed, beside others, on a full disk, within its memory."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from support.patch_target import patch_target
from support.polling import wait_until
from support.runs import Launcher, make_run
from support.tmpfs import mounted_tmpfs
from support.tokenizers import make_closed_tokenizer, make_tokenizer

from kempnerforge.data.prepare import ABANDONED_AFTER_S, prepare
from kempnerforge.data.reading.options import ReadOptions
from kempnerforge.data.tokenizer import ByteTokenizer
from kempnerforge.data.tokens import open_dataset

pytest_plugins = ["support.run_fixtures"]
pytestmark = pytest.mark.smoke

TASK_BYTES = patch_target("kempnerforge.data.prepare:TASK_BYTES")
KILL_AT = {
    "a part": patch_target("kempnerforge.data.prepare_workers:_Worker.receive"),
    "the shards": patch_target("kempnerforge.data.shard_writer:ShardWriter.write"),
    "the index": patch_target("kempnerforge.data.prepare:write_new_file"),
    "the publication": patch_target("kempnerforge.data.prepare:publish"),
}
"""A function of the parent that is called at this point."""

PREPARE = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from support.patch_target import resolve
from kempnerforge.data.prepare import prepare
from kempnerforge.data.tokenizer import load_tokenizer
from kempnerforge.errors import KempnerForgeError

sys.path[:0] = {first!r}
owner, name = resolve({task_bytes!r})
setattr(owner, name, 60_000)
if {kill_at!r}:
    owner, name = resolve({kill_at!r})
    original, calls = getattr(owner, name), [0]

    def kill(*arguments, **more):
        calls[0] += 1
        if calls[0] == {kill_call}:
            {action}
        return original(*arguments, **more)

    setattr(owner, name, kill)
try:
    tokenizer = load_tokenizer({tokenizer!r})
    prepare([sys.argv[1]], Path(sys.argv[2]), tokenizer, workers={workers}, val_fraction=0.05)
except KempnerForgeError as error:
    sys.exit(str(error))
"""


def command(
    texts: Path,
    out: Path,
    *,
    tokenizer: str = "bytes",
    workers: int = 2,
    kill_at: str = "",
    kill_call: int = 1,
    action: str = "os.kill(os.getpid(), 9)",
    first: Sequence[str] = (),
) -> list[str]:
    """A process that prepares ``texts``, with small tasks, and may be killed at a call of a function."""
    code = PREPARE.format(
        tests=str(Path(__file__).parents[1]),
        task_bytes=TASK_BYTES,
        tokenizer=tokenizer,
        workers=workers,
        kill_at=kill_at,
        kill_call=kill_call,
        action=action,
        first=[*first],
    )
    return [sys.executable, "-c", code, str(texts), str(out)]


def write_texts(folder: Path) -> Path:
    """Files of several kinds, of about 20 tasks."""
    generator = random.Random(3)
    words = [f"word{number}" for number in range(300)]
    folder.mkdir(parents=True)
    for number in range(12):
        texts = [" ".join(generator.choices(words, k=generator.randint(3, 200))) for _ in range(60)]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        (folder / f"{number}.txt").write_text("\n".join(texts[:30]) + "\n")
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepare")
    make_tokenizer(folder / "tok" / "tokenizer.json")
    return write_texts(folder / "texts")


@pytest.fixture(scope="module")
def uninterrupted(texts: Path) -> dict[str, bytes]:
    """What one process makes of ``texts``."""
    out = texts.parent / "uninterrupted"
    subprocess.run(command(texts, out, workers=1), check=True, timeout=120)
    return content(out)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("workers", [2, 3])
def test_data_prepare_any_number_of_workers_same_bytes(
    texts: Path, uninterrupted: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    subprocess.run(command(texts, tmp_path / "out", workers=workers), check=True, timeout=120)
    assert content(tmp_path / "out") == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("has_plugin", [False, True])
def test_data_prepare_modules_of_the_user_not_imported(
    texts: Path, uninterrupted: dict[str, bytes], tmp_path: Path, has_plugin: bool
) -> None:
    """The command does not have the working directory in its path, and a rank with a plug-in has it."""
    (tmp_path / "json.py").write_text("raise SystemExit('a file of the user is imported')")
    program, *arguments = command(texts, tmp_path / "out", first=[str(tmp_path)] if has_plugin else [])
    subprocess.run([program, "-P", *arguments], check=True, timeout=120, cwd=tmp_path)
    assert content(tmp_path / "out") == uninterrupted


@pytest.mark.parametrize("point", list(KILL_AT))
def test_data_prepare_killed_goes_on_to_the_same_bytes(
    texts: Path, uninterrupted: dict[str, bytes], tmp_path: Path, point: str
) -> None:
    """Killed at two seeded calls, one after the other, then finished."""
    out = tmp_path / "out"
    generator = random.Random(point)
    for _ in range(2):
        call = generator.randint(3, 12) if point in ("a part", "the shards") else 1
        killed = subprocess.run(command(texts, out, kill_at=KILL_AT[point], kill_call=call), timeout=120)
        assert killed.returncode == -signal.SIGKILL
        assert not out.exists()
    (parts,) = tmp_path.glob(".out.*.parts")
    finished = {path.parent.name: path.stat().st_ino for path in parts.glob("part_*/part.json")}
    assert finished or point == "a part"
    survived = subprocess.run(
        command(texts, out, kill_at=KILL_AT["the publication"]), timeout=120
    )  # the parts are still there to look at
    assert survived.returncode == -signal.SIGKILL
    again = {path.parent.name: path.stat().st_ino for path in parts.glob("part_*/part.json")}
    assert finished.items() <= again.items(), "finished parts are not written again"
    subprocess.run(command(texts, out), check=True, timeout=120)
    assert content(out) == uninterrupted
    assert not parts.exists()


def test_data_prepare_two_at_once_agree(texts: Path, uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = [
        subprocess.Popen(command(texts, out, workers=workers), stderr=subprocess.PIPE, text=True)
        for workers in (1, 2, 2)
    ]
    said = [process.communicate(timeout=120)[1] for process in running]
    ended = sorted(process.returncode for process in running)
    assert ended == [0, 1, 1], said
    assert sum("was created by another process in the meantime" in text for text in said) == 2, said
    assert content(out) == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_data_prepare_killed_leaves_no_process(texts: Path, tmp_path: Path) -> None:
    tokenizer = str(texts.parent / "tok")
    parent = subprocess.Popen(command(texts, tmp_path / "out", tokenizer=tokenizer, workers=3))
    me = psutil.Process(parent.pid)
    wait_until(lambda: len(me.children()) == 3, "three workers")
    workers = me.children()
    parent.kill()
    parent.wait(timeout=60)
    wait_until(lambda: not any(is_alive(worker) for worker in workers), "none of them is left")


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_data_prepare_worker_killed_is_named(texts: Path, tmp_path: Path) -> None:
    tokenizer = str(texts.parent / "tok")
    arguments = command(texts, tmp_path / "out", tokenizer=tokenizer, workers=1)
    parent = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    me = psutil.Process(parent.pid)
    wait_until(me.children, "a worker")
    me.children()[0].kill()
    said = parent.communicate(timeout=60)[1]
    assert "a process that tokenizes ended with signal 9" in said
    assert "Run the same command to go on" in said


def test_data_prepare_text_without_token_is_refused(texts: Path, tmp_path: Path) -> None:
    """Not by a traceback of a worker, with the advice to run the same command again."""
    make_closed_tokenizer(tmp_path / "closed/tokenizer.json", ["word1"])
    done = subprocess.run(
        command(texts, tmp_path / "out", tokenizer=str(tmp_path / "closed")), capture_output=True, text=True
    )
    assert done.returncode == 1
    assert re.fullmatch(r".*: tokenizer closed/tokenizer\.json cannot encode the text: .*\n", done.stderr)


def test_data_prepare_file_changed_meanwhile_refused(texts: Path, tmp_path: Path) -> None:
    mine = write_texts(tmp_path / "texts")
    change = "open(sys.argv[1] + '/9.txt', 'w').write('new')"
    code = command(mine, tmp_path / "out", workers=1, kill_at=KILL_AT["a part"], action=change)
    ended = subprocess.run(code, stderr=subprocess.PIPE, text=True, timeout=120)
    assert ended.returncode == 1
    assert "9.txt changed while it was being prepared; start again" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_tmpfs(tmp_path / "disk", "size=700k") as folder:
        yield folder


def test_data_prepare_full_disk_exits_2_and_goes_on(texts: Path, small_disk: Path) -> None:
    """Nothing is damaged: with more space the same command goes on."""
    arguments = ["data", "prepare", str(texts), "--out", str(small_disk / "out"), "--workers", "2"]
    program = [sys.executable, "-m", "kempnerforge", *arguments]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert "cannot write prepared tokens" in ended.stderr
    assert "No space left on device" in ended.stderr
    assert "finished parts are kept in" in ended.stderr
    assert not (small_disk / "out").exists()
    subprocess.run(["mount", "-o", "remount,size=60m", str(small_disk)], check=True)
    again = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    open_dataset(small_disk / "out", verify=True)
    assert [path.name for path in small_disk.iterdir()] == ["out"]


def test_data_prepare_removes_what_was_abandoned(texts: Path, tmp_path: Path) -> None:
    old, new = (tmp_path / f".out.{name}.parts" for name in ("old", "new"))
    for folder in (old, new):
        (folder / "part_000000").mkdir(parents=True)
    long_ago = time.time() - ABANDONED_AFTER_S - 60
    for path in (*old.iterdir(), old):
        os.utime(path, (long_ago, long_ago))
    subprocess.run(command(texts, tmp_path / "out"), check=True, timeout=120)
    assert not old.exists()
    assert new.exists(), "it may still be in use"


def test_train_on_mixed_files_says_what_was_left_out(launcher: Launcher, tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts")
    (texts / "a.jsonl").write_text('{"text": "good"}\n{"title": "no text"}\n')
    (texts / "image.png").write_bytes(b"\x89PNG\0\0data")
    settings = {"train.max_steps": 4, "data.text": [str(texts)], "data.skip_unreadable": True}
    run = make_run(tmp_path / "base", texts, **settings, **{"data.cache_dir": str(tmp_path / "cache")})
    for _ in range(2):  # also when the tokens are there already
        output = launcher.run(run, ranks=1).output
        assert "left out: 1 x PNG image" in output
        assert "image.png: PNG image" in output
        assert "a.jsonl:2: " in output


@pytest.mark.parametrize("is_mixture", [False, True])
def test_train_on_prepared_says_what_was_left_out(
    launcher: Launcher, tmp_path: Path, is_mixture: bool
) -> None:
    """At every start, on one rank, and with the name of the source."""
    texts = write_texts(tmp_path / "texts")
    (texts / "a.jsonl").write_text('{"text": "good"}\n{"title": "no text"}\n')
    (texts / "image.png").write_bytes(b"\x89PNG\0\0data")
    (texts / "note.txt").write_text("ends with <|endoftext|>")
    prepare([str(texts)], tmp_path / "tokens", ByteTokenizer(), options=ReadOptions(skip_unreadable=True))
    path = str(tmp_path / "tokens")
    alone = {} if is_mixture else {"data.dataset_path": path}
    run = make_run(tmp_path / "base", texts, **{"train.max_steps": 4, "data.text": None, **alone})
    if is_mixture:
        source = f'[[data.sources]]\nname = "web"\nweight = 1\ndataset_path = "{path}"\n'
        run.config.write_text(run.config.read_text() + source)
    begin = 'data: source "web"' if is_mixture else "data"
    for _ in range(2):
        output = launcher.run(run, ranks=2).output
        for line in ("left out: 1 x PNG image", f"  {texts}/a.jsonl:2: it has no field"):
            assert output.count(f"{begin}: {line}") == 1
        assert output.count(f"{begin}: {texts}/note.txt contains the text <|endoftext|>") == 1
