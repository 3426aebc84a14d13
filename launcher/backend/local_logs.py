"""Log lines of a local job's pods, from their files; followed over restarts until the job is finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.backend.local_state import LOOK_SECONDS, JobFolder
from launcher.backend.status import LogLine, PodStatus, pod_status
from launcher.errors import NotFound


@dataclass
class _Reader:
    """One pod's file, read to where it ended last time; a line without its end waits for the rest."""

    pod: PodStatus
    path: Path
    offset: int = 0
    rest: bytes = b""

    def lines(self, *, last: bool) -> Iterator[LogLine]:
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read()
        except FileNotFoundError:
            return
        self.offset += len(data)
        *whole, self.rest = (self.rest + data).split(b"\n")
        if last and self.rest:
            whole, self.rest = [*whole, self.rest], b""
        for line in whole:
            text = line.decode("utf-8", "replace").rstrip("\r")
            yield LogLine(slice_index=self.pod.slice_index, worker=self.pod.worker, attempt=self.pod.attempt, text=text)


def log_lines(
    folder: JobFolder, *, follow: bool, slice_index: int | None, worker: int | None, over: Callable[[], bool]
) -> Iterator[LogLine]:
    """`over` says whether anything may still be written; it is asked before the files are read a last time."""
    readers: dict[str, _Reader] = {}
    while True:
        ended = not follow or over()
        try:
            pods = [pod_status(pod) for pod in folder.read().pods]
        except NotFound:
            if not readers:
                raise
            return  # cancelled meanwhile
        for pod in sorted(pods, key=lambda pod: (pod.attempt, pod.slice_index, pod.worker)):
            if slice_index in (None, pod.slice_index) and worker in (None, pod.worker):
                reader = readers.setdefault(pod.name, _Reader(pod, folder.pods / pod.name / "log"))
                yield from reader.lines(last=ended)
        if ended:
            return
        time.sleep(LOOK_SECONDS)
