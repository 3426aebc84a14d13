"""Where the job keeps its files: gs://, or a volume that every host sees and that outlives the pods."""

from __future__ import annotations

import os
from collections.abc import Iterator
from glob import iglob
from pathlib import PurePosixPath
from typing import Final

from launcher.spec import JobSpec, Layout, run_directory
from launcher.spec.pod import Claim, GcsFuse, Volume
from trainer.config import Problem
from trainer.config.checks import named_paths
from trainer.config.paths import is_gcs, path_fault

_WRITTEN: Final = ("run_directory", "data.cache_directory")
_READ: Final = ("data.sources.", "data.tokenizer.")


def directory_is_usable(spec: JobSpec) -> Iterator[Problem]:
    """A folder or gs:// address, and the trainer's run directory follows from it."""
    if fault := path_fault(spec.directory):
        message = f"{spec.directory[:120]!r} {fault}"
        yield Problem(path="directory", message=message, hint="a folder, or gs://bucket/folder", code="path", value=spec.directory)
    given, expected = spec.train.run_directory, run_directory(spec.directory, spec.name)
    if given != expected:
        message = f"{given[:120]!r} contradicts `directory` and `name`, which give {expected[:120]!r}"
        yield Problem(path="train.run_directory", message=message, hint="leave it out", code="run-directory", value=given)


def files_outlive_pods(spec: JobSpec, layout: Layout) -> Iterator[Problem]:
    """On a cluster: what is written lies in gs:// or on a mounted, writable, shared volume; what is read can be read."""
    for key, path in named_paths(spec.train):
        if is_gcs(path) or path_fault(path):
            continue
        where = "directory" if key == "run_directory" else f"train.{key}"
        volume = _volume_of(spec, path)
        written = key in _WRITTEN
        if key == "data.cache_directory" and path == f"{spec.directory.rstrip('/')}/data":
            continue  # follows from `directory`, which has its own problem
        if volume is None and (written or spec.image is None):
            message = f"{path[:120]!r} is a folder of the pod, and no volume is mounted there"
            hint = "use gs://bucket/folder, or mount a volume and use a path in it"
            if spec.cpu is not None:
                hint += "; to run the job on this machine: --backend local"
            yield Problem(path=where, message=message, hint=hint, code="path-not-mounted", value=path)
        elif volume is not None and written:
            yield from _writable(spec, layout, where, path, volume)


def files_are_here(spec: JobSpec, layout: Layout) -> Iterator[Problem]:
    """On this machine: local files that are read are there, below the folder one submits from where their path does not begin at /."""
    if layout.target != "cpu":  # its processes cannot run here
        return
    for key, path in named_paths(spec.train):
        if not key.startswith(_READ) or is_gcs(path) or path_fault(path):
            continue
        expanded, is_glob = os.path.expanduser(path), key.startswith("data.sources.")
        if os.path.isfile(expanded) or (is_glob and any(map(os.path.isfile, iglob(expanded, recursive=True)))):
            continue
        folder = os.path.isdir(expanded)
        hint = "check the path" + (f"; it begins at {os.getcwd()}" if not os.path.isabs(expanded) else "")
        if is_glob and folder:
            hint = f"write {path.rstrip('/')}/** for everything below it"
        what = "is a folder, not a file" if folder else "names no file of this machine"
        yield Problem(path=f"train.{key}", message=f"{path[:120]!r} {what}", hint=hint, code="no-such-file", value=path)


def _writable(spec: JobSpec, layout: Layout, where: str, path: str, volume: Volume) -> Iterator[Problem]:
    place = f"volumes.{spec.volumes.index(volume)} ({volume.type})"
    if volume.read_only:
        message = f"{path[:120]!r} lies on {place}, which is mounted read-only"
        yield Problem(path=where, message=message, hint="set `read_only: false`", code="path-read-only", value=path)
    if not isinstance(volume, GcsFuse | Claim):
        lost = "and every host has its own" if layout.hosts > 1 else "so a restart begins again"
        message = f"{path[:120]!r} lies on {place}, which is lost with its pod, {lost}"
        hint = "use gs://bucket/folder, a `pvc` or a `gcs` volume"
        yield Problem(path=where, message=message, hint=hint, code="path-not-kept", value=path)


def _volume_of(spec: JobSpec, path: str) -> Volume | None:
    """The volume whose mount holds `path`: the innermost one."""
    inside = [volume for volume in spec.volumes if PurePosixPath(path).is_relative_to(PurePosixPath(volume.mount_path))]
    return max(inside, key=lambda volume: len(PurePosixPath(volume.mount_path).parts), default=None)


def image_is_reachable(spec: JobSpec, layout: Layout) -> Iterator[Problem]:
    """TPU hosts pull from a registry, and the default image is only on the machine that built it."""
    if spec.image is None and layout.target == "tpu":
        message = f"is required: {spec.container_image.reference} exists only where it was built"
        hint = "nnxlaunch image build SPEC --name REGISTRY/PATH, then image push with the same words, which writes the line"
        yield Problem(path="image", message=message, hint=hint, code="image-needed")
