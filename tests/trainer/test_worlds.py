"""Slices that are JAX worlds of their own: they meet through files, and go on without one that is lost."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from pytest import MonkeyPatch

from tests.gcs_emulator import Gcs
from tests.trainer.configs import config, layout, ragged_batch
from trainer.checkpoint import Checkpoints
from trainer.checkpoint.commit import COMMIT_FILE, checkpoint_directory
from trainer.checkpoint.storage import open_storage
from trainer.config.checks import check_train
from trainer.config.diloco import FilesTransport, one_world
from trainer.contract import Exit, slice_directory
from trainer.distributed import enter_own_world, rank_from_environment
from trainer.errors import CheckpointError, PeerLost, Preempted, WorldError
from trainer.feed import Feed
from trainer.parallel.sharding import Layout
from trainer.run import _not_outrun
from trainer.state import describe_state, initial_state, state_items
from trainer.step import Batch, make_train_step
from trainer.worlds import Batches, Exchange, Programs
from trainer.worlds.delta import decode, encode, mean
from trainer.worlds.rounds import DECIDED, File, Record, Rounds

NESTEROV = {"sync_every_steps": 2, "outer_learning_rate": 0.6, "outer_momentum": 0.9}
EXACT = ("model.matmul_precision=highest", "schedule.warmup_steps=0")
APART = config(*EXACT, "mesh.ici.fsdp=2", diloco={**NESTEROV, "transport": {"type": "files", "wait_seconds": 3600}})


class World:
    """One slice of APART on two of the devices."""

    def __init__(self, directory: str, first: nnx.State, index: int) -> None:
        """first: the state before the first step, wherever it is."""
        self.own = one_world(APART, 2)
        self.layout = Layout.of(self.own, jax.devices()[2 * index : 2 * index + 2])
        self.spec = describe_state(self.own, self.layout)
        self.step = make_train_step(self.own, self.spec, self.layout)
        self.feed = Feed(self.layout.of_batch(self.own), self.own.batch.global_batch, self.own.batch.sequence_length)
        self.rows = slice(4 * index, 4 * index + 4)
        self.programs = Programs.of(APART, self.spec, index)
        self.again(directory, index)
        self.state, self.done = self.exchange.join(jax.device_put(first, self.spec.shardings, may_alias=False), 0).state, 0

    def again(self, directory: str, index: int) -> World:
        """The slice after a new start, with the programs of this one."""
        assert APART.diloco is not None
        self.exchange = Exchange(APART.diloco, self.programs, directory, index=index, slices=2)
        hurried = APART.diloco.model_copy(update={"transport": FilesTransport(wait_seconds=1)})
        self.hurried = Exchange(hurried, self.programs, directory, index=index, slices=2)
        return self

    def train(self, steps: int) -> None:
        for n in range(self.done, self.done + steps):
            self.state, _ = self.step(self.state, self.feed({name: rows[self.rows] for name, rows in ragged_batch(n).items()}))
        self.done += steps

    def meet(self, leaving: Callable[[], bool] = lambda: False, *, alone: bool = False) -> list[list[int]]:
        """Who took part in the rounds it has come through; `alone`: it is known that the other one does not come."""
        joined = (self.hurried if alone else self.exchange).meet(self.state, self.done, leaving)
        self.state, self.done = joined.state, joined.done
        return [record.slices for record in joined.records]

    def round(self, *, alone: bool = False) -> list[list[int]]:
        self.train(2)
        return self.meet(alone=alone)

    def items(self) -> dict[str, dict[str, np.ndarray]]:
        return jax.tree.map(np.asarray, state_items(self.state))


def both(action: Callable[[World], object], worlds: list[World]) -> list[object]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(action, worlds))


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for path, value in one.items():
        np.testing.assert_array_equal(value, other[path], err_msg=path)


def test_two_worlds_train_as_two_replicas_of_one_and_go_on_without_one_that_is_lost_until_it_is_back(tmp_path: Path) -> None:
    together = config(*EXACT, "mesh.ici.diloco=2", "mesh.ici.fsdp=2", diloco=NESTEROV)
    where = layout(together, 4)
    spec = describe_state(together, where)
    state, step, feed = initial_state(together, spec), make_train_step(together, spec, where), Feed(where.of_batch(together), 8, 16)
    for n in range(5):
        state, _ = step(state, feed(ragged_batch(n)))
    expected = jax.tree.map(np.asarray, state_items(state))

    alone = one_world(APART, 2)
    first = initial_state(alone, describe_state(alone, layout(alone, 2)))
    worlds = both(partial(World, str(tmp_path), first), [0, 1])
    assert both(World.round, worlds) == both(World.round, worlds) == [[[0, 1]], [[0, 1]]]
    same(worlds[0].items()["params"], worlds[1].items()["params"])
    for world in worlds:
        world.train(1)
    for r, world in enumerate(worlds):
        for item in ("params", "opt"):
            for path, value in world.items()[item].items():
                np.testing.assert_allclose(value, expected[item][path], rtol=0, atol=1e-6, err_msg=path)
        for path, value in world.items()["replicas"].items():
            np.testing.assert_allclose(value[0], expected["replicas"][path][r], rtol=0, atol=2e-6, err_msg=path)

    # Slice 1 is lost in the middle of round 3, with what it had not saved; slice 0 waits for it once.
    saved = jax.tree.map(lambda x: x.copy(), worlds[1].state)
    worlds[0].train(1)
    assert worlds[0].meet(alone=True) == [[0]] and worlds[0].round() == [[0]]
    lost = worlds[1].again(str(tmp_path), 1)
    joined = lost.exchange.join(saved, 5)
    lost.state, lost.done = joined.state, joined.done
    assert (lost.done, [record.slices for record in joined.records]) == (8, [[0], [0]])
    same(lost.items()["params"], worlds[0].items()["params"])
    same({path: value[0] for path, value in lost.items()["replicas"].items() if "model" in path},
         {f"model/{path}": value for path, value in worlds[0].items()["params"].items()})  # fmt: skip
    assert np.all(lost.items()["replicas"]["optimizer/opt_state/count"] == 8)
    assert both(World.round, worlds) == [[[0, 1]], [[0, 1]]]

    # One that comes late takes the decisions of the others, and is waited for again.
    worlds[1].train(2)
    assert worlds[0].round(alone=True) == [[0]] and worlds[0].round() == [[0]]
    assert worlds[1].meet() == [[0], [0]] and worlds[1].done == worlds[0].done == 14
    assert both(World.round, worlds) == [[[0, 1]], [[0, 1]]]
    same(worlds[0].items()["params"], worlds[1].items()["params"])
    same(worlds[0].items()["opt"], worlds[1].items()["opt"])

    # Asked to leave while it waits, a slice has said what it moved: the others count it, and it finds its own part when it is back.
    worlds[0].train(2)
    with pytest.raises(Preempted, match="its part of round 9 is kept"):
        worlds[0].meet(leaving=lambda: True)
    assert worlds[1].round() == [[0, 1]]
    for done in (4, 4, 18):
        worlds[1].hurried.saved(done)
    kept = sorted(path.parent.name for path in tmp_path.glob("rounds/*/*.delta"))
    assert worlds[1].round(alone=True) == [[1]] and len(kept) == 14
    assert min(path.parent.name for path in tmp_path.glob("rounds/*/*.delta")) == "00000003", "all since the last but one checkpoint"
    worlds[1].hurried.saved(20)
    assert worlds[1].round(alone=True) == [[1]]
    assert {path.parent.name for path in tmp_path.glob("rounds/*/*.delta")} == {"00000010", "00000011"}
    assert len(list(tmp_path.glob("rounds/*/decided.json"))) == 11
    behind = worlds[0].again(str(tmp_path), 0)
    with pytest.raises(PeerLost, match="too far behind"):
        behind.exchange.join(behind.state, 4)


def rounds(directory: Path | str, index: int, slices: int = 3) -> Rounds:
    return Rounds(str(directory), index=index, slices=slices)


def commit(mine: Rounds, number: int) -> None:
    mine.commit(number, (File(f"slice-{mine.index}.x.host-0.delta", 1, "x"),))


def settle(mine: Rounds, number: int, wait_seconds: float = 60) -> list[int]:
    record = mine.settle(number, wait_seconds=wait_seconds, leaving=lambda: False)
    assert record is not None
    return record.slices


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "folder":
        yield str(tmp_path)
    else:
        gcs: Gcs = request.getfixturevalue("gcs")
        yield f"{gcs.url}/worlds-{tmp_path.name}"


def test_a_checkpoint_that_its_slice_deletes_while_another_reads_it_is_no_reason_to_end_the_job(tmp_path: Path) -> None:
    ours, theirs = str(tmp_path), slice_directory(str(tmp_path), 1)
    of_the_step = Path(checkpoint_directory(theirs), "8", COMMIT_FILE)

    def read(directory: str) -> None:
        with _not_outrun(directory, ours, 8):
            raise CheckpointError("a file is missing")

    with pytest.raises(PeerLost, match=r"step 8 of .* was deleted by its slice") as caught:
        read(theirs)
    assert caught.value.exit_code is Exit.PEER, "restarted"
    with pytest.raises(CheckpointError, match=r"^a file is missing"):
        read(ours)
    of_the_step.parent.mkdir(parents=True)
    of_the_step.write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"^a file is missing"):
        read(theirs)


def test_a_checkpoint_that_is_deleted_between_its_check_and_the_reading_of_what_it_says_is_one_that_is_gone(tmp_path: Path) -> None:
    theirs = slice_directory(str(tmp_path), 1)
    checkpoints = Checkpoints(APART.checkpoint, theirs)
    checkpoints.save(8, {"params": {"w": jax.numpy.ones(4)}}, {})
    checkpoints.close()
    reader = Checkpoints(APART.checkpoint, theirs)
    assert reader.latest_step() == 8
    open_storage(checkpoint_directory(theirs)).remove_tree("8")
    for read in (reader.meta, reader.items, partial(reader.restore, abstract_items={})):
        with pytest.raises(PeerLost, match="was deleted by its slice"), _not_outrun(theirs, str(tmp_path), 8):
            read(8)


def test_of_many_that_decide_at_once_the_first_decides_for_all(place: str) -> None:
    slices = [rounds(place, index, 8) for index in range(8)]
    for mine in slices[:5]:
        commit(mine, 1)
    ready = threading.Barrier(8)

    def late(mine: Rounds) -> Record | None:
        ready.wait()
        commit(mine, 1)
        return mine.settle(1, wait_seconds=0, leaving=lambda: False)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(late, slices))
    assert len({record.encode() for record in found if record}) == 1 and None not in found
    assert found[0] is not None and set(range(5)) <= set(found[0].slices)
    assert rounds(place, 0).record(1) == found[0] and rounds(place, 0).newest() == 1


def test_one_that_was_not_there_is_waited_for_again_when_it_has_announced_itself(place: str) -> None:
    first, second, third = (rounds(place, index) for index in range(3))
    for mine in (first, second):
        commit(mine, 1)
    assert settle(first, 1, wait_seconds=0) == [0, 1] == settle(third, 1)
    for mine in (first, second):
        commit(mine, 2)
    assert settle(first, 2) == [0, 1]
    third.announce(3)
    commit(second, 3)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(settle, mine, 3) for mine in (first, second)]
        commit(first, 3)
        assert not any(each.done() for each in waiting)
        commit(third, 3)
        assert [each.result() for each in waiting] == [[0, 1, 2]] * 2


def clear(mine: Rounds, number: int) -> Record:
    """Slice 0 decides the round, goes on, and deletes what is in it, whatever others are writing there."""
    mine.put(number, mine.delta_path(number, "x", 0), b"x")
    record = mine.settle(number, wait_seconds=0, leaving=lambda: False)
    mine.forget(number)
    assert record is not None and mine._names(number) == {DECIDED}
    return record


def test_a_round_that_is_decided_and_cleared_between_a_look_and_the_decision_is_the_others(place: str, monkeypatch: MonkeyPatch) -> None:
    first, late = rounds(place, 0, 2), rounds(place, 1, 2)
    for mine in (first, late):
        commit(mine, 1)
    names, cleared = late._names, list[Record]()

    def look(number: int) -> set[str]:
        found = names(number)
        cleared.append(clear(first, number))
        return found

    monkeypatch.setattr(late, "_names", look)
    assert late.settle(1, wait_seconds=0, leaving=lambda: False) == cleared[0] and cleared[0].slices == [0, 1]


@pytest.mark.parametrize("write", ["part", "delta", "decision"])
def test_a_round_that_is_cleared_while_a_late_slice_writes_there_stays_decided(
    tmp_path: Path, monkeypatch: MonkeyPatch, write: str
) -> None:
    first, late = rounds(tmp_path, 0, 2), rounds(tmp_path, 1, 2)
    for mine in (first, late)[: 2 if write == "decision" else 1]:
        commit(mine, 1)
    begun, cleared = list[str](), list[Record]()

    def after_clearing(action: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def act(source: Any, target: Any) -> None:
            if not begun:  # to clear is to write, too
                begun.append(source)
                cleared.append(clear(first, 1))
            action(source, target)

        return act

    name = "replace" if write == "part" else "link"
    monkeypatch.setattr(os, name, after_clearing(getattr(os, name)))
    if write == "part":
        late.put(1, late.delta_path(1, "x", 0), b"x")
    elif write == "delta":
        commit(late, 1)
    else:
        assert late.settle(1, wait_seconds=0, leaving=lambda: False) == cleared[0]
    assert late.record(1) == cleared[0] and cleared[0].slices == ([0, 1] if write == "decision" else [0])


def test_a_delta_that_was_committed_stays_and_is_not_wanted_again(place: str) -> None:
    mine = rounds(place, 0)
    assert mine.wants_delta(1)
    mine.commit(1, (File("first.delta", 1, "a"),))
    assert not rounds(place, 0).wants_delta(1)
    rounds(place, 0).commit(1, (File("second.delta", 1, "b"),))
    assert settle(mine, 1, wait_seconds=0) == [0]
    record = mine.record(1)
    assert record is not None and record.deltas[0] == (File("first.delta", 1, "a"),)
    assert not rounds(place, 1).wants_delta(1)
    assert mine.settle(2, wait_seconds=60, leaving=lambda: True) is not None or mine.record(2) is None


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=4), st.sampled_from(["float32", "bfloat16"]))
def test_shards_survive_their_bytes_and_their_mean_is_that_of_numpy(shapes: list[tuple[int, int]], dtype: str) -> None:
    random = np.random.default_rng(0)
    parts = [
        {(f"w{i}", (0, 0), shape): random.normal(size=shape).astype(jax.numpy.dtype(dtype)) for i, shape in enumerate(shapes)}
        for _ in range(3)
    ]
    for shards in parts:
        back = decode(encode(shards))
        assert back.keys() == shards.keys()
        for region, array in shards.items():
            np.testing.assert_array_equal(back[region], array)
    for region, array in mean([encode(shards) for shards in parts]).items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, np.mean([shards[region].astype(np.float64) for shards in parts], axis=0), atol=1e-6)
    with pytest.raises(WorldError, match="different models or meshes"):
        mean([encode(parts[0]), encode({("other", (0,), (1,)): np.ones(1, np.float32)})])


def test_batches_go_on_from_a_later_step_where_a_slice_has_missed_some() -> None:
    started: list[int] = []

    def start(begin: int) -> Iterator[tuple[int, Batch]]:
        started.append(begin)
        return ((n, {}) for n in range(begin, 100))

    batches = Batches(start, 3)
    assert [next(batches)[0] for _ in range(2)] == [3, 4]
    batches.go_to(5)
    assert next(batches)[0] == 5
    batches.go_to(9)
    assert next(batches)[0] == 9 and started == [3, 9]


def test_a_slice_of_its_own_is_process_0_of_one_slice_whatever_the_tpu_runtime_says_of_the_others() -> None:
    environment = {
        "NNX_JOB_INDEX": "2", "NNX_NUM_SLICES": "3", "NNX_HOSTS_PER_SLICE": "2", "JOB_COMPLETION_INDEX": "1", "TPU_WORKER_ID": "1",
        "TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2", "MEGASCALE_COORDINATOR_ADDRESS": "c:8080",
    }  # fmt: skip
    enter_own_world(environment)
    enter_own_world(environment)
    rank = rank_from_environment(environment)
    assert (rank.process_index, rank.process_count, rank.replica, rank.replicas, rank.coordinator_host) == (1, 2, 2, 3, "a")
    assert not [name for name in environment if name.startswith("MEGASCALE")] and "slice 2, worker 1" in str(rank)


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        (("diloco.fragments=2",), "diloco.fragments"),
        (("diloco.delay_steps=1",), "diloco.delay_steps"),
        (("mesh.dcn.data=2",), "mesh.dcn"),
        (("mesh.ici.diloco=2",), "mesh.ici"),
        (("batch.global_batch=9",), "batch.global_batch"),
        (("mesh.ici.fsdp=4",), "mesh.ici"),
        (("profiler={first_step: 1, last_step: 2, processes: [1]}",), "profiler.processes.0"),
    ],
)
def test_what_slices_that_meet_through_files_cannot_do_is_refused_where_it_was_written(overrides: tuple[str, ...], path: str) -> None:
    diloco = {"sync_every_steps": 4, "transport": "files"}
    wrong = config("mesh.ici.fsdp=2", "mesh.ici.tensor=2", *overrides, diloco=diloco)
    assert path in [problem.path for problem in check_train(wrong, slices=2, devices_per_slice=4, processes=2)]
    right = config("mesh.ici.fsdp=2", "mesh.ici.tensor=2", diloco=diloco)
    assert not list(check_train(right, slices=2, devices_per_slice=4, processes=2))
