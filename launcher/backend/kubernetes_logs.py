"""Log lines of a job's pods: what there is, or followed over restarts, with one thread a pod."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from launcher.backend.kubernetes_api import JOBSET, POD, Api, Patience
from launcher.backend.kubernetes_errors import TemporarilyUnavailable
from launcher.backend.status import JOBSET_NAME_LABEL, LogLine, Manifest, PodStatus, job_status, pod_status
from launcher.errors import NotFound, Unavailable
from trainer.contract import CONTAINER_NAME

LOOK_SECONDS: Final = 5.0
PATIENCE_SECONDS: Final = 300.0
_QUEUED_LINES: Final = 10_000


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Whose lines; None means all."""

    slice_index: int | None = None
    worker: int | None = None

    def __contains__(self, pod: PodStatus) -> bool:
        return self.slice_index in (None, pod.slice_index) and self.worker in (None, pod.worker)


def read_logs(api: Api, namespace: str, name: str, selection: Selection) -> Iterator[LogLine]:
    """The lines there are now, pod by pod, the oldest attempt first."""
    for pod in sorted(_started(api, namespace, name, selection), key=lambda pod: (pod.attempt, pod.slice_index, pod.worker)):
        try:
            for raw in api.log(namespace, pod.name, container=CONTAINER_NAME, follow=False):
                yield _line(pod, raw.partition(b" ")[2])
        except NotFound:
            continue  # deleted meanwhile


def follow_logs(api: Api, namespace: str, name: str, selection: Selection) -> Iterator[LogLine]:
    """Lines as they come, until the job has finished or is gone. Raises Unavailable after minutes of nothing but faults."""
    following = _Following(api, namespace, name, selection)
    threading.Thread(target=following.scout, name=f"logs of {name}", daemon=True).start()
    try:
        while True:
            item = following.lines.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                return
            yield item
    finally:
        following.stop.set()


@dataclass
class _Following:
    """The threads of one `follow_logs`. The scout finds pods; each pod has a reader."""

    api: Api
    namespace: str
    name: str
    selection: Selection
    lines: queue.Queue[LogLine | Exception | None] = field(default_factory=lambda: queue.Queue(_QUEUED_LINES))
    stop: threading.Event = field(default_factory=threading.Event)

    def scout(self) -> None:
        """Give each pod that starts a reader; when the job is over and all is read, end the queue."""
        readers: dict[str, threading.Thread] = {}
        patience = Patience(PATIENCE_SECONDS)
        try:
            while not self.stop.is_set():
                try:
                    jobset = self.api.get(JOBSET, self.namespace, self.name)
                    for pod in _started(self.api, self.namespace, self.name, self.selection):
                        if pod.name not in readers:
                            readers[pod.name] = threading.Thread(target=self._guard(self._read), args=(pod,), daemon=True)
                            readers[pod.name].start()
                    if job_status(jobset, []).state.finished:
                        break
                    self.api.wait_for_change(JOBSET, jobset, timeout_seconds=LOOK_SECONDS)
                    patience.good()
                except TemporarilyUnavailable as error:
                    self.stop.wait(patience.pause(error))
        except NotFound:
            pass  # the job was deleted: what its pods still say is read
        except Unavailable as error:
            self._put(error)
        for reader in readers.values():
            reader.join()
        self._put(None)

    def _read(self, pod: PodStatus) -> None:
        """All lines of one container, over cut connections, each once."""
        patience, last = Patience(PATIENCE_SECONDS), b""
        while not self.stop.is_set():
            try:
                ended = pod_status(self.api.get(POD, self.namespace, pod.name)).finished_at is not None
                for raw in self.api.log(self.namespace, pod.name, container=CONTAINER_NAME, follow=True, since=last.decode() or None):
                    time, _, text = raw.partition(b" ")
                    if time > last:  # a resumed stream begins with the whole second that it stopped in
                        last = time
                        self._put(_line(pod, text))
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

    def _put(self, item: LogLine | Exception | None) -> None:
        while not self.stop.is_set():
            try:
                return self.lines.put(item, timeout=1.0)
            except queue.Full:
                continue


def _started(api: Api, namespace: str, name: str, selection: Selection) -> list[PodStatus]:
    """The selected pods whose container has run or runs."""
    pods: list[Manifest] = api.list(POD, namespace, labels=f"{JOBSET_NAME_LABEL}={name}")
    return [pod for pod in map(pod_status, pods) if pod in selection and pod.started_at is not None]


def _line(pod: PodStatus, text: bytes) -> LogLine:
    return LogLine(slice_index=pod.slice_index, worker=pod.worker, attempt=pod.attempt, text=text.decode("utf-8", "replace").rstrip("\r"))
