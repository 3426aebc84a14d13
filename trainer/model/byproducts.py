"""What a model's layers say beside their results: sums for the loss, statistics of the batch, and what moves by them.

R repeats of a segment's pattern, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from trainer.config.model import Model, Moe
from trainer.config.weights import stacked_path


class Outputs(NamedTuple):
    hidden: jax.Array  # compute dtype [B, T, D], after the final norm
    further: tuple[jax.Array, ...]
    """The same of each module of multi-token prediction: of one token further than the module before."""
    terms: dict[str, jax.Array]
    """Float32 scalars by the names of `trainer.config.terms`, not weighted."""
    statistics: dict[str, jax.Array]
    """Additive over parts of a batch: `load/PATH` float32 [R, E], choices that fell on each expert of the mixture at PATH
    (`segments/S/P`, `multi_token/K`), and `dropped/PATH` [R], those that found no room."""


def mixture_sums(model: Model, products: Sequence[Any]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Terms and statistics of the mixtures of experts, from what `Transformer.forward` returns beside its result.

    A term is the mean over the mixtures of the model, so that its weight means the same at any depth.
    """
    found = mixtures(model, products)
    names = ("load_balance", "router_z_loss") if found else ()
    terms = {name: jnp.mean(jnp.concatenate([sums[name] for sums in found.values()])) for name in names}
    statistics = {f"{name}/{path}": sums[name] for path, sums in found.items() for name in ("load", "dropped")}
    return terms, statistics


def mixtures(model: Model, products: Sequence[Any]) -> dict[str, dict[str, jax.Array]]:
    """By-products of the mixtures with a leading dim of all repeats, by `segments/S/P` (position P in the pattern of segment S)
    and `multi_token/K`. products: of every segment, then of every module of multi-token prediction.

    Raises ValueError where a mixture's by-products are not there: a layer's loss must not be lost on the way.
    """
    found: dict[str, dict[str, jax.Array]] = {}
    for s, segment in enumerate(model.segments):
        for p, block in enumerate(segment.pattern):
            if not isinstance(block.mlp, Moe):
                continue
            if model.layers == "scan":
                sums = products[s][p].get("moe")
            else:
                layers = [layer[p].get("moe") for layer in products[s]]
                sums = None if None in layers else jax.tree.map(lambda *values: jnp.stack(values), *layers)
            if sums is None or len(sums["load"]) != segment.repeats:
                raise ValueError(f"the mixtures of experts at segments/{s}/{p} did not hand out what they routed")
            found[f"segments/{s}/{p}"] = sums
    for k, product in enumerate(products[len(model.segments) :]):
        if isinstance(model.blocks[-1].mlp, Moe):
            found[f"multi_token/{k}"] = jax.tree.map(lambda value: value[None], product["moe"])
    return found


def advance_bias(model: Model, balance: nnx.Param, statistics: Mapping[str, jax.Array]) -> None:
    """`balance` of one router, or of several stacked: up by the update rate where an expert's load was below the mean, down
    where it was above (Wang et al. 2024, algorithm 1)."""
    place = stacked_path(balance.path).split("/")
    in_segment = place[0] == "segments"
    mlp = model.segments[int(place[1])].pattern[int(place[2])].mlp if in_segment else model.blocks[-1].mlp
    assert isinstance(mlp, Moe)
    assert mlp.router.bias_balancing is not None
    old = balance[...]
    first, experts = balance.first_repeat, old.shape[-1]
    load_RE = statistics["/".join(["load", *place[: 3 if in_segment else 2]])][first : first + old.size // experts]
    below_RE = jnp.sign(jnp.mean(load_RE, axis=-1, keepdims=True) - load_RE)
    balance[...] = old + mlp.router.bias_balancing.update_rate * below_RE.reshape(old.shape)


def statistics_metrics(statistics: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """`expert_load/PATH` [R, E]: choices that fell on each expert, 1 being the mean of its mixture; `expert_load_max`
    and `expert_load_min` over all of them; `dropped_choices`, the share of all choices that found no room."""
    loads = {path.removeprefix("load/"): load for path, load in statistics.items() if path.startswith("load/")}
    if not loads:
        return {}
    shares = {
        f"expert_load/{path}": load_RE / jnp.maximum(jnp.mean(load_RE, axis=-1, keepdims=True), 1e-9) for path, load_RE in loads.items()
    }
    dropped = sum(jnp.sum(value) for path, value in statistics.items() if path.startswith("dropped/"))
    return {
        **shares,
        "expert_load_max": jnp.max(jnp.stack([jnp.max(share) for share in shares.values()])),
        "expert_load_min": jnp.min(jnp.stack([jnp.min(share) for share in shares.values()])),
        "dropped_choices": dropped / jnp.maximum(sum(jnp.sum(load) for load in loads.values()), 1),
    }
