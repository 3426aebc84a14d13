"""Experts spread over a mesh give what the oracle gives; rows travel to them, experts are not gathered."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.trainer.configs import config, layout
from tests.trainer.model.moe_oracle import mixture
from tests.trainer.model.test_moe import FORMS, params_of, spec_of
from trainer.config.weights import weights
from trainer.model.moe import MixtureOfExperts
from trainer.parallel.experts import Choices, Expert, Placed, Route, exchange, mix, mix_over_mesh
from trainer.parallel.sharding import Layout, use_layout

B, T, D = 16, 4, 16
WAYS = 4
SPLIT = ("mixtral", "mesh.ici.data=2", "mesh.ici.fsdp=1", "mesh.ici.fsdp_transpose=2", "mesh.ici.tensor=2")
MESHES = {
    "expert 2, fsdp 2, tensor 2": ("deepseek", "mesh.ici.expert=2", "mesh.ici.fsdp=2", "mesh.ici.tensor=2"),
    "expert 4, tensor 2": ("gpt-oss", "mesh.ici.expert=4", "mesh.ici.tensor=2", "mesh.ici.fsdp=1"),
    "expert 8": ("mixtral", "mesh.ici.expert=8", "mesh.ici.fsdp=1"),
    "fsdp 4, fsdp_transpose 2": ("mixtral", "mesh.ici.fsdp=4", "mesh.ici.fsdp_transpose=2"),
    "data 2, expert 2, context 2": ("mixtral", "mesh.ici.data=2", "mesh.ici.expert=2", "mesh.ici.context=2", "mesh.ici.fsdp=1"),
    "rows over tensor": (*SPLIT, "sharding.rules=[{axis: batch, mesh: [data, tensor]}]"),
    "one weight over less": (*SPLIT, "sharding.rules=[{axis: mlp, mesh: [tensor], weight: '*/experts/down'}]"),
}
QUICK = ("expert 2, fsdp 2, tensor 2", "expert 4, tensor 2")


@pytest.mark.parametrize("mesh", [mesh if mesh in QUICK else pytest.param(mesh, marks=pytest.mark.full) for mesh in MESHES])
def test_on_a_mesh_values_and_gradients_are_those_of_one_device_and_of_the_oracle(mesh: str) -> None:
    compare(*MESHES[mesh], rows=B)


@pytest.mark.full
def test_rows_that_cannot_be_split_stay_and_every_device_adds_its_experts_part() -> None:
    compare(*MESHES[QUICK[0]], rows=1)


def compare(form: str, *overrides: str, rows: int) -> None:
    spec = spec_of(**FORMS[form])
    block = {"attention": {"heads": 4, "kv_heads": 2, "head_dim": 8}, "mlp": spec.model_dump()}
    model = {**config().model.model_dump(mode="json"), "width": D, "layers": "unroll", "segments": [{"repeats": 1, "pattern": [block]}]}
    run = config(*overrides, model=model)
    where = layout(run)
    declared = {w.path.partition("/mlp/")[2]: w for w in weights(run.model) if "/mlp/" in w.path}
    params = params_of(spec)
    valid = np.random.default_rng(5).random((rows, T)) < 0.8
    x = np.random.default_rng(3).normal(size=(rows, T, D))
    cotangent = np.where(valid[..., None], np.random.default_rng(7).normal(size=x.shape), 0)
    oracle = mixture(x, valid, params, spec)
    assert oracle.load[3] == 0

    def value(x: jax.Array, params: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        held = {
            path: nnx.Param(array, axes=declared[path].axes if path in declared else ("router",), path=f"segments/0/0/0/mlp/{path}")
            for path, array in params.items()
        }
        with jax.default_matmul_precision("highest"):
            y, sums = MixtureOfExperts(spec, held)(x, jnp.asarray(valid))
        return jnp.sum(y * cotangent) + 0.3 * sums["load_balance"], (y, sums["load"])

    step = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))
    narrow = {name: jnp.asarray(array, jnp.float32) for name, array in params.items()}
    (_, (plain, _)), wanted = step(jnp.asarray(x, jnp.float32), narrow)
    held = {
        name: jax.device_put(array, where.sharding(declared[name].axes, array.shape) if name in declared else where.replicated)
        for name, array in narrow.items()
    }
    rows_held = jax.device_put(jnp.asarray(x, jnp.float32), where.sharding(("batch", "length", "act_embed"), x.shape))
    with use_layout(where):
        compiled = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True)).lower(rows_held, held).compile()
    (_, (y, load)), found = compiled(rows_held, held)
    np.testing.assert_allclose(np.asarray(y)[valid], oracle.y[valid], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(load, oracle.load)
    np.testing.assert_allclose(plain, y, rtol=1e-5, atol=1e-5)
    for path, gradient in jax.tree.leaves_with_path(wanted):
        ours = np.asarray(dict(jax.tree.leaves_with_path(found))[path])
        np.testing.assert_allclose(ours, gradient, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(gradient).max())), err_msg=str(path))
    if rows == B and where.mesh.shape["expert"] > 1:
        text = compiled.as_text()
        assert "all-to-all" in text
        gathered = [tuple(map(int, shape.split(","))) for shape in re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", text)]
        assert not [shape for shape in gathered if len(shape) == 3 and shape[0] == spec.experts], gathered
        assert not [shape for shape in gathered if shape[:2] == (B, T)], gathered


def test_within_a_stage_which_gets_its_weights_whole_only_rows_travel_and_values_are_those_of_one_device() -> None:
    random = np.random.default_rng(0)
    where = replace(layout(config("mesh.ici={expert: 2, fsdp: 2, tensor: 2}")), inside_stage=True)
    weights = {"up": random.normal(size=(4, D, 8)).astype(np.float32), "down": random.normal(size=(4, 8, D)).astype(np.float32)}
    placed = {"up": Placed(("expert", "embed", "mlp"), None), "down": Placed(("expert", "mlp", "embed"), None)}
    x, shape = random.normal(size=(B, T, D)).astype(np.float32), (B, T, 2)
    choices = Choices(random.integers(0, 4, shape, np.int32), random.random(shape, np.float32), random.random((B, T)) < 0.8)

    def two_products(rows: jax.Array, ids: jax.Array, sizes: jax.Array, weights: Any) -> jax.Array:
        del ids
        return jax.lax.ragged_dot(jax.lax.ragged_dot(rows, weights["up"], sizes), weights["down"], sizes)

    def run(where: Layout | None) -> Any:
        expert = Expert(two_products, lambda y_BTKD, w_BTK: jnp.einsum("BTKD,BTK->BTD", y_BTKD, w_BTK))
        if where is None:
            return jax.jit(lambda x, choices, weights: mix(x, choices, weights, expert))
        return jax.jit(lambda x, choices, weights: mix_over_mesh(where, x, choices, weights, placed, expert))

    found, wanted = (run(layout)(x, choices, weights) for layout in (where, None))
    np.testing.assert_allclose(found[choices.valid], wanted[choices.valid], rtol=1e-4, atol=1e-5)
    outside, inside = (str(jax.make_jaxpr(run(one))(x, choices, weights)) for one in (replace(where, inside_stage=False), where))
    gathers = [re.findall(r"all_gather\[.*?axis_name=\(([^)]*)\)", program, re.DOTALL) for program in (outside, inside)]
    assert gathers == [["'fsdp',", "'fsdp',", "'expert',"], ["'expert',"]]


def test_rows_go_to_the_devices_of_their_experts_and_back_to_their_places() -> None:
    """The route that a ragged all-to-all is given, against its definition, row by row."""
    sizes = np.random.default_rng(1).integers(0, 4, (3, 3))  # [from, to]
    rows = [np.arange(100 * s, 100 * s + sizes[s].sum()) for s in range(3)]
    begins, lands = np.cumsum(sizes, 1) - sizes, np.cumsum(sizes, 0) - sizes
    there = [Route(begins[d], sizes[d], lands[d], sizes[:, d]) for d in range(3)]
    back = [Route(lands[:, d], sizes[:, d], begins[:, d], sizes[d]) for d in range(3)]
    arrived = ragged_all_to_all(rows, there, 12)
    for d in range(3):
        wanted = np.concatenate([rows[s][begins[s, d] : begins[s, d] + sizes[s, d]] for s in range(3)])
        np.testing.assert_array_equal(arrived[d][: len(wanted)], wanted)
    for d, returned in enumerate(ragged_all_to_all(arrived, back, 12)):
        np.testing.assert_array_equal(returned[: len(rows[d])], rows[d])


def test_chunks_of_one_size_bring_what_a_ragged_all_to_all_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which only TPUs have: here as it is defined, of all devices' rows. Some devices send nothing, one nothing to itself."""

    def by_definition(
        rows: jax.Array, out: jax.Array, begins: jax.Array, sent: jax.Array, lands: jax.Array, arrives: jax.Array, *, axis_name: str
    ) -> jax.Array:
        everyone = [jax.lax.all_gather(array, axis_name) for array in (rows, begins, sent, lands)]
        here = jax.lax.axis_index(axis_name)
        for source in range(WAYS):
            theirs, begin, count, land = (array[source] for array in everyone)
            place = jnp.arange(len(out)) - land[here]
            taken = theirs[jnp.clip(place + begin[here], 0, len(theirs) - 1)]
            out = jnp.where(((place >= 0) & (place < arrives[source]) & (place < count[here]))[:, None], taken, out)
        return out

    monkeypatch.setattr(jax.lax, "ragged_all_to_all", by_definition)
    sizes = np.array([[3, 0, 2, 1], [0, 0, 0, 0], [1, 4, 0, 0], [2, 1, 1, 2]])  # [from, to]
    begins, lands = np.cumsum(sizes, 1) - sizes, np.cumsum(sizes, 0) - sizes
    routes = Route(*(jnp.asarray(array) for array in (begins, sizes, lands, sizes.T)))
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(WAYS, 6, 2)), jnp.float32)

    def both(rows: jax.Array, routes: Route) -> list[jax.Array]:
        route = Route(*(array[0] for array in routes))
        return [exchange(rows[0], route, room=8, chunk=4, native=native)[None] for native in (True, False)]

    mesh, split = jax.make_mesh((WAYS,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec("expert")
    native, chunks = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=split, out_specs=split, check_vma=False))(rows, routes)
    np.testing.assert_array_equal(chunks, native)
    for target in range(WAYS):
        wanted = [rows[source, begins[source, target] :][: sizes[source, target]] for source in range(WAYS)]
        np.testing.assert_array_equal(native[target, : sizes[:, target].sum()], np.concatenate(wanted))


