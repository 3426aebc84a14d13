"""What is saved comes back, bit for bit, onto any mesh and in either form of the layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer.checkpoint.states import abstract, differences, mesh, state, values
from trainer.checkpoint import Checkpoints
from trainer.config.run import Checkpoint
from trainer.errors import CheckpointError

META = {"config": {"steps": 40}, "layout": ["scan"], "data": {"step": 10}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Step 10 with stacked layers on fsdp=8, step 20 unrolled on fsdp=4 x tensor=2, saved one after the other."""
    directory = str(tmp_path_factory.mktemp("run"))
    checkpoints = Checkpoints(Checkpoint(), directory)
    checkpoints.save(10, state(10, mesh(8)), META)
    checkpoints.save(20, state(20, mesh(4, 2), unrolled=True), META)
    checkpoints.close()
    yield directory


@pytest.mark.parametrize(("fsdp", "tensor"), [(8, 1), (4, 2), (1, 1)])
@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("step", [10, 20])
def test_every_mesh_and_layer_form_restores_the_same_bits(run: str, step: int, unrolled: bool, fsdp: int, tensor: int) -> None:
    on = mesh(fsdp, tensor)
    found = Checkpoints(Checkpoint(), run).restore(step, abstract(on, unrolled=unrolled))
    assert differences(found, step, on, unrolled=unrolled) == []


def test_the_newest_committed_step_is_the_latest_and_carries_its_meta(run: str) -> None:
    checkpoints = Checkpoints(Checkpoint(), run)
    assert checkpoints.latest_step() == 20
    assert checkpoints.meta(20) == META
    assert checkpoints.skipped == {}


def test_parameters_are_read_alone(run: str) -> None:
    on = mesh(2, 2)
    found = Checkpoints(Checkpoint(), run).restore(10, {"params": abstract(on)["params"]})
    assert found.keys() == {"params"}
    for path, value in values(10)["params"].items():
        assert np.asarray(found["params"][path]).tobytes() == value.tobytes()


def test_a_leaf_without_sharding_lands_on_the_first_device(run: str) -> None:
    wanted = {path: jax.ShapeDtypeStruct(value.shape, value.dtype) for path, value in values(10)["rest"].items()}
    found = Checkpoints(Checkpoint(), run).restore(10, {"rest": wanted})["rest"]
    assert found["key"].devices() == {jax.local_devices()[0]}
    restored = jax.random.wrap_key_data(found["key"], impl="threefry2x32")
    expected = jax.random.wrap_key_data(values(10)["rest"]["key"], impl="threefry2x32")
    assert jnp.array_equal(jax.random.bits(restored, (4,)), jax.random.bits(expected, (4,)))


def test_everything_that_does_not_fit_is_named_at_once(run: str) -> None:
    wanted: dict[str, Any] = abstract(mesh(1))
    wanted["params"]["embedding/table"] = wanted["params"].pop("embed/table")
    wanted["params"]["segments/0/0/attention/query"] = jax.ShapeDtypeStruct((3, 8, 32), jnp.float32)
    wanted["opt"]["0/count"] = jax.ShapeDtypeStruct((), jnp.float32)
    with pytest.raises(CheckpointError) as raised:
        Checkpoints(Checkpoint(), run).restore(10, wanted)
    message = str(raised.value)
    assert "4 problems" in message
    assert "params: segments/0/0/attention/query: saved float32[3, 8, 16], wanted float32[3, 8, 32]" in message
    assert "params: embedding/table: wanted bfloat16[16, 8], not saved (nearest: embed/table)" in message
    assert "params: embed/table: saved bfloat16[16, 8], not wanted (nearest: embedding/table)" in message
    assert "opt: 0/count: saved int32[], wanted float32[]" in message


def test_a_long_list_of_problems_is_cut(run: str) -> None:
    wanted = {"params": {f"w{n}": jax.ShapeDtypeStruct((), jnp.float32) for n in range(30)}}
    with pytest.raises(CheckpointError, match=r"33 problems:(\n.*){20}\n  and 13 more$"):
        Checkpoints(Checkpoint(), run).restore(10, wanted)


