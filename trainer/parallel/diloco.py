"""The outer step of DiLoCo: the only place where replicas exchange anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from trainer.config.diloco import DiLoCo, Part, turns

Arrays = Mapping[str, jax.Array]


def synchronise(
    config: DiLoCo, fragments: Sequence[Sequence[Part]], outer: Arrays, momentum: Arrays, inner: Arrays, done: jax.Array
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict[str, jax.Array]]:
    """(outer, momentum, inner) after `done` finished steps (int32), by path: changed where a fragment is due, else as they are.

    outer, momentum: [...]; inner: [R, ...], R replicas. Paths in `outer` without momentum are averaged without a step:
    what moves beside the gradient, such as the bias of a router. With d the mean over replicas of outer - inner, m the
    momentum mu and l the outer learning rate: velocity <- m velocity + d; outer <- outer - l (d + m velocity), which is
    `optax.sgd(l, momentum=m, nesterov=True)`. A replica that takes a fragment becomes blend * inner + (1 - blend) * outer.
    """
    order = turns(config)
    phase = done % config.sync_every_steps

    def send(parts: Sequence[Part]) -> Callable[[Arrays, Arrays, Arrays], tuple[Arrays, Arrays]]:
        def branch(outer: Arrays, momentum: Arrays, inner: Arrays) -> tuple[Arrays, Arrays]:
            new_outer, new_momentum = dict(outer), dict(momentum)
            for part in parts:
                theirs = jnp.mean(_pick(inner[part.path], part, 1), axis=0)
                ours = _pick(outer[part.path], part, 0)
                if part.path not in momentum:
                    new_outer[part.path] = _put(outer[part.path], theirs, part)
                    continue
                stepped, velocity = outer_step(config, ours, _pick(momentum[part.path], part, 0), ours - theirs)
                new_outer[part.path] = _put(outer[part.path], stepped, part)
                new_momentum[part.path] = _put(momentum[part.path], velocity, part)
            return new_outer, new_momentum

        return branch

    def take(parts: Sequence[Part]) -> Callable[[Arrays, Arrays], Arrays]:
        def branch(outer: Arrays, inner: Arrays) -> Arrays:
            new = dict(inner)
            for part in parts:
                own = _pick(inner[part.path], part, 1)
                result = jnp.broadcast_to(_pick(outer[part.path], part, 0), own.shape)
                mixed = config.blend * own + (1 - config.blend) * result if config.blend else result
                new[part.path] = _put(inner[part.path], mixed, part, 1)
            return new

        return branch

    nothing_sent: Callable[[Arrays, Arrays, Arrays], tuple[Arrays, Arrays]] = lambda outer, momentum, inner: (outer, momentum)  # noqa: E731
    nothing_taken: Callable[[Arrays, Arrays], Arrays] = lambda outer, inner: inner  # noqa: E731
    sends = jnp.asarray([0 if f is None else 1 + f for f in order.sends])[phase]
    takes = jnp.where(done > config.delay_steps, jnp.asarray([0 if f is None else 1 + f for f in order.takes])[phase], 0)
    outer, momentum = jax.lax.switch(sends, [nothing_sent, *map(send, fragments)], dict(outer), dict(momentum), dict(inner))
    inner = jax.lax.switch(takes, [nothing_taken, *map(take, fragments)], dict(outer), dict(inner))
    return dict(outer), dict(momentum), dict(inner)


def outer_step(config: DiLoCo, outer: jax.Array, velocity: jax.Array, moved: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(outer, velocity) after a step along `moved`, the mean of what replicas went from `outer` (outer - inner); all of one shape."""
    velocity = config.outer_momentum * velocity + moved
    return outer - config.outer_learning_rate * (moved + config.outer_momentum * velocity), velocity


def _pick(x: jax.Array, part: Part, dim: int) -> jax.Array:
    return x if part.layers is None else jnp.take(x, np.array(part.layers), axis=dim)


def _put(x: jax.Array, value: jax.Array, part: Part, dim: int = 0) -> jax.Array:
    if part.layers is None:
        return value
    rows = np.array(part.layers)
    return x.at[(slice(None),) * dim + (rows,)].set(value)
