"""Rules across the nodes of a TrainConfig. A rule is a generator of problems; all of them run, every time. No JAX here."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Final

from trainer.config.attention import KERNEL_BLOCK
from trainer.config.context import Ring, Ulysses, context_fits, heads_leave_the_rows, is_balanced
from trainer.config.data import ArrayRecord, Bytes, JsonLines, Parquet, PythonStandardLibrary, Synthetic, Text
from trainer.config.diloco import diloco_fits, one_world, worlds_apart, worlds_fit
from trainer.config.layouts import batch_divides, length_shards, mesh_axes_are_used, model_divides, rules_are_known, weights_are_split
from trainer.config.mesh import REPLICA_AXES, product
from trainer.config.mlp import KERNEL_LANES, Moe
from trainer.config.paths import path_fault
from trainer.config.pipeline import pipeline_fits
from trainer.config.problem import Problem
from trainer.config.ramp import ramp_up_fits
from trainer.config.schedule import Cosine, Linear, WarmupStableDecay
from trainer.config.train import TrainConfig
from trainer.config.treatment import groups_select

BYTES_VOCABULARY: Final = 258
"""256 bytes, begin and end of a document."""


def check_train(config: TrainConfig, *, slices: int, devices_per_slice: int, processes: int) -> Iterator[Problem]:
    """Every problem of `config` on so many slices, devices of a slice, and processes (hosts) in all."""
    problems: list[Problem] = []
    if worlds_apart(config):
        problems += worlds_fit(config, slices)
        yield from problems
        config, slices, processes = one_world(config, slices), 1, processes // slices
    shape = yield from mesh_fits(config, slices=slices, devices_per_slice=devices_per_slice)
    if shape is not None and not problems:  # of a batch that does not come out even, nothing more can be said
        yield from pipeline_fits(config, shape)
        yield from diloco_fits(config, shape)
        yield from batch_divides(config, shape)
        yield from ramp_up_fits(config, shape)
        yield from context_fits(config, shape)
        yield from heads_leave_the_rows(config, shape)
        yield from model_divides(config, shape)
        yield from mesh_axes_are_used(config, shape)
        yield from kernel_fits(config, shape)
        yield from tiles_fit(config, shape)
        yield from weights_are_split(config, shape)
        yield from one_replica_reads_for_others(config, shape)
    yield from expert_kernel_fits(config)
    yield from state_is_of_one_run(config)
    yield from averages_are_there(config)
    yield from rules_are_known(config)
    yield from groups_select(config)
    yield from schedule_ends(config)
    yield from steps_are_reached(config, processes=processes)
    yield from tokenizer_fits(config)
    yield from evaluation_has_documents(config)
    yield from paths_are_usable(config)


def mesh_fits(config: TrainConfig, *, slices: int, devices_per_slice: int) -> Generator[Problem, None, dict[str, int] | None]:
    """Degrees inside a slice multiply to its devices, degrees between slices to the slices. Returns the mesh, or None."""
    fits = True
    totals = {"ici": (devices_per_slice, "devices per slice"), "dcn": (slices, "slices")}
    for link, (total, what) in totals.items():
        degrees = getattr(config.mesh, link)
        try:
            degrees.solve(total, what)
        except ValueError as error:
            fits = False
            hint = f"degrees of mesh.{link} whose product is {total}; one of them may be -1: what is left"
            yield Problem(path=f"mesh.{link}", message=str(error), hint=hint, code="mesh", value=product(degrees.by_axis()), limit=total)
    return config.mesh.shape(slices=slices, devices_per_slice=devices_per_slice) if fits else None


def kernel_fits(config: TrainConfig, shape: Mapping[str, int]) -> Iterator[Problem]:
    """What the splash kernel is asked to take at once, a sequence or a device's chunk of one, is whole blocks."""
    if config.model.attention_kernel != "splash":
        return
    path, length, context = "model.attention_kernel", config.batch.sequence_length, config.sharding.context
    ways = 1 if isinstance(context, Ulysses) else length_shards(shape, config.sharding)
    parts = 2 * ways if ways > 1 and is_balanced(context) else ways
    unit = parts * KERNEL_BLOCK
    if length % unit:
        chunks = f" in each of {parts} chunks" if parts > 1 else ""
        message = f"splash takes blocks of {KERNEL_BLOCK} tokens{chunks}, and batch.sequence_length is {length}"
        hint = f"a sequence length that is a multiple of {unit}, or plain"
        yield Problem(path=path, message=message, hint=hint, code="kernel", value=length, limit=unit)
    windows = [block.attention.window for block in config.model.patterns if block.attention.window is not None]
    if ways > 1 and isinstance(context, Ring) and windows:
        message = f"splash takes no windows in a ring, and the model has one of {min(windows)}"
        yield Problem(path=path, message=message, hint="auto, or sharding.context: {type: gather}", code="kernel", value="splash")


