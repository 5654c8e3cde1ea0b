"""Rate and memory of ``kempnerforge data prepare`` against ``datasets`` with the same tokenizer.

    python benchmarks/bench_prepare.py

The reference loads the same JSON Lines with ``datasets.load_dataset("json")`` and tokenizes them
with ``map(batched=True)`` in as many processes as the command has. Its result is a cached Arrow
table of ids. The text, ``--megabytes`` of it, are pieces of the sources of Python's standard library,
and the tokenizer is a byte-level BPE with ``--vocab-size`` ids that the benchmark trains on a part of
them. The arms alternate, each in new processes and into a new folder. The benchmark measures:

  mb_per_s  bytes of the file per second, from the start of the program to its end
  peak_mb   the largest memory of all its processes together (PSS, read every 50 ms)

Both arms must give the same number of ids. The goal is a ratio of rates of at least 1.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from bench import command, machine, pairs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kempnerforge.data.index import read_index
from kempnerforge.data.reading.files import PYTHON_STDLIB, files_of

SIZES = {
    "tiny": {"megabytes": 1, "vocab_size": 500, "pairs": 2},
    "cpu": {"megabytes": 500, "vocab_size": 32_000, "pairs": 5},
}
EOS = "<|endoftext|>"
TRAIN_BYTES = 20_000_000
"""Text on which the tokenizer is trained."""
RECORD_BYTES = (500, 8000)
POLL_S = 0.05

DATASETS = """
import sys
import datasets
from tokenizers import Tokenizer

texts, tokenizer_file, cache, num_proc = sys.argv[1:]
tokenizer = Tokenizer.from_file(tokenizer_file)

def encode(batch):
    encoded = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
    return {"ids": [document.ids for document in encoded]}

if __name__ == "__main__":
    data = datasets.load_dataset("json", data_files=texts, split="train", cache_dir=cache)
    data = data.map(encode, batched=True, num_proc=int(num_proc), remove_columns=data.column_names)
    print(sum(len(ids.as_py()) for ids in data.data.column("ids")) if __debug__ else "")
"""
"""The reference. With ``python -O`` it counts nothing, so that the count costs no time."""


def records() -> Iterator[str]:
    """Yield pieces of the sources of the standard library, over and over, with a seeded length."""
    generator = random.Random(0)
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in files_of(PYTHON_STDLIB)]
    while True:
        for text in texts:
            start = 0
            while start < len(text):
                size = generator.randint(*RECORD_BYTES)
                yield text[start : start + size]
                start += size


def write_records(path: Path, size_bytes: int) -> None:
    """Write JSON Lines of ``size_bytes``."""
    source, done = records(), 0
    with path.open("w", encoding="utf-8") as file:
        while done < size_bytes:
            done += file.write(json.dumps({"text": next(source)}, ensure_ascii=False) + "\n")


def train_tokenizer(path: Path, vocab_size: int, size_bytes: int) -> None:
    """Train a byte-level BPE on the first ``size_bytes`` of the text."""
    source, texts, done = records(), [], 0
    while done < size_bytes:
        texts.append(next(source))
        done += len(texts[-1])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def memory_mb(process: psutil.Process) -> float:
    """Return the PSS of a process and of all that it started, in MB."""
    total = 0
    for each in (process, *process.children(recursive=True)):
        try:
            total += each.memory_full_info().pss
        except psutil.Error:  # it has just ended
            continue
    return total / 1e6


def measure(arguments: list[str], size_bytes: int, folder: Path) -> tuple[pairs.Measured, str]:
    """Run a process. Return its rate and peak memory, and what it printed."""
    with (folder / "printed").open("w+") as printed:
        started = time.perf_counter()
        process = subprocess.Popen(arguments, stdout=printed, env=environment(folder))
        running, peak = psutil.Process(process.pid), 0.0
        while process.poll() is None:
            try:
                peak = max(peak, memory_mb(running))
            except psutil.Error:
                continue
            time.sleep(POLL_S)
        seconds = time.perf_counter() - started
        printed.seek(0)
        if process.returncode:
            sys.exit(f"{arguments} ended with {process.returncode}")
        return {"mb_per_s": size_bytes / seconds / 1e6, "peak_mb": peak}, printed.read()


def environment(folder: Path) -> dict[str, str]:
    """Neither arm asks the network, and tokenizers use one thread in each process."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    return {**os.environ, **offline, "TOKENIZERS_PARALLELISM": "false"}


