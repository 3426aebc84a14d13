"""Collectives of a compiled program, read from its scheduled HLO text. No JAX here.

A region is what runs as one piece: the entry, or the body of a loop the program's author wrote (`lax.scan`). Loops the
compiler made, such as a product split into turns with a permute each, belong to the region they are in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from trainer.aot.groups import first_group, permute_pairs

KINDS: Final = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast", "send",
)  # fmt: skip

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|body|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"([0-9]+)"\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes

    @property
    def called(self) -> list[str]:
        names = _CALLED.findall(self.rest) if self.opcode not in KINDS else []
        for branches in _BRANCHES.findall(self.rest):
            names += [name.strip().lstrip("%") for name in branches.split(",")]
        return names

    @property
    def op_name(self) -> str:
        found = _OP_NAME.search(self.rest)
        return found[1] if found else ""

    @property
    def channel(self) -> str:
        found = re.search(r"channel_id=([0-9]+)", self.rest)
        return found[1] if found else ""

    @property
    def first_operand(self) -> str:
        found = re.match(r"[^%)]*%?([\w.\-]+)", self.rest)
        return found[1] if found else ""


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective of a region."""

    kind: str
    bytes: int  # result of one device; input of a reduce-scatter, what is sent by a send
    turns: int  # how often it runs in one execution of its region
    asynchronous: bool
    overlapped: bool  # asynchronous, with a matrix product, kernel or loop between start and done
    group: tuple[int, ...]  # partitions of the first group; empty where the program does not say
    pairs: tuple[tuple[int, int], ...]  # source and target partitions of a permute
    algorithm: str  # the compiler's own word for how it runs, such as `StrategyND`
    op_name: str  # of the program that was compiled


@dataclass(frozen=True, kw_only=True)
class Region:
    name: str  # `entry`, `forward layer body`, `backward layer body`, ...
    executions: int  # in one step
    collectives: tuple[Collective, ...]


@dataclass
class _Open:
    name: str
    executions: int
    found: list[Collective] = field(default_factory=list)


def regions(text: str, partitions: int) -> list[Region]:
    """Regions with their collectives, the entry last; those without any are left out. `text` is `Compiled.as_text()`."""
    program = _Program(text, partitions)
    return program.regions()


