"""``[data]``: what the model is trained on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field

from kempnerforge.config.section import AtLeastZero, FractionBelowOne, NonEmpty, Section


class DataConfig(Section):
    """What the model is trained on: either text or dataset_path."""

    text: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)] | None = None
    """Text to prepare at the first start: "python-stdlib" (the sources of Python's standard library),
    or paths and globs of text files."""

    dataset_path: NonEmpty | None = None
    """Prepared tokens: a folder that `kempnerforge data prepare` wrote, or .npy token shards."""

    tokenizer: NonEmpty = "bytes"
    """How text becomes tokens: "bytes", or the path of a Hugging Face tokenizer.json. Only read with
    text."""

    cache_dir: NonEmpty | None = None
    """Where prepared text is kept, shared by all nodes; none means $XDG_CACHE_HOME/kempnerforge or
    ~/.cache/kempnerforge."""

    val_fraction: FractionBelowOne = 0.01
    """Share of the text that is held out for validation."""

    allow_changed: bool = False
    """Let a run go on although its data differ from those it started with."""

    prefetch_batches: AtLeastZero = 2
    """Batches that are read ahead in the background; 0 reads each when it is needed."""

    @property
    def cache_folder(self) -> Path:
        """Where prepared text is kept, ``~`` expanded. Does not create it."""
        if self.cache_dir is not None:
            return Path(self.cache_dir).expanduser()
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(base).expanduser() / "kempnerforge"
