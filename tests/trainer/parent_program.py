"""A child for the parent in `trainer.parent`, and the parent around it: `python -m tests.trainer.parent_program MODE [FILE]`.

Standard library only, so that a test of the parent costs a tenth of a second.
"""

from __future__ import annotations

import atexit
import itertools
import mmap
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from trainer.parent import link

PEER_DIED = (
    "Terminating process because the JAX distributed service detected fatal errors. This most likely indicates that another task died"
)

GLOO_DIED = (
    "terminate called after throwing an instance of 'gloo::EnforceNotMet'\n"
    "  what():  [enforce fail at external/gloo/gloo/transport/tcp/pair.cc:446] op.preamble.nbytes == buf->size_. "
    "Received data size doesn't match expected size. Is there a send/recv mismatch in your collective calls?"
)


def wait() -> None:
    """For a signal without a handler; a signal with one does not end it."""
    while True:
        signal.pause()


def child(mode: str, file: str) -> None:
    link.attach()
    match mode:
        case "compiling":  # deaf, as in a long call into C++
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            print("started", flush=True)
            wait()
        case "training" | "forever":
            asked: list[float] = []
            signal.signal(signal.SIGTERM, lambda *_: asked.append(time.monotonic()))
            link.tell(log_file=file, phase="training")
            link.tell(step=41)
            print("started", flush=True)
            while mode == "forever" or not asked:
                signal.pause()
            link.tell(exit_code=75, message=f"asked at {asked[0]}")
            os.abort()  # taking itself apart goes wrong
        case "abort" | "peer" | "gloo":
            print({"peer": PEER_DIED, "gloo": GLOO_DIED}.get(mode, "one of its own"), file=sys.stderr, flush=True)
            link.tell(processes=2)
            os.abort()
        case "code" | "shutdown":
            print("last words", file=sys.stderr)
            os._exit(int(file))
        case "said":
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            link.tell(exit_code=int(file), message="announced")
            print("started", flush=True)
            wait()
        case "log":
            print("before the log file is known")
            sys.stdout.flush()
            link.tell(log_file=file)
            print("after it is known")
            print("on stderr", file=sys.stderr)
            print(os.environ.get("HUB_TOKEN"), "https://user:pass@host/x")
            sys.stdout.flush()
            raise SystemExit(70)
        case "uploads":
            print("before storage is known", flush=True)
            link.keep_output(file, "logs/attempt-0.slice-0.worker-0")
            for number in range(3):
                link.append("metrics/metrics-00000", ".jsonl", b'{"step": %d}\n' % number)
            link.append("metrics/events", "", bytes(range(256)))
            print("started", flush=True)
            for number in itertools.count() if os.environ.get("TALK") else ():
                print("line", number, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        case "memory":
            print(*(_pages_of(64 << 20) for _ in range(3)), flush=True)
        case "orphan":
            # Its parent ends at once, so it becomes a child of PID 1.
            subprocess.run([sys.executable, "-S", "-c", "import os; os.fork() or os._exit(0)"], check=True)
            Path(file).write_text("done")
            wait()
        case _:
            raise ValueError(mode)


def _pages_of(size: int) -> int:
    """How many pages the kernel had to give for `size` bytes that are written to and let go."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    array = bytearray(size)
    for place in range(0, size, mmap.PAGESIZE):
        array[place] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def main(mode: str, file: str = "") -> None:
    if "NNX_PARENT" in os.environ:
        child(mode, file)
        return
    early: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: early.append(number))
    from trainer.parent.process import Parent, leave

    if mode == "shutdown":  # the moment at the end when Python has no handlers any more and a SIGTERM comes
        atexit.register(lambda: (signal.signal(signal.SIGTERM, signal.SIG_DFL), os.kill(os.getpid(), signal.SIGTERM)))
    leave(Parent([sys.executable, "-m", "tests.trainer.parent_program", mode, file]).run(early))


if __name__ == "__main__":
    main(*sys.argv[1:])
