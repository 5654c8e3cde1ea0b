"""``kempnerforge data``: tokenize text into shards, and inspect shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kempnerforge.data.corpus import PYTHON_STDLIB
from kempnerforge.data.index import Index
from kempnerforge.data.prepare import SHARD_TOKENS
from kempnerforge.data.prepare import prepare as prepare_text
from kempnerforge.data.tokenizer import BYTES, load_tokenizer
from kempnerforge.data.tokens import TokenDataset, load_shards

EXIT_DAMAGED = 1

app = typer.Typer(help="Tokenize text into shards, and inspect shards.", no_args_is_help=True)


@app.command()
def prepare(
    text: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT...",
            help=f'Text files, folders, globs such as "notes/**/*.md", or {PYTHON_STDLIB}.',
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to create. It must be empty or not exist.")],
    tokenizer: Annotated[
        str, typer.Option(metavar=f"{BYTES}|FILE", help="Built-in bytes, or a Hugging Face tokenizer.json.")
    ] = BYTES,
    val_fraction: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Fraction of the documents to hold out for validation.")
    ] = 0.01,
    shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens per shard.")] = SHARD_TOKENS,
) -> None:
    """Tokenize text into shards for training."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("tokenizing", total=None)
        index = prepare_text(
            text,
            out,
            load_tokenizer(tokenizer),
            val_fraction=val_fraction,
            shard_tokens=shard_tokens,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for line in _summary(index, out):
        typer.echo(line)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A prepared folder, or .npy token shards.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the contents of token shards and verify every byte. Exit status 1 if a shard is corrupt."""
    dataset = load_shards(folder)
    facts = _facts(dataset)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print_facts(facts)
    if not facts["sound"]:
        raise typer.Exit(EXIT_DAMAGED)


def _summary(index: Index, out: Path) -> list[str]:
    lines = [
        f"{name}: {split.tokens:,} tokens, {split.documents:,} documents, shards: {len(split.shards)}"
        for name, split in index.splits.items()
    ]
    left_out = [
        f"{count:,} {what}"
        for count, what in (
            (index.num_empty, "empty files skipped"),
            (index.num_binary, "binary files skipped"),
            (index.num_not_utf8, "documents that are not UTF-8, invalid bytes replaced"),
        )
        if count
    ]
    if left_out:
        lines.append(", ".join(left_out))
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
        "tokens": {
            name: sum(shard.num_tokens for shard in entries) for name, entries in dataset.shards.items()
        },
        "shards": shards,
    }


def _print_facts(facts: dict[str, Any]) -> None:
    console = Console()
    for name in ("path", "tokenizer", "vocab_size", "separator_id", "digest"):
        if facts[name] is not None:
            console.print(f"{name}: {facts[name]}", highlight=False, markup=False, soft_wrap=True)
    table = Table("split", "file", "dtype", "tokens", "check")
    for shard in facts["shards"]:
        check = "corrupt" if shard["problem"] else "ok"
        table.add_row(shard["split"], escape(shard["file"]), shard["dtype"], f"{shard['tokens']:,}", check)
    for split, tokens in facts["tokens"].items():
        documents = f"{facts['documents'][split]:,} documents" if facts["documents"] else ""
        table.add_row(split, "all", "", f"{tokens:,}", documents)
    console.print(table)
    for shard in facts["shards"]:
        if shard["problem"]:
            console.print(shard["problem"], highlight=False, markup=False, soft_wrap=True)
