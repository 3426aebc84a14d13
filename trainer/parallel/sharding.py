"""The layout of a run: logical axes of a tensor to its sharding over the mesh.

The model names logical axes and calls `constrain`; it never sees a mesh. Inside `use_layout` the names are
resolved by the run's rules, outside of it `constrain` is the identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainer.config.context import is_balanced
from trainer.config.layouts import stored_layout
from trainer.config.rules import Resolution, across_replicas, inside_pipeline, resolve
from trainer.config.sharding import Sharding
from trainer.config.train import TrainConfig
from trainer.parallel.mesh import build_mesh

if TYPE_CHECKING:
    from jaxlib._jax import Device  # the public name is a variable to a type checker


STANDARD: Final = Sharding()


@dataclass(frozen=True)
class Layout:
    """A mesh and the rules that lay tensors over it."""

    mesh: Mesh
    sharding_config: Sharding = STANDARD
    inside_stage: bool = False
    """Within a pipeline's stage: the `stage` axis is taken, the batch is split over the others."""
    balanced: bool = False
    """Sequences lie in the order of `trainer.config.context.balanced_order`."""
    all_replicas: bool = False
    """For what all replicas of DiLoCo do together: the batch is split over `diloco` too. A replica's own step knows nothing of the axis."""

    @classmethod
    def of(cls, config: TrainConfig, devices: Sequence[Device], *, slices: int = 1) -> Layout:
        """The layout of a run. Raises ConfigError where its mesh does not fit the devices."""
        return cls(build_mesh(config.mesh, devices, slices=slices), config.sharding)

    def spec(self, axes: Sequence[str | None], shape: Sequence[int], weight: str | None = None) -> PartitionSpec:
        """Mesh axes of a tensor with these logical axes; `weight` is its path where it is a weight, or belongs to one."""
        rules = self.sharding_config.table(weight)
        rules = inside_pipeline(rules) if self.inside_stage else rules
        rules = across_replicas(rules) if self.all_replicas else rules
        return _partition_spec(resolve(axes, shape, self.mesh.shape, rules))

    def sharding(self, axes: Sequence[str | None], shape: Sequence[int], weight: str | None = None) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(axes, shape, weight))

    def stored(self, axes: Sequence[str | None], shape: Sequence[int], weight: str | None = None) -> NamedSharding:
        """Of a weight, or of a tensor the optimizer keeps for it, between steps."""
        return NamedSharding(self.mesh, _partition_spec(stored_layout(self.sharding_config, axes, shape, weight, self.mesh.shape)))

    def of_batch(self, config: TrainConfig) -> Layout:
        """The layout of whole batches of a run."""
        return self if config.diloco is None else replace(self, all_replicas=True)

    def in_steps(self, config: TrainConfig) -> Layout:
        """The layout that steps compute with: sequences are balanced where they are split and the run says so."""
        split = self.spec(("batch", "length"), (config.batch.global_batch, config.batch.sequence_length))
        return replace(self, balanced=len(split) == 2 and is_balanced(config.sharding.context))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())


def _partition_spec(resolution: Resolution) -> PartitionSpec:
    entries = [mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None for mesh_axes in resolution.spec]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


_current: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextmanager
def use_layout(layout: Layout | None) -> Iterator[None]:
    """Resolve `constrain` by `layout` while tracing inside this block; None: no constraint."""
    token = _current.set(layout)
    try:
        yield
    finally:
        _current.reset(token)


def current_layout() -> Layout | None:
    """The layout of the innermost `use_layout`."""
    return _current.get()


def constrain(x: jax.Array, axes: Sequence[str | None], weight: str | None = None) -> jax.Array:
    """`x` with the sharding its logical `axes` resolve to; `x` itself outside of `use_layout` or on one device.

    `weight`: the path of the weight that `x` is a copy of, for the rules attached to it.
    """
    layout = _current.get()
    if layout is None or layout.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, layout.sharding(axes, x.shape, weight))
