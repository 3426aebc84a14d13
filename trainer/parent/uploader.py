"""`python -m trainer.parent.uploader gs://BUCKET/RUN`: appends what it reads on stdin to files there, until stdin ends.

Frames are a line `STEM SUFFIX BYTES` and so many bytes, for the objects `STEM-PART SUFFIX` of `BucketLog`. Reading never waits for
storage. Trouble with storage is told once a minute; what could not be sent is tried again, and given up with this process.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import BinaryIO, Final

from trainer.checkpoint.bucket_log import BucketLog

WAITING_BYTES: Final = 64 << 20
"""Read and not yet taken up, because storage hangs; what comes on top of it is lost."""
LOOK_SECONDS: Final = 1.0
COMPLAINT_SECONDS: Final = 60.0
LINES: Final = ".log"
"""Files of this suffix are cut between lines, so that each part has whole ones."""
LINE_BYTES: Final = 1 << 16
"""A longer line may be cut."""
NICENESS: Final = 5

Frame = tuple[str, str, bytes]


class Inbox:
    """Frames between the thread that reads and the one that sends."""

    def __init__(self) -> None:
        self._frames: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._bytes = 0
        self._lock = threading.Lock()

    def read(self, stream: BinaryIO) -> None:
        """All of `stream`. A frame cut short is what a killed process was writing."""
        while (head := stream.readline()).endswith(b"\n"):
            stem, suffix, size = head[:-1].decode().split(" ")
            data = stream.read(int(size))
            with self._lock:
                room = self._bytes + len(data) <= WAITING_BYTES
                self._bytes += len(data) if room else 0
            if room:
                self._frames.put((stem, suffix, data))
        self._frames.put(None)

    def next(self) -> Frame | None:
        """None at the end. Raises queue.Empty when nothing came for a moment."""
        frame = self._frames.get(timeout=LOOK_SECONDS)
        with self._lock:
            self._bytes -= len(frame[2]) if frame else 0
        return frame


class Sender:
    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._logs: dict[tuple[str, str], BucketLog] = {}
        self._rest: dict[str, bytes] = {}  # the beginning of a line, by stem
        self._complained_at = -COMPLAINT_SECONDS

    def append(self, stem: str, suffix: str, data: bytes) -> None:
        if suffix == LINES:
            data = self._rest.pop(stem, b"") + data
            end = len(data) if len(data) > LINE_BYTES else data.rfind(b"\n") + 1
            data, self._rest[stem] = data[:end], data[end:]
        if data:
            begins = suffix == LINES and (stem, suffix) not in self._logs
            with self._complaining():
                log = self._log(stem, suffix)
                log.append(data)
                if begins:  # that there is one tells a later process, and whoever looks, that this one has run
                    log.flush(now=True)

    def flush(self) -> None:
        for log in self._logs.values():
            with self._complaining():
                log.flush()

    def close(self) -> None:
        for stem, rest in self._rest.items():
            if rest:
                with self._complaining():
                    self._log(stem, LINES).append(rest)
        for log in self._logs.values():
            with self._complaining():
                log.flush(now=True)

    def _log(self, stem: str, suffix: str) -> BucketLog:
        if (stem, suffix) not in self._logs:
            self._logs[stem, suffix] = BucketLog(self._directory, stem, suffix)
        return self._logs[stem, suffix]

    @contextlib.contextmanager
    def _complaining(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if time.monotonic() - self._complained_at >= COMPLAINT_SECONDS:
                self._complained_at = time.monotonic()
                print(f"warning: no log is uploaded: {error}", file=sys.stderr, flush=True)


def main(directory: str) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the parent decides
    os.nice(NICENESS)
    inbox = Inbox()
    threading.Thread(target=inbox.read, args=(sys.stdin.buffer,), daemon=True).start()
    sender = Sender(directory)
    while True:
        try:
            frame = inbox.next()
        except queue.Empty:
            sender.flush()
            continue
        if frame is None:
            sender.close()
            return
        sender.append(*frame)


if __name__ == "__main__":
    main(sys.argv[1])
