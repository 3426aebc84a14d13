"""One run: assemble the pieces, find where to begin, call the loop."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import jax
from flax import nnx

from trainer import distributed
from trainer.aot.executable import load_executable
from trainer.attempts import numbered, record_attempt
from trainer.checkpoint import Checkpoints
from trainer.checkpoint.commit import COMMIT_FILE, checkpoint_directory
from trainer.checkpoint.mismatch import compare_meta
from trainer.checkpoint.peers import Peers
from trainer.checkpoint.storage import open_storage
from trainer.config.checks import check_train
from trainer.config.diloco import one_world, worlds_apart
from trainer.config.problem import ConfigError, Problem
from trainer.config.terms import eval_terms
from trainer.config.train import TrainConfig
from trainer.contract import GRACE_SECONDS, JOB_UID, METRICS_FOLDER, Exit, slice_directory
from trainer.data import BatchLoader, Data, differences, open_data
from trainer.errors import CheckpointError, DataError, PeerLost, ResumeMismatch
from trainer.feed import Feed
from trainer.loop import Loop
from trainer.loss import LossSums
from trainer.observe import Profiler, Reporter, enable_compile_cache, make_header
from trainer.observe.jsonl import evaluated
from trainer.parallel.compiler import check_options, compiler_options
from trainer.parallel.sharding import Layout
from trainer.silent import SilentTerms
from trainer.sizes import for_each_size
from trainer.state import StateSpec, describe_state, initial_state, state_from_items, state_items, with_average
from trainer.step import Batch, EvalStep, TrainStep, make_eval_step, make_term_probe, make_train_step
from trainer.worlds import Batches, Exchange, Programs
from trainer.worlds.rounds import decided_rounds

DATA_DEADLINE_SECONDS: Final = 3600
"""How long the processes wait for the one that is last to prepare its data."""


def run(config: TrainConfig) -> Exit:
    """Train `config` to its last step, from the newest checkpoint of its run directory where there is one.

    Raises the exceptions of `trainer.errors` and ConfigError; each carries the exit code of its process.
    """
    world = distributed.initialise(config.distributed)
    if config.compile_cache:
        enable_compile_cache(config.compile_cache)
    _require_consistent(config, world)
    own = one_world(config, world.replicas) if worlds_apart(config) else config
    directory = slice_directory(config.run_directory, world.replica)
    layout = Layout.of(own, jax.devices(), slices=world.slices)
    data = open_data(config, process_index=world.process_index, process_count=world.process_count)
    _require_same_data(data)
    if world.process_index == 0:
        job = os.environ.get(JOB_UID, "")
        rounds = decided_rounds(config.run_directory) if worlds_apart(config) else 0
        record_attempt(directory, numbered(directory, world.attempt, job), job, rounds=rounds)
    spec = describe_state(own, layout)
    exchange = _exchange(config, spec, world)
    checkpoints = Checkpoints(config.checkpoint, directory)
    header = make_header(own, dict(layout.mesh.shape)) | {"compiler_options": compiler_options(config.compiler, layout.mesh) or {}}
    meta = functools.partial(_meta, config, data, header)
    begin, accepted = _beginning(config, checkpoints, exchange, world), []
    if begin.step is not None:
        with _not_outrun(begin.directory, directory, begin.step):
            saved = begin.checkpoints.meta(begin.step)
        accepted = _require_same_run(config, saved, meta(begin.step))
        _require_steps_ahead(config, begin.step)
    complete = begin.step == config.steps and not begin.joins
    unevaluated = complete and not _evaluated(config, directory)
    reporter = Reporter(own, directory, header, primary=world.process_index == 0)
    profiler = Profiler(config.profiler, directory, world.process_index)
    try:
        if complete and not unevaluated:
            reporter.event("already complete", step=begin.step, directory=directory)
            return Exit.DONE
        if begin.step is not None:
            more = {"accepted": "; ".join(accepted)} if accepted else {}
            reporter.event("resumed", step=begin.step, directory=begin.directory, **more)
        loop = Loop(
            config=own,
            train_step=_train_step(own, spec, layout, reporter),
            evaluate=_evaluation(config, data, layout, make_eval_step(own, spec, layout)) if config.eval else None,
            checkpoints=checkpoints,
            meta=meta,
            reporter=reporter,
            silent_terms=SilentTerms(own, for_each_size(own, lambda one: make_term_probe(one, spec, layout)), reporter),
            profiler=profiler,
            preemption_requested=distributed.preemption_requested,
            exchange=exchange,
            leaving=distributed.asked_to_leave,
            grace_seconds=float(os.environ.get(GRACE_SECONDS) or "inf"),
        )
        with _not_outrun(begin.directory, directory, begin.step):
            state, done = _first_state(config, spec, begin.checkpoints, begin.step), begin.step or 0
        if unevaluated:
            loop.evaluate_last(done, state)
            return Exit.DONE
        if exchange and begin.joins:
            state, done = loop.join(exchange, state, done)
            if done >= config.steps:
                loop.finish(done, state)
                return Exit.DONE
        loop.run(state, Batches(functools.partial(_batches, own, data, layout, world.replica), done))
    finally:
        profiler.close()
        reporter.close()
    return Exit.DONE


def _evaluated(config: TrainConfig, directory: str) -> bool:
    """Whether a run that has done its last step has its last evaluation too, where one can tell. The same on all processes."""
    if config.eval is None or "jsonl" not in config.metrics.writers:
        return True
    peers = Peers()
    found = str(int(evaluated(f"{directory}/{METRICS_FOLDER}", config.steps))) if peers.is_primary else None
    return peers.broadcast("evaluated", found, deadline=time.monotonic() + DATA_DEADLINE_SECONDS) == "1"


def _exchange(config: TrainConfig, spec: StateSpec, world: distributed.World) -> Exchange | None:
    if config.diloco is None or not config.diloco.files:
        return None
    programs = Programs.of(config, spec, world.replica)
    return Exchange(config.diloco, programs, config.run_directory, index=world.replica, slices=world.replicas)


@dataclass(frozen=True)
class _Beginning:
    """Where a run goes on: the checkpoint, None for the first state."""

    checkpoints: Checkpoints
    directory: str
    step: int | None
    joins: bool = False
    """A slice that the others have gone on without: it begins at outer parameters, and goes through the rounds it has missed."""


def _beginning(config: TrainConfig, checkpoints: Checkpoints, exchange: Exchange | None, world: distributed.World) -> _Beginning:
    """The newest checkpoint of this run; of a slice that is a world of its own, of any slice where rounds were decided since its own."""
    mine = slice_directory(config.run_directory, world.replica)
    step = checkpoints.latest_step()
    if exchange is None:
        return _Beginning(checkpoints, mine, step)
    if step is not None and exchange.round_of(step) >= exchange.newest():
        return _Beginning(checkpoints, mine, step)
    best = _Beginning(checkpoints, mine, step, joins=True)
    for index in range(world.replicas):
        if index != world.replica:
            directory = slice_directory(config.run_directory, index)
            theirs = Checkpoints(config.checkpoint, directory)
            found = theirs.latest_step()
            if found is not None and exchange.round_of(found) > exchange.round_of(best.step or 0):
                best = _Beginning(theirs, directory, found, joins=True)
    return best


@contextmanager
def _not_outrun(directory: str, mine: str, step: int | None) -> Iterator[None]:
    """While a step of `directory` is read. Where that is another slice's, which trains on and deletes its old checkpoints, the step
    may be gone before it is read: then PeerLost, since a restart finds a newer one, and not an error that ends the job."""
    try:
        yield
    except CheckpointError as error:
        if directory == mine or f"{step}/{COMMIT_FILE}" in open_storage(checkpoint_directory(directory)).files(str(step)):
            raise
        raise PeerLost(
            f"step {step} of {directory} was deleted by its slice, which went on meanwhile ({error})",
            hint="a restart takes a newer one; with a larger checkpoint.keep_last there is more time to read it",
        ) from error


def _train_step(config: TrainConfig, spec: StateSpec, layout: Layout, reporter: Reporter) -> TrainStep:
    """The step compiled beforehand where there is one and it is this run's, else one that is compiled when it first runs."""
    check_options(config.compiler, layout.mesh.local_mesh.devices.flat[0])
    return for_each_size(
        config, lambda one: _one_step(one, spec, layout, reporter, whole=one.batch.global_batch == config.batch.global_batch)
    )


