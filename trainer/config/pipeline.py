"""Pipeline parallelism: which layers stand on the mesh axis `stage`, and how a batch goes through them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trainer.config.base import Node, NonNegativeInt, PositiveInt
from trainer.config.pipeline_schedule import PipelineSchedule
from trainer.config.problem import Problem

if TYPE_CHECKING:
    from trainer.config.model import Segment
    from trainer.config.train import TrainConfig

Gather = Literal["iteration", "once", "repeat"]


class Pipeline(Node):
    """Layers of one segment in stages, one for each degree of `mesh.*.stage`; all other layers run outside, where `stage`
    splits the batch.

    A stage holds whole patterns of the segment: layers = stages x repeats x layers per stage.
    """

    microbatches: PositiveInt | None = None
    """Parts of the batch (of each accumulation turn) that follow each other through the stages; a multiple of the stages,
    at least that many, with delayed forwarding twice. More of them: less idle time, smaller products. Default: the fewest."""
    repeats: PositiveInt = 1
    """Laps of every microbatch. Above 1 the pipeline is circular: each stage holds `repeats` groups of layers that are
    not neighbours, and is idle `repeats` times less, for as many times the traffic between stages."""
    segment: NonNegativeInt | None = None
    """Index of the segment in model.segments. Default: the one with the most layers."""
    layers: PositiveInt | None = None
    """Layers of the segment that are pipelined, its first ones; the others run after them, outside. Default: all."""
    delayed_forwarding: bool = False
    """A result has a whole iteration to reach the next stage, while that one computes; twice the idle time at both ends."""
    gather: Gather = "iteration"
    """When weights split over `fsdp` are made whole: for every iteration anew (least memory), `once` a step for all
    repeats (most memory), or once for every `repeat` (memory for two)."""


@dataclass(frozen=True)
class PipelinePlan:
    """The pipeline of a run on its mesh."""

    segment: int
    patterns_per_stage: int
    schedule: PipelineSchedule
    gather: Gather

    @property
    def stacked(self) -> tuple[int, int, int]:
        """Leading dims of a pipelined weight: repeats, stages, patterns per stage. In this order they are the model's layers."""
        return self.schedule.repeats, self.schedule.stages, self.patterns_per_stage

    @property
    def patterns(self) -> int:
        """Repeats of the segment that are pipelined."""
        return self.schedule.repeats * self.schedule.stages * self.patterns_per_stage


