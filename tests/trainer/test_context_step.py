"""Whole steps on split sequences: the loss of one device, memory that falls with the axis, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer.configs import BATCH, LENGTH, config, layout, mixture, put, ragged_batch
from tests.trainer.model.models import random_params
from trainer.aot.lower import compile_step
from trainer.config import TrainConfig
from trainer.config.checks import check_train
from trainer.config.context import balanced_order
from trainer.config.model import Moe
from trainer.config.terms import eval_terms
from trainer.decode.engine import Engine
from trainer.decode.sampling import Sampling
from trainer.loss import LossSums
from trainer.model.moe import with_capacity
from trainer.model.multi_token import ahead
from trainer.model.routing import route
from trainer.parallel.context import as_stored, balance
from trainer.parallel.sharding import use_layout
from trainer.state import describe_state, initial_state
from trainer.step import make_eval_step, make_train_step

RING, ULYSSES = "sharding.context={type: ring}", "sharding.context={type: ulysses}"
HEADS = "model.segments.0.pattern.0.attention.heads"
SPLASH = "model.attention_kernel=splash"
UNBALANCED = "sharding.context={type: gather, balanced: false}"


def problems(run: TrainConfig, devices: int) -> list[Any]:
    return list(check_train(run, slices=1, devices_per_slice=devices, processes=1))


def evaluation(run: TrainConfig, devices: int) -> dict[str, float]:
    """Sums of an evaluation of the first parameters on a ragged batch."""
    assert problems(run, devices) == []
    where = layout(run, devices)
    spec = describe_state(run, where)
    zero = jax.device_put(LossSums.zero(eval_terms(run)), where.replicated)
    sums = make_eval_step(run, spec, where)(initial_state(run, spec), zero, put(ragged_batch(2), where))
    return {name: float(value) for name, value in {"cross_entropy": sums.cross_entropy, "tokens": sums.tokens, **sums.terms}.items()}


def steps(run: TrainConfig, devices: int) -> dict[str, float]:
    """Metrics of two steps on ragged batches."""
    assert problems(run, devices) == []
    where = layout(run, devices)
    spec = describe_state(run, where)
    state, step = initial_state(run, spec), make_train_step(run, spec, where)
    found: dict[str, float] = {}
    for n in range(2):
        state, metrics = step(state, put(ragged_batch(n), where))
        found |= {f"{name} {n}": float(value) for name, value in metrics.items() if value.ndim == 0}
    return found


def assert_same(found: dict[str, float], wanted: dict[str, float]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def plain(*overrides: str) -> TrainConfig:
    return config("model.matmul_precision=highest", "model.segments.0.pattern.0.attention.window=5", *overrides)


def everything(*overrides: str) -> TrainConfig:
    """What looks at the order of tokens: modules that look ahead, experts whose room is taken in order; dropout."""
    return mixture(
        "model.multi_token={depth: 2}", "model.dropout=0.1", "loss.load_balance_weight=0.1", "sharding.unsharded_limit=0.2", *overrides,
        pattern="sparse", mlp={"dispatch": {"type": "capacity", "factor": 0.8}},
    )  # fmt: skip


@pytest.fixture(scope="module")
def one_device() -> dict[str, float]:
    return steps(plain("mesh.ici.fsdp=1"), 1)


@pytest.mark.full
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("mesh.ici={context: 2}",), id="gather-of-two"),
        pytest.param(("mesh.ici={context: 4}", RING), id="ring-of-four"),
        pytest.param(("mesh.ici={context: 8, fsdp: 1}", UNBALANCED), id="gather-of-eight-unbalanced"),
        pytest.param(("mesh.ici={fsdp: 2, context: 2, tensor: 2}", ULYSSES), id="ulysses"),
        pytest.param(("mesh.ici={context: 4, fsdp: 2}", RING, "batch.accumulation=2"), id="ring-accumulated"),
        pytest.param(("mesh.ici={stage: 2, context: 2, fsdp: 2}", "pipeline={}"), id="pipeline"),
        pytest.param(("mesh.ici={stage: 2, context: 4}", "pipeline={}", RING), id="ring-in-a-pipeline"),
        pytest.param(("mesh.ici={context: 2}", RING, "loss.tiles=2", "model.remat=none"), id="tiles"),
    ],
)
def test_steps_on_split_sequences_are_those_of_one_device(overrides: tuple[str, ...], one_device: dict[str, float]) -> None:
    run = plain(*overrides)
    assert_same(steps(run, int(np.prod(list(run.mesh.ici.by_axis().values())))), one_device)


@pytest.mark.full
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("mesh.ici={context: 2, tensor: 2}",), id="gather"),
        pytest.param(("mesh.ici={context: 4}", RING), id="ring"),
        pytest.param(("mesh.ici={expert: 2, context: 2}",), id="expert"),
    ],
)
def test_steps_that_look_ahead_fill_experts_in_order_and_drop_do_not_depend_on_where_tokens_lie(overrides: tuple[str, ...]) -> None:
    assert_same(steps(everything(*overrides), 4), steps(everything("mesh.ici.fsdp=1"), 1))


@pytest.mark.full
def test_an_evaluation_that_looks_ahead_and_fills_experts_in_order_does_not_depend_on_where_tokens_lie() -> None:
    """Its sums, and what was accepted of the drafts, over four shards in balanced order."""
    assert_same(evaluation(everything("mesh.ici={context: 4}"), 4), evaluation(everything("mesh.ici.fsdp=1"), 1))


LATENT = {"type": "latent", "heads": 4, "key_value_rank": 8, "plain_dim": 8, "rope_dim": 4, "value_dim": 6}


@pytest.mark.full
@pytest.mark.parametrize("method", ["gather", "ring", "ulysses"])
def test_latent_attention_on_split_sequences_is_that_of_one_device(method: str) -> None:
    latent = f"model.segments=[{{repeats: 1, pattern: [{{attention: {json.dumps(LATENT)}, mlp: {{hidden: 48}}}}]}}]"
    one, split = (
        config("model.matmul_precision=highest", "sharding.unsharded_limit=0.5", latent, *overrides)
        for overrides in (("mesh.ici.fsdp=1",), ("mesh.ici={context: 2}", f"sharding.context={{type: {method}}}"))
    )
    assert_same(evaluation(split, 2), evaluation(one, 1))


@pytest.mark.full
def test_replicas_whose_sequences_are_split_have_the_losses_of_replicas_on_one_device_each() -> None:
    found: list[np.ndarray] = []
    for mesh, devices in (("mesh.ici={diloco: 2, fsdp: 1}", 2), ("mesh.ici={diloco: 2, fsdp: 1, context: 2}", 4)):
        run = config("model.matmul_precision=highest", mesh, diloco={"sync_every_steps": 2})
        assert problems(run, devices) == []
        where = layout(run, devices)
        spec = describe_state(run, where)
        _, metrics = make_train_step(run, spec, where)(initial_state(run, spec), put(ragged_batch(0), where.of_batch(run)))
        found.append(np.asarray(metrics["loss"]))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


@pytest.mark.full
def test_a_prompt_on_a_mesh_that_splits_sequences_leaves_the_logits_of_one_device() -> None:
    run = config("model.matmul_precision=highest")
    params = random_params(run.model)
    found: list[np.ndarray] = []
    for ways in (1, 4):
        engine = Engine(run.model, params, layout(config(f"mesh.ici={{context: {ways}}}"), ways), slots=1, max_length=32)
        prefix = engine.prefill([3, 1, 4, 1, 5, 9, 2, 6, 5], max_tokens=2, sampling=Sampling())
        _, step = engine.generate(engine.insert(engine.empty(), prefix, 0))
        found.append(np.concatenate([np.asarray(prefix.logits), np.asarray(step.logits)]))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("method", ["gather", "ring", "ulysses"])
def test_memory_of_activations_falls_with_the_axis(method: str) -> None:
    """One sequence over 1, 2, 4 devices: what a step needs beside its arguments halves each time, nearly."""
    found = []
    for ways in (1, 2, 4):
        run = plain(
            f"mesh.ici={{context: {ways}}}", f"sharding.context={{type: {method}}}", "batch.global_batch=1", "batch.sequence_length=1024"
        )
        stats = compile_step(run, layout(run, ways)).step.memory_analysis()
        assert stats is not None
        found.append(stats.temp_size_in_bytes)
    assert found[1] < 0.6 * found[0] and found[2] < 0.6 * found[1], found


@pytest.mark.parametrize(
    ("overrides", "path", "value", "limit", "words"),
    [
        (("batch.sequence_length=20",), "batch.sequence_length", 20, 8, "cannot be cut into 8 chunks"),
        (
            (ULYSSES, "mesh.ici.fsdp=1", "mesh.ici.tensor=2"),
            "model.segments.0.pattern.0.attention.heads",
            4,
            4,
            "ulysses divides the 2 heads",
        ),
        ((SPLASH,), "model.attention_kernel", 16, 1024, "in each of 8 chunks"),
        (
            ("model.attention_kernel=splash", "batch.sequence_length=1024", RING),
            "model.attention_kernel",
            "splash",
            None,
            "takes no windows",
        ),
    ],
    ids=["chunks", "heads", "kernel-blocks", "kernel-windows"],
)
def test_what_cannot_be_split_is_refused_with_the_arithmetic(
    overrides: tuple[str, ...], path: str, value: Any, limit: int | None, words: str
) -> None:
    found = problems(plain(*(("mesh.ici={context: 4, fsdp: 2}", *overrides))), 8)
    assert [(problem.path, problem.value, problem.limit) for problem in found] == [(path, value, limit)], found
    assert words in found[0].message and found[0].hint


def test_a_balanced_batch_has_two_ends_of_the_row_on_each_shard_and_what_goes_by_order_is_as_before() -> None:
    """Looking ahead, and the room that experts have in order of tokens."""
    run = everything("mesh.ici={context: 4}")
    where, natural = layout(run, 4), ragged_batch(0)
    moe = run.model.blocks[-1].mlp
    assert isinstance(moe, Moe)
    x_BTD = np.random.default_rng(0).normal(size=(BATCH, LENGTH, 4)).astype(np.float32)
    experts = {name: jnp.ones((moe.experts, 4, 4)) for name in ("gate", "up", "down")}
    logits = np.random.default_rng(1).normal(size=(BATCH, LENGTH, moe.experts)).astype(np.float32)

    def by_order(batch: dict[str, jax.Array], x_BTD: jax.Array, logits: jax.Array) -> tuple[Any, ...]:
        batch = balance(batch)
        mixed, dropped = with_capacity(as_stored(x_BTD), route(as_stored(logits), moe), batch["segments"] != 0, experts, moe, 0.5)
        return batch["inputs"], ahead(batch["inputs"], 3), mixed, dropped

    wanted = jax.jit(by_order)(natural, x_BTD, logits)
    with use_layout(where.in_steps(run)):
        stored = jax.jit(by_order)(put(natural, where), x_BTD, logits)
    shards = {shard.index[1].start or 0: np.asarray(shard.data) for shard in stored[0].addressable_shards}
    chunks = np.split(natural["inputs"], 8, axis=1)
    for shard in range(4):
        np.testing.assert_array_equal(shards[shard * LENGTH // 4], np.concatenate([chunks[shard], chunks[7 - shard]], axis=1))
    back = np.argsort(np.concatenate([[2 * chunk, 2 * chunk + 1] for chunk in balanced_order(4)]))
    for found, expected in zip(stored[:3], wanted[:3], strict=True):
        np.testing.assert_allclose(np.asarray(found)[:, back], expected, rtol=1e-6)
    assert float(stored[3]) == float(wanted[3]) > 0


def test_sequences_that_balance_does_not_divide_are_taken_without_it() -> None:
    assert problems(plain("mesh.ici={context: 4, fsdp: 2}", "batch.sequence_length=20", UNBALANCED), 8) == []