def _one_step(config: TrainConfig, spec: StateSpec, layout: Layout, reporter: Reporter, *, whole: bool) -> TrainStep:
    """For batches of one size; the executable is of the whole batch."""
    if whole and (path := config.compiler.executable):
        found = load_executable(path, config, spec, layout)
        if not isinstance(found, str):
            reporter.event("compiled step loaded", path=path)
            return found
        reporter.event("compiled step not used", path=path, reason=found)
    return make_train_step(config, spec, layout)


def _first_state(config: TrainConfig, spec: StateSpec, checkpoints: Checkpoints, begin: int | None) -> nnx.State:
    if begin is not None:
        wanted = state_items(spec.abstract)
        if "ema" not in wanted or "ema" in checkpoints.items(begin):
            return state_from_items(spec, checkpoints.restore(begin, wanted))
        del wanted["ema"]
        return with_average(spec, state_from_items(spec, checkpoints.restore(begin, wanted)))
    if config.checkpoint.start_from is None:
        return initial_state(config, spec)
    from trainer.checkpoint.parameters import load_folder

    abstract = state_items(spec.abstract)["params"]
    return initial_state(config, spec, load_folder(config.checkpoint.start_from, abstract, config.model))


def _batches(config: TrainConfig, data: Data, layout: Layout, replica: int, begin: int) -> Iterator[tuple[int, Batch]]:
    """From step `begin` on; `config` is of one world, whose rows follow those of `replica` others."""
    feeds = {size: Feed(layout.of_batch(config), size, config.batch.sequence_length) for size in config.batch.sizes}
    rows = {size: feed.local_rows + replica * size for size, feed in feeds.items()}
    size_at = config.batch.size_at
    loader = BatchLoader(data.train, start_step=begin, local_rows=lambda n: rows[size_at(n)], prefetch_batches=config.data.prefetch_batches)
    return ((n, feeds[size_at(n)](batch)) for n, batch in loader)


