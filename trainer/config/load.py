"""Documents in: safe YAML or JSON, `--set a.b=c` overrides, and every problem at once."""
# PyYAML's C loader has no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, Final, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from trainer.config.base import dotted, known_keys, locate, near_miss
from trainer.config.presets import merge
from trainer.config.problem import ConfigError, Problem
from trainer.config.train import TrainConfig

MAX_DOCUMENT_BYTES = 1_000_000
MAX_DEPTH = 40
MAX_PROBLEMS = 50
"""Problems of form that are worked out; nobody reads more, and a hostile document has thousands."""

_Safe = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader


class _Loader(_Safe):  # type: ignore[misc]
    """Safe YAML with duplicate keys refused."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool) and key is not None:
                raise yaml.MarkedYAMLError(None, None, "a key must be plain text", key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_document(text: str | bytes, *, name: str) -> dict[str, Any]:
    """The mapping in `text` (YAML, of which JSON is a part). Raises ConfigError for anything else."""
    if len(text) > MAX_DOCUMENT_BYTES:
        hint = "a spec is a few kilobytes; is this the right file?"
        raise ConfigError([_document(name, f"larger than {MAX_DOCUMENT_BYTES:,} bytes", hint)])
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        _refuse_depth_and_aliases(text)
        parsed = yaml.load(text, Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ConfigError([_document(name, f"not UTF-8 text: {error.reason} at byte {error.start}", "save the file as UTF-8")]) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError([_document(name, f"not valid YAML: {_one_line(error)}", "")]) from None
    if not isinstance(parsed, dict):
        raise ConfigError([_document(name, f"must be a mapping of keys, not {type(parsed).__name__}", "start with `name: ...`")])
    return parsed


def _refuse_depth_and_aliases(text: str) -> None:
    """Look at the events before anything is built from them: libyaml builds nodes by recursion in C and dies of a deep document."""
    depth = 0
    for event in yaml.parse(text, Loader=_Safe):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(None, None, f"nested deeper than {MAX_DEPTH} levels", event.start_mark)
        if getattr(event, "anchor", None) is not None:  # of an alias, the name it refers to
            raise yaml.MarkedYAMLError(None, None, "anchors and aliases are not accepted here", event.start_mark)


def read_document(path: str | Path) -> dict[str, Any]:
    """Parse a local file. Raises ConfigError when it cannot be read or parsed."""
    try:
        with open(path, "rb") as file:
            return parse_document(file.read(MAX_DOCUMENT_BYTES + 1), name=str(path))
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError([_document(str(path), f"cannot be read: {reason}", "check the path")]) from None


def apply_overrides(document: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`a.b.0.c=value` on top of a document; values are YAML. Raises ConfigError for a malformed override."""
    for override in overrides:
        path, separator, text = override.partition("=")
        parts = path.split(".")
        if not separator or not all(parts):
            raise ConfigError([Problem(path="--set", message=f"{override!r} is not of the form a.b=value", code="override")])
        value = parse_document(f"value: {text}" if text else "value: ''", name=f"--set {path}")["value"]
        for part in reversed(parts):
            value = {part: value}
        try:
            document = merge(document, value)
        except ValueError as error:
            raise ConfigError([Problem(path=path, message=str(error), code="override")]) from None
    return document


def validate[M: BaseModel](model: type[M], document: Any, *, hidden: Collection[str] = ()) -> M:
    """`document` as `model`. Raises ConfigError with every problem, each with its path and the nearest known key.

    Values below the top-level keys in `hidden` are never repeated in a message.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise ConfigError(problems_of(model, error, hidden=hidden)) from None


WORDS: Final = {
    "greater_than": "must be more than {gt}", "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}", "less_than_equal": "must be at most {le}",
    "int_type": "must be a whole number", "int_parsing": "must be a whole number", "int_from_float": "must be a whole number",
    "float_type": "must be a number", "float_parsing": "must be a number", "finite_number": "must be a finite number",
    "bool_type": "must be true or false", "bool_parsing": "must be true or false",
    "tuple_type": "must be a list", "list_type": "must be a list",
}  # fmt: skip
"""Pydantic's kinds of problems in our words; the fields are those of its context."""


