"""Parts of API objects that may be absent or null."""

from __future__ import annotations

from typing import Any

Manifest = dict[str, Any]


def part(thing: Manifest | None, *keys: str) -> Manifest:
    """The object below `keys`; empty where one of them is absent or null."""
    found: Manifest = thing or {}
    for key in keys:
        below: Any = found.get(key)
        found = below or {}
    return found


def each(thing: Manifest | None, *keys: str) -> list[Manifest]:
    """The list of objects below `keys`; empty where one of them is absent or null."""
    *above, last = keys
    found: Any = part(thing, *above).get(last)
    return found or []


def name_of(thing: Manifest) -> str:
    return thing["metadata"]["name"]


def labels_of(thing: Manifest) -> dict[str, str]:
    return part(thing, "metadata", "labels")


def condition(thing: Manifest, kind: str) -> Manifest:
    """Its condition of this type; empty where it has none."""
    for found in each(thing, "status", "conditions"):
        if found["type"] == kind:
            return found
    return {}
