"""What becomes of the job after each way a process can end, under its failure mode."""

from __future__ import annotations

from launcher.spec import Failure
from trainer import contract


def outcomes(failure: Failure) -> dict[str, str]:
    """`CODE (meaning)` -> what happens; then the ends that have no exit code."""
    found = {f"{code} ({meaning})": _outcome(failure, code) for code, meaning in sorted(contract.MEANING.items())}
    counted = _counted(failure)
    return {
        **found,
        "any other code": counted,
        "node drained or reclaimed, pod evicted": "restart, free" if failure.mode == "smart" else counted,
        "preempted by its Kueue queue": "waits in the queue again, free",
    }


def _outcome(failure: Failure, code: int) -> str:
    if code == contract.Exit.DONE:
        return "done, once every process has ended so"
    if failure.mode != "simple" and code in contract.FATAL_EXIT_CODES:
        return "the job ends"
    if failure.mode == "smart" and code in contract.FREE_EXIT_CODES:
        return f"restart, free; {contract.ATTEMPTS_WITHOUT_PROGRESS} attempts without a new checkpoint end the job"
    return _counted(failure)


def _counted(failure: Failure) -> str:
    return f"restart, counted (at most {failure.max_restarts})" if failure.max_restarts else "the job ends (no restarts allowed)"
