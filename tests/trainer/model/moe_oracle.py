"""A mixture of experts token by token in float64: the definition the model's forms are held against. NumPy alone.

B sequences, T tokens, K experts of a token, E experts, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from trainer.config.model import Moe

Arrays = Mapping[str, np.ndarray]


class Mixed(NamedTuple):
    y: np.ndarray  # [B, T, D]; what padding gives has no meaning
    load_balance: float
    router_z_loss: float
    load: np.ndarray  # [E]
    dropped: set[tuple[int, int, int]]  # (sequence, token, place among its choices)


def mixture(x: np.ndarray, valid: np.ndarray, params: Arrays, spec: Moe, *, factor: float | None = None) -> Mixed:
    """x [B, T, D], valid [B, T]; `params` by their paths below `mlp/`. factor: room of an expert; None drops nothing."""
    B, T, D = x.shape
    E, K = spec.experts, spec.experts_per_token
    room = None if factor is None else math.ceil(factor * T * K / E)
    y, load, dropped, balance, z = np.zeros((B, T, D)), np.zeros(E), set(), 0.0, 0.0
    for b in range(B):
        taken, mean_probability, tokens = np.zeros(E), np.zeros(E), int(valid[b].sum())
        for t in range(T):
            if not valid[b, t]:
                continue
            logits = x[b, t] @ params["router/kernel"] + params.get("router/bias", 0.0)
            chosen, weights, probabilities = choose(logits, params.get("router/balance"), spec)
            mean_probability += probabilities / tokens
            z += math.log(np.exp(logits).sum()) ** 2
            for place, (expert, weight) in enumerate(zip(chosen, weights, strict=True)):
                full = room is not None and taken[expert] >= room
                taken[expert] += 1
                if full:
                    dropped.add((b, t, place))
                else:
                    y[b, t] += weight * gated(x[b, t], {name: params[name][expert] for name in params if name.startswith("experts/")}, spec)
            if spec.shared_hidden is not None:
                y[b, t] += gated(x[b, t], {name.replace("shared", "experts"): params[name] for name in params if "shared/" in name}, spec)
        load += taken
        balance += tokens * E * float(taken @ mean_probability) / (K * max(tokens, 1))
    return Mixed(y, balance, z, load, dropped)


def choose(logits: np.ndarray, balance: np.ndarray | None, spec: Moe) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Experts of one token, best first, their weights, and probabilities of all experts."""
    router = spec.router
    softmax = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    sigmoid = 1 / (1 + np.exp(-logits))
    scores = {"softmax": softmax, "softmax_of_chosen": logits, "sigmoid": sigmoid}[router.scoring]
    choice = scores + (0 if balance is None else balance)
    allowed = set(range(spec.experts))
    if router.groups is not None:
        size = spec.experts // router.groups.count
        best = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(router.groups.count)]
        groups = sorted(range(router.groups.count), key=lambda g: -best[g])[: router.groups.chosen]
        allowed = {g * size + e for g in groups for e in range(size)}
    experts = sorted(allowed, key=lambda e: -choice[e])[: spec.experts_per_token]
    weights = scores[experts]
    if router.scoring == "softmax_of_chosen":
        weights = np.exp(weights) / np.exp(weights).sum()
    elif router.normalize:
        weights = weights / weights.sum()
    return experts, weights * router.scale, sigmoid / sigmoid.sum() if router.scoring == "sigmoid" else softmax


def gated(x: np.ndarray, expert: Arrays, spec: Moe) -> np.ndarray:
    gate = x @ expert["experts/gate"] + expert.get("experts/gate_bias", 0.0)
    up = x @ expert["experts/up"] + expert.get("experts/up_bias", 0.0)
    if spec.clamp is None:
        assert spec.activation == "silu"
        hidden = gate / (1 + np.exp(-gate)) * up
    else:
        limit, slope = spec.clamp.limit, spec.clamp.slope
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        hidden = (up + 1) * gate / (1 + np.exp(-slope * gate))
    return hidden @ expert["experts/down"] + expert.get("experts/down_bias", 0.0)
