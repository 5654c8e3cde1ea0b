"""Fine-tuning data: turn a record into token ids, and mark those that count in the loss.

Two formats. ``prompt_completion``: a prompt and the completion to learn. ``chat``: messages, through
the chat template of a tokenizer. Only completions and what the assistant says count. This module does
not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np

from kempnerforge.data.chat_template import TEMPLATE_FILE, Spans, load_templates
from kempnerforge.data.index import json_digest
from kempnerforge.data.record_fields import (
    RecordError,
    check_encodable,
    read_messages,
    read_text,
    read_tools,
    strings_in,
)
from kempnerforge.data.tokenizer import BYTES, TOKENIZER, Tokenizer, encoding_errors, token_dtype
from kempnerforge.errors import DataError

MAX_TOKENIZED_BYTES = 512 << 10
"""Longest text of a record. It is tokenized as a whole, which needs up to 350 times its size in memory."""

MAX_RENDERED_SIZE = 4 * MAX_TOKENIZED_BYTES
"""Characters of the longest texts of a record that a chat template is given."""

ANCHORS = ("\n", ":", ".", "0")
"""Texts before a completion that keep a tokenizer from treating it as the beginning of a text."""


@dataclass(frozen=True)
class Conversation:
    """One record as tokens."""

    ids: np.ndarray
    """Token ids, uint16 or uint32 [num_tokens]."""
    counted: np.ndarray
    """1 for a token that counts as a target, else 0: uint8 [num_tokens]. The first token has nothing
    before it, so it never counts."""
    content: bytes
    """The text that the tokens stand for, as UTF-8."""
    special: tuple[str, ...]
    """The texts of special tokens that are in texts of the record, each once."""


class RecordFormat(Protocol):
    """How records become tokens."""

    @property
    def name(self) -> str:
        """As data.format."""
        ...

    @property
    def special_text(self) -> str:
        """What happens to the texts of special tokens in a record."""
        ...

    @property
    def digest(self) -> str:
        """A digest that changes whenever the same record could give other tokens."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about the format, a line each."""
        ...

    def files(self) -> dict[str, bytes]:
        """Return files of the tokenizer that are not its own, by name."""
        ...

    def encode(self, record: Mapping[str, Any]) -> Conversation:
        """Return the tokens of one record.

        Raises :class:`RecordError` if it is not of this format, and :class:`DataError` if the tokenizer
        cannot encode it.
        """
        ...


class PromptCompletion:
    """Records with a prompt and a completion.

    Both are plain text, and are tokenized apart, as axolotl does: the prompt then has the ids that
    ``generate`` gives it, and no token belongs to both. (TRL tokenizes them together and warns where
    the prompt's ids change.) The tokenizer's separator follows the completion and counts, and its BOS, if
    one is to be written, stands before the prompt.
    """

    name = "prompt_completion"
    special_text = 'it is plain text here. For conversations, use the format "chat"'
    notes = ()

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_field: str = "prompt",
        completion_field: str = "completion",
    ) -> None:
        self._tokenizer = tokenizer
        self._prompt_field = prompt_field
        self._completion_field = completion_field
        bos_id = tokenizer.special.bos_id
        self._bos = [] if bos_id is None else [bos_id]
        self._special = _special_pattern(tokenizer)
        self._begins_texts = _begins_texts(tokenizer)

    @property
    def digest(self) -> str:
        """A digest of the tokenizer, the fields and BOS."""
        fields = [self._prompt_field, self._completion_field]
        return json_digest(["prompt_completion 1", self._tokenizer.digest, *fields, self._bos])

    def files(self) -> dict[str, bytes]:
        """Return no files."""
        return {}

    def encode(self, record: Mapping[str, Any]) -> Conversation:
        """Return the tokens of one record."""
        prompt = read_text(record, self._prompt_field, "--prompt-field")
        completion = read_text(record, self._completion_field, "--completion-field")
        if not completion:
            raise RecordError(f"field {self._completion_field!r} is empty, so there is nothing to learn")
        content = f"{prompt}\0{completion}".encode()
        _check_length(len(content) - 1)
        before = [*self._bos, *self._encode(prompt)]
        after = self._continuation(completion) if prompt else self._encode(completion)
        after.append(self._tokenizer.separator_id)
        ids = np.array([*before, *after], dtype=token_dtype(self._tokenizer.vocab_size))
        counted = np.repeat(np.array([0, 1], dtype=np.uint8), [len(before), len(after)])
        counted[0] = 0
        return Conversation(ids, counted, content, _matches(self._special, (prompt, completion)))

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode_batch([text.encode()])[0].tolist()

    def _continuation(self, text: str) -> list[int]:
        """Return the ids of ``text`` as it follows other text, without a space that begins a text."""
        if not self._begins_texts:
            return self._encode(text)
        for anchor in ANCHORS:
            ids = _ids_after(self._tokenizer, anchor, text)
            if ids is not None:
                return ids
        self._encode(text)  # raises, if that is why
        raise RecordError(
            f"field {self._completion_field!r} cannot be tokenized as the continuation of a prompt",
            f"tokenizer {self._tokenizer.name} joins its beginning with whatever stands before it",
        )


