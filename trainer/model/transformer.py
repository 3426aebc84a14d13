"""The decoder-only transformer, built from its config's segments. It knows logical axes and no mesh.

B sequences, T tokens, N = B x T rows, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from trainer.config.model import Attention as AttentionSpec
from trainer.config.model import Block as BlockSpec
from trainer.config.model import GatedMlp, Model, Segment
from trainer.config.pipeline import PipelinePlan
from trainer.config.weights import weights
from trainer.model.attention import Attention, ByProducts, Cache, Context, make_context
from trainer.model.byproducts import Outputs, advance_bias, mixture_sums
from trainer.model.dropout import Dropout
from trainer.model.latent import LatentAttention
from trainer.model.layers import Mlp, Params, RmsNorm, einsum_float32, lookup, rows_times_kernel, select, under
from trainer.model.moe import MixtureOfExperts
from trainer.model.multi_token import Module, ahead, goes_on
from trainer.model.remat import policy_of
from trainer.model.stages import run_stages
from trainer.parallel.sharding import constrain

NORMS: Final = ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")
METADATA: Final = ("path", "axes", "init", "inputs", "batch", "exact", "first_repeat")
HIDDEN_AXES: Final = ("batch", "act_length", "act_embed")


class Block(nnx.Module):
    """Attention and MLP, each with its norms and a residual connection."""

    def __init__(self, spec: BlockSpec, params: Params) -> None:
        norms = {name: RmsNorm(spec.norm, under(params, name)) for name in NORMS if f"{name}/scale" in params}
        self.attention_norm, self.attention_post_norm, self.mlp_norm, self.mlp_post_norm = (norms.get(name) for name in NORMS)
        attention = Attention if isinstance(spec.attention, AttentionSpec) else LatentAttention
        self.attention = attention(spec.attention, under(params, "attention"))  # pyright: ignore[reportArgumentType]
        mlp = Mlp if isinstance(spec.mlp, GatedMlp) else MixtureOfExperts
        self.mlp = mlp(spec.mlp, under(params, "mlp"))  # pyright: ignore[reportArgumentType]

    def __call__(self, x_BTD: jax.Array, context: Context, past: Cache | None = None) -> tuple[jax.Array, ByProducts]:
        """past: what the layer's attention remembers of the tokens before these."""
        x_BTD = checkpoint_name(x_BTD, "block_input")
        x_BTD = select(context.valid, constrain(x_BTD, HIDDEN_AXES))
        mixed_BTD, products = self.attention(normed(self.attention_norm, x_BTD), context, past)
        x_BTD = x_BTD + context.drop(normed(self.attention_post_norm, mixed_BTD), "attention")
        mlp_BTD, routed = self.run_mlp(normed(self.mlp_norm, x_BTD), context)
        x_BTD = x_BTD + context.drop(normed(self.mlp_post_norm, mlp_BTD), "mlp")
        return constrain(x_BTD, HIDDEN_AXES), products | routed

    def run_mlp(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, ByProducts]:
        if isinstance(self.mlp, Mlp):
            return self.mlp(x_BTD), {}
        # A step of decoding sees a part of the sequence: what another part leaves no room for must not depend on it.
        y_BTD, routed = self.mlp(x_BTD, context.valid, dropless=context.remember, kernel=context.expert_kernel)
        return checkpoint_name(y_BTD, "mlp_down"), {} if context.remember else {"moe": routed}


def normed(norm: RmsNorm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)


