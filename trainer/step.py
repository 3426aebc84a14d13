"""train_step and eval_step: pure functions of (state, batch)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from trainer.config.optimizer import Loss
from trainer.config.run import Ema
from trainer.config.terms import Term, eval_terms, loss_terms, model_terms
from trainer.config.train import TrainConfig
from trainer.ledger import Batch, Forward, Statistics, counts_of, forward_sums, ledger_metrics, mean_loss, targets_ahead
from trainer.loss import LossSums
from trainer.model import Transformer
from trainer.model.byproducts import statistics_metrics
from trainer.model.dropout import token_noise
from trainer.model.multi_token import ahead
from trainer.model.tiles import tiled_loss_sums
from trainer.optim import build_schedule
from trainer.parallel.compiler import compiler_options
from trainer.parallel.context import balance
from trainer.parallel.sharding import Layout, constrain, use_layout
from trainer.replicas import over_replicas
from trainer.silent import TermProbe
from trainer.state import StateSpec, TrainState, fetched, gathered, stored

NOISE: Final = "noise"
"""Beside the arrays of a batch, where there is dropout: a random number of each token, uint32 [B, T]."""

Metrics = dict[str, jax.Array]
TrainStep = Callable[[nnx.State, Batch], tuple[nnx.State, Metrics]]
EvalStep = Callable[[nnx.State, LossSums, Batch], LossSums]
ForwardPass = Callable[[nnx.State, Batch], Forward]
"""(parameters, microbatch) -> what the forward pass gives."""


def make_train_step(config: TrainConfig, spec: StateSpec, layout: Layout) -> TrainStep:
    """The jitted step `(state, batch) -> (state, metrics)`; the state is donated.

    batch: `inputs`, `targets`, `positions`, `segments` int32 [B, T] and `weights` float32 [B, T], B the global
    batch, tokens in order. metrics: float32 scalars: `loss` (what is minimised), `cross_entropy`, every loss term's value before
    its weight, `tokens` (valid) and what else terms are divided by, `gradient_norm` (before clipping), `learning_rate`,
    `skipped_updates` so far where spikes are skipped, and those of `trainer.model.byproducts.statistics_metrics`, some of them arrays.
    With replicas in one world, metrics have a leading dim that counts them.
    """
    options = compiler_options(config.compiler, layout.mesh)
    if config.diloco is None or spec.replica is None:
        step, metrics = _one_step(config, spec, layout), layout.replicated
    else:
        step = over_replicas(config, config.diloco, spec, layout, _one_step(config, spec.replica, layout))
        metrics = layout.replicated if config.diloco.files else NamedSharding(layout.mesh, PartitionSpec("diloco"))
    return jax.jit(step, donate_argnums=0, out_shardings=(spec.shardings, metrics), compiler_options=options)


def _one_step(config: TrainConfig, spec: StateSpec, layout: Layout) -> TrainStep:
    schedule = build_schedule(config.schedule, config.steps)
    terms = model_terms(config)
    shardings = nnx.filter_state(spec.shardings["model"], spec.trained)
    offloaded = config.optimizer.state_memory == "host"

    def train_step(state: nnx.State, batch: Batch) -> tuple[nnx.State, Metrics]:
        with use_layout(layout.in_steps(config)):
            batch = balance(batch)
            train = nnx.merge(spec.graphdef, state)
            model_def, *parts = nnx.split(train.model, spec.trained, ...)
            params, rest = (gathered(config, part) for part in parts)

            def forward(params: nnx.State, microbatch: Batch) -> Forward:
                return _forward(config, nnx.merge(model_def, params, rest), microbatch, terms)

            if config.model.dropout:
                noise = token_noise(train.key[...], train.optimizer.step[...], batch["positions"], batch["segments"])
                batch = {**batch, NOISE: noise}
            sums, gradients, statistics = accumulate(config, forward, params, batch, terms, shardings)
            metrics = {
                **ledger_metrics(config, sums, terms),
                "gradient_norm": optax.tree.norm(gradients),
                "learning_rate": schedule(train.optimizer.step[...]),
            }
            if offloaded:
                state, gradients = fetched(spec, nnx.state(train), gradients)
                nnx.update(train, state)
            train.optimizer.update(train.model, gradients)
            if config.optimizer.skip_spikes is not None:
                metrics["skipped_updates"] = train.optimizer.opt_state["spikes"]["skipped"][...].astype(jnp.float32)
            if statistics:
                metrics |= statistics_metrics(statistics)
                train.model.advance(statistics)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
            if config.ema is not None:
                _follow(config.ema, train)
            return stored(spec, nnx.state(train)) if offloaded else nnx.state(train), metrics

    return train_step


def _follow(config: Ema, train: TrainState) -> None:
    """Moves the average towards the parameters as the step leaves them."""
    n = (train.optimizer.step[...] - 1).astype(jnp.float32)
    share = 1 - (jnp.minimum(config.decay, (1 + n) / (10 + n)) if config.warm_up else jnp.float32(config.decay))
    # As a difference, so that a parameter that does not move has itself as its average, to the bit.
    nnx.update(train.ema, jax.tree.map(lambda mean, new: mean + share * (new - mean), nnx.state(train.ema), nnx.state(train.model)))


def make_eval_step(config: TrainConfig, spec: StateSpec, layout: Layout) -> EvalStep:
    """The jitted `(state, sums so far, batch) -> sums`, those of `eval_terms` among them; the state is only read."""
    terms = eval_terms(config)
    weights = "ema" if config.eval is not None and config.eval.weights == "ema" else "model"

    def eval_step(state: nnx.State, sums: LossSums, batch: Batch) -> LossSums:
        with use_layout(layout.of_batch(config).in_steps(config)):
            batch = balance(batch)
            model = nnx.merge(spec.model, gathered(config, state[weights]))
            return sums + forward_sums(config, _forward(config, model, batch, terms), batch, terms)

    return jax.jit(eval_step, donate_argnums=1, out_shardings=layout.replicated)


def make_term_probe(config: TrainConfig, spec: StateSpec, layout: Layout) -> TermProbe:
    """The jitted `(state, batch, number) -> {value, tokens, gradient_norm}` of one term of `loss_terms`, before its weight.

    Measured on the first microbatch, by the parameters that are trained; `tokens` is what the term's sum was divided by.
    One term at a time, so that it needs no more memory than the training step.
    """
    terms, model = loss_terms(config), model_terms(config)

    def term_probe(state: nnx.State, batch: Batch, number: jax.Array) -> Metrics:
        with use_layout(layout.of_batch(config).in_steps(config)):
            batch = balance(batch)
            model_def, *parts = nnx.split(nnx.merge(spec.model, state["model"]), spec.trained, ...)
            params, rest = (gathered(config, part) for part in parts)
            count = config.batch.accumulation
            microbatch = jax.tree.map(lambda rows: rows[0], _microbatches(batch, count)) if count > 1 else batch
            counts = counts_of(microbatch, terms)

            def value(params: nnx.State) -> jax.Array:
                found = _forward(config, nnx.merge(model_def, params, rest), microbatch, model)
                ledger = ledger_metrics(config, forward_sums(config, found, microbatch, model), model)
                return jnp.stack([ledger[term.name] for term in terms])[number]

            found, gradients = jax.value_and_grad(value)(params)
            tokens = jnp.stack([counts[term.counts] for term in terms])[number]
            return {"value": found, "tokens": tokens, "gradient_norm": optax.tree.norm(gradients)}

    return jax.jit(term_probe, out_shardings=layout.replicated)


def accumulate(
    config: TrainConfig, forward: ForwardPass, params: nnx.State, batch: Batch, terms: Sequence[Term], shardings: Any
) -> tuple[LossSums, Any, Statistics]:
    """Sums of the ledger over all microbatches of `batch`, the gradient of the loss by `params`, and summed statistics.

    The gradient is that of the whole batch at once: every term is divided by a count of the whole batch, whichever
    microbatch it comes from. Gradients are laid out as `shardings`, a tree like `params`. A model whose variables
    beside the parameters move (a router's bias) returns statistics; its `advance(statistics)` moves them once a step.
    """
    counts = counts_of(batch, terms)

    def loss(params: nnx.State, microbatch: Batch) -> tuple[jax.Array, tuple[LossSums, Statistics]]:
        found = forward(params, microbatch)
        sums = forward_sums(config, found, microbatch, terms)
        return mean_loss(sums, counts, terms), (sums, jax.lax.stop_gradient(found.statistics))

    def one(microbatch: Batch) -> tuple[tuple[LossSums, Statistics], Any]:
        (_, found), gradients = jax.value_and_grad(loss, has_aux=True)(params, microbatch)
        gradients = jax.tree.map(lambda gradient: gradient.astype(config.optimizer.gradient_dtype), gradients)
        return found, jax.lax.with_sharding_constraint(gradients, shardings)

    count = config.batch.accumulation
    if count == 1:
        (sums, statistics), gradients = one(batch)
        return sums, gradients, statistics

    def turn(carry: tuple[LossSums, Any], microbatch: Batch) -> tuple[tuple[LossSums, Any], Statistics]:
        (sums, statistics), gradients = one(microbatch)
        return jax.tree.map(jnp.add, carry, (sums, gradients)), statistics

    zeros = jax.tree.map(lambda param: jnp.zeros(param.shape, jnp.float32), params)
    zeros = jax.lax.with_sharding_constraint(zeros, shardings)
    (sums, gradients), statistics = jax.lax.scan(turn, (LossSums.zero(terms), zeros), _microbatches(batch, count))
    return sums, gradients, jax.tree.map(lambda stacked: jnp.sum(stacked, axis=0), statistics)


def _forward(config: TrainConfig, model: nnx.Module, batch: Batch, terms: Sequence[Term]) -> Forward:
    """What the forward pass adds to `terms`, the model's or those of an evaluation."""
    assert isinstance(model, Transformer)
    tiles, segments_BT = config.loss.tiles, batch["segments"]
    found = model.run(batch["inputs"], batch["positions"], segments_BT, batch.get(NOISE))
    wanted = {term.name for term in terms}
    sums = {**found.terms}
    for k, hidden_BTD in enumerate(found.further, 1):
        rows = {**batch, **targets_ahead(batch, k)}
        sums[f"multi_token_{k}"] = tiled_loss_sums(model, hidden_BTD, rows, Loss(tiles=tiles)).cross_entropy
        if f"accepted_{k}" in wanted:
            drafted_BT, own_BT = (_best_tokens(model, x_BTD, segments_BT, tiles) for x_BTD in (hidden_BTD, found.hidden))
            sums[f"accepted_{k}"] = jnp.sum((drafted_BT == ahead(own_BT, k)) & (rows["weights"] > 0), dtype=jnp.float32)
    kept = {name: value for name, value in sums.items() if name in wanted}
    if tiles > 1:
        return Forward(tiled_loss_sums(model, found.hidden, batch, config.loss), kept, found.statistics)
    return Forward(model.logits(found.hidden, segments_BT), kept, found.statistics)


def _best_tokens(model: Transformer, hidden_BTD: jax.Array, segments_BT: jax.Array, tiles: int) -> jax.Array:
    """The likeliest next tokens, int32 [B, T], of one tile of the sequence after the other."""
    parts = [jnp.stack(jnp.split(x, tiles, axis=1)) for x in (hidden_BTD, segments_BT)]
    best_tBT = jax.lax.map(lambda part: jnp.argmax(model.logits(part[0], part[1]), axis=-1), (parts[0], parts[1]))
    return jnp.moveaxis(best_tBT, 0, 1).reshape(segments_BT.shape)


def _microbatches(batch: Batch, count: int) -> Batch:
    """[B, T] -> [count, B / count, T], strided: microbatch i has rows i, i + count, ..., so no row changes its device."""

    def split(x_BT: jax.Array) -> jax.Array:
        x_mBT = x_BT.reshape(x_BT.shape[0] // count, count, *x_BT.shape[1:]).swapaxes(0, 1)
        return constrain(x_mBT, (None, "batch", "length"))

    return jax.tree.map(split, batch)
