"""A program of the trainer as a part of a command: it writes to the same terminal and ends when the command ends."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from launcher.errors import Unavailable


def run_trainer_module(
    module: str, arguments: Sequence[str], *, needs: str = "jax", given: str = "", capture: bool = False
) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ARGUMENTS` with `given` on its standard input; with `capture`, what it printed is in the result.

    It is a process group of its own, which is told to end where this process is. Raises Unavailable where the
    package `needs` is not installed.
    """
    if importlib.util.find_spec(needs) is None:
        raise Unavailable("the trainer's packages are not installed here", hint="in the clone: ./setup.sh train")
    words = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE if capture else None, text=True, process_group=0) as process:

        def pass_on(*_: object) -> None:
            os.killpg(process.pid, signal.SIGTERM)

        for number in (signal.SIGTERM, signal.SIGHUP):  # `timeout`, a closed terminal
            signal.signal(number, pass_on)
        try:
            printed, _ = process.communicate(given)
        except KeyboardInterrupt:
            pass_on()
            raise
    return subprocess.CompletedProcess(words, process.returncode, printed)