def expert_kernel_fits(config: TrainConfig) -> Iterator[Problem]:
    """Where the megablox kernels are asked for, the matrices of all experts are whole tiles."""
    if config.model.expert_kernel != "megablox":
        return
    hidden = sorted({block.mlp.hidden for block in config.model.patterns if isinstance(block.mlp, Moe)})
    sizes = [("model.width", config.model.width), *(("hidden of the experts", size) for size in hidden)]
    if wrong := [f"{name} is {size}" for name, size in sizes if size % KERNEL_LANES]:
        message = f"megablox takes dims in multiples of {KERNEL_LANES}, and {', '.join(wrong)}"
        path, hint = "model.expert_kernel", "auto, or ragged_dot"
        yield Problem(path=path, message=message, hint=hint, code="kernel", value="megablox", limit=KERNEL_LANES)


def state_is_of_one_run(config: TrainConfig) -> Iterator[Problem]:
    """Replicas keep their optimizer state on the device."""
    if config.diloco is not None and config.optimizer.state_memory == "host":
        message = "host, but replicas of DiLoCo keep their state on the device"
        yield Problem(path="optimizer.state_memory", message=message, hint="device", code="state-memory", value="host")


def averages_are_there(config: TrainConfig) -> Iterator[Problem]:
    """An average is kept of parameters that move with every step, and evaluated where it is kept."""
    if config.ema is not None and config.diloco is not None:
        message = "the outer parameters of DiLoCo move at a sync only, and are an average of the replicas already"
        yield Problem(path="ema", message=message, hint="leave it out", code="ema")
    if config.ema is None and config.eval is not None and config.eval.weights == "ema":
        yield Problem(
            path="eval.weights", message="ema, but the run keeps no average", hint="add `ema: {decay: 0.999}`", code="ema", value="ema"
        )


def one_replica_reads_for_others(config: TrainConfig, shape: Mapping[str, int]) -> Iterator[Problem]:
    """There are others that have the same."""
    if config.checkpoint.restore == "all_replicas":
        return
    path, hint = "checkpoint.restore", "all_replicas, or leave it out"
    axes = [axis for axis in REPLICA_AXES if shape.get(axis, 1) > 1]
    if not axes:
        message = "one_replica, but data and diloco have one index each: nobody would have it passed on"
        yield Problem(path=path, message=message, hint=hint, code="restore", value="one_replica", limit=1)
    elif axes == ["data"] and config.sharding.optimizer == "over_data":
        message = "one_replica, but with sharding.optimizer: over_data every index of data keeps a part of its own"
        yield Problem(path=path, message=message, hint=hint, code="restore", value="one_replica", limit="as_weights")


def tiles_fit(config: TrainConfig, shape: Mapping[str, int]) -> Iterator[Problem]:
    """Tiles of the loss divide the tokens of a sequence that one device has."""
    tokens = config.batch.sequence_length // length_shards(shape, config.sharding)
    if tokens % config.loss.tiles:
        fitting = max(n for n in range(1, config.loss.tiles + 1) if tokens % n == 0)
        message = f"{config.loss.tiles} tiles do not divide the {tokens} tokens of a sequence that a device has"
        yield Problem(path="loss.tiles", message=message, hint=str(fitting), code="tiles", value=config.loss.tiles, limit=tokens)


def schedule_ends(config: TrainConfig) -> Iterator[Problem]:
    """Warm-up and decay lie inside the run."""
    schedule, steps = config.schedule, config.steps
    decay = schedule.decay_steps if isinstance(schedule, WarmupStableDecay) else 0
    if schedule.warmup_steps + decay > steps:
        what = f"{schedule.warmup_steps} warm-up steps" + (f" and {decay} decay steps" if decay else "")
        path = "schedule.warmup_steps"
        yield Problem(path=path, message=f"{what}, but the run has {steps}", hint="shorten them", code="schedule", limit=steps)
    if (
        isinstance(schedule, Cosine | Linear)
        and schedule.decay_until_step is not None
        and schedule.decay_until_step <= schedule.warmup_steps
    ):
        message = f"{schedule.decay_until_step} is not after the warm-up ({schedule.warmup_steps} steps)"
        yield Problem(path="schedule.decay_until_step", message=message, hint="leave it out", code="schedule", limit=schedule.warmup_steps)


