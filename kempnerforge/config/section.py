"""The base class of all configuration sections, and their common value types."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue


class Section(BaseModel):
    """One table of the TOML file. It is immutable, rejects unknown keys and does not convert types.

    The docstring under a field is its documentation in ``--help`` and the JSON schema.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


AtLeastOne = Annotated[int, Field(ge=1)]
AtLeastZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
FractionBelowOne = Annotated[float, Field(ge=0, lt=1)]
FractionUpToOne = Annotated[float, Field(ge=0, le=1)]
NonEmpty = Annotated[str, Field(min_length=1)]
Arguments = dict[str, JsonValue]
"""Keyword arguments of a plug-in, as written in a table."""
