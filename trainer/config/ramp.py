"""The sizes of a batch that grows, on a mesh. No JAX here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from trainer.config.layouts import batch_divides
from trainer.config.pipeline import pipeline_fits
from trainer.config.problem import Problem
from trainer.config.train import TrainConfig

SIZE = "batch.global_batch"


def ramp_up_fits(config: TrainConfig, mesh: Mapping[str, int]) -> Iterator[Problem]:
    """The batch grows, to its whole size within the run, and every size is divided as the whole one is."""
    batch, ramp = config.batch, config.batch.ramp_up
    if ramp is None:
        return
    whole, path = batch.global_batch, "batch.ramp_up"
    if ramp.start >= whole:
        message = f"{ramp.start} is not below batch.global_batch ({whole}): nothing would grow"
        hint = "a smaller size, or leave batch.ramp_up out"
        yield Problem(path=f"{path}.start", message=message, hint=hint, code="ramp-up", value=ramp.start, limit=whole)
        return
    if batch.ramp_up_steps >= config.steps:
        message = (
            f"{len(batch.sizes) - 1} sizes of {ramp.steps_per_size} steps, but the run has {config.steps}: it would never reach {whole}"
        )
        hint = "fewer steps per size, or a larger increment"
        yield Problem(
            path=f"{path}.steps_per_size", message=message, hint=hint, code="never", value=ramp.steps_per_size, limit=config.steps
        )
    microbatch = whole // batch.accumulation
    for size in batch.sizes[:-1]:
        if size > microbatch and size % microbatch:
            message = f"{size} sequences are neither at most one microbatch of {microbatch} nor whole ones"
            hint = f"start and increment that are multiples of {microbatch}"
            yield Problem(path=path, message=message, hint=hint, code="ramp-up", value=size, limit=microbatch)
            return
        one = config.of_size(size)
        found = [*batch_divides(one, mesh), *(pipeline_fits(one, mesh) if config.pipeline else ())]
        if problems := [problem for problem in found if problem.path == SIZE]:
            for problem in problems:
                hint = f"start and increment that are multiples of {problem.limit}"
                yield Problem(path=path, message=problem.message, hint=hint, code=problem.code, value=size, limit=problem.limit)
            return
