"""The limit on attempts without progress, which no restart budget gives: free restarts are unbounded.

Process 0 records in the run directory at which committed step each attempt starts. No JAX here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from trainer.checkpoint.commit import committed_steps
from trainer.checkpoint.storage import open_storage
from trainer.contract import ATTEMPTS_FILE, ATTEMPTS_WITHOUT_PROGRESS
from trainer.errors import NoProgress


@dataclass(frozen=True)
class Attempt:
    attempt: int
    committed_step: int | None  # the step it starts from; None: from the beginning
    started_at: str


def record_attempt(run_directory: str, attempt: int) -> Attempt:
    """Note that `attempt` starts now. Attempt 0 begins a new account; the same attempt twice (an eviction) counts once.

    Raises NoProgress when ATTEMPTS_WITHOUT_PROGRESS attempts before it already started at the same committed step.
    """
    storage = open_storage(run_directory)
    steps = committed_steps(run_directory)
    current = Attempt(attempt, steps[-1] if steps else None, datetime.now(UTC).isoformat(timespec="seconds"))
    before: list[Attempt] = []
    if attempt > 0:
        try:
            before = [Attempt(**entry) for entry in json.loads(storage.read(ATTEMPTS_FILE))["attempts"]]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass  # an account that is lost or torn begins anew: it only limits
    account = [*(entry for entry in before if entry.attempt < attempt), current]
    storage.write(ATTEMPTS_FILE, json.dumps({"attempts": [asdict(entry) for entry in account]}, indent=1).encode())
    stuck = without_progress(account[:-1], current.committed_step)
    if stuck >= ATTEMPTS_WITHOUT_PROGRESS:
        where = "before the first checkpoint" if current.committed_step is None else f"at checkpoint {current.committed_step}"
        raise NoProgress(
            f"the last {stuck} attempts started {where} and none saved a newer one",
            hint="read their logs; a shorter `checkpoint.every_steps` lets short attempts count. A new submit starts the account anew",
        )
    return current


def without_progress(attempts: Sequence[Attempt], committed_step: int | None) -> int:
    """How many of the latest attempts started at `committed_step`."""
    count = 0
    for entry in reversed(attempts):
        if entry.committed_step != committed_step:
            break
        count += 1
    return count
