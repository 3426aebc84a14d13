"""The floor: the train step of `work` written by hand in plain JAX, for the trainer's step to be measured against.

The same arithmetic (packing by segments, remat, scan, loss over valid tokens, clip, AdamW, cosine), with none of the
trainer's generality: no modules, no rules, no selects against NaN, shapes fixed.

B sequences, T tokens, N heads, H head dim, D model width, F MLP hidden width, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trainer.config import TrainConfig

Params = dict[str, jax.Array]
Batch = dict[str, jax.Array]

# Where fsdp splits each weight.
SPECS = {
    "embed_VD": P(None, "fsdp"), "head_DV": P("fsdp"), "norm_D": P(), "attention_norm_LD": P(), "mlp_norm_LD": P(),
    "query_LDNH": P(None, "fsdp"), "key_LDNH": P(None, "fsdp"), "value_LDNH": P(None, "fsdp"), "out_LNHD": P(None, None, None, "fsdp"),
    "gate_LDF": P(None, "fsdp"), "up_LDF": P(None, "fsdp"), "down_LFD": P(None, None, "fsdp"),
}  # fmt: skip


class State(NamedTuple):
    params: Params
    mean: Params  # Adam's first moment
    square: Params  # and second
    step: jax.Array  # int32 scalar


def make_floor(config: TrainConfig, mesh: Mesh) -> tuple[Callable[[State, Batch], tuple[State, dict[str, jax.Array]]], State]:
    """The jitted step, state donated, and a first state."""
    (segment,) = config.model.segments
    (block,) = segment.pattern
    optimizer, schedule = config.optimizer, config.schedule
    assert schedule.type == "cosine" and optimizer.clip_norm is not None
    clip_norm = optimizer.clip_norm
    L, D, V, F = segment.repeats, config.model.width, config.model.vocab_size, block.mlp.hidden
    N, H = block.attention.heads, block.attention.head_dim
    shapes = {
        "embed_VD": (V, D), "head_DV": (D, V), "norm_D": (D,), "attention_norm_LD": (L, D), "mlp_norm_LD": (L, D),
        "query_LDNH": (L, D, N, H), "key_LDNH": (L, D, N, H), "value_LDNH": (L, D, N, H), "out_LNHD": (L, N, H, D),
        "gate_LDF": (L, D, F), "up_LDF": (L, D, F), "down_LFD": (L, F, D),
    }  # fmt: skip

    def rows(x: jax.Array) -> jax.Array:
        """Batch over the devices, all else whole."""
        return x if mesh.size == 1 else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("fsdp")))

    def layer(x_BTD: jax.Array, w: Params, mask_BTS: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        x_BTD = rows(x_BTD)
        h_BTD = rms_norm(x_BTD, w["attention_norm_LD"])
        query, key, value = (rows(jnp.einsum("BTD,DNH->BTNH", h_BTD, w[name])) for name in ("query_LDNH", "key_LDNH", "value_LDNH"))
        scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", rotate(query, cos, sin) * H**-0.5, rotate(key, cos, sin))
        weights_BNTS = jax.nn.softmax(jnp.where(mask_BTS[:, None], scores_BNTS, -1e30), axis=-1)
        mixed_BTNH = jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, value)
        x_BTD = x_BTD + jnp.einsum("BTNH,NHD->BTD", rows(mixed_BTNH), w["out_LNHD"])
        h_BTD = rms_norm(x_BTD, w["mlp_norm_LD"])
        hidden_BTF = rows(jax.nn.silu(h_BTD @ w["gate_LDF"]) * (h_BTD @ w["up_LDF"]))
        return rows(x_BTD + hidden_BTF @ w["down_LFD"])

    def loss(params: Params, batch: Batch) -> jax.Array:
        positions, segments = batch["positions"], batch["segments"]
        angles = positions[..., None].astype(jnp.float32) * (10_000.0 ** (-jnp.arange(0, H, 2) / H))[None, None]
        cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
        mask_BTS = (segments[:, :, None] == segments[:, None, :]) & (positions[:, :, None] >= positions[:, None, :])
        x_BTD = rows(params["embed_VD"][batch["inputs"]])
        stacked = {name: params[name] for name in shapes if "_L" in name}
        policy = jax.checkpoint_policies.nothing_saveable
        body = jax.checkpoint(lambda x, w: layer(x, w, mask_BTS, cos, sin), policy=policy, prevent_cse=False)
        x_BTD, _ = jax.lax.scan(lambda x, w: (body(x, w), None), x_BTD, stacked)
        # One matrix of rows: a head product over [B, T, D] makes XLA transpose a [B, T, V] array for the gradient.
        x_ND = rms_norm(x_BTD, params["norm_D"]).reshape(-1, D)
        logits_NV = rows(x_ND @ params["head_DV"])
        return cross_entropy(logits_NV, batch["targets"].reshape(-1), batch["weights"].reshape(-1) > 0)

    def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        tokens = jnp.maximum(jnp.sum(batch["weights"] > 0, dtype=jnp.float32), 1)
        value, gradients = jax.value_and_grad(lambda params: loss(params, batch) / tokens)(state.params)
        norm = jnp.sqrt(sum((jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradients)), jnp.float32(0)))
        scale = jnp.minimum(1, clip_norm / norm)
        count = state.step.astype(jnp.float32)
        warm = jnp.minimum((count + 1) / schedule.warmup_steps, 1)
        done = jnp.clip((count - schedule.warmup_steps) / (config.steps - schedule.warmup_steps), 0, 1)
        final = schedule.final_fraction
        rate = schedule.learning_rate * warm * (final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * done)))
        b1, b2 = optimizer.b1, optimizer.b2
        unbias_mean, unbias_square = 1 / (1 - b1 ** (count + 1)), 1 / (1 - b2 ** (count + 1))

        def update(weight: jax.Array, mean: jax.Array, square: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            gradient = gradient * scale
            mean = b1 * mean + (1 - b1) * gradient
            square = b2 * square + (1 - b2) * gradient * gradient
            adam = (mean * unbias_mean) / (jnp.sqrt(square * unbias_square) + optimizer.epsilon)
            return weight - rate * (adam + optimizer.weight_decay * weight), mean, square

        updated = {name: update(state.params[name], state.mean[name], state.square[name], gradients[name]) for name in shapes}
        params, mean, square = ({name: leaves[i] for name, leaves in updated.items()} for i in range(3))
        return State(params, mean, square, state.step + 1), {"loss": value, "gradient_norm": norm, "learning_rate": rate}

    def init() -> State:
        keys = jax.random.split(jax.random.key(0), len(shapes))
        params = {
            name: jnp.ones(shape) if "norm" in name else 0.02 * jax.random.normal(key, shape)
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        zeros = jax.tree.map(jnp.zeros_like, params)
        return State(params, zeros, jax.tree.map(jnp.copy, zeros), jnp.int32(0))

    by_name = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    shardings = State._make((by_name, by_name, by_name, NamedSharding(mesh, P())))
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, P())))
    return jitted, jax.jit(init, out_shardings=shardings)()


def rms_norm(x: jax.Array, scale_D: jax.Array) -> jax.Array:
    scaled: jax.Array = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-5)
    return scaled * jnp.expand_dims(scale_D, range(x.ndim - 1))


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@jax.custom_vjp
def cross_entropy(logits_NV: jax.Array, targets_N: jax.Array, valid_N: jax.Array) -> jax.Array:
    """Sum over valid rows of -log softmax(logits)[target]; the gradient is made in one pass over the logits."""
    return _cross_entropy_forward(logits_NV, targets_N, valid_N)[0]


def _cross_entropy_forward(logits_NV: jax.Array, targets_N: jax.Array, valid_N: jax.Array) -> tuple[jax.Array, Any]:
    top_N = jnp.max(logits_NV, axis=-1)
    log_z_N = top_N + jnp.log(jnp.sum(jnp.exp(logits_NV - top_N[:, None]), axis=-1))
    target_N = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]
    return jnp.sum(jnp.where(valid_N, log_z_N - target_N, 0)), (logits_NV, log_z_N, targets_N, valid_N)


def _cross_entropy_backward(residuals: Any, gradient: jax.Array) -> tuple[jax.Array, None, None]:
    logits_NV, log_z_N, targets_N, valid_N = residuals
    hit_NV = jax.lax.broadcasted_iota(jnp.int32, logits_NV.shape, 1) == targets_N[:, None]
    probability_NV = jnp.exp(logits_NV - log_z_N[:, None])
    return jnp.where(valid_N[:, None], jnp.where(hit_NV, probability_NV - 1, probability_NV) * gradient, 0), None, None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
