"""Whether a step is likely to fit in a TPU's memory, and what to change first where it is not."""

from __future__ import annotations

import math

from launcher.explain.memory import Memory, device_memory
from launcher.spec import JobSpec
from trainer.config import TrainConfig

TIGHT = 0.85
"""Above this share of the memory an estimate says little: `nnxlaunch compile` does."""


def too_large(spec: JobSpec) -> str:
    """The verdict on a job for TPUs that is estimated not to fit, else nothing."""
    if spec.layout.tpu is None:
        return ""
    mesh = spec.world.mesh.shape(slices=spec.world_slices, devices_per_slice=spec.layout.devices_per_slice)
    memory, hbm = device_memory(spec.world, mesh, tpu=True), hbm_bytes(spec)
    return verdict(spec.world, memory, hbm) if memory.total > hbm else ""


def hbm_bytes(spec: JobSpec) -> int:
    """Of one device; 0 where the job is not for TPUs."""
    return int(spec.layout.tpu.hbm_gib_per_device * 2**30) if spec.layout.tpu else 0


def verdict(config: TrainConfig, memory: Memory, hbm: int) -> str:
    """One line: the share of `hbm` bytes that is needed and, above it, the largest part and what makes that part smaller."""
    share = memory.total / hbm
    percent = f"{math.ceil(100 * share)} % of HBM"
    if share <= 1:
        return f"{percent}: tight" if share > TIGHT else f"{percent}: fits"
    state = memory.parameters + memory.average + memory.optimizer + memory.gradients
    fewer = "fewer sequences at a time (`batch.accumulation`, a smaller `batch.global_batch`)"
    less_kept = fewer if config.model.remat == "full" else f"`model.remat: full`, or {fewer}"
    parts = {
        "the logits": (memory.logits, f"compute the loss in tiles (`loss.tiles: {max(8, 2 * config.loss.tiles)}`), or {fewer}"),
        "what layers keep for the backward pass": (memory.saved_activations, less_kept),
        "a layer at work": (memory.layer_at_work, f"{fewer}, or more `tensor` or `context` in the mesh"),
        "what waits in the pipeline": (memory.pipeline, "fewer sequences in a microbatch (`pipeline.microbatches`)"),
        "the state": (state, "more devices that split it (`fsdp` in the mesh), or `optimizer.state_memory: host`"),
    }
    name, (size, advice) = max(parts.items(), key=lambda part: part[1][0])
    return f"{percent}: will not fit; most of it, {size / 2**30:.1f} GiB, is {name}: {advice}"
