"""``[data]``: what the model is trained on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field

from kempnerforge.config.section import AtLeastZero, FractionBelowOne, NonEmpty, Section


class DataConfig(Section):
    """What the model is trained on: text or dataset_path, not both."""

    text: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)] | None = None
    """Text to tokenize at the first start: "python-stdlib" (the sources of Python's standard
    library), or paths and globs of text files."""

    dataset_path: NonEmpty | None = None
    """Prepared tokens: a folder written by `kempnerforge data prepare`, or .npy token shards."""

    tokenizer: NonEmpty = "bytes"
    """Tokenizer for text: "bytes", or the path of a Hugging Face tokenizer.json. Not used with
    dataset_path."""

    cache_dir: NonEmpty | None = None
    """Folder for prepared text, shared by all nodes. None means $XDG_CACHE_HOME/kempnerforge or
    ~/.cache/kempnerforge."""

    val_fraction: FractionBelowOne = 0.01
    """Fraction of the text to hold out for validation."""

    allow_changed: bool = False
    """Let a run continue although its data differ from the data it started with."""

    prefetch_batches: AtLeastZero = 2
    """Number of batches to read ahead in the background. 0 reads each batch when it is needed."""

    @property
    def cache_folder(self) -> Path:
        """Folder for prepared text, with ``~`` expanded. Does not create it."""
        if self.cache_dir is not None:
            return Path(self.cache_dir).expanduser()
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(base).expanduser() / "kempnerforge"
