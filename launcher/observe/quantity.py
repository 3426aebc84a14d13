"""Kubernetes quantities, such as `500m` or `2Gi`, as numbers."""

from __future__ import annotations

import re
from typing import Final

_SUFFIXES: Final = {
    "": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50,
}  # fmt: skip


def quantity(text: object) -> float:
    """0 for what is not a quantity."""
    found = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text))
    return float(found[1]) * _SUFFIXES.get(found[2], 0) if found else 0.0
