"""Check the names that a test patches in another process when the test module is imported."""

from __future__ import annotations

import importlib
from typing import Any


def resolve(name: str) -> tuple[Any, str]:
    """Return the owner and the attribute that ``module:attribute.path`` names, such as ``os:fsync``.

    Raise ImportError or AttributeError if there is no such attribute.
    """
    module, _, path = name.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, attribute = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    getattr(owner, attribute)
    return owner, attribute


def patch_target(name: str) -> str:
    """Return ``name`` after checking that it exists, so that a rename in the package fails at import."""
    resolve(name)
    return name
