"""Read the fields of records for fine-tuning, and refuse what is not of the format.

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kempnerforge.data.reading.items import MAX_FIELDS_NAMED

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
"""The roles of messages. The assistant is the one that is learnt."""

RESULT_ROLES = ("tool", "function", "ipython")
"""Roles whose content is the result of a call, of any type."""


class RecordError(Exception):
    """What is wrong with one record, and in which ``message``, from 1. The caller adds file and line.

    Records that are left out are counted by the text before the ``details``.
    """

    def __init__(self, reason: str, details: str = "", *, message: int | None = None) -> None:
        where = "" if message is None else f" in message {message}"
        super().__init__(f"{reason}{where}; {details}" if details else f"{reason}{where}")


def read_messages(record: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    """Return the messages of a chat, of which at least one is the assistant's.

    Raises :class:`RecordError` if there are none, or one is not a message.
    """
    messages = _field(record, field, "--messages-field")
    if not isinstance(messages, list) or not messages:
        raise RecordError(f"field {field!r} is {_kind(messages)}, not a list of messages")
    for number, message in enumerate(messages, 1):
        _check_message(message, number)
    if all(message["role"] != "assistant" for message in messages):
        raise RecordError("no message is of the assistant, so there is nothing to learn")
    return messages


def _check_message(message: Any, number: int) -> None:
    if not isinstance(message, dict):
        raise RecordError(f"{_kind(message)} instead of an object", message=number)
    role = message.get("role")
    if role is None:
        raise RecordError("no role", f"its fields are {_names(message)}", message=number)
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise RecordError("unknown role", f"it is {role!r:.40}, and roles are {known}", message=number)
    content = message.get("content")
    calls = role == "assistant" and (message.get("tool_calls") or message.get("function_call"))
    if content is None and not calls:
        raise RecordError("no content", f"its fields are {_names(message)}", message=number)
    if role not in RESULT_ROLES and not (content is None or isinstance(content, str) or _is_parts(content)):
        raise RecordError(
            f"{_kind(content)} as the content", "it is text, or a list of parts", message=number
        )
    if role == "assistant" and not content and not calls:
        raise RecordError("nothing said by the assistant", message=number)
    if message.get("weight", 1) not in (0, 1, None):
        problem = f"it is {message['weight']!r:.40}, and weights are 0 and 1"
        raise RecordError("unknown weight", problem, message=number)


def _is_parts(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)


def read_tools(record: Mapping[str, Any]) -> list[Any] | None:
    """Return the descriptions of the tools of a chat. Raises :class:`RecordError` for other values."""
    tools = record.get("tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError(f"field 'tools' is {_kind(tools)}, not a list of objects")
    return tools


def read_text(record: Mapping[str, Any], field: str, option: str) -> str:
    """Return the text of ``field``, which ``option`` of the command names.

    Raises :class:`RecordError` if there is no such field or it has no text.
    """
    value = _field(record, field, option)
    if isinstance(value, str):
        return check_encodable(value, f"field {field!r}")
    hint = '. For messages, set data.format = "chat" (--format chat)' if isinstance(value, list) else ""
    raise RecordError(f"field {field!r} is {_kind(value)}, not text{hint}")


def _field(record: Mapping[str, Any], field: str, option: str) -> Any:
    if field not in record:
        raise RecordError(f"no field {field!r}", f"the fields are {_names(record)}. See {option}")
    return record[field]


def check_encodable(text: str, what: str) -> str:
    """Return ``text``, called ``what`` in messages. Raises :class:`RecordError` if UTF-8 cannot hold it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RecordError(f"{what} has half of a surrogate pair, which is no character") from None
    return text


def _names(record: Mapping[str, Any]) -> str:
    named = ", ".join(map(repr, list(record)[:MAX_FIELDS_NAMED])) or "none"
    return f"{named}, ..." if len(record) > MAX_FIELDS_NAMED else named


def _kind(value: Any) -> str:
    """Say in words of JSON what ``value`` is."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "text", dict: "an object"}
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return kinds.get(type(value), f"a {type(value).__name__}")


def strings_in(value: Any) -> Iterator[str]:
    """Yield every string in ``value``, which is made of dicts and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from strings_in(each)
    elif isinstance(value, list):
        for each in value:
            yield from strings_in(each)
