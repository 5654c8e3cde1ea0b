"""``kempnerforge data``: tokenize text into shards, and inspect shards."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from kempnerforge.config.data import DataConfig, DataFormat
from kempnerforge.config.rules import format_fits_data
from kempnerforge.data.document_view import DocumentView, longest_document, view_document
from kempnerforge.data.index import Index, SplitEntry
from kempnerforge.data.prepare import SHARD_TOKENS
from kempnerforge.data.prepare import prepare as prepare_text
from kempnerforge.data.prepare_progress import OnProgress, Progress, plain_lines
from kempnerforge.data.reading.files import PYTHON_STDLIB
from kempnerforge.data.reading.options import ReadOptions
from kempnerforge.data.record_encoder import make_encoder
from kempnerforge.data.tokenizer import BYTES, load_tokenizer
from kempnerforge.data.tokens import TokenDataset, load_shards
from kempnerforge.errors import ConfigError
from kempnerforge.printable import printable

EXIT_DAMAGED = 1

EXAMPLE_TOKENS = 400
"""So many tokens of the first record are shown after records were prepared."""

app = typer.Typer(help="Tokenize text into shards, and inspect shards.", no_args_is_help=True)


FormatOption = Annotated[
    DataFormat,
    typer.Option(
        help="What the files have: text, or records for fine-tuning with a prompt and a completion, or "
        "with the messages of a chat."
    ),
]
ChatTemplateOption = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Jinja file of the chat template. Default: the tokenizer's own."),
]


@app.command()
def prepare(
    context: typer.Context,
    text: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT...",
            help=f'Files, folders, globs such as "notes/**/*.md", or {PYTHON_STDLIB}. Files are text, '
            ".jsonl, .parquet, .arrow, or .gz or .zst of text and .jsonl.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to create. It must be empty or not exist.")],
    tokenizer: Annotated[
        str, typer.Option(metavar=f"{BYTES}|FILE", help="Built-in bytes, or a Hugging Face tokenizer.json.")
    ] = BYTES,
    format: FormatOption = "text",
    prompt_field: Annotated[str, typer.Option(help="Field of the prompt.")] = "prompt",
    completion_field: Annotated[str, typer.Option(help="Field of the completion.")] = "completion",
    messages_field: Annotated[str, typer.Option(help="Field of the messages.")] = "messages",
    chat_template: ChatTemplateOption = None,
    text_field: Annotated[
        str, typer.Option(help="Field of a JSON line, or column of a table, that has the text.")
    ] = "text",
    document_separator: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help='Text between the documents of a text file, such as "<|endoftext|>". '
            "Without it, each text file is one document.",
        ),
    ] = None,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out, count and name text that cannot be read.")
    ] = False,
    eos_token: Annotated[
        str | None,
        typer.Option(metavar="TOKEN", help="Token that ends each document. Default: the tokenizer's own."),
    ] = None,
    bos_token: Annotated[
        str | None, typer.Option(metavar="TOKEN", help="Token that begins each document. Default: none.")
    ] = None,
    val_fraction: Annotated[
        float,
        typer.Option(min=0.0, max=0.99, help="Fraction of the text to hold out for validation."),
    ] = 0.01,
    shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens per shard.")] = SHARD_TOKENS,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that tokenize. Default: one for each processor.")
    ] = None,
) -> None:
    """Tokenize text into shards for training. After a kill, the same command goes on."""
    data = _data_config(context.params)
    options = ReadOptions(text_field, document_separator, skip_unreadable)
    with _progress() as progress:
        index = prepare_text(
            text,
            out,
            load_tokenizer(tokenizer, eos=eos_token, bos=bos_token),
            options=options,
            make_encoder=functools.partial(make_encoder, data),
            val_fraction=val_fraction,
            shard_tokens=shard_tokens,
            workers=workers,
            progress=progress,
        )
    for line in _summary(index, out):
        typer.echo(line)
    if format != "text":
        _print_document(view_document(load_shards(out), "train", 0, max_tokens=EXAMPLE_TOKENS))


def _data_config(options: dict[str, Any]) -> DataConfig:
    """Return the options that are keys of ``[data]`` too. Raises ConfigError for a contradiction."""
    data = DataConfig(**{name: value for name, value in options.items() if name in DataConfig.model_fields})
    if faults := format_fits_data(data):
        raise ConfigError(faults)
    return data


@contextlib.contextmanager
def _progress() -> Iterator[OnProgress]:
    """Show a bar with the rate on a terminal, and a line now and then elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield plain_lines(lambda line: typer.echo(line, err=True))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with ProgressBar(*columns, TextColumn("{task.fields[rate]}"), console=console, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def show(progress: Progress) -> None:
            if progress.activity not in tasks:
                tasks[progress.activity] = bar.add_task(progress.activity, total=None, rate="")
            bar.update(
                tasks[progress.activity],
                completed=progress.done_bytes,
                total=progress.total_bytes or None,
                rate=progress.rate,
            )

        yield show


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A prepared folder, or .npy token shards.")],
    sample: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", help="Show document N, from 0, and which of its tokens count, and no more."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of --sample: train or val.")] = "train",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the contents of token shards and verify every byte. Exit status 1 if a shard is corrupt."""
    dataset = load_shards(folder)
    if sample is not None:
        view = view_document(dataset, split, sample)
        if as_json:
            typer.echo(json.dumps(view.facts(), indent=2))
        else:
            _print_document(view)
        return
    facts = _facts(dataset)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print_facts(facts, dataset.index)
    if not facts["sound"]:
        raise typer.Exit(EXIT_DAMAGED)


def _print_document(view: DocumentView) -> None:
    for line in view.lines():
        typer.echo(printable(line, lines=True))


def _summary(index: Index, out: Path) -> list[str]:
    lines = [
        f"{name}: {split.tokens:,} tokens{_counted(split)}, {split.documents:,} documents, "
        f"shards: {len(split.shards)}"
        for name, split in index.splits.items()
    ]
    lines += [f"{name}: {value}" for name, value in _text_facts(index).items()]
    lines += _notes(index)
    if "val" not in index.splits:
        lines.append("no validation split: set eval.interval = 0 in the config")
    return [
        *lines,
        "Add this to your config to train on it:",
        "  [data]",
        f"  dataset_path = {json.dumps(str(out.resolve()), ensure_ascii=False)}",
        "  [model]",
        f"  vocab_size = {index.vocab_size}  # or more",
    ]


def _counted(split: SplitEntry) -> str:
    if split.counted is None:
        return ""
    return f" ({split.counted:,} count as targets, {split.counted / split.tokens:.1%})"


def _text_facts(index: Index) -> dict[str, str]:
    """Return how the text was read, and the tokens around documents. Nothing for format 1."""
    text = index.text
    if text.eos_token is None:
        return {"tokenizer": index.tokenizer}
    bos = "none"
    if text.bos_token is not None:
        bos = f"{text.bos_token} (id {text.bos_id})"
    elif text.unwritten_bos is not None:
        bos = (
            f"none, although the tokenizer has {text.unwritten_bos}; to begin each document with it, add "
            f'--bos-token "{text.unwritten_bos}"'
        )
    separator = text.document_separator
    facts = {
        "format": text.format,
        "tokenizer": index.tokenizer,
        "eos": f"{text.eos_token} (id {index.separator_id}), named by {text.eos_source}",
        "bos": bos,
        "document separator": "none, a text file is one document" if separator is None else repr(separator),
    }
    if text.format != "text":
        del facts["document separator"]
    if text.format == "chat":
        del facts["bos"]
        facts["eos"] += "; conversations begin and end as the chat template writes them"
    sizes = {name: split.text_bytes or 0 for name, split in index.splits.items()}
    if "val" in sizes:
        share = sizes["val"] / sum(sizes.values())
        facts["held out"] = f"{share:.3%} of the text, for {index.val_fraction:g} asked"
    return facts


def _notes(index: Index) -> list[str]:
    """Return how tokens were made, what was left out, and the warnings."""
    warnings = [f"warning: {warning}" for warning in index.text.warnings]
    return [*index.text.notes, *index.passed_over.lines(), *index.unreadable.lines(), *warnings]


def _facts(dataset: TokenDataset) -> dict[str, Any]:
    problems = dataset.problems(contents=True)
    index = dataset.index
    shards = [
        {
            "split": split,
            "file": shard.path.name,
            "dtype": shard.dtype.name,
            "tokens": shard.num_tokens,
            "problem": problems.get(shard.path),
        }
        for split, entries in dataset.shards.items()
        for shard in entries
    ]
    return {
        "path": str(dataset.path),
        "sound": not problems,
        "vocab_size": dataset.vocab_size,
        "tokenizer": index.tokenizer if index else None,
        "separator_id": index.separator_id if index else None,
        "digest": None if problems else dataset.digest,
        "documents": {name: split.documents for name, split in index.splits.items()} if index else None,
        "longest_document": {
            split: None if problems else longest_document(entries)
            for split, entries in dataset.shards.items()
        },
        "counted": {name: split.counted for name, split in index.splits.items()} if index else None,
        "tokens": {
            name: sum(shard.num_tokens for shard in entries) for name, entries in dataset.shards.items()
        },
        "text": asdict(index.text) if index else None,
        "passed_over": asdict(index.passed_over) if index else None,
        "unreadable": asdict(index.unreadable) if index else None,
        "shards": shards,
    }


def _print_facts(facts: dict[str, Any], index: Index | None) -> None:
    console = Console()
    shown = {name: facts[name] for name in ("path", "vocab_size", "separator_id", "digest")}
    shown |= _text_facts(index) if index else {}
    lines = [f"{name}: {value}" for name, value in shown.items() if value is not None]
    for line in [*lines, *(_notes(index) if index else [])]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    table = Table("split", "file", "dtype", "tokens", "check")
    for shard in facts["shards"]:
        check = "corrupt" if shard["problem"] else "ok"
        table.add_row(shard["split"], escape(shard["file"]), shard["dtype"], f"{shard['tokens']:,}", check)
    for split, tokens in facts["tokens"].items():
        documents = f"{facts['documents'][split]:,} documents" if facts["documents"] else ""
        table.add_row(split, "all", "", f"{tokens:,}", documents)
    console.print(table)
    for split, entry in index.splits.items() if index else ():
        longest = facts["longest_document"][split]
        if longest is not None:
            line = f"{split}: {entry.tokens:,} tokens{_counted(entry)}, {longest:,} in the longest document"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    for shard in facts["shards"]:
        if shard["problem"]:
            console.print(shard["problem"], highlight=False, markup=False, soft_wrap=True)
