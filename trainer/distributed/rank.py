"""Who this process is, read from the environment alone. Standard library only.

GKE's TPU variables win where they are: its admission webhook knows the slices. Else the launcher's `NNX_*`
variables; else the process is alone. JAX's own detection of Kubernetes is never used: it counts the pods of one
Job, which is wrong for several slices.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.contract import (
    ATTEMPT,
    COMPLETION_INDEX,
    COORDINATOR,
    COORDINATOR_PORT,
    HOSTS_PER_SLICE,
    JAX_COORDINATOR_PORT,
    JOB_INDEX,
    NUM_SLICES,
    POD_NAME,
    REPLICA,
    REPLICAS,
)
from trainer.errors import WorldError


@dataclass(frozen=True, kw_only=True)
class Rank:
    source: Literal["gke", "launcher", "alone"]
    slice_index: int
    slices: int
    worker: int  # within its slice
    hosts_per_slice: int
    coordinator_host: str  # empty when alone
    coordinator_port: int
    attempt: int
    pod: str  # for messages
    replica: int = 0  # which of the slices, where every one is a world of its own; `slice_index` is 0 then
    replicas: int = 1

    @property
    def process_index(self) -> int:
        return self.slice_index * self.hosts_per_slice + self.worker

    @property
    def process_count(self) -> int:
        return self.slices * self.hosts_per_slice

    @property
    def hosts(self) -> list[tuple[int, int]]:
        """Slice and worker of every process."""
        return [(index, worker) for index in range(self.slices) for worker in range(self.hosts_per_slice)]

    def __str__(self) -> str:
        pod = f", pod {self.pod}" if self.pod else ""
        return f"process {self.process_index} (slice {self.slice_index + self.replica}, worker {self.worker}{pod})"


def rank_from_environment(environment: Mapping[str, str]) -> Rank:
    """Raises WorldError naming the variable that cannot be."""
    tpu_workers = _tpu_workers(environment)
    if tpu_workers is not None:
        coordinator = environment.get("MEGASCALE_COORDINATOR_ADDRESS") or tpu_workers[0]
        return _checked(
            environment,
            source="gke",
            slice_index=_number(environment, "MEGASCALE_SLICE_ID", 0),
            slices=_number(environment, "MEGASCALE_NUM_SLICES", 1),
            worker=_number(environment, "TPU_WORKER_ID", 0),
            hosts_per_slice=len(tpu_workers),
            coordinator_host=coordinator.split(":")[0],
            coordinator_port=_number(environment, JAX_COORDINATOR_PORT, COORDINATOR_PORT),
        )
    hosts, slices = _number(environment, HOSTS_PER_SLICE, 1), _number(environment, NUM_SLICES, 1)
    if hosts * slices == 1:
        return _checked(environment, source="alone", coordinator_host="", coordinator_port=0)
    address = environment.get(COORDINATOR, "")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise WorldError(f"{COORDINATOR} is {address!r}, but {slices} slices x {hosts} hosts need the address of process 0 as host:port")
    return _checked(
        environment,
        source="launcher",
        slice_index=_number(environment, JOB_INDEX, 0),
        slices=slices,
        worker=_number(environment, COMPLETION_INDEX, 0),
        hosts_per_slice=hosts,
        coordinator_host=host,
        coordinator_port=int(port),
    )


def enter_own_world(environment: MutableMapping[str, str]) -> None:
    """Make the slice of this process a JAX world of its own, for everybody who reads `environment` from now on.

    The TPU runtime would join the slices as soon as it saw the variables that GKE sets for several.
    """
    if REPLICAS in environment:
        return
    environment[REPLICA] = environment.get(JOB_INDEX) or environment.get("MEGASCALE_SLICE_ID") or "0"
    environment[REPLICAS] = environment.get(NUM_SLICES) or environment.get("MEGASCALE_NUM_SLICES") or "1"
    environment.update({JOB_INDEX: "0", NUM_SLICES: "1"})
    for name in [name for name in environment if name.startswith("MEGASCALE_")]:
        del environment[name]


def attempt_from_environment(environment: Mapping[str, str]) -> int:
    return _number(environment, ATTEMPT, 0)


def _checked(
    environment: Mapping[str, str],
    *,
    source: Literal["gke", "launcher", "alone"],
    coordinator_host: str,
    coordinator_port: int,
    slice_index: int = 0,
    slices: int = 1,
    worker: int = 0,
    hosts_per_slice: int = 1,
) -> Rank:
    replica, replicas = _number(environment, REPLICA, 0), _number(environment, REPLICAS, 1)
    if slice_index >= slices or worker >= hosts_per_slice or replica >= replicas:
        raise WorldError(
            f"slice {slice_index + replica} of {slices * replicas}, worker {worker} of {hosts_per_slice}: no such process",
            hint=f"{JOB_INDEX}, {NUM_SLICES}, {COMPLETION_INDEX}, {HOSTS_PER_SLICE} (or the TPU runtime's variables) contradict each other",
        )
    return Rank(
        source=source,
        slice_index=slice_index,
        slices=slices,
        worker=worker,
        hosts_per_slice=hosts_per_slice,
        coordinator_host=coordinator_host,
        coordinator_port=coordinator_port,
        attempt=attempt_from_environment(environment),
        pod=environment.get(POD_NAME, ""),
        replica=replica,
        replicas=replicas,
    )


def _tpu_workers(environment: Mapping[str, str]) -> list[str] | None:
    """The workers of this slice in the order JAX itself uses (jax._src.clusters.cloud_tpu_cluster)."""
    if path := environment.get("TPU_PROCESS_ADDRESSES_PATH"):
        try:
            listed = Path(path).read_text().strip()
        except OSError as error:
            raise WorldError(f"TPU_PROCESS_ADDRESSES_PATH={path}: {error.strerror}") from None
    else:
        listed = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    return listed.split(",") if listed else None


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal():
        raise WorldError(f"{name} is {text!r}, a number is needed")
    return int(text)
