"""Dropout: which elements fall depends on the step and the token, and on nothing of how the work is spread."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer.configs import config, layout, put, ragged_batch
from trainer.loss import LossSums
from trainer.model.dropout import SITES, Dropout, token_noise
from trainer.state import describe_state, initial_state
from trainer.step import make_eval_step, make_train_step

B, T, D = 4, 32, 64


def noise(step: int, seed: int = 0) -> jax.Array:
    batch = ragged_batch(0, batch=B, length=T)
    return token_noise(jnp.asarray([seed, 1], jnp.uint32), jnp.int32(step), batch["positions"], batch["segments"])


def test_the_share_that_falls_is_the_rate_and_the_mean_stays() -> None:
    x = jnp.ones((B, T, D), jnp.bfloat16)
    y = np.asarray(Dropout(0.25, noise(3))(x, "mlp"), np.float32)
    fallen = float((y == 0).mean())
    assert abs(fallen - 0.25) < 5 * (0.25 * 0.75 / y.size) ** 0.5
    assert set(np.unique(y)) == {0, float(jnp.bfloat16(1 / 0.75))}


def test_masks_of_steps_layers_sites_and_tokens_have_nothing_in_common() -> None:
    x = jnp.ones((B, T, D))
    masks = [np.asarray(Dropout(0.5, noise(step), layer)(x, site)) != 0 for step in (0, 1) for layer in (0, 1) for site in SITES]
    masks.append(np.asarray(Dropout(0.5, noise(0, seed=1))(x, "mlp")) != 0)
    masks.append(np.roll(masks[0], 1, axis=1))
    masks.append(np.roll(masks[0], 1, axis=0))
    valid = ragged_batch(0, batch=B, length=T)["segments"][0] != 0
    for i, mine in enumerate(masks):
        for other in masks[:i]:
            equal = (mine == other)[0][valid]
            assert abs(equal.mean() - 0.5) < 5 * 0.5 / equal.size**0.5


def losses(*overrides: str) -> list[float]:
    run = config("model.matmul_precision=highest", "model.dropout=0.3", "model.segments.0.repeats=4", *overrides)
    where = layout(run)
    spec = describe_state(run, where)
    state, step, found = initial_state(run, spec), make_train_step(run, spec, where), []
    for n in range(2):
        state, metrics = step(state, put(ragged_batch(n), where))
        found.append(float(metrics["loss"]))
    return found


SPREAD = {
    "unrolled, accumulation 4, nothing recomputed": (
        "model.layers=unroll", "model.remat=none", "batch.accumulation=4", "mesh.ici.fsdp=2", "mesh.ici.tensor=4",
    ),
    "pipelined, accumulation 2": ("pipeline={}", "mesh.ici.stage=2", "mesh.ici.fsdp=2", "mesh.ici.tensor=2", "batch.accumulation=2"),
}  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> list[float]:
    return losses()


@pytest.mark.full
@pytest.mark.parametrize("how", SPREAD)
def test_the_losses_do_not_depend_on_mesh_accumulation_layer_form_remat_or_stages(how: str, reference: list[float]) -> None:
    np.testing.assert_allclose(losses(*SPREAD[how]), reference, rtol=1e-5)


def test_an_evaluation_has_none() -> None:
    def program(rate: float) -> str:
        run = config(f"model.dropout={rate}")
        where = layout(run)
        spec = describe_state(run, where)
        return make_eval_step(run, spec, where).lower(spec.abstract, LossSums.zero(), put(ragged_batch(0), where)).as_text()

    assert program(0.0) == program(0.3)
