"""Parts of API objects that may be absent or null, as the empty value of their type."""

from __future__ import annotations

from typing import Any


def mapping(value: Any) -> dict[str, Any]:
    return value or {}


def items(value: Any) -> list[dict[str, Any]]:
    return value or []


def strings(value: Any) -> list[str]:
    return value or []
