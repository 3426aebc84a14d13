"""Log lines of a job's pods: what there is, merged by time, or followed over restarts, with one thread a pod."""

from __future__ import annotations

import heapq
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from launcher.backend.kubernetes_api import JOBSET, POD, Api, Patience
from launcher.backend.kubernetes_errors import TemporarilyUnavailable
from launcher.backend.selection import Selection
from launcher.backend.status import JOBSET_NAME_LABEL, LogLine, Manifest, PodStatus, job_status, pod_status
from launcher.errors import NotFound, Unavailable

LOOK_SECONDS: Final = 5.0
PATIENCE_SECONDS: Final = 300.0
QUEUED_LINES: Final = 10_000
"""Lines that wait for a slow reader; then the streams, and with them the kubelets, wait too."""
ORDER_SECONDS: Final = 0.2
"""Lines of different pods that arrive within this time are put in order."""
OPEN_AT_ONCE: Final = 64
"""Streams that are merged by time; the pods of a larger job are read group by group."""

_Stamped = tuple[bytes, LogLine]


def read_logs(api: Api, namespace: str, name: str, selection: Selection) -> Iterator[LogLine]:
    """The lines there are now, by time, the oldest attempt first."""
    pods = sorted(_started(api, namespace, name, selection), key=lambda pod: (pod.attempt, pod.slice_index, pod.worker))
    groups: list[list[PodStatus]] = []
    for pod in pods:
        if not groups or groups[-1][0].attempt != pod.attempt or len(groups[-1]) == OPEN_AT_ONCE:
            groups.append([])
        groups[-1].append(pod)
    for group in groups:
        streams = [_lines(api, namespace, pod, selection) for pod in group]
        for _, line in heapq.merge(*streams, key=lambda stamped: stamped[0]):
            yield line


def follow_logs(api: Api, namespace: str, name: str, selection: Selection) -> Iterator[LogLine]:
    """Lines as they come, until the job has finished or is gone. Raises Unavailable after minutes of nothing but faults."""
    following = _Following(api, namespace, name, selection)
    threading.Thread(target=following.scout, name=f"logs of {name}", daemon=True).start()
    try:
        while True:
            ended = False
            batch: list[_Stamped] = []
            for item in following.next_batch():
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    ended = True
                else:
                    batch.append(item)
            for _, line in sorted(batch, key=lambda stamped: stamped[0]):
                yield line
            if ended:
                return
    finally:
        following.stop.set()


@dataclass
class _Following:
    """The threads of one `follow_logs`. The scout finds pods; each pod has a reader."""

    api: Api
    namespace: str
    name: str
    selection: Selection
    lines: queue.Queue[_Stamped | Exception | None] = field(default_factory=lambda: queue.Queue(QUEUED_LINES))
    stop: threading.Event = field(default_factory=threading.Event)
    readers: dict[str, threading.Thread] = field(default_factory=dict[str, threading.Thread])

    def next_batch(self) -> Iterator[_Stamped | Exception | None]:
        """Waits for a line; then all that come within a moment of it."""
        yield self.lines.get()
        until = time.monotonic() + ORDER_SECONDS
        for _ in range(QUEUED_LINES):
            try:
                yield self.lines.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return

    def scout(self) -> None:
        """Give each pod that starts a reader at once; when the job is over and all is read, end the queue."""
        patience = Patience(PATIENCE_SECONDS)
        labels = f"{JOBSET_NAME_LABEL}={self.name}"
        try:
            while not self.stop.is_set():
                try:
                    jobset = self.api.get(JOBSET, self.namespace, self.name)
                    pods, version = self.api.list_at(POD, self.namespace, labels=labels)
                    for pod in pods:
                        self._attend(pod)
                    if job_status(jobset, []).state.finished:
                        break
                    for pod in self.api.changes(POD, self.namespace, version, labels=labels, timeout_seconds=LOOK_SECONDS):
                        self._attend(pod)
                        if self.stop.is_set():
                            return
                    patience.good()
                except TemporarilyUnavailable as error:
                    self.stop.wait(patience.pause(error))
        except NotFound:
            pass  # the job was deleted: what its pods still say is read
        except Unavailable as error:
            self._put(error)
        for reader in self.readers.values():
            reader.join()
        self._put(None)

    def _attend(self, manifest: Manifest) -> None:
        pod = pod_status(manifest)
        if pod.name not in self.readers and pod in self.selection and pod.started_at is not None:
            self.readers[pod.name] = threading.Thread(target=self._guard(self._read), args=(pod,), daemon=True)
            self.readers[pod.name].start()

    def _read(self, pod: PodStatus) -> None:
        """All lines of one container, over cut connections, each once."""
        patience, last, told = Patience(PATIENCE_SECONDS), b"", 0
        while not self.stop.is_set():
            try:
                ended = pod_status(self.api.get(POD, self.namespace, pod.name)).finished_at is not None
                since = last.decode() or self.selection.since
                again = told  # a resumed stream begins with the whole second that it stopped in
                for raw in self.api.log(self.namespace, pod.name, container=pod.container, follow=True, since=since):
                    stamp, _, text = raw.partition(b" ")
                    if stamp < last or not _is_time(stamp):
                        continue
                    if stamp == last and again:
                        again -= 1
                        continue
                    last, told = stamp, (told + 1 if stamp == last else 1)
                    self._put((stamp, _line(pod, text)))
                if ended:
                    return
                patience.good()
            except NotFound:
                return
            except TemporarilyUnavailable as error:
                self.stop.wait(patience.pause(error))

    def _guard(self, body: Callable[[PodStatus], None]) -> Callable[[PodStatus], None]:
        def run(pod: PodStatus) -> None:
            try:
                body(pod)
            except Unavailable as error:
                self._put(error)

        return run

    def _put(self, item: _Stamped | Exception | None) -> None:
        while not self.stop.is_set():
            try:
                return self.lines.put(item, timeout=1.0)
            except queue.Full:
                continue


def since_time(now: datetime, seconds: float) -> str:
    """As the API wants the beginning of a log, so long before `now`: RFC 3339, whole seconds."""
    return (now - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def _lines(api: Api, namespace: str, pod: PodStatus, selection: Selection) -> Iterator[_Stamped]:
    with suppress(NotFound):  # deleted meanwhile
        for raw in api.log(namespace, pod.name, container=pod.container, follow=False, since=selection.since):
            stamp, _, text = raw.partition(b" ")
            if _is_time(stamp):
                yield stamp, _line(pod, text)


def _is_time(stamp: bytes) -> bool:
    """Not so for the kubelet's own words in the place of a log, such as `unable to retrieve container logs for ...`."""
    return stamp[:4].isdigit()


def _started(api: Api, namespace: str, name: str, selection: Selection) -> list[PodStatus]:
    """The selected pods whose container has run or runs."""
    pods: list[Manifest] = api.list_whole(POD, namespace, labels=f"{JOBSET_NAME_LABEL}={name}")
    return [pod for pod in map(pod_status, pods) if pod in selection and pod.started_at is not None]


def _line(pod: PodStatus, text: bytes) -> LogLine:
    return LogLine(slice_index=pod.slice_index, worker=pod.worker, attempt=pod.attempt, text=text.decode("utf-8", "replace").rstrip("\r"))
