"""Tokenizers: plain bytes, or any Hugging Face ``tokenizer.json``.

This module does not import torch, and imports ``tokenizers`` only to load a ``tokenizer.json``.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
BY_OPTION = "an option"
"""The source of a token that the user named."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")

SIBLINGS = (TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.jinja")
"""Files beside a ``tokenizer.json`` that belong to it."""


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of prepared data."""

    eos: str
    """Ends each document."""
    eos_source: str
    """What named it: a file, an option, or the list of well-known tokens."""
    bos: str | None = None
    """Begins each document. None: no token does."""
    bos_id: int | None = None
    unwritten_bos: str | None = None
    """The ``bos_token`` of the tokenizer's files, if none is written."""


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
    def special(self) -> SpecialTokens:
        """The special tokens that are written, and what named them."""
        ...

    @property
    def digest(self) -> str:
        """A digest that changes whenever the same text could give other ids."""
        ...

    def encode(self, text: bytes | str) -> np.ndarray:
        """Return the ids of ``text`` without a separator, uint16 or uint32 [num_tokens].

        Raises :class:`DataError` if it has no ids.
        """
        ...

    @property
    def reads_utf8(self) -> bool:
        """Whether bytes that are not valid UTF-8 are lost (they become U+FFFD)."""
        ...

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Return the ids of every text, as :meth:`encode` does."""
        ...

    def token_bytes(self) -> list[bytes]:
        """Return the UTF-8 bytes that each id stands for, as well as they are known without context."""
        ...

    def decoder(self, context: Sequence[int] = ()) -> TextDecoder:
        """Return a decoder of the ids that follow ``context``."""
        ...

    def files(self) -> dict[str, bytes]:
        """Return the files from which other programs load this tokenizer, by name."""
        ...


@contextlib.contextmanager
def encoding_errors(tokenizer: str) -> Iterator[None]:
    """Turn what the library raises while ``tokenizer`` encodes into :class:`DataError`."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:  # the library raises bare ones, as for a character without a token
            raise
        raise DataError(
            f"tokenizer {tokenizer} cannot encode the text: {error}. Use one that can encode any text, such "
            "as a byte-level one, or give its model an unknown token"
        ) from error


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest little-endian type for all ids: uint16 up to 65,536 ids, else uint32."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class ByteTokenizer:
    """A tokenizer whose ids 0-255 are the bytes. 256 separates documents."""

    name = BYTES
    vocab_size = 257
    separator_id = 256
    reads_utf8 = False
    special = SpecialTokens(BYTES_EOS, "the built-in tokenizer")

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

    def token_bytes(self) -> list[bytes]:
        """Return the byte of each id, and no bytes for the separator."""
        return [*(bytes([byte]) for byte in range(256)), b""]

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

    ``eos`` and ``bos`` are the texts of the tokens that end and begin documents. None: the
    end-of-text token is looked for in the files, and nothing begins a document.

    Raises :class:`DataError` if the file cannot be read, no end-of-text token is found, or a token
    is not in the vocabulary.
    """

    reads_utf8 = True

    def __init__(self, path: Path, *, eos: str | None = None, bos: str | None = None) -> None:
        self.path = path
        raw = _read_tokenizer_file(path)
        self._raw = raw
        self._tokenizer = _parse_tokenizer(path, raw)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"{path}: the tokenizer has an empty vocabulary")
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.special = _special_tokens(path, vocabulary, eos, bos)
        self.separator_id: int = vocabulary[self.special.eos]
        self.name = f"{path.parent.name}/{path.name}" if path.parent.name else path.name
        self.digest: str = xxhash.xxh3_128_hexdigest(raw + b"\0separator %d" % self.separator_id)
        self._dtype = token_dtype(self.vocab_size).newbyteorder("=")

    def encode(self, text: bytes | str) -> np.ndarray:
        """Return the ids of ``text``, uint16 or uint32 [num_tokens]. Invalid UTF-8 becomes U+FFFD."""
        string = text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text
        with encoding_errors(self.name):
            encoding = self._tokenizer.encode(string, add_special_tokens=False)
        return np.asarray(encoding.ids, dtype=self._dtype)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Return the ids of every text, uint16 or uint32 [num_tokens] each, tokenised in parallel."""
        strings = [text.decode("utf-8", errors="replace") for text in texts]
        with encoding_errors(self.name):
            encodings = self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=self._dtype) for encoding in encodings]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_tokenizer"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokenizer = _parse_tokenizer(self.path, self._raw)

    def has_token(self, text: str) -> bool:
        """Return whether ``text`` is one token of the vocabulary."""
        return self._tokenizer.token_to_id(text) is not None

    def token_bytes(self) -> list[bytes]:
        """Return the bytes of each id: exact for byte-level tokenizers that do not normalize."""
        of_character = (
            {char: byte for byte, char in _byte_characters()} if b'"ByteLevel"' in self._raw else {}
        )
        found = [b""] * self.vocab_size
        for token, number in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if of_character and of_character.keys() >= set(token):
                found[number] = bytes(of_character[char] for char in token)
            elif byte := _BYTE_TOKEN.fullmatch(token):
                found[number] = bytes([int(byte[1], 16)])
            else:
                found[number] = token.replace("\u2581", " ").encode()
        return found

    def decoder(self, context: Sequence[int] = ()) -> TextDecoder:
        """Return a decoder of the ids that follow ``context``, which decides on spaces between words."""
        return WindowDecoder(self._tokenizer, context)

    def files(self) -> dict[str, bytes]:
        """Return the file and those that belong to it. Without a ``tokenizer_config.json``, make one.

        It names the tokens that were given as ``eos`` and ``bos``.

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
        files.setdefault(TOKENIZER_CONFIG, _config_bytes(self.special.eos))
        given = {"bos_token": self.special.bos} if self.special.bos is not None else {}
        if self.special.eos_source == BY_OPTION:
            given["eos_token"] = self.special.eos
        if given:
            files[TOKENIZER_CONFIG] = _json_bytes({**json.loads(files[TOKENIZER_CONFIG]), **given})
        return files


def load_tokenizer(spec: str, *, eos: str | None = None, bos: str | None = None) -> Tokenizer:
    """Return the tokenizer of ``spec``: ``"bytes"``, a ``tokenizer.json``, or a folder with one.

    ``eos`` and ``bos``: as for :class:`HfTokenizer`.

    Raises :class:`DataError` if there is no such file, it is not a usable tokenizer, or it has no
    such token.
    """
    path = tokenizer_path(spec)
    if path is not None:
        return HfTokenizer(path, eos=eos, bos=bos)
    for what, token in (("eos", eos), ("bos", bos)):
        if token is not None:
            raise DataError(
                f"{what} token {token!r}: the tokenizer {BYTES} has no tokens with a text; leave out "
                f"data.{what}_token (--{what}-token), or give a tokenizer.json"
            )
    return ByteTokenizer()


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


def _special_tokens(
    path: Path, vocabulary: dict[str, int], eos: str | None, bos: str | None
) -> SpecialTokens:
    for what, token in (("eos", eos), ("bos", bos)):
        if token is not None and token not in vocabulary:
            raise DataError(
                f"{what} token {token!r} (data.{what}_token, --{what}-token) is not in the vocabulary "
                f"of {path}"
            )
    found, source = (eos, BY_OPTION) if eos is not None else _find_eos(path, vocabulary)
    named = _named_token(path, "bos_token")
    unwritten = named[0] if bos is None and named is not None and named[0] in vocabulary else None
    return SpecialTokens(found, source, bos, None if bos is None else vocabulary[bos], unwritten)


def _find_eos(path: Path, vocabulary: dict[str, int]) -> tuple[str, str]:
    """Return the end-of-text token and what named it: a file beside ``path``, else the well-known ones."""
    if named := _named_token(path, "eos_token"):
        token, file = named
        if token not in vocabulary:
            raise DataError(f"{file}: eos_token {token!r} is not in the vocabulary of {path.name}")
        return token, file.name
    for name in EOS_NAMES:
        if name in vocabulary:
            return name, "a well-known name, because no file names one"
    raise DataError(
        f"tokenizer {path}: found no end-of-text token to separate documents with. Name one with "
        "data.eos_token (--eos-token), or put a "
        'tokenizer_config.json with "eos_token" beside it; without one these are tried: '
        + ", ".join(EOS_NAMES)
    )


def _named_token(path: Path, key: str) -> tuple[str, Path] | None:
    """Return the token that the first file beside ``path`` names as ``key``, and that file."""
    for sibling in SIBLINGS[:2]:
        file = path.with_name(sibling)
        named = _token_in(file, key)
        if named is not None:
            return named, file
    return None


def _token_in(path: Path, key: str) -> str | None:
    """Read a token of a tokenizer_config.json: a string, or an object with its text in ``content``."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(settings, dict):
        raise DataError(f"{path}: it is not a JSON object; replace it, or delete it")
    token = settings.get(key)
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
