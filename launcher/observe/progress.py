"""How far a run has come, from the record the trainer keeps in its run directory."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, cast

from trainer.contract import METRICS_FILE, METRICS_FOLDER

TAIL_BYTES: Final = 256 * 1024


@dataclass(frozen=True, kw_only=True)
class Progress:
    done: int  # finished steps
    loss: float | None  # of the last one
    at: datetime


def last_progress(run_directory: str) -> Progress | None:
    """The newest step on record; None where there is none, or where the directory is not on this machine."""
    if "://" in run_directory:
        return None
    try:
        with open(Path(run_directory, METRICS_FOLDER, METRICS_FILE), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        record = _record(line)
        if record.get("kind") == "step" and isinstance(record.get("done"), int):
            loss = record.get("loss")
            return Progress(
                done=record["done"],
                loss=float(loss) if isinstance(loss, int | float | str) else None,
                at=datetime.fromtimestamp(float(record.get("time", 0)), UTC),
            )
    return None


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:  # cut short
        return {}
    return cast("dict[str, Any]", record) if isinstance(record, dict) else {}
