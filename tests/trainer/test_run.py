"""Whole runs in this process: counted traces, compiles and host reads; evaluation; numerics; resume."""

from __future__ import annotations

import itertools
import json
import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.trainer.configs import config, layout
from trainer import run as run_module
from trainer.checkpoint import Checkpoints
from trainer.checkpoint.saving import Save
from trainer.config import ConfigError, TrainConfig
from trainer.contract import COMMITTED, GRACE_SECONDS, GRACE_SHORT, SURVIVOR_WAIT_SECONDS, Exit
from trainer.errors import NumericsError, Preempted, ResumeMismatch
from trainer.observe import Reporter
from trainer.run import run
from trainer.state import describe_state, state_items

SOURCE = {"sources": [{"type": "synthetic", "distinct_batches": 4}]}


def small(directory: Path, *overrides: str, **changes: Any) -> TrainConfig:
    document = {"steps": 6, "data": SOURCE, "metrics": {"writers": ["jsonl"]}, "checkpoint": {"every_steps": 3}, **changes}
    return config(*overrides, run_directory=str(directory), **document)


def parameters(directory: Path, step: int) -> dict[str, np.ndarray]:
    saved = Checkpoints(config().checkpoint, str(directory))
    where = layout(config())
    wanted = state_items(describe_state(config(), where).abstract)
    restored = saved.restore(step, {"params": wanted["params"], "opt": wanted["opt"]})
    return {f"{item}/{name}": np.asarray(value) for item, values in restored.items() for name, value in values.items()}


