"""TPU types: families as data (`families.yaml`), names and topologies as arithmetic.

A name is `FAMILY-N` or `FAMILY-TOPOLOGY`, such as `v5p-128` or `v5p-4x4x4`. N counts TensorCores on v4, v5p and
tpu7x, chips on v5e and v6e, as Google Cloud's own names do.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import yaml

from trainer.config.base import near_miss

ACCELERATOR_COUNT_LABEL = "cloud.google.com/gke-accelerator-count"
RESOURCE = "google.com/tpu"

Topology = tuple[int, ...]


class TpuError(ValueError):
    """A TPU type that does not exist, or one that means several things. `key` names the part of the spec at fault."""

    def __init__(self, message: str, *, key: str, hint: str, code: str) -> None:
        super().__init__(message)
        self.key, self.hint, self.code = key, hint, code


@dataclass(frozen=True, kw_only=True)
class Cubes:
    """Topologies built from 4x4x4 cubes."""

    max: int
    any_order: bool
    """Whether 8x4x4 is a topology besides 4x4x8."""


@dataclass(frozen=True, kw_only=True)
class Family:
    name: str
    aliases: list[str]
    name_counts: str  # "chips" or "tensorcores"
    gke_accelerator: str
    machines: dict[str, int]
    """Machine type -> chips of one host."""
    tensorcores_per_chip: int
    devices_per_chip: int
    hbm_gib_per_chip: int
    hbm_gbytes_per_s_per_chip: int
    peak_bf16_tflops_per_chip: int
    ici_gbytes_per_s_per_chip: int
    topologies: list[str]
    names: dict[int, str]
    """N of `FAMILY-N` -> topology."""
    cubes: Cubes | None = None
    workload_policy: bool = False
    super_slice: bool = False
    _shapes: frozenset[Topology] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_shapes", frozenset(parse_topology(text) for text in self.topologies))

    @property
    def units_per_chip(self) -> int:
        """What N of `FAMILY-N` counts, per chip."""
        return self.tensorcores_per_chip if self.name_counts == "tensorcores" else 1

    def has(self, topology: Topology) -> bool:
        """Whether a slice of this family can have this shape."""
        if topology in self._shapes:
            return True
        if self.cubes is None or len(topology) != 3 or any(dim % 4 or not 4 <= dim <= 256 for dim in topology):
            return False
        ordered = self.cubes.any_order or topology == tuple(sorted(topology))
        return ordered and math.prod(topology) <= 64 * self.cubes.max

    def shapes(self, chips: int) -> list[Topology]:
        """Non-decreasing topologies of so many chips, the most compact first."""
        found = [shape for shape in self._shapes if math.prod(shape) == chips]
        if self.cubes is not None and chips % 64 == 0 and chips <= 64 * self.cubes.max:
            found += [(4 * a, 4 * b, 4 * c) for a, b, c in _triples(chips // 64) if 4 * c <= 256]
        return sorted(found, key=lambda shape: (max(shape), shape))

    def hosts_of(self, topology: Topology) -> list[tuple[str, int]]:
        """Machine types that can carry the shape, each with its chips per host.

        One chip takes the one-chip machine; everything else the four-chip machine; eight chips can also be one
        eight-chip machine.
        """
        chips = math.prod(topology)
        wanted = (1,) if chips == 1 else (4, 8) if chips == 8 else (4,)
        return [(machine, count) for machine, count in self.machines.items() if count in wanted]


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Chips joined by ICI, on so many hosts."""

    family: Family
    topology: Topology
    machine: str
    chips_per_host: int

    @property
    def topology_text(self) -> str:
        return format_topology(self.topology)

    @property
    def chips(self) -> int:
        return math.prod(self.topology)

    @property
    def hosts(self) -> int:
        return self.chips // self.chips_per_host

    @property
    def devices_per_host(self) -> int:
        return self.chips_per_host * self.family.devices_per_chip

    @property
    def devices(self) -> int:
        return self.chips * self.family.devices_per_chip

    @property
    def hbm_gib_per_device(self) -> float:
        return self.family.hbm_gib_per_chip / self.family.devices_per_chip

    @property
    def peak_bf16_tflops_per_device(self) -> float:
        return self.family.peak_bf16_tflops_per_chip / self.family.devices_per_chip

    @property
    def name(self) -> str:
        """`FAMILY-N` where N means this shape, else `FAMILY-TOPOLOGY`."""
        count = self.chips * self.family.units_per_chip
        numeric = self.family.names.get(count) == self.topology_text
        return f"{self.family.name}-{count if numeric else self.topology_text}"

    @property
    def ambiguous(self) -> bool:
        """Whether the topology alone does not tell the machine type."""
        return len(self.family.hosts_of(self.topology)) > 1


