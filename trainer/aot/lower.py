"""The train step of a config, lowered and compiled for described devices."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from trainer.config.target import Target
from trainer.config.train import TrainConfig
from trainer.parallel.sharding import Layout
from trainer.state import StateSpec, describe_state
from trainer.step import make_train_step

if TYPE_CHECKING:
    from jaxlib._jax import Device

# Two cores of a v4 chip are one device, as they are at run time; the other families need no word.
_CHIP_CONFIG = {"v4": "megacore"}


@dataclass(frozen=True)
class Compiled:
    """A compiled train step and what it took."""

    step: jax.stages.Compiled
    lowered: jax.stages.Lowered
    layout: Layout
    lower_seconds: float
    compile_seconds: float


def devices_of(target: Target) -> Sequence[Device]:
    """Devices of `target`: described ones of a TPU topology, or the CPU devices of this process."""
    if target.platform == "cpu":
        return jax.devices("cpu")[: target.devices]
    assert target.topology is not None
    options: dict[str, Any] = {"num_slices": target.slices} if target.slices > 1 else {}
    if chip := _CHIP_CONFIG.get(target.topology.partition(":")[0]):
        options["chip_config_name"] = chip
    return topologies.get_topology_desc(platform="tpu", topology_name=target.topology, **options).devices


def layout_of(config: TrainConfig, target: Target) -> Layout:
    """Raises ConfigError where the config's mesh does not fit the target."""
    return Layout.of(config, devices_of(target), slices=target.slices)


def abstract_batch(config: TrainConfig, layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a global batch as the trainer's feed places it."""
    shape = (config.batch.global_batch, config.batch.sequence_length)
    sharding = layout.of_batch(config).sharding(("batch", "length"), shape)
    integers = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    names = ("inputs", "targets", "positions", "segments")
    return {**dict.fromkeys(names, integers), "weights": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)}


def lower_step(config: TrainConfig, layout: Layout) -> tuple[StateSpec, jax.stages.Lowered]:
    """The very step `trainer.run` calls, lowered from shapes."""
    spec = describe_state(config, layout)
    step = make_train_step(config, spec, layout)
    return spec, step.lower(  # pyright: ignore[reportFunctionMemberAccess]
        spec.abstract, abstract_batch(config, layout)
    )


def compile_step(config: TrainConfig, layout: Layout) -> Compiled:
    """Compile for the devices of `layout`. Raises jax.errors.JaxRuntimeError, RESOURCE_EXHAUSTED where it does not fit."""
    start = time.monotonic()
    _, lowered = lower_step(config, layout)
    middle = time.monotonic()
    compiled = lowered.compile()
    return Compiled(compiled, lowered, layout, middle - start, time.monotonic() - middle)
