"""Turns pydantic's report about a user's mapping into one line that names key, value, expectation and mend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from bittern.errors import UserError, did_you_mean

M = TypeVar("M", bound=BaseModel)


def validated(model: type[M], data: object, where: str) -> M:
    """A model instance from plain data.

    Args:
        model: The pydantic model.
        data: What the user gave: normally a mapping.
        where: What the message calls the source, such as `recipe my.yaml`.

    Raises:
        UserError: for the first key that is unknown or missing and the first value that does not fit.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: expected a mapping of keys to values, got {type(data).__name__}")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        # A key that is mistyped is unknown under one name and may be missing under another.
        details = sorted(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
        more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
        raise UserError(f"{where}: {_line(model, details[0])}{more}") from None


def _line(model: type[BaseModel], error: ErrorDetails) -> str:
    path = [str(step) for step in error["loc"]]
    key, value = ".".join(path), error["input"]
    match error["type"]:
        case "extra_forbidden":
            return f"unknown key {key!r}: {did_you_mean(path[-1], _fields(model, path[:-1]))}"
        case "missing":
            return f"key {key!r} is missing: add it"
        case "literal_error":
            return f"{key} {value!r}: expected {error['ctx']['expected']}"
        case "value_error":
            reason = str(error["ctx"]["error"])
            return f"{key} {value!r}: {reason}" if key else reason
        case _:
            return f"{key} {value!r}: {error['msg'].replace('Input should be', 'expected')}"


def _fields(model: type[BaseModel], path: list[str]) -> list[str]:
    """The keys that are valid in the (possibly nested) mapping at `path`."""
    for step in path:
        field = model.model_fields.get(step)
        annotation: Any = field and field.annotation
        inner = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        found = next((kind for kind in inner if issubclass(kind, BaseModel)), None)
        if found is None:
            return []
        model = found
    return list[Any](model.model_fields)
