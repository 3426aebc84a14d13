"""Where a rendered job runs: one protocol, two doors (`kubernetes`, `local`).

A backend takes manifests and gives plain values (`launcher.backend.status`). Only the modules of this package
talk to a cluster or start processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from launcher.backend.scene import Scene
from launcher.backend.status import (
    Condition,
    Event,
    JobState,
    JobStatus,
    LogLine,
    Manifest,
    PodStatus,
    SliceStatus,
    explain_exit,
    job_status,
    pod_status,
)
from launcher.kinds import BackendKind

__all__ = [
    "Backend", "BackendKind", "Condition", "Event", "JobState", "JobStatus", "LogLine", "Manifest", "PodStatus", "Scene", "SliceStatus",
    "explain_exit", "job_status", "open_backend", "pod_status",
]  # fmt: skip


class Backend(Protocol):
    """Every method raises launcher.errors.Unavailable when the other side cannot be reached or refuses."""

    namespace: str

    def create(self, manifests: Sequence[Manifest], *, replace: bool = False) -> JobStatus:
        """Create one job from its manifests (one JobSet and what belongs to it).

        With `replace`, an existing job of the name is deleted first, and this waits until it is gone.
        Raises AlreadyExists otherwise.
        """
        ...

    def get(self, name: str) -> JobStatus:
        """Raises NotFound."""
        ...

    def list(self) -> list[JobStatus]:
        """The jobs of this launcher and of XPK in the namespace, by name."""
        ...

    def scene(self, name: str) -> Scene:
        """All that says how the job is doing, in at most five requests. Raises NotFound."""
        ...

    def delete(self, name: str) -> None:
        """Delete the job and all that was created with it; returns when its pods are gone. Raises NotFound."""
        ...

    def suspend(self, name: str) -> JobStatus:
        """Stop the pods, keep the job; returns when they are gone. Raises NotFound, and NnxlaunchError when it has ended."""
        ...

    def resume(self, name: str) -> JobStatus:
        """Let a suspended job go on. Raises NotFound, and NnxlaunchError when it is not suspended."""
        ...

    def watch(self, name: str, *, timeout_seconds: float | None = None) -> Iterator[JobStatus]:
        """The status now and after each change; ends once the job is finished or the time is over. Raises NotFound."""
        ...

    def logs(
        self, name: str, *, follow: bool = False, slice_index: int | None = None, worker: int | None = None,
        since_seconds: float | None = None,
    ) -> Iterator[LogLine]:  # fmt: skip
        """Lines of the trainer containers by time, oldest attempt first; None means all slices, all workers, from the beginning.

        With `follow` this goes on over restarts until the job is finished. Raises NotFound.
        """
        ...

    def run_directory(self, name: str) -> str:
        """Where the trainer keeps checkpoints, metrics and logs, as its pods call it; empty for a job that has none. Raises NotFound."""
        ...

    def events(self, name: str) -> Sequence[Event]:
        """What the cluster said about the job and its pods, oldest first. Raises NotFound."""
        ...


def open_backend(kind: BackendKind, *, context: str | None = None, kubeconfig: str | None = None, namespace: str | None = None) -> Backend:
    """The backend; a client library is imported only here, by the commands that talk to a cluster."""
    if kind is BackendKind.LOCAL:
        from launcher.backend.local import LocalBackend

        return LocalBackend(namespace=namespace or "default")
    from launcher.backend.kubernetes import KubernetesBackend

    return KubernetesBackend(context=context, kubeconfig=kubeconfig, namespace=namespace)
