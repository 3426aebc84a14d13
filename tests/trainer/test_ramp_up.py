"""Batches that grow: which rows, which programs, and the same bits after a resume in the middle of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.configs import config, layout
from tests.trainer.test_run import compilations
from trainer import run as run_module
from trainer.config import TrainConfig
from trainer.config.diloco import one_world
from trainer.config.run import Batch, RampUp
from trainer.contract import Exit
from trainer.data import open_data
from trainer.errors import Preempted
from trainer.feed import Feed
from trainer.run import run
from trainer.state import describe_state, initial_state, state_items
from trainer.step import make_train_step

STEPS = 6
SIZES = [4, 4, 12, 12, 12, 12]
BATCH = {"global_batch": 12, "sequence_length": 16, "accumulation": 3, "ramp_up": {"start": 4, "increment": 8, "steps_per_size": 2}}


def growing(directory: Path, *overrides: str, batch: dict[str, Any] = BATCH, **changes: Any) -> TrainConfig:
    """Two steps of 4 sequences in one microbatch, then 12 in three."""
    fixed = {"steps": STEPS, "data": {"sources": [{"type": "synthetic", "distinct_batches": 7}]}, "metrics": {"writers": ["jsonl"]}}
    mesh = () if any(word.startswith("mesh") for word in overrides) else ("mesh.ici.data=2", "mesh.ici.fsdp=2", "mesh.ici.tensor=2")
    restore = "all_replicas" if any("stage" in word for word in overrides) else "one_replica"  # which changes no bit
    save = {"every_steps": 100, "restore": restore}
    return config(*mesh, *overrides, run_directory=str(directory), **fixed, batch=batch, checkpoint=save, **changes)


def lines(directory: Path, kind: str = "step") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (directory / "metrics" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def by_hand(run_config: TrainConfig, sizes: list[int], make: Any) -> Iterator[tuple[float, dict[str, dict[str, np.ndarray]]]]:
    """Loss and state of each step, by the steps of runs without ramp-up, each fed the next rows of the order of a run without one."""
    data = {"data": {"sources": [{"type": "synthetic", "distinct_batches": 7 * run_config.batch.global_batch}]}}
    split = open_data(config(batch={"global_batch": 1, "sequence_length": 16}, **data)).train
    where, next_row = layout(run_config), 0
    spec = describe_state(run_config, where)
    state = initial_state(run_config, spec)
    whole = run_config.batch
    for size in sizes:
        microbatches = max(1, size // (whole.global_batch // whole.accumulation))
        batch = Batch(global_batch=size, sequence_length=16, accumulation=microbatches)
        of_size = run_config.model_copy(update={"batch": batch})
        step = make(of_size, spec, where)
        rows = split.rows(np.concatenate([split.batch_rows(n) for n in range(next_row, next_row + size)]))
        state, metrics = step(state, Feed(where.of_batch(of_size), size, 16)(rows))
        next_row += size
        yield (
            float(np.mean(metrics["loss"])),
            {item: {k: np.asarray(v) for k, v in found.items()} for item, found in state_items(state).items()},
        )


def final(run_config: TrainConfig, directory: Path) -> dict[str, dict[str, np.ndarray]]:
    from trainer.checkpoint import Checkpoints

    wanted = state_items(describe_state(run_config, layout(run_config)).abstract)
    found = Checkpoints(run_config.checkpoint, str(directory)).restore(run_config.steps, wanted)
    return {item: {name: np.asarray(value) for name, value in values.items()} for item, values in found.items()}


def assert_resumes_in_the_middle(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, leave: int, sizes: list[int]) -> None:
    made: dict[str, Any] = {}  # a program for a config without ramp-up serves all three

    def step_of(of_size: TrainConfig, *arguments: Any) -> Any:
        assert of_size.batch.ramp_up is None
        return made.setdefault(of_size.model_dump_json(), make_train_step(of_size, *arguments))

    monkeypatch.setattr(run_module, "make_train_step", step_of)
    with compilations() as seen:
        with monkeypatch.context() as patch:
            patch.setattr(run_module.distributed, "preemption_requested", lambda step: step == leave)
            with pytest.raises(Preempted, match=f"checkpoint {leave} is committed"):
                run(make(tmp_path))
        assert run(make(tmp_path)) == Exit.DONE
        *_, (_, expected) = found = list(by_hand(make(tmp_path), sizes, step_of))
    assert sum("Finished XLA compilation of jit(train_step)" in line for line in seen) == len(set(sizes))
    assert [line["loss"] for line in lines(tmp_path)] == [loss for loss, _ in found]
    assert [line["global_batch"] for line in lines(tmp_path)] == sizes
    for item, values in final(make(tmp_path), tmp_path).items():
        for name, value in values.items():
            np.testing.assert_array_equal(value, expected[item][name], err_msg=f"{item}/{name}")


@pytest.mark.full
def test_a_growing_batch_resumed_in_the_middle_trains_as_steps_of_those_sizes_on_the_same_order_of_rows(
    tmp_path: Path, monkeypatch
) -> None:
    assert_resumes_in_the_middle(growing, tmp_path, monkeypatch, leave=1, sizes=SIZES)
    assert {line["tokens"] for line in lines(tmp_path)} == {4 * 16.0, 12 * 16.0}


@pytest.mark.full
@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        (("mesh.ici.diloco=2", "mesh.ici.fsdp=2", "mesh.ici.tensor=2"), {"diloco": {"sync_every_steps": 2}}),
        (("mesh.ici.stage=2", "mesh.ici.fsdp=2", "mesh.ici.tensor=2"), {"pipeline": {}}),
        (("mesh.ici.data=4", "mesh.ici.context=2"), {"eval": {"every_steps": 3}}),
    ],
    ids=["replicas", "pipeline", "context"],
)
def test_it_does_so_with_replicas_in_a_pipeline_and_on_split_sequences(
    tmp_path: Path, monkeypatch, mesh: tuple[str, ...], changes: dict[str, Any]
) -> None:
    def make(directory: Path) -> TrainConfig:
        return growing(directory, *mesh, **changes)

    assert_resumes_in_the_middle(make, tmp_path, monkeypatch, leave=3, sizes=SIZES)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(1, 40), st.integers(0, 60))
def test_rows_before_a_step_are_those_of_all_steps_before(start: int, increment: int, steps: int, more: int, step: int) -> None:
    batch = Batch(global_batch=start + more, sequence_length=1, ramp_up=RampUp(start=start, increment=increment, steps_per_size=steps))
    sizes = [min(start + n // steps * increment, start + more) for n in range(step + 1)]
    assert batch.size_at(step) == sizes[-1] and batch.sequences_before(step) == sum(sizes[:-1])
    assert batch.size_at(batch.ramp_up_steps) == start + more > batch.size_at(batch.ramp_up_steps - 1)
    assert set(sizes) <= set(batch.sizes)


def test_worlds_of_their_own_grow_by_their_share(tmp_path: Path) -> None:
    batch = {**BATCH, "global_batch": 24, "ramp_up": {"start": 8, "increment": 16, "steps_per_size": 2}}
    run_config = growing(tmp_path, batch=batch, diloco={"sync_every_steps": 2, "transport": "files"})
    own = one_world(run_config, 2).batch
    assert [2 * own.size_at(n) for n in range(STEPS)] == [run_config.batch.size_at(n) for n in range(STEPS)]
