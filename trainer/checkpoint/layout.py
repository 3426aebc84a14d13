"""From the tensors a checkpoint holds to the tensors a run wants. No JAX here.

A checkpoint keeps every tensor in the shape it had in memory: layers of a segment stacked
(`segments/0/1/attention/query`, leading dim = repeats) or one by one (`segments/0/1/7/attention/query`). A run
that wants the other form gets it by path, one tensor at a time. Optimizer trees hold the same paths further
down (`0/mu/segments/0/1/...`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

_IN_SEGMENT: Final = re.compile(r"(?P<head>(?:.*/)?segments/\d+/\d+)/(?:(?P<repeat>\d+)/)?(?P<tail>.*\D.*)")
_NAMED_AT_MOST: Final = 20


@dataclass(frozen=True)
class Leaf:
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class Same:
    path: str


@dataclass(frozen=True)
class Unstack:
    """Target r is `source[r]`."""

    source: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Stack:
    """The target is the sources, stacked along a new leading dim."""

    sources: tuple[str, ...]
    target: str


Move = Same | Unstack | Stack


@dataclass(frozen=True)
class Plan:
    moves: tuple[Move, ...]
    problems: tuple[str, ...]  # one sentence each; a plan with problems must not be run


def plan(saved: Mapping[str, Leaf], wanted: Mapping[str, Leaf]) -> Plan:
    """How to build every wanted tensor from saved ones, each saved one used once; or everything that is wrong."""
    moves: list[Move] = []
    problems: list[str] = []
    unused = dict(saved)
    missing: list[str] = []
    for move in _moves(saved, wanted):
        match move:
            case str(path):
                missing.append(path)
                continue
            case Same(path):
                sources, found, expected = (path,), saved[path], wanted[path]
            case Unstack(source, targets):
                expected = Leaf((len(targets), *wanted[targets[0]].shape), wanted[targets[0]].dtype)
                sources, found = (source,), saved[source]
            case Stack(sources, target):
                found, expected = Leaf((len(sources), *saved[sources[0]].shape), saved[sources[0]].dtype), wanted[target]
        for source in sources:
            del unused[source]
        if found != expected:
            problems.append(f"{sources[0]}: saved {found}, wanted {expected}")
        moves.append(move)
    problems += [f"{path}: wanted {wanted[path]}, not saved{_near(path, unused)}" for path in missing]
    problems += [f"{path}: saved {leaf}, not wanted{_near(path, missing)}" for path, leaf in unused.items()]
    return Plan(tuple(moves), tuple(problems))


def shorten(problems: list[str]) -> str:
    """The problems as indented lines; a long list is cut with its length named."""
    lines = problems[:_NAMED_AT_MOST]
    if len(problems) > _NAMED_AT_MOST:
        lines.append(f"and {len(problems) - _NAMED_AT_MOST} more")
    return "\n".join(f"  {line}" for line in lines)


def _moves(saved: Mapping[str, Leaf], wanted: Mapping[str, Leaf]) -> Iterator[Move | str]:
    """A move for each wanted tensor (one for all repeats of it), or its path where nothing fits."""
    saved_repeats = _by_stacked_path(saved)
    wanted_repeats = _by_stacked_path(wanted)
    done: set[str] = set()
    for path in wanted:
        stacked, _ = _split(path)
        if path in saved:
            yield Same(path)
        elif stacked != path and stacked in saved:
            if stacked not in done:
                done.add(stacked)
                yield Unstack(stacked, wanted_repeats[stacked])
        elif path in saved_repeats:
            yield Stack(saved_repeats[path], path)
        else:
            yield path


def _split(path: str) -> tuple[str, int | None]:
    """The path with the repeat taken out, and the repeat."""
    found = _IN_SEGMENT.fullmatch(path)
    if found is None or found["repeat"] is None:
        return path, None
    return f"{found['head']}/{found['tail']}", int(found["repeat"])


def _by_stacked_path(leaves: Mapping[str, Leaf]) -> dict[str, tuple[str, ...]]:
    """Stacked path -> its repeats in order, where repeats 0 to n-1 are all there and look the same."""
    groups: dict[str, dict[int, str]] = {}
    for path in leaves:
        stacked, repeat = _split(path)
        if repeat is not None:
            groups.setdefault(stacked, {})[repeat] = path
    return {
        stacked: tuple(group[repeat] for repeat in range(len(group)))
        for stacked, group in groups.items()
        if sorted(group) == list(range(len(group))) and len({leaves[path] for path in group.values()}) == 1
    }


def _near(path: str, others: Mapping[str, Leaf] | list[str]) -> str:
    close = difflib.get_close_matches(path, list(others)[:1000], n=1, cutoff=0.6)
    return f" (nearest: {close[0]})" if close else ""
