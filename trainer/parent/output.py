"""The child's output: passed on at once, its end remembered, and kept where the run keeps its logs."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Final

from trainer.parent.evidence import TAIL_BYTES

EARLY_BYTES: Final = 1 << 20
"""Output kept until the child has said where its log file is."""


class Output:
    def __init__(self) -> None:
        self.path: Path | None = None
        self._file: FileIO | None = None
        self._send: Callable[[bytes], None] | None = None
        self._recent: deque[bytes] = deque()
        self._recent_bytes = 0
        self._keep_bytes = EARLY_BYTES
        self._closed: set[int] = set()

    def write(self, chunk: bytes, target: int) -> None:
        if target not in self._closed:
            try:
                _write_all(target, chunk)
            except OSError:  # nobody reads there any more
                self._closed.add(target)
        self._remember(chunk)
        if self._send:
            self._send(chunk)
        if self._file:
            try:
                _write_all(self._file.fileno(), chunk)
            except OSError as error:
                self._file = None
                print(f"{self.path}: {error.strerror}; the log goes on without this file", file=sys.stderr)

    def keep_in(self, path: Path) -> None:
        """Append to `path` from now on, with what has been written so far."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0)
            self.path = path
            begun = os.fstat(self._file.fileno()).st_size > 0  # a run that is submitted again counts its attempts from 0 again
            _write_all(self._file.fileno(), b"".join([_border(), *self._recent] if begun else self._recent))
        except OSError as error:
            print(f"no log file {path}: {error.strerror}", file=sys.stderr)
        self._keep_bytes = TAIL_BYTES

    def send_to(self, send: Callable[[bytes], None]) -> None:
        """Give `send` what has been written so far, and all that follows."""
        send(b"".join(self._recent))
        self._send = send
        self._keep_bytes = TAIL_BYTES

    def tail(self) -> str:
        return b"".join(self._recent)[-TAIL_BYTES:].decode(errors="replace")

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _remember(self, chunk: bytes) -> None:
        self._recent.append(chunk)
        self._recent_bytes += len(chunk)
        while self._recent_bytes - len(self._recent[0]) >= self._keep_bytes:
            self._recent_bytes -= len(self._recent.popleft())


def _border() -> bytes:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return f"---- {now}: started again; the lines above are of an earlier start of this run ----\n".encode()


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
