"""One line of `nnxlaunch doctor`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Level(StrEnum):
    PASS = "pass"
    WARN = "warn"  # a job may start, but not every job or not every command
    FAIL = "fail"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found about one thing."""

    check: str  # `jobset`, `queue`, ...
    level: Level
    message: str
    fix: str = ""
    """The command, or the change of the spec, that repairs it; empty where all is well."""

    def as_data(self) -> dict[str, Any]:
        return {key: str(value) for key, value in asdict(self).items()}


def good(check: str, message: str) -> Finding:
    return Finding(check=check, level=Level.PASS, message=message)


def warn(check: str, message: str, fix: str) -> Finding:
    return Finding(check=check, level=Level.WARN, message=message, fix=fix)


def bad(check: str, message: str, fix: str) -> Finding:
    return Finding(check=check, level=Level.FAIL, message=message, fix=fix)
