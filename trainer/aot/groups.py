"""Which partitions a collective joins, in the three ways HLO writes them. No JAX here."""

from __future__ import annotations

import math
import re
from itertools import product

_LISTED = re.compile(r"replica_groups=\{\{([0-9,]*)\}")
_IOTA = re.compile(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{[0-9]+,[0-9]+\},?)*)\}")
_AXIS = re.compile(r"'([^']+)'=([0-9]+)")
_USED = re.compile(r"'([^']+)'(?::\(([0-9]+)\)([0-9]+))?")


def first_group(attributes: str, partitions: int) -> tuple[int, ...]:
    """The first group: listed, as a transposed iota, or as axes of a mesh; all partitions where the groups are empty."""
    if found := _LISTED.search(attributes):
        return tuple(int(part) for part in found[1].split(",") if part) or tuple(range(partitions))
    if found := _IOTA.search(attributes):
        shape, dims = _numbers(found[1]), _numbers(found[2])
        order = _numbers(found[3]) if found[3] else list(range(len(dims)))
        return tuple(_transposed(dims, order)[: shape[-1]])
    if found := _MESH.search(attributes):
        return _of_mesh(found[1], found[2])
    return tuple(range(partitions)) if "replica_groups={}" in attributes else ()


def permute_pairs(attributes: str) -> tuple[tuple[int, int], ...]:
    found = _PAIRS.search(attributes)
    numbers = [int(number) for number in re.findall(r"[0-9]+", found[1])] if found else []
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _transposed(dims: list[int], order: list[int]) -> list[int]:
    """The elements of `iota(prod(dims)).reshape(dims).transpose(order)`, flat."""
    strides = [math.prod(dims[axis + 1 :]) for axis in range(len(dims))]
    places = product(*(range(dims[axis]) for axis in order))
    return [sum(i * strides[axis] for i, axis in zip(place, order, strict=True)) for place in places]


def _of_mesh(axes_text: str, used_text: str) -> tuple[int, ...]:
    """`'a':(m)k` is a part of axis a: after the m ways that lie outside of it, k ways."""
    axes = {name: int(size) for name, size in _AXIS.findall(axes_text)}
    strides: dict[str, int] = {}
    stride = math.prod(axes.values())
    for name, size in axes.items():
        stride //= size
        strides[name] = stride
    members = [0]
    for name, outside, size in _USED.findall(used_text):
        ways = int(size) if size else axes[name]
        step = strides[name] * (axes[name] // (int(outside) * ways) if size else 1)
        members = [member + step * i for member in members for i in range(ways)]
    return tuple(members)
