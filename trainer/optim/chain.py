"""An optimizer as one optax transformation: clip, skip spikes, go against each tensor's direction, decay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from trainer.config.optimizer import Optimizer, SkipSpikes
from trainer.config.treatment import Treatment
from trainer.optim.methods import rules


def build_optimizer(config: Optimizer, schedule: optax.Schedule, treated: Sequence[Treatment]) -> optax.GradientTransformation:
    """The transformation of the parameters in `treated`, none of them frozen, one for each leaf in order.

    Its state is a dict: `count` (int32, calls so far; the schedule's step), `spikes` where spikes are skipped, and for
    each slot a dict of arrays by the path of their weight, as `trainer.config.treatment` declares them. Every
    expression per element is a multiplication: divisions by a norm or a bias correction are not fused into the three
    updates but written out.
    """

    def init(params: optax.Params) -> optax.OptState:
        state: dict[str, Any] = {"count": jnp.zeros((), jnp.int32)}
        if config.skip_spikes is not None:
            state["spikes"] = _no_norms(config.skip_spikes)
        leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        for treatment, leaf in zip(treated, leaves, strict=True):
            for moment in treatment.moments:
                zeros = jnp.zeros(moment.shape, moment.dtype)
                kept = leaf.replace(zeros, axes=moment.axes) if isinstance(leaf, nnx.Variable) else zeros
                state.setdefault(moment.slot, {})[treatment.weight.path] = kept
        return state

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None) -> tuple[optax.Updates, optax.OptState]:
        count = jnp.asarray(optax.safe_increment(state["count"]), jnp.int32)
        norm = optax.tree.norm(updates)
        new: dict[str, Any] = {"count": count}
        skip = applied = None
        if config.skip_spikes is not None:
            skip, new["spikes"] = _spike(config.skip_spikes, norm, state["spikes"])
            applied = count - new["spikes"]["skipped"] + skip
        rule = rules(config, count if applied is None else applied)
        clip = jnp.minimum(1, config.clip_norm / norm) if config.clip_norm is not None else jnp.float32(1)
        rate = jnp.asarray(schedule(state["count"]))
        leaves, tree = jax.tree.flatten(updates)
        steps: list[jax.Array] = []
        for treatment, gradient, p in zip(treated, leaves, jax.tree.leaves(params), strict=True):
            path, factor = treatment.weight.path, treatment.learning_rate_factor
            slots = {moment.slot: state[moment.slot][path] for moment in treatment.moments}
            direction = rule[treatment.method](treatment, gradient.astype(jnp.float32) * clip, slots, p)
            own_rate = rate if factor == 1 else rate * factor
            step = -own_rate * (direction.value + (treatment.weight_decay * p if treatment.weight_decay else 0))
            steps.append(step if skip is None else jnp.where(skip, 0, step))
            for moment in treatment.moments:
                value = direction.slots[moment.slot].astype(moment.dtype)
                kept = value if skip is None else jnp.where(skip, slots[moment.slot], value)
                new.setdefault(moment.slot, {})[path] = kept
        return tree.unflatten(steps), new

    return optax.GradientTransformation(init, update)


def _no_norms(config: SkipSpikes) -> dict[str, jax.Array]:
    zero = jnp.zeros((), jnp.int32)
    return {"norms": jnp.zeros(config.window_steps, jnp.float32), "seen": zero, "skipped": zero}


def _spike(config: SkipSpikes, norm: jax.Array, state: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Whether `norm` is one, and the state with it: norms of the latest steps, skipped or not, a ring of float32.

    A norm that is not finite is left to the loop, which ends the run for it.
    """
    size = config.window_steps
    known = jnp.minimum(state["seen"], size)
    inside = jnp.arange(size) < known
    mean = jnp.sum(jnp.where(inside, state["norms"], 0)) / jnp.maximum(known, 1)
    variance = jnp.sum(jnp.where(inside, jnp.square(state["norms"] - mean), 0)) / jnp.maximum(known, 1)
    limit = mean + config.deviations * jnp.maximum(jnp.sqrt(variance), 0.01 * mean)
    finite = jnp.isfinite(norm)
    skip = (known >= size // 2) & finite & (norm > limit)
    norms = jnp.where(finite, state["norms"].at[state["seen"] % size].set(norm), state["norms"])
    return skip, {"norms": norms, "seen": state["seen"] + finite, "skipped": state["skipped"] + skip}