def ragged_all_to_all(rows: list[np.ndarray], routes: list[Route], room: int) -> list[np.ndarray]:
    out = [np.full(room, -1) for _ in rows]
    for source, route in enumerate(routes):
        for target in range(len(rows)):
            begin, count, land = (int(part[target]) for part in (route.begins, route.sent, route.lands))
            out[target][land : land + count] = rows[source][begin : begin + count]
            assert int(routes[target].arrives[source]) == count
    return out


@pytest.mark.full
def test_by_the_kernels_a_mesh_gives_what_it_gives_without_them() -> None:
    """Experts over devices, interpreted: the kernels get the rows that arrive, and room that nobody uses."""
    spec = spec_of(experts=4, experts_per_token=2, hidden=128)
    run = config("mesh.ici.expert=2", "mesh.ici.fsdp=2", "model.width=128", "model.expert_kernel=megablox")
    where = layout(run, 4)
    random = np.random.default_rng(2)
    sizes = {"router/kernel": (128, 4), "experts/gate": (4, 128, 128), "experts/up": (4, 128, 128), "experts/down": (4, 128, 128)}
    params = {path: jnp.asarray(random.normal(size=shape) / 8, jnp.float32) for path, shape in sizes.items()}
    x, valid = jnp.asarray(random.normal(size=(B, T, 128)), jnp.float32), jnp.asarray(random.random((B, T)) < 0.8)

    def value(kernel: Any, params: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        axes = {
            "router": ("embed", "router"),
            "gate": ("expert", "embed", "mlp"),
            "up": ("expert", "embed", "mlp"),
            "down": ("expert", "mlp", "embed"),
        }
        held = {path: nnx.Param(array, axes=axes.get(path.split("/")[1], axes["router"]), path=path) for path, array in params.items()}
        with jax.default_matmul_precision("highest"):
            y, _ = MixtureOfExperts(spec, held)(x, valid, kernel=kernel)
        return jnp.sum(jnp.where(valid[..., None], y, 0) ** 2), y

    with use_layout(where):
        step = jax.jit(jax.value_and_grad(value, argnums=1, has_aux=True), static_argnums=0)
        (_, plain), wanted = step("ragged_dot", params)
        (_, y), found = step("megablox", params)
        assert "pallas_call" in str(jax.make_jaxpr(lambda params: value("megablox", params))(params))
    np.testing.assert_allclose(np.asarray(y)[valid], np.asarray(plain)[valid], rtol=1e-5, atol=1e-5)
    for path, gradient in wanted.items():
        np.testing.assert_allclose(found[path], gradient, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(gradient).max())), err_msg=path)
