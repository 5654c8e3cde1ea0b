"""``kempnerforge data`` as a new user would type it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from support.tokenizers import make_tokenizer
from typer.testing import CliRunner, Result

from kempnerforge.cli.app import main
from kempnerforge.cli.data import app
from kempnerforge.data.tokens import open_dataset
from kempnerforge.errors import DataError

pytest_plugins = ["support.text_fixtures"]


PREPARE = ("prepare", "texts", "--out", "out", "--val-fraction", "0")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_data_prepare_then_inspect_agree(texts):
    result = run("prepare", "texts/*.txt", "--out", "out", "--val-fraction", "0.2")
    assert result.exit_code == 0, result.output
    assert "train: " in result.stdout
    assert f'dataset_path = "{texts / "out"}"' in result.stdout
    assert "vocab_size = 257" in result.stdout
    dataset = open_dataset("out", vocab_size=257)
    assert set(dataset.shards) == {"train", "val"}

    result = run("inspect", "out", "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["sound"]
    assert (facts["vocab_size"], facts["tokenizer"], facts["separator_id"]) == (257, "bytes", 256)
    assert sum(facts["documents"].values()) == 30
    assert sum(facts["tokens"].values()) == sum(path.stat().st_size + 1 for path in Path("texts").iterdir())
    assert facts["digest"] == dataset.digest
    assert {shard["dtype"] for shard in facts["shards"]} == {"uint16"}

    result = run("inspect", "out")
    assert result.exit_code == 0
    assert "train_00000.bin" in result.stdout
    assert "ok" in result.stdout


def test_data_prepare_real_tokenizer_used(texts):
    make_tokenizer(texts / "tok" / "tokenizer.json")
    (texts / "tok" / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": "<begin>"}')
    Path("texts", "latin1.txt").write_bytes(b"caf\xe9\n")
    Path("texts", "empty.txt").touch()
    command = ["prepare", "texts", "--tokenizer", "tok/tokenizer.json", "--val-fraction", "0"]
    options = ["--skip-unreadable", "--document-separator", "---"]
    result = run(*command, *options, "--out", "out")
    assert result.exit_code == 0, result.output
    assert "no validation split" in result.stdout
    inspected = run("inspect", "out").stdout
    for shown in (
        "eos: </s> (id 1), named by tokenizer_config.json",
        "bos: none, although the tokenizer has <begin>; to begin each document with it, add --bos-token",
        "document separator: '---'",
        "left out: 1 x empty",
        "latin1.txt:1: byte 3 (0xe9) is not UTF-8",
    ):
        assert shown in result.stdout
        assert shown in inspected
    facts = json.loads(run("inspect", "out", "--json").stdout)
    assert facts["tokenizer"] == "tok/tokenizer.json"
    assert facts["text"]["document_separator"] == "---"
    assert facts["unreadable"]["counts"] == {"byte N": 1}

    result = run(*command, *options, "--out", "other", "--bos-token", "<begin>", "--eos-token", "<gone>")
    assert isinstance(result.exception, DataError)
    result = run(*command, *options, "--out", "other", "--bos-token", "<begin>")
    assert "bos: <begin> (id 0)" in result.stdout


def test_data_prepare_non_empty_folder_refused(texts):
    Path("out").mkdir()
    Path("out", "thesis.tex").write_text("years of work")
    result = run("prepare", "texts", "--out", "out")
    assert isinstance(result.exception, DataError)
    assert Path("out", "thesis.tex").read_text() == "years of work"


def test_data_inspect_damaged_shards_status_1(texts):
    assert run(*PREPARE, "--shard-tokens", "100").exit_code == 0
    shard = Path("out", "train_00001.bin")
    shard.write_bytes(b"\1" + shard.read_bytes()[1:])
    Path("out", "train_00002.bin").unlink()
    result = run("inspect", "out")
    assert result.exit_code == 1
    assert "train_00001.bin: damaged" in result.stdout
    assert "train_00002.bin: No such file" in result.stdout
    result = run("inspect", "out", "--json")
    assert result.exit_code == 1
    facts = json.loads(result.stdout)
    assert not facts["sound"]
    assert [shard["file"] for shard in facts["shards"] if shard["problem"]] == [
        "train_00001.bin",
        "train_00002.bin",
    ]


@pytest.mark.parametrize("name", ["train_00000.ends", "train_00001.ends"])
def test_data_inspect_verifies_ends_of_documents(texts: Path, name: str) -> None:
    assert run(*PREPARE, "--shard-tokens", "100").exit_code == 0
    ends = Path("out", name)
    ends.write_bytes(b"\1" + ends.read_bytes()[1:])
    result = run("inspect", "out")
    assert result.exit_code == 1
    assert f"{name}: damaged" in result.stdout
    ends.unlink()
    assert f"{name}: No such file" in run("inspect", "out").stdout


def test_data_inspect_npy_shards_read(texts):
    np.save("tokens.npy", np.arange(100))
    facts = json.loads(run("inspect", "tokens.npy", "--json").stdout)
    assert facts["sound"]
    assert facts["tokens"] == {"train": 100}
    assert facts["digest"] == open_dataset("tokens.npy").digest
    assert "tokens.npy" in run("inspect", "tokens.npy").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "nothing/*.txt", "--out", "out"], "matches no file"),
        (["prepare", "texts", "--out", "out", "--tokenizer", "absent.json"], "no such file"),
        (["prepare", "texts", "--out", "texts"], "not an empty folder"),
        (["prepare", "texts", "--out", "texts/00.txt/below"], "cannot write prepared tokens"),
        (["prepare", "texts"], "Missing option '--out'"),
        (["prepare", "texts", "--out", "out", "--val-fraction", "1.5"], "--val-fraction"),
        (["inspect", "nowhere"], "no such file or folder"),
        (["inspect", "texts"], "neither index.json nor .npy"),
    ],
)
def test_data_invalid_request_exits_2_without_traceback(texts, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["kempnerforge", "data", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr().err
    assert ended.value.code == 2, printed
    assert message in printed
    assert "Traceback" not in printed
    assert not Path("out").exists()
