"""A writer behind a bounded queue and a thread of its own, so that no sink can slow a training step."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

Record = Mapping[str, Any]

CAPACITY: Final = 4096
IDLE_SECONDS: Final = 1.0
RETRY_SECONDS: Final = 5.0
COMPLAINT_SECONDS: Final = 60.0


class Writer(Protocol):
    """A sink of records. Made and called by one thread only; whatever it raises is reported and does not end the run."""

    def write(self, record: Record) -> None: ...

    def flush(self) -> None:
        """Called about once a second when there is nothing to write, and now and then while there is."""
        ...

    def close(self) -> None: ...


class Background:
    """Hands records to a writer in order. When the queue is full a record is dropped and counted."""

    def __init__(self, name: str, make: Callable[[], Writer], *, capacity: int = CAPACITY, retry_seconds: float = RETRY_SECONDS) -> None:
        self.dropped = 0
        self.failed = 0
        self._name = name
        self._make = make
        self._retry_seconds = retry_seconds
        self._queue: queue.Queue[Record | None] = queue.Queue(capacity)
        self._closing = threading.Event()
        self._complained_at = -COMPLAINT_SECONDS
        # A daemon: a sink that hangs must not keep the process from its exit code.
        self._thread = threading.Thread(target=self._work, name=f"{name}-writer", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        """Never blocks."""
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def close(self, deadline: float) -> bool:
        """Write what is queued and stop, until `deadline` (time.monotonic()). False if the writer was not done by then."""
        self._closing.set()
        try:
            self._queue.put_nowait(None)  # wakes a waiting thread; a busy one looks at the event
        except queue.Full:
            pass
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def _work(self) -> None:
        writer = self._made()
        if writer is None:
            return
        flushed = time.monotonic()
        reported = 0
        while not (self._closing.is_set() and self._queue.empty()):
            try:
                record = self._queue.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                record = None
            if record is not None:
                self._try(lambda record=record: writer.write(record))
            if self.dropped > reported:
                lost, reported = self.dropped - reported, self.dropped
                self._try(lambda lost=lost: writer.write({"kind": "event", "event": "records_dropped", "count": lost}))
            if record is None or time.monotonic() - flushed > IDLE_SECONDS:
                flushed = time.monotonic()
                self._try(writer.flush)
        self._try(writer.close)

    def _made(self) -> Writer | None:
        """The writer, tried until it can be made; records wait in the queue meanwhile. None when closed before that."""
        made: list[Writer] = []
        while not self._try(lambda: made.append(self._make())):
            if self._closing.wait(self._retry_seconds):
                return None
        return made[0]

    def _try(self, call: Callable[[], None]) -> bool:
        try:
            call()
            return True
        except Exception as error:  # any client library's error: reports must not end a training run
            self.failed += 1
            if time.monotonic() - self._complained_at >= COMPLAINT_SECONDS:
                self._complained_at = time.monotonic()
                print(f"warning: {self._name} metrics: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            return False
