"""Logical-axis rules: one ordered table turns the names a model gives its dims into mesh axes.

Pure arithmetic over names and sizes, so that the launcher can explain a sharding without JAX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

Rule = tuple[str, tuple[str, ...]]

RULES: Final[tuple[Rule, ...]] = (
    # Activations.
    ("batch", ("data", "fsdp")),
    ("act_heads", ("tensor",)),
    ("act_kv_heads", ("tensor",)),
    ("act_mlp", ("tensor",)),
    ("act_vocab", ("tensor",)),
    # Weights.
    ("vocab", ("tensor",)),
    ("mlp", ("tensor",)),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("embed", ("fsdp",)),
)
"""Names without a rule (`length`, `act_embed`, `head_dim`, `norm`, `layer`) are replicated."""


@dataclass(frozen=True)
class Resolution:
    """How one tensor is laid out over the mesh, and why."""

    spec: tuple[tuple[str, ...], ...]  # mesh axes of each dim; () is replicated
    winners: tuple[Rule | None, ...]  # the rule that won each dim
    skipped: tuple[tuple[Rule, str], ...]  # rules that named a dim but could not apply, with the reason
    dropped: tuple[tuple[int, str, str], ...]  # (dim, mesh axis, reason): won, but does not divide the dim


def resolve(axes: Sequence[str | None], shape: Sequence[int], mesh: Mapping[str, int], rules: Sequence[Rule] = RULES) -> Resolution:
    """Lay a tensor of `shape` with logical `axes` over `mesh` (mesh axis -> degree).

    Rules are walked in list order. A rule applies when it names a dim that has no rule yet and all its mesh
    axes are still free in this tensor; otherwise the whole rule is skipped and a later one may apply. Mesh
    axes of size 1 vanish; one that does not divide its dim is dropped and reported.
    Raises ValueError when a logical axis occurs twice or the lengths differ.
    """
    named = [axis for axis in axes if axis is not None]
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} logical axes {tuple(axes)} for {len(shape)} dims {tuple(shape)}")
    if len(set(named)) != len(named):
        raise ValueError(f"a logical axis occurs twice in {tuple(axes)}")
    winners: list[Rule | None] = [None] * len(axes)
    skipped: list[tuple[Rule, str]] = []
    used: dict[str, str] = {}
    for rule in rules:
        name, mesh_axes = rule
        if name not in named:
            continue
        dim = list(axes).index(name)
        taken = [axis for axis in mesh_axes if axis in used]
        if (winner := winners[dim]) is not None:
            skipped.append((rule, f"{name} already has {'+'.join(winner[1]) or 'replicated'}"))
        elif taken:
            skipped.append((rule, ", ".join(f"{axis} is used by {used[axis]}" for axis in taken)))
        else:
            winners[dim] = rule
            used.update(dict.fromkeys(mesh_axes, name))
    spec: list[tuple[str, ...]] = []
    dropped: list[tuple[int, str, str]] = []
    for dim, winner in enumerate(winners):
        kept: list[str] = []
        ways = 1
        for axis in winner[1] if winner else ():
            degree = mesh.get(axis, 1)
            if degree == 1:
                continue
            if shape[dim] % (ways * degree):
                after = f" after {ways} ways" if ways > 1 else ""
                dropped.append((dim, axis, f"{axis}={degree} does not divide {axes[dim]}={shape[dim]}{after}"))
                continue
            ways *= degree
            kept.append(axis)
        spec.append(tuple(kept))
    return Resolution(tuple(spec), tuple(winners), tuple(skipped), tuple(dropped))


def shard_elements(shape: Sequence[int], resolution: Resolution, mesh: Mapping[str, int]) -> int:
    """Elements of the tensor one device holds."""
    elements = 1
    for size, mesh_axes in zip(shape, resolution.spec, strict=True):
        for axis in mesh_axes:
            size //= mesh[axis]
        elements *= size
    return elements
