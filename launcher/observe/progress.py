"""How far a run has come: from the record in its run directory where this machine has it, else from the log of process 0."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, cast

from launcher.observe.commits import last_commit
from trainer.contract import COMMITTED, METRICS_FILE, METRICS_FOLDER

TAIL_BYTES: Final = 256 * 1024


@dataclass(frozen=True, kw_only=True)
class Progress:
    done: int | None = None  # finished steps
    total: int | None = None
    loss: float | None = None  # of the last one
    step_seconds: float | None = None
    at: datetime | None = None  # when it was told
    checkpoint: int | None = None  # the last committed one that is on record
    checkpoint_at: datetime | None = None
    save_seconds: float | None = None  # of that one, from when it was asked for


def last_progress(run_directory: str) -> Progress | None:
    """The newest step on record and the newest checkpoint; None where there is none, or where the directory is not on this machine."""
    if "://" in run_directory:
        return None
    found = _recorded(run_directory)
    # The trainer tells of a commit between two steps or two batches of an evaluation; the commit file is there before.
    committed = last_commit(run_directory)
    if committed and committed.step != found.checkpoint:
        found = replace(found, checkpoint=committed.step, checkpoint_at=committed.at, save_seconds=committed.save_seconds)
    return None if found == Progress() else found


def _recorded(run_directory: str) -> Progress:
    try:
        with open(Path(run_directory, METRICS_FOLDER, METRICS_FILE), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            records = [_record(line) for line in file.read().splitlines()]
    except OSError:
        return Progress()
    found = Progress()
    for record in records:
        at = datetime.fromtimestamp(float(record.get("time", 0)), UTC)
        if record.get("kind") == "step" and isinstance(record.get("done"), int):
            loss, seconds = record.get("loss"), record.get("step_seconds", found.step_seconds)
            known = float(loss) if isinstance(loss, int | float | str) else None
            found = replace(found, done=record["done"], loss=known, step_seconds=seconds, at=at)
        elif record.get("event") == COMMITTED and isinstance(record.get("step"), int):
            took = record.get("seconds")
            found = replace(
                found, checkpoint=record["step"], checkpoint_at=at, save_seconds=float(took) if isinstance(took, int | float) else None
            )
    return found


_STEP: Final = re.compile(r"\[ *(?P<done>\d+)/(?P<total>\d+)\]  loss (?P<loss>\S+)(?:.*?  (?P<time>[\d.]+) (?P<unit>ms|s)/step)?")
_COMMIT: Final = re.compile(rf"{COMMITTED}: step (?P<step>\d+)(?:  seconds (?P<seconds>[\d.]+))?")


def progress_in(log: Sequence[str]) -> Progress | None:
    """The newest step in lines of a log, each after its time (RFC 3339) and a space; None where there is none."""
    found = Progress()
    for line in log:
        stamp, _, text = line.partition(" ")
        if step := _STEP.match(text):
            seconds = float(step["time"]) / (1000 if step["unit"] == "ms" else 1) if step["time"] else found.step_seconds
            found = replace(
                found, done=int(step["done"]), total=int(step["total"]), loss=_number(step["loss"]), step_seconds=seconds, at=_time(stamp)
            )
        elif commit := _COMMIT.match(text):
            took = _number(commit["seconds"]) if commit["seconds"] else None
            found = replace(found, checkpoint=int(commit["step"]), checkpoint_at=_time(stamp), save_seconds=took)
    return None if found == Progress() else found


def _time(stamp: str) -> datetime | None:
    try:
        return datetime.fromisoformat(stamp)
    except ValueError:
        return None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:  # cut short
        return {}
    return cast("dict[str, Any]", record) if isinstance(record, dict) else {}
