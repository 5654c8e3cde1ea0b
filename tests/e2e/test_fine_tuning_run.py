"""Runs on records for fine-tuning: the loss is that of the answers, and the example of the docs works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import chat
from support.runs import Launcher, make_run

from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader, load_tensors
from kempnerforge.config.schema import load_job
from kempnerforge.data.document_view import view_document
from kempnerforge.data.tokens import RowOptions, load_shards
from kempnerforge.model.llama import Llama

pytest_plugins = ["support.run_fixtures"]

REPO = Path(__file__).parents[2]
PACKED = {"data.packing": "best_fit", "data.document_mask": True}
SETTINGS = {
    "data.format": "chat",
    "model.vocab_size": 720,
    "model.max_seq_len": 96,
    "train.seq_len": 96,
    "train.max_steps": 4,
    "checkpoint.save_first": True,
    **PACKED,
}


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """``chats.jsonl`` with 200 conversations, and ``tok``, a tokenizer with a template."""
    numbers = np.random.default_rng(0).integers(0, 99, size=(200, 2)).tolist()
    records = [
        {"messages": chat.talk(f"What is {a} and {b}?", f"It is {a + b}.", *["More.", "No."] * (a % 2))}
        for a, b in numbers
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    chat.make_chat_tokenizer(tmp_path / "tok", chat.CHATML)
    return tmp_path


def loss_of_answers(step: Path, config: Path, data: Path) -> float:
    """Return the mean loss of the counted tokens of the held-out documents, each alone in the model."""
    model = Llama(load_job(config).job.model)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    load_tensors(tensors, SafetensorsReader(step))
    dataset = load_shards(data)
    assert dataset.index is not None
    total, count = 0.0, 0
    for number in range(dataset.index.splits["val"].documents):
        view = view_document(dataset, "val", number)
        assert view.counted is not None
        ids, counted = torch.from_numpy(view.ids), torch.from_numpy(view.counted)
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")
        total += losses[counted[1:]].sum().item()
        count += int(counted[1:].sum())
    return total / count


@pytest.mark.smoke
def test_validation_loss_is_that_of_the_answers(launcher: Launcher, chats: Path) -> None:
    """On two ranks and packed, it equals that of each conversation alone."""
    command = [sys.executable, "-m", "kempnerforge", "data", "prepare", "chats.jsonl", "--out", "data"]
    options = ["--format", "chat", "--tokenizer", "tok", "--val-fraction", "0.1"]
    subprocess.run([*command, *options], cwd=chats, check=True, timeout=120, stdout=subprocess.DEVNULL)
    rows = RowOptions(packing="best_fit", document_mask=True, cache_dir=chats / "cache")
    num_rows = load_shards(chats / "data", rows=rows).split("val", 96).num_samples
    settings: dict[str, Any] = {
        **SETTINGS,
        "data.format": None,
        "data.text": None,
        "data.dataset_path": str(chats / "data"),
        "data.cache_dir": str(chats / "cache"),
        "eval.num_batches": num_rows,  # each row in as many batches as any other
    }
    run = make_run(chats / "run", chats, **settings)
    ended = launcher.run(run, ranks=2)
    assert ended.statuses == [0, 0], ended.output
    losses = {row["step"]: row["eval/loss"] for row in run.rows() if "eval/loss" in row}
    assert sorted(losses) == [0, 4]
    for step, loss in losses.items():
        expected = loss_of_answers(run.step_folder(step), run.config, chats / "data")
        assert loss == pytest.approx(expected, rel=1e-4)
    assert losses[4] < losses[0]


def test_worker_processes_write_the_same_bytes(chats: Path) -> None:
    for out, workers in (("one", []), ("two", ["--workers", "2"])):  # one: in the process itself
        command = [
            sys.executable,
            "-m",
            "kempnerforge",
            "data",
            "prepare",
            "chats.jsonl",
            "--out",
            out,
            *workers,
        ]
        options = ["--format", "chat", "--tokenizer", "tok", "--val-fraction", "0.1"]
        subprocess.run([*command, *options], cwd=chats, check=True, timeout=120, stdout=subprocess.DEVNULL)
    first, second = (
        {path.name: path.read_bytes() for path in sorted((chats / out).iterdir())} for out in ("one", "two")
    )
    assert first == second
    assert "train_00000.counted" in first


def test_run_tokenizes_chats_and_resumes_on_another_layout(launcher: Launcher, chats: Path) -> None:
    settings: dict[str, Any] = {
        **SETTINGS,
        "data.text": [str(chats / "chats.jsonl")],
        "data.tokenizer": str(chats / "tok"),
        "data.cache_dir": str(chats / "cache"),
    }
    whole = make_run(chats / "whole", chats, **{**settings, "train.max_steps": 8})
    ended = launcher.run(whole, ranks=2)
    assert ended.statuses == [0, 0], ended.output
    assert "answers are what follows the messages before" in ended.output
    parts = make_run(chats / "parts", chats, **settings)
    assert launcher.run(parts, ranks=2).statuses == [0, 0]
    longer = make_run(chats / "parts", chats, **{**settings, "train.max_steps": 8})
    ended = launcher.run(longer, ranks=1)
    assert ended.statuses == [0], ended.output
    facts = [
        [(row["step"], row["data/digest"], row["train/tokens"]) for row in run.rows() if "train/loss" in row]
        for run in (whole, longer)
    ]
    assert facts[0] == facts[1]
    assert facts[0][-1][2] < 8 * 4 * 96 / 2  # only answers are counted


def test_fine_tuning_example_of_the_docs_trains(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPO), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    commands = [
        [str(REPO / "examples/fine_tuning.py"), "data/chats"],
        ["-m", "kempnerforge", "train", str(REPO / "examples/fine_tuning.toml"), "--train.max_steps=3"],
    ]
    commands[1] += ["--processes", "1", "--scheduler.warmup_steps=1", "--eval.interval=0"]
    for command in commands:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs/fine-tuning/checkpoints/step_00000003").is_dir()
