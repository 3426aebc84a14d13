"""Every weight of a model, declared once: path, shape, logical axes, initial values. No JAX here.

The model builds its parameters from this list; `explain`, the parameter count, FLOP and byte arithmetic,
Hugging Face exchange and checkpoints read the same list.

Paths: `embed/table`, `segments/S/P/attention/query` (segment S, position P in its pattern; scanned layers have
a leading `layer` dim of size `repeats`), `segments/S/P/R/attention/query` (unrolled: repeat R), `head/kernel`.
In a pipelined segment: `segments/S/P/pipeline/attention/query` (leading dims `repeat`, `stage`, `layer`, which in this
order are the segment's first repeats) and, for the repeats behind the pipeline, `segments/S/P/after/attention/query`,
stacked, or unrolled `segments/S/P/after/R/attention/query` with R counted from 0.
Modules of multi-token prediction: `multi_token/K/from_hidden`, `multi_token/K/block/attention/query`, K from 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from trainer.config.model import Attention, Block, GatedMlp, LatentAttention, Model, Moe, Norm

if TYPE_CHECKING:
    from trainer.config.pipeline import PipelinePlan

LAYER_AXIS = "layer"
PIPELINE_PARTS = ("pipeline", "after")
"""Parts of a pipelined segment, in its paths: the layers in the pipeline, and those behind it."""
LAYER_AXES = ("repeat", "stage", LAYER_AXIS)
"""Leading dims of a weight that holds several layers: the last one, or in a pipeline all three."""


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
    batch: int = 0
    """Dims of one layer's tensor before those: experts, each with a matrix (or a bias) of its own."""
    exact: bool = False
    """Used in float32, whatever the compute dtype."""
    trained: bool = True
    """False: no gradient moves it; the model does by itself, after a step."""

    first_repeat: int = 0
    """Of its segment, the first one it holds."""

    @property
    def layer_dims(self) -> int:
        """Leading dims on which the weights of several repeats are stacked: 1, 3 in a pipeline, 0 for a single layer's weight."""
        return sum(axis in LAYER_AXES for axis in self.axes[:3])

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape in one layer."""
        return self.shape[self.layer_dims :]


def weights(model: Model, pipeline: PipelinePlan | None = None) -> tuple[Weight, ...]:
    """All weights of `model` in its own layout (`model.layers`, `pipeline`), in forward order."""
    return tuple(_weights(model, pipeline))


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


def stacked_path(path: str) -> str:
    """The path a weight has when all repeats of its segment are stacked, whatever form it has itself."""
    parts = path.split("/")
    if parts[0] == "segments" and parts[3] in PIPELINE_PARTS:
        del parts[3]
    return split_repeat("/".join(parts))[0]


def _weights(model: Model, pipeline: PipelinePlan | None) -> Iterator[Weight]:
    normal = Normal(model.initializer_stddev)
    yield Weight("embed/table", (model.vocab_size, model.width), ("vocab", "embed"), normal, 1)
    for s, segment in enumerate(model.segments):
        for p, block in enumerate(segment.pattern):
            declared = list(_block(block, model.width, normal))
            for form in _forms(model, s, pipeline):
                for weight in declared:
                    path = "/".join(part for part in ("segments", str(s), str(p), form.name, weight.path) if part)
                    yield replace(
                        weight,
                        path=path,
                        shape=(*form.shape, *weight.shape),
                        axes=(*form.axes, *weight.axes),
                        first_repeat=form.first_repeat,
                    )
    yield _norm("final_norm", model.final_norm, model.width)
    if not model.tie_embeddings:
        yield Weight("head/kernel", (model.width, model.vocab_size), ("embed", "vocab"), normal, 1)
    for index in range(model.depth):
        yield from _module(f"multi_token/{index}", model, normal)


def _module(path: str, model: Model, normal: Normal) -> Iterator[Weight]:
    """A module of multi-token prediction. Its joint projection of two vectors is two matrices, whose results are added."""
    for name in ("hidden", "token"):
        yield _norm(f"{path}/{name}_norm", model.final_norm, model.width)
        yield Weight(f"{path}/from_{name}", (model.width, model.width), ("embed", "norm"), normal, 1)
    for weight in _block(model.blocks[-1], model.width, normal):
        yield replace(weight, path=f"{path}/block/{weight.path}")
    yield _norm(f"{path}/final_norm", model.final_norm, model.width)


class _Form(NamedTuple):
    """How some repeats of a segment are held in one weight."""

    name: str  # in the path
    first_repeat: int
    shape: tuple[int, ...]
    axes: tuple[str, ...]


def _forms(model: Model, segment: int, pipeline: PipelinePlan | None) -> Iterator[_Form]:
    repeats = model.segments[segment].repeats
    pipelined, prefix = 0, ""
    if pipeline is not None and pipeline.segment == segment:
        pipelined, prefix = pipeline.patterns, "after"
        yield _Form("pipeline", 0, pipeline.stacked, LAYER_AXES)
    rest = repeats - pipelined
    if model.layers == "scan":
        if rest:
            yield _Form(prefix, pipelined, (rest,), LAYER_AXES[-1:])
        return
    for index in range(rest):
        yield _Form(f"{prefix}/{index}" if prefix else str(index), pipelined + index, (), ())


def _norm(name: str, norm: Norm, size: int) -> Weight:
    return Weight(f"{name}/scale", (size,), ("norm",), Constant(1.0 - norm.offset), 0)


def _block(block: Block, width: int, normal: Normal) -> Iterator[Weight]:
    for part, inner in (("attention", _attention(block.attention, width, normal)), ("mlp", _mlp(block.mlp, width, normal))):
        if block.norms != "post":
            yield _norm(f"{part}_norm", block.norm, width)
        yield from inner
        if block.norms != "pre":
            yield _norm(f"{part}_post_norm", block.norm, width)


def _attention(attention: Attention | LatentAttention, width: int, normal: Normal) -> Iterator[Weight]:
    match attention:
        case Attention():
            yield from _grouped_attention(attention, width, normal)
        case LatentAttention():
            yield from _latent_attention(attention, width, normal)


def _grouped_attention(attention: Attention, width: int, normal: Normal) -> Iterator[Weight]:
    projections = (("query", attention.heads, "heads"), ("key", attention.kv_heads, "kv_heads"), ("value", attention.kv_heads, "kv_heads"))
    for name, heads, axis in projections:
        yield Weight(f"attention/{name}", (width, heads, attention.head_dim), ("embed", axis, "head_dim"), normal, 1)
        if attention.qkv_bias:
            yield Weight(f"attention/{name}_bias", (heads, attention.head_dim), (axis, "head_dim"), Constant(0.0), 0)
    if (norm := attention.qk_norm) is not None:
        for name, heads, axis in projections[:2]:
            scale = _norm(f"attention/{name}_norm", norm, attention.head_dim)
            if attention.qk_norm_over == "all_heads":
                scale = replace(scale, shape=(heads, attention.head_dim), axes=(axis, "head_dim"))
            yield scale
    if attention.sinks:
        yield Weight("attention/sinks", (attention.heads,), ("heads",), Constant(0.0), 0)
    yield from _attention_output(attention, width, normal, bias=attention.output_bias)


def _latent_attention(attention: LatentAttention, width: int, normal: Normal) -> Iterator[Weight]:
    head = (attention.heads, attention.head_dim)
    if (rank := attention.query_rank) is None:
        yield Weight("attention/query", (width, *head), ("embed", "heads", "head_dim"), normal, 1)
    else:
        yield from _to_latent("query", attention, width, rank, rank, normal)
        yield Weight("attention/query_up", (rank, *head), ("latent", "heads", "head_dim"), normal, 1)
    rank = attention.key_value_rank
    yield from _to_latent("key_value", attention, width, rank, rank + attention.rope_dim, normal)
    shape = (rank, attention.heads, attention.plain_dim + attention.value_dim)
    yield Weight("attention/key_value_up", shape, ("latent", "heads", "head_dim"), normal, 1)
    yield from _attention_output(attention, width, normal, bias=attention.bias)


def _to_latent(name: str, attention: LatentAttention, width: int, rank: int, outputs: int, normal: Normal) -> Iterator[Weight]:
    yield Weight(f"attention/{name}_down", (width, outputs), ("embed", "latent"), normal, 1)
    if attention.bias:
        yield Weight(f"attention/{name}_down_bias", (outputs,), ("norm",), Constant(0.0), 0)
    yield _norm(f"attention/{name}_norm", attention.latent_norm, rank)


def _attention_output(attention: Attention | LatentAttention, width: int, normal: Normal, *, bias: bool) -> Iterator[Weight]:
    yield Weight("attention/out", (attention.heads, attention.value_dim, width), ("heads", "head_dim", "embed"), normal, 2)
    if bias:
        yield Weight("attention/out_bias", (width,), ("norm",), Constant(0.0), 0)


def _mlp(mlp: GatedMlp | Moe, width: int, normal: Normal) -> Iterator[Weight]:
    match mlp:
        case GatedMlp():
            yield from _gated("mlp", mlp.hidden, width, normal, bias=mlp.bias)
        case Moe():
            yield Weight("mlp/router/kernel", (width, mlp.experts), ("embed", "router"), normal, 1, exact=True)
            if mlp.router.bias:
                yield Weight("mlp/router/bias", (mlp.experts,), ("router",), Constant(0.0), 0)
            if mlp.router.bias_balancing is not None:
                yield Weight("mlp/router/balance", (mlp.experts,), ("router",), Constant(0.0), 0, trained=False)
            for weight in _gated("mlp/experts", mlp.hidden, width, normal, bias=mlp.bias):
                yield replace(weight, shape=(mlp.experts, *weight.shape), axes=("expert", *weight.axes), batch=1)
            if mlp.shared_hidden is not None:
                yield from _gated("mlp/shared", mlp.shared_hidden, width, normal, bias=False)


def _gated(path: str, hidden: int, width: int, normal: Normal, *, bias: bool) -> Iterator[Weight]:
    for name in ("gate", "up"):
        yield Weight(f"{path}/{name}", (width, hidden), ("embed", "mlp"), normal, 1)
        if bias:
            yield Weight(f"{path}/{name}_bias", (hidden,), ("mlp",), Constant(0.0), 0)
    yield Weight(f"{path}/down", (hidden, width), ("mlp", "embed"), normal, 1)
    if bias:
        yield Weight(f"{path}/down_bias", (width,), ("norm",), Constant(0.0), 0)
