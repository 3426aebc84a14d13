"""The child's side of the pipe to its parent. Without a parent every call does nothing.

One JSON object a line, from child to parent: `processes` of the run, `log_file` (where to keep a copy of the output), `phase`
(`training`: from now on there may be unsaved steps), `step`, and last `exit_code` with its `message`.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
from typing import Any, Final

VARIABLE: Final = "NNX_PARENT"
STACKS_SIGNAL: Final = signal.SIGUSR1
"""The parent sends it to have the stacks of all threads written, before it kills."""

_link: int | None = None


def attach() -> None:
    """Take over what the parent left in the environment, and make sure that this process does not outlive it."""
    global _link
    told = os.environ.pop(VARIABLE, None)
    if told is None:
        faulthandler.enable()
        return
    _link, leash, stacks, parent = (int(part) for part in told.split(","))
    for descriptor in (_link, leash, stacks):
        os.set_inheritable(descriptor, False)
    faulthandler.enable(file=stacks, all_threads=True)
    faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True)
    _end_with(parent, leash)


def tell(**facts: Any) -> None:
    """Send one line; a parent that is gone is no reason to fail."""
    global _link
    if _link is None:
        return
    try:
        os.write(_link, json.dumps(facts).encode() + b"\n")
    except OSError:
        _link = None


def _end_with(parent: int, leash: int) -> None:
    if sys.platform == "linux":
        import ctypes

        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(137)
    else:
        threading.Thread(target=_hold, args=(leash,), name="leash", daemon=True).start()


def _hold(leash: int) -> None:
    os.read(leash, 1)  # returns only when the parent's end closes
    os._exit(137)
