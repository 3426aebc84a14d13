"""What is not the matter with a job yet, and will be: told beside its cause."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from launcher.backend.scene import Scene
from launcher.backend.status import RUN_DIRECTORY_ANNOTATION
from launcher.backend.values import mapping
from launcher.labels import SPOT_GRACE_SECONDS, SPOT_LABEL
from launcher.observe.progress import Progress, last_progress, progress_in
from trainer.contract import grace_needed


@dataclass(frozen=True, kw_only=True)
class Remark:
    code: str
    """Stable, for scripts."""
    sentence: str
    fix: str

    def __str__(self) -> str:
        return f"{self.sentence} [{self.code}]: {self.fix}"


def progress_of(scene: Scene) -> Progress | None:
    """How far the run has come: by its record where this machine has it, else by the log of process 0."""
    directory = scene.status.annotations.get(RUN_DIRECTORY_ANNOTATION, "")
    return (last_progress(directory) if directory else None) or progress_in(scene.log)


def remarks(scene: Scene, progress: Progress | None) -> Iterator[Remark]:
    """Of a job that has not ended."""
    if scene.status.state.finished or progress is None or progress.save_seconds is None:
        return
    pod = scene.jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    grace, needed = int(pod.get("terminationGracePeriodSeconds", 30)), grace_needed(progress.save_seconds)
    if needed > grace:
        spot = SPOT_LABEL in mapping(pod.get("nodeSelector")) and needed > SPOT_GRACE_SECONDS
        yield Remark(
            code="grace-save",
            sentence=f"the save of step {progress.checkpoint} took {progress.save_seconds:.1f} s: a host that is asked to leave needs up "
            f"to {needed} s and has {grace} s: it may lose what it did since its last checkpoint",
            fix="a spot node gives no more time: save more often (checkpoint.every_steps)"
            if spot
            else f"grace_seconds: {needed} in the spec, submitted with --replace; the run goes on from its last checkpoint",
        )
