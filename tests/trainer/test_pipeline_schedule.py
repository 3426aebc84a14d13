"""The schedule of a pipeline as integers: who computes what, when, out of which slot, into which slot."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.pipeline_schedule import PipelineSchedule, Work, diagram


@st.composite
def schedules(draw: st.DrawFn) -> PipelineSchedule:
    stages, hop = draw(st.integers(1, 9)), draw(st.sampled_from((1, 2)))
    lanes = draw(st.integers(hop, 7))
    return PipelineSchedule(stages=stages, repeats=draw(st.integers(1, 5)), microbatches=stages * lanes, hop=hop)


@given(schedules())
def test_every_stage_computes_every_microbatch_of_every_repeat_once_and_in_order(schedule: PipelineSchedule) -> None:
    every = [Work(repeat=r, microbatch=m) for r, m in product(range(schedule.repeats), range(schedule.microbatches))]
    for stage in range(schedule.stages):
        assert [work for t in range(schedule.iterations) if (work := schedule.work(t, stage))] == every


@given(schedules())
def test_iterations_bubbles_and_the_steady_state_are_those_of_the_formula(schedule: PipelineSchedule) -> None:
    """N = M R + d (S - 1); of N S places, d (S - 1) S are empty."""
    S, R, M, d = schedule.stages, schedule.repeats, schedule.microbatches, schedule.hop
    places = [[schedule.work(t, s) for s in range(S)] for t in range(schedule.iterations)]
    assert schedule.iterations == M * R + d * (S - 1) and all(any(row) for row in places)
    assert not any(schedule.work(schedule.iterations, s) for s in range(S))
    empty = sum(work is None for row in places for work in row)
    assert schedule.bubble_share == pytest.approx(empty / (S * schedule.iterations), rel=1e-12)
    assert schedule.bubble_share == pytest.approx(d * (S - 1) / (M * R + d * (S - 1)), rel=1e-12)
    assert [t for t, row in enumerate(places) if all(row)] == list(schedule.steady)


@given(schedules())
def test_what_a_stage_reads_has_come_through_all_layers_before_it_and_nothing_is_lost(schedule: PipelineSchedule) -> None:
    """The moves of the buffer, with (microbatch, stages passed) in place of activations and None for what nobody may read."""
    S, K = schedule.stages, schedule.lanes
    buffer: list[list[tuple[int, int] | None]] = [[(s * K + lane, 0) for lane in range(K)] for s in range(S)]
    arriving: list[tuple[int, int] | None] = [None] * S
    held: list[tuple[int, int] | None] = [None] * S
    for turn in range(schedule.turns):
        lane = schedule.read_lane(turn)
        inputs = [buffer[0][lane], *arriving[1:]]
        results: list[tuple[int, int] | None] = []
        for stage, x in enumerate(inputs):
            if (work := schedule.work(turn, stage)) is None:
                results.append(None)
                continue
            assert x == (work.microbatch, work.repeat * S + stage)
            results.append((work.microbatch, work.repeat * S + stage + 1))
        column = [row[lane] for row in buffer]
        for stage in range(S):
            buffer[stage][lane] = column[(stage + 1) % S]
        leaving, held = (results, held) if schedule.hop == 1 else (held, results)
        arriving = [leaving[-1], *leaving[:-1]]
        if (microbatch := schedule.written(turn)) is not None:
            assert leaving[-1] is not None and leaving[-1][0] == microbatch
            buffer[schedule.write_stage][schedule.write_lane(turn)] = leaving[-1]
    for q, lane in product(range(S), range(K)):
        assert buffer[(q - schedule.final_turns(lane)) % S][lane] == (q * K + lane, schedule.repeats * S)


@given(schedules())
def test_in_a_window_of_one_repeat_every_stage_is_in_that_repeat_or_the_one_before(schedule: PipelineSchedule) -> None:
    """What gathering weights once for every repeat rests on, for any number of stages."""
    R, M = schedule.repeats, schedule.microbatches
    for t in range(schedule.iterations):
        at_work = {work.repeat for s in range(schedule.stages) if (work := schedule.work(t, s))}
        window = t // M
        assert at_work <= ({window - 1, window} if window < R else {R - 1})


@pytest.mark.parametrize(("stages", "microbatches", "hop"), [(4, 6, 1), (4, 4, 2), (2, 0, 1), (0, 0, 1), (2, 6, 3)])
def test_a_schedule_that_cannot_be_is_refused(stages: int, microbatches: int, hop: int) -> None:
    with pytest.raises(ValueError, match="microbatches must be a multiple of stages and at least hop x stages"):
        PipelineSchedule(stages=stages, repeats=1, microbatches=microbatches, hop=hop)


def test_the_diagram_shows_repeats_as_letters_microbatches_as_numbers_and_bubbles_as_dots() -> None:
    assert diagram(PipelineSchedule(stages=2, repeats=2, microbatches=2, hop=1)) == [
        "stage 0  a0 a1 b0 b1 ..",
        "stage 1  .. a0 a1 b0 b1",
    ]
    assert diagram(PipelineSchedule(stages=2, repeats=1, microbatches=4, hop=2)) == [
        "stage 0  a0 a1 a2 a3 .. ..",
        "stage 1  .. .. a0 a1 a2 a3",
    ]
    cut = diagram(PipelineSchedule(stages=4, repeats=3, microbatches=16, hop=1), columns=8)
    assert cut[3] == "stage 3  ... ... ... a0   ~  c12 c13 c14 c15"
