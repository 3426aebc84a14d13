"""What a compiled step needs and does, as one plain dict: memory, collectives by region, bounds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import jax

from trainer.aot.hlo import Region, regions
from trainer.aot.links import Cost, Place, cost
from trainer.aot.lower import Compiled
from trainer.config.flops import train_flops
from trainer.config.mesh import used
from trainer.config.target import Target
from trainer.config.train import TrainConfig
from trainer.config.weights import weights
from trainer.parallel.compiler import compiler_options
from trainer.parallel.sharding import Layout


def report(config: TrainConfig, target: Target, compiled: Compiled) -> dict[str, Any]:
    """Sizes are bytes of one device, times seconds. `fits` is None where the capacity is unknown (CPU)."""
    found = regions(compiled.step.as_text() or "", target.devices)
    spots = places(compiled.layout, target)
    memory = _memory(compiled.step, target)
    return {
        **_target(config, target, compiled.layout),
        "fits": memory["fits"],
        "memory_per_device": memory,
        "collectives": [_region(region, spots, target) for region in found],
        "options": compiler_options(config.compiler, compiled.layout.mesh) or {},
        "bounds": bounds(config, target, compiled.layout, found, spots),
        "seconds": {"lower": round(compiled.lower_seconds, 2), "compile": round(compiled.compile_seconds, 2)},
        "program": program_hash(compiled.lowered),
    }


def too_large(config: TrainConfig, target: Target, layout: Layout, message: str) -> dict[str, Any]:
    """The report of a step whose compilation ended for want of memory, with the compiler's own words."""
    return {**_target(config, target, layout), "fits": False, "compiler": message}


def program_hash(lowered: jax.stages.Lowered) -> str:
    """SHA-256 of the program before compilation: equal for two steps that are the same."""
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()


def places(layout: Layout, target: Target) -> list[Place]:
    """Where each partition of the program lies; empty where devices have no coordinates."""
    if not target.torus:
        return []
    devices = list(layout.mesh.devices.flat)
    return [(getattr(device, "slice_index", 0), tuple(device.coords)[: len(target.torus)]) for device in devices]


def _target(config: TrainConfig, target: Target, layout: Layout) -> dict[str, Any]:
    return {
        "target": target.name,
        "slices": target.slices,
        "devices": target.devices,
        "mesh": used(dict(layout.mesh.shape)),
        "global_batch": config.batch.global_batch,
        "sequence_length": config.batch.sequence_length,
    }


def _memory(step: jax.stages.Compiled, target: Target) -> dict[str, Any]:
    stats = step.memory_analysis()
    assert stats is not None
    arguments, output, temporaries = stats.argument_size_in_bytes, stats.output_size_in_bytes, stats.temp_size_in_bytes
    # The CPU compiler's own peak leaves temporaries out.
    known = stats.peak_memory_in_bytes if target.platform == "tpu" else 0
    peak = known or arguments + output - stats.alias_size_in_bytes + temporaries
    return {
        "arguments": arguments,
        "output": output,
        "donated": stats.alias_size_in_bytes,
        "temporaries": temporaries,
        "peak": peak,
        "code": stats.generated_code_size_in_bytes,
        "host": stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes,
        "capacity": target.hbm_bytes,
        "fits": None if target.hbm_bytes is None else peak <= target.hbm_bytes,
    }


def _region(region: Region, spots: Sequence[Place], target: Target) -> dict[str, Any]:
    """One entry for each kind, way of running, network and algorithm; counts, bytes and seconds of one execution."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    exposed = 0.0
    for collective in region.collectives:
        price = cost(collective, spots, target)
        key = (collective.kind, collective.asynchronous, collective.overlapped, price.link, collective.algorithm, len(collective.group))
        row = rows.setdefault(key, {
            "kind": collective.kind,
            "runs": "async" if collective.asynchronous else "sync",
            "overlapped": collective.overlapped,
            "network": price.link,
            "algorithm": collective.algorithm,
            "group": len(collective.group) or None,
            "count": 0, "bytes": 0, "largest": 0, "links": price.links, "seconds": None if price.seconds is None else 0.0,
        })  # fmt: skip
        row["count"] += collective.turns
        row["bytes"] += collective.bytes * collective.turns
        row["largest"] = max(row["largest"], collective.bytes)
        if price.seconds is not None:
            row["seconds"] += price.seconds * collective.turns
            exposed += 0 if collective.overlapped else price.seconds * collective.turns
    known = target.ici_link_bytes_per_second is not None
    return {
        "region": region.name,
        "executions": region.executions,
        "exposed_seconds": exposed if known else None,
        "collectives": list(rows.values()),
    }


def bounds(config: TrainConfig, target: Target, layout: Layout, found: Sequence[Region], spots: Sequence[Place]) -> dict[str, Any]:
    """Seconds a step takes at the least, by what limits it.

    FLOPs are analytic: causal attention counts the pairs it sees, recomputation does not count. HBM traffic is a lower
    bound: the state read and written once, and each microbatch's gathered matrices read in the forward pass, the backward
    pass for inputs and for weights, and once more where the layer is recomputed.
    """
    flops = train_flops(config.model, config.batch.global_batch, config.batch.sequence_length) / target.devices
    traffic = _least_traffic(config, layout)
    by_link = {"ici": 0.0, "dcn": 0.0}
    for region in found:
        for collective in region.collectives:
            price: Cost = cost(collective, spots, target)
            if price.seconds is not None and price.link in by_link:
                by_link[price.link] += price.seconds * collective.turns * region.executions
    seconds: dict[str, float] = {}
    if target.peak_flops and target.hbm_bytes_per_second:
        seconds = {"compute": flops / target.peak_flops, "hbm": traffic / target.hbm_bytes_per_second, **by_link}
    return {
        "flops_per_device": flops,
        "flops_convention": "causal attention counted as causal; no recomputation",
        "least_hbm_bytes_per_device": traffic,
        "arithmetic_intensity": flops / traffic,
        "intensity_needed": target.peak_flops / target.hbm_bytes_per_second if target.peak_flops and target.hbm_bytes_per_second else None,
        "seconds": seconds,
        "limited_by": max(seconds, key=lambda name: seconds[name]) if seconds else None,
        "exposed_seconds": sum(exposed_seconds(region, spots, target) * region.executions for region in found) if seconds else None,
    }


def exposed_seconds(region: Region, spots: Sequence[Place], target: Target) -> float:
    """Of one execution: collectives that no computation runs beside."""
    prices = ((collective, cost(collective, spots, target)) for collective in region.collectives if not collective.overlapped)
    return sum((price.seconds or 0.0) * collective.turns for collective, price in prices)


def _least_traffic(config: TrainConfig, layout: Layout) -> float:
    narrow = 2 if config.model.compute_dtype == "bfloat16" else 4
    tensor = layout.mesh.shape.get("tensor", 1)
    passes = (3 if config.model.remat == "none" else 4) * config.batch.accumulation
    total = 0.0
    for weight in weights(config.model):
        kept = math.prod(layout.sharding(weight.axes, weight.shape, weight.path).shard_shape(weight.shape))
        total += 2 * 3 * 4 * kept + (passes * narrow * math.prod(weight.shape) / tensor if weight.inputs else 0)
    return total