class Chat:
    """Records with messages, through a chat template.

    The text of a conversation is tokenized as a whole, special tokens as such, as by
    ``apply_chat_template`` of transformers. No separator is added: the template writes what ends it.

    Raises :class:`DataError` if the tokenizer has no chat template, or an unusable one, or a BOS is to be
    written, which templates do themselves.
    """

    name = "chat"
    special_text = "it becomes the special token, as in transformers"

    def __init__(
        self, tokenizer: Tokenizer, *, messages_field: str = "messages", chat_template: str | None = None
    ) -> None:
        if tokenizer.name == BYTES:
            raise DataError(
                'data.format = "chat" (--format chat) needs a chat template, and the tokenizer "bytes" has '
                "none. Set data.tokenizer (--tokenizer) to a Hugging Face tokenizer.json, "
                'or use the format "prompt_completion"'
            )
        if tokenizer.special.bos is not None:
            raise DataError(
                "data.bos_token (--bos-token) has no effect on chats: the chat template writes the token "
                "that begins a conversation. Leave it out"
            )
        self._tokenizer = tokenizer
        self._messages_field = messages_field
        self._encoder = _RenderedText(tokenizer)
        self._special = _special_pattern(tokenizer)
        self._is_own = chat_template is None
        self._templates = load_templates(
            tokenizer.files(), tokenizer.name, chat_template, special=_special_texts(tokenizer)
        )

    @property
    def digest(self) -> str:
        """A digest of the tokenizer, its special tokens, the field and the templates."""
        templates = {name: [each.source, each.variables] for name, each in self._templates.items()}
        return json_digest(["chat 1", self._tokenizer.digest, self._messages_field, templates])

    @property
    def notes(self) -> tuple[str, ...]:
        """What the template does that a user should know."""
        template = self._templates["default"]
        how = "its {% generation %} blocks" if template.marks_answers else "what follows the messages before"
        notes = [f"chat template {template.name}: answers are {how}"]
        if template.uses_date:
            from kempnerforge.data.template_environment import TEMPLATE_DATE

            notes.append(
                f"the chat template asks for the date and was given {TEMPLATE_DATE:%d %b %Y}, "
                "so that the data are the same on every day"
            )
        return tuple(notes)

    def files(self) -> dict[str, bytes]:
        """Return the template that was used, unless it is the tokenizer's own."""
        return {} if self._is_own else {TEMPLATE_FILE: self._templates["default"].source.encode()}

    def encode(self, record: Mapping[str, Any]) -> Conversation:
        """Return the tokens of one record."""
        messages = read_messages(record, self._messages_field)
        tools = read_tools(record)
        # It is rendered several times. A template may leave out a part of it.
        _check_length(sum(map(len, strings_in([messages, tools]))), MAX_RENDERED_SIZE, "characters")
        template = self._templates["default"]
        if tools is not None:
            template = self._templates.get("tool_use", template)
        text, answers = template.find_answers(messages, tools=tools)
        if not answers:
            raise RecordError(
                f"the chat template {template.name} marks no text of this conversation with "
                "{% generation %}, so there is nothing to learn"
            )
        content = check_encodable(text, "the text of the conversation").encode()
        _check_length(len(content))
        ids, spans = self._encoder.encode(text)
        counted = _overlapping(spans, _weighted(answers, messages))
        counted[:1] = 0
        return Conversation(ids, counted, content, _matches(self._special, strings_in(messages)))


