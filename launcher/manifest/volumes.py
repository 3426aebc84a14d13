"""Volumes of the pod and where the container sees them."""

from __future__ import annotations

from typing import Any, Final

from launcher.manifest import names
from launcher.spec import JobSpec
from launcher.spec.pod import Claim, EmptyDirectory, GcsFuse, Volume
from launcher.spec.pod import Memory as MemoryVolume
from trainer import contract

Manifest = dict[str, Any]

OWN_MOUNTS: Final = {"config": contract.CONFIG_DIRECTORY, "tmp": "/tmp", "shm": "/dev/shm"}
"""Mounts of every job: the TrainConfig; scratch space, because the root file system is read-only; shared memory, because
the 64 MiB of a container are too few for data loaders."""


def volume_name(index: int) -> str:
    return f"volume-{index}"


def volumes(spec: JobSpec) -> list[Manifest]:
    own: list[Manifest] = [
        {"name": "config", "configMap": {"name": names.config_map(spec)}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{spec.resources.shared_memory_gib}Gi"}},
    ]
    return own + [{"name": volume_name(index), **_source(volume)} for index, volume in enumerate(spec.volumes)]


def mounts(spec: JobSpec) -> list[Manifest]:
    own = [_mount(name, path, read_only=name == "config") for name, path in OWN_MOUNTS.items()]
    return own + [_mount(volume_name(i), volume.mount_path, read_only=volume.read_only) for i, volume in enumerate(spec.volumes)]


def _mount(name: str, path: str, *, read_only: bool) -> Manifest:
    return {"name": name, "mountPath": path, **({"readOnly": True} if read_only else {})}


def _source(volume: Volume) -> Manifest:
    match volume:
        case GcsFuse():
            only = (f"only-dir={volume.only_directory}",) if volume.only_directory else ()
            options = ",".join(("implicit-dirs", *only, *volume.mount_options))
            attributes = {"bucketName": volume.bucket, "mountOptions": options}
            read_only = {"readOnly": True} if volume.read_only else {}
            return {"csi": {"driver": "gcsfuse.csi.storage.gke.io", **read_only, "volumeAttributes": attributes}}
        case Claim():
            return {"persistentVolumeClaim": {"claimName": volume.claim, **({"readOnly": True} if volume.read_only else {})}}
        case MemoryVolume():
            return {"emptyDir": {"medium": "Memory", "sizeLimit": f"{volume.size_gib}Gi"}}
        case EmptyDirectory():
            return {"emptyDir": {} if volume.size_gib is None else {"sizeLimit": f"{volume.size_gib}Gi"}}