def ours(folder: Path, cpus: int, size_bytes: int, pair: int) -> pairs.Measured:
    """Run ``data prepare``."""
    out = folder / f"ours{pair}"
    options = ["--tokenizer", str(folder / "tokenizer.json"), "--workers", str(cpus), "--out", str(out)]
    program = [sys.executable, "-m", "kempnerforge", "data", "prepare", str(folder / "texts.jsonl")]
    found, _ = measure([*program, *options], size_bytes, folder)
    shutil.rmtree(out)
    return found


def reference(folder: Path, cpus: int, size_bytes: int, pair: int) -> pairs.Measured:
    """Run ``datasets``."""
    cache = folder / f"datasets{pair}"
    script = [sys.executable, "-O", str(folder / "reference.py")]
    files = [str(folder / "texts.jsonl"), str(folder / "tokenizer.json"), str(cache), str(cpus)]
    found, _ = measure([*script, *files], size_bytes, folder)
    shutil.rmtree(cache)
    return found


def count_ids(folder: Path, cpus: int) -> tuple[int, int]:
    """Return the ids that each arm gives, ours without separators."""
    out, cache = folder / "counted", folder / "counted-cache"
    options = ["--tokenizer", str(folder / "tokenizer.json"), "--out", str(out), "--val-fraction", "0"]
    program = [sys.executable, "-m", "kempnerforge", "data", "prepare", str(folder / "texts.jsonl")]
    measure([*program, *options], 1, folder)
    split = read_index(out).splits["train"]
    files = [str(folder / "texts.jsonl"), str(folder / "tokenizer.json"), str(cache), str(cpus)]
    _, printed = measure([sys.executable, str(folder / "reference.py"), *files], 1, folder)
    shutil.rmtree(out)
    shutil.rmtree(cache)
    return split.tokens - split.documents, int(printed.split()[-1])


def main() -> None:
    """Measure and print."""
    arguments = command.parse(__doc__, SIZES)
    folder = Path(tempfile.mkdtemp(dir=arguments.dir or Path.cwd(), prefix="bench-"))
    cpus = len(os.sched_getaffinity(0))
    try:
        size_bytes = arguments.megabytes * 1_000_000
        write_records(folder / "texts.jsonl", size_bytes)
        train_tokenizer(folder / "tokenizer.json", arguments.vocab_size, min(size_bytes, TRAIN_BYTES))
        (folder / "reference.py").write_text(DATASETS)
        size_bytes = (folder / "texts.jsonl").stat().st_size
        counted = count_ids(folder, cpus)
        if counted[0] != counted[1]:
            sys.exit(f"the arms do not give the same ids: {counted[0]:,} and {counted[1]:,}")
        arms = {
            name: functools.partial(arm, folder, cpus, size_bytes)
            for name, arm in (("ours", ours), ("datasets", reference))
        }
        found = pairs.alternate(arms, arguments.pairs)
        facts = machine.facts(folder)
    finally:
        shutil.rmtree(folder)
    print(
        f"{size_bytes / 1e6:.0f} MB of JSON Lines, {counted[0]:,} ids of {arguments.vocab_size:,}, {cpus} "
        f"processes; {machine.describe(facts)}"
    )
    rows = [
        pairs.compare(
            name, *(pairs.column(found[arm], name) for arm in ("ours", "datasets")), goal=goal, at_most=False
        )
        for name, goal in (("mb_per_s", 1.0), ("peak_mb", None))
    ]
    pairs.show(rows, reference="datasets", others={})
    if arguments.json:
        pairs.write_json(arguments.json, rows, ids=counted[0], machine=facts, measured=found)


if __name__ == "__main__":
    main()