def _evaluation(
    config: TrainConfig, data: Data, layout: Layout, eval_step: EvalStep
) -> Callable[[nnx.State, Callable[[], bool]], LossSums | None]:
    """Loss sums over the whole evaluation set, None when told to leave; every process makes the same number of steps."""
    split = data.eval
    assert split is not None and config.eval is not None
    feed = Feed(layout.of_batch(config), split.global_batch, config.batch.sequence_length)
    # Compiled, because placing a host value on the devices of other processes compares it on all of them first.
    zero = jax.jit(functools.partial(LossSums.zero, eval_terms(config)), out_shardings=layout.replicated)

    def evaluate(state: nnx.State, leave: Callable[[], bool]) -> LossSums | None:
        sums = zero()
        for _, batch in BatchLoader(split, local_rows=feed.local_rows, prefetch_batches=config.data.prefetch_batches):
            if leave():
                return None
            sums = eval_step(state, sums, feed(batch))
        return sums

    return evaluate


def _require_consistent(config: TrainConfig, world: distributed.World) -> None:
    """Raises ConfigError with every rule across nodes that the config breaks on the devices that are there."""
    devices, slices = world.devices_per_slice, world.slices * world.replicas
    processes = world.process_count * world.replicas
    if problems := list(check_train(config, slices=slices, devices_per_slice=devices, processes=processes)):
        raise ConfigError(problems)


def _require_steps_ahead(config: TrainConfig, begin: int) -> None:
    if begin > config.steps:
        message = f"is {config.steps}, but the run directory already holds a checkpoint of step {begin}"
        raise ConfigError([Problem(path="steps", message=message, hint="raise steps, or use another run_directory", code="steps")])


def _require_same_data(data: Data) -> None:
    """Raises DataError on every process when any of them reads other data than process 0."""
    peers = Peers()
    deadline = time.monotonic() + DATA_DEADLINE_SECONDS
    found = peers.gather("data", data.identity.dataset, deadline=deadline)
    others = [str(index) for index, fingerprint in enumerate(found) if fingerprint != found[0]]
    others = peers.broadcast("data", ", ".join(others) if peers.is_primary else None, deadline=deadline)
    if others:
        raise DataError(
            f"the files of data.sources on process {others} are not those of process 0",
            hint="give every host the same files, or put them where all hosts read them, such as gs://",
        )


def _meta(config: TrainConfig, data: Data, header: Mapping[str, Any], done: int) -> dict[str, Any]:
    return {
        "step": done,
        "config": config.model_dump(mode="json"),
        "data": data.state(done),
        "fingerprints": {"data": data.train.fingerprint, "tokenizer": data.train.tokenizer_fingerprint},
        "mesh": header["mesh"],
        "versions": header["versions"],
        "restart_attempt": header["restart_attempt"],
    }


def _require_same_run(config: TrainConfig, saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """The differences that the config accepts. Raises ResumeMismatch."""
    try:
        return compare_meta(saved, present, config.checkpoint.allow_mismatch)
    except ResumeMismatch as mismatch:
        details = "".join(f"\n  {difference.message}" for difference in differences(saved["data"], present["data"]))
        raise ResumeMismatch(f"{mismatch}{details}", hint=mismatch.hint) from None
