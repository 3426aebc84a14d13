"""The step's value does not depend on how the work is spread: mesh, accumulation, layer form, remat."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer.configs import config, layout, put, ragged_batch
from trainer.config.weights import split_repeat
from trainer.loss import LossSums
from trainer.state import describe_state, initial_state, state_items
from trainer.step import make_eval_step, make_train_step

STEPS = 20
VARIANTS = {
    "dp8": ("mesh.ici.data=8", "mesh.ici.fsdp=1"),
    "fsdp8": (),
    "dp2 fsdp2 tp2": ("mesh.ici.data=2", "mesh.ici.fsdp=2", "mesh.ici.tensor=2"),
    "fsdp4 tp2": ("mesh.ici.fsdp=4", "mesh.ici.tensor=2"),
    "accumulation 2": ("mesh.ici.fsdp=4", "mesh.ici.tensor=2", "batch.accumulation=2"),
    "accumulation 4": ("mesh.ici.fsdp=2", "mesh.ici.tensor=4", "batch.accumulation=4"),
    "unrolled": ("model.layers=unroll",),
    "remat none": ("model.remat=none",),
    "remat minimal": ("model.remat=minimal",),
    "remat dots": ("model.remat=dots",),
    "fsdp2 fsdp_transpose2 tp2": ("mesh.ici.fsdp=2", "mesh.ici.fsdp_transpose=2", "mesh.ici.tensor=2"),
    "fsdp4 tensor_sequence2": ("mesh.ici.fsdp=4", "mesh.ici.tensor_sequence=2"),
    "fsdp2 context2 tp2": ("mesh.ici.fsdp=2", "mesh.ici.context=2", "mesh.ici.tensor=2"),
    "fsdp4 expert2": ("mesh.ici.fsdp=4", "mesh.ici.expert=2"),
    "dp4 fsdp2 over data": ("mesh.ici.data=4", "mesh.ici.fsdp=2", "sharding.optimizer=over_data"),
}
RARE = {"accumulation 2", "remat none", "remat dots", *[*VARIANTS][-5:]}
"""Only in the long run."""


def train(*overrides: str, devices: int = 8) -> tuple[dict[str, np.ndarray], list[float]]:
    """Initial parameters by stacked path and repeat, and the losses of STEPS different ragged batches."""
    run = config("model.matmul_precision=highest", *overrides)
    where = layout(run, devices)
    spec = describe_state(run, where)
    state = initial_state(run, spec)
    initial = {}
    for path, value in state_items(state)["params"].items():
        stacked, repeat = split_repeat(path)
        layers = [(repeat, value)] if repeat is not None else enumerate(value) if stacked.startswith("segments/") else [(0, value)]
        initial.update({f"{stacked}#{index}": np.asarray(layer) for index, layer in layers})
    step = make_train_step(run, spec, where)
    losses = []
    for n in range(STEPS):
        state, metrics = step(state, put(ragged_batch(n), where))
        losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1
    return initial, losses


@pytest.fixture(scope="module")
def reference() -> tuple[dict[str, np.ndarray], list[float]]:
    return train(devices=1)


@pytest.mark.parametrize("variant", [pytest.param(name, marks=pytest.mark.full) if name in RARE else name for name in VARIANTS])
def test_the_first_parameters_are_bitwise_equal_and_twenty_losses_agree_with_one_device(variant: str, reference) -> None:
    initial, losses = train(*VARIANTS[variant])
    assert initial.keys() == reference[0].keys()
    for name, value in reference[0].items():
        np.testing.assert_array_equal(initial[name], value, err_msg=name)
    np.testing.assert_allclose(losses, reference[1], rtol=1e-5)


def test_the_loss_falls_on_a_batch_seen_again() -> None:
    run = config()
    where = layout(run)
    spec = describe_state(run, where)
    state, step, batch = initial_state(run, spec), make_train_step(run, spec, where), put(ragged_batch(0), where)
    state, first = step(state, batch)
    for _ in range(10):
        state, last = step(state, batch)
    assert float(last["loss"]) < float(first["loss"]) - 0.1


def test_the_state_is_donated_and_every_array_keeps_its_sharding() -> None:
    run = config()
    where = layout(run)
    spec = describe_state(run, where)
    state = initial_state(run, spec)
    after, _ = make_train_step(run, spec, where)(state, put(ragged_batch(0), where))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert jax.tree.all(jax.tree.map(lambda leaf, wanted: leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim), after, spec.abstract))


def test_evaluation_sums_equal_the_training_loss_of_the_same_parameters() -> None:
    run = config("loss.z_loss_weight=0.01")
    where = layout(run)
    spec = describe_state(run, where)
    state, batch = initial_state(run, spec), put(ragged_batch(3), where)
    sums = jax.device_put(LossSums.zero(), where.replicated)
    for _ in range(2):
        sums = make_eval_step(run, spec, where)(state, sums, batch)
    _, metrics = make_train_step(run, spec, where)(state, batch)
    np.testing.assert_allclose(float(sums.total / sums.tokens), float(metrics["loss"]), rtol=1e-6)
    np.testing.assert_allclose(float(sums.tokens), 2 * float(metrics["tokens"]))
    assert float(metrics["z_loss"]) > 0


def test_a_batch_without_a_valid_token_gives_loss_zero_and_no_nan() -> None:
    run = config()
    where = layout(run)
    spec = describe_state(run, where)
    batch = ragged_batch(0)
    batch["weights"] = np.zeros_like(batch["weights"])
    state, metrics = make_train_step(run, spec, where)(initial_state(run, spec), put(batch, where))
    assert float(metrics["loss"]) == 0 and float(metrics["gradient_norm"]) == 0
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state))
