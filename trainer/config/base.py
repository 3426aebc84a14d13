"""The closed, frozen node every config class is, and its errors."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from types import NoneType
from typing import Annotated, Any, ClassVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

# Strict: neither `true` nor "3" is a number.
PositiveInt = Annotated[int, Field(ge=1, le=2**53, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, le=2**53, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Node(BaseModel):
    """A frozen, closed model: unknown keys are errors, defaults are validated, instances hash by value."""

    # Validators are built on first use (`defer_build`): a start-up pays for the root it validates, not for every node.
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, defer_build=True)

    accepted_keys: ClassVar[tuple[str, ...]] = ()
    """Keys a document may use beside the fields; a validator expands them before the fields are read."""


def tag_or(default: str) -> Callable[[Any], str]:
    """The discriminator of a union whose members have a `type`: what the document says, `default` where it says nothing."""

    def tag(value: Any) -> str:
        return str(value.get("type", default) if isinstance(value, dict) else getattr(value, "type", default))  # pyright: ignore

    tag.__name__ = "type"  # what an error calls the missing key
    return tag


def near_miss(word: str, known: list[str]) -> str | None:
    """The closest of `known` to `word`, or None when nothing is close."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return found[0] if found else None


def dotted(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location) or "(root)"


def locate(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[tuple[int | str, ...], Any]:
    """Where pydantic's `location` lies in the document as a person wrote it, and the type expected there.

    Pydantic adds a part for every union it enters (the tag, or the member's name): those are left out.
    """
    written: list[int | str] = []
    here: Any = model
    parts = list(location)
    while parts:
        here, discriminator = _plain(here)
        members = _members(here)
        if len(members) > 1:
            label = parts.pop(0)
            here = _chosen(members, discriminator, label)
            continue
        here = members[0] if members else Any
        part = parts.pop(0)
        written.append(part)
        here = _inside(here, part)
    return tuple(written), here


def known_keys(annotation: Any) -> list[str]:
    """Keys a mapping of this type may have, sorted; for a union, those of all its members."""
    members = [_plain(member)[0] for member in _members(_plain(annotation)[0])]
    models = [member for member in members if _is_model(member)]
    return sorted({key for member in models for key in (*member.model_fields, *getattr(member, "accepted_keys", ()))})


def _plain(annotation: Any) -> tuple[Any, str | None]:
    """The annotation without `Annotated`, and the discriminator it carried."""
    discriminator: str | None = None
    while True:
        if isinstance(annotation, FieldInfo):
            found = annotation.discriminator
            annotation = annotation.annotation
        elif get_origin(annotation) is Annotated:
            found = next((item.discriminator for item in annotation.__metadata__ if isinstance(item, FieldInfo)), None)
            annotation = get_args(annotation)[0]
        elif hasattr(annotation, "__value__"):  # a `type X = ...` alias
            annotation, found = annotation.__value__, None
        else:
            members = _members(annotation)
            if len(members) == 1 and members[0] is not annotation:
                annotation = members[0]  # X | None
                continue
            return annotation, discriminator
        discriminator = found if isinstance(found, str) else discriminator


def _members(annotation: Any) -> list[Any]:
    """Members of a union without None; the annotation itself where it is none."""
    if get_origin(annotation) is None or type(annotation).__name__ not in ("UnionType", "Union", "_UnionGenericAlias"):
        return [annotation]
    return [member for member in get_args(annotation) if member is not NoneType]


def _chosen(members: list[Any], discriminator: str | None, label: int | str) -> Any:
    for member in members:
        if get_origin(member) is Annotated and any(getattr(item, "tag", None) == label for item in member.__metadata__):
            return get_args(member)[0]
        name = member.model_fields[discriminator].default if discriminator and _is_model(member) else getattr(member, "__name__", None)
        if name == label:
            return member
    return Any


def _inside(annotation: Any, part: int | str) -> Any:
    if _is_model(annotation):
        return annotation.model_fields.get(str(part), Any)
    arguments = get_args(annotation)
    if isinstance(part, int):
        return arguments[0] if arguments else Any
    return arguments[1] if len(arguments) > 1 else Any


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


__all__ = [
    "Fraction", "Node", "NonNegativeFloat", "NonNegativeInt", "PositiveFloat", "PositiveInt", "ValidationError",
    "dotted", "known_keys", "locate", "near_miss", "tag_or",
]  # fmt: skip
