"""Names of what a test patches in another process, looked up when the test module is imported."""

from __future__ import annotations

import importlib
from typing import Any


def resolve(name: str) -> tuple[Any, str]:
    """The owner and the attribute that ``module:attribute.path`` names, such as ``os:fsync``.

    Raise ImportError or AttributeError when there is no such thing.
    """
    module, _, path = name.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, attribute = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    getattr(owner, attribute)
    return owner, attribute


def patch_target(name: str) -> str:
    """``name`` itself, after checking that it can be resolved: a rename in the product fails at import."""
    resolve(name)
    return name