@cache
def families() -> dict[str, Family]:
    """All families by name."""
    loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
    text = (resources.files(__package__) / "families.yaml").read_text(encoding="utf-8")
    data: dict[str, dict[str, Any]] = yaml.load(text, Loader=loader)
    return {name: _family(name, dict(facts)) for name, facts in data.items()}


def _family(name: str, facts: dict[str, Any]) -> Family:
    cubes = facts.pop("cubes", None)
    return Family(name=name, cubes=Cubes(**cubes) if cubes else None, **facts)


def resolve(type_name: str, *, machine: str | None = None) -> Slice:
    """The slice a type name such as `v5p-128`, `trillium-256` or `v5e-4x8` means. Raises TpuError."""
    word = type_name.strip().lower()
    prefix, dash, size = word.rpartition("-")
    family = _find_family(prefix if dash else word, key="type", given=type_name)
    if not dash or not size:
        raise TpuError(f"{type_name[:60]!r} has no size", key="type", hint=f"such as {_examples(family)}", code="tpu-size")
    if re.fullmatch(r"[0-9]+(x[0-9]+)+", size):
        return _place(family, parse_topology(size), machine, key="type")
    if not size.isascii() or not size.isdigit() or len(size) > 9:
        message = f"{type_name[:60]!r} does not end in a number or a topology"
        raise TpuError(message, key="type", hint=f"such as {_examples(family)}", code="tpu-size")
    count = int(size)
    if count in family.names:
        return _place(family, parse_topology(family.names[count]), machine, key="type")
    raise _no_such_size(family, count)


def ways(type_name: str) -> list[Slice]:
    """Every slice the name can mean: one for each machine type that carries it. Raises TpuError as `resolve`."""
    try:
        return [resolve(type_name)]
    except TpuError as error:
        if error.code != "tpu-ambiguous":
            raise
    found: list[Slice] = []
    for machine in dict.fromkeys(machine for family in families().values() for machine in family.machines):
        with contextlib.suppress(TpuError):
            found.append(resolve(type_name, machine=machine))
    return found


def resolve_topology(accelerator: str, topology: str, *, machine: str | None = None) -> Slice:
    """The slice of a family (its name, an alias or its GKE label) with a topology such as `4x4x8`. Raises TpuError."""
    family = find_family(accelerator)
    return _place(family, parse_topology(topology), machine, key="topology")


def parse_topology(text: str) -> Topology:
    """`4x4x8` -> (4, 4, 8). Raises TpuError."""
    if not re.fullmatch(r"[0-9]{1,3}(x[0-9]{1,3}){1,2}", text, re.ASCII):
        raise TpuError(f"{text[:40]!r} is not a topology", key="topology", hint="such as 4x4 or 4x4x8", code="tpu-topology")
    return tuple(int(part) for part in text.split("x"))


def format_topology(topology: Topology) -> str:
    return "x".join(map(str, topology))


def find_family(name: str) -> Family:
    """The family of this name, alias or GKE label. Raises TpuError."""
    return _find_family(name.strip().lower(), key="accelerator", given=name)


