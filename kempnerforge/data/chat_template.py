"""Chat templates: turn messages into the text of a conversation, and find the answers in it.

A template renders as in transformers 5: the same variables, filters and treatment of white space.
This module does not import torch, and imports Jinja2 only to render.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kempnerforge.config.path_text import expand
from kempnerforge.data.record_fields import RecordError
from kempnerforge.errors import DataError, StopRequestedError

if TYPE_CHECKING:
    import jinja2

TEMPLATE_FILE = "chat_template.jinja"
"""The file of a tokenizer's own template, beside its ``tokenizer.json``."""

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that a tokenizer_config.json names. Templates have them as variables."""

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Names under which data have the reasoning of a message. Templates read the first or the second."""

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Message = Mapping[str, Any]
Spans = list[tuple[int, int]]
"""Ranges of characters, [start, end), that increase and do not overlap."""


class ChatTemplate:
    """One Jinja2 template. ``name`` is for messages; ``special`` are the texts of special tokens.

    Raises :class:`DataError` if ``source`` is not a template.
    """

    def __init__(
        self, source: str, name: str, *, variables: Mapping[str, str], special: Sequence[str] = ()
    ) -> None:
        self.source = source
        self.name = name
        self.variables = dict(variables)
        self.special = tuple(special)
        self.marks_answers = _GENERATION.search(source) is not None
        """Whether ``{% generation %}`` blocks say what the assistant says."""
        self.uses_date = "strftime_now" in source
        _ = self._compiled

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(ChatTemplate, variables=self.variables, special=self.special)
        return make, (self.source, self.name)

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        import jinja2

        from kempnerforge.data.template_environment import compile_template

        try:
            return compile_template(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"chat template {self.name}, line {error.lineno}: {error.message}. "
                "Correct it, or set data.chat_template to another file"
            ) from error

    def render(self, messages: Sequence[Message], *, tools: Any = None, prompt: bool = False) -> str:
        """Return the text of ``messages``, with ``prompt`` followed by the beginning of an answer.

        Raises :class:`RecordError` if the template fails or refuses the messages.
        """
        return self._render(messages, tools, prompt)[0]

    def find_answers(self, messages: Sequence[Message], *, tools: Any = None) -> tuple[str, Spans]:
        """Return the text of ``messages`` and where the assistant's answers are in it.

        An answer ends with the token that ends its turn. Where the template has ``{% generation %}``
        blocks, an answer is what they hold. Elsewhere it is what follows the messages before it,
        rendered alone with the beginning of an answer.

        Raises :class:`RecordError` if the template fails, refuses the messages, or does not show
        where an answer begins and ends.
        """
        text, blocks = self._render(messages, tools, False)
        if self.marks_answers:
            return text, [block for block in blocks if block[0] < block[1]]
        return text, [
            self._find_answer(messages, number, tools, text)
            for number, message in enumerate(messages)
            if message["role"] == "assistant"
        ]

    def _find_answer(
        self, messages: Sequence[Message], number: int, tools: Any, text: str
    ) -> tuple[int, int]:
        """Return where the answer ``messages[number]`` is in ``text``, the whole conversation."""
        before = self.render(messages[:number], tools=tools, prompt=True)
        after = text if number + 1 == len(messages) else self.render(messages[: number + 1], tools=tools)
        if not (text.startswith(after) and after.startswith(before)):
            raise self._no_place(number, "writes other text for the messages up to it once more follow")
        answer = after[len(before) :]
        if before == self.render(messages[:number], tools=tools):
            self._check_no_header(answer, messages[number], number)
        # White space after the token that ends the turn is the template's, not the assistant's.
        stripped = answer.rstrip()
        end = len(stripped) if self.special and stripped.endswith(self.special) else len(answer)
        return len(before), len(before) + end

    def _check_no_header(self, answer: str, message: Message, number: int) -> None:
        """Refuse an answer with more in it than the content and an end, where the template has no prompt."""
        content = message.get("content", "")
        if not isinstance(content, str):
            raise self._no_place(number, "ignores add_generation_prompt")
        start = answer.find(content.strip())
        rest = answer[start + len(content.strip()) :].strip()
        end = next((token for token in self.special if rest.startswith(token)), "")
        if start < 0 or answer[:start].strip() or rest[len(end) :].strip():
            raise self._no_place(number, "ignores add_generation_prompt")

    def _no_place(self, number: int, reason: str) -> RecordError:
        return RecordError(
            "no beginning and end of the answer found",
            f"the chat template {self.name} {reason}. Copy the template, put {{% generation %}} and "
            "{% endgeneration %} around what the assistant says, and set data.chat_template "
            "(--chat-template) to the copy",
            message=number + 1,
        )

    def _render(self, messages: Sequence[Message], tools: Any, prompt: bool) -> tuple[str, Spans]:
        from kempnerforge.data.template_environment import render_spans

        variables = {
            **self.variables,
            "messages": [_with_reasoning(message) for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": prompt,
        }
        try:
            return render_spans(self._compiled, variables)
        except StopRequestedError:  # a signal arrived meanwhile
            raise
        except Exception as error:  # a template is a program, which may raise anything
            raise RecordError(
                f"the chat template {self.name} refuses the conversation", str(error) or type(error).__name__
            ) from error


def load_templates(
    files: Mapping[str, bytes], tokenizer: str, path: str | None, *, special: Sequence[str] = ()
) -> dict[str, ChatTemplate]:
    """Return the templates of a tokenizer by name: ``default``, and ``tool_use`` where there is one.

    ``files`` are those of ``Tokenizer.files()``, ``tokenizer`` is its name. ``path`` is a template
    to use instead.

    Raises :class:`DataError` if there is no template, or it cannot be read, and ConfigError for an
    environment variable in ``path`` that is not set.
    """
    config = _read_config(files, tokenizer)
    variables = special_tokens(files, tokenizer)
    make = functools.partial(ChatTemplate, variables=variables, special=special)
    if path is not None:
        return {"default": make(_read_template(expand(path, key="data.chat_template")), path)}
    if TEMPLATE_FILE in files:
        return {"default": make(files[TEMPLATE_FILE].decode("utf-8", "replace"), TEMPLATE_FILE)}
    found = config.get("chat_template")
    if isinstance(found, str):
        found = [{"name": "default", "template": found}]
    if not found:
        raise DataError(
            f"tokenizer {tokenizer} has no chat template: its folder has no {TEMPLATE_FILE}, and its "
            "tokenizer_config.json names none. Set data.chat_template (--chat-template) to a .jinja file"
        )
    try:
        sources = {entry["name"]: entry["template"] for entry in found}
        default = sources["default"]
    except (TypeError, KeyError) as error:
        raise DataError(
            f"tokenizer {tokenizer}: chat_template of its tokenizer_config.json is neither a text nor a list "
            "with a default. Set data.chat_template (--chat-template) to a .jinja file"
        ) from error
    templates = {"default": make(default, "of tokenizer_config.json")}
    if "tool_use" in sources:
        templates["tool_use"] = make(sources["tool_use"], "tool_use of tokenizer_config.json")
    return templates


def special_tokens(files: Mapping[str, bytes], tokenizer: str) -> dict[str, str]:
    """Return the special tokens that a tokenizer's files name, as ``eos_token``: text."""
    names: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):  # the second is the newer
        content = _read_config(files, tokenizer, file)
        for name in SPECIAL_NAMES:
            token = content.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                names[name] = token
    return names


def _read_config(
    files: Mapping[str, bytes], tokenizer: str, name: str = "tokenizer_config.json"
) -> dict[str, Any]:
    try:
        content = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise DataError(f"tokenizer {tokenizer}: its {name} cannot be read as JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(
            f"chat template {path}: no such file. Set data.chat_template to a .jinja file"
        ) from None
    except OSError as error:
        raise DataError(f"chat template {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"chat template {path}: cannot be read: not UTF-8 at byte {error.start}") from error


def _with_reasoning(message: Message) -> dict[str, Any]:
    """Return ``message`` without its null fields, with its reasoning under the names that templates read."""
    fields = {name: value for name, value in message.items() if value is not None}
    reasoning = next((fields[name] for name in REASONING_FIELDS if name in fields), None)
    if reasoning is None:
        return fields
    return {"thinking": reasoning, **fields, "reasoning_content": reasoning}
