"""Rows of the results table, CPU clocks and child processes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.parent.allocator import memory_kept

# What would change the work if it leaked in from the caller.
_REMOVED = (
    "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "JAX_NUM_CPU_DEVICES", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION",
    "PYTHONDONTWRITEBYTECODE",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One figure. `value` and `limit` are in `unit`; the limit is an upper bound."""

    name: str
    unit: str
    value: float
    limit: float
    note: str = ""

    @property
    def met(self) -> bool:
        return self.value <= self.limit


def cpu_seconds() -> float:
    """User and system CPU-seconds of this process, all threads, since it started."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def environment(devices: int = 1) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _REMOVED}
    given = {**kept, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    return {**given, **memory_kept(given)}  # as the trainer's parent does


def child_json(arguments: Sequence[str], *, devices: int = 1) -> dict[str, Any]:
    """Run this Python with `arguments`; the last line it prints, as JSON. Raises CalledProcessError when it fails."""
    done = subprocess.run([sys.executable, *arguments], env=environment(devices), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@dataclass(frozen=True)
class Spent:
    """Seconds of a whole process and its children."""

    wall: float
    cpu: float  # user and system


def child_spent(arguments: Sequence[str], *, devices: int = 1) -> Spent:
    """Run this Python with `arguments`. Raises CalledProcessError when it fails."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([sys.executable, *arguments], env=environment(devices), stdout=subprocess.DEVNULL, check=True)
    after, end = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    return Spent(wall=end - begin, cpu=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def child_cpu_seconds(arguments: Sequence[str], *, devices: int = 1) -> float:
    """User and system CPU-seconds of a whole process (and its children) that must end with 0."""
    return child_spent(arguments, devices=devices).cpu
