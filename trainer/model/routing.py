"""Which experts a token goes to, with what weights, and how evenly: in float32.

B sequences, T tokens, E experts, K experts of a token, G groups of experts.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from trainer.config.model import Moe


class Routing(NamedTuple):
    experts: jax.Array  # int32 [B, T, K]
    weights: jax.Array  # float32 [B, T, K]
    probabilities: jax.Array  # float32 [B, T, E], sums to 1: what the load-balance loss takes
    logits: jax.Array  # float32 [B, T, E]


def route(logits_BTE: jax.Array, spec: Moe, balance_E: jax.Array | None = None) -> Routing:
    """Experts and weights of float32 logits.

    balance_E float32: added to the scores for the choice, not for the weight (Wang et al. 2024). Gradients pass the
    weights, never the choice.
    """
    router = spec.router
    match router.scoring:
        case "softmax":
            scores_BTE = probabilities_BTE = jax.nn.softmax(logits_BTE, axis=-1)
        case "softmax_of_chosen":
            scores_BTE, probabilities_BTE = logits_BTE, jax.nn.softmax(logits_BTE, axis=-1)
        case "sigmoid":
            scores_BTE = jax.nn.sigmoid(logits_BTE)
            probabilities_BTE = scores_BTE / (jnp.sum(scores_BTE, axis=-1, keepdims=True) + 1e-20)
    choice_BTE = jax.lax.stop_gradient(scores_BTE)
    if balance_E is not None:
        choice_BTE = choice_BTE + jax.lax.stop_gradient(balance_E)[None, None, :]
    if router.groups is not None:
        choice_BTE = _best_groups_only(choice_BTE, router.groups.count, router.groups.chosen)
    experts_BTK = jax.lax.top_k(choice_BTE, spec.experts_per_token)[1]
    weights_BTK = jnp.take_along_axis(scores_BTE, experts_BTK, axis=-1)
    if router.scoring == "softmax_of_chosen":
        weights_BTK = jax.nn.softmax(weights_BTK, axis=-1)
    elif router.normalize:
        # As DeepSeek-V3's model code: sigmoids may all underflow.
        weights_BTK = weights_BTK / (jnp.sum(weights_BTK, axis=-1, keepdims=True) + 1e-20)
    if router.scale != 1:
        weights_BTK = weights_BTK * router.scale
    return Routing(experts_BTK, weights_BTK, probabilities_BTE, logits_BTE)


def _best_groups_only(choice_BTE: jax.Array, count: int, chosen: int) -> jax.Array:
    """-inf for experts outside of the `chosen` groups whose two best scores have the largest sums."""
    choice_BTGE = choice_BTE.reshape(*choice_BTE.shape[:-1], count, -1)
    best_BTG = jnp.sum(jax.lax.top_k(choice_BTGE, min(2, choice_BTGE.shape[-1]))[0], axis=-1)
    groups_BTC = jax.lax.top_k(best_BTG, chosen)[1]
    open_BTG = jnp.any(jax.nn.one_hot(groups_BTC, count, dtype=bool), axis=-2)
    return jnp.where(open_BTG[..., None], choice_BTGE, -jnp.inf).reshape(choice_BTE.shape)


def chosen_experts(experts_BTK: jax.Array, experts: int, valid_BT: jax.Array) -> jax.Array:
    """1 where a token that is not padding chose the expert, float32 [B, T, E]."""
    return jnp.sum(jax.nn.one_hot(experts_BTK, experts, dtype=jnp.float32), axis=-2) * valid_BT[..., None]


def load_balance_sum(routing: Routing, taken_BTE: jax.Array, valid_BT: jax.Array) -> jax.Array:
    """Sum over tokens of their sequence's `E * sum_e f_e P_e`: f_e the share of the sequence's choices on expert e, P_e its
    mean probability there (Fedus et al. 2021, equation 4, by sequence). Float32 scalar; padding takes no part.

    By sequence, it adds up over microbatches and devices, so that no split of the batch changes it.
    """
    experts, chosen = taken_BTE.shape[-1], routing.experts.shape[-1]
    tokens_B = jnp.sum(valid_BT, axis=1, dtype=jnp.float32)
    counts_BE = jnp.sum(taken_BTE, axis=1)
    probabilities_BE = jnp.sum(jnp.where(valid_BT[..., None], routing.probabilities, 0), axis=1)
    return jnp.sum(experts / chosen * counts_BE * probabilities_BE / jnp.maximum(tokens_B, 1)[:, None])


def z_loss_sum(routing: Routing, valid_BT: jax.Array) -> jax.Array:
    """Sum over tokens of log(sum_e exp(logit_e))^2 (Zoph et al. 2022, equation 5); padding takes no part."""
    return jnp.sum(jnp.where(valid_BT, jnp.square(jax.nn.logsumexp(routing.logits, axis=-1)), 0))
