"""Tokenizers: plain bytes, or any Hugging Face ``tokenizer.json``.

This module does not import torch, and imports ``tokenizers`` only to load a ``tokenizer.json``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import xxhash

from kempnerforge.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as TokenizersTokenizer

BYTES = "bytes"
"""The name of the built-in byte tokenizer."""

EOS_NAMES = (
    "<|end_of_text|>",
    "<|endoftext|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<|eot_id|>",
    "<|im_end|>",
    "[EOS]",
)
"""End-of-text tokens of well-known models, tried in this order when no file names one."""


class Tokenizer(Protocol):
    """The interface that :mod:`kempnerforge.data.prepare` needs."""

    @property
    def name(self) -> str:
        """Short name for display."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def separator_id(self) -> int:
        """The id written after every document."""
        ...

    @property
    def digest(self) -> str:
        """A digest that changes whenever the same text could give other ids."""
        ...

    def encode(self, text: bytes | str) -> np.ndarray:
        """Return the ids of ``text`` without a separator, uint16 or uint32 [num_tokens]."""
        ...

    @property
    def reads_utf8(self) -> bool:
        """Whether bytes that are not valid UTF-8 are lost (they become U+FFFD)."""
        ...

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Return the ids of every text, as :meth:`encode` does."""
        ...


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest little-endian type for all ids: uint16 up to 65,536 ids, else uint32."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class ByteTokenizer:
    """A tokenizer whose ids 0-255 are the bytes. 256 separates documents."""

    name = BYTES
    vocab_size = 257
    separator_id = 256
    reads_utf8 = False

    @property
    def digest(self) -> str:
        """A constant, because the ids never change."""
        return xxhash.xxh3_128_hexdigest(b"kempnerforge bytes 1")

    def encode(self, text: bytes | str) -> np.ndarray:
        """Return the ids of ``text``, uint16 [num_bytes]. A str is encoded as UTF-8."""
        raw = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(raw, dtype=np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Return the ids of every text, uint16 [num_bytes] each."""
        return [self.encode(text) for text in texts]


class HfTokenizer:
    """A Hugging Face fast tokenizer from its ``tokenizer.json``.

    It adds no special tokens, ignores the truncation and padding settings of the file, and encodes
    special tokens in the text as plain text: only :mod:`~kempnerforge.data.prepare` writes
    separators.

    Raises :class:`DataError` if the file cannot be read or no end-of-text token is found.
    """

    reads_utf8 = True

    def __init__(self, path: Path) -> None:
        self.path = path
        raw = _read_tokenizer_file(path)
        self._tokenizer = _parse_tokenizer(path, raw)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"{path}: the tokenizer has an empty vocabulary")
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.separator_id: int = vocabulary[_find_eos(path, vocabulary)]
        self.name = f"{path.parent.name}/{path.name}" if path.parent.name else path.name
        self.digest: str = xxhash.xxh3_128_hexdigest(raw + b"\0separator %d" % self.separator_id)
        self._dtype = token_dtype(self.vocab_size).newbyteorder("=")

    def encode(self, text: bytes | str) -> np.ndarray:
        """Return the ids of ``text``, uint16 or uint32 [num_tokens]. Invalid UTF-8 becomes U+FFFD."""
        string = text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text
        return np.asarray(self._tokenizer.encode(string, add_special_tokens=False).ids, dtype=self._dtype)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Return the ids of every text, uint16 or uint32 [num_tokens] each, tokenised in parallel."""
        strings = [text.decode("utf-8", errors="replace") for text in texts]
        encodings = self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=self._dtype) for encoding in encodings]


def load_tokenizer(spec: str) -> Tokenizer:
    """Return the tokenizer of ``spec``: ``"bytes"``, a ``tokenizer.json``, or a folder with one.

    Raises :class:`DataError` if there is no such file or it is not a usable tokenizer.
    """
    path = tokenizer_path(spec)
    return ByteTokenizer() if path is None else HfTokenizer(path)


def tokenizer_path(spec: str) -> Path | None:
    """Return the tokenizer file of ``spec``, which need not exist, or None for ``"bytes"``."""
    if spec == BYTES:
        return None
    path = Path(spec).expanduser()
    return path / "tokenizer.json" if path.is_dir() else path


def _read_tokenizer_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"tokenizer {path}: no such file. Give the path of a Hugging Face tokenizer.json, "
            f'or "{BYTES}" for the built-in byte tokenizer'
        ) from None
    except OSError as error:
        raise DataError(f"tokenizer {path}: cannot be read: {error.strerror}") from error


def _parse_tokenizer(path: Path, raw: bytes) -> TokenizersTokenizer:
    from tokenizers import Tokenizer as TokenizersTokenizer

    try:
        tokenizer = TokenizersTokenizer.from_buffer(raw)
    except Exception as error:  # the library raises bare Exception for any bad file
        raise DataError(f"tokenizer {path}: not a Hugging Face tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _find_eos(path: Path, vocabulary: dict[str, int]) -> str:
    """Return the end-of-text token that a file beside ``path`` names, else the first well-known one."""
    for sibling in ("tokenizer_config.json", "special_tokens_map.json"):
        named = _named_eos(path.with_name(sibling))
        if named is None:
            continue
        if named not in vocabulary:
            raise DataError(
                f"{path.with_name(sibling)}: eos_token {named!r} is not in the vocabulary of {path.name}"
            )
        return named
    for name in EOS_NAMES:
        if name in vocabulary:
            return name
    raise DataError(
        f"tokenizer {path}: found no end-of-text token to separate documents with. Put a "
        'tokenizer_config.json with "eos_token" beside it; without one these are tried: '
        + ", ".join(EOS_NAMES)
    )


def _named_eos(path: Path) -> str | None:
    """Read ``eos_token`` of a tokenizer_config.json: a string, or an object with its text in ``content``."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error
    eos = settings.get("eos_token") if isinstance(settings, dict) else None
    if isinstance(eos, dict):
        eos = eos.get("content")
    return eos if isinstance(eos, str) else None
