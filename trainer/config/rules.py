"""Logical-axis rules: one ordered table turns the names a model gives its dims into mesh axes.

Pure arithmetic over names and sizes, so that the launcher can explain a sharding without JAX.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

Rule = tuple[str, tuple[str, ...]]

RULES: Final[tuple[Rule, ...]] = (
    # Dims that a mesh axis exists for.
    ("replica", ("diloco",)),
    ("stage", ("stage",)),
    ("expert", ("expert",)),
    ("act_expert", ("expert",)),
    # The batch: over everything that does not split the sequence or the width of a layer. A tensor that has a stage
    # or an expert dim beside the batch takes a later line.
    ("batch", ("stage", "data", "fsdp", "fsdp_transpose", "expert")),
    ("batch", ("stage", "data", "fsdp", "fsdp_transpose")),
    ("batch", ("data", "fsdp", "fsdp_transpose", "expert")),
    ("batch", ("data", "fsdp", "fsdp_transpose")),
    # Embedded tokens where they have the width of a shard of the table: the mesh axes of the width are taken.
    ("rows", ("stage", "data")),
    # Activations: `length` inside of attention and the MLP, `act_length` between blocks.
    ("length", ("context",)),
    ("act_length", ("context", "tensor_sequence")),
    ("act_heads", ("tensor", "tensor_sequence")),
    ("act_kv_heads", ("tensor", "tensor_sequence")),
    ("act_mlp", ("tensor", "tensor_sequence")),
    ("act_vocab", ("tensor", "tensor_sequence")),
    # Weights. `embed` comes last: it takes what the other dim of the weight has left.
    ("mlp", ("fsdp_transpose", "tensor", "tensor_sequence")),
    ("vocab", ("tensor", "tensor_sequence")),
    ("heads", ("tensor", "tensor_sequence")),
    ("kv_heads", ("tensor", "tensor_sequence")),
    ("embed", ("fsdp", "fsdp_transpose", "context", "expert")),
    ("embed", ("fsdp", "context", "expert")),
    ("embed", ("fsdp", "fsdp_transpose", "context")),
    ("embed", ("fsdp", "context")),
    ("embed", ("fsdp", "fsdp_transpose", "expert")),
)
"""The built-in table. Its order decides; a name that no rule is for is replicated."""

UNRULED: Final = ("layer", "repeat", "head_dim", "norm", "act_embed")
"""Logical axes without a rule."""

STACKED: Final = ("repeat", "stage", "layer")
"""Logical axes of dims that count layers."""


def inside_pipeline(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules for what runs within a stage: there the `stage` axis is taken, and the batch has the other axes."""
    return tuple((name, tuple(axis for axis in axes if axis != "stage")) for name, axes in rules if name != "stage")


def across_replicas(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules for a batch of all replicas: replica r has the r-th part of its rows."""
    return tuple((name, ("diloco", *axes) if name == "batch" else axes) for name, axes in rules)


@dataclass(frozen=True)
class Skip:
    """A rule that named a dim of the tensor and did not apply."""

    rule: Rule
    reason: str
    matters: bool
    """False where it is a matter of mesh axes of size 1 only: on this mesh the layout is the same without the conflict."""


@dataclass(frozen=True)
class Resolution:
    """How one tensor is laid out over the mesh, and why."""

    spec: tuple[tuple[str, ...], ...]  # mesh axes of each dim; () is replicated
    winners: tuple[Rule | None, ...]  # the rule that won each dim
    skipped: tuple[Skip, ...]
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
    skipped: list[Skip] = []
    used: dict[str, str] = {}
    for rule in rules:
        name, mesh_axes = rule
        if name not in named:
            continue
        dim = list(axes).index(name)
        taken = [axis for axis in mesh_axes if axis in used]
        if (winner := winners[dim]) is not None:
            won = in_use(winner[1], mesh)
            skipped.append(Skip(rule, f"{name} already has {'+'.join(won) or 'no axis'}", in_use(mesh_axes, mesh) != won))
        elif taken:
            conflict = in_use(taken, mesh)
            reason = ", ".join(f"{axis} is used by {used[axis]}" for axis in conflict or taken)
            skipped.append(Skip(rule, reason, bool(conflict)))
        else:
            winners[dim] = rule
            used.update(dict.fromkeys(mesh_axes, name))
    spec: list[tuple[str, ...]] = []
    dropped: list[tuple[int, str, str]] = []
    for dim, winner in enumerate(winners):
        kept: list[str] = []
        ways = 1
        for axis in in_use(winner[1], mesh) if winner else ():
            degree = mesh[axis]
            if shape[dim] % (ways * degree):
                after = f" after {ways} ways" if ways > 1 else ""
                dropped.append((dim, axis, f"{axis}={degree} does not divide {axes[dim]}={shape[dim]}{after}"))
                continue
            ways *= degree
            kept.append(axis)
        spec.append(tuple(kept))
    return Resolution(tuple(spec), tuple(winners), tuple(skipped), tuple(dropped))


def split_further(
    resolution: Resolution, axes: Sequence[str | None], shape: Sequence[int], mesh: Mapping[str, int], axis: str
) -> Resolution:
    """The layout with `axis` added, innermost, to the first dim whose part on a device it divides.

    So a device holds a piece of what it held before, and a collective over `axis` alone makes the one from the other.
    Dims of stacked layers come last: a gradient summed over `axis` layer by layer is split within the layer. Dims over
    `tensor` and `tensor_sequence` are left alone. Unchanged where `axis` has size 1, is in use, or divides no dim.
    """
    degree = mesh.get(axis, 1)
    if degree == 1 or any(axis in spec for spec in resolution.spec):
        return resolution
    for dim in sorted(range(len(shape)), key=lambda dim: axes[dim] in STACKED):
        spec = resolution.spec[dim]
        part = shape[dim] // math.prod(mesh[other] for other in spec)
        if part % degree == 0 and not {"tensor", "tensor_sequence"} & set(spec):
            return replace(resolution, spec=(*resolution.spec[:dim], (*spec, axis), *resolution.spec[dim + 1 :]))
    return resolution


def in_use(mesh_axes: Sequence[str], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Those of `mesh_axes` that split anything."""
    return tuple(axis for axis in mesh_axes if mesh.get(axis, 1) != 1)


def shard_elements(shape: Sequence[int], resolution: Resolution, mesh: Mapping[str, int]) -> int:
    """Elements of the tensor one device holds."""
    elements = 1
    for size, mesh_axes in zip(shape, resolution.spec, strict=True):
        for axis in mesh_axes:
            size //= mesh[axis]
        elements *= size
    return elements
