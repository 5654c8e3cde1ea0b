"""The base class of all configuration sections, and their common value types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from kempnerforge.errors import ConfigError


class Section(BaseModel):
    """One table of the TOML file. It is immutable, rejects unknown keys and does not convert types.

    The docstring under a field is its documentation in ``--help`` and the JSON schema. The
    constructor raises ConfigError, with the nearest key or the allowed values. ``model_validate``
    raises pydantic's ValidationError.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    if not TYPE_CHECKING:  # type checkers know the parameters from the fields

        def __init__(self, /, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                # Imported here: that module imports this one.
                from kempnerforge.config.validation_errors import constructor_faults

                raise ConfigError(constructor_faults(error, type(self), values)) from None

        # pydantic would otherwise call it in model_validate, also for nested sections.
        __init__.__pydantic_base_init__ = True


AtLeastOne = Annotated[int, Field(ge=1)]
AtLeastZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
FractionBelowOne = Annotated[float, Field(ge=0, lt=1)]
FractionUpToOne = Annotated[float, Field(ge=0, le=1)]
NonEmpty = Annotated[str, Field(min_length=1)]
Arguments = dict[str, JsonValue]
"""Keyword arguments of a plug-in, as written in a table."""