class Transformer(nnx.Module):
    """Tokens in, logits out. Its parameters are those of `trainer.config.weights`, under the same paths."""

    def __init__(self, spec: Model, params: Params, pipeline: PipelinePlan | None = None) -> None:
        self.spec = spec
        self.pipeline = pipeline
        self.embed = nnx.Dict(under(params, "embed"))
        self.segments = nnx.List([_segment(spec, index, params, pipeline) for index in range(len(spec.segments))])
        self.final_norm = RmsNorm(spec.final_norm, under(params, "final_norm"))
        self.head = nnx.Dict(under(params, "head"))
        self.multi_token = nnx.List([_module(spec, under(params, f"multi_token/{k}")) for k in range(spec.depth)])

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
        """Logits, float32 [B, T, V].

        tokens int32; positions int32, counted from 0 in each document; segments int32, the document's number in
        its row from 1, 0 in padding. Padding may hold any token id. An id outside of the vocabulary elsewhere gives NaN.
        """
        return self.logits(self.hidden(tokens_BT, positions_BT, segments_BT), segments_BT)

    def run(self, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array, noise_BT: jax.Array | None = None) -> Outputs:
        """What `hidden` returns, and what the layers say beside it. Arguments as of a call.

        noise: what `trainer.model.dropout.token_noise` gives, where dropout is wanted: in training. The modules of multi-token
        prediction have none.
        """
        plain = context = self.context(positions_BT, segments_BT)
        if noise_BT is not None:
            context = replace(context, dropout=Dropout(self.spec.dropout, noise_BT))
        x_BTD, products = self.forward(tokens_BT, context)
        hidden, further = x_BTD, list[jax.Array]()
        for k, module in enumerate(self.multi_token, 1):
            x_BTD, product = self.look_ahead(module, k, x_BTD, tokens_BT, segments_BT, plain)
            further.append(x_BTD)
            products.append(product)
        return Outputs(hidden, tuple(further), *mixture_sums(self.spec, products))

    def look_ahead(
        self, module: Module, k: int, x_BTD: jax.Array, tokens_BT: jax.Array, segments_BT: jax.Array, context: Context
    ) -> tuple[jax.Array, ByProducts]:
        """The k-th module's output after its final norm, [B, T, D]; where the document has ended before, it has no meaning."""
        there_BT = goes_on(segments_BT, k)
        with jax.default_matmul_precision(self.spec.matmul_precision):
            token_BTD = select(there_BT, self.embedding(ahead(tokens_BT, k), there_BT))
            graphdef, params = self.split(nnx.List([module.block]))

            def pure(params: nnx.State, x_BTD: jax.Array) -> tuple[jax.Array, ByProducts]:
                return nnx.merge(graphdef, params)[0](x_BTD, context)

            policy = policy_of(self.spec.remat)
            run = pure if policy is None else jax.checkpoint(pure, policy=policy)
            x_BTD, product = run(params, module.join(select(context.valid, x_BTD), token_BTD))
            return module.final_norm(select(context.valid, x_BTD)), product

    def advance(self, statistics: Mapping[str, jax.Array]) -> None:
        """Moves what no gradient moves: the routers' balancing biases, by the statistics of a whole step's batch."""
        for path, param in nnx.to_flat_state(nnx.state(self, nnx.Param)):
            if path[-2:] == ("router", "balance"):
                advance_bias(self.spec, param, statistics)

    def hidden(self, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
        """The last block's output after the final norm, compute dtype [B, T, D]. Arguments as of a call."""
        return self.forward(tokens_BT, self.context(positions_BT, segments_BT))[0]

    def context(self, positions_BT: jax.Array, segments_BT: jax.Array) -> Context:
        spec = self.spec
        return make_context(spec.patterns, positions_BT, segments_BT, kernel=spec.attention_kernel, expert_kernel=spec.expert_kernel)

    def forward(self, tokens_BT: jax.Array, context: Context, past: list[Any] | None = None) -> tuple[jax.Array, list[Any]]:
        """What `hidden` returns, and the by-products of every segment's blocks.

        past: for every segment what its layers remember, laid out as the by-products are: for each position in the
        pattern a tree with a leading `layer` dim; unrolled: a list of such lists, by repeat, without that dim.
        """
        with jax.default_matmul_precision(self.spec.matmul_precision):
            x_BTD = context.drop(self.embedding(tokens_BT, context.valid), "embedding")
            products: list[Any] = []
            remembered = [None] * len(self.spec.segments) if past is None else past
            for index, (segment, positions, caches) in enumerate(zip(self.spec.segments, self.segments, remembered, strict=True)):
                if self.pipeline is not None and index == self.pipeline.segment:
                    x_BTD, product = self.run_pipelined(self.pipeline, segment, positions, x_BTD, context)
                else:
                    x_BTD, product = self.run_segment(segment.repeats, positions, x_BTD, context, caches)
                context = context.later(segment.repeats * len(segment.pattern))
                products.append(product)
            return self.final_norm(select(context.valid, x_BTD)), products

    def embedding(self, tokens_BT: jax.Array, valid_BT: jax.Array) -> jax.Array:
        """Embedded tokens, compute dtype [B, T, D]."""
        tokens_BT = jnp.where(valid_BT, tokens_BT, 0)
        x_BTD = lookup(self.embed["table"][...], tokens_BT, jnp.dtype(self.spec.compute_dtype))
        if self.spec.embedding_scale is not None:
            x_BTD = x_BTD * jnp.asarray(self.spec.embedding_scale, x_BTD.dtype)
        return constrain(x_BTD, HIDDEN_AXES)

    def run_pipelined(
        self, plan: PipelinePlan, segment: Segment, positions: nnx.List, x_BTD: jax.Array, context: Context
    ) -> tuple[jax.Array, list[Any]]:
        """The segment whose first repeats are a pipeline; by-products as of `run_segment`."""
        blocks = nnx.List([position["pipeline"] for position in positions])
        policy = policy_of(self.spec.remat)
        rows = {"positions": context.positions, "segments": context.segments}
        dropout = context.dropout
        x_BTD, products = run_stages(self.spec, segment, blocks, x_BTD, rows, plan, policy=policy, axes=HIDDEN_AXES, dropout=dropout)
        if self.spec.layers == "unroll":
            products = [jax.tree.map(lambda leaf, index=repeat: leaf[index], products) for repeat in range(plan.patterns)]
        if (rest := segment.repeats - plan.patterns) == 0:
            return x_BTD, products
        after = nnx.List([position["after"] for position in positions])
        x_BTD, found = self.run_segment(rest, after, x_BTD, context.later(plan.patterns * len(positions)))
        if self.spec.layers == "unroll":
            return x_BTD, products + found
        return x_BTD, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), products, found)

    def run_segment(
        self, repeats: int, positions: nnx.List, x_BTD: jax.Array, context: Context, past: Any = None
    ) -> tuple[jax.Array, list[Any]]:
        """All repeats of one segment's pattern; `past` and by-products as of `forward`, of this segment."""
        if self.spec.layers == "scan":
            graphdef, stacked = self.split(positions)
            layers = None if context.dropout is None else jnp.arange(repeats) * len(positions)

            def body(x_BTD: jax.Array, layer: Any) -> tuple[jax.Array, list[ByProducts]]:
                params, cache, number = layer
                return self.run_pattern(graphdef, params, x_BTD, context.later(number), cache)

            return jax.lax.scan(body, x_BTD, (stacked, past, layers))
        products: list[Any] = []
        for repeat in range(repeats):
            graphdef, params = self.split(nnx.List([blocks[repeat] for blocks in positions]))
            here = context.later(repeat * len(positions))
            x_BTD, product = self.run_pattern(graphdef, params, x_BTD, here, None if past is None else past[repeat])
            products.append(product)
        return x_BTD, products

    def run_pattern(
        self, graphdef: nnx.GraphDef[nnx.List], params: nnx.State, x_BTD: jax.Array, context: Context, past: list[Any] | None = None
    ) -> tuple[jax.Array, list[ByProducts]]:
        """One repeat of a pattern; each block is rematerialised on its own. By-products (and `past`) by position."""
        products: list[ByProducts] = []
        blocks = nnx.merge(graphdef, params)
        for position, (block, cache) in enumerate(zip(blocks, [None] * len(blocks) if past is None else past, strict=True)):
            x_BTD, product = self.run_block(block, x_BTD, context.later(position), cache)
            products.append(product)
        return x_BTD, products

    def run_block(self, block: Block, x_BTD: jax.Array, context: Context, past: Cache | None = None) -> tuple[jax.Array, ByProducts]:
        policy = policy_of(self.spec.remat)
        if policy is None or context.remember:  # what is remembered is never differentiated
            return block(x_BTD, context, past)
        graphdef, params = nnx.split(block)

        def pure(params: nnx.State, x_BTD: jax.Array) -> tuple[jax.Array, ByProducts]:
            return nnx.merge(graphdef, params)(x_BTD, context)

        # Inside a scan the loop itself keeps XLA from merging the recomputation with the forward pass.
        in_scan = self.spec.layers == "scan"
        return jax.checkpoint(pure, policy=policy, prevent_cse=not in_scan)(params, x_BTD)

    def split(self, blocks: nnx.List) -> tuple[nnx.GraphDef[nnx.List], nnx.State]:
        """Graph and parameters, matmul kernels in compute dtype and still laid out as stored.

        The cast comes before a layer is taken out, so that it is done once and a sharded kernel is gathered in
        compute dtype.
        """
        graphdef, params = nnx.split(blocks)
        dtype = jnp.dtype(self.spec.compute_dtype)

        def cast(param: nnx.Param) -> nnx.Variable[jax.Array]:
            if not param.inputs or param.exact or param[...].dtype == dtype:
                return param
            return param.replace(constrain(param[...].astype(dtype), param.axes, param.path))

        return graphdef, jax.tree.map(cast, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))

    def logits(self, x_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
        """Unnormalised log probabilities of the next token, float32 [B, T, V], of what `hidden` returns."""
        kernel, axes, path = self.head_kernel()
        return constrain(self.project(x_BTD, segments_BT, constrain(kernel, axes, path)), ("batch", "length", "act_vocab"))

    def head_kernel(self) -> tuple[jax.Array, tuple[str, ...], str]:
        """The weight that makes logits in compute dtype, [D, V] or, where it is the embedding, [V, D]; its logical axes and path."""
        param = self.embed["table"] if self.spec.tie_embeddings else self.head["kernel"]
        return param[...].astype(self.spec.compute_dtype), param.axes, param.path

    def project(self, x_BTD: jax.Array, segments_BT: jax.Array, kernel: jax.Array) -> jax.Array:
        """Logits [B, T, V] of hidden states with the weight of `head_kernel`."""
        x_BTD = select(segments_BT != 0, x_BTD)
        # One matrix of rows: over [B, T, D], XLA on CPU writes a transposed copy of all logits for the kernel's gradient.
        x_ND = x_BTD.reshape(-1, self.spec.width)
        if self.spec.tie_embeddings:
            with jax.default_matmul_precision(self.spec.matmul_precision):
                logits_NV = einsum_float32("ND,VD->NV", x_ND, kernel)
        else:
            logits_NV = rows_times_kernel(x_ND, kernel, self.spec.matmul_precision)
        logits_BTV = logits_NV.reshape(*x_BTD.shape[:2], self.spec.vocab_size)
        if self.spec.head_soft_cap is None:
            return logits_BTV
        return self.spec.head_soft_cap * jnp.tanh(logits_BTV / self.spec.head_soft_cap)


def create_abstract_model(model: Model, pipeline: PipelinePlan | None = None) -> Transformer:
    """The model, laid out as `pipeline` says, with a `jax.ShapeDtypeStruct` (float32) in each parameter: nothing is computed or traced.

    Each `nnx.Param` carries the metadata METADATA of its `trainer.config.weights.Weight`.
    """
    return Transformer(model, {
        weight.path: nnx.Param(
            jax.ShapeDtypeStruct(weight.shape, jnp.float32), **{name: getattr(weight, name) for name in METADATA}
        )
        for weight in weights(model, pipeline)
    }, pipeline)  # fmt: skip


def _module(spec: Model, params: Params) -> Module:
    return Module(spec, params, Block(spec.blocks[-1], under(params, "block")))


def _segment(spec: Model, index: int, params: Params, pipeline: PipelinePlan | None) -> nnx.List:
    """Blocks by position in the pattern; unrolled: a list of blocks by repeat at each position.

    In the pipelined segment each position has `pipeline`, one block of all stages, and where layers are left, `after`.
    """
    segment = spec.segments[index]
    positions: list[Any] = []
    for position, block in enumerate(segment.pattern):
        path = f"segments/{index}/{position}"
        if pipeline is None or pipeline.segment != index:
            positions.append(_repeats(spec, block, path, segment.repeats, params))
            continue
        parts = {"pipeline": Block(block, under(params, f"{path}/pipeline"))}
        if rest := segment.repeats - pipeline.patterns:
            parts["after"] = _repeats(spec, block, f"{path}/after", rest, params)
        positions.append(nnx.Dict(parts))
    return nnx.List(positions)


def _repeats(spec: Model, block: BlockSpec, path: str, repeats: int, params: Params) -> Any:
    if spec.layers == "scan":
        return Block(block, under(params, path))
    return nnx.List([Block(block, under(params, f"{path}/{repeat}")) for repeat in range(repeats)])
