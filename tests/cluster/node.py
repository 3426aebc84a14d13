"""The node of the test cluster, which is this machine: its kubelet, and the processes of its pods."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from select import POLLIN, poll

from tests.cluster.tools import kubectl

REAL = ("-l", "!fake.test/pool-prefix")
"""Not one of those that CLUSTER_HOME/fake-nodes.sh makes."""


def node_name() -> str:
    return kubectl("get", "nodes", *REAL, "-o", "jsonpath={.items[0].metadata.name}")


def node_address() -> str:
    return kubectl("get", "nodes", *REAL, "-o", 'jsonpath={.items[0].status.addresses[?(@.type=="InternalIP")].address}')


@contextmanager
def kubelet_away() -> Generator[None]:
    """Its containers run on meanwhile, but nobody looks after them; then it is started again, as a host's is that comes back."""
    pid = _kubelet()
    gone = os.pidfd_open(pid)
    os.kill(pid, signal.SIGTERM)
    waiting = poll()
    waiting.register(gone, POLLIN)
    assert waiting.poll(60_000), "the kubelet does not end"
    os.close(gone)
    try:
        yield
    finally:
        subprocess.run([f"{os.environ['CLUSTER_HOME']}/up.sh"], stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=600)


def _kubelet() -> int:
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cmdline").read_bytes().partition(b"\0")[0].endswith(b"/kubelet"):
                return int(entry.name)
        except OSError:
            continue
    raise AssertionError("no kubelet on this machine")


def first_process(pod: str) -> int:
    """PID, on this machine, of the first process in the pod's container."""
    mark = f"NNX_POD_NAME={pod}".encode()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                status = (entry / "status").read_text()
                if next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1] == "1":
                    return int(entry.name)
        except OSError:
            continue
    raise AssertionError(f"no process of {pod} on this machine")
