"""Which lines of a job's logs are wanted."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.backend.status import PodStatus


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Whose lines, and from when; None means all."""

    slice_index: int | None = None
    worker: int | None = None
    since: str | None = None  # RFC 3339

    def __contains__(self, pod: PodStatus) -> bool:
        return self.slice_index in (None, pod.slice_index) and self.worker in (None, pod.worker)
