"""The next token of every slot: greedy, or drawn after temperature, top-k, top-p and min-p, in this order.

B slots, V vocabulary. Every slot has settings and a key of its own, and noise is folded from the key and the token's
position, so neither other slots nor the number of steps taken so far change what a request draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Sampling:
    """How one request draws its tokens. Raises ValueError for what cannot be."""

    temperature: float = 0.0
    """Logits are divided by it; 0: always the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens (and any equally likely as the last of them); 0: all."""
    top_p: float = 1.0
    """Only the fewest most likely tokens that together have this probability, of what top-k left (Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Only tokens at least this likely, as a share of the most likely one's probability (Nguyen et al. 2024)."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, fits, limit in (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_k", self.top_k, 0 <= self.top_k < 2**31, "at least 0 and below 2^31"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1"),
            ("seed", self.seed, 0 <= self.seed < 2**63, "at least 0 and below 2^63"),
        ):
            if not fits:
                raise ValueError(f"{name} is {value}, must be {limit}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """The settings of B requests."""

    temperature: jax.Array  # float32 [B]
    top_k: jax.Array  # int32 [B]
    top_p: jax.Array  # float32 [B]
    min_p: jax.Array  # float32 [B]
    key: jax.Array  # threefry key data, uint32 [B, 2]


def one_row(sampling: Sampling) -> Rows:
    """The settings of one request, B = 1."""
    return Rows(
        jnp.full(1, sampling.temperature, jnp.float32),
        jnp.full(1, sampling.top_k, jnp.int32),
        jnp.full(1, sampling.top_p, jnp.float32),
        jnp.full(1, sampling.min_p, jnp.float32),
        jnp.array([[sampling.seed >> 32, sampling.seed & 0xFFFFFFFF]], jnp.uint32),
    )


def sample(logits_BV: jax.Array, rows: Rows, positions_B: jax.Array) -> jax.Array:
    """The next tokens, int32 [B]. positions: where they will stand in their sequences. Logits float32."""
    likeliest_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def drawn() -> jax.Array:
        scaled_BV = logits_BV / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
        ranked = jnp.any((rows.temperature > 0) & ((rows.top_k > 0) | (rows.top_p < 1)))
        lowest_B = jax.lax.cond(ranked, lambda: _lowest_by_rank(scaled_BV, rows), lambda: jnp.full(len(positions_B), -jnp.inf))
        kept_BV = scaled_BV >= jnp.maximum(lowest_B, jnp.max(scaled_BV, axis=-1) + jnp.log(rows.min_p))[:, None]
        noise_BV = jax.vmap(_noise, in_axes=(0, 0, None))(rows.key, positions_B, logits_BV.shape[1])
        tokens_B = jnp.argmax(jnp.where(kept_BV, scaled_BV + noise_BV, -jnp.inf), axis=-1).astype(jnp.int32)
        return jnp.where(rows.temperature > 0, tokens_B, likeliest_B)

    return jax.lax.cond(jnp.any(rows.temperature > 0), drawn, lambda: likeliest_B)


def _lowest_by_rank(scaled_BV: jax.Array, rows: Rows) -> jax.Array:
    """The smallest logit that top-k and then top-p keep, [B]."""
    V = scaled_BV.shape[1]
    falling_BV = -jnp.sort(-scaled_BV, axis=-1)
    k_B = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, V), V)
    kth_B1 = jnp.take_along_axis(falling_BV, k_B[:, None] - 1, axis=-1)
    inside_BV = falling_BV >= kth_B1
    probability_BV = jax.nn.softmax(jnp.where(inside_BV, falling_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    nucleus_BV = (before_BV < rows.top_p[:, None]) | (rows.top_p[:, None] >= 1)
    return jnp.min(jnp.where(inside_BV & nucleus_BV, falling_BV, jnp.inf), axis=-1)


def _noise(key: jax.Array, position: jax.Array, size: int) -> jax.Array:
    """Gumbel noise: the largest sum of logit and noise falls on a token with its softmax probability."""
    return jax.random.gumbel(jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position), (size,), jnp.float32)
