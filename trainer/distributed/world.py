"""One function that makes the processes of a job one JAX world."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Final

from trainer.config.run import Distributed
from trainer.contract import IMAGE_REVISION, POD_IP, SPEC_HASH
from trainer.distributed.rank import Rank, rank_from_environment
from trainer.distributed.roll_call import resolve, roll_call

SHUTDOWN_SECONDS: Final = 60
"""How long processes that are done wait for each other at the end; JAX's default is 300."""
VERSIONED: Final = ("jax", "jaxlib", "libtpu", "flax", "orbax-checkpoint")


@dataclass(frozen=True, kw_only=True)
class World:
    process_index: int
    process_count: int
    slice_index: int
    slices: int
    worker: int  # within its slice
    hosts_per_slice: int
    attempt: int
    replica: int = 0  # which of the slices, where every one is a world of its own
    replicas: int = 1

    @property
    def devices_per_slice(self) -> int:
        """Starts JAX's backend."""
        import jax

        return jax.device_count() // self.slices


def initialise(config: Distributed) -> World:
    """Before any use of a JAX device. Raises WorldError (the processes do not fit together) and PeerLost (one never came)."""
    rank = rank_from_environment(os.environ)
    if rank.process_count > 1:
        _meet(rank, config)
    return World(
        process_index=rank.process_index,
        process_count=rank.process_count,
        slice_index=rank.slice_index,
        slices=rank.slices,
        worker=rank.worker,
        hosts_per_slice=rank.hosts_per_slice,
        attempt=rank.attempt,
        replica=rank.replica,
        replicas=rank.replicas,
    )


def shutdown() -> None:
    """Meet once more and part: a process that leaves earlier would be a lost peer to the others."""
    import jax

    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def identity(environment: Mapping[str, str]) -> dict[str, str]:
    """What must be equal on every process."""
    found = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found | {name: environment[name] for name in (SPEC_HASH, IMAGE_REVISION) if environment.get(name)}


def _meet(rank: Rank, config: Distributed) -> None:
    import jax

    deadline = time.monotonic() + config.initialization_timeout_seconds
    where = f"{rank.coordinator_host}:{rank.coordinator_port}"
    print(f"{rank} of {rank.process_count}, attempt {rank.attempt}: meeting at {where}", file=sys.stderr, flush=True)
    # JAX would listen on all interfaces.
    bind_host = os.environ.get(POD_IP) or (resolve(rank.coordinator_host, deadline) if rank.process_index == 0 else "")
    roll_call(rank, identity(os.environ), bind_host=bind_host, timeout_seconds=deadline - time.monotonic())
    bind = f"[{bind_host}]:{rank.coordinator_port}" if ":" in bind_host else f"{bind_host}:{rank.coordinator_port}"
    # On GKE the arguments left out come from JAX's detection of its TPU variables.
    explicit = rank.source != "gke"
    jax.distributed.initialize(
        coordinator_address=where if explicit else None,
        num_processes=rank.process_count if explicit else None,
        process_id=rank.process_index if explicit else None,
        cluster_detection_method="deactivate" if explicit else None,
        coordinator_bind_address=bind if rank.process_index == 0 else None,
        initialization_timeout=max(int(deadline - time.monotonic()), 30),
        heartbeat_timeout_seconds=config.heartbeat_timeout_seconds,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
