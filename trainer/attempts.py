"""The limit on attempts without progress, which no restart budget gives: free restarts are unbounded.

Process 0 records in the run directory at which committed step each attempt starts, once its data are ready: preparing them
may take many attempts, each of which keeps what the ones before it made. No JAX here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Final

from trainer.checkpoint.commit import committed_steps
from trainer.checkpoint.storage import open_storage
from trainer.contract import ATTEMPTS_FILE, ATTEMPTS_WITHOUT_PROGRESS, LOG_FOLDER, Exit
from trainer.errors import NoProgress


@dataclass(frozen=True)
class Attempt:
    attempt: int
    committed_step: int | None  # the step it starts from; None: from the beginning
    started_at: str
    job: str = ""
    """Of a slice that is restarted by its own Job, without a number of the attempt: which Job that was."""
    rounds: int = 0
    """Where slices meet through files: rounds decided by then. While the others go on, a slice that falls behind again is not stuck."""


def numbered(run_directory: str, attempt: int, job: str) -> int:
    """The attempt that begins now: `attempt`, or how many of `job` are on the account where that restarts its slice by itself."""
    if not job:
        return attempt
    return 1 + max((entry.attempt for entry in _recorded(run_directory) if entry.job == job), default=-1)


def require_progress(run_directory: str, attempt: int, *, rounds: int = 0) -> None:
    """Before anything else in `attempt`. Attempt 0 begins a new account. rounds: decided so far, where slices meet through files.

    Raises NoProgress when ATTEMPTS_WITHOUT_PROGRESS recorded attempts before it started at the present committed step and round.
    """
    if attempt == 0:
        open_storage(run_directory).remove(ATTEMPTS_FILE)
        return
    committed_step = _committed_step(run_directory)
    stuck = without_progress(_recorded(run_directory, before=attempt), committed_step, rounds)
    if stuck >= ATTEMPTS_WITHOUT_PROGRESS:
        where = "before the first checkpoint" if committed_step is None else f"at checkpoint {committed_step}"
        raise NoProgress(
            f"the last {stuck} attempts started {where} and none saved a newer one",
            hint="read their logs; a shorter `checkpoint.every_steps` lets short attempts count. A new submit starts the account anew",
        )


def record_attempt(run_directory: str, attempt: int, job: str = "", *, rounds: int = 0) -> Attempt:
    """Note that `attempt` has its data and starts now. The same attempt twice (an eviction) counts once."""
    current = Attempt(attempt, _committed_step(run_directory), datetime.now(UTC).isoformat(timespec="seconds"), job, rounds)
    account = [*_recorded(run_directory, before=attempt), current]
    content = json.dumps({"attempts": [asdict(entry) for entry in account]}, indent=1)
    open_storage(run_directory).write(ATTEMPTS_FILE, content.encode())
    return current


def _committed_step(run_directory: str) -> int | None:
    steps = committed_steps(run_directory)
    return steps[-1] if steps else None


def _recorded(run_directory: str, *, before: int = 2**31) -> list[Attempt]:
    try:
        account = json.loads(open_storage(run_directory).read(ATTEMPTS_FILE))["attempts"]
        return [entry for entry in (Attempt(**fields) for fields in account) if entry.attempt < before]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []  # an account that is lost or torn begins anew: it only limits


def without_progress(attempts: Sequence[Attempt], committed_step: int | None, rounds: int = 0) -> int:
    """How many of the latest attempts started at `committed_step`, with so many rounds decided."""
    count = 0
    for entry in reversed(attempts):
        if (entry.committed_step, entry.rounds) != (committed_step, rounds):
            break
        count += 1
    return count


_OF_A_HOST: Final = rf"{LOG_FOLDER}/attempt-(?P<attempt>\d+)\.slice-(?P<slice>\d+)\.worker-(?P<worker>\d+)"
_LOG: Final = re.compile(rf"{_OF_A_HOST}(?:-\d+)?\.log")
_CRASH: Final = re.compile(rf"{_OF_A_HOST}\.exit-(?P<code>\d+)(?:-\d+)?\.crash\.json")
_NAMED: Final = 4


def log_stem(attempt: int, slice_index: int, worker: int) -> str:
    """Of a host's log in its run directory."""
    return f"{LOG_FOLDER}/attempt-{attempt}.slice-{slice_index}.worker-{worker}"


def after_its_last_log(run_directory: str, slice_index: int, worker: int) -> int:
    """Number of the attempt of a host whose Job replaces its pods by itself, and tells them no number: one more than its last log's."""
    logs = (match for name in open_storage(run_directory).files(LOG_FOLDER) if (match := _LOG.fullmatch(name)))
    return 1 + max((int(match["attempt"]) for match in logs if _host(match) == (slice_index, worker)), default=-1)


def _host(match: re.Match[str]) -> tuple[int, int]:
    return int(match["slice"]), int(match["worker"])


def how_it_ended(run_directory: str, attempt: int, hosts: Sequence[tuple[int, int]]) -> str:
    """Who ended `attempt`, from the crash bundles of its hosts (slice, worker); empty where it left none, as after a preemption.

    The cluster keeps nothing of a pod that was replaced, least of all its exit code.
    """
    storage = open_storage(run_directory)
    bundles = ((name, match) for name in storage.files(LOG_FOLDER) if (match := _CRASH.fullmatch(name)))
    found = {name: match for name, match in bundles if int(match["attempt"]) == attempt and _host(match) in hosts}
    causes = {name: match for name, match in found.items() if int(match["code"]) != Exit.PEER}
    if causes:
        said = [f"slice {m['slice']}, worker {m['worker']} exited with {m['code']}: {_cause(storage.read(n))}" for n, m in causes.items()]
        return "; ".join(said[:_NAMED])
    silent = sorted({*hosts} - {_host(match) for match in found.values()})
    if not found or not silent:
        return ""
    who = "; ".join(f"slice {slice_index}, worker {worker}" for slice_index, worker in silent[:_NAMED])
    return f"{who} ended without a word, and the others lost the connection: its container or its host was taken away from outside"


def _cause(bundle: bytes) -> str:
    try:
        return str(json.loads(bundle)["cause"]).strip().splitlines()[0]
    except (ValueError, KeyError, TypeError, IndexError):
        return "no cause is on record"
