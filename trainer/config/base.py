"""The closed, frozen node every config class is, and its errors."""

from __future__ import annotations

import difflib
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

PositiveInt = Annotated[int, Field(ge=1, le=2**53)]
NonNegativeInt = Annotated[int, Field(ge=0, le=2**53)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Node(BaseModel):
    """A frozen, closed model: unknown keys are errors, defaults are validated, instances hash by value."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, strict=False)


def near_miss(word: str, known: list[str]) -> str | None:
    """The closest of `known` to `word`, or None when nothing is close."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return found[0] if found else None


def dotted(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location) or "(root)"


def known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Field names of the model at `location` inside `model`; empty where the path leaves typed nodes."""
    from typing import get_args

    options: list[Any] = [model]
    for part in location:
        following: list[Any] = []
        for option in options:
            if isinstance(option, type) and issubclass(option, BaseModel) and part in option.model_fields:
                following.append(option.model_fields[str(part)].annotation)
            elif isinstance(part, int) or not isinstance(option, type):
                following.append(option)
        options = [leaf for option in following for leaf in _models(option, get_args)]
        tagged = [o for o in options if _tag(o) == part]
        options = tagged or options
    return sorted({name for option in options if isinstance(option, type) and issubclass(option, BaseModel) for name in option.model_fields})


def _models(annotation: Any, get_args: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [leaf for argument in get_args(annotation) for leaf in _models(argument, get_args)]


def _tag(model: Any) -> Any:
    field = model.model_fields.get("type") if isinstance(model, type) else None
    return None if field is None else field.default


__all__ = [
    "Fraction", "Node", "NonNegativeFloat", "NonNegativeInt", "PositiveFloat", "PositiveInt", "ValidationError",
    "dotted", "known_keys", "near_miss",
]  # fmt: skip
