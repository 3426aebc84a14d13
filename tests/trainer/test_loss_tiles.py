"""The loss in tiles: the values and gradients of all logits at once, in less memory."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.trainer.configs import config, layout, put, ragged_batch
from trainer.aot.hlo import regions
from trainer.aot.lower import compile_step
from trainer.loss import LossSums
from trainer.state import describe_state, initial_state
from trainer.step import make_eval_step, make_train_step

CASES = {
    "sharded": ("mesh.ici={data: 2, fsdp: 2, tensor: 2}",),
    "tied": ("mesh.ici={fsdp: 8}", "model.tie_embeddings=true", "model.head_soft_cap=5", "batch.accumulation=1"),
    "accumulated": ("mesh.ici={fsdp: 4, fsdp_transpose: 1, tensor: 2}", "batch.accumulation=2"),
    "one device": ("mesh.ici={}",),
}
FULL = ("sharded", "tied", "accumulated")


def metrics(*overrides: str, devices: int) -> list[dict[str, float]]:
    """Metrics of three steps."""
    run = config("model.matmul_precision=highest", "loss.z_loss_weight=0.01", *overrides)
    where = layout(run, devices)
    spec = describe_state(run, where)
    state, step = initial_state(run, spec), make_train_step(run, spec, where)
    found: list[dict[str, float]] = []
    for n in range(3):
        state, values = step(state, put(ragged_batch(n), where))
        found.append({name: float(value) for name, value in values.items()})
    return found


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.full) if case in FULL else case for case in CASES])
def test_tiles_change_neither_loss_nor_gradient(case: str) -> None:
    devices = 1 if case == "one device" else 8
    whole, tiled = (metrics(*CASES[case], f"loss.tiles={tiles}", devices=devices) for tiles in (1, 4))
    for expected, found in zip(whole, tiled, strict=True):
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-6), name


def test_logits_are_never_whole_and_the_head_is_gathered_and_its_gradient_summed_once() -> None:
    programs: dict[int, jax.stages.Compiled] = {}
    for tiles in (1, 16):
        run = config("mesh.ici={data: 2, fsdp: 4}", f"loss.tiles={tiles}", "model.vocab_size=4096", "batch.sequence_length=256")
        programs[tiles] = compile_step(run, layout(run)).step
    memory = {tiles: program.memory_analysis() for tiles, program in programs.items()}
    logits = 256 * 4096 * 4  # of one device, float32
    assert memory[1] is not None and memory[16] is not None
    assert memory[1].temp_size_in_bytes - memory[16].temp_size_in_bytes > 0.9 * logits
    loops = [region for region in regions(programs[16].as_text() or "", 8) if "layer" not in region.name and region.name != "entry"]
    assert not loops  # the loops over tiles send nothing


@pytest.mark.full
def test_evaluation_in_tiles_gives_the_same_sums() -> None:
    sums = []
    for tiles in (1, 4):
        run = config("model.matmul_precision=highest", f"loss.tiles={tiles}")
        where = layout(run)
        spec = describe_state(run, where)
        sums.append(make_eval_step(run, spec, where)(initial_state(run, spec), LossSums.zero(), put(ragged_batch(3), where)))
    for expected, found in zip(*map(jax.tree.leaves, sums), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
