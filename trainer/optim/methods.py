"""What each optimizer makes of one tensor's gradient: a direction to go against, and what it remembers.

A rule is a function (gradient float32, what is remembered by slot, parameter) -> (direction, what is remembered now).
Learning rate, weight decay, clipping and skipping are the same for all and live in `trainer.optim.chain`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainer.config.optimizer import Adafactor, AdamW, Lion, Muon, Optimizer, Sgd
from trainer.config.treatment import Method, Treatment, factored_dims, matrix_dims

Slots = Mapping[str, jax.Array]


class Direction(NamedTuple):
    value: jax.Array
    slots: dict[str, jax.Array]


Rule = Callable[[Treatment, jax.Array, Slots, jax.Array], Direction]


def rules(optimizer: Optimizer, count: jax.Array) -> dict[Method, Rule]:
    """The rules `optimizer` needs at its `count`-th update (int32, from 1)."""
    match optimizer:
        case AdamW():
            return {"adamw": _adamw(optimizer, count)}
        case Muon():
            return {"adamw": _adamw(optimizer, count), "muon": _muon(optimizer, count)}
        case Sgd():
            return {"sgd": _sgd(optimizer)}
        case Adafactor():
            return {"adafactor": _adafactor(optimizer, count)}
        case Lion():
            return {"lion": _lion(optimizer)}


def _adamw(config: AdamW | Muon, count: jax.Array) -> Rule:
    """The arithmetic of `optax.scale_by_adam`, its divisions by bias corrections written as multiplications."""
    first = 1 / (1 - config.b1 ** count.astype(jnp.float32))
    second = 1 / (1 - config.b2 ** count.astype(jnp.float32))

    def rule(treatment: Treatment, g: jax.Array, slots: Slots, p: jax.Array) -> Direction:
        m = config.b1 * slots["mu"].astype(jnp.float32) + (1 - config.b1) * g
        v = config.b2 * slots["nu"] + (1 - config.b2) * (g * g)
        return Direction((m * first) / (jnp.sqrt(v * second) + config.epsilon), {"mu": m, "nu": v})

    return rule


def _muon(config: Muon, count: jax.Array) -> Rule:
    """`optax.contrib.scale_by_muon`, every layer and expert a matrix of its own, and the scale of its paper."""

    def rule(treatment: Treatment, g: jax.Array, slots: Slots, p: jax.Array) -> Direction:
        dims = matrix_dims(treatment.weight)
        tx = optax.contrib.scale_by_muon(
            ns_steps=config.iterations,
            beta=config.momentum,
            nesterov=config.nesterov,
            weight_dimension_numbers=[optax.contrib.MuonDimensionNumbers(dims.inputs, dims.outputs)],
        )
        fresh = tx.init([g])
        assert isinstance(fresh, optax.contrib.MuonState)
        updates, state = tx.update([g], fresh._replace(count=count - 1, mu=[slots["mu"].astype(jnp.float32)]))
        assert isinstance(state, optax.contrib.MuonState)
        [update] = jax.tree.leaves(updates)
        inputs, outputs = (math.prod(p.shape[dim] for dim in part) for part in (dims.inputs, dims.outputs))
        scale = math.sqrt(max(1, outputs / inputs)) if config.update_rms is None else config.update_rms * math.sqrt(max(inputs, outputs))
        [momentum] = jax.tree.leaves(state.mu)
        return Direction(scale * update, {"mu": momentum})

    return rule


def _sgd(config: Sgd) -> Rule:
    def rule(treatment: Treatment, g: jax.Array, slots: Slots, p: jax.Array) -> Direction:
        if not config.momentum:
            return Direction(g, {})
        m = config.momentum * slots["mu"].astype(jnp.float32) + g
        return Direction(g + config.momentum * m if config.nesterov else m, {"mu": m})

    return rule


def _lion(config: Lion) -> Rule:
    def rule(treatment: Treatment, g: jax.Array, slots: Slots, p: jax.Array) -> Direction:
        m = slots["mu"].astype(jnp.float32)
        return Direction(jnp.sign(config.b1 * m + (1 - config.b1) * g), {"mu": config.b2 * m + (1 - config.b2) * g})

    return rule


def _adafactor(config: Adafactor, count: jax.Array) -> Rule:
    """Shazeer and Stern 2018, algorithms 4 and 5; every layer and expert is a tensor of its own."""
    keep = 1 - count.astype(jnp.float32) ** -config.decay_exponent

    def rule(treatment: Treatment, g: jax.Array, slots: Slots, p: jax.Array) -> Direction:
        dims = matrix_dims(treatment.weight)
        own = (*dims.inputs, *dims.outputs)
        square = g * g + config.epsilon
        factored = factored_dims(treatment.weight, config.factored_from)
        if factored is None:
            v = keep * slots["nu"] + (1 - keep) * square
            direction, new = g * jax.lax.rsqrt(v), {"nu": v}
        else:
            smaller, larger = factored
            row = keep * slots["row"] + (1 - keep) * jnp.mean(square, axis=larger)
            column = keep * slots["column"] + (1 - keep) * jnp.mean(square, axis=smaller)
            rest = tuple(dim - (dim > larger) for dim in (smaller,))
            relative = row / jnp.mean(row, axis=rest, keepdims=True)
            direction = g * jnp.expand_dims(jax.lax.rsqrt(relative), larger) * jnp.expand_dims(jax.lax.rsqrt(column), smaller)
            new = {"row": row, "column": column}
        if config.clip_update_rms is not None:
            direction = direction / jnp.maximum(1, _rms(direction, own) / config.clip_update_rms)
        if config.scale_by_parameter:
            direction = direction * jnp.maximum(_rms(p, own), 1e-3)
        return Direction(direction, new)

    return rule


def _rms(x: jax.Array, dims: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=dims, keepdims=True))
