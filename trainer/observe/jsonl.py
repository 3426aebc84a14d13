"""One JSON object a line: the record everything else can be made from."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from trainer.checkpoint.storage import open_storage
from trainer.contract import METRICS_FILE
from trainer.observe.background import Record
from trainer.observe.log import open_log

STEM, _, _EXTENSION = METRICS_FILE.partition(".")
SUFFIX: Final = f".{_EXTENSION}"


class JsonLines:
    """`metrics.jsonl` in a folder, continued by each attempt; `metrics-ATTEMPT-PART.jsonl` on gs://.

    Every line has `kind` (header, step, eval, event), `attempt` and `time` (seconds since 1970). An attempt is
    one start of the trainer on the run directory, counted from 0: what a resumed run writes again can be told
    from what it wrote before. NaN and infinities, which JSON lacks, are the strings "NaN", "Infinity", "-Infinity".
    """

    def __init__(self, directory: str) -> None:
        self._attempt = next_attempt(directory)
        self._log = open_log(directory, f"{STEM}-{self._attempt:05d}" if directory.startswith("gs://") else STEM, SUFFIX)
        if torn(directory):
            self._log.append(b"\n")  # the record a kill cut short keeps a line of its own

    def write(self, record: Record) -> None:
        line = {"kind": record["kind"], "attempt": self._attempt, "time": round(time.time(), 3), **record}
        self._log.append(json.dumps(plain(line), allow_nan=False).encode() + b"\n")

    def flush(self) -> None:
        self._log.flush()

    def close(self) -> None:
        self._log.flush(now=True)


def next_attempt(directory: str) -> int:
    """Number of this start of the trainer, from what earlier ones left in `directory`. Raises OSError."""
    if directory.startswith("gs://"):
        found = [int(match[1]) for name in open_storage(directory).files() if (match := _OBJECT.fullmatch(name))]
        return max(found, default=-1) + 1
    path = Path(directory, METRICS_FILE)
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        return 1 + max((int(match[1]) for line in file if (match := _HEADER.match(line))), default=-1)


def evaluated(directory: str, done: int) -> bool:
    """Whether an evaluation after `done` steps is on record in `directory`. Raises OSError."""
    if directory.startswith("gs://"):
        storage = open_storage(directory)
        names = sorted((name for name in storage.files() if _OBJECT.fullmatch(name)), reverse=True)
        return any(_tells_of(storage.read(name).splitlines(), done) for name in names)
    path = Path(directory, METRICS_FILE)
    if not path.exists():
        return False
    with open(path, "rb") as file:
        return _tells_of(file, done)


def _tells_of(lines: Iterable[bytes], done: int) -> bool:
    return any(line.startswith(b'{"kind": "eval"') and f'"done": {done},'.encode() in line for line in lines)


def torn(directory: str) -> bool:
    """Whether the local file ends in the middle of a line."""
    path = Path(directory, METRICS_FILE)
    if directory.startswith("gs://") or not path.exists() or not path.stat().st_size:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


_HEADER: Final = re.compile(rb'\{"kind": "header", "attempt": (\d+),')
_OBJECT: Final = re.compile(rf"{STEM}-(\d+)-\d+{re.escape(SUFFIX)}")


def plain(value: Any) -> Any:
    """`value` with floats that JSON cannot say spelled as strings."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