def plan_pipeline(config: TrainConfig, mesh: Mapping[str, int]) -> PipelinePlan | None:
    """The pipeline of the run on `mesh` (mesh axis -> degree); None where nothing is pipelined, or can be (`pipeline_fits`)."""
    if (pipeline := config.pipeline) is None or next(pipeline_fits(config, mesh), None) is not None:
        return None
    stages = mesh.get("stage", 1)
    index, segment = pipelined_segment(config)
    layers = pipeline.layers or layers_of(segment)
    hop = 2 if pipeline.delayed_forwarding else 1
    schedule = PipelineSchedule(stages=stages, repeats=pipeline.repeats, microbatches=_microbatches(pipeline, stages), hop=hop)
    return PipelinePlan(index, layers // (len(segment.pattern) * pipeline.repeats * stages), schedule, pipeline.gather)


def pipelined_segment(config: TrainConfig) -> tuple[int, Segment]:
    """Raises IndexError where the config names a segment that is not there."""
    assert config.pipeline is not None
    segments = config.model.segments
    index = config.pipeline.segment
    if index is None:
        index = max(range(len(segments)), key=lambda i: (layers_of(segments[i]), -i))
    return index, segments[index]


def layers_of(segment: Segment) -> int:
    return len(segment.pattern) * segment.repeats


def pipeline_fits(config: TrainConfig, mesh: Mapping[str, int]) -> Iterator[Problem]:
    """Stages hold equal numbers of whole patterns, and there are microbatches enough to keep them in order."""
    stages, pipeline = mesh.get("stage", 1), config.pipeline
    if pipeline is None:
        if stages > 1:
            message = f"is left out, but the mesh has stage={stages}"
            yield Problem(path="pipeline", message=message, hint="`pipeline: {}`, or data instead of stage", code="pipeline", limit=1)
        return
    count = len(config.model.segments)
    if pipeline.segment is not None and pipeline.segment >= count:
        message, hint = f"{pipeline.segment}, but the model has {count} segments", f"{count - 1} or less"
        yield Problem(path="pipeline.segment", message=message, hint=hint, code="pipeline", value=pipeline.segment, limit=count - 1)
        return
    yield from _layers_divide(config, stages)
    yield from _microbatches_fit(config, stages)
    yield from _rows_divide(config, mesh)
    if pipeline.gather == "repeat" and pipeline.repeats == 1:
        message = "repeat, but the pipeline has only one"
        yield Problem(path="pipeline.gather", message=message, hint="once, or repeats of 2", code="pipeline", value="repeat", limit=1)


def _layers_divide(config: TrainConfig, stages: int) -> Iterator[Problem]:
    pipeline = config.pipeline
    assert pipeline is not None
    index, segment = pipelined_segment(config)
    there, pattern = layers_of(segment), len(segment.pattern)
    layers = pipeline.layers or there
    unit = stages * pipeline.repeats * pattern
    if layers > there:
        message, limit = f"{layers}, but segment {index} of the model has {there}", there
    elif layers % unit:
        parts = f"{stages} stages x {pipeline.repeats} repeats x {pattern} layers of the pattern"
        message, limit = f"{layers} layers cannot be divided over {parts}: not a multiple of {unit}", unit
    else:
        return
    nearest = min(layers, there) // unit * unit
    fitting = [str(n) for n in (nearest, nearest + unit) if 0 < n <= there]
    repeats = [n for n in range(1, pipeline.repeats + 1) if layers <= there and layers % (stages * pattern * n) == 0]
    hints = [*([" or ".join(fitting)] if fitting else []), *([f"repeats of {repeats[-1]}"] if repeats else [])]
    if not hints:
        fewer = min(stages, segment.repeats)
        hints = [f"{segment.repeats // fewer * fewer * pattern} layers with stage={fewer} and repeats of 1"]
    yield Problem(path="pipeline.layers", message=message, hint="; ".join(hints), code="pipeline", value=layers, limit=limit)


def _microbatches(pipeline: Pipeline, stages: int) -> int:
    return pipeline.microbatches or stages * (2 if pipeline.delayed_forwarding else 1)


def _rows_divide(config: TrainConfig, mesh: Mapping[str, int]) -> Iterator[Problem]:
    """Every batch has whole sequences for every shard of every microbatch."""
    assert config.pipeline is not None
    stages = mesh.get("stage", 1)
    microbatches = _microbatches(config.pipeline, stages)
    batch_axes = next((axes for name, axes in config.sharding.table() if name == "batch"), ())
    shards = math.prod(mesh.get(axis, 1) for axis in batch_axes if axis != "stage")
    batches = {"batch.global_batch": (config.batch.global_batch, config.batch.accumulation)}
    if config.eval is not None:
        batches["eval.global_batch"] = (config.eval.global_batch or config.batch.global_batch, 1)
    for path, (sequences, turns) in batches.items():
        unit = turns * microbatches * shards
        if sequences % unit:
            accumulated = f" x {turns} accumulation" if turns > 1 else ""
            message = f"{sequences} sequences cannot be divided evenly over {microbatches} microbatches x {shards} shards{accumulated}"
            below = sequences - sequences % unit
            hint = " or ".join(str(n) for n in (below, below + unit) if n)
            yield Problem(path=path, message=message, hint=hint, code="pipeline", value=sequences, limit=unit)


def _microbatches_fit(config: TrainConfig, stages: int) -> Iterator[Problem]:
    pipeline = config.pipeline
    assert pipeline is not None
    if (given := pipeline.microbatches) is None:
        return
    least = 2 * stages if pipeline.delayed_forwarding else stages
    if given % stages or given < least:
        below, above = given - given % stages, given - given % stages + stages
        fitting = [str(n) for n in (below, above) if n >= least] or [str(least)]
        twice = ", at least twice with delayed_forwarding" if pipeline.delayed_forwarding else ""
        message = f"{given} is not a multiple of {stages} stages{twice}"
        yield Problem(path="pipeline.microbatches", message=message, hint=" or ".join(fitting), code="pipeline", value=given, limit=least)
