"""From the tensors a checkpoint holds to the tensors a run wants. No JAX here.

A checkpoint keeps every tensor in the shape it had in memory: layers of a segment stacked
(`segments/0/1/attention/query`, leading dim = repeats), one by one (`segments/0/1/7/attention/query`), or in a pipeline
(`segments/0/1/pipeline/attention/query`, three leading dims that in their order are the first repeats, and the other
repeats under `segments/0/1/after/`, in one of the first two forms). A run that wants another form gets it by path, one
tensor of the model at a time. Optimizer trees hold the same paths further down (`0/mu/segments/0/1/...`).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

_IN_SEGMENT: Final = re.compile(r"(?P<head>(?:.*/)?segments/\d+/\d+)/(?:(?P<part>pipeline|after)/)?(?:(?P<repeat>\d+)/)?(?P<tail>.*\D.*)")
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
class Part:
    """A tensor that holds some repeats of a weight, in order: as its `layer_dims` leading dims, or just one."""

    path: str
    shape: tuple[int, ...]
    layer_dims: int

    @property
    def repeats(self) -> int:
        return math.prod(self.shape[: self.layer_dims])

    @property
    def layer_shape(self) -> tuple[int, ...]:
        return self.shape[self.layer_dims :]


@dataclass(frozen=True)
class Regroup:
    """The repeats of one weight, in order, from the parts that hold them to the parts that are wanted."""

    sources: tuple[Part, ...]
    targets: tuple[Part, ...]


Move = Same | Regroup


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
            case Regroup(parts, targets):
                sources = tuple(part.path for part in parts)
                found, expected = _together(parts, saved), _together(targets, wanted)
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
    """A move for each wanted tensor (one for all parts of a weight), or its path where nothing fits."""
    saved_groups, wanted_groups = _by_weight(saved), _by_weight(wanted)
    for weight, targets in wanted_groups.items():
        held, asked = _parts(saved, saved_groups.get(weight, ())), _parts(wanted, targets)
        if held and asked and held != asked:
            yield Regroup(held, asked)
        else:
            yield from (Same(path) if path in saved else path for path in targets)


def _by_weight(leaves: Mapping[str, Leaf]) -> dict[str, list[str]]:
    """Path with all repeats stacked -> the tensors that hold them."""
    groups: dict[str, list[str]] = {}
    for path in leaves:
        found = _IN_SEGMENT.fullmatch(path)
        groups.setdefault(path if found is None else f"{found['head']}/{found['tail']}", []).append(path)
    return groups


def _parts(leaves: Mapping[str, Leaf], paths: Iterable[str]) -> tuple[Part, ...]:
    """The tensors that hold a weight's repeats, first repeat first; none where they are not all there, or not alike."""
    found: list[tuple[int, int, Part]] = []
    for path in paths:
        matched = _IN_SEGMENT.fullmatch(path)
        if matched is None:
            return ()
        order = {"pipeline": 0, None: 1, "after": 1}[matched["part"]]
        layer_dims = 3 if matched["part"] == "pipeline" else 0 if matched["repeat"] else 1
        found.append((order, int(matched["repeat"] or 0), Part(path, leaves[path].shape, layer_dims)))
    found.sort(key=lambda entry: entry[:2])
    parts = tuple(part for *_, part in found)
    behind = [repeat for order, repeat, _ in found if order]
    alike = len({(part.layer_shape, leaves[part.path].dtype) for part in parts}) == 1
    forms = {("after" in part.path.split("/"), part.layer_dims) for order, _, part in found if order}
    return parts if behind == list(range(len(behind))) and alike and len(forms) < 2 else ()


def _together(parts: tuple[Part, ...], leaves: Mapping[str, Leaf]) -> Leaf:
    return Leaf((sum(part.repeats for part in parts), *parts[0].layer_shape), leaves[parts[0].path].dtype)


def _near(path: str, others: Mapping[str, Leaf] | list[str]) -> str:
    close = difflib.get_close_matches(path, list(others)[:1000], n=1, cutoff=0.6)
    return f" (nearest: {close[0]})" if close else ""
