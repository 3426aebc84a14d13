"""The parent's side of the uploader: bytes for files on gs://, handed over without ever waiting for storage."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
from collections import deque
from typing import Final

BACKLOG_BYTES: Final = 8 << 20
"""Kept for an uploader that does not read, as while it starts; what comes on top of it is lost, and said to be."""


class Uploads:
    """A process of its own, because the parent is the standard library alone and has signals to attend to.

    It outlives the trainer proper, and the parent where that is not PID 1: a closed pipe makes it send the rest and end.
    """

    def __init__(self, directory: str, selector: selectors.BaseSelector) -> None:
        self.directory = directory
        self.ended = False
        self.lost = 0  # bytes
        self._selector = selector
        self._frames: deque[bytes] = deque()
        self._waiting = 0
        self._closing = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trainer.parent.uploader", directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            process_group=0,  # a Ctrl-C is for us to act on
        )
        assert self._process.stdin
        self._pipe = self._process.stdin.fileno()
        os.set_blocking(self._pipe, False)

    def append(self, stem: str, suffix: str, data: bytes) -> None:
        """Add to `<stem>-PART<suffix>` under the directory; both are paths without spaces."""
        if self.ended or self._waiting > BACKLOG_BYTES:
            self.lost += len(data)
            return
        frame = f"{stem} {suffix} {len(data)}\n".encode() + data
        self._frames.append(frame)
        self._waiting += len(frame)
        self.push()

    def push(self, _: int = -1) -> bool:
        """Write what the pipe takes; the selector calls again when it takes more."""
        if self._pipe < 0:
            return False
        try:
            while self._frames:
                written = os.write(self._pipe, self._frames[0])
                self._waiting -= written
                if written == len(self._frames[0]):
                    self._frames.popleft()
                else:
                    self._frames[0] = self._frames[0][written:]
        except BlockingIOError:
            if self._pipe not in self._selector.get_map():
                self._selector.register(self._pipe, selectors.EVENT_WRITE, self.push)
            return False
        except OSError:  # it is gone
            self._frames.clear()
            self._waiting = 0
        if self._pipe in self._selector.get_map():
            self._selector.unregister(self._pipe)
        if self._closing:
            self._close()
        return False

    def finish(self) -> None:
        """Nothing follows; it ends when all is sent."""
        self._closing = True
        if self.lost:
            print(f"{self.lost} bytes of logs and metrics are not on gs://", file=sys.stderr)
        self.push()

    def reaped(self, pid: int, status: int) -> bool:
        """Whether the process that has ended is the uploader."""
        if pid != self._process.pid:
            return False
        self.ended = True
        self._process.returncode = os.waitstatus_to_exitcode(status)  # the parent has reaped it
        if self._process.returncode or not self._closing:
            print("the uploader has failed: logs and metrics of this process are no longer kept on gs://", file=sys.stderr)
        self._frames.clear()
        self.push()
        return True

    def kill(self) -> None:
        if not self.ended:
            print(f"{self.directory} does not answer: the end of the logs is not kept there", file=sys.stderr)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _close(self) -> None:
        assert self._process.stdin
        self._pipe = -1
        with contextlib.suppress(OSError):
            self._process.stdin.close()
