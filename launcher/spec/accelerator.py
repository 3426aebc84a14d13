"""What a job runs on: TPU slices, or hosts without accelerators that force so many CPU devices each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from launcher.tpu import Slice, resolve, resolve_topology
from trainer.config.base import Node

Slices = Annotated[int, Field(ge=1, le=10_000, strict=True)]


class Tpu(Node):
    """TPU slices: either `type`, or `accelerator` with `topology`."""

    type: str | None = None
    """A name such as `v5p-128`, `v6e-16`, `trillium-256` or `v5e-4x8`; see `nnxlaunch types`."""
    accelerator: str | None = None
    """A family: its name, an alias, or its GKE label such as `tpu-v5p-slice`."""
    topology: str | None = None
    """Such as `4x4x8`; together with `accelerator`."""
    machine: str | None = None
    """Machine type, where the topology can be built from several (2x4 on v5e and v6e)."""
    placement_policy: str | None = None
    """Workload policy of the node pool, where node auto-provisioning makes it (multi-host tpu7x)."""
    slices: Slices = 1
    """Slices of this type, joined by the data-centre network."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        given = [key for key in ("type", "accelerator", "topology") if getattr(self, key) is not None]
        if given not in (["type"], ["accelerator", "topology"]):
            raise ValueError(f"give `type`, or `accelerator` and `topology`; given: {', '.join(given) or 'none'}")
        return self

    def slice(self) -> Slice:
        """The slice this means. Raises launcher.tpu.TpuError."""
        if self.type is not None:
            return resolve(self.type, machine=self.machine)
        return resolve_topology(self.accelerator or "", self.topology or "", machine=self.machine)


class Cpu(Node):
    """Hosts without accelerators; each runs one process with so many forced XLA host devices."""

    hosts: Annotated[int, Field(ge=1, le=100_000, strict=True)] = 1
    """Hosts of a slice."""
    devices_per_host: Annotated[int, Field(ge=1, le=1024, strict=True)] = 1
    slices: Slices = 1


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many of everything a job has, whatever it runs on."""

    target: Literal["tpu", "cpu"]
    slices: int
    hosts_per_slice: int
    devices_per_host: int
    tpu: Slice | None

    @property
    def hosts(self) -> int:
        return self.slices * self.hosts_per_slice

    @property
    def devices_per_slice(self) -> int:
        return self.hosts_per_slice * self.devices_per_host

    @property
    def devices(self) -> int:
        return self.slices * self.devices_per_slice
