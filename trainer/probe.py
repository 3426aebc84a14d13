"""`python -m trainer.probe DIRECTORY [--tpu]`: what a pod can do, one JSON line a finding; `nnxlaunch doctor` reads them.

A line has `check`, `level` (pass, warn, fail), `message` and `fix`. No JAX: opening a TPU would wait for the other
hosts of its slice.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from glob import glob
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from trainer import contract
from trainer.checkpoint.storage import open_storage

PACKAGES: Final = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
TPU_DEVICES: Final = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
"""Device files of TPUs: accel up to v4, VFIO from v5e on."""
SCRATCH_BYTES: Final = 2**30
MEMLOCK_BYTES: Final = 2**30
"""Below this libtpu cannot pin its host buffers; GKE's TPU nodes set no limit."""


@dataclass(frozen=True)
class Line:
    check: str
    level: str
    message: str
    fix: str = ""


def storage(directory: str) -> Iterator[Line]:
    """Write, read and remove one small file under the directory that checkpoints go to."""
    name, content = f".nnxlaunch-probe-{uuid.uuid4().hex}", b'{"probe": true}'
    began = time.monotonic()
    store = open_storage(directory)
    try:
        store.write_new(name, content)
        same = store.read(name) == content
        store.remove(name)
    except FileNotFoundError as error:
        yield Line(
            "storage", "fail", f"{directory} does not exist: {error}", "make the bucket or mount the volume; see k8s/README.md, step 4"
        )
    except PermissionError as error:
        fix = "bind the job's `service_account` to roles/storage.objectUser of the bucket; see k8s/README.md, step 4"
        yield Line("storage", "fail", f"{directory} cannot be written as this pod: {error}", fix)
    except OSError as error:
        yield Line("storage", "fail", f"{directory} cannot be used: {error}", "check the name, the network policy and the bucket's region")
    else:
        took = f"{(time.monotonic() - began) * 1000:.0f} ms"
        if same:
            yield Line("storage", "pass", f"{directory}: a file was written, read and removed in {took}")
        else:
            yield Line("storage", "fail", f"{directory} gives back other bytes than were written", "use another bucket or volume")


def scratch(directory: str) -> Iterator[Line]:
    """/tmp can be written and has room; who the process is."""
    del directory
    who = f"user {os.getuid()}, group {os.getgid()}"
    try:
        with tempfile.TemporaryFile() as file:
            file.write(b"probe")
    except OSError as error:
        yield Line(
            "scratch", "fail", f"{who}: {tempfile.gettempdir()} cannot be written: {error}", "leave /tmp to the launcher's own mount"
        )
        return
    free = shutil.disk_usage(tempfile.gettempdir()).free
    said = f"{who}: {tempfile.gettempdir()} has {free / 2**30:.1f} GiB free"
    yield Line("scratch", "pass", said) if free >= SCRATCH_BYTES else Line("scratch", "warn", said, "use nodes with a larger boot disk")


def versions(directory: str) -> Iterator[Line]:
    """What the image carries."""
    del directory
    found = {name: _version(name) for name in PACKAGES}
    said = ", ".join(f"{name} {number}" for name, number in {"python": sys.version.split()[0], **found}.items() if number)
    missing = [name for name, number in found.items() if not number]
    said += f"; image revision {os.environ.get(contract.IMAGE_REVISION, 'unknown')}"
    yield (
        Line("versions", "fail", f"{said}; missing: {', '.join(missing)}", "nnxlaunch image build")
        if missing
        else Line("versions", "pass", said)
    )


def tpu(directory: str) -> Iterator[Line]:
    """The TPU's device files open as this user; what libtpu needs beside them."""
    del directory
    libtpu = _version("libtpu")
    yield (
        Line("tpu", "pass", f"libtpu {libtpu}")
        if libtpu
        else Line("tpu", "fail", "the image has no libtpu", "nnxlaunch image build --target tpu")
    )
    devices = sorted(path for pattern in TPU_DEVICES for path in glob(pattern))
    if not devices:
        fix = "the node's TPU device plugin gives none: kubectl describe node; is `tpu` in the spec the pool's type?"
        yield Line("tpu", "fail", f"no device of {' or '.join(TPU_DEVICES)}", fix)
    closed = [f"{path}: {trouble}" for path in devices if (trouble := _trouble_opening(path))]
    if closed:
        fix = "set `security: root_no_caps`, in a namespace of the level baseline"
        yield Line("tpu", "fail", f"user {os.getuid()} may not open {'; '.join(closed)}", fix)
    elif devices:
        yield Line("tpu", "pass", f"user {os.getuid()} opens {len(devices)} devices: {', '.join(devices)}")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / 2**20:.0f} MiB"
    if soft == resource.RLIM_INFINITY or soft >= MEMLOCK_BYTES:
        yield Line("tpu", "pass", f"memlock is {limit}")
    else:
        yield Line("tpu", "warn", f"memlock is {limit}: libtpu may fail to pin memory", "raise it on the node, or `security: privileged`")


def _trouble_opening(path: str) -> str:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m trainer.probe", description="Print what this pod can do.")
    parser.add_argument("directory", help="where checkpoints go: a folder or gs://")
    parser.add_argument("--tpu", action="store_true", help="look at the TPU's device files too")
    given = parser.parse_args(arguments)
    checks: list[Callable[[str], Iterator[Line]]] = [versions, scratch, storage, *([tpu] if given.tpu else [])]
    for check in checks:
        for line in check(given.directory):
            print(json.dumps(asdict(line)), flush=True)


if __name__ == "__main__":
    main()
