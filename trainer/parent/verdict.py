"""What the end of the child means: a pure function from how it ended to the exit code and the cause."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from typing import Final, Literal

from trainer.contract import MEANING, Exit

Killed = Literal["", "nothing unsaved", "second signal", "grace expired", "teardown"]

# The C++ side of JAX ends a process like this when another one is gone; no exception, no other trace.
_SHARED_FATE: Final = re.compile(
    r"Terminating process because the JAX distributed service detected fatal errors"
    r"|(?:coordination service|Coordination service|JAX distributed).{0,300}(?:unhealthy|heartbeat|another task died|UNAVAILABLE)",
    re.DOTALL,
)
# On CPU devices Gloo may notice it first, and throws where nothing catches: the other side closed, or half a message came.
_GLOO: Final = re.compile(r"gloo::|gloo/transport|Gloo [\w-]+ failed|Connection closed by peer")
_SILENT: Final = re.compile(r"tasks are unhealthy \(stopped sending heartbeats\):\n([^\n]{1,200})")
_ABORTS: Final = (signal.SIGABRT, signal.SIGSEGV)


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How the child ended, as the parent saw it."""

    status: int  # as subprocess gives it: negative is a signal
    announced: int | None = None  # the exit code it said it would have
    message: str = ""  # the words with it
    phase: str = "startup"
    processes: int = 1  # of the run
    asked: bool = False  # to leave, by SIGTERM or SIGINT
    killed: Killed = ""  # why the parent killed it
    tail: str = ""  # the last of its output
    out_of_memory: bool = False  # the container's memory limit killed something


@dataclass(frozen=True, kw_only=True)
class Verdict:
    code: int
    cause: str  # one sentence
    survivor: bool = False  # it ended because another process did


def verdict(ending: Ending) -> Verdict:
    if ending.announced is not None:
        survivor = ending.announced == Exit.PEER and ending.processes > 1
        return Verdict(code=ending.announced, cause=ending.message or MEANING.get(ending.announced, ""), survivor=survivor)
    by_request = ending.asked and ending.phase == "startup" and ending.status == -signal.SIGTERM
    if ending.killed == "nothing unsaved" or by_request:
        return Verdict(code=Exit.PREEMPTED, cause="asked to leave before training began; nothing was unsaved")
    if ending.killed == "second signal":
        return Verdict(code=143, cause="asked to leave twice; ended before it could save")
    if ending.killed:
        return Verdict(code=143, cause="asked to leave; the grace ended before it could save")
    if ending.status >= 0:
        words = last_line(ending.tail) if ending.status else ""
        return Verdict(code=ending.status, cause=words or MEANING.get(ending.status, ""))
    number = -ending.status
    if number in _ABORTS and _SHARED_FATE.search(ending.tail):
        silent = _SILENT.search(ending.tail)
        who = f"task {silent[1].strip()} stopped sending heartbeats" if silent else "a task died"
        return Verdict(code=Exit.PEER, cause=f"{who}; JAX ended this process with {_name(number)}", survivor=True)
    if number in _ABORTS and ending.processes > 1 and _GLOO.search(ending.tail):
        return Verdict(code=Exit.PEER, cause=f"lost the connection to a peer; Gloo ended this process with {_name(number)}", survivor=True)
    if number == signal.SIGKILL:
        return Verdict(code=137, cause="killed: out of memory" if ending.out_of_memory else "killed with SIGKILL by someone else")
    return Verdict(code=128 + number, cause=f"ended by {_name(number)} during {ending.phase}")


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
