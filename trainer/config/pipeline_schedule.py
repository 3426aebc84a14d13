"""Who computes what, when, in a pipeline: the schedule as arithmetic. No JAX here.

S stages stand in a ring; layers are laid round it R times (`repeats`), so that stage s of repeat r holds layers
((r * S) + s) * P to ((r * S) + s) * P + P - 1 of the P layers per stage. A batch goes through as M microbatches. In
iteration t, stage s works on item n = t - hop * s, which is microbatch n mod M in repeat n div M; `hop` is the number
of iterations from one stage to the next: 1, or 2 with delayed forwarding, where a result travels while its stage
computes the next one.

One buffer holds everything that is not at a stage: inputs that wait, results of a repeat that wait for the next one,
and finished results. It has S x lanes slots, lanes = M / S, so a stage keeps M / S microbatches of it and nothing is
kept twice. Microbatch m lives in lane m mod lanes and begins at stage m div lanes. In iteration t, stage 0 reads lane
t mod lanes, and that lane turns by one stage towards stage 0; a result of the last stage is written to the place
where its microbatch would now be, had it stayed in the buffer: always the same stage, `write_stage`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What one stage computes in one iteration."""

    repeat: int
    microbatch: int


@dataclass(frozen=True, kw_only=True)
class PipelineSchedule:
    """Raises ValueError unless microbatches are a multiple of stages, at least hop * stages."""

    stages: int
    repeats: int
    microbatches: int
    hop: int

    def __post_init__(self) -> None:
        S, M = self.stages, self.microbatches
        if min(S, self.repeats) < 1 or self.hop not in (1, 2) or M % S or M < self.hop * S:
            raise ValueError(f"no schedule for {self}: microbatches must be a multiple of stages and at least hop x stages")

    @property
    def lanes(self) -> int:
        """Microbatches of the buffer that one stage holds."""
        return self.microbatches // self.stages

    @property
    def drain(self) -> int:
        """Iterations between the first stage's work on a microbatch and the last one's; so many stand idle at each stage."""
        return self.hop * (self.stages - 1)

    @property
    def iterations(self) -> int:
        """In which any stage computes."""
        return self.microbatches * self.repeats + self.drain

    @property
    def turns(self) -> int:
        """In which the buffer moves: with delayed forwarding the last result arrives one iteration after it was computed."""
        return self.iterations + self.hop - 1

    @property
    def bubble_share(self) -> float:
        """Part of all stage-iterations in which a stage has nothing to do."""
        return self.drain / self.iterations

    @property
    def steady(self) -> range:
        """Iterations in which every stage computes."""
        return range(self.drain, self.microbatches * self.repeats)

    def work(self, iteration: int, stage: int) -> Work | None:
        """None in a bubble."""
        n = iteration - self.hop * stage
        if not 0 <= n < self.microbatches * self.repeats:
            return None
        return Work(repeat=n // self.microbatches, microbatch=n % self.microbatches)

    def read_lane(self, turn: int) -> int:
        """The lane that stage 0 reads, and that then turns by one stage."""
        return turn % self.lanes

    def written(self, turn: int) -> int | None:
        """The microbatch whose result the last stage puts into the buffer; None before the first one."""
        n = turn - self.drain - (self.hop - 1)
        return None if n < 0 else n % self.microbatches

    def write_lane(self, turn: int) -> int:
        """The lane of `written`; any lane before the first one."""
        microbatch = self.written(turn)
        return 0 if microbatch is None else microbatch % self.lanes

    @property
    def write_stage(self) -> int:
        """The stage that `written` goes to.

        Microbatch q * lanes + j is written at turn r * M + q * lanes + j + late, late = drain + hop - 1. By then lane j
        has turned r * S + q + late div lanes + 1 times, and what began at stage q is at stage -1 - late div lanes (mod S).
        """
        return (-1 - (self.drain + self.hop - 1) // self.lanes) % self.stages

    def final_turns(self, lane: int) -> int:
        """How often a lane has turned at the end: microbatch q * lanes + lane is then at stage q - final_turns (mod S)."""
        return -(-(self.turns - lane) // self.lanes)


def diagram(schedule: PipelineSchedule, *, columns: int = 24) -> list[str]:
    """One line a stage, one cell an iteration: repeat as a letter, microbatch as a number, dots in a bubble.

    A long schedule is cut in the middle.
    """
    N = schedule.iterations
    shown = list(range(N)) if N <= columns else [*range(columns // 2), None, *range(N - columns // 2, N)]
    width = 1 + len(str(schedule.microbatches - 1))
    lines: list[str] = []
    for stage in range(schedule.stages):
        cells = [" ~ ".center(width) if t is None else _cell(schedule.work(t, stage), width) for t in shown]
        lines.append(f"stage {stage:<{len(str(schedule.stages - 1))}}  {' '.join(cells)}".rstrip())
    return lines


def _cell(work: Work | None, width: int) -> str:
    if work is None:
        return "." * width
    letter = chr(ord("a") + work.repeat) if work.repeat < 26 else "+"
    return f"{letter}{work.microbatch}".ljust(width)
