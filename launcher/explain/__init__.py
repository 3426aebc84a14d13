"""What a spec means: the numbers that follow from it, as plain nested dicts."""

from __future__ import annotations

import math
from typing import Any, Final

from launcher.explain.context import context_section
from launcher.explain.memory import device_memory
from launcher.explain.outcome import outcomes
from launcher.explain.pipeline import pipeline_section
from launcher.explain.verdict import hbm_bytes, verdict
from launcher.manifest import names
from launcher.manifest.container import pull_policy
from launcher.spec import JobSpec
from trainer import contract
from trainer.config.diloco import worlds_apart
from trainer.config.flops import train_flops
from trainer.config.layouts import batch_shards, weight_layouts
from trainer.config.mesh import REPLICA_AXES, used
from trainer.config.rules import Resolution, in_use
from trainer.config.treatment import treatments
from trainer.config.weights import parameter_count, weights

__all__ = ["explain"]

SECURITY: Final = {
    "restricted": "no root, no capabilities, read-only root file system; passes the Pod Security level `restricted`. "
    "If a node gives its TPU devices to root only, the trainer fails to find them: then take root_no_caps",
    "root_no_caps": "root without capabilities, read-only root file system; passes the Pod Security level `baseline`",
    "privileged": "everything is allowed; needs a privileged namespace",
}


def explain(spec: JobSpec) -> dict[str, Any]:
    """The derived numbers of a checked spec, in sections. Sizes are bytes, times seconds."""
    mesh = spec.world.mesh.shape(slices=spec.world_slices, devices_per_slice=spec.layout.devices_per_slice)
    pipeline, context = pipeline_section(spec.world, mesh), context_section(spec.world, mesh)
    return {
        "job": _job(spec),
        "hardware": _hardware(spec),
        "mesh": _mesh(spec, mesh),
        "batch": _batch(spec, mesh),
        **({"restore": _restore(spec, mesh)} if spec.train.checkpoint.restore == "one_replica" else {}),
        **({"pipeline": pipeline} if pipeline else {}),
        **({"context": context} if context else {}),
        "model": _model(spec),
        "memory_per_device": _memory(spec, mesh),
        "sharding": _sharding(spec, mesh),
        "timeouts": _timeouts(spec),
        "failure": {"mode": spec.failure.mode, "exit_codes": outcomes(spec.failure, slice_alone=worlds_apart(spec.train))},
        "security": {"level": spec.security, "meaning": SECURITY[spec.security], "network": _network(spec)},
    }


def _job(spec: JobSpec) -> dict[str, Any]:
    image = spec.container_image
    return {
        "name": spec.name,
        "spec_hash": spec.hash,
        "image": image.reference,
        "image_pull_policy": pull_policy(image),
        "run_directory": spec.train.run_directory,
        "data_cache": spec.train.data.cache_directory,
        "capacity": spec.capacity.type,
        "queue": spec.queue.name if spec.queue else None,
        "placement": spec.placed.type,
        "oldest_jobset": spec.jobset_version,
    }


def _hardware(spec: JobSpec) -> dict[str, Any]:
    layout, tpu = spec.layout, spec.layout.tpu
    found: dict[str, Any] = {
        "accelerator": tpu.name if tpu else "cpu",
        "slices": layout.slices,
        "hosts_per_slice": layout.hosts_per_slice,
        "hosts": layout.hosts,
        "devices_per_host": layout.devices_per_host,
        "devices_per_slice": layout.devices_per_slice,
        "devices": layout.devices,
    }
    if tpu is not None:
        found |= {
            "topology": tpu.topology_text,
            "machine": tpu.machine,
            "chips": layout.slices * tpu.chips,
            "hbm_bytes_per_device": hbm_bytes(spec),
            "peak_bf16_tflops_per_device": tpu.peak_bf16_tflops_per_device,
            "ici_gbytes_per_s_per_chip": tpu.family.ici_gbytes_per_s_per_chip,
        }
    return found


def _mesh(spec: JobSpec, mesh: dict[str, int]) -> dict[str, Any]:
    ici = spec.train.mesh.ici.solve(spec.layout.devices_per_slice, "devices per slice")
    dcn = spec.world.mesh.dcn.solve(spec.world_slices, "slices")
    return {axis: f"{degree} = {ici[axis]} in a slice x {dcn[axis]} over slices" for axis, degree in used(mesh).items()}


def _batch(spec: JobSpec, mesh: dict[str, int]) -> dict[str, Any]:
    batch, shards = spec.train.batch, batch_shards(mesh, spec.train.sharding)
    ramp = batch.ramp_up
    grows = (
        ramp and f"{ramp.start} sequences, {ramp.increment} more every {ramp.steps_per_size} steps, all from step {batch.ramp_up_steps} on"
    )
    return {
        "global_batch_sequences": batch.global_batch,
        **({"ramp_up": grows, "sizes_compiled": len(batch.sizes)} if grows else {}),
        "sequence_length": batch.sequence_length,
        "tokens_per_step": batch.global_batch * batch.sequence_length,
        "tokens_of_the_run": batch.sequences_before(spec.train.steps) * batch.sequence_length,
        "batch_shards": shards,
        "sequences_per_shard_and_microbatch": spec.world.batch.global_batch // (shards * batch.accumulation),
        "microbatches": batch.accumulation,
    }