def test_another_number_of_layers_is_refused_in_both_directions(run: str) -> None:
    for step, unrolled in ((10, True), (20, False)):
        wanted: dict[str, Any] = abstract(mesh(1), unrolled=unrolled)
        if unrolled:
            wanted["params"]["segments/0/0/3/attention/query"] = wanted["params"]["segments/0/0/2/attention/query"]
        else:
            wanted["params"]["segments/0/0/attention/query"] = jax.ShapeDtypeStruct((4, 8, 16), jnp.float32)
        with pytest.raises(CheckpointError, match=r"saved float32\[3, 8, 16\], wanted float32\[4, 8, 16\]"):
            Checkpoints(Checkpoint(), run).restore(step, wanted)


def test_a_step_that_is_not_there_is_refused_by_name(run: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"step 15 of .* there is no such step"):
        Checkpoints(Checkpoint(), run).restore(15, abstract(mesh(1)))
    with pytest.raises(CheckpointError, match="there is no such step"):
        Checkpoints(Checkpoint(), str(tmp_path)).meta(1)
    assert Checkpoints(Checkpoint(), str(tmp_path)).latest_step() is None


def test_the_next_steps_may_donate_the_state_while_it_is_written(tmp_path: Path) -> None:
    """Every save is followed at once by steps that overwrite the buffers in place."""
    on = mesh(8)
    advance = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 3 + 1, state), donate_argnums=0)
    live: Any = {"params": {f"w{n}": jnp.full((256, 1024), n, jnp.float32) for n in range(8)}, "opt": {}, "rest": {}}
    live["params"] = {path: jax.device_put(leaf, state(0, on)["params"]["embed/table"].sharding) for path, leaf in live["params"].items()}
    live["opt"] = {"0/count": jnp.int32(0)}
    live["rest"] = {"step": jnp.int32(0)}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), live)
    checkpoints = Checkpoints(Checkpoint(keep_last=10), str(tmp_path))
    expected = {}
    for step in range(1, 6):
        live = advance(live)
        expected[step] = jax.tree.map(lambda leaf: np.array(leaf), live)
        checkpoints.save(step, live, {})
        for _ in range(3):
            before, live = live, advance(live)
            del before
    checkpoints.wait()
    for step, wanted in expected.items():
        found = checkpoints.restore(step, shapes)
        assert all(np.asarray(a).tobytes() == b.tobytes() for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True))


def test_saving_computes_nothing_on_the_devices(tmp_path: Path) -> None:
    """No program is compiled or run, so there is no collective either."""
    from jax._src.interpreters import pxla

    checkpoints = Checkpoints(Checkpoint(), str(tmp_path))
    live = state(1, mesh(4, 2))
    programs: list[str] = []
    call = pxla.ExecuteReplicated.__call__

    def counted(self: Any, *arguments: Any) -> Any:
        programs.append(self.name)
        return call(self, *arguments)

    jax.clear_caches()  # what ran before goes past Python
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pxla.ExecuteReplicated, "__call__", counted)
        jax.jit(lambda x: x + 41)(jnp.float32(1))
        seen = len(programs)
        checkpoints.save(1, live, {})
        checkpoints.wait()
    assert seen > 0, "the count does not count"
    assert programs[seen:] == []


def test_a_second_save_waits_for_the_first_and_a_committed_step_is_not_saved_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Checkpoint(), str(tmp_path))
    for step in (1, 2, 2):
        checkpoints.save(step, state(step, mesh(8)), {"round": step})
    checkpoints.wait()
    checkpoints.check()
    fresh = Checkpoints(Checkpoint(), str(tmp_path))
    assert fresh.latest_step() == 2
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    fresh.save(2, state(2, mesh(8)), {"round": "other"})
    fresh.close()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == written
    assert fresh.meta(2) == {"round": 2}
