"""Encode non-tensor leaves as JSON: plain values as they are, others with a tag. Nothing is unpickled.

=====================  ==========================================================
value                  JSON
=====================  ==========================================================
None, bool, int, str   itself
finite float           itself, at full precision
nan, inf, -inf         ``{"__float__": "nan"}``
complex                ``{"__complex__": [real, imaginary]}``
tuple, set, frozenset  ``{"__tuple__": [...]}``, ``{"__set__": [...]}``, ...
deque                  ``{"__deque__": [maxlen, [...]]}``
str of surrogate pairs ``{"__text__": base64}``: JSON would join them
bytes, bytearray       ``{"__bytes__": base64}``, ``{"__bytearray__": base64}``
BytesIO                ``{"__bytesio__": [base64, position]}``
dict                   an object; ``{"__dict__": [[key, value], ...]}`` if a key is not a
                       string or begins with ``__``
OrderedDict, Counter   ``{"__ordereddict__": [[key, value], ...]}``, ``{"__counter__": ...}``
state dict of a module ``{"__statedict__": [[[key, value], ...], metadata]}``
defaultdict            ``{"__defaultdict__": [factory, [[key, value], ...]]}``
=====================  ==========================================================

``tensor_leaves`` handles the tags of torch and numpy. This module only lists them and needs no
torch.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kempnerforge.checkpoint.format.structure import PATHS

_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_TEXT = ("utf-8", "surrogatepass")
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
"""Errors from decoding JSON that no version of this format has. They mean that the step is damaged."""
MAX_DEPTH = 200
"""Limit on nested containers."""
FOREIGN_TAGS = ("__tensor__", "__ndarray__", "__numpy__", "__size__", "__dtype__", "__device__")
"""Tags that ``tensor_leaves`` reads and writes."""
_FACTORIES: dict[str, type] = {
    kind.__name__: kind for kind in (int, float, bool, str, list, dict, set, tuple)
}


@dataclass(frozen=True, eq=False)
class Foreign:
    """The JSON of a value of torch or numpy."""

    tag: str
    content: Any

    def __repr__(self) -> str:
        if self.tag == "__tensor__":
            return f"tensor {self.content['name']}"
        if self.tag == "__ndarray__":
            return f"numpy {self.content['dtype']} array of shape {tuple(self.content['shape'])}"
        return f"{self.tag.strip('_')} {self.content}"


def encode(value: Any, *, name: str, foreign: Callable[[Any, str], Any] | None = None, depth: int = 0) -> Any:
    """Return ``value`` as tagged JSON.

    ``foreign`` is called with every other kind of value and its name. It returns JSON, or None if
    it cannot store the value. Raises TypeError, which names the leaf, for a value that cannot be
    stored.
    """

    def inner(item: Any, key: Any) -> Any:
        if _is_json(item):  # a loader may have a million numbers: build no names for them
            return item
        return encode(item, name=f"{name}.{key}", foreign=foreign, depth=depth + 1)

    def items(values: Any) -> list[Any]:
        return [inner(item, position) for position, item in enumerate(values)]

    def pairs(mapping: Any) -> list[Any]:
        return [[inner(key, "key"), inner(item, key)] for key, item in mapping.items()]

    if _is_json(value):
        return value
    kind = type(value)
    if kind is str:
        return {"__text__": _base64(value.encode(*_TEXT))}
    if kind is float:
        return {"__float__": repr(value)}
    if depth > MAX_DEPTH:
        raise TypeError(f"{name[:200]} is nested more than {MAX_DEPTH} deep, or holds itself")
    if kind is list:
        return items(value)
    if kind is dict:
        if all(type(key) is str and not key.startswith("__") and _is_json_text(key) for key in value):
            return {key: inner(item, key) for key, item in value.items()}
        return {"__dict__": pairs(value)}
    if kind in _ENCODERS:
        tag, write = _ENCODERS[kind]
        return {tag: write(value)}
    if kind in (set, frozenset):
        return {f"__{kind.__name__}__": items(sorted(value, key=repr))}
    if kind is tuple:
        return {"__tuple__": items(value)}
    if kind is deque:
        return {"__deque__": [value.maxlen, items(value)]}
    if kind is OrderedDict and vars(value):
        # ``state_dict`` of a module stores the versions of its submodules here. Without them, it loads as an
        # old one.
        if list(vars(value)) != ["_metadata"]:
            raise TypeError(f"{name} is an OrderedDict with attributes of its own, which are not stored")
        return {"__statedict__": [pairs(value), inner(value._metadata, "_metadata")]}
    if kind in (OrderedDict, Counter):
        return {f"__{kind.__name__.lower()}__": pairs(value)}
    if kind is defaultdict and (
        value.default_factory is None or value.default_factory in _FACTORIES.values()
    ):
        factory = value.default_factory
        return {"__defaultdict__": [factory and factory.__name__, pairs(value)]}
    if foreign is not None and (found := foreign(value, name)) is not None:
        return found
    raise TypeError(
        f"{name} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold: use tensors, "
        "numpy arrays, numbers, strings, bytes, lists, tuples, sets and dicts"
    )


def decode(value: Any, foreign: Callable[[str, Any], Any] = Foreign) -> Any:
    """Invert ``encode``. ``foreign`` decodes tags of torch and numpy. Raise ValueError for unknown tags."""
    if isinstance(value, list):
        return [decode(item, foreign) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((tag, content),) = value.items()
        if tag in _DECODERS:
            return _DECODERS[tag](content, lambda item: decode(item, foreign))
        if tag in FOREIGN_TAGS:
            return foreign(tag, content)
        if tag.startswith("__"):
            raise ValueError(f"unknown tag {tag!r}")
    return {key: decode(item, foreign) for key, item in value.items()}


def parse_objects(data: bytes) -> dict[str, Any]:
    """Parse ``train_state.json``: encoded leaves by name, and ``structure.PATHS``. Raises ValueError."""
    body = json.loads(data)
    if not isinstance(body, dict):
        raise ValueError("it is not a JSON object")
    return body


def decode_objects(data: bytes) -> dict[str, Any]:
    """Return the non-tensor leaves in the bytes of ``train_state.json``, by name. Raises ValueError."""
    body = parse_objects(data)
    body.pop(PATHS, None)
    if b'"__' not in data:  # no tags: the JSON is the value
        return body
    return {name: decode(value) for name, value in body.items()}


def has_new_tags(data: bytes) -> bool:
    """Return whether ``train_state.json`` has tags that the first version of format 1 cannot read."""
    return b'"__' in data and any(f'"{tag}"'.encode() in data for tag in _NEW_TAGS)


def _is_json(value: Any) -> bool:
    """Return whether JSON can hold a value without a tag."""
    kind = type(value)
    if kind is int:
        return value.bit_length() <= 10_000  # Python refuses to print larger ones
    if kind is float:
        return math.isfinite(value)
    return kind is bool or value is None or (kind is str and _is_json_text(value))


def _is_json_text(value: str) -> bool:
    return value.isascii() or _SURROGATE_PAIR.search(value) is None


def _base64(value: Any) -> str:
    return base64.b64encode(value).decode()


_ENCODERS: dict[type, tuple[str, Callable[[Any], Any]]] = {
    bytes: ("__bytes__", _base64),
    bytearray: ("__bytearray__", _base64),
    complex: ("__complex__", lambda value: [encode(part, name="") for part in (value.real, value.imag)]),
    io.BytesIO: ("__bytesio__", lambda value: [_base64(value.getvalue()), value.tell()]),
}


def _bytes_io(content: Any) -> io.BytesIO:
    value = io.BytesIO(base64.b64decode(content[0]))
    value.seek(content[1])
    return value


def _pairs(pairs: Any, inner: Callable[[Any], Any]) -> list[tuple[Any, Any]]:
    return [(inner(key), inner(item)) for key, item in pairs]


def _state_dict(content: Any, inner: Callable[[Any], Any]) -> OrderedDict[Any, Any]:
    found = OrderedDict(_pairs(content[0], inner))
    found._metadata = inner(content[1])  # type: ignore[attr-defined]
    return found


def _default_dict(content: Any, inner: Callable[[Any], Any]) -> defaultdict[Any, Any]:
    return defaultdict(_FACTORIES[content[0]] if content[0] else None, _pairs(content[1], inner))


_DECODERS: dict[str, Callable[[Any, Callable[[Any], Any]], Any]] = {
    "__float__": lambda content, _: float(content),
    "__complex__": lambda content, inner: complex(*map(inner, content)),
    "__text__": lambda content, _: base64.b64decode(content).decode(*_TEXT),
    "__bytes__": lambda content, _: base64.b64decode(content),
    "__bytearray__": lambda content, _: bytearray(base64.b64decode(content)),
    "__bytesio__": lambda content, _: _bytes_io(content),
    "__tuple__": lambda content, inner: tuple(map(inner, content)),
    "__set__": lambda content, inner: set(map(inner, content)),
    "__frozenset__": lambda content, inner: frozenset(map(inner, content)),
    "__deque__": lambda content, inner: deque(map(inner, content[1]), maxlen=content[0]),
    "__dict__": lambda content, inner: dict(_pairs(content, inner)),
    "__ordereddict__": lambda content, inner: OrderedDict(_pairs(content, inner)),
    "__statedict__": _state_dict,
    "__counter__": lambda content, inner: Counter(dict(_pairs(content, inner))),
    "__defaultdict__": _default_dict,
}
_NEW_TAGS = (
    *FOREIGN_TAGS,
    *("__text__", "__complex__", "__bytearray__", "__bytesio__", "__deque__"),
    *("__ordereddict__", "__statedict__", "__counter__", "__defaultdict__"),
)
"""Since format 1.1."""
