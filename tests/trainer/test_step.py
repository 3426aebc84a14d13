"""The step's value does not depend on how the work is spread: mesh, accumulation, layer form, remat."""

from __future__ import annotations

from functools import cache
from typing import Any

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
RARE = {"fsdp4 tp2", "accumulation 2", "remat none", "remat minimal", "remat dots", *[*VARIANTS][-5:]}
"""Only in the long run."""


class Program:
    """A run's step, compiled once for all tests of this file, and its state before the first step."""

    def __init__(self, overrides: tuple[str, ...], devices: int) -> None:
        self.config = config("model.matmul_precision=highest", "loss.z_loss_weight=0.01", *overrides)
        self.layout = layout(self.config, devices)
        self.spec = describe_state(self.config, self.layout)
        self.step: Any = make_train_step(self.config, self.spec, self.layout)
        self._first = jax.device_get(initial_state(self.config, self.spec))

    def first(self) -> Any:
        return jax.device_put(self._first, self.spec.shardings, may_alias=False)


def program(*overrides: str, devices: int = 8) -> Program:
    return built(overrides, devices)


built = cache(Program)


def train(*overrides: str, devices: int = 8) -> tuple[dict[str, np.ndarray], list[float]]:
    """Initial parameters by stacked path and repeat, and the losses of STEPS different ragged batches."""
    run = program(*overrides, devices=devices)
    state = run.first()
    initial = {}
    for path, value in state_items(state)["params"].items():
        stacked, repeat = split_repeat(path)
        layers = [(repeat, value)] if repeat is not None else enumerate(value) if stacked.startswith("segments/") else [(0, value)]
        initial.update({f"{stacked}#{index}": np.asarray(layer) for index, layer in layers})
    losses = []
    for n in range(STEPS):
        state, metrics = run.step(state, put(ragged_batch(n), run.layout))
        losses.append(float(metrics["loss"]))
    assert run.step._cache_size() == 1
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
    run = program()
    batch = put(ragged_batch(0), run.layout)
    state, first = run.step(run.first(), batch)
    for _ in range(10):
        state, last = run.step(state, batch)
    assert float(last["loss"]) < float(first["loss"]) - 0.1


def test_the_state_is_donated_and_every_array_keeps_its_sharding() -> None:
    run = program()
    state = run.first()
    after, _ = run.step(state, put(ragged_batch(0), run.layout))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state) if leaf.ndim)
    wanted = run.spec.abstract
    assert jax.tree.all(jax.tree.map(lambda leaf, wanted: leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim), after, wanted))


def test_evaluation_sums_equal_the_training_loss_of_the_same_parameters() -> None:
    run = program()
    state, batch = run.first(), put(ragged_batch(3), run.layout)
    evaluate, sums = make_eval_step(run.config, run.spec, run.layout), jax.device_put(LossSums.zero(), run.layout.replicated)
    for _ in range(2):
        sums = evaluate(state, sums, batch)
    _, metrics = run.step(state, batch)
    np.testing.assert_allclose(float(sums.total / sums.tokens), float(metrics["loss"]), rtol=1e-6)
    np.testing.assert_allclose(float(sums.tokens), 2 * float(metrics["tokens"]))
    assert float(metrics["z_loss"]) > 0


def test_a_batch_without_a_valid_token_gives_loss_zero_and_no_nan() -> None:
    run, batch = program(), ragged_batch(0)
    batch["weights"] = np.zeros_like(batch["weights"])
    state, metrics = run.step(run.first(), put(batch, run.layout))
    assert float(metrics["loss"]) == 0 and float(metrics["gradient_norm"]) == 0
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state))
