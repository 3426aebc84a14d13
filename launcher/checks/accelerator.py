"""The accelerator, the mesh over it, capacity and placement."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from launcher.spec import JobSpec, Layout
from launcher.spec.capacity import Dws, Exclusive, SuperSlice, Tas
from launcher.tpu import TpuError
from trainer.config import Problem
from trainer.config.checks import check_train
from trainer.config.diloco import worlds_apart

SUPER_SLICE_CUBE: Final = 4
SUPER_SLICE_MAX_NAME: Final = 28


def tpu_exists(spec: JobSpec) -> Iterator[Problem]:
    """The type, or the family and topology, are in the table and mean one thing."""
    if spec.tpu is None:
        return
    try:
        spec.tpu.slice()
    except TpuError as error:
        value = getattr(spec.tpu, error.key)
        yield Problem(path=f"tpu.{error.key}", message=str(error), hint=error.hint, code=error.code, value=value)


def several_slices_need_several_hosts(spec: JobSpec, layout: Layout) -> Iterator[Problem]:
    """GKE sets up multislice only for slices of more than one host; slices that are worlds of their own do without."""
    if layout.tpu is not None and layout.slices > 1 and layout.hosts_per_slice == 1 and not worlds_apart(spec.train):
        yield Problem(
            path="tpu.slices",
            message=f"{layout.slices} slices of {layout.tpu.name}: a slice with one host cannot be joined with others",
            hint="take one slice, or a type with more hosts",
            code="multislice-single-host",
            value=layout.slices,
            limit=1,
        )


def train_config_fits(spec: JobSpec, layout: Layout) -> Iterator[Problem]:
    """Mesh, batch, model and schedule against the devices there are."""
    problems = check_train(spec.train, slices=layout.slices, devices_per_slice=layout.devices_per_slice, processes=layout.hosts)
    for problem in problems:
        yield problem.under("train")


def queued_provisioning_needs_a_queue(spec: JobSpec) -> Iterator[Problem]:
    if isinstance(spec.capacity, Dws) and spec.queue is None:
        message = "queued provisioning works through a Kueue queue, and the spec names none"
        yield Problem(path="queue", message=message, hint="add `queue: NAME`, or take `capacity: flex_start`", code="dws-queue")


def placement_fits(spec: JobSpec, layout: Layout) -> Iterator[Problem]:
    """Topology-aware scheduling is Kueue's; its level must be known; slices of it have whole pods."""
    placement = spec.placement
    if isinstance(placement, Tas | SuperSlice) and spec.queue is None:
        message = "topology-aware scheduling works through a Kueue queue, and the spec names none"
        yield Problem(path="queue", message=message, hint="add `queue: NAME`, or take `placement: exclusive`", code="tas-queue")
    if isinstance(placement, Tas) and placement.level is None and layout.tpu is None:
        message = "is required on hosts without TPUs"
        yield Problem(path="placement.level", message=message, hint="such as `kubernetes.io/hostname`", code="tas-level")
    if isinstance(placement, Exclusive) and not placement.topology_key:
        yield Problem(path="placement.topology_key", message="is empty", hint="a node label", code="placement-key")


def super_slice_fits(spec: JobSpec, layout: Layout) -> Iterator[Problem]:
    """tpu7x only; every dimension a multiple of 4; at most 144 cubes; name at most 28 characters."""
    if not isinstance(spec.placement, SuperSlice):
        return
    tpu = layout.tpu
    if tpu is None or not tpu.family.super_slice:
        shown = tpu.name if tpu else "cpu"
        hint = "take `placement: exclusive`"
        yield Problem(path="placement", message=f"{shown} has no super-slices; tpu7x has", hint=hint, code="super-slice-family")
        return
    if any(dim % SUPER_SLICE_CUBE for dim in tpu.topology):
        message = f"topology {tpu.topology_text} is not made of {SUPER_SLICE_CUBE}x{SUPER_SLICE_CUBE}x{SUPER_SLICE_CUBE} cubes"
        yield Problem(path="tpu", message=message, hint="such as 4x4x4 or 4x4x8", code="super-slice-topology", value=tpu.topology_text)
    if len(spec.name) > SUPER_SLICE_MAX_NAME:
        message = f"has {len(spec.name)} characters; a super-slice's name leaves {SUPER_SLICE_MAX_NAME}"
        yield Problem(path="name", message=message, hint="shorten it", code="super-slice-name", value=spec.name, limit=SUPER_SLICE_MAX_NAME)
