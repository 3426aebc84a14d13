"""The child's side of the pipe to its parent. Without a parent every call does nothing.

One JSON object a line, from child to parent: `processes` of the run, `log_file` (where to keep a copy of the output) or `uploads` (the
run directory on gs://) with `log` (the file there), `append` (stem and suffix of another file there) with `data`, `phase` (`training`:
from now on there may be unsaved steps), `step`, and last `exit_code` with its `message`.
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
_writing = threading.Lock()
_uploads = ""  # the run directory, where the parent sends what is appended there


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
    line = memoryview(json.dumps(facts).encode() + b"\n")
    try:
        with _writing:
            while line:
                line = line[os.write(_link, line) :]
    except OSError:
        _link = None


def keep_output(run_directory: str, log: str) -> None:
    """Have the parent keep a copy of the output in the run directory: in the file `log`.log, on gs:// in `log`-PART.log."""
    global _uploads
    if run_directory.startswith("gs://"):
        _uploads = run_directory.rstrip("/") if _link is not None else ""
        tell(uploads=run_directory.rstrip("/"), log=log)
    else:
        tell(log_file=os.path.abspath(os.path.join(run_directory, f"{log}.log")))


def below_uploads(directory: str) -> str | None:
    """The path of `directory` in the run directory, where the parent sends what is appended to files there; else None."""
    return directory.removeprefix(f"{_uploads}/") if _uploads and directory.startswith(f"{_uploads}/") else None


def append(stem: str, suffix: str, data: bytes) -> None:
    """Have the parent add bytes, kept together, to `stem`-PART`suffix` of the run directory."""
    tell(append=[stem, suffix], data=data.decode("latin-1"))


def bytes_of(data: str) -> bytes:
    """What `append` was given."""
    return data.encode("latin-1")


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
