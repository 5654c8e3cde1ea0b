"""Non-tensor leaves as JSON: plain values as they are, the others tagged, nothing unpickled ever.

=====================  ==========================================================
value                  JSON
=====================  ==========================================================
None, bool, int, str   itself
finite float           itself, at full precision
nan, inf, -inf         ``{"__float__": "nan"}``
tuple, set, frozenset  ``{"__tuple__": [...]}``, ``{"__set__": [...]}``, ...
bytes                  ``{"__bytes__": base64}``
dict                   an object; ``{"__dict__": [[key, value], ...]}`` when a key is no
                       string or begins with ``__``
=====================  ==========================================================
"""

from __future__ import annotations

import base64
import json
import math
from typing import Any


def encode(value: Any, *, name: str) -> Any:
    """``value`` as tagged JSON. Raises TypeError, naming the leaf, for what cannot be stored."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"__float__": repr(value)}
    if type(value) is bytes:
        return {"__bytes__": base64.b64encode(value).decode()}
    if type(value) is list:
        return [encode(item, name=f"{name}[{place}]") for place, item in enumerate(value)]
    if type(value) in _SEQUENCES:
        items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return {_SEQUENCES[type(value)]: [encode(item, name=name) for item in items]}
    if isinstance(value, dict):
        if all(type(key) is str and not key.startswith("__") for key in value):
            return {key: encode(item, name=f"{name}.{key}") for key, item in value.items()}
        pairs = [[encode(k, name=name), encode(v, name=f"{name}.{k}")] for k, v in value.items()]
        return {"__dict__": pairs}
    raise TypeError(
        f"{name} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold: "
        "use tensors, numbers, strings, bytes, lists, tuples, sets and dicts"
    )


def decode(value: Any) -> Any:
    """The inverse of ``encode``. Raises ValueError for an unknown tag."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((tag, content),) = value.items()
        if tag in _DECODERS:
            return _DECODERS[tag](content)
        if tag.startswith("__"):
            raise ValueError(f"unknown tag {tag!r}")
    return {key: decode(item) for key, item in value.items()}


def decode_objects(data: bytes) -> dict[str, Any]:
    """The non-tensor leaves in the bytes of ``train_state.json``, by name. Raises ValueError."""
    body = json.loads(data)
    if not isinstance(body, dict):
        raise ValueError("it is not a JSON object")
    if b'"__' not in data:  # nothing is tagged: the JSON is what was stored
        return body
    return {name: decode(value) for name, value in body.items()}


_SEQUENCES: dict[type, str] = {tuple: "__tuple__", set: "__set__", frozenset: "__frozenset__"}
_DECODERS = {
    "__float__": float,
    "__bytes__": base64.b64decode,
    "__tuple__": lambda items: tuple(decode(item) for item in items),
    "__set__": lambda items: {decode(item) for item in items},
    "__frozenset__": lambda items: frozenset(decode(item) for item in items),
    "__dict__": lambda pairs: {decode(key): decode(item) for key, item in pairs},
}
