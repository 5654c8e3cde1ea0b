"""Bad configs and bad data, tried as a new user would: one clear message, exit status 2, nothing started."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.runs import Launcher, Run, make_run

pytest_plugins = ["support.run_fixtures"]

REPO = Path(__file__).parents[2]

BAD_CONFIGS: dict[str, tuple[str, list[str], list[str]]] = {
    "a misspelt key": ("[train]\nbatchsize = 4", [], ["train.batchsize", "batch_size"]),
    "an unknown section": ("[trian]\nseed = 4", [], ["trian", "train"]),
    "a fraction for an integer": ("[train]\nmax_steps = 10.9", [], ["train.max_steps", "10.9", "integer"]),
    "a misspelt boolean": (
        "",
        ["--train.compile_model=ture"],
        ["train.compile_model", "ture", "command line"],
    ),
    "not a number": ("[optimizer]\nlr = nan", [], ["optimizer.lr", "nan"]),
    "an unknown choice": ("[scheduler]\nname = 'cosin'", [], ["scheduler.name", "cosin", "cosine"]),
    "broken TOML": ("[train\nseed = 1", [], ["config.toml", "line 1"]),
    "heads that do not divide": ("[model]\ndim = 32\nn_heads = 3", [], ["model", "n_heads", "3"]),
    "a sequence that is too long": (
        "[model]\nmax_seq_len = 64\n[train]\nseq_len = 128",
        [],
        ["seq_len", "64"],
    ),
    "a batch that does not divide": ("[train]\nglobal_batch_size = 9\nbatch_size = 4", [], ["8 or 12"]),
    "two sources of data": (
        "[data]\ndataset_path = 'x'",
        ["--data.text=python-stdlib"],
        ["dataset_path", "text"],
    ),
    "a parallelism that does not fit": ("[distributed]\ntp = 3", [], ["distributed.tp", "n_heads"]),
    "a variable that is not set": ("", ["--run.dir=$UNSET_KF/run"], ["run.dir", "$UNSET_KF is not set"]),
    "several faults": ("[train]\nseed = -1\n[eval]\ninterval = 'x'", [], ["train.seed", "eval.interval"]),
}


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_train_bad_config_exits_2(tmp_path: Path, kind: str) -> None:
    text, overrides, reported = BAD_CONFIGS[kind]
    config = tmp_path / "config.toml"
    config.write_text(text)
    if "data" not in text and "--data" not in str(overrides):
        overrides = [*overrides, "--data.text=python-stdlib"]
    command = [sys.executable, str(REPO / "scripts/train.py"), "--config", str(config), *overrides]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    for part in reported:
        assert part in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"], "nothing was started"


@pytest.mark.smoke
def test_train_missing_files_told_before_a_run_folder(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    """All at once, by rank 0, as ``kempnerforge config check`` does."""
    run = make_run(tmp_path, corpus, **{"data.tokenizer": str(tmp_path / "tok.json")})
    missing = ['--data.text=["/nowhere/*.txt"]', "--checkpoint.load_path=/nowhere/run"]
    ended = launcher.run(run, *missing, ranks=2)
    assert ended.statuses == [2, 2], ended.output
    for words in (
        "3 faults",
        "data.text:",
        "data.tokenizer:",
        "checkpoint.load_path: /nowhere/run does not exist",
    ):
        assert words in ended.outputs[0]
    assert "Traceback" not in ended.output
    assert "faults" not in ended.outputs[1]
    assert not run.folder.exists()


def prepared(tmp_path: Path, corpus: Path) -> Path:
    command = str(Path(sys.executable).with_name("kempnerforge"))
    arguments = ["data", "prepare", str(corpus / "*.txt"), "--out", str(tmp_path / "t")]
    subprocess.run([command, *arguments], check=True, capture_output=True)
    return tmp_path / "t"


def flip_byte(folder: Path) -> None:
    shard = next(folder.glob("train*.bin"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


def cut(folder: Path) -> None:
    shard = next(folder.glob("train*.bin"))
    shard.write_bytes(shard.read_bytes()[:-10])


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def foreign_npy(folder: Path) -> None:
    empty(folder)
    np.save(folder / "a.npy", np.linspace(0, 1, 5000))


def too_large_ids(folder: Path) -> None:
    empty(folder)
    np.save(folder / "a.npy", np.full(5000, 300, dtype=np.uint16))


def too_few_tokens(folder: Path) -> None:
    empty(folder)
    np.save(folder / "a.npy", np.arange(20, dtype=np.uint16))


BAD_DATA: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "a flipped byte": (flip_byte, ["train_00000.bin", "digest"]),
    "a shard that was cut short": (cut, ["train_00000.bin", "bytes"]),
    "an empty folder": (empty, ["kempnerforge data prepare"]),
    "shards of another dtype": (foreign_npy, ["a.npy", "float64"]),
    "ids outside the vocabulary": (too_large_ids, ["a.npy", "300", "257"]),
    "too few tokens": (too_few_tokens, ["too few tokens", "seq_len"]),
}


@pytest.mark.parametrize("kind", BAD_DATA)
@pytest.mark.parametrize("ranks", [1, 2])
def test_train_bad_data_exits_2(
    launcher: Launcher, corpus: Path, tmp_path: Path, kind: str, ranks: int
) -> None:
    spoil, reported = BAD_DATA[kind]
    folder = prepared(tmp_path, corpus)
    spoil(folder)
    run = make_run(tmp_path / "base", corpus, **{"data.text": None, "data.dataset_path": str(folder)})
    refuse(launcher, run, ranks, reported)


BAD_PLACES: dict[str, tuple[dict[str, object], list[str]]] = {
    "data that is nowhere": (
        {"data.text": None, "data.dataset_path": "nowhere"},
        ["nowhere", "no such file"],
    ),
    "a pattern that matches nothing": ({"data.text": ["nothing/*.txt"]}, ["nothing/*.txt"]),
    "a tokenizer that is nowhere": ({"data.tokenizer": "nowhere.json"}, ["nowhere.json"]),
    "a warm start from nowhere": (
        {"checkpoint.load_path": "nowhere"},
        ["checkpoint.load_path", "nowhere", "does not exist"],
    ),
    "too little memory for the buffers": (
        {"checkpoint.max_host_memory_gb": 1e-6},
        ["checkpoint.max_host_memory_gb", "0.00 GB", "more than 1e-06"],
    ),
    "a run folder that cannot be made": ({"run.dir": "config.toml/run"}, ["run.dir", "config.toml/run"]),
}


@pytest.mark.smoke
@pytest.mark.parametrize("kind", BAD_PLACES)
def test_train_bad_path_or_limit_exits_2(launcher: Launcher, corpus: Path, tmp_path: Path, kind: str) -> None:
    settings, reported = BAD_PLACES[kind]
    refuse(launcher, make_run(tmp_path, corpus, **settings), 2, reported)


def refuse(launcher: Launcher, run: Run, ranks: int, reported: list[str]) -> None:
    ended = launcher.run(run, ranks=ranks)
    assert ended.statuses == [2] * ranks, ended.output
    assert "Traceback" not in ended.output
    assert ended.output.count("error:") == 1, "rank 0 speaks"
    for part in reported:
        assert part in ended.output
    if run.folder.exists():
        assert run.committed() == []
        last_exit = json.loads((run.folder / "run.json").read_text())["last_exit"]
        assert last_exit is None or last_exit["status"] == 2


@pytest.mark.smoke
def test_train_config_for_gpus_on_cpu_exits_2(
    launcher: Launcher, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instead of being killed for memory, or a traceback of the compiler."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("CXX", "no-compiler-here")
    shape = {"model.dim": 65536, "model.n_layers": 1000, "model.n_heads": 64}
    run = make_run(tmp_path, corpus, **shape, **{"train.compile_model": True, "distributed.dp_shard": 2})
    reported = ["model: weights, gradients and optimizer state of the ranks on", "torch sees no GPU here"]
    reported += ["train.compile_model: torch.compile needs a C++ compiler", "no-compiler-here is not found"]
    refuse(launcher, run, 2, reported)
