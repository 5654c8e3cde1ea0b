"""``[data]``: what the model is trained on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field

from kempnerforge.config.data_sources import DataPhaseConfig, DataSourceConfig, Text, normalized
from kempnerforge.config.path_text import expand
from kempnerforge.config.section import Arguments, AtLeastZero, FractionBelowOne, NonEmpty, Section

DataFormat = Literal["text", "prompt_completion", "chat"]
PackingMethod = Literal["contiguous", "best_fit"]


class ValDataConfig(Section):
    """A dataset of your own for validation, instead of a part of data.dataset."""

    dataset: NonEmpty
    """As data.dataset."""

    args: Arguments = Field(default_factory=dict)
    """Keyword arguments of the dataset."""


class DataConfig(Section):
    """What the model is trained on: text, dataset_path, dataset or sources, one of them."""

    text: Text | None = None
    """Text to tokenize at the first start: "python-stdlib" (the sources of Python's standard
    library), or paths and globs of files and folders: text, .jsonl, .parquet, .arrow, and .gz or .zst of
    text and .jsonl."""

    dataset_path: NonEmpty | None = None
    """Prepared tokens: a folder written by `kempnerforge data prepare`, or .npy token shards."""

    dataset: NonEmpty | None = None
    """A dataset of your own, with __len__ and __getitem__: "package.module:attribute", or a name that an
    installed package registers. See docs/guide/own-dataset.md."""

    args: Arguments = Field(default_factory=dict)
    """Keyword arguments of dataset."""

    val: ValDataConfig | None = None
    """A dataset of your own for validation. None means val_fraction of dataset."""

    sources: list[DataSourceConfig] = Field(default_factory=list)
    """Several sources of text or prepared tokens, mixed by weights. See docs/guide/mixtures.md."""

    phases: list[DataPhaseConfig] = Field(default_factory=list)
    """Changes of the weights of the sources, in the order of their steps."""

    tokenizer: NonEmpty = "bytes"
    """Tokenizer for text: "bytes", or the path of a Hugging Face tokenizer.json. Used with text
    only."""

    text_field: NonEmpty = "text"
    """Field of a JSON line, or column of a table, that has the text of a document."""

    document_separator: NonEmpty | None = None
    """Text between the documents of a text file, such as "<|endoftext|>". None: each text file is one
    document."""

    skip_unreadable: bool = False
    """Leave out text that cannot be read (encoding, a damaged file, a missing field), and count and name
    it, instead of refusing it."""

    eos_token: NonEmpty | None = None
    """Token of the tokenizer that ends each document. None: the one that the tokenizer's files name."""

    bos_token: NonEmpty | None = None
    """Token of the tokenizer that begins each document. None: no token does."""

    format: DataFormat = "text"
    """What the files of text have: "text", or records for fine-tuning in JSON Lines, parquet or arrow.
    "prompt_completion": the loss is that of completions. "chat": messages through a chat template, and
    the loss is that of what the assistant says."""

    prompt_field: NonEmpty = "prompt"
    """Field of the prompt, with format = "prompt_completion"."""

    completion_field: NonEmpty = "completion"
    """Field of the completion, with format = "prompt_completion"."""

    messages_field: NonEmpty = "messages"
    """Field of the messages, with format = "chat"."""

    chat_template: NonEmpty | None = None
    """Jinja file of the chat template, with format = "chat". None means the template of the tokenizer: its
    chat_template.jinja, or chat_template in its tokenizer_config.json."""

    cache_dir: NonEmpty | None = None
    """Folder for prepared text and packings, shared by all nodes. None means $XDG_CACHE_HOME/kempnerforge or
    ~/.cache/kempnerforge."""

    val_fraction: FractionBelowOne = 0.01
    """Fraction of the bytes of text, or of the samples of dataset, to hold out for validation. Not
    used with val."""

    document_mask: bool = False
    """Keep attention within documents, and let positions begin at 0 in each. The target after the last
    token of a document counts nothing. Refused for .npy shards and datasets of your own, which do not
    tell where documents end."""

    packing: PackingMethod = "contiguous"
    """How documents become sequences of train.seq_len. "contiguous" cuts the stream of tokens at equal
    distances. "best_fit" cuts only documents that are longer than a sequence, and fills the rest of
    each sequence with tokens that count nothing. Needs what document_mask needs."""

    allow_changed: bool = False
    """Let a run continue although its data differ from the data it started with."""

    num_workers: AtLeastZero = 0
    """Number of processes per rank that read samples of dataset for training. 0 reads them in the rank."""

    prefetch_batches: AtLeastZero = 2
    """Number of batches to read ahead in the background. 0 reads each batch when it is needed. With
    num_workers, each worker reads one more."""

    @property
    def cache_folder(self) -> Path:
        """Folder for prepared text, with ``~`` and ``$VAR`` expanded. Does not create it.

        Raises ConfigError for a variable that is not set.
        """
        if self.cache_dir is not None:
            return expand(self.cache_dir, key="data.cache_dir")
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(base).expanduser() / "kempnerforge"

    def parts(self) -> dict[str, DataConfig]:
        """Return each source as a config of its own, by its key: this one as ``data`` without a mixture."""
        if not self.sources:
            return {"data": self}
        return {
            f"data.sources[{index}]": self.model_copy(
                update={
                    "text": source.text,
                    "dataset_path": source.dataset_path,
                    "sources": [],
                    "phases": [],
                }
            )
            for index, source in enumerate(self.sources)
        }

    def by_source(self) -> dict[str, DataConfig]:
        """Return the config of each source, as ``parts``, by its name; nothing without a mixture."""
        return dict(zip([source.name for source in self.sources], self.parts().values(), strict=False))

    def weights(self) -> dict[int, dict[str, int]]:
        """Return the weights in parts of a million, by the step from which on they are in force, from 0."""
        names = [source.name for source in self.sources]
        weights = {0: normalized({source.name: source.weight for source in self.sources})}
        for phase in self.phases:
            weights[phase.start_step] = normalized(phase.weights)
        return {step: {name: parts.get(name, 0) for name in names} for step, parts in weights.items()}