def records(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics" / "metrics.jsonl").read_text().splitlines()]


def evaluations(directory: Path) -> dict[int, list[float]]:
    found = [(line["done"], line["loss"]) for line in records(directory) if line["kind"] == "eval"]
    return {done: [loss for at, loss in found if at == done] for done, _ in found}


def losses(directory: Path) -> list[float]:
    return [line["loss"] for line in records(directory) if line["kind"] == "step"]


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in records(directory) if line.get("event") == kind]


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Names of the functions traced and compiled, as JAX logs them."""
    seen: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    handler = Collect()
    loggers = [logging.getLogger(name) for name in ("jax._src.interpreters.pxla", "jax._src.dispatch", "jax._src.compiler")]
    with jax.log_compiles():
        for logger in loggers:
            logger.addHandler(handler)
        try:
            yield seen
        finally:
            for logger in loggers:
                logger.removeHandler(handler)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps without evaluation."""
    directory = tmp_path_factory.mktemp("plain")
    assert run(small(directory)) == Exit.DONE
    return directory


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps with an evaluation after every second one; the log of its compilations is in `compilations.txt`."""
    directory = tmp_path_factory.mktemp("evaluated")
    with compilations() as seen:
        run(small(directory, eval={"every_steps": 2}))
    (directory / "compilations.txt").write_text("\n".join(seen))
    return directory


def test_a_run_with_evaluation_and_checkpoints_traces_and_compiles_each_step_once(evaluated: Path, plain: Path) -> None:
    seen = (evaluated / "compilations.txt").read_text().splitlines()
    for function in ("train_step", "eval_step"):
        assert sum(f"Finished tracing {function} for jit" in line for line in seen) == 1
        assert sum(f"Finished XLA compilation of jit({function})" in line for line in seen) == 1
    with_evaluation, alone = parameters(evaluated, 6), parameters(plain, 6)
    for name, value in alone.items():
        np.testing.assert_array_equal(with_evaluation[name], value, err_msg=name)


def test_a_resumed_run_traces_and_compiles_the_step_once_and_ends_with_the_same_bits(tmp_path: Path, plain: Path, monkeypatch) -> None:
    monkeypatch.setattr(run_module.distributed, "preemption_requested", lambda step: step == 4)
    with pytest.raises(Preempted, match="checkpoint 4 is committed"):
        run(small(tmp_path))
    monkeypatch.undo()
    with compilations() as seen:
        run(small(tmp_path))
    assert sum("Finished tracing train_step for jit" in line for line in seen) == 1
    assert sum("Finished XLA compilation of jit(train_step)" in line for line in seen) == 1
    assert losses(tmp_path) == losses(plain)
    resumed, alone = parameters(tmp_path, 6), parameters(plain, 6)
    for name, value in alone.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)
    assert run(small(tmp_path)) == Exit.DONE  # complete: nothing is trained again
    assert losses(tmp_path) == losses(plain)


def test_a_run_asked_to_leave_during_an_evaluation_saves_at_once_and_goes_on_with_the_same_bits(
    tmp_path: Path, plain: Path, evaluated: Path, monkeypatch
) -> None:
    asked: list[int] = []

    def in_the_evaluation(step: int) -> bool:
        asked.append(step)
        return asked.count(step) == 2

    monkeypatch.setattr(run_module.distributed, "preemption_requested", in_the_evaluation)
    monkeypatch.setenv(GRACE_SECONDS, str(SURVIVOR_WAIT_SECONDS))  # nothing is left for a save
    with pytest.raises(Preempted, match="checkpoint 4 is committed"):
        run(small(tmp_path, eval={"every_steps": 4}))
    assert asked == [1, 2, 3, 4, 4]
    with pytest.raises(Preempted, match="checkpoint 6 is committed"):  # in the last one
        run(small(tmp_path, eval={"every_steps": 4}))
    assert asked == [1, 2, 3, 4, 4, 5, 6, 6]
    with pytest.raises(Preempted, match="checkpoint 6 is committed"):  # in the one that was made up for
        asked.remove(6)
        run(small(tmp_path, eval={"every_steps": 4}))
    monkeypatch.undo()
    assert evaluations(tmp_path) == {}
    run(small(tmp_path, eval={"every_steps": 4}))
    run(small(tmp_path, eval={"every_steps": 4}))  # complete: nothing is evaluated again
    assert evaluations(tmp_path) == {6: evaluations(evaluated)[6]}
    took = {event["step"]: event["seconds"] for event in events(tmp_path, COMMITTED)}
    assert list(took) == [3, 4, 6]
    assert [(event["step"], event["grace_seconds"], event["needed_seconds"]) for event in events(tmp_path, GRACE_SHORT)] == [
        (step, SURVIVOR_WAIT_SECONDS, SURVIVOR_WAIT_SECONDS + math.ceil(took[step])) for step in (3, 4, 6)
    ]
    assert not events(plain, GRACE_SHORT)
    assert losses(tmp_path) == losses(plain)
    resumed, alone = parameters(tmp_path, 6), parameters(plain, 6)
    for name, value in alone.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)


def test_a_checkpoint_in_flight_does_not_hold_the_loop(tmp_path: Path, monkeypatch) -> None:
    gone_on, calls = threading.Event(), itertools.count(1)
    commit, make = Save._commit, run_module.make_train_step

    def commit_later(save: Save, known: dict[str, str]) -> None:
        assert gone_on.wait(60), "the loop waits for the commit"
        commit(save, known)

    def make_counting(*arguments: Any) -> Any:
        step = make(*arguments)

        def counted(state: Any, batch: Any) -> Any:
            if next(calls) == 4:  # two steps after the save of step 2 began
                gone_on.set()
            return step(state, batch)

        return counted

    monkeypatch.setattr(Save, "_commit", commit_later)
    monkeypatch.setattr(run_module, "make_train_step", make_counting)
    assert run(small(tmp_path, checkpoint={"every_steps": 2})) == Exit.DONE
    assert Checkpoints(config().checkpoint, str(tmp_path)).latest_step() == 6


def test_a_save_that_is_committed_during_an_evaluation_is_told_of_in_it(tmp_path: Path, monkeypatch) -> None:
    said: list[tuple[str, int]] = []
    told, news = Reporter.event, Checkpoints.newly_committed

    def tell(reporter: Reporter, kind: str, **fields: Any) -> None:
        if kind == COMMITTED:
            said.append((kind, fields["step"]))
        told(reporter, kind, **fields)

    def when_it_is_committed(checkpoints: Checkpoints) -> Any:
        checkpoints.wait()
        return news(checkpoints)

    def ask(step: int) -> bool:
        said.append(("asked", step))
        return False

    monkeypatch.setattr(Reporter, "event", tell)
    monkeypatch.setattr(Checkpoints, "newly_committed", when_it_is_committed)
    monkeypatch.setattr(run_module.distributed, "preemption_requested", ask)
    assert run(small(tmp_path, steps=4, eval={"every_steps": 3})) == Exit.DONE
    told_at = said.index((COMMITTED, 3))
    assert ("asked", 3) in said[told_at:] and ("asked", 4) not in said[:told_at]


def test_fewer_steps_than_are_done_are_refused(plain: Path) -> None:
    with pytest.raises(ConfigError, match="is 4, but the run directory already holds a checkpoint of step 6"):
        run(small(plain, steps=4, checkpoint={"every_steps": 3, "allow_mismatch": ["steps"]}))


def test_what_the_devices_cannot_carry_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"batch\.global_batch"):
        run(small(tmp_path, batch={"global_batch": 12, "sequence_length": 16}))
    assert not list(tmp_path.iterdir())


def test_another_learning_rate_is_refused_at_resume_with_both_values_named(plain: Path) -> None:
    with pytest.raises(ResumeMismatch, match=r"schedule.learning_rate: saved 0.003, now 0.1"):
        run(small(plain, "schedule.learning_rate=0.1"))


def test_a_loss_that_is_not_finite_ends_the_run_after_logging_and_is_never_saved(tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match=r"nan|inf"):
        run(small(tmp_path, "schedule.learning_rate=1e30", "optimizer.clip_norm=null", checkpoint={"every_steps": 1}))
    logged = losses(tmp_path)
    assert np.isfinite(logged[0])
    committed = Checkpoints(config().checkpoint, str(tmp_path)).latest_step()
    assert committed == len(logged) - 1


class HostReads:
    """Counts conversions of device arrays to host values, whoever asks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        from jax._src.array import ArrayImpl

        original = ArrayImpl._value.fget  # type: ignore[attr-defined]

        def value(array: Any) -> Any:
            self.count += 1
            return original(array)

        monkeypatch.setattr(ArrayImpl, "_value", property(value))


def test_the_loop_reads_nothing_from_the_device_but_the_metrics_of_the_previous_step(tmp_path: Path, monkeypatch) -> None:
    reads, before_step, planted = HostReads(monkeypatch), [], 7
    original = run_module.make_train_step

    def make(*arguments: Any) -> Any:
        step = original(*arguments)

        def wrapped(state: Any, batch: Any) -> Any:
            before_step.append(reads.count)
            state, metrics = step(state, batch)
            if len(before_step) > planted:
                float(metrics["loss"])
            return state, metrics

        return wrapped

    monkeypatch.setattr(run_module, "make_train_step", make)
    run(small(tmp_path, steps=12, checkpoint={"every_steps": 100}, eval={"every_steps": 12}))
    in_a_step = np.diff(before_step).tolist()
    assert in_a_step[1:planted] == [len(METRICS)] * (planted - 1)
    assert in_a_step[planted:] == [len(METRICS) + 1] * (11 - planted)


METRICS = ("loss", "cross_entropy", "z_loss", "tokens", "gradient_norm", "learning_rate")