def _model(spec: JobSpec) -> dict[str, Any]:
    model, batch, tpu = spec.train.model, spec.train.batch, spec.layout.tpu
    operations = train_flops(model, batch.global_batch, batch.sequence_length)
    found: dict[str, Any] = {
        "parameters": parameter_count(model),
        "layers": model.layer_count,
        "flops_per_step": operations,
        "checkpoint_bytes": 4 * parameter_count(model) * (2 if spec.train.ema else 1)
        + sum(m.bytes for t in treatments(spec.train.optimizer, weights(model)) for m in t.moments),
    }
    if tpu is not None:
        peak = tpu.peak_bf16_tflops_per_device * 1e12 * spec.layout.devices
        found["seconds_per_step_at_half_of_peak"] = round(2 * operations / peak, 4)
        steps_of_full_batches = batch.sequences_before(spec.train.steps) / batch.global_batch
        found["hours_of_the_run_at_half_of_peak"] = round(steps_of_full_batches * 2 * operations / peak / 3600, 2)
    return found


def _restore(spec: JobSpec, mesh: dict[str, int]) -> dict[str, Any]:
    """Of a resume that one replica reads for all."""
    axes = {axis: mesh[axis] for axis in REPLICA_AXES if mesh[axis] > 1}
    named = " x ".join(f"{axis}={degree}" for axis, degree in axes.items())
    return {
        "reads": f"the hosts of the first of {math.prod(axes.values())} replicas ({named})",
        "passed_on": "what the others have in common with it, one tensor after the other; what only they have, they read",
    }


def _memory(spec: JobSpec, mesh: dict[str, int]) -> dict[str, Any]:
    memory = device_memory(spec.world, mesh, tpu=spec.layout.tpu is not None)
    found: dict[str, Any] = {
        "parameters": memory.parameters,
        **({"average": memory.average} if memory.average else {}),
        "optimizer": memory.optimizer,
        "gradients": memory.gradients,
        "saved_activations_estimate": memory.saved_activations,
        "layer_at_work_estimate": memory.layer_at_work,
        "logits_estimate": memory.logits,
        **({"pipeline_estimate": memory.pipeline} if memory.pipeline else {}),
        "total_estimate": memory.total,
    }
    if hbm := hbm_bytes(spec):
        found |= {"hbm": hbm, "verdict": verdict(spec.world, memory, hbm)}
    return found


def _sharding(spec: JobSpec, mesh: dict[str, int]) -> dict[str, Any]:
    """Per weight: its shape, the mesh axes of each dim, and what could not apply."""
    found: dict[str, Any] = {}
    for weight, layout in weight_layouts(spec.world, mesh):
        entry: dict[str, Any] = {"shape": "x".join(map(str, weight.shape)), "layout": _layout(weight.axes, layout)}
        skipped = [skip for skip in layout.skipped if skip.matters]
        if skipped:
            entry["skipped"] = [f"{skip.rule[0]} -> {'+'.join(in_use(skip.rule[1], mesh))}: {skip.reason}" for skip in skipped]
        if layout.dropped:
            entry["dropped"] = [reason for _, _, reason in layout.dropped]
        found[weight.path] = entry
    return found


def _layout(axes: tuple[str, ...], layout: Resolution) -> str:
    return ", ".join(f"{axis}:{'+'.join(mesh)}" if mesh else axis for axis, mesh in zip(axes, layout.spec, strict=True))


def _network(spec: JobSpec) -> str:
    if spec.network.host_network:
        return (
            "the node's own: ports are the node's, no network policy binds the pods, and GKE's Workload Identity gives them "
            "the node's account instead of their service account"
        )
    if not spec.network.isolate:
        return "the pod's own; anybody in the cluster may connect"
    return "the pod's own; in: only pods of this job; out: those, DNS, GKE's metadata server, TCP 443"


def _timeouts(spec: JobSpec) -> dict[str, Any]:
    distributed, port = spec.train.distributed, spec.network.coordinator_port
    return {
        "coordinator": names.coordinator(spec) if spec.layout.target == "cpu" else f"chosen by the TPU runtime, port {port}",
        "initialization_seconds": distributed.initialization_timeout_seconds,
        "heartbeat_seconds": distributed.heartbeat_timeout_seconds,
        "grace_seconds": spec.grace,
        "survivor_wait_seconds": contract.SURVIVOR_WAIT_SECONDS,
        "deleted_after_seconds": spec.ttl_seconds,
        "queue_limit_seconds": spec.queue.max_run_seconds if spec.queue else None,
    }
