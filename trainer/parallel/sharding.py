"""The layout of a run: logical axes of a tensor to its sharding over the mesh.

The model names logical axes and calls `constrain`; it never sees a mesh. Inside `use_layout` the names are
resolved by the run's rules, outside of it `constrain` is the identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainer.config.rules import RULES, Rule, resolve


@dataclass(frozen=True)
class Layout:
    """A mesh and the rules that lay tensors over it."""

    mesh: Mesh
    rules: tuple[Rule, ...] = RULES

    def spec(self, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
        resolution = resolve(axes, shape, self.mesh.shape, self.rules)
        entries = [mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None for mesh_axes in resolution.spec]
        while entries and entries[-1] is None:
            entries.pop()
        return PartitionSpec(*entries)

    def sharding(self, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(axes, shape))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())


_current: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextmanager
def use_layout(layout: Layout) -> Iterator[None]:
    """Resolve `constrain` by `layout` while tracing inside this block."""
    token = _current.set(layout)
    try:
        yield
    finally:
        _current.reset(token)


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """`x` with the sharding its logical `axes` resolve to; `x` itself outside of `use_layout` or on one device."""
    layout = _current.get()
    if layout is None or layout.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, layout.sharding(axes, x.shape))
