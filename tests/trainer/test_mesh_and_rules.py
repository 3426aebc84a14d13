"""Rules and meshes: the laws of the resolution, slices that stay whole, arithmetic in words."""

from __future__ import annotations

import math

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import ConfigError
from trainer.config.mesh import AxisDegrees, Mesh, used
from trainer.config.rules import RULES, Rule, resolve, shard_elements
from trainer.parallel.mesh import build_mesh

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
