"""Replicas that train apart: what they do between syncs, at a sync, and what passes between them."""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from tests.trainer.configs import config, layout, mixture, ragged_batch
from trainer.aot.hlo import Collective, regions
from trainer.aot.lower import lower_step
from trainer.checkpoint import Checkpoints
from trainer.config import TrainConfig
from trainer.config.checks import check_train
from trainer.config.diloco import DiLoCo, Part, fragment_parts, turns
from trainer.config.terms import eval_terms
from trainer.config.weights import weights
from trainer.contract import Exit
from trainer.export import export
from trainer.feed import Feed
from trainer.loss import LossSums
from trainer.parallel.diloco import synchronise
from trainer.parallel.sharding import Layout
from trainer.run import run as train
from trainer.state import StateSpec, describe_state, initial_state, state_items
from trainer.step import make_eval_step, make_train_step

TWO = ("mesh.ici.diloco=2", "mesh.ici.fsdp=2", "mesh.ici.tensor=2", "model.matmul_precision=highest", "schedule.warmup_steps=0")


def test_four_steps_of_a_linear_model_give_the_losses_computed_by_hand() -> None:
    rows = jnp.array([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    wanted = jnp.array([[1.0, 2.0], [2.0, 3.0]])
    outer = {"w": jnp.array([2.0, 1.0]), "b": jnp.array([1.0])}
    momentum = {name: jnp.zeros_like(value) for name, value in outer.items()}
    inner = {name: jnp.stack([value, value]) for name, value in outer.items()}
    settings = DiLoCo(sync_every_steps=3, outer_learning_rate=1.0, outer_momentum=0.9)
    parts = ((Part("w"), Part("b")),)

    def loss(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(x @ params["w"] + params["b"] - y))

    losses = []
    for done in range(1, 5):
        values, gradients = jax.vmap(jax.value_and_grad(loss))(inner, rows, wanted)
        losses.append(float(values[0]))
        inner = jax.tree.map(lambda p, g: p - 0.1 * g, inner, gradients)
        outer, momentum, inner = synchronise(settings, parts, outer, momentum, inner, jnp.int32(done))
    np.testing.assert_allclose(losses, [1.0, 0.49, 0.2401, 0.207543725], rtol=0, atol=1e-6)


@cache
def built(run_config: str, devices: int) -> tuple[Layout, StateSpec, jax.stages.Compiled]:
    """Compiled once for all that is asked of a config; it takes no batch or state of another shape or layout."""
    parsed = TrainConfig.model_validate_json(run_config)
    where = layout(parsed, devices)
    spec, lowered = lower_step(parsed, where)
    return where, spec, lowered.compile()


def run(run_config: TrainConfig, steps: int, devices: int = 8, rows: slice = slice(None)):
    """Yields the state's items (numpy) and metrics after each step, the first time before any."""
    where, spec, step = built(run_config.model_dump_json(), devices)
    state = initial_state(run_config, spec)
    feed = Feed(where.of_batch(run_config), run_config.batch.global_batch, run_config.batch.sequence_length)
    yield jax.tree.map(np.asarray, state_items(state)), {}
    for n in range(steps):
        state, metrics = step(state, feed({name: value[rows] for name, value in ragged_batch(n).items()}))
        yield jax.tree.map(np.asarray, state_items(state)), jax.tree.map(np.asarray, metrics)


def close(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], tolerance: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_allclose(value, theirs[path], rtol=0, atol=tolerance, err_msg=path)


def test_one_replica_with_outer_rate_one_and_no_momentum_trains_as_without() -> None:
    alone = ("mesh.ici.fsdp=4", "mesh.ici.tensor=2", "model.matmul_precision=highest")
    plain = run(config(*alone), 5)
    replicated = run(config(*alone, diloco={"sync_every_steps": 2, "outer_learning_rate": 1.0, "outer_momentum": 0.0}), 5)
    for n, ((one, expected), (other, metrics)) in enumerate(zip(plain, replicated, strict=True)):
        if n:
            np.testing.assert_allclose(metrics["loss"], [expected["loss"]], rtol=1e-6)
        close({path: value[0] for path, value in other["replicas"].items()}, own(one))
        if n % 2 == 0:
            close(other["params"], one["params"])


def own(items) -> dict[str, np.ndarray]:
    """Of a run without replicas, what a replica has of its own."""
    model = {f"model/{path}": value for path, value in items["params"].items()}
    return model | {f"optimizer/opt_state/{path}": value for path, value in items["opt"].items()}


NESTEROV: Any = {"diloco": {"sync_every_steps": 3, "outer_learning_rate": 0.6, "outer_momentum": 0.9}, "steps": 21, "loss": {"tiles": 2}}


def test_replicas_train_like_two_runs_of_their_own_and_meet_as_nesterov_momentum_says() -> None:
    together = [items for items, _ in run(config(*TWO, **NESTEROV), 4)]
    alone = ("mesh.ici.fsdp=2", "mesh.ici.tensor=2", "model.matmul_precision=highest", "schedule.warmup_steps=0", "batch.global_batch=4")
    half = [[own(items) for items, _ in run(config(*alone, "steps=21"), 3, devices=4, rows=slice(4 * r, 4 * r + 4))] for r in range(2)]
    for n in range(3):
        for r in range(2):
            close({path: value[r] for path, value in together[n]["replicas"].items()}, half[r][n], 2e-6)

    outer = {path: jnp.asarray(value) for path, value in together[0]["params"].items()}
    moved = {path: value - (half[0][3][f"model/{path}"] + half[1][3][f"model/{path}"]) / 2 for path, value in outer.items()}
    optimizer = optax.sgd(0.6, momentum=0.9, nesterov=True)
    met = optax.apply_updates(outer, optimizer.update(moved, optimizer.init(outer))[0])
    close(together[3]["params"], {path: np.asarray(value) for path, value in met.items()}, 2e-6)
    for n in (1, 2, 4):
        close(together[n]["params"], together[n - 1]["params"], 0)
    for path, value in together[3]["params"].items():
        replicas = together[3]["replicas"][f"model/{path}"]
        np.testing.assert_array_equal(replicas, np.broadcast_to(value, replicas.shape))
    for r in range(2):
        optimizer_alone = {path: value for path, value in half[r][3].items() if path.startswith("optimizer/")}
        close({path: together[3]["replicas"][path][r] for path in optimizer_alone}, optimizer_alone, 2e-6)


def test_the_step_of_the_outer_parameters_is_that_of_optax_along_the_mean_of_what_replicas_moved() -> None:
    random = np.random.default_rng(0)
    settings = DiLoCo(sync_every_steps=1, outer_learning_rate=0.7, outer_momentum=0.8)
    outer = {"w": jnp.asarray(random.normal(size=(3, 5)))}
    momentum, inner = {"w": jnp.zeros((3, 5))}, {"w": jnp.zeros((4, 3, 5))}
    theirs, optimizer = outer, optax.sgd(0.7, momentum=0.8, nesterov=True)
    state = optimizer.init(theirs)
    for done in range(1, 4):
        moved = random.normal(size=(4, 3, 5))
        inner = {"w": outer["w"][None] + moved}
        updates, state = optimizer.update({"w": -jnp.asarray(moved.mean(0))}, state)
        theirs = optax.apply_updates(theirs, updates)
        outer, momentum, inner = synchronise(settings, ((Part("w"),),), outer, momentum, inner, jnp.int32(done))
        np.testing.assert_allclose(outer["w"], theirs["w"], atol=1e-6)
        np.testing.assert_array_equal(inner["w"], np.broadcast_to(outer["w"], (4, 3, 5)))


def test_what_moves_beside_the_gradient_has_no_momentum_and_becomes_the_mean_of_the_replicas() -> None:
    """Such as the bias of a router; here of two layers, of which one is in the fragment."""
    random = np.random.default_rng(0)
    outer, inner = {"bias": jnp.asarray(random.normal(size=(2, 5)))}, {"bias": jnp.asarray(random.normal(size=(4, 2, 5)))}
    settings = DiLoCo(sync_every_steps=1, outer_learning_rate=0.7, outer_momentum=0.8)
    met, momentum, after = synchronise(settings, ((Part("bias", (1,)),),), outer, {}, inner, jnp.int32(1))
    assert not momentum
    np.testing.assert_array_equal(met["bias"][0], outer["bias"][0])
    np.testing.assert_allclose(met["bias"][1], inner["bias"][:, 1].mean(0), rtol=1e-6)
    np.testing.assert_array_equal(after["bias"][:, 0], inner["bias"][:, 0])
    np.testing.assert_array_equal(after["bias"][:, 1], np.broadcast_to(met["bias"][1], (4, 5)))


STREAMING = {"sync_every_steps": 4, "fragments": 2, "delay_steps": 1, "blend": 0.25, "outer_learning_rate": 0.5}


def test_streaming_syncs_a_fragment_at_its_turn_and_replicas_take_it_blended_after_the_delay() -> None:
    found = [items for items, _ in run(config(*TWO, diloco=STREAMING), 9)]
    layers = [path for path in found[0]["params"] if path.startswith("segments/")]
    for n in range(1, 10):
        changed = {path for path, value in found[n]["params"].items() if not np.array_equal(value, found[n - 1]["params"][path])}
        wanted = {2: set(found[0]["params"]) - set(layers), 0: set(layers)}.get(n % 4, set())
        assert changed == wanted, n
        apart = {path for path in changed for value in [found[n]["replicas"][f"model/{path}"]] if np.array_equal(value[0], value[1])}
        assert not apart


def test_replicas_exchange_nothing_but_in_a_sync() -> None:
    assert_apart(config(*TWO, **NESTEROV))


APART = {
    "once in four steps": lambda: config(*TWO, diloco={"sync_every_steps": 4}),
    "streaming": lambda: config(*TWO, diloco=STREAMING),
    "context": lambda: config("mesh.ici={diloco: 2, context: 2, fsdp: 2}", "sharding.context={type: ring}", diloco={"sync_every_steps": 4}),
    "pipeline": lambda: config("mesh.ici={diloco: 2, stage: 2, fsdp: 2}", "pipeline={}", diloco={"sync_every_steps": 4}),
    "experts": lambda: mixture("mesh.ici={diloco: 2, expert: 2, fsdp: 2}", "model.multi_token={depth: 1}", diloco={"sync_every_steps": 4}),
    "optimizer over data": lambda: config(
        "mesh.ici={diloco: 2, data: 2, fsdp: 2}", "sharding.optimizer=over_data", "batch.accumulation=2", diloco={"sync_every_steps": 4}
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("form", APART)
def test_nor_do_they_in_other_forms(form: str) -> None:
    assert_apart(APART[form]())


def assert_apart(run_config: TrainConfig) -> None:
    text = built(run_config.model_dump_json(), 8)[2].as_text()
    assert text is not None
    found = [collective for region in regions(text, 8) for collective in region.collectives]
    crossing = [collective for collective in found if _crosses(collective)]
    assert len(found) > len(crossing) > 0
    assert not [collective for collective in crossing if not re.search(r"branch_[1-9]\d*_fun", collective.op_name)]


def _crosses(collective: Collective) -> bool:
    """Of 8 partitions, those of replica r are 4 r to 4 r + 3."""
    if collective.pairs:
        return any(source // 4 != target // 4 for source, target in collective.pairs)
    return len({index // 4 for index in collective.group or range(8)}) > 1


@pytest.mark.full
def test_evaluation_is_that_of_the_outer_parameters() -> None:
    run_config = config("mesh.ici.diloco=2", "mesh.ici.fsdp=4", diloco={"sync_every_steps": 5})
    where = layout(run_config)
    spec = describe_state(run_config, where)
    feed = Feed(where.of_batch(run_config), 8, 16)
    state, step = initial_state(run_config, spec), make_train_step(run_config, spec, where)
    evaluate = make_eval_step(run_config, spec, where)
    sums = [evaluate(state, LossSums.zero(()), feed(ragged_batch(7)))]
    state, _ = step(state, feed(ragged_batch(0)))
    sums.append(evaluate(state, LossSums.zero(()), feed(ragged_batch(7))))
    assert float(sums[0].cross_entropy) == float(sums[1].cross_entropy) > 0


@given(st.integers(1, 6), st.sampled_from(["strided", "sequential"]), st.sampled_from(["scan", "unroll"]))
def test_every_layer_of_every_weight_is_in_exactly_one_fragment(fragments: int, order: str, form: str) -> None:
    model = config(f"model.layers={form}", "model.segments.0.repeats=5").model
    found = fragment_parts(model, DiLoCo(sync_every_steps=60, fragments=fragments, layers=order))
    assert len(found) == fragments and all(found)
    held = [(part.path, layer) for parts in found for part in parts for layer in (part.layers or (None,))]
    assert len(held) == len(set(held))
    for weight in weights(model):
        layers = {layer for path, layer in held if path == weight.path}
        assert layers in ({None}, set(range(weight.shape[0])))


@given(st.integers(1, 8), st.integers(1, 12), st.data())
def test_a_fragment_is_sent_and_taken_once_in_every_round(fragments: int, distance: int, data) -> None:
    every = fragments * distance
    settings = DiLoCo(sync_every_steps=every, fragments=fragments, delay_steps=data.draw(st.integers(0, every - 1)))
    order = turns(settings)
    for turn in (order.sends, order.takes):
        assert sorted(fragment for fragment in turn if fragment is not None) == list(range(fragments))
    for fragment in range(fragments):
        assert (order.takes.index(fragment) - order.sends.index(fragment)) % every == settings.delay_steps


def test_a_resumed_run_ends_with_the_same_bits_and_twice_as_many_replicas_start_from_the_saved_ones_in_turn(tmp_path: Path) -> None:
    changes = {
        "diloco": {"sync_every_steps": 2},
        "steps": 4,
        "checkpoint": {"every_steps": 3, "keep_every_steps": 3},
        "metrics": {"writers": ["jsonl"]},
        "data": {"sources": [{"type": "synthetic", "distinct_batches": 4}]},
    }
    mesh = ("mesh.ici.diloco=2", "mesh.ici.fsdp=4")
    run_config = config(*mesh, run_directory=str(tmp_path), **changes)
    assert train(run_config) == Exit.DONE
    saved = Checkpoints(run_config.checkpoint, str(tmp_path))
    wanted = state_items(describe_state(run_config, layout(run_config)).abstract)
    uninterrupted = jax.tree.map(np.asarray, saved.restore(4, wanted))

    shutil.rmtree(tmp_path / "checkpoints" / "4")
    assert train(run_config) == Exit.DONE
    resumed = jax.tree.map(np.asarray, Checkpoints(run_config.checkpoint, str(tmp_path)).restore(4, wanted))
    jax.tree.map(np.testing.assert_array_equal, resumed, uninterrupted)
    lines = [json.loads(line) for line in (tmp_path / "metrics" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == [0, 1, 2, 3, 3]
    assert all(np.isclose(line["loss"], (line["replica_0_loss"] + line["replica_1_loss"]) / 2) for line in steps)

    export(str(tmp_path), str(tmp_path / "merged"), form="parameters")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == resumed["params"].keys()
    for path, value in merged.items():
        np.testing.assert_array_equal(value, resumed["params"][path], err_msg=path)

    four = config("mesh.ici.diloco=4", "mesh.ici.fsdp=2", run_directory=str(tmp_path), **changes)
    onto = saved.restore(3, state_items(describe_state(four, layout(four)).abstract))
    three = jax.tree.map(np.asarray, saved.restore(3, wanted))
    for path, value in onto["replicas"].items():
        np.testing.assert_array_equal(np.asarray(value), three["replicas"][path][[0, 1, 0, 1]])
    assert any(not np.array_equal(value[0], value[1]) for value in three["replicas"].values())


@pytest.mark.full
@pytest.mark.parametrize("mesh", ["fsdp: 4", "fsdp: 2, expert: 2", "context: 2, tensor: 2"])
def test_modules_that_look_ahead_and_tiles_give_what_replicas_on_one_device_each_have(mesh: str) -> None:
    found: list[Any] = []
    for axes, devices in (("fsdp: 1", 2), (mesh, 8)):
        run_config = mixture(
            f"mesh.ici={{diloco: 2, {axes}}}", "model.multi_token={depth: 1}", "loss.tiles=2", "loss.load_balance_weight=0.1",
            "sharding.unsharded_limit=1", diloco={"sync_every_steps": 2}, optimizer={"type": "sgd", "momentum": 0.0, "clip_norm": None},
        )  # fmt: skip
        where = layout(run_config, devices)
        spec, terms = describe_state(run_config, where), eval_terms(run_config)
        feed = Feed(where.of_batch(run_config), 8, 16)
        zero = jax.device_put(LossSums.zero(terms), where.replicated)
        state = initial_state(run_config, spec)
        sums = make_eval_step(run_config, spec, where)(state, zero, feed(ragged_batch(1)))
        state, metrics = make_train_step(run_config, spec, where)(state, feed(ragged_batch(0)))
        found.append(jax.tree.map(np.asarray, ({**metrics}, {**sums.terms}, {**state_items(state)["replicas"]})))
    assert found[0][0]["multi_token_1"].min() > 0
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            np.testing.assert_allclose(other[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.full
def test_a_run_goes_on_with_more_replicas_with_fewer_and_with_one(tmp_path: Path) -> None:
    for number, (replicas, rest) in enumerate(((2, 4), (4, 2), (2, 4), (1, 8)), 1):
        run_config = config(
            f"mesh.ici={{diloco: {replicas}, fsdp: {rest}}}",
            run_directory=str(tmp_path),
            steps=2 * number,
            diloco={"sync_every_steps": 2},
            schedule={"type": "constant", "learning_rate": 1e-3},
            checkpoint={"every_steps": 1},
            metrics={"writers": ["jsonl"]},
        )
        assert train(run_config) == Exit.DONE
        if number == 2:  # the next begins within a round
            shutil.rmtree(tmp_path / "checkpoints" / "4")
    lines = [json.loads(line) for line in (tmp_path / "metrics" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == [0, 1, 2, 3, 3, 4, 5, 6, 7]
    assert [sum(name.startswith("replica_") for name in line) for line in steps] == [2, 2, 4, 4, 2, 2, 2, 1, 1]
    assert all(np.isfinite(line["loss"]) for line in steps)


@pytest.mark.parametrize(
    ("changes", "overrides", "path"),
    [
        ({}, ("mesh.ici.diloco=2",), "mesh.ici.diloco"),
        ({"diloco": {"sync_every_steps": 3}}, (), "steps"),
        ({"diloco": {"sync_every_steps": 4, "fragments": 3}}, (), "diloco.fragments"),
        ({"diloco": {"sync_every_steps": 4, "fragments": 4}}, (), "diloco.fragments"),
        ({"diloco": {"sync_every_steps": 4, "delay_steps": 4}}, (), "diloco.delay_steps"),
        ({"diloco": {"sync_every_steps": 4, "blend": 0.5}}, (), "diloco.blend"),
        (
            {"diloco": {"sync_every_steps": 4}, "batch": {"global_batch": 12, "sequence_length": 16}},
            ("mesh.ici.diloco=8",),
            "batch.global_batch",
        ),
    ],
)
def test_what_cannot_be_synced_is_refused_where_it_was_written(changes, overrides, path: str) -> None:
    with_axes = config("mesh.ici.fsdp=-1", *overrides, **changes)
    found = check_train(with_axes, slices=1, devices_per_slice=8, processes=1)
    assert path in [problem.path for problem in found]