def _find_family(word: str, *, key: str, given: str) -> Family:
    known = {name: family for family in families().values() for name in (family.name, *family.aliases, family.gke_accelerator)}
    if word in known:
        return known[word]
    meant = sorted({family.name for name, family in known.items() if word and name.startswith(word)})
    if len(meant) > 1:
        message = f"{word[:40]!r} is ambiguous: {', '.join(meant)} begin like this"
        hint = "one of " + ", ".join(repr(given.lower().replace(word, name, 1)) for name in meant)
        raise TpuError(message, key=key, hint=hint, code="tpu-family")
    close = near_miss(word, list(known))
    hint = f"did you mean {given.lower().replace(word, close)!r}?" if close else f"families: {', '.join(families())}"
    raise TpuError(f"no TPU family is called {word[:40]!r}", key=key, hint=hint, code="tpu-family")


def _place(family: Family, topology: Topology, machine: str | None, *, key: str) -> Slice:
    text = format_topology(topology)
    if not family.has(topology):
        raise TpuError(f"{family.name} has no topology {text}", key=key, hint=_shape_hint(family, topology), code="tpu-topology")
    choices = dict(family.hosts_of(topology))
    if machine is not None:
        if machine not in choices:
            hint = f"machine types of {family.name} with {text}: {', '.join(choices)}"
            raise TpuError(f"{machine[:60]!r} cannot carry {family.name} {text}", key="machine", hint=hint, code="tpu-machine")
        choices = {machine: choices[machine]}
    if len(choices) > 1:
        chips = math.prod(topology)
        hosts = {name: f"{chips // count} host{'s' * (chips > count)} of {count} chips" for name, count in choices.items()}
        hint = "add " + " or ".join(f"`machine: {name}` ({meaning})" for name, meaning in hosts.items())
        raise TpuError(f"{family.name} {text} is ambiguous: it can be built in two ways", key=key, hint=hint, code="tpu-ambiguous")
    ((name, count),) = choices.items()
    return Slice(family=family, topology=topology, machine=name, chips_per_host=count)


def _no_such_size(family: Family, count: int) -> TpuError:
    shapes = family.shapes(count // family.units_per_chip) if count % family.units_per_chip == 0 else []
    name = f"{family.name}-{count}"
    if shapes:
        several = ", ".join(f"{family.name}-{format_topology(shape)}" for shape in shapes[:6])
        return TpuError(f"{name} does not name one shape", key="type", hint=f"name the topology: {several}", code="tpu-topology-needed")
    return TpuError(f"{name} does not exist", key="type", hint=f"neighbours: {_neighbours(family, count)}", code="tpu-size")


def _neighbours(family: Family, count: int) -> str:
    below = max((n for n in family.names if n < count), default=None)
    above = min((n for n in family.names if n > count), default=None)
    return ", ".join(f"{family.name}-{n} ({family.names[n]})" for n in (below, above) if n is not None)


def _shape_hint(family: Family, topology: Topology) -> str:
    if family.has(tuple(sorted(topology))):
        return f"write it in rising order: {format_topology(tuple(sorted(topology)))}"
    if family.cubes is None:
        return f"topologies of {family.name}: {', '.join(family.topologies)}"
    shapes = family.shapes(math.prod(topology))
    if shapes:
        return f"with as many chips: {', '.join(map(format_topology, shapes[:6]))}"
    rule = f"{', '.join(family.topologies)}, or three multiples of 4 in rising order with at most {64 * family.cubes.max} chips"
    return f"topologies of {family.name}: {rule}"


def _examples(family: Family) -> str:
    some = sorted(family.names)[1:4]
    return ", ".join(f"{family.name}-{count}" for count in some)


def _triples(product: int) -> Iterator[tuple[int, int, int]]:
    """a <= b <= c with a * b * c = product."""
    for a in range(1, round(product ** (1 / 3)) + 2):
        if product % a == 0:
            rest = product // a
            for b in range(a, math.isqrt(rest) + 1):
                if rest % b == 0:
                    yield a, b, rest // b
