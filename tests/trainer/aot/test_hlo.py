"""Collectives read out of programs: of hand-written ones with every form of asynchrony, and of compiled ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from trainer.aot.hlo import Collective, Region, regions, shape_bytes

PROGRAM = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%product (p: bf16[8,8]) -> bf16[8,8] {
  %p = bf16[8,8]{1,0} parameter(0)
  ROOT %dot = bf16[8,8]{1,0} convolution(%p, %p), dim_labels=bf_io->bf
}

%all-reduce-scatter.1 (p.1: f32[64]) -> f32[16] {
  %p.1 = f32[64]{0} parameter(0)
  %all-reduce.9 = f32[64]{0} all-reduce(%p.1), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = f32[16]{0} dynamic-slice(%all-reduce.9)
}

%body (state: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {
  %state = (s32[], bf16[8,8]) parameter(0)
  %x = bf16[8,8]{1,0} get-tuple-element(%state), index=1
  %permute = (bf16[8,8]{1,0}, bf16[8,8]{1,0}, u32[]) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %work = bf16[8,8]{1,0} fusion(%x), kind=kOutput, calls=%product, metadata={op_name="jit(step)/jvp()/while/body/dot_general"}
  %permuted = bf16[8,8]{1,0} collective-permute-done(%permute)
  %second = (bf16[8,8]{1,0}, bf16[8,8]{1,0}, u32[]) collective-permute-start(%permuted), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %late = bf16[8,8]{1,0} collective-permute-done(%second)
  %gather = bf16[32,8]{1,0} all-gather(%late), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %out = (s32[], bf16[8,8]) tuple(%gather)
}

%condition (state.1: (s32[], bf16[8,8])) -> pred[] {
  %state.1 = (s32[], bf16[8,8]) parameter(0)
  %limit = s32[] constant(12)
  ROOT %less = pred[] compare(%state.1, %limit), direction=LT
}

ENTRY %main (x.1: bf16[8,8], g: f32[64]) -> bf16[8,8] {
  %x.1 = bf16[8,8]{1,0} parameter(0)
  %g = f32[64]{0} parameter(1)
  %scattered = f32[16]{0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %loop = (s32[], bf16[8,8]) while(%x.1), condition=%condition, body=%body, metadata={op_name="jit(step)/jvp()/while"}
}
"""


def by_kind(region: Region) -> dict[str, list[Collective]]:
    found: dict[str, list[Collective]] = {}
    for collective in region.collectives:
        found.setdefault(collective.kind, []).append(collective)
    return found


def test_a_loop_is_a_region_of_its_own_that_runs_as_often_as_its_condition_says() -> None:
    layer, entry = regions(PROGRAM, 4)
    assert (layer.name, layer.executions) == ("forward layer body", 12)
    assert (entry.name, entry.executions) == ("entry", 1)


def test_a_collective_is_overlapped_only_where_work_is_scheduled_between_its_start_and_its_done() -> None:
    layer, _ = regions(PROGRAM, 4)
    found = by_kind(layer)
    assert [(c.asynchronous, c.overlapped) for c in found["collective-permute"]] == [(True, True), (True, False)]
    assert [(c.asynchronous, c.overlapped, c.bytes) for c in found["all-gather"]] == [(False, False, 32 * 8 * 2)]


def test_an_all_reduce_fused_with_its_slice_is_a_reduce_scatter_of_the_whole_input() -> None:
    *_, entry = regions(PROGRAM, 4)
    (scatter,) = entry.collectives
    assert (scatter.kind, scatter.bytes, scatter.group) == ("reduce-scatter", 64 * 4, (0, 1, 2, 3))


def test_bytes_of_shapes_count_tuples_narrow_types_and_tokens() -> None:
    assert shape_bytes("(bf16[8,4]{1,0}, s32[], u8[3], f8e4m3fn[2,2], s4[3], pred[5], token[])") == [64, 4, 3, 4, 2, 5, 0]


def test_the_collectives_of_a_compiled_loop_are_those_that_were_written() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def step(stacked: jax.Array, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))), None

        return jnp.sum(jax.lax.scan(layer, x, stacked)[0])

    stacked = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32, sharding=NamedSharding(mesh, P(None, "x")))
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    text = jax.jit(step).lower(stacked, x).compile().as_text()
    loop, entry = regions(text or "", 8)
    (gather,) = loop.collectives
    assert (loop.executions, gather.kind, gather.bytes, gather.group) == (5, "all-gather", 16 * 16 * 4, tuple(range(8)))
    assert [(c.kind, c.bytes) for c in entry.collectives] == [("all-reduce", 4)]


def test_a_permute_beside_a_branch_that_computes_is_overlapped_and_beside_one_that_does_not_it_is_not() -> None:
    """The ring sends a part on while it computes with it, or with half of it."""
    branch = "%nothing (p: bf16[8,8]) -> bf16[8,8] {\n  ROOT %p = bf16[8,8]{1,0} parameter(0)\n}\n\n"
    work = "fusion(%x), kind=kOutput, calls=%product"
    for chosen, overlapped in (("%product, %nothing", True), ("%nothing, %nothing", False)):
        conditional = f"conditional(%x, %x, %x), branch_computations={{{chosen}}}"
        program = PROGRAM.replace("%body (state", f"{branch}%body (state").replace(work, conditional)
        body = next(region for region in regions(program, 4) if region.executions == 12)
        assert by_kind(body)["collective-permute"][0].overlapped is overlapped
