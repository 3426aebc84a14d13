"""Following a job to its end: lines on standard output, then an exit code that says how it ended."""

from __future__ import annotations

import os
import sys
from collections import deque

from launcher.backend import Backend, JobState
from launcher.errors import JobFailed


def follow(backend: Backend, name: str, *, options: str) -> None:
    """Print the logs of all hosts until the job has ended; `options` follow the job's name in other commands about it.

    Raises JobFailed when it ended badly.
    """
    try:
        for line in backend.logs(name, follow=True):
            print(line.prefix, line.text, flush=True)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    except KeyboardInterrupt:
        print(f"interrupted: {name} goes on; stop it with: nnxlaunch cancel {name}{options}", file=sys.stderr)
        raise
    (status,) = deque(backend.watch(name), maxlen=1)
    if status.state is JobState.FAILED:
        raise JobFailed(f"{name} failed: {status.message}", hint=f"see more with: nnxlaunch status {name}{options}")
    print(f"{name}: {status.state}")
