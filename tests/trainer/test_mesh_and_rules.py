"""Rules and meshes: the laws of the resolution, slices that stay whole, arithmetic in words."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import topologies

from tests.trainer.configs import config, layout
from tests.trainer.sharding_goldens import CASES, golden, text
from trainer.aot.hlo import regions
from trainer.config import ConfigError, validate
from trainer.config.checks import check_train
from trainer.config.mesh import MESH_AXES, AxisDegrees, Mesh, used
from trainer.config.rules import RULES, STACKED, Rule, resolve, shard_elements, split_further
from trainer.model.layers import lookup
from trainer.model.transformer import HIDDEN_AXES
from trainer.parallel.mesh import build_mesh
from trainer.parallel.sharding import constrain, use_layout

NAMES = ("a", "b", "c", "d")
AXES = ("x", "y", "z")
rules = st.lists(st.tuples(st.sampled_from(NAMES), st.lists(st.sampled_from(AXES), unique=True, max_size=3).map(tuple)), max_size=8)
tensors = st.lists(st.sampled_from(NAMES), unique=True, min_size=1, max_size=4).flatmap(
    lambda names: st.tuples(st.just(tuple(names)), st.lists(st.sampled_from((1, 2, 3, 4, 6, 8)), min_size=len(names), max_size=len(names)))
)
meshes = st.fixed_dictionaries({axis: st.sampled_from((1, 2, 3, 4)) for axis in AXES})


@given(rules, tensors, meshes)
def test_no_mesh_axis_is_bound_twice_every_one_divides_its_dim_and_every_drop_is_reported(table: list[Rule], tensor, mesh) -> None:
    axes, shape = tensor
    found = resolve(axes, shape, mesh, table)
    used = [axis for spec in found.spec for axis in spec]
    assert len(used) == len(set(used))
    for size, spec, winner, dim in zip(shape, found.spec, found.winners, range(len(shape)), strict=True):
        assert size % math.prod(mesh[axis] for axis in spec) == 0
        wanted = [axis for axis in (winner[1] if winner else ()) if mesh[axis] > 1]
        assert sorted(wanted) == sorted([*spec, *(axis for where, axis, _ in found.dropped if where == dim)])
    assert shard_elements(shape, found, mesh) * math.prod(mesh[axis] for axis in used) == math.prod(shape)


@given(rules, tensors, meshes)
def test_the_first_rule_whose_axes_are_free_wins_and_a_conflicting_one_is_skipped_whole(table: list[Rule], tensor, mesh) -> None:
    axes, shape = tensor
    taken: set[str] = set()
    expected: dict[str, tuple[str, ...]] = {}
    for name, mesh_axes in table:
        if name in axes and name not in expected and not taken & set(mesh_axes):
            expected[name] = mesh_axes
            taken |= set(mesh_axes)
    found = resolve(axes, shape, mesh, table)
    assert {name: winner[1] for name, winner in zip(axes, found.winners, strict=True) if winner} == expected
    assert len(found.skipped) == sum(name in axes for name, _ in table) - len(expected)


@given(rules, tensors, meshes, st.permutations(NAMES))
def test_names_do_not_matter(table: list[Rule], tensor, mesh, order) -> None:
    axes, shape = tensor
    rename = dict(zip(NAMES, order, strict=True))
    renamed = resolve([rename[name] for name in axes], shape, mesh, [(rename[name], mesh_axes) for name, mesh_axes in table])
    assert renamed.spec == resolve(axes, shape, mesh, table).spec


@given(rules, tensors, meshes, st.data())
def test_rules_that_share_neither_a_name_nor_a_mesh_axis_may_change_places(table: list[Rule], tensor, mesh, data) -> None:
    axes, shape = tensor
    before = resolve(axes, shape, mesh, table)
    swapped = list(table)
    for _ in range(data.draw(st.integers(0, 8))):
        place = data.draw(st.integers(0, max(len(table) - 2, 0)))
        pair = swapped[place : place + 2]
        if len(pair) == 2 and pair[0][0] != pair[1][0] and not set(pair[0][1]) & set(pair[1][1]):
            swapped[place : place + 2] = reversed(pair)
    after = resolve(axes, shape, mesh, swapped)
    assert (after.spec, after.winners, after.dropped) == (before.spec, before.winners, before.dropped)


@given(rules, tensors, meshes, st.sampled_from(AXES))
def test_splitting_further_adds_one_axis_innermost_to_one_dim_it_divides_or_changes_nothing(table: list[Rule], tensor, mesh, axis) -> None:
    axes, shape = tensor
    before = resolve(axes, shape, mesh, table)
    after = split_further(before, axes, shape, mesh, axis)
    changed = [dim for dim in range(len(shape)) if after.spec[dim] != before.spec[dim]]
    possible = [dim for dim in range(len(shape))
                if (shape[dim] // math.prod(mesh[other] for other in before.spec[dim])) % mesh[axis] == 0]  # fmt: skip
    if mesh[axis] == 1 or any(axis in spec for spec in before.spec) or not possible:
        assert after == before
        return
    assert changed == possible[:1] and after.spec[changed[0]] == (*before.spec[changed[0]], axis)
    assert shard_elements(shape, after, mesh) * mesh[axis] == shard_elements(shape, before, mesh)


def test_layers_are_split_over_data_last_and_dims_over_tensor_never() -> None:
    mesh = {"data": 2, "fsdp": 4, "tensor": 2}
    for axes, shape, wanted in (
        (("layer", "embed", "mlp"), (4, 64, 128), ((), ("fsdp", "data"), ("tensor",))),
        (("layer", "norm"), (4, 65), (("data",), ())),
        (("vocab",), (128,), (("tensor",),)),
    ):
        assert split_further(resolve(axes, shape, mesh), axes, shape, mesh, "data").spec == wanted
    assert set(STACKED) == {"repeat", "stage", "layer"}


@pytest.mark.parametrize("name", CASES)
def test_the_layout_of_every_tensor_is_the_one_that_was_reviewed(name: str) -> None:
    assert golden(name).read_text(encoding="utf-8") == text(CASES[name]), "run: python -m tests.trainer.sharding_goldens"


@pytest.mark.parametrize("name", CASES)
def test_every_reviewed_case_is_a_legal_run(name: str) -> None:
    case = CASES[name]
    processes = case.slices * case.devices // 4
    assert not list(check_train(case.config, slices=case.slices, devices_per_slice=case.devices, processes=processes))


def test_every_mesh_axis_splits_something_in_a_reviewed_case() -> None:
    used_axes = {axis for case in CASES.values() for axis in used(case.mesh)}
    assert used_axes == {*MESH_AXES} - {"diloco"}


def test_a_logical_axis_that_occurs_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="occurs twice"):
        resolve(("embed", "embed"), (4, 4), {}, RULES)


def test_the_batch_is_split_over_data_and_fsdp_and_weights_over_fsdp_and_tensor() -> None:
    mesh = {"data": 2, "fsdp": 4, "tensor": 2}
    assert resolve(("batch", "length", "act_embed"), (16, 128, 64), mesh).spec == (("data", "fsdp"), (), ())
    assert resolve(("layer", "embed", "heads", "head_dim"), (3, 64, 8, 16), mesh).spec == ((), ("fsdp",), ("tensor",), ())
    assert resolve(("embed", "kv_heads", "head_dim"), (64, 1, 16), mesh).dropped == ((1, "tensor", "tensor=2 does not divide kv_heads=1"),)


def test_an_ici_axis_never_crosses_a_slice() -> None:
    config = Mesh(ici=AxisDegrees(fsdp=2, tensor=2), dcn=AxisDegrees(data=-1))
    mesh = build_mesh(config, jax.devices(), slices=2)
    assert used(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    for data in range(2):
        assert {device.id // 4 for device in mesh.devices[0, data].flat} == {data}


@st.composite
def hybrids(draw: st.DrawFn) -> tuple[Mesh, dict[str, int], int]:
    """A mesh for eight devices, its ICI degrees solved, its slices; one degree may be -1 on either link."""
    slices = draw(st.sampled_from((1, 2, 4, 8)))
    links: list[tuple[dict[str, int], dict[str, int]]] = []
    for total in (8 // slices, slices):
        axes = iter(draw(st.permutations(MESH_AXES)))
        outer = draw(st.sampled_from([n for n in (1, 2, 4) if total % n == 0]))
        degrees = {next(axes): n for n in (outer, total // outer) if n > 1} or {next(axes): 1}
        open_axis = draw(st.sampled_from([None, *degrees]))
        links.append((degrees, {axis: -1 if axis == open_axis else degree for axis, degree in degrees.items()}))
    (ici, given_ici), (_, given_dcn) = links
    return Mesh(ici=AxisDegrees(**given_ici), dcn=AxisDegrees(**given_dcn)), ici, slices


@given(hybrids(), st.permutations(range(8)))
def test_devices_that_differ_in_ici_degrees_only_are_of_one_slice_in_whatever_order_they_are_listed(hybrid, order) -> None:
    config, ici, slices = hybrid
    mesh = build_mesh(config, [jax.devices()[n] for n in order], slices=slices)
    found: dict[tuple[int, ...], set[int]] = {}
    for index, device in np.ndenumerate(mesh.devices):
        outer = tuple(place // ici.get(axis, 1) for axis, place in zip(MESH_AXES, index, strict=True))
        found.setdefault(outer, set()).add(device.id * slices // 8)
    assert len(found) == slices and all(len(of) == 1 for of in found.values()) and len(set.union(*found.values())) == slices


def test_dcn_is_the_outer_part_of_an_axis_that_has_both() -> None:
    mesh = build_mesh(Mesh(ici=AxisDegrees(fsdp=4), dcn=AxisDegrees(fsdp=2)), jax.devices(), slices=2)
    assert [device.id for device in mesh.devices.flat] == list(range(8))


def test_degrees_that_do_not_fit_are_refused_with_the_arithmetic() -> None:
    with pytest.raises(ConfigError, match=r"fsdp=3 needs a multiple of 3 devices per slice, has 8: fsdp=4 divides"):
        build_mesh(Mesh(ici=AxisDegrees(data=-1, fsdp=3)), jax.devices(), slices=1)
    with pytest.raises(ConfigError, match=r"data=2 x tensor=2 needs 2 x 2 devices per slice, has 8: data=4 divides"):
        build_mesh(Mesh(ici=AxisDegrees(data=2, tensor=2)), jax.devices(), slices=1)
    with pytest.raises(ValueError, match="data=2 x fsdp=64 needs 2 x 64 devices per slice, has 120: fsdp=60 divides"):
        AxisDegrees(data=2, fsdp=64).solve(120, "devices per slice")
    with pytest.raises(ConfigError, match="8 devices cannot be split over 3 slices"):
        build_mesh(Mesh(), jax.devices(), slices=3)
    with pytest.raises(ConfigError, match="stage=3 needs a multiple of 3 slices, has 2: stage=2 divides"):
        build_mesh(Mesh(dcn=AxisDegrees(stage=3, data=-1)), jax.devices(), slices=2)
    with pytest.raises(ConfigError, match="only one degree may be -1"):
        validate(Mesh, {"dcn": {"data": -1, "stage": -1}, "ici": {"fsdp": -1}})


degrees = st.dictionaries(st.sampled_from(MESH_AXES), st.integers(1, 12), max_size=3)


open_axes = st.one_of(st.none(), st.sampled_from(MESH_AXES))


@given(degrees, open_axes, st.integers(1, 144))
def test_the_change_an_error_names_divides_and_without_one_there_is_none(fixed: dict[str, int], rest: str | None, total: int) -> None:
    fixed = {axis: degree for axis, degree in fixed.items() if axis != rest}
    opened = {rest: -1} if rest else {}
    try:
        solved = AxisDegrees(**fixed, **opened).solve(total, "slices")
    except ValueError as error:
        named = re.search(r"has (\d+): (?:(\w+)=(\d+)|no change of one degree) divides$", str(error))
        assert named and int(named[1]) == total
        if named[2]:
            assert math.prod(AxisDegrees(**{**fixed, named[2]: int(named[3]), **opened}).solve(total, "slices").values()) == total
        else:
            others = [math.prod(fixed.values()) // degree for degree in fixed.values() if degree > 1]
            assert not others or all(total % other or (rest and total == other) for other in others)
    else:
        assert math.prod(solved.values()) == total and fixed.items() <= solved.items()


def test_slices_are_those_the_tpu_runtime_names() -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices
    mesh = build_mesh(Mesh(ici=AxisDegrees(fsdp=2, tensor=2), dcn=AxisDegrees(data=-1)), devices[::-1], slices=2)
    for data in range(2):
        assert {device.slice_index for device in mesh.devices[0, data].flat} == {data}
    with pytest.raises(ConfigError, match="expected 4 slices of equal size, found slices of 4, 4 devices"):
        build_mesh(Mesh(), devices, slices=4)
    with pytest.raises(ConfigError, match="expected 2 slices of equal size, found slices of 4, 3 devices"):
        build_mesh(Mesh(), devices[:-1], slices=2)


TABLE, ROWS = (64, 32), (8, 16)


@pytest.mark.parametrize(
    ("ici", "sharding"),
    [
        ({"fsdp": 4, "tensor": 2}, "as_weights"),
        ({"fsdp": 2, "tensor_sequence": 4}, "as_weights"),
        ({"fsdp": 2, "context": 2, "tensor": 2}, "as_weights"),
        ({"data": 2, "fsdp": 2, "tensor": 2}, "over_data"),
    ],
    ids=str,
)
def test_embedded_rows_and_their_gradients_are_never_whole_on_a_device(ici: dict[str, int], sharding: str, capfd) -> None:
    run = config(f"mesh.ici={ici}", f"sharding.optimizer={sharding}")
    where = layout(run)
    stored = where.stored(("vocab", "embed"), TABLE, "embed/table")

    def gradient(table_VD: jax.Array, tokens_BT: jax.Array, cotangent_BTD: jax.Array) -> jax.Array:
        with use_layout(where):

            def loss(table_VD: jax.Array) -> jax.Array:
                return jnp.vdot(constrain(lookup(table_VD, tokens_BT, jnp.dtype("float32")), HIDDEN_AXES), cotangent_BTD)

            return jax.lax.with_sharding_constraint(jax.grad(loss)(constrain(table_VD, ("vocab", "embed"), "embed/table")), stored)

    random = np.random.default_rng(0)
    tokens, cotangent = random.integers(0, TABLE[0], ROWS), random.normal(size=(*ROWS, TABLE[1])).astype(np.float32)
    arguments = [
        jax.device_put(np.zeros(TABLE, np.float32), stored),
        jax.device_put(tokens.astype(np.int32), where.sharding(("batch", "length"), ROWS)),
        jax.device_put(cotangent, where.sharding(HIDDEN_AXES, cotangent.shape)),
    ]
    compiled = jax.jit(gradient).lower(*arguments).compile()
    assert "rematerialization" not in capfd.readouterr().err
    rows_bytes = 4 * math.prod(cotangent.shape)
    found = [collective for region in regions(compiled.as_text() or "", 8) for collective in region.collectives]
    assert all(collective.bytes < rows_bytes for collective in found if collective.kind in ("all-gather", "all-reduce"))
    expected = np.zeros(TABLE, np.float64)
    np.add.at(expected, tokens, cotangent)
    np.testing.assert_allclose(np.asarray(compiled(*arguments)), expected, rtol=1e-5, atol=1e-5)
