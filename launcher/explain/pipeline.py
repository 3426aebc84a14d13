"""The pipeline of a run: who computes when, how much of the time nothing, and what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from trainer.config import TrainConfig
from trainer.config.pipeline import plan_pipeline
from trainer.config.pipeline_schedule import diagram

GATHERS: Final = {
    "iteration": "for every iteration, {0} times a step and again in the backward pass; weights of one repeat are whole",
    "once": "once a step; weights of all {1} repeats are whole",
    "repeat": "once for every repeat, {2} times a step and again in the backward pass; weights of two repeats are whole",
}


def pipeline_section(config: TrainConfig, mesh: Mapping[str, int]) -> dict[str, Any]:
    """Empty where nothing is pipelined. `schedule`: lines of a diagram, a row a stage and a cell an iteration."""
    plan = plan_pipeline(config, mesh)
    if plan is None:
        return {}
    schedule, segment = plan.schedule, config.model.segments[plan.segment]
    pipelined = plan.patterns * len(segment.pattern)
    rows = config.batch.global_batch // config.batch.accumulation
    windows = schedule.repeats + (1 if schedule.drain else 0)
    return {
        "stages": schedule.stages,
        "repeats": schedule.repeats,
        "layers_of_a_stage_and_repeat": plan.patterns_per_stage * len(segment.pattern),
        "layers_in_the_pipeline": pipelined,
        "layers_outside_of_it": config.model.layer_count - pipelined,
        "microbatches": schedule.microbatches,
        "sequences_of_a_microbatch": rows // schedule.microbatches,
        "iterations": schedule.iterations,
        "iterations_in_which_all_stages_compute": len(schedule.steady),
        "bubble_share": f"{schedule.bubble_share:.1%} = {schedule.drain} / {schedule.iterations}",
        "weights_gathered": GATHERS[plan.gather].format(schedule.iterations, schedule.repeats, windows),
        "microbatches_a_stage_keeps": schedule.lanes,
        "schedule": diagram(schedule),
    }