def _check_length(size: int, most: int = MAX_TOKENIZED_BYTES, unit: str = "bytes") -> None:
    """Raise :class:`RecordError` for a record whose text is too long to be tokenized."""
    if size > most:
        limit = MAX_TOKENIZED_BYTES >> 10
        raise RecordError("too long", f"its text has {size:,} {unit}; at most {limit} KiB are tokenized")


class _RenderedText:
    """Tokenizes rendered conversations: special tokens as such, with the characters of each token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from tokenizers import Tokenizer as TokenizersTokenizer
        from tokenizers import processors

        self._tokenizer = TokenizersTokenizer.from_buffer(tokenizer.files()[TOKENIZER])
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = False
        # Without it, no token is added, and no white space is cut from the characters of a token.
        self._tokenizer.post_processor = processors.Sequence([])
        self._name = tokenizer.name
        self._dtype = token_dtype(tokenizer.vocab_size)

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return ids [num_tokens], and the characters of each, [start, end): int64 [num_tokens, 2]."""
        with encoding_errors(self._name):
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=self._dtype)
        # encoding.offsets is a list of tuples, with 130 bytes for each token.
        spans = map(encoding.token_to_chars, range(ids.size))
        numbers = chain.from_iterable(spans)  # type: ignore[arg-type]  # None is for tokens beyond the last
        return ids, np.fromiter(numbers, dtype=np.int64, count=2 * ids.size).reshape(-1, 2)


def _overlapping(tokens: np.ndarray, answers: Spans) -> np.ndarray:
    """Return 1 for each token that has a character of an answer, else 0: uint8 [num_tokens].

    A token without characters has the place at which it stands. ``tokens`` is int64 [num_tokens, 2].
    """
    starts, ends = tokens[:, 0], np.maximum(tokens[:, 1], tokens[:, 0] + 1)
    counted = np.zeros(len(tokens), dtype=np.uint8)
    for start, end in answers:
        counted[(starts < end) & (ends > start)] = 1
    return counted


def _weighted(answers: Spans, messages: Iterable[Mapping[str, Any]]) -> Spans:
    """Leave out the answers of messages with the weight 0."""
    kept = [message.get("weight") != 0 for message in messages if message["role"] == "assistant"]
    if all(kept):
        return answers
    if not any(kept):
        raise RecordError("every message of the assistant has the weight 0, so there is nothing to learn")
    if len(answers) != len(kept):
        raise RecordError(
            "weights that cannot be applied",
            f"the chat template marks {len(answers)} texts in {len(kept)} answers",
        )
    return [answer for answer, keep in zip(answers, kept, strict=True) if keep]


def _special_texts(tokenizer: Tokenizer) -> list[str]:
    """Return the texts of the special tokens of a Hugging Face tokenizer; none for bytes."""
    import json

    if tokenizer.name == BYTES:
        return []
    added = json.loads(tokenizer.files()[TOKENIZER]).get("added_tokens") or []
    return [token["content"] for token in added if token.get("special")]


def _special_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    texts = sorted(filter(None, _special_texts(tokenizer)), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def _matches(pattern: re.Pattern[str] | None, texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(match for text in texts for match in pattern.findall(text))) if pattern else ()


def _begins_texts(tokenizer: Tokenizer) -> bool:
    """Return whether ``tokenizer`` begins texts in its own way, as with a space."""
    for anchor in ANCHORS:
        ids = _ids_after(tokenizer, anchor, "a")
        if ids is not None:
            return ids != tokenizer.encode("a").tolist()
    return False


def _ids_after(tokenizer: Tokenizer, anchor: str, text: str) -> list[int] | None:
    """Return the ids of ``text`` as it follows ``anchor``. None if they cannot be told apart or encoded."""
    try:
        before, ids = tokenizer.encode(anchor).tolist(), tokenizer.encode(anchor + text).tolist()
    except DataError:  # it may have no other words than those of a game's moves
        return None
    return ids[len(before) :] if ids[: len(before)] == before else None
