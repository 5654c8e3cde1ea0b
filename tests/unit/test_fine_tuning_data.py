"""Records are prepared for fine-tuning: which tokens count is stored and shown."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import chat
from support.tokenizers import make_closed_tokenizer
from typer.testing import CliRunner, Result

from kempnerforge.cli.data import app
from kempnerforge.config.data import DataConfig
from kempnerforge.data.document_view import longest_document, view_document
from kempnerforge.data.index import read_index
from kempnerforge.data.prepare import prepare
from kempnerforge.data.reading import units
from kempnerforge.data.reading.options import ReadOptions
from kempnerforge.data.record_encoder import make_encoder
from kempnerforge.data.tokenizer import load_tokenizer
from kempnerforge.data.tokens import load_shards, open_dataset
from kempnerforge.errors import ConfigError, DataError

SUMS = [{"prompt": f"{a} + {b} = ", "completion": str(a + b)} for a in range(8) for b in range(8)]
CHATS = [{"messages": chat.talk(f"What is {a} and two?", f"It is {a + 2}.")} for a in range(64)]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with ``sums.jsonl``, ``chats.jsonl`` and a tokenizer ``tok`` for ChatML."""
    monkeypatch.chdir(tmp_path)
    write("sums.jsonl", SUMS)
    write("chats.jsonl", CHATS)
    chat.make_chat_tokenizer(tmp_path / "tok", chat.CHATML)
    return tmp_path


def write(name: str, records: list[Any]) -> None:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def prepare_chats(*options: str, file: str = "chats.jsonl", out: str = "out") -> Result:
    return run("prepare", file, "--out", out, "--format", "chat", "--tokenizer", "tok", *options)


def counted_texts(folder: str, split: str) -> list[str]:
    """Return what counts in each document."""
    dataset = load_shards(folder)
    assert dataset.index is not None
    views = [view_document(dataset, split, n) for n in range(dataset.index.splits[split].documents)]
    return [
        "".join(text for text, counts in zip(view.texts, view.counted, strict=True) if counts)
        for view in views
        if view.counted is not None
    ]


def test_prepared_sums_count_completions(base: Path) -> None:
    result = run(
        "prepare", "sums.jsonl", "--out", "out", "--format", "prompt_completion", "--val-fraction", "0"
    )
    assert result.exit_code == 0, result.output
    assert counted_texts("out", "train") == [f"{record['completion']}<|endoftext|>" for record in SUMS]
    index = read_index(Path("out"))
    count = sum(len(record["completion"]) + 1 for record in SUMS)
    assert index.splits["train"].counted == count
    assert index.text.format == "prompt_completion"
    assert f"({count:,} count as targets, " in result.stdout
    assert "document 0 of train: 10 tokens; 2 count as targets, between [[ and ]]" in result.stdout
    assert "0 + 0 = [[0<|endoftext|>]]" in result.stdout


def test_prepared_chats_count_answers_in_both_splits(base: Path) -> None:
    result = prepare_chats("--val-fraction", "0.1")
    assert result.exit_code == 0, result.output
    found = counted_texts("out", "train") + counted_texts("out", "val")
    assert sorted(found) == sorted(f"{record['messages'][1]['content']}<|im_end|>" for record in CHATS)
    assert "answers are what follows the messages before" in result.stdout
    assert "bos" not in result.stdout  # the template decides