class _Program:
    def __init__(self, text: str, partitions: int) -> None:
        self.partitions = partitions
        self.computations, self.entry = _parse(text)
        self._started = {
            channel
            for lines in self.computations.values()
            if _starts(lines)
            for line in lines
            if line.opcode in KINDS and (channel := line.channel)
        }
        self._heavy: dict[str, bool] = {}
        self._open: list[_Open] = []

    def regions(self) -> list[Region]:
        entry = _Open("entry", 1)
        self._visit(self.entry, entry, turns=1, fused=False, overlapped=None)
        counts: dict[str, int] = {}
        closed: list[Region] = []
        for region in [*self._open, entry]:
            if not region.found:
                continue
            counts[region.name] = counts.get(region.name, 0) + 1
            name = region.name if counts[region.name] == 1 else f"{region.name} {counts[region.name]}"
            closed.append(Region(name=name, executions=region.executions, collectives=tuple(region.found)))
        return closed

    def _visit(self, computation: str, region: _Open, *, turns: int, fused: bool, overlapped: bool | None) -> None:
        """`overlapped`: None outside of an asynchronous call, else whether work was put between its start and its done."""
        body = self.computations[computation]
        starts = _starts(body)
        scatters = computation.startswith("all-reduce-scatter")
        for index, line in enumerate(body):
            kind = line.opcode.removesuffix("-start")
            if kind in KINDS:
                if fused and not starts and line.channel in self._started:
                    continue  # a gather spread over a chain of fusions is written in each of them; it counts where it starts
                start = line.opcode.endswith("-start") or kind == "send"
                asynchronous = start or starts or overlapped is not None
                works = starts or bool(overlapped) or (start and self._works_until_done(body, index))
                self._add(region, line, kind, turns, asynchronous=asynchronous, overlapped=works, scatters=scatters)
            elif line.opcode == "while":
                self._loop(line, region, turns)
            else:
                inner = self._works_until_done(body, index) if line.opcode.endswith("-start") else overlapped
                for name in line.called:
                    self._visit(name, region, turns=turns, fused=fused or line.opcode == "fusion", overlapped=inner)

    def _loop(self, line: Instruction, region: _Open, turns: int) -> None:
        trips = self._trips(line)
        body = re.search(r"body=%?([\w.\-]+)", line.rest)
        assert body is not None, line.name
        if line.op_name and not line.op_name.endswith("/while"):
            self._visit(body[1], region, turns=turns * trips, fused=False, overlapped=None)
            return
        inner = _Open(self._body_name(line.op_name, body[1]), region.executions * turns * trips)
        self._visit(body[1], inner, turns=1, fused=False, overlapped=None)
        self._open.append(inner)

    def _trips(self, line: Instruction) -> int:
        """How often the loop turns: said by the compiler, or the constant that its condition compares the counter with."""
        if found := _TRIPS.search(line.rest):
            return int(found[1])
        condition = re.search(r"condition=%?([\w.\-]+)", line.rest)
        lines = self.computations[condition[1]] if condition else []
        lines = [*lines, *(inner for line in lines for name in line.called for inner in self.computations[name])]
        limits = [int(found[1]) for line in lines if line.opcode == "constant" and (found := re.match(r"([0-9]+)\)", line.rest))]
        return max(limits, default=1)

    def _body_name(self, op_name: str, body: str) -> str:
        names = [op_name] if op_name else [line.op_name for line in self.computations[body]]
        backward, forward = (sum(mark in name for name in names) for mark in ("transpose(", "jvp("))
        direction = "backward" if 2 * backward > forward else "forward" if forward else ""
        outer = any(line.opcode == "while" and line.op_name.endswith("/while") for line in self.computations[body])
        return " ".join(word for word in (direction, "outer loop body" if outer else "layer body" if direction else "loop body") if word)

    def _add(
        self, region: _Open, line: Instruction, kind: str, turns: int, *, asynchronous: bool, overlapped: bool, scatters: bool
    ) -> None:
        sizes = shape_bytes(line.shape)
        if line.opcode in ("all-gather-start", "collective-permute-start"):
            sizes = sizes[1:2]  # (operand, result, context)
        elif kind == "send":
            sizes = sizes[:1]
        group = first_group(line.rest, self.partitions)
        size = sum(sizes) * (max(len(group), 1) if kind == "reduce-scatter" else 1)
        algorithm = re.search(r'"strategy":"([^"]*)"', line.rest) or re.search(r'"emitter":"([^"]*)"', line.rest)
        region.found.append(Collective(
            kind="reduce-scatter" if scatters and kind == "all-reduce" else kind,
            bytes=size,
            turns=turns,
            asynchronous=asynchronous,
            overlapped=overlapped,
            group=group,
            pairs=permute_pairs(line.rest) if kind == "collective-permute" else (),
            algorithm=algorithm[1] if algorithm else "",
            op_name=line.op_name,
        ))  # fmt: skip

    def _works_until_done(self, body: list[Instruction], start: int) -> bool:
        """Whether a matrix product, a kernel or a loop is scheduled before the done of the start at this place."""
        name = body[start].name
        users = {name}
        for line in body[start + 1 :]:
            if line.opcode.endswith("-done") and line.first_operand in users:
                return False
            if line.opcode.endswith("-update") and line.first_operand in users:
                users.add(line.name)
            if self._is_work(line):
                return True
        return False

    def _is_work(self, line: Instruction) -> bool:
        if line.opcode in ("convolution", "dot", "while"):
            return True
        if line.opcode == "custom-call":
            return "tpu_custom_call" in line.rest
        return line.opcode in ("fusion", "conditional") and any(self._is_heavy(name) for name in line.called)

    def _is_heavy(self, computation: str) -> bool:
        if computation not in self._heavy:
            self._heavy[computation] = False
            self._heavy[computation] = any(self._is_work(line) for line in self.computations[computation])
        return self._heavy[computation]


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    computations: dict[str, list[Instruction]] = {}
    entry = ""
    lines: list[Instruction] = []
    for raw in text.splitlines():
        if raw and not raw[0].isspace():
            if header := _COMPUTATION.match(raw):
                lines = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(raw):
            lines.append(Instruction(*found.groups()))
    return computations, entry


def _starts(lines: list[Instruction]) -> bool:
    """Whether a fused computation begins a collective that later ones carry on."""
    return any('custom_call_target="AsyncCollectiveStart"' in line.rest for line in lines)


def shape_bytes(shape: str) -> list[int]:
    """Bytes of each array of a shape, which may be a tuple."""
    return list(_sizes(shape))


def _bits(dtype: str) -> int:
    """Of one element: `s32`, `bf16`, `f8e4m3fn`; what has none (a token) counts nothing."""
    found = re.match(r"[a-z]+([0-9]+)", dtype)
    return 8 if dtype == "pred" else int(found[1]) if found else 0


def _sizes(shape: str) -> Iterator[int]:
    for dtype, dims in _SHAPE.findall(shape):
        bits = _bits(dtype)
        elements = 1
        for dim in dims.split(",") if dims else ():
            elements *= int(dim)
        yield (elements * bits + 7) // 8
