"""train_step and eval_step: pure functions of (state, batch)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from trainer.config.train import TrainConfig
from trainer.loss import LossSums, loss_sums
from trainer.optim import build_schedule
from trainer.parallel.sharding import Layout, constrain, use_layout
from trainer.state import StateSpec

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
TrainStep = Callable[[nnx.State, Batch], tuple[nnx.State, Metrics]]
EvalStep = Callable[[nnx.State, LossSums, Batch], LossSums]


def make_train_step(config: TrainConfig, spec: StateSpec, layout: Layout) -> TrainStep:
    """The jitted step `(state, batch) -> (state, metrics)`; the state is donated.

    batch: `inputs`, `targets`, `positions`, `segments` int32 [B, T] and `weights` float32 [B, T], B the global
    batch. metrics: float32 scalars: `loss` (what is minimised), `cross_entropy`, `z_loss`, `tokens` (valid),
    `gradient_norm` (before clipping), `learning_rate`.
    """
    schedule = build_schedule(config.schedule, config.steps)

    def train_step(state: nnx.State, batch: Batch) -> tuple[nnx.State, Metrics]:
        with use_layout(layout):
            train = nnx.merge(spec.graphdef, state)
            tokens = jnp.maximum(jnp.sum(batch["weights"] > 0, dtype=jnp.float32), 1)
            sums, gradients = _gradients(config, spec, train.model, batch, tokens)
            metrics = {
                "loss": sums.total / tokens,
                "cross_entropy": sums.cross_entropy / tokens,
                "z_loss": sums.z_loss / tokens,
                "tokens": sums.tokens,
                "gradient_norm": optax.tree.norm(gradients),
                "learning_rate": schedule(train.optimizer.step[...]),
            }
            train.optimizer.update(train.model, gradients)
            return nnx.state(train), metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=(spec.shardings, layout.replicated))


def make_eval_step(config: TrainConfig, spec: StateSpec, layout: Layout) -> EvalStep:
    """The jitted `(state, sums so far, batch) -> sums`; the state is only read."""

    def eval_step(state: nnx.State, sums: LossSums, batch: Batch) -> LossSums:
        with use_layout(layout):
            train = nnx.merge(spec.graphdef, state)
            return sums + _sums(config, train.model, batch)

    return jax.jit(eval_step, donate_argnums=1, out_shardings=layout.replicated)


def _sums(config: TrainConfig, model: nnx.Module, batch: Batch) -> LossSums:
    logits_BTV = model(batch["inputs"], batch["positions"], batch["segments"])  # pyright: ignore[reportCallIssue]
    return loss_sums(logits_BTV, batch["targets"], batch["weights"], config.loss)


def _gradients(config: TrainConfig, spec: StateSpec, model: nnx.Module, batch: Batch, tokens: jax.Array) -> tuple[LossSums, nnx.State]:
    """Loss sums, and the gradient of their total over `tokens`, over all microbatches; gradients laid out like the parameters."""
    model_def, params = nnx.split(model, nnx.Param)

    def total(params: nnx.State, microbatch: Batch) -> tuple[jax.Array, LossSums]:
        sums = _sums(config, nnx.merge(model_def, params), microbatch)
        return sums.total / tokens, sums

    def one(microbatch: Batch) -> tuple[LossSums, Any]:
        (_, sums), gradients = jax.value_and_grad(total, has_aux=True)(params, microbatch)
        return sums, jax.lax.with_sharding_constraint(gradients, spec.shardings["model"])

    count = config.batch.accumulation
    if count == 1:
        return one(batch)

    def turn(carry: tuple[LossSums, Any], microbatch: Batch) -> tuple[tuple[LossSums, Any], None]:
        return jax.tree.map(jnp.add, carry, one(microbatch)), None

    zeros = jax.lax.with_sharding_constraint(jax.tree.map(jnp.zeros_like, params), spec.shardings["model"])
    (sums, gradients), _ = jax.lax.scan(turn, (LossSums.zero(), zeros), _microbatches(batch, count))
    return sums, gradients


def _microbatches(batch: Batch, count: int) -> Batch:
    """[B, T] -> [count, B / count, T], strided: microbatch i has rows i, i + count, ..., so no row changes its device."""

    def split(x_BT: jax.Array) -> jax.Array:
        x_mBT = x_BT.reshape(x_BT.shape[0] // count, count, *x_BT.shape[1:]).swapaxes(0, 1)
        return constrain(x_mBT, (None, "batch", "length"))

    return jax.tree.map(split, batch)