def problems_of(model: type[BaseModel], error: ValidationError, *, hidden: Collection[str] = ()) -> list[Problem]:
    """Every problem in pydantic's words turned into ours, without those that only follow from another."""
    details = error.errors(include_url=False)
    places = [detail["loc"] for detail in details]
    found: list[Problem] = []
    for detail in details:
        if len(found) >= MAX_PROBLEMS:
            rest = len(details) - details.index(detail)
            found.append(Problem(path="(root)", message=f"and about {rest:,} more", hint="correct these first", code="too-many"))
            break
        here = detail["loc"]
        if detail["type"] == "too_short" and any(len(other) > len(here) and other[: len(here)] == here for other in places):
            continue  # the items are there, but each has its own problem
        inner = detail.get("ctx", {}).get("error")
        if isinstance(inner, ConfigError):
            found += [problem.under(dotted(locate(model, here)[0])) if here else problem for problem in inner.problems]
        else:
            found.append(_problem(model, detail, show=not here or here[0] not in hidden))
    return found


def load_train_config(path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    return validate(TrainConfig, apply_overrides(read_document(path), overrides))


def _problem(model: type[BaseModel], detail: Any, *, show: bool) -> Problem:
    kind, value, context = detail["type"], detail.get("input"), detail.get("ctx", {})
    location, expected = locate(model, detail["loc"])
    message = detail["msg"].removeprefix("Value error, ")
    message, hint = f"{message[:1].lower()}{message[1:]}", ""
    if kind == "extra_forbidden":
        known = known_keys(locate(model, detail["loc"][:-1])[1] if len(detail["loc"]) > 1 else model)
        close = near_miss(str(location[-1]), known)
        message = f"unknown key {_short(location[-1])}"
        hint = f"did you mean {close!r}?" if close else f"known keys: {', '.join(known)}"
        if len(location) == 1 and location[0] in known_keys(getattr(model.model_fields.get("train"), "annotation", None)):
            hint = f"did you mean 'train.{location[0]}'?"
    elif kind == "missing":
        message = "is required"
    elif kind in ("union_tag_not_found", "union_tag_invalid"):
        location = (*location, context["discriminator"].strip("'()"))
        choices = [tag.strip("' ") for tag in context.get("expected_tags", "").split(",") if tag] or _tags(expected)
        given = cast("dict[str, Any]", value).get(location[-1]) if isinstance(value, dict) else None
        close = near_miss(given, choices) if isinstance(given, str) else None
        message = "is required" if given is None else f"unknown kind {_short(given)}"
        hint = f"did you mean {close!r}?" if close else f"one of: {', '.join(choices)}"
    elif kind in ("model_type", "model_attributes_type", "dict_type"):
        known = known_keys(expected)
        message = "is empty: a mapping of keys is needed" if value is None else f"must be a mapping of keys, not {_kind(value)}"
        hint = f"known keys: {', '.join(known)}" if known else ""
    elif kind == "literal_error":
        choices = [choice.strip("' ") for choice in context["expected"].replace(" or ", ", ").split(",")]
        close = near_miss(value, choices) if isinstance(value, str) else None
        message, hint = f"{message}, got {_short(value)}", f"did you mean {close!r}?" if close else ""
    elif kind == "too_short":
        message = f"must have at least {context['min_length']}, not {context['actual_length']}"
    elif kind == "string_type":
        message, hint = f"must be text, not {_kind(value)}", "put it in quotes" if isinstance(value, str | int | float) else ""
    else:
        message = WORDS[kind].format_map(context) if kind in WORDS else message
        if show and (isinstance(value, str | int | float | bool) or value is None):
            message = f"{message}, got {_short(value)}"
    shown = value if show and isinstance(value, str | int | float) else None
    return Problem(path=dotted(location), message=message, hint=hint, code=kind, value=shown)


def _tags(expected: Any) -> list[str]:
    annotation = getattr(expected, "annotation", expected)
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    members = get_args(annotation) or (annotation,)
    fields = [getattr(member, "model_fields", {}) for member in members]
    return [str(field["type"].default) for field in fields if "type" in field]


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", tuple: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _document(name: str, message: str, hint: str) -> Problem:
    return Problem(path=name, message=message, hint=hint, code="document")


def _one_line(error: BaseException) -> str:
    mark = getattr(error, "problem_mark", None)
    text = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{text} (line {mark.line + 1}, column {mark.column + 1})" if mark else text
