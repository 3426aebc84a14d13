"""The pipelined layers of a segment: what one stage computes. `trainer.parallel.pipeline` says when and where.

B sequences, b of a microbatch, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from trainer.config.model import Model, Segment
from trainer.config.pipeline import PipelinePlan
from trainer.config.weights import LAYER_AXES
from trainer.model.attention import make_context
from trainer.model.dropout import Dropout
from trainer.parallel.pipeline import Policy, StageWeight, Use, run_pipeline

Rows = Mapping[str, Any]


def run_stages(
    model: Model,
    segment: Segment,
    blocks: nnx.List,
    x_BTD: jax.Array,
    rows: Rows,
    plan: PipelinePlan,
    *,
    policy: Policy | None,
    axes: Any,
    dropout: Dropout | None = None,
) -> tuple[jax.Array, list[Any]]:
    """The pipelined repeats of `segment` and the by-products of its blocks: for each position a tree with a leading `layer` dim.

    blocks: by position, parameters with the leading dims `plan.stacked`. rows: `positions` and `segments`, int32 [B, T].
    dropout: as of the segment's first layer.
    """
    graphdef, params = nnx.split(blocks)
    flat = nnx.to_flat_state(params)

    def run_pattern(arrays: list[jax.Array], x_bTD: jax.Array, context: Any) -> tuple[jax.Array, list[Any]]:
        state = nnx.from_flat_state([(path, param.replace(array)) for (path, param), array in zip(flat, arrays[: len(flat)], strict=True)])
        products: list[Any] = []
        if dropout is not None:
            context = context.later(arrays[-1].astype(jnp.int32))
        for position, block in enumerate(nnx.merge(graphdef, state)):
            x_bTD, product = block(x_bTD, context.later(position))
            products.append(product)
        return x_bTD, products

    def stage(arrays: list[jax.Array], use: Use, x_bTD: jax.Array, rows: Rows) -> tuple[jax.Array, list[Any]]:
        # Made here, of the microbatch's own rows: for the whole batch they would be held by every stage.
        pattern, kernel = list(segment.pattern), model.attention_kernel
        context = make_context(pattern, rows["positions"], rows["segments"], kernel=kernel, expert_kernel=model.expert_kernel)
        if dropout is not None:
            context = replace(context, dropout=replace(dropout, noise=rows["noise"]))
        if model.layers == "scan" and plan.patterns_per_stage > 1:
            # Gathered before the scan: gathered inside of it, they would be among what its backward pass keeps of every turn.
            return jax.lax.scan(lambda x, arrays: run_pattern(arrays, x, context), x_bTD, use(arrays))
        found: list[list[Any]] = []
        for pattern in range(plan.patterns_per_stage):
            x_bTD, products = run_pattern(use([array[pattern] for array in arrays]), x_bTD, context)
            found.append(products)
        return x_bTD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

    compute_dtype = jnp.dtype(model.compute_dtype)
    weights = [
        StageWeight(param[...], param.axes, param.path, compute_dtype if param.inputs and not param.exact else param[...].dtype)
        for _, param in flat
    ]
    if dropout is not None:
        rows = {**rows, "noise": dropout.noise}
        # Which layers a stage has at the moment reaches it as its weights do.
        numbers = jnp.arange(plan.patterns, dtype=jnp.float32).reshape(plan.stacked) * len(segment.pattern)
        weights.append(StageWeight(numbers, LAYER_AXES, "layer_numbers", jnp.dtype(jnp.float32)))
    return run_pipeline(stage, weights, x_BTD, dict(rows), plan, axes=axes, policy=policy and _of_all_stages(policy))


def _of_all_stages(policy: Policy) -> Policy:
    """`policy`, which speaks of a stage, for the stages together: there, a product with a weight has a batch dim, the stage."""

    def keeps(primitive: Any, *avals: Any, **params: Any) -> Any:
        if primitive is jax.lax.dot_general_p:
            contracted, (x_batch, y_batch) = params["dimension_numbers"]
            params = {**params, "dimension_numbers": (contracted, (x_batch[1:], y_batch[1:]))}
        return policy(primitive, *avals, **params)

    return keeps
