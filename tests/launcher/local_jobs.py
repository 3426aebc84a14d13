"""Local jobs made of the really rendered JobSet with a small program in the trainer's place."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.backend.status import JobStatus, Manifest
from launcher.manifest import render
from launcher.spec import from_document

ENOUGH_SECONDS = 240.0  # on a machine that does much else
TRAIN: dict[str, Any] = {
    "steps": 4,
    "model": {
        "vocab_size": 64,
        "width": 32,
        "compute_dtype": "float32",
        "remat": "none",
        "segments": [{"repeats": 1, "pattern": [{"attention": {"heads": 2, "kv_heads": 2, "head_dim": 8}, "mlp": {"hidden": 48}}]}],
    },
    "batch": {"global_batch": 8, "sequence_length": 16},
    "schedule": {"type": "constant", "learning_rate": 0.001},
    "data": {"sources": [{"type": "synthetic"}]},
}


def document(directory: Path, *, hosts: int = 1, slices: int = 1, **changes: Any) -> dict[str, Any]:
    """A job spec as a person would write it."""
    cpu = {"hosts": hosts, "slices": slices, "devices_per_host": 1}
    return {"name": "job", "cpu": cpu, "directory": str(directory), "grace_seconds": 5, "train": TRAIN, **changes}


def manifests(directory: Path, program: str, *words: str, **changes: Any) -> list[Manifest]:
    """What `render` gives, with `python -c program words...` as the container's command."""
    rendered = render(from_document(document(directory, **changes)))
    container_of(rendered)["command"] = ["python", "-c", program, *words]
    return rendered


def jobset_of(rendered: list[Manifest]) -> Manifest:
    return next(manifest for manifest in rendered if manifest["kind"] == "JobSet")


def container_of(rendered: list[Manifest]) -> Manifest:
    return jobset_of(rendered)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]


def last(backend: Any, name: str = "job") -> JobStatus:
    """The status at the end of the job."""
    *_, status = backend.watch(name, timeout_seconds=ENOUGH_SECONDS)
    assert status.state.finished, status
    return status


def until(condition: Callable[[], Any], what: str = "") -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + ENOUGH_SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what or condition}"
        time.sleep(0.01)
    return value


def exists(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
