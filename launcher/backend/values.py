"""Parts of API objects that may be absent or null, as the empty value of their type; the form of a namespace's name."""

from __future__ import annotations

import re
from typing import Any

from launcher.errors import Unavailable


def mapping(value: Any) -> dict[str, Any]:
    return value or {}


def items(value: Any) -> list[dict[str, Any]]:
    return value or []


def strings(value: Any) -> list[str]:
    return value or []


def check_namespace(name: str) -> None:
    """Raises Unavailable for what no namespace can be called."""
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name):
        raise Unavailable(f"{name[:80]!r} is not the name of a namespace", hint="lower-case letters, digits and dashes")
