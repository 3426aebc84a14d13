"""The link model: seconds of a collective on a torus, from bytes, links and hops. docs/compile.md has it in words. No JAX here.

    seconds = passes x (n - 1) / n x bytes / (links x bandwidth of a link in one direction) + hops x 1 microsecond

n devices in the group; one pass for a gather, a scatter or an exchange, two for an all-reduce. Links are those a device
sends on: two for each dim of the torus that the group spans and that wraps, one for a dim that does not; two for the
compiler's one-dimensional ring through several dims; half where it says that a ring turns one way. Each device of an
all-to-all sends bytes / n to every other one; a byte takes a quarter of the length of a dim that wraps, a third of one
that does not, and occupies as many links. A permute takes one link of each hop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from trainer.aot.hlo import Collective
from trainer.config.target import Target

HOP_SECONDS: Final = 1e-6
Place = tuple[int, tuple[int, ...]]
"""Slice, and coordinates in its torus."""


@dataclass(frozen=True)
class Cost:
    link: str  # "ici", "dcn", or "none" where nothing leaves a device
    links: int  # a device sends on, at a time
    hops: int
    seconds: float | None  # None without bandwidths


def cost(collective: Collective, places: Sequence[Place], target: Target) -> Cost:
    """What one run of `collective` costs; `places`: where each partition is, empty where that is unknown."""
    if collective.kind == "send":
        rate = target.dcn_bytes_per_second
        return Cost("dcn", 1, 1, collective.bytes / rate if rate else None)
    members = [places[partition] for partition in collective.group] if places else []
    pairs = [(places[source], places[to]) for source, to in collective.pairs] if places else []
    if len({slice_index for slice_index, _ in members}) > 1 or any(source[0] != to[0] for source, to in pairs):
        return _between_slices(collective, members, target)
    if pairs:
        hops = max(_distance(source[1], to[1], target) for source, to in pairs)
        return _cost(collective.bytes * max(hops, 1) / max(hops, 1), 1, hops, target)
    n = len(collective.group)
    if n <= 1 and collective.group:
        return Cost("none", 0, 0, 0.0)
    sizes = [len({place[axis] for _, place in members}) for axis in range(len(target.torus))]
    spanned = [(size, wraps and size == length) for size, wraps, length in zip(sizes, target.wraps, target.torus, strict=True) if size > 1]
    if collective.kind in ("all-to-all", "ragged-all-to-all"):
        distance = sum(size / (4 if wraps else 3) for size, wraps in spanned)
        links = _links(spanned)
        return _cost(collective.bytes * distance, links, sum(size // 2 for size, _ in spanned), target)
    passes = 2 if collective.kind == "all-reduce" else 1
    ring = collective.algorithm.startswith("1D")
    links = (2 if len(spanned) > 1 else _links(spanned)) if ring else _links(spanned)
    if collective.algorithm.startswith("UniDirection"):
        links = max(links // 2, 1)
    hops = passes * (math.ceil(n / 2) if ring else sum(size // 2 if wraps else size - 1 for size, wraps in spanned))
    return _cost(passes * (n - 1) / max(n, 1) * collective.bytes, links, hops, target)


def _links(spanned: list[tuple[int, bool]]) -> int:
    return sum(2 if wraps else 1 for _, wraps in spanned) or 1


def _cost(sent: float, links: int, hops: int, target: Target) -> Cost:
    rate = target.ici_link_bytes_per_second
    return Cost("ici", links, hops, sent / (links * rate) + hops * HOP_SECONDS if rate else None)


def _between_slices(collective: Collective, members: list[Place], target: Target) -> Cost:
    """Everything is charged to the slower network: each slice sends what it has to every other one once."""
    slices = max(len({slice_index for slice_index, _ in members}), 2)
    passes = 2 if collective.kind == "all-reduce" else 1
    rate = target.dcn_bytes_per_second
    return Cost("dcn", 1, 1, passes * (slices - 1) / slices * collective.bytes / rate if rate else None)


def _distance(source: tuple[int, ...], to: tuple[int, ...], target: Target) -> int:
    hops = 0
    for here, there, length, wraps in zip(source, to, target.torus, target.wraps, strict=True):
        straight = abs(here - there)
        hops += min(straight, length - straight) if wraps else straight
    return hops
