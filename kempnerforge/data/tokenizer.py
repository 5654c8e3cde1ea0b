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

from kempnerforge.config.path_text import expand
from kempnerforge.data.text_decoder import ByteDecoder, TextDecoder, WindowDecoder
from kempnerforge.errors import DataError
from kempnerforge.fsio import GIT_LFS_POINTER

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

BYTES_EOS = "<|endoftext|>"
"""The separator of the byte tokenizer in the files that it exports."""

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SIBLINGS = (TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.jinja")
"""Files beside a ``tokenizer.json`` that belong to it."""


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

    def decoder(self, context: Sequence[int] = ()) -> TextDecoder:
        """Return a decoder of the ids that follow ``context``."""
        ...

    def files(self) -> dict[str, bytes]:
        """Return the files from which other programs load this tokenizer, by name."""
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

    def decoder(self, context: Sequence[int] = ()) -> TextDecoder:
        """Return a decoder of bytes. ``context`` changes nothing."""
        return ByteDecoder()

    def files(self) -> dict[str, bytes]:
        """Return a ``tokenizer.json`` with the same ids, and its ``tokenizer_config.json``.

        There, the separator is the special token ``BYTES_EOS``, and is put before every text, as it
        stands before every document in training.
        """
        special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        }
        separator = {"SpecialToken": {"id": BYTES_EOS, "type_id": 0}}
        body = {
            "version": "1.0",
            "added_tokens": [{"id": self.separator_id, "content": BYTES_EOS, **special, "special": True}],
            "pre_tokenizer": byte_level,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [separator, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [separator, *({"Sequence": {"id": name, "type_id": 0}} for name in "AB")],
                "special_tokens": {
                    BYTES_EOS: {"id": BYTES_EOS, "ids": [self.separator_id], "tokens": [BYTES_EOS]}
                },
            },
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "vocab": {char: byte for byte, char in _byte_characters()},
                "merges": [],
            },
        }
        return {TOKENIZER: _json_bytes(body), TOKENIZER_CONFIG: _config_bytes(BYTES_EOS, bos=BYTES_EOS)}


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
        self._raw = raw
        self._tokenizer = _parse_tokenizer(path, raw)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"{path}: the tokenizer has an empty vocabulary")
        self.vocab_size: int = max(vocabulary.values()) + 1
        self._eos = _find_eos(path, vocabulary)
        self.separator_id: int = vocabulary[self._eos]
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

    def decoder(self, context: Sequence[int] = ()) -> TextDecoder:
        """Return a decoder of the ids that follow ``context``, which decides on spaces between words."""
        return WindowDecoder(self._tokenizer, context)

    def files(self) -> dict[str, bytes]:
        """Return the file and those that belong to it. Without a ``tokenizer_config.json``, make one.

        Raises :class:`DataError` if one of them cannot be read.
        """
        files = {TOKENIZER: self._raw}
        for name in SIBLINGS:
            try:
                files[name] = self.path.with_name(name).read_bytes()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise DataError(f"{self.path.with_name(name)}: cannot be read: {error.strerror}") from error
        return {TOKENIZER_CONFIG: _config_bytes(self._eos), **files}


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
    path = expand(spec, key="data.tokenizer")
    return path / TOKENIZER if path.is_dir() else path


def _byte_characters() -> list[tuple[int, str]]:
    """Return the character that stands for each byte in byte-level tokenizers, as GPT-2 defined them."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return [(byte, chr(byte) if byte in shown else chr(256 + hidden.index(byte))) for byte in range(256)]


def _config_bytes(eos: str, *, bos: str | None = None) -> bytes:
    """Return a ``tokenizer_config.json`` that names the special tokens."""
    names = {"bos_token": bos} if bos else {}
    return _json_bytes({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, **names})


def _json_bytes(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=2, ensure_ascii=False) + "\n").encode()


def _read_tokenizer_file(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"tokenizer {path}: no such file. Give the path of a Hugging Face tokenizer.json, "
            f'or "{BYTES}" for the built-in byte tokenizer'
        ) from None
    except OSError as error:
        raise DataError(f"tokenizer {path}: cannot be read: {error.strerror}") from error
    if raw.startswith(GIT_LFS_POINTER):
        raise DataError(f"{path} is a git-lfs pointer, not the file itself: run git lfs pull in its folder")
    return raw


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
    for sibling in SIBLINGS[:2]:
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