def test_chats_in_parquet_are_read_as_in_json_lines(base: Path) -> None:
    """A table has null for the fields that a message lacks."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    messages = [[{**message, "tool_calls": None} for message in record["messages"]] for record in CHATS]
    parquet.write_table(pa.table({"messages": messages}), "chats.parquet", row_group_size=10)
    prepare_chats("--val-fraction", "0")
    result = prepare_chats("--val-fraction", "0", file="chats.parquet", out="table")
    assert result.exit_code == 0, result.output
    assert read_index(Path("table")).digest == read_index(Path("out")).digest


def test_text_files_have_no_records(base: Path) -> None:
    Path("notes.txt").write_text("hello\n")
    result = prepare_chats(file="notes.txt")
    assert isinstance(result.exception, DataError)
    assert "notes.txt" in str(result.exception)
    assert "records are read from .jsonl, .parquet and .arrow" in str(result.exception)


def test_training_reads_the_same_records(base: Path) -> None:
    """The targets that count in rows are those of the answers."""
    prepare_chats("--val-fraction", "0")
    dataset = open_dataset("out")
    samples = dataset.split("train", 16)
    rows = samples.read(np.arange(samples.num_samples))
    assert rows.counted is not None
    stored = np.concatenate([shard.counted.map() for shard in dataset.shards["train"] if shard.counted])
    assert rows.counted.sum() == stored[1 : samples.num_samples * 16 + 1].sum()


def test_inspect_sample_shows_what_counts(base: Path) -> None:
    prepare_chats("--val-fraction", "0")
    result = run("inspect", "out", "--sample", "5")
    expected = (
        "<|im_start|>user\nWhat is 5 and two?<|im_end|>\n<|im_start|>assistant\n[[It is 7.<|im_end|>]]\n"
    )
    assert result.stdout.split("\n", 1)[1].startswith(expected)
    facts = json.loads(run("inspect", "out", "--sample", "5", "--json").stdout)
    assert (facts["split"], facts["document"], facts["tokens"]) == ("train", 5, len(facts["ids"]))
    assert len(facts["ids"]) == len(facts["counted"]) == len(facts["texts"])
    assert "".join(facts["texts"]) == expected.replace("[[", "").replace("]]", "")
    facts = json.loads(run("inspect", "out", "--json").stdout)
    dataset = load_shards("out")
    assert dataset.index is not None
    assert facts["counted"] == {"train": dataset.index.splits["train"].counted}
    lengths = [view_document(dataset, "train", number).num_tokens for number in range(len(CHATS))]
    assert facts["longest_document"] == {"train": max(lengths)}


def test_inspect_sample_that_is_not_there_is_refused(base: Path) -> None:
    prepare_chats("--val-fraction", "0")
    dataset = load_shards("out")
    with pytest.raises(DataError, match="the train split has no document 64; its documents are 0 to 63"):
        view_document(dataset, "train", 64)
    with pytest.raises(DataError, match="has no val split"):
        view_document(dataset, "val", 0)
    np.save("ids.npy", np.arange(100, dtype=np.uint16))
    with pytest.raises(DataError, match=r"records no documents \(\.npy\)"):
        view_document(load_shards("ids.npy"), "train", 0)


@pytest.mark.parametrize("name", ["train_00000.bin", "train_00000.ends", "train_00000.counted"])
@pytest.mark.parametrize("is_gone", [True, False])
def test_inspect_sample_of_damaged_shards_is_refused(base: Path, name: str, is_gone: bool) -> None:
    prepare_chats("--val-fraction", "0")
    damaged = base / "out" / name
    if is_gone:
        damaged.unlink()
    else:
        os.truncate(damaged, 1)
    dataset = load_shards(base / "out")
    with pytest.raises(DataError, match=rf"{name}: .*\. See: kempnerforge data inspect "):
        view_document(dataset, "train", 0)


def test_long_document_is_shown_in_part(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("long.txt").write_text("a" * 100)
    run("prepare", "long.txt", "--out", "out", "--val-fraction", "0")
    view = view_document(load_shards("out"), "train", 0, max_tokens=10)
    assert view.lines() == [
        "document 0 of train: 101 tokens; all count as targets, of the first 10",
        "a" * 10,
        "... and 91 more tokens",
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "hi"}, "no field 'messages'; the fields are 'text'. See --messages-field"),
        ({"messages": [{"role": "bot", "content": "hi"}]}, "unknown role in message 1; it is 'bot'"),
        ({"messages": chat.talk("hi", "")}, "nothing said by the assistant in message 2"),
    ],
)
def test_bad_record_is_refused_with_its_line_or_left_out(base: Path, record: Any, message: str) -> None:
    write("chats.jsonl", [*CHATS[:3], record, *CHATS[3:]])
    result = prepare_chats()
    assert isinstance(result.exception, DataError)
    assert f"chats.jsonl:4: {message}" in str(result.exception)
    assert "data.skip_unreadable = true (--skip-unreadable)" in str(result.exception)
    assert not Path("out").exists()
    result = prepare_chats("--skip-unreadable", "--val-fraction", "0")
    assert result.exit_code == 0, result.output
    kind = message.split(";")[0].replace("message 1", "message N").replace("message 2", "message N")
    assert f"left out: 1 x {kind}\n" in result.stdout
    assert "chats.jsonl:4: " in result.stdout
    assert len(counted_texts("out", "train")) == len(CHATS)


TEMPLATE = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %} {% endfor %}"
MOVES = {"prompt": "e2 e4", "completion": "e5", "text": "e2 e4", "messages": chat.talk("e2 e4", "e5")}


@pytest.mark.parametrize(("format_", "where"), [("text", ""), ("prompt_completion", ":2"), ("chat", ":2")])
def test_text_without_token_refused_with_file_and_line(base: Path, format_: str, where: str) -> None:
    """A record that is left out would be the error of a record. This is one of the tokenizer."""
    make_closed_tokenizer(base / "closed/tokenizer.json", ["e2", "e4", "e5"])
    (base / "closed/chat_template.jinja").write_text(TEMPLATE)
    bad = {"prompt": "e2", "completion": "mate", "text": "mate", "messages": chat.talk("e2", "mate")}
    options = ["--format", format_, "--tokenizer", "closed", "--val-fraction", "0", "--skip-unreadable"]
    write("moves.jsonl", [MOVES, bad])
    result = run("prepare", "moves.jsonl", "--out", "out", *options)
    assert isinstance(result.exception, DataError)
    assert f"moves.jsonl{where}: tokenizer closed/tokenizer.json cannot encode the text: Word" in str(
        result.exception
    )
    write("moves.jsonl", [MOVES])
    result = run("prepare", "moves.jsonl", "--out", "out", *options)
    assert result.exit_code == 0, result.output
    assert read_index(Path("out")).splits["train"].tokens == 3 + (format_ == "prompt_completion")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "chat"], '"bytes" has no chat template'),
        (
            ["--prompt-field", "q"],
            'data.prompt_field: has no effect without data.format = "prompt_completion"',
        ),
        (["--format", "prompt_completion", "--text-field", "q"], "data.text_field: has no effect"),
        (
            ["--format", "chat", "--tokenizer", "tok", "--bos-token", "<s>"],
            "data.bos_token: has no effect on chats",
        ),
    ],
)
def test_options_of_other_formats_are_refused(base: Path, options: list[str], message: str) -> None:
    result = run("prepare", "sums.jsonl", "--out", "out", *options)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_special_tokens_in_records_are_a_warning(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 1000)  # the line is not in the first unit
    write("chats.jsonl", [*CHATS, {"messages": chat.talk("<|im_end|>", "Yes. </s>")}])
    result = prepare_chats("--val-fraction", "0")
    assert "warning: " in result.stdout
    assert "chats.jsonl:65 has the text <|im_end|>" in result.stdout
    assert "it becomes the special token, as in transformers" in result.stdout


def test_given_template_is_stored_beside_the_tokens(base: Path) -> None:
    """So that an export has the template with which the model was trained."""
    Path("own.jinja").write_text(chat.CHATML_MARKED)
    result = prepare_chats("--chat-template", "own.jinja", "--val-fraction", "0")
    assert "chat template own.jinja: answers are its {% generation %} blocks" in result.stdout
    assert Path("out/chat_template.jinja").read_text() == chat.CHATML_MARKED
    assert Path("tok/chat_template.jinja").read_text() == chat.CHATML


def test_which_tokens_count_belongs_to_the_digest(base: Path) -> None:
    """The same ids with other targets are other data."""
    prepare_chats("--val-fraction", "0", out="out")
    weights = [{"messages": [*r["messages"], *({**m, "weight": 0} for m in r["messages"])]} for r in CHATS]
    write("weighted.jsonl", weights)
    write("unweighted.jsonl", [{"messages": record["messages"] * 2} for record in CHATS])
    prepare_chats("--val-fraction", "0", file="weighted.jsonl", out="weighted")
    prepare_chats("--val-fraction", "0", file="unweighted.jsonl", out="unweighted")
    first, second = (read_index(Path(name)) for name in ("weighted", "unweighted"))
    assert first.splits["train"].digest == second.splits["train"].digest
    assert first.digest != second.digest


def test_encoder_keys_differ_by_format_and_survive_pickling(base: Path) -> None:
    tokenizer, options = load_tokenizer("tok"), ReadOptions()
    configs = [
        DataConfig(text="x"),
        DataConfig(text="x", format="prompt_completion"),
        DataConfig(text="x", format="prompt_completion", completion_field="answer"),
        DataConfig(text="x", format="chat"),
        DataConfig(text="x", format="chat", messages_field="talk"),
    ]
    encoders = [make_encoder(data, tokenizer, options) for data in configs]
    keys = [json.dumps(encoder.key(), sort_keys=True) for encoder in encoders]
    assert len(set(keys)) == len(keys)
    assert [json.dumps(pickle.loads(pickle.dumps(e)).key(), sort_keys=True) for e in encoders] == keys


def test_documents_of_text_have_no_marks(base: Path) -> None:
    Path("a.txt").write_text("hello\n")
    prepare("a.txt", base / "out", load_tokenizer("bytes"), val_fraction=0)
    assert view_document(load_shards("out"), "train", 0).marked == "hello\n<|endoftext|>"
    assert read_index(base / "out").splits["train"].counted is None


@pytest.mark.parametrize("shard_tokens", [7, 100])
def test_longest_document_spans_shards(base: Path, shard_tokens: int) -> None:
    contents = ["short", "a" * 40, "b" * 15, "", "c" * 24]
    write("texts.jsonl", [{"prompt": "?", "completion": f"{text}!"} for text in contents])
    options = ("--format", "prompt_completion", "--val-fraction", "0", "--shard-tokens", str(shard_tokens))
    run("prepare", "texts.jsonl", "--out", "out", *options)
    assert longest_document(load_shards("out").shards["train"]) == len("?!") + 40 + 1
    assert counted_texts("out", "train") == [f"{text}!<|endoftext|>" for text in contents]
