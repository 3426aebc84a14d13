"""A pipeline of small layers, and the same layers run in order: what the pipeline's tests compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from trainer.config.mesh import AxisDegrees, Mesh
from trainer.config.pipeline import Gather, PipelinePlan
from trainer.config.pipeline_schedule import PipelineSchedule
from trainer.parallel.mesh import build_mesh
from trainer.parallel.pipeline import Policy, StageWeight, Use, run_pipeline
from trainer.parallel.sharding import Layout, use_layout

WIDTH, LENGTH = 8, 3
PRODUCT = "product"
"""Name of a layer's product with its weight, for what the backward pass keeps."""
WEIGHT_AXES = ("repeat", "stage", "layer", "embed", "mlp")
X_AXES = ("batch", "act_length", "act_embed")


@dataclass(frozen=True, kw_only=True)
class Case:
    stages: int
    repeats: int = 1
    microbatches: int
    patterns: int = 1
    delay: bool = False
    gather: Gather = "iteration"
    fsdp: int = 1
    data: int = 1

    @property
    def plan(self) -> PipelinePlan:
        hop = 2 if self.delay else 1
        schedule = PipelineSchedule(stages=self.stages, repeats=self.repeats, microbatches=self.microbatches, hop=hop)
        return PipelinePlan(0, self.patterns, schedule, self.gather)

    @property
    def layout(self) -> Layout:
        degrees = AxisDegrees(stage=self.stages, fsdp=self.fsdp, data=self.data)
        devices = jax.devices()[: self.stages * self.fsdp * self.data]
        return Layout(build_mesh(Mesh(ici=degrees), devices, slices=1))

    def inputs(self) -> dict[str, jax.Array]:
        """weight [R, S, P, D, D], x [B, T, D] and one number for every token, which belongs to its row."""
        random = np.random.default_rng(0)
        rows = self.microbatches * self.fsdp * self.data
        weight = random.normal(size=(self.repeats, self.stages, self.patterns, WIDTH, WIDTH)) * WIDTH**-0.5
        host = {"weight": weight, "x": random.normal(size=(rows, LENGTH, WIDTH)), "scale": random.uniform(0.2, 0.6, (rows, LENGTH))}
        axes = {"weight": WEIGHT_AXES, "x": X_AXES, "scale": ("batch", None)}
        shardings = {name: self.layout.sharding(axes[name], value.shape) for name, value in host.items()}
        return {name: jax.device_put(value.astype(np.float32), shardings[name]) for name, value in host.items()}


def layer(x: jax.Array, weight: jax.Array, scale: jax.Array) -> jax.Array:
    return x + scale[..., None] * jnp.tanh(checkpoint_name(x @ weight, PRODUCT))


def in_order(weight: jax.Array, x: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The result of all layers, and the sum of each one's."""

    def next_layer(x: jax.Array, one: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = layer(x, one, scale)
        return x, jnp.sum(x)

    return jax.lax.scan(next_layer, x, weight.reshape(-1, WIDTH, WIDTH))


def pipelined(case: Case, *, idle: float = 0.0, policy: Policy | None = None) -> Any:
    """A function like `in_order`."""

    def stage(arrays: list[jax.Array], use: Use, x: jax.Array, rows: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        sums: list[jax.Array] = []
        for pattern in range(case.patterns):
            x = layer(x, use([arrays[0][pattern]])[0], rows["scale"])
            sums.append(jnp.sum(x))
        return x, jnp.stack(sums)

    def run(weight: jax.Array, x: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        with use_layout(case.layout):
            weights = [StageWeight(weight, WEIGHT_AXES, "weight", jnp.dtype("float32"))]
            return run_pipeline(stage, weights, x, {"scale": scale}, case.plan, axes=X_AXES, policy=policy, idle=idle)

    return run


def with_gradients(run: Any) -> Any:
    """(weight, x, scale) -> loss, the layers' sums, and the gradient by weight and x."""

    def both(weight: jax.Array, x: jax.Array, scale: jax.Array) -> Any:
        def loss(weight: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y, sums = run(weight, x, scale)
            return jnp.mean(jnp.square(y)), sums

        (value, sums), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(weight, x)
        return value, sums, gradients

    return jax.jit(both)


def assert_equal_to_layers_in_order(case: Case, **options: Any) -> None:
    """Loss at 1e-6, every gradient at 1e-5 of its norm, what every layer hands out at 1e-5."""
    inputs = case.inputs()
    arguments = inputs["weight"], inputs["x"], inputs["scale"]
    loss, sums, gradients = with_gradients(pipelined(case, **options))(*arguments)
    here = [jax.device_put(np.asarray(value), jax.devices()[0]) for value in arguments]
    wanted_loss, wanted_sums, wanted = with_gradients(in_order)(*here)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6, err_msg=str(case))
    np.testing.assert_allclose(sums, wanted_sums, rtol=1e-5, atol=1e-4, err_msg=str(case))
    for name, found, expected in zip(("weight", "x"), gradients, wanted, strict=True):
        error = np.linalg.norm(np.asarray(found) - np.asarray(expected)) / np.linalg.norm(np.asarray(expected))
        assert error < 1e-5, f"{case}: gradient of {name}: {error}"
