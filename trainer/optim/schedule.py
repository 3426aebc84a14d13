"""Learning-rate schedules as functions of the step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from trainer.config.schedule import Constant, Cosine, Linear, Schedule, WarmupStableDecay


def build_schedule(config: Schedule, steps: int) -> optax.Schedule:
    """Map a step (int32 scalar) to the learning rate (float32 scalar) of that step; `steps` is the length of the run.

    Step n of the warm-up uses (n + 1) / warmup_steps of the peak, so that step 0 already learns.
    """

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        warm = jnp.minimum((step + 1) / config.warmup_steps, 1.0) if config.warmup_steps else jnp.float32(1)
        return jnp.float32(config.learning_rate) * warm * _decay(config, step, steps)

    return schedule


def _decay(config: Schedule, step: jax.Array, steps: int) -> jax.Array:
    """Fraction of the peak after the warm-up, float32 scalar."""
    match config:
        case Constant():
            return jnp.float32(1)
        case Cosine():
            done = _done(config, step, steps)
            return config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        case Linear():
            return 1 - (1 - config.final_fraction) * _done(config, step, steps)
        case WarmupStableDecay():
            done = jnp.clip((step - (steps - config.decay_steps)) / config.decay_steps, 0, 1)
            return 1 - (1 - config.final_fraction) * done


def _done(config: Cosine | Linear, step: jax.Array, steps: int) -> jax.Array:
    """How much of the way from the warm-up to the end of the decay is behind."""
    end = config.decay_until_step or steps
    return jnp.clip((step - config.warmup_steps) / max(end - config.warmup_steps, 1), 0, 1)
