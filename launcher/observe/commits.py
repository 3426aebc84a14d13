"""The newest checkpoint of a run, from the commit file that makes it one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, cast

from trainer.contract import CHECKPOINT_FOLDER, COMMIT_FILE, SAVE_SECONDS

_NEWEST: Final = 3
"""Steps that are tried: the newest may be about to be written, or to be deleted."""


@dataclass(frozen=True)
class Committed:
    step: int
    save_seconds: float | None  # from when it was asked for; None where its trainer wrote no time down
    at: datetime | None = None


def last_commit(run_directory: str) -> Committed | None:
    """Of a folder of this machine; None where there is none."""
    if "://" in run_directory:
        return None
    folder = Path(run_directory, CHECKPOINT_FOLDER)
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except OSError:
        return None

    def read(step: int) -> tuple[bytes, datetime] | None:
        try:
            with open(folder / str(step) / COMMIT_FILE, "rb") as file:
                return file.read(), datetime.fromtimestamp(os.fstat(file.fileno()).st_mtime, UTC)
        except OSError:
            return None

    return newest_commit(names, read)


def newest_commit(names: Iterable[str], read: Callable[[int], tuple[bytes, datetime | None] | None]) -> Committed | None:
    """Of the folders `names`; `read` gives what a step's commit file says and when it was written."""
    steps = sorted((int(name) for name in names if name.isascii() and name.isdigit()), reverse=True)
    for step in steps[:_NEWEST]:
        found = read(step)
        if found is not None:
            return _commit(step, *found)
    return None


def _commit(step: int, content: bytes, at: datetime | None) -> Committed | None:
    try:
        document = json.loads(content)
    except ValueError:
        return None
    if not isinstance(document, dict):
        return None
    took = cast("dict[str, Any]", document).get(SAVE_SECONDS)
    return Committed(step, float(took) if isinstance(took, int | float) and math.isfinite(took) and took >= 0 else None, at)