def steps_are_reached(config: TrainConfig, *, processes: int) -> Iterator[Problem]:
    """Steps named in the config happen, on processes there are."""
    if config.eval is not None and config.eval.every_steps > config.steps:
        message = f"{config.eval.every_steps}, but the run has {config.steps} steps: it would never evaluate"
        yield Problem(path="eval.every_steps", message=message, hint="lower it, or remove `eval`", code="never", limit=config.steps)
    save = config.checkpoint
    if save.keep_every_steps is not None and save.keep_every_steps % save.every_steps:
        message = f"{save.keep_every_steps} is not a multiple of checkpoint.every_steps ({save.every_steps}), so those steps are not saved"
        hint = f"a multiple of {save.every_steps}"
        yield Problem(path="checkpoint.keep_every_steps", message=message, hint=hint, code="never", limit=save.every_steps)
    trace = config.profiler
    if trace is not None and trace.last_step >= config.steps:
        message = f"{trace.last_step}, but the last step is {config.steps - 1}"
        yield Problem(path="profiler.last_step", message=message, hint="trace earlier steps", code="never", limit=config.steps - 1)
    for index, process in enumerate(trace.processes if trace is not None else ()):
        if process >= processes:
            message = f"{process}, but the last process is {processes - 1}"
            yield Problem(path=f"profiler.processes.{index}", message=message, hint="0 is the primary", code="never", limit=processes - 1)


def tokenizer_fits(config: TrainConfig) -> Iterator[Problem]:
    """The bytes tokenizer's ids are in the vocabulary."""
    reads_text = any(not isinstance(source, Synthetic) for source in config.data.sources)
    if reads_text and isinstance(config.data.tokenizer, Bytes) and config.model.vocab_size < BYTES_VOCABULARY:
        message, hint = f"{config.model.vocab_size}, but the bytes tokenizer has {BYTES_VOCABULARY} ids", f"at least {BYTES_VOCABULARY}"
        yield Problem(path="model.vocab_size", message=message, hint=hint, code="vocabulary", limit=BYTES_VOCABULARY)


def evaluation_has_documents(config: TrainConfig) -> Iterator[Problem]:
    """What is evaluated is text that is held out; a synthetic source has no documents and makes its own."""
    data = config.data
    if config.eval is not None and not data.held_out and not any(isinstance(source, Synthetic) for source in data.sources):
        message, hint = "eval is set, but no document is held out for it (held_out is 0)", "set held_out, such as 0.01, or remove eval"
        yield Problem(path="data.held_out", message=message, hint=hint, code="held-out", value=0, limit="above 0")


def paths_are_usable(config: TrainConfig) -> Iterator[Problem]:
    """Well-formed folders or gs:// addresses."""
    for path, value in named_paths(config):
        if fault := path_fault(value):
            yield Problem(path=path, message=f"{value[:120]!r} {fault}", hint="a folder, or gs://bucket/folder", code="path", value=value)


def named_paths(config: TrainConfig) -> Sequence[tuple[str, str]]:
    """Every path in the config with its place in it."""
    found: list[tuple[str, str | None]] = [
        ("run_directory", config.run_directory),
        ("compile_cache", config.compile_cache),
        ("compiler.executable", config.compiler.executable),
        ("checkpoint.start_from", config.checkpoint.start_from),
        ("data.cache_directory", config.data.cache_directory),
    ]
    if not isinstance(config.data.tokenizer, Bytes):
        found.append(("data.tokenizer.path", config.data.tokenizer.path))
    for index, source in enumerate(config.data.sources):
        match source:
            case Text() | JsonLines() | Parquet() | ArrayRecord():
                found += [(f"data.sources.{index}.paths.{i}", path) for i, path in enumerate(source.paths)]
            case PythonStandardLibrary() | Synthetic():
                pass
    return [(path, value) for path, value in found if value is not None]
