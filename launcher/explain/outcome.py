"""What becomes of the job after each way a process can end, under its failure mode.

The table `effect` is what `explain` prints, what docs/reference.md shows, and what tests/cluster/test_failure_matrix.py proves
on real pods, row by row.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, Literal

from launcher.spec import Failure
from trainer import contract

Mode = Literal["smart", "strict", "simple"]
MODES: Final[tuple[Mode, ...]] = ("smart", "strict", "simple")


class Effect(StrEnum):
    DONE = "done, once every process has ended so"
    STOP = "the job stops"
    FREE = "restart, free"
    COUNTED = "restart, counted"


class Event(StrEnum):
    """Ends that an exit code does not decide."""

    DISRUPTION = "node drained or reclaimed, pod evicted or preempted by the scheduler"  # DisruptionTarget
    QUEUE_PREEMPTION = "preempted by its Kueue queue"


def effect(mode: Mode, end: int | Event) -> Effect:
    """Of an exit code, or of an event whose pod ended with a code of no rule, such as 143."""
    match end:
        case Event.QUEUE_PREEMPTION:
            return Effect.FREE  # Kueue suspends the JobSet: nothing has failed
        case Event.DISRUPTION:
            return Effect.FREE if mode == "smart" else Effect.COUNTED
        case contract.Exit.DONE:
            return Effect.DONE
        case _ if mode != "simple" and end in contract.FATAL_EXIT_CODES:
            return Effect.STOP
        case _ if mode == "smart" and end in contract.FREE_EXIT_CODES:
            return Effect.FREE
        case _:
            return Effect.COUNTED


def outcomes(failure: Failure, *, slice_alone: bool = False) -> dict[str, str]:
    """`CODE (meaning)` -> what happens; then the ends that have no exit code. `slice_alone`: every slice is a JAX world of its own."""

    def said(end: int | Event) -> str:
        words = _said(failure, end)
        return f"of this slice alone: {words}" if slice_alone and words.startswith("restart, ") else words

    found = {f"{code} ({meaning})": said(code) for code, meaning in sorted(contract.MEANING.items())}
    return {**found, "any other code": said(-1), **{event.value: said(event) for event in Event}}


def _said(failure: Failure, end: int | Event) -> str:
    match effect(failure.mode, end):
        case Effect.STOP:
            return "the job ends"
        case Effect.FREE if end is Event.QUEUE_PREEMPTION:
            return "waits in the queue again, free"
        case Effect.FREE:
            return f"restart, free; {contract.ATTEMPTS_WITHOUT_PROGRESS} attempts without a new checkpoint end the job"
        case Effect.COUNTED if failure.max_restarts:
            return f"restart, counted (at most {failure.max_restarts})"
        case Effect.COUNTED:
            return "the job ends (no restarts allowed)"
        case done:
            return done.value
