"""Where the hosts come from, who waits for them, and how pods are placed."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from trainer.config.base import Node


def shorthand(key: str) -> BeforeValidator:
    """Accept plain text for a node: `capacity: spot` means `capacity: {type: spot}`."""

    def expand(value: Any) -> Any:
        return {key: value} if isinstance(value, str) else value

    return BeforeValidator(expand)


class OnDemand(Node):
    type: Literal["on_demand"] = "on_demand"


class Spot(Node):
    """Spare capacity, taken back with about 30 seconds of notice."""

    type: Literal["spot"] = "spot"


class Reservation(Node):
    """Capacity reserved beforehand, in this or another project."""

    type: Literal["reservation"] = "reservation"
    name: Annotated[str, Field(min_length=1)]
    project: str | None = None
    """Project that owns a shared reservation."""
    block: str | None = None
    sub_block: str | None = None


class FlexStart(Node):
    """Flex-start: hosts come one by one when there are some, for at most seven days."""

    type: Literal["flex_start"] = "flex_start"


class Dws(Node):
    """Dynamic Workload Scheduler, queued provisioning: all hosts at once, when they can be had. Needs a queue."""

    type: Literal["dws"] = "dws"
    max_run_seconds: Annotated[int, Field(ge=600, le=604_800, strict=True)] | None = None
    """How long the hosts are kept; at most seven days."""


Capacity = Annotated[OnDemand | Spot | Reservation | FlexStart | Dws, Field(discriminator="type")]
CapacityField = Annotated[Capacity, shorthand("type")]


class Queue(Node):
    """A Kueue LocalQueue. `queue: NAME` is enough."""

    name: Annotated[str, Field(min_length=1)]
    priority: str | None = None
    """A WorkloadPriorityClass: order in the queue, without touching the pods' priority."""
    max_run_seconds: Annotated[int, Field(ge=1, le=2**31 - 1, strict=True)] | None = None
    """Kueue ends the job after this long."""


QueueField = Annotated[Queue, shorthand("name")]


class Exclusive(Node):
    """One slice per topology domain and one domain per slice (JobSet's exclusive placement)."""

    type: Literal["exclusive"] = "exclusive"
    topology_key: str = "cloud.google.com/gke-nodepool"


class Tas(Node):
    """Kueue's topology-aware scheduling: each slice inside one domain of a topology level."""

    type: Literal["tas"] = "tas"
    level: str | None = None
    """Node label of the level. Default: the GKE label of this slice's partition."""


class SuperSlice(Node):
    """A tpu7x slice joined from 4x4x4 cubes on demand, placed by Kueue's topology-aware scheduling."""

    type: Literal["super_slice"] = "super_slice"

    cube: ClassVar = (4, 4, 4)


class NoPlacement(Node):
    """Wherever the scheduler likes."""

    type: Literal["none"] = "none"


Placement = Annotated[Exclusive | Tas | SuperSlice | NoPlacement, Field(discriminator="type")]
PlacementField = Annotated[Placement, shorthand("type")]
