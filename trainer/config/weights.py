"""Every weight of a model, declared once: path, shape, logical axes, initial values. No JAX here.

The model builds its parameters from this list; `explain`, the parameter count, FLOP and byte arithmetic,
Hugging Face exchange and checkpoints read the same list.

Paths: `embed/table`, `segments/S/P/attention/query` (segment S, position P in its pattern; scanned layers have
a leading `layer` dim of size `repeats`), `segments/S/P/R/attention/query` (unrolled: repeat R), `head/kernel`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from trainer.config.model import Attention, Block, GatedMlp, Model

LAYER_AXIS = "layer"


@dataclass(frozen=True)
class Normal:
    """Gaussian with mean 0."""

    stddev: float


@dataclass(frozen=True)
class Constant:
    value: float


Init = Normal | Constant


@dataclass(frozen=True)
class Weight:
    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    """Logical axis of each dim."""
    init: Init
    inputs: int
    """Leading dims of one layer's tensor that the forward matmul contracts; 0 for vectors (norms, biases)."""

    @property
    def layer_dims(self) -> int:
        """1 where the weights of all repeats are stacked on a leading dim, else 0."""
        return int(self.axes[:1] == (LAYER_AXIS,))

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape in one layer."""
        return self.shape[self.layer_dims :]


def weights(model: Model) -> tuple[Weight, ...]:
    """All weights of `model` in its own layout (`model.layers`), in forward order."""
    return tuple(_weights(model))


def parameter_count(model: Model) -> int:
    return sum(math.prod(weight.shape) for weight in weights(model))


def split_repeat(path: str) -> tuple[str, int | None]:
    """The path a weight has when its repeats are stacked, and the repeat it names itself (None unless unrolled).

    `segments/0/1/7/attention/query` -> (`segments/0/1/attention/query`, 7).
    """
    parts = path.split("/")
    if parts[0] == "segments" and len(parts) > 3 and parts[3].isdigit():
        return "/".join(parts[:3] + parts[4:]), int(parts[3])
    return path, None


def join_repeat(path: str, repeat: int) -> str:
    """The unrolled path of one repeat of a stacked weight; the inverse of `split_repeat`."""
    parts = path.split("/")
    return "/".join([*parts[:3], str(repeat), *parts[3:]])


def _weights(model: Model) -> Iterator[Weight]:
    normal = Normal(model.initializer_stddev)
    yield Weight("embed/table", (model.vocab_size, model.width), ("vocab", "embed"), normal, 1)
    for s, segment in enumerate(model.segments):
        for p, block in enumerate(segment.pattern):
            declared = list(_block(block, model.width, normal))
            if model.layers == "scan":
                for weight in declared:
                    stacked = (segment.repeats, *weight.shape)
                    yield replace(weight, path=f"segments/{s}/{p}/{weight.path}", shape=stacked, axes=(LAYER_AXIS, *weight.axes))
            else:
                for r in range(segment.repeats):
                    yield from (replace(weight, path=f"segments/{s}/{p}/{r}/{weight.path}") for weight in declared)
    yield _norm("final_norm", model.width)
    if not model.tie_embeddings:
        yield Weight("head/kernel", (model.width, model.vocab_size), ("embed", "vocab"), normal, 1)


def _norm(name: str, size: int) -> Weight:
    return Weight(f"{name}/scale", (size,), ("norm",), Constant(1.0), 0)


def _block(block: Block, width: int, normal: Normal) -> Iterator[Weight]:
    yield _norm("attention_norm", width)
    yield from _attention(block.attention, width, normal)
    yield _norm("mlp_norm", width)
    yield from _gated_mlp(block.mlp, width, normal)


def _attention(attention: Attention, width: int, normal: Normal) -> Iterator[Weight]:
    projections = (("query", attention.heads, "heads"), ("key", attention.kv_heads, "kv_heads"), ("value", attention.kv_heads, "kv_heads"))
    for name, heads, axis in projections:
        yield Weight(f"attention/{name}", (width, heads, attention.head_dim), ("embed", axis, "head_dim"), normal, 1)
        if attention.qkv_bias:
            yield Weight(f"attention/{name}_bias", (heads, attention.head_dim), (axis, "head_dim"), Constant(0.0), 0)
    if attention.qk_norm is not None:
        yield _norm("attention/query_norm", attention.head_dim)
        yield _norm("attention/key_norm", attention.head_dim)
    yield Weight("attention/out", (attention.heads, attention.head_dim, width), ("heads", "head_dim", "embed"), normal, 2)
    if attention.output_bias:
        yield Weight("attention/out_bias", (width,), ("norm",), Constant(0.0), 0)


def _gated_mlp(mlp: GatedMlp, width: int, normal: Normal) -> Iterator[Weight]:
    for name in ("gate", "up"):
        yield Weight(f"mlp/{name}", (width, mlp.hidden), ("embed", "mlp"), normal, 1)
        if mlp.bias:
            yield Weight(f"mlp/{name}_bias", (mlp.hidden,), ("mlp",), Constant(0.0), 0)
    yield Weight("mlp/down", (mlp.hidden, width), ("mlp", "embed"), normal, 1)
    if mlp.bias:
        yield Weight("mlp/down_bias", (width,), ("norm",), Constant(0.0), 0)
